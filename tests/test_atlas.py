"""Segmentation by atlases: votes, weights, scans brought to the grid and labels back, bundles of labelled scans."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import small_brain
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai import atlas_transforms as atlas
from voxelmorph_monai.apps import atlas_bundle
from voxelmorph_monai.apps.atlas_bundle import make_atlas_bundle
from voxelmorph_monai.atlas import AtlasInferer, AtlasSegmentation, joint_weights
from voxelmorph_monai.atlas_transforms import LoadAlignedScand, RestoreLabelsd, SaveSegmentationd
from voxelmorph_monai.blocks import warp
from voxelmorph_monai.cli import main
from voxelmorph_monai.io.images import read_labels, save_image
from voxelmorph_monai.report import overlap
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import WorkingGrid, sample_scan

SHIPPED = Path(__file__).parents[1] / "bundles" / "brain_t1_atlas_segmentation"
SIZE = (32, 48, 40)
GRID = WorkingGrid((54, 60, 70), 3.0)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # printed for every config that is parsed; what it asks is said in the README
    pytest.mark.filterwarnings("ignore:parsing config_file.*"),
]


def network(num_atlases: int = 1, **options: Any) -> AtlasSegmentation:
    """Atlases of random images and labels that fill the grid, registered by a network of random weights."""
    torch.manual_seed(0)
    found = AtlasSegmentation(4, num_atlases, size=SIZE, **options).eval()
    torch.nn.init.normal_(found.network.flow.weight, std=0.05)  # displacements of some voxels
    found.images.random_(0, 256)
    found.labels.random_(0, 5)
    return found


def still(number: int, *shift: float) -> list[Tensor]:
    """The same displacement everywhere, of each of ``number`` atlases."""
    return [torch.tensor(shift or (0.0, 0.0, 0.0)).view(1, 3, 1, 1, 1).expand(1, 3, *SIZE).contiguous()] * number


def one_hot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels[:, 0].long(), 5).movedim(-1, 1).float()


@pytest.mark.parametrize("size", [(12, 17), (9, 11, 13)])
def test_joint_weights_solve_the_equations_of_each_window(size: tuple[int, ...]) -> None:
    differences = torch.rand(2, 4, *size, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4]).view(-1, *[1] * len(size))
    weights = joint_weights(differences, 5)
    assert weights.shape == differences.shape
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    at = tuple(n // 2 for n in size)
    window = differences[(1, slice(None), *(slice(i - 2, i + 3) for i in at))].flatten(1).numpy()
    matrix = (window @ window.T / window.shape[1]) ** 2
    matrix += (0.1 * np.trace(matrix) / 4 + 1e-8) * np.eye(4)
    expected = np.maximum(np.linalg.solve(matrix, np.ones(4)), 0)
    np.testing.assert_allclose(weights[(1, slice(None), *at)], expected / expected.sum(), rtol=1e-9)


@pytest.mark.parametrize("window", [-1, 0, 4])
def test_joint_weights_refuse_windows_without_a_middle(window: int) -> None:
    with pytest.raises(ValueError, match=rf"^window is {window} voxels\. .* odd"):
        joint_weights(torch.zeros(1, 2, 5, 6), window)


def test_joint_weights_of_known_errors() -> None:
    def weights(*differences: float) -> list[float]:
        return joint_weights(torch.tensor(differences).view(1, -1, 1, 1, 1).expand(1, -1, 7, 7, 7), 3)[
            0, :, 3, 3, 3
        ].tolist()

    assert weights(0, 0, 0, 0) == pytest.approx([0.25] * 4)
    assert weights(0.3, 0.3) == pytest.approx([0.5, 0.5])
    # M = ((a^4, a^2 b^2), (a^2 b^2, b^4)), c = (a^4 + b^4) / 20: the weights are as b^4 + c - a^2 b^2 to a^4 + c - ...
    a, b = 0.4, 0.5
    c, mixed = (a**4 + b**4) / 20 + 1e-8, a**2 * b**2
    first, second = b**4 + c - mixed, a**4 + c - mixed
    assert second < 0  # it errs where the first one does, and more
    assert weights(a, b) == pytest.approx([1.0, 0.0])
    b = 0.42
    c, mixed = (a**4 + b**4) / 20 + 1e-8, a**2 * b**2
    first, second = b**4 + c - mixed, a**4 + c - mixed
    assert weights(a, b) == pytest.approx([first / (first + second), second / (first + second)], abs=1e-4)  # float32


def test_atlases_that_err_together_share_their_vote() -> None:
    error = torch.zeros(1, 3, 9, 9, 9)
    error[:, :2, ..., ::3], error[:, 2, ..., 1::3] = (
        0.5,
        0.5,
    )  # the first two err in the same planes, the third elsewhere
    weights = joint_weights(error, 3)[0, :, 4, 4, 4]
    # In units of their mean square, M = ((1.1, 1, 0), (1, 1.1, 0), (0, 0, 1.1)).
    expected = torch.tensor([1 / 2.1, 1 / 2.1, 1 / 1.1])
    torch.testing.assert_close(weights, expected / expected.sum(), rtol=0, atol=1e-5)  # 1e-8 on the diagonal


def test_votes_are_the_linearly_warped_one_hot_labels() -> None:
    segmentation, image = network(), torch.rand(2, 1, *SIZE)
    with torch.no_grad():
        ddf = segmentation.displacement(image, 0)
        assert float(ddf.abs().max()) > 2
        expected = warp(one_hot(segmentation.labels_of(0)).expand(2, -1, -1, -1, -1), ddf)
        # float32: shares of eight corners, in another order
        torch.testing.assert_close(segmentation(image), expected, rtol=0, atol=1e-5)


def test_a_shift_by_whole_voxels_moves_the_labels_and_half_a_voxel_divides_the_vote() -> None:
    segmentation = network()
    labels = segmentation.labels_of(0)
    votes = segmentation.vote(torch.zeros(1, 1, *SIZE), still(1, 1.0, -2.0, 3.0))
    assert torch.equal(votes[..., :-1, 2:, :-3], one_hot(labels)[..., 1:, :-2, 3:])
    votes = segmentation.vote(torch.zeros(1, 1, *SIZE), still(1, 0.0, 0.5, 0.0))
    between = (one_hot(labels)[..., :-1, :] + one_hot(labels)[..., 1:, :]) / 2
    assert torch.equal(votes[..., :-1, :], between)


def test_equal_votes_are_those_of_itk() -> None:
    segmentation = network(3)
    labels = [segmentation.labels_of(number)[0, 0].numpy() for number in range(3)]
    segmentation.images[:] = 100  # nothing speaks for one of them
    votes = segmentation.vote(torch.rand(1, 1, *SIZE), still(3))
    torch.testing.assert_close(votes.sum(1), torch.ones(1, *SIZE), rtol=0, atol=1e-6)  # rounding of thirds
    undecided = 9
    majority = sitk.GetArrayFromImage(sitk.LabelVoting([sitk.GetImageFromArray(x) for x in labels], undecided))
    decided = majority != undecided
    assert 0.3 < decided.mean() < 0.7  # of random labels
    np.testing.assert_array_equal(votes[0].argmax(0).numpy()[decided], majority[decided])


def test_an_atlas_counts_as_much_as_it_looks_like_the_scan() -> None:
    segmentation = network(2)
    image = segmentation.image_of(0).clone()
    image[..., :20] = segmentation.image_of(1)[..., :20]
    weights = segmentation.weights(image, still(2))
    torch.testing.assert_close(weights.sum(1), torch.ones(1, *SIZE), rtol=0, atol=1e-6)  # rounding
    # Half a window off the seam one errs nowhere, the other by m: M is diag(0, m) and a tenth of its mean,
    # diag(1, 21) m / 20. 1e-4 for the 1e-8 on the diagonal.
    for best, part in ((1, weights[..., :18]), (0, weights[..., 22:])):
        torch.testing.assert_close(part[0, best], torch.full_like(part[0, best], 21 / 22), rtol=0, atol=1e-4)


def test_atlases_lie_in_the_grid_where_their_box_starts() -> None:
    segmentation = network(2, start=(3, 0, 5), box=(20, 48, 30))
    labels = torch.zeros(1, 1, *SIZE, dtype=torch.uint8)
    labels[..., 3:23, :, 5:35] = segmentation.labels[1:]
    assert torch.equal(segmentation.labels_of(1), labels)
    assert torch.equal(segmentation.image_of(1)[..., 3:23, :, 5:35], segmentation.images[1:] / 255)


def test_a_script_gives_what_the_network_gives() -> None:
    segmentation = network(2, start=(3, 0, 5), box=(20, 48, 30))
    image = torch.rand(1, 1, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(segmentation)(image), segmentation(image))


def test_refinement_brings_an_atlas_closer() -> None:
    segmentation = network()
    torch.nn.init.zeros_(segmentation.network.flow.weight)
    ball = [
        torch.linalg.vector_norm(
            torch.stack(torch.meshgrid(*map(torch.arange, SIZE), indexing="ij")).float()
            - torch.tensor([16.0, at, 20.0]).view(3, 1, 1, 1),
            dim=0,
        )
        < 9
        for at in (22.0, 26.0)
    ]
    segmentation.images[0, 0], segmentation.labels[0, 0] = 200 * ball[0], ball[0]
    image = torch.nn.functional.avg_pool3d(ball[1][None, None].float(), 3, 1, 1)
    truth = ball[1].numpy().astype(int)
    scores = []
    for budget in (0, "600"):  # text, as from a client; it ends when nothing improves
        found = AtlasInferer(budget)(MetaTensor(image), segmentation)
        scores.append(overlap({"": found[0].argmax(0).numpy()}, truth)[""]["1"])
    assert scores[0] < 0.75
    assert scores[1] > 0.9  # the map is smooth to 1 mm, so that not every voxel of the rim is reached


def test_wrong_options_and_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^num_labels is 256\b.* 1 to 255"):
        AtlasSegmentation(256)
    with pytest.raises(ValueError, match=r"^num_atlases is 0\b"):
        AtlasSegmentation(1, num_atlases=0)
    with pytest.raises(ValueError, match=r"box of \[20, 48, 38\] .*from \[3, 0, 5\] .* grid of \[32, 48, 40\]"):
        network(start=(3, 0, 5), box=(20, 48, 38))
    with pytest.raises(ValueError, match=r"^window is 4\b.*odd"):
        network(window=4)
    with pytest.raises(ValueError, match=r"^image has shape \[1, 1, 32, 48, 39\].*\[32, 48, 40\]"):
        network()(torch.rand(1, 1, 32, 48, 39))
    with pytest.raises(ValueError, match=r"^budget is 'a while'"):
        AtlasInferer("a while")
    with pytest.raises(ValueError, match=r"^budget is -1\."):
        AtlasInferer(-1)
    with pytest.raises(TypeError, match=r"^the network is a Identity\b"):
        AtlasInferer(1)(torch.rand(1, 1, *SIZE), torch.nn.Identity())


def scan_of(affine: NDArray[Any], original: NDArray[Any], shape: tuple[int, ...]) -> MetaTensor:
    meta = {"original_affine": original, "spatial_shape": np.array(shape)}
    return MetaTensor(torch.zeros(1, *SIZE), affine=torch.as_tensor(affine), meta=meta)


def test_labels_are_restored_on_whatever_axes_the_scan_has() -> None:
    votes = one_hot(network().labels_of(0))[0]
    affine = np.array([[0.0, -2, 0, 10], [3, 0, 0, -7], [0, 0, 1, 4], [0, 0, 0, 1]])
    # The scan's first axis is the grid's last one, backwards, without its first two voxels.
    to_grid = np.array([[0.0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 39], [0, 0, 0, 1]])
    shape = (38, 48, 32)
    found = RestoreLabelsd()({"image": scan_of(affine, affine @ to_grid, shape), "pred": votes})
    expected = votes.argmax(0).permute(2, 1, 0).flip(0)[:38]
    assert found["pred"].dtype == torch.uint8
    np.testing.assert_array_equal(found["pred"][0], expected)
    torch.testing.assert_close(found["pred"].affine, torch.as_tensor(affine @ to_grid))
    # one-hot votes, sampled at voxels but for the rounding of float32 coordinates
    np.testing.assert_allclose(found["probability"][0], 1, atol=1e-4)


def test_restored_labels_are_the_most_probable_ones_and_background_beyond_the_grid() -> None:
    votes = torch.zeros(2, *SIZE)
    votes[0, :16], votes[1, 16:] = 1, 1
    eye = np.eye(4)
    between = eye.copy()
    between[0, 3] = 0.25  # scan voxel i lies at i + 0.25: voxel 15 takes a quarter of the label, 3/4 of background
    found = RestoreLabelsd()({"image": scan_of(eye, between, (40, 48, 40)), "pred": votes})
    labels, probability = found["pred"][0, :, 3, 4].tolist(), found["probability"][0, :, 3, 4]
    assert labels == [0] * 16 + [1] * 16 + [0] * 8
    # the last voxel lies at 31.25, of which a quarter is beyond the grid
    expected = torch.tensor([1.0] * 15 + [0.75] + [1.0] * 15 + [0.75] + [1.0] * 8)
    torch.testing.assert_close(probability, expected, rtol=0, atol=1e-4)  # float32 coordinates


def test_a_refusal_reaches_the_client_of_monai_label(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class HTTPException(Exception):
        pass

    with pytest.raises(FileNotFoundError, match="does not exist"):
        LoadAlignedScand("image")({"image": str(tmp_path / "a.nii.gz")})
    monkeypatch.setitem(sys.modules, "fastapi", SimpleNamespace(HTTPException=HTTPException))
    monkeypatch.setitem(sys.modules, "monailabel", SimpleNamespace())
    with pytest.raises(HTTPException) as refusal:
        LoadAlignedScand("image")({"image": str(tmp_path / "a.nii.gz")})
    status, message = refusal.value.args
    assert status == 422
    assert "does not exist" in message


def test_nothing_is_overwritten_unless_it_is_a_segmentation_and_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=rf"{tmp_path} already exists"):
        SaveSegmentationd(tmp_path).check()
    SaveSegmentationd(tmp_path, overwrite=True).check()
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is not from a segmentation"):
        SaveSegmentationd(tmp_path, overwrite=True).check()


POSES = (np.eye(4), np.array([[0.0, 0, -1, 12], [1, 0, 0, -9], [0, 1, 0, 5], [0, 0, 0, 1]]))


# The scan's array runs the other way along its first axis.
BACKWARDS = np.array([[-1.0, 0, 0, 49], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def write_scan(folder: Path, name: str, pose: NDArray[Any], labels: dict[int, int]) -> tuple[Path, Path]:
    """MNI152 at 4 mm with its tissues renumbered, the header moved by ``pose``."""
    image, tissue, affine = small_brain()
    assert len(image) == 50
    numbers = np.zeros(4, dtype=np.int16)
    for old, new in labels.items():
        numbers[old] = new
    paths = folder / f"{name}.nii.gz", folder / f"{name}_labels.nii.gz"
    save_image(paths[0], 900 * image[::-1], pose @ affine @ BACKWARDS)
    save_image(paths[1], numbers[tissue[::-1]], pose @ affine @ BACKWARDS)
    return paths


@pytest.fixture
def known_pose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alignment is known: finding it takes seconds of each scan, and is tested elsewhere."""
    monkeypatch.setattr(
        atlas,
        "align",
        lambda scan, _: scan.affine @ np.linalg.inv(small_brain()[2] @ BACKWARDS),
    )


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.csv"
    path.write_text('number,name\n300,"Brain, fluid"\n20,Matter\n10,Matter\n7,unused\n5,\n')
    return path


@pytest.mark.usefixtures("known_pose")
def test_labelled_scans_make_a_bundle_that_segments_another(tmp_path: Path, names: Path) -> None:
    numbers = {1: 300, 2: 20, 3: 10}
    atlases = [write_scan(tmp_path, "a", POSES[0], numbers), write_scan(tmp_path, "b", POSES[1], numbers)]
    terms = tmp_path / "terms.txt"
    terms.write_text("ours")
    bundle = make_atlas_bundle(atlases, tmp_path / "my_atlas", names=names, licence=terms, grid=GRID)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert channels == {"0": "background", "1": "Brain, fluid", "2": "Matter"}
    with (bundle / "docs" / "labels.csv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [("1", "Brain, fluid", "300"), ("2", "Matter", "20"), ("2", "Matter", "10")]
    assert (bundle / "docs" / "data_license.txt").read_text() == "ours"
    assert "| 2 | Matter |" in (bundle / "docs" / "README.md").read_text()

    scan, labels = write_scan(tmp_path, "c", POSES[1] @ POSES[1], {1: 1, 2: 2, 3: 2})
    options = {"bundle_root": str(bundle), "image": str(scan), "output_dir": str(tmp_path / "out")}
    run = ConfigWorkflow(
        str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        **options,
    )
    run.initialize()
    assert run.check_properties() == []
    run.run()
    found = nib.load(tmp_path / "out" / "segmentation.nii.gz")
    assert found.shape == nib.load(scan).shape
    np.testing.assert_array_equal(found.affine, nib.load(scan).affine)
    truth, _ = read_labels(labels)
    stages = {f"off by one along {axis}": np.roll(truth, 1, axis) for axis in range(3)}
    dice = overlap({**stages, "found": np.asarray(found.dataobj)}, truth)
    assert dice["found"]["2"] > 0.9  # of fluid, a film, much is lost between voxels of 4 and of 3 mm
    assert all(dice["found"][label] > dice[stage][label] + 0.01 for stage in stages for label in "12"), dice
    with pytest.raises(Exception) as failure:  # noqa: PT011, MONAI wraps what a config raises
        run.run()  # again
    causes, error = [], failure.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    assert any("out already exists" in cause for cause in causes), causes
    probability = nib.load(tmp_path / "out" / "probability.nii.gz").get_fdata()
    assert probability.min() > 1 / 3 - 1e-6  # of three the largest one
    assert probability.max() <= 1


def test_what_cannot_become_a_bundle_is_refused_before_the_work(
    tmp_path: Path, names: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(*args: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(atlas, "align", late)
    scan, labels = write_scan(tmp_path, "a", np.eye(4), {1: 300, 2: 20, 3: 5})
    image, affine = nib.load(scan).get_fdata(dtype=np.float32), nib.load(scan).affine
    save_image(tmp_path / "cut.nii.gz", image[1:].astype(np.int16), affine)
    save_image(tmp_path / "half.nii.gz", image / 1000, affine)
    save_image(tmp_path / "head.nii.gz", image + 1, affine)
    wrong = {
        "twice": ("number,name\n300,a\n300,b\n20,c\n5,\n", r"wrong\.csv lists the number '300'"),
        "columns": ("label;name\n300;a\n", r"wrong\.csv has the columns \['label;name'\]"),
        "lacking": ("number,name\n300,a\n", r"wrong\.csv does not list the labels \[5, 20\]"),
        "case": ("number,name\n300,a\n20,A\n5,\n", r"wrong\.csv uses the names \['a'\]"),
        "long": ("number,name\n300," + 200_000 * "a", r"wrong\.csv is not a CSV file in UTF-8: field larger than"),
        "none": ("number,name\n300,\n20,\n5,\n", r"wrong\.csv names 0 structures .* 1 to 255"),
    }
    output = tmp_path / "bundle"
    for text, message in wrong.values():
        table = tmp_path / "wrong.csv"
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            make_atlas_bundle([(scan, labels)], output, names=table)
    for atlases, error, message in (
        ([(scan, tmp_path / "cut.nii.gz")], ValueError, "has shape"),
        ([(scan, tmp_path / "half.nii.gz")], ValueError, "is not a label map"),
        ([(tmp_path / "head.nii.gz", labels)], ValueError, "skull-stripped brain"),
        ([(tmp_path / "x.nii.gz", labels)], FileNotFoundError, "x.nii.gz"),
    ):
        with pytest.raises(error, match=message):
            make_atlas_bundle(atlases, output, names=names)
    with pytest.raises(ValueError, match=rf"{labels} have no names"):
        make_atlas_bundle([(scan, labels)], output)
    with pytest.raises(ValueError, match=rf"^{names} describes atlases"):
        make_atlas_bundle([], output, names=names)
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv does not exist\. .*a table of names"):
        make_atlas_bundle([(scan, labels)], output, names=tmp_path / "nothing.csv")
    with pytest.raises(FileExistsError, match=rf"{tmp_path} already exists"):
        make_atlas_bundle([(scan, labels)], tmp_path, names=names)
    assert main(["make-atlas-bundle", str(scan), "--output", str(output)]) == 2
    assert "each atlas needs a scan and a label map, but 1" in capsys.readouterr().err
    assert not output.exists()


def test_a_bundle_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, tissue, affine = small_brain()

    def full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(atlas_bundle.torch, "save", full)
    monkeypatch.setattr(atlas_bundle, "mni152", lambda: Scan(image, affine))
    monkeypatch.setattr(atlas_bundle, "mni152_tissue", lambda: Scan(tissue, affine))
    monkeypatch.setattr(atlas_bundle, "_align", lambda scan, grid: (np.ones(SIZE, np.uint8),) * 2)
    with pytest.raises(OSError, match="no space left"):
        make_atlas_bundle([], tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_bundle_is_what_the_command_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / SHIPPED.name
    assert main(["make-atlas-bundle", "--output", str(made)]) == 0
    assert "read docs/README.md" in capsys.readouterr().out
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    model = Path("models", "model.pt")
    for name in set(files) - {model}:
        assert (made / name).read_text() == (SHIPPED / name).read_text(), name
    state, shipped = (torch.load(folder / model, weights_only=True) for folder in (made, SHIPPED))
    assert state.keys() == shipped.keys()
    for name, tensor in state.items():
        # Another processor may round a grey value the other way.
        atol = 1 if name == "images" else 0
        torch.testing.assert_close(tensor.float(), shipped[name].float(), rtol=0, atol=atol, msg=name)


def test_the_shipped_bundle_segments_colin27(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SHIPPED)
    run = ConfigWorkflow(
        "configs/inference.json",
        meta_file="configs/metadata.json",
        logging_file=False,
        workflow_type="infer",
        image=str(sample_scan("colin27")),
        output_dir=str(tmp_path / "out"),
    )
    run.initialize()
    assert run.check_properties() == []
    run.run()
    found, _ = read_labels(tmp_path / "out" / "segmentation.nii.gz")
    truth, _ = read_labels(sample_scan("colin27_tissue"))
    dice = overlap({"found": found}, truth)["found"]
    assert dice["2"] > 0.72  # 0.68 and 0.70 after the affine alignment alone
    assert dice["3"] > 0.74
