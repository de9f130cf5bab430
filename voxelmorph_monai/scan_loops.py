"""Loops over the voxels of scans, compiled by numba: interpolation along maps between grids, in one pass.

The callers have equivalents with SciPy's operators, which need several passes and the coordinates of all voxels in
memory. Both give the same numbers up to rounding: coordinates and weights are in float64 here, too. Nothing here needs
torch, which takes longer to import than the loops take to run.

Arrays are ``(X, Y, Z)`` in any order in memory; in results X is fastest, as in NIfTI files.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.compiled import compiled
from voxelmorph_monai.threads import num_threads, run

__all__ = ["bend", "displace", "interleaved", "pull", "volume_change"]

_Array = NDArray[Any]

_MOST = 32  # slabs of a volume, shared by the threads
_ROUNDED = 1e-9  # voxels by which rounding may move a point off the outermost ones
_Index = np.intp


def _for_slabs(work: Callable[[int, int], None], planes: int) -> None:
    parts = min(_MOST, planes)
    slabs = [(planes * k // parts, planes * (k + 1) // parts) for k in range(parts)]
    run(lambda slab: work(*slab), slabs, num_threads())


def _flat(volume: _Array) -> tuple[_Array, _Array]:
    """The voxels of a volume in the order in which they lie in memory, and how far its axes are apart there, in voxels.

    Along an axis of one voxel they are 0 apart.
    """
    flat = volume.ravel("A")
    sizes = np.array(volume.shape)
    steps = np.ones(3, _Index)
    axes = (0, 1, 2) if volume.flags.f_contiguous else (2, 1, 0)
    for axis, before in zip(axes[1:], axes, strict=False):
        steps[axis] = steps[before] * sizes[before]
    return flat, np.where(sizes > 1, steps, 0)


@compiled
def _cell(p: Any, size: Any, steps: Any) -> Any:
    """Offset of the first voxel of a cell, and where in it a point lies that is moved into the volume, 0 to 1."""
    p = min(max(p, 0.0), size - 1.0)
    low = min(int(p), max(size - 2, 0))
    return _Index(low) * steps, p - low


@compiled
def _mixed(v: Any, b: Any, sx: Any, sy: Any, sz: Any, tx: Any, ty: Any, tz: Any) -> Any:
    e0 = v[b] + tx * (v[b + sx] - np.float64(v[b]))
    e1 = v[b + sy] + tx * (v[b + sy + sx] - np.float64(v[b + sy]))
    e2 = v[b + sz] + tx * (v[b + sz + sx] - np.float64(v[b + sz]))
    e3 = v[b + sz + sy] + tx * (v[b + sz + sy + sx] - np.float64(v[b + sz + sy]))
    f0, f1 = e0 + ty * (e1 - e0), e2 + ty * (e3 - e2)
    return f0 + tz * (f1 - f0)


@compiled
def _pull(
    v: Any, steps: Any, size: Any, m: Any, moved: bool, ux: Any, uy: Any, uz: Any, out: Any, first: int, last: int,
    reach: float, outside: Any, linear: bool,
) -> None:  # fmt: skip
    """Interpolate a volume at ``m`` times (voxel + displacement) for planes of ``out`` ``(Z, Y, X)``."""
    low, high = -reach, size.astype(np.float64) - 1 + reach
    for z in range(first, last):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                i, j, k = float(x), float(y), float(z)
                if moved:
                    i, j, k = i + ux[z, y, x], j + uy[z, y, x], k + uz[z, y, x]
                px = m[0, 0] * i + m[0, 1] * j + m[0, 2] * k + m[0, 3]
                py = m[1, 0] * i + m[1, 1] * j + m[1, 2] * k + m[1, 3]
                pz = m[2, 0] * i + m[2, 1] * j + m[2, 2] * k + m[2, 3]
                within = px >= low and py >= low and pz >= low and px < high[0] and py < high[1] and pz < high[2]
                if not within:
                    out[z, y, x] = outside
                elif linear:
                    bx, tx = _cell(px, size[0], steps[0])
                    by, ty = _cell(py, size[1], steps[1])
                    bz, tz = _cell(pz, size[2], steps[2])
                    out[z, y, x] = _mixed(v, bx + by + bz, steps[0], steps[1], steps[2], tx, ty, tz)
                else:
                    a = min(max(int(np.floor(px + 0.5)), 0), size[0] - 1)
                    b = min(max(int(np.floor(py + 0.5)), 0), size[1] - 1)
                    c = min(max(int(np.floor(pz + 0.5)), 0), size[2] - 1)
                    out[z, y, x] = v[a * steps[0] + b * steps[1] + c * steps[2]]


def pull(
    volume: _Array, matrix: _Array, size: Sequence[int], ddf: _Array | None, order: int, outside: float, reach: float
) -> _Array:
    """Resample a volume on a grid; the result has the dtype of the volume.

    Args:
        volume: ``(X, Y, Z)``; floating point if ``order`` is 1.
        matrix: 4 x 4, from displaced voxel coordinates of the grid to voxel coordinates of the volume.
        size: size of the grid.
        ddf: displacement ``(3, *size)`` in voxels of the grid; None for no displacement.
        order: 1 for linear interpolation, 0 for nearest neighbour.
        outside: value of points more than ``reach`` voxels outside the volume.
        reach: distance in voxels over which the values at the border of the volume continue outside it.
    """
    found = np.empty(tuple(size), volume.dtype, order="F")
    wide, kept = matrix[:3].astype(np.float64), volume.dtype
    if order == 0:  # whatever the type is: so many types of integers as there are sizes
        volume, found = (each.view(f"u{kept.itemsize}") for each in (volume, found))
        outside = np.asarray(outside, kept).reshape(1).view(volume.dtype)[0]
    else:
        outside = kept.type(outside)
    wide[np.array(volume.shape) == 1] = 0  # across a slice there is no outside
    flat, steps = _flat(volume)
    u = [found.T] * 3 if ddf is None else [np.ascontiguousarray(each.T) for each in ddf]
    sizes, reached = np.array(volume.shape, _Index), reach + _ROUNDED * (reach == 0)

    def work(first: int, last: int) -> None:
        moved = ddf is not None
        _pull(flat, steps, sizes, wide, moved, *u, found.T, first, last, reached, outside, order == 1)

    _for_slabs(work, found.shape[2])
    return found.view(kept)


@compiled
def _within(px: Any, py: Any, pz: Any, size: Any) -> Any:
    """Whether a point lies at most half a voxel from the outermost ones; across a slice everything does."""
    return (
        (size[0] == 1 or (px >= -0.5 and px < size[0] - 0.5))
        and (size[1] == 1 or (py >= -0.5 and py < size[1] - 0.5))
        and (size[2] == 1 or (pz >= -0.5 and pz < size[2] - 0.5))
    )


@compiled
def _displace(ux: Any, uy: Any, uz: Any, steps: Any, size: Any, points: Any, out: Any, first: int, last: int) -> None:
    """Interpolate a displacement at ``points`` ``(3, N)`` in its voxels; beyond the grid it is 0."""
    for n in range(first, last):
        px, py, pz = points[0, n], points[1, n], points[2, n]
        if _within(px, py, pz, size):
            bx, tx = _cell(px, size[0], steps[0])
            by, ty = _cell(py, size[1], steps[1])
            bz, tz = _cell(pz, size[2], steps[2])
            b = bx + by + bz
            out[0, n] = _mixed(ux, b, steps[0], steps[1], steps[2], tx, ty, tz)
            out[1, n] = _mixed(uy, b, steps[0], steps[1], steps[2], tx, ty, tz)
            out[2, n] = _mixed(uz, b, steps[0], steps[1], steps[2], tx, ty, tz)
        else:
            out[0, n] = out[1, n] = out[2, n] = 0.0


def displace(ddf: _Array, points: _Array) -> _Array:
    """Displacement ``(3, ...)`` in float64 at ``points`` ``(3, ...)``, both in voxels of the grid of ``ddf``."""
    flat, (steps, *_) = zip(*map(_flat, ddf), strict=True)
    given = np.ascontiguousarray(points.reshape(3, -1), np.float64)
    out, sizes = np.empty_like(given), np.array(ddf.shape[1:], _Index)
    _for_slabs(lambda first, last: _displace(*flat, steps, sizes, given, out, first, last), given.shape[1])
    return out.reshape(points.shape)


@compiled
def _bend(
    ux: Any, uy: Any, uz: Any, steps: Any, size: Any, f: Any, k: Any, n: Any, out: Any, first: int, last: int
) -> None:
    """Give ``k`` times the voxel plus ``n`` times the displacement at ``f`` of it, in planes of ``out``."""
    for z in range(first, last):
        for y in range(out.shape[2]):
            for x in range(out.shape[3]):
                a = k[0, 0] * x + k[0, 1] * y + k[0, 2] * z + k[0, 3]
                b = k[1, 0] * x + k[1, 1] * y + k[1, 2] * z + k[1, 3]
                c = k[2, 0] * x + k[2, 1] * y + k[2, 2] * z + k[2, 3]
                px = f[0, 0] * x + f[0, 1] * y + f[0, 2] * z + f[0, 3]
                py = f[1, 0] * x + f[1, 1] * y + f[1, 2] * z + f[1, 3]
                pz = f[2, 0] * x + f[2, 1] * y + f[2, 2] * z + f[2, 3]
                if _within(px, py, pz, size):
                    bx, tx = _cell(px, size[0], steps[0])
                    by, ty = _cell(py, size[1], steps[1])
                    bz, tz = _cell(pz, size[2], steps[2])
                    o = bx + by + bz
                    u = _mixed(ux, o, steps[0], steps[1], steps[2], tx, ty, tz)
                    v = _mixed(uy, o, steps[0], steps[1], steps[2], tx, ty, tz)
                    w = _mixed(uz, o, steps[0], steps[1], steps[2], tx, ty, tz)
                    a += n[0, 0] * u + n[0, 1] * v + n[0, 2] * w
                    b += n[1, 0] * u + n[1, 1] * v + n[1, 2] * w
                    c += n[2, 0] * u + n[2, 1] * v + n[2, 2] * w
                out[0, z, y, x] = a
                out[1, z, y, x] = b
                out[2, z, y, x] = c


def bend(ddf: _Array, to_field: _Array, linear: _Array, after: _Array, size: Sequence[int]) -> _Array:
    """Sample a map, linear, nonlinear, linear, on a grid: a displacement ``(3, *size)`` in float32.

    Args:
        ddf: ``(3, X, Y, Z)`` in voxels of its own grid, and 0 outside it.
        to_field: 4 x 4, from voxels of the grid to voxels of ``ddf``.
        linear: 4 x 4, the map without the displacement, from voxels of the grid to its voxels.
        after: 3 x 3, from displacements in voxels of ``ddf`` to those in voxels of the grid.
        size: of the grid.
    """
    flat, (steps, *_) = zip(*map(_flat, ddf), strict=True)
    out = np.empty((3, *reversed(size)), np.float32)
    sizes, shift = np.array(ddf.shape[1:], _Index), linear[:3] - np.eye(3, 4)
    f, k, n = (np.ascontiguousarray(matrix, np.float64) for matrix in (to_field[:3], shift, after))
    _for_slabs(lambda first, last: _bend(*flat, steps, sizes, f, k, n, out, first, last), size[2])
    return out.transpose(0, 3, 2, 1)


@compiled
def _slope(u: Any, z: Any, y: Any, x: Any) -> Any:
    """Central differences of ``u`` ``(Z, Y, X)`` along x, y and z, one-sided at the border, 0 across a slice."""
    z0, z1, y0, y1, x0, x1 = z, z, y, y, x, x
    if z > 0:
        z0 = z - 1
    if z < u.shape[0] - 1:
        z1 = z + 1
    if y > 0:
        y0 = y - 1
    if y < u.shape[1] - 1:
        y1 = y + 1
    if x > 0:
        x0 = x - 1
    if x < u.shape[2] - 1:
        x1 = x + 1
    along_x = (np.float64(u[z, y, x1]) - u[z, y, x0]) / max(x1 - x0, 1)
    along_y = (np.float64(u[z, y1, x]) - u[z, y0, x]) / max(y1 - y0, 1)
    along_z = (np.float64(u[z1, y, x]) - u[z0, y, x]) / max(z1 - z0, 1)
    return along_x, along_y, along_z


@compiled
def _volume_change(ux: Any, uy: Any, uz: Any, out: Any, first: int, last: int) -> None:
    for z in range(first, last):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                a0, a1, a2 = _slope(ux, z, y, x)
                b0, b1, b2 = _slope(uy, z, y, x)
                c0, c1, c2 = _slope(uz, z, y, x)
                a0, b1, c2 = a0 + 1, b1 + 1, c2 + 1
                out[z, y, x] = a0 * (b1 * c2 - b2 * c1) - a1 * (b0 * c2 - b2 * c0) + a2 * (b0 * c1 - b1 * c0)


def volume_change(ddf: _Array) -> _Array:
    """Jacobian determinant ``(X, Y, Z)`` of ``ddf`` ``(3, X, Y, Z)``, like ``blocks.jacobian_determinant``."""
    u = [np.ascontiguousarray(each.T) for each in ddf]
    out = np.empty(u[0].shape, u[0].dtype)
    _for_slabs(lambda first, last: _volume_change(*u, out, first, last), len(out))
    return out.T


@compiled
def _interleave(ux: Any, uy: Any, uz: Any, steps: Any, m: Any, out: Any, first: int, last: int) -> None:
    for z in range(first, last):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                o = x * steps[0] + y * steps[1] + z * steps[2]
                a, b, c = ux[o], uy[o], uz[o]
                out[z, y, x, 0] = m[0, 0] * a + m[0, 1] * b + m[0, 2] * c
                out[z, y, x, 1] = m[1, 0] * a + m[1, 1] * b + m[1, 2] * c
                out[z, y, x, 2] = m[2, 0] * a + m[2, 1] * b + m[2, 2] * c


def interleaved(ddf: _Array, matrix: _Array) -> _Array:
    """``matrix``, 3 x 3, times the vectors of ``ddf`` ``(3, X, Y, Z)``, one after the other: ``(X, Y, Z, 3)``."""
    flat, (steps, *_) = zip(*map(_flat, ddf), strict=True)
    out = np.empty((*reversed(ddf.shape[1:]), 3), ddf.dtype)
    m = np.ascontiguousarray(matrix, ddf.dtype)
    _for_slabs(lambda first, last: _interleave(*flat, steps, m, out, first, last), len(out))
    return out.transpose(2, 1, 0, 3)
