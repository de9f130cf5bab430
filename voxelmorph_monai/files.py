"""Files and folders that appear whole or not at all, JSON, and what may be replaced."""

import csv
import glob
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

__all__ = [
    "atomic",
    "atomic_folder",
    "read_table",
    "require_new",
    "require_replaceable",
    "scan_files",
    "stamp",
    "sweep",
    "write_json",
]

_DETACHED = re.compile(r"^(?:ElementDataFile *=|data ?file:)(?! *LOCAL)(.*)", re.DOTALL | re.IGNORECASE | re.MULTILINE)


def _mark() -> str:
    """Beginning of a temporary name that nobody else uses: in a container every process may have the number 1."""
    return f".{os.getpid()}-{secrets.token_hex(4)}."


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give the name of a temporary file in the folder of ``path`` to write; it takes the place of ``path`` at the end.

    Nobody ever sees half a file: after an error the temporary file is gone and ``path`` is what it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic(f"{folder}/notes.txt") as temporary:
    ...         number_of_characters = temporary.write_text("whole")
    ...     os.listdir(folder)
    ['notes.txt']
    """
    path = Path(path)
    temporary = path.with_name(_mark() + path.name)  # the ending stays: writers choose the format by it
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` to fill; it takes the place of ``path``, and of all in it, at the end.

    Nobody ever sees half of it: after an error the temporary folder is gone and ``path`` is what it was.
    """
    path = Path(path).resolve()  # the folder that a link leads to is replaced, not the link
    temporary = path.with_name(_mark() + path.name)
    former = temporary.with_name(f"{temporary.name}.former")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.replace(path, former)
        os.replace(temporary, path)
    finally:
        if former.exists() and not path.exists():
            os.replace(former, path)
        for leftover in (temporary, former):
            _remove(leftover)


def require_new(path: str | Path, overwrite: bool | None = None) -> None:
    """Raise FileExistsError where ``path`` exists, unless it may be overwritten (None: there is no such option)."""
    if Path(path).exists() and not overwrite:
        choice = "" if overwrite is None else ", or be overwritten (--overwrite)"
        raise FileExistsError(f"{path} must be new{choice}, but it exists.")


def require_replaceable(folder: str | Path, overwrite: bool | None, maker: str, patterns: Iterable[str]) -> None:
    """Raise FileExistsError or ValueError where writing ``folder`` would replace what it should not.

    Args:
        folder: to write; it may be new.
        overwrite: as in :func:`require_new`.
        maker: of the folder, to name in the error.
        patterns: of the names of the files that this one writes; a folder that holds others is not replaced.
    """
    require_new(folder, overwrite)
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if others or (folder.exists() and not folder.is_dir()):
        what = f"holds {others[0]}" if others else "is a file"
        raise ValueError(f"{folder} must hold only what {maker} writes here, to be overwritten, but {what}.")
    if os.path.ismount(folder):
        raise ValueError(f"{folder} must be replaced as a whole, but it is a mount point: give a folder within it.")


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left in ``folder``, where nobody may be at work now.

    That is what has a temporary name of :func:`atomic` or :func:`atomic_folder`.
    """
    for path in list(folder.glob(".*")):
        if re.match(r"\.\d+-[0-9a-f]{8}\.", path.name):  # as _mark makes them
            _remove(path)


def read_table(path: Path, what: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Columns of a CSV file (none if it is empty), and the cells of each line that is not empty, with its number.

    Raises:
        FileNotFoundError: there is no such file; ``what`` it must be goes into the message.
        ValueError: it is no CSV file in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be {what} (CSV), but there is no such file.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a byte order mark
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a CSV file in UTF-8: {error}.") from error
    return (rows[0][1] if rows else []), rows[1:]


def scan_files(path: Path) -> list[Path]:
    """The files that a scan consists of, in the order of their names.

    Those in a folder; of a header (``.hdr``, ``.mhd``, ``.nhdr``) the files with the voxels too; else the file itself.

    >>> [file.name for file in scan_files(Path("scan.nii.gz"))]
    ['scan.nii.gz']
    """
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    found: list[str] = []
    if pair := re.match(r"(.*)\.(hdr|img)(\.gz)?$", path.name, re.IGNORECASE):
        endings = (".hdr", ".img", ".mat")  # the last of SPM, which says where the voxels lie
        found += [f"{path.parent / pair[1]}{ending}{gz}" for ending in endings for gz in ("", ".gz")]
    elif path.name.lower().endswith((".mhd", ".mha", ".nhdr", ".nrrd")):
        with path.open("rb") as file:
            header = _DETACHED.search(os.fsdecode(file.read(2**20)))
        for line in header[1].splitlines() if header else []:  # one name, a list, or names that count: "s%03d.raw 1 9"
            names = re.sub(r"%\d*d(\S*).*", r"*\1", glob.escape(line.strip()))
            found += glob.glob(os.path.join(glob.escape(str(path.parent)), names))
    return sorted({path, *(Path(file) for file in found if os.path.isfile(file))})


def stamp(path: Path) -> list[Any]:
    """What tells whether a scan or file is still the same, as JSON holds it: path, size in bytes, time of last change.

    Of several files (:func:`scan_files`) the sums; the time is in ns.
    """
    statuses = [file.stat() for file in scan_files(path)]
    return [str(path), sum(status.st_size for status in statuses), sum(status.st_mtime_ns for status in statuses)]


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor Inf: None stands for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON; whole or not at all. Numbers that are not finite become null."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
