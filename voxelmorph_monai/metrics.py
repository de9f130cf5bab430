r"""Measures of a registration: overlap, surface distance, landmark error, and regularity of the map.

Each measure is a function of tensors that returns float64 values for each pair, or for each pair and structure, with
NaN where there is no value. ``epoch_metrics`` has the same measures for MONAI and Ignite.

Fields are in voxels as in ``blocks``. ``spacing`` converts them to millimetres: it holds the side lengths of a voxel in
mm along each array axis, or one number for all axes.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.blocks import as_signed, check_field, compose, jacobian_determinant
from voxelmorph_monai.lazy import lazy

__all__ = [
    "Spacing",
    "dice",
    "folding",
    "hausdorff95",
    "inverse_consistency",
    "log_jacobian_sd",
    "non_diffeomorphic_volume",
    "sides_of",
    "target_registration_error",
]

Spacing = float | Sequence[float]  # mm

ndimage, spatial, monai_metrics = lazy("scipy.ndimage"), lazy("scipy.spatial"), lazy("monai.metrics.utils")


def _check_labels(labels: Tensor, reference: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Check that two label maps can be compared, and convert them to types that torch computes with."""
    if num_labels < 1:
        raise ValueError(f"num_labels is {num_labels}. Give the number of labels without the background, 1 or more.")
    if labels.ndim not in (4, 5) or labels.shape[1] != 1 or labels.shape != reference.shape:
        raise ValueError(
            f"labels and reference have shapes {list(labels.shape)} and {list(reference.shape)}. Give two maps of one "
            "shape, (B, 1, H, W) or (B, 1, H, W, D)."
        )
    labels, reference = as_signed(labels), as_signed(reference)
    for name, image in (("labels", labels), ("reference", reference)):
        if image.is_floating_point():
            raise TypeError(f"{name} has the type {image.dtype}. Give integers.")
        low, high = (int(value) for value in image.aminmax())
        if low < 0 or high > num_labels:
            raise ValueError(
                f"{name} holds values from {low} to {high}, but num_labels is {num_labels}. Correct num_labels, or "
                "merge the labels."
            )
    return labels, reference


def sides_of(spacing: Spacing, spatial_dims: int) -> list[float]:
    """Side lengths of a voxel in mm along each of the axes, from one number for all or a list."""
    sides = np.atleast_1d(np.asarray(spacing, dtype=float))
    if sides.shape not in ((1,), (spatial_dims,)) or not bool(((sides > 0) & (sides < np.inf)).all()):
        raise ValueError(
            f"spacing of {spatial_dims}-D images is {spacing}. Give 1 or {spatial_dims} lengths above 0, in mm."
        )
    return np.broadcast_to(sides, spatial_dims).tolist()


def _inside(ddf: Tensor, mask: Tensor | None, border: int = 0) -> Tensor:
    """Voxels to count, ``(B, 1, *spatial)``: those in ``mask``, without the ``border`` outermost layers."""
    check_field("ddf", ddf)
    expected = [ddf.shape[0], 1, *ddf.shape[2:]]
    if mask is not None and list(mask.shape) != expected:
        raise ValueError(f"mask has shape {list(mask.shape)}, but a ddf of shape {list(ddf.shape)} needs {expected}.")
    core: tuple[Any, ...] = (..., *(slice(border, n - border) for n in ddf.shape[2:]))
    inside = torch.zeros(expected, dtype=torch.bool, device=ddf.device)
    inside[core] = True if mask is None else mask[core] != 0
    counts = inside.flatten(1).sum(1).tolist()
    if min(counts) == 0:
        raise ValueError(
            f"there are no voxels to measure: the batch items have {counts} voxels in the mask, without the {border} "
            "outermost layers of the grid. Give a larger mask or grid."
        )
    return inside


def _mean_inside(values: Tensor, inside: Tensor) -> Tensor:
    """Mean of ``values`` over the voxels where the mask ``inside`` is True: ``(B,)``, NaN if there are none."""
    total = torch.where(inside, values, 0).flatten(1).sum(1, dtype=torch.float64)
    return total / inside.flatten(1).sum(1)


def _counts(labels: Tensor, reference: Tensor, n: int) -> Tensor:
    """Voxels of each of ``n`` labels that two flat maps share, that the first has, and the second: ``(3, n)``."""
    if n * n > labels.numel():
        return torch.stack([x.bincount(minlength=n) for x in (labels[labels == reference], labels, reference)])
    # Counting pairs of labels once, in a small type, instead of labels three times takes 0.3 of the CPU time.
    dtype = next(kind for kind in (torch.int16, torch.int32, torch.int64) if n * n <= torch.iinfo(kind).max)
    pairs = labels.to(dtype, copy=True).mul_(n).add_(reference.to(dtype)).bincount(minlength=n * n).view(n, n)
    return torch.stack([pairs.diagonal(), pairs.sum(1), pairs.sum(0)])


def dice(labels: Tensor, reference: Tensor, num_labels: int) -> Tensor:
    r"""Overlap of each structure, :math:`2 |A \cap B| / (|A| + |B|)` (Dice, Ecology 1945): ``(B, num_labels)``.

    Column ``k - 1`` is label ``k``; the background has no column. The value is 0 if only one of the two maps has the
    structure, and NaN if neither has it.

    Args:
        labels: integer label map ``(B, 1, *spatial)``, values 0 to ``num_labels``.
        reference: true label map, of the same shape and range.
        num_labels: number of structures, without the background.

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
        ddf: displacement in voxels, ``(B, D, *spatial)``. NaN counts as folded.
        mask: voxels to count, ``(B, 1, *spatial)``, nonzero inside (default: the whole grid).
        scheme: finite differences, as in ``blocks.jacobian_determinant``.

    >>> mirror = torch.tensor([0.0, -2.0, -4.0]).expand(1, 1, 4, 3)  # phi(x) = -x along the last axis
    >>> folding(torch.cat([torch.zeros(1, 1, 4, 3), mirror], dim=1))
    tensor([100.], dtype=torch.float64)
    """
    inside = _inside(ddf, mask)
    return 100 * _mean_inside(~(jacobian_determinant(ddf, scheme) > 0), inside)


def log_jacobian_sd(ddf: Tensor, mask: Tensor | None = None, *, definition: str = "plain") -> Tensor:
    r"""Standard deviation of the logarithm of the Jacobian determinant (SDlogJ) over voxels: ``(B,)``.

    It is 0 for a map that changes all volumes by the same factor. The two definitions give very different numbers for
    the same field; both use central differences and divide by the number of voxels.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``.
        mask: voxels to count, ``(B, 1, *spatial)``, nonzero inside (default: the whole grid).
        definition: ``"plain"`` is the SD of :math:`\log |J|` (Leow et al., IEEE TMI 2007) over the voxels that do not
            fold, and NaN if all voxels fold. Folded voxels have no logarithm, and any value in its place would dominate
            the result; ``folding`` counts them. ``"learn2reg"`` is the SD of
            :math:`\log(\mathrm{clip}(|J| + 3, 10^{-9}, 10^9))` without the two outermost layers of voxels, which the
            Learn2Reg challenge ranks by (Hering et al., IEEE TMI 2023).
    """
    if definition not in ("plain", "learn2reg"):
        raise ValueError(f"definition is '{definition}'. Use 'plain' or 'learn2reg'.")
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
    r"""Image of a grid edge, :math:`\phi(x + stop) - \phi(x + start)`, at all voxels except the outermost layer."""
    ends: list[tuple[Any, ...]] = [
        (..., *(slice(1 + o, n - 1 + o) for o, n in zip(offset, ddf.shape[2:], strict=True)))
        for offset in (start, stop)
    ]
    step = ddf.new_tensor(stop) - ddf.new_tensor(start)
    return ddf[ends[1]] - ddf[ends[0]] + step.view(-1, *[1] * len(start))


def _determinant(edges: Sequence[Tensor]) -> Tensor:
    """Signed volume spanned by 2 or 3 vectors ``(B, D, *spatial)``: ``(B, 1, *spatial)``."""
    if len(edges) == 2:
        (a, b), (c, d) = (edge.split(1, dim=1) for edge in edges)
        return a * d - b * c
    u, v, w = (edge.unbind(1) for edge in edges)
    minors = [v[i - 2] * w[i - 1] - v[i - 1] * w[i - 2] for i in range(3)]  # i - 2 is i + 1, modulo 3
    return (u[0] * minors[0] + u[1] * minors[1] + u[2] * minors[2]).unsqueeze(1)


def non_diffeomorphic_volume(ddf: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Volume that the map turns inside out, as a percentage of the counted volume (Liu et al., IJCV 2024): ``(B,)``.

    Each cell of the grid is cut into 5 tetrahedra (2 triangles in 2-D), in both possible ways. The map is taken to be
    linear in each tetrahedron. It is one to one if all tetrahedra keep their orientation. The volume of those that do
    not, averaged over the two ways, is

    .. math:: \frac{100}{N} \sum_x \frac{1}{2 D!} \sum_i \max(-|J_i(x)|, 0)

    over the N counted voxels. :math:`|J_i|` are the determinants of the 8 (in 2-D 4) tetrahedra with a corner at the
    voxel, which are all combinations of forward and backward differences, and in 3-D also those of the 2 tetrahedra in
    the middle of a cell. Unlike ``folding``, this measure detects folds that central differences miss, and weights a
    fold by its depth. Like the authors' code, it leaves out the outermost voxels.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``; NaN makes the result NaN.
        mask: voxels to count, ``(B, 1, *spatial)``, nonzero inside (default: the whole grid). The LUMIR challenge
            counts within the brain.
    """
    inside, spatial_dims = _inside(ddf, mask, border=1), ddf.ndim - 2
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


_REACH = 4  # distance in voxels up to which the other surface is looked up in a mask; beyond it a KD-tree is used


def _strides(shape: Sequence[int]) -> list[int]:
    """Differences of the flat indices of neighbours along each axis of an array."""
    return [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]


class _Surface(NamedTuple):
    """Surface of a structure, on a grid of points halfway between voxels; indices are flat."""

    is_surface: NDArray[np.bool_]  # whether each point of the grid lies on the surface
    points: NDArray[np.intp]  # indices of the points on the surface, (N,)
    areas: NDArray[np.float64]  # surface area at each of these points in mm2 (2-D: length in mm), (N,)


def _surface(mask: NDArray[np.bool_], areas: NDArray[np.float64]) -> _Surface:
    """Find the surface of ``mask``, which must be False at its border; ``areas`` is MONAI's table of areas by code."""
    code = mask.ravel().view(np.uint8)  # becomes the 2 x 2 (x 2) voxels around each point as bits, the last one lowest
    for axis, stride in enumerate(_strides(mask.shape)):
        ahead = code[stride:]
        code = code[: len(ahead)] << np.uint8(1 << (mask.ndim - 1 - axis))
        code |= ahead
    is_surface = code - np.uint8(1) < len(areas) - 2  # neither all bits 0 (outside) nor all 1 (inside)
    points = np.flatnonzero(is_surface)
    return _Surface(is_surface, points, areas[code[points]])


def _shells(sides: Sequence[float]) -> list[tuple[float, NDArray[np.intp]]]:
    """Offsets in voxels grouped by their length in mm, shortest first; complete up to the largest length returned."""
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
    """Smallest distance in mm from ``other`` within which 95 % of the area of ``surface`` lies."""
    points, areas = surface.points, surface.areas
    wanted, covered = 0.95 * areas.sum(), 0.0
    # The two surfaces usually lie close to each other. Looking up the nearest offsets first, until 95 % of the area has
    # reached the other surface, takes a seventh of the CPU time of a KD-tree, and gives the same result.
    for length, steps in shells:
        reached = np.zeros(len(points), dtype=bool)
        for step in steps.tolist():
            reached |= other.is_surface.take(points + step)
        # A product (areas @ reached) would take twice the CPU time, because threads of NumPy's BLAS wait in a loop.
        covered += float(areas.sum(where=reached))
        if covered >= wanted:
            return length
        left = np.flatnonzero(~reached)
        points, areas = points.take(left), areas.take(left)
    remaining, others = (np.stack(np.unravel_index(p, shape), axis=1) * sides for p in (points, other.points))
    # The points share many coordinates, which makes a balanced tree slower.
    distances = spatial.KDTree(others, compact_nodes=False, balanced_tree=False).query(remaining)[0]
    order = np.argsort(distances)
    return float(distances[order][np.searchsorted(covered + np.cumsum(areas[order]), wanted)])


def hausdorff95(labels: Tensor, reference: Tensor, num_labels: int, *, spacing: Spacing = 1.0) -> Tensor:
    r"""Robust Hausdorff distance of each structure in mm (Huttenlocher et al., IEEE PAMI 1993): ``(B, num_labels)``.

    It is the distance from the surface of a structure within which 95 % of the surface in the other map lies, and the
    larger of the two directions. Surface elements lie between voxels and are weighted by their area, as in the package
    ``surface-distance`` that Learn2Reg uses (Nikolov et al., JMIR 2021); MONAI's own metric gives all boundary voxels
    the same weight. The value is NaN if either map lacks the structure: report it together with ``dice``, which is 0
    there.

    Args:
        labels: integer label map ``(B, 1, *spatial)``, values 0 to ``num_labels``.
        reference: true label map, of the same shape and range.
        num_labels: number of structures, without the background.
        spacing: side lengths of a voxel in mm.
    """
    labels, reference = _check_labels(labels, reference, num_labels)
    sides = sides_of(spacing, labels.ndim - 2)
    shells = _shells(sides)
    areas = monai_metrics.get_code_to_measure_table(sides)[0].double().numpy()
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
            boxes = (ndimage.find_objects(image, num_labels) for image in maps)
            distances = list(pool.map(distance, range(1, num_labels + 1), *boxes))
        result[item] = torch.tensor(distances, dtype=torch.float64)
    return result.to(labels.device)


def _warp_points(points: Tensor, ddf: Tensor) -> Tensor:
    r"""Map ``points`` ``(B, N, D)`` by :math:`\phi(x) = x + u(x)`; ``ddf`` is interpolated linearly."""
    last = torch.tensor(ddf.shape[2:], device=ddf.device) - 1
    place = points.clamp(torch.zeros_like(last), last)
    low = place.floor()
    fraction = place - low
    vectors = ddf.movedim(1, -1)
    item = torch.arange(len(points), device=ddf.device).unsqueeze(1)
    moved = points
    for corner in product((0, 1), repeat=ddf.ndim - 2):
        end = torch.tensor(corner, device=ddf.device)
        voxel = torch.minimum(low.long() + end, last)
        weight = torch.where(end == 1, fraction, 1 - fraction).prod(-1, keepdim=True)
        moved = moved + weight * vectors[(item, *voxel.unbind(-1))]
    return moved


def target_registration_error(moving_points: Tensor, fixed_points: Tensor, ddf: Tensor, spacing: Spacing) -> Tensor:
    r"""Distance in mm between :math:`\phi(x)` of each fixed point and its moving point: ``(B, N)``.

    The field maps fixed to moving points, so it is applied to the fixed points. For the meaning of this error see
    Fitzpatrick et al., IEEE TMI 1998.

    Args:
        moving_points: landmarks in the moving image, ``(B, N, D)``, in voxels of the grid of ``ddf``.
        fixed_points: the same landmarks in the fixed image, ``(B, N, D)``, in voxels of the same grid.
        ddf: displacement in voxels, ``(B, D, *spatial)``.
        spacing: side lengths of a voxel in mm.

    >>> x = torch.tensor([[[1.0, 1.5]]])
    >>> target_registration_error(x + 2, x, torch.ones(1, 2, 4, 5), spacing=(3.0, 4.0))
    tensor([[5.]], dtype=torch.float64)
    """
    check_field("ddf", ddf)
    spatial_dims, shape = ddf.ndim - 2, fixed_points.shape
    if len(shape) != 3 or (shape[0], shape[2]) != ddf.shape[:2] or moving_points.shape != shape:
        raise ValueError(
            f"moving_points and fixed_points have shapes {list(moving_points.shape)} and {list(shape)}, but a ddf of "
            f"shape {list(ddf.shape)} needs ({ddf.shape[0]}, N, {spatial_dims}) for both."
        )
    for name, points in (("moving_points", moving_points), ("fixed_points", fixed_points)):
        if not bool(points.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity. Give finite voxel coordinates.")
    sides = sides_of(spacing, spatial_dims)
    error = _warp_points(fixed_points.double(), ddf) - moving_points
    return torch.linalg.vector_norm(error * error.new_tensor(sides), dim=-1)


def inverse_consistency(
    ddf: Tensor, inverse_ddf: Tensor, *, spacing: Spacing = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""Mean of :math:`|\phi^{-1}(\phi(x)) - x|` in mm (Christensen and Johnson, IEEE TMI 2001): ``(B,)``.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``; the mean is over its voxels ``x``, those of the fixed image.
        inverse_ddf: displacement of the inverse map, on the same grid.
        spacing: side lengths of a voxel in mm.
        mask: voxels to count, ``(B, 1, *spatial)``, nonzero inside (default: the whole grid).
    """
    if ddf.shape != inverse_ddf.shape:
        raise ValueError(
            f"inverse_ddf has shape {list(inverse_ddf.shape)}, but ddf has {list(ddf.shape)}. Give both on one grid."
        )
    inside, spatial_dims = _inside(ddf, mask), ddf.ndim - 2
    sides = sides_of(spacing, spatial_dims)
    error = compose(inverse_ddf, ddf)
    error = error * error.new_tensor(sides).view(-1, *[1] * spatial_dims)
    return _mean_inside(torch.linalg.vector_norm(error, dim=1, keepdim=True), inside)
