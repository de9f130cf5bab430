r"""Read and write transforms of FSL and FreeSurfer with the libraries `fslpy` and `nitransforms`.

FSL files store no position in space. Their numbers are in scaled voxels of the fixed and the moving image, with the
first axis reversed if an affine has a positive determinant, so both images are needed to interpret them. A FLIRT matrix
maps points of the *moving* image to points of the fixed one. A FNIRT warp maps in the opposite direction, as do ITK
transforms and all functions in this module.
"""

import importlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, ImageGrid, check_same_grid
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.io.formats import reading
from voxelmorph_monai.io.images import save_nifti

__all__ = ["read_flirt", "read_fnirt", "read_lta", "save_flirt", "save_fnirt", "save_lta"]


def _library(name: str) -> Any:
    """Import a module of an optional library when it is needed, as this can take half a second."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"FSL and FreeSurfer transforms need fslpy and nitransforms: pip install 'voxelmorph_monai[transforms]' "
            f"({error})."
        ) from error


def _header(grid: ImageGrid) -> nib.Nifti1Image:
    """Image on this grid, whose voxels take no memory."""
    return nib.Nifti1Image(np.broadcast_to(np.uint8(0), tuple(grid.size)), grid.affine)


def _nifti(grid: ImageGrid) -> Any:
    return _library("fsl.data.image").Nifti(_header(grid).header)


def read_flirt(path: Path, fixed: ImageGrid, moving: ImageGrid) -> Affine:
    """Read a FLIRT matrix: map from points of the fixed image, FSL's reference, to the moving one, 4 x 4 (RAS, mm)."""
    flirt = _library("fsl.transform.flirt")
    try:
        matrix = flirt.readFlirt(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a FLIRT matrix, a text file of 4 x 4 numbers: {error}.") from error
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-6:
        raise ValueError(f"{path} is not a FLIRT matrix, which has 4 x 4 numbers and an inverse: {matrix.tolist()}.")
    return np.linalg.inv(flirt.fromFlirt(matrix, _nifti(moving), _nifti(fixed), "world", "world"))


def read_fnirt(path: Path, fixed: ImageGrid, moving: ImageGrid) -> tuple[NDArray[np.float64], Affine]:
    """Read a FNIRT warp or file of coefficients.

    Returns:
        Displacement ``(3, X, Y, Z)`` in voxels of the fixed grid, and the affine of that grid (RAS, mm).
    """
    fnirt = _library("fsl.transform.fnirt")
    with reading(path):
        read = fnirt.readFnirt(str(path), _nifti(moving), _nifti(fixed))
        field = fnirt.fromFnirt(read, "world", "world")
        vectors = np.asarray(field.data, dtype=np.float64)
    affine = np.asarray(field.voxToWorldMat)
    check_same_grid(ImageGrid(vectors.shape[:3], affine), fixed, (str(path), "the fixed image"))
    if field.absolute:
        vectors = vectors - np.moveaxis(np.tensordot(affine[:3, :3], np.indices(vectors.shape[:3]), 1), 0, -1)
        vectors -= affine[:3, 3]
    if not np.isfinite(vectors).all():
        raise ValueError(
            f"{path} holds {int((~np.isfinite(vectors)).sum())} numbers that are NaN or Inf. Correct the warp."
        )
    return np.einsum("ij,...j->i...", np.linalg.inv(affine[:3, :3]), vectors), affine


def save_flirt(path: Path, matrix: Affine, fixed: ImageGrid, moving: ImageGrid) -> None:
    """Write a map from points of the fixed image to points of the moving one, 4 x 4 (RAS, mm), as a FLIRT matrix."""
    flirt = _library("fsl.transform.flirt")
    written = flirt.toFlirt(np.linalg.inv(matrix), _nifti(moving), _nifti(fixed), "world", "world")
    with atomic(path) as temporary:
        flirt.writeFlirt(written, temporary)


def save_fnirt(path: Path, ddf: NDArray[np.floating[Any]], fixed: ImageGrid, moving: ImageGrid) -> None:
    """Write a displacement ``(3, X, Y, Z)`` in voxels of the fixed grid as a FNIRT warp of relative displacements."""
    nonlinear = _library("fsl.transform.nonlinear")
    vectors = np.einsum("ij,j...->...i", fixed.affine[:3, :3], ddf)
    ours = nonlinear.DeformationField(
        vectors,
        _nifti(moving),
        _nifti(fixed),
        xform=fixed.affine,
        srcSpace="world",
        refSpace="world",
        defType="relative",
    )
    theirs = _library("fsl.transform.fnirt").toFnirt(ours)
    image = nib.Nifti1Image(np.asarray(theirs.data, dtype=np.float32), fixed.affine)
    image.header.set_intent("fnirt disp field")
    save_nifti(path, image)


def read_lta(path: Path) -> Affine:
    """Read a linear FreeSurfer transform: 4 x 4 matrix from points of the fixed to the moving image (RAS, mm)."""
    lta = _library("nitransforms.io.lta")
    try:
        read = lta.FSLinearTransform.from_string(path.read_text(encoding="utf-8"))
        kind = int(read["type"])
        matrix = read.to_ras() if kind in (0, 1) else None
    except (AssertionError, LookupError, ValueError, np.linalg.LinAlgError) as error:
        reason = str(error) or "its lines are not as expected"
        raise ValueError(f"{path} is not a linear FreeSurfer transform with an inverse: {reason}.") from error
    if matrix is None:
        raise ValueError(f"{path} is of type {kind}; only types 0 (voxels to voxels) and 1 (RAS to RAS) can be read.")
    return matrix


def save_lta(path: Path, matrix: Affine, fixed: ImageGrid, moving: ImageGrid) -> None:
    """Write a 4 x 4 matrix from points of the fixed to the moving image (RAS, mm) as a linear FreeSurfer transform."""
    lta = _library("nitransforms.io.lta")
    written = lta.FSLinearTransform.from_ras(matrix)
    # nitransforms 25.1 exchanges the two images: in FreeSurfer, the matrix maps from src to dst.
    for role, grid in (("src", moving), ("dst", fixed)):
        written.structarr[role] = np.asanyarray(lta.VolumeGeometry.from_image(_header(grid)))
    with atomic(path) as temporary:
        temporary.write_text(written.to_string(), encoding="utf-8")
