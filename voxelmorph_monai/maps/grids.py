"""Record in a transform file the grids of its two scans, and find out whether it is applied in the right direction.

The name of a transform does not show its direction, and a result in the wrong direction looks plausible. In ITK's HDF5
files the grids are appended after the last byte that HDF5 reads, so other programs can still read the file. A
displacement in NIfTI lies on the grid of the fixed scan.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from voxelmorph_monai.affines import ImageGrid, apply_affine, check_same_grid, inside
from voxelmorph_monai.maps.names import parse_name

__all__ = ["Ends", "fits_backwards", "is_backwards", "read_ends", "write_ends"]

_LOGGER = logging.getLogger(__name__)

_MARK = b"\nvoxelmorph_monai grids "
_LONGEST = 1 << 13  # bytes: two grids take 1 KB
_HDF5 = (".h5", ".hdf5")
_LATTICE = 9  # number of points along each axis at which two grids are compared


class Ends(NamedTuple):
    """Grids of the two scans that a transform connects; None if a grid is unknown."""

    fixed: ImageGrid | None
    moving: ImageGrid | None


def write_ends(path: str | Path, fixed: ImageGrid, moving: ImageGrid) -> None:
    """Add the grids of both scans to an ITK transform in HDF5."""
    grids = {
        name: {"size": [int(n) for n in grid.size], "affine": np.asarray(grid.affine).tolist()}
        for name, grid in (("fixed", fixed), ("moving", moving))
    }
    with Path(path).open("ab") as file:
        file.write(_MARK + json.dumps(grids).encode() + b"\n")


def read_ends(path: str | Path) -> Ends:
    """Read the grids recorded in a transform file; None for each grid that is missing or unreadable."""
    path = Path(path)
    with suppress(OSError, ValueError, KeyError, nib.filebasedimages.ImageFileError):
        if path.name.endswith((".nii", ".nii.gz")):
            image: nib.Nifti1Image = nib.load(path)  # type: ignore[assignment]  # nibabel's own type says too little
            return Ends(ImageGrid(image.shape[:3], image.affine), None)
        if path.suffix in _HDF5:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _LONGEST))
                _, _, text = file.read().rpartition(_MARK)
            grids = json.loads(text)
            return Ends(*(ImageGrid(grids[name]["size"], np.array(grids[name]["affine"])) for name in Ends._fields))
    return Ends(None, None)


def _same(first: ImageGrid, second: ImageGrid | None) -> bool:
    if second is None:
        return False
    try:
        check_same_grid(first, second, ("", ""))
    except ValueError:
        return False
    return True


def _covers(first: ImageGrid, second: ImageGrid) -> bool:
    """Whether some of the second grid lies in the first one."""
    axes = [np.linspace(0, n - 1, _LATTICE) for n in second.size]
    index = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    at = apply_affine(np.linalg.inv(first.affine) @ second.affine, index)
    at[np.array(first.size) == 1] = 0.0  # a slice extends without limit across its plane
    return bool(inside(at, first.size).any())


def _overlap(first: ImageGrid, second: ImageGrid | None) -> bool:
    return second is None or _covers(first, second) or _covers(second, first)


def is_backwards(ends: Ends, image: ImageGrid, reference: ImageGrid, names: tuple[str, str]) -> bool:
    """Whether a transform fits only in reverse: the image lies in the fixed space, and the reference in the moving one.

    Args:
        ends: grids of the transform.
        image: grid of the image to resample.
        reference: grid to resample the image on.
        names: names of the image and the reference, for error messages.

    Raises:
        ValueError: the image or the reference overlaps neither scan of the transform.
    """
    known = ends.fixed is not None and ends.moving is not None
    for grid, name in zip((image, reference), names, strict=True):
        if known and not _overlap(grid, ends.fixed) and not _overlap(grid, ends.moving):
            raise ValueError(
                f"{name} overlaps neither of the scans that the transform was made from. Choose the transform of this "
                "pair."
            )
    if _same(image, ends.moving) or _same(reference, ends.fixed):
        return False
    if _same(image, ends.fixed) and _same(reference, ends.moving):
        return True
    fits = _overlap(image, ends.moving) and _overlap(reference, ends.fixed)
    return known and not fits and _overlap(image, ends.fixed) and _overlap(reference, ends.moving)


def fits_backwards(names: Sequence[str], image: ImageGrid, reference: ImageGrid, of: tuple[str, str]) -> bool:
    """Whether files of transforms, in ANTs' order, fit an image and a reference only in reverse.

    The grids are compared as in :func:`is_backwards`; ``of`` names the image and the reference. If the transforms fit
    only in reverse, a warning is logged.
    """
    first, last = (
        Ends(*read_ends(path)[::-1]) if inverted else read_ends(path)
        for path, inverted in (parse_name(names[0]), parse_name(names[-1]))
    )
    backwards = is_backwards(Ends(first.fixed, last.moving), image, reference, of)
    if backwards:
        _LOGGER.warning(
            "%s fits only in reverse, so its inverse was used: %s is in its fixed space, and %s in its moving space.",
            " ".join(map(str, names)),
            *of,
        )
    return backwards
