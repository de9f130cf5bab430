"""Objective of a refinement: the loss of a pair at a resolution, and its gradient with respect to a step.

A step is a small displacement that is composed with the map; see :mod:`~voxelmorph_monai.refinement`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxelmorph_monai.blocks import compose, jacobian_determinant, warp
from voxelmorph_monai.kernels import loops
from voxelmorph_monai.losses import LabelDiceLoss, LNCCLoss, MINDLoss, MutualInformationLoss
from voxelmorph_monai.metrics import target_registration_error

__all__ = ["SIMILARITIES", "Objective", "Pair", "Similarity", "cut", "double", "halve", "image_force", "times"]

Similarity = Callable[[Tensor, Tensor], Tensor]

SIMILARITIES: dict[str, Similarity] = {
    "lncc": LNCCLoss(window=9),  # for images of the same contrast
    "mi": MutualInformationLoss(),  # for images of different contrast
    "mind": MINDLoss(),  # for images of different contrast; compares local structure
}


def cut(image: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Voxels ``start`` to ``start + size``, exclusive, of ``image`` ``(B, C, *spatial)``: ``(B, C, *size)``.

    Beyond its grid the image continues with its border value; ``start`` may be negative.
    """
    for d, (first, n) in enumerate(zip(start, size, strict=True)):
        index = torch.arange(first, first + n, device=image.device).clamp(0, image.shape[d + 2] - 1)
        image = image.index_select(d + 2, index)
    return image


def halve(image: Tensor) -> Tensor:
    """Every other voxel of ``image`` ``(B, C, *spatial)`` after smoothing with [1, 2, 1] / 4.

    ``2 n - 1`` voxels along an axis become ``n``, and the corner voxels coincide. Values stay the same, so that a
    displacement must be divided by 2 to be in voxels of the new grid.
    """
    for axis in range(2, image.ndim):
        n = image.shape[axis] // 2
        index = torch.arange(image.shape[axis], device=image.device)
        even, odd = image.index_select(axis, index[::2]), image.index_select(axis, index[1::2])
        half = even * 0.5
        half.narrow(axis, 0, n).add_(odd, alpha=0.25)
        half.narrow(axis, 1, n).add_(odd, alpha=0.25)
        for end in (0, n):  # at the border a neighbour is missing
            half.narrow(axis, end, 1).div_(0.75)
        image = half
    return image


def double(ddf: Tensor) -> Tensor:
    """``blocks.resize`` of ``ddf`` ``(B, D, *spatial)`` in voxels from ``n`` to ``2 n - 1`` along each axis."""
    ddf = ddf * 2
    for axis in range(2, ddf.ndim):
        n = ddf.shape[axis]
        between = (ddf.narrow(axis, 0, n - 1) + ddf.narrow(axis, 1, n - 1)) * 0.5
        pairs = torch.stack([ddf.narrow(axis, 0, n - 1), between], dim=axis + 1).flatten(axis, axis + 1)
        ddf = torch.cat([pairs, ddf.narrow(axis, n - 1, 1)], dim=axis)
    return ddf


def _whole(mask: Tensor) -> Tensor:
    """Mask of the voxels where an interpolated mask is 1: elsewhere, the image also contains values from outside."""
    return (mask > 0.999).float()


def times(function: Callable[[Tensor], Tensor], number: int, tensor: Tensor) -> Tensor:
    """Apply ``function`` to a tensor ``number`` times."""
    for _ in range(number):
        tensor = function(tensor)
    return tensor


def image_force(image: Tensor, slope: Tensor) -> Tensor:
    """Gradient of a loss with respect to a step, from its gradient with respect to the image that the step moves.

    This is the spatial gradient of the image, by central differences, times ``slope``, summed over channels.

    Args:
        image: image ``(1, C, *spatial)``.
        slope: gradient of the loss with respect to ``image``, of the same shape.

    Returns:
        ``(1, D, *spatial)``; 0 at the border.
    """
    compiled = loops(image, slope)
    if compiled is not None:
        found: Tensor = compiled.force(image, slope)
        return found
    found = image.new_zeros(1, image.ndim - 2, *image.shape[2:])
    for d in range(image.ndim - 2):
        n = image.shape[d + 2] - 2
        rise = image.narrow(d + 2, 2, n) - image.narrow(d + 2, 0, n)
        found[:, d].narrow(d + 1, 1, n).copy_((rise * slope.narrow(d + 2, 1, n)).sum(1).mul_(0.5))
    return found


class Pair(NamedTuple):
    """What is aligned, all on one grid; of masks, labels and points the first belongs to ``moving``.

    Attributes:
        moving: image ``(1, C, *spatial)``.
        fixed: image of the same shape.
        masks: 1 where an image counts and 0 elsewhere, ``(1, 1, *spatial)``; None: everything counts.
        labels: integer label maps ``(1, 1, *spatial)``.
        points: landmarks ``(1, N, D)`` in voxels of the images at full resolution.
        scale: voxels at full resolution per voxel of the grid, along each axis.
    """

    moving: Tensor
    fixed: Tensor
    masks: tuple[Tensor, Tensor] | None
    labels: tuple[Tensor, Tensor] | None
    points: tuple[Tensor, Tensor] | None
    scale: int = 1

    def cut(self, start: list[int], size: list[int]) -> "Pair":
        """Crop the pair to a box of ``size`` voxels from ``start``."""
        shift = torch.tensor(start, device=self.fixed.device)
        return self._replace(
            moving=cut(self.moving, start, size),
            fixed=cut(self.fixed, start, size),
            masks=None if self.masks is None else (cut(self.masks[0], start, size), cut(self.masks[1], start, size)),
            labels=None
            if self.labels is None
            else (cut(self.labels[0], start, size), cut(self.labels[1], start, size)),
            points=None if self.points is None else (self.points[0] - shift, self.points[1] - shift),
        )

    def exchanged(self) -> "Pair":
        """Exchange moving and fixed."""
        masks, labels, points = (each and each[::-1] for each in (self.masks, self.labels, self.points))
        return self._replace(moving=self.fixed, fixed=self.moving, masks=masks, labels=labels, points=points)

    def halved(self) -> "Pair":
        """Halve the resolution."""
        every_other: tuple[Any, ...] = (..., *[slice(None, None, 2)] * (self.moving.ndim - 2))
        return self._replace(
            moving=halve(self.moving),
            fixed=halve(self.fixed),
            masks=None if self.masks is None else (_whole(halve(self.masks[0])), _whole(halve(self.masks[1]))),
            labels=None if self.labels is None else (self.labels[0][every_other], self.labels[1][every_other]),
            scale=2 * self.scale,
        )


class Objective(NamedTuple):
    """The loss that is minimised, and how steps change it.

    Attributes:
        similarity: loss of two images, called with ``(warped, fixed)``.
        bidirectional: compare ``moving`` with the warped ``fixed`` too, and average the two losses.
        label_weight: factor of minus the soft Dice of the labels.
        points_weight: factor of the mean squared distance of the points, in 1 / voxels^2 at full resolution.
    """

    similarity: Similarity
    bidirectional: bool
    label_weight: float
    points_weight: float

    def _slope(self, warped: Tensor, fixed: Tensor, mask: Tensor | None) -> tuple[float, Tensor]:
        """Similarity loss of two images, and its gradient with respect to the first."""
        leaf = warped.detach().requires_grad_()
        with torch.enable_grad():
            masked = (leaf, fixed) if mask is None else (leaf * mask, fixed * mask)
            loss = self.similarity(*masked)
            (slope,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), slope

    def _images(self, pair: Pair, ddf: Tensor, inverse: Tensor | None) -> tuple[float, Tensor]:
        """Similarity loss and its gradient with respect to a step; ``ddf`` and ``inverse`` are on the images' grid."""
        warped = warp(pair.moving, ddf)
        mask = None if pair.masks is None else _whole(warp(pair.masks[0], ddf)) * pair.masks[1]
        loss, slope = self._slope(warped, pair.fixed, mask)
        force = image_force(warped, slope)
        if inverse is None:
            return loss, force
        # A step moves the warped fixed image in the opposite direction, at the points to which the map takes it.
        mask = None if pair.masks is None else pair.masks[0] * _whole(warp(pair.masks[1], inverse))
        back, slope = self._slope(warp(pair.fixed, inverse), pair.moving, mask)
        force -= image_force(pair.fixed, warp(slope, ddf) * jacobian_determinant(ddf).clamp_min_(0))
        return (loss + back) / 2, force / 2

    def _others(self, pair: Pair, ddf: Tensor, doublings: int) -> Tensor:
        """Weighted losses of labels and points, a scalar; the grid of ``ddf`` is ``doublings`` times halved."""
        total = ddf.new_zeros(())
        if pair.labels is not None:
            dice = LabelDiceLoss(int(max(label.max() for label in pair.labels)))
            total = total + self.label_weight * dice(*pair.labels, times(double, doublings, ddf))
        if pair.points is not None:
            side = pair.scale << doublings
            moving, fixed = (points / side for points in pair.points)
            error = target_registration_error(moving, fixed, ddf, spacing=side)
            total = total + self.points_weight * error.square().mean()
        return total

    def force(self, pair: Pair, ddf: Tensor, inverse: Tensor | None, doublings: int) -> tuple[float, Tensor]:
        r"""Loss of :math:`\phi` and its gradient for a step :math:`\delta` in :math:`\phi \circ (id + \delta)`.

        Args:
            pair: what is aligned.
            ddf: displacement of :math:`\phi` in voxels of its grid, ``(1, D, *coarse)``.
            inverse: displacement of the inverse map on the same grid, if the loss is bidirectional.
            doublings: how many times the grid of ``ddf`` must be doubled to be that of ``pair``.

        Returns:
            The loss, and its gradient ``(1, D, *coarse)`` per voxel of the grid of ``ddf``.
        """
        finer = [None if field is None else times(double, doublings, field) for field in (ddf, inverse)]
        assert finer[0] is not None
        loss, force = self._images(pair, finer[0], finer[1])
        # A voxel of the field moves several voxels of the image, and is a larger unit for the step.
        force = times(halve, doublings, force) * 2 ** (doublings * (1 + force.shape[1]))
        if pair.labels is not None or pair.points is not None:
            step = torch.zeros_like(ddf).requires_grad_()
            with torch.enable_grad():
                others = self._others(pair, compose(ddf, step), doublings)
                (slope,) = torch.autograd.grad(others, step)
            loss, force = loss + float(others.detach()), force + slope
        return loss, force
