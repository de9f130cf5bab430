"""Compute a space in the middle of several scans: the mean of linear maps, and a grid that encloses the scans."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from voxelmorph_monai.affines import Affine, ImageGrid, corners, half_map
from voxelmorph_monai.space.alignment import align
from voxelmorph_monai.space.scan import Scan

__all__ = ["grid_around", "linear_mean", "rigid_both_ways"]

_MARGIN = 8  # voxels around what the scans show
_Matrix = NDArray[np.floating[Any]]


def linear_mean(maps: Sequence[_Matrix]) -> NDArray[np.float64]:
    """Mean of linear maps, 4 x 4, taken over their logarithms: the mean of a map and its inverse is the identity.

    >>> shift = np.eye(4); shift[0, 3] = 6.0
    >>> linear_mean([shift, np.eye(4)])[0].round(6).tolist()
    [1.0, 0.0, 0.0, 3.0]
    """
    logarithms = [linalg.logm(np.asarray(each, dtype=np.float64)).real for each in maps]
    found: NDArray[np.float64] = linalg.expm(np.mean(logarithms, axis=0))
    found[3] = [0, 0, 0, 1]  # removes rounding errors
    return found


def rigid_both_ways(moving: Scan, fixed: Scan) -> Affine:
    """Rigid map, 4 x 4, from points of ``fixed`` to points of ``moving`` (mm); exchanging them gives its inverse."""
    there, back = align(moving, fixed, "rigid"), align(fixed, moving, "rigid")
    loop = np.linalg.inv(back @ there).astype(np.float64)
    return (there @ half_map(loop)).astype(np.float64)


def grid_around(scans: Sequence[Scan], maps: Sequence[_Matrix], spacing: float | None = None) -> ImageGrid:
    """Grid with axes along RAS that encloses everything above the background of the scans.

    Args:
        scans: scans to enclose.
        maps: 4 x 4, from points of the grid to points of each scan (RAS, mm).
        spacing: voxel size in mm (default: the smallest voxel size of a scan, as geometric mean over its axes).
    """
    side = spacing or min(float(np.prod(scan.spacing)) ** (1 / 3) for scan in scans)
    ends = []
    for scan, mapping in zip(scans, maps, strict=True):
        index = np.argwhere(scan.array > scan.background)
        ends.append(corners(np.linalg.inv(mapping) @ scan.affine, index.min(0), index.max(0)))
    low, high = np.hstack(ends).min(1), np.hstack(ends).max(1)
    size = np.ceil((high - low) / side).astype(int) + 1 + 2 * _MARGIN
    affine = np.diag([side, side, side, 1.0])
    affine[:3, 3] = (low + high) / 2 - side * (size - 1) / 2
    return ImageGrid(size.tolist(), affine)
