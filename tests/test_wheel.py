"""What is published is whole: source archive and wheel, and the wheel alone, away from the source, registers scans."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from voxelmorph_monai import __version__

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="build is not installed")

Run = Callable[..., str]


def run(*command: object, cwd: Path, fails: bool = False) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert (done.returncode != 0) == fails, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the source archive and of the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("published")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def away(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; only what it depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("away")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (wheel,) = published.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    assert not [path for path in borrowed if Path(path, "voxelmorph_monai").exists()]  # but a link to the source
    (site / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    return folder


def test_archives_hold_what_git_knows(published: Path) -> None:
    known = run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / ".git").exists() else []
    if not known:
        pytest.skip("this is no clone: nothing says what the source is")
    with tarfile.open(published / f"voxelmorph_monai-{__version__}.tar.gz") as archive:
        source = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert set(known) - {".gitignore"} <= set(source)
    wheel = zipfile.ZipFile(published / f"voxelmorph_monai-{__version__}-py3-none-any.whl").namelist()
    needed = [name for name in known if name.startswith("voxelmorph_monai/")]
    needed += [f"voxelmorph_monai/{name}" for name in known if name.startswith("bundles/")]
    assert sorted(needed) == sorted(name for name in wheel if ".dist-info/" not in name)


def test_wheel_registers_real_scans_without_its_source(away: Path, real_pair: dict[str, Path]) -> None:
    vxm = away / "venv" / "bin" / "vxm"
    commands = re.findall(r"^    ([a-z][\w-]+) ", run(vxm, "--help", cwd=away), re.MULTILINE)
    assert {"register", "prepare", "pack-bundle", "quickstart"} <= set(commands)
    for command in commands:
        assert "usage: vxm " + command in run(vxm, command, "--help", cwd=away)
    run(vxm, "label-app", away / "app", cwd=away)
    quick = ["--size", 80, 96, 112, "--spacing", 2, "--transform", "none", "--no-refine"]
    run(vxm, "register", *real_pair.values(), "--output", away / "out", *quick, cwd=away)
    summary = json.loads((away / "out" / "summary.json").read_text(encoding="utf-8"))
    assert Path(summary["inputs"]["weights"]["path"]).is_relative_to(away)
    assert 1 - summary["correlation_after"] < 0.7 * (1 - summary["correlation_affine"])  # without the network: 1
    assert summary["folding_percent"] == 0


def test_types_of_the_wheel_are_seen(away: Path) -> None:
    script = away / "mine.py"
    script.write_text("from voxelmorph_monai import __version__\n\nnumber: int = __version__\n", encoding="utf-8")
    python = away / "venv" / "bin" / "python"
    said = run(sys.executable, "-m", "mypy", "--python-executable", python, script, cwd=away, fails=True)
    assert 'expression has type "str", variable has type "int"' in said  # without py.typed: nothing but its absence
    assert "Found 1 error" in said
