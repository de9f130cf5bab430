r"""Rigid and affine registration by mutual information, from any pose, in 2-D and 3-D.

The transform maps points of the fixed image to points of the moving one. It is found in three steps:

1. Many poses are scored on coarse copies of the images: rotations about the centres of their content and, if a field of
   view cuts off some of the content, shifts along all axes.
2. On the same copies, mutual information is maximised over few parameters, starting from the best poses and from the
   pose in the headers.
3. On two finer copies it is maximised over all parameters, starting from the best pose so far.

Images that are already aligned by their headers are left as they are. Voxel sizes are relative to the side of a cube
with the volume of the content, so that the brains of a mouse and of a man are treated alike: for a human brain, with a
side of about 125 mm, the copies have voxels of 8, 4 and 2 mm.

What a field of view cuts off is unknown. It is not treated as background but left out
(:mod:`~voxelmorph_monai.space.mutual_information`). There are no random numbers, and sums are taken in a fixed order,
so the same images give the same transform for any number of threads.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, corners, even_rotations, inside, require_right_angles, spacing
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.space.mutual_information import Copy, MutualInformation, coarsen, is_shown, maximise
from voxelmorph_monai.space.scan import Plane, Scan

__all__ = ["align", "header_map", "register_affine"]

ndimage = lazy("scipy.ndimage")

# Voxel sizes of the copies as fractions of the side of the content: a brain is first about 20 voxels wide.
_SIZES = {2: (0.032, 0.016, 0.008), 3: (0.064, 0.032, 0.016)}
_REACH = 0.14  # margin to compare around the content of the fixed image, as a fraction of its side
_NUM_ROTATIONS = 500  # neighbours are about 30 degrees apart, half of what the maximisation can correct
_SHIFT = 3  # coarse voxels between neighbouring shifts, about half of what the maximisation can correct
_NUM_STARTS = 8
_TOLERANCE = 0.01  # shortest step of the maximisation, in voxels
_SAME = 0.9999  # correlation of images that differ only by rounding
_NUM_POINTS = 20_000  # number of points at which to check whether images are the same


def _side(array: NDArray[Any], affine: Affine) -> float:
    """Side in mm of a cube (or square in 2-D) with the volume (area) of the content of an image."""
    return float(np.count_nonzero(is_shown(array)) * np.prod(spacing(affine))) ** (1 / array.ndim)


def _rotations(number: int, spatial_dims: int) -> NDArray[Any]:
    """Evenly spread rotations ``(number, D, D)``, the identity first."""
    if spatial_dims == 3:
        return even_rotations(number)
    angles = 2 * np.pi * np.arange(number) / number
    return np.moveaxis(np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]]), -1, 0)


def _ends(copy: Copy) -> NDArray[Any]:
    """Lowest and highest coordinates ``(2, D)`` of a copy in mm."""
    places = corners(copy.affine, np.zeros(copy.array.ndim), np.array(copy.array.shape) - 1)
    return np.stack([places.min(axis=1), places.max(axis=1)])


def _poses(moving: Copy, fixed: Copy, scale: float) -> Iterator[Affine]:
    """Maps to try: rotations about the centres with a scale and, if an image is cut off, shifts.

    The scale is the ratio of the sizes of the contents. It is unreliable if an image is cut off, so rotations without a
    scale are then tried as well.
    """
    cut = moving.known is not None or fixed.known is not None
    dims, centre, target = fixed.array.ndim, fixed.centre, moving.centre

    def pose(linear: NDArray[Any], to: NDArray[Any]) -> Affine:
        matrix = np.eye(dims + 1)
        matrix[:-1, :-1] = linear
        matrix[:-1, -1] = to - linear @ centre
        return matrix

    turns = _rotations(_NUM_ROTATIONS, dims)
    for linear in [*scale * turns, *(turns if cut and scale != 1 else [])]:
        yield pose(linear, target)
    if cut:
        (low, high), (other_low, other_high) = _ends(moving), _ends(fixed)
        middle = (low + high) / 2 + centre - (other_low + other_high) / 2
        farthest = np.maximum(high - low, other_high - other_low) / 2  # half of the smaller image overlaps then
        step = _SHIFT * float(spacing(fixed.affine).max())
        for index in product(*[np.arange(-(r // step), r // step + 1) for r in farthest]):
            yield pose(np.eye(dims), middle + step * np.array(index))


def _same(moving: tuple[NDArray[Any], Affine], fixed: tuple[NDArray[Any], Affine]) -> bool:
    """Whether the images are the same if aligned by their headers, so that an optimisation could only do harm."""
    shown = np.flatnonzero(is_shown(fixed[0]))
    some = np.stack(np.unravel_index(shown[:: max(1, len(shown) // _NUM_POINTS)], fixed[0].shape))
    to_voxels = np.linalg.inv(moving[1]) @ fixed[1]
    at = to_voxels[:-1, :-1] @ some + to_voxels[:-1, -1:]
    common = inside(at, moving[0].shape)
    if common.mean() < 0.5:
        return False
    there = ndimage.map_coordinates(moving[0], at[:, common], np.float64, order=1, mode="nearest")
    here = fixed[0][tuple(some[:, common])].astype(np.float64)
    there, here = there - there.mean(), here - here.mean()
    return bool((there * here).sum() > _SAME * np.sqrt((there**2).sum() * (here**2).sum()))


def register_affine(
    moving: tuple[NDArray[Any], Affine],
    fixed: tuple[NDArray[Any], Affine],
    kind: str = "affine",
    names: tuple[str, str] = ("moving", "fixed"),
) -> Affine:
    """Align two images ``(array, affine)``.

    Args:
        moving: image ``(X, Y, Z)`` with a 4 x 4 affine, or ``(X, Y)`` with a 3 x 3 affine, in any pose. Its background
            must be about 0. Clip very bright voxels, which distort the histogram.
        fixed: like ``moving``.
        kind: ``"rigid"`` (6 parameters, 3 in 2-D) or ``"affine"`` (12 and 6).
        names: names of the images in error messages.

    Returns:
        Matrix, 4 x 4 or 3 x 3, that takes points of ``fixed`` to points of ``moving`` (RAS, mm).

    Raises:
        ValueError: an image cannot be aligned.
    """
    if kind not in ("rigid", "affine"):
        raise ValueError(f"kind is '{kind}'. Use 'rigid' or 'affine'.")
    for name, (array, affine) in zip(names, (moving, fixed), strict=True):
        if array.ndim not in (2, 3) or affine.shape != (array.ndim + 1,) * 2 or not (array > 0).any():
            raise ValueError(
                f"{name} has shape {array.shape}, {np.count_nonzero(array > 0)} voxels above 0, and an affine of shape "
                f"{affine.shape}. Give (X, Y, Z) with 4 x 4, or (X, Y) with 3 x 3, and some voxels above 0."
            )
        require_right_angles(affine, name)
    if moving[0].ndim != fixed[0].ndim:
        raise ValueError(
            f"{names[0]} has shape {moving[0].shape} and {names[1]} has {fixed[0].shape}. Align two volumes, or two "
            "slices."
        )
    dims = fixed[0].ndim
    if _same(moving, fixed):
        return np.eye(dims + 1)
    sides = _side(*moving), _side(*fixed)
    sizes, reach = [max(sides) * size for size in _SIZES[dims]], _REACH * max(sides)
    copies = [*zip(coarsen(*moving, sizes, 0), coarsen(*fixed, sizes, reach), strict=True)]
    coarse = copies[0]
    for name, copy in zip(names, coarse, strict=True):
        if not np.ptp(copy.array) > 0:
            raise ValueError(f"{name} cannot be aligned: it has the same intensity everywhere, {copy.array.flat[0]:g}.")
    poses = [*_poses(*coarse, 1.0 if kind == "rigid" else sides[0] / sides[1])]
    information = MutualInformation(*coarse, reach)
    starts = [poses[k] for k in np.argsort(information.glance(poses), kind="stable")[::-1][:_NUM_STARTS]]
    starts.append(np.eye(dims + 1))
    start_kind = "rigid" if kind == "rigid" else "similarity"
    results = [maximise(information, start, start_kind, 5 * _TOLERANCE * sizes[0]) for start in starts]
    result = results[int(np.argmax([information(each) for each in results]))]
    for size, pair, thinned in zip(sizes[1:], copies[1:], (False, True), strict=True):
        result = maximise(MutualInformation(*pair, reach, thinned), result, kind, _TOLERANCE * size)
    return result


def header_map(moving: Scan, fixed: Scan) -> Affine:
    """Map, 4 x 4, from points of ``fixed`` to those of ``moving`` (RAS, mm) by the headers.

    It is the identity, or for slices from plane to plane.
    """
    if not fixed.is_slice:
        return np.eye(4)
    source = Plane.of(fixed)
    return source.map_to(Plane.of(moving, source), np.eye(3))


def align(moving: Scan, fixed: Scan, alignment: str = "affine") -> Affine:
    """Align two scans: linear map, 4 x 4, from points of ``fixed`` to points of ``moving`` (RAS, mm).

    Args:
        moving: scan with a background of 0, in any pose; slices are aligned within their planes.
        fixed: like ``moving``.
        alignment: ``"affine"``, ``"rigid"``, or ``"none"`` to rely on the headers.

    Raises:
        ValueError: the scans cannot be aligned, or ``alignment`` is none of these.
    """
    if alignment == "none":
        return header_map(moving, fixed)
    names = moving.name, fixed.name
    if not fixed.is_slice:
        return register_affine((moving.array, moving.affine), (fixed.array, fixed.affine), alignment, names)
    source = Plane.of(fixed)
    target = Plane.of(moving, source)
    return source.map_to(target, register_affine(target.flatten(moving), source.flatten(fixed), alignment, names))
