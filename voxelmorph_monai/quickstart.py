"""The quick start: two real brains that come with the project, registered from scratch through the bundle.

Colin27 (moving) and MNI152 (fixed) are prepared at 2 mm and 1 mm, the network is trained on this one pair at 2 mm, and
then evaluated and applied at 1 mm, all by the commands that a user would type; each is printed before it runs.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from voxelmorph_monai.preparation import Grid, mni152, mni152_tissue, prepare, sample
from voxelmorph_monai.spaces import read_image, read_labels, save_image

__all__ = ["quickstart"]

_GRIDS = {"2mm": Grid((80, 96, 112), 2.0), "1mm": Grid((160, 192, 224), 1.0)}
_TISSUES = ("cerebrospinal fluid", "grey matter", "white matter")


def _find_bundle() -> Path:
    bundle = Path(__file__).parents[1] / "bundles" / "brain_t1_registration"
    if not bundle.is_dir():
        raise FileNotFoundError(
            f"the quick start needs a clone of the project with its bundles, but there is no {bundle}."
        )
    return bundle


def _write_scans(folder: Path) -> None:
    for name in ("colin27", "mni152"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if not (folder / name / "t1.nii.gz").exists():
            image = mni152() if name == "mni152" else read_image(sample(name))
            tissue = mni152_tissue() if name == "mni152" else read_labels(sample(f"{name}_tissue"))
            save_image(folder / name / "tissue.nii.gz", *tissue)
            save_image(folder / name / "t1.nii.gz", *image)


def _run_bundle(bundle: Path, run_id: str, *configs: str, **options: object) -> None:
    files = str([f"configs/{config}" for config in configs])
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", files]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    print("\n$", shlex.join(["python", *command[1:]]), flush=True)
    code = subprocess.run(command, cwd=bundle, check=False).returncode
    if code != 0:
        raise ValueError(f"the command above must succeed, but it ended with exit code {code}.")


def quickstart(output: str | Path, jobs: int = 2) -> dict[str, object]:
    """Prepare, train, evaluate and register; returns the summary of the registration (``summary.json``).

    Args:
        output: folder for everything. What is there from an earlier, interrupted run is taken up where it stopped.
        jobs: processes for the preparation.
    """
    bundle, output, start = _find_bundle(), Path(output).absolute(), time.perf_counter()
    _write_scans(output / "scans")
    split = output / "split.json"
    split.write_text(json.dumps({"moving": ["colin27"], "fixed": ["mni152"]}))
    for name, grid in _GRIDS.items():
        print(f"\n{name}: aligning Colin27 and MNI152 to one space, grid {grid.size}", flush=True)
        prepare(
            [output / "scans"],
            output / name,
            images="*/t1.nii.gz",
            labels="*/tissue.nii.gz",
            grid=grid,
            split=split,
            jobs=jobs,
        )
    training = {"dataset_dir": output / "2mm", "output_dir": output / "training"}
    _run_bundle(bundle, "training", "train.json", "quickstart.yaml", **training)
    evaluating = {"section": "fixed", "overwrite": True, **training}
    _run_bundle(bundle, "evaluating", "train.json", "quickstart.yaml", "evaluate.json", **evaluating)
    pair = {
        f"{role}{suffix}": output / "1mm" / folder / f"{name}.nii.gz"
        for role, name in (("moving", "colin27"), ("fixed", "mni152"))
        for suffix, folder in (("", "images"), ("_label", "labels"))
    }
    weights, registered = output / "training" / "model.pt", output / "registration"
    _run_bundle(
        bundle,
        "run",
        "inference.json",
        **pair,
        weights=weights,
        scale_factor=0.5,
        output_dir=registered,
        overwrite=True,
    )
    summary: dict[str, object] = json.loads((registered / "summary.json").read_text())
    _print(summary, time.perf_counter() - start)
    print(f"\nlook at {registered / 'report.png'}")
    return summary


def _print(summary: dict[str, object], seconds: float) -> None:
    dice = summary["dice"]
    assert isinstance(dice, dict)
    print(f"\nColin27 to MNI152 at 1 mm{'before':>16}{'after':>10}")
    for number, name in enumerate(_TISSUES, start=1):
        print(f"Dice, {name:<23}{dice['before'][str(number)]:>12.3f}{dice['after'][str(number)]:>10.3f}")
    print(f"{'Dice, mean':<29}{dice['before']['mean']:>12.3f}{dice['after']['mean']:>10.3f}")
    print(f"{'correlation of the images':<29}{summary['similarity_before']:>12.3f}{summary['similarity_after']:>10.3f}")
    print(f"{'folded voxels':<29}{'':>12}{summary['folding_percent']:>8.4f} %")
    print(f"{'the registration itself':<29}{'':>12}{summary['seconds']:>8.2f} s")
    print(f"{'the whole quick start':<29}{'':>12}{seconds:>8.0f} s")
