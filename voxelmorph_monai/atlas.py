r"""Segment a brain with labelled atlases: register each to it, warp its labels, and let them vote.

At each voxel of the scan, the atlases are weighted by joint label fusion (Wang et al., IEEE TPAMI 2013),

.. math:: w = \frac{M^{-1} 1}{1^T M^{-1} 1}, \quad M_{ab} = \langle |f - m_a| |f - m_b| \rangle^2

where :math:`f` is the scan, :math:`m_a` the warped image of atlas a, and the mean is over the window around the voxel.
An atlas gets less weight the more it differs from the scan, and the more the other atlases differ from the scan at the
same voxels. Negative weights are set to 0. Linear interpolation divides the vote of an atlas among the labels around a
point, so that the sum of all votes for a label is its probability.

:class:`AtlasSegmentation` is the network that a bundle saves and exports. It maps an image ``(B, 1, *spatial)`` to
probabilities ``(B, 1 + num_labels, *spatial)``, both on the grid of the atlases in the space of MNI152.
:mod:`~voxelmorph_monai.atlas_transforms` aligns a scan to that grid, and resamples the labels to the grid of the scan.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from torch import Tensor, nn

from voxelmorph_monai.blocks import linear_weights, warp
from voxelmorph_monai.losses import box_sum
from voxelmorph_monai.networks import VoxelMorph
from voxelmorph_monai.refinement import refine
from voxelmorph_monai.space.template import STANDARD_GRID

__all__ = ["MAX_LABELS", "SLAB_PLANES", "AtlasInferer", "AtlasSegmentation", "joint_weights"]

MAX_LABELS = 255  # labels are stored in one byte per voxel
SLAB_PLANES = 16  # number of planes to process at a time, which limits the memory


def _check_window(window: int) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window} voxels. Give an odd number, so that there is a voxel in the middle.")


def joint_weights(differences: Tensor, window: int) -> Tensor:
    """Weights of joint label fusion ``(B, A, *spatial)`` from the absolute differences of A atlases to the scan.

    The weights are at least 0 and sum to 1. The matrix M in the formula of this module may be singular, so a tenth of
    the mean of its diagonal is added to the diagonal.

    Args:
        differences: absolute differences ``(B, A, *spatial)``; they are taken to be 0 beyond the border.
        window: side of the window in voxels, an odd number.

    Raises:
        ValueError: ``window`` is not an odd number.
    """
    _check_window(window)
    spatial_dims, n = differences.ndim - 2, differences.shape[1]
    padded = F.pad(differences, [window // 2] * (2 * spatial_dims)).split(1, dim=1)
    # Rows of the lower half of M; the elimination below solves the equations of all voxels at once.
    rows: list[list[Tensor]] = []
    mean = torch.zeros_like(differences[:, :1])
    for i in range(n):
        row = [(box_sum(padded[i] * padded[j], window) / float(window**spatial_dims)).square() for j in range(i + 1)]
        mean = mean + row[i] / n
        rows.append(row)
    solution = [torch.ones_like(mean) for _ in range(n)]
    for k in range(n):
        rows[k][k] = rows[k][k] + 0.1 * mean + 1e-8  # if no atlas differs, all get the same weight
    for k in range(n):
        for i in range(k + 1, n):
            factor = rows[i][k] / rows[k][k]
            solution[i] = solution[i] - factor * solution[k]
            for j in range(k + 1, i + 1):
                rows[i][j] = rows[i][j] - factor * rows[j][k]
    for i in range(n - 1, -1, -1):
        for j in range(i + 1, n):
            solution[i] = solution[i] - rows[j][i] * solution[j]
        solution[i] = solution[i] / rows[i][i]
    weights = torch.cat(solution, dim=1).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


class AtlasSegmentation(nn.Module):
    """Network that registers labelled atlases to an aligned scan, and returns the probability of each label.

    Channel 0 of the result is the background; the probabilities of a voxel sum to 1. The images and labels of the
    atlases are buffers, which are saved in the state dict. They are cropped to a common box around the brains, and
    take one byte per voxel.

    Args:
        num_labels: number of labels, which are 1 to ``num_labels``.
        num_atlases: number of atlases.
        size: size of the grid on which scans and atlases are aligned, in voxels.
        start: first voxel of the box in the grid.
        box: size of the box in voxels (default: the whole grid).
        preset: preset of the registration network (:data:`~voxelmorph_monai.networks.PRESETS`).
        window: side in voxels, an odd number, of the window in which the scan and a warped atlas are compared.
    """

    _slab_planes: Final[int] = SLAB_PLANES  # TorchScript cannot read constants of the module

    images: Tensor
    labels: Tensor

    def __init__(
        self,
        num_labels: int,
        num_atlases: int = 1,
        *,
        size: Sequence[int] = STANDARD_GRID.size,
        start: Sequence[int] = (0, 0, 0),
        box: Sequence[int] | None = None,
        preset: str = "wide",
        window: int = 5,
    ) -> None:
        super().__init__()
        box = size if box is None else box
        if not 1 <= num_labels <= MAX_LABELS:
            raise ValueError(f"num_labels is {num_labels}. Use 1 to {MAX_LABELS}.")
        if num_atlases < 1:
            raise ValueError(f"num_atlases is {num_atlases}. At least 1 atlas is needed.")
        ends = [(first, n - first - length) for first, length, n in zip(start, box, size, strict=True)]
        if min(box) < 1 or min(min(end) for end in ends) < 0:
            raise ValueError(
                f"the box of {list(box)} voxels from {list(start)} does not fit into the grid of {list(size)} voxels. "
                "Correct start, box or size."
            )
        _check_window(window)
        self.num_labels = num_labels
        self.num_atlases = num_atlases
        self.size = [int(n) for n in size]
        self.margins = [int(n) for end in ends[::-1] for n in end]
        self.window = window
        self.network = VoxelMorph(preset)
        self.register_buffer("images", torch.zeros(num_atlases, 1, *box, dtype=torch.uint8))
        self.register_buffer("labels", torch.zeros(num_atlases, 1, *box, dtype=torch.uint8))

    def image_of(self, atlas: int) -> Tensor:
        """Image of the atlas with this number (from 0): ``(1, 1, *size)``, float32 in [0, 1]."""
        return F.pad(self.images[atlas : atlas + 1].float() / 255, self.margins)

    def labels_of(self, atlas: int) -> Tensor:
        """Labels of the atlas with this number (from 0): ``(1, 1, *size)``, uint8."""
        return F.pad(self.labels[atlas : atlas + 1], self.margins)

    def displacement(self, image: Tensor, atlas: int) -> Tensor:
        """Displacement ``(B, 3, *size)`` in voxels that warps an atlas to ``image`` ``(B, 1, *size)``."""
        if image.ndim != 5 or image.shape[1] != 1 or list(image.shape[2:]) != self.size:
            raise ValueError(f"image has shape {list(image.shape)}. Give (B, 1, *size), where size is {self.size}.")
        moving = self.image_of(atlas).expand(image.shape[0], -1, -1, -1, -1)
        return self.network(torch.cat([moving, image], dim=1))

    def weights(self, image: Tensor, ddfs: list[Tensor]) -> Tensor:
        """Weight of each warped atlas at each voxel: ``(B, num_atlases, *size)``; the weights of a voxel sum to 1.

        Args:
            image: ``(B, 1, *size)``, aligned, in [0, 1].
            ddfs: the :meth:`displacement` of each atlas, ``(B, 3, *size)`` in voxels.
        """
        if self.num_atlases == 1:
            return torch.ones_like(image)
        differences: list[Tensor] = []
        for atlas in range(self.num_atlases):
            warped = warp(self.image_of(atlas).expand_as(image), ddfs[atlas])
            differences.append((warped - image).abs())
        return joint_weights(torch.cat(differences, dim=1), self.window)

    def vote(self, image: Tensor, ddfs: list[Tensor]) -> Tensor:
        """Probabilities ``(B, 1 + num_labels, *size)``, from a :meth:`displacement` for each atlas.

        Args:
            image: ``(B, 1, *size)``, aligned, in [0, 1].
            ddfs: the :meth:`displacement` of each atlas, ``(B, 3, *size)`` in voxels.
        """
        weights = self.weights(image, ddfs)
        batch = image.shape[0]
        x, y, z = self.size
        votes = weights.new_zeros([batch, self.num_labels + 1, x, y, z])
        for atlas in range(self.num_atlases):
            labels = self.labels_of(atlas).flatten(1).expand(batch, -1)
            for start in range(0, self.size[0], self._slab_planes):
                planes = min(self._slab_planes, self.size[0] - start)
                ddf = ddfs[atlas].narrow(2, start, planes)
                ddf = torch.cat([ddf[:, :1] + float(start), ddf[:, 1:]], dim=1)  # relative to the whole grid
                weight = weights.narrow(1, atlas, 1).narrow(2, start, planes)
                here = votes.narrow(2, start, planes)
                for index, fraction in linear_weights(ddf, self.size):
                    label = labels.gather(1, index.flatten(1)).view_as(index).long()
                    here.scatter_add_(1, label.unsqueeze(1), fraction.unsqueeze(1) * weight)
        return votes

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities ``(B, 1 + num_labels, *size)`` for an aligned ``image`` ``(B, 1, *size)`` in [0, 1]."""
        ddfs = [self.displacement(image, atlas) for atlas in range(self.num_atlases)]
        return self.vote(image, ddfs)


class AtlasInferer(Inferer):
    """Call an :class:`AtlasSegmentation`, and optionally refine the registration of each atlas to the scan.

    Args:
        budget: seconds of refinement for each atlas (:func:`~voxelmorph_monai.refinement.refine`); 0 does not refine.
    """

    def __init__(self, budget: float | str = 0) -> None:
        try:
            self.budget = float(budget)  # MONAI Label sends text
        except ValueError as error:
            raise ValueError(f"budget is '{budget}'. Give a number of seconds.") from error
        if not 0 <= self.budget < float("inf"):
            raise ValueError(f"budget is {budget}. Give a finite number of seconds, 0 or more.")

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: object, **kwargs: object) -> Tensor:
        """Probabilities ``(B, 1 + num_labels, *size)`` for aligned images ``inputs`` ``(B, 1, *size)``."""
        image = inputs.as_subclass(Tensor)
        if self.budget == 0:
            return network(image)
        if not isinstance(network, AtlasSegmentation):
            raise TypeError(
                f"the network is a {type(network).__name__}, but only an AtlasSegmentation can be refined. Set budget "
                "to 0."
            )
        ddfs = []
        for atlas in range(network.num_atlases):
            starts, moving = network.displacement(image, atlas), network.image_of(atlas)
            refined = [
                refine(moving, fixed, ddf=ddf, budget=self.budget).ddf
                for fixed, ddf in zip(image.split(1), starts.split(1), strict=True)
            ]
            ddfs.append(torch.cat(refined))
        return network.vote(image, ddfs)
