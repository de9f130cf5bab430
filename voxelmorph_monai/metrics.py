r"""How well a registration does: overlap, surface distance, landmarks, and whether the map is one to be believed.

Each measure is a function of tensors that gives one value a pair (and a structure), and a class that gathers the values
of an epoch for MONAI and Ignite: ``metric(y_pred, y)`` with batched tensors or lists of unbatched ones, over all
processes, then ``aggregate()``: the mean over the structures of each pair that have a value, then over the pairs that
have one. ``monai.handlers.IgniteMetricHandler(metric_fn=...)`` attaches it to an engine. Structures and pairs without a
value are NaN; a mean over none at all is NaN too, where MONAI's reduction would say 0.

Fields are in voxels as in ``blocks``. They become millimetres by ``spacing``: the side lengths of a voxel in mm along
each array axis, or one number for all. Results are float64.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.metrics.metric import CumulativeIterationMetric
from monai.metrics.utils import get_code_to_measure_table
from monai.utils.type_conversion import convert_to_tensor
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.spatial import KDTree
from torch import Tensor

from voxelmorph_monai.blocks import compose, jacobian_determinant, signed

__all__ = [
    "Folding",
    "Hausdorff95",
    "InverseConsistency",
    "LabelDice",
    "LogJacobianSD",
    "NonDiffeomorphicVolume",
    "PairValue",
    "TargetRegistrationError",
    "dice",
    "folding",
    "hausdorff95",
    "inverse_consistency",
    "log_jacobian_sd",
    "non_diffeomorphic_volume",
    "target_registration_error",
]

Spacing = float | Sequence[float]


def _check_labels(labels: Tensor, reference: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Check that two maps can be compared, and give them in types that torch computes with."""
    if num_labels < 1:
        raise ValueError(f"num_labels must be 1 or more (background not counted), got {num_labels}.")
    if labels.ndim not in (4, 5) or labels.shape[1] != 1 or labels.shape != reference.shape:
        raise ValueError(
            "labels and reference must both be (B, 1, H, W) or both (B, 1, H, W, D), "
            f"got {list(labels.shape)} and {list(reference.shape)}."
        )
    labels, reference = signed(labels), signed(reference)
    for name, image in (("labels", labels), ("reference", reference)):
        if image.is_floating_point():
            raise TypeError(f"{name} must have an integer type, got {image.dtype}.")
        low, high = (int(value) for value in image.aminmax())
        if low < 0 or high > num_labels:
            raise ValueError(f"{name} must lie in 0 to num_labels = {num_labels}, got {low} to {high}.")
    return labels, reference


def _millimetres(spacing: Spacing, spatial_dims: int) -> list[float]:
    """Give ``spacing`` for each of the axes."""
    sides = np.atleast_1d(np.asarray(spacing, dtype=float))
    if sides.shape not in ((1,), (spatial_dims,)) or not bool((sides > 0).all()):
        raise ValueError(f"spacing must be 1 or {spatial_dims} lengths > 0 in mm, got {spacing}.")
    return np.broadcast_to(sides, spatial_dims).tolist()


def _inside(ddf: Tensor, mask: Tensor | None, border: int = 0) -> Tensor:
    """Voxels to count, ``(B, 1, *spatial)``: those of ``mask`` that are not among the ``border`` outermost."""
    expected = [ddf.shape[0], 1, *ddf.shape[2:]]
    if mask is not None and list(mask.shape) != expected:
        raise ValueError(f"mask for a ddf of shape {list(ddf.shape)} must be {expected}, got {list(mask.shape)}.")
    core: tuple[Any, ...] = (..., *(slice(border, n - border) for n in ddf.shape[2:]))
    inside = torch.zeros(expected, dtype=torch.bool, device=ddf.device)
    inside[core] = True if mask is None else mask[core] != 0
    counts = inside.flatten(1).sum(1).tolist()
    if min(counts) == 0:
        raise ValueError(
            f"mask must hold at least 1 voxel of each item, the {border} outermost voxels left out, got {counts}."
        )
    return inside


def _mean_inside(values: Tensor, inside: Tensor) -> Tensor:
    """Mean of ``values`` over the voxels ``inside`` of each item, ``(B,)``; NaN where there are none."""
    total = torch.where(inside, values, 0).flatten(1).sum(1, dtype=torch.float64)
    return total / inside.flatten(1).sum(1)


def _counts(labels: Tensor, reference: Tensor, n: int) -> Tensor:
    """Voxels of each of ``n`` labels where two flat maps agree, in the first, in the second: ``(3, n)``."""
    if n * n > labels.numel():
        return torch.stack([x.bincount(minlength=n) for x in (labels[labels == reference], labels, reference)])
    # One count of the pairs instead of three of labels, in a type that takes less memory to the processor: 0.3 of the
    # CPU time for 35 labels.
    dtype = next(kind for kind in (torch.int16, torch.int32, torch.int64) if n * n <= torch.iinfo(kind).max)
    pairs = labels.to(dtype, copy=True).mul_(n).add_(reference.to(dtype)).bincount(minlength=n * n).view(n, n)
    return torch.stack([pairs.diagonal(), pairs.sum(1), pairs.sum(0)])


def dice(labels: Tensor, reference: Tensor, num_labels: int) -> Tensor:
    r"""Overlap of each structure, :math:`2 |A \cap B| / (|A| + |B|)` (Dice, Ecology 1945): ``(B, num_labels)``.

    Column ``k - 1`` is label ``k``; background is left out. 0 where only one of the two has the structure, NaN where
    neither has it. Labels are counted, all structures at once, without one-hot images.

    Args:
        labels: integer label map ``(B, 1, *spatial)``, values 0 to ``num_labels``.
        reference: the same for the truth.
        num_labels: how many structures, background not counted.

    >>> dice(torch.tensor([[[[1, 1, 2, 0]]]]), torch.tensor([[[[1, 0, 0, 0]]]]), num_labels=3)
    tensor([[0.6667, 0.0000,    nan]], dtype=torch.float64)
    """
    labels, reference = _check_labels(labels, reference, num_labels)
    n = num_labels + 1
    counts = [_counts(*pair, n) for pair in zip(labels.flatten(1), reference.flatten(1), strict=True)]
    both, one, two = torch.stack(counts, dim=1)
    return (2 * both.double() / (one + two))[:, 1:]


def folding(ddf: Tensor, mask: Tensor | None = None, *, scheme: str = "central") -> Tensor:
    r"""Percentage (0 to 100) of voxels where the map folds, :math:`\det(I + \nabla u) \le 0`: ``(B,)``.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``. Where it is NaN it counts as folded.
        mask: voxels to count, ``(B, 1, *spatial)``, not 0 inside; without it the whole grid.
        scheme: differences, as in ``blocks.jacobian_determinant``.

    >>> mirror = torch.tensor([0.0, -2.0, -4.0]).expand(1, 1, 4, 3)  # phi(x) = -x along the last axis
    >>> folding(torch.cat([torch.zeros(1, 1, 4, 3), mirror], dim=1))
    tensor([100.], dtype=torch.float64)
    """
    inside = _inside(ddf, mask)
    return 100 * _mean_inside(~(jacobian_determinant(ddf, scheme) > 0), inside)


def log_jacobian_sd(ddf: Tensor, mask: Tensor | None = None, *, definition: str = "plain") -> Tensor:
    r"""Standard deviation of the logarithm of the Jacobian determinant (SDlogJ) over voxels: ``(B,)``.

    0 for a map that changes all volumes alike. The two definitions give very different numbers for the same field;
    both take central differences and divide by the number of voxels.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``.
        mask: voxels to count, ``(B, 1, *spatial)``, not 0 inside; without it the whole grid.
        definition: ``"plain"``, the SD of :math:`\log |J|` (Leow et al., IEEE TMI 2007) where the map does not fold:
            folded voxels have no logarithm, any floor in its place would decide the result, and ``folding`` counts
            them; NaN where everything folds. ``"learn2reg"``, the SD of
            :math:`\log(\mathrm{clip}(|J| + 3, 10^{-9}, 10^9))` without the two outermost voxels, as the Learn2Reg
            challenge ranks (Hering et al., IEEE TMI 2023).
    """
    if definition not in ("plain", "learn2reg"):
        raise ValueError(f"definition must be 'plain' or 'learn2reg', got '{definition}'.")
    inside = _inside(ddf, mask, border=0 if definition == "plain" else 2)
    jacobian = jacobian_determinant(ddf)
    if definition == "plain":
        inside = inside & (jacobian > 0)
    else:
        jacobian = (jacobian + 3).clamp(1e-9, 1e9)
    log = jacobian.log()
    mean = _mean_inside(log, inside).view(-1, *[1] * (log.ndim - 1))
    return _mean_inside((log - mean) ** 2, inside).sqrt()


def _edge(ddf: Tensor, start: Sequence[int], stop: Sequence[int]) -> Tensor:
    r"""Image of an edge of the grid, :math:`\phi(x + stop) - \phi(x + start)`, at all voxels but the outermost."""
    ends: list[tuple[Any, ...]] = [
        (..., *(slice(1 + o, n - 1 + o) for o, n in zip(offset, ddf.shape[2:], strict=True)))
        for offset in (start, stop)
    ]
    step = ddf.new_tensor(stop) - ddf.new_tensor(start)
    return ddf[ends[1]] - ddf[ends[0]] + step.view(-1, *[1] * len(start))


def _determinant(edges: Sequence[Tensor]) -> Tensor:
    """Volume, with its sign, that 2 or 3 vectors ``(B, D, *spatial)`` span: ``(B, 1, *spatial)``."""
    if len(edges) == 2:
        (a, b), (c, d) = (edge.split(1, dim=1) for edge in edges)
        return a * d - b * c
    u, v, w = (edge.unbind(1) for edge in edges)
    minors = [v[i - 2] * w[i - 1] - v[i - 1] * w[i - 2] for i in range(3)]  # i - 2 is i + 1, modulo 3
    return (u[0] * minors[0] + u[1] * minors[1] + u[2] * minors[2]).unsqueeze(1)


def non_diffeomorphic_volume(ddf: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Volume that the map turns inside out, in per cent of the volume counted (Liu et al., IJCV 2024): ``(B,)``.

    Each cell of the grid is cut into 5 tetrahedra (2 triangles in 2-D), in both of the two ways that there are. The
    map, taken to be linear in each, is one to one if all of them keep their orientation; the volume of those that do
    not, averaged over the two ways, is

    .. math:: \frac{100}{N} \sum_x \frac{1}{2 D!} \sum_i \max(-|J_i(x)|, 0)

    over the N voxels counted, with the determinants :math:`|J_i|` of the 8 (4) corners at a voxel, all combinations of
    forward and backward differences, and in 3-D of the 2 tetrahedra in the middle of cells. Unlike ``folding`` it sees
    folds that central differences step over, and a deep fold counts for more than a shallow one. As the authors do, it
    leaves out the outermost voxels.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``; the result is NaN where it is.
        mask: voxels to count, ``(B, 1, *spatial)``, not 0 inside; without it the whole grid. The LUMIR challenge
            counts within the brain.
    """
    inside = _inside(ddf, mask, border=1)
    spatial_dims = ddf.ndim - 2
    if spatial_dims not in (2, 3) or ddf.shape[1] != spatial_dims:
        raise ValueError(f"ddf must be (B, 2, H, W) or (B, 3, H, W, D), got {list(ddf.shape)}.")
    ddf = ddf if ddf.dtype == torch.float64 else ddf.float()
    here = (0,) * spatial_dims
    unit = [tuple(int(d == axis) for d in range(spatial_dims)) for axis in range(spatial_dims)]
    minus = [tuple(-d for d in axis) for axis in unit]
    sides = [(_edge(ddf, here, ahead), _edge(ddf, behind, here)) for ahead, behind in zip(unit, minus, strict=True)]
    simplices = list(product(*sides))
    if spatial_dims == 3:  # in the middle of a cell, between its corner at the voxel and the 3 across its faces
        for a, b, c in (unit, minus[::-1]):  # in reverse, as turning all three edges round changes the sign
            across = [tuple(map(sum, zip(*pair, strict=True))) for pair in ((a, b), (b, c), (a, c))]
            simplices.append(tuple(_edge(ddf, here, corner) for corner in across))
    turned = torch.zeros_like(ddf[:, :1])
    inner: tuple[Any, ...] = (..., *(slice(1, n - 1) for n in ddf.shape[2:]))
    for edges in simplices:
        turned[inner] -= _determinant(edges).clamp_max(0)
    return 100 * _mean_inside(turned, inside) / (2 * math.factorial(spatial_dims))


# Voxels around a point within which another surface is looked up; beyond, it is searched for.
_REACH = 4


def _strides(shape: Sequence[int]) -> list[int]:
    """Steps along each axis of a flat array."""
    return [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]


class _Surface(NamedTuple):
    """Surface of a structure on the flat grid of points halfway between voxels."""

    there: NDArray[np.bool_]  # whether it is at each point
    points: NDArray[np.intp]  # where it is
    areas: NDArray[np.float64]  # of the surface at each of them


def _surface(mask: NDArray[np.bool_], areas: NDArray[np.float64]) -> _Surface:
    """Find the surface of ``mask``, which is False at its border; ``areas`` as MONAI's table has them."""
    code = mask.ravel().view(np.uint8)  # gathers the 2 x 2 (x 2) voxels around a point as bits, the last one lowest
    for axis, stride in enumerate(_strides(mask.shape)):
        ahead = code[stride:]
        code = code[: len(ahead)] << np.uint8(1 << (mask.ndim - 1 - axis))
        code |= ahead
    there = code - np.uint8(1) < len(areas) - 2  # neither 0, all outside, nor all inside
    points = np.flatnonzero(there)
    return _Surface(there, points, areas[code[points]])


def _shells(sides: Sequence[float]) -> list[tuple[float, NDArray[np.intp]]]:
    """Offsets (voxels) of each length (mm), shortest first, up to where one out of ``_REACH`` may be shorter."""
    offsets = np.array(list(product(range(-_REACH, _REACH + 1), repeat=len(sides))))
    lengths = np.linalg.norm(offsets * sides, axis=1)
    return [(float(x), offsets[lengths == x]) for x in np.unique(lengths[lengths < (_REACH + 1) * min(sides)])]


def _percentile95(
    surface: _Surface,
    other: _Surface,
    shells: Sequence[tuple[float, NDArray[np.intp]]],
    shape: Sequence[int],
    sides: Sequence[float],
) -> float:
    """Smallest distance (mm) from ``other`` that 95 % of the area of ``surface`` does not exceed."""
    points, areas = surface.points, surface.areas
    wanted, covered = 0.95 * areas.sum(), 0.0
    # Surfaces that are compared lie close to each other. To look where the other one is, nearest places first, until
    # 95 % have found it, takes a seventh of the CPU time of a KD-tree, and is as exact.
    for length, steps in shells:
        found = np.zeros(len(points), dtype=bool)
        for step in steps.tolist():
            found |= other.there.take(points + step)
        # not areas @ found: the threads of NumPy's BLAS wait in a loop beside ours, and took twice the CPU time again
        covered += float(areas.sum(where=found))
        if covered >= wanted:
            return length
        left = np.flatnonzero(~found)
        points, areas = points.take(left), areas.take(left)
    here, there = (np.stack(np.unravel_index(p, shape), axis=1) * sides for p in (points, other.points))
    # Points of a grid have many equal coordinates, which balancing only makes slower.
    distances = KDTree(there, compact_nodes=False, balanced_tree=False).query(here)[0]
    order = np.argsort(distances)
    return float(distances[order][np.searchsorted(covered + np.cumsum(areas[order]), wanted)])


def hausdorff95(labels: Tensor, reference: Tensor, num_labels: int, *, spacing: Spacing = 1.0) -> Tensor:
    r"""Robust Hausdorff distance of each structure in mm (Huttenlocher et al., IEEE PAMI 1993): ``(B, num_labels)``.

    The distance from the surface of one structure within which 95 % of the surface of the other lies, the larger of
    both directions. Surface elements lie between voxels and count by their area, as in the ``surface-distance``
    package that Learn2Reg uses (Nikolov et al., JMIR 2021); MONAI's own metric takes every boundary voxel for the same
    area. NaN where either has no such structure: read it beside ``dice``, which is 0 there.

    Args:
        labels: integer label map ``(B, 1, *spatial)``, values 0 to ``num_labels``.
        reference: the same for the truth.
        num_labels: how many structures, background not counted.
        spacing: side lengths of a voxel in mm.
    """
    labels, reference = _check_labels(labels, reference, num_labels)
    sides = _millimetres(spacing, labels.ndim - 2)
    shells = _shells(sides)
    areas = get_code_to_measure_table(sides)[0].double().numpy()
    small = torch.uint8 if num_labels <= torch.iinfo(torch.uint8).max else torch.int32
    result = torch.full((labels.shape[0], num_labels), torch.nan, dtype=torch.float64)
    for item in range(labels.shape[0]):
        maps = [image[item, 0].to(small).cpu().numpy() for image in (labels, reference)]

        def distance(label: int, *boxes: tuple[slice, ...] | None, maps: list[NDArray[Any]] = maps) -> float:
            if None in boxes:
                return math.nan
            box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(*boxes, strict=True))
            masks = [np.pad(image[box] == label, _REACH + 2) for image in maps]
            shape = masks[0].shape
            flat = [(length, offsets @ _strides(shape)) for length, offsets in shells]
            first, second = (_surface(mask, areas) for mask in masks)
            return max(
                _percentile95(first, second, flat, shape, sides), _percentile95(second, first, flat, shape, sides)
            )

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            boxes = (find_objects(image, num_labels) for image in maps)
            found = list(pool.map(distance, range(1, num_labels + 1), *boxes))
        result[item] = torch.tensor(found, dtype=torch.float64)
    return result.to(labels.device)


def _warp_points(points: Tensor, ddf: Tensor) -> Tensor:
    r"""Map ``points`` ``(B, N, D)`` by :math:`\phi(x) = x + u(x)`, ``u`` linear between the voxels of ``ddf``."""
    last = torch.tensor(ddf.shape[2:], device=ddf.device) - 1
    place = points.clamp(torch.zeros_like(last), last)
    low = place.floor()
    share = place - low
    vectors = ddf.movedim(1, -1)
    item = torch.arange(len(points), device=ddf.device).unsqueeze(1)
    moved = points
    for corner in product((0, 1), repeat=ddf.ndim - 2):
        end = torch.tensor(corner, device=ddf.device)
        voxel = torch.minimum(low.long() + end, last)
        weight = torch.where(end == 1, share, 1 - share).prod(-1, keepdim=True)
        moved = moved + weight * vectors[(item, *voxel.unbind(-1))]
    return moved


def target_registration_error(moving_points: Tensor, fixed_points: Tensor, ddf: Tensor, spacing: Spacing) -> Tensor:
    r"""Distance in mm from :math:`\phi(x)` of each fixed point to its moving point: ``(B, N)``.

    A field pulls back, so it is the fixed point that moves (Fitzpatrick et al., IEEE TMI 1998, on what this measures).

    Args:
        moving_points: landmarks in the moving image, ``(B, N, D)``, in voxels of the grid of ``ddf``.
        fixed_points: the same landmarks in the fixed image.
        ddf: displacement in voxels, ``(B, D, *spatial)``.
        spacing: side lengths of a voxel in mm.

    >>> x = torch.tensor([[[1.0, 1.5]]])
    >>> target_registration_error(x + 2, x, torch.ones(1, 2, 4, 5), spacing=(3.0, 4.0))
    tensor([[5.]], dtype=torch.float64)
    """
    spatial_dims = ddf.ndim - 2
    if spatial_dims not in (2, 3) or ddf.shape[1] != spatial_dims:
        raise ValueError(f"ddf must be (B, 2, H, W) or (B, 3, H, W, D), got {list(ddf.shape)}.")
    shape = fixed_points.shape
    if len(shape) != 3 or (shape[0], shape[2]) != ddf.shape[:2] or moving_points.shape != shape:
        raise ValueError(
            f"moving_points and fixed_points for a ddf of shape {list(ddf.shape)} must both be "
            f"({ddf.shape[0]}, N, {spatial_dims}), got {list(moving_points.shape)} and {list(shape)}."
        )
    if not bool(moving_points.isfinite().all() and fixed_points.isfinite().all()):
        raise ValueError("moving_points and fixed_points must be finite voxel coordinates, got NaN or infinity.")
    sides = _millimetres(spacing, spatial_dims)
    error = _warp_points(fixed_points.double(), ddf) - moving_points
    return torch.linalg.vector_norm(error * error.new_tensor(sides), dim=-1)


def inverse_consistency(
    ddf: Tensor, inverse_ddf: Tensor, *, spacing: Spacing = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""Mean of :math:`|\phi^{-1}(\phi(x)) - x|` in mm (Christensen and Johnson, IEEE TMI 2001): ``(B,)``.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``; ``x`` are its voxels, those of the fixed image.
        inverse_ddf: what should undo it, on the same grid.
        spacing: side lengths of a voxel in mm.
        mask: voxels to count, ``(B, 1, *spatial)``, not 0 inside; without it the whole grid.
    """
    if ddf.shape != inverse_ddf.shape:
        raise ValueError(f"inverse_ddf must have the shape of ddf, {list(ddf.shape)}, got {list(inverse_ddf.shape)}.")
    spatial_dims = ddf.ndim - 2
    sides = _millimetres(spacing, spatial_dims)
    inside = _inside(ddf, mask)
    error = compose(inverse_ddf, ddf)
    error = error * error.new_tensor(sides).view(-1, *[1] * spatial_dims)
    return _mean_inside(torch.linalg.vector_norm(error, dim=1, keepdim=True), inside)


class _PairMetric(CumulativeIterationMetric):
    """Gathers what ``_values`` finds for each pair."""

    y_is_optional = False

    def __call__(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        # MONAI would take a y that is no tensor for none, and leave out what the longer of two lists has more.
        name = type(self).__name__
        if not isinstance(y, (Tensor, list, tuple)) and not (y is None and self.y_is_optional):
            raise TypeError(f"y of {name} must be a tensor or a list of tensors, got {type(y).__name__}.")
        if y is not None and len(y) != len(y_pred):
            raise ValueError(f"y of {name} must have as many items as y_pred, {len(y_pred)}, got {len(y)}.")
        return super().__call__(y_pred, y, **kwargs)

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        # Plain tensors: the header of a MetaTensor says nothing of a metric, and gathering must not carry it along.
        plain = None if y is None else convert_to_tensor(y, track_meta=False)
        return self._values(convert_to_tensor(y_pred, track_meta=False), plain, **kwargs)

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        raise NotImplementedError

    def aggregate(self) -> Tensor:
        """Mean over the structures of each pair that have a value, then over the pairs that have one."""
        values = self.get_buffer()
        if values is None:
            raise ValueError(f"{type(self).__name__} must be called on a pair before aggregate, got none.")
        return values.reshape(len(values), -1).nanmean(1).nanmean()


class LabelDice(_PairMetric):
    """``dice`` of label maps: ``metric(labels, reference)``."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return dice(y_pred, y, self.num_labels)


class Hausdorff95(_PairMetric):
    """``hausdorff95`` of label maps in mm: ``metric(labels, reference)``."""

    def __init__(self, num_labels: int, spacing: Spacing = 1.0) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.spacing = spacing

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return hausdorff95(y_pred, y, self.num_labels, spacing=self.spacing)


class Folding(_PairMetric):
    """``folding`` in per cent: ``metric(ddf)`` or ``metric(ddf, mask)``."""

    y_is_optional = True

    def __init__(self, scheme: str = "central") -> None:
        super().__init__()
        self.scheme = scheme

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return folding(y_pred, y, scheme=self.scheme)


class LogJacobianSD(_PairMetric):
    """``log_jacobian_sd``: ``metric(ddf)`` or ``metric(ddf, mask)``."""

    y_is_optional = True

    def __init__(self, definition: str = "plain") -> None:
        super().__init__()
        self.definition = definition

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return log_jacobian_sd(y_pred, y, definition=self.definition)


class NonDiffeomorphicVolume(_PairMetric):
    """``non_diffeomorphic_volume`` in per cent: ``metric(ddf)`` or ``metric(ddf, mask)``."""

    y_is_optional = True

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return non_diffeomorphic_volume(y_pred, y)


class PairValue(_PairMetric):
    """What something else has measured of each pair, such as the time it took: ``metric(values)``."""

    y_is_optional = True

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return y_pred.double()


class TargetRegistrationError(_PairMetric):
    """Mean ``target_registration_error`` of each pair in mm: ``metric(ddf, points)``.

    ``points`` ``(B, 2, N, D)`` are the moving points, then the fixed points; pairs may have different numbers of them.
    """

    def __init__(self, spacing: Spacing) -> None:
        super().__init__()
        self.spacing = spacing

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        if y.ndim != 4 or y.shape[1] != 2:
            raise ValueError(f"points must be (B, 2, N, D), moving then fixed, got {list(y.shape)}.")
        return target_registration_error(y[:, 0], y[:, 1], y_pred, self.spacing).mean(1)


class InverseConsistency(_PairMetric):
    """``inverse_consistency`` over the whole grid in mm: ``metric(ddf, inverse_ddf)``."""

    def __init__(self, spacing: Spacing = 1.0) -> None:
        super().__init__()
        self.spacing = spacing

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return inverse_consistency(y_pred, y, spacing=self.spacing)
