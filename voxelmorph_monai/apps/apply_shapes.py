"""Apply transforms to surfaces and streamlines.

Their points are mapped like those of a point file: a shape made from the fixed image is mapped to the moving image by
the transform, a shape made from the moving image to the fixed image by the inverse.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from voxelmorph_monai.affines import ImageGrid
from voxelmorph_monai.io.images import open_volume
from voxelmorph_monai.maps.files import read_chain
from voxelmorph_monai.maps.names import check_output
from voxelmorph_monai.maps.streamlines import move_streamlines
from voxelmorph_monai.maps.surfaces import read_surface, save_surface
from voxelmorph_monai.maps.vertices import Mover

__all__ = ["apply_to_streamlines", "apply_to_surface"]

_LOGGER = logging.getLogger(__name__)


def _grid(path: str | Path | None) -> ImageGrid | None:
    if path is None:
        return None
    volume, affine = open_volume(path, planar=True)
    return ImageGrid(volume.shape, affine)


def _mover(
    transforms: Sequence[str], shape: str | Path, output: str | Path, made_from: str, overwrite: bool
) -> tuple[Mover, float]:
    if made_from not in ("fixed", "moving"):
        raise ValueError(f"made_from is '{made_from}'. Choose fixed or moving.")
    if Path(shape).suffix.lower() != Path(output).suffix.lower():
        raise ValueError(f"{output} does not end in '{Path(shape).suffix}', but shapes keep their format. Rename it.")
    check_output(Path(output), overwrite, [shape, *transforms])
    found = read_chain(transforms)
    if found.spatial_dims == 2:
        raise ValueError(f"{shape} is in 3-D, but the transforms are for 2-D images.")
    return Mover(found.transform, made_from), found.residual


def _tell(mover: Mover, shape: str | Path, what: str) -> None:
    if mover.outside:
        _LOGGER.warning(
            "%s: %d %s lie outside the grid of the displacement, so its value at the border was used for them.",
            shape,
            mover.outside,
            what,
        )


def apply_to_surface(
    transforms: Sequence[str],
    surface: str | Path,
    output: str | Path,
    *,
    made_from: str,
    coordinates: str | None = None,
    reference: str | Path | None = None,
    volume: str | Path | None = None,
    overwrite: bool = False,
) -> float:
    """Move a surface from one image to the other; the output keeps the format of the input and its other content.

    Args:
        transforms: files in ANTs' order, see :func:`~voxelmorph_monai.maps.files.read_chain`.
        surface: GIFTI, FreeSurfer, VTK, STL or PLY (:mod:`~voxelmorph_monai.maps.surfaces`).
        output: file to write, with the same extension.
        made_from: ``"fixed"``: the transform maps the surface to the moving image; ``"moving"``: the inverse maps it to
            the fixed image.
        coordinates: coordinate system of a file that does not state it, ``"RAS"``, ``"LPS"`` or ``"tkr"``.
        reference: the image that the surface is mapped to; FreeSurfer files store its geometry.
        volume: the image that a surface in tkr RAS was made from, if its file does not store the geometry.
        overwrite: replace ``output``.

    Returns:
        Largest error of the numerical inverse in mm, 0 if there was none.
    """
    mover, residual = _mover(transforms, surface, output, made_from, overwrite)
    found = read_surface(surface, coordinates, _grid(volume))
    if found.note:
        _LOGGER.warning("%s.", found.note)
    moved = mover(found.points)
    save_surface(output, found, moved, _grid(reference), mover.mirrors)
    _tell(mover, surface, f"of {len(moved)} vertices")
    return max(residual, mover.residual)


def apply_to_streamlines(
    transforms: Sequence[str],
    streamlines: str | Path,
    output: str | Path,
    *,
    made_from: str,
    reference: str | Path | None = None,
    overwrite: bool = False,
) -> float:
    """Move streamlines from one image to the other, in parts to save memory.

    Args:
        transforms: as in :func:`apply_to_surface`.
        streamlines: ``.trk``, ``.tck`` or ``.trx``.
        output: file to write, with the same extension.
        made_from: as in :func:`apply_to_surface`.
        reference: the image that the streamlines are mapped to, required for TRK; TRK and TRX store its geometry.
        overwrite: replace ``output``.

    Returns:
        Largest error of the numerical inverse in mm, 0 if there was none.
    """
    mover, residual = _mover(transforms, streamlines, output, made_from, overwrite)
    count = move_streamlines(streamlines, output, mover, _grid(reference))
    if not count:
        _LOGGER.warning("%s holds no streamlines.", streamlines)
    _tell(mover, streamlines, "points")
    return max(residual, mover.residual)
