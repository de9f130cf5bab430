"""Time the paths of this package on a GPU: training steps, passes, operators, beside MONAI's.

    python -m tests.benchmarks.gpu                 # a minute or two; prints a table
    python -m tests.benchmarks.gpu --device cpu --size 32 32 48   # does it run?

Times are medians of steps between two events of the device, memory is the peak of PyTorch's allocator. Before anything
is timed, the answers on the GPU are compared with those on the CPU, at a smaller size, and a training step runs in the
mode in which PyTorch refuses to wait for the device.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import monai.losses
import torch
from monai.metrics import compute_dice
from monai.networks.blocks import DVF2DDF, Warp
from torch import Tensor, nn

from tests.benchmarks.speed import (
    MONAI_DENSE,
    NUM_LABELS,
    Answer,
    Size,
    Work,
    field,
    images,
    register,
    train,
    train_monai,
)
from voxelmorph_monai.blocks import integrate, warp
from voxelmorph_monai.losses import LabelDiceLoss, LNCCLoss
from voxelmorph_monai.metrics import dice, hausdorff95


def gradients(function: Callable[..., Tensor], of: Callable[[Size], list[Tensor]], size: Size, device: str) -> Work:
    """Prepare a function with the gradient of its first argument."""
    first, *others = (tensor.to(device) for tensor in of(size))
    first.requires_grad_()

    def work() -> Answer:
        first.grad = None
        value = function(first, *others)
        value.sum().backward()
        assert first.grad is not None
        return {"value": value.detach().reshape(1, -1), "gradient": first.grad}

    return work


def blocks(size: Size, seed: int) -> Tensor:
    """Label map of 35 structures, ``(1, 1, *size)``."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, NUM_LABELS + 1, (1, 1, *(max(n // 16, 1) for n in size)), generator=generator)
    return nn.functional.interpolate(coarse.float(), size, mode="nearest").int()


def labels(function: Callable[[Tensor, Tensor], Tensor], size: Size, device: str) -> Work:
    """Prepare a metric of two label maps."""
    a, b = (blocks(size, seed).to(device) for seed in (1, 2))
    return lambda: {"value": function(a, b)}


def _pair(size: Size) -> list[Tensor]:
    return list(images(size).split(1, dim=1))


def _dice_of(ddf: Tensor, moving: Tensor, fixed: Tensor) -> Tensor:
    return LabelDiceLoss(NUM_LABELS)(moving, fixed, ddf)


def warp_monai(size: Size, device: str) -> Work:
    """Prepare MONAI's warp."""
    module = Warp(padding_mode="border")
    return gradients(lambda ddf, x: module(x, ddf), lambda s: [field(s, 4.0), images(s)[:, :1]], size, device)


LNCC_MONAI = monai.losses.LocalNormalizedCrossCorrelationLoss(3, kernel_size=9)
WORKS: dict[str, Callable[[Size, str], Work]] = {
    **{f"register {p}": partial(register, p) for p in ("wide", "dense", "diffeomorphic")},
    "register dense, float32": partial(register, "dense", amp=False),
    **{f"train {p}": partial(train, p) for p in ("dense", "diffeomorphic", "wide")},
    "train dense, float32": partial(train, "dense", amp=False),
    "train dense, MONAI": partial(train_monai, MONAI_DENSE),
    "lncc": partial(gradients, LNCCLoss(), _pair),
    "lncc, MONAI": partial(gradients, LNCC_MONAI, _pair),
    "warp": partial(gradients, lambda ddf, image: warp(image, ddf), lambda s: [field(s, 4.0), images(s)[:, :1]]),
    "warp, MONAI": warp_monai,
    "integrate": partial(gradients, integrate, lambda s: [field(s, 4.0)]),
    "integrate, MONAI": lambda s, d: gradients(DVF2DDF(padding_mode="border"), lambda s: [field(s, 4.0)], s, d),
    "Dice loss": partial(gradients, _dice_of, lambda s: [field(s, 4.0), blocks(s, 1), blocks(s, 2)]),
    "dice": partial(labels, lambda a, b: dice(a, b, NUM_LABELS)),
    "dice, MONAI": partial(labels, lambda a, b: compute_dice(a, b, include_background=False, num_classes=36)),
    "hausdorff95": partial(labels, lambda a, b: hausdorff95(a, b, NUM_LABELS)),
}
# Relative differences between GPU and CPU. bfloat16 has 3 digits, tf32 is off; the gradient of a warp jumps at voxels.
TOLERANCE = {"register": 0.03, "train": 0.03, "warp": 0.01, "integrate": 0.01}


def difference(name: str, size: Size, device: str) -> float:
    """Largest relative difference (of norms) between the answers on the device and on the CPU."""
    torch.manual_seed(0)
    here = WORKS[name](size, "cpu")()
    torch.manual_seed(0)
    there = WORKS[name](size, device)()
    return max(
        float((there[k].cpu().double() - here[k].double()).nan_to_num().norm() / here[k].double().nan_to_num().norm())
        for k in here
    )


def never_waits(size: Size, device: str) -> bool:
    """Run a training step in the mode in which PyTorch refuses to wait for the device."""
    work = train("diffeomorphic", size, device)
    work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def timed(name: str, size: Size, device: str, seconds: float) -> tuple[float, float]:
    """Median milliseconds and peak GiB of a work."""
    work = WORKS[name](size, device)
    if device != "cuda":
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start), 0.0
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times, start = [], time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < seconds and len(times) < 30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times), (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, nargs=3, default=[160, 192, 224])
    parser.add_argument("--small", type=int, nargs=3, default=[64, 64, 96], help="where CPU and GPU are compared")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each work (%(default)s)")
    args = parser.parse_args()
    size, small = tuple(args.size), tuple(args.small)
    if args.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {' x '.join(map(str, size))} voxels")
        print("a training step never waits for the device:", never_waits(small, args.device), flush=True)
    print("| work | ms | GiB | relative difference to the CPU |\n|---|---|---|---|")
    for name in WORKS:
        error = difference(name, small, args.device) if "MONAI" not in name else float("nan")
        limit = TOLERANCE.get(name.split()[0], 1e-4)
        found = f"{error:.1g}" if error <= limit else "" if error != error else f"**differs**: {error:.2g}"
        torch.backends.cudnn.benchmark = False
        plain, memory = timed(name, size, args.device, args.seconds)
        text = f"{plain:.2f}"
        if name.startswith(("register", "train")):
            torch.backends.cudnn.benchmark = True
            text += f" (chosen by trial {timed(name, size, args.device, args.seconds)[0]:.2f})"
        print(f"| {name} | {text} | {memory:.2f} | {found} |", flush=True)


if __name__ == "__main__":
    main()
