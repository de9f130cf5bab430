r"""Steps of a refinement: where each point of a map should go, and what keeps the map smooth.

The equations are those of :mod:`~voxelmorph_monai.refinement`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from voxelmorph_monai.blocks import jacobian_determinant, smooth_axes
from voxelmorph_monai.kernels import loops
from voxelmorph_monai.objective import image_force

__all__ = ["TIGHT", "Direction", "Regularity", "squares"]

_STEP = 0.5  # about how far a step moves a point, in voxels of the field
_VOLUME = 2.0  # how much more the change of volume is held down than what the Gaussian smooths away
_STABLE = 0.5  # largest step of the volume term, relative to its curvature: with 2 / 3 it would oscillate in 3-D
_FLOOR = 1.0  # added to each point's gradient length, in mean lengths (Adam's epsilon): no force, no motion
_MOMENTA = 0.9, 0.99  # weight of the past in the means of the gradient and of its square
TIGHT = 0.1  # a voxel that keeps less than this fraction of its volume is smoothed like a fold


def squares(field: Tensor) -> Tensor:
    """Squared length of the vectors of ``field`` ``(1, D, *spatial)``: ``(1, 1, *spatial)``.

    It takes a fifth of the time of torch's norm or sum along an axis.
    """
    first, *others = field.split(1, dim=1)
    total = first.square()
    for component in others:
        total.addcmul_(component, component)
    return total


def _smooth(field: Tensor, sigmas: Sequence[float]) -> Tensor:
    """``blocks.smooth_axes``, in a third of its time where it is compiled."""
    compiled = loops(field)
    if compiled is None:
        return smooth_axes(field, list(sigmas))
    passes = [math.ceil(2 * sigma**2) for sigma in sigmas]
    weights = [sigma**2 / (2 * max(n, 1)) for sigma, n in zip(sigmas, passes, strict=True)]
    found: Tensor = compiled.smooth(field, passes, weights)
    return found


def _towards_volume(ddf: Tensor) -> Tensor:
    r"""Steepest descent of :math:`\frac{1}{2} \int \log^2 \det \nabla \phi` by a step: ``(1, D, *spatial)``.

    A step changes the logarithm by its own divergence, so that it is the gradient of the logarithm.
    """
    compiled = loops(ddf)
    if compiled is None:
        log = jacobian_determinant(ddf).clamp_min_(TIGHT / 2).log_()
    else:
        log = compiled.log_volumes(ddf, TIGHT / 2)
    return image_force(log, torch.ones_like(log))


class Direction:
    """Where each point should go: the mean of the gradients, divided by their root mean square length."""

    def __init__(self, like: Tensor) -> None:
        self.mean = torch.zeros_like(like)
        self.square = torch.zeros_like(like[:, :1])
        self.steps = 0

    def __call__(self, gradient: Tensor) -> Tensor:
        """Take in the ``gradient`` ``(1, D, *spatial)``; the result has its shape, and vectors about 1 long at most."""
        (first, second), self.steps = _MOMENTA, self.steps + 1
        self.mean.lerp_(gradient, 1 - first)
        self.square.lerp_(squares(gradient), 1 - second)
        length = (self.square / (1 - second**self.steps)).sqrt_()
        floor = length.mean() * _FLOOR + torch.finfo(length.dtype).tiny
        return self.mean / ((first**self.steps - 1) * (length + floor))


class Regularity(NamedTuple):
    r"""What a step costs on one grid, whose voxels are :math:`v` mm wide on the (geometric) average.

    A step moves a point by :math:`h = v / 2` mm at most. With smoothness :math:`s` the field is smoothed by a Gaussian
    of variance :math:`s h` mm^2, and moved :math:`s h` mm^2 times the gradient of the logarithmic volume.

    Attributes:
        ratios: width of a voxel along each axis, in :math:`v`.
        sigmas: of the Gaussian that smooths the field, in voxels along each axis.
        volume: factor of the gradient of the logarithmic volume, in :math:`v^2`.
        step_sigma: of the Gaussian that smooths each step, in :math:`v`.
    """

    ratios: list[float]
    sigmas: list[float]
    volume: float
    step_sigma: float

    @staticmethod
    def of(smoothness: float, spacing: Sequence[float], scale: int, step_sigma: float = 0.7) -> "Regularity":
        """Regularity for ``smoothness`` mm; a voxel of the field is ``scale`` of the images', ``spacing`` mm wide."""
        width = math.prod(spacing) ** (1 / len(spacing))
        ratios = [each / width for each in spacing]
        amount = smoothness * _STEP / (width * scale)
        stable = _STABLE * len(ratios) / sum(each**-2 for each in ratios)
        return Regularity(
            ratios, [amount**0.5 / each for each in ratios], min(_VOLUME / 2 * amount, stable), step_sigma
        )

    def _scaled(self, field: Tensor, power: int) -> Tensor:
        if all(each == 1 for each in self.ratios):
            return field
        scales = field.new_tensor([each**power for each in self.ratios])
        return field * scales.view(1, -1, *[1] * (field.ndim - 2))

    def step(self, direction: Direction, force: Tensor, ddf: Tensor) -> Tensor:
        """Step against a force and back towards the volumes: ``(1, D, *spatial)`` in voxels.

        Args:
            direction: what the steps so far have found on this grid.
            force: gradient of the loss per voxel, ``(1, D, *spatial)``.
            ddf: displacement in voxels, of the same shape, from which the step is made.
        """
        smoothed = _smooth(force, [self.step_sigma / each for each in self.ratios])
        step = self._scaled(direction(self._scaled(smoothed, -1)), -1) * _STEP
        return step.add_(self._scaled(_towards_volume(ddf), -2), alpha=self.volume) if self.volume > 0 else step

    def smoothed(self, ddf: Tensor) -> Tensor:
        """``ddf`` ``(1, D, *spatial)`` after a step, in voxels."""
        return _smooth(ddf, self.sigmas)
