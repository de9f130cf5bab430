"""Where a brain lies, from its anatomy: by phantoms whose pose is known, made of MNI152's own structures."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import Affine, apply_affine
from voxelmorph_monai.blocks import sample
from voxelmorph_monai.pose import Anatomy, anatomy_of_mni152, find_poses, fit, fit_centres, rotation_of

pytestmark = pytest.mark.usefixtures("one_thread")


def moved(mapping: Affine, size: int = 60) -> Anatomy:
    """MNI152's structures where ``mapping`` takes them, on a grid of 4 mm around them."""
    template = anatomy_of_mni152()
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = apply_affine(mapping, template.middle) - 2.0 * (size - 1)
    to_template = np.linalg.inv(template.affine) @ np.linalg.inv(mapping) @ affine
    index = apply_affine(to_template, np.indices((size,) * 3).astype(float))
    points = torch.from_numpy(index).float()[None]
    return Anatomy(sample(template.posteriors[None], points, padding_mode="zeros")[0], affine)


def pose(turn: float, scale: tuple[float, float, float], axis: tuple[float, float, float] = (2, -1, 2)) -> Affine:
    mapping = np.eye(4)
    rotation = Rotation.from_rotvec(np.radians(turn) * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    mapping[:3, :3] = rotation @ np.diag(scale)
    mapping[:3, 3] = 40, -80, 15
    return mapping


def miss(found: Affine, true: Affine) -> float:
    """Mean distance (mm) of the points of the brain from where they belong."""
    template = anatomy_of_mni152()
    points = apply_affine(template.affine, (template.posteriors.sum(0) > 0.5).nonzero().T.numpy().astype(float))
    return float(np.linalg.norm(apply_affine(found, points) - apply_affine(true, points), axis=0).mean())


@pytest.mark.parametrize("turn", [0.0, 35.0, 180.0])
def test_an_affine_map_is_found_by_the_structures(turn: float) -> None:
    true = pose(turn, (1.1, 0.9, 1.0))
    brain = moved(true)
    assert miss(fit_centres(brain, anatomy_of_mni152())[0], true) < 0.5  # voxels of 4 mm, sampled once
    assert miss(fit(brain, anatomy_of_mni152()), true) < 0.25  # it was sampled once, which blurs


def test_a_rigid_map_stays_rigid_and_ends_where_it_should() -> None:
    true = pose(70.0, (1.0, 1.0, 1.0))
    found = fit(moved(true), anatomy_of_mni152(), "rigid")
    np.testing.assert_allclose(found[:3, :3].T @ found[:3, :3], np.eye(3), atol=1e-9)
    assert miss(found, true) < 0.25
    grown = fit(moved(pose(70.0, (1.1, 1.1, 1.1))), anatomy_of_mni152(), "similarity")
    np.testing.assert_allclose(grown[:3, :3].T @ grown[:3, :3], 1.21 * np.eye(3), atol=0.01)  # 0.4 % of its length


def test_an_unknown_kind_of_map_is_named() -> None:
    with pytest.raises(ValueError, match="rigit"):
        fit(anatomy_of_mni152(), anatomy_of_mni152(), "rigit")


def test_between_two_brains_the_map_is_that_of_their_poses() -> None:
    first, second = pose(20.0, (1.0, 1.0, 1.0)), pose(-30.0, (1.1, 0.9, 1.0), (0, 1, 3))
    found = fit(moved(second), moved(first))
    assert miss(found @ first, second) < 0.2


def test_what_lies_beyond_the_scan_does_not_count() -> None:
    true = pose(10.0, (1.05, 1.0, 1.0))
    brain = moved(true)
    seen = torch.ones(brain.posteriors.shape[1:], dtype=torch.bool)
    seen[:, :, 38:] = False  # the top 40 mm
    cut = Anatomy(brain.posteriors * seen, brain.affine, seen)
    assert miss(fit(cut, anatomy_of_mni152()), true) < 0.5
    assert miss(fit(cut._replace(seen=None), anatomy_of_mni152()), true) > 2.0  # the reason for it


def test_a_missing_structure_or_a_wrong_one_hardly_matters() -> None:
    true = pose(25.0, (1.0, 1.0, 1.0))
    brain = moved(true)
    brain.posteriors[[4, 10, 15]] = 0
    brain.posteriors[[20, 8]] = brain.posteriors[[8, 20]].roll(9, dims=2)
    mapping, missed = fit_centres(brain, anatomy_of_mni152())
    assert miss(mapping, true) < 4.0
    assert missed > 5.0  # and it is noticed
    assert fit_centres(Anatomy(brain.posteriors * 0, brain.affine), anatomy_of_mni152())[1] == np.inf


def test_the_rest_of_the_mask_does_not_count() -> None:
    brain = moved(pose(25.0, (1.1, 0.9, 1.0)))
    mapping, missed = fit_centres(brain, anatomy_of_mni152())
    brain.posteriors[-1] = brain.posteriors[-1].roll(5, dims=0)
    again, missed_again = fit_centres(brain, anatomy_of_mni152())
    np.testing.assert_array_equal(again, mapping)  # the same numbers in the same order
    assert missed_again == missed


@pytest.mark.parametrize("contrast", [(0.3, 0.1, 1.0, 0.7, 0.75, 0.9, 0.8), (1.0, 0.9, 0.4, 0.55, 0.5, 0.45, 0.5)])
@pytest.mark.parametrize("turn", [0.0, 100.0, 180.0])
def test_any_pose_is_found_in_any_contrast(contrast: tuple[float, ...], turn: float) -> None:
    """T1 and T2 in order: ventricles, fluid, white matter, cortex, cerebellum, brain stem, nuclei."""
    true = pose(turn, (0.9, 0.9, 0.9))
    brain = moved(true)
    tissues = [2, 2, 3, 3, 0, 0, 4, 4, 4, 4, *[6] * 8, 0, 0, 5, *[6] * 6, 5, 5, 1]
    image = torch.tensordot(torch.tensor(contrast)[tissues], brain.posteriors, dims=1)
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.03, image.shape)).float()
    best = find_poses(image + noise, brain.posteriors.sum(0), brain.affine)[0]
    assert best.explained > 0.95  # all but noise
    angle = Rotation.from_matrix(rotation_of(best.mapping).T @ rotation_of(true)).magnitude()
    assert np.degrees(angle) < 3
    assert miss(best.mapping, true) < 3  # 8 mm a voxel
