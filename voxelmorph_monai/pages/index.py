"""A page with a row for each of many results: what is unlike the others, and what people decide about them."""

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
_FEWEST = 5  # rows that say what is usual
_ODD = 3.5  # robust z-score (Iglewicz and Hoaglin, How to detect and handle outliers, 1993)


class Measure(NamedTuple):
    """A column of numbers.

    Attributes:
        key: key of its values in an entry.
        name: name to show.
        digits: number of decimals to show.
        suspect: which values far from the others are a reason to look: ``"low"``, ``"high"``, ``"both"`` or ``""``.
    """

    key: str
    name: str
    digits: int
    suspect: str = ""


class Kind(NamedTuple):
    """What the rows of an index are.

    Attributes:
        title: of the page.
        one: what a row is.
        many: what rows are.
        picture: what a thumbnail shows.
        none: what to say if there are no rows.
    """

    title: str
    one: str
    many: str
    picture: str
    none: str


@dataclass
class Entry:
    """A result.

    Attributes:
        name: its folder within the index's, or its name in a list.
        failed: why there is no result; empty if there is one.
        values: by the key of the measure; None where there is none.
        warnings: what its own checks found.
        odd: how it differs from the others.
        page: address of its page, relative to the index; empty if there is none.
        picture: address of its picture.
        thumbnail: address of its thumbnail.
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
    """Quartiles of some values; whiskers end at the last values within 1.5 times their distance.

    Attributes:
        low: end of the lower whisker.
        first: first quartile.
        median: of the values.
        third: third quartile.
        high: end of the upper whisker.
        number: of values.
        beyond: entries, counted from 0, with their values beyond the whiskers.
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
        """Box of the values of all entries, in their order; None if there are none."""
        known = [(i, value) for i, value in enumerate(values) if value is not None]
        if not known:
            return None
        first, median, third = (float(q) for q in np.percentile([value for _, value in known], (25, 50, 75)))
        reach = 1.5 * (third - first)
        inner = [value for _, value in known if first - reach <= value <= third + reach]
        beyond = [(i, value) for i, value in known if not first - reach <= value <= third + reach]
        return cls(min(inner), first, median, third, max(inner), len(known), beyond)


class BoxPlot(NamedTuple):
    """Boxes of one measure.

    Attributes:
        name: of the measure.
        digits: after the point.
        stages: what the boxes of a row are, as ``("before", "after")``.
        rows: name of a structure, and a box for each stage.
    """

    name: str
    digits: int
    stages: tuple[str, ...]
    rows: list[tuple[str, list[Box | None]]]


class Index(NamedTuple):
    """All that an index shows.

    Attributes:
        kind: what its rows are.
        measures: the columns.
        entries: the rows.
        plots: boxes to show above them.
    """

    kind: Kind
    measures: Sequence[Measure]
    entries: list[Entry]
    plots: Sequence[BoxPlot] = ()


def number(value: object) -> float | None:
    """A finite number, also one of a table; None if it is none."""
    try:
        found = float(value)  # type: ignore[arg-type] # what is none raises an error
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and not isinstance(value, bool) else None


def address(path: Path, folder: Path) -> str:
    """Address of a file, relative to a page in ``folder``."""
    return quote(path.relative_to(folder).as_posix())


def thumbnail_of(name: str, folder: Path) -> Path:
    """Where the thumbnail of an entry lies. No name can lead out of the folder, or collide with another."""
    return folder / _THUMBNAILS / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.jpg"


def without_paths(text: str, names: Mapping[str, str]) -> str:
    """A sentence as it may be shown to others: without paths, which often hold names of people.

    Args:
        text: the sentence, say the reason of a failure.
        names: what to write for paths that are known.

    >>> without_paths("/data/doe/t1.nii.gz and /tmp/x.nii differ", {"/data/doe/t1.nii.gz": "MOVING"})
    'MOVING and FILE differ'
    >>> without_paths("/data/Jane Doe/t1_labels.nii.gz has no labels", {})
    'FILE has no labels'
    """
    for path in sorted(filter(None, names), key=len, reverse=True):
        text = text.replace(path, names[path])
    return _PATH.sub("FILE", text)


def flag_outliers(entries: Sequence[Entry], measures: Sequence[Measure], many: str) -> None:
    """Note for each entry in which measures it is unlike the others, by robust z-scores of at least five entries.

    The score is the distance to the median in units of 1.4826 median absolute deviations; where more than half of the
    values are equal, in units of 1.2533 mean absolute deviations. Only deviations to a suspect side count.

    Args:
        entries: the rows, which are changed.
        measures: the columns.
        many: what rows are called.
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
