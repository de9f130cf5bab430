"""A command imports no library that it does without, and does nothing twice: what makes it start, and end, fast.

How many seconds each takes is measured by ``python -m tests.benchmarks command``; here only what would bring them back.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from voxelmorph_monai import scan_loops
from voxelmorph_monai.apps.options import Options
from voxelmorph_monai.apps.register_files import register_files
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.maps.spatial_map import Displacement, SpatialMap

SIZE = (20, 24, 22)
HEAVY = ("ignite", "itk", "matplotlib", "monai", "nilearn", "pandas", "scipy.ndimage", "scipy.optimize", "torch")
SCRIPT = """
import json, sys
from voxelmorph_monai.cli import main
assert main(json.loads(sys.argv[1])) == 0
print(json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""


def blob(shift: int) -> NDArray[np.float32]:
    array = np.zeros(SIZE, np.float32)
    array[5 + shift : 15 + shift, 6:18, 5:17] = 100
    return gaussian_filter(array, 2.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, shift in (("moving", 1), ("fixed", 0)):
        save_image(tmp_path / f"{name}.nii.gz", blob(shift), np.diag([-2.0, 2.0, 2.0, 1.0]))
        save_image(tmp_path / f"{name}_labels.nii.gz", (blob(shift) > 50).astype(np.uint8), np.diag([-2.0, 2, 2, 1]))
    ddf = np.zeros((3, *SIZE), np.float32)
    SpatialMap(np.eye(4), np.eye(4), Displacement(ddf, np.diag([-2.0, 2, 2, 1]))).save(tmp_path / "forward.h5")
    return tmp_path


def imported(*words: str | Path) -> set[str]:
    command = [sys.executable, "-c", SCRIPT, json.dumps([*map(str, words)]), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("kind", ["image", "labels"])
def test_a_map_of_ours_is_applied_with_numpy_and_numba(folder: Path, kind: str) -> None:
    moving = folder / ("moving.nii.gz" if kind == "image" else "moving_labels.nii.gz")
    words = ("apply", folder / "forward.h5", f"--{kind}", moving, "--reference", folder / "fixed.nii.gz")
    assert imported(*words, "--output", folder / "warped.nii.gz") == set()


def test_a_registration_needs_torch_and_lets_another_process_draw_its_picture(folder: Path) -> None:
    scans = folder / "moving.nii.gz", folder / "fixed.nii.gz"
    options = ("--space", "fixed", "--alignment", "none", "--no-refine")
    found = imported("register", *scans, "--output", folder / "out", *options)
    assert found <= {"scipy.ndimage", "torch"}  # SciPy for the warnings of the page
    assert (folder / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_threads_of_a_command_sleep_while_they_have_no_work(folder: Path) -> None:
    """Those of OpenMP and OpenBLAS spin otherwise, beside the threads that work. The environment has the last word."""
    script = """
import json, os, sys
from voxelmorph_monai.cli import main
assert main() == 0
import threadpoolctl
blas = [pool for pool in threadpoolctl.threadpool_info() if "numpy" in pool["filepath"]]
print(json.dumps([os.environ["OMP_WAIT_POLICY"], *(pool["num_threads"] for pool in blas)]))
"""
    words = (
        "jacobian",
        folder / "forward.h5",
        "--reference",
        folder / "fixed.nii.gz",
        "--output",
        folder / "jacobian.nii.gz",
    )
    ours = {name: text for name, text in os.environ.items() if not name.startswith(("OMP_", "OPENBLAS_"))}
    for given, expected in (
        ({}, ["PASSIVE", 1]),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OPENBLAS_NUM_THREADS": "2"}, ["ACTIVE", 2]),
    ):
        command = [sys.executable, "-c", script, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=ours | given, check=True)
        assert json.loads(done.stdout.splitlines()[-1]) == expected
        (folder / "jacobian.nii.gz").unlink()


def test_each_volume_is_interpolated_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moving scan and its labels: by their headers, by the linear part, and by all of the map."""
    counts = {"pull": 0, "bend": 0, "volume_change": 0}

    def counted(name: str) -> None:
        real = getattr(scan_loops, name)

        def call(*args: object) -> object:
            counts[name] += 1
            return real(*args)

        monkeypatch.setattr(scan_loops, name, call)

    for name in counts:
        counted(name)
    labels = {f"{side}_labels": folder / f"{side}_labels.nii.gz" for side in ("moving", "fixed")}
    options = Options(space="fixed", alignment="none", refine=False)
    register_files(folder / "moving.nii.gz", folder / "fixed.nii.gz", folder / "out", options=options, **labels)
    assert counts == {"pull": 6, "bend": 0, "volume_change": 1}
