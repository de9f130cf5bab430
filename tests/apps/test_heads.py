"""Whole heads among the scans to register: what is taken for one, and what becomes of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelmorph_monai.affines import apply_affine
from voxelmorph_monai.apps import heads
from voxelmorph_monai.apps.heads import (
    T1_WEIGHTED,
    Head,
    align_to_mni152,
    find_brain,
    find_brains,
    may_be_head,
)
from voxelmorph_monai.apps.options import DEFAULTS
from voxelmorph_monai.pose import Anatomy, anatomy_of_mni152
from voxelmorph_monai.space.resampling import resample
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import mni152

pytestmark = pytest.mark.usefixtures("one_thread")

TISSUES = [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, *[1] * 8, 2, 2, 0, *[1] * 6, 0, 0, 2]  # white, grey, fluid


def scan_of(litres: float, lowest: float = 0.0) -> Scan:
    array = np.full((40, 40, 40), lowest, np.float32)
    array.flat[: round(litres * 1e6 / 64)] = 100
    return Scan(array, np.diag([4.0, 4, 4, 1]), f"{litres:g} l")


def test_what_shows_more_than_a_brain_may_be_a_head() -> None:
    assert not may_be_head(scan_of(2.1))
    assert may_be_head(scan_of(2.5))
    assert not may_be_head(scan_of(3.0, lowest=-1000.0))  # CT
    assert not may_be_head(Scan(np.ones((2000, 2000, 1)), np.eye(4)))


def test_what_is_neither_head_nor_brain_is_refused() -> None:
    assert find_brain(scan_of(1.8)) is None
    with pytest.raises(ValueError, match=r"^4 l shows 4 litres .* brain"):  # a block, which the coarse look believes
        find_brain(scan_of(4.0))


def head_of(contrast: tuple[float, float, float], name: str) -> Head:
    """MNI152's structures, painted."""
    anatomy = anatomy_of_mni152()
    image = torch.tensordot(torch.tensor(contrast)[TISSUES], anatomy.posteriors, dims=1)
    brain = Scan(image.numpy(), anatomy.affine, name)
    return Head(brain, anatomy, brain, heads._order(brain, anatomy))


T1, T2, FLAIR = (1.0, 0.7, 0.2), (0.5, 0.7, 1.0), (0.7, 1.0, 0.2)


def test_the_contrast_follows_from_white_matter_cortex_and_ventricles() -> None:
    assert head_of(T1, "T1").order == T1_WEIGHTED
    assert head_of(T2, "T2").order == (2, 1, 0)
    assert head_of(FLAIR, "FLAIR").order == (1, 0, 2)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Head]:
    """Heads that are found, by the name of the scan."""
    found: dict[str, Head] = {}
    monkeypatch.setattr(heads, "find_brain", lambda scan, device: found.get(scan.name))
    return found


def test_a_mask_wins_and_brains_and_other_spaces_are_left_alone(known: dict[str, Head]) -> None:
    known["T1"] = head_of(T1, "T1")
    scan, brain = known["T1"].brain, scan_of(1.2)
    assert find_brains((scan, brain), (None, None), DEFAULTS) == ([known["T1"], None], DEFAULTS, [])
    assert find_brains((scan, scan), (scan, None), DEFAULTS)[0] == [None, known["T1"]]
    for options in (replace(DEFAULTS, brain_extraction="off"), replace(DEFAULTS, space="fixed")):
        assert find_brains((scan, brain), (None, None), options) == ([None, None], options, [])


@pytest.mark.parametrize(
    ("moving", "fixed", "similarity", "named"),
    [(T2, T1, "mind", "a.nii "), (T2, FLAIR, "mind", "a.nii and b.nii "), (T2, T2, "lncc", "a.nii and b.nii ")],
)
def test_a_network_of_t1_does_not_see_other_contrasts(
    known: dict[str, Head],
    moving: tuple[float, float, float],
    fixed: tuple[float, float, float],
    similarity: str,
    named: str,
) -> None:
    known |= {"a.nii": head_of(moving, "a.nii"), "b.nii": head_of(fixed, "b.nii")}
    scans = known["a.nii"].brain, known["b.nii"].brain
    _, options, notes = find_brains(scans, (None, None), DEFAULTS)
    assert (options.weights, options.similarity) == ("none", similarity)
    assert len(notes) == 1
    assert notes[0].startswith(named)
    assert "T1" in notes[0]
    own = replace(DEFAULTS, weights="own.pt")  # may know them
    assert find_brains(scans, (None, None), own)[1:] == (own, [])


def test_a_head_is_aligned_by_its_structures_unless_the_headers_shall_do() -> None:
    shift = np.eye(4)
    shift[:3, 3] = 5, -7, 11
    template = anatomy_of_mni152()
    head = Head(scan_of(1.0), Anatomy(template.posteriors, shift @ template.affine), scan_of(1.0))
    np.testing.assert_allclose(align_to_mni152(head.brain, head, "affine"), shift, atol=1e-3)
    np.testing.assert_allclose(align_to_mni152(head.brain, head, "rigid"), shift, atol=1e-3)
    np.testing.assert_array_equal(align_to_mni152(mni152(), head, "none"), np.eye(4))


def test_the_brain_of_a_real_head_is_found(colin27: Path) -> None:
    scan = Scan.read(colin27 / "ch2.nii.gz")
    true = Scan.read(colin27 / "ch2bet.nii.gz").array > 0
    assert may_be_head(scan)
    head = find_brain(scan, "cpu")
    assert head is not None
    assert head.order == T1_WEIGHTED
    found = head.brain.array > 0
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.9  # .927 when this was written
    labels = resample(head.labels, scan.grid, np.eye(4), order=0).array
    assert 2 * ((labels > 0) & true).sum() / ((labels > 0).sum() + true.sum()) > 0.88  # of voxels of 2 mm
    assert apply_affine(scan.affine, np.argwhere(labels == 10).T).mean(axis=1)[0] < -5  # the left thalamus
    mapping = align_to_mni152(scan, head, "affine")
    np.testing.assert_allclose(mapping[:3, :3], np.eye(3), atol=0.12)  # Colin27 lies in MNI's space, a little larger
    np.testing.assert_allclose(mapping[:3, 3], 0, atol=10)
