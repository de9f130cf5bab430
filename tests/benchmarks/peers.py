"""Displacement fields of other registration programs on two prepared scans, for comparison.

    python tests/benchmarks/peers.py greedy moving.nii.gz fixed.nii.gz ddf.npy --threads 1

It runs in an environment of its own: ``pip install nibabel picsl-greedy antspyx``, and for the last two peers, the only
ones that need torch, ``fireants convexAdam``. Each call is one process, so that the peak memory is that of one
registration; it is that of the host, on a GPU too.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Found = tuple[NDArray[np.float32], dict[str, float]]


def _measured(register: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What ``register`` gives; wall and processor seconds of the call, and peak MiB so far."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = register()
    return found, {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _voxels(warp: Path, fixed: str) -> NDArray[np.float32]:
    """ITK's vectors (LPS, mm) as voxels of the fixed grid along its array axes: ``(3, X, Y, Z)``."""
    vectors = np.asarray(nib.load(warp).dataobj, dtype=np.float64)[:, :, :, 0] * [-1, -1, 1]
    matrix = nib.load(fixed).affine[:3, :3]
    return np.moveaxis(vectors @ np.linalg.inv(matrix).T, -1, 0).astype(np.float32)


def greedy(
    moving: str,
    fixed: str,
    threads: int,
    device: str,
    sigmas: Sequence[float] = (),
    iterations: str = "100x50x10",
) -> Found:
    """Greedy (Yushkevich et al., 2016): NCC over 5 voxels a side, its defaults otherwise; ``sigmas`` in voxels."""
    try:
        from picsl_greedy import Greedy3D  # optional: a peer
    except ImportError as error:
        raise ImportError("greedy needs picsl-greedy: pip install picsl-greedy.") from error
    with TemporaryDirectory() as folder:
        warp = Path(folder) / "warp.nii.gz"
        words = f"-d 3 -m NCC 2x2x2 -i {fixed} {moving} -o {warp} -n {iterations} -threads {threads}"
        if sigmas:
            words += " -s " + " ".join(f"{sigma}vox" for sigma in sigmas)
        _, cost = _measured(lambda: Greedy3D().execute(words))
        return _voxels(warp, fixed), cost


def greedy_converged(moving: str, fixed: str, threads: int, device: str, sigmas: Sequence[float] = ()) -> Found:
    """Greedy with five times the steps at full resolution."""
    return greedy(moving, fixed, threads, device, sigmas, "100x100x50")


def greedy_40(moving: str, fixed: str, threads: int, device: str, sigmas: Sequence[float] = ()) -> Found:
    """Greedy with 40 steps at full resolution."""
    return greedy(moving, fixed, threads, device, sigmas, "100x100x40")


def _ants(moving: str, fixed: str, threads: int, kind: str, **options: Any) -> Found:
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)  # before ITK loads
    try:
        import ants  # optional: a peer
    except ImportError as error:
        raise ImportError("ants needs ANTsPy: pip install antspyx.") from error
    with TemporaryDirectory() as folder:

        def register() -> Path:
            images = ants.image_read(fixed), ants.image_read(moving)
            found = ants.registration(*images, type_of_transform=kind, outprefix=f"{folder}/", **options)
            return Path(ants.apply_transforms(*images, found["fwdtransforms"], compose=f"{folder}/whole"))

        warp, cost = _measured(register)
        return _voxels(warp, fixed), cost


def syn(moving: str, fixed: str, threads: int, device: str, sigmas: Sequence[float] = ()) -> Found:
    """ANTsPy's default, affine transform included (Avants et al., Medical Image Analysis 2008)."""
    return _ants(moving, fixed, threads, "SyN", **dict(zip(("flow_sigma", "total_sigma"), sigmas, strict=False)))


def syn_cc(moving: str, fixed: str, threads: int, device: str) -> Found:
    """ANTs SyN with local cross-correlation over 5 voxels a side, as Greedy's; steps of ``antsRegistrationSyN.sh``.

    Not ANTsPy's ``SyNCC``, which takes up to 1200 steps at half the resolution and does not ask how many are wanted.
    """
    return _ants(moving, fixed, threads, "SyN", syn_metric="CC", syn_sampling=2, reg_iterations=(100, 70, 50, 20))


def _warm(register: Callable[..., NDArray[np.float32]], device: str, few: Sequence[int], full: Sequence[int]) -> Found:
    """Measure ``register(*full)``; on a GPU after ``register(*few)``, as the first call there loads its kernels."""
    if device != "cpu":
        register(*few)
    return _measured(lambda: register(*full))


def fireants(moving: str, fixed: str, threads: int, device: str) -> Found:
    """FireANTs (Jena et al., 2024), greedy, from the identity, without its compiled operations.

    Steps, window and sigmas are those of its own configuration for brains
    (``fireants/scripts/template/configs/oasis_deformable.yaml``); the learning rate is that of its tutorial, as the
    configuration's is lowered for templates.
    """
    try:
        import torch
        from fireants.io import BatchedImages, Image  # optional: a peer
        from fireants.registration.greedy import GreedyRegistration
    except ImportError as error:
        raise ImportError("fireants needs FireANTs: pip install fireants.") from error
    torch.set_num_threads(threads)
    images = [BatchedImages([Image.load_file(path, device=device)]) for path in (fixed, moving)]

    def register(*iterations: int) -> NDArray[np.float32]:
        options = {"cc_kernel_size": 5, "smooth_grad_sigma": 1.0, "smooth_warp_sigma": 0.5, "optimizer_lr": 0.5}
        registration = GreedyRegistration([4, 2, 1], iterations, *images, progress_bar=False, **options)
        registration.optimize()
        # (Z, Y, X, 3) in grid_sample's units, vectors x first; the copy to the host waits for the device
        vectors = registration.get_warp_parameters(*images)["grid"].detach()[0].permute(3, 2, 1, 0).cpu().numpy()
        return vectors * (np.array(vectors.shape[1:], np.float32).reshape(3, 1, 1, 1) - 1) / 2

    return _warm(register, device, (2, 2, 2), (200, 100, 50))


def convexadam(moving: str, fixed: str, threads: int, device: str) -> Found:
    """ConvexAdam (Siebert et al., IEEE TMI 2024) on MIND features: its defaults, but single precision on a GPU too."""
    try:
        import torch
        from convexAdam.convex_adam_MIND import convex_adam_pt  # optional: a peer
    except ImportError as error:
        raise ImportError("convexadam needs convexAdam: pip install convexAdam.") from error
    torch.set_num_threads(threads)
    images = [torch.from_numpy(nib.load(path).get_fdata(dtype=np.float32)) for path in (fixed, moving)]

    def register(iterations: int) -> NDArray[np.float32]:
        place = {"dtype": torch.float32, "device": torch.device(device)}
        vectors = convex_adam_pt(*images, selected_niter=iterations, **place)  # (X, Y, Z, 3) in voxels, on the host
        return np.moveaxis(vectors, -1, 0).astype(np.float32)

    return _warm(register, device, (2,), (80,))


PEERS: dict[str, Callable[..., Found]] = {
    "greedy": greedy,
    "greedy_40": greedy_40,
    "greedy_converged": greedy_converged,
    "syn": syn,
    "syn_cc": syn_cc,
    "fireants": fireants,
    "convexadam": convexadam,
}


def displacement(
    peer: str, moving: str, fixed: str, threads: int = 1, device: str = "cpu", sigmas: Sequence[float] = ()
) -> Found:
    """Displacement ``(3, X, Y, Z)`` in voxels of the fixed grid; wall and processor seconds and peak MiB so far."""
    if peer not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got '{peer}'.")
    return PEERS[peer](moving, fixed, threads, device, *([sigmas] if sigmas else []))


def main() -> None:
    """Write the field, print the cost as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("moving")
    parser.add_argument("fixed")
    parser.add_argument("output", type=Path, help="NumPy file of the displacement, (3, X, Y, Z) in voxels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of fireants and convexadam; the others know the CPU alone")
    parser.add_argument("--sigmas", type=float, nargs="+", default=(), help="of greedy and syn: of steps, of the whole")
    args = parser.parse_args()
    ddf, cost = displacement(args.peer, args.moving, args.fixed, args.threads, args.device, args.sigmas)
    np.save(args.output, ddf)
    print(json.dumps({name: round(value, 1) for name, value in cost.items()}))


if __name__ == "__main__":
    main()
