"""The bundles: every file loads, every recipe runs, and MONAI's own checks pass."""

import csv
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from fields import read_submission
from ignite.engine import Engine, Events
from layouts import SIZE, images_and_labels, ixi, learn2reg, lpba40, oasis
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics, WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.workflows import QUIET, copied, workflow
from voxelmorph_monai.apps.datalists import write_datalist
from voxelmorph_monai.evaluation import load_evaluation
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.networks import PRESETS, VoxelMorph

ROOT = Path(__file__).parents[1]
REGISTRATION = ROOT / "bundles" / "brain_t1_registration"
OVERLAYS = sorted(path.name for path in (REGISTRATION / "configs").glob("*.yaml"))

pytestmark = QUIET


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Path]:
    """A copy of the registration bundle with weights (random ones, of seed 0), as the working directory."""
    with copied(REGISTRATION, VoxelMorph, tmp_path) as copy:
        yield copy


def train(prepared: Path, output: Path, *overlays: str, **options: object) -> ConfigWorkflow:
    small = {"max_epochs": 1, "pairs_per_epoch": 2, "num_labels": 4, "learning_rate": 1e-3}
    found = workflow(
        ["train.json", *overlays], dataset_dir=str(prepared), output_dir=str(output), **{**small, **options}
    )
    found.run()
    found.finalize()
    return found


def _lookup(config: object, key: str) -> object:
    for part in key.replace("::", "#").split("#"):
        config = config[int(part)] if isinstance(config, list) else config[part]  # type: ignore[index]
    return config


# What an overlay may add to train.json: ids that only it uses.
NEW_KEYS = {
    "evaluate.json": {"weights", "section", "evaluation_dir", "overwrite", "save_evaluation", "evaluating"},
    "semi_supervised.yaml": {
        *("dice_weight", "dice_ramp", "train_structures"),
        *("loss#dice", "loss#dice_weight", "train#preprocessing#transforms#2#kept"),
    },
    "refine.yaml": {"budget"},
    "synthetic.yaml": {"maps_dir", "coarsen", "anatomy", "dice_weight", "synthesis"},
    "probabilistic.yaml": {"image_sigma", "prior_lambda", "loss#prior"},
    "amortised.yaml": {"network_def#smoothness_weight"},
    "accumulation.yaml": {"accumulation_steps", "train#trainer#accumulation_steps"},
}
AFTER = {"lpba40_56.yaml": "lpba40.yaml", "learn2reg.yaml": "evaluate.json"}  # overlays of another overlay


@pytest.mark.parametrize("name", sorted({*OVERLAYS, "evaluate.json", "multi_gpu_train.json"} - set(AFTER)))
def test_overlay_changes_only_what_exists(name: str) -> None:
    base = ConfigParser.load_config_file(REGISTRATION / "configs" / "train.json")
    overlay = ConfigParser.load_config_file(REGISTRATION / "configs" / name)
    assert overlay
    for key in set(overlay) - NEW_KEYS.get(name, set()):
        _lookup(base, key.lstrip("+"))  # a KeyError names the typo
    for key in NEW_KEYS.get(name, set()):
        assert key in overlay
        with pytest.raises(KeyError):
            _lookup(base, key)


def test_label_maps_train_a_network_that_goes_on_from_given_weights(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, random = tmp_path / "maps", np.random.default_rng(0)
    maps.mkdir()
    scans = []
    for name in "ab":
        blocks = random.choice([0, 2, 41, 3, 42, 4, 24], (5, 6, 7)).repeat(16, 0).repeat(16, 1).repeat(16, 2)
        save_image(maps / f"{name}.nii.gz", blocks.astype(np.int16), np.diag([1.0, 1, 1, 1]))
        scans.append({"image": f"{name}.nii.gz", "label": f"{name}.nii.gz"})
    (maps / "datalist.json").write_text(json.dumps({"training": scans}))
    monkeypatch.chdir(REGISTRATION)
    first = train(prepared, tmp_path / "first", "synthetic.yaml", maps_dir=str(maps))
    longer = {"dataset_dir": str(prepared), "output_dir": str(tmp_path / "first"), "maps_dir": str(maps)}
    longer |= {"num_labels": 4, "pairs_per_epoch": 2, "learning_rate": 1e-3, "max_epochs": 2}
    _fails("different settings {'max_epochs': 1}, now {'max_epochs': 2}", ["train.json", "synthetic.yaml"], **longer)
    noisier = {**longer, "max_epochs": 1, "synthesis#noise": 0.1}
    _fails("different settings {'synthesis': 'Synthesis, sha256 ", ["train.json", "synthetic.yaml"], **noisier)
    weights = str(tmp_path / "first" / "model.pt")
    again = train(
        prepared, tmp_path / "again", "synthetic.yaml", maps_dir=str(maps), pretrained=weights, learning_rate=0.0
    )
    kept, start = (each.trainer.network.network.state_dict() for each in (again, first))
    assert all(torch.equal(kept[name], start[name]) for name in start)
    assert float(kept["flow.weight"].abs().max()) > 1e-4  # its initial values are 1e-5


def test_each_preset_has_its_overlay() -> None:
    for preset in PRESETS:
        overlay = ConfigParser.load_config_file(REGISTRATION / "configs" / f"{preset}.yaml")
        assert overlay == {"preset": preset}


@pytest.mark.parametrize(
    ("files", "kind", "options"),
    [
        (["train.json"], "train", {}),
        (["train.json", "evaluate.json"], "train", {}),
        (["inference.json"], "infer", {}),
    ],
    ids=["train", "evaluate", "inference"],
)
def test_properties_are_what_monai_expects(
    bundle: Path, prepared: Path, files: list[str], kind: str, options: dict[str, object]
) -> None:
    if kind == "train":
        options = {"dataset_dir": str(prepared), "output_dir": "out", "num_labels": 4}
    assert workflow(files, kind, **options).check_properties() == []


def test_train_evaluate_register(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "training"
    trained = train(prepared, output, "mse.yaml", max_epochs=6, pairs_per_epoch=48)
    assert trained.evaluator.state.metrics.keys() == {
        "val_mean_dice",
        "val_dice_before",
        "val_folding_percent",
        "val_sdlogj",
    }
    assert trained.trainer.state.epoch == 6
    (curves,) = output.glob("events.out.tfevents.*")
    assert trained.parser.get_parsed_content("tensorboard").all_writers is None  # closed
    scalars = EventAccumulator(str(curves)).Reload()
    assert len(scalars.Scalars("train_loss")) == 6 * 48
    assert {name for name in scalars.Tags()["scalars"] if name.startswith("val_")} == set(
        trained.evaluator.state.metrics
    )

    evaluated = workflow(
        ["train.json", "evaluate.json"], dataset_dir=str(prepared), output_dir=str(output), num_labels=4
    )
    evaluated.run()
    evaluated.finalize()
    assert list(output.glob("events.out.tfevents.*")) == [curves]
    metrics = evaluated.evaluator.state.metrics
    assert metrics["dice"] > metrics["dice_before"] > 0.3
    assert metrics["folding_percent"] == metrics["folding_forward_percent"] == metrics["ndv_percent"] == 0
    assert 0 < metrics["sdlogj_learn2reg"] < metrics["sdlogj"]
    assert 0 < metrics["inverse_consistency_mm"] < 1
    tables = load_evaluation(output)
    assert list(tables.pairs.index) == [("6", "7"), ("7", "6")]
    assert list(tables.over("dice").columns) == ["1", "2", "3", "4"]
    assert {"dice", "dice_before", "hd95_mm"} == set(tables.structures)
    assert set(metrics) == {*tables.structures, *tables.pairs}
    assert tables.over("dice").mean(axis=1).mean() == pytest.approx(metrics["dice"])
    assert (tables.pairs["seconds"] > 0).all()

    refined = workflow(
        ["train.json", "evaluate.json", "refine.yaml"],
        dataset_dir=str(prepared),
        output_dir=str(output),
        num_labels=4,
        budget=1.0,
        evaluation_dir=str(output / "refined"),
    )
    refined.run()
    assert refined.evaluator.state.metrics["dice"] > metrics["dice_before"]
    assert refined.evaluator.state.metrics["folding_percent"] == 0

    pair = {
        f"{role}{suffix}": str(prepared / folder / f"{number}.nii.gz")
        for role, number in (("moving", 6), ("fixed", 7))
        for suffix, folder in (("", "images"), ("_label", "labels"))
    }
    registered = tmp_path / "registered"
    run = workflow(["inference.json"], "infer", **pair, weights=str(output / "model.pt"), output_dir=str(registered))
    run.run()
    summary = json.loads((registered / "summary.json").read_text())
    # the same pair, weights and metric as in the evaluation
    found = tables.over("dice").loc[("6", "7")].mean()
    assert summary["dice"]["after"]["mean"] == pytest.approx(found, abs=1e-6)  # sums in other orders
    assert summary["correlation_after"] > summary["correlation_before"]
    warped, fixed = nib.load(registered / "warped.nii.gz"), nib.load(pair["fixed"])
    np.testing.assert_allclose(warped.affine, fixed.affine, atol=1e-5)  # float32 in the header
    assert warped.shape == fixed.shape


def test_several_pairs_are_kept_apart(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    scans = [str(prepared / "images" / f"{number}.nii.gz") for number in (5, 6, 7)]
    pairs = [{"moving": scans[i], "fixed": scans[j]} for i, j in ((0, 1), (2, 1), (1, 2))]
    output = {"output_dir": str(tmp_path / "out"), "dataset#data": pairs}
    workflow(["inference.json"], "infer", **output).run()
    folders = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(folders) == {"5_to_6", "7_to_6", "6_to_7"}
    alone = {"output_dir": str(tmp_path / "alone"), "moving": scans[2], "fixed": scans[1]}
    workflow(["inference.json"], "infer", **alone).run()
    for name in ("warped.nii.gz", "displacement.nii.gz"):
        assert (folders["7_to_6"] / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    _fails("already holds", ["inference.json"], "infer", **{**output, "dataset#data": pairs[1:]})
    _fails("is listed twice", ["inference.json"], "infer", **{**output, "dataset#data": [pairs[0], pairs[0]]})


DATA_SETS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "ixi": (ixi, ["ixi.yaml"]),
    "oasis": (oasis, ["oasis.yaml"]),
    "learn2reg": (learn2reg, ["oasis.yaml"]),
    "lpba40": (lpba40, ["lpba40.yaml", "lpba40_56.yaml"]),
    "lpba40 atlas": (lpba40, ["lpba40_regions.yaml", "lpba40_atlas.yaml"]),
}
MODES = [
    *("ncc", "mse", "mi", "mind", "semi_supervised", "probabilistic", "bidirectional", "amortised"),
    *("both_orders", "flip", "augmentation", "accumulation"),
]

# One mode each: all else is that of dense and diffeomorphic, from which they differ in how vectors are resized and
# sampled, as test_networks proves.
LIKE_OTHERS = {"vxmdense": "ncc", "miccai2018": "probabilistic"}


def _combinations() -> Iterator[tuple[str, str, str]]:
    """Each preset with each mode, on a data set in turn: each data set meets each preset and each mode, too.

    With ``VXM_TEST_COMBINATIONS=all`` on every data set, which takes minutes.
    """
    every = os.environ.get("VXM_TEST_COMBINATIONS") == "all"
    for i, preset in enumerate(sorted(PRESETS, key=LIKE_OTHERS.__contains__)):
        for j, mode in enumerate(MODES):
            if mode == "bidirectional" and preset in ("vm1", "vm2"):  # no velocity, which test_networks expects to fail
                continue
            if mode == "probabilistic" and preset not in ("diffeomorphic", "miccai2018"):  # no variance
                continue
            if mode != LIKE_OTHERS.get(preset, mode):
                continue
            for data in DATA_SETS if every else [list(DATA_SETS)[(i + j) % len(DATA_SETS)]]:
                yield data, preset, mode


def test_each_data_set_meets_each_preset_and_each_mode() -> None:
    found = list(_combinations())
    wanted = {(data, preset) for data in DATA_SETS for preset in PRESETS if preset not in LIKE_OTHERS}
    assert {(data, preset) for data, preset, _ in found} >= wanted
    assert {preset for _, preset, _ in found} == set(PRESETS)
    missing = {(data, mode) for data in DATA_SETS for mode in MODES} - {(data, mode) for data, _, mode in found}
    assert {mode for _, mode in missing} <= {"bidirectional", "probabilistic"}  # not for every preset


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data sets as the bundle takes them, 2 scans or pairs a section."""
    folder = tmp_path_factory.mktemp("trees")
    for name, (make, _) in DATA_SETS.items():
        layout = name.split()[0]
        path = write_datalist(layout, make(folder / f"{name} published"), folder / name)
        sections = json.loads(path.read_text())
        path.write_text(json.dumps({section: items[:2] for section, items in sections.items()}))
    return {name: folder / name for name in DATA_SETS}


@pytest.mark.filterwarnings(
    "ignore:(Mean of empty slice|All-NaN|Degrees of freedom):RuntimeWarning"
)  # absent structures
@pytest.mark.parametrize(("data", "preset", "mode"), list(_combinations()))
def test_data_preset_and_mode_go_together(
    bundle: Path,
    trees: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    preset: str,
    mode: str,
) -> None:
    # the preset last: probabilistic.yaml has one of its own
    overlays = [*DATA_SETS[data][1], f"{mode}.yaml", f"{preset}.yaml"]
    options = {"dataset_dir": str(trees[data]), "output_dir": str(tmp_path / "out"), "num_labels": "$len(@structures)"}
    trained = train(trees[data], tmp_path / "out", *overlays, num_labels="$len(@structures)")
    assert trained.trainer.state.iteration == 2
    assert np.isfinite(trained.trainer.state.output[0]["loss"])
    weights = tmp_path / "out" / "model.pt"
    names = set(torch.load(weights, weights_only=True))
    assert names >= set(VoxelMorph(preset).state_dict())

    monkeypatch.setattr("voxelmorph_monai.evaluation.save_box_plot", lambda *_, **__: None)  # most of the time
    if data != "ixi":  # a picture takes as long as all else, and shows no data set but a pair
        monkeypatch.setattr("voxelmorph_monai.report.save_registration_picture", lambda *_, **__: None)
    evaluated = workflow(["train.json", *overlays, "evaluate.json"], section="validation", **options)
    evaluated.run()
    tables = load_evaluation(tmp_path / "out")
    assert list(tables.over("dice")) == list(evaluated.parser.get_parsed_content("structures"))
    assert tables.over("dice").notna().any(axis=None)
    assert ("inverse_consistency_mm" in tables.pairs) == (preset not in ("vm1", "vm2"))

    if mode in ("ncc", "amortised"):  # what else an inference may be given changes it no further
        files = ["inference.json", f"{preset}.yaml", *(["amortised.yaml"] if mode == "amortised" else [])]
        pair = {role: str(trained.val_dataset[0][role].meta["filename_or_obj"]) for role in ("moving", "fixed")}
        registered = tmp_path / "registered"
        workflow(files, "infer", **pair, weights=str(weights), output_dir=str(registered)).run()
        assert np.isfinite(json.loads((registered / "summary.json").read_text())["correlation_after"])


@pytest.mark.parametrize(
    ("overlays", "num_steps"),
    [
        (["ncc.yaml"], 4),
        (["bidirectional.yaml"], 4),
        (["both_orders.yaml"], 4),
        (["flip.yaml"], 4),
        (["augmentation.yaml", "semi_supervised.yaml"], 4),
        (["accumulation.yaml"], 1),
        (["probabilistic.yaml", "bidirectional.yaml", "both_orders.yaml", "flip.yaml", "accumulation.yaml"], 1),
    ],
    ids=str,
)
def test_modes_train_alone_and_together(
    bundle: Path, prepared: Path, tmp_path: Path, overlays: list[str], num_steps: int
) -> None:
    trained = train(prepared, tmp_path / "out", *overlays, pairs_per_epoch=4)
    output = trained.trainer.state.output
    assert np.isfinite(output[0]["loss"])
    assert len(output) == (2 if "both_orders.yaml" in overlays else 1)
    assert ("inverse_ddf" in output[0]["pred"]) == ("bidirectional.yaml" in overlays)
    assert (trained.train_dataset.augmentation is not None) == bool({"flip.yaml", "augmentation.yaml"} & set(overlays))
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert state["optimizer"]["state"][0]["step"] == num_steps
    names = {"both_orders": "prepare_batch", "accumulation": "accumulation_steps"}
    assert {key for name, key in names.items() if f"{name}.yaml" in overlays} <= set(state["settings"])


def test_another_augmentation_is_not_resumed(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    files = ["train.json", "flip.yaml"]
    options = {"dataset_dir": str(prepared), "output_dir": str(tmp_path / "out"), "num_labels": 4}
    options |= {"pairs_per_epoch": 2, "learning_rate": 1e-3, "max_epochs": 1}
    workflow(files, **options).run()
    _fails("settings {'augmentation': 'RandFlipd, sha256 ", files, **options, **{"augmentation#prob": 0.25})
    _fails("settings {'augmentation': 'RandFlipd, sha256 ", files, **options, augmentation=None)
    workflow(files, **options, **{"augmentation#prob": 0.5}).run()


def test_augmented_training_resumes_to_the_same_weights(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    workers = {"num_workers": 1, "train#dataloader#persistent_workers": True}
    runs = [("whole", 2, workers), ("cut", 1, {}), ("cut", 2, workers)]
    for output, max_epochs, options in runs:
        options |= {"learning_rate": 1e-3, "pairs_per_epoch": 2, "max_epochs": max_epochs}
        train(prepared, tmp_path / output, "augmentation.yaml", "vm1.yaml", **options)
    networks = [torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["network"] for n in ("whole", "cut")]
    assert all(torch.equal(tensor, networks[1][name]) for name, tensor in networks[0].items())


# Labels of each of LPBA40's regions as the registration papers group them; 181 and 182 (cerebellum, brain stem) are in
# the last one where they are measured.
REGIONS = [
    *(range(21, 35), range(41, 51), range(61, 69), range(81, 93), (121, 122), (165, 166)),
    (101, 102, 161, 162, 163, 164, 181, 182),
]


def _groups(folder: Path) -> list[list[str]]:
    """The structures of each group of an evaluation, found from their names and numbers, not from the groups' names."""
    names = list(dict.fromkeys(row["structure"] for row in csv.DictReader((folder / "structures.csv").open())))
    if "cerebrospinal fluid" in names:
        bare = [re.sub("^(left|right) ", "", name) for name in names]
        return [[name for name, key in zip(names, bare, strict=True) if key == group] for group in dict.fromkeys(bare)]
    config = ConfigParser.load_config_files([f"configs/{name}.yaml" for name in ("lpba40", "lpba40_56")])
    numbers = {**config["structures"], "cerebellum": [181], "brain stem": [182]}
    return [[name for name in names if numbers[name][0] in region] for region in REGIONS]


def _check_means(folder: Path, num_structures: int, num_groups: int) -> None:
    """Do both means by hand from the table of structures, and compare them with the summary."""
    pairs: dict[tuple[str, str], dict[str, float]] = {}
    with (folder / "structures.csv").open() as file:
        for row in csv.DictReader(file):
            if row["dice"]:
                pairs.setdefault((row["moving"], row["fixed"]), {})[row["structure"]] = float(row["dice"])
    summary = json.loads((folder / "summary.json").read_text())
    found = {row["over"]: row["mean"] for row in summary["measures"] if row["measure"] == "dice"}
    assert set(found) == ({"structures", "groups"} if num_groups else {"structures"})
    assert found["structures"] == pytest.approx(mean(mean(values.values()) for values in pairs.values()))
    if num_groups:
        groups = _groups(folder)
        assert (len(groups), sum(map(len, groups))) == (num_groups, num_structures)
        assert sorted(map(sorted, groups)) == sorted(map(sorted, summary["groups"].values()))
        merged = [
            mean(mean(values[name] for name in group if name in values) for group in groups if set(group) & set(values))
            for values in pairs.values()
        ]
        assert found["groups"] == pytest.approx(mean(merged))


@pytest.mark.filterwarnings(
    "ignore:(Mean of empty slice|All-NaN|Degrees of freedom):RuntimeWarning"
)  # of absent structures
@pytest.mark.parametrize(
    ("layout", "make", "overlays", "num_structures", "num_groups", "num_pairs"),
    [
        ("ixi", ixi, ["ixi.yaml", "vm1.yaml"], 30, 17, 3),
        ("oasis", oasis, ["oasis.yaml", "dense.yaml", "both_orders.yaml"], 35, 0, 2),
        ("learn2reg", learn2reg, ["oasis.yaml", "mse.yaml"], 35, 0, 2),
        ("lpba40", lpba40, ["lpba40.yaml", "lpba40_56.yaml", "lpba40_atlas.yaml", "semi_supervised.yaml"], 56, 7, 9),
        ("lpba40", lpba40, ["lpba40.yaml", "lpba40_atlas.yaml"], 54, 7, 9),
    ],
    ids=["ixi", "oasis", "learn2reg", "lpba40 56", "lpba40 54"],
)
def test_every_data_set_trains_and_is_evaluated(
    bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    layout: str,
    make: Callable[[Path], Path],
    overlays: list[str],
    num_structures: int,
    num_groups: int,
    num_pairs: int,
) -> None:
    write_datalist(layout, make(tmp_path / "published"), tmp_path / "data")
    trained = train(tmp_path / "data", tmp_path / "out", *overlays, num_labels="$len(@structures)")
    assert trained.evaluator.state.metric_details["val_mean_dice"].shape[1] == num_structures
    submit = ["learn2reg.yaml"] if "oasis.yaml" in overlays else []
    options = {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    section = "validation" if submit else "test"
    evaluated = workflow(["train.json", *overlays, "evaluate.json", *submit], section=section, **options)
    evaluated.run()
    assert evaluated.evaluator.state.metric_details["dice"].shape == (num_pairs, num_structures)
    _check_means(tmp_path / "out" / "evaluation", num_structures, num_groups)
    if layout == "ixi":  # labels at random, with a Dice of 1/4, are not aligned as those of the publication
        summary = json.loads((tmp_path / "out" / "evaluation" / "summary.json").read_text())
        affine = summary["settings"]["affine_dice"]
        before = {row["over"]: row["mean"] for row in summary["measures"] if row["measure"] == "dice_before"}
        assert {over: dice["measured"] for over, dice in affine.items()} == before
        assert {over: dice["published"] for over, dice in affine.items()} == {"groups": 0.386, "structures": 0.4061}
        assert "but 0.386 was published" in caplog.text
    if submit:
        fields = sorted((tmp_path / "out" / "submission" / "task_03").iterdir())
        first = 438 if layout == "oasis" else 395
        assert [path.name for path in fields] == [f"disp_{n:04d}_{n + 1:04d}.npz" for n in (first, first + 1)]
        assert read_submission(fields[0]).shape == (3, *SIZE)


def test_amortised_network_registers_with_any_smoothness(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    train(prepared, tmp_path / "out", "amortised.yaml", pairs_per_epoch=4)
    pair = {role: str(prepared / "images" / f"{n}.nii.gz") for role, n in (("moving", 6), ("fixed", 7))}
    fields = []
    for weight in (0.1, 0.9):
        options = {"weights": str(tmp_path / "out" / "model.pt"), "output_dir": str(tmp_path / f"registered{weight}")}
        files = ["inference.json", "amortised.yaml"]
        workflow(files, "infer", **pair, **options, smoothness_weight=weight).run()
        fields.append(nib.load(Path(options["output_dir"], "displacement.nii.gz")).get_fdata())
    assert not np.allclose(fields[0], fields[1])
    options = {"dataset_dir": str(prepared), "output_dir": str(tmp_path / "out"), "num_labels": 4}
    for files, weight in ((["ncc.yaml", "amortised.yaml"], 0.25), (["ncc.yaml"], None)):
        evaluated = workflow(["train.json", *files, "evaluate.json"], smoothness_weight=0.25, **options)
        assert evaluated.parser.get_parsed_content("save_evaluation").settings["smoothness_weight"] == weight


def test_fewer_scans_train(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    trained = train(prepared, tmp_path / "out", num_train_scans=2)
    assert len(trained.train_dataset) == 2  # pairs
    _fails("too few scans for training: 1", ["train.json"], dataset_dir=str(prepared), num_train_scans=1)


def test_probabilistic_recipe_trains(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    trained = train(prepared, tmp_path / "out", "probabilistic.yaml")
    assert np.isfinite(trained.trainer.state.output[0]["loss"])
    assert trained.trainer.loss_function.prior is not None


def test_structures_are_measured_one_by_one(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    table = ConfigParser.load_config_file(REGISTRATION / "configs" / "neuromorphometrics.yaml")["structures"]
    assert len(table) == 27
    overlay = bundle / "configs" / "mine.yaml"
    overlay.write_text("structures: {core: [2, 3, 4], rim: [1], absent: [9]}\n")
    trained = train(prepared, tmp_path / "out", "mine.yaml", num_labels="$len(@structures)")
    dice = trained.evaluator.state.metric_details["val_mean_dice"]
    assert dice.shape == (2, 3)
    assert dice[:, :2].isfinite().all()
    assert dice[:, 2].isnan().all()


def test_two_processes_learn_what_one_does_with_twice_the_batch(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    # Steps of plain gradient descent: Adam would turn rounding errors of gradients near 0 into steps of full size.
    (bundle / "configs" / "sgd.yaml").write_text(
        "optimizer: {_target_: torch.optim.SGD, params: $@network_def.parameters(), lr: '@learning_rate'}\n"
    )
    overlays = ["vm2.yaml", "mse.yaml", "sgd.yaml"]
    options = {"max_epochs": 1, "pairs_per_epoch": 4, "num_labels": 4, "amp": False, "learning_rate": 1.0}
    train(prepared, tmp_path / "one", *overlays, **options, batch_size=2)
    files = [f"configs/{name}" for name in ("train.json", *overlays, "multi_gpu_train.json")]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "monai.bundle", "run", "training", "--config_file", str(files)),
        *("--dataset_dir", str(prepared), "--output_dir", str(tmp_path / "two")),
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*"))) == 1  # of the main process
    torch.manual_seed(0)  # as the recipe does before it makes the network
    start = VoxelMorph("vm2").state_dict()
    one, two = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["network"] for n in ("one", "two"))
    assert two.keys() == start.keys()  # no "module." in front of the names
    for name, before in start.items():
        learned = float((one[name] - before).abs().max())
        assert learned > 0, name
        # means over 2 pairs and over 2 processes add up in different orders: float32, relative to what was learned and
        # to the weight, to which each step is added
        assert float((two[name] - one[name]).abs().max()) < 1e-3 * learned + 1e-6 * float(before.abs().max()), name


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_gets_losses_metrics_and_the_config(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", "configs/train.json"]
    command += ["--tracking", "mlflow", "--experiment_name", "mine", "--output_dir", f"$'{output}'"]
    command += ["--dataset_dir", str(prepared), "--num_labels", "4", "--max_epochs", "2", "--pairs_per_epoch", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    store = sqlite3.connect(output / "mlruns.db")
    assert store.execute("SELECT e.name, status FROM experiments e JOIN runs USING (experiment_id)").fetchall() == [
        ("mine", "FINISHED")
    ]
    tracked: dict[str, dict[int, float]] = {}
    for name, step, value in store.execute("SELECT key, step, value FROM metrics"):
        tracked.setdefault(name, {})[step] = value
    shown: dict[str, dict[int, float]] = {}  # by TensorBoard, which another handler writes
    for path in output.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path)).Reload()
        for name in events.Tags()["scalars"]:
            shown[name] = {event.step: event.value for event in events.Scalars(name)}
    assert list(tracked["train_loss"]) == [1, 2, 3, 4]
    for name in ("train_loss", "val_mean_dice", "val_dice_before", "val_folding_percent", "val_sdlogj"):
        assert tracked[name] == pytest.approx(shown[name])  # float32 in TensorBoard
    (config,) = output.glob("mlruns/*/artifacts/config_*.json")
    assert json.loads(config.read_text())["max_epochs"] == 2


@pytest.mark.filterwarnings("ignore:executing the bundle config")  # said to each client
def test_a_federated_client_trains_and_evaluates(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    """``MonaiAlgo`` is what NVIDIA FLARE calls on each site; the server sends weights and gets differences back."""
    options = {"dataset_dir": str(prepared), "output_dir": str(tmp_path / "out"), "num_labels": 4}
    client = MonaiAlgo(
        str(bundle),
        train_kwargs={**options, "pairs_per_epoch": 2, "learning_rate": 1e-3},
        eval_kwargs={**options, "evaluation_dir": str(tmp_path / "evaluation"), "overwrite": True},
    )
    client.initialize({ExtraItems.CLIENT_NAME: "site"})
    torch.manual_seed(1)
    server = {f"network.{name}": tensor for name, tensor in VoxelMorph().state_dict().items()}
    for epoch in (1, 2):
        client.train(ExchangeObject(weights=server))
        found = client.get_weights()
        assert client.trainer.state.epoch == epoch
        assert found.weight_type == WeightType.WEIGHT_DIFF
        assert found.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == 2
        differences = {name: torch.as_tensor(value) for name, value in found.weights.items()}
        assert all(value.abs().max() > 0 for value in differences.values())
        server = {name: tensor + differences[name] for name, tensor in server.items()}
        for name, tensor in client.trainer.network.state_dict().items():
            torch.testing.assert_close(
                server[name], tensor, rtol=0, atol=1e-6
            )  # float32 weights below 8, rounded twice
    metrics = client.evaluate(ExchangeObject(weights=server)).metrics
    assert 0 < metrics["dice"] <= 1
    assert len(load_evaluation(tmp_path).pairs) == 2
    client.finalize()
    assert not (tmp_path / "out" / "checkpoint.pt").exists()  # rounds are the server's


@pytest.fixture
def four_structures(bundle: Path) -> str:
    """Name of an overlay with a table of structures and a group of two of them."""
    overlay = bundle / "configs" / "mine.yaml"
    overlay.write_text("structures: {rim: [1], core: [2], left: [3], right: [4]}\ngroups: {nuclei: [left, right]}\n")
    return overlay.name


def test_structures_that_are_not_trained_on_are_measured(
    bundle: Path, prepared: Path, tmp_path: Path, four_structures: str
) -> None:
    (bundle / "configs" / "part.yaml").write_text("train_structures: [left, rim]\ndice_ramp: 2\n")
    overlays = [four_structures, "semi_supervised.yaml", "part.yaml"]
    trained = train(prepared, tmp_path / "out", *overlays, num_labels="$len(@structures)", max_epochs=2)
    assert set(trained.train_dataset[0]["moving_label"].unique().tolist()) == {0, 1, 3}
    assert trained.trainer.loss_function.dice_weight == 0.5 * 0.01
    assert trained.evaluator.state.metric_details["val_mean_dice"].isfinite().all()
    options = {"dataset_dir": str(prepared), "output_dir": str(tmp_path / "out"), "max_epochs": 3}
    unknown = {**options, "train_structures": ["lft"]}
    _fails("structures are ['rim', 'core'", ["train.json", *overlays], **unknown)
    changed = {**options, "dice_weight": 1.0}
    _fails("cannot be resumed from the checkpoint", ["train.json", *overlays], **changed)


def test_a_new_data_set_takes_a_few_lines(bundle: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    overlay = next(o for o in re.findall("```yaml\n(.*?)```", text, re.DOTALL) if o.startswith("structures"))
    assert 1 < overlay.count("\n") <= 10
    (bundle / "configs" / "mine.yaml").write_text(overlay)
    write_datalist("folder", images_and_labels(tmp_path / "scans"), tmp_path / "data")
    options = {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    train(tmp_path / "data", tmp_path / "out", "mine.yaml", num_labels="$len(@structures)")
    workflow(["train.json", "mine.yaml", "evaluate.json"], **options).run()
    dice = load_evaluation(tmp_path / "out").over("dice")
    assert list(dice) == ["left hippocampus", "cerebral cortex"]
    assert dice["left hippocampus"].isna().all()  # the scans of the test have no label 17
    assert ((dice["cerebral cortex"] > 0) & (dice["cerebral cortex"] < 1)).all()


@pytest.mark.usefixtures("one_thread")  # as in the two processes: exactly the same
def test_two_processes_measure_what_one_does(
    bundle: Path, prepared: Path, tmp_path: Path, four_structures: str
) -> None:
    # a scan of another section: 3 pairs, so that one process has more than the other
    atlas = {f"{kind}": str(prepared / f"{kind}s" / "4.nii.gz") for kind in ("image", "label")}
    options: dict[str, object] = {"section": "training", "atlas": atlas, "weights": "models/model.pt", "amp": False}
    options |= {"dataset_dir": str(prepared), "output_dir": str(tmp_path)}
    workflow(["train.json", four_structures, "evaluate.json"], **options, evaluation_dir=str(tmp_path / "1")).run()
    files = [f"configs/{name}" for name in ("train.json", four_structures, "multi_gpu_train.json", "evaluate.json")]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "monai.bundle", "run", "evaluating", "--config_file", str(files)),
        *("--evaluation_dir", str(tmp_path / "2")),
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_evaluation(tmp_path / processes) for processes in ("1", "2"))
    assert list(one.pairs.index) == [("4", "1"), ("4", "2"), ("4", "3")]
    assert list(one.over("dice", "groups")) == ["nuclei"]
    pd.testing.assert_frame_equal(two.structures, one.structures, check_exact=True)
    pd.testing.assert_frame_equal(
        two.pairs.drop(columns="seconds"), one.pairs.drop(columns="seconds"), check_exact=True
    )


def test_a_training_goes_on_with_its_own_architecture_alone(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    train(prepared, tmp_path)
    changed = {
        "dataset_dir": str(prepared),
        "output_dir": str(tmp_path),
        "num_labels": 4,
        "network_def#velocity_sigma": 0.5,
    }
    other = {key: str(VoxelMorph(velocity_sigma=sigma).architecture) for key, sigma in (("was", 1.5), ("now", 0.5))}
    message = f"settings {{'architecture': \"{other['was']}\"}}, now {{'architecture': \"{other['now']}\"}}"
    _fails(message, ["train.json"], **changed, learning_rate=1e-3, pairs_per_epoch=2, max_epochs=2)


def test_a_second_evaluation_is_refused_before_the_work(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": str(prepared), "output_dir": str(tmp_path), "num_labels": 4, "weights": "models/model.pt"}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "pairs.csv").write_text("mine")
    _fails("already exists", ["train.json", "evaluate.json"], **options)
    assert (tmp_path / "evaluation" / "pairs.csv").read_text() == "mine"
    options |= {"overwrite": True, "weights": "vm2.pt", "label_mode": "linear"}
    done = workflow(["train.json", "vm2.yaml", "evaluate.json"], **options)
    torch.save(VoxelMorph("vm2").state_dict(), "vm2.pt")
    done.run()
    assert "inverse_consistency_mm" not in load_evaluation(tmp_path).pairs  # vm2 has no inverse
    assert done.parser.get_parsed_content("validate#postprocessing").transforms[-1].mode == "linear"
    settings = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["settings"]
    assert (settings["preset"], settings["label_mode"]) == ("vm2", "linear")
    assert settings["architecture"] == str(VoxelMorph("vm2").architecture)


def _fails(match: str, files: Sequence[str], kind: str = "train", **options: object) -> None:
    with pytest.raises(Exception) as failure:  # noqa: PT011, MONAI wraps what a config raises; the cause is checked
        workflow(files, kind, **options).run()
    causes, error = [], failure.value
    while error is not None:
        causes.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    assert any(match in cause for cause in causes), causes


def test_wrong_input_to_training_is_met_before_the_work(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    def scans(**changes: object) -> dict[str, object]:
        data = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        shutil.copytree(prepared, data)
        datalist = json.loads((data / "datalist.json").read_text())
        (data / "datalist.json").write_text(json.dumps({**datalist, **changes}))
        return {"dataset_dir": str(data), "output_dir": str(tmp_path / "out"), "num_labels": 4}

    def broken(array: np.ndarray) -> dict[str, object]:
        options = scans()
        path = Path(str(options["dataset_dir"])) / "images" / "1.nii.gz"
        nib.save(nib.Nifti1Image(array, nib.load(path).affine), path)
        return options

    image = nib.load(prepared / "images" / "1.nii.gz").get_fdata(dtype=np.float32)
    nan = image.copy()
    nan[3, 4, 5] = np.nan
    _fails(f"dataset_dir {tmp_path / 'nowhere'} has no", ["train.json"], dataset_dir=str(tmp_path / "nowhere"))
    _fails("too few scans for training: 0", ["train.json"], **scans(training=[]))
    _fails("does not exist", ["train.json"], **scans(training=[{"image": "a.nii.gz"}, {"image": "b.nii.gz"}]))
    _fails(
        "has no 'label'. Each scan for validation",
        ["train.json"],
        **scans(validation=[{"image": f"images/{n}.nii.gz"} for n in (4, 5)]),
    )
    _fails("is not one 3-D volume", ["train.json"], **broken(np.stack([image, image], axis=-1)))
    _fails(" voxels of NaN or infinity", ["train.json"], **broken(nan))
    _fails("is constant: every voxel is 0", ["train.json"], **broken(np.zeros_like(image)))
    _fails("Resample them to one grid", ["train.json"], **broken(image[:-2]))
    _fails("preset 'vm3' is unknown", ["train.json"], **scans(), preset="vm3")
    _fails("holds the label 4, but num_labels is 2", ["train.json"], **{**scans(), "num_labels": 2})
    for wrong in (-1, 0, 2.5, "many", True):
        _fails(f"num_labels is {wrong}. Give a whole number", ["train.json"], **{**scans(), "num_labels": wrong})
    both = {"structures": {"rim": [1], "core": [2, 3]}, "num_labels": 4}
    for files in (["train.json"], ["train.json", "evaluate.json"]):
        _fails("num_labels is 4, but structures lists 2.", files, **{**scans(), **both})
    twice = [{"image": "images/1.nii.gz"}, {"image": "./images/1.nii.gz"}]
    _fails("more than once", ["train.json"], **scans(training=twice))
    assert not list((tmp_path / "out").glob("*.pt"))


def test_what_differs_from_the_checkpoint_is_refused(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    train(prepared, tmp_path / "out", "ncc.yaml")
    options = {"dataset_dir": str(prepared), "output_dir": str(tmp_path / "out"), "num_labels": 4, "max_epochs": 2}
    options |= {"pairs_per_epoch": 2, "learning_rate": 1e-3}  # all as they were
    differs = "different settings {'"
    _fails(f"{differs}loss': ", ["train.json", "mse.yaml"], **options)
    _fails(f"{differs}preset': 'wide', ", ["train.json", "vm2.yaml"], **options)
    _fails("LNCCLoss(window=5)", ["train.json"], **options, **{"loss#similarity#window": 5})
    _fails("smoothness_weight=0.5, ", ["train.json"], **options, smoothness_weight=0.5)
    _fails(f"{differs}train_scans': '3 listed, ", ["train.json"], **options, num_train_scans=2)
    _fails(f"{differs}num_labels': 4}}, now ", ["train.json"], **{**options, "num_labels": 5})
    _fails(f"{differs}label_mode': 'nearest'}}, now ", ["train.json"], **options, label_mode="linear")
    atlas = {key: str(prepared / f"{key}s" / "1.nii.gz") for key in ("image", "label")}
    _fails(f"{differs}atlas': None, 'atlas_role': None}}, now ", ["train.json"], **options, atlas=atlas)
    _fails("different settings {}, now {'prepare_batch': 'both orders'}", ["train.json", "both_orders.yaml"], **options)
    for name, kind in (("flip", "RandFlipd"), ("augmentation", "Compose")):
        augmented = f"{differs}augmentation': None}}, now {{'augmentation': '{kind}, sha256 "
        _fails(augmented, ["train.json", f"{name}.yaml"], **options)
    _fails(f"{differs}optimizer': ", ["train.json"], **options, **{"optimizer#weight_decay": 0.1})
    _fails(f"{differs}lr_scheduler': ", ["train.json"], **options, **{"lr_scheduler#factor": 0.5})
    torch.save(VoxelMorph().state_dict(), "other.pt")
    _fails(
        f"{differs}pretrained': None}}, now {{'pretrained': 'sha256 ", ["train.json"], **options, pretrained="other.pt"
    )
    table = {**options, "structures": {"rim": [1]}, "num_labels": 1}
    _fails(f"{differs}structures': 'None', 'num_labels': 4}}, now ", ["train.json"], **table)


def test_the_last_epoch_is_validated(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    epochs = []

    def validated(evaluator: Engine) -> None:
        epochs.append(evaluator.state.epoch)

    for max_epochs, interval in ((3, 2), (4, 2), (1, 5)):
        options = {"max_epochs": max_epochs, "val_interval": interval, "pairs_per_epoch": 1, "num_labels": 4}
        output = tmp_path / f"{max_epochs}"
        training = workflow(["train.json"], dataset_dir=str(prepared), output_dir=str(output), **options)
        training.evaluator.add_event_handler(Events.EPOCH_COMPLETED, validated)
        training.run()
        training.finalize()
        assert (output / "model.pt").is_file()
        epochs.append(0)
    assert epochs == [2, 3, 0, 2, 4, 0, 1, 0]


def test_a_training_does_not_go_on_with_another_fold(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    datalist = json.loads((prepared / "datalist.json").read_text())
    train(prepared, tmp_path / "out")
    scans = [*datalist["training"], *datalist["validation"]]
    fold = tmp_path / "fold"
    shutil.copytree(prepared, fold)
    (fold / "datalist.json").write_text(json.dumps({"training": scans[2:], "validation": scans[:2]}))
    options = {"dataset_dir": str(fold), "output_dir": str(tmp_path / "out"), "num_labels": 4, "max_epochs": 2}
    options |= {"pairs_per_epoch": 2, "learning_rate": 1e-3}  # as they were
    _fails("cannot be resumed from the checkpoint", ["train.json"], **options)
    (fold / "datalist.json").write_text(json.dumps({**datalist, "validation": scans[:2]}))
    _fails("different settings {'val_scans': '2 listed, sha256 ", ["train.json"], **options)


def test_a_training_goes_on_with_its_data_in_another_place(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(prepared, moved)
    for place, max_epochs in ((prepared, 1), (moved, 2)):
        atlas = {key: str(place / f"{key}s" / "1.nii.gz") for key in ("image", "label")}
        trained = train(place, tmp_path / "out", max_epochs=max_epochs, atlas=atlas, atlas_role="fixed")
    assert trained.trainer.state.iteration == 4


def test_wrong_input_to_inference_is_met_before_the_work(bundle: Path, prepared: Path, tmp_path: Path) -> None:
    good = str(prepared / "images" / "6.nii.gz")
    other = str(tmp_path / "other.nii.gz")
    save_image(other, nib.load(good).get_fdata(dtype=np.float32)[:-1], nib.load(good).affine)
    output = {"output_dir": str(tmp_path / "out")}
    _fails("does not exist", ["inference.json"], "infer", moving="nowhere.nii.gz", fixed=good, **output)
    _fails("Resample them to one grid", ["inference.json"], "infer", moving=other, fixed=good, **output)
    _fails("preset 'vm3' is unknown", ["inference.json"], "infer", moving=good, fixed=good, preset="vm3", **output)
    _fails(
        "weights nowhere.pt do not exist",
        ["inference.json"],
        "infer",
        moving=good,
        fixed=good,
        weights="nowhere.pt",
        **output,
    )
    _fails("do not fit the network", ["inference.json"], "infer", moving=good, fixed=good, preset="vm2", **output)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")
    _fails("already holds", ["inference.json"], "infer", moving=good, fixed=good, **output)
