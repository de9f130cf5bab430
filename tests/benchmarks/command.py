"""Time whole commands from outside, each in a cold process: what a user waits for, and where the time goes.

    python -m tests.benchmarks command moving.nii.gz fixed.nii.gz                  # two skull-stripped brains
    python -m tests.benchmarks command ... --labels a.nii.gz b.nii.gz --peers      # and with labels, beside ANTs
    python -m tests.benchmarks command ... --output docs/performance.md            # into that page

The first table has wall clock and CPU seconds of each command, and its peak memory. On a machine that is busy with
other work only the CPU seconds say something. Timelines and imports below it come from runs of their own, as watching
slows a command down.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.benchmarks.pages import around, put

__all__ = ["main"]

MARKS = "<!-- command -->\n", "<!-- end of command -->\n"
VXM = (sys.executable, "-m", "voxelmorph_monai.cli")
PEERS = {"ANTsPy, SyN with its affine": "syn", "Greedy, deformation only": "greedy"}
_ROOTS = 12  # packages of an import that are listed
_SHORT = 0.05  # seconds: what took less is not listed


class Cost(NamedTuple):
    """What a process took: wall clock and CPU seconds, and GiB at its peak."""

    wall: float
    cpu: float
    memory: float


class Row(NamedTuple):
    """A command, what it should take on 2 idle cores, and what it took."""

    title: str
    goal: str
    costs: list[Cost]
    bytes: int = 0

    def __str__(self) -> str:
        wall, cpu, memory = (median(values) for values in zip(*self.costs, strict=True))
        size = f"{self.bytes / 2**20:.1f}" if self.bytes else ""
        return f"| {self.title} | {wall:.2f} s | {cpu:.2f} s | {memory:.2f} | {size} | {self.goal} |"


def cost_of(command: Sequence[str | Path]) -> Cost:
    """Run a command; raises RuntimeError with what it printed where it fails."""
    start = time.monotonic()
    with TemporaryDirectory() as folder, open(Path(folder) / "printed", "w+b") as printed:
        process = subprocess.Popen([*map(str, command)], stdout=printed, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            printed.seek(0)
            raise RuntimeError(f"{command}: exit code {process.returncode}: {printed.read().decode()[-2000:]}")
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir()))


def imports(code: str) -> list[str]:
    """Lines on the packages that ``code`` imports, those that take longest first."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    own: dict[str, int] = {}
    for line in done.stderr.splitlines():
        if line.startswith("import time:") and "self" not in line:
            microseconds, _, name = line.removeprefix("import time:").split("|")
            root = name.strip().split(".")[0]
            own[root] = own.get(root, 0) + int(microseconds)
    longest = sorted(own.items(), key=lambda item: -item[1])[:_ROOTS]
    return [f"{name} {microseconds / 1e6:.2f}" for name, microseconds in longest if microseconds > 1e6 * _SHORT]


def timeline(words: Sequence[str | Path]) -> str:
    """When the parts of a command began, as an indented block of text."""
    command = [sys.executable, "-m", "tests.benchmarks.timeline", *map(str, words), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.endswith(("wall", "in all"))]
    return "\n".join(f"      {line}" for line in lines)


class Run:
    """The commands, in turns, and the block of the page that shows them."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.rows: dict[str, Row] = {}
        self.notes: list[str] = []
        self.watched: list[Sequence[str | Path]] = []

    def row(self, title: str, goal: str, command: Sequence[str | Path], output: Path | None = None) -> None:
        """Run a command once more."""
        if output is not None and output.exists():
            command = [*command, "--overwrite"]
        row = self.rows.setdefault(title, Row(title, goal, []))
        row.costs.append(cost_of(command))
        self.rows[title] = row._replace(bytes=0 if output is None else size_of(output))
        print(self.rows[title], file=sys.stderr, flush=True)

    def turn(self, peers: bool) -> None:
        """Run all commands once, and the peers if they are wanted."""
        pair, work = (self.args.moving, self.args.fixed), self.work
        python = [sys.executable, "-c"]
        self.row("`import torch`", "", [*python, "import torch"])
        title = "`import voxelmorph_monai as v; v.register`"
        self.row(title, "torch + 0.6 s", [*python, "import voxelmorph_monai as v; v.register"])
        register = [*VXM, "register", *pair, "--output"]
        self.row("`vxm register --no-refine`", "6 s", [*register, work / "pass", "--no-refine"], work / "pass")
        if self.args.labels:
            labels = ["--moving-labels", self.args.labels[0], "--fixed-labels", self.args.labels[1]]
            command = [*register, work / "labels", "--no-refine", *labels]
            self.row("the same with labels", "8 s", command, work / "labels")
        prepared = sorted((work / "prepared" / "images").glob("*.nii.gz"))
        none = ["register", *prepared, "--output", work / "none", "--no-refine", "--alignment", "none"]
        self.row("`vxm register --no-refine --alignment none`, prepared scans", "4 s", [*VXM, *none], work / "none")
        if self.args.refine:
            self.row("`vxm register`", "16 s, 2.5 GiB", [*register, work / "refined"], work / "refined")
        warped = work / "warped.nii.gz"
        apply = ["apply", work / "pass" / "forward.h5", "--image", pair[0], "--reference", pair[1], "--output", warped]
        self.row("`vxm apply`, one transform, one image", "2.5 s", [*VXM, *apply], warped)
        self.watched = [[*register[3:], work / "pass", "--no-refine"], none, apply]
        for title, peer in PEERS.items() if peers else ():
            script = Path(__file__).with_name("peers.py")
            scans = pair if peer == "syn" else prepared
            command = [sys.executable, script, peer, *scans, work / "ddf.npy", "--threads", str(os.cpu_count())]
            self.row(title, "", command)

    def all(self) -> None:
        """Prepare the scans for those who need them, then take turns."""
        if not (self.work / "prepared" / "datalist.json").exists():
            pair = sorted([self.args.moving, self.args.fixed])
            cost_of([*VXM, "prepare", *pair, self.work / "prepared", "--jobs", "1", "--validation", "0", "--test", "0"])
        for number in range(self.args.turns):
            self.turn(self.args.peers and number == 0)  # they take long
        for words in self.watched:
            self.notes.append(f"`vxm {words[0]}`, when each part began:\n\n{timeline(words)}\n")
        for code in ("import voxelmorph_monai as v; v.register", "import voxelmorph_monai.apps.apply"):
            self.notes.append(f"`{code}`, seconds of each package: {', '.join(imports(code))}")

    def block(self) -> str:
        """Write the block of the page."""
        text = [
            f"{date.today():%d %B %Y}, {os.cpu_count()} cores; load of the machine at the end {os.getloadavg()[0]:.1f} "
            f"(1 would be this benchmark and nothing else). Medians of {self.args.turns} turns, of ANTs and Greedy one "
            "turn; GiB at the peak; MiB of the files that were written; the goals are wall clock on 2 idle cores.",
            "",
            "| | wall | CPU | GiB | MiB | goal |",
            "|---|---|---|---|---|---|",
            *map(str, self.rows.values()),
        ]
        return "\n".join(text) + "\n"


def main() -> int:
    """Print the table, and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks command", description=__doc__.splitlines()[0])
    parser.add_argument("moving", type=Path, help="skull-stripped brain")
    parser.add_argument("fixed", type=Path, help="another one")
    parser.add_argument("--labels", type=Path, nargs=2, help="label maps of the two")
    parser.add_argument("--refine", action="store_true", help="the default command too, which refines")
    parser.add_argument("--peers", action="store_true", help="ANTs and Greedy too")
    parser.add_argument("--turns", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--work", type=Path, help="folder to write in, kept (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="page whose table is replaced")
    args = parser.parse_args()
    if args.output:
        around(args.output, MARKS)  # a page without marks is refused at once
    show = partial(put, page=args.output, marks=MARKS) if args.output else print
    with TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        run = Run(args, work)
        run.all()
        show(run.block())
        print("\n".join(run.notes), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
