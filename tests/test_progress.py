"""Long work says how far it is: with a bar where somebody watches, in plain lines elsewhere."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from voxelmorph_monai import progress
from voxelmorph_monai.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that goes on by ten seconds each time somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 10
        return self.now


def work(total: int | None, unit: str = "pair", shown: bool = True) -> None:
    with Progress("register", total, unit, shown=shown) as told:
        for i in range(12):
            told.advance(failed=i == 3, means=None if i == 3 else {"Dice": 0.1 * i}, notes=f"voxel {i}")


def test_a_log_gets_lines_with_what_came_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "time", Clock())
    work(12)
    shown = capsys.readouterr().err
    assert re.fullmatch(r"[ -~\n]+", shown)  # no control characters
    lines = shown.splitlines()
    assert lines[0] == "register: 3 of 12 pairs in 00:40, mean Dice 0.100, voxel 2, about 02:00 left"
    assert lines[1] == "register: 6 of 12 pairs in 01:20, 1 failed, mean Dice 0.240, voxel 5, about 01:20 left"
    assert lines[-1] == "register: 12 of 12 pairs in 02:40, 1 failed, mean Dice 0.573, voxel 11"
    assert len(lines) == 4


def test_short_work_is_one_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    work(12)
    assert len(capsys.readouterr().err.splitlines()) == 1
    work(None)  # nobody knows how much it is
    with Progress("align"):
        pass
    with Progress("register", 0, "pair"):
        pass
    work(12, shown=False)
    assert capsys.readouterr().err == ""


def test_work_of_unknown_length_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "time", Clock())
    work(None, "step")
    assert capsys.readouterr().err.splitlines()[0] == "register: 3 steps in 00:40, mean Dice 0.100, voxel 2"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(12)
    last = sys.stderr.getvalue().split("\r")[-1]  # type: ignore[attr-defined]
    assert "register: 100%" in last
    assert "12/12" in last
    assert "1 failed, mean Dice 0.573, voxel 11" in last


def test_a_stage_is_gone_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("align"):
        assert "align ..." in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert sys.stderr.getvalue().split("\r")[-2].strip() == ""  # type: ignore[attr-defined]


def test_a_notebook_gets_a_bar_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its standard error is no terminal, but tqdm.auto draws there."""
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work(12)
    assert "12/12" in sys.stderr.getvalue()  # type: ignore[attr-defined]
