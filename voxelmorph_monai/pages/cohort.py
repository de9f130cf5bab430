"""The index of many registrations: a row for each, outliers, and the decisions of the reader."""

import base64
import csv
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.pages.render import render

__all__ = ["INDEX", "Entry", "Measure", "find_entries", "flag_outliers", "save_index"]

INDEX = "index.html"
_MARK = "voxelmorph_monai-index"
_THUMBNAILS = "thumbnails"
_SUMMARY, _PAGE, _PICTURE = "*summary.json", "*report.html", "*report.png"
_DEPTH = 3  # folders between the cohort's and a registration's, at most
_FEWEST = 5  # pairs that say what is usual
_ODD = 3.5  # robust z-score (Iglewicz and Hoaglin, How to detect and handle outliers, 1993)
_HEAD = 2**16  # bytes of a page in which its icon is
_ICON = re.compile(r'<link rel="icon" type="image/jpeg" href="data:image/jpeg;base64,([A-Za-z0-9+/=]+)">')


class Measure(NamedTuple):
    """A column of numbers.

    Attributes:
        key: its key in a summary; ``dice_before`` and ``dice_after`` are means.
        name: name to show.
        digits: number of decimals to show.
        better: 1 if high values are good, -1 if low ones are, 0 if neither.
    """

    key: str
    name: str
    digits: int
    better: int


MEASURES = (
    Measure("dice_before", "Dice before", 3, 0),
    Measure("dice_after", "Dice after", 3, 1),
    Measure("correlation_before", "correlation before", 3, 0),
    Measure("correlation_after", "correlation after", 3, 1),
    Measure("folding_percent", "folds, %", 4, -1),
    Measure("sdlogj", "SDlogJ", 3, -1),
    Measure("inverse_consistency_mm", "inverse error, mm", 2, -1),
    Measure("seconds", "time, s", 1, 0),
)


@dataclass
class Entry:
    """A registration.

    Attributes:
        name: its folder within the cohort's, or its name in the list.
        failed: why there is no result; empty if there is one.
        values: values by the key of the measure; None if there is none.
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


def _value(value: object) -> float | None:
    """A finite number, or None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None  # type: ignore[arg-type] # it is a number


def _values(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The measures of a summary."""
    found = dict(summary)
    for stage in ("before", "after"):
        dice = summary.get("dice")
        found[f"dice_{stage}"] = dice[stage].get("mean") if isinstance(dice, dict) and stage in dice else None
    seconds = summary.get("seconds")
    if isinstance(seconds, dict):
        found["seconds"] = sum(value for value in map(_value, seconds.values()) if value is not None)
    return {measure.key: _value(found.get(measure.key)) for measure in MEASURES}


def _address(path: Path, folder: Path) -> str:
    return quote(path.relative_to(folder).as_posix())


def _first(folder: Path, pattern: str) -> Path | None:
    return min(folder.glob(pattern), default=None)


def _summaries(folder: Path) -> Iterator[Path]:
    """Summaries of registrations in folders below, in the order of their names."""
    for depth in range(1, _DEPTH + 1):
        for path in sorted(folder.glob("*/" * depth + _SUMMARY)):
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                yield path


def _entry(path: Path, folder: Path) -> Entry:
    """What one summary says. Nothing but the files beside it is read."""
    entry = Entry(path.parent.relative_to(folder).as_posix())
    page, picture = _first(path.parent, _PAGE), _first(path.parent, _PICTURE)
    entry.page = "" if page is None else _address(page, folder)
    entry.picture = "" if picture is None else _address(picture, folder)
    entry.thumbnail = "" if page is None else _thumbnail(page, entry.name, folder)
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or "folding_percent" not in summary:
            raise ValueError("it is not that of a registration")
    except (OSError, ValueError) as error:
        entry.failed = f"{path.name} cannot be used: {error}"
        return entry
    entry.values = _values(summary)
    entry.warnings = [str(each["text"]) for each in summary.get("warnings", [])]
    return entry


def _thumbnail(page: Path, name: str, folder: Path) -> str:
    """Write the icon of a page as a file of its own, unless that is there already; its address."""
    target = folder / _THUMBNAILS / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.jpg"
    if not target.exists() or target.stat().st_mtime < page.stat().st_mtime:
        with page.open("rb") as file:
            match = _ICON.search(file.read(_HEAD).decode("utf-8", "replace"))
        if match is None:
            return ""
        target.parent.mkdir(exist_ok=True)
        with atomic(target) as temporary:
            temporary.write_bytes(base64.b64decode(match[1]))
    return _address(target, folder)


def _listed(folder: Path) -> dict[str, str]:
    """Names in the table of a cohort, if there is one, with the reason of those that have no result."""
    table = folder / "cohort.csv"
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {
            row["name"]: "" if row.get("status") == "done" else row.get("reason") or f"it is {row.get('status')}"
            for row in csv.DictReader(file)
            if row.get("name")
        }


def find_entries(folder: Path) -> list[Entry]:
    """Registrations in ``folder``: what its table ``cohort.csv`` lists, and every folder with a summary.

    Failed ones come first.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    entries = {entry.name: entry for entry in (_entry(path, folder) for path in _summaries(folder))}
    for name, reason in _listed(folder).items():
        if reason:  # what lies there is of an earlier call
            entries[name] = Entry(name, failed=reason)
        elif name not in entries:
            entries[name] = Entry(name, failed="its folder has no summary")
    flag_outliers(list(entries.values()))
    return sorted(entries.values(), key=lambda entry: (not entry.failed, entry.name))


def flag_outliers(entries: Sequence[Entry]) -> None:
    """Note for each entry in which measures it is worse than the others, by robust z-scores of at least five pairs.

    The score is the distance to the median in units of 1.4826 median absolute deviations; where more than half of the
    values are equal, in units of 1.2533 mean absolute deviations. Only deviations to the bad side count.
    """
    for measure in MEASURES:
        known = [(entry, value) for entry in entries if (value := entry.values.get(measure.key)) is not None]
        if not measure.better or len(known) < _FEWEST:
            continue
        values = np.array([value for _, value in known])
        middle = np.median(values)
        unit = 1.4826 * np.median(np.abs(values - middle)) or 1.2533 * np.mean(np.abs(values - middle))
        low, high = (f"{value:.{measure.digits}f}" for value in np.percentile(values, (25, 75)))
        for entry, value in known:
            if unit > 0 and measure.better * (middle - value) > _ODD * unit:
                entry.odd.append(f"{measure.name} {value:.{measure.digits}f}: half of the pairs have {low} to {high}")


def save_index(folder: str | Path) -> list[Entry]:
    """Write ``index.html`` and ``thumbnails`` into a folder of registrations; returns the entries.

    Raises:
        FileNotFoundError: the folder does not exist.
        FileExistsError: there is an ``index.html`` that this function did not write.
    """
    folder = Path(folder)
    path = folder / INDEX
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise FileExistsError(f"{path} already exists and is not an index of registrations. Move it away.")
    entries = find_entries(folder)
    names = "\n".join(sorted(entry.name for entry in entries))
    rows = [
        {
            "name": entry.name,
            "failed": entry.failed,
            "values": [entry.values.get(measure.key) for measure in MEASURES],
            "notes": [*entry.warnings, *entry.odd],
            "page": entry.page,
            "picture": entry.picture,
            "thumbnail": entry.thumbnail,
        }
        for entry in entries
    ]
    data = {
        "cohort": hashlib.sha256(names.encode()).hexdigest()[:16],
        "measures": [{"name": measure.name, "digits": measure.digits} for measure in MEASURES],
        "rows": rows,
    }
    page = render("cohort", "'self' file: data:", mark=_MARK, measures=MEASURES, total=len(entries), data=data)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return entries
