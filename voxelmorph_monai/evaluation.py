"""Tables of an evaluation: arrange, save, load and summarise the measures of each pair and structure.

There are two tables, with a column for each measure. Measures of structures, such as Dice, have a row for each pair and
structure; measures of pairs, such as folding, have a row for each pair. A missing value is NaN, in a file an empty
cell. The suffix ``_before`` means a value before the registration.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from os.path import abspath, commonpath
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from voxelmorph_monai.io.atomic import atomic_folder, require_replaceable, write_json
from voxelmorph_monai.io.formats import scan_name
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
    """Measures of a set of registered pairs.

    Attributes:
        structures: measures of structures, a row for each ``(moving, fixed, structure)``.
        pairs: measures of pairs, a row for each ``(moving, fixed)``.
        groups: names of the structures in each group, by name of the group; empty if there are no groups.
        settings: settings of the evaluation that were recorded, such as ``label_mode``.
    """

    structures: pd.DataFrame
    pairs: pd.DataFrame
    groups: dict[str, list[str]]
    settings: dict[str, Any]

    def over(self, measure: str, kind: str = "structures") -> pd.DataFrame:
        """Table of one measure: a row for each pair, a column for each structure (``kind="groups"``: for each group).

        The value of a group is the mean over its structures that have a value.
        """
        table: pd.DataFrame = self.structures[measure].unstack(sort=False)
        if kind == "structures":
            return table
        return pd.DataFrame({name: table[members].mean(axis=1) for name, members in self.groups.items()})


def scan_names(paths: Sequence[str | Path]) -> list[str]:
    """Short, unambiguous names for files: without folder and extension, unless two files would get the same name.

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
    """Group structures whose names differ only in a leading "left" or "right".

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
            reason = f"{unknown} are not measured" if unknown else "it is empty"
            raise ValueError(f"group '{name}' cannot be used: {reason}. Choose from {list(structures)}.")


def tabulate(
    paths: Sequence[tuple[str, str]],
    measures: Mapping[str, NDArray[np.floating[Any]]],
    structures: Sequence[str],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Evaluation:
    """Arrange the measures of all pairs in tables, sorted by the names of the pairs.

    Args:
        paths: paths of the moving and the fixed scan of each pair.
        measures: values of each measure, by name: ``(pairs, structures)`` or ``(pairs,)``.
        structures: names of the structures, in the order of the columns of ``measures``.
        groups: names of the structures in each group, by name of the group.

    Raises:
        ValueError: a measure has another shape, or a group is empty or names unknown structures.
    """
    _check_groups(groups or {}, structures)
    by_shape: dict[tuple[int, ...], dict[str, NDArray[np.floating[Any]]]] = {
        (len(paths), len(structures)): {},
        (len(paths),): {},
    }
    for measure, values in measures.items():
        if values.shape not in by_shape:
            raise ValueError(
                f"measure '{measure}' has shape {values.shape}, which does not fit {len(paths)} pairs and "
                f"{len(structures)} structures. Give one of {list(by_shape)}."
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
    """Table of mean, median, standard deviations and number of values, with a row for each ``(measure, over)``.

    ``mean``, ``sd_over_pairs`` and ``median`` describe one value per pair. For measures of structures this value is the
    mean over the structures of the pair (if ``over`` is ``structures``) or over its groups (``groups``), without NaN.
    ``sd_over_all`` is the standard deviation of all values, over pairs and structures (or groups): the "±" of many
    tables in the literature, which is about four times as large. Standard deviations divide by n - 1.
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
    """Raise FileExistsError or ValueError if :func:`save_evaluation` must not write to ``folder``."""
    require_replaceable(folder, overwrite, "an evaluation", [*_FILES, "*.png", "index.html"])


def compare_affine(evaluation: Evaluation, published: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Compare the mean Dice before the registration with the published Dice of the affine alignment.

    If they differ, the scans, labels or alignment are not those of the publication.

    Args:
        evaluation: the measures, with ``dice_before``.
        published: published mean over ``structures``, over ``groups``, or both.

    Returns:
        For each key of ``published``, a dict with ``published`` and ``measured``.
    """
    means = summarise(evaluation)["mean"]
    return {
        over: {"published": value, "measured": float(means["dice" + BEFORE, over])} for over, value in published.items()
    }


def save_evaluation(
    folder: str | Path, evaluation: Evaluation, settings: Mapping[str, object], overwrite: bool = False
) -> None:
    """Write ``structures.csv``, ``pairs.csv``, ``summary.json`` and box plots ``MEASURE.png``; all files or none.

    Args:
        folder: new folder, or the folder of an earlier evaluation, which ``overwrite`` replaces completely.
        evaluation: the measures.
        settings: settings to record in ``summary.json``.
        overwrite: replace an existing folder.
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
    """Read the tables that :func:`save_evaluation` wrote; ``folder`` may also be the folder of the training.

    Raises:
        FileNotFoundError: the folder holds no evaluation.
        ValueError: the tables cannot be read.
    """
    source = next((path for path in (Path(folder), Path(folder) / "evaluation") if (path / _FILES[-1]).is_file()), None)
    if source is None:
        raise FileNotFoundError(
            f"{folder} holds no evaluation ({', '.join(_FILES)}). Run the evaluation first, or give its folder."
        )
    try:
        names = dict.fromkeys([*_PAIR, "structure"], str)  # 0012 and NA are names, not values
        options: dict[str, Any] = {"dtype": names, "keep_default_na": False, "na_values": [""]}
        structures, pairs = (pd.read_csv(source / name, **options) for name in _FILES[:2])
        summary = json.loads((source / _FILES[-1]).read_text(encoding="utf-8"))
        tables = structures.set_index([*_PAIR, "structure"]), pairs.set_index(_PAIR)
        for name, table in zip(_FILES, tables, strict=False):
            for column in table.select_dtypes(exclude="number"):
                raise ValueError(f"the column {column} of {name} holds text instead of numbers")
        groups = summary["groups"]
        if not isinstance(groups, dict) or not all(isinstance(members, list) for members in groups.values()):
            raise ValueError(f"the groups in {_FILES[-1]} are {groups} instead of lists of structures by name")
        return Evaluation(*tables, groups, dict(summary.get("settings", {})))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the evaluation in {source} cannot be read: {error}. Run it again.") from error
