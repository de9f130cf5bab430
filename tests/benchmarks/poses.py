"""Measure how often a head is not found in random poses, and whether contrasts of one visit end in the same place.

    python tests/benchmarks/poses.py DATA
    python tests/benchmarks/poses.py DATA --scans 2 --poses 3

DATA holds ``heads/`` (several contrasts of one visit), ``malf/`` and ``colin27/``, or some of them. Each scan
gets random headers: turned by up to 180 degrees, shifted by up to 80 mm, scaled by 0.8 to 1.2. The map to MNI152 is a
failure if the points of the brain end more than 5 mm on average from where they end with the original header. Seconds
are those of the processor.
"""

import argparse
import time
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import Affine, apply_affine
from voxelmorph_monai.anatomy import AnatomyNet, load_anatomy, look, seen_anatomy
from voxelmorph_monai.apps.shipped import shipped_bundle
from voxelmorph_monai.pose import Anatomy, anatomy_of_mni152, fit
from voxelmorph_monai.space.scan import Scan

FAILURE = 5.0  # mm
HELD_BACK = {"1005", "1018", "1019", "1003", "1023", "1004", "1024"}


def anatomy_of(scan: Scan, network: AnatomyNet) -> Anatomy:
    return seen_anatomy(*look(scan, network), scan.grid).coarser(2)


def brain_points() -> np.ndarray:
    template = anatomy_of_mni152()
    return apply_affine(template.affine, (template.posteriors.sum(0) > 0.5).nonzero().T.numpy().astype(float))


def distance(first: Affine, second: Affine, points: np.ndarray) -> float:
    return float(np.linalg.norm(apply_affine(first, points) - apply_affine(second, points), axis=0).mean())


def random_header(generator: np.random.Generator) -> Affine:
    header = np.eye(4)
    turn = Rotation.random(random_state=int(generator.integers(2**31))).as_matrix()
    header[:3, :3] = generator.uniform(0.8, 1.2) * turn
    header[:3, 3] = generator.uniform(-80, 80, 3)
    return header


def poses(paths: list[Path], number: int, network: AnatomyNet) -> None:
    """Failures in random poses of each scan."""
    generator, points, template = np.random.default_rng(0), brain_points(), anatomy_of_mni152()
    failures = total = 0
    for path in paths:
        scan = Scan.read(path)
        expected = fit(anatomy_of(scan, network), template)
        errors, seconds = [], []
        for _ in range(number):
            header = random_header(generator)
            turned = Scan(scan.array, header @ scan.affine, scan.name)
            start = time.process_time()
            try:
                found = fit(anatomy_of(turned, network), template)
                errors.append(distance(np.linalg.inv(header) @ found, expected, points))
            except ValueError as error:
                print(f"{path.name}: {error}")
                errors.append(np.inf)
            seconds.append(time.process_time() - start)
        failed = int((np.array(errors) > FAILURE).sum())
        failures, total = failures + failed, total + number
        print(
            f"{path.name}: {failed} of {number} failed, median {np.median(errors):.2f} mm, worst {max(errors):.2f} mm, "
            f"{np.mean(seconds):.1f} s",
            flush=True,
        )
    print(f"{failures} of {total} poses failed")


def contrasts(data: Path, number: int, network: AnatomyNet) -> None:
    """Rigid maps between the contrasts of a visit: distance from the header's identity, and of the loop."""
    visits: dict[str, dict[str, Path]] = {}
    for path in sorted((data / "heads").glob("*.nii.gz")):
        visit, contrast = path.name.removesuffix(".nii.gz").rsplit("_", 1)
        visits.setdefault(visit, {})[contrast] = path
    for visit, paths in islice(visits.items(), number):
        seen = {contrast: anatomy_of(Scan.read(path), network) for contrast, path in paths.items()}
        to_mni152 = fit(seen["T1W"], anatomy_of_mni152())
        points = apply_affine(to_mni152, brain_points())
        loop, names = np.eye(4), ["T1W", *(name for name in ("T2W", "FLAIR") if name in seen), "T1W"]
        for first, second in pairwise(names):
            mapping = fit(seen[second], seen[first], "rigid")
            loop = mapping @ loop
            print(f"{visit}: {first} to {second} {distance(mapping, np.eye(4), points):.2f} mm from the headers")
        print(f"{visit}: loop {distance(loop, np.eye(4), points):.2f} mm", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--weights", type=Path, default=shipped_bundle("brain_anatomy_segmentation") / "models/model.pt"
    )
    parser.add_argument("--scans", type=int, default=10)
    parser.add_argument("--poses", type=int, default=20)
    parser.add_argument("--visits", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = load_anatomy(args.weights)
    brains = [p for p in sorted((args.data / "malf").glob("*_t1.nii.gz")) if p.name[:4] not in HELD_BACK][:2]
    heads = sorted((args.data / "heads").glob("*.nii.gz"))
    first = [p for p in heads if "study1" in p.name] + [p for p in heads if "study1" not in p.name]
    paths = [*sorted((args.data / "colin27").glob("ch2.nii.gz")), *brains, *first][: args.scans]
    poses(paths, args.poses, network)
    contrasts(args.data, args.visits, network)


if __name__ == "__main__":
    main()
