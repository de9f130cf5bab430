"""Pages of the documentation that hold what a benchmark measured, between two marks."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["around", "put"]


def around(page: Path, marks: Sequence[str]) -> tuple[str, str]:
    """What stands on ``page`` before and after the block between two ``marks``."""
    text = page.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in marks):
        raise ValueError(f"{page} must hold {marks[0].strip()} and {marks[1].strip()} once each.")
    before, rest = text.split(marks[0])
    return before, rest.split(marks[1])[1]


def put(block: str, page: Path, marks: Sequence[str]) -> None:
    """Replace what stands between the marks of ``page``."""
    before, after = around(page, marks)
    page.write_text(before + marks[0] + "\n" + block + "\n" + marks[1] + after, encoding="utf-8")
