import csv
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import InThreads
from phantoms import AFFINES, Write

from voxelmorph_monai.apps import cohort, shipped
from voxelmorph_monai.apps import register as registration
from voxelmorph_monai.apps.cohort import register_cohort
from voxelmorph_monai.apps.options import DEFAULTS, Options
from voxelmorph_monai.apps.register_files import register_files
from voxelmorph_monai.cli import main
from voxelmorph_monai.networks import Registration, VoxelMorph
from voxelmorph_monai.space.template import WorkingGrid

DEADLINE = 240  # seconds, for the imports of some processes on a machine that is busy
ALIGNED = Options(space="fixed", alignment="none", refine=False)
NUMBERS = {
    "dice": {
        stage: {"3": value, "mean": value} for stage, value in (("before", 0.25), ("affine", 0.5), ("after", 1.0))
    },
    **{"correlation_before": 0.1, "correlation_affine": 0.2, "correlation_after": 0.3},
    **{"folding_percent": 0.5, "sdlogj": None, "inverse_consistency_mm": 0.125},
    "seconds": {"affine": 1.5, "network": 0.25},
}


def write_list(folder: Path, *rows: str, columns: str = "name,moving,fixed") -> Path:
    path = folder / "pairs.csv"
    path.write_text("\n".join([columns, *rows, ""]), encoding="utf-8")
    return path


def read_table(output: Path) -> dict[str, dict[str, str]]:
    with (output / "cohort.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def statuses(output: Path) -> dict[str, str]:
    return {name: row["status"] for name, row in read_table(output).items()}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Four pairs of files which are no images."""
    for name in "abcdf":
        (tmp_path / f"{name}.nii").write_text(f"scan {name}")
    return write_list(tmp_path, *(f"{name},{name}.nii,f.nii" for name in "abcd"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No processes and no registration, for what does not depend on them; lists the scans that were registered."""
    made: list[str] = []

    @functools.wraps(register_files)
    def quick(moving: Path, fixed: Path, output: Path, *, options: Options, **_: Any) -> dict[str, Any]:
        text = moving.read_text()
        made.append(moving.stem)
        if text == "bad":
            raise ValueError("moving is bad.\n Give another.")
        (output / "warped.nii.gz").write_text(f"{text} to {fixed.read_text()}: {options.alignment}")
        return {**NUMBERS, "options": options.record()}

    monkeypatch.setattr(cohort, "register_files", quick)
    monkeypatch.setattr(cohort, "Processes", InThreads)
    return made


def test_every_pair_gets_a_folder_and_a_row(tmp_path: Path, listed: Path, calls: list[str]) -> None:
    out = tmp_path / "out"
    assert register_cohort(listed, out) == (out / "cohort.csv", 4, 0, {})
    assert sorted(calls) == list("abcd")
    assert {path.name for path in out.iterdir()} == {*"abcd", "cohort.csv", "options.json", ".lock"}
    assert (out / "b" / "warped.nii.gz").read_text() == "scan b to scan f: affine"
    table = read_table(out)
    assert list(table) == list("abcd")
    assert table["c"] == {
        **{"name": "c", "status": "done", "reason": "", "dice_before": "0.25", "dice_affine": "0.5"},
        **{"dice_after": "1.0", "correlation_before": "0.1", "correlation_affine": "0.2", "correlation_after": "0.3"},
        **{"folding_percent": "0.5", "sdlogj": "", "inverse_consistency_mm": "0.125", "seconds": "1.75"},
        **{"moving": str(tmp_path / "c.nii"), "fixed": str(tmp_path / "f.nii")},
    }


def test_a_failed_pair_has_a_reason_and_is_tried_again(tmp_path: Path, listed: Path, calls: list[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "b.nii").write_text("bad")
    assert register_cohort(listed, out).errors == {"b": "moving is bad. Give another."}
    assert statuses(out) == {"a": "done", "b": "failed", "c": "done", "d": "done"}
    row = read_table(out)["b"]
    assert (row["reason"], row["dice_after"]) == ("moving is bad. Give another.", "")
    assert not (out / "b").exists()
    assert not list(out.glob(".[0-9]*"))
    calls.clear()
    assert register_cohort(listed, out) == (out / "cohort.csv", 4, 3, {"b": "moving is bad. Give another."})
    (tmp_path / "b.nii").write_text("good")
    assert register_cohort(listed, out) == (out / "cohort.csv", 4, 3, {})
    assert register_cohort(listed, out) == (out / "cohort.csv", 4, 4, {})
    assert calls == ["b", "b"]
    assert set(statuses(out).values()) == {"done"}


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))  # an older copy, of the same size


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda folder: (folder / "b.nii").write_text("a longer scan"), "b"),
        (lambda folder: touch(folder / "b.nii"), "b"),
        (lambda folder: touch(folder / "f.nii"), "abcd"),
        (lambda folder: (folder / "out" / "c" / "warped.nii.gz").unlink(), "c"),
        (lambda folder: (folder / "out" / "c" / "pair.json").write_text("{"), "c"),
        (lambda folder: shutil.rmtree(folder / "out" / "c"), "c"),
        (lambda folder: write_list(folder, "x,a.nii,f.nii", "b,c.nii,f.nii"), "ac"),
        (lambda folder: shutil.copytree(folder / "out" / "c", folder / "out" / ".123-0a1b2c3d.d"), ""),
        (lambda folder: (folder / "out" / "cohort.csv").unlink(), ""),
    ],
)
def test_what_changed_is_done_again_and_nothing_else(
    tmp_path: Path, listed: Path, calls: list[str], change: Callable[[Path], object], again: str
) -> None:
    out = tmp_path / "out"
    register_cohort(listed, out)
    calls.clear()
    change(tmp_path)
    assert not register_cohort(listed, out).errors
    assert "".join(sorted(calls)) == again
    assert set(statuses(out).values()) == {"done"}
    assert not list(out.glob(".[0-9]*"))


def test_other_options_are_refused_or_redo_all(tmp_path: Path, listed: Path, calls: list[str]) -> None:
    out, weights = tmp_path / "out", tmp_path / "w.pt"
    torch.save(VoxelMorph("vm1").state_dict(), weights)
    plain = Options(weights, "vm1")
    register_cohort(listed, out, options=Options(str(weights), "vm1", alignment="affine", grid=None))  # the defaults
    register_cohort(listed, out, options=plain)
    assert len(calls) == 4
    with pytest.raises(ValueError, match=r"out holds .*: alignment was affine, now rigid\. "):
        register_cohort(listed, out, options=replace(plain, alignment="rigid"))
    with pytest.raises(ValueError, match=r"grid was None, now {'size': \[80, 96, 112\], 'spacing': 2.0}"):
        register_cohort(listed, out, options=replace(plain, grid=WorkingGrid((80, 96, 112), 2.0)))
    with pytest.raises(ValueError, match=r"steps was None, now 2"):
        register_cohort(listed, out, options=replace(plain, steps=2))
    with pytest.raises(ValueError, match=r"bids was False, now True"):
        register_cohort(listed, out, options=plain, bids=True)
    touch(weights)
    with pytest.raises(ValueError, match=r"weights was .*w\.pt.*, now .*w\.pt"):
        register_cohort(listed, out, options=plain)
    assert len(calls) == 4
    register_cohort(listed, out, options=replace(plain, alignment="rigid"), overwrite=True)
    register_cohort(listed, out, options=replace(plain, alignment="rigid"))
    assert len(calls) == 8
    assert (out / "a" / "warped.nii.gz").read_text().endswith(": rigid")
    write_list(tmp_path, "a,a.nii,f.nii")  # an overwriting that stops half-way leaves pairs of two kinds
    register_cohort(listed, out, overwrite=True, options=plain)
    write_list(tmp_path, *(f"{name},{name}.nii,f.nii" for name in "abcd"))
    calls.clear()
    assert register_cohort(listed, out, options=plain).num_skipped == 1
    assert sorted(calls) == list("bcd")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (DEFAULTS, Options(shipped.shipped_weights(), "wide")),
        (Options(space="fixed"), Options("none", "vm1", space="fixed")),
        (Options("none", refine=False), Options("none", budget=0)),
    ],
)
def test_options_that_mean_the_same_are_the_same(
    tmp_path: Path, listed: Path, calls: list[str], first: Options, second: Options
) -> None:
    register_cohort(listed, tmp_path / "out", options=first)
    assert register_cohort(listed, tmp_path / "out", options=second).num_skipped == 4


def test_where_no_pair_is_done_options_may_change(tmp_path: Path, listed: Path, calls: list[str]) -> None:
    out = tmp_path / "out"
    for name in "abcd":
        (tmp_path / f"{name}.nii").write_text("bad")
    assert len(register_cohort(listed, out, options=Options(alignment="rigid")).errors) == 4
    for name in "abcd":
        (tmp_path / f"{name}.nii").write_text("good")
    assert not register_cohort(listed, out, options=Options(budget=math.inf)).errors
    assert register_cohort(listed, out, options=Options(budget=math.inf)).num_skipped == 4  # JSON knows no infinity
    with pytest.raises(ValueError, match=rf"budget was inf, now {DEFAULTS.budget}"):
        register_cohort(listed, out)
    assert len(calls) == 8  # each of them twice


def test_options_are_checked_before_the_work(tmp_path: Path, listed: Path, calls: list[str]) -> None:
    (tmp_path / "w.pt").write_text("no network")
    network = Registration(VoxelMorph("vm1")).eval()
    for how, options, error, message in (
        ({"jobs": 0}, {}, ValueError, "^jobs is 0. At least 1"),
        ({"jobs": 2, "scheduler": "tcp://x:1"}, {}, ValueError, "^jobs is 2, but the scheduler tcp://x:1"),
        ({"spcae": "fixed"}, {}, TypeError, "unexpected keyword argument 'spcae'"),
        ({}, {"spcae": "fixed"}, TypeError, "unexpected keyword argument 'spcae'"),
        ({"moving_labels": "x.nii"}, {}, TypeError, "unexpected keyword argument 'moving_labels'"),
        ({}, {"budget": -5}, ValueError, r"budget is -5\. .*0 seconds or more"),
        ({}, {"weights": tmp_path / "none.pt"}, FileNotFoundError, "none.pt do not exist"),
        ({}, {"weights": tmp_path / "w.pt"}, ValueError, "do not fit the network"),
        ({}, {"weights": network}, TypeError, "weights is a Registration, .* file"),
    ):
        with pytest.raises(error, match=message):
            register_cohort(listed, tmp_path / "out", options=Options(**options), **how)  # type: ignore[arg-type]
    assert not calls
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_may_be_of_slices_or_of_volumes(tmp_path: Path, listed: Path, calls: list[str], dims: int) -> None:
    weights = tmp_path / "w.pt"
    torch.save(VoxelMorph("vm1", dims).state_dict(), weights)
    assert not register_cohort(listed, tmp_path / "out", options=Options(weights, "vm1")).errors
    assert len(calls) == 4


def test_folders_of_others_stay_as_they_are(tmp_path: Path, listed: Path, calls: list[str]) -> None:
    out = tmp_path / "out"
    (out / "c").mkdir(parents=True)
    for strange in (out, listed):
        with pytest.raises(ValueError, match=rf"{strange} was not made by 'vxm register --list'"):
            register_cohort(listed, strange, overwrite=True)
    (out / "c").rmdir()
    register_cohort(write_list(tmp_path, "a,a.nii,f.nii"), out)
    (out / "c").mkdir()
    (out / "c" / "notes.txt").touch()
    write_list(tmp_path, "a,a.nii,f.nii", "c,c.nii,f.nii")
    with pytest.raises(ValueError, match=r"out.c is in the way"):
        register_cohort(listed, out, overwrite=True)
    assert calls == ["a"]
    assert [path.name for path in (out / "c").iterdir()] == ["notes.txt"]


def test_all_faults_of_a_list_are_told_before_the_work(tmp_path: Path, listed: Path, calls: list[str]) -> None:
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / "x.nii").touch()
    rows = [
        "one,a.nii,f.nii,",
        "two,none.nii,f.nii,none_labels.nii",
        "ONE,b.nii,f.nii,",
        "three,./sub/../a.nii,f.nii,",
        "../four,c.nii,f.nii,",
        ".five,c.nii,f.nii,d.nii",
        "cohort.csv,d.nii,f.nii,",
        "six,,f.nii,",
        "seven,d.nii,f.nii",
        "",
        f"eight,{out / 'a' / 'x.nii'},{tmp_path / 'f.nii'},",
        " , b.nii , f.nii , a.nii ",
        ",b.nii,f.nii,c.nii",
        f"{'x' * 201},d.nii,f.nii,a.nii",
        "ten.,d.nii,f.nii,b.nii",
        "Thumbnails,c.nii,f.nii,b.nii",
    ]
    write_list(tmp_path, *rows, columns="\ufeffname, moving,fixed,moving_labels")
    with pytest.raises(ValueError, match=r"pairs\.csv has 14 errors:") as caught:
        register_cohort(listed, out)

    def name(wrong: str) -> str:
        return f"the name '{wrong}' cannot be a folder here; use up to 200 letters, digits and _ . + -"

    assert str(caught.value).splitlines()[1:] == [
        f"  line 3: moving does not exist: {tmp_path / 'none.nii'}",
        f"  line 3: moving_labels does not exist: {tmp_path / 'none_labels.nii'}",
        "  line 4: the name 'ONE' is also used in line 2; give each pair its own",
        "  line 5: the same pair as in line 2",
        f"  line 6: {name('../four')}",
        f"  line 7: {name('.five')}",
        f"  line 8: {name('cohort.csv')}",
        "  line 9: moving is empty",
        "  line 10: 3 cells for 4 columns",
        f"  line 12: moving lies in the output folder: {out / 'a' / 'x.nii'}",
        "  line 14: the name 'b_to_f' is also used in line 13; give each pair its own",
        f"  line 15: {name('x' * 201)}",
        f"  line 16: {name('ten.')}",
        f"  line 17: {name('Thumbnails')}",
    ]
    write_list(tmp_path, *(f"p{i},none{i}.nii,f.nii" for i in range(30)))
    with pytest.raises(ValueError, match="has 30 errors") as caught:
        register_cohort(listed, out)
    assert str(caught.value).splitlines()[-2:] == [
        f"  line 21: moving does not exist: {tmp_path / 'none19.nii'}",
        "  and 10 more",
    ]
    assert not calls


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"pairs\.csv has the columns \(none\)\. "),
        (b"moving\na.nii\n", r"pairs\.csv has the columns moving\. .*moving and fixed"),
        (b"moving;fixed\na.nii;f.nii\n", r"has the columns moving;fixed\. .* commas"),
        (
            b"moving,fixed,moving_label\na.nii,f.nii,a.nii\n",
            "columns moving, fixed, moving_label. .*name, moving_labels, fixed_labels, moving_mask, fixed_mask",
        ),
        (b"moving,fixed,moving\na.nii,f.nii,a.nii\n", "columns moving, fixed, moving. .*once"),
        (b"moving,fixed\n\n", r"pairs\.csv lists no pairs"),
        (b"moving,fixed\n\xff.nii,f.nii\n", "is not a CSV file in UTF-8: 'utf-8' codec"),
        (b'moving,fixed\n"a.nii,f.nii\n', "is not a CSV file in UTF-8: unexpected end of data"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        register_cohort(path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist\. .*a list of pairs"):
        register_cohort(tmp_path / "none.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_come_from_the_files(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/s-1.x.nii.gz", "t_1.mgz"):
        (tmp_path / name).touch()
    register_cohort(write_list(tmp_path, "sub/s-1.x.nii.gz,t_1.mgz", columns="moving,fixed"), tmp_path / "out")
    assert list(statuses(tmp_path / "out")) == ["s-1.x_to_t_1"]


def test_one_call_at_a_time(tmp_path: Path, listed: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, quick, errors = tmp_path / "out", cohort.register_files, []

    @functools.wraps(register_files)
    def call_again(*args: Any, **options: Any) -> dict[str, Any]:
        try:
            register_cohort(listed, out)
        except BlockingIOError as error:
            errors.append(str(error))
        return quick(*args, **options)

    monkeypatch.setattr(cohort, "register_files", call_again)
    assert not register_cohort(listed, out, jobs=1).errors
    assert len(errors) == 4
    assert all(error.startswith(f"{out} is in use") for error in errors)
    assert sorted(calls) == list("abcd")


def test_an_answer_that_is_lost_is_not_worked_for_twice(tmp_path: Path, listed: Path, calls: list[str]) -> None:
    """A cluster runs a call once more if the worker that holds its answer dies."""
    out = tmp_path / "out"
    (pair, *_) = cohort._read_list(listed, out)
    options = cohort._complete(DEFAULTS)
    for _ in range(2):
        cohort._register_pair(pair, out, options, cohort._as_json(options, bids=False, report=False, show_face=False))
    assert calls == ["a"]


def test_workers_that_write_elsewhere_are_noticed(
    tmp_path: Path, listed: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort, "_register_pair", print)
    errors = register_cohort(listed, tmp_path / "out").errors
    assert set(errors) == set("abcd")
    assert errors["a"].startswith(f"its result is not in {tmp_path / 'out'}")


def test_an_input_that_goes_away_meanwhile_spoils_its_pair_alone(
    tmp_path: Path, listed: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = cohort.register_files

    @functools.wraps(register_files)
    def remove(moving: Path, *args: Any, **options: Any) -> dict[str, Any]:
        (tmp_path / "b.nii").unlink(missing_ok=True)
        return quick(moving, *args, **options)

    monkeypatch.setattr(cohort, "register_files", remove)
    errors = register_cohort(listed, tmp_path / "out", jobs=1).errors
    assert list(errors) == ["b"]
    assert statuses(tmp_path / "out") == {"a": "done", "b": "failed", "c": "done", "d": "done"}


def test_a_file_that_changes_meanwhile_counts_as_changed(
    tmp_path: Path, listed: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = cohort.register_files

    @functools.wraps(register_files)
    def change(moving: Path, *args: Any, **options: Any) -> dict[str, Any]:
        summary = quick(moving, *args, **options)
        if moving.stem == "b":
            moving.write_text("changed while it was registered")
        return summary

    monkeypatch.setattr(cohort, "register_files", change)
    assert set(register_cohort(listed, tmp_path / "out").errors) == {"b"}
    monkeypatch.setattr(cohort, "register_files", quick)
    calls.clear()
    register_cohort(listed, tmp_path / "out")
    assert calls == ["b"]


@pytest.mark.parametrize(
    ("cpus", "gib", "pairs", "jobs", "threads"),
    [(16, 500, 99, 16, 1), (16, 25, 99, 4, 4), (16, 500, 3, 3, 5), (4, 1, 99, 1, 4)],
)
def test_as_many_processes_as_find_processors_and_memory(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gib: int, pairs: int, jobs: int, threads: int
) -> None:
    monkeypatch.setattr(cohort, "Processes", lambda jobs, threads: (jobs, threads))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=gib * 2**30))
    assert cohort._pool(None, None, pairs) == (jobs, threads)
    assert cohort._pool(2, None, 99) == (2, cpus // 2)


def test_the_network_is_loaded_once_and_again_if_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(shipped, "load_network", lambda path, *_: loaded.append(path))
    (tmp_path / "w.pt").touch()
    paths = Write(tmp_path)("moving", AFFINES["straight"])
    monkeypatch.setattr(registration, "_shown", stop)  # once the network is there
    options = Options(tmp_path / "w.pt")
    for _ in range(3):
        with pytest.raises(StopIteration):
            register_files(paths["moving"], paths["moving"], tmp_path / "out", options=options)
    assert len(loaded) == 1
    touch(tmp_path / "w.pt")
    with pytest.raises(StopIteration):
        register_files(paths["moving"], paths["moving"], tmp_path / "out", options=options)
    assert len(loaded) == 2


def stop(*_: Any, **__: Any) -> None:
    raise StopIteration


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A list of five pairs of small scans, the third of which cannot be registered."""
    write = Write(tmp_path)
    write("f", AFFINES["oblique"])
    for i in range(5):
        write(f"m{i}", AFFINES["straight"], bend=float(i))
    (tmp_path / "m2.nii.gz").write_bytes(b"no scan")
    return write_list(
        tmp_path,
        *(f"p{i},m{i}.nii.gz,f.nii.gz,m{i}_labels.nii.gz,f_labels.nii.gz" for i in range(5)),
        columns="name,moving,fixed,moving_labels,fixed_labels",
    )


def at_work(output: Path) -> Iterator[tuple[int, str]]:
    """Process and name of each pair that is being registered."""
    for path in list(output.glob(".[0-9]*")):
        if found := re.fullmatch(r"\.(\d+)-\w+\.(p\d)", path.name):  # not the one within it, of register_files
            yield int(found[1]), found[2]


class Killer(threading.Thread):
    """Watches who registers what, and kills the first process that works at ``p1``."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        self.output, self.seen, self.ended = output, set(), threading.Event()

    def run(self) -> None:
        victim = None
        while not self.ended.wait(0.005):
            self.seen.update(at_work(self.output))
            if victim is None and (victim := next((process for process, name in self.seen if name == "p1"), None)):
                os.kill(victim, signal.SIGKILL)

    def check(self) -> None:
        self.ended.set()
        self.join()
        times = [name for _, name in self.seen if name != "p2"]  # which fails faster than one can look
        assert {name: times.count(name) for name in times} == {"p0": 1, "p1": 2, "p3": 1, "p4": 1}


def check_registered(output: Path) -> None:
    assert statuses(output) == {"p0": "done", "p1": "done", "p2": "failed", "p3": "done", "p4": "done"}
    table = read_table(output)
    assert "not compressed" in table["p2"]["reason"]
    for name in ("p0", "p1", "p3", "p4"):
        summary = json.loads((output / name / "summary.json").read_text())
        assert float(table[name]["dice_after"]) == summary["dice"]["after"]["mean"]
        assert float(table[name]["correlation_after"]) == summary["correlation_after"]
    assert not list(output.glob(".[0-9]*"))


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
def test_ctrl_c_loses_nothing(
    tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [
        "register",
        "--list",
        str(scans),
        "--output",
        str(out),
        "--space",
        "fixed",
        "--alignment",
        "none",
        "--no-refine",
    ]
    command = [sys.executable, "-m", "voxelmorph_monai.cli", *words, "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end = time.monotonic() + DEADLINE
        while "p1" not in [name for _, name in at_work(out)]:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, shown = process.communicate(timeout=DEADLINE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert shown.splitlines()[-1] == "vxm register: interrupted"
    assert "Traceback" not in shown
    assert statuses(out) == {"p0": "done", **dict.fromkeys(["p1", "p2", "p3", "p4"], "pending")}
    assert not list(out.glob(".[0-9]*"))
    before = (out / "p0" / "summary.json").stat()
    monkeypatch.setattr(cohort, "Processes", InThreads)  # the processes have had their turn
    assert main([*words, "--jobs", "1"]) == 1
    assert (out / "p0" / "summary.json").stat() == before
    shown = capsys.readouterr()
    assert "vxm register: p2 failed: " in shown.err
    assert "register: 4 of 4 pairs in " in shown.err  # p0 is done
    assert ", 1 failed, mean Dice 0." in shown.err
    assert shown.out.splitlines()[0] == "4 of 5 pairs are registered, 1 of them by an earlier call"
    check_registered(out)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets of the worker that is killed
def test_a_killed_worker_of_a_cluster_loses_nothing(tmp_path: Path, scans: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: voxelmorph_monai[cohort]")
    out = tmp_path / "out"
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "local_directory": str(tmp_path)}
    with distributed.LocalCluster(**options, silence_logs=50) as cluster:
        killer = Killer(out)
        killer.start()
        errors = register_cohort(scans, out, scheduler=cluster.scheduler_address, options=ALIGNED).errors
        killer.check()
        assert list(errors) == ["p2"]
        check_registered(out)
        again = register_cohort(scans, out, scheduler=cluster.scheduler_address, options=ALIGNED)
        assert (again.num_skipped, list(again.errors)) == (4, ["p2"])


def test_without_dask_a_scheduler_is_refused(
    tmp_path: Path, listed: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"tcp://.* needs Dask.* pip install 'voxelmorph_monai\[cohort\]'"):
        register_cohort(listed, tmp_path / "out", scheduler="tcp://127.0.0.1:1")
    assert not calls
    assert not (tmp_path / "out").exists()
