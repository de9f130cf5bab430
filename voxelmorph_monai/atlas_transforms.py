"""MONAI transforms for an atlas network: align a scan to the atlases, resample its labels back, and save them."""

import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SaveImaged, SpatialResample, Transform
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.atlas import SLAB_PLANES
from voxelmorph_monai.io.atomic import atomic_folder, require_replaceable
from voxelmorph_monai.space.alignment import align
from voxelmorph_monai.space.resampling import resample_intensities, rescale
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import STANDARD_GRID, WorkingGrid, check_brain, check_in_grid, mni152

__all__ = ["LoadAlignedScand", "RestoreLabelsd", "SaveSegmentationd", "aligned", "refusal"]

Data = dict[Hashable, object]


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


def refusal(error: Exception) -> Exception:
    """Convert ``error`` so that a client of MONAI Label sees its message; elsewhere return it unchanged.

    MONAI Label reports only FastAPI's exceptions, and all others as "Internal Server Error".
    """
    fastapi = sys.modules.get("fastapi") if "monailabel" in sys.modules else None
    return error if fastapi is None else fastapi.HTTPException(422, str(error))


class LoadAlignedScand(MapTransform):
    """Load a skull-stripped T1-weighted scan, and resample it on a grid aligned to MNI152.

    The result is a MetaTensor ``(1, *size)``, float32 in [0, 1], whose affine maps voxels of the grid to positions in
    the scan. The meta entries ``original_affine`` and ``spatial_shape`` hold the affine and the shape of the scan, as
    with MONAI's loaders. For formats and errors see :func:`~voxelmorph_monai.io.images.open_volume`.

    Args:
        keys: items that hold paths.
        size: size of the grid in voxels.
        spacing: voxel size of the grid in mm.
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int] = STANDARD_GRID.size, spacing: float = 1.0) -> None:
        super().__init__(keys)
        self.grid = WorkingGrid(tuple(size), spacing)

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Replace the paths in ``data`` by aligned scans."""
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            path = str(loaded[key])
            try:
                scan = Scan.read(path)
                check_brain(scan)
                array, affine = aligned(scan, self.grid)
            except (ValueError, OSError) as error:
                raise refusal(error) from error
            meta = {
                "filename_or_obj": path,
                "original_affine": scan.affine,
                "spatial_shape": np.array(scan.shape),
            }
            loaded[key] = MetaTensor(torch.from_numpy(array)[None], affine=torch.as_tensor(affine), meta=meta)
        return loaded


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
        scan, pred = data[self.ref_image], data["pred"]
        assert isinstance(scan, MetaTensor)
        assert isinstance(pred, Tensor)
        affine = torch.as_tensor(scan.meta["original_affine"], dtype=torch.float64)
        shape = [int(n) for n in scan.meta["spatial_shape"]]
        source = MetaTensor(pred.as_subclass(Tensor), affine=scan.affine)
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


class SaveSegmentationd(SaveImaged):
    """Write ``segmentation.nii.gz`` and ``probability.nii.gz``, with the header of the scan, into a new folder.

    It inherits from ``SaveImaged`` only because MONAI Label skips transforms of this type.

    Args:
        output_dir: folder to write; if writing fails, nothing is left of it.
        overwrite: replace the folder of an earlier segmentation; otherwise an existing folder is an error.
    """

    FILES = ("segmentation.nii.gz", "probability.nii.gz")

    def __init__(self, output_dir: str | Path, overwrite: bool = False) -> None:
        Transform.__init__(self)
        self.output_dir = Path(output_dir)
        self.overwrite = overwrite

    def check(self) -> None:
        """Raise FileExistsError or ValueError if the folder must not be written; a bundle calls this at its start.

        The constructor does not check the folder, because MONAI Label creates this transform without using it.
        """
        require_replaceable(self.output_dir, self.overwrite, "a segmentation", self.FILES)

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
