"""Compare evaluations: paired statistics of runs on the same pairs, and published tables."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from scipy import stats

from voxelmorph_monai.evaluation import Evaluation, load_evaluation, scan_names
from voxelmorph_monai.io.atomic import atomic_folder, require_new
from voxelmorph_monai.pictures import save_box_plot

__all__ = ["Comparison", "PublishedTable", "compare", "compare_runs", "holm", "paired_statistics", "published"]


class PublishedTable(NamedTuple):
    """A table of numbers from a publication.

    Attributes:
        title: data, protocol, number of pairs.
        source: publication.
        methods: numbers by method and measure, such as ``dice over groups``; text if only a bound is known.
    """

    title: str
    source: str
    methods: dict[str, dict[str, float | str]]


class Comparison(NamedTuple):
    """Result of :func:`compare`.

    Attributes:
        measures: a row for each ``(measure, over, run)``; the first run is the reference.
        structures: a row for each ``(measure, structure, run)``.
        note: limitations of the statistics, or an empty text.
    """

    measures: pd.DataFrame
    structures: pd.DataFrame
    note: str


def _library() -> dict[str, Any]:
    return {
        Path(entry.name).stem: entry
        for entry in (files("voxelmorph_monai") / "published").iterdir()
        if entry.name.endswith(".yaml")
    }


def published(name: str) -> list[PublishedTable]:
    """Published tables for one data set: ``"ixi"``, ``"lpba40"`` or ``"oasis"``."""
    known = _library()
    if name not in known:
        raise ValueError(f"there are no published tables for '{name}'. Choose one of {', '.join(sorted(known))}.")
    return [PublishedTable(**table) for table in yaml.safe_load(known[name].read_text(encoding="utf-8"))]


def holm(p: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Correct p values for multiple tests (Holm, Scandinavian Journal of Statistics 1979); NaN values are ignored.

    The smallest of n values is multiplied by n, the next by n - 1, and so on; no value falls below an earlier one.

    >>> holm(np.array([0.01, 0.04, 0.03, np.nan])).round(2).tolist()
    [0.03, 0.06, 0.06, nan]
    """
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]  # NaN comes last
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


def paired_statistics(values: pd.Series, reference: pd.Series, confidence: float = 0.95) -> dict[str, float]:
    """Difference of two runs on the same pairs: mean, confidence interval, and test.

    Args:
        values: values of one run; pairs in which either run is NaN are left out.
        reference: values of the other run, on the same pairs.
        confidence: level of the confidence interval.

    Returns:
        ``difference``, the mean of ``values - reference``; ``low`` and ``high``, its confidence interval by Student's
        t; ``p`` of Wilcoxon's two-sided signed rank test (Biometrics Bulletin 1945), which does not assume a normal
        distribution; and ``pairs``, their number. Interval and p are NaN for fewer than 2 pairs.
    """
    difference = (values - reference).dropna().to_numpy()
    mean = difference.mean() if len(difference) else np.nan
    low = high = p = np.nan
    if len(difference) > 1:
        margin = stats.t.ppf((1 + confidence) / 2, len(difference) - 1) * stats.sem(difference)
        low, high = mean - margin, mean + margin
        # SciPy returns NaN and warns if all differences are 0.
        p = float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0
    return {"difference": mean, "low": low, "high": high, "p": p, "pairs": len(difference)}


def _common(runs: Mapping[str, Evaluation], common: bool) -> tuple[dict[str, Evaluation], str]:
    """Check that evaluations can be compared: the same pairs, structures, groups, and way of warping labels.

    If they differ it is an error; with ``common``, the result is reduced to what all share, with a note.
    """
    notes = []
    modes = {name: run.settings["label_mode"] for name, run in runs.items() if "label_mode" in run.settings}
    if len(set(modes.values())) > 1:
        if not common:
            raise ValueError(
                f"the runs warped labels in different ways (label_mode {modes}), which alone changes Dice. Evaluate "
                "them in the same way, or compare them anyway with --common."
            )
        notes.append(f"Labels were warped in different ways, which changes Dice by itself: label_mode {modes}.")
    indices = [run.structures.index for run in runs.values()]
    shared = indices[0]
    for index in indices[1:]:
        shared = shared.intersection(index, sort=False)
    groups = [{name: set(members) for name, members in run.groups.items()} for run in runs.values()]
    same_rows, same_groups = all(len(shared) == len(index) for index in indices), all(g == groups[0] for g in groups)
    if same_rows and same_groups:
        return dict(runs), "\n".join(notes)
    rows = {name: len(index) for name, index in zip(runs, indices, strict=True)}
    if not common and same_rows:
        differ = {name for one in groups for name in one if any(other.get(name) != one[name] for other in groups)}
        raise ValueError(
            f"the runs have different groups of structures: {sorted(differ)}. Compare them without groups with "
            "--common."
        )
    if not common:
        raise ValueError(
            f"the runs have different pairs or structures: of {rows} rows (pairs x structures) only {len(shared)} are "
            "in all runs. Use --common to compare only these."
        )
    if not len(shared):
        raise ValueError(f"the runs have no pairs and structures in common: of {rows} rows none is in all.")
    pairs = shared.droplevel("structure").unique()
    kept = {
        name: Evaluation(run.structures.loc[shared], run.pairs.loc[pairs], {}, run.settings)
        for name, run in runs.items()
    }
    notes.append(f"Compared on the {len(shared)} rows (pairs x structures) that are in all, of {rows}; no groups.")
    return kept, "\n".join(notes)


def _columns(run: Evaluation) -> dict[tuple[str, str], pd.Series]:
    """One value per pair for each measure; measures of structures are averaged over structures, and over groups."""
    kinds = ("structures", "groups") if run.groups else ("structures",)
    columns = {(m, kind): run.over(m, kind).mean(axis=1) for m in run.structures.columns for kind in kinds}
    return columns | {(measure, "pairs"): run.pairs[measure] for measure in run.pairs.columns}


def _table(
    columns: Mapping[str, Mapping[tuple[str, str], pd.Series]], names: tuple[str, str], family: Sequence[str]
) -> pd.DataFrame:
    """Statistics of each column that all runs have; p is corrected over rows with equal ``family`` levels."""
    reference, *_ = columns.values()
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for first, second in reference:
        for run, column in columns.items():
            key = first, second
            if all(key in other for other in columns.values()):
                difference = {} if column is reference else paired_statistics(column[key], reference[key])
                rows[first, second, run] = {"mean": column[key].mean(), "sd": column[key].std(), **difference}
    statistics = ["mean", "sd", "difference", "low", "high", "p", "pairs"]
    index = pd.MultiIndex.from_tuples(rows, names=[*names, "run"])
    table = pd.DataFrame(list(rows.values()), index=index, columns=statistics)
    table["p_holm"] = table.groupby(level=list(family), sort=False)["p"].transform(lambda p: holm(p.to_numpy(float)))
    return table


def _structures(run: Evaluation) -> list[tuple[str, str]]:
    structures = run.structures.index.unique("structure")
    return [(measure, structure) for measure in run.structures.columns for structure in structures]


def _dependence(index: pd.MultiIndex) -> str:
    """Return a warning if scans are in several pairs, except for an atlas that is in all of them."""
    for level in ("moving", "fixed"):
        if index.get_level_values(level).nunique() == 1 and len(index) > 1:
            return ""
    scans = [*index.get_level_values("moving"), *index.get_level_values("fixed")]
    if len(set(scans)) == len(scans):
        return ""
    return (
        f"The {len(index)} pairs share {len(set(scans))} scans, so they are not independent: intervals are too narrow "
        "and p values too small."
    )


def compare(runs: Mapping[str, Evaluation], *, common: bool = False) -> Comparison:
    """Compare evaluations with the first of them, on the same pairs.

    :func:`holm` corrects the p values: for ``measures`` over the runs, for ``structures`` over runs and structures.

    Args:
        runs: evaluations by name; a single evaluation is only summarised.
        common: if pairs, structures or groups differ, compare only those that all runs have; also accept labels that
            were warped in different ways. If False, both raise an error.
    """
    kept, note = _common(runs, common)
    by_structure = {
        name: {(measure, structure): run.over(measure)[structure] for measure, structure in _structures(run)}
        for name, run in kept.items()
    }
    by_measure = {name: _columns(run) for name, run in kept.items()}
    measures = _table(by_measure, ("measure", "over"), family=("measure", "over"))
    structures = _table(by_structure, ("measure", "structure"), family=("measure",))
    notes = [note, _dependence(next(iter(kept.values())).pairs.index)]
    return Comparison(measures, structures, "\n".join(filter(None, notes)))


def compare_runs(folders: Sequence[str | Path], output: str | Path, *, common: bool = False) -> Comparison:
    """Compare the evaluations in ``folders``; write ``measures.csv``, ``structures.csv`` and box plots to ``output``.

    Runs are named after their folders.

    Raises:
        FileNotFoundError: a folder has no evaluation.
        FileExistsError: ``output`` exists.
        ValueError: the runs cannot be compared.
    """
    require_new(output)
    names = scan_names([Path(folder).absolute() for folder in folders])
    if len(set(names)) < len(names):
        raise ValueError(
            f"two of the runs have the same folder: {[str(folder) for folder in folders]}. Give each once."
        )
    runs = dict(zip(names, map(load_evaluation, folders), strict=True))
    comparison = compare(runs, common=common)
    with atomic_folder(output) as folder:
        comparison.measures.to_csv(folder / "measures.csv")
        comparison.structures.to_csv(folder / "structures.csv")
        for measure in comparison.structures.index.unique("measure"):
            series = {name: run.over(measure) for name, run in _common(runs, common)[0].items()}
            save_box_plot(folder / f"{measure}.png", series, label=measure)
    return comparison
