"""Read and write points in mm: CSV tables and markups of 3D Slicer.

Everything else in a file, such as labels and visibility, is copied to the file with the moved points.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import points_to_lps
from voxelmorph_monai.io.atomic import atomic

__all__ = ["COORDINATES", "PointFile", "read_points", "save_points"]

COORDINATES = ("RAS", "LPS")
_MADE_OF_POINTS = ("Fiducial", "Line", "Angle", "Curve", "ClosedCurve")
_FCSV_SYSTEMS = {"RAS": "RAS", "LPS": "LPS", "0": "RAS", "1": "LPS"}  # older versions write a number
_Points = NDArray[np.float64]
_Text = Callable[[_Points], str]
_Rows = list[tuple[int, list[str]]]  # number of the line, and its cells
_Parsed = tuple[str | None, list[list[float]], _Text]  # the file's system (None: not stated), coordinates, writer


class PointFile(NamedTuple):
    """Points of a file, and a function that returns the text of the same file with other points.

    Attributes:
        points: ``(N, 3)`` in RAS, mm, converted from the coordinate system of the file.
        text: function of other points ``(N, 3)`` in RAS, mm, in the same order; returns the text of the file with them.
    """

    points: _Points
    text: _Text


def _numbers(cells: Any, subject: str) -> list[float]:
    try:
        numbers = [float(cell) for cell in cells] if isinstance(cells, list) else []
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != 3 or not np.isfinite(numbers).all():
        raise ValueError(f"{subject} does not have three finite coordinates: {cells}.")
    return numbers


def _rows(path: Path, text: str) -> _Rows:
    """Rows that are not empty, each with the number of its last line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(
            f"{path} is not a table of points: line {reader.line_num} cannot be read ({error})."
        ) from error


def _csv_text(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _table(path: Path, rows: _Rows, columns: Sequence[str]) -> tuple[list[list[float]], _Text]:
    """Coordinates in the columns x, y and z of ``rows``, and a function that writes the rows with other ones."""
    names = [name.strip().lower() for name in columns]
    if not {"x", "y", "z"} <= set(names):
        raise ValueError(f"{path} has no columns named x, y and z: its columns are {', '.join(columns) or 'missing'}.")
    at = [names.index(axis) for axis in "xyz"]
    numbers = [_numbers([row[i] for i in at if i < len(row)], f"{path}, line {line},") for line, row in rows]

    def text(points: _Points) -> str:
        moved = [list(row) for _, row in rows]
        for row, point in zip(moved, points.tolist(), strict=True):
            for i, number in zip(at, point, strict=True):
                row[i] = f"{number + 0.0:.6f}"  # to a nanometre; no -0
        return _csv_text(moved)

    return numbers, text


def _read_csv(path: Path, content: str) -> _Parsed:
    (_, head), *rows = _rows(path, content) or [(1, [])]
    numbers, text = _table(path, rows, head)
    return None, numbers, lambda points: _csv_text([head]) + text(points)


def _read_fcsv(path: Path, content: str) -> _Parsed:
    comments = [line for line in content.splitlines() if line.startswith("#")]
    pairs = [line[1:].split("=", 1) for line in comments if "=" in line]
    header = {key.strip(): value.strip() for key, value in pairs}
    system = header.get("CoordinateSystem")
    if system not in _FCSV_SYSTEMS:
        raise ValueError(f"{path} has the CoordinateSystem {system} in its comments, but it must be RAS or LPS.")
    lines = content.splitlines(keepends=True)
    rows = _rows(path, "".join("\n" if line.startswith("#") else line for line in lines))
    numbers, text = _table(path, rows, header.get("columns", "id,x,y,z").split(","))
    top = "".join(f"{line}\n" for line in comments)
    return _FCSV_SYSTEMS[system], numbers, lambda points: top + text(points)


def _system_of(path: Path, markups: Sequence[dict[str, Any]]) -> str:
    kinds = {str(markup.get("type")) for markup in markups}
    if not kinds <= set(_MADE_OF_POINTS):
        known, others = ", ".join(_MADE_OF_POINTS), ", ".join(sorted(kinds - set(_MADE_OF_POINTS)))
        raise ValueError(f"{path} holds a markup of type {others}. Only markups of these types can be read: {known}.")
    systems = {str(markup.get("coordinateSystem")) for markup in markups}
    if len(systems) != 1 or not systems <= set(COORDINATES):
        raise ValueError(
            f"{path} has the coordinateSystem {sorted(systems)}, but it must be RAS or LPS for all markups."
        )
    units = [markup.get("coordinateUnits") for markup in markups]
    if any(unit not in (None, "mm", ["mm"] * 3) for unit in units):
        raise ValueError(f"{path} is not in mm: its coordinateUnits are {units}.")
    return systems.pop()


def _read_markups(path: Path, content: str) -> _Parsed:
    try:
        document = json.loads(content)
        markups = document["markups"]
        points = [point for markup in markups for point in markup.get("controlPoints", [])]
        placed = [point for point in points if point.get("position") is not None]  # others are still to be placed
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or not a markups file of 3D Slicer: {error!r}.") from error
    system = _system_of(path, markups)
    numbers = [_numbers(point["position"], f"{path}, point {i},") for i, point in enumerate(placed, 1)]

    def text(points: _Points) -> str:
        for each, point in zip(placed, points.tolist(), strict=True):
            each["position"] = [round(number, 6) + 0.0 for number in point]
        for markup in markups:
            markup.pop("measurements", None)  # old lengths and angles; Slicer measures again
        return json.dumps(document, indent=4, ensure_ascii=False) + "\n"

    return system, numbers, text


_READERS: dict[str, Callable[[Path, str], _Parsed]] = {
    ".fcsv": _read_fcsv,
    ".csv": _read_csv,
    ".mrk.json": _read_markups,
}


def _ending(path: Path) -> str:
    for ending in _READERS:
        if path.name.endswith(ending):
            return ending
    raise ValueError(f"{path} is not a file of points: its name does not end in {', '.join(_READERS)}.")


def read_points(path: str | Path, coordinates: str | None = None) -> PointFile:
    """Read points from a CSV table with columns x, y and z, or from 3D Slicer's ``.fcsv`` or ``.mrk.json``.

    Args:
        path: file to read.
        coordinates: coordinate system of a CSV file, ``"RAS"`` or ``"LPS"``; the other formats state it themselves.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, holds no points, lacks coordinates, or does not state its coordinate system.
    """
    path = Path(path)
    ending = _ending(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        content = path.read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
        declared, numbers, text = _READERS[ending](path, content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error
    if declared is None and coordinates not in COORDINATES:
        raise ValueError(
            f"{path} does not state whether it is in RAS or LPS. Give its coordinate system (--coordinates)."
        )
    if coordinates not in (None, declared or coordinates):
        raise ValueError(f"{path} states that it is in {declared}, which contradicts --coordinates {coordinates}.")
    if not numbers:
        raise ValueError(f"{path} holds no points.")
    points = np.array(numbers)
    if (declared or coordinates) == "RAS":
        return PointFile(points, text)
    return PointFile(points_to_lps(points), lambda moved: text(points_to_lps(moved)))


def save_points(path: str | Path, source: PointFile, points: NDArray[np.floating[Any]]) -> None:
    """Write the file ``source`` with other ``points`` ``(N, 3)`` (RAS, mm), completely or not at all."""
    text = source.text(np.asarray(points, dtype=np.float64))
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
