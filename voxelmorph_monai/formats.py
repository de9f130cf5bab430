"""Which files hold scans, and where their voxels lie: NIfTI, MGZ and more by nibabel, NRRD, MetaImage, DICOM by ITK.

Formats and readers differ in what they do where a file leaves its place in space open. A file is refused where two
common tools would put it in different places, because a transform that is right for one of them is wrong for the other.
"""

import gzip
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import itk
import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

__all__ = [
    "FORMATS",
    "Volume",
    "check_gzip",
    "check_nifti",
    "corner_distance",
    "is_nifti",
    "open_file",
    "reading",
    "scan_name",
    "silent_stderr",
    "spatial_dims_of",
]

FORMATS = "a scan (NIfTI, MGZ, NRRD, MetaImage) or a folder that holds one DICOM series"

Affine = NDArray[np.float64]

_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # what ITK's LPS becomes RAS by, and the other way round
_BY_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
_WITHOUT_PLACE = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif")
_UNITS = {0: "unknown", 1: "metres", 2: "mm", 3: "micrometres"}  # of lengths, in NIfTI
_STDERR = threading.RLock()  # there is one of it for all threads
_DEFLATE = 1040  # at most, by which gzip compresses (1032) or any other format does that is read here


class Volume(Protocol):
    """Voxels of a file ``(X, Y, Z)``, left on disk until ``numpy.asanyarray`` asks for them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the three axes."""


class _ItkVolume:
    """:class:`Volume` of what ITK reads: one file, or the slices of a series in their order."""

    def __init__(self, files: Sequence[str], shape: tuple[int, ...]) -> None:
        self.files = files
        self.shape = shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        # The slices of a series may differ in type, each with a scaling of its own: they meet in float32.
        with silent_stderr():
            image = itk.imread(list(self.files), itk.F) if len(self.files) > 1 else itk.imread(self.files[0])
        return np.asarray(itk.array_from_image(image).T.reshape(self.shape), dtype)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Drop what libraries print on stderr themselves: nibabel, ITK's readers, HDF5 before an error is raised."""
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
    """Restate in one ValueError what a reader raises on a broken file, which may be any error."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rsplit("ITK ERROR: ")[-1]  # before it, where in ITK's source
        raise ValueError(f"{path} must be {FORMATS}, and whole, but reading it failed: {reason}") from error


def check_gzip(path: Path) -> None:
    """Raise an error where a compressed file does not have its own checksum: nibabel stops reading before it."""
    if path.suffix in (".gz", ".mgz") and path.is_file():
        with gzip.open(path) as file:
            while file.read(1 << 22):
                pass


def corner_distance(first: Affine, second: Affine, shape: Sequence[int]) -> float:
    """Largest distance (mm) between the two places that two affines give to a voxel of a grid of this shape."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm((first - second) @ corners, axis=0).max())


def check_nifti(header: nib.Nifti1Header, path: Path, shape: Sequence[int]) -> None:
    """Raise ValueError unless all readers agree on where the voxels lie."""
    codes = int(header["sform_code"]), int(header["qform_code"])
    if max(codes) <= 0:
        raise ValueError(f"{path} must say where it lies, but its sform_code and its qform_code are 0.")
    unit = int(header["xyzt_units"]) % 8
    if unit not in (0, 2):
        raise ValueError(f"{path} must count in mm, but its xyzt_units say {_UNITS.get(unit, unit)}.")
    if min(codes) > 0:
        with reading(path):
            sform, qform = header.get_sform(), header.get_qform()
        apart = corner_distance(sform, qform, shape)
        # Far above the rounding of headers. NaN is not less than it.
        if not apart <= min(0.1, 0.1 * float(np.linalg.norm(sform[:3, :3], axis=0).min())):
            raise ValueError(
                f"{path} must lie in one place, but its sform and its qform put a voxel {apart:.3g} mm apart: set the "
                "code of the wrong one to 0."
            )


def _open_nibabel(path: Path) -> tuple[Volume, Affine]:
    with reading(path), silent_stderr():
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            raise TypeError(f"{type(image).__name__} has no place in space.")
        dtype = image.get_data_dtype()
    shape = (*image.shape, 1, 1)[: max(3, len(image.shape))]
    if dtype.kind not in "iuf":
        raise ValueError(f"{path} must hold one real number a voxel, got {dtype}.")
    if min(shape) < 1 or max(shape[3:], default=1) > 1:
        raise ValueError(f"{path} must be one 3-D volume, got shape {image.shape}.")
    bytes_claimed, bytes_held = int(np.prod(shape, dtype=object)) * dtype.itemsize, _size(image)
    if bytes_claimed > _DEFLATE * bytes_held:
        raise ValueError(f"{path} must hold the voxels of shape {image.shape}, but its {bytes_held} bytes cannot.")
    if isinstance(image, nib.Nifti1Pair):
        check_nifti(image.header, path, shape[:3])
    elif isinstance(image, nib.AnalyzeImage) and not path.with_suffix(".mat").is_file():
        raise ValueError(f"{path} must say where it lies; ANALYZE does so only by an SPM .mat file beside it.")
    if len(image.shape) == 2 and (np.abs(image.affine[2, :2]) > 1e-3 * np.abs(image.affine[:2, :2]).max()).any():
        raise ValueError(f"{path} must lie in a plane of constant z, as 2-D images do, got {image.affine.tolist()}.")
    volume: Any = image.dataobj
    return cast(Volume, volume if len(image.shape) == 3 else volume.reshape(shape[:3])), image.affine


def _size(image: SpatialImage) -> int:
    """Size in bytes of the file that holds the voxels."""
    return Path(str(image.file_map["image"].filename)).stat().st_size


def _itk_header(file: str) -> itk.ImageIOBase:
    """What ITK knows of a file without its voxels."""
    with reading(Path(file)), silent_stderr():
        header = itk.ImageIOFactory.CreateImageIO(file, itk.CommonEnums.IOFileMode_ReadMode)
        if header is None:
            raise TypeError("ITK knows no such format.")
        header.SetFileName(file)
        header.ReadImageInformation()
    kind = header.GetPixelTypeAsString(header.GetPixelType())
    if kind != "scalar" or header.GetNumberOfComponents() != 1:
        raise ValueError(f"{file} must hold one real number a voxel, got {header.GetNumberOfComponents()} ({kind}).")
    return header


def _itk_affine(header: itk.ImageIOBase, num_axes: int = 3) -> Affine:
    """Affine (LPS) of a header; a 2-D image lies in the plane of z = 0."""
    affine = np.eye(4)
    for axis in range(num_axes):
        affine[:num_axes, axis] = np.asarray(header.GetDirection(axis))[:num_axes] * header.GetSpacing(axis)
        affine[axis, 3] = header.GetOrigin(axis)
    return affine


def _itk_shape(header: itk.ImageIOBase) -> tuple[int, ...]:
    return tuple(header.GetDimensions(axis) for axis in range(header.GetNumberOfDimensions()))


def _open_itk(path: Path) -> tuple[Volume, Affine]:
    header = _itk_header(str(path))
    shape = _itk_shape(header)
    if len(shape) not in (2, 3):
        raise ValueError(f"{path} must be one 3-D volume, got shape {shape}.")
    return _ItkVolume([str(path)], (*shape, 1)[:3]), _RAS @ _itk_affine(header, len(shape))


def _open_series(path: Path) -> tuple[Volume, Affine]:
    """The DICOM series in a folder, where its slices say that they lie; ITK would straighten a tilted gantry."""
    with reading(path), silent_stderr():
        names = itk.GDCMSeriesFileNames.New(UseSeriesDetails=True, Directory=str(path))
        series = list(names.GetSeriesUIDs())
        files = list(names.GetFileNames(series[0])) if len(series) == 1 else []
    if len(series) != 1:
        raise ValueError(f"{path} must be {FORMATS}, got a folder that holds {len(series)} series.")
    headers = [_itk_header(file) for file in files]
    shapes = {_itk_shape(header) for header in headers}
    if len(shapes) != 1:
        raise ValueError(f"slices of {path} must be of one size, got {sorted(shapes)}.")
    shape, affine = (*shapes.pop(), 1)[:3], _itk_affine(headers[0])
    if len(files) == 1:
        return _ItkVolume(files, shape), _RAS @ affine
    if shape[2] > 1:
        raise ValueError(f"{path} must hold one volume, got {len(files)} files of shape {shape}.")
    places = np.array([_itk_affine(header)[:3, 3] for header in headers])
    affine[:3, 2] = (places[-1] - places[0]) / (len(files) - 1)
    uneven = float(np.linalg.norm(places - places[0] - np.outer(range(len(files)), affine[:3, 2]), axis=1).max())
    if uneven > 0.1 * np.linalg.norm(affine[:3, 2]):
        raise ValueError(f"slices of {path} must be evenly spaced, but one lies {uneven:.3g} mm off: is one missing?")
    return _ItkVolume(files, (*shape[:2], len(files))), _RAS @ affine


def open_file(path: Path) -> tuple[Volume, Affine]:
    """Open a file, or a folder of DICOM slices: its voxels ``(X, Y, Z)`` and where it says that they lie (RAS, mm).

    An image of fewer axes gets axes of length 1. Neither sizes nor the affine are checked further.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: there is no such scan, or one whose place readers do not agree on.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} must be {FORMATS}, but there is no such file.")
    if path.is_dir():
        return _open_series(path)
    if path.name.lower().endswith(_WITHOUT_PLACE):
        raise ValueError(f"{path} must be {FORMATS}; pictures do not say where they lie.")
    return _open_itk(path) if path.name.lower().endswith(_BY_ITK) else _open_nibabel(path)


def scan_name(path: str | Path) -> str:
    """What to call a scan: its file without folders and ending, or its folder.

    >>> scan_name("/data/sub-01.v2.nii.gz"), scan_name("atlas.mgz")
    ('sub-01.v2', 'atlas')
    """
    path = Path(path)
    if path.is_dir():
        return path.name
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).stem


def is_nifti(path: Path) -> bool:
    """Whether a scan that :func:`open_file` takes is a NIfTI file."""
    return path.is_file() and not path.name.lower().endswith(_BY_ITK) and isinstance(nib.load(path), nib.Nifti1Pair)


def spatial_dims_of(path: Path) -> int:
    """2 for a file of a 2-D image, otherwise 3, also for a single slice."""
    if path.is_dir():
        return 3
    if path.name.lower().endswith(_BY_ITK):
        return len(_itk_shape(_itk_header(str(path))))
    return min(3, len(cast(SpatialImage, nib.load(path)).shape))
