"""Call a function many times in parallel processes; a call that fails or kills its process does not affect the others.

No heavy library is imported here: a process sets the number of threads before it loads its libraries.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import psutil

from voxelmorph_monai.memory import keep_freed_memory
from voxelmorph_monai.progress import Progress

__all__ = ["Pool", "Processes", "attempt", "default_jobs", "failures", "num_cpus"]

_ATTEMPTS = 2  # a process may have been killed because another one needed too much memory
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


def num_cpus() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(memory: int) -> int:
    """Number of processes to run at a time: one per processor, or fewer so that each has ``memory`` bytes."""
    return max(1, min(num_cpus(), psutil.virtual_memory().available // memory))


class Pool(Protocol):
    """Interface that :func:`failures` needs to run calls."""

    def submit(self, function: Callable[..., object], /, *args: Any) -> "Future[str | None]":
        """Call ``function(*args)`` in another process; the result is the reason why it failed, or None."""


class _Child(NamedTuple):
    process: BaseProcess
    connection: Connection


def attempt(function: Callable[..., object], args: Sequence[Any]) -> str | None:
    """Call ``function(*args)``; if it raises an exception, return the reason in one line.

    >>> attempt(int, ["12"])
    >>> attempt(int, ["twelve"])
    "invalid literal for int() with base 10: 'twelve'"
    """
    try:
        function(*args)
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def failures(
    pool: Pool,
    title: str,
    unit: str,
    function: Callable[..., object],
    calls: Mapping[str, Sequence[Any]],
    values: Callable[[str], Mapping[str, float]] | None = None,
) -> Iterator[tuple[str, str]]:
    """Make all ``calls`` of ``function`` and show the progress; yields name and reason of each failure as it happens.

    Args:
        pool: pool that runs the calls.
        title: title of the progress display.
        unit: what one call processes, in the singular, for example ``"scan"``.
        function: function to call.
        calls: arguments of each call, by its name.
        values: returns numbers for the name of a successful call; the progress display shows their means.
    """
    tasks = {pool.submit(function, *args): name for name, args in calls.items()}
    with Progress(title, len(tasks), unit) as progress:
        for task in as_completed(tasks):
            try:
                reason = str(task.exception() or task.result() or "")
            except CancelledError:
                reason = "it was cancelled"
            name = tasks[task]
            progress.advance(failed=bool(reason), means=values(name) if values and not reason else None)
            if reason:
                yield name, reason


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _serve(connection: Connection) -> None:
    """Main loop of a child: receive calls and send back why each failed, until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the child silently: the parent reports it
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_follow_parent, daemon=True).start()
    keep_freed_memory()
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        connection.send(attempt(function, args))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _start_tracker() -> None:
    """Start the resource tracker without its warnings about killed processes, which are normal here."""
    if sys.platform != "win32":
        with _environment({"PYTHONWARNINGS": "ignore"}):
            resource_tracker.ensure_running()


def _block_interrupts() -> None:
    """Block SIGINT in this thread: child processes inherit that and print no traceback before `_serve` unblocks it."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


class Processes:
    """New processes, each fed by its own thread; use it in a ``with`` statement.

    The function must be importable and its arguments picklable; a script must use this under
    ``if __name__ == "__main__":``. If a process is killed, its call is repeated once in a new process, and nothing else
    is lost. All processes are killed at the end of the ``with`` statement, also after Ctrl-C. If the parent is killed,
    they end, too.

    Args:
        jobs: number of processes at a time.
        threads: number of threads that the libraries in each process may use.
    """

    # New processes, because a fork would inherit locks held by threads of the parent (ITK's, torch's). Not a
    # ProcessPoolExecutor, because it ends all work if one of its processes is killed.

    def __init__(self, jobs: int, threads: int) -> None:
        _start_tracker()
        self._environment = dict.fromkeys(_THREADS, str(threads))
        self._threads = ThreadPoolExecutor(jobs, initializer=_block_interrupts)
        self._own = threading.local()
        self._lock = threading.Lock()
        self._children: list[_Child] = []
        self._closed = False

    def submit(self, function: Callable[..., object], /, *args: Any) -> "Future[str | None]":
        """Call ``function(*args)`` in a process; the result is the reason why it failed, or None."""
        return self._threads.submit(self._ask, function, args)

    def _ask(self, function: Callable[..., object], args: Sequence[Any]) -> str | None:
        for _ in range(_ATTEMPTS):
            child = self._child()
            try:
                child.connection.send((function, args))
                return child.connection.recv()
            except (EOFError, OSError):  # the process has died
                with self._lock:  # a start in another thread would also ask for this exit code, which is given once
                    child.process.join()
                self._own.child = None
        return (
            f"its process died {_ATTEMPTS} times (exit code {child.process.exitcode}). If memory ran out, try fewer "
            "--jobs."
        )

    def _child(self) -> _Child:
        """Return the child process of this thread; starts one if there is none."""
        child = getattr(self._own, "child", None)
        if child is None:
            with self._lock:
                if self._closed:
                    raise CancelledError
                child = self._own.child = self._start()
                self._children.append(child)
        return child

    def _start(self) -> _Child:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _environment(self._environment):
            process.start()
        theirs.close()  # now only the child holds this end, so it closes if the child dies
        return _Child(process, ours)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
        for child in self._children:
            child.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.process.join()
            child.connection.close()
