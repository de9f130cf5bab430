"""The benchmark runs and compares what is equal; how fast anything is, is not asked on a busy machine."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parents[1]
GOOD = [1.0, 2.0, 4.0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    page = tmp_path_factory.mktemp("docs") / "performance.md"
    page.write_text("before\n<!-- benchmark -->\nold\n<!-- end of benchmark -->\nafter\n", encoding="utf-8")
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", "--output", str(page)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # on small images threads only wait for each other
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    return done, page.read_text(encoding="utf-8")


def test_all_contenders_agree(run):
    done, _ = run
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "disqualified" not in done.stdout
    assert "failed" not in done.stdout


def test_each_row_gives_a_ratio_and_its_floor(run):
    _, page = run
    rows = [line for line in page.splitlines() if "(goal" in line]
    assert len(rows) >= 12  # with all that the project promises; 13 where voxelmorph is installed
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 12
        assert float(re.match(r"\*\*([\d.e+]+)\*\*", cells[3])[1]) > 0
        assert cells[8] == "" or (float(cells[9]) > 0 and "%" in cells[10])


def test_the_block_replaces_the_one_of_the_page(run):
    done, page = run
    assert page.startswith("before\n<!-- benchmark -->\n")
    assert page.endswith("<!-- end of benchmark -->\nafter\n")
    assert "old" not in page
    assert done.stdout.strip() in page


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return import_module("tests.benchmarks.__main__")


def test_a_line_is_fitted_exactly(table):
    a, b, error = table.fit(GOOD, [0.5 + 3 * x for x in GOOD])
    assert (a, b) == (pytest.approx(0.5), pytest.approx(3.0))
    assert error == pytest.approx(0, abs=1e-12)  # float64
    assert table.fit(GOOD, [x**2 for x in GOOD])[2] > 0.1


def test_a_wrong_answer_disqualifies(table):
    result = table.Result(1.0, 1.0, 1.0, {"dice": np.ones(3)})
    wrong = table.Result(5.0, 5.0, 5.0, {"dice": np.full(3, 1.1)})
    row = next(row for row in table.ROWS if row.ours == "dice")
    text, equal = table.line(row, {row.ours: result, row.peer: wrong}, None)
    assert not equal
    assert "disqualified" in text
    text, equal = table.line(row, {row.ours: result, row.peer: wrong._replace(answer=result.answer)}, None)
    assert equal
    assert "**5** (goal 100)" in text


@pytest.mark.parametrize(("seconds", "turns"), [(0, 1), (1e6, 3)])
def test_turns_repeat_while_time_lasts(table, monkeypatch, seconds, turns):
    """Nothing is measured here: each child process's result is made up, the n-th measurement of n seconds."""
    answer = dict.fromkeys(["ddf", "warped", "gradient", "dice", "distance"], np.ones((1, 3, 16, 16, 16)))
    answer["similarity"] = np.ones(())
    asked = []

    def call(function, *args):
        asked.append((function, *args[:2]))
        made = {"ceilings": {"float32": 1e9, "bfloat16": 1e9, "copy": 1e9, "idle": 0.4}, "count": table.Cost(1, 1, 1)}
        number = asked.count(asked[-1])
        return made.get(function) or table.Measurement(number, number, np.prod(args[1]) / 1e6, answer)

    monkeypatch.setattr(table, "call", call)
    pages = []
    run = table.Run(table.Settings((48, 48, 48), (64, 128), 8, 3, seconds), pages.append)
    run.all()
    assert {len(done) for done in run.turns.values()} == {turns}
    assert len(pages) == turns * len(run.turns) + 2 * len(table.LADDER)
    rows = [line for line in run.block().splitlines() if line.startswith("| ")]
    assert len(rows) == len(table.ROWS) + 2 + len(table.LADDER)
    assert rows[1].split("|")[2].strip() == f"{(turns + 1) // 2} s ({(turns + 1) // 2} s)"  # the median
    assert "1.000 GiB (± 0 %) | 24 million voxels, 287³" in rows[-1]  # 24 - 0.4


def test_what_a_convolution_costs(table, monkeypatch):
    speed = table.speed
    image, weight = torch.zeros(1, 4, 5, 6, 7), torch.zeros(8, 4, 3, 3, 3)
    monkeypatch.setitem(
        speed.CONTENDERS, "one", lambda size: lambda: torch.nn.functional.conv3d(image, weight, padding=1)
    )
    threads = torch.get_num_threads()
    cost = speed.count("one", (5, 6, 7), {"float32": 1e3, "bfloat16": 1.0, "copy": 1e9})
    torch.set_num_threads(threads)
    assert cost.flops == 2 * 27 * 4 * 8 * 5 * 6 * 7
    assert cost.bytes == 4 * (image.numel() + weight.numel() + 8 * 5 * 6 * 7)
    assert cost.seconds == pytest.approx(cost.flops / 1e3)


def test_a_page_without_marks_is_kept(table, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("mine\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md must hold <!-- benchmark --> and <!-- end of benchmark --> once"):
        table.put("block", page, table.MARKS)
    assert page.read_text(encoding="utf-8") == "mine\n"


def test_accuracy_compares_methods_on_the_pairs_that_all_have(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    accuracy = import_module("accuracy")
    dice = {"a": {"p": 0.5, "q": 0.6, "r": 0.7, "s": 0.1}, "b": {"p": 0.6, "q": 0.7, "r": 0.9}}
    rows = [
        {"method": method, "pair": pair, "dice": value, "folding_percent": 0.25, "cpu_seconds": 3.0}
        for method, values in dice.items()
        for pair, value in values.items()
    ]
    title, _, head, _, first, second = accuracy.table(pd.DataFrame(rows), "a").splitlines()
    assert title == "Over 3 pairs:"
    assert head.startswith("| method | Dice | difference to a |")
    assert first.startswith("| a | 0.6000 | +0.0000 ± 0.0000 |  | 0.25000 /  |")
    # differences .1 .1 .2: SD .05774, and Student's factor of 3 values is 4.303
    assert second.startswith("| b | 0.7333 | +0.1333 ± 0.1434 |")
    assert second.endswith("| 3.0 |  |")


def test_curves_are_read_at_the_smoothness_of_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    accuracy = import_module("accuracy")
    points = {
        "greedy": (0.5, 0.7),
        "one pass, 8 s, 1 mm": (0.4, 0.7),
        "one pass, 8 s, 0.5 mm": (0.6, 0.8),
        "syn, 3 1": (0.2, 0.6),
    }
    rows = [
        {"method": name, "pair": pair, "sdlogj": at / 2, "sdlogj_brain": at + shift, "dice": dice, "hd95_mm": 3.0}
        for name, (at, dice) in points.items()
        for pair, shift in (("p", 0.0), ("q", 0.01))
    ]
    lines = accuracy.curves(pd.DataFrame(rows), "greedy").splitlines()
    assert lines[2].startswith("| Greedy, 100x50x10 | 2 | 0.505 / 0.250 | 0.7000 |")
    assert lines[2].endswith("| 0.7000 |")
    assert lines[3].startswith("| one pass, 8 s, 1 mm | 2 | 0.405 / 0.200 |")
    assert lines[3].endswith("| 0.7500 |")  # half way between .7 and .8
    assert lines[4].startswith("| one pass, 8 s, 0.5 mm |")
    assert lines[4].endswith("|  |")
    assert lines[5].endswith("|  |")  # one point, which is not there


def test_another_contrast_is_a_function_of_the_intensity(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    accuracy = import_module("accuracy")
    ramp = torch.linspace(0, 1, 61)
    found = accuracy.other_contrast(ramp, seed=3)
    assert found[0] == 0  # the background stays
    assert found[1:].min() > 0
    assert found.max() <= 1
    assert (found.diff()[1:] < 0).any()  # not the old order
    assert torch.equal(found, accuracy.other_contrast(ramp, seed=3))
    assert not torch.equal(found, accuracy.other_contrast(ramp, seed=4))
    assert [len(accuracy.pairs_of([{}] * 4, number, 0)) for number in (None, 5)] == [12, 5]
