"""Displacement fields of other registration programs on two prepared scans, for comparison.

    python tests/benchmarks/peers.py greedy moving.nii.gz fixed.nii.gz ddf.npy --threads 1

It runs in an environment of its own, without torch: ``pip install nibabel picsl-greedy antspyx``. Each call is one
process, so that the peak memory is that of one registration.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray


def _voxels(warp: Path, fixed: str) -> NDArray[np.float32]:
    """ITK's vectors (LPS, mm) as voxels of the fixed grid along its array axes: ``(3, X, Y, Z)``."""
    vectors = np.asarray(nib.load(warp).dataobj, dtype=np.float64)[:, :, :, 0] * [-1, -1, 1]
    matrix = nib.load(fixed).affine[:3, :3]
    return np.moveaxis(vectors @ np.linalg.inv(matrix).T, -1, 0).astype(np.float32)


def greedy(moving: str, fixed: str, folder: Path, threads: int, iterations: str = "100x50x10") -> Path:
    """Greedy (Yushkevich et al., 2016): NCC over 5 voxels a side, its defaults otherwise."""
    try:
        from picsl_greedy import Greedy3D  # optional: a peer
    except ImportError as error:
        raise ImportError("greedy needs picsl-greedy: pip install picsl-greedy.") from error
    warp = folder / "warp.nii.gz"
    Greedy3D().execute(f"-d 3 -m NCC 2x2x2 -i {fixed} {moving} -o {warp} -n {iterations} -threads {threads}")
    return warp


def greedy_converged(moving: str, fixed: str, folder: Path, threads: int) -> Path:
    """Greedy with five times the steps at full resolution."""
    return greedy(moving, fixed, folder, threads, "100x100x50")


def _ants(moving: str, fixed: str, folder: Path, threads: int, kind: str, **options: Any) -> Path:
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)  # before ITK loads
    try:
        import ants  # optional: a peer
    except ImportError as error:
        raise ImportError("ants needs ANTsPy: pip install antspyx.") from error
    images = ants.image_read(fixed), ants.image_read(moving)
    found = ants.registration(*images, type_of_transform=kind, outprefix=f"{folder}/", **options)
    return Path(ants.apply_transforms(*images, found["fwdtransforms"], compose=f"{folder}/whole"))


def syn(moving: str, fixed: str, folder: Path, threads: int) -> Path:
    """ANTsPy's default, affine transform included (Avants et al., Medical Image Analysis 2008)."""
    return _ants(moving, fixed, folder, threads, "SyN")


def syn_cc(moving: str, fixed: str, folder: Path, threads: int) -> Path:
    """ANTs SyN with local cross-correlation, to the finest resolution."""
    return _ants(moving, fixed, folder, threads, "SyNCC", reg_iterations=(100, 70, 50, 20))


PEERS: dict[str, Callable[[str, str, Path, int], Path]] = {
    "greedy": greedy,
    "greedy_converged": greedy_converged,
    "syn": syn,
    "syn_cc": syn_cc,
}


def displacement(peer: str, moving: str, fixed: str, threads: int = 1) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Displacement ``(3, X, Y, Z)`` in voxels of the fixed grid; wall and processor seconds and peak MiB so far."""
    if peer not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got '{peer}'.")
    with TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        warp = PEERS[peer](moving, fixed, Path(folder), threads)
        cost = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        return _voxels(warp, fixed), cost


def main() -> None:
    """Write the field, print the cost as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("moving")
    parser.add_argument("fixed")
    parser.add_argument("output", type=Path, help="NumPy file of the displacement, (3, X, Y, Z) in voxels")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    ddf, cost = displacement(args.peer, args.moving, args.fixed, args.threads)
    np.save(args.output, ddf)
    print(json.dumps({name: round(value, 1) for name, value in cost.items()}))


if __name__ == "__main__":
    main()
