"""Comparisons of evaluations: statistics against other implementations, and no comparison of what is not alike."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from voxelmorph_monai.apps.compare import compare, compare_runs, holm, paired_statistics, published
from voxelmorph_monai.evaluation import Evaluation, save_evaluation, tabulate

# looking up single rows of a table in the order of its runs; what it costs here is nothing
pytestmark = pytest.mark.filterwarnings("ignore:indexing past lexsort depth")

STRUCTURES = ["thalamus", "caudate", "putamen"]
GROUPS = {"striatum": ["caudate", "putamen"]}


def run(seed: int, pairs: int = 9, structures: list[str] = STRUCTURES, atlas: bool = True, **options) -> Evaluation:
    rng = np.random.default_rng(seed)
    scans = [f"/d/{n}.nii.gz" for n in range(pairs + 1)]
    paths = [(scans[0] if atlas else scans[n], scans[n + 1]) for n in range(pairs)]
    dice = rng.uniform(0.5, 0.8, (pairs, len(structures))) + 0.01 * seed
    return tabulate(paths, {"dice": dice, "folding_percent": rng.uniform(size=pairs)}, structures, **options)


def test_interval_and_p_are_those_of_scipy() -> None:
    first, second = (run(seed).over("dice").mean(axis=1) for seed in (1, 2))
    found = paired_statistics(second, first)
    test = stats.ttest_rel(second, first)
    assert (found["low"], found["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-12)
    assert found["difference"] == pytest.approx(float((second - first).mean()))
    assert found["p"] == pytest.approx(stats.wilcoxon(second, first).pvalue)
    assert found["pairs"] == 9
    narrow = paired_statistics(second, first, confidence=0.5)
    assert found["low"] < narrow["low"] < narrow["high"] < found["high"]


def test_pairs_without_a_value_are_left_out() -> None:
    first, second = pd.Series([1.0, 2.0, np.nan, 4.0]), pd.Series([1.5, np.nan, 3.0, 4.25])
    found = paired_statistics(second, first)
    assert (found["difference"], found["pairs"]) == (0.375, 2)
    alone = paired_statistics(second[:2], first[:2])
    assert (alone["difference"], alone["pairs"]) == (0.5, 1)
    assert np.isnan([alone["low"], alone["high"], alone["p"]]).all()
    same = paired_statistics(first, first)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)


def test_holm_rejects_what_its_definition_rejects() -> None:
    rng = np.random.default_rng(0)
    for level in (0.01, 0.05, 0.2):
        p = rng.uniform(size=12) ** 3
        rejected = np.zeros(12, bool)
        for rank, index in enumerate(np.argsort(p)):  # step down until the first that is not below its level
            if p[index] > level / (12 - rank):
                break
            rejected[index] = True
        assert 0 < rejected.sum() < 12
        assert np.array_equal(holm(p) <= level, rejected)
    assert holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0]


def test_all_runs_are_compared_with_the_first() -> None:
    runs = {name: run(seed, groups=GROUPS) for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    found = compare(runs)
    means = {name: each.over("dice").mean(axis=1) for name, each in runs.items()}
    for name in ("b", "c"):
        row = found.measures.loc[("dice", "structures", name)]
        assert row["mean"] == pytest.approx(means[name].mean())
        assert row["sd"] == pytest.approx(means[name].std())
        assert row["difference"] == pytest.approx((means[name] - means["a"]).mean())
        single = found.structures.loc[("dice", "caudate", name)]
        expected = paired_statistics(runs[name].over("dice")["caudate"], runs["a"].over("dice")["caudate"])
        assert single[list(expected)].to_dict() == pytest.approx(expected)
    assert found.measures.loc[("dice", "structures", "a")].isna().sum() == 6
    merged = runs["b"].over("dice")[["caudate", "putamen"]].mean(axis=1)
    assert found.measures.loc[("dice", "groups", "b"), "mean"] == pytest.approx(merged.mean())
    p = found.measures.loc[("dice", "structures"), "p"]
    np.testing.assert_allclose(found.measures.loc[("dice", "structures"), "p_holm"], holm(p.to_numpy()))
    p = found.structures.loc["dice", "p"]  # over runs and structures
    np.testing.assert_allclose(found.structures.loc["dice", "p_holm"], holm(p.to_numpy()))
    assert ("folding_percent", "pairs", "c") in found.measures.index


def test_pairs_that_share_scans_are_spoken_of() -> None:
    assert compare({"a": run(1), "b": run(2)}).note == ""  # an atlas with every scan
    chain = compare({name: run(seed, pairs=4, atlas=False) for name, seed in (("a", 1), ("b", 2))})
    assert "The 4 pairs share 5 scans, so they are not independent" in chain.note


def test_what_is_not_alike_is_compared_only_when_asked() -> None:
    fewer = run(2, pairs=7)
    with pytest.raises(ValueError, match=r"pairs or structures: of \{'a': 27, 'b': 21\} rows .* only 21 are in all"):
        compare({"a": run(1), "b": fewer})
    with pytest.raises(ValueError, match=r"groups of structures: \['striatum'\]\."):
        compare({"a": run(1), "b": run(2, groups=GROUPS)})
    turned = {name: members[::-1] for name, members in GROUPS.items()}
    assert ("dice", "groups", "b") in compare({"a": run(1, groups=GROUPS), "b": run(2, groups=turned)}).measures.index
    with pytest.raises(ValueError, match=r"in common: of \{'a': 27, 'b': \d+\} rows none is in all"):
        compare({"a": run(1), "b": run(2, structures=["pons"])}, common=True)
    found = compare({"a": run(1), "b": fewer}, common=True)
    assert "Compared on the 21 rows" in found.note
    expected = run(1).over("dice").loc[fewer.pairs.index].mean(axis=1).mean()
    assert found.measures.loc[("dice", "structures", "a"), "mean"] == pytest.approx(expected)
    assert (found.measures["pairs"].dropna() == 7).all()


def test_labels_warped_in_different_ways_are_compared_only_when_asked(tmp_path) -> None:
    for name, mode in (("one", "nearest"), ("other", "linear"), ("third", "linear")):
        save_evaluation(tmp_path / name, run(1), {"label_mode": mode})
    save_evaluation(tmp_path / "unknown", run(1), {})
    folders = [tmp_path / "one", tmp_path / "other"]
    with pytest.raises(ValueError, match=r"label_mode \{'one': 'nearest', 'other': 'linear'\}.*--common"):
        compare_runs(folders, tmp_path / "out")
    assert (
        "label_mode {'one': 'nearest', 'other': 'linear'}" in compare_runs(folders, tmp_path / "out", common=True).note
    )
    assert compare_runs([tmp_path / name for name in ("other", "third", "unknown")], tmp_path / "alike").note == ""


def test_what_is_written(tmp_path) -> None:
    for name, seed in (("run.1", 1), ("run.2", 2)):
        save_evaluation(tmp_path / name / "evaluation", run(seed), {})
    found = compare_runs([tmp_path / "run.1", tmp_path / "run.2"], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"measures.csv", "structures.csv", "dice.png"}
    table = pd.read_csv(tmp_path / "out" / "measures.csv", index_col=[0, 1, 2])
    pd.testing.assert_frame_equal(table, found.measures)
    assert list(found.measures.index.unique("run")) == ["run.1", "run.2"]
    with pytest.raises(FileExistsError, match="already exists"):
        compare_runs([tmp_path / "run.1"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"same folder: .*run\.1'\]"):
        compare_runs([tmp_path / "run.1", tmp_path / "run.1"], tmp_path / "other")
    alone = compare_runs([tmp_path / "run.1"], tmp_path / "alone")
    assert alone.measures["difference"].isna().all()


@pytest.mark.parametrize("name", ["ixi", "lpba40", "oasis"])
def test_published_tables_can_be_true(name: str) -> None:
    limits = {"dice": (0.3, 1), "hd95_mm": (1, 5), "sdlogj_learn2reg": (0.05, 0.15), "folding_percent": (0, 2)}
    tables = published(name)
    assert len({table.title for table in tables}) == len(tables)
    for table in tables:
        assert table.source
        for numbers in table.methods.values():
            for key, value in numbers.items():
                low, high = limits[key.split(" over ")[0]]
                assert low <= float(str(value).removeprefix("< ")) <= high
                assert key.split(" over ")[0] == key or key.split(" over ")[1] in ("structures", "groups")


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"'mnist'.* ixi, lpba40, oasis"):
        published("mnist")
