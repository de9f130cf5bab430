"""Write a page with a row for each of many results, to find outliers and to accept or reject results."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.pages.render import render

__all__ = [
    "INDEX",
    "Box",
    "BoxPlot",
    "Entry",
    "Index",
    "Kind",
    "Measure",
    "address",
    "flag_outliers",
    "number",
    "thumbnail_of",
    "without_paths",
    "write_index",
]

INDEX = "index.html"
_MARK = "voxelmorph_monai-index"
_THUMBNAILS = "thumbnails"
_ROOT = r"(?<![\w.])(?:~?/|[A-Za-z]:[\\/]|\\\\)"
_FILE = r"\.(?:nii|mgz|mgh|nrrd|nhdr|mha|mhd|img|hdr|dcm|ima|h5|mat|pt|csv|txt|json|ya?ml)(?:\.gz)?(?!\w)"
_PATH = re.compile(
    rf"{_ROOT}(?:(?:(?! /)[^'\",;:\n])*?{_FILE}|[^\s'\",;:]+)"
)  # folders of a file may have spaces in their names
_FEWEST = 5  # smallest number of rows in which outliers can be found
_ODD = 3.5  # robust z-score (Iglewicz and Hoaglin, How to detect and handle outliers, 1993)


class Measure(NamedTuple):
    """A column of numbers.

    Attributes:
        key: key of its values in an entry.
        name: name to show.
        digits: number of decimals to show.
        suspect: outliers to flag: ``"low"``, ``"high"``, ``"both"``, or ``""`` for none.
    """

    key: str
    name: str
    digits: int
    suspect: str = ""


class Kind(NamedTuple):
    """Words for the rows of an index.

    Attributes:
        title: title of the page.
        one: name of a row, such as ``"pair"``.
        many: plural of this name.
        picture: content of a thumbnail.
        none: sentence to show if there are no rows.
    """

    title: str
    one: str
    many: str
    picture: str
    none: str


@dataclass
class Entry:
    """One result: a row of the index.

    Attributes:
        name: folder of the result, relative to the index, or its name in a list.
        failed: reason why there is no result; empty if there is one.
        values: values by key of the measure; None if a value is missing.
        warnings: warnings of the checks of the result itself.
        odd: measures in which the result is an outlier, in words.
        page: address of its report, relative to the index; empty if there is none.
        picture: address of its picture, relative to the index; empty if there is none.
        thumbnail: address of its thumbnail, relative to the index; empty if there is none.
    """

    name: str
    failed: str = ""
    values: dict[str, float | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    page: str = ""
    picture: str = ""
    thumbnail: str = ""


class Box(NamedTuple):
    """A box of a box plot; its whiskers end at the last values within 1.5 times the interquartile range.

    Attributes:
        low: end of the lower whisker.
        first: first quartile.
        median: median.
        third: third quartile.
        high: end of the upper whisker.
        number: number of values.
        beyond: index of each entry beyond the whiskers, and its value.
    """

    low: float
    first: float
    median: float
    third: float
    high: float
    number: int
    beyond: list[tuple[int, float]]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Box | None":
        """Make a box from the values of all entries, in their order; None if there are no values."""
        known = [(i, value) for i, value in enumerate(values) if value is not None]
        if not known:
            return None
        first, median, third = (float(q) for q in np.percentile([value for _, value in known], (25, 50, 75)))
        reach = 1.5 * (third - first)
        inner = [value for _, value in known if first - reach <= value <= third + reach]
        beyond = [(i, value) for i, value in known if not first - reach <= value <= third + reach]
        return cls(min(inner), first, median, third, max(inner), len(known), beyond)


class BoxPlot(NamedTuple):
    """Box plot of one measure.

    Attributes:
        name: name of the measure.
        digits: number of decimals to show.
        stages: names of the boxes in a row, such as ``("before", "after")``.
        rows: name of each structure, and a box for each stage.
    """

    name: str
    digits: int
    stages: tuple[str, ...]
    rows: list[tuple[str, list[Box | None]]]


class Index(NamedTuple):
    """Content of an index page.

    Attributes:
        kind: words for the rows.
        measures: columns.
        entries: rows.
        plots: box plots to show above the rows.
    """

    kind: Kind
    measures: Sequence[Measure]
    entries: list[Entry]
    plots: Sequence[BoxPlot] = ()


def number(value: object) -> float | None:
    """Convert a number or the text of a number to a finite float; None for anything else."""
    try:
        found = float(value)  # type: ignore[arg-type] # other types raise an error
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and not isinstance(value, bool) else None


def address(path: Path, folder: Path) -> str:
    """Address of a file, relative to a page in ``folder``."""
    return quote(path.relative_to(folder).as_posix())


def thumbnail_of(name: str, folder: Path) -> Path:
    """Path of the thumbnail of an entry. It is a hash, so that no name can lead out of the folder."""
    return folder / _THUMBNAILS / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.jpg"


def without_paths(text: str, names: Mapping[str, str]) -> str:
    """Remove paths, which often contain names of people, from a sentence that others may see.

    Args:
        text: the sentence, for example the reason of a failure.
        names: replacements of known paths; other paths become ``FILE``.

    >>> without_paths("/data/doe/t1.nii.gz and /tmp/x.nii differ", {"/data/doe/t1.nii.gz": "MOVING"})
    'MOVING and FILE differ'
    >>> without_paths("/data/Jane Doe/t1_labels.nii.gz has no labels", {})
    'FILE has no labels'
    """
    for path in sorted(filter(None, names), key=len, reverse=True):
        text = text.replace(path, names[path])
    return _PATH.sub("FILE", text)


def flag_outliers(entries: Sequence[Entry], measures: Sequence[Measure], many: str) -> None:
    """Flag outliers among at least five entries by robust z-scores: adds a note to ``odd`` of the entry.

    The score is the distance from the median in units of 1.4826 median absolute deviations or, if more than half of the
    values are equal, of 1.2533 mean absolute deviations. Only outliers on a suspect side are flagged.

    Args:
        entries: rows, which are changed.
        measures: columns.
        many: name of the rows in the plural.
    """
    for measure in measures:
        known = [(entry, value) for entry in entries if (value := entry.values.get(measure.key)) is not None]
        if not measure.suspect or len(known) < _FEWEST:
            continue
        values = np.array([value for _, value in known])
        middle = np.median(values)
        unit = 1.4826 * np.median(np.abs(values - middle)) or 1.2533 * np.mean(np.abs(values - middle))
        low, high = (f"{value:.{measure.digits}f}" for value in np.percentile(values, (25, 75)))
        for entry, value in known:
            side = "low" if value < middle else "high"
            if abs(value - middle) > _ODD * unit > 0 and measure.suspect in (side, "both"):
                entry.odd.append(f"{measure.name} {value:.{measure.digits}f}: half of the {many} have {low} to {high}")


def write_index(folder: Path, index: Index) -> None:
    """Write ``index.html`` into a folder.

    Raises:
        FileExistsError: there is an ``index.html`` that this function did not write.
    """
    path = folder / INDEX
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise FileExistsError(f"{path} already exists and is not an index of vxm. Move it away.")
    names = "\n".join(sorted(entry.name for entry in index.entries))
    rows = [
        {
            "name": entry.name,
            "failed": without_paths(entry.failed, {str(folder): "DIR"}),
            "values": [entry.values.get(measure.key) for measure in index.measures],
            "notes": [*entry.warnings, *entry.odd],
            "page": entry.page,
            "picture": entry.picture,
            "thumbnail": entry.thumbnail,
        }
        for entry in index.entries
    ]
    data = {
        "cohort": hashlib.sha256(names.encode()).hexdigest()[:16],
        "one": index.kind.one,
        "many": index.kind.many,
        "first": max(range(len(index.measures)), key=lambda i: index.measures[i].suspect != ""),
        "measures": [{"name": measure.name, "digits": measure.digits} for measure in index.measures],
        "rows": rows,
        "plots": [
            {**plot._asdict(), "rows": [(name, [box and box._asdict() for box in boxes]) for name, boxes in plot.rows]}
            for plot in index.plots
        ],
    }
    shown = {"kind": index.kind, "measures": index.measures, "plots": index.plots, "data": data}
    page = render("cohort", "'self' file: data:", mark=_MARK, total=len(rows), **shown)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
