"""Write the index of a folder of registrations, segmentations, prepared scans or an evaluation: ``vxm report``."""

import base64
import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.pages.evaluations import find_evaluation, holds_evaluation
from voxelmorph_monai.pages.index import (
    Entry,
    Index,
    Kind,
    Measure,
    address,
    flag_outliers,
    number,
    thumbnail_of,
    without_paths,
    write_index,
)
from voxelmorph_monai.pages.scans import find_prepared, find_segmentations, holds_prepared, holds_segmentations

__all__ = ["find_entries", "save_index"]

_SUMMARY, _PAGE, _PICTURE = "*summary.json", "*report.html", "*report.png"
_DEPTH = 3  # largest number of folder levels below the folder of the cohort
_HEAD = 2**16  # bytes at the start of a page that contain its icon
_ICON = re.compile(r'<link rel="icon" type="image/jpeg" href="data:image/jpeg;base64,([A-Za-z0-9+/=]+)">')

_KIND = Kind(
    "Registrations",
    "pair",
    "pairs",
    "fixed and warped",
    "There are no registrations in this folder: no folder in it holds a summary.json.",
)
_MEASURES = (
    Measure("dice_before", "Dice before", 3),
    Measure("dice_after", "Dice after", 3, "low"),
    Measure("correlation_before", "correlation before", 3),
    Measure("correlation_after", "correlation after", 3, "low"),
    Measure("folding_percent", "folds, %", 4, "high"),
    Measure("sdlogj", "SDlogJ", 3, "high"),
    Measure("inverse_consistency_mm", "inverse error, mm", 2, "high"),
    Measure("seconds", "time, s", 1),
)


def _values(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Measures in a summary, by key."""
    found = dict(summary)
    for stage in ("before", "after"):
        dice = summary.get("dice")
        found[f"dice_{stage}"] = dice[stage].get("mean") if isinstance(dice, dict) and stage in dice else None
    seconds = summary.get("seconds")
    if isinstance(seconds, dict):
        found["seconds"] = sum(value for value in map(number, seconds.values()) if value is not None)
    return {measure.key: number(found.get(measure.key)) for measure in _MEASURES}


def _first(folder: Path, pattern: str) -> Path | None:
    return min(folder.glob(pattern), default=None)


def _summaries(folder: Path) -> Iterator[Path]:
    """Find the summaries of registrations in subfolders, ordered by depth and name."""
    for depth in range(1, _DEPTH + 1):
        for path in sorted(folder.glob("*/" * depth + _SUMMARY)):
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                yield path


def _entry(path: Path, folder: Path) -> Entry:
    """Make an entry from one summary and the files beside it."""
    entry = Entry(path.parent.relative_to(folder).as_posix())
    page, picture = _first(path.parent, _PAGE), _first(path.parent, _PICTURE)
    entry.page = "" if page is None else address(page, folder)
    entry.picture = "" if picture is None else address(picture, folder)
    entry.thumbnail = "" if page is None else _thumbnail(page, entry.name, folder)
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or "folding_percent" not in summary:
            raise ValueError("it is not the summary of a registration")
    except (OSError, ValueError) as error:
        entry.failed = f"{path.name} cannot be used: {error}"
        return entry
    entry.values = _values(summary)
    entry.warnings = [str(each["text"]) for each in summary.get("warnings", [])]
    return entry


def _thumbnail(page: Path, name: str, folder: Path) -> str:
    """Save the icon of a page as a thumbnail, unless there is a newer one; returns its address, or an empty text."""
    target = thumbnail_of(name, folder)
    if not target.exists() or target.stat().st_mtime < page.stat().st_mtime:
        with page.open("rb") as file:
            match = _ICON.search(file.read(_HEAD).decode("utf-8", "replace"))
        if match is None:
            return ""
        target.parent.mkdir(exist_ok=True)
        with atomic(target) as temporary:
            temporary.write_bytes(base64.b64decode(match[1]))
    return address(target, folder)


def _listed(folder: Path) -> dict[str, str]:
    """Names in the table of a cohort, if there is one, with the reason why a pair has no result (empty if it has)."""
    table = folder / "cohort.csv"
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("name")]
    reasons = {}
    for row in rows:
        reason = "" if row.get("status") == "done" else row.get("reason") or f"it is {row.get('status')}"
        reasons[row["name"]] = without_paths(
            reason, {row.get(role) or "": role.upper() for role in ("moving", "fixed")}
        )
    return reasons


def _find_registrations(folder: Path) -> Index:
    """Find the registrations listed in ``cohort.csv``, and all folders with a summary."""
    entries = {entry.name: entry for entry in (_entry(path, folder) for path in _summaries(folder))}
    for name, reason in _listed(folder).items():
        if reason:  # a result in its folder is from an earlier call
            entries[name] = Entry(name, failed=reason)
        elif name not in entries:
            entries[name] = Entry(name, failed="its folder has no summary")
    return Index(_KIND, _MEASURES, [*entries.values()])


def find_entries(folder: Path) -> Index:
    """Find the results in a folder and flag outliers among them; failed ones come first.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a table in it cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    if holds_evaluation(folder):
        index = find_evaluation(folder)
    elif holds_prepared(folder):
        index = find_prepared(folder)
    elif holds_segmentations(folder):
        index = find_segmentations(folder)
    else:
        index = _find_registrations(folder)
    flag_outliers(index.entries, index.measures, index.kind.many)
    return index._replace(entries=sorted(index.entries, key=lambda entry: (entry.failed == "", entry.name)))


def save_index(folder: str | Path) -> Index:
    """Write ``index.html``, and ``thumbnails/`` if there are pictures, into a folder; returns the content of the index.

    Raises:
        FileNotFoundError: the folder does not exist.
        FileExistsError: there is an ``index.html`` that this function did not write.
        ValueError: a table in the folder cannot be read.
    """
    index = find_entries(Path(folder))
    write_index(Path(folder), index)
    return index
