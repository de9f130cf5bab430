"""Register all pairs of a list, on this machine or on a Dask cluster, and go on where an earlier call stopped.

Each pair gets a folder of its own, which appears complete or not at all, with a record of what it was made from: that
is all that a later call goes by. What ran where, and what died on the way, does not matter.
"""

import csv
import importlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from voxelmorph_monai.files import atomic, atomic_folder, read_table, stamp, sweep, write_json
from voxelmorph_monai.formats import scan_name
from voxelmorph_monai.processes import Pool, Processes, attempt, default_jobs, failures, num_cpus
from voxelmorph_monai.registration import check_options, load_network, register_files

__all__ = ["Cohort", "register_cohort"]

# Arguments of register_files, of which the first two must be.
_FILES = ("moving", "fixed", "moving_labels", "fixed_labels", "moving_mask", "fixed_mask")
_NAME = re.compile(r"(?!.*\.$)\w[\w.+-]{0,199}", re.ASCII)  # safe as a folder on every system
_OPTIONS, _RECORD, _TABLE = "options.json", "pair.json", "cohort.csv"
_COLUMNS = (
    *("name", "status", "reason", "dice_before", "dice_affine", "dice_after"),
    *("similarity_before", "similarity_affine", "similarity_after"),
    *("folding_percent", "sdlogj", "inverse_consistency_mm", "seconds", "moving", "fixed"),
)
_MEMORY = 6 * 2**30  # bytes a process may need: 3.2 GiB were seen for brains of 1 mm, 4.4 GiB on grids of 256^3
_LISTED = 20  # faults that are told of a list


class Cohort(NamedTuple):
    """What :func:`register_cohort` did.

    Attributes:
        table: path of ``cohort.csv``.
        num_pairs: number of pairs in the list.
        num_skipped: how many of them an earlier call had registered.
        errors: reason by name, for the pairs that failed.
    """

    table: Path
    num_pairs: int
    num_skipped: int
    errors: dict[str, str]


class _Pair(NamedTuple):
    """One line of the list; ``files`` by their names as arguments of :func:`register_files`."""

    name: str
    files: dict[str, Path]

    def inputs(self) -> dict[str, list[Any]]:
        """What tells whether the files are still the same."""
        return {role: stamp(path) for role, path in self.files.items()}


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Columns and lines of a list (:func:`~voxelmorph_monai.files.read_table`)."""
    columns, rows = read_table(path, "a list of pairs")
    if not {"moving", "fixed"} <= set(columns) <= {"name", *_FILES} or len(columns) > len(set(columns)):
        raise ValueError(
            f"{path} must have the columns moving and fixed, and may have name, {', '.join(_FILES[2:])}, got "
            f"{', '.join(columns) or 'none'}."
        )
    if not rows:
        raise ValueError(f"{path} must list at least one pair, got none.")
    return columns, rows


def _pair(cells: Mapping[str, str], folder: Path) -> _Pair:
    files = {role: Path(os.path.abspath(folder / cells[role])) for role in _FILES if cells.get(role)}
    default = "_to_".join(scan_name(files[role]) for role in _FILES[:2] if role in files)
    return _Pair(cells.get("name") or default, files)


def _faults(pair: _Pair, output: Path) -> Iterator[str]:
    """What is wrong with a pair, itself."""
    for role in _FILES[:2]:
        if role not in pair.files:
            yield f"{role} must name a file, got an empty cell"
    for role, path in pair.files.items():
        if not path.exists():
            yield f"{role} does not exist: {path}"
        if output in path.parents:
            yield f"{role} must not lie in {output}, got {path}"
    if not _NAME.fullmatch(pair.name) or pair.name.casefold() in (_OPTIONS, _TABLE):
        yield f"name must be letters, digits and any of _ . + - (200 at most), got '{pair.name}'"


def _read_list(path: Path, output: Path) -> list[_Pair]:
    """Pairs of a list that is fit for use throughout."""
    columns, rows = _read_rows(path)
    pairs: list[_Pair] = []
    faults: list[str] = []
    names: dict[str, int] = {}
    contents: dict[tuple[tuple[str, Path], ...], int] = {}
    for line, row in rows:
        if len(row) != len(columns):
            faults.append(f"line {line}: there must be {len(columns)} cells, got {len(row)}")
            continue
        pair = _pair(dict(zip(columns, row, strict=True)), path.parent)
        faults += [f"line {line}: {fault}" for fault in _faults(pair, output)]
        same_name = names.setdefault(pair.name.casefold(), line)  # some file systems take A for a
        same_files = contents.setdefault(tuple(pair.files.items()), line)
        if same_files != line:
            faults.append(f"line {line}: the same pair as in line {same_files}")
        elif same_name != line:
            faults.append(f"line {line}: the name '{pair.name}' is that of line {same_name}; give each pair its own")
        pairs.append(pair)
    if faults:
        more = [f"and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        shown = "\n  ".join(faults[:_LISTED] + more)
        raise ValueError(f"{path} must be fit for use, but {len(faults)} faults were found:\n  {shown}")
    return pairs


def _check_weights(weights: Path, preset: str) -> None:
    """Raise unless these are weights of the preset, for slices or for volumes: which of them, each pair tells itself.

    Nothing is put on a GPU: a process that has, keeps some of its memory from those that register.
    """
    try:
        load_network(weights, preset, 2, "cpu")
    except ValueError:
        load_network(weights, preset, 3, "cpu")


def _complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of :func:`register_files`, given or default; raises on those that cannot be meant."""
    bound = signature(register_files).bind("", "", "", **options)
    bound.apply_defaults()
    if named := options.keys() & set(_FILES):
        raise TypeError(f"options must leave files to the list, got {', '.join(sorted(named))}.")
    complete = {name: value for name, value in bound.arguments.items() if name not in {*_FILES, "output", "overwrite"}}
    check_options(*(complete[name] for name in ("space", "transform", "similarity", "budget")))
    if complete["weights"] is not None:
        complete["weights"] = Path(complete["weights"]).absolute()  # a worker may run elsewhere
        _check_weights(complete["weights"], complete["preset"])
    return complete


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """What tells whether options, and the weights that they name, are still the same."""
    weights, budget = options["weights"], options["budget"]
    plain = {"weights": weights and stamp(weights), "budget": budget if budget < math.inf else "inf"}
    return json.loads(json.dumps({**options, **plain}))


def _read_json(path: Path) -> dict[str, Any]:
    """A record; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _require_ours(output: Path, pairs: Sequence[_Pair], options: Mapping[str, Any], overwrite: bool) -> None:
    """Raise ValueError unless ``output`` is new, empty, or of an earlier call with the same options."""
    mark = output / _OPTIONS
    if not mark.exists():
        if output.exists() and (not output.is_dir() or {path.name for path in output.iterdir()} - {".lock"}):
            raise ValueError(
                f"{output} must be new, empty or made by 'vxm register --list', but it holds other things."
            )
        return
    strange = [
        pair.name for pair in pairs if (output / pair.name).exists() and not (output / pair.name / _RECORD).exists()
    ]
    if strange:
        raise ValueError(f"{output / strange[0]} must be free for a pair, but something else is there.")
    if not any((output / pair.name).exists() for pair in pairs):  # nothing that other options have made
        return
    found = _read_json(mark)
    changed = [name for name in options if found.get(name) != options[name]]
    if changed and not overwrite:
        told = ", ".join(f"{name} is {found.get(name)} and {options[name]} is asked" for name in changed)
        raise ValueError(f"{output} must keep its options, be overwritten (--overwrite), or be another folder: {told}.")


def _is_done(pair: _Pair, output: Path, told: Mapping[str, Any]) -> bool:
    record = _read_json(output / pair.name / _RECORD)
    try:
        same = record.get("inputs") == pair.inputs() and record.get("options") == told
    except FileNotFoundError:  # an input that is gone
        return False
    return same and all((output / pair.name / name).exists() for name in record["files"])


def _row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of ``summary.json`` that the table has."""
    dice = {f"dice_{stage}": values["mean"] for stage, values in (summary["dice"] or {}).items()}
    return {**summary, **dice, "seconds": round(sum(summary["seconds"].values()), 3)}


def _register_pair(pair: _Pair, output: Path, options: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Register one pair into its folder, unless it is done: a cluster that loses an answer asks once more."""
    if _is_done(pair, output, told):
        return
    inputs, arguments = pair.inputs(), {**pair.files, **options}
    with atomic_folder(output / pair.name) as folder:
        summary = register_files(output=folder, overwrite=True, **arguments)
        numbers = {name: value for name, value in _row(summary).items() if name in _COLUMNS}
        files = sorted(path.name for path in folder.iterdir())
        write_json(folder / _RECORD, {"inputs": inputs, "options": told, "files": files, "numbers": numbers})


def _write_table(pairs: Sequence[_Pair], output: Path, told: Mapping[str, Any], errors: Mapping[str, str]) -> None:
    with atomic(output / _TABLE) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for pair in pairs:
            row = {"name": pair.name, "moving": pair.files["moving"], "fixed": pair.files["fixed"]}
            if pair.name in errors:
                row |= {"status": "failed", "reason": errors[pair.name]}
            elif _is_done(pair, output, told):
                row |= {"status": "done", **_read_json(output / pair.name / _RECORD)["numbers"]}
            else:
                row |= {"status": "pending"}
            writer.writerow(row)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other calls out of ``output``; the system lets go of it if the process is killed."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BlockingIOError(
            f"{output} must be left to one call at a time, but another one is at work there."
        ) from error


class _Cluster:
    """Workers of a Dask cluster that runs already, to be used like :class:`Processes`."""

    def __init__(self, address: str) -> None:
        try:
            distributed = importlib.import_module("distributed")  # optional, and slow to import
        except ImportError as error:
            raise ValueError("scheduler needs Dask: pip install 'voxelmorph_monai[cohort]'.") from error
        self._client = distributed.Client(address)
        self._executor = self._client.get_executor(pure=False)

    def submit(self, function: Any, /, *args: Any) -> Any:
        return self._executor.submit(attempt, function, args)

    def __enter__(self) -> "_Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=False)
        self._client.close()


def _pool(jobs: int | None, scheduler: str | None, num_pairs: int) -> Processes | _Cluster:
    if scheduler is not None:
        return _Cluster(scheduler)
    jobs = min(jobs or default_jobs(_MEMORY), max(1, num_pairs))
    return Processes(jobs, threads=max(1, num_cpus() // jobs))


def _register_all(
    pool: Pool, pairs: Sequence[_Pair], output: Path, options: Mapping[str, Any], told: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Register the pairs; gives name and reason of those that fail."""
    calls = {pair.name: (pair, output, options, told) for pair in pairs}
    failed = set()
    for name, reason in failures(pool, "register", "pair", _register_pair, calls):
        failed.add(name)
        yield name, reason
    for pair in pairs:
        if pair.name not in failed and not _is_done(pair, output, told):
            yield pair.name, f"its result did not arrive in {output}: do all workers see this folder?"


def register_cohort(
    pairs: str | Path,
    output: str | Path,
    *,
    jobs: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Cohort:
    """Register the pairs of a list into the folder ``output``: ``NAME/`` for each, and the table ``cohort.csv``.

    The list is checked as a whole before the work starts. Called again, this does only what is missing, failed, or has
    an input that changed since (by size or time of last change). Other options, or weights that changed, need another
    folder, or ``overwrite``. The processes start afresh, so that a script must call this under
    ``if __name__ == "__main__":``.

    Args:
        pairs: CSV file with the columns ``moving`` and ``fixed``, and maybe ``name`` (default: ``MOVING_to_FIXED``),
            ``moving_labels``, ``fixed_labels``, ``moving_mask`` and ``fixed_mask``; paths are relative to its folder.
        output: a folder that is new, empty or of an earlier call.
        jobs: number of processes (default: of processors, or fewer if they found less than 6 GiB of memory each).
        scheduler: address of a Dask scheduler, whose workers then do the work; they must see the same files.
        overwrite: let the results of other options be replaced.
        options: of :func:`~voxelmorph_monai.registration.register_files`, but for its files.

    Raises:
        ValueError: the list, the folder or an option cannot be used; the message says which and why.
        FileNotFoundError: there is no list, or there are no weights.
        BlockingIOError: another call is at work in ``output``.
    """
    output = Path(os.path.abspath(output))
    if jobs is not None and (jobs < 1 or scheduler is not None):
        raise ValueError(f"jobs must be at least 1, and be left out with a scheduler, got {jobs}.")
    listed, complete = _read_list(Path(pairs).absolute(), output), _complete(options)
    told = _as_json(complete)
    _require_ours(output, listed, told, overwrite)
    errors: dict[str, str] = {}
    with _alone(output):
        _require_ours(output, listed, told, overwrite)  # another call may just have been here
        write_json(output / _OPTIONS, told)
        sweep(output)
        todo = [pair for pair in listed if not _is_done(pair, output, told)]
        try:
            with _pool(jobs, scheduler, len(todo)) as pool:
                for name, reason in _register_all(pool, todo, output, complete, told):
                    errors[name] = reason
        finally:
            sweep(output)
            _write_table(listed, output, told, errors)
    return Cohort(output / _TABLE, len(listed), len(listed) - len(todo), errors)
