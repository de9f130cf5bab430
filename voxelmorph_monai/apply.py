"""Apply transforms to files: images, label maps and points.

Images and points go opposite ways. A transform takes points of the fixed image (the reference) to points of the moving
one, and so pulls the moving image onto the fixed grid. Points that were drawn in the moving image have to go the way of
the image, which is against the transform: by its inverse.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.chains import (
    INTERPOLATIONS,
    LABEL_INTERPOLATIONS,
    field_of,
    flatten,
    invert_points,
    is_field,
    map_points,
    on_grid,
    pull_image,
    pull_labels,
)
from voxelmorph_monai.formats import spatial_dims_of
from voxelmorph_monai.points import read_points, save_points
from voxelmorph_monai.results import volume_change
from voxelmorph_monai.spaces import (
    Affine,
    ImageGrid,
    open_volume,
    read_image,
    read_labels,
    require_right_angles,
    save_image_like,
)
from voxelmorph_monai.transform_files import Chain, check_output, read_chain

__all__ = ["SIDES", "jacobian_file", "open_chain", "pull_file", "read_grid", "take_points"]

SIDES = ("fixed", "moving")
"""The image that points were drawn in."""


def read_grid(path: str | Path) -> ImageGrid:
    """Size and affine (RAS, mm) of an image; its voxels are not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not one 3-D volume, slice or 2-D image, its axes at right angles.
    """
    volume, affine = open_volume(path, planar=True)
    require_right_angles(affine, str(path))
    return ImageGrid(volume.shape, affine)


def _check_image_output(output: str | Path, overwrite: bool, inputs: Sequence[str | Path]) -> None:
    if not str(output).endswith((".nii", ".nii.gz")):
        raise ValueError(f"an image is saved as .nii or .nii.gz, got {output}.")
    check_output(Path(output), overwrite, inputs)


def open_chain(transforms: Sequence[str], *images: str | Path | None) -> Chain:
    """Read transforms (:func:`~voxelmorph_monai.transform_files.read_chain`), whose dimensions the images must have.

    Raises:
        ValueError: an image is in other dimensions; None stands for no image.
    """
    found = read_chain(transforms)
    for image in images:
        if image is not None and spatial_dims_of(Path(image)) != found.spatial_dims:
            raise ValueError(f"{image} must be an image in {found.spatial_dims}-D, as the transforms are.")
    return found


class _Kind(NamedTuple):
    """What is pulled: how it is read and pulled, and the interpolations it can have, the default first."""

    read: Callable[..., tuple[NDArray[Any], Affine]]
    pull: Callable[..., NDArray[Any]]
    interpolations: Iterable[str]


_KINDS = {
    "image": _Kind(read_image, pull_image, INTERPOLATIONS),
    "labels": _Kind(read_labels, pull_labels, LABEL_INTERPOLATIONS),
}


def pull_file(
    transforms: Sequence[str],
    moving: str | Path,
    reference: str | Path,
    output: str | Path,
    *,
    kind: str = "image",
    interpolation: str | None = None,
    overwrite: bool = False,
) -> float:
    """Pull an image or a label map onto the grid of a reference; the output has the header of the reference.

    An image becomes float32, a label map keeps its type. Transforms of 2-D images pull 2-D images onto 2-D references,
    all others volumes or slices.

    Args:
        transforms: as :func:`~voxelmorph_monai.transform_files.read_chain` takes them.
        moving: the image or label map, as :func:`~voxelmorph_monai.spaces.open_volume` takes it.
        reference: the fixed image, whose grid counts alone.
        output: ``.nii`` or ``.nii.gz``.
        kind: ``"image"`` or ``"labels"``.
        interpolation: one of :data:`~voxelmorph_monai.chains.INTERPOLATIONS` (default: linear), or of
            :data:`~voxelmorph_monai.chains.LABEL_INTERPOLATIONS` (default: linear for each label, the largest wins).
        overwrite: replace ``output``.

    Returns:
        Residual in mm of the displacements that were inverted, 0 where none was.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got '{kind}'.")
    read, pull, interpolations = _KINDS[kind]
    interpolation = interpolation or next(iter(interpolations))
    if interpolation not in interpolations:
        raise ValueError(f"{kind} must be interpolated by one of {', '.join(interpolations)}, got '{interpolation}'.")
    _check_image_output(output, overwrite, [moving, reference, *transforms])
    array, affine = read(moving, planar=True)
    require_right_angles(affine, str(moving))
    grid = read_grid(reference)
    found = open_chain(transforms, moving, reference)
    save_image_like(output, pull((array, affine), found.transform, *grid, interpolation=interpolation), reference)
    return found.residual


def jacobian_file(
    transforms: Sequence[str],
    reference: str | Path,
    output: str | Path,
    *,
    logarithm: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the change of volume on the grid of a reference, affine part included: 2 where the transform doubles it.

    Args:
        transforms: as in :func:`pull_file`.
        reference: as in :func:`pull_file`.
        output: as in :func:`pull_file`.
        logarithm: write the natural logarithm, 0 where volume stays.
        overwrite: as in :func:`pull_file`.

    Raises:
        ValueError: the logarithm of a transform that folds; and for wrong input.
    """
    _check_image_output(output, overwrite, [reference, *transforms])
    size, affine = read_grid(reference)
    transform = open_chain(transforms, reference).transform
    if any(is_field(part) and 1 in field_of(part)[0].shape[1:] for part in flatten(transform)):
        determinant = volume_change(on_grid(transform, size, affine), affine)  # which says nothing of other planes
    else:
        flat = np.array(size) == 1
        around = affine.copy()  # three planes for a slice, which lies in the middle: volume changes across it, too
        around[:3, 3] -= affine[:3, :3] @ flat
        ddf = on_grid(transform, np.where(flat, 3, size).tolist(), around)
        determinant = volume_change(ddf, around)[tuple(slice(1, 2) if one else slice(None) for one in flat)]
    if logarithm:
        folds = int((determinant <= 0).sum())
        if folds:
            raise ValueError(
                f"a logarithm must be of a transform without folds, but {folds} of {determinant.size} voxels fold: "
                "write the determinant itself."
            )
        determinant = np.log(determinant)
    save_image_like(output, determinant, reference)


def take_points(
    transforms: Sequence[str],
    points: str | Path,
    output: str | Path,
    *,
    drawn_in: str,
    coordinates: str | None = None,
    overwrite: bool = False,
) -> float:
    """Take points from one image to the other; the output has the format of the input, and all else that is in it.

    Args:
        transforms: as in :func:`pull_file`.
        points: CSV with columns x, y and z, or ``.fcsv`` or ``.mrk.json`` of 3D Slicer.
        output: file of the same ending.
        drawn_in: ``"fixed"``: points of the fixed image go to the moving one, along the transform. ``"moving"``: points
            of the moving image go to the fixed one, as the image does, by the inverse: exact for linear transforms,
            otherwise searched point by point.
        coordinates: of a CSV file, ``"RAS"`` or ``"LPS"``.
        overwrite: replace ``output``.

    Returns:
        Residual of what was inverted numerically, in mm.
    """
    if drawn_in not in SIDES:
        raise ValueError(f"points must be drawn in one of {', '.join(SIDES)}, got '{drawn_in}'.")
    given = read_points(points, coordinates)
    ending = "".join(Path(points).suffixes[-2:]) if str(points).endswith(".json") else Path(points).suffix
    if not str(output).endswith(ending):
        raise ValueError(f"moved points are saved in the format they come in, {ending}, got {output}.")
    check_output(Path(output), overwrite, [points, *transforms])
    transform, residual, _ = read_chain(transforms)
    if drawn_in == "fixed":
        moved = map_points(transform, given.points)
    else:
        moved, missed = invert_points(transform, given.points)
        residual = max(residual, missed)
    save_points(output, given, moved)
    return residual
