"""An index of many registrations: complete, whatever is missing, and fair to what is unusual."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from voxelmorph_monai.cli import main
from voxelmorph_monai.pages.cohort import find_entries, save_index

JPEG = "data:image/jpeg;base64,/9j/2Q=="


def summary(dice: float | None = 0.8, **changes: object) -> dict[str, object]:
    stages = {"before": {"mean": 0.5}, "after": {"mean": dice}}
    return {
        "dice": None if dice is None else stages,
        "correlation_before": 0.8,
        "correlation_after": 0.95,
        "folding_percent": 0.0,
        "sdlogj": 0.3,
        "inverse_consistency_mm": 0.1,
        "seconds": {"affine": 1.0, "warp": 2.0},
        "warnings": [],
        **changes,
    }


def add(folder: Path, name: str, content: object, page: bool = True) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    if page:
        head = f'<link rel="icon" type="image/jpeg" href="{JPEG}">'
        (folder / name / "report.html").write_text(f"<html>{head}</html>", encoding="utf-8")


def data_of(folder: Path) -> dict[str, object]:
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.encode()[:1024].find(b'charset="utf-8"') >= 0
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_nothing_is_an_index_too(tmp_path: Path) -> None:
    assert save_index(tmp_path).entries == []
    assert data_of(tmp_path)["rows"] == []
    assert "no registrations" in (tmp_path / "index.html").read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="missing"):
        save_index(tmp_path / "missing")


def test_failed_pairs_come_first_with_their_reason(tmp_path: Path) -> None:
    add(tmp_path, "a", summary())
    add(tmp_path, "b", summary(None), page=False)
    add(tmp_path, "stale", summary())
    rows = ["name,status,reason,moving,fixed", "a,done,,,", "b,done,,,", 'stale,failed,"t.nii.gz, a slice, is none",,']
    rows += ["lost,failed,/d/Jane Doe/x.nii and /d/y.nii differ,/d/Jane Doe/x.nii,/d/f.nii", "z,pending,,,"]
    (tmp_path / "cohort.csv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text('{"folding_percent": ', encoding="utf-8")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "summary.json").write_text("{}", encoding="utf-8")
    found = {entry.name: entry for entry in save_index(tmp_path).entries}
    assert list(found) == ["broken", "lost", "stale", "z", "a", "b"]
    assert found["stale"].failed == "t.nii.gz, a slice, is none"
    assert "summary.json" in found["broken"].failed
    assert found["lost"].failed == "MOVING and FILE differ"  # the table has the paths
    assert found["z"].failed == "it is pending"
    assert found["a"].values["dice_after"] == 0.8
    assert found["a"].values["seconds"] == 3.0
    assert found["b"].values["dice_after"] is None
    assert found["b"].page == ""
    assert not any(entry.odd for entry in found.values())  # of so few pairs nobody can say what is usual
    assert not re.search(r"\bnan\b", (tmp_path / "index.html").read_text(encoding="utf-8"), re.IGNORECASE)


def test_reasons_hold_no_name_of_a_folder(tmp_path: Path) -> None:
    """Folders are named after patients, and with spaces; dates stand in the names of files."""
    reason = "/d/Doe Jane 1980-01-31/t1 MRN-7.nii.gz and /d/Doe Jane 1980-01-31/labels.mgz have other grids"
    (tmp_path / "cohort.csv").write_text(
        f'name,status,reason,moving,fixed\nlost,failed,"{reason}",/e/m.nii,/e/f.nii\n', encoding="utf-8"
    )
    (entry,) = save_index(tmp_path).entries
    assert entry.failed == "FILE and FILE have other grids"
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for secret in ("Doe", "Jane", "1980", "MRN", "/e/", str(tmp_path)):
        assert secret not in page


def test_numbers_that_are_none_cost_nobody_else_anything(tmp_path: Path) -> None:
    add(tmp_path, "a", summary())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text(
        json.dumps(summary(float("nan"), sdlogj=float("inf"), correlation_after="high")), encoding="utf-8"
    )
    first, second = save_index(tmp_path).entries
    assert first.values["sdlogj"] == 0.3
    assert [second.values[key] for key in ("dice_after", "sdlogj", "correlation_after")] == [None] * 3
    assert second.values["correlation_before"] == 0.8
    assert len(data_of(tmp_path)["rows"]) == 2  # type: ignore[arg-type]


def test_outliers_on_the_bad_side_are_flagged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(20):
        changes = {"folding_percent": 0.4 if i == 7 else 0.0, "sdlogj": 0.05 if i == 9 else rng.normal(0.3, 0.01)}
        add(tmp_path, f"p{i:02}", summary(0.5 if i == 3 else rng.normal(0.8, 0.01), **changes), page=False)
    odd = {entry.name: entry.odd for entry in find_entries(tmp_path).entries if entry.odd}
    assert odd.keys() == {"p03", "p07"}  # a very smooth map is no fault
    assert "Dice after 0.500" in odd["p03"][0]
    assert "0.4000" in odd["p07"][0]  # most values are equal


def test_of_four_pairs_nobody_can_say_what_is_usual(tmp_path: Path) -> None:
    for i, dice in enumerate([0.8, 0.81, 0.79, 0.1]):
        add(tmp_path, f"p{i}", summary(dice), page=False)
    assert not any(entry.odd for entry in find_entries(tmp_path).entries)
    add(tmp_path, "p4", summary(0.8), page=False)
    assert [entry.name for entry in find_entries(tmp_path).entries if entry.odd] == ["p3"]


def test_equal_pairs_are_no_outliers(tmp_path: Path) -> None:
    for i in range(8):
        add(tmp_path, f"p{i}", summary(), page=False)
    assert not any(entry.odd for entry in find_entries(tmp_path).entries)


def test_names_are_text_and_addresses(tmp_path: Path) -> None:
    add(tmp_path, "Zoë <b>& 100%#1", summary())
    (entry,) = save_index(tmp_path).entries
    assert entry.page == "Zo%C3%AB%20%3Cb%3E%26%20100%25%231/report.html"
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert data_of(tmp_path)["rows"][0]["name"] == "Zoë <b>& 100%#1"  # type: ignore[index]


def test_thumbnails_lie_beside_the_page_and_are_made_once(tmp_path: Path) -> None:
    add(tmp_path, "deep/sub-1", summary())
    (entry,) = save_index(tmp_path).entries
    assert entry.name == "deep/sub-1"
    thumbnail = tmp_path / entry.thumbnail
    assert thumbnail.read_bytes() == b"\xff\xd8\xff\xd9"
    before = thumbnail.stat().st_mtime_ns
    save_index(tmp_path)
    assert thumbnail.stat().st_mtime_ns == before


def test_another_index_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<html>mine</html>", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"index\.html"):
        save_index(tmp_path)
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "<html>mine</html>"


def test_the_size_of_an_index_is_that_of_its_numbers(tmp_path: Path) -> None:
    for i in range(200):
        add(tmp_path, f"sub-{i:03}", summary())
    save_index(tmp_path)
    assert (tmp_path / "index.html").stat().st_size < 200_000


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path, "a", summary(warnings=[{"check": "folds", "text": "The map folds."}]))
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1 pairs, 0 of them failed, 1 flagged" in printed
    assert str(tmp_path / "index.html") in printed
    assert main(["report", str(tmp_path / "none")]) == 2
