r"""Apply transforms to series of volumes, with their diffusion gradients, and to images of vectors.

A vector is rotated with the tissue. Where the transform :math:`T` takes points of the fixed image to the moving one, a
vector :math:`v` at :math:`T(x)` becomes :math:`(DT(x))^{-1} v` at :math:`x`. A series has one list of gradients for all
voxels, so they can be rotated only by a transform whose rotation is the same everywhere.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, ImageGrid, check_affine, points_to_lps, require_right_angles, spacing
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.io.formats import check_gzip, check_nifti, is_nifti, reading, stored_header
from voxelmorph_monai.io.images import save_nifti
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.maps.grids import fits_backwards
from voxelmorph_monai.maps.names import check_image_output, check_output
from voxelmorph_monai.progress import Progress
from voxelmorph_monai.space.itk_bridge import Transform
from voxelmorph_monai.space.scan import Frame, Scan

if TYPE_CHECKING:
    from voxelmorph_monai.maps.files import Chain

__all__ = ["apply_to_series", "apply_to_vectors", "is_series", "turn_gradients"]

# These modules import torch, ITK or SciPy, which are not needed to find out whether an image is a series.
linalg = lazy("scipy.linalg")
chains, files = lazy("voxelmorph_monai.maps.chains"), lazy("voxelmorph_monai.maps.files")

_UNIT = 1e-3  # tolerance for the length of a unit vector


def is_series(path: str | Path) -> bool:
    """Whether a file is a NIfTI image of several volumes, ``(X, Y, Z, T)``."""
    if not (Path(path).is_file() and is_nifti(Path(path))):
        return False
    with reading(Path(path)):
        shape = nib.load(path).shape  # type: ignore[attr-defined]  # nibabel's own type says too little
    return len(shape) == 4 and shape[3] > 1


def _open(path: str | Path) -> nib.Nifti1Image:
    """Open a NIfTI image of any shape, with the same checks of the header as for a volume."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with reading(Path(path)):
        image: Any = nib.load(path)
        check_gzip(Path(path))
    check_nifti(stored_header(Path(path), type(image.header)), Path(path), image.shape[:3])
    check_affine(image.affine, str(path))
    require_right_angles(image.affine, str(path))
    return image


def _fitting(names: Sequence[str], moving: str | Path, image: nib.Nifti1Image, fixed: Frame) -> "Chain":
    """Read transforms for a series or image of vectors; invert them if they fit only in reverse."""
    own = Frame(str(moving), ImageGrid(image.shape[:3], image.affine), image.header, 3)
    found: Chain = files.open_chain(names, own, fixed)
    return found.inverse() if fits_backwards(names, own.grid, fixed.grid, (own.name, fixed.name)) else found


def turn_gradients(gradients: NDArray[Any], transform: Transform, moving: Affine, fixed: Affine) -> NDArray[Any]:
    """Rotate the gradients of a diffusion series like the series itself; returns ``(3, N)``.

    FSL gives gradients along the voxel axes, with the first axis flipped if the determinant of the affine is positive.
    For an affine transform the nearest rotation is used (finite strain).

    Args:
        gradients: of the moving series, ``(3, N)``.
        transform: from points of the fixed image to points of the moving one.
        moving: affine of the series (RAS, mm).
        fixed: affine of the grid that it is resampled on.

    Raises:
        ValueError: the transform rotates each voxel differently, or contains a reflection.
    """
    parts = chains.flatten(transform)
    if not all(part.IsLinear() for part in parts):
        raise ValueError(
            "all voxels share one list of gradients, but this transform rotates each voxel differently. Apply its "
            "linear part to the series, or fit the model first and apply the whole transform to the fitted maps."
        )
    matrix = np.eye(4)
    for part in parts:
        matrix = chains.matrix_of(part) @ matrix
    if np.linalg.det(matrix[:3, :3]) < 0:
        raise ValueError("the transform contains a reflection, which cannot be applied to gradients.")
    rotation = linalg.polar(matrix[:3, :3])[0]
    frames = []
    for affine in (moving, fixed):
        axes = affine[:3, :3] / spacing(affine)
        frames.append(axes @ np.diag([-1.0 if np.linalg.det(axes) > 0 else 1.0, 1, 1]))
    turned: NDArray[Any] = np.linalg.inv(frames[1]) @ rotation.T @ frames[0] @ gradients
    return turned


def _read_gradients(path: str | Path, count: int) -> NDArray[Any]:
    try:
        gradients = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path} is not a table of gradients: {error}.") from error
    if gradients.shape != (3, count):
        raise ValueError(
            f"{path} has {gradients.shape[0]} rows and {gradients.shape[1]} columns, but a series of {count} volumes "
            f"has 3 rows of {count}."
        )
    return gradients


def apply_to_series(
    transforms: Sequence[str],
    moving: str | Path,
    reference: str | Path,
    output: str | Path,
    *,
    interpolation: str = "linear",
    reference_series: int | None = None,
    bvec: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> float:
    """Resample a series of volumes on the grid of a reference, one volume at a time to save memory.

    Args:
        transforms: files in ANTs' order, see :func:`~voxelmorph_monai.maps.files.read_chain`.
        moving: NIfTI image ``(X, Y, Z, T)``.
        reference: the fixed image, of which only the grid is used.
        output: ``.nii`` or ``.nii.gz``, in float32.
        interpolation: one of :data:`~voxelmorph_monai.maps.chains.INTERPOLATIONS`.
        reference_series: number of the reference's DICOM series.
        bvec: gradients of the series, in FSL's format; the rotated ones are written beside the output (``.bvec``).
        overwrite: replace ``output``.
        progress: show what is being done, on standard error.

    Returns:
        Largest error in mm of the displacements that were inverted numerically, 0 if there were none.
    """
    target = Path(output)
    check_image_output(target, overwrite, [moving, reference, *transforms])
    gradients_file = target.with_name(target.name.removesuffix(".gz").removesuffix(".nii") + ".bvec")
    if bvec is not None:
        check_output(gradients_file, overwrite, [bvec])
    image, fixed = _open(moving), Frame.read(reference, planar=False, series=reference_series)
    found, grid = _fitting(transforms, moving, image, fixed), fixed.grid
    count = image.shape[3]
    turned = None
    if bvec is not None:
        turned = turn_gradients(_read_gradients(bvec, count), found.transform, image.affine, grid.affine)
    made = nib.Nifti1Image(np.zeros((1, 1, 1, 1), np.float32), grid.affine)
    made.header.set_data_shape((*grid.size, count))
    made.header["pixdim"][4] = image.header["pixdim"][4]
    made.header.set_xyzt_units("mm", image.header.get_xyzt_units()[1])
    for form in (made.set_sform, made.set_qform):
        form(grid.affine, 2)
    made.header["vox_offset"], made.header["magic"] = 352, b"n+1"
    opened: Any = gzip.open if target.suffix == ".gz" else open
    with atomic(target) as temporary, opened(temporary, "wb") as file:
        file.write(made.header.binaryblock + bytes(4))
        with Progress("apply", count, "volume", shown=progress) as told:
            for t in range(count):
                with reading(Path(moving)):
                    volume = np.asarray(image.dataobj[..., t], dtype=np.float32)
                scan = Scan(volume, image.affine, f"{moving}, volume {t},")
                warped = chains.resample_image(scan, found.transform, grid, interpolation)
                file.write(warped.astype("<f4").tobytes(order="F"))
                told.advance()
    if turned is not None:
        with atomic(gradients_file) as temporary:
            np.savetxt(temporary, turned, fmt="%.8f")
    return found.residual


def apply_to_vectors(
    transforms: Sequence[str],
    moving: str | Path,
    reference: str | Path,
    output: str | Path,
    *,
    coordinates: str | None = None,
    interpolation: str = "linear",
    overwrite: bool = False,
) -> float:
    """Resample an image of vectors and rotate them with the tissue; unit vectors stay unit vectors.

    Args:
        transforms: as in :func:`apply_to_series`.
        moving: NIfTI image ``(X, Y, Z, 3)`` or ``(X, Y, Z, 1, 3)``.
        reference: as in :func:`apply_to_series`.
        output: as in :func:`apply_to_series`, with the shape of ``moving``.
        coordinates: axes of the vectors, ``"RAS"`` or ``"LPS"``; not needed if the NIfTI intent is 1006 or 1007.
        interpolation: as in :func:`apply_to_series`; ``"nearest"`` for directions whose sign has no meaning.
        overwrite: replace ``output``.

    Returns:
        As :func:`apply_to_series`.
    """
    target = Path(output)
    check_image_output(target, overwrite, [moving, reference, *transforms])
    image, fixed = _open(moving), Frame.read(reference, planar=False)
    shape = image.shape
    if shape[3:] not in ((3,), (1, 3)):
        raise ValueError(f"{moving} has shape {shape}, but an image of vectors has (X, Y, Z, 3) or (X, Y, Z, 1, 3).")
    said = {1006: "RAS", 1007: "LPS"}.get(int(image.header["intent_code"]))
    if said is None and coordinates not in ("RAS", "LPS"):
        raise ValueError(f"{moving} does not state the axes of its vectors. Pass --coordinates RAS or LPS.")
    if said is not None and coordinates not in (None, said):
        raise ValueError(f"{moving} states that it is in {said}, which contradicts --coordinates {coordinates}.")
    found, grid = _fitting(transforms, moving, image, fixed), fixed.grid
    with reading(Path(moving)):
        vectors = np.asarray(image.dataobj, dtype=np.float32).reshape(*shape[:3], 3)
    in_lps = (said or coordinates) == "LPS"
    if in_lps:
        vectors = points_to_lps(vectors)
    parts = [Scan(vectors[..., i], image.affine, f"{moving}, component {i},") for i in range(3)]
    sampled = np.stack([chains.resample_image(part, found.transform, grid, interpolation) for part in parts], axis=-1)
    ddf = chains.on_grid(found.transform, grid)
    slopes = np.stack([np.stack(np.gradient(u), axis=-1) for u in ddf], axis=-2) + np.eye(3)  # (X, Y, Z, 3, 3)
    axes = grid.affine[:3, :3]
    turned = np.linalg.solve(axes @ slopes @ np.linalg.inv(axes), sampled[..., None])[..., 0]
    lengths = np.linalg.norm(vectors, axis=-1)
    if np.all((lengths < _UNIT) | (np.abs(lengths - 1) < _UNIT)):
        length = np.linalg.norm(turned, axis=-1, keepdims=True)
        turned = np.where(length > 0.5, turned / np.maximum(length, 0.5), 0.0)
    if in_lps:
        turned = points_to_lps(turned)
    made = nib.Nifti1Image(turned.reshape(*grid.size, *shape[3:]).astype(np.float32), grid.affine)
    made.header.set_intent(int(image.header["intent_code"]))
    save_nifti(target, made)
    return found.residual
