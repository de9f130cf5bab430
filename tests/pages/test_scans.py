"""The indices of segmentations, of prepared scans and of evaluations: complete, and showing the body as it is."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pages.bodies import ball, grid_of, head, labels_of, points_of
from tests.pages.test_index import data_of
from voxelmorph_monai.anatomy import STRUCTURES
from voxelmorph_monai.cli import main
from voxelmorph_monai.evaluation import save_evaluation, tabulate
from voxelmorph_monai.pages import scans
from voxelmorph_monai.pages.cohort import find_entries, save_index
from voxelmorph_monai.pages.index import Box
from voxelmorph_monai.pages.scans import draw_scan
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import WorkingGrid

GREEN = (0, 255, 0)


def segmentation(folder: Path, name: str, volumes: dict[str, float], drawn: bool = True) -> None:
    (folder / name).mkdir(parents=True)
    rows = [{"structure": s.name, "volume_mm3": volumes.get(s.name, 1000.0)} for s in STRUCTURES]
    with (folder / name / "volumes.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["structure", "volume_mm3"])
        writer.writeheader()
        writer.writerows(rows)
    scan = head(grid_of("LPI"))
    labels_of(scan).save(folder / name / "labels.nii.gz")
    if drawn:
        scan.save(folder / name / "brain.nii.gz")


def table(folder: Path, *rows: tuple[str, str]) -> None:
    lines = [f"{name},/home/doe/{name}.nii.gz,{reason}" for name, reason in rows]
    (folder / "volumes.csv").write_text("\n".join(["name,scan,reason", *lines]), encoding="utf-8")


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "PSR", "OBL"])
def test_pictures_show_left_on_the_left_in_true_proportions(codes: str) -> None:
    scan = head(grid_of(codes))
    points = points_of(scan.affine)
    mine = ball(points, (0, 0, 0), (65, 82, 65)) & (points[0] < 0) & (points[1] > -30) & (points[2] > 0)
    picture = draw_scan(scan, mine.astype(np.int16), {1: GREEN}).astype(int)
    green = picture[..., 1] - picture[..., 0] > 200
    widths = [190 * 200 / 190 + 24, 150 * 200 / 190 + 24, 150 * 200 / 190 + 24]  # skin: sagittal is as long as high
    assert picture.shape[0] == 200
    assert picture.shape[1] == pytest.approx(sum(widths), rel=0.06)
    ends = (np.cumsum([0, *widths]) * picture.shape[1] / sum(widths)).astype(int)
    for axis, (start, end) in enumerate(pairwise(ends)):
        row, column = np.argwhere(green[:, start:end]).mean(axis=0)
        assert column < 0.48 * (end - start) if axis else column > 0.5 * (end - start)  # in front
        assert row < 100  # above, or in front


def test_outlines_of_all_structures_have_their_colours() -> None:
    scan = head(grid_of())
    labels = labels_of(scan)
    picture = draw_scan(scan, labels.array, {2: GREEN, 41: (0, 0, 255)})
    for colour in (GREEN, (0, 0, 255), (255, 255, 255)):
        assert (picture == colour).all(axis=2).sum() > 50
    coronal = (picture == (0, 0, 255)).all(axis=2)[:, 220:400]  # of the right half of the brain: all around it
    assert np.ptp(np.flatnonzero(coronal.any(axis=0))) > 60
    assert np.ptp(np.flatnonzero(coronal.any(axis=1))) > 125
    assert coronal[:100].sum() == pytest.approx(coronal[100:].sum(), rel=0.2)
    assert (draw_scan(scan, np.zeros(scan.shape, np.int16), {})[..., 0] > 60).mean() > 0.2


def test_segmentations_have_volumes_and_what_failed_is_on_top(tmp_path: Path) -> None:
    segmentation(tmp_path, "a", {"Left-Hippocampus": 3500.0, "Right-Hippocampus": 2500.0})
    segmentation(tmp_path, "b", {})
    segmentation(tmp_path, "extra", {}, drawn=False)  # made alone, and its scan was deleted
    segmentation(tmp_path, "again", {})  # is of an earlier call
    table(
        tmp_path,
        ("a", ""),
        ("again", "memory ran out"),
        ("b", ""),
        ("c", "/home/doe/c.nii.gz shows no head"),
        ("lost", ""),
    )
    index = save_index(tmp_path)
    found = {entry.name: entry for entry in index.entries}
    assert list(found) == ["again", "c", "lost", "a", "b", "extra"]
    assert found["again"].failed == "memory ran out"
    assert found["c"].failed == "SCAN shows no head"
    assert "missing" in found["lost"].failed
    assert found["a"].values["Hippocampus"] == 6.0
    assert found["a"].values["brain"] == pytest.approx(len(STRUCTURES) + 4.0)
    assert found["a"].values["asymmetry"] == pytest.approx(100 / 3)
    assert found["b"].values["asymmetry"] == 0
    with Image.open(tmp_path / found["a"].picture) as picture:
        assert (picture.format, picture.height) == ("JPEG", 200)
    assert found["extra"].picture == ""
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<h1>Segmentations</h1>" in page
    assert "doe" not in page


def test_a_brain_of_an_unusual_size_is_flagged_on_either_side(tmp_path: Path) -> None:
    for i in range(12):
        factor = {3: 0.3, 7: 3.0}.get(i, 1 + 0.01 * i)
        segmentation(tmp_path, f"s{i:02}", {s.name: 1000 * factor for s in STRUCTURES}, drawn=False)
    odd = {entry.name: " ".join(entry.odd) for entry in find_entries(tmp_path).entries if entry.odd}
    assert odd.keys() == {"s03", "s07"}
    assert "brain, ml" in odd["s03"]
    assert "half of the scans have" in odd["s07"]


def test_pictures_are_drawn_once_and_a_file_that_is_damaged_costs_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmentation(tmp_path, "a", {})
    segmentation(tmp_path, "b", {})
    (tmp_path / "b" / "brain.nii.gz").write_bytes(b"none")
    first = {entry.name: entry for entry in save_index(tmp_path).entries}
    assert "cannot be drawn" in first["b"].failed
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "DIR/b/brain.nii.gz" in page
    assert str(tmp_path) not in page
    assert first["a"].picture
    monkeypatch.setattr(scans, "draw_scan", None)  # would fail
    (tmp_path / "a" / "brain.nii.gz").unlink()
    again = {entry.name: entry for entry in save_index(tmp_path).entries}
    assert again["a"].picture == first["a"].picture
    assert again["a"].failed == ""


def test_prepared_scans_are_drawn_with_the_outline_of_the_template(tmp_path: Path) -> None:
    grid = WorkingGrid((54, 60, 70), 3.0)
    (tmp_path / "images").mkdir()
    (tmp_path / "grid.json").write_text(json.dumps({"size": grid.size, "spacing": grid.spacing}))
    (tmp_path / "scans.csv").write_text("name,reason,ncc,volume\nx,,0.9,1.1\ny,it is no brain,,\n", encoding="utf-8")
    around = grid.around()
    scan = Scan(
        np.linspace(0, 0.5, 54, dtype=np.float32)[:, None, None] + np.zeros(around.size, np.float32), around.affine
    )
    scan.save(tmp_path / "images" / "x.nii.gz")
    index = save_index(tmp_path)
    assert [(entry.name, entry.failed) for entry in index.entries] == [("y", "it is no brain"), ("x", "")]
    assert index.entries[1].values == {"ncc": 0.9, "volume": 1.1}
    assert index.entries[0].values == {"ncc": None, "volume": None}
    with Image.open(tmp_path / index.entries[1].picture) as picture:
        pixels = np.asarray(picture).astype(int)
    orange = (pixels[..., 0] > 200) & (pixels[..., 2] < 90) & (pixels[..., 1] < 150)
    assert orange.sum() > 300


STRUCTURE_NAMES = ["left thalamus", "right thalamus", "stem"]


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    paths = [(f"/data/doe/m{i:02}.nii.gz", "/data/doe/f.nii.gz") for i in range(20)]
    dice = rng.normal(0.85, 0.005, (20, 3))
    dice[4], dice[6, 1] = 0.3, np.nan
    measures = {"dice_before": dice - 0.2, "dice": dice, "folding_percent": np.full(20, 0.5)}
    save_evaluation(tmp_path / "evaluation", tabulate(paths, measures, STRUCTURE_NAMES), {})
    return tmp_path / "evaluation"


def test_evaluations_have_a_row_for_each_pair_and_a_box_for_each_structure(evaluated: Path) -> None:
    index = save_index(evaluated)
    found = {entry.name: entry for entry in index.entries}
    assert len(found) == 20
    assert [name for name, entry in found.items() if entry.odd] == ["m04 to f"]
    assert found["m04 to f"].values["dice"] == pytest.approx(0.3)
    assert found["m06 to f"].values["dice"] == pytest.approx(0.85, abs=0.02)  # of the structures that have a value
    assert found["m06 to f"].values["folding_percent"] == 0.5
    (plot,) = index.plots
    assert (plot.name, plot.stages) == ("dice", ("before", "after"))
    rows = dict(plot.rows)
    assert list(rows) == STRUCTURE_NAMES
    assert rows["right thalamus"][1].number == 19
    assert rows["left thalamus"][1].beyond == [(4, pytest.approx(0.3))]
    assert index.entries[4].name == "m04 to f"
    data_of(evaluated)  # strict JSON
    page = (evaluated / "index.html").read_text(encoding="utf-8")
    assert "/data" not in page
    assert "doe" not in page


def test_an_evaluation_with_an_index_can_be_replaced(evaluated: Path) -> None:
    assert main(["report", str(evaluated)]) == 0
    tables = tabulate([("a.nii", "b.nii")], {"dice": np.ones((1, 3))}, STRUCTURE_NAMES)
    save_evaluation(evaluated, tables, {}, overwrite=True)
    assert not (evaluated / "index.html").exists()


def test_tables_of_something_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("structures.csv", "pairs.csv"):
        (tmp_path / name).write_text("name,dice\na,1\n", encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert "moving and fixed are missing" in capsys.readouterr().err


def test_boxes_are_those_of_tukey() -> None:
    box = Box.of([1.0, None, 2.0, 3.0, 4.0, 5.0, 20.0, 6.0, -9.0])
    assert (box.first, box.median, box.third) == (1.75, 3.5, 5.25)
    assert (box.low, box.high) == (1.0, 6.0)
    assert box.beyond == [(6, 20.0), (8, -9.0)]
    assert box.number == 8
    assert Box.of([None]) is None
