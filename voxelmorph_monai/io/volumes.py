"""Open a scan: read its position, and leave its voxels on disk until they are needed.

nibabel reads NIfTI, MGZ and more; ITK reads NRRD and MetaImage. For DICOM see :mod:`~voxelmorph_monai.io.dicom`.
"""

import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, ras_to_lps
from voxelmorph_monai.io.formats import (
    BY_ITK,
    FORMATS,
    Volume,
    check_nifti,
    itk_affine,
    itk_header,
    itk_shape,
    load_nibabel,
    reading,
    silent_stderr,
    stored_header,
)
from voxelmorph_monai.lazy import lazy

__all__ = ["open_file"]

itk = lazy("itk")

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif")
_DEFLATE = 1040  # no format read here compresses by a larger factor (gzip: 1032)


class _NibabelVolume:
    """:class:`Volume` of a nibabel image that has fewer than three axes, or further axes of length 1."""

    def __init__(self, stored: Any, shape: tuple[int, ...]) -> None:
        self.stored = stored
        self.shape = shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(np.asanyarray(self.stored).reshape(self.shape), dtype)


class _ItkVolume:
    """:class:`Volume` of one file that ITK reads."""

    def __init__(self, file: str, shape: tuple[int, ...], pixel_type: Any = None) -> None:
        self.file = file
        self.shape = shape
        self.pixel_type = pixel_type

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        with silent_stderr():
            image = itk.imread(self.file, self.pixel_type)
        return np.asarray(itk.array_from_image(image).T.reshape(self.shape), dtype)


def _open_nibabel(path: Path) -> tuple[Volume, Affine]:
    with reading(path), silent_stderr():
        image = load_nibabel(path)
        if not isinstance(image, SpatialImage):
            raise TypeError(f"a {type(image).__name__} has no position in space.")
        dtype, shape = image.get_data_dtype(), tuple(image.shape)
    if dtype.kind not in "iuf":
        raise ValueError(f"{path} is not a scalar image: its voxels are {dtype}.")
    if isinstance(image, nib.Minc1Image) and len(shape) == 4:  # time comes first there
        shape = (*shape[1:], shape[0])
    shape = (*shape, 1, 1)[: max(3, len(shape))]
    if min(shape) < 1 or max(shape[3:], default=1) > 1:
        raise ValueError(f"{path} is not one 3-D volume: its shape is {image.shape}.")
    bytes_claimed, bytes_held = int(np.prod(shape, dtype=object)) * dtype.itemsize, _size(image)
    if bytes_claimed > _DEFLATE * bytes_held:
        raise ValueError(f"{path} is cut short: a file of {bytes_held} bytes cannot hold the shape {image.shape}.")
    if isinstance(image, nib.Nifti1Pair):
        check_nifti(stored_header(path, type(image.header)), path, shape[:3])
    elif isinstance(image, nib.AnalyzeImage) and not path.with_suffix(".mat").is_file():
        raise ValueError(
            f"{path} has no position: ANALYZE stores it in an SPM .mat file, which is missing. Convert it to NIfTI."
        )
    if len(image.shape) == 2 and (np.abs(image.affine[2, :2]) > 1e-3 * np.abs(image.affine[:2, :2]).max()).any():
        raise ValueError(
            f"{path} is a 2-D image that does not lie in a plane of constant z: its affine is {image.affine.tolist()}. "
            "Save it as a volume of one slice."
        )
    stored: Any = image.dataobj
    return stored if tuple(image.shape) == shape[:3] else _NibabelVolume(stored, shape[:3]), image.affine


def _size(image: SpatialImage) -> int:
    """Size in bytes of the file that holds the voxels."""
    return Path(str(image.file_map["image"].filename)).stat().st_size


def _text_header(path: Path) -> str:
    """Header of an NRRD or MetaImage file, up to the voxels."""
    with path.open("rb") as file:
        start = file.read(2**20)
    return re.split(rb"\r?\n\r?\n|ElementDataFile", start, maxsplit=1)[0].decode("utf-8", "replace")


def _field(header: str, name: str) -> str | None:
    """Value of a field in a text header; None if it is missing."""
    match = re.search(rf"^{name} *[:=]=? *(.*?) *\r?$", header, re.IGNORECASE | re.MULTILINE)
    return match[1] if match else None


# Names of spaces that ITK converts; it treats all others as LPS.
_SPACES = re.compile(r"(left-posterior|right-anterior|left-anterior)-superior(-time)?|(LPS|RAS|LAS)T?", re.IGNORECASE)


def _check_text_header(path: Path, spatial_dims: int) -> None:
    """Raise ValueError if an NRRD or MetaImage file has no position or is not in mm; ITK does not check this."""
    header = _text_header(path)
    if path.name.lower().endswith((".nrrd", ".nhdr")):
        space = _field(header, "space")
        units = set(re.findall(r'[^"\s]+', _field(header, "space units") or _field(header, "units") or "")[:3])
        if spatial_dims == 3 and (space is None or not _SPACES.fullmatch(space)):
            problem = "names no space" if space is None else f"names the space {space!r}, which programs misread"
            raise ValueError(
                f"{path} has no position in the body: its header {problem}. Add the line "
                "'space: left-posterior-superior', or the space in which its directions are given."
            )
    else:
        units = {_field(header, "DistanceUnits") or ""}
    if wrong := {unit for unit in units if unit.lower() not in ("", "mm", "millimeter", "?", "none", "unknown", "???")}:
        raise ValueError(
            f"{path} is not in mm: its header says {', '.join(sorted(wrong))}, which ITK and other programs ignore. "
            "Convert its spacing and origin to mm and correct the unit."
        )


def _open_itk(path: Path) -> tuple[Volume, Affine]:
    header = itk_header(str(path))
    shape = itk_shape(header)
    if len(shape) < 2 or max(shape[3:], default=1) > 1:
        raise ValueError(f"{path} is not one 3-D volume: its shape is {shape}.")
    num_axes = min(3, len(shape))
    _check_text_header(path, num_axes)
    pixel_type = None if header.GetPixelTypeAsString(header.GetPixelType()) == "scalar" else itk.D
    return _ItkVolume(str(path), (*shape, 1)[:3], pixel_type), ras_to_lps(3) @ itk_affine(header, num_axes)


# First bytes of other files that users may give instead of a scan.
_OTHERS = (
    (rb"\s*(//[^\n]*\s*)*\(\w+ ", "a parameter file of elastix"),
    (rb"#Insight Transform File", "a transform of ITK"),
    (rb"MNI Transform File", "a transform of MINC"),
    (rb"(#[^\n]*\n)*type\s*=\s*\d", "a transform of FreeSurfer"),
    (rb"# Markups fiducial file", "a list of points of 3D Slicer"),
    (rb"\s*[{\[]", "a JSON file"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"%PDF", "a PDF document"),
)


def _check_kind(path: Path) -> None:
    """Raise ValueError for a file that is not a scan, or whose extension is wrong."""
    name = path.name.lower()
    with path.open("rb") as file:
        start = file.read(512)
    if name.endswith(_PICTURES):
        raise ValueError(f"{path} is a picture, which has no position in the body. Give a scan ({FORMATS}).")
    for pattern, what in _OTHERS:
        if re.match(pattern, start):
            raise ValueError(f"{path} is {what}, not a scan.")
    compressed = start.startswith(b"\x1f\x8b")
    if compressed and not name.endswith((".gz", ".mgz")):
        raise ValueError(
            f"{path} is compressed with gzip, but its name does not end in .gz. Rename it to {path.name}.gz."
        )
    if start and not compressed and name.endswith(".gz"):
        raise ValueError(
            f"{path} is not compressed with gzip, but its name ends in .gz. If it is a scan, rename it to {path.stem}."
        )


def open_file(path: Path) -> tuple[Volume, Affine]:
    """Open a file that is not DICOM: its voxels ``(X, Y, Z)`` and its affine (RAS, mm).

    An image with fewer than three axes gets further axes of length 1. The caller checks sizes and affine.

    Raises:
        ValueError: the file is not a scan, or programs disagree on its position.
    """
    _check_kind(path)
    return _open_itk(path) if path.name.lower().endswith(BY_ITK) else _open_nibabel(path)
