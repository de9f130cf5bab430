"""Do the tests notice wrong code? Break it by hand, one place at a time, and run its tests.

    python tests/mutants.py           # all whose tests are quick, 2 at a time: in minutes
    python tests/mutants.py slow      # the others: .ci/long
    python tests/mutants.py blocks    # those of one module

Broken are the geometry, the networks, the losses, the images made from label maps, the maps between scans and their
files, and what makes a protocol: from who is paired with whom to what a mean is over.
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
import time
from collections import Counter
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
    "kernels": ["tests/test_blocks.py", "-k", "switch"],
    "loops": [
        *("tests/test_blocks.py", "tests/test_losses.py", "tests/test_folds.py", "tests/test_refinement.py", "-k"),
        "scipys or agree or gradients or rounds or lncc_in_loops or monai_s or both_paths",
    ],
    "metrics": ["tests/test_metrics.py", "-k", "dice or folding or sd or hausdorff or volume or mean_is"],
    "transforms": ["tests/test_transforms.py", "-k", "merg or kept or tables or warp_by or past_what"],
    "engines": ["tests/test_engines.py", "-k", "prepare_pair or both_orders or shares_the_time"],
    "data": ["tests/test_data.py"],
    "apps.datalists": [
        "tests/apps/test_datalists.py",
        "-k",
        "test_ixi or oasis or learn2reg or lpba40 or fold or anew",
    ],
    "handlers": ["tests/test_handlers.py", "-k", "submitted"],
    "evaluation": ["tests/test_evaluation.py"],
    "apps.compare": ["tests/apps/test_compare.py"],
    "descent": ["tests/test_refinement.py", "-k", "not budget and not takes_the_place and not other_contrasts"],
    "refinement": ["tests/test_refinement.py", "-k", "not budget and not takes_the_place and not other_contrasts"],
    "networks": [
        "tests/test_networks.py",
        "-k",
        "(keras or any_size or level or border or smoothed or pass or sample or bidirectional) and not size1 "
        "or surrounds or (one_more and vm1)",
    ],
    "unet": ["tests/test_unet.py", "tests/test_networks.py", "-k", "test_unet or (keras and not size1)"],
    "folds": ["tests/test_folds.py"],
    "objective": ["tests/test_refinement.py", "-k", "force or double or gradient_sums or only_inside"],
    "synthesis": ["tests/test_synthesis.py"],
    "affines": ["tests/space/test_spaces.py"],
    "space.scan": ["tests/space/test_scan.py"],
    "space.resampling": [
        "tests/space/test_resampling.py",
        "tests/apps/test_prepare.py",
        "-k",
        "white or inside or itk or cuts_off or continues",
    ],
    "space.template": ["tests/apps/test_prepare.py", "tests/apps/test_register.py", "-k", "grid or bad_options or rim"],
    "space.itk_bridge": ["tests/space/test_spaces.py", "-k", "itk or matrix or map"],
    "space.alignment": ["tests/space/test_alignment.py", "-k", "known or millimetre or same"],
    "space.mutual_information": ["tests/space/test_mutual_information.py"],
    "maps.spatial_map": ["tests/space/test_spaces.py", "-k", "map or warped"],
    "model_card": ["tests/test_model_card.py", "-k", "not shipped"],
    "apps.shipped": ["tests/test_model_card.py", "-k", "not shipped"],
    "apps.register": [
        "tests/apps/test_register.py",
        "tests/apps/test_slices.py",
        "-k",
        "three_parts or simpleitk_applies or masks_say or tapers or slabs or beside_mni152 or hounsfield or degrees "
        "or outside_a_field",
    ],
    "apps.result": ["tests/apps/test_register.py", "tests/apps/test_slices.py", "-k", "summary or before"],
    "apps.prepare": ["tests/apps/test_prepare.py", "-k", "not any_pose and not tissue and not processes"],
    "maps.chains": ["tests/maps/test_chains.py"],
    "maps.displacements": [
        "tests/maps/test_field_headers.py",
        "tests/space/test_spaces.py",
        "tests/apps/test_apply.py",
        "-k",
        "field or position or slices or (displacement and read) or saved_displacement or saved_map",
    ],
    "maps.field_headers": ["tests/maps/test_field_headers.py"],
    "maps.files": [
        "tests/maps/test_files.py",
        "tests/apps/test_apply.py",
        "-k",
        "test_files or order or marked or pair or whole or cut_off or bad_transforms or inverse_says",
    ],
    "maps.itk_files": ["tests/maps/test_itk_files.py"],
    "maps.names": ["tests/apps/test_apply.py", "-k", "marked or order"],
    "scan_loops": ["tests/test_scan_loops.py"],
    "maps.points": ["tests/apps/test_apply.py", "-k", "points or hash"],
    "maps.grids": ["tests/maps/test_grids.py"],
    "maps.vertices": ["tests/maps/test_vertices.py"],
    "maps.surfaces": ["tests/maps/test_surfaces.py"],
    "maps.streamlines": ["tests/maps/test_streamlines.py"],
    "apps.apply_series": ["tests/apps/test_apply_series.py", "-k", "gradients or axes or follow"],
    "groupwise": ["tests/test_groupwise.py"],
    "vxmdense": ["tests/test_vxmdense.py"],
    "space.middle": ["tests/apps/test_longitudinal.py", "-k", "linear_maps or all_show"],
    "pages.views": ["tests/pages/test_views.py", "-k", "not real and not stripped and not no_part"],
    "pages.checks": ["tests/pages/test_checks.py"],
    "pages.index": ["tests/pages/test_index.py", "tests/pages/test_scans.py"],
    "pages.scans": ["tests/pages/test_scans.py"],
    "pages.cohort": ["tests/pages/test_index.py"],
    "pages.registration": ["tests/pages/test_registration.py", "-k", "patient"],
    "progress": ["tests/test_progress.py"],
    "io.formats": ["tests/io/test_headers.py"],
    "io.volumes": ["tests/io/test_headers.py", "-k", "text or fourth"],
    "io.dicom": ["tests/io/test_dicom.py"],
    "io.images": [
        "tests/io/test_images.py",
        "tests/io/test_headers.py",
        "tests/io/test_dicom.py",
        "-k",
        "label or nan or written or chosen",
    ],
}
# Modules whose tests take a minute or more of a processor for each mutant.
SLOW = {"apps.prepare", "apps.register", "apps.result", "data", "folds", "space.alignment", "space.template"}
# Imported once, before processes are forked: the package, for what it imports (ITK loads its parts when they are first
# used, which takes seconds), and what its tests import.
LIBRARIES = [
    *(
        f"{PACKAGE}.{module}"
        for module in ("cli", "apps.apply", "apps.compare", "apps.prepare", "handlers", "transforms")
    ),
    *("ignite.handlers", "monai.bundle", "monai.engines", "monai.handlers", "monai.losses", "onnxruntime", "pytest"),
    *("nitransforms", "scipy.interpolate", "scipy.spatial.distance", "SimpleITK", "surface_distance"),
]


class Mutant(NamedTuple):
    module: str
    text: str
    replacement: str
    why: str


BLOCKS = [
    ("        found = found + missed / 2", "        found = found - missed / 2", "sign: the search runs away"),
    ("else field.float()", "else field", "precision: coordinates in the field's own bfloat16"),
    ("ddf = _widen(ddf)\n    dtype", "ddf = -_widen(ddf)\n    dtype", "sign: warp pushes instead of pulling"),
    ("range(ddf.shape[1] - 1, -1, -1)", "range(ddf.shape[1])", "axis order: grid_sample counts from the last"),
    ("sigma**2 / (2 * max(", "sigma / (2 * max(", "unit: sigma for a variance"),
    ("wide.narrow(axis, end, 1)", "wide.narrow(axis, 0, 1)", "padding: one border gets what is of both"),
    ("for _ in range(passes)", "for _ in range(1)", "count: wide ones stay narrow"),
    ("2.0 / max(ddf.shape[axis + 2] - 1, 1)", "2.0 / ddf.shape[axis + 2]", "unit: voxels counted as without corners"),
    (
        'ddf: Tensor, mode: str = "bilinear", padding_mode: str = "border"',
        'ddf: Tensor, mode: str = "bilinear", padding_mode: str = "zeros"',
        "padding: images end",
    ),
    ('7, padding_mode: str = "border"', '7, padding_mode: str = "zeros"', "padding: fields end at the border"),
    ("compose(ddf, ddf, padding_mode)", "compose(ddf, ddf)", "padding: not what was asked for"),
    ("dtype = torch.float64  # float32", "dtype = torch.float32  # float32", "precision: large labels rounded"),
    ("image.dtype), mode, padding_mode, align_corners=True)", "image.dtype), mode, padding_mode)", "align_corners"),
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
    ("* (0.5**num_steps)", "* (0.5 ** (num_steps + 1))", "scaling: integrates to time 1/2"),
    ("[0.5**num_steps]", "[0.5 ** (num_steps + 1)]", "scaling: loops integrate to time 1/2"),
    ("elif ddf is not dvf:", "else:", "memory: the velocity that came in is overwritten"),
    ("None if grad is grad_output else grad", "grad", "memory: the gradient that came in is overwritten"),
    ('padding_mode == "border" and loops', "loops", "padding: loops know one, and take both"),
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
    ("fraction = point - low", "fraction = (point - low).detach()", "detach: weights without gradient"),
    ("i * n + end", "i + n * end", "axis order of the flat index"),
    ("(index, 1 - fraction), (", "(index, fraction), (", "weights do not sum to 1"),
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
    ("100 * _mean_inside(~(jacobian", "_mean_inside(~(jacobian", "unit: a fraction for per cent"),
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
        "_Surface(is_surface, points, areas[code[points]])",
        "_Surface(is_surface, points, 0 * areas[code[points]] + 1)",
        "area ignored",
    ),
]

TRANSFORMS = [
    ("clamp(0, len(self.table) - 1)", "clamp(0, len(self.table) - 2)", "unknown labels join the largest structure"),
    ("start=1):\n        for label", "start=0):\n        for label", "one off: the first structure is background"),
    ("or table[label] != 0:", "and table[label] != 0:", "a label in two structures"),
    ("names.index(name) + 1 for", "names.index(name) for", "one off: another structure is kept"),
    ("numbers, 0)", "0, numbers)", "what should go is kept"),
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
    ("random.set_random_state(seed)", "random.set_random_state(0)", "the same augmentation for ever"),
    ("(self.scans.transform, self.augmentation)", "(self.augmentation,)", "preprocessing draws as it likes"),
    ("index.seed if isinstance(index, _Turn) else ", "", "augmentation depends on the process that loads"),
    (".tolist()[rank::world]", ".tolist()", "all processes augment alike"),
    ("* 1_000_003 + self.epoch", "* 1_000_003", "every epoch the same pairs"),
    ("manual_seed(self.seed * 1_000_003 + ", "manual_seed(", "every seed the same pairs"),
    ("drawn[rank:wanted:world]", "drawn[:wanted:world]", "all processes take the same pairs"),
    ("for i in range(rank, wanted, world)]", "for i in range(0, wanted, world)]", "pairs that no process measures"),
    ("* world if self.shuffle else self.num_samples", "* world", "pairs that two processes measure"),
    ("check_same_grid(first[0], grid, (first[1], path))", "pass", "grids that differ"),
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
    ("[[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]", "[[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]", "left for right"),
]

HANDLERS = [
    (
        "ndimage.zoom(component, 0.5, order=2",
        "0.5 * ndimage.zoom(component, 0.5, order=2",
        "unit: voxels of the half grid",
    ),
    ("disp_{fixed:04d}_{moving:04d}", "disp_{moving:04d}_{fixed:04d}", "a field for the other order"),
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

LOOPS = [
    ("s[_TZ + x] = p - kind(i)", "s[_TZ + x] = kind(i + 1) - p", "weights of the two planes exchanged"),
    ("value = f0 + tz * (f1 - f0)", "value = f0 + ty * (f1 - f0)", "axis order: weights of another axis"),
    ("o[there] = scale * (u[there] + value)", "o[there] = u[there] + value", "scaling: the first field stays long"),
    ("far = outer * g[of_c + here + x] * tz", "far = g[of_c + here + x] * tz", "scaling: of the image's gradient"),
    ("outer = scale if add", "outer = kind(1) if add", "scaling: of the gradient that comes in"),
    ("scale * s[_GZ + x] if zero < p and p < end_z else zero", "scale * s[_GZ + x]", "gradient past the border"),
    ("d = scale * s[_GX + x] if", "d = s[_GX + x] if", "scaling: of the field's gradient"),
    ("ov[b + sz + sy] += s[_V6 + x]", "ov[b + sz + sy] = s[_V6 + x]", "of several points the last one counts"),
    ("max(last, int(highest) + 4)", "last", "threads: two may add to one voxel at a time"),
    ("min(first, int(lowest) - 2)", "first", "threads: two may add to one voxel at a time"),
    ("begin >= before.get(item, begin)", "begin >= before.get(0, begin)", "threads: items of a batch are mixed up"),
    ("- ends[4, x] + outside * blank_a * blank_b", "- ends[4, x]", "padding: what lies outside is forgotten"),
    ("wz * (above[y, x] + below[y, x])", "wz * (above[y, x] - below[y, x])", "smoothing: one neighbour taken away"),
    ("o[here] = found if found > least else least", "o[here] = found", "volumes: the logarithm of less than nothing"),
    ("last_one = here + of_y, here + of_x", "last_one = here + of_x, here + of_y", "order: two components exchanged"),
    ("squares_a - sum_a * sum_a / n", "squares_a - sum_a * sum_a / (n - 1)", "one off: voxels of a window"),
    ("q = cc / v_a if variance_a > floor_a else kind(0)", "q = cc / v_a", "gradient of the floor"),
    ("p * kind(sum_b) - q * kind(sum_a)", "p * kind(sum_b) + q * kind(sum_a)", "sign of the variance's gradient"),
    ("own = 3 if i and", "own = 1 if i and", "gradient of the other image"),
    ("out[z, y, x] = factor * (v * p - u * q", "out[z, y, x] = factor * (u * p - v * q", "images exchanged"),
    ("of[i][k], of[1 - i][k], reaches", "of[1 - i][k], of[i][k], reaches", "scales exchanged"),
    ("not (central and forward)", "not central", "folds: seen by central differences alone"),
    ("(half if 0 < z < depth - 1 else one)", "one", "unit: difference over two voxels"),
    ("(none if x < width - 1 else bx)", "none", "border: no difference is left"),
]

KERNELS = [
    ("len(kinds) > 1 or not kinds", "not kinds", "two types at once"),
    ("or is_in_torch_dispatch_mode()", "", "whoever watches torch's operators sees none"),
    ("if all(tensor.numel() for tensor in tensors) else None", "", "nothing to loop over"),
]

OBJECTIVE = [
    ("ddf = ddf * 2\n", "ddf = ddf * 1\n", "unit: vectors keep their length on a finer grid"),
    ("slope.narrow(d + 2, 1, n)).sum(1)", "slope.narrow(d + 2, 1, n))[:, 0]", "gradient: of the first channel"),
    ("2 ** (doublings * (1 + force.shape[1]))", "2**doublings", "gradient: of one voxel of the image alone"),
    ("force -= image_force(", "force += image_force(", "sign: the fixed image moves along"),
    ("* jacobian_determinant(ddf).clamp_min_(0)", "", "gradient: volumes change nothing"),
    ("leaf * mask, fixed * mask", "leaf, fixed", "mask: forgotten"),
    (
        "_whole(warp(pair.masks[0], ddf)) * pair.masks[1]",
        "pair.masks[1]",
        "mask: that of the moving image counts nothing",
    ),
]

FOLDS = [
    ("rows[axis][axis] = slope[axis] + 1.0", "rows[axis][axis] = slope[axis]", "folds: displacements are no maps"),
    ("torch.where(at > 0, back, ahead)", "back", "folds: no volume is left at the border"),
    (' & (jacobian_determinant(ddf, "forward") > volume)', "", "folds: seen by central differences alone"),
    ("index = index * (n + 2) + at + 1", "index = index * (n + 2) + at", "one off: where folds lie"),
]

DESCENT = [
    ("self._scaled(smoothed, -1)), -1) * _STEP", "self._scaled(smoothed, -1)), -1) * -_STEP", "sign: uphill"),
    ("-2), alpha=self.volume)", "-2), alpha=-self.volume)", "sign: volumes are driven apart"),
    ("smoothness * _STEP / (width * scale)", "smoothness * _STEP / scale", "unit: smoothness in voxels"),
    ("[amount**0.5 / each for each in ratios]", "[amount**0.5 for each in ratios]", "unit: slices smoothed in voxels"),
]

REFINEMENT = [
    ("error * (-0.5 / ", "error * (0.5 / ", "sign: away from the inverse"),
    ("inverse = double(inverse)", "inverse = double(inverse) / 2", "unit: the inverse of a coarser grid"),
    ("return losses[0] < losses[1]", "return True", "start: one that takes the images apart"),
    ("compose(there, _inverse(back)), compose(back, _inverse(there))", "there, back", "mean: half of the way"),
]


UNET = [
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
]

NETWORKS = [
    ("with torch.autocast(features.device.type, enabled=False):  #", "if True:  #", "precision: fields in bfloat16"),
    ("padding += [0, n]", "padding += [n // 2, n - n // 2]", "padding: on both sides, but cut on one"),
    ("self.block * F.interpolate(", "F.interpolate(", "unit: voxels of the grid of blocks"),
    ("field * 2.0**levels", "field * 2.0", "unit: doubled whatever the level"),
    ("self.num_steps, self.padding_mode)", "self.num_steps)", "padding: not what was asked for"),
    ("smooth(mean, self.velocity_sigma)", "smooth(mean, self.velocity_sigma**2)", "unit: variance for deviation"),
    ("compose(ddf, step)", "compose(step, ddf)", "order: of the passes"),
    ("compose(back, inverse_ddf)", "compose(inverse_ddf, back)", "order: of the passes, in the inverse"),
    ("network.displacement(-field)", "-network.displacement(field)", "sign: a map's negative is not its inverse"),
    ("and k == cascades - 1)", "and k == 0)", "gradient: of the first pass"),
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
    ("self.intensity_sd * torch", "self.intensity_sd**2 * torch", "unit: variance for deviation"),
    ("-self.gamma, self.gamma)", "0, self.gamma)", "gamma: darkens alone"),
    ('["fixed"], prediction["inverse_ddf"]', '["fixed"], prediction["ddf"]', "the field of the other way"),
]
AFFINES = [
    ("np.diag([-1.0, -1.0, *", "np.diag([-1.0, 1.0, *", "sign: the second axis of LPS is that of RAS"),
    ("np.linalg.norm(affine[:-1, :-1], axis=0)", "np.linalg.norm(affine[:-1, :-1], axis=1)", "axis: rows for columns"),
    ("atol=1e-3)", "atol=1e-9)", "tolerance: the rounding of headers is shear"),
    ("points * np.array([-1, -1, 1])", "points * np.array([-1, 1, 1])", "sign: points to LPS"),
    ("np.ix_([0, 1, 3], [0, 1, 3])", "np.ix_([0, 1, 3], [0, 1, 2])", "plane: the shift is left out"),
    ("index[0] += start", "pass", "slabs: each begins at the border"),
    ("[n - 1 for n in shape]", "[0 for n in shape]", "distance: only the first voxel is compared"),
    ("min(0.1, 0.1 *", "min(0.1, 10 *", "tolerance: a grid is one to ten voxels"),
    ("_SLAB_VOXELS // (size[1] * size[2])", "_SLAB_VOXELS // (size[0] * size[0])", "slabs: planes of another axis"),
]

SCAN = [
    ("place, name)\n        self.array", "np.eye(4), name)\n        self.array", "check: shear is not refused"),
    ("if not np.isfinite(self._range).all():", "if False:", "check: NaN is a number"),
    ("low if low < -0.1 * high", "low if low < 0", "background: interpolation's undershoot"),
    ("low if low < -0.1 * high", "0.0 if low < -0.1 * high", "background: air in CT is 0"),
    ("array[0] if array.ndim == 4", "array[..., 0] if array.ndim == 4", "axis: the channel comes first"),
    ("as_labels(scan.array, own) if labels else", "scan.array if labels else", "check: labels are taken as they come"),
    ("header=self.header, spatial_dims", "header=None, spatial_dims", "header: the codes of the scan are lost"),
    ("np.insert(affine, 2, 0, axis=0), 2,", "np.insert(affine, 1, 0, axis=0), 2,", "axis: a 2-D image on its side"),
    ("all(n == 1 for n in image.shape[3:])", "True", "check: a series passes as a volume"),
]

RESAMPLING = [
    ("@ mapping @ grid.affine\n    to_voxels[:3][", "@ grid.affine @ mapping\n    to_voxels[:3][", "order of matrices"),
    ("np.linalg.inv(grid.affine) @ mapping @ scan.affine", "np.linalg.inv(grid.affine) @ scan.affine", "map left out"),
    ("scan.array > scan.background)", "scan.array > 0)", "background: air of a CT counts, or nothing does"),
    ("large[-1]", "large[0]", "peak: the darkest for the brightest"),
    ("scan.array * (110 / 255 /", "scan.array * (200 / 255 /", "unit: another mode of white matter"),
    ("np.percentile(shown, 99.9)", "shown.max() * 4", "bins: most of the histogram is empty"),
    ("_LARGE_PEAK * counts.max()", "0 * counts.max()", "peak: noise of vessels is one"),
    ("lost |= at < -0.5", "lost |= at < 0.5", "border: half a voxel of what is seen is lost"),
    ("shown.take(-1, axis).any()", "shown.take(0, axis).any()", "cut: the far side is taken for the near one"),
    ("np.inf) if outside is None", "0.0) if outside is None", "border: nothing continues"),
]

TEMPLATE = [
    ("None, LIA, *_template_box()", "None, LIA * [-1, 1, 1], *_template_box()", "sign: the grid runs right"),
    ("- 1) / 2)\n        return", ") / 2)\n        return", "centre: half a voxel off"),
    ("(extent < needed).any()", "(extent < needed).all()", "check: one axis may be too short"),
    ("side *= 1.02", "side *= 0.98", "direction: a grid becomes finer"),
    ("+ 1 + 2 * _MARGIN", "+ 1", "margin: none"),
    ("2.5 + 0.2 *", "2.5 + 0.0 *", "rim: of what is resampled is too much"),
    ("[line[-1] for line in lines]", "[line[-1] + 1 for line in lines]", "box: a voxel too many"),
]

ITK_BRIDGE = [
    ("image_from_array(np.ascontiguousarray(array.T))", "image_from_array(np.ascontiguousarray(array))", "axis order"),
    ("lps[:-1, :-1] / spacing(affine)", "lps[:-1, :-1]", "unit: a direction has the length of a voxel"),
    ("transform.GetOffset()", "transform.GetTranslation()", "centre: the shift about the origin"),
    ("np.float64 if double", "np.float16 if double", "precision: of the matrix"),
    ("@ lps\n", "@ np.eye(spatial_dims + 1)\n", "place: what ITK has is lost"),
]

ALIGNMENT = [
    ("to - linear @ centre", "to - centre", "centre: rotates about the origin"),
    ("result, kind, _TOLERANCE * size)", 'result, "rigid", _TOLERANCE * size)', "kind: an affine map stays rigid"),
    ('"rigid" if kind == "rigid" else "similarity"', '"similarity"', "kind: a rigid map scales"),
    ("> _SAME *", "> 2 * _SAME *", "check: what is the same is optimised"),
    ("common.mean() < 0.5", "common.mean() < 2", "check: what is the same is optimised"),
]

MUTUAL_INFORMATION = [
    ("@ [edge.start for edge in part]", "@ [edge.stop for edge in part]", "position: of what is cut off"),
    ("@ ((factor - 1) / 2)", "@ (factor / 2)", "position: corners for centres"),
    ("affine[:-1, :-1] *= factor", "pass", "unit: voxels of the finer copy"),
    ("wider[:-1, -1] -=", "wider[:-1, -1] +=", "sign: of the margin"),
    ("1.0 - (goes_on & beyond)", "1.0 - beyond", "background ends with the field of view"),
    ("known = None if not", "known = None if", "what is cut off counts as its border"),
    ("np.sign(x)\n", "1\n", "sign: slope of the spline"),
    ("(turn.T @ gradient.reshape(", "(gradient.reshape(", "axes: of the moving image for the fixed"),
    ("zip(at, shape, steps", "zip(at, shape, steps[::-1]", "axis order: neighbours along another axis"),
    ("nearest * n + np.clip(x + 0.5", "nearest * n + np.clip(x", "a glance at the voxel below"),
    ("given - np.log(np.maximum(of_fixed", "given + np.log(np.maximum(of_fixed", "sign: entropy of the fixed image"),
    ("there.value > here.value", "there.value < here.value", "sign: climbs down"),
]

SPATIAL_MAP = [
    ("self.post @ self.pre", "self.pre @ self.post", "order of the linear parts"),
    ("np.linalg.inv(affine), points)", "affine, points)", "direction: voxels for mm"),
    ("offset *= inside(index, ddf.shape[1:])", "pass", "border: the field goes on for ever"),
    ("np.tensordot(affine[:3, :3], offset, axes=1)", "offset", "unit: voxels added to mm"),
    (
        "self._map(apply_affine(grid.affine, index))) - index",
        "self._map(apply_affine(grid.affine, index)))",
        "position",
    ),
    ("self._map(given.T).T", "self._map(given.T[::-1]).T", "axis order of points"),
    ("index + ddf[:, part]", "index - ddf[:, part]", "sign: pushes instead of pulling"),
    ("np.where(inside(at, scan.shape), values, outside)", "values", "border: goes on for ever"),
]

MODEL_CARD = [
    ("if value != usual[name]", "if value == usual[name]", "the preset is written for what differs from it"),
    (
        "self.in_channels, self.smoothness_weight, **self.changes",
        "self.in_channels, self.smoothness_weight",
        "changes are forgotten",
    ),
    ("isinstance(value, list) else value", "isinstance(value, tuple) else value", "lists stay lists"),
    ("if card.intensities not in INTENSITIES", "if False", "check: any name of intensities"),
]

SHIPPED = [
    ("if preset not in (None, card.preset)", "if False", "check: a preset that the card contradicts"),
    ("if spatial_dims not in (None, card.spatial_dims)", "if False", "check: dimensions that the card contradicts"),
]

REGISTER = [
    ("np.where(mask.array > 0, scan.array", "np.where(mask.array == 0, scan.array", "mask: the other way round"),
    ("scan.check_same_grid(mask)", "pass", "check: a mask of another grid"),
    ("if cosine < 0.7", "if cosine < -2", "check: planes across each other"),
    ("common < _LEAST_IN_COMMON", "common < 0", "check: scans that do not overlap"),
    ("check_in_grid(scan, mapping, grid)", "pass", "check: a brain beside the grid"),
    ("wider[:3, 3] -=", "wider[:3, 3] +=", "sign: the margin lies behind"),
    ("*= ramp[::-1]", "*= ramp", "margin: does not taper"),
    ("np.linalg.inv(to_fixed), to_moving, fields[0]", "to_fixed, to_moving, fields[0]", "direction: of the first part"),
    ("np.linalg.inv(to_moving), to_fixed, fields[1]", "np.linalg.inv(to_moving), to_fixed, fields[0]", "no inverse"),
    ("outside=moving.background)", "outside=0.0)", "background: beyond a CT there is water"),
    ("(~each for each in lost)", "(each for each in lost)", "cut off: only what nobody knows counts"),
    ("warp_scan(moving_labels, whole_ddf, fixed, order=0)", "warp_scan(moving_labels, whole_ddf, fixed)", "new labels"),
]

RESULT = [
    ("header_map(scan, self.fixed)", "np.eye(4)", "slices: before the alignment they lie in one plane"),
    ("self.inverse.apply(self.forward.apply(points))", "self.forward.apply(points)", "there, and not back"),
    ("array > self.fixed.background", "array >= self.fixed.background", "mean: over the background, too"),
    ('"after": self.warped_labels', '"after": self._aligned(self.moving_labels)', "step: the labels are not bent"),
    ('"affine": self.aligned', '"affine": self.warped', "stage: what is bent passes for aligned"),
    (", viewed(self.moving, self.fixed.grid, *way))", ")", "padding counts as alike"),
]

PREPARE = [
    ("image.check_same_grid(labels)", "pass", "check: labels of another grid"),
    ("resample(labels, target, mapping, order=0)", "resample(labels, target, mapping)", "labels are mixed"),
    ("is None:\n        check_brain(image)", "is None:\n        pass", "check: anything is taken for a brain"),
    ("sorted(shuffled[first + second :])", "sorted(shuffled[first:])", "leak: test scans are trained on"),
    ('["inputs"] == scan.inputs()', '["inputs"] == scan.inputs() or True', "a scan that changed counts as done"),
    ("random.Random(seed)", "random.Random(0)", "seed: always the same"),
]


VIEWS = [
    ("high + more * (high - low)", "high", "window: of the brain alone, without what lies beyond"),
    ('axcodes2ornt("RAS"))', 'axcodes2ornt("LAS"))', "sides: left and right exchanged"),
    ("_pixels(*self.box[up])[::-1]", "_pixels(*self.box[up])", "axis: heads stand on their heads"),
    ("np.where(folds, 0, level)", "level", "folds look like growth"),
    ("blocks <= 0).any(", "blocks <= 0).all(", "a fold is lost in a block"),
    ("self.normal, points, 1) > self.limit", "self.normal, points, 1) < self.limit", "sign: the brain is hidden"),
    ("blocks / linear", "blocks * linear", "unit: the linear part counts twice"),
]
CHECKS = [
    ("_FAR = 8.0", "_FAR = 30.0", "threshold: a shift of 20 mm passes"),
    ("_FOLDS = 0.05", "_FOLDS = 50.0", "threshold: a map that folds passes"),
    ("_LOOSE = 0.1", "_LOOSE = 0.9", "threshold: labels of another scan pass"),
    ("_BETTER = 0.15", "_BETTER = 1.5", "threshold: labels of another brain in the same place pass"),
    ("np.linalg.det(matrix) < 0", "np.linalg.det(matrix) < -9", "a mirrored map passes"),
    ("[int(vector[axis] > 0)]", "[int(vector[axis] < 0)]", "sign: the words say the other side"),
    ("lattice.points[:, shown].mean(axis=1) - lattice", "lattice", "place: without the fixed scan"),
    ("centres[left][0] > centres[right][0]", "centres[left][0] < centres[right][0]", "sides exchanged pass"),
    ("_TURN = 75.0", "_TURN = 200.0", "threshold: upside down passes"),
    ("if one_contrast and after < before", "if after < before", "two contrasts are compared"),
]
INDEX_PAGE = [
    ("_ODD = 3.5", "_ODD = 35.0", "threshold: nobody is an outlier"),
    ("_FEWEST = 5", "_FEWEST = 2", "threshold: of three, one is an outlier"),
    ('side = "low" if value < middle else "high"', 'side = "high" if value < middle else "low"', "side: the good ones"),
    ("or 1.2533 * np.mean(np.abs(values - middle))", "", "rule: where most values are equal nobody is an outlier"),
    ("hashlib.sha256(name.encode()).hexdigest()[:16]}.jpg", "name}.jpg", "a name leads out of the folder"),
    ("return quote(path", "return str(path", "names with # lead nowhere"),
    ("found if math.isfinite(found) and", "found if", "NaN breaks the page"),
    ("if first - reach <= value", "if first <= value", "whiskers end at the quartile"),
]
SCANS = [
    ("voxels[up][::-1]", "voxels[up]", "axis: heads stand on their heads"),
    ("sides[1:].max()", "sides.max() * 2", "proportions: pictures do not fill their height"),
    ("        at[1:] |= change\n", "", "outlines on one side only"),
    ("value / 1000", "value", "unit: mm3 for ml"),
    ('row.get("reason") or row["name"] not in entries', 'row["name"] not in entries', "a stale result for a failure"),
]
COHORT_PAGE = [
    ('entry.failed == "", entry.name', "entry.name, entry.failed", "what failed is among the others"),
    ("        if reason:  # a result", "        if not reason:  # what", "a stale result for a failure"),
]
REGISTRATION_PAGE = [
    ('each["sha256"]) for role', 'each["path"]) for role', "privacy: paths are shown"),
    ('words.append(f"--{role', 'words.append(f"{inputs[role]} --{role', "privacy: the command has paths"),
]
PROGRESS = [
    ("time.monotonic() - self._told >= _EVERY", "True", "a log gets a line for each step"),
    ("seconds / self._done * (self._total - self._done)", "seconds / self._done * self._total", "what is done is left"),
    ("self._failed += failed", "self._failed += 1", "all have failed"),
]

CHAINS = [
    ("in reversed(range(transform.GetNumber", "in (range(transform.GetNumber", "order: parts of a composite"),
    ("for part in reversed(parts):  #", "for part in parts:  #", "order: ITK applies the last one first"),
    ("matrix_of(part) @ matrix_of(parts.pop())", "matrix_of(parts.pop()) @ matrix_of(part)", "order: of matrices"),
    ("(np.array(ends) - origin).T, origin", "np.array(ends) - origin, origin", "transposed"),
    ("vectors[:] = points_to_lps(np.tensordot(", "vectors[:] = (np.tensordot(", "sign: RAS for LPS"),
    ("np.floor(at + 0.5)", "np.rint(at)", "halves go to the even voxel"),
    ("np.where(inside(at, array.shape), best, 0)", "best", "labels go on beyond the image"),
    ("_shift(grid.affine, (part.start, 0, 0))", "grid.affine", "every slab is the first one"),
    ("index[0] -= part.start", "pass", "origin: of the whole for that of a slab"),
    ('interpolation: str = "nearest"', 'interpolation: str = "linear"', "default: of labels"),
    ("step=0.5", "step=1.0", "runs away where it stretches by more than 100 %"),
    ("_require_no_folds(torch", "(torch", "what folds gets an inverse"),
    ("fit = _border_fit(ddf)", "fit = np.eye(4)", "an affine registration stays in the field"),
    ("np.linalg.inv(affine @ _border_fit(ddf))", "np.linalg.inv(affine)", "start: without the affine part"),
    ("axis=0).max()\n    parts", "axis=0).mean()\n    parts", "reduction: mean residual for the largest"),
    (
        "in reversed(flatten(transform)):\n        if part.IsLinear():\n            parts",
        "in flatten(transform):\n        if part.IsLinear():\n            parts",
        "order: of inverses",
    ),
    ("missed.max() <= _MISS", "missed.max() <= 1e9", "a point without a counterpart"),
]

DISPLACEMENTS = [
    ("(ras_to_lps(3) @ affine)[:3, :3]", "affine[:3, :3]", "sign: RAS for LPS"),
    ("np.eye(4) if intent == 1006", "np.eye(4) if intent == 1007", "sign: of the other intent"),
    ('if meaning.system == "LPS" else', 'if meaning.system == "RAS" else', "sign: of the other system"),
    ("vectors = vectors - places", "vectors = vectors", "positions for displacements"),
    ("check_displacements(vectors, places, path)", "pass", "positions without a mark are displacements"),
    ('"ij,...j->i..."', '"ji,...j->i..."', "transposed"),
    ("np.indices(size), axes=1), 0, -1) + affine[:-1, -1]", "np.indices(size), axes=1), 0, -1)", "origin: of the grid"),
    ("if not np.isfinite(vectors).all():\n        count", "if False:\n        count", "NaN is a place"),
]

FIELD_HEADERS = [
    (
        "{0.0: _POSITIONS, 1.0: _ALONG_RAS}",
        "{1.0: _POSITIONS, 0.0: _ALONG_RAS}",
        "positions for displacements, and back",
    ),
    ('Meaning(True, "RAS")', 'Meaning(True, "LPS")', "sign: of positions"),
    ("{1006: _ALONG_RAS, 1007: _ALONG_LPS}", "{1006: _ALONG_LPS, 1007: _ALONG_RAS}", "sign: intents exchanged"),
    ("in (vectors, points_to_lps(vectors)):", "in (vectors,):", "positions along LPS are overlooked"),
    ("np.linalg.norm(off - off.mean(axes))", "np.linalg.norm(off)", "positions far away are overlooked"),
    ("_LOOKS_ALIKE = 0.4", "_LOOKS_ALIKE = 0.05", "positions that turn are overlooked"),
    ("_LOOKS_ALIKE = 0.4", "_LOOKS_ALIKE = 0.6", "a scan that grows by half is refused"),
    ("    if name and not (code", "    if False and not (code", "any mark is a displacement"),
    ("if not name and re.fullmatch(_SPM_VELOCITY, note)", "if False", "velocities of SPM are displacements"),
]

NAMES = [
    ('bool(marked and marked[2] == "1")', "bool(marked)", "[FILE,0] is inverted"),
]

ITK_FILES = [
    ("enumerate(reversed(parts), start=1)", "enumerate(parts, start=1)", "order: ITK applies the last part first"),
    ("vectors[0, ..., :2]", "vectors[0, ..., 1:]", "2-D: the components of y and z"),
    ("numbers[9:] + centre - lps[:3, :3] @ centre", "numbers[9:]", "centre: linear maps turn about the origin"),
    ("direction * sides, origin", "direction, origin", "unit: voxels of 1 mm"),
    ("for part in reversed(found) if", "for part in found if", "order: of what is read"),
]

SCAN_LOOPS = [
    ("int(np.floor(px + 0.5))", "int(np.floor(px))", "rounding: to the voxel below"),
    ("_ROUNDED * (reach == 0)", "0", "border: rounding makes outermost voxels lie outside"),
    ("linear[:3] - np.eye(3, 4)", "linear[:3]", "displacement: the voxel itself is added"),
    ("size[0] == 1 or", "False or", "slice: a point beside its plane lies outside"),
    ("max(y1 - y0, 1)", "2", "border: one-sided differences are halved"),
    ("bx < sx and by < sy and bz < sz", "True", "border: the brain goes on beyond the view"),
    ("1 + np.argmax(mixed)", "np.argmax(mixed)", "off by one: background is a class"),
    ("by = min(max(ay + ((c >> 1) & 1), 0), sy - 1)", "by = min(max(ay, 0), sy - 1)", "no weight along an axis"),
    ("nearest * size[axis]", "nearest * size[0]", "axis order: of the voxels at a glance"),
    ("min(max(x + 0.5, 0.0)", "min(max(x, 0.0)", "a glance at the voxel below"),
    ("sx, sy, sz = size[1] * size[2], size[2], 1", "sx, sy, sz = 1, size[2], size[1] * size[2]", "axis order"),
    ("counts[cells[n]] += weights[n]", "counts[cells[n]] += 1.0", "what is not known counts"),
    ("slopes[2, n] = f1 - f0", "slopes[2, n] = f0 - f1", "sign: slope along z"),
    (
        "square[i, j] += weights[n] * x[i]",
        "square[i, j] += x[i]",
        "what is not known has a part in Fisher's information",
    ),
]

FILES = [
    ("residual = max(residual, missed)", "residual = 0.0", "an inverse misses by nothing"),
    (".ljust(len(found[0]), filler)", "", "length: of a name in a binary file"),
    ('filler = b" " if path.suffix in _TEXTS else b"\\0"', 'filler = b" "', "a name in a binary file ends in blanks"),
    ("if len(ends) < len(transforms):", "if False:", "what is cut off is the identity"),
    ("is not None and found != number:", "is not None and found > number:", "too few parameters"),
    (
        "matrix = matrix_of(part) @ matrix if",
        "matrix = matrix @ matrix_of(part) if",
        "order: of matrices of an ANTs pair",
    ),
    ("warp.unlink(missing_ok=True)", "pass", "an old warp stays beside a new matrix"),
    ("[:-1, :-1])) < 1e6", "[:-1, :-1])) > 0", "a matrix without an inverse"),
    (
        "transform = lift(transform)\n        if inverted:",
        "transform = lift(transform)\n        if False:",
        "no inverse",
    ),
]

POINTS = [
    ('for axis in "xyz"]', 'for axis in "yxz"]', "axis order"),
    ('if (declared or coordinates) == "RAS":', 'if (declared or coordinates) == "LPS":', "sign: of the other system"),
    ('"0": "RAS", "1": "LPS"', '"0": "LPS", "1": "RAS"', "sign: numbers of systems exchanged"),
    ("or not np.isfinite(numbers).all()", "", "NaN is a place"),
    ("if coordinates not in (None, declared or coordinates):", "if False:", "what a file says is overruled"),
    ('if point.get("position") is not None', "", "points that are not placed"),
    ('markup.pop("measurements", None)', "pass", "lengths as they were before"),
    ("{number + 0.0:.6f}", "{number + 0.0:.3f}", "rounded to a micrometre"),
    ("if not numbers:", "if False:", "a file without points"),
]
FORMATS = [
    ("sides[~np.isfinite(sides) | (sides == 0)] = 1", "pass", "a size of 0 for what both readers take it for"),
    ("if (sides < 0).any():", "if False:", "a size below 0, which ITK takes for a flip"),
    ('-1 if header["pixdim"][0] < 0 else 1', "1", "handedness of the qform"),
    ("* sides * [1, 1, flip]", "* sides * [1, flip, 1]", "axis order: the flip is that of the third axis"),
    ("if apart > allowed:", "if apart > 100:", "pixdim against the sform"),
    ("if not apart <= allowed:", "if apart > allowed:", "NaN is no small distance"),
    ("min(0.1, 0.1 * float(spacing(sform).min()))", "0.5", "tolerance: half a millimetre"),
    ("_ROUNDED = 1e-5", "_ROUNDED = 1e-7", "a quaternion that rounding makes longer than 1"),
    ("_ROUNDED = 1e-5", "_ROUNDED = 1.0", "a quaternion that is no rotation"),
    ("np.sqrt(rest) if rest >= 1e-7 else 0", "0", "a turn of 180 degrees for each"),
    ("if unit not in (0, 2):", "if unit == 1:", "micrometres for mm"),
    ("kind(file.read(kind.sizeof_hdr), check=False)", "kind(file.read(kind.sizeof_hdr))", "as nibabel mends it"),
    ("* header.GetSpacing(axis)", "* header.GetSpacing(0)", "unit: one spacing for all axes"),
]

VOLUMES = [
    ("shape = (*shape[1:], shape[0])", "pass", "MINC: time is the first axis"),
    ("not _SPACES.fullmatch(space)", "False", "the space of a scanner for that of the body"),
    ("if spatial_dims == 3 and (space is None or", "if spatial_dims == 3 and (space is not None and", "LPS by default"),
    ("self.stored).reshape(self.shape)", "self.stored).T.reshape(self.shape)", "axis order of a volume with a time"),
    ("ras_to_lps(3) @ itk_affine(header, num_axes)", "itk_affine(header, num_axes)", "sign: LPS for RAS"),
]

DICOM = [
    ('np.argsort(depth, kind="stable")', "np.arange(count)", "order of the file"),
    ("depth = origin @ normal", "depth = origin[:, 2]", "axis: height for the distance along the normal"),
    ("/ (count - 1)", "/ count", "one off: slices for gaps"),
    ("if places < count:", "if False:", "two volumes for one"),
    ("if uneven > 0.1 *", "if uneven > 10 *", "a slice is missing"),
    ("between[..., None], 1, 2)", "between[:, ::-1, None], 1, 2)", "spacing of rows for that of columns"),
    ("return factor, float(str(intercept)) - factor *", "return factor, float(str(intercept)) -", "intercept"),
    ("float(str(slope)) / header.GetRescaleSlope()", "float(str(slope))", "scaled twice"),
    ("np.asarray(array[..., self.order], dtype)", "np.asarray(array, dtype)", "frames as they are stored"),
    (
        "if (np.abs(steps - steps[0]).max(axis=1) > 1e-3",
        "if (np.abs(steps - steps[0]).max(axis=1) > 1e3",
        "not parallel",
    ),
    ("if number in (None, each.number)]", "]", "any series is the one"),
]

IMAGES = [
    ("np.clip(whole / 50_000, _ROUNDED, 0.25)", "0.5", "fractions for labels"),
    ("np.clip(whole / 50_000, _ROUNDED, 0.25)", "0", "rounding refused"),
    ("whole = np.rint(array)", "whole = np.floor(array)", "cut off for rounded"),
    ('image.set_qform(affine, int(image.header["qform_code"]))', "pass", "two positions are written"),
    ('image.header["pixdim"][1:4] = spacing(affine)', "pass", "two sizes are written"),
    ("np.isfinite(array).all()", "np.isfinite(array).any()", "an image with a hole"),
    ("open_dicom(path, series)", "open_dicom(path)", "the choice is lost"),
]

GRIDS = [
    (
        "            return Ends(*(ImageGrid(grids[name]",
        "            return Ends(*(ImageGrid(grids[name][::-1]",
        "axis order of a size",
    ),
    (
        "    return known and not fits and _overlap(image, ends.fixed)",
        "    return known and _overlap(image, ends.fixed)",
        "overlap both ways is no reason to turn round",
    ),
    (
        "        if known and not _overlap(grid, ends.fixed) and not",
        "        if known and not _overlap(grid, ends.fixed) or not",
        "what lies on one side only is no stranger",
    ),
]
VERTICES = [
    (
        'order=1, mode="nearest") for u',
        'order=1, mode="constant") for u',
        "border: a displacement of 0 beyond it tears",
    ),
    (
        "        parts = flatten(transform)[:: -1 if self.backwards else 1]",
        "        parts = flatten(transform)",
        "order: the last part is undone first",
    ),
    ("for matrix in matrices]) < 0)", "for matrix in matrices]) > 0)", "handedness turned round"),
]
SURFACES = [
    ("return ras_to_lps(3) if", "return np.diag([-1.0, 1, 1, 1]) if", "sign: LPS turns two axes"),
    (
        "np.array(grid.size) / 2)\n    return grid.affine",
        "(np.array(grid.size) - 1) / 2)\n    return grid.affine",
        "offset: FreeSurfer's middle is half a voxel further",
    ),
    (
        "        turned = flip != _handedness(matrix)",
        "        turned = _handedness(matrix)",
        "triangles of a mirrored surface stay inside out",
    ),
    (
        '    said = found[1] if found else frame or "LPS"',
        '    said = found[1] if found else frame or "RAS"',
        "convention of meshes that say nothing",
    ),
]
STREAMLINES = [
    (
        "            moved = apply_affine(self.affine, item.streamline)",
        "            moved = item.streamline",
        "nibabel's affine is left out",
    ),
    ('"VOXEL_TO_RASMM": grid.affine.tolist()', '"VOXEL_TO_RASMM": np.eye(4).tolist()', "the grid is that of no image"),
    ('astype("<f4").tobytes()', 'astype("<f2").tobytes()', "precision: 0.05 mm in float16"),
]
SERIES = [
    ("rotation.T @ frames[0]", "rotation @ frames[0]", "direction: gradients turn against the image"),
    ("-1.0 if np.linalg.det(axes) > 0 else 1.0", "1.0 if np.linalg.det(axes) > 0 else -1.0", "FSL's rule of the sign"),
    ("linalg.polar(matrix[:3, :3])[0]", "matrix[:3, :3]", "a stretch is no rotation"),
    ("    if in_lps:\n        turned", "    if not in_lps:\n        turned", "LPS and RAS exchanged"),
]
GROUPWISE = [
    (" / 2) * 2**_HALVINGS", " / 2) * 2 ** (_HALVINGS - 1)", "unit: half of the velocity"),
    (
        "        return [-whole / 2, whole / 2]",
        "        return [-whole, whole]",
        "both ends would be twice as far apart",
    ),
    (
        "        found = [velocity - middle for velocity in found]",
        "        found = [velocity for velocity in found]",
        "what all have in common stays in",
    ),
]
VXMDENSE = [
    ("math.log2(int_downsize)) if int_steps else 0", "math.log2(int_downsize))", "a displacement is not resized"),
    ("network.displacement(-velocity)", "-network.displacement(velocity)", "minus a displacement is no inverse"),
    ("for k in sorted(numbered)", "for k in sorted(numbered, reverse=True)", "order of the levels"),
]
MIDDLE = [
    ("linalg.expm(np.mean(logarithms, axis=0))", "np.mean(maps, axis=0)", "an arithmetic mean of maps"),
    ("np.linalg.inv(mapping) @ scan.affine", "mapping @ scan.affine", "direction: of the scans, not of the grid"),
    (
        "    affine[:3, 3] = (low + high) / 2 - side",
        "    affine[:3, 3] = low - side",
        "the grid begins where it should be centred",
    ),
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
        "apps.datalists": DATASETS,
        "handlers": HANDLERS,
        "evaluation": EVALUATION,
        "apps.compare": COMPARISON,
        "loops": LOOPS,
        "kernels": KERNELS,
        "objective": OBJECTIVE,
        "folds": FOLDS,
        "descent": DESCENT,
        "refinement": REFINEMENT,
        "unet": UNET,
        "networks": NETWORKS,
        "synthesis": SYNTHESIS,
        "affines": AFFINES,
        "space.scan": SCAN,
        "space.resampling": RESAMPLING,
        "space.template": TEMPLATE,
        "space.itk_bridge": ITK_BRIDGE,
        "space.alignment": ALIGNMENT,
        "space.mutual_information": MUTUAL_INFORMATION,
        "maps.spatial_map": SPATIAL_MAP,
        "model_card": MODEL_CARD,
        "apps.shipped": SHIPPED,
        "apps.register": REGISTER,
        "apps.result": RESULT,
        "apps.prepare": PREPARE,
        "pages.views": VIEWS,
        "pages.checks": CHECKS,
        "pages.index": INDEX_PAGE,
        "pages.scans": SCANS,
        "pages.cohort": COHORT_PAGE,
        "pages.registration": REGISTRATION_PAGE,
        "progress": PROGRESS,
        "maps.chains": CHAINS,
        "maps.displacements": DISPLACEMENTS,
        "maps.field_headers": FIELD_HEADERS,
        "maps.files": FILES,
        "maps.itk_files": ITK_FILES,
        "maps.names": NAMES,
        "maps.grids": GRIDS,
        "maps.vertices": VERTICES,
        "maps.surfaces": SURFACES,
        "maps.streamlines": STREAMLINES,
        "apps.apply_series": SERIES,
        "groupwise": GROUPWISE,
        "vxmdense": VXMDENSE,
        "space.middle": MIDDLE,
        "maps.points": POINTS,
        "io.formats": FORMATS,
        "io.volumes": VOLUMES,
        "io.dicom": DICOM,
        "io.images": IMAGES,
        "scan_loops": SCAN_LOOPS,
    }.items()
    for row in rows
]


def source_of(mutant: Mutant) -> Path:
    return Path(PACKAGE, *mutant.module.split(".")).with_suffix(".py")


def rotten(mutants: list[Mutant]) -> Iterator[str]:
    for mutant in mutants:
        source = (ROOT / source_of(mutant)).read_text(encoding="utf-8")
        if (count := source.count(mutant.text)) != 1:
            yield f"{source_of(mutant)} holds {mutant.text!r} {count} times, but it has to stand there once."


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
            *(ROOT / "tests").rglob("*.py"),
            *(ROOT / PACKAGE).rglob("*.py"),
            *(ROOT / PACKAGE).glob("pages/assets/*"),
            *(ROOT / PACKAGE).glob("published/*"),
            *(ROOT / PACKAGE).glob("sample/*"),
            # and what numba compiled of the healthy loops, which spares each mutant seconds: it belongs to a time
            *(ROOT / PACKAGE / "__pycache__").glob("*loops.*.nb[ic]"),
        ]
        for path in [ROOT / "pyproject.toml", *sources]:
            (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copy2 if path.name.endswith("loops.py") else shutil.copy)(path, copy / path.relative_to(ROOT))
        (copy / "bundles").symlink_to(ROOT / "bundles")  # their weights are large
        target = copy / source_of(mutant)
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


def timed_failure(mutant: Mutant) -> tuple[str | None, float]:
    start = time.perf_counter()
    return failure(mutant), time.perf_counter() - start


def main(modules: list[str]) -> int:
    """Print what became of each mutant, and give the exit status."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # Plugins that others' packages bring would be imported before pytest could rewrite them, which it warns about.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(LIBRARIES)
    wanted = SLOW if modules == ["slow"] else modules or set(TESTS) - SLOW
    mutants = [mutant for mutant in MUTANTS if mutant.module in wanted]
    if problems := list(rotten(mutants)):
        sys.exit("\n".join(problems))
    healthy = [Mutant(module, "", "", "unchanged") for module in dict.fromkeys(m.module for m in mutants)]
    survivors, took = 0, Counter[str]()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for mutant, printed in zip(healthy, pool.map(failure, healthy), strict=True):
            if printed is not None:
                sys.exit(f"Tests that fail on healthy code tell nothing: {mutant.module}.\n{printed}")
        for mutant, (printed, seconds) in zip(mutants, pool.map(timed_failure, mutants), strict=True):
            killed = printed is not None
            survivors += not killed
            took[mutant.module] += seconds
            change = f"{mutant.text.strip()!r} -> {mutant.replacement.strip()!r}"
            print(f"{'killed  ' if killed else 'SURVIVED'} {mutant.module}: {mutant.why}: {change}", flush=True)
    print("seconds:", ", ".join(f"{module} {seconds:.0f}" for module, seconds in took.most_common(12)))
    print(f"{len(mutants) - survivors} of {len(mutants)} killed.")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
