"""Tables of an evaluation: what was measured of each pair and each structure, written, read and summarised.

A measure is a column. Measures of structures (Dice) make one table with a row for each pair and structure, measures of
pairs (folding) another with a row for each pair. A structure that a pair has no value for is NaN, an empty cell. A
measure with the suffix ``_before`` is the one of that name before the registration.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from os.path import abspath, commonpath
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from voxelmorph_monai.files import atomic_folder, require_replaceable, write_json
from voxelmorph_monai.formats import scan_name
from voxelmorph_monai.pictures import save_box_plot

__all__ = [
    "Evaluation",
    "check_folder",
    "compare_affine",
    "load_evaluation",
    "merge_sides",
    "save_evaluation",
    "scan_names",
    "summarise",
    "tabulate",
]

BEFORE = "_before"
_PAIR = ["moving", "fixed"]
_FILES = ("structures.csv", "pairs.csv", "summary.json")


class Evaluation(NamedTuple):
    """What was measured.

    Attributes:
        structures: measures of structures, a row for each ``(moving, fixed, structure)``.
        pairs: measures of pairs, a row for each ``(moving, fixed)``.
        groups: names of the structures that each group merges, by its name; empty if there are none.
        settings: what was written down of how it was measured, such as ``label_mode``.
    """

    structures: pd.DataFrame
    pairs: pd.DataFrame
    groups: dict[str, list[str]]
    settings: dict[str, Any]

    def over(self, measure: str, kind: str = "structures") -> pd.DataFrame:
        """One measure of structures: a row for each pair, a column for each structure (or ``"groups"``: group).

        The value of a group is the mean of those of its structures that have one.
        """
        table: pd.DataFrame = self.structures[measure].unstack(sort=False)
        if kind == "structures":
            return table
        return pd.DataFrame({name: table[members].mean(axis=1) for name, members in self.groups.items()})


def scan_names(paths: Sequence[str | Path]) -> list[str]:
    """Short and unambiguous names for files: without folders and ending, unless they are needed.

    >>> scan_names(["/data/images/1005.nii.gz", "/data/atlas.mgz", "/data/images/1005.nii.gz"])
    ['1005', 'atlas', '1005']
    >>> scan_names(["/data/sub-01/t1.nii.gz", "/data/sub-02/t1.nii.gz"])
    ['sub-01/t1', 'sub-02/t1']
    >>> scan_names(["/data/sub-01/t1.nii.gz", "/data/sub-01/t1.mgz", "/data/sub-02/t2.nii"])
    ['sub-01/t1.nii.gz', 'sub-01/t1.mgz', 'sub-02/t2.nii']
    """
    files = [Path(abspath(path)) for path in paths]
    names = {file: scan_name(file) for file in files}
    if len(set(names.values())) < len(names):
        common = commonpath([file.parent for file in files])
        names = {file: file.with_name(name).relative_to(common).as_posix() for file, name in names.items()}
        if len(set(names.values())) < len(names):
            names = {file: file.relative_to(common).as_posix() for file in names}
    return [names[file] for file in files]


def merge_sides(structures: Iterable[str]) -> dict[str, list[str]]:
    """Groups of the structures whose names are alike but for a first word "left" or "right".

    >>> merge_sides(["left thalamus", "brain stem", "right thalamus"])
    {'thalamus': ['left thalamus', 'right thalamus'], 'brain stem': ['brain stem']}
    """
    groups: dict[str, list[str]] = {}
    for name in structures:
        groups.setdefault(name.removeprefix("left ").removeprefix("right "), []).append(name)
    return groups


def _check_groups(groups: Mapping[str, Sequence[str]], structures: Sequence[str]) -> None:
    for name, members in groups.items():
        unknown = [member for member in members if member not in structures]
        if unknown or not members:
            raise ValueError(
                f"group '{name}' must hold one structure or more, of those that are measured, got {members}."
            )


def tabulate(
    paths: Sequence[tuple[str, str]],
    measures: Mapping[str, NDArray[np.floating[Any]]],
    structures: Sequence[str],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Evaluation:
    """Arrange what was measured of each pair in tables, sorted by the names of the pairs.

    Args:
        paths: moving and fixed scan of each pair.
        measures: by name, ``(pairs, structures)`` or ``(pairs,)``.
        structures: names of the columns of the measures of structures.
        groups: names of the structures to merge, by the name of the group.

    Raises:
        ValueError: a measure of another shape, a group of structures that are not there.
    """
    _check_groups(groups or {}, structures)
    by_shape: dict[tuple[int, ...], dict[str, NDArray[np.floating[Any]]]] = {
        (len(paths), len(structures)): {},
        (len(paths),): {},
    }
    for measure, values in measures.items():
        if values.shape not in by_shape:
            raise ValueError(
                f"measure '{measure}' of {len(paths)} pairs and {len(structures)} structures must be of one of the "
                f"shapes {list(by_shape)}, got {values.shape}."
            )
        by_shape[values.shape][measure] = values.ravel()
    names = scan_names([path for pair in paths for path in pair])
    pairs = list(zip(names[::2], names[1::2], strict=True))
    rows = [(*pair, structure) for pair in pairs for structure in structures]
    index = (
        pd.MultiIndex.from_tuples(rows, names=[*_PAIR, "structure"]),
        pd.MultiIndex.from_tuples(pairs, names=_PAIR),
    )
    tables = [pd.DataFrame(columns, i) for columns, i in zip(by_shape.values(), index, strict=True)]
    ordered = [table.sort_index(level=_PAIR, sort_remaining=False, kind="stable") for table in tables]
    return Evaluation(ordered[0], ordered[1], {name: list(members) for name, members in (groups or {}).items()}, {})


def _statistics(means: pd.Series) -> dict[str, float]:
    return {"mean": means.mean(), "sd_over_pairs": means.std(), "median": means.median()}


def summarise(evaluation: Evaluation) -> pd.DataFrame:
    """Mean, spread and number of values of each measure, a row for each ``(measure, over)``.

    ``mean``, ``sd_over_pairs`` and ``median`` are of the pairs' own values, which for measures of structures are the
    means over the structures (``over`` is then ``structures``), or over the groups of structures (``groups``), that
    have one. ``sd_over_all`` is the spread of the single values, of all pairs and structures (groups) together: the
    "±" of many tables in the literature, and about four times as wide. Deviations divide by n - 1.
    """
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for measure in evaluation.structures.columns:
        for kind in ("structures", "groups") if evaluation.groups else ("structures",):
            values = evaluation.over(measure, kind)
            single = values.stack().dropna()
            rows[measure, kind] = _statistics(values.mean(axis=1)) | {
                "sd_over_all": single.std(),
                "values": len(single),
            }
    for measure in evaluation.pairs.columns:
        values = evaluation.pairs[measure]
        rows[measure, "pairs"] = _statistics(values) | {"values": int(values.count())}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=["measure", "over"])
    return table.astype({"values": int})


def check_folder(folder: str | Path, overwrite: bool) -> None:
    """Raise FileExistsError or ValueError where :func:`save_evaluation` would replace what it should not."""
    require_replaceable(folder, overwrite, "an evaluation", [*_FILES, "*.png"])


def compare_affine(evaluation: Evaluation, published: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Mean Dice before the registration, ``measured``, beside the ``published`` one of the affine alignment.

    Where they differ, scans, labels or alignment are not those of the publication. ``published`` holds means over
    ``structures``, over ``groups``, or both.
    """
    found = summarise(evaluation)["mean"]
    return {
        over: {"published": value, "measured": float(found["dice" + BEFORE, over])} for over, value in published.items()
    }


def save_evaluation(
    folder: str | Path, evaluation: Evaluation, settings: Mapping[str, object], overwrite: bool = False
) -> None:
    """Write ``structures.csv``, ``pairs.csv``, ``summary.json`` and a box plot ``MEASURE.png``; all or nothing.

    Args:
        folder: new, or of an earlier evaluation, which is replaced as a whole if ``overwrite``.
        evaluation: what was measured.
        settings: what is to be remembered of how, for ``summary.json``.
        overwrite: replace the folder.
    """
    check_folder(folder, overwrite)
    summary = {
        "settings": dict(settings),
        "pairs": len(evaluation.pairs),
        "groups": evaluation.groups,
        "measures": summarise(evaluation).reset_index().to_dict("records"),
    }
    with atomic_folder(folder) as temporary:
        evaluation.structures.to_csv(temporary / "structures.csv")
        evaluation.pairs.to_csv(temporary / "pairs.csv")
        for measure in evaluation.structures.columns:
            if not measure.endswith(BEFORE):
                stages = {"before": measure + BEFORE, "after": measure}
                shown = {name: evaluation.over(m) for name, m in stages.items() if m in evaluation.structures}
                title = f"{len(evaluation.pairs)} pairs"
                save_box_plot(temporary / f"{measure}.png", shown, label=measure, title=title)
        write_json(temporary / "summary.json", summary)


def load_evaluation(folder: str | Path) -> Evaluation:
    """Read the tables that :func:`save_evaluation` wrote; ``folder`` may be that of the training, too.

    Raises:
        FileNotFoundError: no evaluation there.
        ValueError: tables that cannot be read.
    """
    found = [path for path in (Path(folder), Path(folder) / "evaluation") if (path / _FILES[-1]).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} must hold an evaluation ({', '.join(_FILES)}), but it does not.")
    try:
        names = dict.fromkeys([*_PAIR, "structure"], str)  # 0012 is a name, no number, and so is NA
        options: dict[str, Any] = {"dtype": names, "keep_default_na": False, "na_values": [""]}
        structures, pairs = (pd.read_csv(found[0] / name, **options) for name in _FILES[:2])
        summary = json.loads((found[0] / _FILES[-1]).read_text(encoding="utf-8"))
        tables = structures.set_index([*_PAIR, "structure"]), pairs.set_index(_PAIR)
        for name, table in zip(_FILES, tables, strict=False):
            for column in table.select_dtypes(exclude="number"):
                raise ValueError(f"{name} must hold numbers in the column {column}, but holds text.")
        groups = summary["groups"]
        if not isinstance(groups, dict) or not all(isinstance(members, list) for members in groups.values()):
            raise ValueError(f"{_FILES[-1]} must hold groups, each a list of structures, got {groups}.")
        return Evaluation(*tables, groups, dict(summary.get("settings", {})))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found[0]} must hold an evaluation's tables, but they cannot be read: {error}") from error
