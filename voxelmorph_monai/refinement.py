r"""Refine the alignment of one pair on the pair itself, from a network's displacement or from nothing.

The map is improved by small steps that are composed with it, :math:`\phi \leftarrow \phi \circ (id + \delta)`, so that
it can go further than one stationary velocity would take it (Vercauteren et al., NeuroImage 2009; Yushkevich et al.,
Alzheimer's & Dementia 2016). As :math:`m \circ \phi \circ (id + \delta)` is the warped image :math:`w`, warped by
:math:`\delta`, the gradient is

.. math:: \frac{\partial L}{\partial \delta} = \frac{\partial L}{\partial w} \nabla w

and nothing has to be differentiated through interpolation or integration. The gradient is smoothed, averaged over the
steps and divided by its own running length, like in Adam (Kingma and Ba, ICLR 2015), but by one length for all
components, so that a step does not depend on the axes.

After each step the displacement is made smoother. It is smoothed by a Gaussian, like an elastic body, and moved along
:math:`\nabla \log \det \nabla \phi`, the steepest descent of the squared logarithm of the local change of volume:
shearing and turning cost less than shrinking and growing. The amount is given in mm, so that it means the same on every
grid. All this happens from coarse to fine, whatever the start: first the images get their full resolution, then the
field.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from voxelmorph_monai.blocks import as_signed, compose, half, invert, warp
from voxelmorph_monai.descent import TIGHT, Direction, Regularity, squares
from voxelmorph_monai.folds import remove_folds
from voxelmorph_monai.metrics import Spacing, sides_of
from voxelmorph_monai.networks import Registration
from voxelmorph_monai.objective import SIMILARITIES, Objective, Pair, Similarity, cut, double, halve, times
from voxelmorph_monai.progress import Progress

__all__ = ["RefinedRegistration", "Refinement", "Step", "mean_map", "refine"]

Clock = Callable[[], float]

_MARGIN = 4  # voxels around the content of the images
_SMALLEST = 16  # least number of voxels along the shortest axis of the coarsest grid
_COARSEST = 2  # largest number of halvings of the resolution
_FINISH = 8  # duration of what comes after the last step, in steps
_PATIENCE = 10  # steps that have to gain 1 % of what the level has gained so far
_SHARES = {
    2: 0.1,
    1: 0.35,
    0: 0.6,
}  # fraction of the budget used up at the end of the level with so many halvings; after the last level, all
_WIDE = 1.5  # SD in voxels of a Gaussian after which a coarser field can be as smooth


class Step(NamedTuple):
    """One step of :func:`refine`: voxels of the images per voxel at its resolution, and the loss before the step."""

    scale: int
    loss: float


class Refinement(NamedTuple):
    """Result of :func:`refine`.

    Attributes:
        ddf: displacement ``(1, D, *spatial)`` in voxels, which warps ``moving``.
        inverse_ddf: displacement of the inverse map, of the same shape and unit, which warps ``fixed``.
        curve: the steps taken.
    """

    ddf: Tensor
    inverse_ddf: Tensor
    curve: list[Step]


def _box(moving: Tensor, fixed: Tensor) -> tuple[list[int], list[int]]:
    """Start and size of the box around what the images show."""
    shown = torch.stack([(image != image.amin()).any(1) for image in (moving, fixed)]).any(0)[0]
    start, size = [], []
    for d in range(shown.ndim):
        others = [axis for axis in range(shown.ndim) if axis != d]
        index = shown.any(others[-1]).any(others[0]).nonzero() if len(others) == 2 else shown.any(others[0]).nonzero()
        low, high = (int(index.min()), int(index.max())) if len(index) else (0, shown.shape[d] - 1)
        # Not further than the image reaches: a margin is there to let the field fade.
        low, high = max(low - _MARGIN, 0), min(high + _MARGIN, shown.shape[d] - 1)
        start.append(low)
        size.append(high - low + 1)
    return start, size


def _inverse(ddf: Tensor) -> Tensor:
    r"""Inverse of a map that does not fold, without folds.

    From coarse to fine. If :math:`\phi \circ \psi = id + e`, then :math:`\psi \circ (id - e)` is closer to the inverse,
    of steep maps, too. Half a voxel at a time is taken, since further off that does not hold.
    """
    fields = [ddf]
    while len(fields) <= _COARSEST and all(n % 2 and n > 4 for n in fields[-1].shape[2:]):
        fields.append(halve(fields[-1]) / 2)
    inverse = -fields[-1]
    for field in fields[::-1]:
        if inverse.shape != field.shape:
            inverse = double(inverse)
        for _ in range(3 if field is ddf and len(fields) > 1 else 8):
            error = compose(field, inverse)
            inverse = compose(inverse, error * (-0.5 / squares(error).sqrt_().clamp_min_(0.5)))
    return remove_folds(inverse, TIGHT / 10)  # what it smooths is no longer the inverse


class _Course:
    """When to stop at a resolution: no time, no step, or no progress left."""

    def __init__(self, clock: Clock, deadline: float, max_steps: int, reserve: int) -> None:
        self.clock = clock
        self.deadline = deadline
        self.max_steps = max_steps
        self.reserve = reserve  # duration of what follows before the deadline, in steps
        self.begin = clock()
        self.best: list[float] = []  # the lowest loss up to each step

    def improves(self, loss: float) -> bool:
        """Add the loss of a step; returns whether it is the lowest so far."""
        lowest = not self.best or loss < self.best[-1]
        self.best.append(loss if lowest else self.best[-1])
        return lowest

    def ends(self) -> bool:
        """Whether the last step was the last."""
        steps = len(self.best)
        now = self.clock()
        if steps > self.max_steps or now + self.reserve * (now - self.begin) / steps >= self.deadline:
            return True
        if steps <= _PATIENCE:
            return False
        return self.best[-1 - _PATIENCE] - self.best[-1] <= 0.01 * (self.best[0] - self.best[-1])


def _descend(
    objective: Objective,
    pair: Pair,
    ddf: Tensor,
    doublings: int,
    course: _Course,
    regularity: Regularity,
) -> Iterator[tuple[float, Tensor]]:
    """Improve ``ddf``, ``doublings`` coarser than the pair: the loss of each step, and the best field so far."""
    direction, best = Direction(ddf), ddf
    inverse = invert(ddf)[0] if objective.bidirectional else None
    while True:
        loss, force = objective.force(pair, ddf, inverse, doublings)
        if course.improves(loss):
            best = ddf
        yield loss, best
        if course.ends():
            return
        ddf = regularity.smoothed(compose(ddf, regularity.step(direction, force, ddf)))
        if inverse is not None:  # from that of the step before, two passes come close enough
            inverse = -warp(ddf, -warp(ddf, inverse))


def _check(pair: Pair, ddf: Tensor | None) -> None:
    shape = list(pair.fixed.shape)
    if len(shape) not in (4, 5) or shape[0] != 1 or list(pair.moving.shape) != shape or min(shape[2:]) < 2:
        raise ValueError(
            f"moving and fixed have shapes {list(pair.moving.shape)} and {shape}. Give one pair of one shape "
            "(1, C, *spatial), with at least 2 voxels along each of 2 or 3 axes."
        )
    labels = pair.labels or (None, None)
    masks = zip(("moving_mask", "mask"), pair.masks or (None, None), (1, 1), strict=True)
    fields = (("ddf", ddf, len(shape) - 2), *masks, *(("labels", label, 1) for label in labels))
    for name, tensor, channels in fields:
        expected = [1, channels, *shape[2:]]
        if tensor is not None and list(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but images of shape {shape} need {expected}.")
    for name, tensor in (("moving", pair.moving), ("fixed", pair.fixed), ("ddf", ddf)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has {int((~tensor.isfinite()).sum())} values of NaN or infinity.")


def _levels(size: Sequence[int], smoothness: float, spacing: Sequence[float]) -> list[tuple[int, int]]:
    """Halvings of the images and of the field, coarse to fine, for a grid of ``size``."""
    coarsest = min(_COARSEST, max(0, int(math.log2(min(size) / _SMALLEST))))
    finest = 0
    while finest < coarsest and max(Regularity.of(smoothness, spacing, 2**finest).sigmas) > _WIDE:
        finest += 1
    levels = [(k, max(k, 1, finest)) for k in range(coarsest, -1, -1)]
    return levels if finest else [*levels, (0, 0)]


def _helps(objective: Objective, pairs: Sequence[Pair], ddf: Tensor) -> bool:
    """Whether ``ddf`` is better than no displacement, looked at on the second finest grid."""
    pair = pairs[:2][-1]
    field = halve(ddf) / 2 if pair.scale > 1 else ddf
    one_way = objective._replace(bidirectional=False)
    losses = [one_way.force(pair, each, None, 0)[0] for each in (field, torch.zeros_like(field))]
    return losses[0] < losses[1]


def _refine(
    objective: Objective,
    pair: Pair,
    ddf: Tensor | None,
    smoothness: float,
    step_sigma: float,
    spacing: Sequence[float],
    budget: float,
    max_steps: int,
    clock: Clock,
    progress: bool,
) -> Refinement:
    begin, whole = clock(), list(pair.fixed.shape[2:])
    start, size = _box(pair.moving, pair.fixed)
    levels = _levels(size, smoothness, spacing)
    multiple = 2 ** levels[0][1]
    size = [-(-(n - 1) // multiple) * multiple + 1 for n in size]  # to be halved
    pairs = [pair.cut(start, size)]
    for _ in range(levels[0][0]):
        pairs.append(pairs[-1].halved())
    field, at = torch.zeros_like(pairs[0].fixed[:, :1]).repeat_interleave(len(size), 1), 0
    if ddf is not None:
        given = cut(ddf.as_subclass(Tensor).float(), start, size)
        if _helps(objective, pairs, given):
            field = given
    curve: list[Step] = []
    title = "refine" if math.isinf(budget) else f"refine, at most {budget:.0f} s"
    with Progress(title, unit="step", shown=progress) as told:
        for image, coarser in levels:
            while at < coarser:
                field, at = halve(field) / 2, at + 1
            while at > coarser:
                field, at = double(field), at - 1
            last = (image, coarser) == levels[-1]
            deadline = begin + budget * (1 if last else _SHARES[image])
            course = _Course(clock, deadline, max_steps, _FINISH if last else 0)
            regularity = Regularity.of(smoothness, spacing, 2**coarser, step_sigma)
            steps = _descend(objective, pairs[image], field, coarser - image, course, regularity)
            for loss, best in steps:
                field = best
                curve.append(Step(pairs[image].scale, loss))
                told.advance(notes=f"voxel {pairs[image].scale}, loss {loss:.4f}")
            field = remove_folds(field, TIGHT)
        field = times(double, at, field)
        inverse = _inverse(field)
    # Beyond the box, where the fields continue with their border values, what turns far may fold.
    found = [remove_folds(cut(x, [-n for n in start], whole)) for x in (field, inverse)]
    return Refinement(found[0], found[1], curve)


@cache
def _compile(spatial_dims: int) -> None:
    """Refine something small: to compile the loops takes half a minute once, which no budget pays for."""
    image = F.pad(torch.ones(1, 1, *[8] * spatial_dims), [8, 8] * spatial_dims)
    objective, widths = Objective(SIMILARITIES["lncc"], False, 0.0, 0.0), [1.0] * spatial_dims
    pair = Pair(image, image.roll(1, 2), None, None, None)
    _refine(objective, pair, None, 1.0, 0.7, widths, math.inf, 1, time.perf_counter, False)


def mean_map(ddf: Tensor, opposite_ddf: Tensor) -> tuple[Tensor, Tensor]:
    r"""Average a map with the inverse of a map found in the opposite direction.

    The mean of :math:`\phi` and :math:`\psi^{-1}` is :math:`\sqrt\phi \circ (\sqrt\psi)^{-1}`. Exchanging
    :math:`\phi` and :math:`\psi` gives its inverse. Neither of the results folds.

    Args:
        ddf: displacement of :math:`\phi`, ``(1, D, *spatial)`` in voxels.
        opposite_ddf: displacement of :math:`\psi`, roughly the inverse of :math:`\phi`, of the same shape and unit.

    Returns:
        The displacements of the mean map and of its inverse, of the same shape and unit.
    """
    there, back = half(ddf), half(opposite_ddf)
    there, back = compose(there, _inverse(back)), compose(back, _inverse(there))
    return remove_folds(there), remove_folds(back)


def refine(
    moving: Tensor,
    fixed: Tensor,
    *,
    ddf: Tensor | None = None,
    inverse_ddf: Tensor | None = None,
    similarity: Similarity | None = None,
    bidirectional: bool = False,
    symmetric: bool = False,
    mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    label_weight: float = 1.0,
    points: tuple[Tensor, Tensor] | None = None,
    points_weight: float = 0.1,
    smoothness: float = 0.5,
    step_sigma: float = 0.7,
    spacing: Spacing = 1.0,
    budget: float = 8.0,
    max_steps: int = 60,
    clock: Clock = time.perf_counter,
    progress: bool = False,
) -> Refinement:
    r"""Align ``moving`` with ``fixed``, both ``(1, C, *spatial)`` in 2-D or 3-D, without a network.

    The result has no folds, by central or forward differences. The same call gives the same result unless the
    ``budget`` ends it.

    Args:
        moving: intensities; the images must be aligned except for local differences.
        fixed: the same.
        ddf: displacement to start from, ``(1, D, *spatial)`` in voxels; default: none. It is ignored if the images are
            less alike with it than without, as can happen if a network gets two equal images.
        inverse_ddf: with ``symmetric``, the displacement to start from in the opposite direction; default: the inverse
            of ``ddf``.
        similarity: loss of two images, called with ``(warped, fixed)``; default: ``LNCCLoss(window=9)``.
        bidirectional: compare ``moving`` with the warped ``fixed`` too; about twice the time for a step.
        symmetric: refine in both directions, each in half of the ``budget``, and return the mean of the two
            (:func:`mean_map`): exchanging the images then gives the inverse.
        mask: nonzero where the images are compared, ``(1, 1, *spatial)`` on the fixed grid.
        moving_mask: the same on the moving grid. What lies outside either mask does not count.
        labels: label maps of moving and fixed, integers ``(1, 1, *spatial)``, whose Dice is part of the loss.
        label_weight: factor of minus their soft Dice (``LabelDiceLoss``).
        points: landmarks in moving and in fixed, ``(1, N, D)`` in voxels, whose mean squared distance is part of it.
        points_weight: factor of that distance, in 1 / voxels^2.
        smoothness: in mm. For each mm that a step moves a point, the displacement is smoothed by a Gaussian of this
            variance, and changes of volume are held down twice as much. It means the same on every grid and at every
            resolution.
        step_sigma: SD of the Gaussian that smooths each step, in voxels of the field (as in a fluid).
        spacing: width of the voxels in mm, along each axis or one for all.
        budget: time limit in seconds; infinite: until nothing improves.
        max_steps: largest number of steps at each resolution.
        clock: function that returns seconds; ``time.process_time`` if other work on the machine must not change the
            result.
        progress: show a bar on standard error.
    """
    moving, fixed = (image.as_subclass(Tensor).float() for image in (moving, fixed))
    for name, value in (
        ("smoothness", smoothness),
        ("step_sigma", step_sigma),
        ("max_steps", max_steps),
        ("budget", budget),
    ):
        if not value >= 0:
            raise ValueError(f"{name} is {value}. Give 0 or more.")
    dims = moving.ndim - 2
    widths = sides_of(spacing, dims)
    if labels is not None:
        labels = as_signed(labels[0]), as_signed(labels[1])
    if inverse_ddf is not None and not symmetric:
        raise ValueError("inverse_ddf has no effect without symmetric. Leave it out, or set symmetric.")
    masks = None
    if mask is not None or moving_mask is not None:
        inside = [
            torch.ones_like(fixed[:, :1]) if each is None else (each != 0).float() for each in (moving_mask, mask)
        ]
        masks = inside[0], inside[1]
    pair = Pair(moving, fixed, masks, labels, points)
    _check(pair, ddf)
    _check(pair, inverse_ddf)
    objective = Objective(similarity or SIMILARITIES["lncc"], bidirectional, label_weight, points_weight)
    with torch.inference_mode(False), torch.no_grad():  # the similarity alone is differentiated
        if moving.device.type == "cpu" and budget < math.inf:
            _compile(dims)
        if not symmetric:
            return _refine(objective, pair, ddf, smoothness, step_sigma, widths, budget, max_steps, clock, progress)
        if ddf is not None and inverse_ddf is None:
            inverse_ddf = _inverse(remove_folds(ddf.as_subclass(Tensor).float()))
        there, back = (
            _refine(objective, *each, smoothness, step_sigma, widths, budget / 2, max_steps, clock, progress)
            for each in ((pair, ddf), (pair.exchanged(), inverse_ddf))
        )
        means = mean_map((there.ddf + back.inverse_ddf) / 2, (back.ddf + there.inverse_ddf) / 2)
        return Refinement(*means, there.curve + back.curve)


class RefinedRegistration(nn.Module):
    """A network followed by :func:`refine`, which can replace ``networks.Registration`` in an evaluation.

    The result is a dict of ``ddf``, ``inverse_ddf``, ``warped`` and ``warped_fixed``, which ``networks.Registration``
    describes.

    Args:
        registration: the trained network.
        options: options of :func:`refine`, for example ``budget``.
    """

    def __init__(self, registration: Registration, **options: Any) -> None:
        super().__init__()
        signature(refine).bind(None, None, **options)  # a misspelt option is an error here, not after the first batch
        self.registration = registration
        self.options = options

    def forward(self, pair: Tensor) -> dict[str, Tensor]:
        """Register ``pair`` ``(B, 2C, *spatial)``, moving image first."""
        start = self.registration(pair)["ddf"]
        moving, fixed = pair.chunk(2, dim=1)
        found = [
            refine(*images, ddf=first, **self.options)
            for *images, first in zip(moving.split(1), fixed.split(1), start.split(1), strict=True)
        ]
        ddf, inverse = torch.cat([x.ddf for x in found]), torch.cat([x.inverse_ddf for x in found])
        return {
            "ddf": ddf,
            "inverse_ddf": inverse,
            "warped": warp(moving, ddf),
            "warped_fixed": warp(fixed, inverse),
        }
