"""Sample scans on other grids, and scale their intensities."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import ImageGrid, inside, spacing
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.space.mutual_information import is_shown
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.switch import compiled_module

__all__ = [
    "SCALINGS",
    "cut_off",
    "fraction_inside",
    "loops_for",
    "resample",
    "resample_intensities",
    "rescale",
    "scale_white_matter",
    "viewed",
]

ndimage = lazy("scipy.ndimage")

_ROUNDED = 1e-3  # distance in voxels beyond the outermost ones that may be rounding
_NUM_BINS, _BIN_SIGMA = 256, 3.0  # bins of a histogram up to the 99.9th percentile, and SD in bins of its smoothing
_LARGE_PEAK = 0.3  # fraction of the highest peak; grey matter can form a higher peak, vessels and noise far lower ones
_NUM_POINTS = 100_000  # number of points to measure how much of a scan lies in a grid, within 0.5 %


def loops_for(scan: Scan, order: int) -> Any:
    """Compiled loops to interpolate a scan in a tenth of SciPy's processor time; None if only SciPy can do it."""
    kind = scan.array.dtype
    fits = kind.isnative and (order == 0 or (order == 1 and kind in (np.float32, np.float64)))
    return compiled_module("scan_loops") if fits else None


def resample(
    scan: Scan, grid: ImageGrid, mapping: NDArray[np.floating[Any]], order: int = 1, outside: float | None = 0.0
) -> Scan:
    """Sample a scan on another grid.

    Args:
        scan: scan to sample; the result has its type.
        grid: grid to sample on.
        mapping: 4 x 4, from points of the grid to points of the scan (RAS, mm).
        order: 1 for linear, 0 for nearest-neighbour interpolation, which suits labels.
        outside: value beyond the outermost voxels of the scan; None repeats these voxels.
    """
    to_voxels = np.linalg.inv(scan.affine) @ mapping @ grid.affine
    to_voxels[:3][np.array(scan.shape) == 1] = 0  # a slice extends without limit across its plane
    loops = loops_for(scan, order)
    if loops is not None:
        value, reach = (0.0, np.inf) if outside is None else (outside, 0.0)
        return Scan(loops.pull(scan.array, to_voxels, grid.size, None, order, value, reach), grid.affine, scan.name)
    beyond: dict[str, Any] = {"mode": "nearest"} if outside is None else {"cval": outside}
    array = ndimage.affine_transform(scan.array, to_voxels, output_shape=tuple(grid.size), order=order, **beyond)
    return Scan(array, grid.affine, scan.name)


def resample_intensities(
    scan: Scan, grid: ImageGrid, mapping: NDArray[np.floating[Any]], outside: float | None = 0.0
) -> Scan:
    """Sample a scan like :func:`resample`, after smoothing it along each axis on which the grid is coarser.

    Each voxel of the grid then averages over its own extent.

    Args:
        scan: the scan.
        grid: grid of the result.
        mapping: 4 x 4, from points of the grid to points of the scan (RAS, mm).
        outside: as in :func:`resample`.
    """
    width = np.sqrt(np.maximum(spacing(grid.affine).max() ** 2 - scan.spacing**2, 0)) / scan.spacing  # at half maximum
    smooth = scan.like(ndimage.gaussian_filter(scan.array, width / 2.355)) if width.any() else scan
    return resample(smooth, grid, mapping, outside=outside)


def _positions(
    scan: Scan, grid: ImageGrid, mapping: NDArray[np.floating[Any]], ddf: NDArray[np.float32] | None = None
) -> Iterator[tuple[int, NDArray[np.floating[Any]]]]:
    """Yield each axis of a scan of length above 1, and the positions of a grid's voxels along it, in scan voxels."""
    to_voxels = np.linalg.inv(scan.affine) @ mapping @ grid.affine
    index = np.ogrid[tuple(map(slice, grid.size))]
    for axis in range(3):
        if scan.shape[axis] > 1:
            at = to_voxels[axis, 3] + sum(float(to_voxels[axis, k]) * index[k] for k in range(3))
            if ddf is not None:
                at = at + sum(float(to_voxels[axis, k]) * ddf[k] for k in range(3))
            yield axis, at


def viewed(
    scan: Scan, grid: ImageGrid, mapping: NDArray[np.floating[Any]], ddf: NDArray[np.float32] | None = None
) -> NDArray[np.bool_]:
    """Find the voxels of a grid in the field of view of a scan: booleans ``(X, Y, Z)``.

    Args:
        scan: scan that may cover only part of the grid.
        grid: size and affine.
        mapping: 4 x 4, from displaced points of the grid to points of the scan (RAS, mm).
        ddf: displacement ``(3, X, Y, Z)`` in voxels of the grid (default: none).
    """
    found = np.ones(tuple(grid.size), bool)
    for axis, at in _positions(scan, grid, mapping, ddf):
        found &= (at > -_ROUNDED) & (at < scan.shape[axis] - 1 + _ROUNDED)
    return found


def cut_off(scan: Scan, grid: ImageGrid, mapping: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Find the voxels of a grid beyond a border of a scan that cuts something off: booleans ``(X, Y, Z)``.

    Beyond its other borders, which show background, background is assumed to continue.

    Args:
        scan: scan with a background of 0.
        grid: size and affine.
        mapping: 4 x 4, from points of the grid to points of the scan (RAS, mm).
    """
    shown, lost = is_shown(scan.array), np.zeros(tuple(grid.size), bool)
    for axis, at in _positions(scan, grid, mapping):
        if shown.take(0, axis).any():
            lost |= at < -0.5
        if shown.take(-1, axis).any():
            lost |= at > scan.shape[axis] - 0.5
    return lost


def rescale(scan: Scan) -> Scan:
    """Scale intensities above the background by their 99.5th percentile and clip them: float32 in [0, 1]."""
    shown = scan.array - scan.background
    return scan.like(np.clip(shown / np.percentile(shown[shown > 0], 99.5), 0, 1).astype(np.float32, copy=False))


def _white_matter_mode(scan: Scan) -> float:
    """Most frequent intensity of white matter in a skull-stripped T1 scan: the brightest large peak."""
    shown = scan.array[scan.array > 0]
    edges = np.linspace(0, np.percentile(shown, 99.9), _NUM_BINS + 1)
    counts = ndimage.gaussian_filter1d(np.histogram(shown, edges)[0].astype(float), _BIN_SIGMA, mode="constant")
    peaks = np.flatnonzero((counts[1:-1] >= counts[:-2]) & (counts[1:-1] > counts[2:])) + 1
    large = peaks[counts[peaks] > _LARGE_PEAK * counts.max()]
    mode = int(large[-1]) if len(large) else int(counts.argmax())
    return float((edges[mode] + edges[mode + 1]) / 2)


def scale_white_matter(scan: Scan) -> Scan:
    """Scale a skull-stripped T1 scan so that the mode of white matter is 110/255, and clip it to [0, 1].

    This is the scale of FreeSurfer's ``norm.mgz`` divided by 255, on which the authors of VoxelMorph trained.
    """
    return scan.like(np.clip(scan.array * (110 / 255 / _white_matter_mode(scan)), 0, 1).astype(np.float32, copy=False))


SCALINGS = {"percentile": rescale, "white_matter": scale_white_matter}
"""Functions that scale images for a network, by the name in its model card."""


def fraction_inside(scan: Scan, grid: ImageGrid, mapping: NDArray[np.floating[Any]]) -> float:
    """Fraction (0 to 1) of the voxels above a scan's background that lie in a grid.

    Args:
        scan: scan that may reach beyond the grid.
        grid: size and affine.
        mapping: 4 x 4, from points of the scan to points of the grid (RAS, mm).
    """
    shown = np.flatnonzero(scan.array > scan.background)
    some = np.unravel_index(shown[:: max(1, len(shown) // _NUM_POINTS)], scan.shape)
    to_voxels = np.linalg.inv(grid.affine) @ mapping @ scan.affine
    index = to_voxels[:3, :3] @ np.stack(some) + to_voxels[:3, 3:]
    index[np.array(grid.size) == 1] = 0  # a slice extends without limit across its plane
    return float(inside(index, grid.size).mean()) if len(shown) else 0.0
