"""Read damaged files in a process of its own: what each of them ends in, a line of JSON for a file.

    python -m tests.campaign FILE [FILE ...]

A parser may crash the process, hang, or fill the memory. Whoever starts this module sees which file it was at.
"""

import json
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel import imageglobals

from voxelmorph_monai.apps import cohort
from voxelmorph_monai.data import check_scans, load_scans
from voxelmorph_monai.io.tables import read_table
from voxelmorph_monai.maps.chains import map_points
from voxelmorph_monai.maps.files import read_transform
from voxelmorph_monai.maps.points import read_points
from voxelmorph_monai.model_card import read_card
from voxelmorph_monai.space.scan import Scan

__all__ = ["EXPECTED", "PARSERS", "Outcome", "damaged"]

EXPECTED = (ValueError, TypeError, OSError, MemoryError)
"""What the command line reports in one line; anything else ends in a traceback."""


class Outcome(NamedTuple):
    """What a file ended in.

    Attributes:
        file: the file.
        error: type of the exception, or None where the file was read.
        message: of the exception.
        memory: by how much the peak of the process's memory rose, in bytes.
    """

    file: str
    error: str | None
    message: str
    memory: int


def _transform(path: Path) -> None:
    transform = read_transform(path)
    dims = int(transform.GetInputSpaceDimension())
    map_points(transform, np.zeros((1, dims)))


def _datalist(path: Path) -> None:
    scans = load_scans(str(path.parent), "training")
    check_scans(scans)


PARSERS: dict[str, Callable[[Path], Any]] = {
    "scan": Scan.read,
    "labels": Scan.read_labels,
    "transform": _transform,
    "points": lambda path: read_points(path, "RAS" if path.suffix == ".csv" else None),
    "table": lambda path: read_table(path, "a table"),
    "pairs": lambda path: cohort._read_list(path, Path("/elsewhere")),
    "datalist": _datalist,
    "card": lambda path: read_card(path.with_suffix(".pt")),
}
"""What reads a file, by the beginning of the name of its folder."""

_EXTREME = (b"nan", b"1e999", b"-1", b"0", b"99999999999", b"", b"1e-320", b"\xff\xfe", b"\xc3\xa9", b"0x10", b"1,5")
_NUMBERS = (0, -1, 1, 2**15 - 1, -(2**15), 2**31 - 1, -(2**31))


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """``content`` with one to three faults of the kinds that transfers, editors and programs make."""
    for _ in range(random.integers(1, 4)):
        if not content:
            return content
        content = _FAULTS[random.integers(len(_FAULTS))](content, random)
    return content


def _flip(content: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in random.integers(min(len(changed), 2000), size=random.integers(1, 5)):
        changed[place] ^= 1 << int(random.integers(8))
    return bytes(changed)


def _cut(content: bytes, random: np.random.Generator) -> bytes:
    return content[: random.integers(len(content))]


def _repeat(content: bytes, random: np.random.Generator) -> bytes:
    start, length = random.integers(len(content)), random.integers(1, 200)
    return content[: start + length] + content[start:]


def _drop(content: bytes, random: np.random.Generator) -> bytes:
    start = random.integers(len(content))
    return content[:start] + content[start + random.integers(1, 200) :]


def _replace_word(content: bytes, random: np.random.Generator) -> bytes:
    words = content.split(b" ")
    words[random.integers(len(words))] = _EXTREME[random.integers(len(_EXTREME))]
    return b" ".join(words)


def _swap_lines(content: bytes, random: np.random.Generator) -> bytes:
    lines = content.split(b"\n")
    first, second = random.integers(len(lines), size=2)
    lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


def _replace_number(content: bytes, random: np.random.Generator) -> bytes:
    """A binary header's field, of 2, 4 or 8 bytes, becomes an extreme number."""
    kind = ("<i2", "<i4", "<f4", "<f8", "<i8")[random.integers(5)]
    place = 2 * int(random.integers(max(1, min(len(content), 700) // 2)))
    value = float(random.choice([np.nan, np.inf, -1e30])) if kind[1] == "f" else int(random.choice(_NUMBERS))
    word = np.array(value).astype(kind) if kind[1] == "f" else np.array(np.clip(value, *_limits(kind)), kind)
    return content[:place] + word.tobytes() + content[place + word.nbytes :]


def _limits(kind: str) -> tuple[int, int]:
    return np.iinfo(kind).min, np.iinfo(kind).max


_FAULTS = (_flip, _cut, _repeat, _drop, _replace_word, _swap_lines, _replace_number)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outcomes(files: Sequence[str]) -> Iterator[Outcome]:
    """Read each file with the parser that its folder is named after."""
    for file in files:
        before, error, message = _peak(), None, ""
        try:
            PARSERS[Path(file).parent.name.split("-")[0]](Path(file))
        except Exception as caught:
            error, message = type(caught).__name__, str(caught)
            if not isinstance(caught, EXPECTED):
                error = f"unexpected {error}"
        yield Outcome(file, error, message, _peak() - before)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    imageglobals.logger.disabled = True
    for outcome in outcomes(sys.argv[1:]):
        print(json.dumps(outcome._asdict()), flush=True)
