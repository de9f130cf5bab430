"""Tables in CSV files."""

import csv
from pathlib import Path

__all__ = ["read_table"]


def read_table(path: Path, what: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Read a CSV file: its columns (none if it is empty), and number and cells of each line that is not empty.

    Args:
        path: file to read.
        what: what the file should hold, for the error if it does not exist.

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
    return (rows[0][1] if rows else []), rows[1:]
