"""What strangers give to ``vxm register``: each ends in one line on stderr and code 2, with nothing written.

What may look wrong but is not has its result checked at the end.
"""

import errno
import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.apps.bids import bids_names
from voxelmorph_monai.cli import main
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.networks import VoxelMorph

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (12, 14, 10)
AFFINE = np.array([[-4.0, 0, 0, 20], [0, 0, 4, -30], [0, -4, 0, 25], [0, 0, 0, 1]])
ALIGNED = ["--space", "fixed", "--alignment", "none", "--no-refine"]
FOREIGN = tuple[Path, Callable[..., None]]


def blob(dtype: Any = np.int16) -> NDArray[Any]:
    """An image of a ball, 0 around it."""
    index = np.indices(SIZE) - np.reshape(SIZE, (3, 1, 1, 1)) / 2
    radius = np.sqrt((index**2).sum(axis=0))
    return np.clip(900 - 200 * radius, 0, None).astype(dtype)


def write(path: Path, array: NDArray[Any], affine: Affine = AFFINE, **fields: Any) -> Path:
    """A NIfTI file, with some fields of its header set to what nibabel would not write."""
    image = nib.Nifti1Image(array, np.eye(4), dtype=array.dtype)
    image.header.set_sform(affine, 2)
    image.header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    image.header["vox_offset"] = 352
    for name, value in fields.items():
        image.header[name] = value
    content = image.header.binaryblock + bytes(4) + array.tobytes(order="F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def with_value(value: float) -> NDArray[np.float32]:
    array = blob(np.float32)
    array[5, 6, 4] = value
    return array


def bend(matrix: Any) -> Affine:
    changed = AFFINE.copy()
    changed[:3, :3] = matrix
    return changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good scans, ``moving.nii.gz`` and ``fixed.nii.gz``, and labels of both."""
    for name in ("moving", "fixed"):
        save_image(tmp_path / f"{name}.nii.gz", blob(), AFFINE)
    save_image(tmp_path / "labels.nii.gz", (blob() > 300).astype(np.uint8), AFFINE)
    return tmp_path


# Moving scans: what makes the file, and what the error says. ------------------------------------------------------


def text(path: Path) -> None:
    path.write_text("Dear sir, enclosed please find the scan.\n" * 40)


def mha(path: Path, **fields: str) -> None:
    """A MetaImage whose header says what ``fields`` have it say."""
    image = sitk.GetImageFromArray(blob().T)
    sitk.WriteImage(image, str(path.with_name("good.mha")))
    header, _, data = path.with_name("good.mha").read_bytes().partition(b"ElementDataFile = LOCAL\n")
    for name, value in fields.items():
        lines = header.decode().splitlines()
        header = "".join(
            f"{name} = {value}\n" if line.startswith(f"{name} =") else line + "\n" for line in lines
        ).encode()
    path.write_bytes(header + b"ElementDataFile = LOCAL\n" + data)


def cut(path: Path, share: float = 0.5) -> None:
    """Leave a share of the bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def written_by_itk(path: Path, image: sitk.Image, share: float = 1.0) -> None:
    sitk.WriteImage(image, str(path))
    cut(path, share)


def analyze(path: Path) -> None:
    nib.save(nib.AnalyzeImage(blob(), None), path)


FORMS = {"sform_code": 1, "qform_code": 1, "pixdim": [1, 4, 4, 4, 0, 0, 0, 0]}
COLOUR = np.zeros(SIZE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
BROKEN = " cannot be read: "
MOVING: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("scan.nii.gz", lambda path: None, " does not exist"),
    "empty file": ("scan.nii.gz", Path.touch, BROKEN),
    "empty file, uncompressed": ("scan.nii", Path.touch, BROKEN),
    "text called .nii.gz": ("scan.nii.gz", text, "not compressed with gzip"),
    "text called .nii": ("scan.nii", text, BROKEN),
    "compressed text": ("scan.nii.gz", lambda path: path.write_bytes(gzip.compress(b"text" * 400)), BROKEN),
    "truncated .nii.gz": ("scan.nii.gz", lambda path: cut(write(path, blob())), BROKEN),
    "truncated .nii": ("scan.nii", lambda path: cut(write(path, blob())), BROKEN),
    "header alone": (
        "scan.nii",
        lambda path: path.write_bytes(nib.Nifti1Header().binaryblock),
        "is not one 3-D volume",
    ),
    "huge sizes": (
        "scan.nii",
        lambda path: write(path, blob(), dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
        " bytes",
    ),
    "huge, compressed": (
        "scan.nii.gz",
        lambda path: write(path, blob(), dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
        " bytes",
    ),
    "negative sizes": (
        "scan.nii",
        lambda path: write(path, blob(), dim=[3, -12, 14, 10, 1, 1, 1, 1]),
        "is not one 3-D volume",
    ),
    "sizes of 0": (
        "scan.nii",
        lambda path: write(path, blob(), dim=[3, 12, 0, 10, 1, 1, 1, 1]),
        "is not one 3-D volume",
    ),
    "unknown type": ("scan.nii", lambda path: write(path, blob(), datatype=77), BROKEN),
    "4-D": ("scan.nii", lambda path: write(path, np.stack([blob()] * 2, -1)), "is not one 3-D volume"),
    "1-D": ("scan.nii", lambda path: write(path, blob().ravel()), "is not one 3-D volume"),
    "two axes of one voxel": ("scan.nii", lambda path: write(path, blob()[:, 6:7, 4:5]), "is not one 3-D volume"),
    "an axis of one voxel": (
        "scan.nii",
        lambda path: write(path, blob()[:, 6:7]),
        "register two volumes, or two slices",
    ),
    "RGB": ("scan.nii", lambda path: write(path, COLOUR), "is not a scalar image"),
    "complex": ("scan.nii", lambda path: write(path, blob(np.complex64)), "is not a scalar image"),
    "affine of zeros": ("scan.nii", lambda path: write(path, blob(), np.diag([0.0, 0, 0, 1])), "has no inverse"),
    "singular affine": ("scan.nii", lambda path: write(path, blob(), bend(np.ones((3, 3)))), "has no inverse"),
    "affine of NaN": (
        "scan.nii",
        lambda path: write(path, blob(), bend(np.nan)),
        "is not a matrix of 4 x 4 finite numbers",
    ),
    "sheared": ("scan.nii", lambda path: write(path, blob(), bend(4 * np.eye(3) + np.eye(3, k=1))), "at right angles"),
    "two places": (
        "scan.nii",
        lambda path: write(path, blob(), **FORMS),
        "sform and a qform that differ by up to 110 mm",
    ),
    "no place": (
        "scan.nii",
        lambda path: write(path, blob(), sform_code=0),
        "no position: sform_code and qform_code are both 0",
    ),
    "metres": ("scan.nii", lambda path: write(path, blob(), xyzt_units=1), "metres"),
    "NaN": ("scan.nii", lambda path: write(path, with_value(np.nan)), "has 1 voxels of NaN or infinity"),
    "Inf": ("scan.nii", lambda path: write(path, with_value(np.inf)), "has 1 voxels of NaN or infinity"),
    "scaled to Inf": (
        "scan.nii",
        lambda path: write(path, blob(), scl_slope=3e38, scl_inter=0),
        "voxels of NaN or infinity",
    ),
    "constant": ("scan.nii", lambda path: write(path, np.full(SIZE, 7, np.int16)), "is constant: every voxel is 7"),
    "far away": ("scan.nii", lambda path: write(path, blob(), AFFINE + 900 * np.eye(4, k=3)), "overlap by only 0%"),
    "unknown ending": ("scan.xyz", text, BROKEN),
    "picture": ("scan.png", text, "is a picture"),
    "NIfTI called .mha": (
        "scan.mha",
        lambda path: save_image(path.with_name("a.nii"), blob(), AFFINE),
        "does not exist",
    ),
    "MetaImage called .nii": ("scan.nii", mha, BROKEN),
    "text called .nrrd": ("scan.nrrd", text, BROKEN),
    "truncated .mha": ("scan.mha", lambda path: (mha(path), cut(path)), BROKEN),
    "huge .mha": ("scan.mha", lambda path: mha(path, DimSize="60000 60000 60000"), BROKEN),
    "flat .mha": ("scan.mha", lambda path: mha(path, TransformMatrix="1 0 0 0 1 0 0 1 0"), ""),
    ".mha without spacing": ("scan.mha", lambda path: mha(path, ElementSpacing="0 0 0"), ""),
    ".mhd without data": (
        "scan.mhd",
        lambda path: (sitk.WriteImage(sitk.GetImageFromArray(blob().T), str(path)), path.with_suffix(".raw").unlink()),
        BROKEN,
    ),
    "truncated .nrrd": ("scan.nrrd", lambda path: written_by_itk(path, sitk.GetImageFromArray(blob().T), 0.6), BROKEN),
    "colours in .nrrd": (
        "scan.nrrd",
        lambda path: written_by_itk(path, sitk.GetImageFromArray(np.ones((*SIZE, 3), np.uint8), isVector=True)),
        "is not a scalar image",
    ),
    "4-D .nrrd": (
        "scan.nrrd",
        lambda path: written_by_itk(path, sitk.GetImageFromArray(np.stack([blob()] * 2), isVector=False)),
        "is not one 3-D volume",
    ),
    "ANALYZE": ("scan.img", analyze, "no position: ANALYZE"),
    "folder without DICOM": ("photos", lambda path: (path.mkdir(), text(path / "cat.jpg")), "without DICOM images"),
    "empty folder": ("photos", Path.mkdir, "without DICOM images"),
}


@pytest.fixture
def refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[list[str], str], None]:
    """Registers by these words and sees to it that they are refused in one line, and leave nothing."""

    def check(words: list[str], message: str) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        capfd.readouterr()
        assert main(["register", *words, *([] if "--space" in words else ALIGNED)]) == 2
        shown = capfd.readouterr()
        assert shown.out == ""
        (line,) = shown.err.splitlines()  # of ITK's and HDF5's C code too
        assert line.startswith("vxm register: ")
        assert message in line
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert not list(folder.glob(".*"))

    return check


def pair(folder: Path, moving: str = "moving.nii.gz") -> list[str]:
    return [str(folder / moving), str(folder / "fixed.nii.gz"), "--output", str(folder / "out")]


@pytest.mark.parametrize(("name", "make", "message"), MOVING.values(), ids=MOVING.keys())
def test_a_scan_that_cannot_be_used_is_refused(
    folder: Path, refused: Any, name: str, make: Callable[[Path], object], message: str
) -> None:
    make(folder / name)
    refused(pair(folder, name), message)


def test_dicom_that_is_no_volume_is_refused(folder: Path, refused: Any, save_dicom: Callable[..., None]) -> None:
    series = folder / "series"
    save_dicom(series, blob(), AFFINE)
    (series / "1_004.dcm").unlink()
    refused(pair(folder, "series"), "not evenly spaced")
    save_dicom(series, blob(), AFFINE)
    save_dicom(series, blob(), AFFINE, series=2)
    refused(pair(folder, "series"), "holds 2 series: 1 ")


def test_what_may_not_be_read_is_refused(folder: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(nib, "load", forbid)  # the tests may run as root, who may read everything
    refused(pair(folder), "Permission denied")


LABELS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing labels": ("--moving-labels", lambda path: None, " does not exist"),
    "labels of another shape": ("--moving-labels", lambda path: write(path, blob()[1:]), "has shape (12, 14, 10) and "),
    "labels elsewhere": ("--fixed-labels", lambda path: write(path, blob(), AFFINE * 1.01), "are not on one grid"),
    "fractions": ("--moving-labels", lambda path: write(path, blob(np.float32) / 7), "not whole numbers"),
    "negative labels": ("--fixed-labels", lambda path: write(path, blob() - 5), "is not a label map"),
    "no label": ("--moving-labels", lambda path: write(path, np.zeros(SIZE, np.uint8)), "is not a label map"),
    "NaN as label": ("--moving-labels", lambda path: write(path, with_value(np.nan).round()), "is not a label map"),
    "labels past 2^53": ("--moving-labels", lambda path: write(path, blob(np.int64) + 2**60), "labels above 2^53"),
    "RGB labels": ("--moving-labels", lambda path: write(path, COLOUR), "is not a scalar image"),
    "empty mask": ("--fixed-mask", lambda path: write(path, np.zeros(SIZE, np.uint8)), "is not a label map"),
    "mask of another shape": ("--moving-mask", lambda path: write(path, blob()[1:]), "has shape (12, 14, 10) and "),
    "mask beside the body": (
        "--moving-mask",
        lambda path: write(path, (blob() == 0).astype(np.uint8)),
        "does not overlap",
    ),
}


@pytest.mark.parametrize(("option", "make", "message"), LABELS.values(), ids=LABELS.keys())
def test_labels_and_masks_that_cannot_be_used_are_refused(
    folder: Path, refused: Any, option: str, make: Callable[[Path], object], message: str
) -> None:
    make(folder / "extra.nii")
    refused([*pair(folder), option, str(folder / "extra.nii")], message)


class Trap:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))

    def __init__(self, path: Path) -> None:
        self.path = path


OPTIONS: dict[str, tuple[list[str], str]] = {
    "weights of another preset": (["--weights", "vm2.pt"], "do not fit the network"),
    "weights that run code": (["--weights", "trap.pt"], "do not fit the network"),
    "weights that are text": (["--weights", "text.pt"], "do not fit the network"),
    "no weights": (["--weights", "none.pt"], "none.pt do not exist"),
    "weights a folder": (["--weights", "."], "lies within the input"),
    "no such preset": (["--weights", "vm2.pt", "--preset", "vm3"], "preset 'vm3' is unknown"),
    "grid too small": (
        ["--weights", "vm2.pt", "--preset", "vm2", "--size", "4", "4", "4"],
        "a grid of [4.0, 4.0, 4.0] mm is too small for ",
    ),
    "grid of two axes": (["--weights", "vm2.pt", "--preset", "vm2", "--size", "64", "64"], "Give 3 sizes"),
    "spacing of 0": (
        ["--weights", "vm2.pt", "--preset", "vm2", "--size", *"999", "--spacing", "0"],
        "and a spacing above 0",
    ),
    "spacing of NaN": (
        ["--weights", "vm2.pt", "--preset", "vm2", "--size", *"999", "--spacing", "nan"],
        "and a spacing above 0",
    ),
    "no brain": (["--space", "mni152"], "but a skull-stripped brain has 0.3 to "),
    "no device": (["--device", "abacus"], "device 'abacus' cannot be used"),
}


@pytest.mark.parametrize(("words", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options_that_cannot_be_met_are_refused(
    folder: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    text(folder / "text.pt")
    torch.save(VoxelMorph("vm2").state_dict(), folder / "vm2.pt")
    (folder / "trap.pt").write_bytes(pickle.dumps(Trap(folder / "sprung"), protocol=2))
    refused([*pair(folder), *words], message)
    assert not (folder / "sprung").exists()


def test_outputs_that_would_harm_or_cannot_be_are_refused(
    folder: Path, refused: Any, save_dicom: Callable[..., None]
) -> None:
    scans = pair(folder)[:2]
    (folder / "theirs").mkdir()
    (folder / "link").symlink_to(folder)
    text(folder / "theirs" / "thesis.txt")
    save_dicom(folder / "series", blob(), AFFINE)
    for output, words, message in (
        ("labels.nii.gz", ["--overwrite"], "is not overwritten, because it is a file"),
        ("labels.nii.gz/out", [], "cannot create "),
        ("theirs", [], "already exists"),
        ("theirs", ["--overwrite"], "is not overwritten, because it holds "),
        (".", ["--overwrite"], " would replace the input "),
        ("moving.nii.gz", ["--overwrite"], " would replace the input "),
        ("link", ["--overwrite"], " would replace the input "),
        ("theirs/..", ["--overwrite"], " would replace the input "),
        ("n" * 240, [], "240 bytes, but at most 220"),
        (os.fsdecode(b"caf\xe9"), [], "is not UTF-8"),
    ):
        refused([*scans, "--output", str(folder / output), *words], message)
    dicom = [str(folder / "series"), scans[1], "--output"]
    refused([*dicom, str(folder / "series" / "out")], "lies within the input")
    refused([*dicom, str(folder / "series"), "--overwrite"], " would replace the input ")


@pytest.mark.skipif(sys.platform != "linux", reason="a folder in which not even root may write")
def test_a_folder_in_which_nothing_may_be_written_is_refused(folder: Path, refused: Any) -> None:
    refused([*pair(folder)[:2], "--output", "/proc/vxm/out"], "/proc")


FULL_DISK = """
import resource, sys
from voxelmorph_monai.apps import register_files as registration
from voxelmorph_monai.apps.bids import bids_names
from voxelmorph_monai.cli import main
save, size = registration.write_result, int(sys.argv.pop())
def limited(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    save(*args)
registration.write_result = limited
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are POSIX")
@pytest.mark.parametrize("size", [600, 4000])
def test_a_full_disk_leaves_nothing(folder: Path, size: int) -> None:
    """No file may grow beyond so many bytes; in a process of its own, which such a file can crash at its end."""
    before = {path for path in folder.rglob("*")}
    words = ["register", *pair(folder), "--moving-labels", str(folder / "labels.nii.gz"), *ALIGNED]
    command = [sys.executable, "-c", FULL_DISK, *words, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("vxm register: ")
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize("writer", ["save_linear", "SpatialMap.save", "save_results", "Scan.save"])
def test_a_disk_that_fills_up_later_leaves_nothing(
    folder: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"voxelmorph_monai.apps.result.{writer}", full)
    refused(pair(folder), "No space left on device. Incomplete files were removed.")


# What may look wrong but is right. --------------------------------------------------------------------------------


def register(folder: Path, moving: str, *words: str) -> tuple[NDArray[Any], dict[str, Any]]:
    """The warped scan and the summary."""
    assert main(["register", *pair(folder, moving), *ALIGNED, *words]) == 0
    out = folder / "out"
    return nib.load(out / "warped.nii.gz").get_fdata(), json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("alignment", ["none", "rigid", "affine"])
def test_a_scan_fits_itself(folder: Path, alignment: str) -> None:
    warped, summary = register(folder, "fixed.nii.gz", "--alignment", alignment)
    np.testing.assert_allclose(warped, blob(), atol=1.0)  # of 900, at the slopes of a ball
    assert summary["correlation_after"] > 0.9999
    assert summary["inverse_consistency_mm"] < 1e-6


def test_numbers_however_they_are_stored_are_the_same(folder: Path) -> None:
    stored = {
        "scaled.nii": write(folder / "scaled.nii", blob() // 4 * 4 // 4 - 30, scl_slope=4, scl_inter=120),
        "four.nii": write(folder / "four.nii", (blob() // 4 * 4)[..., None]),
        "double.nii.gz": write(folder / "double.nii.gz", (blob() // 4 * 4).astype(np.float64)),
    }
    big = nib.Nifti1Image(blob() // 4 * 4, AFFINE, nib.Nifti1Header(endianness=">"))
    nib.save(big, folder / "big.nii")
    nib.save(nib.MGHImage(blob() // 4 * 4, AFFINE), folder / "scan.mgz")
    (folder / "link.nii").symlink_to(folder / "four.nii")
    for name in [*stored, "big.nii", "scan.mgz", "link.nii"]:
        warped, _ = register(folder, name, "--overwrite")
        np.testing.assert_allclose(warped, blob() // 4 * 4, atol=1e-3, err_msg=name)  # float32 of 900


def test_labels_past_the_range_of_32_bits_and_stored_as_floats_are_kept(folder: Path) -> None:
    large = (blob() > 300) * np.int64(2**33 + 1)
    write(folder / "large.nii", large)
    write(folder / "float.nii", (blob() > 300).astype(np.float32) * 5)
    for name, expected in (("large.nii", large), ("float.nii", (blob() > 300) * 5)):
        _, summary = register(folder, "moving.nii.gz", "--moving-labels", str(folder / name), "--overwrite")
        found = np.asarray(nib.load(folder / "out" / "warped_labels.nii.gz").dataobj)
        np.testing.assert_array_equal(found, expected)
        assert summary["dice"] is None


def test_names_that_bids_does_not_know_become_names_it_knows(folder: Path) -> None:
    save_image(folder / "..strange - name.nii.gz", blob(), AFFINE)
    assert main(["register", *pair(folder, "..strange - name.nii.gz"), "--bids", *ALIGNED]) == 0
    assert {path.name for path in (folder / "out").iterdir()} == set(
        bids_names(Path("strangename.nii.gz"), Path("fixed.nii.gz")).values()
    ) - {"sub-strangename_space-fixed_dseg.nii.gz"}


@pytest.mark.parametrize(
    ("moving", "fixed", "message"),
    [
        ("患者.nii.gz", "fixed.nii.gz", "患者.nii.gz has no letters or digits"),
        ("moving.nii.gz", "__.nii", "__.nii has no letters or digits"),
        ("sub-1_dseg.nii.gz", "fixed.nii.gz", r"sub-1_dseg\.nii\.gz is named as a dseg"),
    ],
)
def test_names_that_bids_cannot_tell_apart_are_refused(moving: str, fixed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bids_names(Path(moving), Path(fixed))
