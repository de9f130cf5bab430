"""A series chosen in a DICOM folder of several, on the command line."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.dicoms import classic, slices
from voxelmorph_monai.affines import Affine
from voxelmorph_monai.cli import main
from voxelmorph_monai.io import images
from voxelmorph_monai.io.images import read_image, save_image

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (12, 14, 10)
AFFINE: Affine = np.array([[4.0, 0, 0, -20], [0, 4, 0, -30], [0, 0, 4, -25], [0, 0, 0, 1]])
ALIGNED = ["--space", "fixed", "--alignment", "none", "--no-refine"]


def ball(radius: float) -> NDArray[np.int16]:
    index = np.indices(SIZE) - np.reshape(SIZE, (3, 1, 1, 1)) / 2
    return np.clip(900 - 900 / radius * np.sqrt((index**2).sum(axis=0)), 0, None).astype(np.int16)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two series, 3 and 8, and ``fixed.nii.gz`` on the same grid beside their folder."""
    for number, radius in ((3, 3.0), (8, 5.0)):
        classic(tmp_path / "study", ball(radius), slices(AFFINE, range(SIZE[2])), number=number)
    save_image(tmp_path / "fixed.nii.gz", ball(4), AFFINE)
    return tmp_path / "study"


@pytest.mark.parametrize(("number", "radius"), [(3, 3.0), (8, 5.0)])
def test_the_series_that_was_chosen_is_registered(study: Path, number: int, radius: float) -> None:
    fixed, out = study.parent / "fixed.nii.gz", study.parent / "out"
    words = [str(study), str(fixed), "--output", str(out), "--moving-series", str(number), *ALIGNED]
    assert main(["register", *words]) == 0
    np.testing.assert_allclose(nib.load(out / "warped.nii.gz").get_fdata(), ball(radius), atol=1e-3)  # float32
    assert json.loads((out / "summary.json").read_text())["inputs"]["moving"]["series"] == number


def test_the_fixed_series_is_chosen_too(study: Path) -> None:
    fixed, out = study.parent / "fixed.nii.gz", study.parent / "out"
    words = [str(fixed), str(study), "--output", str(out), "--fixed-series", "8", *ALIGNED]
    assert main(["register", *words]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["inputs"]["fixed"]["series"] == 8
    assert "series" not in summary["inputs"]["moving"]
    assert summary["correlation_before"] == pytest.approx(np.corrcoef(ball(4).ravel(), ball(5).ravel())[0, 1], abs=0.05)


def test_a_transform_is_applied_to_the_series_that_was_chosen(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, out = study.parent / "fixed.nii.gz", study.parent / "out"
    assert main(["register", str(fixed), str(fixed), "--output", str(out), *ALIGNED]) == 0
    opened, open_dicom = [], images.open_dicom

    def counted(path: Path, series: int | None = None) -> object:
        opened.append(path)
        return open_dicom(path, series)

    monkeypatch.setattr(images, "open_dicom", counted)
    for number, radius in ((3, 3.0), (8, 5.0)):
        words = ["--image", str(study), "--series", str(number), "--reference", str(study), "--reference-series", "8"]
        output = study.parent / f"{number}.nii.gz"
        assert main(["apply", str(out / "forward.h5"), *words, "--output", str(output)]) == 0
        assert opened == [study, study]  # all files of a folder are read to put its slices in order: once for each scan
        array, affine = read_image(output)
        place, (theirs, grid) = np.linalg.inv(affine), read_image(study, series=8)
        np.testing.assert_allclose(place @ grid, np.eye(4), atol=1e-5)  # float32 in the header
        assert array.shape == theirs.shape
        np.testing.assert_allclose(array, read_image(study, series=number)[0], atol=0.1)  # of 900: float32 positions
        assert array.max() == pytest.approx(ball(radius).max(), abs=0.1)
        opened.clear()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "holds 2 series: 3 without description (12 x 14 x 10), 8 "),
        (["--moving-series", "4"], "has no series 4"),
        (["--moving-series", "8", "--fixed-series", "1"], "fixed.nii.gz is a file"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(
    study: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    out = study.parent / "out"
    assert (
        main(["register", str(study), str(study.parent / "fixed.nii.gz"), "--output", str(out), *words, *ALIGNED]) == 2
    )
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(("number", "radius"), [(3, 3.0), (8, 5.0)])
def test_labels_come_from_the_series_that_was_chosen(study: Path, number: int, radius: float) -> None:
    fixed, output = study.parent / "fixed.nii.gz", study.parent / "labels.nii.gz"
    (study.parent / "still.txt").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        "Parameters: 1 0 0 0 1 0 0 0 1 0 0 0\nFixedParameters: 0 0 0\n"
    )
    words = ["--labels", str(study), "--series", str(number), "--reference", str(fixed), "--output", str(output)]
    assert main(["apply", str(study.parent / "still.txt"), *words]) == 0
    np.testing.assert_array_equal(nib.load(output).get_fdata(), ball(radius))


def test_labels_of_several_series_are_refused_with_a_way_out(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed, out = str(study.parent / "fixed.nii.gz"), study.parent / "out"
    assert main(["register", fixed, fixed, "--moving-labels", str(study), "--output", str(out), *ALIGNED]) == 2
    assert "labels and masks of vxm register, give a folder with one series." in capsys.readouterr().err
    assert not out.exists()


def test_a_series_is_not_of_a_list_nor_of_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.csv").write_text("moving,fixed\n")
    listed = ["--list", str(tmp_path / "list.csv"), "--moving-series", "1", "--output", str(tmp_path / "out")]
    assert main(["register", *listed]) == 2
    assert "series" in capsys.readouterr().err
    points = ["a.h5", "--points", "a.csv", "--points-of", "fixed", "--output", "b.csv", "--series", "1"]
    assert main(["apply", *points]) == 2
    assert "--series" in capsys.readouterr().err
