"""``vxm segment``: what it writes, where it lies, and what it refuses."""

import csv
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from voxelmorph_monai import anatomy
from voxelmorph_monai.anatomy import AnatomyNet, colour_table
from voxelmorph_monai.apps import segment
from voxelmorph_monai.cli import main
from voxelmorph_monai.io.images import save_image

pytestmark = pytest.mark.usefixtures("one_thread")

AFFINE = np.array([[-2.5, 0, 0, 70], [0, 2.4, 0.6, -90], [0, -0.6, 2.4, -20], [0, 0, 0, 1.0]])


class Bright(nn.Module):
    """In place of a U-Net: what is bright is of the last class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, image: Tensor) -> Tensor:
        scores = torch.full((1, self.num_classes, *image.shape[2:]), -50.0)
        scores[:, 0], scores[:, -1] = 0, 20 * (image[:, 0] - 0.5)
        return scores


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "_LEAST_LIKE", 0.0)  # one structure is found
    network = AnatomyNet()
    network.coarse, network.fine = Bright(9), Bright(31)
    monkeypatch.setattr(segment, "load_anatomy", lambda weights: network.eval())


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    image = np.full((60, 70, 50), 20, np.int16)
    image[10:50, 10:60, 10:40] = 200  # 1.2 l
    image[0, 0, :2] = -1, 200
    save_image(tmp_path / "scan.nii.gz", image, AFFINE)
    return tmp_path / "scan.nii.gz"


def test_a_folder_gets_all_that_was_found_on_the_grid_of_the_scan(scan: Path, tmp_path: Path) -> None:
    assert main(["segment", str(scan), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    image = nib.load(scan)
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"labels.nii.gz", "brain_mask.nii.gz", "brain.nii.gz", "volumes.csv", "colours.txt"}
    for name in ("labels.nii.gz", "brain_mask.nii.gz", "brain.nii.gz"):
        found = nib.load(files[name])
        assert found.shape == image.shape
        for form in ("get_sform", "get_qform"):
            np.testing.assert_array_equal(*(getattr(x, form)() for x in (found, image)))
    labels, mask, brain = (
        np.asarray(nib.load(files[f"{n}.nii.gz"]).dataobj) for n in ("labels", "brain_mask", "brain")
    )
    assert set(np.unique(labels)) == {0, 24}
    np.testing.assert_array_equal(mask, labels > 0)
    true = image.get_fdata() == 200
    assert 2 * (mask & true).sum() / (mask.sum() + true.sum()) > 0.97
    np.testing.assert_array_equal(brain, np.where(mask, image.get_fdata(), 0))
    volumes = {
        row["structure"]: float(row["volume_mm3"])
        for row in csv.DictReader(files["volumes.csv"].read_text().splitlines())
    }
    litres = mask.sum() * abs(np.linalg.det(AFFINE[:3, :3]))
    assert volumes["CSF"] == pytest.approx(litres, rel=0.03)
    assert volumes["Left-Thalamus"] == pytest.approx(0, abs=1)
    assert files["colours.txt"].read_text() == colour_table()


def test_a_file_gets_the_labels_only(scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "labels.nii"
    assert main(["segment", str(scan), "--output", str(output)]) == 0
    assert set(np.unique(nib.load(output).get_fdata())) == {0, 24}
    assert {path.name for path in tmp_path.iterdir()} == {"scan.nii.gz", "labels.nii"}
    before = output.read_bytes()
    assert main(["segment", str(scan), "--output", str(output)]) == 2
    assert re.search(r"labels.nii .*--overwrite", capsys.readouterr().err)
    assert output.read_bytes() == before
    assert main(["segment", str(scan), "--output", str(output), "--overwrite"]) == 0


def test_a_scan_without_a_head_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.zeros((40, 40, 40), np.int16)
    image[18:22, 18:22, 18:22] = 100
    save_image(tmp_path / "phantom.nii.gz", image, np.diag([3.0, 3, 3, 1]))
    assert main(["segment", str(tmp_path / "phantom.nii.gz"), "--output", str(tmp_path / "out")]) == 2
    assert re.search(r"phantom.nii.gz .*no head.* 0.001 litres", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_many_scans_get_a_folder_each_and_one_table(
    scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    scan.rename(folder / "a.nii.gz")
    save_image(folder / "empty.nii.gz", np.zeros((40, 40, 40), np.int16) + np.eye(40, dtype=np.int16), np.eye(4))
    output = tmp_path / "out"
    assert main(["segment", str(folder), "--output", str(output)]) == 1
    told = capsys.readouterr()
    assert re.search(r"empty failed: .*empty.nii.gz", told.err)
    assert re.search(r"1 of 2 scans.* 0 of them", told.out)
    rows = list(csv.DictReader((output / "volumes.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["a", "empty"]
    own = (output / "a" / "volumes.csv").read_text()
    assert float(rows[0]["CSF"]) > 9e5
    assert f"CSF,{rows[0]['CSF']}" in own
    assert rows[1]["CSF"] == ""
    assert "empty.nii.gz" in rows[1]["reason"]
    (tmp_path / "list.csv").write_text("name,scan\na,scans/a.nii.gz\n")
    before = (output / "a" / "labels.nii.gz").stat().st_mtime_ns
    assert main(["segment", "--list", str(tmp_path / "list.csv"), "--output", str(output)]) == 0
    assert "1 of them by an earlier call" in capsys.readouterr().out
    assert (output / "a" / "labels.nii.gz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("scan\na.nii\nb/a.nii\n", r"line 3: .* a "),
        ("name,scan\n../x,a.nii\n", r"line 2: \.\./x "),
        ("name,scan\nthumbnails,a.nii\n", "line 2: thumbnails "),
        ("file\na.nii\n", r"columns file\."),
        ("name,scan\nx\n", "line 2"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ValueError, match=r"list\.csv.*" + message):
        segment.read_list(tmp_path / "list.csv")
