"""Collect the results of an evaluation for its index: a row for each pair, and box plots for the structures."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from voxelmorph_monai.io.tables import read_table
from voxelmorph_monai.pages.index import Box, BoxPlot, Entry, Index, Kind, Measure, number

__all__ = ["find_evaluation", "holds_evaluation"]

_KIND = Kind("Evaluation", "pair", "pairs", "none", "There are no pairs in this evaluation.")
_STRUCTURES, _PAIRS = "structures.csv", "pairs.csv"
_BEFORE = "_before"
_ROW = ("moving", "fixed", "structure")
_Pair = tuple[str, str]


def holds_evaluation(folder: Path) -> bool:
    """Whether a folder holds the tables of an evaluation."""
    return (folder / _STRUCTURES).is_file() and (folder / _PAIRS).is_file()


def _table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read the names of the measures and the rows of a table."""
    columns, rows = read_table(path, "a table of an evaluation")
    if not {*_ROW[:2]} <= set(columns):
        raise ValueError(f"{path} has the columns {', '.join(columns) or '(none)'}: moving and fixed are missing.")
    return [column for column in columns if column not in _ROW], [row.by_column for row in rows]


def _measure(key: str) -> Measure:
    """Column of a measure: Dice should be high, everything else (distances, folds) low."""
    plain, after = key.removesuffix(_BEFORE), not key.endswith(_BEFORE)
    suspect = ("low" if "dice" in plain else "high") if after else ""
    return Measure(key, plain.replace("_", " ") + ("" if after else " before"), 3, suspect)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _plots(measures: list[str], values: Mapping[str, dict[str, dict[_Pair, Any]]], pairs: list[_Pair]) -> list[BoxPlot]:
    """Box plots of all measures, each with the values before and after registration.

    Args:
        measures: names of the measures, in the order of the table.
        values: values of each measure, by structure and pair.
        pairs: pairs in the order of the entries.
    """
    plots = []
    for measure in measures:
        if not measure.endswith(_BEFORE):
            stages = [name for name in (measure + _BEFORE, measure) if name in measures]
            rows = [
                (name, [Box.of([values[stage][name].get(pair) for pair in pairs]) for stage in stages])
                for name in values[measure]
            ]
            names = ("before", "after")[-len(stages) :]
            plots.append(BoxPlot(measure.replace("_", " "), 3, names, rows))
    return plots


def find_evaluation(folder: Path) -> Index:
    """Read the pairs of an evaluation and their measures, averaged over structures.

    Raises:
        ValueError: a table cannot be read.
    """
    measures, rows = _table(folder / _STRUCTURES)
    names, of_pairs = _table(folder / _PAIRS)
    values: dict[str, dict[str, dict[_Pair, Any]]] = {measure: {} for measure in measures}
    for row in rows:
        for measure in measures:
            of_structure = values[measure].setdefault(row["structure"], {})
            of_structure[row["moving"], row["fixed"]] = number(row.get(measure))
    entries = {}
    for row in of_pairs:
        pair = row["moving"], row["fixed"]
        found = {name: number(row.get(name)) for name in names}
        found |= {m: _mean(structure.get(pair) for structure in values[m].values()) for m in measures}
        entries[pair] = Entry(" to ".join(pair), values=found)
    pairs = sorted(entries, key=" to ".join)  # in the order of the index
    columns = [_measure(key) for key in [*measures, *names]]
    return Index(_KIND, columns, [entries[pair] for pair in pairs], _plots(measures, values, pairs))
