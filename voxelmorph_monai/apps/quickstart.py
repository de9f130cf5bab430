"""Register two brain scans that are included in the package: ``vxm quickstart``."""

from pathlib import Path

from voxelmorph_monai.apps.register_files import register_files
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import TISSUES, mni152, mni152_tissue, sample_scan

__all__ = ["quickstart"]


def _write_scans(folder: Path) -> dict[str, Path]:
    """Write Colin27 (moving) and MNI152 (fixed) with their tissues, unless they exist; returns the paths by role."""
    paths = {}
    for role, name in (("moving", "colin27"), ("fixed", "mni152")):
        paths[role], paths[f"{role}_labels"] = folder / f"{name}.nii.gz", folder / f"{name}_tissue.nii.gz"
        if not (paths[role].exists() and paths[f"{role}_labels"].exists()):
            folder.mkdir(parents=True, exist_ok=True)
            image = mni152() if name == "mni152" else Scan.read(sample_scan(name))
            tissue = mni152_tissue() if name == "mni152" else Scan.read_labels(sample_scan(f"{name}_tissue"))
            image.save(paths[role])
            tissue.save(paths[f"{role}_labels"])
    return paths


def quickstart(output: str | Path) -> dict[str, object]:
    """Write two scans to ``output/scans``, and register them into ``output/registered``; returns the summary.

    Args:
        output: folder for all files; the registration of an earlier quick start is replaced.
    """
    output = Path(output)
    paths = _write_scans(output / "scans")
    words = [f"--{role.replace('_', '-')} {path}" if "labels" in role else str(path) for role, path in paths.items()]
    print(
        "$ vxm register",
        *sorted(words, key=lambda word: word.startswith("--")),
        f"--output {output / 'registered'} --overwrite",
    )
    summary = register_files(
        paths["moving"],
        paths["fixed"],
        output / "registered",
        moving_labels=paths["moving_labels"],
        fixed_labels=paths["fixed_labels"],
        overwrite=True,
        progress=True,
    )
    _print(summary)
    print(f"\nlook at {output / 'registered' / 'report.html'}")
    return summary


def _print(summary: dict[str, object]) -> None:
    dice, seconds = summary["dice"], summary["seconds"]
    assert isinstance(dice, dict)
    assert isinstance(seconds, dict)
    stages = ("before", "affine", "after")
    print(f"\n{'Colin27 to MNI152':<29}" + "".join(f"{stage:>10}" for stage in stages))
    for key, name in [*((str(i), f"Dice, {name}") for i, name in TISSUES.items()), ("mean", "Dice, mean")]:
        print(f"{name:<29}" + "".join(f"{dice[stage][key]:>10.3f}" for stage in stages))
    print(f"{'correlation of the images':<29}" + "".join(f"{summary[f'correlation_{s}']:>10.3f}" for s in stages))
    print(f"{'folded voxels':<29}{summary['folding_percent']:>28.4f} %")
    for stage, duration in seconds.items():
        print(f"{f'seconds, {stage}':<29}{duration:>30.1f}")
