"""Compiled loops over voxels, for computations in which torch's operators make several passes over memory.

For each public function, the caller has an equivalent with torch's operators, which gives the same numbers up to
rounding; the tests compare the two. Tensors must be of the kinds that ``kernels.loops`` accepts.

Each compiled loop processes the planes ``first`` to ``last`` (exclusive) along the first spatial axis, so that threads
can share the work. Arrays are ``(C, Z, Y, X)``; for 2-D images Y is 1.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.compiled import compiled
from voxelmorph_monai.threads import run

__all__ = [
    "correlation",
    "force",
    "log_volumes",
    "sample",
    "sample_backward",
    "smooth",
    "square",
    "square_backward",
    "suspects",
]

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_Array = NDArray[Any]

_FEW = 1 << 15  # up to this number of voxels, one thread is as fast as several
_PLANES = 8  # number of planes in the slab of one thread
_ROWS = 16  # rows to process in all planes before the next rows: their data stay in the cache (1.7 times faster)
_BLOCK = 64  # voxels processed together; a constant, so that the compiler knows that their results do not overlap
_Index = np.uintp  # unsigned: for a signed index numba would check whether it counts from the end

# Start of each group of intermediate results for a block: weights in the cell, gradient of the field, corner values.
_TZ, _TY, _TX, _GZ, _GY, _GX = (_Index(_BLOCK * k) for k in range(6))
_V0, _V1, _V2, _V3, _V4, _V5, _V6, _V7 = (_Index(_BLOCK * k) for k in range(6, 14))


def _run(work: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> list[_Result]:
    """Call ``work`` for each of ``jobs``, with as many threads as torch uses."""
    return run(work, jobs, torch.get_num_threads())


def _volumes(tensor: Tensor) -> _Array:
    """Array ``(B, C, Z, Y, X)`` of a tensor, without a copy if the tensor is contiguous; in 2-D Y is 1."""
    array: _Array = tensor.detach().as_subclass(Tensor).contiguous().numpy()
    return array if tensor.ndim == 5 else array[:, :, :, None]


def _slabs(volumes: _Array, planes: int) -> list[tuple[int, int, int]]:
    """Cut each batch item into slabs of about ``planes`` planes: item, first plane, last plane (exclusive)."""
    items, _, n, *_ = volumes.shape
    parts = -(-n // planes) if volumes[0, 0].size > _FEW else 1
    return [(item, n * k // parts, n * (k + 1) // parts) for item in range(items) for k in range(parts)]


# Interpolation


@compiled
def _locate(field: Any, here: Any, n: Any, at: Any, size: Any, dims: Any, scale: Any, base: Any, s: Any) -> None:
    """Find the cells of interpolation for ``n`` points along a row.

    ``base`` gets the index of the first voxel of each cell, ``s`` the position of each point in its cell, 0 to 1.
    Points outside the grid are first moved to its border, and NaN to the first voxel.
    """
    kind = field.dtype.type
    zero = kind(0)
    voxels = _Index(size[0] * size[1] * size[2])
    of_y, of_x = voxels * _Index(dims - 2), voxels * _Index(dims - 1)  # in 2-D, where Y is one voxel, any of_y will do
    end_z, end_y, end_x = kind(size[0] - 1), kind(size[1] - 1), kind(size[2] - 1)
    last_z, last_y, last_x = max(size[0] - 2, 0), max(size[1] - 2, 0), max(size[2] - 2, 0)
    z, y, start = kind(at[0]), kind(at[1]), kind(at[2])
    for x in range(n):
        p = z + scale * field[here + x]
        p = p if p > zero else zero
        p = p if p < end_z else end_z
        i = min(np.int32(p), np.int32(last_z))
        s[_TZ + x] = p - kind(i)
        p = y + scale * field[here + of_y + x]
        p = p if p > zero else zero
        p = p if p < end_y else end_y
        j = min(np.int32(p), np.int32(last_y))
        s[_TY + x] = p - kind(j)
        p = start + kind(np.int32(x)) + scale * field[here + of_x + x]
        p = p if p > zero else zero
        p = p if p < end_x else end_x
        k = min(np.int32(p), np.int32(last_x))
        s[_TX + x] = p - kind(k)
        base[x] = (_Index(i) * _Index(size[1]) + _Index(j)) * _Index(size[2]) + _Index(k)


@compiled
def _steps(size: Any) -> Any:
    """Difference of the flat indices of neighbours along each axis; 0 along an axis of one voxel."""
    z, y, x = size
    return _Index(y * x if z > 1 else 0), _Index(x if y > 1 else 0), _Index(1 if x > 1 else 0)


@compiled
def _sample(image: Any, field: Any, out: Any, first: int, last: int, scale: Any, add: bool) -> None:
    """Sample ``image`` ``(C, Z, Y, X)`` along ``scale * field``; with ``add``, give ``scale * (field + sample)``."""
    channels, size = image.shape[0], image.shape[1:]
    dims = field.shape[0]
    base, s = np.empty(_BLOCK, _Index), np.empty(14 * _BLOCK, image.dtype)
    sz, sy, sx = _steps(size)
    voxels = _Index(size[0] * size[1] * size[2])
    v, u, o = image.reshape(-1), field.reshape(-1), out.reshape(-1)
    for rows in range(0, size[1], _ROWS):
        for z in range(first, last):
            for y in range(rows, min(rows + _ROWS, size[1])):
                for start in range(0, size[2], _BLOCK):
                    n = _Index(min(_BLOCK, size[2] - start))
                    here = _Index((z * size[1] + y) * size[2] + start)
                    _locate(u, here, n, (z, y, start), size, dims, scale, base, s)
                    for c in range(_Index(channels)):
                        for x in range(n):
                            b = base[x] + c * voxels
                            tz, ty, tx = s[_TZ + x], s[_TY + x], s[_TX + x]
                            v0, v2, v4, v6 = v[b], v[b + sy], v[b + sz], v[b + sz + sy]
                            e0 = v0 + tx * (v[b + sx] - v0)
                            e1 = v2 + tx * (v[b + sy + sx] - v2)
                            e2 = v4 + tx * (v[b + sz + sx] - v4)
                            e3 = v6 + tx * (v[b + sz + sy + sx] - v6)
                            f0, f1 = e0 + ty * (e1 - e0), e2 + ty * (e3 - e2)
                            value = f0 + tz * (f1 - f0)
                            there = c * voxels + here + x
                            o[there] = scale * (u[there] + value) if add else value


@compiled
def _sample_backward(
    image: Any,
    field: Any,
    grad: Any,
    of_image: Any,
    of_field: Any,
    first: int,
    last: int,
    scale: Any,
    add: bool,
    want_image: bool,
    want_field: bool,
) -> None:
    """Gradients of ``_sample``.

    The gradient of the image is added to ``of_image``. The gradient of the field is written to ``of_field``, and with
    ``add`` added to it.
    """
    channels, size = image.shape[0], image.shape[1:]
    dims = field.shape[0]
    kind = image.dtype.type
    zero = kind(0)
    base, s = np.empty(_BLOCK, _Index), np.empty(14 * _BLOCK, image.dtype)
    sz, sy, sx = _steps(size)
    voxels = _Index(size[0] * size[1] * size[2])
    of_y, of_x = voxels * _Index(dims - 2), voxels * _Index(dims - 1)
    end_z, end_y, end_x = kind(size[0] - 1), kind(size[1] - 1), kind(size[2] - 1)
    v, u, g, ov, ou = image.reshape(-1), field.reshape(-1), grad.reshape(-1), of_image.reshape(-1), of_field.reshape(-1)
    outer = scale if add else kind(1)
    for rows in range(0, size[1], _ROWS):
        for z in range(first, last):
            for y in range(rows, min(rows + _ROWS, size[1])):
                for start in range(0, size[2], _BLOCK):
                    n = _Index(min(_BLOCK, size[2] - start))
                    here = _Index((z * size[1] + y) * size[2] + start)
                    _locate(u, here, n, (z, y, start), size, dims, scale, base, s)
                    for x in range(n):
                        s[_GZ + x] = s[_GY + x] = s[_GX + x] = zero
                    for c in range(_Index(channels)):
                        of_c = c * voxels
                        if want_field:
                            for x in range(n):
                                b = base[x] + of_c
                                s[_V0 + x], s[_V1 + x] = v[b], v[b + sx]
                                s[_V2 + x], s[_V3 + x] = v[b + sy], v[b + sy + sx]
                                s[_V4 + x], s[_V5 + x] = v[b + sz], v[b + sz + sx]
                                s[_V6 + x], s[_V7 + x] = v[b + sz + sy], v[b + sz + sy + sx]
                            for x in range(n):
                                tz, ty, tx = s[_TZ + x], s[_TY + x], s[_TX + x]
                                slope = g[of_c + here + x]
                                d0, d1 = s[_V1 + x] - s[_V0 + x], s[_V3 + x] - s[_V2 + x]
                                d2, d3 = s[_V5 + x] - s[_V4 + x], s[_V7 + x] - s[_V6 + x]
                                e0, e2 = s[_V0 + x] + tx * d0, s[_V4 + x] + tx * d2
                                f0, f1 = s[_V2 + x] + tx * d1 - e0, s[_V6 + x] + tx * d3 - e2
                                s[_GZ + x] += slope * (e2 - e0 + ty * (f1 - f0))
                                s[_GY + x] += slope * (f0 + tz * (f1 - f0))
                                d0, d2 = d0 + ty * (d1 - d0), d2 + ty * (d3 - d2)
                                s[_GX + x] += slope * (d0 + tz * (d2 - d0))
                        if want_image:
                            for x in range(n):
                                tz, ty, tx = s[_TZ + x], s[_TY + x], s[_TX + x]
                                far = outer * g[of_c + here + x] * tz
                                near = outer * g[of_c + here + x] - far
                                e1, e3 = near * ty, far * ty
                                e0, e2 = near - e1, far - e3
                                s[_V1 + x], s[_V3 + x], s[_V5 + x], s[_V7 + x] = e0 * tx, e1 * tx, e2 * tx, e3 * tx
                                s[_V0 + x], s[_V2 + x] = e0 - e0 * tx, e1 - e1 * tx
                                s[_V4 + x], s[_V6 + x] = e2 - e2 * tx, e3 - e3 * tx
                            for x in range(n):
                                b = base[x] + of_c
                                ov[b] += s[_V0 + x]
                                ov[b + sx] += s[_V1 + x]
                                ov[b + sy] += s[_V2 + x]
                                ov[b + sy + sx] += s[_V3 + x]
                                ov[b + sz] += s[_V4 + x]
                                ov[b + sz + sx] += s[_V5 + x]
                                ov[b + sz + sy] += s[_V6 + x]
                                ov[b + sz + sy + sx] += s[_V7 + x]
                    if want_field:  # the gradient is 0 where a point was moved to the border
                        for x in range(n):
                            there = here + x
                            p = kind(z) + scale * u[there]
                            d = scale * s[_GZ + x] if zero < p and p < end_z else zero
                            ou[there] = outer * (d + g[there]) + ou[there] if add else d
                        if dims == 3:
                            for x in range(n):
                                there = of_y + here + x
                                p = kind(y) + scale * u[there]
                                d = scale * s[_GY + x] if zero < p and p < end_y else zero
                                ou[there] = outer * (d + g[there]) + ou[there] if add else d
                        for x in range(n):
                            there = of_x + here + x
                            p = kind(start) + kind(np.int32(x)) + scale * u[there]
                            d = scale * s[_GX + x] if zero < p and p < end_x else zero
                            ou[there] = outer * (d + g[there]) + ou[there] if add else d


def _rounds(fields: _Array, scale: float) -> list[list[tuple[int, int, int]]]:
    """Slabs of ``fields`` in rounds: threads can share a round, because its slabs write to different planes."""
    planes = torch.arange(fields.shape[2])
    spans = []  # for each item: first and last plane that the points of each plane reach (all planes for NaN)
    for field in fields:
        ends = torch.from_numpy(field[0]).flatten(1).aminmax(dim=1)
        low, high = (planes + scale * end for end in ends)
        inside = (end.clamp_(0, len(planes)) for end in (low.nan_to_num_(-torch.inf), high.nan_to_num_(torch.inf)))
        spans.append([end.tolist() for end in inside])
    rounds: list[list[tuple[int, int, int]]] = []
    taken: list[dict[int, int]] = []  # for each round: the plane before which the last slab of each item ends
    for slab in _slabs(fields, _PLANES):
        item, first, last = slab
        lowest, highest = (min(spans[item][0][first:last]), max(spans[item][1][first:last]))
        # two voxels more than the points reach, for the end of their cells and for rounding, and the slab itself
        begin, end = min(first, int(lowest) - 2), max(last, int(highest) + 4)
        for members, before in zip(rounds, taken, strict=True):
            if begin >= before.get(item, begin):
                members.append(slab)
                before[item] = end
                break
        else:
            rounds.append([slab])
            taken.append({item: end})
    return rounds


def sample(image: Tensor, ddf: Tensor) -> Tensor:
    """``blocks.warp`` with linear interpolation and the border value outside.

    Args:
        image: ``(B, C, *spatial)``.
        ddf: displacement in voxels, ``(B, D, *spatial)``.

    Returns:
        The warped image, ``(B, C, *spatial)``.
    """
    out = image.new_empty(image.shape)
    _forward(image, ddf, out, 1.0, False)
    return out


def square(ddf: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Compose ``scale`` times ``ddf`` with itself.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``.
        scale: factor of the displacement before it is composed.
        out: contiguous tensor of the same shape to write to (default: a new one).

    Returns:
        Displacement of the composed map in voxels, ``(B, D, *spatial)``.
    """
    out = ddf.new_empty(ddf.shape) if out is None else out
    _forward(ddf, ddf, out, scale, True)
    return out


def _forward(image: Tensor, ddf: Tensor, out: Tensor, scale: float, add: bool) -> None:
    images, fields, found = (_volumes(tensor) for tensor in (image, ddf, out))
    factor = images.dtype.type(scale)

    def work(slab: tuple[int, int, int]) -> None:
        item, first, last = slab
        _sample(images[item], fields[item], found[item], first, last, factor, add)

    _run(work, _slabs(images, -(-images.shape[2] // (4 * torch.get_num_threads()))))


def sample_backward(
    image: Tensor, ddf: Tensor, grad: Tensor, want_image: bool, want_ddf: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``sample`` with respect to image and field.

    Args:
        image: ``(B, C, *spatial)``, as given to ``sample``.
        ddf: displacement in voxels, ``(B, D, *spatial)``, as given to ``sample``.
        grad: gradient with respect to the warped image, ``(B, C, *spatial)``.
        want_image: compute the gradient with respect to ``image``.
        want_ddf: compute the gradient with respect to ``ddf``.

    Returns:
        The two gradients, in the shapes of ``image`` and ``ddf``; None for one that is not wanted.
    """
    of_image = image.new_zeros(image.shape) if want_image else None
    of_ddf = ddf.new_empty(ddf.shape) if want_ddf else None
    _backward(image, ddf, grad, of_image, of_ddf, 1.0, False)
    return of_image, of_ddf


def square_backward(ddf: Tensor, grad: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Gradient of ``square``.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``, as given to ``square``.
        grad: gradient with respect to the result of ``square``, ``(B, D, *spatial)``.
        scale: as given to ``square``.
        out: contiguous tensor of the same shape to write to (default: a new one).

    Returns:
        Gradient with respect to ``ddf``, ``(B, D, *spatial)``.
    """
    out = ddf.new_zeros(ddf.shape) if out is None else out.zero_()
    _backward(ddf, ddf, grad, out, out, scale, True)
    return out


def _backward(
    image: Tensor,
    ddf: Tensor,
    grad: Tensor,
    of_image: Tensor | None,
    of_ddf: Tensor | None,
    scale: float,
    add: bool,
) -> None:
    images, fields, grads = (_volumes(tensor) for tensor in (image, ddf, grad))
    of_images, of_fields = (
        given if found is None else _volumes(found) for given, found in ((images, of_image), (fields, of_ddf))
    )
    factor = images.dtype.type(scale)
    wanted = of_image is not None, of_ddf is not None

    def work(slab: tuple[int, int, int]) -> None:
        k, first, last = slab
        arrays = images[k], fields[k], grads[k], of_images[k], of_fields[k]
        _sample_backward(*arrays, first, last, factor, add, *wanted)

    for slabs in _rounds(fields, scale) if torch.get_num_threads() > 1 else [_slabs(fields, fields.shape[2])]:
        _run(work, slabs)


# Local correlation


@compiled
def _enter_products(acc: Any, a: Any, b: Any, of_a: Any, of_b: Any, sign: Any) -> None:
    """Add the values, squares and product of two planes, centred and scaled, to ``acc``; ``sign`` -1 subtracts them."""
    for i in range(a.size):
        x, y = (a[i] - of_a[0]) * of_a[1], (b[i] - of_b[0]) * of_b[1]
        u, v = sign * np.float64(x), np.float64(y)
        acc[0, i] += u
        acc[1, i] += sign * v
        acc[2, i] += u * np.float64(x)
        acc[3, i] += sign * v * v
        acc[4, i] += u * v


@compiled
def _enter_maps(acc: Any, maps: Any, own: Any, z: Any, sign: Any) -> None:
    p, q, means = maps[0, z].reshape(-1), maps[own, z].reshape(-1), maps[own + 1, z].reshape(-1)
    for i in range(p.size):
        acc[0, i] += sign * np.float64(p[i])
        acc[1, i] += sign * np.float64(q[i])
        acc[2, i] += sign * np.float64(means[i])


@compiled
def _enter_row(row: Any, acc: Any, y: Any, sign: Any) -> None:
    width = row.shape[1]
    for k in range(len(row)):
        for x in range(width):
            row[k, x] += sign * acc[k, y * width + x]


@compiled
def _entering(at: Any, first: Any, reach: Any, n: Any) -> Any:
    """Range of planes (or rows) that enter the window around ``at``, compared with the window before.

    The window holds up to ``reach`` of the ``n`` planes on each side of ``at``. At ``first`` all its planes enter.
    """
    return max(first - reach, 0) if at == first else at + reach, min(at + reach + 1, n)


@compiled
def _move_rows(row: Any, acc: Any, y: Any, reach: Any, height: Any) -> None:
    """Update ``row`` from the sum of the rows of ``acc`` around ``y - 1`` to that around ``y``."""
    if y == 0:
        row[:] = 0.0
    start, stop = _entering(y, 0, reach, height)
    for near in range(start, stop):
        _enter_row(row, acc, near, 1.0)
    if y - reach - 1 >= 0:
        _enter_row(row, acc, y - reach - 1, -1.0)


@compiled
def _running_sums(row: Any, reach: Any, ends: Any) -> None:
    """Write cumulative sums to ``ends``: the sum over the window at x is ``ends[:, x + window] - ends[:, x]``."""
    width = row.shape[1]
    for k in range(len(row)):
        total = 0.0
        for x in range(reach + 1):
            ends[k, x] = 0.0
        for x in range(width):
            total += row[k, x]
            ends[k, x + reach + 1] = total
        for x in range(width + reach + 1, width + 2 * reach + 1):
            ends[k, x] = total


@compiled
def _inside(at: Any, n: Any, reach: Any) -> Any:
    """Number of indices from ``at - reach`` to ``at + reach`` that lie in 0 to ``n - 1``."""
    return min(at + reach + 1, n) - max(at - reach, 0)


@compiled
def _correlation(
    a: Any, b: Any, of_a: Any, of_b: Any, reaches: Any, maps: Any, want_a: bool, want_b: bool, first: int, last: int
) -> Any:
    """Sum of the squared correlations over the windows around the voxels of some planes; see ``losses._MeanLNCC``.

    Sums over windows are updated in float64 as the window moves: what enters is added, what leaves is subtracted.
    ``maps`` gets p of each window and, for each image with a gradient, q and the contribution of the means.
    """
    kind = a.dtype.type
    depth, height, width = a.shape
    rz, ry, rx = reaches
    n = float((2 * rz + 1) * (2 * ry + 1) * (2 * rx + 1))
    acc, row, ends = np.zeros((5, height * width)), np.empty((5, width)), np.empty((5, width + 2 * rx + 1))
    blank_a, blank_b = np.float64((kind(0) - of_a[0]) * of_a[1]), np.float64((kind(0) - of_b[0]) * of_b[1])
    lost = 32 * np.finfo(a.dtype).eps  # as in losses._local_moments
    total = 0.0
    for z in range(first, last):
        start, stop = _entering(z, first, rz, depth)
        for near in range(start, stop):
            _enter_products(acc, a[near].reshape(-1), b[near].reshape(-1), of_a, of_b, 1.0)
        if z - rz - 1 >= max(first - rz, 0):
            _enter_products(acc, a[z - rz - 1].reshape(-1), b[z - rz - 1].reshape(-1), of_a, of_b, -1.0)
        for y in range(height):
            _move_rows(row, acc, y, ry, height)
            _running_sums(row, rx, ends)
            covered = float(_inside(z, depth, rz) * _inside(y, height, ry))
            for x in range(width):
                far = x + 2 * rx + 1
                outside = n - covered * _inside(x, width, rx)  # voxels beyond the border, where images are 0
                sum_a = ends[0, far] - ends[0, x] + outside * blank_a
                sum_b = ends[1, far] - ends[1, x] + outside * blank_b
                squares_a = ends[2, far] - ends[2, x] + outside * blank_a * blank_a
                squares_b = ends[3, far] - ends[3, x] + outside * blank_b * blank_b
                cross = kind(ends[4, far] - ends[4, x] + outside * blank_a * blank_b - sum_a * sum_b / n)
                floor_a, floor_b = max(lost * squares_a, 1e-5), max(lost * squares_b, 1e-5)
                variance_a, variance_b = squares_a - sum_a * sum_a / n, squares_b - sum_b * sum_b / n
                v_a, v_b = kind(max(variance_a, floor_a)), kind(max(variance_b, floor_b))
                p = cross / (v_a * v_b)
                cc = cross * p
                total += min(np.float64(cc), 1.0)  # rounding errors can exceed 1
                maps[0, z, y, x] = p
                if want_a:
                    q = cc / v_a if variance_a > floor_a else kind(0)
                    maps[1, z, y, x] = q
                    maps[2, z, y, x] = p * kind(sum_b) - q * kind(sum_a)
                if want_b:
                    k = 3 if want_a else 1
                    q = cc / v_b if variance_b > floor_b else kind(0)
                    maps[k, z, y, x] = q
                    maps[k + 1, z, y, x] = p * kind(sum_a) - q * kind(sum_b)
    return total


@compiled
def _correlation_slope(
    a: Any,
    b: Any,
    of_a: Any,
    of_b: Any,
    reaches: Any,
    maps: Any,
    own: Any,
    factor: Any,
    out: Any,
    first: int,
    last: int,
) -> None:
    """Gradient with respect to ``a``, summed over the windows around each voxel; ``own`` is the first map of ``a``."""
    kind = a.dtype.type
    depth, height, width = a.shape
    rz, ry, rx = reaches
    n = float((2 * rz + 1) * (2 * ry + 1) * (2 * rx + 1))
    acc, row, ends = np.zeros((3, height * width)), np.empty((3, width)), np.empty((3, width + 2 * rx + 1))
    for z in range(first, last):
        start, stop = _entering(z, first, rz, depth)
        for near in range(start, stop):
            _enter_maps(acc, maps, own, near, 1.0)
        if z - rz - 1 >= max(first - rz, 0):
            _enter_maps(acc, maps, own, z - rz - 1, -1.0)
        for y in range(height):
            _move_rows(row, acc, y, ry, height)
            _running_sums(row, rx, ends)
            for x in range(width):
                far = x + 2 * rx + 1
                u, v = (a[z, y, x] - of_a[0]) * of_a[1], (b[z, y, x] - of_b[0]) * of_b[1]
                p, q = kind(ends[0, far] - ends[0, x]), kind(ends[1, far] - ends[1, x])
                means = kind((ends[2, far] - ends[2, x]) / n)
                out[z, y, x] = factor * (v * p - u * q - means)


def correlation(
    images: Sequence[Tensor], scales: Sequence[tuple[Tensor, Tensor]], window: int, wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Mean squared correlation of two images over the windows around all voxels, and its gradients.

    Args:
        images: two images, ``(B, C, *spatial)``.
        scales: for each image, the offset to subtract from each channel, and the factor to multiply it by, both
            ``(B, C, 1, ...)``.
        window: side of the windows in voxels, odd.
        wanted: which images need a gradient.

    Returns:
        The mean over all windows, 0 to 1, and a gradient for each image, ``(B, C, *spatial)``, or None.
    """
    channels = [_volumes(x).reshape(-1, 1, *_volumes(x).shape[2:]) for x in images]
    size = channels[0].shape[2:]
    of = [list(zip(*(x.flatten().numpy() for x in scale), strict=True)) for scale in scales]
    reaches = window // 2, window // 2 if images[0].ndim == 5 else 0, window // 2
    maps = np.empty((len(channels[0]), 1 + 2 * sum(wanted), *size), channels[0].dtype)
    gradients = [images[0].new_empty(images[0].shape) if each else None for each in wanted]
    slabs = _slabs(channels[0], max(-(-size[0] // torch.get_num_threads()), 2 * window))
    a, b = channels

    def work(slab: tuple[int, int, int]) -> float:
        k, first, last = slab
        found: float = _correlation(a[k, 0], b[k, 0], of[0][k], of[1][k], reaches, maps[k], *wanted, first, last)
        return found

    total = sum(_run(work, slabs))
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        out = _volumes(gradient).reshape(a.shape)
        own = 3 if i and gradients[0] is not None else 1

        def slope(slab: tuple[int, int, int], i: int = i, own: int = own, out: _Array = out) -> None:
            k, first, last = slab
            x, y = channels[i][k, 0], channels[1 - i][k, 0]
            factor = of[i][k][1] * a.dtype.type(2 / a.size)
            _correlation_slope(x, y, of[i][k], of[1 - i][k], reaches, maps[k], own, factor, out[k, 0], first, last)

        _run(slope, slabs)
    return images[0].new_tensor(total / a.size), gradients


# Steps of a refinement


@compiled
def _log_volumes(field: Any, least: Any, out: Any, first: int, last: int) -> None:
    """Logarithm of the Jacobian determinant, or of ``least`` if that is larger; differences as in ``blocks``."""
    dims, depth, height, width = field.shape
    kind = field.dtype.type
    half, one = kind(0.5), kind(1)
    voxels = _Index(depth * height * width)
    of_y, of_x = voxels * _Index(dims - 2), voxels * _Index(dims - 1)  # in 2-D, where Y is one voxel, any of_y will do
    sz, sy, sx = _steps((depth, height, width))
    none = _Index(0)
    u, o = field.reshape(-1), out.reshape(-1)
    for z in range(first, last):
        az, bz = (sz if z < depth - 1 else none), (none - sz if z > 0 else none)
        wz = half if 0 < z < depth - 1 else one
        for y in range(height):
            ay, by = (sy if y < height - 1 else none), (none - sy if y > 0 else none)
            wy = half if 0 < y < height - 1 else one
            for x in range(width):
                ax, bx = (sx if x < width - 1 else none), (none - sx if x > 0 else none)
                wx = half if 0 < x < width - 1 else one
                here = _Index((z * height + y) * width + x)
                there, last_one = here + of_y, here + of_x
                a0 = wz * (u[here + az] - u[here + bz]) + one
                a1 = wz * (u[there + az] - u[there + bz])
                a2 = wz * (u[last_one + az] - u[last_one + bz])
                b0 = wy * (u[here + ay] - u[here + by])
                b1 = wy * (u[there + ay] - u[there + by]) + one
                b2 = wy * (u[last_one + ay] - u[last_one + by])
                c0 = wx * (u[here + ax] - u[here + bx])
                c1 = wx * (u[there + ax] - u[there + bx])
                c2 = wx * (u[last_one + ax] - u[last_one + bx]) + one
                found = a0 * (b1 * c2 - b2 * c1) + a1 * (b2 * c0 - b0 * c2) + a2 * (b0 * c1 - b1 * c0)
                o[here] = found if found > least else least
    flat = o[first * height * width : last * height * width]
    for i in range(flat.size):
        flat[i] = np.log(flat[i])


def log_volumes(ddf: Tensor, least: float) -> Tensor:
    """``jacobian_determinant(ddf).clamp_min(least).log()`` of ``ddf`` ``(B, D, *spatial)``: ``(B, 1, *spatial)``."""
    out = ddf.new_empty((len(ddf), 1, *ddf.shape[2:]))
    fields, found = _volumes(ddf), _volumes(out)
    lowest = fields.dtype.type(least)

    def work(slab: tuple[int, int, int]) -> None:
        item, first, last = slab
        _log_volumes(fields[item], lowest, found[item, 0], first, last)

    _run(work, _slabs(fields, _PLANES))
    return out


@compiled
def _force(image: Any, slope: Any, out: Any, first: int, last: int) -> None:
    channels, depth, height, width = image.shape
    kind = image.dtype.type
    half, zero = kind(0.5), kind(0)
    axes = len(out)
    for z in range(first, last):
        for y in range(height):
            out[0, z, y] = zero
            out[1, z, y] = zero
            out[axes - 1, z, y] = zero
            for c in range(channels):
                if 0 < z < depth - 1:
                    for x in range(width):
                        out[0, z, y, x] += half * slope[c, z, y, x] * (image[c, z + 1, y, x] - image[c, z - 1, y, x])
                if 0 < y < height - 1:  # never in 2-D
                    for x in range(width):
                        out[1, z, y, x] += half * slope[c, z, y, x] * (image[c, z, y + 1, x] - image[c, z, y - 1, x])
                for x in range(1, width - 1):
                    out[axes - 1, z, y, x] += half * slope[c, z, y, x] * (image[c, z, y, x + 1] - image[c, z, y, x - 1])


def force(image: Tensor, slope: Tensor) -> Tensor:
    """``objective.image_force`` of ``image`` and ``slope``, both ``(B, C, *spatial)``: ``(B, D, *spatial)``."""
    out = image.new_empty((len(image), image.ndim - 2, *image.shape[2:]))
    images, slopes, found = (_volumes(tensor) for tensor in (image, slope, out))

    def work(slab: tuple[int, int, int]) -> None:
        item, first, last = slab
        _force(images[item], slopes[item], found[item], first, last)

    _run(work, _slabs(images, _PLANES))
    return out


@compiled
def _smooth(field: Any, weights: Any, out: Any, first: int, last: int) -> None:
    """Convolve planes with ``[w, 1 - 2 w, w]`` along each axis; the border value continues beyond the border."""
    channels, depth, height, width = field.shape
    plane, row = np.empty((height, width), field.dtype), np.empty(width, field.dtype)
    wz, wy, wx = weights
    two = field.dtype.type(2)
    one = field.dtype.type(1)
    for z in range(first, last):
        for c in range(channels):
            here, above, below = field[c, z], field[c, min(z + 1, depth - 1)], field[c, max(z - 1, 0)]
            for y in range(height):
                for x in range(width):
                    plane[y, x] = (one - two * wz) * here[y, x] + wz * (above[y, x] + below[y, x])
            for y in range(height):
                after, before = min(y + 1, height - 1), max(y - 1, 0)
                for x in range(width):
                    row[x] = (one - two * wy) * plane[y, x] + wy * (plane[after, x] + plane[before, x])
                end = width - 1
                out[c, z, y, 0] = (one - wx) * row[0] + wx * row[min(1, end)]
                for x in range(1, end):
                    out[c, z, y, x] = (one - two * wx) * row[x] + wx * (row[x + 1] + row[x - 1])
                if end > 0:
                    out[c, z, y, end] = (one - wx) * row[end] + wx * row[end - 1]


def smooth(field: Tensor, passes: Sequence[int], weights: Sequence[float]) -> Tensor:
    """Convolve a field repeatedly with ``[w, 1 - 2 w, w]`` along each axis.

    Args:
        field: ``(B, C, *spatial)``.
        passes: number of passes along each axis, ``(D,)``.
        weights: weight ``w`` along each axis, ``(D,)``.

    Returns:
        The smoothed field, ``(B, C, *spatial)``.
    """
    for number in range(max(passes)):
        source, out = field, torch.empty_like(field, memory_format=torch.contiguous_format)
        fields, found = _volumes(source), _volumes(out)
        kind = fields.dtype.type
        used = [kind(w) if number < n else kind(0) for n, w in zip(passes, weights, strict=True)]
        if len(used) == 2:
            used.insert(1, kind(0))

        def work(
            slab: tuple[int, int, int],
            fields: _Array = fields,
            found: _Array = found,
            used: tuple[Any, ...] = tuple(used),
        ) -> None:
            item, first, last = slab
            _smooth(fields[item], used, found[item], first, last)

        _run(work, _slabs(fields, _PLANES))
        field = out
    return field


# Folds


@compiled
def _surely_above(u: Any, here: Any, voxels: Any, dims: Any, back: Any, ahead: Any, weight: Any, volume: Any) -> bool:
    """Whether the Jacobian determinant at voxel ``here`` is above ``volume`` by more than rounding errors.

    The difference along an axis is ``weight`` times the difference of the voxels at offsets ``ahead`` and ``back``.
    """
    kind = u.dtype.type
    one = kind(1)
    a0 = weight[0] * (u[here + ahead[0]] - u[here + back[0]]) + one
    a1 = weight[0] * (u[here + voxels + ahead[0]] - u[here + voxels + back[0]])
    if dims == 2:
        b0 = weight[2] * (u[here + ahead[2]] - u[here + back[2]])
        b1 = weight[2] * (u[here + voxels + ahead[2]] - u[here + voxels + back[2]]) + one
        found = a0 * b1 - a1 * b0
        bound = (abs(a0) + abs(a1)) * (abs(b0) + abs(b1))
    else:
        third = here + voxels + voxels
        a2 = weight[0] * (u[third + ahead[0]] - u[third + back[0]])
        b0 = weight[1] * (u[here + ahead[1]] - u[here + back[1]])
        b1 = weight[1] * (u[here + voxels + ahead[1]] - u[here + voxels + back[1]]) + one
        b2 = weight[1] * (u[third + ahead[1]] - u[third + back[1]])
        c0 = weight[2] * (u[here + ahead[2]] - u[here + back[2]])
        c1 = weight[2] * (u[here + voxels + ahead[2]] - u[here + voxels + back[2]])
        c2 = weight[2] * (u[third + ahead[2]] - u[third + back[2]]) + one
        found = a0 * (b1 * c2 - b2 * c1) + a1 * (b2 * c0 - b0 * c2) + a2 * (b0 * c1 - b1 * c0)
        bound = (abs(a0) + abs(a1) + abs(a2)) * (abs(b0) + abs(b1) + abs(b2)) * (abs(c0) + abs(c1) + abs(c2))
    return found - kind(32 * np.finfo(u.dtype).eps) * bound > volume


@compiled
def _suspects(field: Any, volume: Any, out: Any, first: int, last: int) -> None:
    """Mark the voxels that may keep ``volume`` or less, by forward or central differences and up to rounding."""
    dims, depth, height, width = field.shape
    kind = field.dtype.type
    half, one = kind(0.5), kind(1)
    voxels = _Index(depth * height * width)
    sz, sy, sx = _steps((depth, height, width))
    none = _Index(0)
    u, o = field.reshape(-1), out.reshape(-1)
    for z in range(first, last):
        az, bz = (sz if z < depth - 1 else none), (none - sz if z > 0 else none)
        fz, wz = (none if z < depth - 1 else bz), (half if 0 < z < depth - 1 else one)
        for y in range(height):
            ay, by = (sy if y < height - 1 else none), (none - sy if y > 0 else none)
            fy, wy = (none if y < height - 1 else by), (half if 0 < y < height - 1 else one)
            for x in range(width):
                ax, bx = (sx if x < width - 1 else none), (none - sx if x > 0 else none)
                fx, wx = (none if x < width - 1 else bx), (half if 0 < x < width - 1 else one)
                here = _Index((z * height + y) * width + x)
                central = _surely_above(u, here, voxels, dims, (bz, by, bx), (az, ay, ax), (wz, wy, wx), volume)
                forward = _surely_above(u, here, voxels, dims, (fz, fy, fx), (az, ay, ax), (one, one, one), volume)
                o[here] = not (central and forward)


def suspects(ddf: Tensor, volume: float) -> Tensor:
    """Flat indices of all voxels that may keep ``volume`` or less, by central or forward differences.

    Rounding errors can add voxels, but never leave one out.

    Args:
        ddf: displacement of one pair in voxels, ``(1, D, *spatial)``, with at least 2 voxels along each axis.
        volume: fraction of the volume of a voxel; where nothing moves, a voxel keeps 1.

    Returns:
        Indices ``(N,)``, int64.
    """
    fields = _volumes(ddf)
    found = np.empty(fields.shape[2:], bool)
    least = fields.dtype.type(volume)

    def work(slab: tuple[int, int, int]) -> None:
        _suspects(fields[0], least, found, *slab[1:])

    _run(work, _slabs(fields, _PLANES))
    return torch.from_numpy(np.flatnonzero(found))
