"""Read and write images as arrays ``(X, Y, Z)`` with their affine (RAS, mm)."""

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip_threaded
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, check_affine, is_sheared, spacing
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.io.dicom import open_dicom
from voxelmorph_monai.io.formats import (
    Volume,
    check_gzip,
    is_dicom,
    reading,
)
from voxelmorph_monai.io.volumes import open_file
from voxelmorph_monai.threads import num_threads

__all__ = [
    "as_labels",
    "check_image_name",
    "open_volume",
    "read_image",
    "read_labels",
    "save_image",
    "save_image_as",
    "save_nifti",
]

_LOGGER = logging.getLogger(__name__)
_ROUNDED = 1e-3  # largest distance of a label from a whole number


def open_volume(path: str | Path, *, planar: bool = False, series: int | None = None) -> tuple[Volume, Affine]:
    """Open a scan and check its header, leaving the voxels ``(X, Y, Z)`` on disk.

    A scan is a file (NIfTI, MGZ, NRRD, MetaImage, DICOM, or another format that nibabel reads) or a folder of DICOM
    files. In a NIfTI header the sform is used if its code is above 0, otherwise the qform. Files that programs place
    differently are rejected: those whose sform, qform and pixdim disagree by more than 0.1 mm or a tenth of a voxel,
    those without a position (NIfTI with codes of 0, NRRD without a space, ANALYZE without an SPM ``.mat`` file), and
    those whose unit is not mm. DICOM slices are ordered by their positions.

    Args:
        path: file or folder.
        planar: also accept a single slice, or a 2-D image, which becomes a slice ``(X, Y, 1)`` in the plane z = 0.
        series: number of the series if the folder holds several (:func:`~voxelmorph_monai.io.dicom.list_series`).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not one 3-D volume with one real number per voxel and an invertible affine.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if series is not None and not path.is_dir():
        raise ValueError(f"{path} is a file; series {series} can be chosen only in a folder of DICOM files.")
    volume, affine = open_dicom(path, series) if path.is_dir() or is_dicom(path) else open_file(path)
    if sorted(volume.shape)[1 if planar else 0] < 2 or min(volume.shape) < 1:
        raise ValueError(f"{path} is not one 3-D volume: its shape is {tuple(volume.shape)}.")
    check_affine(affine, str(path))
    return volume, affine


def _read(path: str | Path, planar: bool, series: int | None) -> tuple[NDArray[Any], Affine]:
    """Read the voxels ``(X, Y, Z)`` in their stored type, and the affine."""
    volume, affine = open_volume(path, planar=planar, series=series)
    with reading(Path(path)):
        array = np.asanyarray(volume)
        check_gzip(Path(path))
    return array.astype(array.dtype.newbyteorder("="), copy=False), affine


def read_image(
    path: str | Path, *, planar: bool = False, series: int | None = None
) -> tuple[NDArray[np.float32], Affine]:
    """Read a scan in any format of :func:`open_volume`: intensities ``(X, Y, Z)`` in float32 and the affine (RAS, mm).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, is not one 3-D scan, has voxels that are NaN, infinite or all equal, or has an
            affine without an inverse.
    """
    array, affine = _read(path, planar, series)
    with np.errstate(over="ignore"):  # numbers beyond the range of float32 become Inf, which is reported below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"{path} has {count} voxels of NaN or infinity. Replace them, for example by 0.")
    if array.min() == array.max():
        raise ValueError(f"{path} is constant: every voxel is {array.flat[0]:g}.")
    return array, affine


def read_labels(path: str | Path, *, planar: bool = False, series: int | None = None) -> tuple[NDArray[Any], Affine]:
    """Read a label map in any format of :func:`open_volume`: integers ``(X, Y, Z)`` and the affine (RAS, mm).

    :func:`as_labels` explains their type and rounding.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, is not one 3-D map of whole numbers of at least 0, has no label above 0, or has
            an affine without an inverse.
    """
    array, affine = _read(path, planar, series)
    return as_labels(array, str(path)), affine


def as_labels(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Convert labels to whole numbers; integers keep their type, floats become the smallest unsigned type that fits.

    A value that differs from a whole number by at most 0.001, or by a 50,000th of a label above 50, is treated as a
    rounding error (a scaling of 65536/65535 turns label 1 into 1.0000153): it is rounded, and a warning is logged.

    Raises:
        ValueError: the values are not whole numbers from 0 to 2^53, or none is above 0.
    """
    least, most = array.min(), array.max()
    if not (least >= -_ROUNDED and 0.5 < most < np.inf):  # NaN fails too
        raise ValueError(
            f"{name} is not a label map: its values run from {least} to {most}, but labels are 0 or more, and at least "
            "one is above 0."
        )
    if most > 2**53:  # SciPy resamples in double precision
        raise ValueError(f"{name} has labels above 2^53 (the largest is {most}). Renumber them.")
    if array.dtype.kind == "f":
        whole = np.rint(array)
        off = np.abs(array - whole)
        broken = array[off > np.clip(whole / 50_000, _ROUNDED, 0.25)]
        if broken.size:
            raise ValueError(
                f"{name} is not a label map: {broken.size} of its voxels are not whole numbers, the first is "
                f"{broken[0]}."
            )
        if off.any():
            count, most_off = np.count_nonzero(off), off.max()
            _LOGGER.warning("%s: %d voxels, up to %.2g from a whole number, were rounded.", name, count, most_off)
        array = np.abs(whole).astype(np.min_scalar_type(int(whole.max())))  # -0 becomes 0
    return array


def check_image_name(path: str | Path) -> None:
    """Raise ValueError unless a file to write is named ``.nii`` or ``.nii.gz``."""
    if not str(path).endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path} does not end in .nii or .nii.gz, but images are saved as NIfTI. Rename it.")


def save_nifti(path: str | Path, image: nib.Nifti1Image) -> None:
    """Write an image with its affine as both sform and qform, completely or not at all."""
    check_image_name(path)
    affine = image.affine
    # Code 2 means "aligned to another image": the grid was chosen by this package, not by a scanner. Readers differ in
    # which form they prefer, so both hold the same affine. A qform cannot hold shear; it is then marked as unset (0).
    image.set_sform(affine, 2)
    image.set_qform(None if is_sheared(affine) else affine, 0 if is_sheared(affine) else 2)
    image.header.set_xyzt_units("mm")
    _save(path, image)


def _save(path: str | Path, image: nib.Nifti1Image) -> None:
    with atomic(path) as temporary:
        if str(path).endswith(".gz"):
            with igzip_threaded.open(temporary, "wb", compresslevel=1, threads=num_threads()) as file:
                file.write(image.to_bytes())
        else:
            nib.save(image, temporary)


def save_image(path: str | Path, array: NDArray[Any], affine: Affine, spatial_dims: int = 3) -> None:
    """Write ``array`` ``(X, Y, Z)`` in its own type with its affine (RAS, mm) as NIfTI, completely or not at all.

    If ``spatial_dims`` is 2, a slice ``(X, Y, 1)`` is written as a 2-D image.
    """
    if array.ndim != 3:
        raise ValueError(f"the array for {path} is not 3-D: its shape is {array.shape}.")
    check_affine(affine, str(path))
    save_nifti(path, nib.Nifti1Image(array if spatial_dims == 3 else array[..., 0], affine, dtype=array.dtype))


def save_image_as(path: str | Path, array: NDArray[Any], affine: Affine, header: nib.Nifti1Header) -> None:
    """Write ``array`` ``(X, Y, Z)`` in its own type with a NIfTI header, completely or not at all.

    The header gives the position, the codes of sform and qform, the units and the description. If sform, qform and
    pixdim differ by rounding, all are set to the sform.
    """
    check_image_name(path)
    shape = header.get_data_shape()
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(array.reshape(shape), affine, header, dtype=array.dtype)
    if image.header["sform_code"] > 0:
        image.header["pixdim"][1:4] = spacing(affine)
        if image.header["qform_code"] > 0:
            image.set_qform(affine, int(image.header["qform_code"]))
    image.header["cal_min"] = image.header["cal_max"] = 0  # display range, which applied to other intensities
    _save(path, image)
