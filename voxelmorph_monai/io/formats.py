"""Read headers of scans (NIfTI, MGZ and more with nibabel; NRRD, MetaImage and DICOM with ITK), and find their files.

Programs interpret contradictory or incomplete headers in different ways. A file is rejected if two common programs
would place it differently, because a transform that is right for one of them is wrong for the other.
"""

import glob
import gzip
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
from nibabel.quaternions import quat2mat
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, check_affine, corner_distance, spacing
from voxelmorph_monai.lazy import lazy

__all__ = [
    "BY_ITK",
    "FORMATS",
    "Volume",
    "check_gzip",
    "check_nifti",
    "is_dicom",
    "is_nifti",
    "itk_affine",
    "itk_header",
    "itk_shape",
    "load_nibabel",
    "reading",
    "scan_files",
    "scan_name",
    "silent_stderr",
    "spatial_dims_of",
    "stamp",
    "stored_header",
]

itk = lazy("itk")

FORMATS = "NIfTI, MGZ, NRRD, MetaImage or DICOM"
BY_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")  # extensions of files that ITK reads here
_UNITS = {1: "metres", 3: "micrometres"}  # NIfTI's codes of lengths other than unknown (0) and mm (2)
_STDERR = threading.RLock()  # all threads share one stderr
_ROUNDED = 1e-5  # allowed excess of a quaternion's square over 1, from rounding to float32; 4e-7 occurs


class Volume(Protocol):
    """Voxels of a file ``(X, Y, Z)``, left on disk until ``numpy.asanyarray`` asks for them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the three axes."""


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Hide messages that libraries (nibabel, ITK's readers, HDF5) print on stderr before they raise an error."""
    with _STDERR:
        stderr = os.dup(2)
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error that a reader raises on a damaged file into one ValueError that names the file."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{path} "):  # the message names the file already
            raise
        reason = " ".join(str(error).split()).rsplit("ITK ERROR: ")[-1]  # without the line in ITK's source
        raise ValueError(f"{path} cannot be read: {reason or type(error).__name__}") from error


def check_gzip(path: Path) -> None:
    """Raise an error if the checksum of a compressed file is wrong; nibabel does not read that far."""
    if path.suffix in (".gz", ".mgz") and path.is_file():
        with gzip.open(path) as file:
            while file.read(1 << 22):
                pass


def stored_header(path: Path, kind: type[nib.Nifti1Header]) -> nib.Nifti1Header:
    """Header of a NIfTI file as stored; nibabel corrects some errors when it loads an image."""
    hdr = re.sub(r"\.img(?=\.|$)", ".hdr", str(path), flags=re.IGNORECASE)
    with reading(path), nib.openers.ImageOpener(hdr) as file:
        return kind(file.read(kind.sizeof_hdr), check=False)


def _quaternion(header: nib.Nifti1Header, path: Path) -> NDArray[np.float64]:
    """Unit quaternion ``(4,)`` of a header; as in ITK, one that rounding made slightly longer than 1 is shortened."""
    bcd = np.array([header[f"quatern_{axis}"] for axis in "bcd"], np.float64)
    rest = 1 - bcd @ bcd
    if not rest >= -_ROUNDED:
        raise ValueError(
            f"{path} has a qform that is not a rotation: the squares of quatern_b, quatern_c and quatern_d add up to "
            f"{1 - rest:.7g}, more than 1. Correct them, or set qform_code to 0 if the sform is right."
        )
    quaternion = np.array([np.sqrt(rest) if rest >= 1e-7 else 0, *bcd])  # ITK treats a smaller rest as rounding
    return quaternion / np.linalg.norm(quaternion)


def _qform(header: nib.Nifti1Header, path: Path, sides: NDArray[np.float64]) -> Affine:
    """Affine of a header's qform."""
    affine, flip = np.eye(4), -1 if header["pixdim"][0] < 0 else 1
    affine[:3, :3] = quat2mat(_quaternion(header, path)) * sides * [1, 1, flip]
    affine[:3, 3] = [header[f"qoffset_{axis}"] for axis in "xyz"]
    return affine


def check_nifti(header: nib.Nifti1Header, path: Path, shape: Sequence[int]) -> None:
    """Raise ValueError unless all programs agree on the position of the voxels.

    Programs use different parts of a header: nibabel uses the sform, ITK the directions of the sform or the qform and
    the sizes in pixdim. They must agree within 0.1 mm, or a tenth of a voxel if that is less; rounding in headers is
    far below this.

    Args:
        header: header of the image, preferably from :func:`stored_header`, as nibabel makes a negative pixdim positive.
        path: path of the image, for error messages.
        shape: shape of the image, ``(X, Y, Z)``.
    """
    codes = {form: int(header[f"{form}_code"]) for form in ("sform", "qform")}
    if max(codes.values()) <= 0:
        raise ValueError(
            f"{path} has no position: sform_code and qform_code are both 0. If you know that the sform or the qform is "
            "right, set its code to 1."
        )
    for form, code in codes.items():
        if code > 5:
            raise ValueError(
                f"{path} has {form}_code {code}, which is not a NIfTI code (0 to 5). Set it to 1, or to 0."
            )
    unit = int(header["xyzt_units"]) % 8
    if unit not in (0, 2):
        raise ValueError(
            f"{path} is in {_UNITS.get(unit, f'unit {unit}')} by its xyzt_units, which only some programs convert. "
            "Convert its affine and pixdim to mm and set xyzt_units to 2."
        )
    sides = header["pixdim"][1:4].astype(np.float64)
    sides[~np.isfinite(sides) | (sides == 0)] = 1  # like ITK and nibabel
    if (sides < 0).any():
        raise ValueError(
            f"{path} has a negative size in pixdim ({_times(sides)}), which some programs treat as a flip, while "
            "others ignore the sign. Make it positive."
        )
    if header["pixdim"][0] < 0 and header["pixdim"][0] != -1 and codes["qform"] > 0:
        raise ValueError(
            f"{path} has pixdim[0] {header['pixdim'][0]:g}, which some programs read as -1 and others as 1. Set it "
            "to one of these."
        )
    if codes["sform"] <= 0:
        _quaternion(header, path)
        return
    sform = header.get_sform()
    check_affine(sform, str(path))
    allowed = min(0.1, 0.1 * float(spacing(sform).min()))
    if codes["qform"] > 0:
        apart = corner_distance(sform, _qform(header, path, sides), shape)
        if not apart <= allowed:  # also true for NaN
            raise ValueError(
                f"{path} has an sform and a qform that differ by up to {apart:.3g} mm in the position of a voxel, and "
                "programs differ in which one they use. Set the code of the wrong one to 0."
            )
    scaled = sform.copy()
    scaled[:3, :3] *= sides / spacing(sform)
    apart = corner_distance(sform, scaled, shape)
    if apart > allowed:
        raise ValueError(
            f"{path} has voxels of {_times(sides)} mm in pixdim but of {_times(spacing(sform))} mm in its sform, and "
            "programs differ in which one they use. Correct the wrong one."
        )


def _times(sizes: Any) -> str:
    return " x ".join(f"{size:.6g}" for size in sizes)


def load_nibabel(path: str | Path) -> Any:
    """Call ``nibabel.load``, but accept a NIfTI quaternion that rounding made slightly longer than 1."""
    path = Path(path)
    try:
        image = nib.load(path)
    except ValueError:
        # Without an sform nibabel needs the qform, and does not accept a quaternion longer than 1.0000002.
        if not path.name.lower().endswith((".nii", ".nii.gz")):
            raise
        kind = nib.Nifti2Image if nib.Nifti2Image.path_maybe_image(path)[0] else nib.Nifti1Image
        with nib.openers.ImageOpener(str(path)) as file:
            header = kind.header_class.from_fileobj(file)
        _shorten(header, path)
        image = kind(kind.ImageArrayProxy(path, header.copy()), header.get_best_affine(), header)
        image.set_filename(str(path))
    if isinstance(image, nib.Nifti1Pair) and image.header["qform_code"] > 0:
        _shorten(image.header, path)
    return image


def _shorten(header: nib.Nifti1Header, path: Path) -> None:
    """Make the quaternion of a header no longer than 1."""
    quaternion = _quaternion(header, path)
    if quaternion[0] == 0:
        for axis, value in zip("bcd", quaternion[1:], strict=True):
            header[f"quatern_{axis}"] = value


def itk_header(file: str) -> Any:
    """Read the header of a scalar image, but not its voxels; returns ITK's reader."""
    with reading(Path(file)), silent_stderr():
        header = itk.ImageIOFactory.CreateImageIO(file, itk.CommonEnums.IOFileMode_ReadMode)
        if header is None:
            raise TypeError("ITK does not know the format.")
        header = itk.down_cast(header)
        header.SetFileName(file)
        header.ReadImageInformation()
    kind, count = header.GetPixelTypeAsString(header.GetPixelType()), header.GetNumberOfComponents()
    if kind not in ("scalar", "vector") or count != 1:  # NRRD has vectors of one number
        raise ValueError(f"{file} is not a scalar image: each voxel holds {count} numbers ({kind}).")
    return header


def itk_affine(header: Any, num_axes: int = 3) -> Affine:
    """Affine (LPS, mm) of a header from :func:`itk_header`; a 2-D image lies in the plane z = 0."""
    affine = np.eye(4)
    for axis in range(num_axes):
        affine[:num_axes, axis] = np.asarray(header.GetDirection(axis))[:num_axes] * header.GetSpacing(axis)
        affine[axis, 3] = header.GetOrigin(axis)
    return affine


def itk_shape(header: Any) -> tuple[int, ...]:
    """Shape of an image from its :func:`itk_header`."""
    return tuple(header.GetDimensions(axis) for axis in range(header.GetNumberOfDimensions()))


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, judged by its extension or by the letters DICM at byte 128."""
    if path.suffix.lower() in (".dcm", ".ima"):
        return path.is_file()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def scan_name(path: str | Path) -> str:
    """Name of a scan: the name of its file without extension, or of its folder.

    >>> scan_name("/data/sub-01.v2.nii.gz"), scan_name("atlas.mgz")
    ('sub-01.v2', 'atlas')
    """
    path = Path(path)
    if path.is_dir():
        return path.name
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).stem


def is_nifti(path: Path) -> bool:
    """Whether a scan is a NIfTI file."""
    return _by_nibabel(path) and isinstance(load_nibabel(path), nib.Nifti1Pair)


def _by_nibabel(path: Path) -> bool:
    return path.is_file() and not path.name.lower().endswith(BY_ITK) and not is_dicom(path)


def spatial_dims_of(path: Path) -> int:
    """Number of dimensions of a scan: 2 for a file with a 2-D image, otherwise 3, even for a single slice."""
    if path.name.lower().endswith(BY_ITK):
        return min(3, len(itk_shape(itk_header(str(path)))))
    return min(3, len(load_nibabel(path).shape)) if _by_nibabel(path) else 3


_DETACHED = re.compile(r"^(?:ElementDataFile *=|data ?file:)(?! *LOCAL)(.*)", re.DOTALL | re.IGNORECASE | re.MULTILINE)


def scan_files(path: Path) -> list[Path]:
    """All files of a scan, ordered by name.

    These are the files in a folder, a header (``.hdr``, ``.mhd``, ``.nhdr``) with the files of its voxels, or just the
    file itself.

    >>> [file.name for file in scan_files(Path("scan.nii.gz"))]
    ['scan.nii.gz']
    """
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    parts: list[str] = []
    if pair := re.match(r"(.*)\.(hdr|img)(\.gz)?$", path.name, re.IGNORECASE):
        endings = (".hdr", ".img", ".mat")  # SPM stores the position in .mat
        parts += [f"{path.parent / pair[1]}{ending}{gz}" for ending in endings for gz in ("", ".gz")]
    elif path.name.lower().endswith((".mhd", ".mha", ".nhdr", ".nrrd")):
        with path.open("rb") as file:
            header = _DETACHED.search(os.fsdecode(file.read(2**20)))
        for line in header[1].splitlines() if header else []:  # a name, a list, or numbered names: "s%03d.raw 1 9"
            names = re.sub(r"%\d*d(\S*).*", r"*\1", glob.escape(line.strip()))
            parts += glob.glob(os.path.join(glob.escape(str(path.parent)), names))
    return sorted({path, *(Path(file) for file in parts if os.path.isfile(file))})


def stamp(path: Path) -> list[Any]:
    """Path, size in bytes, and modification time in ns of a scan or file, as JSON values, to detect changes.

    For several files (:func:`scan_files`) sizes and times are added up.
    """
    statuses = [file.stat() for file in scan_files(path)]
    return [str(path), sum(status.st_size for status in statuses), sum(status.st_mtime_ns for status in statuses)]
