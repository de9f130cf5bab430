"""Affine maps in physical space: voxel size, RAS and LPS, checks of headers, the grid of an image.

An ``affine`` is nibabel's: a 4 x 4 matrix that maps voxel indices to millimetres in RAS (x grows to the right, y to
the front, z up). ITK and its files use LPS, in which the first two coordinates have the opposite sign. This conversion
happens only here and, for scans that ITK reads, in :mod:`~voxelmorph_monai.io.volumes` and
:mod:`~voxelmorph_monai.io.dicom`. In 2-D an affine is 3 x 3.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "LIA",
    "Affine",
    "ImageGrid",
    "apply_affine",
    "check_affine",
    "check_same_grid",
    "corner_distance",
    "corners",
    "even_rotations",
    "half_map",
    "in_plane",
    "inside",
    "is_sheared",
    "points_to_lps",
    "ras_to_lps",
    "require_right_angles",
    "slabs",
    "spacing",
    "to_lps",
]

Affine = NDArray[np.float64]

LIA = np.array([[-1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
"""Directions (RAS) of array axes that run left, inferior, anterior, as in FreeSurfer's volumes; a column per axis."""


def corners(affine: Affine, low: ArrayLike, high: ArrayLike) -> NDArray[np.float64]:
    """Positions ``(D, 2^D)`` (mm) of the corners of a box in voxels.

    Args:
        affine: map from voxel indices to positions, ``(D + 1, D + 1)``.
        low: lowest index along each axis, ``(D,)``.
        high: highest index along each axis, ``(D,)``.

    >>> corners(np.diag([2.0, 3.0, 1.0]), [0, 0], [5, 7]).tolist()
    [[0.0, 0.0, 10.0, 10.0], [0.0, 21.0, 0.0, 21.0]]
    """
    index = np.stack(np.meshgrid(*np.transpose([low, high]), [1.0], indexing="ij")).reshape(len(affine), -1)
    return (affine @ index)[:-1]


def corner_distance(first: Affine, second: Affine, shape: Sequence[int]) -> float:
    """Largest distance (mm) between the positions of a voxel under two affines, on a grid of this shape.

    Args:
        first: map from voxel indices to positions, ``(D + 1, D + 1)``.
        second: another one, of the same shape.
        shape: number of voxels along each axis, ``(D,)``.
    """
    last = [n - 1 for n in shape]
    return float(np.linalg.norm(corners(first - second, [0] * len(last), last), axis=0).max())


_SLAB_VOXELS = 2**20  # voxels processed at a time


class ImageGrid(NamedTuple):
    """Size and position of an image grid.

    Attributes:
        size: number of voxels ``(X, Y, Z)``.
        affine: map from voxel indices to positions (RAS, mm).
    """

    size: Sequence[int]
    affine: Affine


def ras_to_lps(spatial_dims: int) -> Affine:
    """Matrix from RAS to LPS, ``(D + 1, D + 1)``, which is its own inverse."""
    return np.diag([-1.0, -1.0, *[1.0] * (spatial_dims - 1)])


def half_map(mapping: Affine) -> Affine:
    """Square root of a 4 x 4 map: applied twice, it gives ``mapping``, which must rotate by less than 180 degrees.

    Computed by the iteration of Denman and Beavers (Applied Mathematics and Computation 1976), which converges
    quadratically.

    >>> half_map(np.diag([4.0, 9.0, 1.0, 1.0])).diagonal().tolist()
    [2.0, 3.0, 1.0, 1.0]
    """
    half, inverse = mapping, np.eye(4)
    for _ in range(12):
        half, inverse = (half + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(half)) / 2
    return half


def spacing(affine: Affine) -> Affine:
    """Distance between neighbouring voxels along each array axis, in mm: ``(3,)``, or ``(2,)`` in 2-D.

    >>> spacing(np.diag([-2.0, 1.0, 3.0, 1.0])).tolist()
    [2.0, 1.0, 3.0]
    """
    return np.linalg.norm(affine[:-1, :-1], axis=0)


def check_affine(affine: Affine, subject: str) -> None:
    """Raise ValueError unless ``affine`` is 4 x 4, finite and has an inverse."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError(
            f"the affine of {subject} is not a matrix of 4 x 4 finite numbers: {affine.tolist()}. Correct its header."
        )
    volume = abs(np.linalg.det(affine[:3, :3]))
    if volume <= 1e-6 * np.prod(spacing(affine)):
        raise ValueError(
            f"the affine of {subject} has no inverse: its axes {affine[:3, :3].tolist()} span no volume. Correct its "
            "header."
        )


def is_sheared(affine: Affine) -> bool:
    """Whether angles between the axes of an affine, 4 x 4 or 3 x 3, differ from 90 degrees by more than rounding.

    The limit, 1e-3 radians, is 0.25 mm across a brain.
    """
    direction = affine[:-1, :-1] / spacing(affine)
    return not np.allclose(direction.T @ direction, np.eye(len(direction)), atol=1e-3)


def require_right_angles(affine: Affine, subject: str) -> None:
    """Raise ValueError if the axes of an image are sheared: neither ITK nor a qform can store shear."""
    if is_sheared(affine):
        raise ValueError(
            f"the axes of {subject} are not at right angles in the affine {affine.tolist()}. Correct its header, or "
            "resample it to a grid without shear."
        )


def to_lps(value: NDArray[np.floating[Any]]) -> Affine:
    """Convert a point ``(3,)`` or a map of points ``(4, 4)`` from RAS to LPS, or back; also in 2-D."""
    if value.ndim == 1:
        return ras_to_lps(len(value))[:-1, :-1] @ value
    return ras_to_lps(len(value) - 1) @ value @ ras_to_lps(len(value) - 1)


def points_to_lps(points: NDArray[np.floating[Any]]) -> NDArray[Any]:
    """Convert points or vectors ``(..., 3)`` or ``(..., 2)`` from RAS to LPS, or back."""
    return points * np.array([-1, -1, 1])[: points.shape[-1]]


def in_plane(matrix: NDArray[np.floating[Any]]) -> Affine:
    """Reduce a 4 x 4 matrix to x and y: 3 x 3. This is exact if the matrix maps the plane z = 0 to itself."""
    return matrix[np.ix_([0, 1, 3], [0, 1, 3])].astype(np.float64)


def apply_affine(matrix: NDArray[np.floating[Any]], points: NDArray[Any]) -> NDArray[np.float64]:
    """Map ``points`` ``(3, ...)`` by a 4 x 4 matrix."""
    shift = matrix[:3, 3].reshape(3, *[1] * (points.ndim - 1))
    return np.tensordot(matrix[:3, :3], points, axes=1) + shift


def even_rotations(number: int) -> NDArray[np.float64]:
    """Evenly spread rotations ``(number, 3, 3)``, the identity first: a super-Fibonacci spiral (Alexa, CVPR 2022)."""
    s = np.arange(number - 1) + 0.5
    inner, outer = np.sqrt(s / (number - 1)), np.sqrt(1 - s / (number - 1))
    a, b = 2 * np.pi * s / np.sqrt(2), 2 * np.pi * s / 1.533751168755204288118041
    x, y, z, w = inner * np.sin(a), inner * np.cos(a), outer * np.sin(b), outer * np.cos(b)  # quaternions
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.concatenate([np.eye(3)[None], np.moveaxis(np.array(rows), -1, 0)])


def slabs(size: Sequence[int]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Cut a grid along its first axis into slabs of about a million voxels.

    Yields:
        The slice of the first axis, and the indices ``(3, ...)`` of the voxels in the slab.
    """
    step = max(1, _SLAB_VOXELS // (size[1] * size[2]))
    for start in range(0, size[0], step):
        stop = min(start + step, size[0])
        index = np.indices((stop - start, size[1], size[2]), dtype=np.float64)
        index[0] += start
        yield slice(start, stop), index


def inside(index: Iterable[NDArray[np.floating[Any]]], shape: Sequence[int]) -> NDArray[np.bool_]:
    """Whether indices lie in an image of this shape, which ends half a voxel beyond its outermost voxels.

    Args:
        index: indices ``(D, ...)``, or an iterable of the indices along each axis.
        shape: shape of the image, ``(D,)``.

    >>> inside(np.array([[-0.5, 1.4, 1.5]]), [2]).tolist()
    [True, True, False]
    """
    return reduce(np.logical_and, ((at >= -0.5) & (at < n - 0.5) for at, n in zip(index, shape, strict=True)))


def check_same_grid(first: ImageGrid, second: ImageGrid, names: tuple[str, str]) -> None:
    """Raise ValueError unless two grids have the same size and place each voxel at the same point.

    The two positions of a voxel may differ by 0.1 mm and by a tenth of the shortest side of a voxel, whichever is less.
    This is far above the rounding of headers and far below a voxel.

    Args:
        first: first grid.
        second: second grid.
        names: names of the two images, for the message.
    """
    tolerance = min(0.1, 0.1 * float(spacing(first.affine).min()))
    shape, other = tuple(first.size), tuple(second.size)
    if shape != other:
        raise ValueError(f"{names[0]} has shape {shape} and {names[1]} has {other}. Resample them to one grid.")
    apart = corner_distance(first.affine, second.affine, shape)
    if not apart <= tolerance:
        raise ValueError(
            f"{names[0]} and {names[1]} are not on one grid: their headers place the same voxel {apart:.3g} mm apart, "
            f"affines {first.affine.tolist()} and {second.affine.tolist()}. Correct a header, or resample one image."
        )
