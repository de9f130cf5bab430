r"""Mutual information of two images as a function of the linear map between them, and how to maximise it.

Two scans are compared only where the content of both is known. It is known within the field of view. Outside the field
of view, background is assumed to continue from a border that shows background. Beyond a border that cuts something off,
the content is unknown, and points there are left out.

Mutual information is computed as by Mattes et al. (IEEE TMI 2003): intensities of the moving image are spread over the
bins of a histogram by a cubic B-spline, those of the fixed image are counted. With :math:`p` the fraction of the points
in each cell, :math:`m` the moving and :math:`f` the fixed intensity,

.. math:: I = \sum_{f, m} p(f, m) \log \frac{p(f, m)}{p(f) \, p(m)}, \qquad
          \frac{dI}{d\theta} = \Big\langle s(f, m) \, \frac{dm}{d\theta} \Big\rangle, \quad
          s = \frac{\partial}{\partial m} \log \frac{p(f, m)}{p(m)},

where the brackets are a mean over the points. Fisher's information, the mean of
:math:`s^2 \, (dm / d\theta)(dm / d\theta)^T`, contains the scales and correlations of the parameters; in coordinates
that make it the identity, BFGS needs about ten steps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, spacing
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.switch import compiled_module

__all__ = ["Copy", "MutualInformation", "coarsen", "generators", "is_shown", "maximise"]

linalg, ndimage = lazy("scipy.linalg"), lazy("scipy.ndimage")

_SHOWN = 0.1  # fraction of the 99th percentile below which a voxel is background or noise
_THIN = 4  # smallest number of voxels of a copy along each axis, unless the image itself has fewer
_LEVELS = 16  # levels of intensity within a bin; more of them change the result by less than 1e-3 mm
_MAX_BINS = 32
_BLOCK = 8192  # points to process together, so that intermediate results stay in the cache (3 times as fast)
_MAPS = 64  # maps to score together
_LEAST = 0.25  # smallest fraction of the comparable points that must be compared
_MAX_STEPS = 40
_FARTHEST = 0.5  # longest step, in units of the points' root mean square distance from their centre

_Array = NDArray[np.float64]


class Copy(NamedTuple):
    """Coarse copy of an image, with a margin.

    Attributes:
        array: intensities ``(X, Y, Z)``, or ``(X, Y)``.
        affine: from voxels to mm (RAS), 4 x 4 or 3 x 3.
        shown: True where a voxel lies above the background; same shape as ``array``.
        known: 1 where the content is known, otherwise 0, same shape; None if it is known everywhere.
    """

    array: _Array
    affine: Affine
    shown: NDArray[np.bool_]
    known: _Array | None

    @property
    def centre(self) -> _Array:
        """Centre of what is shown, in mm."""
        return self.affine[:-1, :-1] @ np.argwhere(self.shown).mean(axis=0) + self.affine[:-1, -1]


def is_shown(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Find the voxels above the background, which must be about 0: booleans in the shape of the image."""
    some = array[tuple(slice(None, None, max(1, n // 50)) for n in array.shape)]
    some = some if (some > 0).any() else array
    return np.asarray(array > (_SHOWN * np.percentile(some[some > 0], 99) if (some > 0).any() else 0))


def _mean_of_blocks(array: NDArray[Any], factor: Sequence[int]) -> NDArray[np.float32]:
    """Mean of each block of ``factor`` voxels along the axes; incomplete blocks at the ends are dropped."""
    for axis, n in enumerate(factor):
        lines = np.moveaxis(array, axis, 0)[: array.shape[axis] // n * n].astype(np.float32, copy=False)
        summed = lines[::n].copy() if n > 1 else lines
        for k in range(1, n):
            summed += lines[k::n]
        array = np.moveaxis(summed / np.float32(n) if n > 1 else lines, 0, axis)
    return array


def _smooth(array: NDArray[np.float32], averaged: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Smooth an image along each axis by a weighted mean of neighbouring voxels; the border is repeated.

    Interpolation smooths an image between voxels but not at voxels, so with noise the map would prefer one or the
    other. The weights are 1 6 1 along an axis whose voxels have been ``averaged``, which removes most of the noise, and
    otherwise 1 2 1.
    """
    for axis, own in enumerate(np.where(averaged, np.float32(6), np.float32(2))):
        lines = np.moveaxis(array, axis, 0)
        beside = np.concatenate([lines[:1], lines, lines[-1:]])
        array = np.moveaxis((own * lines + beside[2:] + beside[:-2]) / (own + 2), 0, axis)
    return array


def _extent(array: NDArray[Any], margin: Sequence[int]) -> tuple[slice, ...]:
    """Slices around the voxels that are not 0, with a margin in voxels, cut off at the ends of the array."""
    part = []
    for axis, (n, width) in enumerate(zip(array.shape, margin, strict=True)):
        found = np.flatnonzero(array.any(axis=tuple(k for k in range(array.ndim) if k != axis)))
        part.append(slice(max(0, int(found[0]) - width), min(n, int(found[-1]) + 1 + width)))
    return tuple(part)


def coarsen(array: NDArray[Any], affine: Affine, sizes: Sequence[float], margin: float) -> list[Copy]:
    """Make coarse copies of an image, with voxels of about ``sizes`` mm; each is made from the next finer one.

    Args:
        array: image ``(X, Y, Z)`` or ``(X, Y)`` whose background is about 0.
        affine: affine of the image.
        sizes: voxel sizes in mm, the largest first. An axis with voxels of this size, or with few voxels, is kept.
        margin: width in mm of a margin around the field of view, at least one voxel, filled with the border.
    """
    sides = spacing(affine)
    part = _extent(array != 0, np.maximum(np.ceil(2 * sizes[0] / sides).astype(int), 1))
    array, affine = array[part], affine.copy()
    affine[:-1, -1] += affine[:-1, :-1] @ [edge.start for edge in part]
    copies = []
    for size in reversed(sizes):
        most = np.maximum(np.array(array.shape) // _THIN, 1)
        factor = np.clip(np.rint(size / spacing(affine)).astype(int), 1, most)
        array, affine = _mean_of_blocks(array, factor.tolist()), affine.copy()
        affine[:-1, -1] += affine[:-1, :-1] @ ((factor - 1) / 2)
        affine[:-1, :-1] *= factor
        width = np.maximum(np.ceil(margin / spacing(affine)).astype(int), 1)
        around = [(n, n) for n in width]
        wider = affine.copy()
        wider[:-1, -1] -= affine[:-1, :-1] @ width
        padded = np.pad(_smooth(array, spacing(affine) > 1.5 * sides), around, mode="edge").astype(np.float64)
        shown = is_shown(array)
        goes_on = np.pad(shown, around, mode="edge")  # repeats the border beyond the field of view
        beyond = np.pad(np.zeros(array.shape, bool), around, constant_values=True)
        known = None if not (goes_on & beyond).any() else 1.0 - (goes_on & beyond)
        copies.append(Copy(padded, wider, goes_on & ~beyond, known))
    return copies[::-1]


def generators(kind: str, dims: int) -> _Array:
    """Directions in which a linear map can change: P flattened matrices of D x (D + 1), ``(P, D (D + 1))``.

    ``kind`` is ``"rigid"``, ``"similarity"`` or ``"affine"``.
    """
    units = np.eye(dims * (dims + 1)).reshape(dims, dims + 1, -1)
    if kind == "affine":
        return units.reshape(-1, dims * (dims + 1))
    found = [units[i, dims] for i in range(dims)]
    found += [units[i, j] - units[j, i] for i in range(dims) for j in range(i)]
    if kind == "similarity":
        found.append(sum(units[i, i] for i in range(dims)))
    return np.stack(found)


def _spline(bins: int) -> tuple[_Array, _Array]:
    """Weights of the B-spline in each bin for each level of intensity, and their slopes: ``(levels, bins + 3)``."""
    x = np.arange(bins * _LEVELS + 1)[:, None] / _LEVELS - (np.arange(bins + 3) - 1)
    far = np.abs(x)
    weights = np.where(far < 1, 2 / 3 - far**2 + far**3 / 2, np.clip(2 - far, 0, None) ** 3 / 6)
    slopes = np.where(far < 1, 1.5 * far**2 - 2 * far, -(np.clip(2 - far, 0, None) ** 2) / 2) * np.sign(x)
    return weights, slopes / _LEVELS


def _interpolate(values: _Array, shape: tuple[int, ...], at: _Array) -> tuple[_Array, list[_Array]]:
    """Interpolate an image linearly: values ``(N,)`` and slopes along each axis; the border is repeated outside.

    Args:
        values: voxels of the image, flattened.
        shape: shape of the image, at least 2 along each axis.
        at: positions in voxels, ``(D, N)``, which are overwritten.
    """
    steps = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    first = np.zeros(at.shape[1], np.intp)
    for x, n, step in zip(at, shape, steps, strict=True):
        np.clip(x, 0, n - 1 - 1e-6, out=x)
        whole = x.astype(np.intp)
        x -= whole
        first += whole * step
    corners = np.array(np.meshgrid(*[(0, step) for step in steps], indexing="ij")).sum(axis=0).ravel()
    found = [values[corner:].take(first) for corner in corners]
    slopes: list[list[_Array]] = []
    for x in at:
        half = len(found) // 2
        steep = [found[half + k] - found[k] for k in range(half)]
        slopes = [[each[k] + x * (each[half + k] - each[k]) for k in range(half)] for each in slopes] + [steep]
        found = [found[k] + x * steep[k] for k in range(half)]
    return found[0], [each[0] for each in slopes]


class _Sums:
    """The functions of ``scan_loops`` in NumPy, for 2-D images and where the compiled module is missing."""

    @staticmethod
    def glance(
        values: _Array, known: _Array, size: tuple[int, ...], rows: _Array, maps: _Array, points: _Array, number: int
    ) -> _Array:
        """As in ``scan_loops``."""
        counts = []
        for matrix in maps:
            nearest = np.zeros(points.shape[1], np.intp)
            for x, n in zip(matrix @ points, size, strict=True):
                nearest = nearest * n + np.clip(x + 0.5, 0, n - 0.5).astype(np.intp)
            cells = rows + values.take(nearest).astype(np.intp)
            counts.append(np.bincount(cells, known.take(nearest) if len(known) else None, minlength=number))
        return np.stack(counts)

    @staticmethod
    def match(
        values: _Array, known: _Array, size: tuple[int, ...], rows: _Array, matrix: _Array, points: _Array, number: int
    ) -> tuple[_Array, _Array, _Array, _Array]:
        """As in ``scan_loops``."""
        counts, parts = np.zeros(number), []
        for start in range(0, points.shape[1], _BLOCK):
            at = matrix @ points[:, start : start + _BLOCK]
            weights = _interpolate(known, size, at.copy())[0] if len(known) else np.ones(at.shape[1])
            level, slopes = _interpolate(values, size, at)
            cells = rows[start : start + _BLOCK] + level.astype(np.intp)
            counts += np.bincount(cells, weights, minlength=number)
            parts.append((cells, weights, np.stack(slopes)))
        cells, weights, slope = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
        return counts, cells, weights, slope

    @staticmethod
    def moments(
        score: _Array, slopes: _Array, points: _Array, weights: _Array, *, squared: bool
    ) -> tuple[_Array, _Array]:
        """As in ``scan_loops``."""
        rows = ((score * slopes)[:, None] * points).reshape(-1, len(score))
        return rows @ weights, (rows * weights) @ rows.T if squared else np.zeros((0, 0))


class _Slope(NamedTuple):
    """Mutual information at a map, its gradient ``(N,)`` and Fisher's information ``(N, N)``; N is D (D + 1)."""

    value: float
    gradient: _Array
    fisher: _Array | None


class MutualInformation:
    """Mutual information (nats) of two images under a linear map from points of the fixed to points of the moving one.

    Changes of the map are applied before it, in coordinates relative to the centre of the compared points. Their unit
    is the root mean square distance of the points from this centre.

    Args:
        moving: coarse copy of the moving image.
        fixed: coarse copy of the fixed image; its voxels above the background, and those within ``reach`` of them, are
            compared.
        reach: distance in mm.
        thinned: compare only a quarter of the voxels, a body-centred lattice (half of the voxels in 2-D).
    """

    def __init__(self, moving: Copy, fixed: Copy, reach: float, thinned: bool = False) -> None:
        widths = np.maximum(np.rint(reach / spacing(fixed.affine)).astype(int), 1)
        taken = fixed.shown
        for axis, width in enumerate(widths):
            taken = ndimage.maximum_filter1d(taken, 2 * width + 1, axis=axis)
        if fixed.known is not None:
            taken &= fixed.known > 0
        if thinned:
            parity = np.indices(taken.shape) % 2
            taken &= (parity == parity[0]).all(axis=0)
        points = fixed.affine[:-1, :-1] @ np.argwhere(taken).T + fixed.affine[:-1, -1:]
        centre = points.mean(axis=1, keepdims=True)
        self.radius = float(np.sqrt(((points - centre) ** 2).sum(axis=0).mean()))
        self.points = np.concatenate([(points - centre) / self.radius, np.ones((1, points.shape[1]))])
        self.to_mm = np.diag([*[self.radius] * len(points), 1.0])
        self.to_mm[:-1, -1:] = centre
        self.bins = int(min(np.cbrt(self.points.shape[1]), _MAX_BINS))
        self._weights, self._slopes = _spline(self.bins)
        row = len(self._weights)
        self._cells = self.bins * row
        self._rows = (self._levels(fixed.array, taken, self.bins) // 1).clip(max=self.bins - 1).astype(np.intp) * row
        levels = self._levels(moving.array, ..., row - 1).ravel() + 0.5
        known = np.empty(0) if moving.known is None else moving.known.ravel()
        self._moving = levels, known, moving.array.shape
        self._to_voxels = np.linalg.inv(moving.affine)
        volumes = [float(np.prod(spacing(each.affine))) * each.array.size for each in (moving, fixed)]
        self._sums: Any = (compiled_module("scan_loops") if moving.array.ndim == 3 else None) or _Sums
        self.least = _LEAST * min(1.0, volumes[0] / volumes[1])

    @staticmethod
    def _levels(array: _Array, part: Any, number: int) -> _Array:
        low, high = float(array.min()), float(array.max())
        return (array[part] - low) * (number / (high - low))

    def __call__(self, matrix: Affine) -> float:
        """Mutual information times the fraction of points with known content in the moving image; 0 if too few.

        The factor makes maps with different overlap comparable: points without known content add no information.
        """
        return float(self._score(self._match(self._to_voxels @ matrix @ self.to_mm)[0], self.points.shape[1]))

    def glance(self, matrices: Sequence[Affine]) -> _Array:
        """Approximate :meth:`__call__` for K maps in less time: ``(K,)``.

        Only half of the points are used, and the moving image is sampled at the nearest voxel.
        """
        maps = (self._to_voxels @ np.stack(matrices) @ self.to_mm)[:, :-1]
        rows, points, scores = self._rows[::2].copy(), np.ascontiguousarray(self.points[:, ::2]), []
        for start in range(0, len(maps), _MAPS):
            some = maps[start : start + _MAPS]
            counts = self._sums.glance(*self._moving, rows, some, points, self._cells)
            scores.append(self._score(counts, len(rows)))
        return np.concatenate(scores)

    def _score(self, histograms: _Array, number: int) -> _Array:
        """Score of :meth:`__call__` for histograms ``(..., cells)`` of ``number`` points."""
        fraction = histograms.sum(axis=-1) / number
        return np.where(fraction >= self.least, fraction * self._information(histograms)[0], 0.0)

    def _match(self, to_voxels: Affine) -> Any:
        """Joint histogram of moving levels and fixed bins, and the cell, weight and slope of each point."""
        return self._sums.match(*self._moving, self._rows, to_voxels[:-1], self.points, self._cells)

    def _information(self, histograms: _Array) -> tuple[_Array, _Array]:
        """Mutual information ``(...)`` of histograms ``(..., cells)``, and ``log(p(f, m) / p(m))`` in each bin."""
        joint = histograms.reshape(*histograms.shape[:-1], self.bins, -1) @ self._weights
        joint /= np.maximum(joint.sum(axis=(-2, -1), keepdims=True), 1e-9)
        of_moving, of_fixed = joint.sum(axis=-2, keepdims=True), joint.sum(axis=-1, keepdims=True)
        given = np.log(np.maximum(joint, 1e-12) / np.maximum(of_moving, 1e-12))
        given[joint <= 1e-12] = 0
        return (joint * (given - np.log(np.maximum(of_fixed, 1e-12)))).sum(axis=(-2, -1)), given

    def slope(self, matrix: Affine, with_fisher: bool = False) -> _Slope:
        """Value, gradient and, if ``with_fisher``, Fisher's information, for the parameters of an affine map.

        Args:
            matrix: the map, 4 x 4 or 3 x 3 (RAS, mm).
            with_fisher: compute Fisher's information, which takes longer; otherwise it is None.
        """
        to_voxels = self._to_voxels @ matrix @ self.to_mm
        histogram, cells, weights, slopes = self._match(to_voxels)
        size = len(self.points) * (len(self.points) - 1)
        if histogram.sum() < self.least * self.points.shape[1]:
            return _Slope(-np.inf, np.zeros(size), np.eye(size) if with_fisher else None)
        value, given = self._information(histogram)
        score = (given @ self._slopes.T).ravel().take(cells)
        gradient, fisher = self._sums.moments(score, slopes, self.points, weights, squared=with_fisher)
        total, turn = histogram.sum(), to_voxels[:-1, :-1]
        gradient = (turn.T @ gradient.reshape(len(turn), -1) / total).ravel()
        mixed = np.kron(turn, np.eye(len(self.points)))
        return _Slope(float(value), gradient, mixed.T @ fisher @ mixed / total if with_fisher else None)

    def change(self, matrix: Affine, direction: _Array) -> tuple[Affine, float]:
        """Change a map in a direction ``(D (D + 1),)``; returns it and roughly how far the points move, in mm."""
        step = np.zeros_like(matrix)
        step[:-1] = direction.reshape(-1, len(self.points))
        return matrix @ self.to_mm @ linalg.expm(step) @ np.linalg.inv(self.to_mm), self.radius * float(
            np.linalg.norm(step)
        )


def maximise(information: MutualInformation, matrix: Affine, kind: str, tolerance: float) -> Affine:
    """Maximise mutual information from a starting map until steps are shorter than ``tolerance`` mm.

    Args:
        information: mutual information of two images.
        matrix: map to start from, 4 x 4 or 3 x 3 (RAS, mm), like the result.
        kind: limits the changes to the parameters of :func:`generators`.
        tolerance: mm.
    """
    basis = generators(kind, len(matrix) - 1)
    here = information.slope(matrix, with_fisher=True)
    assert here.fisher is not None
    fisher = basis @ here.fisher @ basis.T
    if not np.trace(fisher) > 0:  # nothing in common
        return matrix
    fisher += 1e-9 * np.trace(fisher) * np.eye(len(fisher))
    basis = np.linalg.solve(np.linalg.cholesky(fisher), basis)  # makes Fisher's information the identity
    inverse = 2 * np.eye(len(basis))  # inverse curvature; the curvature is below 1, as images of two people differ
    for number in range(_MAX_STEPS):
        step = inverse @ (basis @ here.gradient)
        step *= min(1.0, _FARTHEST / max(float(np.linalg.norm(step @ basis)), 1e-9))
        while True:
            trial, length = information.change(matrix, step @ basis)
            if not length >= tolerance:
                return matrix
            there = information.slope(trial)
            if there.value > here.value:
                break
            rise = float(step @ (basis @ here.gradient))
            step = step * np.clip(rise / (2 * (rise + here.value - there.value)), 0.1, 0.5)  # maximum of a parabola
        bend = basis @ (here.gradient - there.gradient)
        curvature = float(step @ bend)
        if curvature > 0:
            if number == 0:
                inverse *= np.clip(curvature / (bend @ bend) / 2, 0.25, 4)
            left = np.eye(len(step)) - np.outer(step, bend) / curvature
            inverse = left @ inverse @ left.T + np.outer(step, step) / curvature
        else:
            inverse *= 2
        matrix, here = trial, there
    return matrix
