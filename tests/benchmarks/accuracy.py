"""How well and how fast: ours beside other programs, on pairs of prepared scans with labels.

    python tests/benchmarks/accuracy.py prepared/ --methods affine "one pass" "one pass, 30 s" greedy syn
    python tests/benchmarks/accuracy.py prepared/ --report --reference greedy # table and plot of docs/results.md
    python tests/benchmarks/accuracy.py prepared/ --csv curves.csv --methods "one pass, 8 s, 0.5 mm" "greedy, 2 1" syn
    python tests/benchmarks/accuracy.py prepared/ --csv curves.csv --curves --reference greedy # at equal smoothness

Every method gives a displacement on the fixed grid, and all are judged by the same code: Dice and HD95 of the
structures of an overlay (labels warped by the nearest neighbour), folding, SDlogJ in the fixed brain and on the whole
grid, inverse consistency where there is an inverse. Each registration is a process of its own, one after the other, so
that its peak memory can be read. Rows are added to a CSV file as they come; what stands there already is not measured
again, so that a run can be stopped, and methods measured on different days. Budgets are counted in processor seconds.
"""

import argparse
import json
import math
import multiprocessing
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from scipy.stats import t as student
from torch import Tensor

from voxelmorph_monai import folds, objective, refinement
from voxelmorph_monai.apps.options import SMOOTHNESS
from voxelmorph_monai.apps.shipped import load_network
from voxelmorph_monai.blocks import warp
from voxelmorph_monai.data import load_scans
from voxelmorph_monai.memory import keep_freed_memory
from voxelmorph_monai.metrics import dice, folding, hausdorff95, inverse_consistency, log_jacobian_sd
from voxelmorph_monai.transforms import LoadScand, MergeLabelsd

PEERS = Path(__file__).with_name("peers.py")
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "bundles" / "brain_t1_registration" / "configs"
NAMES = {
    "syn": "ANTs SyN",
    "syn_cc": "ANTs SyN, CC",
    "greedy": "Greedy, 100x50x10",
    "greedy_40": "Greedy, 100x100x40",
    "greedy_converged": "Greedy",
    "fireants": "FireANTs",
    "convexadam": "ConvexAdam",
}
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"


class Pair(NamedTuple):
    """One pair to register: images and labels ``(1, 1, *spatial)``, and the files of the images."""

    moving: Tensor
    fixed: Tensor
    moving_label: Tensor
    fixed_label: Tensor
    paths: tuple[str, str]


class Found(NamedTuple):
    """A displacement, its inverse where there is one, and what they cost."""

    ddf: Tensor
    inverse_ddf: Tensor | None
    cost: Mapping[str, float]


def affine(pair: Pair, args: argparse.Namespace) -> Found:
    """Prepared scans as they are: affinely aligned."""
    return Found(torch.zeros(1, 3, *pair.fixed.shape[2:]), None, {})


def ours(pair: Pair, args: argparse.Namespace, start: str, *options: str) -> Found:
    """One pass of the network, or from zero; with a budget (``30 s`` or ``converged``), refined.

    Further options are the similarity (``mind``) and the smoothness (``0.5 mm``).
    """
    budget = next((each for each in options if each == "converged" or each.endswith(" s")), "")
    similarity = next((each for each in options if each in objective.SIMILARITIES), "lncc")
    smoothness = next((float(each.split()[0]) for each in options if each.endswith(" mm")), SMOOTHNESS["default"])
    keep_freed_memory()  # as vxm does
    network = load_network(args.weights, args.preset, device=args.device) if start == "one pass" else None
    moving, fixed = pair.moving.to(args.device), pair.fixed.to(args.device)
    clock = time.process_time if args.device == "cpu" else time.perf_counter  # other work must not change the result

    def register() -> tuple[Tensor, Tensor]:
        ddf = inverse = None
        if network is not None:
            with torch.inference_mode():
                found = network(torch.cat([moving, fixed], dim=1))
            ddf, inverse = found["ddf"], found["inverse_ddf"]
        if budget:
            seconds = math.inf if budget == "converged" else float(budget.split()[0])
            found = refinement.refine(
                *(moving, fixed),
                ddf=ddf,
                budget=seconds,
                similarity=objective.SIMILARITIES[similarity],
                smoothness=smoothness,
                spacing=args.spacing,
                clock=clock,
            )
            ddf, inverse = found.ddf, found.inverse_ddf
        elif ddf is not None and inverse is not None:
            ddf, inverse = folds.remove_folds(ddf), folds.remove_folds(inverse)  # as vxm register does
        assert ddf is not None
        assert inverse is not None
        return ddf.cpu(), inverse.cpu()  # a GPU has ended when they have come

    if args.device != "cpu":
        register()  # the first work on a GPU loads its programs
        torch.cuda.reset_peak_memory_stats(args.device)
    wall, cpu = time.perf_counter(), time.process_time()
    ddf, inverse = register()
    cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.device != "cpu":
        peak = torch.cuda.max_memory_allocated(args.device) / 2**20
    return Found(ddf, inverse, {**cost, "peak_mib": peak})


def peer(pair: Pair, args: argparse.Namespace, name: str, sigmas: str = "") -> Found:
    """Another program, in an environment of its own, with its smoothing (``3 0.5``: of each step and of the whole)."""
    with TemporaryDirectory() as folder:
        output = f"{folder}/ddf.npy"
        options = ["--threads", str(args.threads), "--device", args.device]
        options += ["--sigmas", *sigmas.split()] if sigmas else []
        words = [args.peers_python, str(PEERS), name, *pair.paths, output, *options]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        return Found(torch.from_numpy(np.load(output))[None], None, json.loads(done.stdout.splitlines()[-1]))


def method(name: str) -> Callable[[Pair, argparse.Namespace], Found]:
    """What ``name`` stands for: ``affine``, ``one pass``, ``one pass, 8 s, 1 mm``, ``zero, converged, mind``, a peer.

    A peer has options too, as ``syn, 3 0.5``: its smoothing of each step and of the whole.
    """
    start, *options = (part.strip() for part in name.split(","))
    if start == "affine":
        return affine
    if start in ("one pass", "zero"):
        return lambda pair, args: ours(pair, args, start, *options)
    return lambda pair, args: peer(pair, args, start, *options)


def other_contrast(image: Tensor, seed: int) -> Tensor:
    """``image`` (0 to 1) as a scan of another contrast would look: intensities through a random broken line."""
    heights = torch.rand(7, generator=torch.Generator().manual_seed(seed))
    position = (image * 6).clamp(0, 6)
    low = position.long().clamp(max=5)
    return (image > 0) * (heights[low] + (position - low) * (heights[low + 1] - heights[low])).clamp_min(0.02)


def load_pair(scans: Sequence[Mapping[str, str]], structures: Mapping[str, Any], contrast: int | None) -> Pair:
    """Read a pair; with ``contrast``, a seed, the moving image gets another one."""
    load = LoadScand(("image", "label"))
    merge = MergeLabelsd("label", structures=structures, num_labels=len(structures))
    moving, fixed = (
        {key: torch.as_tensor(value).as_subclass(Tensor)[None] for key, value in merge(load(scan)).items()}
        for scan in scans
    )
    image = moving["image"] if contrast is None else other_contrast(moving["image"], contrast)
    return Pair(image, fixed["image"], moving["label"], fixed["label"], (scans[0]["image"], scans[1]["image"]))


def measure(name: str, scans: Sequence[Mapping[str, str]], args: argparse.Namespace) -> dict[str, float]:
    """Quality and cost of one method on one pair."""
    torch.set_num_threads(args.threads)
    structures = ConfigParser.load_config_file(CONFIGS / args.structures)["structures"]
    pair, labels = load_pair(scans, structures, args.contrast), len(structures)
    found = method(name)(pair, args)
    warped = warp(pair.moving_label.float(), found.ddf, mode="nearest").to(pair.fixed_label.dtype)
    quality = {
        "dice": dice(warped, pair.fixed_label, labels).nanmean(),
        "hd95_mm": hausdorff95(warped, pair.fixed_label, labels, spacing=args.spacing).nanmean(),
        "folding_percent": folding(found.ddf),
        "folding_forward_percent": folding(found.ddf, scheme="forward"),
        "sdlogj": log_jacobian_sd(found.ddf),
        "sdlogj_brain": log_jacobian_sd(found.ddf, pair.fixed > 0),  # padding hides roughness
        "displacement_sd_mm": found.ddf.sub(found.ddf.mean((2, 3, 4), keepdim=True)).square().sum(1).mean().sqrt()
        * args.spacing,
    }
    if found.inverse_ddf is not None:
        inside = (pair.fixed > 0).float()
        quality["inverse_mm"] = inverse_consistency(found.ddf, found.inverse_ddf, spacing=args.spacing, mask=inside)
    return {**{key: float(value) for key, value in quality.items()}, **found.cost}


def pairs_of(scans: Sequence[Mapping[str, str]], number: int | None, seed: int) -> list[tuple[int, int]]:
    """All ordered pairs, or ``number`` of them at random."""
    every = list(permutations(range(len(scans)), 2))
    return every if number is None else sorted(random.Random(seed).sample(every, number))


def run(args: argparse.Namespace) -> None:
    """Measure what the CSV file lacks."""
    scans = [scan for section in args.sections for scan in load_scans(args.dataset_dir, section)]
    rows = pd.read_csv(args.csv).to_dict("records") if args.csv.exists() else []
    known = {(row["method"], row["pair"]) for row in rows}
    for i, j in pairs_of(scans, args.pairs, args.seed):
        title = " to ".join(Path(scans[k]["image"]).name.split(".")[0] for k in (i, j))
        for name in args.methods:
            if (name, title) in known:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(measure, (name, (scans[i], scans[j]), args))
            rows.append({"method": name, "pair": title, "threads": args.threads, **found})
            print(json.dumps(rows[-1]), flush=True)
            pd.DataFrame(rows).to_csv(args.csv, index=False, float_format="%.6g")


def table(found: pd.DataFrame, reference: str) -> str:
    """Means over the pairs that all methods have, and the paired difference of Dice to ``reference``.

    With the difference comes its 95 % interval over pairs.
    """
    wide = found.pivot(index="pair", columns="method", values="dice").dropna()
    found = found[found["pair"].isin(wide.index)]
    lines = [
        f"Over {len(wide)} pairs:\n",
        f"| method | Dice | difference to {reference} | HD95 (mm) | folded, central / forward (%) | "
        "SDlogJ, brain / grid | inverse (mm) | processor seconds | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(found["method"].unique(), key=lambda name: wide[name].mean()):
        mean = found[found["method"] == name].mean(numeric_only=True)
        difference = wide[name] - wide[reference]
        n = len(difference)  # pairs share scans, so that the interval is a narrow one
        half = student.ppf(0.975, n - 1) * difference.std() / n**0.5 if n > 1 else float("nan")

        def shown(key: str, digits: int, factor: float = 1.0, mean: pd.Series = mean) -> str:
            value = mean.get(key, float("nan")) * factor
            return "" if np.isnan(value) else f"{value:.{digits}f}"

        lines.append(
            f"| {name} | {mean['dice']:.4f} | {difference.mean():+.4f} ± {half:.4f} | {shown('hd95_mm', 2)} | "
            f"{shown('folding_percent', 5)} / {shown('folding_forward_percent', 5)} | "
            f"{shown('sdlogj_brain', 3)} / {shown('sdlogj', 3)} | {shown('inverse_mm', 2)} | "
            f"{shown('cpu_seconds', 1)} | {shown('peak_mib', 1, 1 / 1024)} |"
        )
    return "\n".join(lines) + "\n"


def family(name: str) -> str:
    """A method's name without its smoothness."""
    parts = [part.strip() for part in name.split(",")]
    kept = [part for part in parts if not (part.endswith(" mm") or part.replace(".", "").replace(" ", "").isdigit())]
    return ", ".join(kept)


def curves(found: pd.DataFrame, reference: str) -> str:
    """Dice and HD95 against SDlogJ in the brain over each method's smoothness, and Dice where it is the reference's.

    That is interpolated on each pair between the two neighbours on the method's curve, and missing where the curve does
    not reach it; then the mean over the pairs that all of its points have.
    """
    found = found[found["sdlogj_brain"] > 0].assign(family=found["method"].map(family))
    target = found[found["method"] == reference].set_index("pair")["sdlogj_brain"]
    lines = [
        "| method | pairs | SDlogJ, brain / grid | Dice | HD95 (mm) | "
        f"Dice at SDlogJ of {NAMES.get(reference, reference)} |",
        "|---|---|---|---|---|---|",
    ]
    for _, group in found.groupby("family", sort=False):
        wide = group.pivot(index="pair", columns="method", values=["sdlogj_brain", "dice"]).dropna()
        there = []
        for pair, row in wide.iterrows():
            points = np.array(sorted(zip(row["sdlogj_brain"], row["dice"], strict=True)))
            there.append(np.interp(target.get(pair, np.nan), points[:, 0], points[:, 1], left=np.nan, right=np.nan))
        means = group[group["pair"].isin(wide.index)].groupby("method").mean(numeric_only=True)
        at = float(np.mean(there)) if there else float("nan")
        shown = "" if np.isnan(at) else f"{at:.4f}"
        for method_name, row in means.sort_values("sdlogj_brain").iterrows():
            title = NAMES.get(str(method_name), method_name)
            deviation = f"{row['sdlogj_brain']:.3f} / {row['sdlogj']:.3f}"
            lines.append(
                f"| {title} | {len(wide)} | {deviation} | {row['dice']:.4f} | {row['hd95_mm']:.2f} | {shown} |"
            )
            shown = ""  # once a method
    return "\n".join(lines) + "\n"


def plot(found: pd.DataFrame, path: Path) -> None:
    """Dice against processor seconds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    means = found.groupby("method")[["cpu_seconds", "dice"]].mean().dropna().sort_values("cpu_seconds")
    for rank, (name, *point) in enumerate(means.itertuples()):
        own = str(name).startswith(("one pass", "zero"))
        axes.scatter(*point, color="C1" if own else "C0")
        above = 7 if rank % 2 else -12  # neighbours' names do not meet
        axes.annotate(str(name), point, (4, above), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="processor seconds a pair", ylabel="mean Dice")
    axes.margins(x=0.15, y=0.1)  # names stand to the right
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def report(args: argparse.Namespace) -> None:
    """Write the block between the marks of the page, and the plot."""
    found = pd.read_csv(args.csv).replace({"method": NAMES})
    page = args.output.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    block = BEGIN + "\n" + table(found, NAMES.get(args.reference, args.reference)) + "\n"
    args.output.write_text(head + block + END + rest.split(END)[1], encoding="utf-8")
    plot(found, args.output.parent / "figures" / "accuracy.png")


def main() -> None:
    """Measure or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_dir", help="as vxm prepare leaves it")
    parser.add_argument("--methods", nargs="+", default=["affine", "one pass"], help=str(method.__doc__))
    parser.add_argument("--sections", nargs="+", default=["test"], help="of its datalist (%(default)s)")
    parser.add_argument("--pairs", type=int, help="so many at random (default: all ordered pairs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contrast", type=int, help="seed: give the moving images another contrast")
    parser.add_argument("--structures", default="neuromorphometrics.yaml", help="overlay that names them (%(default)s)")
    parser.add_argument("--spacing", type=float, default=1.0, help="mm (%(default)s)")
    parser.add_argument("--weights", help="of the network (default: those of the bundle)")
    parser.add_argument("--preset", default="wide")
    parser.add_argument("--peers-python", default=sys.executable, help="python of the peers' environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda: of ours, and of peers that know it (%(default)s)")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "accuracy.csv", help="rows (%(default)s)")
    parser.add_argument("--report", action="store_true", help="do not measure, write the page")
    parser.add_argument("--curves", action="store_true", help="do not measure, print Dice against SDlogJ")
    parser.add_argument("--reference", default="affine", help="method that differences are taken to (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md", help="page with the marks")
    args = parser.parse_args()
    others = ("contrast", "device", "preset", "spacing", "structures", "weights")
    changed = [f"--{name}" for name in others if getattr(args, name) != parser.get_default(name)]
    if changed and args.csv == parser.get_default("csv"):
        parser.error(f"{', '.join(changed)} must come with a --csv of its own: rows do not tell them.")
    if args.curves:
        print(curves(pd.read_csv(args.csv), args.reference))
    else:
        (report if args.report else run)(args)


if __name__ == "__main__":
    main()
