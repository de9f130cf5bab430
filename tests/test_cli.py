import argparse
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from voxelmorph_monai import cli
from voxelmorph_monai.apps import compare as comparison
from voxelmorph_monai.apps import prepare as preparation
from voxelmorph_monai.apps import register_files as registration
from voxelmorph_monai.apps import uncertainty
from voxelmorph_monai.apps.options import Options
from voxelmorph_monai.apps.prepare import Prepared
from voxelmorph_monai.apps.shipped import shipped_weights, weights_file
from voxelmorph_monai.cli import main
from voxelmorph_monai.objective import SIMILARITIES
from voxelmorph_monai.space.template import WorkingGrid, sample_scan


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "voxelmorph_monai.cli", *words], capture_output=True, text=True)


def test_help_comes_without_the_heavy_imports() -> None:
    script = """
import sys
from voxelmorph_monai.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print(sorted({"torch", "monai", "itk", "nibabel", "nilearn", "scipy", "matplotlib", "pandas"} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "prepare" in shown
    assert shown.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_that_ends_in_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    example = cli.COMMANDS[command].example
    assert " ".join(shown.split()).endswith(f"example: {example}")
    assert example.startswith(f"vxm {command} ")


def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prepaer"])
    assert "invalid choice: 'prepaer'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_errors_are_one_line(tmp_path: Path) -> None:
    shown = run("prepare", str(tmp_path / "nothing"), str(tmp_path / "out"))
    assert shown.returncode == 2
    assert shown.stdout == ""
    (line,) = shown.stderr.splitlines()
    assert line == f"vxm prepare: these inputs do not exist: {tmp_path / 'nothing'}."


@pytest.mark.parametrize("words", [["--output=~/out"], ["--output", "~/out"]])
def test_a_home_that_the_shell_did_not_expand_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *words]) == 2
    assert "./~/out" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_what_is_asked_is_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls: list[Any] = []
    errors: dict[str, str] = {}

    def noted(*args: Any, **options: Any) -> Prepared:
        calls.append((args, options))
        return Prepared(tmp_path / "datalist.json", errors)

    monkeypatch.setattr(preparation, "prepare", noted)
    assert main(["prepare", "a", "b.nii.gz", "out"]) == 0
    defaults = {"images": "*.nii.gz", "labels": None, "maps": False, "split": None, "seed": 0}
    defaults |= {"validation": 0.1, "test": 0.1}
    assert calls == [(([Path("a"), Path("b.nii.gz")], Path("out")), {"grid": WorkingGrid(), "jobs": None, **defaults})]
    errors["x7"] = "no space left"
    words = "prepare a out --images *.mgz --labels *_l.mgz --size 80 96 112 --spacing 2 --split s.json "
    words += "--validation 0.2 --test 0.3 --seed 4 --jobs 3 --maps"
    assert main(words.split()) == 1
    options = {
        "images": "*.mgz",
        "labels": "*_l.mgz",
        "maps": True,
        "split": Path("s.json"),
        "validation": 0.2,
        "test": 0.3,
    }
    assert calls[1][1] == {"grid": WorkingGrid((80, 96, 112), 2.0), "seed": 4, "jobs": 3, **options}
    shown = capsys.readouterr()
    assert shown.err == "vxm prepare: x7 failed: no space left\n"
    assert "index.html" in shown.out


def test_what_is_asked_of_register_is_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls: list[Any] = []
    summary: dict[str, Any] = {"correlation_before": 0.5, "correlation_after": 0.75, "dice": None}
    summary["options"] = {"preset": "wide"}

    def noted(*args: Any, **options: Any) -> dict[str, Any]:
        calls.append((args, options))
        return summary

    monkeypatch.setattr(registration, "register_files", noted)
    register = "register m.mgz f.nii --output out "
    assert main(register.split()) == 0
    assert capsys.readouterr().out.splitlines() == ["correlation 0.500 -> 0.750", "out: look at report.html"]
    summary["dice"] = {"before": {"mean": 0.25}, "after": {"mean": 0.625}}
    words = "--weights w.pt --preset vm1 --space fixed --alignment rigid --budget 5 --similarity mi --steps 7 "
    words += "--smoothness 2.5 "
    words += "--moving-labels a.nii --fixed-labels b.nii --moving-mask c.nii --mask d.nii "
    words += "--size 80 96 112 --spacing 2 --device cpu --bids --overwrite --no-report --show-face"
    assert main((register + words).split()) == 0
    shown = capsys.readouterr().out
    assert "only aligned" not in shown
    assert "mean Dice 0.250 -> 0.625" in shown
    inputs = Path("m.mgz"), Path("f.nii"), Path("out")
    defaults: dict[str, Any] = {"moving_labels": None, "fixed_labels": None, "moving_mask": None, "fixed_mask": None}
    defaults |= {"moving_series": None, "fixed_series": None}
    defaults |= {"bids": False, "overwrite": False, "report": True, "show_face": False, "progress": True}
    assert calls[0] == (inputs, {"options": Options(), **defaults})  # the defaults of Python
    files = {"moving_labels": Path("a.nii"), "fixed_labels": Path("b.nii"), "moving_mask": Path("c.nii")}
    given: dict[str, Any] = {**files, "fixed_mask": Path("d.nii"), "bids": True, "overwrite": True, "progress": True}
    given |= {"moving_series": None, "fixed_series": None, "report": False, "show_face": True}
    options = Options(
        weights=Path("w.pt"),
        preset="vm1",
        device="cpu",
        budget=5.0,
        steps=7,
        similarity="mi",
        smoothness=2.5,
        space="fixed",
        alignment="rigid",
        grid=WorkingGrid((80, 96, 112), 2.0),
    )
    assert calls[1] == (inputs, {"options": options, **given})


def test_the_similarities_to_choose_from_are_those_there_are(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["register", "--help"])
    assert f"--similarity {{{','.join(SIMILARITIES)}}}" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Options]:
    """The options with which ``vxm register`` and some words would register two scans."""
    calls: list[Options] = []

    def noted(*_: Any, options: Options, **__: Any) -> dict[str, Any]:
        calls.append(options)
        used = {"preset": "wide" if weights_file(options) else None}
        return {"correlation_before": 0.5, "correlation_after": 0.75, "dice": None, "options": used}

    def ask(words: str) -> Options:
        assert main(f"register m.mgz f.nii --output out {words}".split()) == 0
        return calls[-1]

    monkeypatch.setattr(registration, "register_files", noted)
    return ask


@pytest.mark.parametrize(
    ("words", "weights", "budget"),
    [
        ("", shipped_weights(), 8.0),
        ("--space fixed", None, 8.0),
        ("--weights none --no-refine", None, 0.0),
        ("--weights none", None, 8.0),
        ("--same-person", None, 8.0),
        ("--weights none --budget 0", None, 0.0),
        ("--weights none --budget inf", None, "inf"),
    ],
)
def test_brains_alone_get_the_shipped_weights(
    words: str, weights: Path | None, budget: float | str, asked: Callable[[str], Options], capsys: Any
) -> None:
    options = asked(words)
    assert (weights_file(options), options.record()["budget"]) == (weights, budget)
    assert ("the scans were only aligned" in capsys.readouterr().out) == (budget == 0)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--space fixed --similarity mind --smoothness high --steps 3",
        "--weights none --alignment rigid --budget 30 --symmetric --size 80 96 112 --spacing 2",
        "--preset wide --brain-extraction off --same-person --budget inf --smoothness 1.5",
        "--no-refine",
    ],
)
def test_the_recorded_command_asks_for_the_same_again(words: str, asked: Callable[[str], Options]) -> None:
    options = asked(words)
    command = options.record()["command"]
    assert command.startswith("vxm register MOVING FIXED --output DIR")
    assert command.count("--") == 1 + words.count("--")
    assert asked(" ".join(options.words())).record() == options.record()


def test_the_former_name_of_the_alignment_is_known_but_not_shown(
    asked: Callable[[str], Options], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert asked("--transform rigid") == asked("--alignment rigid") == Options(alignment="rigid")
    assert asked("--transform none --space fixed").alignment == "none"
    calls: list[str] = []
    summary = {"sd_mm": {"mean": 0.25}, "meaning": "no error bar", "calibration": None}
    monkeypatch.setattr(
        uncertainty, "uncertainty_files", lambda *_, options, **__: calls.append(options.alignment) or summary
    )
    assert main(["uncertainty", "m.mgz", "f.nii", "--weights", "w.pt", "--output", "out", "--transform", "none"]) == 0
    assert calls == ["none"]
    with pytest.raises(SystemExit, match="2"):
        main(["register", "m.mgz", "f.nii", "--output", "out", "--transform", "bent"])
    capsys.readouterr()
    for command in ("register", "uncertainty"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert "--alignment {affine,rigid,none}" in shown
        assert "--transform" not in shown


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("--no-refine --budget 5", "--budget, --steps, --similarity and --smoothness configure the refinement"),
        ("--no-refine --similarity mi", "--budget, --steps, --similarity and --smoothness configure the refinement"),
        ("--no-refine --smoothness high", "--budget, --steps, --similarity and --smoothness configure the refinement"),
        ("--smoothness soft", "smoothness is 'soft'"),
        ("--smoothness -1", "smoothness is -1.0"),
        ("--symmetric --space fixed", "symmetric cannot be combined with space fixed"),
        ("--same-person --alignment none", "same_person aligns the scans rigidly"),
        ("--no-refine --steps 2", "--budget, --steps, --similarity and --smoothness configure the refinement"),
        ("--space fixed --spacing 2", "--spacing needs --size"),
        ("--budget nan", "budget is nan"),
        ("--budget -1", "budget is -1.0"),
        ("--steps 0", "steps is 0"),
    ],
)
def test_options_that_would_change_nothing_are_refused(words: str, match: str, capsys: Any) -> None:
    scan = str(sample_scan("colin27"))
    assert main(["register", scan, scan, "--output", "never", *words.split()]) != 0
    assert match in capsys.readouterr().err
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("words", "grid"),
    [
        ("", None),  # that of the literature
        ("--spacing 2", WorkingGrid(spacing=2.0)),
        ("--space fixed", None),  # the one that fits
        ("--space fixed --size 80 90", WorkingGrid((80, 90))),
    ],
)
def test_scans_that_are_no_brains_get_a_grid_that_fits(
    words: str, grid: WorkingGrid | None, asked: Callable[[str], Options]
) -> None:
    assert asked(words).grid == grid


def test_what_is_asked_of_compare_is_what_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls: list[Any] = []
    index = pd.MultiIndex.from_tuples([("dice", "structures", "a")], names=["measure", "over", "run"])
    table = pd.DataFrame({"mean": [0.71239]}, index=index)

    def noted(*args: Any, **options: Any) -> comparison.Comparison:
        calls.append((args, options))
        return comparison.Comparison(table, table, "they share scans")

    monkeypatch.setattr(comparison, "compare_runs", noted)
    assert main(["compare", "a", "b", "--output", "out", "--published", "ixi", "--common"]) == 0
    assert main(["compare", "a", "--output", "out"]) == 0
    assert calls == [
        (([Path("a"), Path("b")], Path("out")), {"common": True}),
        (([Path("a")], Path("out")), {"common": False}),
    ]
    first, second = capsys.readouterr().out.split("out: measures.csv")[:2]
    assert "0.7124" in first
    assert "they share scans\n" in first
    assert "TransMorph-bspl   dice over groups 0.761" in first
    assert "source: Chen et al." in first
    assert "TransMorph" not in second
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "a", "--output", "out", "--published", "mnist"])
    choices = capsys.readouterr().err.split("choose from")[1]
    assert set(re.findall(r"\w+", choices)) == comparison._library().keys()


def test_what_is_asked_of_uncertainty_is_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls: list[Any] = []
    summary: dict[str, Any] = {"sd_mm": {"mean": 0.25}, "meaning": "no error bar", "calibration": None}

    def noted(*args: Any, **options: Any) -> dict[str, Any]:
        calls.append((args, options))
        return summary

    monkeypatch.setattr(uncertainty, "uncertainty_files", noted)
    assert main(["uncertainty", "m.mgz", "f.nii", "--weights", "w.pt", "--output", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "out: sd_mm.nii.gz, 0.250 mm on average in the fixed scan",
        "no error bar",
    ]
    summary["calibration"] = {"expected_calibration_error": 0.125}
    words = "uncertainty m.mgz f.nii --weights w.pt --output out --preset p --samples 7 --seed 3 --space fixed "
    words += "--alignment none --moving-labels a.nii --fixed-labels b.nii --size 80 96 112 --spacing 2 --device cpu"
    assert main(words.split()) == 0
    assert "expected calibration error of the label probabilities: 0.125" in capsys.readouterr().out
    inputs = Path("m.mgz"), Path("f.nii"), Path("out")
    how: dict[str, Any] = {"moving_labels": None, "fixed_labels": None, "num_samples": 50, "seed": 0, "progress": True}
    options = Options(Path("w.pt"), "diffeomorphic", space="mni152", alignment="affine", grid=None, device=None)
    assert calls[0] == (inputs, {"options": options, **how})
    how |= {"moving_labels": Path("a.nii"), "fixed_labels": Path("b.nii"), "num_samples": 7, "seed": 3}
    grid = WorkingGrid((80, 96, 112), 2.0)
    options = Options(Path("w.pt"), "p", space="fixed", alignment="none", grid=grid, device="cpu")
    assert calls[1] == (inputs, {"options": options, **how})


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "prepare", cli.COMMANDS["prepare"]._replace(run=interrupted))
    assert main(["prepare", "a", "b"]) == 130
    assert capsys.readouterr().err == "vxm prepare: interrupted\n"


def test_termination_unwinds_as_an_interrupt_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undone: list[str] = []

    def terminated(args: argparse.Namespace) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
            return 0
        finally:
            undone.append("half of a file")

    monkeypatch.setitem(cli.COMMANDS, "prepare", cli.COMMANDS["prepare"]._replace(run=terminated))
    monkeypatch.setattr(sys, "argv", ["vxm", "prepare", "a", "b"])
    monkeypatch.setattr("voxelmorph_monai.memory.keep_freed_memory", lambda: True)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main() == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert undone
    assert capsys.readouterr().err == "vxm prepare: terminated\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_too_little_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "prepare", cli.COMMANDS["prepare"]._replace(run=full))
    assert main(["prepare", "a", "b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vxm prepare: out of memory. ")


MEMORY = """
import resource, sys
import torch
from voxelmorph_monai import cli
def hungry(args):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    torch.empty(512 << 20, dtype=torch.uint8)
cli.COMMANDS["register"] = cli.COMMANDS["register"]._replace(run=hungry)
sys.exit(cli.main(["register", "moving.nii", "fixed.nii", "--output", "out"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep this limit")
def test_torch_without_memory_is_one_line() -> None:
    """The words of the allocator are torch's own, which may change."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("vxm register: out of memory. ")
    assert str(512 << 20) in line


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
def test_ctrl_c_stops_the_processes_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "voxelmorph_monai.cli",
        "prepare",
        str(sample_scan("colin27")),
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 240  # the imports of two processes, on a machine that is busy
        while not (tmp_path / "out" / "grid.json").exists():  # then the inputs are checked and the work begins
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, shown = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert shown.splitlines()[-1] == "vxm prepare: interrupted"
    assert "Traceback" not in shown
    assert not (tmp_path / "out" / "datalist.json").exists()
    assert not list((tmp_path / "out" / "images").iterdir())
