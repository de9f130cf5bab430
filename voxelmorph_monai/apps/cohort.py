"""Register all pairs in a list, on this machine or on a Dask cluster, and continue where an earlier call stopped.

Each pair gets its own folder, which appears complete or not at all, with a record of its inputs and options. A later
call relies only on these records; where pairs were registered, and which processes died, does not matter.
"""

import csv
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from voxelmorph_monai.apps.options import DEFAULTS, Options
from voxelmorph_monai.apps.processes import Pool, Processes, attempt, default_jobs, failures, num_cpus
from voxelmorph_monai.apps.register_files import register_files
from voxelmorph_monai.apps.shipped import card_of, load_network, weights_file
from voxelmorph_monai.io.atomic import atomic, atomic_folder, sweep, write_json
from voxelmorph_monai.io.formats import scan_name, stamp
from voxelmorph_monai.io.tables import Row, read_table

__all__ = ["Cohort", "register_cohort"]

# Arguments of register_files; the first two are required.
_FILES = ("moving", "fixed", "moving_labels", "fixed_labels", "moving_mask", "fixed_mask")
_NAME = re.compile(r"(?!.*\.$)\w[\w.+-]{0,199}", re.ASCII)  # safe as a folder on every system
_OPTIONS, _RECORD, _TABLE = "options.json", "pair.json", "cohort.csv"
_RESERVED = (_OPTIONS, _TABLE, "index.html", "thumbnails")  # vxm report writes the last two
_COLUMNS = (
    *("name", "status", "reason", "dice_before", "dice_affine", "dice_after"),
    *("correlation_before", "correlation_affine", "correlation_after"),
    *("folding_percent", "sdlogj", "inverse_consistency_mm", "seconds", "moving", "fixed"),
)
_MEMORY = 6 * 2**30  # bytes per process; measured: 3.2 GiB for brains of 1 mm, 4.4 GiB on grids of 256^3
_MAX_ERRORS = 20  # largest number of errors in a list to show


class Cohort(NamedTuple):
    """Outcome of :func:`register_cohort`.

    Attributes:
        table: path of ``cohort.csv``.
        num_pairs: number of pairs in the list.
        num_skipped: number of pairs that an earlier call had already registered.
        errors: reasons of failed pairs, by name of the pair.
    """

    table: Path
    num_pairs: int
    num_skipped: int
    errors: dict[str, str]


class _Pair(NamedTuple):
    """One line of the list; the keys of ``files`` are arguments of :func:`register_files`."""

    name: str
    files: dict[str, Path]

    def inputs(self) -> dict[str, list[Any]]:
        """Size and time of each file, to detect changes."""
        return {role: stamp(path) for role, path in self.files.items()}


def _read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Read the columns and lines of a list (:func:`~voxelmorph_monai.io.tables.read_table`)."""
    columns, rows = read_table(path, "a list of pairs")
    if not {"moving", "fixed"} <= set(columns) <= {"name", *_FILES} or len(columns) > len(set(columns)):
        raise ValueError(
            f"{path} has the columns {', '.join(columns) or '(none)'}. Give moving and fixed, and optionally name, "
            f"{', '.join(_FILES[2:])}, each once, separated by commas."
        )
    if not rows:
        raise ValueError(f"{path} lists no pairs. Add a line for each pair below its columns.")
    return columns, rows


def _pair(cells: Mapping[str, str], folder: Path) -> _Pair:
    files = {role: Path(os.path.abspath(folder / cells[role])) for role in _FILES if cells.get(role)}
    default = "_to_".join(scan_name(files[role]) for role in _FILES[:2] if role in files)
    return _Pair(cells.get("name") or default, files)


def _errors(pair: _Pair, output: Path) -> Iterator[str]:
    """Find the errors in a single line of the list."""
    for role in _FILES[:2]:
        if role not in pair.files:
            yield f"{role} is empty"
    for role, path in pair.files.items():
        if not path.exists():
            yield f"{role} does not exist: {path}"
        if output in path.parents:
            yield f"{role} lies in the output folder: {path}"
    if not _NAME.fullmatch(pair.name) or pair.name.casefold() in _RESERVED:
        yield f"the name '{pair.name}' cannot be a folder here; use up to 200 letters, digits and _ . + -"


def _read_list(path: Path, output: Path) -> list[_Pair]:
    """Read the pairs in a list; raises one ValueError that names all errors in it."""
    columns, rows = _read_rows(path)
    pairs: list[_Pair] = []
    errors: list[str] = []
    names: dict[str, int] = {}
    contents: dict[tuple[tuple[str, Path], ...], int] = {}
    for line, row, cells in rows:
        if len(row) != len(columns):
            errors.append(f"line {line}: {len(row)} cells for {len(columns)} columns")
            continue
        pair = _pair(cells, path.parent)
        errors += [f"line {line}: {error}" for error in _errors(pair, output)]
        same_name = names.setdefault(pair.name.casefold(), line)  # some file systems do not distinguish A from a
        same_files = contents.setdefault(tuple(pair.files.items()), line)
        if same_files != line:
            errors.append(f"line {line}: the same pair as in line {same_files}")
        elif same_name != line:
            errors.append(
                f"line {line}: the name '{pair.name}' is also used in line {same_name}; give each pair its own"
            )
        pairs.append(pair)
    if errors:
        more = [f"and {len(errors) - _MAX_ERRORS} more"] if len(errors) > _MAX_ERRORS else []
        shown = "\n  ".join(errors[:_MAX_ERRORS] + more)
        raise ValueError(f"{path} has {len(errors)} error{'s' * (len(errors) > 1)}:\n  {shown}")
    return pairs


def _check_weights(weights: Path, preset: str) -> None:
    """Raise an error unless the weights fit the preset, for slices or for volumes.

    The GPU is not used: it would reserve memory that the registering processes need.
    """
    try:
        load_network(weights, preset, 2, "cpu")
    except ValueError:
        load_network(weights, preset, 3, "cpu")


def _complete(options: Options) -> Options:
    """Check options and make their weights and preset explicit, for workers that may run on other machines."""
    if not isinstance(options.weights, str | Path | None):
        raise TypeError(
            f"weights is a {type(options.weights).__name__}, but the processes that register a list load weights from "
            "a file. Save the network, and give the path."
        )
    weights = weights_file(options)
    if weights is None:
        return replace(options, weights="none", preset=None)
    preset = card_of(weights, options.preset).preset
    _check_weights(weights, preset)
    return replace(options, weights=weights, preset=preset)


def _as_json(options: Options, **files: bool) -> dict[str, Any]:
    """Options as JSON values, with size and modification time of the weights, to detect changes."""
    weights = options.weights
    plain = {**asdict(options), **options.record(), **files}
    del plain["refine"], plain["command"]  # redundant: without refinement, budget is 0 and steps is None
    plain["weights"] = stamp(weights) if isinstance(weights, Path) else None
    return json.loads(json.dumps(plain))


def _read_json(path: Path) -> dict[str, Any]:
    """Read a record; empty if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _require_ours(output: Path, pairs: Sequence[_Pair], options: Mapping[str, Any], overwrite: bool) -> None:
    """Raise ValueError unless ``output`` is new, empty, or from an earlier call with the same options."""
    mark = output / _OPTIONS
    if not mark.exists():
        if output.exists() and (not output.is_dir() or {path.name for path in output.iterdir()} - {".lock"}):
            raise ValueError(
                f"{output} was not made by 'vxm register --list', and is not empty. Choose another output folder."
            )
        return
    strange = [
        pair.name for pair in pairs if (output / pair.name).exists() and not (output / pair.name / _RECORD).exists()
    ]
    if strange:
        raise ValueError(
            f"{output / strange[0]} is in the way: a pair has this name, but the folder was not made by a "
            "registration. Move it, or rename the pair."
        )
    if not any((output / pair.name).exists() for pair in pairs):  # no results that other options could have made
        return
    recorded = _read_json(mark)
    changed = [name for name in options if recorded.get(name) != options[name]]
    if changed and not overwrite:
        differences = ", ".join(f"{name} was {recorded.get(name)}, now {options[name]}" for name in changed)
        raise ValueError(
            f"{output} holds results with other options: {differences}. Use the same options, another output folder, "
            "or --overwrite to register all pairs again."
        )


def _is_done(pair: _Pair, output: Path, options_record: Mapping[str, Any]) -> bool:
    record = _read_json(output / pair.name / _RECORD)
    try:
        same = record.get("inputs") == pair.inputs() and record.get("options") == options_record
    except FileNotFoundError:  # an input was deleted
        return False
    return same and all((output / pair.name / name).exists() for name in record["files"])


def _row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Convert ``summary.json`` to a row of the table."""
    dice = {f"dice_{stage}": values["mean"] for stage, values in (summary["dice"] or {}).items()}
    return {**summary, **dice, "seconds": round(sum(summary["seconds"].values()), 3)}


def _register_pair(pair: _Pair, output: Path, options: Options, options_record: Mapping[str, Any]) -> None:
    """Register one pair into its folder, unless this was done: a cluster that loses a result calls this again."""
    if _is_done(pair, output, options_record):
        return
    inputs = pair.inputs()
    with atomic_folder(output / pair.name) as folder:
        files: dict[str, Any] = dict(pair.files)
        how = {name: options_record[name] for name in ("bids", "report", "show_face")}
        summary = register_files(**files, output=folder, options=options, overwrite=True, **how)
        numbers = {name: value for name, value in _row(summary).items() if name in _COLUMNS}
        written = sorted(path.name for path in folder.iterdir())
        write_json(
            folder / _RECORD, {"inputs": inputs, "options": options_record, "files": written, "numbers": numbers}
        )


def _write_table(
    pairs: Sequence[_Pair], output: Path, options_record: Mapping[str, Any], errors: Mapping[str, str]
) -> None:
    with atomic(output / _TABLE) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for pair in pairs:
            row = {"name": pair.name, "moving": pair.files["moving"], "fixed": pair.files["fixed"]}
            if pair.name in errors:
                row |= {"status": "failed", "reason": errors[pair.name]}
            elif _is_done(pair, output, options_record):
                row |= {"status": "done", **_read_json(output / pair.name / _RECORD)["numbers"]}
            else:
                row |= {"status": "pending"}
            writer.writerow(row)


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Lock ``output`` against other calls; the system releases the lock if the process is killed."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BlockingIOError(
            f"{output} is in use by another call. Wait until it ends, or choose another output folder."
        ) from error


def _dask(scheduler: str) -> Any:
    try:
        return importlib.import_module("distributed")  # optional, and slow to import
    except ImportError as error:
        raise ValueError(
            f"scheduler {scheduler} needs Dask, which is not installed: pip install 'voxelmorph_monai[cohort]'."
        ) from error


class _Cluster:
    """Workers of a running Dask cluster, with the interface of :class:`Processes`."""

    def __init__(self, address: str) -> None:
        self._client = _dask(address).Client(address)
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


def _likeness(folder: Path) -> dict[str, float]:
    """Similarity of a registered pair: Dice if it has labels, otherwise correlation."""
    numbers = _read_json(folder / _RECORD).get("numbers", {})
    found = {"Dice": numbers.get("dice_after"), "correlation": numbers.get("correlation_after")}
    return dict([(name, value) for name, value in found.items() if value is not None][:1])


def _register_all(
    pool: Pool, title: str, pairs: Sequence[_Pair], output: Path, options: Options, options_record: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Register the pairs; yields the name of each pair that failed, and the reason."""
    calls = {pair.name: (pair, output, options, options_record) for pair in pairs}
    failed = set()
    for name, reason in failures(pool, title, "pair", _register_pair, calls, lambda name: _likeness(output / name)):
        failed.add(name)
        yield name, reason
    for pair in pairs:
        if pair.name not in failed and not _is_done(pair, output, options_record):
            yield pair.name, f"its result is not in {output}: make sure that all workers see this folder"


def register_cohort(
    pairs: str | Path,
    output: str | Path,
    *,
    jobs: int | None = None,
    scheduler: str | None = None,
    options: Options = DEFAULTS,
    bids: bool = False,
    overwrite: bool = False,
    report: bool = True,
    show_face: bool = False,
    title: str = "register",
) -> Cohort:
    """Register the pairs in a list; ``output`` gets a folder ``NAME/`` for each, and the table ``cohort.csv``.

    The whole list is checked before the work starts. A second call registers only pairs that are missing, failed, or
    have a changed input (size or modification time). Other options or changed weights need another folder or
    ``overwrite``. The work runs in new processes, so a script must call this under ``if __name__ == "__main__":``.

    Args:
        pairs: CSV file with the columns ``moving`` and ``fixed``, and optionally ``name`` (default:
            ``MOVING_to_FIXED``), ``moving_labels``, ``fixed_labels``, ``moving_mask`` and ``fixed_mask``. Paths are
            relative to its folder.
        output: folder that is new, empty or from an earlier call.
        jobs: number of processes (default: one per processor, but at most one per 6 GiB of free memory).
        scheduler: address of a Dask scheduler whose workers do the work; they must see the same files.
        options: options of the registration.
        bids: use BIDS file names, as in :func:`~voxelmorph_monai.apps.register_files.register_files`.
        overwrite: replace results that were made with other options.
        report: write ``report.png`` and ``report.html`` for each pair.
        show_face: show the faces of whole heads in the reports; by default they are hidden.
        title: title of the progress display.

    Raises:
        ValueError: the list, the folder or an option cannot be used.
        FileNotFoundError: the list or the weights do not exist.
        BlockingIOError: another call is using ``output``.
    """
    output = Path(os.path.abspath(output))
    if jobs is not None and scheduler is not None:
        raise ValueError(
            f"jobs is {jobs}, but the scheduler {scheduler} has its own workers. Give only one of the two."
        )
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}. At least 1 process is needed.")
    if scheduler is not None:
        _dask(scheduler)  # raises an error if Dask is missing, before a folder is created
    listed, complete = _read_list(Path(pairs).absolute(), output), _complete(options)
    options_record = _as_json(complete, bids=bids, report=report, show_face=show_face)
    _require_ours(output, listed, options_record, overwrite)
    errors: dict[str, str] = {}
    with _lock(output):
        _require_ours(output, listed, options_record, overwrite)  # another call may just have finished
        write_json(output / _OPTIONS, options_record)
        sweep(output)
        todo = [pair for pair in listed if not _is_done(pair, output, options_record)]
        try:
            with _pool(jobs, scheduler, len(todo)) as pool:
                for name, reason in _register_all(pool, title, todo, output, complete, options_record):
                    errors[name] = reason
        finally:
            sweep(output)
            _write_table(listed, output, options_record, errors)
    return Cohort(output / _TABLE, len(listed), len(listed) - len(todo), errors)
