"""Apply transforms to files: images, label maps and points.

Images and points go opposite ways. A transform takes points of the fixed image (the reference) to points of the moving
one, and so pulls the moving image onto the fixed grid. Points that were drawn in the moving image have to go the way of
the image, which is against the transform: by its inverse.
"""

from collections.abc import Sequence
from pathlib import Path

import itk
import numpy as np
import torch

from voxelmorph_monai.blocks import jacobian_determinant
from voxelmorph_monai.chains import INTERPOLATIONS, invert_points, map_points, on_grid, pull_image, pull_labels
from voxelmorph_monai.points import read_points, save_points
from voxelmorph_monai.spaces import (
    Affine,
    open_volume,
    read_image,
    read_labels,
    require_right_angles,
    save_image_like,
)
from voxelmorph_monai.transform_files import read_chain, require_new

__all__ = ["LABEL_INTERPOLATIONS", "SIDES", "jacobian_file", "pull_file", "pull_label_file", "read_grid", "take_points"]

LABEL_INTERPOLATIONS = ("label", "nearest")
"""How a label map is read between voxels: the label with the largest linear share, or that of the nearest voxel."""

SIDES = ("fixed", "moving")
"""The image that points were drawn in."""


def read_grid(path: str | Path) -> tuple[tuple[int, int, int], Affine]:
    """Size and affine (RAS, mm) of an image; its voxels are not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not one 3-D volume with axes at right angles.
    """
    volume, affine = open_volume(path)
    require_right_angles(affine, str(path))
    x, y, z = volume.shape
    return (x, y, z), affine


def _check_output(output: str | Path, overwrite: bool, inputs: Sequence[str | Path]) -> None:
    if not str(output).endswith((".nii", ".nii.gz")):
        raise ValueError(f"an image is saved as .nii or .nii.gz, got {output}.")
    require_new(Path(output), overwrite, inputs)


def _open(
    transforms: Sequence[str], reference: str | Path
) -> tuple[itk.Transform, tuple[tuple[int, int, int], Affine], float]:
    grid = read_grid(reference)
    transform, residual = read_chain(transforms)
    return transform, grid, residual


def pull_file(
    transforms: Sequence[str],
    image: str | Path,
    reference: str | Path,
    output: str | Path,
    *,
    interpolation: str = "linear",
    overwrite: bool = False,
) -> float:
    """Pull an image onto the grid of a reference; the output has the header of the reference and is float32.

    Args:
        transforms: as :func:`~voxelmorph_monai.transform_files.read_chain` takes them.
        image: the moving image, as :func:`~voxelmorph_monai.spaces.open_volume` takes it, in 3-D.
        reference: the fixed image, whose grid counts alone.
        output: ``.nii`` or ``.nii.gz``.
        interpolation: one of :data:`~voxelmorph_monai.chains.INTERPOLATIONS`.
        overwrite: replace ``output``.

    Returns:
        Residual in mm of the displacements that were inverted, 0 where none was.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation of an image must be one of {', '.join(INTERPOLATIONS)}, got '{interpolation}'."
        )
    _check_output(output, overwrite, [image, reference, *transforms])
    moving = read_image(image)
    require_right_angles(moving[1], str(image))
    transform, grid, residual = _open(transforms, reference)
    save_image_like(output, pull_image(moving, transform, *grid, interpolation=interpolation), reference)
    return residual


def pull_label_file(
    transforms: Sequence[str],
    labels: str | Path,
    reference: str | Path,
    output: str | Path,
    *,
    interpolation: str = "label",
    overwrite: bool = False,
) -> float:
    """Pull a label map onto the grid of a reference, as :func:`pull_file` does an image; it keeps its type.

    Args:
        transforms: as in :func:`pull_file`.
        labels: label map of the moving image.
        reference: as in :func:`pull_file`.
        output: as in :func:`pull_file`.
        interpolation: ``"label"``: linear for each label, the largest share wins; or ``"nearest"``.
        overwrite: as in :func:`pull_file`.
    """
    if interpolation not in LABEL_INTERPOLATIONS:
        known = ", ".join(LABEL_INTERPOLATIONS)
        raise ValueError(f"interpolation of labels must be one of {known}, got '{interpolation}'.")
    _check_output(output, overwrite, [labels, reference, *transforms])
    moving = read_labels(labels)
    transform, grid, residual = _open(transforms, reference)
    pulled = pull_labels(moving, transform, *grid, nearest=interpolation == "nearest")
    save_image_like(output, pulled, reference)
    return residual


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
    _check_output(output, overwrite, [reference, *transforms])
    transform, grid, _ = _open(transforms, reference)
    determinant = jacobian_determinant(torch.from_numpy(on_grid(transform, *grid))[None])[0, 0].numpy()
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
    require_new(Path(output), overwrite, [points, *transforms])
    transform, residual = read_chain(transforms)
    if drawn_in == "fixed":
        moved = map_points(transform, given.points)
    else:
        moved, missed = invert_points(transform, given.points)
        residual = max(residual, missed)
    save_points(output, given, moved)
    return residual
