"""Tables of an evaluation: what stands where, what the summary means, and that nothing is replaced silently."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from voxelmorph_monai.evaluation import (
    Evaluation,
    compare_affine,
    load_evaluation,
    merge_sides,
    save_evaluation,
    scan_names,
    summarise,
    tabulate,
)

STRUCTURES = ["right thalamus", "left thalamus", "brain stem"]
GROUPS = {"thalamus": ["right thalamus", "left thalamus"], "stem": ["brain stem"]}
PATHS = [("/d/b.nii.gz", "/d/0012.nii.gz"), ("/d/0012.nii.gz", "/d/b.nii.gz"), ("/d/0012.nii.gz", "/d/c.nii.gz")]
DICE = np.array([[0.5, 0.75, 1.0], [0.25, np.nan, 0.5], [1.0, 0.5, 0.125]])
FOLDING = np.array([3.0, 1.0, 0.5])


def evaluation() -> Evaluation:
    return tabulate(PATHS, {"dice_before": DICE / 2, "dice": DICE, "folding_percent": FOLDING}, STRUCTURES, GROUPS)


def test_every_value_stands_beside_its_pair_and_its_structure() -> None:
    found = evaluation()
    assert list(found.pairs.index) == [("0012", "b"), ("0012", "c"), ("b", "0012")]
    for row, (moving, fixed) in enumerate([("b", "0012"), ("0012", "b"), ("0012", "c")]):
        assert found.pairs.loc[(moving, fixed), "folding_percent"] == FOLDING[row]
        for column, structure in enumerate(STRUCTURES):
            value = found.structures.loc[(moving, fixed, structure), "dice"]
            np.testing.assert_equal(value, DICE[row, column])
    assert list(found.over("dice").columns) == STRUCTURES  # in the order of the table of structures


def test_the_order_of_the_pairs_does_not_matter() -> None:
    turned = tabulate(PATHS[::-1], {"dice": DICE[::-1], "folding_percent": FOLDING[::-1]}, STRUCTURES, GROUPS)
    pd.testing.assert_frame_equal(turned.structures, evaluation().structures[["dice"]])
    pd.testing.assert_frame_equal(turned.pairs, evaluation().pairs)


def test_a_group_is_the_mean_of_its_structures_that_have_a_value() -> None:
    groups = evaluation().over("dice", "groups")
    assert groups.loc[("b", "0012")].tolist() == [0.625, 1.0]
    assert groups.loc[("0012", "b")].tolist() == [0.25, 0.5]


def test_sides_are_merged_and_nothing_else() -> None:
    names = ["right thalamus", "stem", "left thalamus", "upright post", "left post", "leftover"]
    assert merge_sides(names) == {
        "thalamus": ["right thalamus", "left thalamus"],
        "stem": ["stem"],
        "upright post": ["upright post"],
        "post": ["left post"],
        "leftover": ["leftover"],
    }


def test_summary_says_over_what_it_is() -> None:
    table = summarise(evaluation())
    of_pairs = np.nanmean(DICE, axis=1)
    expected = {"mean": of_pairs.mean(), "sd_over_pairs": of_pairs.std(ddof=1), "median": np.median(of_pairs)}
    expected |= {"sd_over_all": np.nanstd(DICE, ddof=1), "values": 8}
    assert table.loc[("dice", "structures")].to_dict() == pytest.approx(expected)
    merged = np.array([[0.625, 1.0], [0.25, 0.5], [0.75, 0.125]])
    expected = {"mean": merged.mean(), "sd_over_pairs": merged.mean(1).std(ddof=1), "sd_over_all": merged.std(ddof=1)}
    expected |= {"median": np.median(merged.mean(1)), "values": 6}
    assert table.loc[("dice", "groups")].to_dict() == pytest.approx(expected)
    expected = {"mean": 1.5, "sd_over_pairs": FOLDING.std(ddof=1), "median": 1.0, "values": 3}
    row = table.loc[("folding_percent", "pairs")].to_dict()
    assert np.isnan(row.pop("sd_over_all"))
    assert row == pytest.approx(expected)


def test_the_affine_alignment_stands_beside_the_published_one() -> None:
    found = compare_affine(evaluation(), {"groups": 0.386, "structures": 0.4061})
    # 0.25, 0.375, 0.5; 0.125, nothing, 0.25; 0.5, 0.25, 0.0625: the mean of each pair, then of these
    over_structures = np.mean([0.375, 0.1875, 0.8125 / 3])
    over_groups = np.mean([(0.3125 + 0.5) / 2, 0.1875, (0.375 + 0.0625) / 2])
    assert found["structures"] == {"published": 0.4061, "measured": pytest.approx(over_structures)}
    assert found["groups"] == {"published": 0.386, "measured": pytest.approx(over_groups)}


def test_what_is_written_is_what_is_read(tmp_path) -> None:
    save_evaluation(tmp_path / "training" / "evaluation", evaluation(), {"weights": "model.pt", "rate": float("nan")})
    folder = tmp_path / "training" / "evaluation"
    assert {path.name for path in folder.iterdir()} == {"structures.csv", "pairs.csv", "summary.json", "dice.png"}
    for place in (folder, tmp_path / "training"):
        found = load_evaluation(place)
        pd.testing.assert_frame_equal(found.structures, evaluation().structures)
        pd.testing.assert_frame_equal(found.pairs, evaluation().pairs)
        assert found.groups == GROUPS
    text = (folder / "structures.csv").read_text().splitlines()
    assert text[0] == "moving,fixed,structure,dice_before,dice"
    assert text[2] == "0012,b,left thalamus,,"  # no value, no number
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["settings"] == {"weights": "model.pt", "rate": None}
    assert summary["pairs"] == 3
    dice = summary["measures"][2]
    assert (dice["measure"], dice["over"]) == ("dice", "structures")
    assert dice["mean"] == pytest.approx(np.nanmean(DICE, axis=1).mean())
    assert summary["measures"][-1]["sd_over_all"] is None


def test_nothing_is_replaced_silently(tmp_path) -> None:
    save_evaluation(tmp_path / "e", evaluation(), {})
    with pytest.raises(FileExistsError, match=rf"{tmp_path / 'e'} already exists.*--overwrite"):
        save_evaluation(tmp_path / "e", evaluation(), {})
    one = tabulate(PATHS[:1], {"hd95_mm": DICE[:1]}, STRUCTURES)
    save_evaluation(tmp_path / "e", one, {}, overwrite=True)
    assert len(load_evaluation(tmp_path / "e").pairs) == 1
    assert not (tmp_path / "e" / "dice.png").exists()
    (tmp_path / "e" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is not from an evaluation"):
        save_evaluation(tmp_path / "e", one, {}, overwrite=True)
    assert (tmp_path / "e" / "thesis.txt").exists()


def test_scans_of_one_name_keep_their_folders() -> None:
    assert scan_names(["/d/s1/t1.nii.gz", "/d/s2/t1.nii.gz", "/d/a.pkl"]) == ["s1/t1", "s2/t1", "a"]
    here = Path.cwd().as_posix()
    assert scan_names(["s1/t1.nii", f"{here}/s2/t1.nii", f"{here}/s1/t1.nii"]) == ["s1/t1", "s2/t1", "s1/t1"]
    assert scan_names(["/d/1.nii", "/d/1.nii.nii.gz", "/d/1.mgz"]) == ["1.nii", "1.nii.nii.gz", "1.mgz"]


def test_what_is_wrong_is_said(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^measure 'x' has shape \(3, 2\), .* 3 pairs and 3 structures"):
        tabulate(PATHS, {"x": DICE[:, :2]}, STRUCTURES)
    with pytest.raises(ValueError, match=r"^group 'pons' .*\['pons'\] are not measured"):
        tabulate(PATHS, {"dice": DICE}, STRUCTURES, {"pons": ["pons"]})
    with pytest.raises(ValueError, match=r"^group 'empty' .* is empty"):
        tabulate(PATHS, {"dice": DICE}, STRUCTURES, {"empty": []})
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path} holds no evaluation .*summary\.json"):
        load_evaluation(tmp_path)
    save_evaluation(tmp_path / "e", evaluation(), {})
    (tmp_path / "e" / "pairs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=rf"evaluation in {tmp_path / 'e'} cannot be read"):
        load_evaluation(tmp_path / "e")


def test_a_structure_may_be_called_na(tmp_path):
    names = ["NA", "None", "null"]
    measures = {"dice": np.array([[0.5, 0.25, np.nan], [1, 0, 0.5]]), "seconds": np.array([np.nan, 2.0])}
    written = tabulate([("NA", "b"), ("c", "nan")], measures, names)
    save_evaluation(tmp_path / "e", written, {})
    found = load_evaluation(tmp_path / "e")
    pd.testing.assert_frame_equal(found.structures, written.structures)
    pd.testing.assert_frame_equal(found.pairs, written.pairs)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("summary.json", '"groups": {}', '"groups": null', r"groups in summary\.json are None"),
        ("summary.json", '"groups": {}', '"groups": {"a": null}', r"groups in summary\.json are \{'a': None\}"),
        ("summary.json", '"settings": {}', '"settings": 7', r"evaluation in .* cannot be read"),
        ("structures.csv", "0.5", "half", r"column dice of structures\.csv holds text"),
    ],
)
def test_tables_that_somebody_changed_are_named(tmp_path, file, old, new, message):
    save_evaluation(tmp_path / "e", tabulate([("a", "b")], {"dice": np.array([[0.5]])}, ["x"]), {})
    path = tmp_path / "e" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_evaluation(tmp_path / "e")
