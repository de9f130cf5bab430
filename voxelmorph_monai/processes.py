"""Call one function for many things, in processes of this machine; what fails, or kills its process, fails alone.

Nothing heavy is imported here: a process says how many threads its libraries may use before it loads them.
"""

import ctypes
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
from tqdm import tqdm

__all__ = ["Pool", "Processes", "attempt", "default_jobs", "failures", "keep_freed_memory", "num_cpus"]

_ATTEMPTS = 2  # a process may have been the victim of another one's hunger for memory
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees for its next tensors, to work faster on a CPU.

    glibc gives large blocks back to the system at once, so that each step gets its tensors as new pages, which
    the system fills with zeros first: a fifth of the CPU time of a step of ``dense``, and of a refinement. Kept, they
    leave the process at its peak until it ends, and the peak 4 to 17 % higher, as blocks of different sizes do not fit
    each other's gaps.

    Returns:
        Whether the C library took it: glibc does, others have no such setting and stay as they are.
    """
    if sys.platform != "linux":  # Windows has no CDLL(None)
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # (what, value) of glibc's malloc.h: M_MMAP_MAX, no block is a mapping of its own; M_TRIM_THRESHOLD, never shrink
    return mallopt is not None and all([mallopt(-4, 0), mallopt(-1, -1)])


def num_cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(memory: int) -> int:
    """How many processes to run at a time: one for each processor, or fewer so that each finds ``memory`` bytes."""
    return max(1, min(num_cpus(), psutil.virtual_memory().available // memory))


class Pool(Protocol):
    """What :func:`failures` hands its calls to."""

    def submit(self, function: Callable[..., object], /, *args: Any) -> "Future[str | None]":
        """Call ``function(*args)`` elsewhere; the result is the reason why it failed, or None."""


class _Child(NamedTuple):
    process: BaseProcess
    connection: Connection


def attempt(function: Callable[..., object], args: Sequence[Any]) -> str | None:
    """Call ``function(*args)``; returns the reason, in one line, if it raises an exception.

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
    pool: Pool, title: str, unit: str, function: Callable[..., object], calls: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[str, str]]:
    """Make all ``calls`` of ``function``, under a progress bar; gives name and reason of those that fail as they do."""
    tasks = {pool.submit(function, *args): name for name, args in calls.items()}
    for task in tqdm(as_completed(tasks), title, len(tasks), unit=unit):
        try:
            reason = str(task.exception() or task.result() or "")
        except CancelledError:
            reason = "it was cancelled"
        if reason:
            yield tasks[task], reason


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _serve(connection: Connection) -> None:
    """Main loop of a child: receive calls and send back why each failed, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # die of Ctrl-C in silence: the parent says that it was interrupted
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
    """Start what clears up after processes that are killed, here as a rule, and let it do so without a warning."""
    if sys.platform != "win32":
        with _environment({"PYTHONWARNINGS": "ignore"}):
            resource_tracker.ensure_running()


def _block_interrupts() -> None:
    """Block SIGINT in this thread: child processes inherit that and print no traceback before `_serve` unblocks it."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


class Processes:
    """Processes that start afresh, each fed by a thread of its own; to be used in a ``with`` statement.

    The function must be importable and its arguments picklable; a script must use this under
    ``if __name__ == "__main__":``. If a process is killed, what it did is tried once more in a new one, and nothing
    else is lost. When the ``with`` statement is left, by Ctrl-C too, all processes are killed; when the parent is
    killed, they follow.

    Args:
        jobs: number of processes at a time.
        threads: that the libraries may use in each of them.
    """

    # Fresh processes: a fork would inherit whatever locks the threads of the parent (ITK's, torch's) hold. And not one
    # ProcessPoolExecutor: where one of its processes is killed, it ends the work of all.

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
            except (EOFError, OSError):  # there is no process at the other end
                with self._lock:  # starts happen in it, which ask how other children ended: one alone gets the status
                    child.process.join()
                self._own.child = None
        return f"its process died {_ATTEMPTS} times (exit code {child.process.exitcode}): was there too little memory?"

    def _child(self) -> _Child:
        """The process of this thread."""
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
        theirs.close()  # now it is open in the process alone, and closed if that dies
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
