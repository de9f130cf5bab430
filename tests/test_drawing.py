"""A picture is the same whichever process draws it."""

import subprocess
import sys

import numpy as np
import pytest

from voxelmorph_monai import drawing
from voxelmorph_monai.drawing import Row, beside, png


def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    frame = np.array([[-0.5, 11.5], [-0.5, 8.5]])
    return [Row(rng.random((4, 9, 12)), rng.normal(size=(2, 9, 12)), frame, "LR", (1.0, 2.0))]


def test_another_process_draws_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    here = png(rows(), 0.9, "a title")
    assert here.startswith(b"\x89PNG")
    assert here != png(rows(), 0.5, "a title")
    with beside():
        monkeypatch.setattr(drawing, "_draw", lambda *_: b"drawn here")
        assert png(rows(), 0.9, "a title") == here
        assert png(rows(), 0.9, "a title") == b"drawn here"  # it draws one
    assert png(rows(), 0.9, "a title") == b"drawn here"


def test_a_process_with_nothing_to_draw_ends() -> None:
    with beside():
        process = drawing._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None
    assert drawing._process is None


@pytest.mark.parametrize("python", ["/nowhere/python", "false"])
def test_without_a_process_the_picture_is_drawn_here(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    """Python may be part of another program, and cannot be started."""
    monkeypatch.setattr(sys, "executable", python)
    with beside():
        assert png(rows(), 0.9) == drawing._draw(rows(), 0.9, "")


def test_a_process_survives_an_interruption_and_ends_with_its_input() -> None:
    """Ctrl-C reaches all processes of a terminal; the one that waits for the picture decides."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    script = f"from voxelmorph_monai import drawing; drawing._draw = lambda *_: exec({code!r}); drawing.serve()"
    done = subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stderr == b""
