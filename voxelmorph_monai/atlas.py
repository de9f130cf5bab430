r"""Segment a brain by labelled ones: register each to it, carry the labels along, let them vote.

At each voxel of the scan the atlases have the weights of joint label fusion (Wang et al., IEEE TPAMI 2013),

.. math:: w = \frac{M^{-1} 1}{1^T M^{-1} 1}, \quad M_{ab} = \langle |f - m_a| |f - m_b| \rangle^2

where :math:`f` is the scan, :math:`m_a` the warped image of atlas a and the mean is over the window around the voxel.
An atlas counts the less, the more it errs there, and the more it errs where others do. Negative weights are set to 0.
Between voxels of the atlas its vote is divided as linear interpolation divides it, so that the votes of a label are its
probability.

:class:`AtlasSegmentation` is what a bundle saves and exports: one tensor in, ``(B, 1, *spatial)``, one tensor out,
``(B, 1 + num_labels, *spatial)``, both on the grid of the atlases in the space of MNI152. :class:`LoadAlignedScand`
brings a scan there as it is, :class:`RestoreLabelsd` brings labels back to its grid.
"""

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform, SaveImaged, SpatialResample, Transform
from torch import Tensor, nn

from voxelmorph_monai.affine import register_affine
from voxelmorph_monai.blocks import corners, warp
from voxelmorph_monai.files import atomic_folder, require_replaceable
from voxelmorph_monai.losses import box_sum
from voxelmorph_monai.networks import VoxelMorph
from voxelmorph_monai.preparation import Grid, check_brain, grid_affine, mni152, resample_intensities, rescale
from voxelmorph_monai.refinement import refine
from voxelmorph_monai.spaces import Affine, read_image, save_image_like, transform_affine

__all__ = [
    "MAX_LABELS",
    "AtlasInferer",
    "AtlasSegmentation",
    "LoadAlignedScand",
    "RestoreLabelsd",
    "SaveSegmentationd",
    "aligned",
    "joint_weights",
]

MAX_LABELS = 255  # they are kept in one byte a voxel

_SLAB_PLANES = 16  # whose votes are counted, or whose labels are chosen, at a time

Data = dict[Hashable, object]


def joint_weights(differences: Tensor, window: int) -> Tensor:
    """Weights of joint label fusion ``(B, A, *spatial)`` from the absolute differences of A atlases to the scan.

    They are at least 0 and sum to 1. Windows have ``window`` voxels a side, an odd number, and reach over the border,
    where there is no difference. A tenth of the mean of the diagonal is added to it, as M may have no inverse.
    """
    spatial_dims, n = differences.ndim - 2, differences.shape[1]
    padded = F.pad(differences, [window // 2] * (2 * spatial_dims)).split(1, dim=1)
    # The lower half of M, row by row, is eliminated for all voxels at once.
    rows: list[list[Tensor]] = []
    mean = torch.zeros_like(differences[:, :1])
    for i in range(n):
        row = [(box_sum(padded[i] * padded[j], window) / float(window**spatial_dims)).square() for j in range(i + 1)]
        mean = mean + row[i] / n
        rows.append(row)
    found = [torch.ones_like(mean) for _ in range(n)]
    for k in range(n):
        rows[k][k] = rows[k][k] + 0.1 * mean + 1e-8  # where nothing differs all count alike
    for k in range(n):
        for i in range(k + 1, n):
            share = rows[i][k] / rows[k][k]
            found[i] = found[i] - share * found[k]
            for j in range(k + 1, i + 1):
                rows[i][j] = rows[i][j] - share * rows[j][k]
    for i in range(n - 1, -1, -1):
        for j in range(i + 1, n):
            found[i] = found[i] - rows[j][i] * found[j]
        found[i] = found[i] / rows[i][i]
    weights = torch.cat(found, dim=1).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


class AtlasSegmentation(nn.Module):
    """Probability of each label at each voxel of an aligned scan, by labelled atlases that the network registers to it.

    Channel 0 is the background; the probabilities of a voxel sum to 1. Images and labels of the atlases are buffers, so
    that they are part of the state dict: cut to the box that shows something, one byte a voxel.

    Args:
        num_labels: labels are 1 to this.
        num_atlases: number of atlases.
        size: of the grid that scans and atlases are aligned on.
        start: first voxel of the box that the atlases fill in the grid.
        box: size of the box.
        preset: of the network (:data:`~voxelmorph_monai.networks.PRESETS`).
        window: side in voxels, odd, of the window in which the scan and a warped atlas are compared.
    """

    _slab_planes: Final[int] = _SLAB_PLANES  # TorchScript sees no constants of the module

    images: Tensor
    labels: Tensor

    def __init__(
        self,
        num_labels: int,
        num_atlases: int = 1,
        *,
        size: Sequence[int] = Grid().size,
        start: Sequence[int] = (0, 0, 0),
        box: Sequence[int] | None = None,
        preset: str = "wide",
        window: int = 5,
    ) -> None:
        super().__init__()
        box = size if box is None else box
        if not 1 <= num_labels <= MAX_LABELS or num_atlases < 1:
            raise ValueError(
                f"there must be 1 to {MAX_LABELS} labels and at least 1 atlas, got {num_labels} and {num_atlases}."
            )
        ends = [(first, n - first - length) for first, length, n in zip(start, box, size, strict=True)]
        if min(box) < 1 or min(min(end) for end in ends) < 0:
            raise ValueError(f"box must lie in a grid of {list(size)}, got {list(box)} from {list(start)}.")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be an odd number of voxels, got {window}.")
        self.num_labels = num_labels
        self.num_atlases = num_atlases
        self.size = [int(n) for n in size]
        self.margins = [int(n) for end in ends[::-1] for n in end]
        self.window = window
        self.network = VoxelMorph(preset)
        self.register_buffer("images", torch.zeros(num_atlases, 1, *box, dtype=torch.uint8))
        self.register_buffer("labels", torch.zeros(num_atlases, 1, *box, dtype=torch.uint8))

    def image_of(self, atlas: int) -> Tensor:
        """Image of an atlas ``(1, 1, *size)``, float32 in [0, 1]."""
        return F.pad(self.images[atlas : atlas + 1].float() / 255, self.margins)

    def labels_of(self, atlas: int) -> Tensor:
        """Labels of an atlas ``(1, 1, *size)``, uint8."""
        return F.pad(self.labels[atlas : atlas + 1], self.margins)

    def displacement(self, image: Tensor, atlas: int) -> Tensor:
        """Displacement ``(B, 3, *size)`` that warps an atlas to ``image`` ``(B, 1, *size)``, as the network sees it."""
        if image.ndim != 5 or image.shape[1] != 1 or list(image.shape[2:]) != self.size:
            raise ValueError(f"image must be (B, 1) and a grid of {self.size}, got {list(image.shape)}.")
        moving = self.image_of(atlas).expand(image.shape[0], -1, -1, -1, -1)
        return self.network(torch.cat([moving, image], dim=1))

    def weights(self, image: Tensor, ddfs: list[Tensor]) -> Tensor:
        """Weight of each atlas, warped along its displacement, at each voxel: ``(B, A, *size)``; they sum to 1."""
        if self.num_atlases == 1:
            return torch.ones_like(image)
        differences: list[Tensor] = []
        for atlas in range(self.num_atlases):
            warped = warp(self.image_of(atlas).expand_as(image), ddfs[atlas])
            differences.append((warped - image).abs())
        return joint_weights(torch.cat(differences, dim=1), self.window)

    def vote(self, image: Tensor, ddfs: list[Tensor]) -> Tensor:
        """Probabilities ``(B, 1 + num_labels, *size)`` from the displacements of all atlases to ``image``."""
        weights = self.weights(image, ddfs)
        batch = image.shape[0]
        x, y, z = self.size
        votes = weights.new_zeros([batch, self.num_labels + 1, x, y, z])
        for atlas in range(self.num_atlases):
            labels = self.labels_of(atlas).flatten(1).expand(batch, -1)
            for start in range(0, self.size[0], self._slab_planes):
                planes = min(self._slab_planes, self.size[0] - start)
                ddf = ddfs[atlas].narrow(2, start, planes)
                ddf = torch.cat([ddf[:, :1] + float(start), ddf[:, 1:]], dim=1)  # points count in the whole grid
                weight = weights.narrow(1, atlas, 1).narrow(2, start, planes)
                here = votes.narrow(2, start, planes)
                for index, share in corners(ddf, self.size):
                    label = labels.gather(1, index.flatten(1)).view_as(index).long()
                    here.scatter_add_(1, label.unsqueeze(1), share.unsqueeze(1) * weight)
        return votes

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities ``(B, 1 + num_labels, *size)`` of ``image`` ``(B, 1, *size)``, aligned, in [0, 1]."""
        ddfs = [self.displacement(image, atlas) for atlas in range(self.num_atlases)]
        return self.vote(image, ddfs)


class AtlasInferer(Inferer):
    """Call an :class:`AtlasSegmentation`, and refine each registration on the scan itself if that is asked for.

    Args:
        budget: seconds to refine in, for each atlas (:func:`~voxelmorph_monai.refinement.refine`); 0: not at all.
    """

    def __init__(self, budget: float | str = 0) -> None:
        try:
            self.budget = float(budget)  # the clients of MONAI Label send text
        except ValueError as error:
            raise ValueError(f"budget must be seconds, got '{budget}'.") from error
        if not 0 <= self.budget < float("inf"):
            raise ValueError(f"budget must be seconds >= 0, got {budget}.")

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: object, **kwargs: object) -> Tensor:
        """Give probabilities ``(B, 1 + num_labels, *size)`` of ``inputs`` ``(B, 1, *size)``."""
        image = inputs.as_subclass(Tensor)
        if self.budget == 0:
            return network(image)
        if not isinstance(network, AtlasSegmentation):
            raise TypeError(f"only an AtlasSegmentation can be refined (budget > 0), got {type(network).__name__}.")
        ddfs = []
        for atlas in range(network.num_atlases):
            starts, moving = network.displacement(image, atlas), network.image_of(atlas)
            refined = [
                refine(moving, fixed, ddf=ddf, budget=self.budget).ddf
                for fixed, ddf in zip(image.split(1), starts.split(1), strict=True)
            ]
            ddfs.append(torch.cat(refined))
        return network.vote(image, ddfs)


def aligned(scan: tuple[np.ndarray, Affine], grid: Grid) -> tuple[np.ndarray, Affine]:
    """Sample a skull-stripped scan ``(array, affine)`` on the grid, aligned to MNI152 as ``vxm prepare`` does.

    Returns:
        Intensities in [0, 1] on the grid, and the affine that puts its voxels into the scan (RAS, mm).
    """
    image = rescale(scan[0]), scan[1]
    target = grid_affine(grid)
    mapping = transform_affine(register_affine(image, mni152()))
    return resample_intensities(image, grid.size, target, mapping), mapping @ target


def _refusal(error: Exception) -> Exception:
    """The error as a web server passes it on: in MONAI Label all others reach the client as "Internal Server Error"."""
    fastapi = sys.modules.get("fastapi") if "monailabel" in sys.modules else None
    return error if fastapi is None else fastapi.HTTPException(422, str(error))


class LoadAlignedScand(MapTransform):
    """Load a skull-stripped T1 scan and align it to MNI152: a MetaTensor ``(1, *size)``, float32 in [0, 1].

    Its affine puts the voxels of the grid into the scan; the scan's own one and its shape are the meta entries
    ``original_affine`` and ``spatial_shape``, as MONAI's loaders have them. Formats and what is refused: see
    :func:`~voxelmorph_monai.spaces.open_volume`.

    Args:
        keys: items that hold paths.
        size: of the grid.
        spacing: side of its voxels in mm.
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int] = Grid().size, spacing: float = 1.0) -> None:
        super().__init__(keys)
        self.grid = Grid(tuple(size), spacing)

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Replace the paths in ``data`` by aligned scans."""
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            path = str(loaded[key])
            try:
                scan = read_image(path)
                check_brain(scan, path)
                array, affine = aligned(scan, self.grid)
            except (ValueError, OSError) as error:
                raise _refusal(error) from error
            meta = {
                "filename_or_obj": path,
                "original_affine": scan[1],
                "spatial_shape": np.array(scan[0].shape),
            }
            loaded[key] = MetaTensor(torch.from_numpy(array)[None], affine=torch.as_tensor(affine), meta=meta)
        return loaded


class RestoreLabelsd(Transform):
    """Turn the probabilities ``pred`` into labels on the grid of the scan, and add their ``probability``.

    The probabilities are sampled linearly at the voxels of the scan, where the largest one wins; beyond the grid there
    is background. ``pred`` becomes ``(1, X, Y, Z)``, uint8; ``probability`` is that of the label, float32.

    Args:
        ref_image: item of :class:`LoadAlignedScand`, whose header says where the voxels of the scan are.
    """

    def __init__(self, ref_image: str = "image") -> None:
        self.ref_image = ref_image

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Replace ``pred`` in ``data``."""
        scan, pred = data[self.ref_image], data["pred"]
        assert isinstance(scan, MetaTensor)
        assert isinstance(pred, Tensor)
        affine = torch.as_tensor(scan.meta["original_affine"], dtype=torch.float64)
        shape = [int(n) for n in scan.meta["spatial_shape"]]
        source = MetaTensor(pred.as_subclass(Tensor), affine=scan.affine)
        resample = SpatialResample(padding_mode="zeros", align_corners=True, dtype="float32")
        labels, probability = [], []
        for start in range(0, shape[0], _SLAB_PLANES):
            here = affine.clone()
            here[:3, 3] += start * affine[:3, 0]
            size = [min(_SLAB_PLANES, shape[0] - start), *shape[1:]]
            part = resample(source, here, size).as_subclass(Tensor)
            part[0] += 1 - part.sum(0)  # what lies beyond the grid is background
            most, label = part.max(0)
            labels.append(label.to(torch.uint8))
            probability.append(most.clamp_max(1))  # rounding alone goes beyond
        found = {"pred": torch.cat(labels)[None], "probability": torch.cat(probability)[None]}
        return dict(data) | {key: MetaTensor(value, affine=affine) for key, value in found.items()}


class SaveSegmentationd(SaveImaged):
    """Write ``segmentation.nii.gz`` and ``probability.nii.gz``, with the header of the scan, into a new folder.

    A ``SaveImaged`` by name alone: by that MONAI Label knows what it has to leave out.

    Args:
        output_dir: the folder; it appears whole or not at all.
        overwrite: replace the folder of an earlier segmentation; else it is an error.
    """

    FILES = ("segmentation.nii.gz", "probability.nii.gz")

    def __init__(self, output_dir: str | Path, overwrite: bool = False) -> None:
        Transform.__init__(self)
        self.output_dir = Path(output_dir)
        self.overwrite = overwrite

    def check(self) -> None:
        """Raise FileExistsError or ValueError if the folder must not be written; a bundle asks before it works.

        It is not the constructor that asks, as MONAI Label calls that one, and writes nothing.
        """
        require_replaceable(self.output_dir, self.overwrite, "a segmentation", self.FILES)

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Write the files; ``data`` stays as it is."""
        self.check()
        scan = data["image"]
        assert isinstance(scan, MetaTensor)
        like = str(scan.meta["filename_or_obj"])
        with atomic_folder(self.output_dir) as folder:
            for name, key in zip(self.FILES, ("pred", "probability"), strict=True):
                array = data[key]
                assert isinstance(array, Tensor)
                save_image_like(folder / name, array[0].as_subclass(Tensor).cpu().numpy(), like)
        return dict(data)
