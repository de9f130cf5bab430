"""How well and how fast: ours beside other programs, on all ordered pairs of some prepared scans with labels.

    python tests/benchmarks/accuracy.py prepared/ --peers greedy syn --peers-python PYTHON --output docs/results.md

Every method gives a displacement on the fixed grid, and all are judged by the same code: Dice of the structures of an
overlay (labels warped by the nearest neighbour), folding, SDlogJ. Each registration runs alone, ours on ``--threads``
threads, the peers (``peers.py``, in an environment of their own) too. Writes a table, a plot of Dice against time, and
``accuracy.csv`` beside them.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from torch import Tensor

from voxelmorph_monai.blocks import warp
from voxelmorph_monai.data import load_scans
from voxelmorph_monai.metrics import dice, folding, log_jacobian_sd
from voxelmorph_monai.networks import Registration
from voxelmorph_monai.refinement import refine
from voxelmorph_monai.registration import load_network
from voxelmorph_monai.transforms import LoadScand, MergeLabelsd

Method = Callable[[Tensor, Tensor, tuple[str, str]], Tensor]

PEERS = Path(__file__).with_name("peers.py")
CONFIGS = Path(__file__).parents[2] / "bundles" / "brain_t1_registration" / "configs"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"


def identity(moving: Tensor, fixed: Tensor, paths: tuple[str, str]) -> Tensor:
    """Prepared scans as they are: affinely aligned."""
    return torch.zeros(1, 3, *fixed.shape[2:])


def one_pass(network: Registration, moving: Tensor, fixed: Tensor, paths: tuple[str, str]) -> Tensor:
    """The shipped network."""
    with torch.inference_mode():
        return network(torch.cat([moving, fixed], dim=1))["ddf"].clone()


def refined(
    network: Registration | None, budget: float | None, moving: Tensor, fixed: Tensor, paths: tuple[str, str]
) -> Tensor:
    """Refinement, from the network's displacement or from nothing."""
    start = None if network is None else one_pass(network, moving, fixed, paths)
    return refine(moving, fixed, ddf=start, budget=budget).ddf


def by_peer(python: str, peer: str, threads: int, moving: Tensor, fixed: Tensor, paths: tuple[str, str]) -> Tensor:
    """Another program, in a process of its own."""
    with TemporaryDirectory() as folder:
        output = f"{folder}/ddf.npy"
        words = [python, str(PEERS), peer, *paths, output, "--threads", str(threads)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return torch.from_numpy(np.load(output))[None]


def methods(args: argparse.Namespace) -> dict[str, Method]:
    """What is compared, by name."""
    network = load_network(args.weights, args.preset)
    found: dict[str, Method] = {"affine": identity, "ours, one pass": partial(one_pass, network)}
    for budget in args.budgets:
        found[f"ours, one pass and {budget:g} s"] = partial(refined, network, budget)
        found[f"ours, from zero, {budget:g} s"] = partial(refined, None, budget)
    for peer in args.peers:
        found[peer] = partial(by_peer, args.peers_python, peer, args.threads)
    return found


def measure(method: Method, pair: Sequence[dict[str, Tensor]], paths: tuple[str, str], labels: int) -> dict[str, float]:
    """Time and quality of one method on one pair of scans with ``image`` and ``label``, ``(1, *spatial)``."""
    moving, fixed = pair
    start = time.perf_counter()
    ddf = method(moving["image"][None], fixed["image"][None], paths)
    seconds = time.perf_counter() - start
    warped = warp(moving["label"][None].float(), ddf, mode="nearest").to(fixed["label"].dtype)
    return {
        "dice": float(dice(warped, fixed["label"][None], labels).nanmean()),
        "folding_percent": float(folding(ddf)),
        "folding_forward_percent": float(folding(ddf, scheme="forward")),
        "sdlogj": float(log_jacobian_sd(ddf)),
        "seconds": seconds,
    }


def table(found: pd.DataFrame, reference: str) -> str:
    """Means over pairs, and the paired difference of Dice to ``reference`` with its 95 % interval over pairs."""
    wide = found.pivot(index="pair", columns="method", values="dice")
    lines = [
        "| method | Dice | difference to " + reference + " | folded, central / forward (%) | SDlogJ | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in found["method"].unique():
        mean = found[found["method"] == name].mean(numeric_only=True)
        difference = wide[name] - wide[reference]
        # Student's factor for these few pairs; they share scans, so that the interval is a narrow one
        half = 2.57 * difference.std() / len(difference) ** 0.5 if len(difference) > 1 else float("nan")
        folded = f"{mean['folding_percent']:.5f} / {mean['folding_forward_percent']:.5f}"
        lines.append(
            f"| {name} | {mean['dice']:.4f} | {difference.mean():+.4f} ± {half:.4f} | {folded} | "
            f"{mean['sdlogj']:.3f} | {mean['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: pd.DataFrame, path: Path) -> None:
    """Dice against seconds."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in found[found["method"] != "affine"].groupby("method", sort=False):
        colour = "C1" if str(name).startswith("ours") else "C0"
        axes.scatter(rows["seconds"].mean(), rows["dice"].mean(), color=colour)
        axes.annotate(str(name), (rows["seconds"].mean(), rows["dice"].mean()), (4, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="seconds a pair", ylabel="mean Dice")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, and write the block between the marks of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_dir", help="as vxm prepare leaves it")
    parser.add_argument("--section", default="test", help="of its datalist (%(default)s)")
    parser.add_argument("--structures", default="neuromorphometrics.yaml", help="overlay that names them (%(default)s)")
    parser.add_argument("--weights", help="of the network (default: those of the bundle)")
    parser.add_argument("--preset", default="wide")
    parser.add_argument("--budgets", type=float, nargs="*", default=[10, 30])
    parser.add_argument("--peers", nargs="*", default=[], help="names of peers.py")
    parser.add_argument("--peers-python", default=sys.executable, help="python of their environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", default="affine", help="method that differences are taken to (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="page with the marks of a measured block")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    structures = ConfigParser.load_config_file(CONFIGS / args.structures)["structures"]
    scans = load_scans(args.dataset_dir, args.section)
    load, merge = (
        LoadScand(("image", "label")),
        MergeLabelsd("label", structures=structures, num_labels=len(structures)),
    )
    loaded = [{key: torch.as_tensor(value) for key, value in merge(load(scan)).items()} for scan in scans]
    rows = []
    for name, method in methods(args).items():
        for i, j in permutations(range(len(scans)), 2):
            paths = scans[i]["image"], scans[j]["image"]
            row = measure(method, (loaded[i], loaded[j]), paths, len(structures))
            rows.append({"method": name, "pair": f"{Path(paths[0]).name} to {Path(paths[1]).name}", **row})
            print(json.dumps(rows[-1]), flush=True)
    found = pd.DataFrame(rows)
    page = args.output.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    block = BEGIN + "\n" + table(found, args.reference) + "\n"
    args.output.write_text(head + block + END + rest.split(END)[1], encoding="utf-8")
    found.to_csv(args.output.with_name("accuracy.csv"), index=False)
    plot(found, args.output.parent / "figures" / "accuracy.png")


if __name__ == "__main__":
    main()
