"""Real processes, which import nothing heavy: what they are called for is in this module."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest

from voxelmorph_monai.apps.processes import Processes, attempt, failures
from voxelmorph_monai.memory import keep_freed_memory

DEADLINE = 60  # seconds, for what takes one on an idle machine


def wait_for(path: Path) -> None:
    end = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.01)


def note(folder: Path, name: str) -> int:
    """Leave a file for each call of this name; returns how many there are."""
    number = len(list(folder.glob(f"{name}.*"))) + 1
    (folder / f"{name}.{number}").write_text(str(os.getpid()))
    return number


def work(folder: Path, name: str) -> None:
    """Fail, hang, kill the process or do nothing, as the name says."""
    number = note(folder, name)
    if name.startswith("bad"):
        raise ValueError(f"{name} must be good,\n  got bad.")
    if name.startswith("killed") or (name.startswith("victim") and number == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("slow"):
        time.sleep(1.0)
    if name.startswith("endless"):
        time.sleep(10 * DEADLINE)


def run(folder: Path, names: list[str], jobs: int = 2) -> dict[str, str]:
    with Processes(jobs, threads=1) as pool:
        arguments = {name: (folder, name) for name in names}
        return dict(failures(pool, "work", "call", work, arguments, lambda name: {"letters": len(name)}))


def calls(folder: Path) -> dict[str, int]:
    names = [path.name.split(".")[0] for path in folder.iterdir()]
    return {name: names.count(name) for name in names}


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["a", "bad1", "b", "bad2", "c"]
    assert run(tmp_path, names) == {f"bad{i}": f"bad{i} must be good, got bad." for i in (1, 2)}
    assert calls(tmp_path) == dict.fromkeys(names, 1)
    assert (
        len({path.read_text() for path in tmp_path.iterdir()} - {str(os.getpid())}) <= 2
    )  # a failure costs no process
    shown = capfd.readouterr().err
    assert "work: 5 of 5 calls in 00:0" in shown
    assert ", 2 failed, mean letters 1.000\n" in shown  # of those that went well
    assert "Traceback" not in shown


def test_a_killed_process_takes_nothing_else_down(tmp_path: Path) -> None:
    names = ["slow", "victim", "a", "killed", "b", "c"]
    errors = run(tmp_path, names)
    assert errors.keys() == {"killed"}
    assert "died 2 times (exit code -9)" in errors["killed"]
    assert calls(tmp_path) == {**dict.fromkeys(names, 1), "victim": 2, "killed": 2}


def test_nothing_starts_while_it_is_asked_how_a_process_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start elsewhere asks all children, too, and who is second gets no status."""
    alone, join = [], BaseProcess.join

    def noted(process: BaseProcess, timeout: float | None = None) -> None:
        alone.append(pool._lock.locked())
        join(process, timeout)

    monkeypatch.setattr(BaseProcess, "join", noted)
    with Processes(1, threads=1) as pool:
        assert "exit code -9" in str(pool.submit(work, tmp_path, "killed").result(DEADLINE))
        assert alone == [True, True]


def test_jobs_run_side_by_side(tmp_path: Path) -> None:
    with Processes(3, threads=1) as pool:
        tasks = [pool.submit(meet, tmp_path, i, 3) for i in range(3)]
        assert [task.result(DEADLINE) for task in tasks] == [None] * 3
        assert len({path.read_text() for path in tmp_path.iterdir()} | {str(os.getpid())}) == 4


def meet(folder: Path, i: int, number: int) -> None:
    note(folder, str(i))
    for other in range(number):
        wait_for(folder / f"{other}.1")


def test_no_more_processes_than_calls(tmp_path: Path) -> None:
    with Processes(8, threads=1) as pool:
        assert pool.submit(note, tmp_path, "a").result(DEADLINE) is None
        assert len(pool._children) == 1


def expect_threads(number: int) -> None:
    import SimpleITK  # any copy of ITK reads the variable
    import torch
    from threadpoolctl import threadpool_info

    found = [library["num_threads"] for library in threadpool_info()]
    found += [torch.get_num_threads(), SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()]
    if len(found) < 3 or set(found) != {number}:
        raise ValueError(f"libraries use {found}")


def test_libraries_use_the_threads_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    number = min(2, os.cpu_count() or 1)  # OpenBLAS takes no more than there are
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with Processes(1, threads=number) as pool:
        assert pool.submit(expect_threads, number).result(DEADLINE) is None
    assert os.environ["OMP_NUM_THREADS"] == "7"  # the parent keeps its own
    assert "OPENBLAS_NUM_THREADS" not in os.environ


def test_leaving_kills_what_runs_and_drops_what_waits(tmp_path: Path) -> None:
    names = ["endless1", "endless2", "a", "b"]
    with Processes(2, threads=1) as pool:
        tasks = [pool.submit(work, tmp_path, name) for name in names]
        for name in names[:2]:
            wait_for(tmp_path / f"{name}.1")
    assert all(task.done() for task in tasks)
    assert [child.process.exitcode for child in pool._children] == [-signal.SIGKILL] * 2
    assert calls(tmp_path) == {"endless1": 1, "endless2": 1}


SCRIPT = """
import sys
from pathlib import Path
from test_processes import run
if __name__ == "__main__":
    run(Path(sys.argv[1]), ["endless1", "endless2", "a"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
@pytest.mark.parametrize("kill", ["group by Ctrl-C", "parent by SIGINT", "parent by SIGKILL"])
def test_no_process_outlives_its_parent(tmp_path: Path, kill: str) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "calls"
    script.write_text(SCRIPT)
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, str(script), str(folder)]
    parent = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        for name in ("endless1.1", "endless2.1"):
            wait_for(folder / name)
        if kill == "group by Ctrl-C":
            os.killpg(parent.pid, signal.SIGINT)
        else:
            os.kill(parent.pid, signal.SIGINT if kill == "parent by SIGINT" else signal.SIGKILL)
        _, shown = parent.communicate(timeout=DEADLINE)  # standard error closes when all processes are gone
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == (-signal.SIGKILL if "SIGKILL" in kill else -signal.SIGINT)
    assert shown.count("Traceback") == (0 if "SIGKILL" in kill else 1)  # of the parent alone
    assert "a" not in calls(folder)


def test_a_reason_is_one_line() -> None:
    def fail(error: BaseException) -> None:
        raise error

    assert attempt(fail, [ValueError("first\n  second")]) == "first second"
    assert attempt(fail, [MemoryError()]) == "MemoryError"
    assert attempt(print, []) is None
    with pytest.raises(KeyboardInterrupt):
        attempt(fail, [KeyboardInterrupt()])


FAULTS = """
import resource, torch
from voxelmorph_monai.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), keep_freed_memory(), faults(), min(faults() for _ in range(9)))  # the system may take pages back
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt"
)
def test_freed_memory_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, taken, _, after = done.stdout.split()
    assert taken == "True"
    assert int(before) >= 32  # 64 MiB in pages of 4 KiB, or at the largest of 2 MiB
    assert int(after) <= 4  # the same pages again; a few are for small objects


def test_other_c_libraries_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    def refuse(name: None) -> None:  # as on Windows
        raise TypeError("argument 1 must be str, not None")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(sys, "platform", platform)
    assert not keep_freed_memory()
