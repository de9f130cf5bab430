"""Read DICOM: series in a folder, and files with many frames, whose slices are ordered by position."""

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, ras_to_lps
from voxelmorph_monai.io.formats import (
    FORMATS,
    Volume,
    itk_affine,
    itk_header,
    itk_shape,
    reading,
    silent_stderr,
)
from voxelmorph_monai.lazy import lazy

__all__ = ["Series", "list_series", "open_dicom"]

itk = lazy("itk")


class Series(NamedTuple):
    """A DICOM series in a folder.

    Attributes:
        number: Series Number, or the place in the list (from 1) if numbers are missing or repeated.
        description: Series Description.
        size: columns, rows and slices, ``(X, Y, Z)``.
        files: paths of the files.
    """

    number: int
    description: str
    size: tuple[int, ...]
    files: tuple[str, ...]


class _Slices(NamedTuple):
    """Headers of ``n`` slices, in the order in which they are stored.

    Attributes:
        origin: position of the first voxel of each slice (LPS, mm), ``(n, 3)``.
        steps: vectors to the next column and to the next row (LPS, mm), ``(n, 3, 2)``.
        scaling: factor and offset from the value that ITK reads to the correct value, ``(n, 2)``.
    """

    origin: NDArray[np.float64]
    steps: NDArray[np.float64]
    scaling: NDArray[np.float64]


class _DicomVolume:
    """:class:`Volume` of slices in one or many files, put into ``order`` and scaled by ``scaling``."""

    def __init__(
        self, files: Sequence[str], shape: tuple[int, ...], order: NDArray[np.intp], scaling: NDArray[np.float64]
    ) -> None:
        self.files = files
        self.shape = shape
        self.order = order
        self.scaling = scaling

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        # Slices of a series may differ in type and scaling, so read them as float32.
        with silent_stderr():
            image = itk.imread(list(self.files), itk.F) if len(self.files) > 1 else itk.imread(self.files[0])
        array = itk.array_from_image(image).T.reshape(self.shape)
        if (self.scaling != (1, 0)).any():
            array = array.astype(np.float32) * self.scaling[:, 0] + self.scaling[:, 1]
        return np.asarray(array[..., self.order], dtype)


def _tag(header: Any, tag: str) -> str:
    """Value of a tag as text; empty if it is missing."""
    values = header.GetMetaDataDictionary()
    return str(values[tag]).strip("\0 ") if values.HasKey(tag) else ""


def _scaling(header: Any, slope: object, intercept: object) -> tuple[float, float]:
    """Factor and offset that convert ITK's scaled value to ``slope`` times the stored number plus ``intercept``."""
    factor = float(str(slope)) / header.GetRescaleSlope()
    return factor, float(str(intercept)) - factor * header.GetRescaleIntercept()


def list_series(folder: str | Path) -> list[Series]:
    """List the DICOM series in a folder, ordered by number; subfolders are not searched.

    If each file of a series holds a volume, as scanners since about 2017 write them, each file counts as a series.
    """
    with reading(Path(folder)), silent_stderr():
        names = itk.GDCMSeriesFileNames.New(UseSeriesDetails=True, Directory=str(folder))
        groups = [tuple(names.GetFileNames(series)) for series in names.GetSeriesUIDs()]
    entries: list[tuple[str, Series]] = []
    for files in groups:
        try:
            header = itk_header(files[0])
        except ValueError:  # a report or a presentation state, which has no image
            continue
        columns, rows, frames = (*itk_shape(header), 1)[:3]
        for part in [files] if frames == 1 else [(file,) for file in files]:
            size = columns, rows, max(frames, len(part))
            entries.append((_tag(header, "0020|0011"), Series(0, _tag(header, "0008|103e"), size, part)))
    numbers = [text for text, _ in entries]
    if len(set(numbers)) == len(numbers) and all(text.lstrip("-").isdigit() for text in numbers):
        return sorted(series._replace(number=int(text)) for text, series in entries)
    entries.sort(key=lambda item: (int(item[0]) if item[0].isdigit() else 0, item[1].files))
    return [series._replace(number=place) for place, (_, series) in enumerate(entries, start=1)]


def _chosen(folder: Path, number: int | None) -> Series:
    """Series with this number; without a number, the only series."""
    series = list_series(folder)
    if not series:
        raise ValueError(f"{folder} is a folder without DICOM images. Give a scan ({FORMATS}).")
    chosen = [each for each in series if number in (None, each.number)]
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(
        f"{each.number} {each.description or 'without description'} ({' x '.join(map(str, each.size))})"
        for each in series
    )
    if number is not None:
        raise ValueError(f"{folder} has no series {number}. It holds {listed}.")
    raise ValueError(
        f"{folder} holds {len(series)} series: {listed}. Choose one by its number: --moving-series or --fixed-series "
        "of vxm register, --series or --reference-series of vxm apply. For anything else, such as labels and masks of "
        "vxm register, give a folder with one series."
    )


# Tags in which the volumes of one series can differ.
_TAGS = {
    "echo time": "0018|0081",
    "acquisition number": "0020|0012",
    "point in time": "0020|0100",
    "b-value": "0018|9087",
    "image type": "0008|0008",
}


def _slices_of(headers: Sequence[Any]) -> tuple[_Slices, list[str]]:
    """Slices from files with one slice each, and the names of tags that differ between them."""
    affines = np.array([itk_affine(header) for header in headers])
    scaling = [
        # ITK leaves out the scaling of MR images
        _scaling(header, slope, _tag(header, "0028|1052") or 0) if (slope := _tag(header, "0028|1053")) else (1.0, 0.0)
        for header in headers
    ]
    differences = [name for name, tag in _TAGS.items() if len({_tag(header, tag) for header in headers}) > 1]
    return _Slices(affines[:, :3, 3], affines[:, :3, :2], np.array(scaling)), differences


def _pydicom(path: str) -> Any:
    try:
        return importlib.import_module("pydicom")
    except ImportError as error:
        raise ValueError(
            f"{path} holds many frames; their positions are read with pydicom: pip install 'voxelmorph_monai[dicom]'."
        ) from error


# Sequences and elements of a frame in which the volumes of one file can differ.
_DIFFERENCES = {
    "stack": ("FrameContentSequence", "StackID"),
    "point in time": ("FrameContentSequence", "TemporalPositionIndex"),
    "echo time": ("MREchoSequence", "EffectiveEchoTime"),
    "b-value": ("MRDiffusionSequence", "DiffusionBValue"),
    "type of MR frame": ("MRImageFrameTypeSequence", "FrameType"),
    "type of CT frame": ("CTImageFrameTypeSequence", "FrameType"),
}


def _frames_of(path: str, count: int, header: Any) -> tuple[_Slices, list[str]]:
    """Slices from a file with ``count`` frames, and the names of elements that differ between them."""
    pydicom = _pydicom(path)
    with reading(Path(path)), silent_stderr(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about violations of DICOM that do not matter here
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
        frames = dataset.get("PerFrameFunctionalGroupsSequence") or []

        def every(sequence: str, element: str, default: object = None) -> list[Any]:
            """Value of an element for every frame; it may be shared by all frames."""
            groups = [(frame.get(sequence) or shared.get(sequence) or [{}])[0] for frame in frames]
            return [group.get(element) or default for group in groups]

        positions = every("PlanePositionSequence", "ImagePositionPatient")
        directions = every("PlaneOrientationSequence", "ImageOrientationPatient")
        sides = every("PixelMeasuresSequence", "PixelSpacing")
        slopes = every("PixelValueTransformationSequence", "RescaleSlope", 1)
        intercepts = every("PixelValueTransformationSequence", "RescaleIntercept", 0)
        scaling = [_scaling(header, *pair) for pair in zip(slopes, intercepts, strict=True)]
        part, parts = dataset.get("InConcatenationNumber"), int(dataset.get("InConcatenationTotalNumber") or 1)
        differences = [name for name, element in _DIFFERENCES.items() if len(set(map(str, every(*element)))) > 1]
    if parts > 1:
        raise ValueError(f"{path} holds part {part} of {parts} of a volume. Join the parts first.")
    if len(frames) != count or None in positions or None in directions or None in sides:
        raise ValueError(f"{path} holds {count} frames, but not the position of each frame.")
    with reading(Path(path)):
        along = np.array(directions, np.float64).reshape(-1, 2, 3)
        between = np.array(sides, np.float64)[:, ::-1]  # first between rows, then between columns
        steps = np.swapaxes(along * between[..., None], 1, 2)
        return _Slices(np.array(positions, np.float64), steps, np.array(scaling)), differences


def _arrange(slices: _Slices, path: str | Path, what: str, differences: Sequence[str]) -> tuple[NDArray[Any], Affine]:
    """Order of the slices by position, and affine (LPS, mm) of their volume.

    The slices keep their positions, so the volume of a tilted gantry is sheared; ITK would straighten it.
    """
    origin, steps, count = slices.origin, slices.steps, len(slices.origin)
    sides = np.linalg.norm(steps, axis=1)
    # 1e-3 is a quarter of a voxel over 256 voxels; numbers written with six digits are ten times as precise
    if (np.abs(steps - steps[0]).max(axis=1) > 1e-3 * sides[0]).any():
        raise ValueError(f"{path} is not one volume: its {count} {what} differ in orientation or pixel size.")
    normal = np.cross(*steps[0].T) / np.prod(sides[0])
    depth = origin @ normal
    order = np.argsort(depth, kind="stable")
    gaps = np.diff(depth[order])
    places = 1 + int((gaps > 1e-3 * sides[0].min()).sum())
    if places < count:
        reason = f" They differ in {' and '.join(differences)}." if differences else ""
        raise ValueError(
            f"{path} is not one volume: its {count} {what} lie at {places} positions.{reason} Save each volume in a "
            "separate file."
        )
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 3] = steps[0], origin[order[0]]
    affine[:3, 2] = (origin[order[-1]] - origin[order[0]]) / (count - 1)
    even = origin[order[0]] + np.outer(range(count), affine[:3, 2])
    uneven = float(np.linalg.norm(origin[order] - even, axis=1).max())
    if uneven > 0.1 * np.linalg.norm(affine[:3, 2]):
        raise ValueError(
            f"{path} has {count} {what} that are not evenly spaced: one lies {uneven:.3g} mm off. One may be missing."
        )
    return order, affine


def open_dicom(path: Path, series: int | None = None) -> tuple[Volume, Affine]:
    """Open a DICOM file, or one series in a folder: its voxels ``(X, Y, Z)`` and its affine (RAS, mm).

    Args:
        path: file or folder.
        series: number of the series in a folder, as in :func:`list_series`; optional if there is only one.

    Raises:
        ValueError: the slices do not form one volume of evenly spaced, parallel slices.
    """
    files: Sequence[str] = _chosen(path, series).files if path.is_dir() else [str(path)]
    headers = [itk_header(file) for file in files]
    shapes = {(*itk_shape(header), 1)[:3] for header in headers}
    if len(shapes) != 1:
        sizes = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
        raise ValueError(f"{path} is not one volume: its slices are of different sizes, {sizes}.")
    shape = shapes.pop()
    if "MOSAIC" in _tag(headers[0], "0008|0008").upper():
        raise ValueError(f"{path} holds a mosaic of slices, as Siemens writes them. Convert it to NIfTI with dcm2niix.")
    if shape[2] > 1:
        slices, differences = _frames_of(files[0], shape[2], headers[0])
        path, what = Path(files[0]), "frames"
    else:
        (slices, differences), what = _slices_of(headers), "slices"
    shape = (*shape[:2], len(slices.origin))
    if shape[2] == 1:
        order, affine = np.zeros(1, np.intp), itk_affine(headers[0])
    else:
        order, affine = _arrange(slices, path, what, differences)
    return _DicomVolume(files, shape, order, slices.scaling), ras_to_lps(3) @ affine
