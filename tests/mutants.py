"""Do the tests notice wrong code? Break it by hand, one place at a time, and run its tests.

    python tests/mutants.py           # all, 2 at a time: in minutes
    python tests/mutants.py blocks    # those of one module

Broken are the geometry, the networks, the losses, the images made from label maps, and what makes a protocol: from who
is paired with whom to what a mean is over.
Each mutant is put into a copy of the package in a temporary folder, where the tests of its module have to fail. They
run in processes that are forked from one that has imported all libraries, so that a mutant costs little more than its
tests. Exits with 1 if one survives. A mutant whose text is gone, or stands there twice, stops the run: the table
follows the code.
"""

import gc
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "voxelmorph_monai"
AT_A_TIME = 2
ONE_READER = Lock()
TIME_LIMIT = 120  # seconds of CPU time; a mutant may loop for ever, which a test run notices too

# What the tests of a module are, where it is not all of its test file: the words of pytest.
TESTS = {
    "blocks": ["tests/test_blocks.py"],
    "losses": ["tests/test_losses.py"],
    "metrics": ["tests/test_metrics.py", "-k", "dice or folding or sd or hausdorff or volume or mean_is"],
    "transforms": ["tests/test_transforms.py", "-k", "merg or kept or tables or warp_by or past_what"],
    "engines": ["tests/test_engines.py", "-k", "prepare_pair or both_orders or shares_the_time"],
    "data": ["tests/test_data.py"],
    "datasets": [
        "tests/test_datasets.py",
        "-k",
        "test_ixi or oasis or learn2reg or lpba40 or fold or anew or submitted",
    ],
    "evaluation": ["tests/test_evaluation.py"],
    "comparison": ["tests/test_comparison.py"],
    "refinement": ["tests/test_refinement.py", "-k", "not budget and not takes_the_place and not other_contrasts"],
    "networks": [
        "tests/test_networks.py",
        "-k",
        "(keras or any_size or level or border or smoothed or pass or sample or bidirectional) and not size1 "
        "or heads_convolve or surrounds or pooled or (one_more and vm1)",
    ],
    "synthesis": ["tests/test_synthesis.py"],
}
# Imported once, before processes are forked: the package, for what it imports (ITK loads its parts when they are first
# used, which takes seconds), and what its tests import.
LIBRARIES = [
    *(f"{PACKAGE}.{module}" for module in ("cli", "comparison", "handlers", "preparation", "transforms")),
    *("ignite.handlers", "monai.bundle", "monai.engines", "monai.handlers", "monai.losses", "onnxruntime", "pytest"),
    *("scipy.interpolate", "scipy.spatial.distance", "SimpleITK", "surface_distance"),
]


class Mutant(NamedTuple):
    module: str
    text: str
    replacement: str
    why: str


BLOCKS = [
    ("else field.float()", "else field", "precision: coordinates in the field's own bfloat16"),
    ("ddf = _widen(ddf)\n    dtype", "ddf = -_widen(ddf)\n    dtype", "sign: warp pushes instead of pulling"),
    ("range(ddf.shape[1] - 1, -1, -1)", "range(ddf.shape[1])", "axis order: grid_sample counts from the last"),
    ("sigma**2 / (2 * max(", "sigma / (2 * max(", "unit: sigma for a variance"),
    ("wide.narrow(axis, end, 1)", "wide.narrow(axis, 0, 1)", "padding: one border gets what is of both"),
    ("for _ in range(passes)", "for _ in range(1)", "count: wide ones stay narrow"),
    ("2.0 / max(ddf.shape[axis + 2] - 1, 1)", "2.0 / ddf.shape[axis + 2]", "unit: voxels counted as without corners"),
    ('"bilinear", padding_mode: str = "border"', '"bilinear", padding_mode: str = "zeros"', "padding: images end"),
    ('7, padding_mode: str = "border"', '7, padding_mode: str = "zeros"', "padding: fields end at the border"),
    ("compose(ddf, ddf, padding_mode)", "compose(ddf, ddf)", "padding: not what was asked for"),
    ("dtype = torch.float64  # float32", "dtype = torch.float32  # float32", "precision: large labels rounded"),
    ("mode, padding_mode, align_corners=True)", "mode, padding_mode)", "align_corners"),
    ("0, padding, True)", "0, padding, False)", "align_corners"),
    ("ctx.padding, True,", "1 - ctx.padding, True,", "padding: gradients of another one"),
    (".transpose(1, 2).flatten(2, 3)", ".flatten(2, 3)", "threads: channels and parts change places"),
    ("of_image += other", "pass", "threads: the image's gradient of one part alone"),
    ("torch.mul(component, _to_unit(ddf, d)", "torch.mul(component, 1", "unit: gradient of [-1, 1]"),
    ("grid.shape[1] % parts", "grid.shape[2] % parts", "threads: divisibility of another axis"),
    (
        "_widen(inner) + warp(_widen(outer), inner, padding_mode=padding_mode)",
        "_widen(outer) + warp(_widen(inner), outer, padding_mode=padding_mode)",
        "order: composes the other way round",
    ),
    ("+ warp(_widen(outer), inner", "+ warp(_widen(outer).detach(), inner", "detach: half of the gradient"),
    ("num_steps: int = 7", "num_steps: int = 6", "default: one squaring less"),
    ("in range(num_steps)", "in range(num_steps - 1)", "number of squarings: integrates to time 1/2"),
    ("0.5**num_steps", "0.5 ** (num_steps + 1)", "scaling: integrates to time 1/2"),
    ("inverse - step * error", "inverse + step * error", "sign: runs away from the inverse"),
    ("<= tolerance).all()", "<= tolerance).any()", "stops while some voxels are still far off"),
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
    ("components[j] + 1.0", "components[j] + 0.0", "determinant of the displacement, not of the map"),
    ("a[1], b[0], value=-1", "a[1], b[0], value=1", "sign in the 2-D determinant"),
    ("b[2] * c[0], b[0], c[2]", "b[0] * c[2], b[2], c[0]", "sign of one cofactor"),
    ("slab.narrow(2, start - first", "slab.narrow(2, 0", "slabs: one off, all but the first"),
    ("min(stop + 1, n)", "stop", "slabs: the last difference of each is one-sided"),
    (".clamp(0, n - 1)", ".clamp(0, n - 2)", "one off: the last voxel is never reached"),
    ("share = point - low", "share = (point - low).detach()", "detach: weights without gradient"),
    ("i * n + end", "i + n * end", "axis order of the flat index"),
    ("(index, 1 - share), (", "(index, share), (", "weights do not sum to 1"),
    ("(label < best)", "(label > best)", "ties to the larger label"),
]

LOSSES = [
    ("/ self.image_sigma**2", "/ self.image_sigma", "unit: deviation for variance"),
    ("return -_MeanLNCC", "return _MeanLNCC", "sign: trained to be dissimilar"),
    ("value=-1 / window **", "value=-1 / (window - 1) **", "one off: voxels of a window"),
    ("F.pad(x, padding).sub_(centre)", "F.pad(x, padding)", "not centred: cancels"),
    (".mul_(scales[i][1] * (2 / warped.numel()))", ".mul_(2 / warped.numel())", "unit: gradient of the scaled image"),
    (
        "keepdim=True) * ((low > 0) | (high < 0))",
        "keepdim=True)",
        "an empty background is lifted, and rounds",
    ),
    ("(32 * torch.finfo", "(0 * torch.finfo", "no variance floor: noise counts as contrast"),
    ("cc.clamp_max_(1).sum()", "cc.sum()", "a correlation above 1"),
    ("(2 / warped.numel()))", "(2 / len(warped)))", "reduction: gradient of the sum over voxels"),
    (".mul_(moments[i].free)", "", "gradient of the floor"),
    ("slab.addcmul_(a, q, value=-1)", "slab.addcmul_(a, q)", "sign of the variance's gradient"),
    ("gradient[:, :, start:stop]", "gradient[:, :, : stop - start]", "slabs: all gradients go to the first"),
    ("images[i], images[1 - i]", "images[0], images[1]", "axis order: gradient of the other image"),
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

METRICS = [
    ("(one + two))[:, 1:]", "(one + two))[:, :-1]", "one off: the background for label 1"),
    ("2 * both.double() / (one + two)", "both.double() / (one + two - both)", "Jaccard's index for Dice"),
    ("2 * both.double() / (one + two)", "both.double() / two", "target overlap for Dice"),
    ("100 * _mean_inside(~(jacobian", "_mean_inside(~(jacobian", "unit: a share for per cent"),
    ("(jacobian_determinant(ddf, scheme) > 0)", "(jacobian_determinant(ddf, scheme) >= 0)", "collapsed is no fold"),
    ("(jacobian_determinant(ddf, scheme) > 0)", "(jacobian_determinant(ddf) > 0)", "scheme ignored"),
    ("inside = inside & (jacobian > 0)", "jacobian = jacobian.clamp_min(1e-9)", "a floor for folded voxels decides"),
    ('0 if definition == "plain" else 2', "0", "Learn2Reg leaves out two voxels of border"),
    ("(jacobian + 3).clamp", "(jacobian + 0).clamp", "Learn2Reg adds 3"),
    ("(log - mean) ** 2, inside).sqrt()", "(log - mean) ** 2, inside)", "variance for its root"),
    ("log = jacobian.log()", "log = jacobian", "SD of the determinant, not of its logarithm"),
    ("/ (2 * math.factorial(spatial_dims))", "/ math.factorial(spatial_dims)", "two ways to cut a cell for their mean"),
    ("wanted, covered = 0.95 *", "wanted, covered = 0.90 *", "another percentile"),
    ("            return max(\n", "            return min(\n", "the nearer of both directions"),
    ("norm(offsets * sides, axis=1)", "norm(offsets * sides[0], axis=1)", "unit: one side for all axes"),
    (
        "_Surface(there, points, areas[code[points]])",
        "_Surface(there, points, 0 * areas[code[points]] + 1)",
        "area ignored",
    ),
]

TRANSFORMS = [
    ("clamp(0, len(self.table) - 1)", "clamp(0, len(self.table) - 2)", "unknown labels join the largest structure"),
    ("start=1):\n        for label", "start=0):\n        for label", "one off: the first structure is background"),
    ("or table[label] != 0:", "and table[label] != 0:", "a label in two structures"),
    ("names.index(name) + 1 for", "names.index(name) for", "one off: another structure is kept"),
    ("found, 0)", "0, found)", "what should go is kept"),
    ("> self.num_labels:", "> self.num_labels + 1:", "a label past what is measured"),
    ('if mode == "nearest" else', 'if mode == "linear" else', "ways to warp labels exchanged"),
]

ENGINES = [
    (
        '[target["moving"], target["fixed"]], dim=1)',
        '[target["fixed"], target["moving"]], dim=1)',
        "order of the input",
    ),
    ("[pair, torch.cat([fixed, moving], dim=1)]", "[pair, torch.cat([moving, fixed], dim=1)]", "no other order"),
    ("[target[role + end], target[other + end]]", "[target[role + end], target[role + end]]", "targets not exchanged"),
    ('for end in ("", "_label"):', 'for end in ("",):', "labels of the other order are lost"),
    (") / len(inputs)", ")", "time of the batch for that of a pair"),
]

DATA = [
    ("if i != j]", "]", "a scan with itself"),
    ("for j in range(n) if i != j]", "for j in range(i + 1, n)]", "one order of each pair"),
    ('[(n, i) if atlas_role == "moving" else', '[(n, i) if atlas_role == "fixed" else', "the atlas in the other role"),
    ("if _file(scan) != _file(atlas)]", "]", "the atlas with itself"),
    ("pairs.append((moving, fixed))", "pairs.append((fixed, moving))", "moving and fixed exchanged"),
    ('{"moving": moving["image"], "fixed": fixed', '{"moving": fixed["image"], "fixed": moving', "images exchanged"),
    ('"moving_label": moving["label"]', '"moving_label": fixed["label"]', "labels of the other scan"),
    ('if "label" in moving and "label" in fixed', 'if "label" in moving', "half of the labels"),
    ("set_random_state(int(torch.randint(2**32, ())))", "set_random_state(0)", "the same augmentation for ever"),
    ("* 1_000_003 + self.epoch", "* 1_000_003", "every epoch the same pairs"),
    ("manual_seed(self.seed * 1_000_003 + ", "manual_seed(", "every seed the same pairs"),
    ("drawn[rank:wanted:world]", "drawn[:wanted:world]", "all processes take the same pairs"),
    ("for i in range(rank, wanted, world)]", "for i in range(0, wanted, world)]", "pairs that no process measures"),
    ("* world if self.shuffle else self.num_samples", "* world", "pairs that two processes measure"),
    ("require_same_grid(first[0], volume, (first[1], path))", "pass", "grids that differ"),
    ("for scan in [*scans, *([atlas] if atlas else [])]:", "for scan in scans:", "the atlas is not checked"),
]

DATASETS = [
    (
        '"training": "Train", "validation": "Val", "test": "Test"',
        '"training": "Train", "validation": "Test", "test": "Val"',
        "validated on the test",
    ),
    ("if number >= _OASIS_VALIDATION]", "if number > _OASIS_VALIDATION]", "one subject fewer is validated"),
    ("if number < _OASIS_VALIDATION]", "]", "trained on who is validated"),
    ("for fixed, moving in pairwise", "for moving, fixed in pairwise", "order of Learn2Reg's pairs"),
    ('files = "aligned_norm.nii.gz", "aligned_seg35.nii.gz"', 'files = "norm.nii.gz", "seg35.nii.gz"', "not aligned"),
    ('if item["image"] not in paired]', "]", "trained on who is validated"),
    ('scan(item["moving"]), scan(item["fixed"])', 'scan(item["fixed"]), scan(item["moving"])', "moving and fixed"),
    ("training[-5:]", "test[-5:]", "validated on the test"),
    ('"test": [atlas, *test]', '"test": test', "a scan of the test is missing"),
    ("shuffled[k::num_folds]", "scans[k::num_folds]", "not drawn: the seed does nothing"),
    ("if k not in (test, validation) for", "if k != test for", "trained on who is validated"),
    ("(fold + 1) % num_folds", "fold", "validated on the test"),
    (" if image not in kept]", "]", "the atlas is trained on"),
    (
        "ndimage.zoom(component, 0.5, order=2",
        "0.5 * ndimage.zoom(component, 0.5, order=2",
        "unit: voxels of the half grid",
    ),
    (
        "ndimage.zoom(component, 2, order=2)",
        "ndimage.zoom(component, 2, order=0)",
        "not enlarged as the challenge does",
    ),
    ("disp_{fixed:04d}_{moving:04d}", "disp_{moving:04d}_{fixed:04d}", "a field for the other order"),
    ("[[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]", "[[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]", "left for right"),
]

EVALUATION = [
    ("table[members].mean(axis=1)", "table[members].max(axis=1)", "a group is its best structure"),
    ('kind == "structures":\n            return', 'kind == "groups":\n            return', "structures for groups"),
    ('{"mean": means.mean(), ', '{"mean": means.median(), ', "median for mean"),
    ('"sd_over_pairs": means.std()', '"sd_over_pairs": means.std(ddof=0)', "divides by n"),
    ('"sd_over_all": single.std()', '"sd_over_all": values.mean(axis=1).std()', "spread of pairs for that of values"),
    ('"sd_over_all": single.std()', '"sd_over_all": values.mean(axis=0).std()', "spread of structures' means"),
    ("_statistics(values.mean(axis=1)) |", "_statistics(values.mean(axis=0)) |", "over structures for over pairs"),
    ("_statistics(values.mean(axis=1)) |", "_statistics(values.fillna(0).mean(axis=1)) |", "absent counts as missed"),
    ('"values": len(single)', '"values": values.size', "empty values are counted"),
    (
        "for pair in pairs for structure in structures]",
        "for structure in structures for pair in pairs]",
        "values change places",
    ),
    (
        "zip(names[::2], names[1::2], strict=True)",
        "zip(names[1::2], names[::2], strict=True)",
        "moving and fixed exchanged",
    ),
    ("_check_groups(groups or {}, structures)", "pass", "a group of what is not measured"),
    ('.removeprefix("right ")', "", "sides not merged"),
    ("    check_folder(folder, overwrite)\n    summary", "    summary", "an evaluation is replaced silently"),
    ('(folder, overwrite, "an', '(folder, True, "an', "an evaluation is replaced silently"),
]

COMPARISON = [
    ("(values - reference).dropna()", "(reference - values).dropna()", "sign of a difference"),
    ("len(difference) - 1)", "len(difference))", "degrees of freedom"),
    ("(1 + confidence) / 2", "confidence", "one-sided interval"),
    ("np.arange(len(order), 0, -1)", "len(order)", "Bonferroni for Holm"),
    ("np.maximum.accumulate(steps)", "steps", "p values that fall"),
    ("\n    if not common:", "\n    if common:", "other pairs are compared"),
    ("        if not common:", "        if common:", "labels warped in different ways are compared"),
    ("reference, *_ = columns.values()", "*_, reference = columns.values()", "the last run is the reference"),
]

REFINEMENT = [
    ("ddf = ddf * 2\n", "ddf = ddf * 1\n", "unit: vectors keep their length on a finer grid"),
    ("slope.narrow(d + 2, 1, n)).sum(1)", "slope.narrow(d + 2, 1, n))[:, 0]", "gradient: of the first channel"),
    ("2 ** (doublings * (1 + force.shape[1]))", "2**doublings", "gradient: of one voxel of the image alone"),
    ("force -= _gradient(", "force += _gradient(", "sign: the fixed image moves along"),
    ("* jacobian_determinant(ddf).clamp_min_(0)", "", "gradient: volumes change nothing"),
    ("error * (-0.5 / ", "error * (0.5 / ", "sign: away from the inverse"),
    ("inverse = _double(inverse)", "inverse = _double(inverse) / 2", "unit: the inverse of a coarser grid"),
    ("return losses[0] < losses[1]", "return True", "start: one that takes the images apart"),
    (' & (jacobian_determinant(ddf, "forward") > volume)', "", "folds: seen by central differences alone"),
    ("leaf * mask, fixed * mask", "leaf, fixed", "mask: forgotten"),
    ("ddf = smooth(compose(ddf, direction(", "ddf = smooth(compose(ddf, -direction(", "sign: uphill"),
]

NETWORKS = [
    ("[0, 1] * spatial_dims if", "[1, 0] * spatial_dims if", "padding: a stride of 2 pads before, not after"),
    ("F.leaky_relu(x, 0.2", "F.leaky_relu(x, 0.01", "slope: torch's default"),
    ("wide = weight[:, : x.shape[1]]", "wide = weight[:, -x.shape[1] :]", "order: the skip comes first"),
    ("[c, b + c, a + b, a], dim", "[a, a + b, b + c, c], dim", "order: a transposed convolution mirrors its weights"),
    ("of_weight += _conv", "of_weight = _conv", "slabs: the weights' gradient of the last one alone"),
    (".flatten(2).sum((0, 2)) if", ".flatten(2).mean((0, 2)) if", "reduction: the bias's gradient is a mean"),
    ("int(start == 0), int(stop == x.shape[2])", "int(stop == x.shape[2]), int(start == 0)", "padding: the other side"),
    (
        "enabled=False):\n            return F.max_pool3d",
        "enabled=False):\n            return F.avg_pool3d",
        "mean for maximum",
    ),
    ("with torch.autocast(features.device.type, enabled=False):  #", "if True:  #", "precision: fields in bfloat16"),
    ("padding += [0, n]", "padding += [n // 2, n - n // 2]", "padding: on both sides, but cut on one"),
    ("self.block * F.interpolate(", "F.interpolate(", "unit: voxels of the grid of blocks"),
    ("field * 2.0**levels", "field * 2.0", "unit: doubled whatever the level"),
    ("self.num_steps, self.padding_mode)", "self.num_steps)", "padding: not what was asked for"),
    ("smooth(mean, self.smoothing)", "smooth(mean, self.smoothing**2)", "unit: variance for deviation"),
    ("compose(ddf, step)", "compose(step, ddf)", "order: of the passes"),
    ("compose(back, inverse_ddf)", "compose(inverse_ddf, back)", "order: of the passes, in the inverse"),
    ("network.displacement(-field)", "-network.displacement(field)", "sign: a map's negative is not its inverse"),
    ("and k == passes - 1)", "and k == 0)", "gradient: of the first pass"),
    ("is not None and self.training:", "is not None:", "sampled in use, too"),
    ("torch.exp(0.5 * log_variance)", "torch.exp(log_variance)", "unit: variance for deviation"),
    ("torch.ones_like(weight) * smoothness_weight", "weight", "the weight that was drawn is not shown"),
]

SYNTHESIS = [
    ("            if flip:", '            if flip and role == "moving":', "mirrored: one of the two images"),
    ('"moving_label": batch["fixed_label"]}', '"moving_label": batch["moving_label"]}', "labels of the other anatomy"),
    (".round().to(torch.uint8)", ".to(torch.uint8)", "partial volumes rounded down"),
    ("255 - parts.sum(0, keepdim=True)", "0 * parts.sum(0, keepdim=True)", "background never fills most of a voxel"),
    ("self.rotation * torch.pi / 180", "self.rotation", "unit: degrees for radians"),
    ("angles - angles.T", "angles", "shears for rotations"),
    ("(n - 1) / 2 for n in size]", "n / 2 for n in size]", "one off: the middle"),
    ("(n - 1) / 2 for n in size]", "0 * n for n in size]", "turned about the corner"),
    ("dvf = dvf * (2 / knots)", "pass", "unit: voxels of the coarse grid"),
    ("self._spoil(image) * mask", "self._spoil(image * mask)", "noise where the skull was stripped"),
    ("* mask, clean, label", "* mask, image, label", "judged on the image that is shown"),
    ("means * brain, brain", "drawn * brain, brain", "judged on intensities that were drawn"),
    ("shape = [len(like), *", "shape = [1, *", "one draw for the whole batch"),
    ("+ self.intensity_sd * torch", "+ self.intensity_sd**2 * torch", "unit: variance for deviation"),
    ("-self.gamma, self.gamma)", "0, self.gamma)", "gamma: darkens alone"),
    ('["fixed"], prediction["inverse_ddf"]', '["fixed"], prediction["ddf"]', "the field of the other way"),
]
MUTANTS = [
    Mutant(module, *row)
    for module, rows in {
        "blocks": BLOCKS,
        "losses": LOSSES,
        "metrics": METRICS,
        "transforms": TRANSFORMS,
        "engines": ENGINES,
        "data": DATA,
        "datasets": DATASETS,
        "evaluation": EVALUATION,
        "comparison": COMPARISON,
        "refinement": REFINEMENT,
        "networks": NETWORKS,
        "synthesis": SYNTHESIS,
    }.items()
    for row in rows
]


def rotten(mutants: list[Mutant]) -> Iterator[str]:
    for mutant in mutants:
        source = (ROOT / PACKAGE / f"{mutant.module}.py").read_text(encoding="utf-8")
        if (count := source.count(mutant.text)) != 1:
            yield f"{mutant.module}.py must hold {mutant.text!r} once, it holds it {count} times."


def run_tests(folder: str, tests: list[str]) -> None:
    """Run pytest in ``folder`` and exit with its status; what it prints goes to ``folder/output``."""
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT, TIME_LIMIT))
    gc.freeze()  # pytest ends with ten collections: of all that the libraries hold they outlast most mutants
    os.chdir(folder)
    # The copy, not what was imported before it and not an editable install, or all mutants would survive.
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(int(pytest.main(["-xq", "-p", "no:cacheprovider", *tests])))


def failure(mutant: Mutant) -> str | None:
    """Run the tests of the mutant's module on a copy that holds it: what they printed where they failed."""
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        # Sources alone: Python takes a compiled file for current if size and second of its source agree.
        sources = [
            *(ROOT / "tests").glob("*.py"),
            *(ROOT / PACKAGE).glob("*.py"),
            *(ROOT / PACKAGE).glob("published/*"),
        ]
        for path in [ROOT / "pyproject.toml", *sources]:
            (copy / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, copy / path.relative_to(ROOT))
        target = copy / PACKAGE / f"{mutant.module}.py"
        target.write_text(target.read_text(encoding="utf-8").replace(mutant.text, mutant.replacement), encoding="utf-8")
        process = multiprocessing.Process(target=run_tests, args=(folder, TESTS[mutant.module]))
        # start() also asks how the processes of other threads ended; a status is read by one of two, the other gets 255
        with ONE_READER:
            process.start()
        wait([process.sentinel])
        with ONE_READER:
            process.join()
        printed = (copy / "output").read_text()[-4000:]
        # pytest's codes for passed and failed, and the signal for too much CPU time; a syntax error proves nothing
        if process.exitcode not in (0, 1, -signal.SIGXCPU, -signal.SIGKILL):
            raise RuntimeError(f"pytest did not run the tests of {mutant}, exit code {process.exitcode}: {printed}")
        return printed if process.exitcode else None


def main(modules: list[str]) -> int:
    """Print what became of each mutant, and give the exit status."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # Plugins that others' packages bring would be imported before pytest could rewrite them, which it warns about.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(LIBRARIES)
    mutants = [mutant for mutant in MUTANTS if not modules or mutant.module in modules]
    if problems := list(rotten(mutants)):
        sys.exit("\n".join(problems))
    healthy = [Mutant(module, "", "", "unchanged") for module in dict.fromkeys(m.module for m in mutants)]
    survivors = 0
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for mutant, printed in zip(healthy, pool.map(failure, healthy), strict=True):
            if printed is not None:
                sys.exit(f"Tests that fail on healthy code tell nothing: {mutant.module}.\n{printed}")
        for mutant, printed in zip(mutants, pool.map(failure, mutants), strict=True):
            killed = printed is not None
            survivors += not killed
            change = f"{mutant.text.strip()!r} -> {mutant.replacement.strip()!r}"
            print(f"{'killed  ' if killed else 'SURVIVED'} {mutant.module}: {mutant.why}: {change}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} killed.")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
