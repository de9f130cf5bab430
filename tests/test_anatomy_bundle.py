"""The bundle brain_anatomy_segmentation: it trains on label maps, is evaluated, and segments a scan."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from scipy.spatial.transform import Rotation

from tests.workflows import QUIET, copied, workflow
from voxelmorph_monai.affines import ImageGrid
from voxelmorph_monai.anatomy import STRUCTURES, AnatomyNet, colour_table, load_anatomy, segment
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.space.resampling import resample, resample_intensities
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import sample_scan

BUNDLE = Path(__file__).parents[1] / "bundles" / "brain_anatomy_segmentation"

pytestmark = [pytest.mark.usefixtures("one_thread"), *QUIET]


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Path]:
    """A copy of the bundle with random weights, as the working directory."""
    with copied(BUNDLE, AnatomyNet, tmp_path) as copy:
        yield copy


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Three label maps in which each structure has a block of its own."""
    folder, random = tmp_path / "maps", np.random.default_rng(0)
    folder.mkdir()
    numbers = [0, 511, *(structure.number for structure in STRUCTURES)]
    for name in "abc":
        blocks = np.zeros((4, 4, 4), np.int16)
        blocks.flat[: len(numbers)] = random.permutation(numbers)
        blocks = blocks.repeat(16, 0).repeat(16, 1).repeat(16, 2)
        save_image(folder / f"{name}.nii.gz", blocks, np.diag([-1.0, 1, 1, 1]))
    return folder


def train(maps: Path, output: Path, *overlays: str, **options: object) -> ConfigWorkflow:
    small = {"size": [32, 24, 16], "repeats": 1, "num_val_maps": 1, "max_epochs": 2}
    found = workflow(["train.json", *overlays], dataset_dir=str(maps), output_dir=str(output), **{**small, **options})
    found.run()
    return found


def test_a_training_stopped_and_resumed_ends_with_the_same_weights(bundle: Path, maps: Path, tmp_path: Path) -> None:
    train(maps, tmp_path / "whole")
    whole = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    stopped = workflow(
        ["train.json"], dataset_dir=str(maps), output_dir=str(tmp_path / "cut"), size=[32, 24, 16], repeats=1,
        num_val_maps=1, max_epochs=2,
    )  # fmt: skip
    stopped.trainer.add_event_handler("EPOCH_COMPLETED", lambda engine: engine.terminate())
    stopped.run()
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["epoch"] == 1
    train(maps, tmp_path / "cut")
    cut = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    for part in ("network", "average"):
        assert all(torch.equal(value, cut[part][name]) for name, value in whole[part].items())
    assert not torch.equal(whole["network"]["fine.head.weight"], whole["average"]["fine.head.weight"])
    with pytest.raises(Exception, match="trainer") as failure:  # MONAI wraps what a config raises
        train(maps, tmp_path / "cut", **{"synthesis#noise": 0.3})
    assert "settings {'synthesis'" in str(failure.value.__cause__)


def test_the_looks_are_trained_one_after_the_other(bundle: Path, maps: Path, tmp_path: Path) -> None:
    start = torch.load("models/model.pt", weights_only=True)
    first = str(tmp_path / "fine" / "model.pt")
    train(maps, tmp_path / "fine", pretrained="models/model.pt")
    train(maps, tmp_path / "both", "coarse.yaml", pretrained=first, size=[16, 16, 16])
    fine, both = (torch.load(path, weights_only=True) for path in (first, tmp_path / "both" / "model.pt"))
    for name, value in start.items():
        changed = (fine if name.startswith("fine") else both)[name]
        if value.ndim == 5:  # of a convolution
            assert not torch.allclose(changed, value), name
        kept, expected = (both, fine) if name.startswith("fine") else (fine, start)
        torch.testing.assert_close(kept[name], expected[name], msg=name)  # a mean of many equal weights is rounded


def test_the_tables_agree() -> None:
    config = ConfigParser.load_config_file(BUNDLE / "configs" / "train.json")
    assert list(config["structures"]) == [structure.name for structure in STRUCTURES]
    assert [numbers[0] for numbers in config["structures"].values()] == [s.number for s in STRUCTURES]
    evaluate = ConfigParser.load_config_file(BUNDLE / "configs" / "evaluate.json")
    assert evaluate["structures"] == config["structures"]
    coarse = ConfigParser.load_config_file(BUNDLE / "configs" / "coarse.yaml")["structures"]
    for number, labels in enumerate(coarse.values(), start=1):
        inside = [label for s in STRUCTURES if s.part == number for label in config["structures"][s.name]]
        assert sorted(labels) == sorted(inside)
    rows = list(csv.DictReader((BUNDLE / "docs" / "labels.csv").open()))
    assert [(row["name"], int(row["number"])) for row in rows] == [(s.name, s.number) for s in STRUCTURES]
    assert (BUNDLE / "docs" / "colours.txt").read_text() == colour_table()
    metadata = ConfigParser.load_config_file(BUNDLE / "configs" / "metadata.json")
    classes = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert list(classes.values())[1:] == [row["name"] for row in rows]


def test_overlays_change_what_exists() -> None:
    for base, name, new in (
        ("train.json", "coarse.yaml", {"synthesis"}),
        ("inference.json", "evaluate.json", {"section", "structures", "scans", "evaluator#key_val_metric"}),
    ):
        config = ConfigParser(ConfigParser.load_config_file(BUNDLE / "configs" / base))
        for key in ConfigParser.load_config_file(BUNDLE / "configs" / name):
            if key not in new:
                config[key.lstrip("+")]  # a KeyError names the typo


@pytest.mark.parametrize(
    ("files", "kind"), [(["train.json"], "train"), (["inference.json"], "infer")], ids=["train", "inference"]
)
def test_properties_are_what_monai_expects(bundle: Path, maps: Path, files: list[str], kind: str) -> None:
    options = {"dataset_dir": str(maps), "num_val_maps": 1} if kind == "train" else {}
    assert workflow(files, kind, **options).check_properties() == []


def brain_of_blocks(path: Path) -> None:
    """A bright box of 1.2 l in the dark, which random weights may take for anything."""
    image = np.zeros((60, 70, 50), np.int16)
    image[10:50, 10:60, 10:40] = 200 + np.random.default_rng(0).integers(0, 50, (40, 50, 30))
    save_image(path, image, np.array([[-2.5, 0, 0, 70], [0, 2.4, 0.6, -90], [0, -0.6, 2.4, -20], [0, 0, 0, 1.0]]))


@pytest.fixture
def trained(bundle: Path) -> Path:
    """Weights by which all that is bright is of the first class, in both looks."""
    network = AnatomyNet()
    for look in (network.coarse, network.fine):
        for parameter in look.parameters():
            torch.nn.init.zeros_(parameter)
        # the top block passes the first voxel of its block on: enc -> skip -> dec -> head
        with torch.no_grad():
            look.encoder[0].first.weight[0, :, 1, 1, 1] = 1 / 8
            look.encoder[0].second.weight[0, 0, 1, 1, 1] = 1.0
            look.encoder[0].norm.weight[:] = 1.0
            width = look.encoder[1].norm.num_channels
            look.decoder[-1].first.weight[0, width, 1, 1, 1] = 1.0
            look.decoder[-1].second.weight[0, 0, 1, 1, 1] = 1.0
            look.decoder[-1].norm.weight[:] = 1.0
            look.head.weight[8:16, 0] = 5.0
            look.head.bias[:8] = 4.0  # else background
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    return bundle / "models" / "model.pt"


def test_a_scan_is_segmented_on_its_own_grid(bundle: Path, trained: Path, tmp_path: Path) -> None:
    brain_of_blocks(tmp_path / "scan.nii.gz")
    run = workflow(["inference.json"], "infer", image=str(tmp_path / "scan.nii.gz"), output_dir=str(tmp_path / "out"))
    run.run()
    scan, labels = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "out" / "labels.nii.gz")
    assert labels.shape == scan.shape
    np.testing.assert_array_equal(labels.affine, scan.affine)
    found, true = labels.get_fdata(), scan.get_fdata() > 0
    assert set(np.unique(found)) <= {0, 2, 24}
    assert 2 * ((found > 0) & true).sum() / ((found > 0).sum() + true.sum()) > 0.9
    mask = nib.load(tmp_path / "out" / "brain_mask.nii.gz")
    np.testing.assert_array_equal(mask.get_fdata(), found > 0)
    rows = {row["structure"]: float(row["volume_mm3"]) for row in csv.DictReader((tmp_path / "out/volumes.csv").open())}
    assert list(rows) == [structure.name for structure in STRUCTURES]
    voxel = abs(np.linalg.det(scan.affine[:3, :3]))
    assert sum(rows.values()) == pytest.approx((found > 0).sum() * voxel, rel=0.05)
    assert (tmp_path / "out" / "colours.txt").read_text() == colour_table()
    with pytest.raises(Exception, match="check") as failure:  # MONAI wraps what a config raises
        run.run()
    assert "FileExistsError" in repr(failure.value) + repr(failure.value.__cause__)


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")  # of absent structures
def test_labelled_scans_are_evaluated(bundle: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    brain_of_blocks(folder / "scan.nii.gz")
    image = nib.load(folder / "scan.nii.gz")
    save_image(folder / "labels.nii.gz", np.where(image.get_fdata() > 0, 2, 0).astype(np.int16), image.affine)
    (folder / "datalist.json").write_text(json.dumps({"test": [{"image": "scan.nii.gz", "label": "labels.nii.gz"}]}))
    run = workflow(
        ["inference.json", "evaluate.json"], "infer", dataset_dir=str(folder), output_dir=str(tmp_path / "evaluation")
    )
    run.run()
    assert run.evaluator.state.metrics["dice"] > 0.8
    details = run.evaluator.state.metric_details["dice"]
    assert details.shape == (1, 30)
    assert details[:, 1:].isnan().all()  # no such structure
    assert list((tmp_path / "evaluation").glob("*.csv"))


@pytest.fixture(scope="module")
def shipped() -> AnatomyNet:
    return load_anatomy(BUNDLE / "models" / "model.pt")


def overlap(first: Scan, second: Scan) -> tuple[float, float]:
    """Dice of the masks, and mean Dice of the structures that both have."""

    def dice(one: np.ndarray, two: np.ndarray) -> float:
        return float(2 * (one & two).sum() / (one.sum() + two.sum()))

    numbers = [
        s.number for s in STRUCTURES[:-1] if (first.array == s.number).any() and (second.array == s.number).any()
    ]
    each = [dice(first.array == n, second.array == n) for n in numbers]
    return dice(first.array > 0, second.array > 0), float(np.mean(each))


def test_the_shipped_weights_find_a_brain_and_its_parts_whatever_its_grid(shipped: AnatomyNet) -> None:
    brain = Scan.read(sample_scan("colin27"))
    found = segment(brain, shipped)
    mask = found.mask.array > 0
    assert 2 * (mask & (brain.array > 0)).sum() / (mask.sum() + (brain.array > 0).sum()) > 0.91  # .928 found
    for structure in STRUCTURES[:-1]:
        where = np.argwhere(found.labels.array == structure.number)
        assert len(where), structure.name
        x = nib.affines.apply_affine(brain.affine, where.mean(0))[0]
        if structure.name.startswith(("Left", "Right")):
            assert (x < 0) == structure.name.startswith("Left"), structure.name
    # the same brain, turned, in slices of 4 mm and with other intensities
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [8, -10, 15], degrees=True).as_matrix() * [-0.9, 0.9, 4.0]
    size = (190, 230, 48)
    middle = brain.affine @ [*((np.array(brain.shape) - 1) / 2), 1]
    affine[:3, 3] = middle[:3] - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    grid = ImageGrid(size, affine)
    other = resample_intensities(brain, grid, np.eye(4))
    other = other.like(np.where(other.array > 0, other.array.max() * 1.1 - other.array, 0).astype(np.float32))
    mask_dice, structures = overlap(segment(other, shipped).labels, resample(found.labels, grid, np.eye(4), order=0))
    assert mask_dice > 0.9
    assert structures > 0.5
