"""Measure the anatomy network on real scans: structures against manual labels, brain masks, agreement of contrasts.

    python tests/benchmarks/anatomy.py DATA --weights bundles/brain_anatomy_segmentation/models/model.pt
    python tests/benchmarks/anatomy.py DATA --scans 1005 1018 --skip heads

DATA holds ``malf/`` (T1 scans and their Neuromorphometrics labels), ``colin27/`` and ``heads/`` (several contrasts of
one visit); what is absent is left out. Everything is measured on the scans' own grids;
seconds are those of the processor.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from voxelmorph_monai.anatomy import STRUCTURES, AnatomyNet, Segmentation, load_anatomy, segment
from voxelmorph_monai.apps.shipped import shipped_bundle
from voxelmorph_monai.space.resampling import resample
from voxelmorph_monai.space.scan import Scan

# Neuromorphometrics' number of each of FreeSurfer's; cerebral cortex is all from 100 on, left ones odd.
NEUROMORPHOMETRICS = {
    **{2: 45, 41: 44, 4: 52, 43: 51, 7: 41, 46: 40, 8: 39, 47: 38, 10: 60, 49: 59, 11: 37, 50: 36, 12: 58, 51: 57},
    **{13: 56, 52: 55, 14: 4, 15: 11, 16: 35, 17: 48, 53: 47, 18: 32, 54: 31, 26: 30, 58: 23, 28: 62, 60: 61},
}


def dice(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return float(2 * (first & second).sum() / max(1, first.sum() + second.sum()))


def timed(scan: Scan, network: AnatomyNet) -> tuple[Segmentation, str]:
    start = time.process_time()
    found = segment(scan, network)
    return found, f"{time.process_time() - start:.1f} s"


def structures(data: Path, scans: list[str], network: AnatomyNet) -> None:
    """Dice of each structure, and of the mask, with manual labels."""
    rows = []
    for scan in scans:
        image = Scan.read(data / "malf" / f"{scan}_t1.nii.gz")
        found, seconds = timed(image, network)
        labels = Scan.read_labels(data / "malf" / f"{scan}_labels.nii.gz").array
        row = {}
        for structure in STRUCTURES[:-1]:
            n = structure.number
            cortex = (labels >= 100) & (labels % 2 == (n == 3))
            row[structure.name] = dice(
                found.labels.array == n, cortex if n in (3, 42) else labels == NEUROMORPHOMETRICS[n]
            )
        rows.append(list(row.values()))
        mask = dice(found.mask.array > 0, image.array > 0)
        print(
            f"malf {scan}: structures {np.mean(rows[-1]):.3f}, mask {mask:.3f} (of what is not 0), {seconds}",
            flush=True,
        )
    means = np.mean(rows, axis=0)
    print(f"mean of {len(scans)} scans: {means.mean():.3f}")
    for structure, value in zip(STRUCTURES, means, strict=False):
        print(f"  {structure.name:30s} {value:.3f}")


def colin(data: Path, network: AnatomyNet) -> None:
    """The mask of a whole head, as it is and in other poses, against that of the brain extracted."""
    image = Scan.read(data / "colin27" / "ch2.nii.gz")
    brain = Scan.read(data / "colin27" / "ch2bet.nii.gz").array > 0
    for axis, angle in ((0, 0), (0, 20), (1, 30), (2, 60), (0, 90), (2, 180)):
        turn = np.eye(4)
        rotation = Rotation.from_rotvec(np.radians(angle) * np.eye(3)[axis]).as_matrix()
        turn[:3, :3] = rotation
        try:
            found, seconds = timed(Scan(image.array, turn @ image.affine, "ch2"), network)
        except ValueError as error:
            print(f"colin27 turned by {angle} degrees about {'xyz'[axis]}: {error}", flush=True)
            continue
        seen = found.view.affine[:3, :3] / 2 @ np.array([[-1, 0, 0], [0, 0, -1], [0, 1, 0]])
        away = np.degrees(np.arccos(np.clip((np.trace(seen.T @ rotation) - 1) / 2, -1, 1)))
        left, right = found.labels.array == 2, found.labels.array == 41
        sides = (
            dice(left, left & (np.indices(left.shape)[0] < 90)),
            dice(right, right & (np.indices(right.shape)[0] >= 90)),
        )
        mask = dice(found.mask.array > 0, brain)
        print(
            f"colin27 turned by {angle} degrees about {'xyz'[axis]}: mask {mask:.3f}, the view is {away:.0f} degrees "
            f"off, sides right {sides[0]:.2f} {sides[1]:.2f}, {seconds}",
            flush=True,
        )


def contrasts(data: Path, network: AnatomyNet) -> None:
    """Overlap of what is found in two contrasts of one visit, by their headers."""
    visits: dict[str, dict[str, Path]] = {}
    for path in sorted((data / "heads").glob("*.nii.gz")):
        visit, contrast = path.name.removesuffix(".nii.gz").rsplit("_", 1)
        visits.setdefault(visit, {})[contrast] = path
    for visit, paths in visits.items():
        found = {}
        for contrast, path in paths.items():
            try:
                found[contrast] = timed(Scan.read(path), network)[0]
            except ValueError as error:
                print(f"{visit}: {error}")
        litres = {c: f.mask.array.sum() * np.prod(f.mask.spacing) * 1e-6 for c, f in found.items()}
        print(f"{visit}: " + ", ".join(f"{contrast} {volume:.2f} l" for contrast, volume in litres.items()), flush=True)
        for first, second in (("T1W", "T2W"), ("T1W", "FLAIR"), ("T2W", "FLAIR")):
            if first in found and second in found:
                one, two = found[first].labels, found[second].labels
                moved = resample(two, one.grid, np.eye(4), order=0).array
                each = [dice(one.array == s.number, moved == s.number) for s in STRUCTURES[:-1]]
                mask = dice(one.array > 0, moved > 0)
                print(f"  {first} and {second}: mask {mask:.3f}, structures {np.mean(each):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--weights", type=Path, default=shipped_bundle("brain_anatomy_segmentation") / "models/model.pt"
    )
    parser.add_argument("--scans", nargs="+", default=["1005", "1018", "1019"])
    parser.add_argument("--skip", nargs="*", default=[], choices=["malf", "colin27", "heads"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = load_anatomy(args.weights)
    parts = {
        "colin27": lambda: colin(args.data, network),
        "malf": lambda: structures(args.data, args.scans, network),
        "heads": lambda: contrasts(args.data, network),
    }
    for name, measure in parts.items():
        if name not in args.skip and (args.data / name).is_dir():
            measure()


if __name__ == "__main__":
    main()
