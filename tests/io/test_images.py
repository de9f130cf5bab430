"""Labels that are rounded, files that are no scans, and what their messages say."""

import gzip
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from voxelmorph_monai.io.images import open_volume, read_image, read_labels

SIZE = (9, 12, 7)
LABELS = np.random.default_rng(0).choice([0, 1, 2, 41, 2035, 14175], SIZE)


def write(path: Path, array: NDArray[Any]) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4), dtype=array.dtype), path)
    return path


def scaled(path: Path, slope: float, intercept: float, stored: NDArray[np.int16]) -> Path:
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, path)
    return path


ROUNDED: dict[str, Callable[[Path], Path]] = {
    "scaled by 65536 / 65535": lambda path: write(path, LABELS * (65536 / 65535)),
    "a float32 too high": lambda path: write(path, np.nextafter(LABELS.astype(np.float32), np.float32(np.inf))),
    "a float32 too low": lambda path: write(path, np.nextafter(LABELS.astype(np.float32), np.float32(-1))),
    "three digits": lambda path: write(path, LABELS + np.random.default_rng(1).uniform(-9e-4, 9e-4, SIZE)),
    "a slope in the header": lambda path: scaled(path, 0.1, 0, (LABELS * 10 % 20000).astype(np.int16)),
}


@pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED.keys())
def test_labels_off_by_rounding_are_rounded_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path / "labels.nii.gz")
    labels, _ = read_labels(path)
    stored = np.asanyarray(nib.load(path).dataobj)
    np.testing.assert_array_equal(labels, np.rint(stored))
    assert labels.dtype == np.min_scalar_type(labels.max())
    off = np.count_nonzero(stored != labels)
    assert off > 20
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert f" {off} voxels" in record.getMessage()


def test_exact_labels_are_read_without_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for dtype in (np.int32, np.float32, np.float64):
        np.testing.assert_array_equal(read_labels(write(tmp_path / "labels.nii", LABELS.astype(dtype)))[0], LABELS)
    assert not caplog.records


@pytest.mark.parametrize(
    ("label", "off", "good"),
    [
        (1, 0.0009, True),
        (1, 0.0012, False),
        (1, -0.0012, False),
        (50, 0.0012, False),
        (2035, 0.04, True),
        (2035, 0.042, False),
        (14175, 0.24, True),
        (14175, 0.26, False),
        (0, -0.0009, True),
        (0, -0.0012, False),
    ],
)
def test_labels_may_be_off_by_a_thousandth_or_a_50000th(tmp_path: Path, label: int, off: float, good: bool) -> None:
    """A 50,000th is a little more than the 65,535th by which a scaled int16 is off; never more than a quarter."""
    array = LABELS.astype(np.float64)
    array[4, 5, 6] = label + off
    path = write(tmp_path / "labels.nii", array)
    if good:
        assert read_labels(path)[0][4, 5, 6] == label
    else:
        with pytest.raises(ValueError, match=r"labels\.nii is not a label map"):
            read_labels(path)


def test_an_interpolated_label_map_is_refused(tmp_path: Path) -> None:
    array = (LABELS == 2).astype(np.float32)
    array[1:] = (array[1:] + array[:-1]) / 2
    count = int((array == 0.5).sum())
    with pytest.raises(ValueError, match=rf"labels\.nii is not a label map: {count} of .*first is 0\.5"):
        read_labels(write(tmp_path / "labels.nii", array))


def test_a_mask_of_nearly_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels\.nii is not a label map"):
        read_labels(write(tmp_path / "labels.nii", np.full(SIZE, 5e-4) * (LABELS > 1)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_an_image_with_a_nan_or_infinity_is_refused(tmp_path: Path, value: float) -> None:
    """A float64 past the range of float32 counts as infinite."""
    array = LABELS.astype(np.float64)
    array[4, 5, :2] = value
    with pytest.raises(ValueError, match=r"scan\.nii has 2 voxels of NaN or infinity"):
        read_image(write(tmp_path / "scan.nii", array))


# Other files ------------------------------------------------------------------------------------------------------

NIFTI = nib.Nifti1Image(LABELS.astype(np.int16), np.eye(4)).to_bytes()
ELASTIX = b'// a comment\n(Transform "BSplineTransform")\n(NumberOfParameters 12)\n'
OTHERS: dict[str, tuple[str, bytes, str]] = {
    "gzip called .nii": ("a.nii", gzip.compress(NIFTI), r"compressed with gzip.* a\.nii\.gz\.$"),
    "gzip called .mgh": ("a.mgh", gzip.compress(b"\0" * 900), r"compressed with gzip.* a\.mgh\.gz\.$"),
    "gzip called .mha": ("a.mha", gzip.compress(b"ObjectType = Image\n"), "compressed with gzip"),
    "gzip without an ending": ("a", gzip.compress(NIFTI), "compressed with gzip"),
    "NIfTI called .nii.gz": ("a.nii.gz", NIFTI, r"not compressed with gzip.* a\.nii\.$"),
    "parameters of elastix": ("TransformParameters.0.txt", ELASTIX, "parameter file of elastix"),
    "settings of elastix": ("par.txt", b'(FixedInternalImagePixelType "float")\n', "parameter file of elastix"),
    "parameters called .nii": ("a.nii", ELASTIX, "parameter file of elastix"),
    "a transform of ITK": ("a.tfm", b"#Insight Transform File V1.0\n#Transform 0\n", "transform of ITK"),
    "a transform of MINC": ("a.xfm", b"MNI Transform File\n", "transform of MINC"),
    "a transform of FreeSurfer": ("a.lta", b"# made by\ntype      = 1 # RAS\nnxforms = 1\n", "transform of FreeSurfer"),
    "points of 3D Slicer": ("a.fcsv", b"# Markups fiducial file version = 4.11\n", "points of 3D Slicer"),
    "JSON": ("a.json", b'{\n "a": 1}', "JSON"),
    "a zip archive": ("a.nii.gz", b"PK\x03\x04" + bytes(100), "zip archive"),
    "a picture": ("a.PNG", b"\x89PNG", "picture"),
}


@pytest.mark.parametrize(("name", "content", "message"), OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("read", [open_volume, read_image, read_labels])
def test_files_that_are_no_scans_are_called_by_what_they_are(
    tmp_path: Path, read: Any, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        read(tmp_path / name)


def test_what_does_not_exist_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.nii does not exist"):
        open_volume(tmp_path / "nothing.nii")
