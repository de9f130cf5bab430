"""Read and write displacement fields in NIfTI files, in the conventions of ITK, ANTs, 3D Slicer and others."""

from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import (
    Affine,
    check_affine,
    in_plane,
    points_to_lps,
    ras_to_lps,
    require_right_angles,
)
from voxelmorph_monai.io.formats import check_gzip, check_nifti, reading, stored_header
from voxelmorph_monai.io.images import save_nifti
from voxelmorph_monai.maps.field_headers import check_displacements, meaning_of
from voxelmorph_monai.switch import compiled_module

__all__ = ["lps_vectors", "read_displacement", "save_displacement", "transform_vectors"]


def transform_vectors(matrix: NDArray[Any], vectors: NDArray[Any]) -> NDArray[Any]:
    """Multiply ``vectors`` ``(3, X, Y, Z)`` by a 3 x 3 matrix, in their own type; X varies fastest in memory.

    Zeros in the matrix are skipped; for a grid along the axes of the body these are two thirds of it.
    """
    found = np.empty((3, *vectors.shape[:0:-1]), vectors.dtype)
    for row, out in zip(matrix.astype(vectors.dtype), found.transpose(0, 3, 2, 1), strict=True):
        first, *others = np.flatnonzero(row)
        np.multiply(vectors[first], row[first], out=out)
        for other in others:
            out += row[other] * vectors[other]
    return found.transpose(0, 3, 2, 1)


def lps_vectors(ddf: NDArray[Any], affine: Affine) -> NDArray[Any]:
    """Convert a displacement ``(3, X, Y, Z)`` in voxels to vectors ``(X, Y, Z, 3)`` in mm along LPS."""
    ddf = np.asarray(ddf, dtype=np.result_type(ddf, np.float32))
    matrix, loops = (ras_to_lps(3) @ affine)[:3, :3].astype(ddf.dtype), compiled_module("scan_loops")
    return np.einsum("ij,j...->...i", matrix, ddf) if loops is None else loops.interleaved(ddf, matrix)


def save_displacement(
    path: str | Path, ddf: NDArray[Any], affine: Affine, *, spatial_dims: int = 3, intent: int = 1007
) -> None:
    """Write a displacement as a NIfTI file for ITK, ANTs and 3D Slicer, completely or not at all.

    The file is a vector image ``(X, Y, Z, 1, 3)`` (intent 1007) with vectors in mm along LPS: :math:`diag(-1, -1, 1) A
    u` with the linear part :math:`A` of the affine. As in ITK, it takes points of the fixed image to points of the
    moving one.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        ddf: ``(3, X, Y, Z)``, in voxels of the fixed grid.
        affine: affine of the fixed image (RAS, mm).
        spatial_dims: 2 to write the field of a 2-D image, ``(X, Y, 1, 1, 2)``.
        intent: 1007 for vectors along LPS, which all programs understand; 1006 for displacements along RAS.
    """
    if ddf.ndim != 4 or ddf.shape[0] != 3:
        raise ValueError(f"ddf for {path} has shape {ddf.shape}, not (3, X, Y, Z).")
    if not np.isfinite(ddf).all():
        raise ValueError(f"ddf for {path} contains NaN or Inf.")
    check_affine(affine, str(path))
    require_right_angles(affine, str(path))
    system = np.eye(4) if intent == 1006 else ras_to_lps(3)
    wide = ddf.astype(np.result_type(ddf, np.float32), copy=False)
    vectors = transform_vectors((system @ affine)[:3, :3], wide)[:spatial_dims].astype(np.float32, copy=False)
    image = nib.Nifti1Image(np.moveaxis(vectors, 0, -1)[:, :, :, None], affine)
    image.header.set_intent(intent)
    save_nifti(path, image)


def _places(size: tuple[int, ...], affine: Affine) -> NDArray[np.float64]:
    """Positions of the voxels of a grid, ``(X, Y, Z, 3)`` (RAS, mm), or ``(X, Y, 2)`` with a 3 x 3 affine."""
    return np.moveaxis(np.tensordot(affine[:-1, :-1], np.indices(size), axes=1), 0, -1) + affine[:-1, -1]


def read_displacement(path: str | Path) -> tuple[NDArray[np.float64], Affine]:
    """Read a field from NIfTI: displacement ``(3, X, Y, Z)`` in voxels of its grid, and affine of the grid (RAS, mm).

    The field may be from :func:`save_displacement` or ANTs, or hold positions or displacements of other programs
    (:mod:`~voxelmorph_monai.maps.field_headers`). The field of a 2-D image, ``(X, Y, 1, 1, 2)``, becomes ``(2, X, Y)``
    and a 3 x 3 affine.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a complete NIfTI file ``(X, Y, Z, 1, 3)`` of finite numbers, or its header does not
            say that it is such a field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with reading(path):
        image = cast(nib.Nifti1Image, nib.load(path))
        header, shape = image.header, image.shape
        vectors = np.asarray(image.dataobj, dtype=np.float64) if shape[4:] in ((2,), (3,)) else None
        check_gzip(path)
    check_nifti(stored_header(path, type(header)), path, shape[:3])
    meaning = meaning_of(header, path)
    if vectors is None or shape[3] != 1 or sorted(shape[:3])[1] < 2 or (shape[4] == 2 and shape[2] > 1):
        raise ValueError(
            f"{path} has shape {shape}, but a displacement field has (X, Y, Z, 1, 3), or (X, Y, 1, 1, 2) for a 2-D "
            "image."
        )
    if meaning is None:
        raise ValueError(
            f"{path} does not say what its vectors mean: its intent is {int(header['intent_code'])}. Set it to 1006 "
            "for displacements along RAS, or to 1007 for displacements along LPS."
        )
    affine = image.affine
    check_affine(affine, str(path))
    require_right_angles(affine, str(path))
    vectors = vectors[:, :, :, 0] if shape[4] == 3 else vectors[:, :, 0, 0]
    affine = affine if shape[4] == 3 else in_plane(affine)
    if not np.isfinite(vectors).all():
        count = int((~np.isfinite(vectors)).sum())
        raise ValueError(f"{path} holds {count} numbers that are NaN or Inf. A displacement must be finite everywhere.")
    places = _places(vectors.shape[:-1], affine)
    if meaning.positions:
        vectors = vectors - places
    else:
        check_displacements(vectors, places, path)
    along_ras = points_to_lps(vectors) if meaning.system == "LPS" else vectors
    return np.einsum("ij,...j->i...", np.linalg.inv(affine[:-1, :-1]), along_ras), affine
