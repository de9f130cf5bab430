"""Read tables from CSV files."""

import csv
from pathlib import Path
from typing import NamedTuple

__all__ = ["Row", "read_table"]


class Row(NamedTuple):
    """A line of a table that is not empty.

    Attributes:
        line: number of the line in the file.
        cells: cells of the line.
        by_column: cells by name of the column, without missing and superfluous ones.
    """

    line: int
    cells: list[str]
    by_column: dict[str, str]


def read_table(path: Path, what: str) -> tuple[list[str], list[Row]]:
    """Read a CSV file: its columns (none if it is empty), and the lines below that are not empty.

    Args:
        path: file to read.
        what: content of the file, such as ``"a list of pairs"``, for the error message if it does not exist.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not CSV in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give {what} in a CSV file.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}. Save it as one.") from error
    columns = rows[0][1] if rows else []
    return columns, [Row(line, cells, dict(zip(columns, cells, strict=False))) for line, cells in rows[1:]]
