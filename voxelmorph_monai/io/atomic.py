"""Write files, folders and JSON completely or not at all, and check whether an output may be written."""

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

__all__ = ["atomic", "atomic_folder", "require_new", "require_replaceable", "require_writable", "sweep", "write_json"]


def _mark() -> str:
    """Unique prefix of a temporary name; the process number is not unique, as it is often 1 in containers."""
    return f".{os.getpid()}-{secrets.token_hex(4)}."


def _remove(path: Path) -> None:
    """Remove a file or a folder if it exists and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path`` to write to; at the end, the file replaces ``path``.

    An incomplete file is never visible: after an error the temporary file is removed, and ``path`` is unchanged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic(f"{folder}/notes.txt") as temporary:
    ...         number_of_characters = temporary.write_text("whole")
    ...     os.listdir(folder)
    ['notes.txt']
    """
    path = Path(path)
    temporary = path.with_name(_mark() + path.name)  # keep the extension: writers choose the format by it
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``path`` to fill; at the end, it replaces ``path`` and everything in it.

    An incomplete folder is never visible: after an error the temporary folder is removed, and ``path`` is unchanged.
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


def require_writable(path: str | Path) -> None:
    """Raise ValueError unless the folder above ``path``, or the nearest one that exists, can be written to."""
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"cannot create {path}: {above} is not a folder that you can write to.")


def require_new(path: str | Path, overwrite: bool | None = None) -> None:
    """Check that ``path`` can be written, before long work starts.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is not True. If it is False, the message mentions
            ``--overwrite``; None is for callers without this option.
        ValueError: the folder of ``path`` cannot be written to.
    """
    if Path(path).exists() and not overwrite:
        choice = "" if overwrite is None else ", or --overwrite to replace it"
        raise FileExistsError(f"{path} already exists. Choose another output{choice}.")
    require_writable(path)


def require_replaceable(folder: str | Path, overwrite: bool | None, maker: str, patterns: Iterable[str]) -> None:
    """Raise FileExistsError or ValueError if ``folder`` must not be written or replaced.

    Args:
        folder: folder to write; it need not exist.
        overwrite: whether the folder may be replaced, as in :func:`require_new`.
        maker: command that writes such folders, named in the error message.
        patterns: patterns of the files that this command writes; a folder with other files is not replaced.
    """
    require_new(folder, overwrite)
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if others or (folder.exists() and not folder.is_dir()):
        what = f"holds {others[0]}, which is not from {maker}" if others else "is a file"
        raise ValueError(f"{folder} is not overwritten, because it {what}. Choose another output.")
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is a mount point, which cannot be replaced. Choose a folder within it.")


def sweep(folder: Path) -> None:
    """Remove leftovers of killed processes in ``folder``; no other process may be writing to it.

    Leftovers are the temporary files and folders of :func:`atomic` and :func:`atomic_folder`.
    """
    for path in list(folder.glob(".*")):
        if re.match(r"\.\d+-[0-9a-f]{8}\.", path.name):  # the names that _mark makes
            _remove(path)


def _finite(value: Any) -> Any:
    """Replace NaN and Inf, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, completely or not at all. Numbers that are not finite become null."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
