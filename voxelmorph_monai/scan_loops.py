"""Loops over the voxels of scans, compiled by numba: interpolation along maps between grids, and joint histograms.

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

__all__ = [
    "bend",
    "displace",
    "glance",
    "interleaved",
    "likeliest",
    "match",
    "moments",
    "pull",
    "volume_change",
]

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


@compiled
def _weight(t: Any, upper: int) -> Any:
    return t if upper else np.float32(1) - t


@compiled
def _likeliest(p: Any, brain: Any, m: Any, out: Any, first: int, last: int) -> None:
    """Fill the planes of ``out``."""
    sx, sy, sz = brain.shape
    mixed = np.empty(p.shape[3], np.float32)
    for i in range(first, last):
        for j in range(out.shape[1]):
            for k in range(out.shape[2]):
                x = m[0, 0] * i + m[0, 1] * j + m[0, 2] * k + m[0, 3]
                y = m[1, 0] * i + m[1, 1] * j + m[1, 2] * k + m[1, 3]
                z = m[2, 0] * i + m[2, 1] * j + m[2, 2] * k + m[2, 3]
                out[i, j, k] = 0
                if not (x > -1 and y > -1 and z > -1 and x < sx and y < sy and z < sz):
                    continue
                ax, ay, az = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
                tx, ty, tz = np.float32(x - ax), np.float32(y - ay), np.float32(z - az)
                value = np.float32(0)
                for c in range(8):
                    bx, by, bz = ax + (c >> 2), ay + ((c >> 1) & 1), az + (c & 1)
                    if bx >= 0 and by >= 0 and bz >= 0 and bx < sx and by < sy and bz < sz:
                        value += (
                            _weight(tx, c >> 2) * _weight(ty, (c >> 1) & 1) * _weight(tz, c & 1) * brain[bx, by, bz]
                        )
                if not value > 0:
                    continue
                mixed[:] = 0
                for c in range(8):  # beyond the border lies what is there
                    bx = min(max(ax + (c >> 2), 0), sx - 1)
                    by = min(max(ay + ((c >> 1) & 1), 0), sy - 1)
                    bz = min(max(az + (c & 1), 0), sz - 1)
                    weight = _weight(tx, c >> 2) * _weight(ty, (c >> 1) & 1) * _weight(tz, c & 1)
                    for n in range(len(mixed)):
                        mixed[n] += weight * p[bx, by, bz, n]
                out[i, j, k] = 1 + np.argmax(mixed)


def likeliest(posteriors: _Array, brain: _Array, matrix: _Array, size: Sequence[int]) -> _Array:
    """Number of the likeliest class in the voxels of a grid, from 1 on; 0 where ``brain`` is not above 0: uint8.

    Args:
        posteriors: ``(X, Y, Z, K)`` in float32; beyond the border they are those there.
        brain: ``(X, Y, Z)`` in float32, 0 beyond the border.
        matrix: 4 x 4, from voxels of the grid to those of the posteriors.
        size: size of the grid.
    """
    out, m = np.empty(tuple(size), np.uint8), np.ascontiguousarray(matrix[:3], np.float64)
    _for_slabs(lambda first, last: _likeliest(posteriors, brain, m, out, first, last), len(out))
    return out


@compiled
def _glance(values: Any, known: Any, size: Any, rows: Any, maps: Any, points: Any, counts: Any) -> None:
    for k in range(len(maps)):
        for n in range(points.shape[1]):
            nearest = 0
            for axis in range(3):
                m, p = maps[k, axis], points[:, n]
                x = m[0] * p[0] + m[1] * p[1] + m[2] * p[2] + m[3]
                nearest = nearest * size[axis] + int(min(max(x + 0.5, 0.0), size[axis] - 0.5))
            counts[k, rows[n] + int(values[nearest])] += known[nearest] if len(known) else 1.0


def glance(
    values: _Array, known: _Array, size: tuple[int, ...], rows: _Array, maps: _Array, points: _Array, number: int
) -> _Array:
    """Joint histograms ``(K, number)`` of two volumes under K maps, from the voxels that are nearest to the points.

    Args:
        values: level of each voxel of the moving volume, flat.
        known: what a voxel counts, flat; empty if each counts 1.
        size: size of the moving volume.
        rows: first cell of the histogram for the intensity of the fixed volume at each point ``(N,)``.
        maps: ``(K, 3, 4)``, from points to voxels of the moving volume.
        points: ``(4, N)``, the last coordinate 1.
        number: number of cells.
    """
    counts = np.zeros((len(maps), number))
    _glance(values, known, np.array(size), rows, maps, points, counts)
    return counts


@compiled
def _clipped(p: Any, size: Any, steps: Any) -> Any:
    """Like :func:`_cell`, for a volume that goes on beyond its border and has at least two voxels along each axis."""
    p = min(max(p, 0.0), size - 1.0 - 1e-6)
    return _Index(p) * steps, p - _Index(p)


@compiled
def _match(
    v: Any, known: Any, size: Any, rows: Any, m: Any, p: Any, counts: Any, cells: Any, weights: Any, slopes: Any
) -> None:
    sx, sy, sz = size[1] * size[2], size[2], 1
    for n in range(p.shape[1]):
        bx, tx = _clipped(m[0, 0] * p[0, n] + m[0, 1] * p[1, n] + m[0, 2] * p[2, n] + m[0, 3], size[0], sx)
        by, ty = _clipped(m[1, 0] * p[0, n] + m[1, 1] * p[1, n] + m[1, 2] * p[2, n] + m[1, 3], size[1], sy)
        bz, tz = _clipped(m[2, 0] * p[0, n] + m[2, 1] * p[1, n] + m[2, 2] * p[2, n] + m[2, 3], size[2], sz)
        b = bx + by + bz
        x0, x1 = v[b + sx] - v[b], v[b + sx + sy] - v[b + sy]
        x2, x3 = v[b + sx + sz] - v[b + sz], v[b + sx + sy + sz] - v[b + sy + sz]
        e0, e1 = v[b] + tx * x0, v[b + sy] + tx * x1
        e2, e3 = v[b + sz] + tx * x2, v[b + sy + sz] + tx * x3
        f0, f1, x4, x5 = e0 + ty * (e1 - e0), e2 + ty * (e3 - e2), x0 + ty * (x1 - x0), x2 + ty * (x3 - x2)
        slopes[0, n] = x4 + tz * (x5 - x4)
        slopes[1, n] = e1 - e0 + tz * (e3 - e2 - (e1 - e0))
        slopes[2, n] = f1 - f0
        weights[n] = _mixed(known, b, sx, sy, sz, tx, ty, tz) if len(known) else 1.0
        cells[n] = rows[n] + int(f0 + tz * (f1 - f0))
        counts[cells[n]] += weights[n]


def match(
    values: _Array, known: _Array, size: tuple[int, ...], rows: _Array, matrix: _Array, points: _Array, number: int
) -> tuple[_Array, _Array, _Array, _Array]:
    """Joint histogram ``(number,)`` of two volumes under one map, with linear interpolation, and what it is made of.

    That is the cell of each point ``(N,)``, what the point counts ``(N,)``, and the slope of the moving volume there
    ``(3, N)``. The arguments are those of :func:`glance`, with one map ``(3, 4)``.
    """
    n = len(rows)
    found = np.zeros(number), np.empty(n, _Index), np.empty(n), np.empty((3, n))
    _match(values, known, np.array(size), rows, matrix, points, *found)
    return found


@compiled
def _moments(s: Any, slopes: Any, points: Any, weights: Any, mean: Any, square: Any) -> None:
    x = np.empty(12)
    for n in range(len(s)):
        for i in range(3):
            for j in range(4):
                x[4 * i + j] = s[n] * slopes[i, n] * points[j, n]
        for i in range(12):
            mean[i] += weights[n] * x[i]
            for j in range(len(square)):
                square[i, j] += weights[n] * x[i] * x[j]


def moments(score: _Array, slopes: _Array, points: _Array, weights: _Array, *, squared: bool) -> tuple[_Array, _Array]:
    """Weighted sums of ``x``, ``(12,)``, and of ``x x^T``, ``(12, 12)`` or empty if not wanted, over the points.

    ``x`` is the outer product of the slope and the point, times the score ``(N,)``; the others are those of
    :func:`match`.
    """
    mean, square = np.zeros(12), np.zeros((12, 12) if squared else (0, 0))
    _moments(score, slopes, points, weights, mean, square)
    return mean, square
