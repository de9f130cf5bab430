"""Kill commands at random moments: nothing is half-written, and the next run ends as one that was left alone.

    python -m tests.killing 50
    python -m tests.killing 20 prepare segment

The number of moments is shared by the commands: all, or those that are named.

Each command is run once to its end, which gives the result to reach and the time it takes. It is then killed with
SIGKILL at moments spread over that time. What it leaves must be whole files; the same command is run again to its end,
with ``--overwrite`` where the first run had already written a result.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np

from tests.phantoms import AFFINES, Write
from voxelmorph_monai.apps.shipped import shipped_bundle
from voxelmorph_monai.maps.files import read_transform
from voxelmorph_monai.space.template import sample_scan

VXM = [sys.executable, "-m", "voxelmorph_monai.cli"]
QUICK = ["--space", "fixed", "--steps", "3"]


def commands(inputs: Path) -> dict[str, list[str]]:
    """Command lines by name; the output comes after them."""
    write = Write(inputs)
    moving = write("moving", AFFINES["oblique"], 2.0)["moving"]
    fixed = write("fixed", AFFINES["straight"])["fixed"]
    brains = inputs / "brains"
    brains.mkdir()
    for name in ("mni152", "colin27"):
        shutil.copy(sample_scan(name), brains)
    (inputs / "pairs.csv").write_text(f"name,moving,fixed\na,{moving},{fixed}\nb,{fixed},{moving}\n")
    return {
        "register": ["register", moving, fixed, *QUICK, "--output"],
        "register --list": ["register", "--list", str(inputs / "pairs.csv"), "--jobs", "2", *QUICK, "--output"],
        "prepare": ["prepare", str(brains), "--size", "40", "48", "48", "--spacing", "4"],
        "segment": ["segment", str(brains / "colin27.nii.gz"), "--output"],
        "pack-bundle": ["pack-bundle", str(shipped_bundle("brain_t1_registration")), "--output"],
    }


def visible(folder: Path) -> list[Path]:
    """Files that a user takes for results."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.parts))


def check_whole(path: Path) -> None:
    """Read a file to its end."""
    if path.name.endswith((".nii", ".nii.gz")):
        np.asanyarray(nib.load(path).dataobj)
    elif path.suffix in (".h5", ".txt", ".tfm"):
        read_transform(path)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".html":
        assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    else:
        assert path.stat().st_size > 0


def voxels(folder: Path) -> dict[str, bytes]:
    """What the results are, without times and dates."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in visible(folder)
        if path.name.endswith((".nii.gz", ".h5", ".zip"))
    }


def start(command: Sequence[str], output: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*VXM, *command, str(output)],
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_at(command: Sequence[str], output: Path, moment: float) -> bool:
    """Kill the command and its children after some seconds; whether it was still at work."""
    process = start(command, output)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def finish(command: Sequence[str], output: Path) -> None:
    """Run the command to its end; over what an earlier run had already written, if it says so."""
    process = start(command, output)
    _, message = process.communicate()
    if process.returncode == 2 and "--overwrite" in message:
        process = start([*command[:-1], "--overwrite", command[-1]], output)
        _, message = process.communicate()
    assert process.returncode == 0, message


def run(name: str, command: Sequence[str], times: int, random: np.random.Generator, folder: Path) -> int:
    """Kill a command ``times`` times, in as many folders; returns how often it was still at work."""
    began = time.monotonic()
    finish(command, folder / "reference")
    length = time.monotonic() - began
    wanted, killed = voxels(folder / "reference"), 0
    for number in range(times):
        output = folder / f"{name.replace(' ', '')}-{number}"
        moment, began = length * (number + random.random()) / times, time.monotonic()
        if kill_at(command, output, moment):
            killed += 1
        else:
            length = min(length, time.monotonic() - began)  # the first run compiles, and the machine may have been busy
        for path in visible(output):
            check_whole(path)
        finish(command, output)
        assert voxels(output) == wanted, f"{name}, killed after {moment:.1f} s, ends in other results"
        left = [path.name for path in output.rglob("*") if path.name.startswith(".") and "tmp" in path.name]
        assert not left, left
        shutil.rmtree(output)
    shutil.rmtree(folder / "reference")
    return killed


def main() -> None:
    times, random = int(sys.argv[1]), np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        lines = {name: words for name, words in commands(Path(folder)).items() if name in (sys.argv[2:] or [name])}
        for name, command in lines.items():
            killed = run(name, command, -(-times // len(lines)), random, Path(folder))
            print(f"{name}: killed {killed} times; nothing lost, nothing half-written", flush=True)


if __name__ == "__main__":
    main()
