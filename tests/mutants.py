"""Do the tests notice wrong code? Break ``blocks`` and ``losses`` by hand, one place at a time, and run their tests.

    python tests/mutants.py           # all, 2 at a time
    python tests/mutants.py blocks    # those of one module

Each mutant is put into a copy of the package in a temporary folder, where the tests of its module have to fail. Exits
with 1 if one survives. A mutant whose text is gone, or stands there twice, stops the run: the table follows the code.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "voxelmorph_monai"
AT_A_TIME = 2
TIME_LIMIT = 200  # seconds; a mutant may loop for ever, which a test run notices too


class Mutant(NamedTuple):
    module: str
    text: str
    replacement: str
    why: str


BLOCKS = [
    ("else field.float()", "else field", "precision: coordinates in the field's own bfloat16"),
    ("ddf = _exact(ddf)\n    dtype", "ddf = -_exact(ddf)\n    dtype", "sign: warp pushes instead of pulling"),
    ("range(ddf.shape[1] - 1, -1, -1)", "range(ddf.shape[1])", "axis order: grid_sample counts from the last"),
    ("max(ddf.shape[d + 2] - 1, 1)) - 1.0", "ddf.shape[d + 2]) - 1.0", "unit: voxels counted as without corners"),
    ('padding_mode: str = "border"', 'padding_mode: str = "zeros"', "padding: fields end at the border"),
    ("dtype = torch.float64  # float32", "dtype = torch.float32  # float32", "precision: large labels rounded"),
    ("(image, grid, mode, padding_mode, align_corners=True)", "(image, grid, mode, padding_mode)", "align_corners"),
    ("(copies, cut, mode, padding_mode, align_corners=True)", "(copies, cut, mode, padding_mode)", "align_corners"),
    (".transpose(1, 2)\n", "\n", "threads: channels and parts change places"),
    ("copies = image[:, None]", "copies = image.detach()[:, None]", "detach: no gradient of the image by threads"),
    ("grid.shape[1] % parts", "grid.shape[2] % parts", "threads: divisibility of another axis"),
    (
        "_exact(inner) + warp(_exact(outer), inner)",
        "_exact(outer) + warp(_exact(inner), outer)",
        "order: composes the other way round",
    ),
    ("+ warp(_exact(outer), inner)", "+ warp(_exact(outer).detach(), inner)", "detach: half of the gradient"),
    ("num_steps: int = 7", "num_steps: int = 6", "default: one squaring less"),
    ("in range(num_steps)", "in range(num_steps - 1)", "number of squarings: integrates to time 1/2"),
    ("0.5**num_steps", "0.5 ** (num_steps + 1)", "scaling: integrates to time 1/2"),
    ("inverse - step * error", "inverse + step * error", "sign: runs away from the inverse"),
    (".max()) <= tolerance", ".mean()) <= tolerance", "stops while some voxels are still far off"),
    (".amax(dim=1)", ".mean(dim=1)", "reduction: mean residual for the largest"),
    ("flatten(1).amax(dim=1)", "amax().expand(len(ddf))", "one residual for the whole batch"),
    (
        "(size[d] - 1) / max(field.shape[d + 2] - 1, 1)",
        "size[d] / field.shape[d + 2]",
        "unit: ratio of sizes, not of lengths",
    ),
    (
        "(size[d] - 1) / max(field.shape[d + 2] - 1, 1)",
        "max(field.shape[d + 2] - 1, 1) / (size[d] - 1)",
        "unit: ratio upside down",
    ),
    ("(size[d] - 1) / max(field.shape[d + 2]", "(size[0] - 1) / max(field.shape[2]", "unit: one ratio for all axes"),
    ("mode=mode, align_corners=True", "mode=mode", "align_corners: corners of the grids do not coincide"),
    ("step.narrow(axis, 0, n - 2)) * 0.5", "step.narrow(axis, 0, n - 2))", "unit: difference over two voxels"),
    ("torch.cat([step, last]", "torch.cat([step.narrow(axis, 0, 1), step]", "one off: forward becomes backward"),
    ("step.narrow(axis, 0, 1), inner", "last, inner", "border: the wrong side's difference"),
    ("one[j] = 1.0", "one[j] = 0.0", "determinant of the displacement, not of the map"),
    ("a[:, :1] * b[:, 1:] - ", "a[:, :1] * b[:, 1:] + ", "sign in the 2-D determinant"),
    ("b[:, 2] * c[:, 0] - b[:, 0] * c[:, 2]", "b[:, 0] * c[:, 2] - b[:, 2] * c[:, 0]", "sign of one cofactor"),
    (".clamp(0, n - 1)", ".clamp(0, n - 2)", "one off: the last voxel is never reached"),
    ("share = point - low", "share = (point - low).detach()", "detach: weights without gradient"),
    ("i * n + end", "i + n * end", "axis order of the flat index"),
    ("(index, 1 - share), (", "(index, share), (", "weights do not sum to 1"),
    ("(label < best)", "(label > best)", "ties to the larger label"),
]

LOSSES = [
    ("/ self.image_sigma**2", "/ self.image_sigma", "unit: deviation for variance"),
    ("return -_MeanLNCC", "return _MeanLNCC", "sign: trained to be dissimilar"),
    ("total * total / window **", "total * total / (window - 1) **", "one off: voxels of a window"),
    ("_pad(image, window // 2) - image.mean", "_pad(image, window // 2) + 0 * image.mean", "not centred: cancels"),
    ("(32 * torch.finfo", "(0 * torch.finfo", "no variance floor: noise counts as contrast"),
    ("cc.clamp_max(1).mean()", "cc.mean()", "a correlation above 1"),
    ("p = p / cc.numel()", "p = p / len(cc)", "reduction: gradient of the sum over voxels"),
    ("q = torch.where(a.free, p * cross / a.variance, 0)", "q = p * cross / a.variance", "gradient of the floor"),
    ("/ -2\n", "/ 2\n", "sign of the variance's gradient"),
    ("moments[i], moments[1 - i]", "moments[0], moments[1]", "axis order: gradient of the other image"),
    ("image.detach().aminmax", "image.aminmax", "detach: the range is optimised"),
    (
        "for axis in axes]).mean()",
        "for axis in axes]).sum()",
        "reduction: sum over the axes for the mean",
    ),
    ('torch.square if self.penalty == "l2"', 'torch.square if self.penalty == "l1"', "penalties exchanged"),
    ("+ 2 * torch.stack(mixed)", "+ torch.stack(mixed)", "mixed derivatives counted once"),
    ("(fixed_volume > 0))[:, 1:]", "(fixed_volume > 0))", "the background counts as a label"),
    ("present.sum(1).clamp_min(1)", "self.num_labels", "reduction: absent labels counted as missed"),
    ("(label == fixed), weight,", "(label == fixed), weight.detach(),", "detach: labels that cannot train"),
    ("narrow(axis, 1, num_pairs).add_(1)", "narrow(axis, 1, num_pairs).add_(0)", "neighbours on one side alone"),
    (".exp() - log_variance).mean()", ".exp() + log_variance).mean()", "sign of the entropy"),
    ('terms["similarity"] + back) / 2', 'terms["similarity"] + back)', "reduction: two ways for their mean"),
    ('"dvf" if "dvf" in prediction else "ddf"', '"ddf"', "smooths the displacement of a velocity network"),
    (
        "self.dice(fixed, moving, predicted",
        "self.dice(moving, fixed, predicted",
        "labels not exchanged on the way back",
    ),
    ("weight * self.smoothness(field)", "self.smoothness(field)", "weight ignored"),
]

MUTANTS = [Mutant("blocks", *row) for row in BLOCKS] + [Mutant("losses", *row) for row in LOSSES]


def rotten(mutants: list[Mutant]) -> Iterator[str]:
    for mutant in mutants:
        source = (ROOT / PACKAGE / f"{mutant.module}.py").read_text(encoding="utf-8")
        if (count := source.count(mutant.text)) != 1:
            yield f"{mutant.module}.py must hold {mutant.text!r} once, it holds it {count} times."


def fails(mutant: Mutant) -> bool:
    """Run the tests of the mutant's module on a copy that holds it."""
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        tests = ROOT / "tests" / f"test_{mutant.module}.py"
        for name in (PACKAGE, "tests"):
            (copy / name).mkdir()
        # Sources alone: Python takes a compiled file for current if size and second of its source agree. And no
        # conftest.py, whose imports take longer than most mutants live.
        for path in [ROOT / "pyproject.toml", tests, *(ROOT / PACKAGE).glob("*.py")]:
            shutil.copy(path, copy / path.relative_to(ROOT))
        target = copy / PACKAGE / f"{mutant.module}.py"
        target.write_text(target.read_text(encoding="utf-8").replace(mutant.text, mutant.replacement), encoding="utf-8")
        # An editable install comes after PYTHONPATH and the working directory. Were the copy not what is imported, all
        # mutants would survive.
        env = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", f"tests/{tests.name}"]
        try:
            run = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            return True
        if run.returncode not in (0, 1):  # pytest's codes for passed and failed; a syntax error proves nothing
            raise RuntimeError(f"pytest did not run the tests of {mutant}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
        return run.returncode == 1


def main(modules: list[str]) -> int:
    """Print what became of each mutant, and give the exit status."""
    mutants = [mutant for mutant in MUTANTS if not modules or mutant.module in modules]
    if problems := list(rotten(mutants)):
        sys.exit("\n".join(problems))
    healthy = [Mutant(module, "", "", "unchanged") for module in dict.fromkeys(m.module for m in mutants)]
    survivors = 0
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        if ill := [mutant.module for mutant, failed in zip(healthy, pool.map(fails, healthy), strict=True) if failed]:
            sys.exit(f"Tests that fail on healthy code tell nothing: test_{', test_'.join(ill)}.")
        for mutant, killed in zip(mutants, pool.map(fails, mutants), strict=True):
            survivors += not killed
            change = f"{mutant.text.strip()!r} -> {mutant.replacement.strip()!r}"
            print(f"{'killed  ' if killed else 'SURVIVED'} {mutant.module}: {mutant.why}: {change}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} killed.")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
