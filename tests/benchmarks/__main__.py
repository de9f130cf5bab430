"""Time this package against its peers, on this machine, and print the table of ``docs/performance.md``.

    python -m tests.benchmarks                              # about 15 minutes on 2 idle cores
    python -m tests.benchmarks --output docs/performance.md # and put the table between the marks of that page
    python -m tests.benchmarks --quick                      # small images: does it run?
    python -m tests.benchmarks command MOVING FIXED         # whole commands instead, see command.py

Each measurement is a process of its own, where its peak memory is read. Each contender has a first turn, then comes the
growth with size; after that contenders take turns as long as the time lasts, and each row gives medians. The page is
written after each turn, so that what is interrupted is not lost. A row whose contenders disagree is no comparison: it
says so, and the exit status is 1.
"""

import argparse
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import processor
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks import command, speed
from tests.benchmarks.pages import around, put
from tests.benchmarks.speed import STRIDE, Cost, Measurement, Size

MARKS = "<!-- benchmark -->\n", "<!-- end of benchmark -->\n"
GIB_OF_A_WORKSTATION = 24

# Mean difference of displacements in voxels. Where the integration's resolution differs from MONAI's, the roughness of
# an untrained network's field (0.5 voxel long) adds 0.03; bfloat16 alone makes 0.002.
CLOSE, ROUGH = 0.02, 0.05

Answer = dict[str, np.ndarray]
Agreement = Callable[[Answer, Answer], tuple[str, bool]]


class Settings(NamedTuple):
    """How large a run is."""

    size: Size
    ladder: tuple[int, ...]  # sides of cubes
    product: int  # side of the matrices multiplied
    rounds: int  # how often each contender's turn comes at most
    seconds: float  # no repeated turn begins that would end later


FULL = Settings((160, 192, 224), (64, 96, 128, 160, 192, 256), 4096, 5, 840)
QUICK = Settings((64, 64, 96), (48, 64), 256, 1, 0)  # the peers' networks take multiples of 32 alone


# Agreement: what is left of the difference, and whether the contenders count as equal


def fields_agree(tolerance: float) -> Agreement:
    """Compare displacements 16 voxels from the border and deeper: beyond it MONAI's velocity is 0, ours goes on."""
    margin = 16 // STRIDE

    def agree(ours: Answer, theirs: Answer) -> tuple[str, bool]:
        inside = (..., *(slice(margin, -margin) for _ in range(3)))
        error = float(np.linalg.norm((ours["ddf"] - theirs["ddf"])[inside], axis=1).mean())
        return f"{error:.4f} voxel", error <= tolerance

    return agree


def numbers_agree(tolerance: float) -> Agreement:
    """Compare all numbers by their norm: where a gradient jumps, rounding alone decides between two values."""

    def agree(ours: Answer, theirs: Answer) -> tuple[str, bool]:
        errors = [float((np.nansum((ours[k] - theirs[k]) ** 2) / np.nansum(theirs[k] ** 2)) ** 0.5) for k in theirs]
        return f"{max(errors):.1g} relative", max(errors) <= tolerance

    return agree


def steps_agree(ours: Answer, theirs: Answer) -> tuple[str, bool]:
    """Compare the similarity before the step, -1 to 0, and the displacement."""
    error = abs(float(ours["similarity"] - theirs["similarity"]))
    text, equal = fields_agree(ROUGH)(ours, theirs)
    return f"{text}; loss {error:.1g}", equal and error <= 0.01


def means_agree(ours: Answer, theirs: Answer) -> tuple[str, bool]:
    """Compare mean distances of surfaces: MONAI takes boundary voxels where ours takes the surface between voxels."""
    error = abs(float(np.nanmean(ours["distance"]) - np.nanmean(theirs["distance"])))
    return f"{error:.2f} voxel", error <= 1


class Row(NamedTuple):
    """One line of the table: ours against a peer."""

    title: str
    ours: str
    peer: str
    faster: float  # what we aim at
    smaller: float | None = None  # the peer's memory divided by ours
    agree: Agreement | None = None  # None: not the same computation
    truth: str | None = None  # what ours has to agree with, where that is not the peer
    maps: int = 0  # of 4 bytes a voxel, read or written besides what is counted
    most: float | None = None  # GiB of ours at full size


ROWS = [
    Row("inference, `dense`", "register dense", "register dense, MONAI", 6, 2, fields_agree(ROUGH)),
    Row(
        "the same, integrated at MONAI's full resolution",
        "register dense, full resolution",
        "register dense, MONAI",
        1,
        agree=fields_agree(CLOSE),
    ),
    Row("the same in float32", "register dense, float32", "register dense, MONAI", 1, agree=fields_agree(ROUGH)),
    Row(
        "inference, `diffeomorphic`; MONAI's default net",
        "register diffeomorphic",
        "register, MONAI",
        20,
        agree=fields_agree(CLOSE),
        truth="register diffeomorphic, float32",
    ),
    Row("the same; `voxelmorph` 0.3.4", "register diffeomorphic", "register, voxelmorph", 1),
    Row("inference, `wide`, which comes with weights; MONAI's default net", "register wide", "register, MONAI", 1),
    # Windows are summed twice: 2 images in, 3 coefficients out; 5 maps in, the gradient out.
    Row("training step, `dense`", "train dense", "train dense, MONAI", 10, 2.85, steps_agree, maps=11),
    Row("training step, `diffeomorphic`", "train diffeomorphic", "train dense, MONAI", 20, maps=11, most=2.5),
    Row("LNCC 9³, with gradient", "lncc", "lncc, MONAI", 50, None, numbers_agree(1e-4), "lncc, MONAI in float64", 11),
    # The gradient of linear interpolation jumps at voxels, and points close to one are rounded to either side.
    Row("warp, with gradients", "warp", "warp, MONAI", 8, agree=numbers_agree(1e-2)),
    Row("integrate, with gradient", "integrate", "integrate, MONAI", 8, agree=numbers_agree(1e-2)),
    Row("Dice, 35 labels", "dice", "dice, MONAI", 100, agree=numbers_agree(1e-6), maps=2),
    Row("HD95, 35 labels", "hausdorff95", "hausdorff95, MONAI", 15, agree=means_agree, maps=2),
    Row("next cached pair; its training step", "load", "train diffeomorphic", 10, maps=4),
]
LADDER = ["register wide", "register diffeomorphic", "train diffeomorphic", "register dense", "train dense"]


# Running


def call(function: str, *args: Any) -> Any:
    """Run a function of ``speed`` in a process of its own. What comes back as text is the reason of a failure."""
    context = multiprocessing.get_context("forkserver")  # its imports are done once, and alike for all
    context.set_forkserver_preload([speed.__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=speed.answer, args=(sender, function, *args))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = "the process ended without a result"
    process.join()
    return found


def timed_call(function: str, *args: Any) -> tuple[Any, float]:
    """Do what :func:`call` does, say so, and tell how long it took."""
    start = time.monotonic()
    found = call(function, *args)
    seconds = time.monotonic() - start
    print(f"{function} {' '.join(map(str, args[:2]))}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return found, seconds


class Result(NamedTuple):
    """Medians of one contender."""

    seconds: float
    cpu_seconds: float
    memory: float
    answer: Answer


def summary(measurements: list[Measurement]) -> Result:
    """Reduce the turns of one contender."""
    medians = (median(m[i] for m in measurements) for i in range(3))
    return Result(*medians, answer=measurements[0].answer)


# The table


def formatted(seconds: float) -> str:
    """Three digits, in s or ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def least(row: Row, size: Size, ceiling: dict[str, float]) -> Cost | None:
    """Count what a row's own work takes at least; None where that is neither convolution nor sampling."""
    cost = Cost(0, 0, 0)
    if row.ours.startswith(("register", "train", "warp", "integrate")):
        cost = call("count", row.ours, size, ceiling)
        if isinstance(cost, str):
            raise RuntimeError(f"counting {row.ours}: {cost}")
    elif not row.maps:
        return None
    more = 4 * row.maps * float(np.prod(size))
    return Cost(cost.flops, cost.bytes + more, cost.seconds + more / ceiling["copy"])


def goal(ratio: float, wanted: float | None) -> str:
    """Write a ratio beside what it should be."""
    return f"{ratio:.3g}" + ("" if wanted is None else f" (goal {wanted:g})")


def line(row: Row, found: dict[str, Result | str], cost: Cost | None) -> tuple[str, bool]:
    """Write one row, and tell whether the contenders agree."""
    ours, peer = found[row.ours], found[row.peer]
    if isinstance(ours, str):
        raise RuntimeError(f"{row.ours} failed: {ours}")
    if isinstance(peer, str):
        return f"| {row.title} | {formatted(ours.seconds)} | not run: {peer.splitlines()[0]} |" + " |" * 8, True
    text, equal = "another computation", True
    truth = found[row.truth or row.peer]
    if row.agree is not None and not isinstance(truth, str):
        text, equal = row.agree(ours.answer, truth.answer)
    floor = (
        " | | "
        if cost is None
        else (
            f"{cost.flops / 1e9:.3g} | {cost.bytes / 1e9:.3g} | "
            f"{formatted(cost.seconds)}, {100 * cost.seconds / ours.seconds:.0f} %"
        )
    )
    speedup = peer.seconds / ours.seconds
    cells = [
        row.title,
        f"{formatted(ours.seconds)} ({formatted(ours.cpu_seconds)})",
        f"{formatted(peer.seconds)} ({formatted(peer.cpu_seconds)})",
        f"**{speedup:.3g}** (goal {row.faster:g})" if equal else "disqualified",
        f"{peer.cpu_seconds / ours.cpu_seconds:.3g}",
        f"{ours.memory:.2f}{'' if row.most is None else f' (at most {row.most:g})'}",
        f"{peer.memory:.2f}",
        goal(peer.memory / ours.memory, row.smaller),
        floor,
        text if equal else f"**differs**: {text}",
    ]
    return "| " + " | ".join(cells) + " |", equal


def fit(voxels: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Fit ``values = a + b * voxels`` so that relative errors are small: a, b, and the largest of them."""
    x, y = np.asarray(voxels, float), np.asarray(values, float)
    a, b = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones(len(x)), rcond=None)[0]
    return float(a), float(b), float(np.abs((a + b * x) / y - 1).max())


def growth_line(name: str, rungs: dict[int, Measurement | str], idle: float) -> str:
    """Write how time and memory of a contender grow with the side of a cube."""
    measured = {n: m for n, m in rungs.items() if not isinstance(m, str)}
    cells = [
        name,
        *(m if isinstance(m, str) else f"{formatted(m.seconds)}, {m.memory:.2f} GiB" for m in rungs.values()),
    ]
    if len(measured) > 1:
        voxels = [n**3 / 1e6 for n in measured]
        in_time, in_memory = (fit(voxels, [m[i] for m in measured.values()]) for i in (0, 2))
        most = (GIB_OF_A_WORKSTATION - idle - in_memory[0]) / in_memory[1]
        cells += [
            *(
                f"{a:.2f} + {b:.3f} {unit} (± {100 * error:.0f} %)"
                for (a, b, error), unit in ((in_time, "s"), (in_memory, "GiB"))
            ),
            f"{most:.0f} million voxels, {1e2 * most ** (1 / 3):.0f}³" if in_memory[1] > 0 else "no growth seen",
        ]
    return "| " + " | ".join(cells) + " |"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((text.split(":")[1].strip() for text in lines if text.startswith("model name")), processor())


def _versions() -> str:
    found = []
    for name in ("torch", "monai", "voxelmorph"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


class Run:
    """One run: what has been measured so far, and the block of the page that shows it."""

    def __init__(self, settings: Settings, show: Callable[[str], None]) -> None:
        self.settings = settings
        self.show = show
        self.shown = ""
        self.start = time.monotonic()
        self.ceiling: dict[str, float] = call("ceilings", settings.product)
        self.costs: dict[str, Cost | None] = {}
        self.turns: dict[str, list[Measurement]] = {}
        self.failed: dict[str, str] = {}
        self.rungs: dict[str, dict[int, Measurement | str]] = {}

    def turn(self, name: str) -> float:
        """Measure a contender once more; the seconds that took."""
        result, seconds = timed_call("measure", name, self.settings.size)
        if isinstance(result, str):
            self.failed[name] = result
        else:
            self.turns.setdefault(name, []).append(result)
        self.update()
        return seconds

    def update(self) -> None:
        """Show what has been measured so far."""
        self.shown = self.block()
        self.show(self.shown)

    def all(self) -> None:
        """First turns, growth, further turns."""
        wanted = dict.fromkeys(name for row in ROWS for name in (row.ours, row.peer, row.truth) if name)
        for row in ROWS:
            self.costs[row.title] = least(row, self.settings.size, self.ceiling)
        took = {name: self.turn(name) for name in wanted}
        for name in LADDER:
            self.rungs[name] = {}
            for n in self.settings.ladder:
                self.rungs[name][n], _ = timed_call("measure", name, (n, n, n))
                self.update()
        for _ in range(1, self.settings.rounds):
            for name in self.turns:
                if time.monotonic() - self.start + took[name] < self.settings.seconds:
                    took[name] = self.turn(name)

    def lines(self) -> list[tuple[str, bool]]:
        """Write the rows whose contenders have had a turn, and tell of each whether they agree."""
        found: dict[str, Result | str] = {name: summary(done) for name, done in self.turns.items()}
        found |= self.failed
        return [
            line(row, found, self.costs[row.title])
            for row in ROWS
            if {row.ours, row.peer, row.truth or row.peer} <= set(found)
        ]

    def block(self) -> str:
        """Write the block of the page."""
        size, ladder, ceiling = self.settings.size, self.settings.ladder, self.ceiling
        number = [len(done) for done in self.turns.values()]
        text = [
            f"{date.today():%d %B %Y}, {_cpu_name()}, {multiprocessing.cpu_count()} cores; {_versions()}. "
            f"{' x '.join(map(str, size))} voxels. Ceilings in this run: "
            f"{ceiling['float32'] / 1e9:.0f} GFLOP/s float32, {ceiling['bfloat16'] / 1e9:.0f} GFLOP/s bfloat16, "
            f"{ceiling['copy'] / 1e9:.0f} GB/s copied (read and written). Times are wall clock, in brackets CPU, "
            f"medians of {min(number, default=0)} to {max(number, default=0)} turns; memory is the peak in GiB "
            f"above the {ceiling['idle']:.2f} of a process that has imported all contenders. "
            f"The run took {(time.monotonic() - self.start) / 60:.1f} minutes.",
            "",
            "| | ours | peer | times faster | CPU | GiB | peer, GiB | ratio | GFLOP | GB | floor, share | difference |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(row for row, _ in self.lines()),
            "",
            "Growth with the number of voxels (fit in millions of them, with its largest relative error); "
            f"the last column is where the fit of memory meets {GIB_OF_A_WORKSTATION} GiB, an estimate:",
            "",
            "| | " + " | ".join(f"{n}³" for n in ladder) + " | time | memory | in 24 GiB |",
            "|---" * (len(ladder) + 4) + "|",
            *(growth_line(name, rungs, ceiling["idle"]) for name, rungs in self.rungs.items()),
        ]
        return "\n".join(text) + "\n"


def main() -> int:
    """Print the table, and give the exit status."""
    if sys.argv[1:2] == ["command"]:  # in a process of its own, as the memory of this one would be that of its children
        return subprocess.call([sys.executable, "-m", command.__name__, *sys.argv[2:]])
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small images")
    parser.add_argument(
        "--seconds", type=float, default=FULL.seconds, help="no repeated turn begins that would end later (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    if options.output:
        around(options.output, MARKS)  # a page without marks is refused at once
    run = Run(
        QUICK if options.quick else FULL._replace(seconds=options.seconds),
        show=partial(put, page=options.output, marks=MARKS) if options.output else lambda block: None,
    )
    run.all()
    print(run.shown)
    return 0 if all(equal for _, equal in run.lines()) else 1


if __name__ == "__main__":
    sys.exit(main())
