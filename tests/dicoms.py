"""DICOM files as scanners write them: enhanced files of many frames, and classic ones of one slice each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from voxelmorph_monai.affines import Affine

ENHANCED_MR, CLASSIC_MR = "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4"


def _text(values: Any) -> list[str]:
    return [f"{value:.10g}" for value in values]  # DICOM allows 16 characters


def item(**elements: Any) -> DicomSequence:
    """A sequence of one item."""
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return DicomSequence([dataset])


def _place(affine: Affine) -> tuple[list[str], list[str], list[str]]:
    """Position, orientation and spacing of pixels of the first slice."""
    lps, sides = np.diag([-1.0, -1, 1, 1]) @ affine, np.linalg.norm(affine[:3, :2], axis=0)
    return _text(lps[:3, 3]), _text((lps[:3, :2] / sides).T.ravel()), _text(sides[::-1])


def _pixels(dataset: Dataset, array: NDArray[np.int16]) -> None:
    """Put in frames ``(X, Y)`` or ``(X, Y, n)``."""
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.Rows, dataset.Columns = array.shape[1], array.shape[0]
    dataset.PixelData = array.T.astype("<i2").tobytes()


def new(kind: str, number: int, **elements: Any) -> Dataset:
    """A data set without pixels."""
    dataset, meta = Dataset(), FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "MR", number, 1
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = (
        generate_uid(entropy_srcs=[part]) for part in ("study", f"series {number}", "frame")
    )
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def save(dataset: Dataset, path: Path) -> None:
    """Write it, by pydicom 2.4 or 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if int(pydicom.__version__.split(".")[0]) >= 3:
        dataset.save_as(path, enforce_file_format=True)
    else:
        dataset.is_little_endian, dataset.is_implicit_VR = True, False
        dataset.save_as(path, write_like_original=False)


def enhanced(
    path: Path,
    array: NDArray[np.int16],
    affines: Sequence[Affine],
    *,
    number: int = 1,
    scaling: Sequence[tuple[float, float]] | None = None,
    frames: Sequence[dict[str, DicomSequence]] = (),
    **elements: Any,
) -> Dataset:
    """Write an enhanced MR file.

    Args:
        path: to write.
        array: frames ``(X, Y, n)`` in the order of the file.
        affines: of each frame (RAS, mm), its index along the third axis 0.
        number: of the series.
        scaling: slope and intercept of each frame; by default 1 and 0, once for all.
        frames: what else each frame holds.
        elements: what else the file holds.
    """
    dataset = new(ENHANCED_MR, number, NumberOfFrames=len(affines), **elements)
    positions, orientations, sides = zip(*map(_place, affines), strict=True)
    shared, groups = Dataset(), [Dataset() for _ in affines]
    for values, name, element in (
        (orientations, "PlaneOrientationSequence", "ImageOrientationPatient"),
        (sides, "PixelMeasuresSequence", "PixelSpacing"),
    ):
        once = all(value == values[0] for value in values)
        for group, value in zip([shared] if once else groups, values, strict=False):
            setattr(group, name, item(**{element: value}))
    if scaling is None:
        shared.PixelValueTransformationSequence = item(RescaleSlope="1", RescaleIntercept="0", RescaleType="US")
    for index, group in enumerate(groups):
        group.PlanePositionSequence = item(ImagePositionPatient=positions[index])
        if scaling is not None:
            slope, intercept = _text(scaling[index])
            group.PixelValueTransformationSequence = item(RescaleSlope=slope, RescaleIntercept=intercept)
        for name, sequence in (frames[index] if frames else {}).items():
            setattr(group, name, sequence)
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(groups)
    _pixels(dataset, array)
    save(dataset, path)
    return dataset


def classic(folder: Path, array: NDArray[np.int16], affines: Sequence[Affine], *, number: int = 1, **each: Any) -> None:
    """Write a file for each slice of ``(X, Y, n)``; ``each`` holds a list of values for an element."""
    for index, affine in enumerate(affines):
        position, orientation, sides = _place(affine)
        values = {name: listed[index] for name, listed in each.items() if listed[index] is not None}
        dataset = new(
            CLASSIC_MR,
            number,
            ImagePositionPatient=position,
            ImageOrientationPatient=orientation,
            PixelSpacing=sides,
            SliceThickness="3",
            **values,
        )
        dataset.InstanceNumber = index + 1
        _pixels(dataset, array[..., index])
        save(dataset, folder / f"{number}_{index:03d}.dcm")


def slices(affine: Affine, indices: Sequence[int]) -> list[Affine]:
    """Affines of the slices of a volume with these indices along its third axis."""
    return [affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, k], [0, 0, 0, 1.0]]) for k in indices]
