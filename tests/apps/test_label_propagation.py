from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import brain, oblique_lia
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from voxelmorph_monai.apps.label_propagation import Study, number_structures, propagate, rank, renumbered, structures
from voxelmorph_monai.apps.options import Options
from voxelmorph_monai.blocks import weighted_vote
from voxelmorph_monai.cli import main
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.report import overlap
from voxelmorph_monai.space.template import WorkingGrid

# The individuals lie in one place: to align them takes seconds.
TOGETHER = Options(space="fixed", alignment="none", grid=WorkingGrid((32, 32, 32), 8.0), refine=False)
NAMES = {1: "rim", 2: "core", 3: "left nucleus", 4: "right nucleus"}

pytestmark = pytest.mark.usefixtures("one_thread")


def study(
    folder: Path,
    name: str,
    seed: int,
    values: Sequence[int] = (0, 1, 2, 3, 4),
    names: dict[int, str] | None = None,
) -> Study:
    """An individual in files; ``values`` are written for its labels 0, 1, 2, 3, 4."""
    image, labels = brain(seed)
    found = Study(name, folder / f"{name}.nii.gz", folder / f"{name}_label.nii.gz", names or {})
    save_image(found.image, image, oblique_lia())
    save_image(found.label, np.array(values, dtype=np.int16)[labels], oblique_lia())
    return found


def vote(maps: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Majority of label maps that all count alike."""
    stacked = torch.from_numpy(np.stack(maps))[None]
    return weighted_vote(stacked, torch.ones(stacked.shape))[0, 0].numpy()


def test_vote_is_that_of_simpleitk() -> None:
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 4, (9, 8, 7), dtype=np.uint8) for _ in range(5)]
    undecided = 255
    oracle = sitk.GetArrayFromImage(sitk.LabelVoting([sitk.GetImageFromArray(m) for m in maps], undecided))
    clear = oracle != undecided
    assert 0.5 < clear.mean() < 1  # both cases occur
    won = vote(maps)
    assert_array_equal(won[clear], oracle[clear])
    counts = np.stack([sum(m == label for m in maps) for label in range(4)])
    assert_array_equal(won, counts.argmax(axis=0))  # in a draw the smallest of the labels that most have


def test_structures_are_known_by_their_names(tmp_path: Path) -> None:
    first = study(tmp_path, "a", 1, names=NAMES)
    second = study(tmp_path, "b", 1, (0, 40, 30, 20, 999), {40: "rim", 30: "core", 20: "left nucleus"})
    assert structures(second) == {20: "left nucleus", 30: "core", 40: "rim", 999: "label 999"}
    numbers = number_structures([first, second])
    assert numbers == {"rim": 1, "core": 2, "left nucleus": 3, "right nucleus": 4, "label 999": 5}
    labels = brain(1)[1]
    assert_array_equal(renumbered(first, numbers).array, labels)
    assert_array_equal(renumbered(second, numbers).array, np.array([0, 1, 2, 3, 5])[labels])
    assert renumbered(second, numbers).array.dtype == np.uint8
    assert renumbered(second, {str(i): i for i in range(300)}).array.dtype == np.uint16


def test_what_is_called_background_is_no_structure(tmp_path: Path) -> None:
    found = study(tmp_path, "a", 1, names={**NAMES, 1: "Background"})
    numbers = number_structures([found])
    assert numbers == {"core": 1, "left nucleus": 2, "right nucleus": 3}
    assert_array_equal(renumbered(found, numbers).array, np.array([0, 0, 1, 2, 3])[brain(1)[1]])


def test_labels_of_the_scan_itself_come_back_as_they_are(tmp_path: Path) -> None:
    """The alignment leaves alike images in place, and no two voxels are mixed: equality, not closeness."""
    found = study(tmp_path, "a", 3, (0, 4, 3, 2, 1), {5 - value: name for value, name in NAMES.items()})
    numbers = {name: value for value, name in NAMES.items()}
    labels = propagate([found], found.image, numbers, TOGETHER)
    assert_array_equal(labels.array, brain(3)[1])


def test_the_scan_itself_outvotes_others(tmp_path: Path) -> None:
    """Its difference is 0, so its weight in joint fusion is the largest wherever an image differs from another."""
    studies = [study(tmp_path, name, seed, names=NAMES) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    labels = propagate(studies, studies[2].image, number_structures(studies), TOGETHER).array
    assert (labels == brain(3)[1]).mean() > 0.999  # where all images are alike the labels may still differ
    majority = vote([brain(seed)[1] for seed in (1, 2, 3)])
    assert (majority == brain(3)[1]).mean() < 0.97


def mean_dice(labels: NDArray[np.generic], truth: NDArray[np.generic]) -> float:
    return overlap({"found": labels}, truth)["found"]["mean"]


def test_labels_follow_the_anatomy(tmp_path: Path) -> None:
    truth = brain(2)[1]
    target = study(tmp_path, "open", 2)
    sources = [study(tmp_path, name, seed, names=NAMES) for name, seed in (("a", 1), ("b", 3), ("c", 4))]
    numbers = number_structures(sources)
    options = replace(TOGETHER, refine=True, budget=60)
    single = [propagate([each], target.image, numbers, options).array for each in sources]
    dice = [mean_dice(labels, truth) for labels in single]
    as_they_lie = [mean_dice(brain(seed)[1], truth) for seed in (1, 3, 4)]
    # Half of what was wrong before is right after: far above chance, and below what any pair reached when written.
    assert all(1 - after < 0.5 * (1 - before) for after, before in zip(dice, as_they_lie, strict=True))
    assert mean_dice(vote(single), truth) > np.mean(dice)  # what fusion is for: errors that differ lose the vote


def test_the_most_similar_come_first_and_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    twin, other = study(tmp_path, "twin", 2), study(tmp_path, "other", 1)
    broken = Study("broken", tmp_path / "broken.nii.gz", other.label)
    broken.image.write_bytes(b"nothing")
    target = study(tmp_path, "open", 2)
    ranked, reasons = rank([other, broken, twin], target.image, space="fixed", alignment="none")
    assert [found.name for _, found in ranked] == ["twin", "other"]
    assert ranked[0][0] == pytest.approx(1, abs=1e-6)  # float32
    assert 0.3 < ranked[1][0] < 0.999
    assert set(reasons) == {"broken"}
    assert "not compressed" in reasons["broken"]


def test_wrong_input_is_told(tmp_path: Path) -> None:
    found = study(tmp_path, "a", 1)
    with pytest.raises(ValueError, match=rf"no study .*{found.image}"):
        propagate([], found.image, {}, TOGETHER)
    elsewhere = study(tmp_path, "b", 1)
    save_image(elsewhere.label, np.ones((4, 5, 6), np.uint8), oblique_lia())
    with pytest.raises(ValueError, match=r"b has shape \(24, 32, 20\) and .*b_label\.nii\.gz has \(4, 5, 6\)"):
        propagate([elsewhere], found.image, number_structures([elsewhere]), TOGETHER)
    found.label.unlink()
    with pytest.raises(FileNotFoundError, match=rf"labels of a .*{found.label}"):
        structures(found)


def test_brains_are_compared_in_mni152(tmp_path: Path) -> None:
    """On another grid in the same place, the scan is still most similar to its twin."""
    twin, other = study(tmp_path, "twin", 2), study(tmp_path, "other", 1)
    array, affine = brain(2)[0][::-1, 1:-1].swapaxes(0, 2), oblique_lia()
    flipped = affine @ np.array([[-1.0, 0, 0, 23], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    save_image(tmp_path / "open.nii.gz", array, flipped[:, [2, 1, 0, 3]])
    ranked, reasons = rank([other, twin], tmp_path / "open.nii.gz", alignment="none")
    assert [found.name for _, found in ranked] == ["twin", "other"]
    assert ranked[0][0] == pytest.approx(1, abs=1e-3)  # float32 along two ways
    assert not reasons


@pytest.mark.parametrize("space", ["fixed", "mni152"])
@pytest.mark.parametrize("cut", ["study", "scan"])
def test_what_a_scan_does_not_show_makes_it_no_less_similar(tmp_path: Path, space: str, cut: str) -> None:
    """A slab of the scan itself is more similar to it than the whole of someone else, and so is it to its slab."""
    twin, other, target = study(tmp_path, "twin", 2), study(tmp_path, "other", 1), study(tmp_path, "open", 2)
    image, affine = brain(2)[0][:, 9:24], oblique_lia()
    affine[:3, 3] += affine[:3, :3] @ (0, 9, 0)
    save_image((twin if cut == "study" else target).image, image, affine)
    ranked, reasons = rank([other, twin], target.image, space=space, alignment="none")
    assert not reasons
    assert [found.name for _, found in ranked] == ["twin", "other"]
    assert ranked[0][0] > 0.99  # in MNI152 an intensity is of the 99.5th percentile of what is shown


def test_the_app_is_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label-app", str(tmp_path / "app")]) == 0
    assert {path.name for path in (tmp_path / "app").iterdir()} == {"main.py", "requirements.txt"}
    assert f"start_server --app {tmp_path / 'app'} " in capsys.readouterr().out
    assert main(["label-app", str(tmp_path / "app")]) == 2
    assert "app already exists" in capsys.readouterr().err
