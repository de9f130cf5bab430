"""Apply transforms to files: images, label maps and points.

Images and points go opposite ways. A transform takes points of the fixed image (the reference) to points of the moving
one, and so pulls the moving image onto the fixed grid. Points that were drawn in the moving image have to go the same
way as the image, against the transform, so they are mapped by its inverse.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import ImageGrid
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.maps.grids import fits_backwards
from voxelmorph_monai.maps.names import check_image_output, check_output
from voxelmorph_monai.maps.spatial_map import INTERPOLATIONS, LABEL_INTERPOLATIONS, SpatialMap, warp_to_grid
from voxelmorph_monai.space.scan import Frame, Scan, ScanLike

__all__ = ["SIDES", "apply", "apply_to_image", "apply_to_points", "jacobian_file"]

SIDES = ("fixed", "moving")
"""Images in which points can be drawn."""

# These modules import torch or ITK. A map of this package is applied without them, in half the time.
chains, files = lazy("voxelmorph_monai.maps.chains"), lazy("voxelmorph_monai.maps.files")
point_files, report = lazy("voxelmorph_monai.maps.points"), lazy("voxelmorph_monai.report")


def _interpolation(kind: str, interpolation: str | None) -> str:
    """Return the interpolation to use (default if None); raises ValueError if it or the kind is unknown."""
    if kind not in ("image", "labels"):
        raise ValueError(f"kind is '{kind}'. Choose image or labels.")
    known = INTERPOLATIONS if kind == "image" else LABEL_INTERPOLATIONS
    if interpolation not in (None, *known):
        raise ValueError(f"interpolation '{interpolation}' does not exist for {kind}; choose from {', '.join(known)}.")
    return interpolation or known[0]


def _simple(kind: str, interpolation: str) -> bool:
    """Whether :func:`warp_to_grid` has this interpolation; ITK and torch have the others."""
    return interpolation == "nearest" or (kind, interpolation) == ("image", "linear")


def _warp(map_: SpatialMap, scan: Scan, grid: ImageGrid, interpolation: str) -> NDArray[Any]:
    return warp_to_grid(scan, map_.on_grid(grid), grid, order=int(interpolation == "linear"))


def _resample(kind: str, interpolation: str, scan: Scan, transform: Any, grid: ImageGrid) -> NDArray[Any]:
    resample = chains.resample_image if kind == "image" else chains.resample_labels
    return resample(scan, transform, grid, interpolation)


def apply(
    transforms: str | Path | SpatialMap | Sequence[str | Path],
    moving: ScanLike,
    reference: ScanLike,
    *,
    kind: str = "image",
    interpolation: str | None = None,
) -> Scan:
    """Resample a scan on the grid of a reference, as ``vxm apply`` does with files.

    Args:
        transforms: map of a registration (``result.forward``), a file, or files in ANTs' order
            (:func:`~voxelmorph_monai.maps.files.read_chain`).
        moving: image or label map.
        reference: the fixed image, whose grid and header the result has.
        kind: ``"image"`` or ``"labels"``.
        interpolation: one of :data:`~voxelmorph_monai.maps.spatial_map.INTERPOLATIONS` (default: linear), or of
            :data:`~voxelmorph_monai.maps.spatial_map.LABEL_INTERPOLATIONS` (default: nearest).

    Raises:
        TypeError: an input is not a scan.
        ValueError, FileNotFoundError: an input or an option cannot be used; the message says which and why.
    """
    interpolation = _interpolation(kind, interpolation)
    scan, like = Scan.of(moving, "moving", labels=kind == "labels"), Scan.of(reference, "reference")
    if isinstance(transforms, SpatialMap):
        if _simple(kind, interpolation):
            return like.like(_warp(transforms, scan, like.grid, interpolation), scan.name)
        found = chains.chain_of_map(transforms)
    else:
        names = [transforms] if isinstance(transforms, str | Path) else transforms
        found = files.read_chain([str(name) for name in names]).transform
    return like.like(_resample(kind, interpolation, scan, found, like.grid), scan.name)


def apply_to_image(
    transforms: Sequence[str],
    moving: str | Path,
    reference: str | Path,
    output: str | Path,
    *,
    kind: str = "image",
    interpolation: str | None = None,
    series: int | None = None,
    reference_series: int | None = None,
    overwrite: bool = False,
) -> float:
    """Resample an image or a label map on the grid of a reference; the output has the header of the reference.

    An image becomes float32, a label map keeps its type. Transforms that fit only in reverse are inverted
    (:func:`~voxelmorph_monai.maps.grids.fits_backwards`). Transforms of 2-D images need 2-D images and references; all
    others need volumes or slices.

    Args:
        transforms: files in ANTs' order, see :func:`~voxelmorph_monai.maps.files.read_chain`.
        moving: the image or label map, see :func:`~voxelmorph_monai.io.images.open_volume`.
        reference: the fixed image, of which only the grid is used.
        output: ``.nii`` or ``.nii.gz``.
        kind: ``"image"`` or ``"labels"``.
        interpolation: one of :data:`~voxelmorph_monai.maps.spatial_map.INTERPOLATIONS` (default: linear), or of
            :data:`~voxelmorph_monai.maps.spatial_map.LABEL_INTERPOLATIONS` (default: nearest).
        series: number of the DICOM series if ``moving`` is a folder of several
            (:func:`~voxelmorph_monai.io.dicom.list_series`).
        reference_series: the same for the reference.
        overwrite: replace ``output``.

    Returns:
        Largest error in mm of the displacements that were inverted numerically, 0 if there were none.
    """
    interpolation = _interpolation(kind, interpolation)
    check_image_output(Path(output), overwrite, [moving, reference, *transforms])
    scan = (Scan.read if kind == "image" else Scan.read_labels)(moving, series)
    fixed = Frame.read(reference, series=reference_series)
    found, backwards = None, fits_backwards(transforms, scan.grid, fixed.grid, (scan.name, fixed.name))
    if not backwards and len(transforms) == 1 and _simple(kind, interpolation) and fixed.spatial_dims == 3:
        found = SpatialMap.read(transforms[0])
    if found is not None and scan.spatial_dims == 3:
        resampled, residual = _warp(found, scan, fixed.grid, interpolation), 0.0
    else:
        chain = files.open_chain(transforms, scan, fixed)
        if backwards:
            chain = chain.inverse()
        resampled, residual = _resample(kind, interpolation, scan, chain.transform, fixed.grid), chain.residual
    fixed.save(output, resampled)
    return residual


def jacobian_file(
    transforms: Sequence[str],
    reference: str | Path,
    output: str | Path,
    *,
    logarithm: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the Jacobian determinant on the grid of a reference, affine part included: 2 where volumes double.

    Args:
        transforms: as in :func:`apply_to_image`.
        reference: as in :func:`apply_to_image`.
        output: as in :func:`apply_to_image`.
        logarithm: write the natural logarithm, which is 0 where the volume does not change.
        overwrite: as in :func:`apply_to_image`.

    Raises:
        ValueError: an input cannot be used, or the transform folds, so that its logarithm is not defined.
    """
    check_image_output(Path(output), overwrite, [reference, *transforms])
    fixed = Frame.read(reference)
    size, affine = fixed.grid
    transform = files.open_chain(transforms, fixed).transform
    parts = [part for part in chains.flatten(transform) if chains.is_field(part)]
    if any(1 in chains.field_of(part)[0].shape[1:] for part in parts):
        ddf = chains.on_grid(transform, fixed.grid)  # a 2-D field says nothing about other planes
        determinant = report.volume_change(ddf, affine)
    else:
        flat = np.array(size) == 1
        around = affine.copy()  # add a plane on both sides of a slice, to measure the change across it
        around[:3, 3] -= affine[:3, :3] @ flat
        ddf = chains.on_grid(transform, ImageGrid(np.where(flat, 3, size).tolist(), around))
        determinant = report.volume_change(ddf, around)[tuple(slice(1, 2) if one else slice(None) for one in flat)]
    if logarithm:
        folds = int((determinant <= 0).sum())
        if folds:
            raise ValueError(
                f"the logarithm is not defined: the transform folds in {folds} of {determinant.size} voxels. Leave "
                "out --log to write the determinant itself."
            )
        determinant = np.log(determinant)
    fixed.save(output, determinant)


def apply_to_points(
    transforms: Sequence[str],
    points: str | Path,
    output: str | Path,
    *,
    drawn_in: str,
    coordinates: str | None = None,
    overwrite: bool = False,
) -> float:
    """Map points from one image to the other; the output keeps the format of the input and its other content.

    Args:
        transforms: as in :func:`apply_to_image`.
        points: CSV with columns x, y and z, or ``.fcsv`` or ``.mrk.json`` of 3D Slicer.
        output: file to write, with the same extension.
        drawn_in: ``"fixed"``: points of the fixed image are mapped to the moving one by the transform. ``"moving"``:
            points of the moving image are mapped to the fixed one by the inverse, which is exact for linear transforms
            and otherwise found numerically for each point.
        coordinates: coordinate system of a CSV file, ``"RAS"`` or ``"LPS"``.
        overwrite: replace ``output``.

    Returns:
        Largest error in mm of the numerical inverse, 0 if there was none.
    """
    if drawn_in not in SIDES:
        raise ValueError(f"points cannot be drawn in '{drawn_in}'. Choose one of {', '.join(SIDES)}.")
    given = point_files.read_points(points, coordinates)
    ending = "".join(Path(points).suffixes[-2:]) if str(points).endswith(".json") else Path(points).suffix
    if not str(output).endswith(ending):
        raise ValueError(f"{output} does not end in {ending}, but points keep the format of {points}. Rename it.")
    check_output(Path(output), overwrite, [points, *transforms])
    transform, residual, _ = files.read_chain(transforms)
    if drawn_in == "fixed":
        moved = chains.map_points(transform, given.points)
    else:
        moved, missed = chains.invert_points(transform, given.points)
        residual = max(residual, missed)
    point_files.save_points(output, given, moved)
    return residual
