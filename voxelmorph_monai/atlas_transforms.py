"""MONAI transforms for an atlas network: align a scan to the atlases, resample its labels back, and save them."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import SpatialResample, Transform
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.atlas import SLAB_PLANES
from voxelmorph_monai.io.atomic import atomic_folder
from voxelmorph_monai.segmentation_transforms import Data, LoadScand, SaveFolderd, prediction_of
from voxelmorph_monai.space.alignment import align
from voxelmorph_monai.space.resampling import resample_intensities, rescale
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import STANDARD_GRID, WorkingGrid, check_brain, check_in_grid, mni152

__all__ = ["LoadAlignedScand", "RestoreLabelsd", "SaveSegmentationd", "aligned"]


def aligned(scan: Scan, grid: WorkingGrid) -> tuple[NDArray[np.float32], Affine]:
    """Align a skull-stripped scan to MNI152 like ``vxm prepare``, and resample it on a grid.

    Args:
        scan: the scan.
        grid: grid around MNI152.

    Returns:
        Intensities in [0, 1], ``grid.size``, and the affine from voxels of the grid to positions in the scan (RAS, mm).
    """
    image, target = rescale(scan), grid.around()
    mapping = align(image, mni152())
    check_in_grid(image, mapping, target)
    return resample_intensities(image, target, mapping).array, mapping @ target.affine


class LoadAlignedScand(LoadScand):
    """Load a skull-stripped T1-weighted scan, and resample it on a grid aligned to MNI152.

    Args:
        keys: items that hold paths.
        size: size of the grid in voxels.
        spacing: voxel size of the grid in mm.
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int] = STANDARD_GRID.size, spacing: float = 1.0) -> None:
        super().__init__(keys)
        self.grid = WorkingGrid(tuple(size), spacing)

    def resampled(self, scan: Scan) -> tuple[Tensor, Affine]:
        """A scan on the grid, ``(1, *size)``, and the affine from voxels of the grid to positions in the scan."""
        check_brain(scan)
        array, affine = aligned(scan, self.grid)
        return torch.from_numpy(array)[None], affine


class RestoreLabelsd(Transform):
    """Convert the probabilities ``pred`` to labels on the grid of the scan, and add ``probability``.

    Each voxel of the scan gets the label with the largest probability, by linear interpolation; voxels outside the grid
    of the atlases are background. ``pred`` becomes ``(1, X, Y, Z)``, uint8. ``probability`` is the probability of the
    label of each voxel, of the same shape, float32.

    Args:
        ref_image: item of :class:`LoadAlignedScand`, whose header has the grid of the scan.
    """

    def __init__(self, ref_image: str = "image") -> None:
        self.ref_image = ref_image

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Replace ``pred`` in ``data``, and add ``probability``."""
        pred, view, grid = prediction_of(data, self.ref_image)
        affine, shape = torch.as_tensor(grid.affine), grid.size
        source = MetaTensor(pred, affine=torch.as_tensor(view.affine))
        resample = SpatialResample(padding_mode="zeros", align_corners=True, dtype="float32")
        labels, probability = [], []
        for start in range(0, shape[0], SLAB_PLANES):
            here = affine.clone()
            here[:3, 3] += start * affine[:3, 0]
            size = [min(SLAB_PLANES, shape[0] - start), *shape[1:]]
            part = resample(source, here, size).as_subclass(Tensor)
            part[0] += 1 - part.sum(0)  # outside the grid everything is background
            most, label = part.max(0)
            labels.append(label.to(torch.uint8))
            probability.append(most.clamp_max(1))  # rounding errors can exceed 1
        restored = {"pred": torch.cat(labels)[None], "probability": torch.cat(probability)[None]}
        return dict(data) | {key: MetaTensor(value, affine=affine) for key, value in restored.items()}


class SaveSegmentationd(SaveFolderd):
    """Write ``segmentation.nii.gz`` and ``probability.nii.gz``, with the header of the scan, into a new folder.

    Args:
        output_dir: folder to write; if writing fails, nothing is left of it.
        overwrite: replace the folder of an earlier segmentation; otherwise an existing folder is an error.
    """

    FILES = ("segmentation.nii.gz", "probability.nii.gz")

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Write the files; ``data`` is returned unchanged."""
        self.check()
        scan = data["image"]
        assert isinstance(scan, MetaTensor)
        like = Scan.read(str(scan.meta["filename_or_obj"]))
        with atomic_folder(self.output_dir) as folder:
            for name, key in zip(self.FILES, ("pred", "probability"), strict=True):
                array = data[key]
                assert isinstance(array, Tensor)
                like.like(array[0].as_subclass(Tensor).cpu().numpy()).save(folder / name)
        return dict(data)
