import math

import pytest
import torch
from torch.testing import assert_close

from tests.deformations import SIZES, noise, unfolded
from voxelmorph_monai import switch
from voxelmorph_monai.blocks import (
    compose,
    identity_grid,
    integrate,
    invert,
    jacobian_determinant,
    resize,
    smooth,
    warp,
    warp_labels,
)
from voxelmorph_monai.descent import Direction, Regularity, _smooth, _towards_volume
from voxelmorph_monai.losses import LNCCLoss, MSELoss
from voxelmorph_monai.metrics import dice, folding, inverse_consistency, log_jacobian_sd, target_registration_error
from voxelmorph_monai.networks import Registration, VoxelMorph
from voxelmorph_monai.objective import SIMILARITIES, Objective, Pair, double, halve, image_force
from voxelmorph_monai.refinement import (
    RefinedRegistration,
    _inverse,
    mean_map,
    refine,
)

pytestmark = pytest.mark.usefixtures("one_thread")
sizes = pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])


def inside(size):
    """1 in an ellipsoid, 0 around it."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in size], indexing="ij")
    return (sum(x.square() for x in axes) < 0.7).float()[None, None]


def example(size, amplitude=3.0):
    """Fixed, and a moving image that the returned displacement warps to it."""
    image = inside(size) * (noise(size, 1) + 4)
    truth = integrate(amplitude * noise(size, 6, len(size), seed=1) * smooth(inside(size), 3))
    return (
        warp(image, integrate(-amplitude * noise(size, 6, len(size), seed=1) * smooth(inside(size), 3))),
        image,
        truth,
    )


def error(ddf, truth):
    """Mean distance in voxels inside the ellipsoid, where the images show something."""
    distance = torch.linalg.vector_norm(ddf - truth, dim=1, keepdim=True)
    shown = inside(ddf.shape[2:]) > 0
    return float(distance[shown].mean())


@sizes
def test_refine_finds_the_deformation_from_zero(size):
    moving, fixed, truth = example(size)
    found = refine(moving, fixed, budget=math.inf)
    before = error(torch.zeros_like(truth), truth)
    assert error(found.ddf, truth) < 0.3 * before  # local correlation forgives a shift of some tenths of a voxel
    assert unfolded(found.ddf)
    assert unfolded(found.inverse_ddf)
    fields = found.ddf, found.inverse_ddf
    # voxels: about a tenth is what linear interpolation leaves; the inverse is found by the second of the two ways
    assert float(inverse_consistency(*fields, mask=inside(size))) < 0.2
    assert float(inverse_consistency(*fields[::-1], mask=inside(size))) < 0.1


@sizes
def test_refine_keeps_and_improves_a_start(size):
    moving, fixed, truth = example(size)
    start = 0.5 * truth
    found = refine(moving, fixed, ddf=start, budget=math.inf)
    assert error(found.ddf, truth) < 0.8 * error(start, truth)
    none = refine(moving, fixed, ddf=start, max_steps=0).ddf  # only through the grid of half the resolution and back
    assert error(none, start) < 0.1


def test_refine_lowers_the_loss_and_gives_its_course():
    moving, fixed, _ = example((48, 61))
    curve = refine(moving, fixed, budget=math.inf).curve
    scales = [step.scale for step in curve]
    assert scales == sorted(scales, reverse=True)
    for scale in set(scales):
        losses = [step.loss for step in curve if step.scale == scale]
        assert min(losses) < losses[0]


def test_refine_is_deterministic():
    moving, fixed, _ = example((48, 61))
    first, second = (refine(moving, fixed, budget=math.inf, max_steps=8) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)


def test_refine_leaves_a_pair_that_is_aligned():
    _, image, _ = example((48, 61))
    assert_close(refine(image, image, budget=math.inf).ddf, torch.zeros(1, 2, 48, 61), rtol=0, atol=0)


@sizes
def test_a_start_that_takes_the_images_apart_is_not_used(size):
    moving, fixed, truth = example(size)
    plain, found = (refine(moving, fixed, ddf=start, budget=math.inf, max_steps=4) for start in (None, -truth))
    assert_close(found, plain, rtol=0, atol=0)
    assert_close(refine(fixed, fixed, ddf=0.3 * truth, budget=math.inf).ddf, torch.zeros_like(truth), rtol=0, atol=0)


def test_refine_ends_with_its_budget():
    moving, fixed, _ = example((34, 40, 29))
    assert len(refine(moving, fixed, budget=0).curve) == 2  # each level looks once at what it has


@pytest.mark.parametrize("name", ["mi", "mind"])
def test_refine_knows_other_contrasts(name):
    moving, fixed, truth = example((60, 72))
    other = (8 - fixed) * (fixed > 0)  # dark where it was bright
    found = refine(moving, other, similarity=SIMILARITIES[name], budget=math.inf)
    assert error(found.ddf, truth) < 0.7 * error(torch.zeros_like(truth), truth)  # a histogram knows less than a window


@sizes
def test_bidirectional_refinement_aligns_too(size):
    moving, fixed, truth = example(size)
    found = refine(moving, fixed, bidirectional=True, budget=math.inf)
    assert error(found.ddf, truth) < 0.3 * error(torch.zeros_like(truth), truth)
    assert unfolded(found.ddf)


@sizes
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("doublings", [0, 1])
def test_force_is_the_gradient_by_a_step(size, bidirectional, doublings):
    """Against autograd through warps: of the moving image by a step after the map, and back by its inverse."""
    size = tuple(n // 2 * 2 + 1 for n in size)
    moving, fixed = (smooth(noise(size, 3, seed=seed) * inside(size), 2) for seed in (1, 2))
    velocity = 3 * noise(size, 6, len(size), seed=3) * smooth(inside(size), 3)
    ddf, inverse = integrate(velocity), integrate(-velocity) if bidirectional else None
    if doublings:
        ddf, inverse = (None if field is None else halve(field) / 2 for field in (ddf, inverse))
    pair = Pair(moving, fixed, None, None, None)
    _, force = Objective(MSELoss(), bidirectional, 0, 0).force(pair, ddf, inverse, doublings)
    step = torch.zeros_like(ddf).requires_grad_()
    fine = [double(field) if doublings else field for field in (ddf, step)]
    loss = MSELoss()(warp(moving, compose(*fine)), fixed)
    if inverse is not None:
        back = compose(-fine[1], double(inverse) if doublings else inverse)
        loss = (loss + MSELoss()(warp(fixed, back), moving)) / 2
    (expected,) = torch.autograd.grad(loss, step)
    # interpolation has one-sided slopes where the differences are central: alike, not equal
    cosine = torch.nn.functional.cosine_similarity(force.flatten(), expected.flatten(), dim=0)
    assert float(cosine) > 0.97
    assert_close(force.norm(), expected.norm(), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16])
def test_labels_pull_where_images_show_nothing(dtype):
    size = (48, 60)
    flat = inside(size)
    labels = torch.zeros(2, 1, *size, dtype=torch.int32)
    labels[0, :, 20:30, 18:28], labels[1, :, 20:30, 24:34] = 1, 1
    moving, fixed = labels.split(1)
    found = refine(flat, flat, labels=(moving.to(dtype), fixed.to(dtype)), budget=math.inf)
    before, after = dice(moving, fixed, 1), dice(warp_labels(moving, found.ddf), fixed, 1)
    assert float(before) < 0.5
    assert float(after) > 0.8


def test_points_pull_where_images_show_nothing():
    size = (48, 60)
    flat = inside(size)
    fixed = torch.tensor([[[20.0, 25.0], [30.0, 35.0]]])
    moving = fixed + torch.tensor([3.0, -2.0])
    found = refine(flat, flat, points=(moving, fixed), points_weight=1, budget=math.inf)
    assert float(target_registration_error(moving, fixed, found.ddf, 1).max()) < 1  # of 3.6 voxels


def test_images_count_only_inside_the_mask():
    size = (48, 61)
    moving, fixed, truth = example(size)
    mask = torch.zeros(1, 1, *size)
    mask[..., :30] = 1
    other = torch.where(mask > 0, fixed, noise(size, 2, seed=7))
    found = refine(moving, other, mask=mask, budget=math.inf)
    far = found.ddf[..., 45:]
    assert float(far.abs().max()) < float(found.ddf[..., :30].abs().max()) / 2
    shown = (inside(size) * mask)[..., :25] > 0
    distance = torch.linalg.vector_norm((found.ddf - truth)[..., :25], dim=1, keepdim=True)
    assert float(distance[shown].mean()) < 0.5 * float(truth[..., :25].norm(dim=1, keepdim=True)[shown].mean())


def test_images_count_only_inside_the_mask_of_the_moving_image():
    size = (48, 61)
    fixed, moving, _ = example(size)
    mask = torch.zeros(1, 1, *size)
    mask[..., :30] = 1
    other = torch.where(mask > 0, fixed, noise(size, 2, seed=7))
    options = {"budget": math.inf, "symmetric": True, "max_steps": 12}
    back = refine(moving, other, mask=mask, **options)
    found = refine(other, moving, moving_mask=mask, **options)
    assert_close(found.inverse_ddf, back.ddf, rtol=0, atol=1e-5)
    assert float(found.inverse_ddf[..., 45:].abs().max()) < float(found.inverse_ddf[..., :30].abs().max()) / 2


def test_what_turns_far_folds_nowhere_beyond_the_images_either():
    size, angle = (64, 64), math.radians(100)
    cos, sin = math.cos(angle), math.sin(angle)
    centred = identity_grid(torch.zeros(1, 1, *size)) - 32
    ddf = torch.einsum("ij,bj...->bi...", torch.tensor([[cos - 1, -sin], [sin, cos - 1]]), centred)
    moving = torch.zeros(1, 1, *size)
    moving[..., 24:41, 24:41] = noise((17, 17), 1) + 4
    found = refine(moving, warp(moving, ddf), ddf=ddf, budget=math.inf, max_steps=0)
    assert unfolded(found.ddf)
    assert unfolded(found.inverse_ddf)


@sizes
def test_double_is_resize_and_halve_its_inverse_on_lines(size):
    ddf = noise(size, 1, len(size))
    assert_close(double(ddf), resize(ddf, [2 * n - 1 for n in size]))
    line = torch.arange(9.0).view(1, 1, 1, 9).expand(1, 1, 7, 9)
    inner = halve(line)[..., 1:-1]  # at the ends one neighbour is missing
    assert_close(inner, line[:, :, ::2, ::2][..., 1:-1])


@pytest.mark.parametrize("enabled", [True, False], ids=["loops", "torch"])
def test_gradient_sums_over_channels(enabled, monkeypatch):
    monkeypatch.setattr(switch, "enabled", enabled)
    line = torch.arange(6.0).expand(1, 2, 5, 6)
    slope = torch.ones(1, 2, 5, 6)
    slope[:, 1] = 2
    assert image_force(line, slope)[0, :, 2, 2].tolist() == [0, 3]


@sizes
def test_steps_agree_in_loops_and_in_torch(size, monkeypatch):
    image, slope = (noise(size, 1, 2, seed=seed) for seed in (1, 2))
    ddf = 0.7 * noise(size, 1, len(size))
    assert float(folding(ddf)) > 0  # so that the smallest volume counts
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(switch, "enabled", enabled)
        smoothed = _smooth(image, [0.6, 1.3, 0.4][: len(size)])
        found.append((image_force(image, slope), _towards_volume(ddf), smoothed))
    # rounding, of a determinant near 0 before its logarithm
    assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@sizes
def test_volumes_are_held_by_steepest_descent(size):
    """Against autograd through the composition with a step and the logarithm of the determinant."""
    ddf = integrate(noise(size, 5, len(size), seed=3) * smooth(inside(size), 3))
    step = torch.zeros_like(ddf).requires_grad_()
    loss = jacobian_determinant(compose(ddf, step)).log().square().sum() / 2
    (slope,) = torch.autograd.grad(loss, step)
    found = _towards_volume(ddf)
    # to first order in the logarithm, whose SD is a tenth or two here; and by differences over two voxels, not four
    assert 0.05 < float(log_jacobian_sd(ddf)) < 0.3
    assert float(torch.nn.functional.cosine_similarity(found.flatten(), -slope.flatten(), dim=0)) > 0.9
    assert 0.7 < float(found.norm() / slope.norm()) < 1.4


@sizes
def test_the_smoother_the_less_volumes_change(size):
    moving, fixed, truth = example(size)
    found = [refine(moving, fixed, smoothness=mm, budget=math.inf, max_steps=20).ddf for mm in (0, 0.5, 3, 30)]
    deviation = [float(log_jacobian_sd(ddf)) for ddf in found]
    assert deviation == sorted(deviation, reverse=True)
    assert deviation[3] < deviation[1] / 2
    assert error(found[1], truth) < 0.5 * error(torch.zeros_like(truth), truth)


def test_what_moves_in_noise_is_little_if_it_is_smooth():
    """Two scans of one brain: they differ by noise, a hundredth of the range."""
    size = (40, 44, 36)
    brain = inside(size) * (noise(size, 2) + 4) / 8
    scans = [brain + 0.01 * torch.randn(brain.shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    scans = [scan * (brain > 0) for scan in scans]
    shown = (brain > 0).expand(1, 3, *size)
    loose, smooth_one = (refine(*scans, smoothness=mm, budget=math.inf, max_steps=15).ddf[shown] for mm in (0.5, 30))
    assert float(smooth_one.std()) < 0.05  # voxels
    assert float(smooth_one.std()) < float(loose.std()) / 3


def test_smoothness_is_in_millimetres():
    moving, fixed, _ = example((34, 40, 29))
    options = {"budget": math.inf, "max_steps": 4}
    found = refine(moving, fixed, smoothness=0.6, **options).ddf
    scaled = refine(moving, fixed, smoothness=1.5, spacing=2.5, **options).ddf
    assert_close(scaled, found, rtol=0, atol=1e-5)  # 1.5 / 2.5 is rounded
    rougher = refine(moving, fixed, smoothness=0.6, spacing=2.5, **options).ddf
    assert float(log_jacobian_sd(rougher)) > 1.05 * float(log_jacobian_sd(found))
    turned = [image.transpose(2, 4) for image in (moving, fixed)]
    thick = refine(moving, fixed, spacing=(3.0, 1.0, 1.0), **options).ddf
    other = refine(*turned, spacing=(1.0, 1.0, 3.0), **options).ddf
    assert_close(other.flip(1).transpose(2, 4), thick, rtol=0, atol=1e-3)  # sums in another order


def test_regularity_in_millimetres_along_thick_slices():
    """A field on voxels of 1 x 1 mm, and on each other row of them: one field in mm, one step."""
    fine, wide = 2.0 * noise((96, 48), 8, 2), (2.0, 1.0)
    coarse = fine[:, :, ::2].clone()
    coarse[:, 0] /= 2  # voxels of 2 mm
    mm = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1)
    width = 2**0.5
    thin, thick = Regularity.of(1.0 / width, (1.0, 1.0), 1), Regularity.of(1.0, wide, 1)
    # the step is half a voxel: sqrt(2) times as long on the wider voxels, so that as much smoothness costs so much more
    assert_close([a * b for a, b in zip(thick.sigmas, wide, strict=True)], [s * width for s in thin.sigmas])
    inner = (..., slice(8, -8), slice(8, -8))
    smoothed = thick.smoothed(coarse) * mm
    for _ in range(2):
        fine = thin.smoothed(fine)
    assert_close(smoothed[inner], fine[:, :, ::2][inner], rtol=0, atol=0.02)  # of 2 mm, by two rows or one
    force = noise((48, 48), 8, 2, seed=5)
    still = torch.zeros_like(coarse)
    along = (
        Regularity.of(1.0, each, 1).step(Direction(still), force * scale, still) * scale
        for each, scale in ((wide, mm),)
    )
    for step in along:  # in mm the direction is that of the force per mm
        expected = smooth(force, 0.7)
        cosine = (step * expected).sum(1) / step.norm(dim=1) / expected.norm(dim=1)
        assert float(-cosine[..., 8:-8, 8:-8].mean()) > 0.99


@sizes
def test_exchanged_images_get_the_inverse(size):
    moving, fixed, truth = example(size)
    options = {"symmetric": True, "budget": math.inf, "max_steps": 12}
    there, back = refine(moving, fixed, **options), refine(fixed, moving, **options)
    assert_close(there.ddf, back.inverse_ddf, rtol=0, atol=1e-5)
    assert_close(there.inverse_ddf, back.ddf, rtol=0, atol=1e-5)
    assert float(inverse_consistency(there.ddf, there.inverse_ddf, mask=inside(size))) < 0.05
    assert float(inverse_consistency(there.inverse_ddf, there.ddf, mask=inside(size))) < 0.05
    assert error(there.ddf, truth) < 0.5 * error(torch.zeros_like(truth), truth)
    assert unfolded(there.ddf)
    one_way = refine(moving, fixed, budget=math.inf, max_steps=12)
    other = refine(fixed, moving, budget=math.inf, max_steps=12)
    assert float((one_way.ddf - other.inverse_ddf).abs().max()) > 0.1  # without it they differ


@sizes
def test_mean_of_a_map_and_its_inverse_is_the_map(size):
    velocity = 2 * noise(size, 6, len(size)) * smooth(inside(size), 3)
    there, back = integrate(velocity), integrate(-velocity)
    mean, inverse = mean_map(there, back)
    assert error(mean, there) < 0.03  # voxels, of interpolation
    assert error(inverse, back) < 0.03


def test_symmetric_refinement_takes_labels_and_points_along():
    size = (48, 60)
    flat = inside(size)
    labels = torch.zeros(2, 1, *size, dtype=torch.int32)
    labels[0, :, 20:30, 18:28], labels[1, :, 20:30, 24:34] = 1, 1
    moving, fixed = labels.split(1)
    found = refine(flat, flat, labels=(moving, fixed), symmetric=True, budget=math.inf)
    assert float(dice(warp_labels(moving, found.ddf), fixed, 1)) > 0.75
    points = torch.tensor([[[20.0, 25.0], [30.0, 35.0]]])
    shifted = points + torch.tensor([3.0, -2.0])
    found = refine(flat, flat, points=(shifted, points), points_weight=1, symmetric=True, budget=math.inf)
    assert float(target_registration_error(shifted, points, found.ddf, 1).max()) < 1.2  # of 3.6 voxels


@pytest.mark.parametrize("size", [(49, 61), (33, 41, 29), (32, 40, 28)], ids=str)  # two halvings, or none
def test_inverse_is_the_flow_backwards_though_steep(size):
    velocity = 1.5 * noise(size, 3, len(size)) * smooth(inside(size), 2)
    ddf, truth = integrate(velocity, 10), integrate(-velocity, 10)
    determinant = jacobian_determinant(ddf)
    assert float(determinant.min()) < 0.4
    assert float(determinant.max()) > 3
    found = _inverse(ddf)
    assert float(invert(ddf)[1]) > 1  # fixed points diverge on such a map
    assert float(inverse_consistency(found, ddf)) < 0.01  # what the inverse is found by
    assert float(inverse_consistency(ddf, found)) < 0.04  # the inverse itself is interpolated
    assert error(found, truth) < 0.1  # what sampling at voxels leaves of the flow
    assert unfolded(found)


@pytest.mark.parametrize(("side", "coarsest"), [(12, 1), (30, 2), (60, 4)])
def test_resolutions_are_those_of_what_the_images_show(side, coarsest):
    image = torch.zeros(1, 1, 128, 128)
    image[..., 30 : 30 + side, 40 : 40 + side] = 4 + noise((side, side), 1)
    found = refine(image, image.roll(1, 3), budget=math.inf, max_steps=1)
    assert found.curve[0].scale == coarsest


def test_several_channels_and_other_levels():
    moving, fixed, truth = example((21, 19))  # so small that there is one resolution
    found = refine(moving.repeat(1, 2, 1, 1), fixed.repeat(1, 2, 1, 1), budget=math.inf)
    assert error(found.ddf, truth) < error(torch.zeros_like(truth), truth)
    assert {step.scale for step in found.curve} == {1}


def test_refined_registration_takes_the_place_of_a_registration():
    moving, fixed, truth = example((32, 48))
    torch.manual_seed(0)
    registration = Registration(VoxelMorph(spatial_dims=2)).eval()
    network = RefinedRegistration(registration, budget=math.inf)
    pair = torch.cat([torch.cat([moving, fixed], 1), torch.cat([fixed, moving], 1)])
    with torch.inference_mode():
        found = network(pair)
    assert sorted(found) == ["ddf", "inverse_ddf", "warped", "warped_fixed"]
    assert all(value.shape[0] == 2 for value in found.values())
    assert error(found["ddf"][:1], truth) < 0.8 * error(torch.zeros_like(truth), truth)
    assert float(LNCCLoss()(found["warped"], pair[:, 1:])) < float(LNCCLoss()(pair[:, :1], pair[:, 1:]))
    with pytest.raises(TypeError, match="budgett"):
        RefinedRegistration(registration, budgett=8.0)


IMAGE = torch.rand(1, 1, 20, 22)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ((IMAGE, IMAGE[..., 1:]), {}, r"^moving and fixed .* \[1, 1, 20, 22\] and \[1, 1, 20, 21\]\. .*one shape"),
        ((IMAGE.repeat(2, 1, 1, 1),) * 2, {}, r"^moving and fixed .*\[2, 1, 20, 22\]\. .*one pair"),
        ((IMAGE, IMAGE / 0), {}, "^fixed has .* NaN or infinity"),
        ((IMAGE, IMAGE), {"ddf": IMAGE}, r"^ddf has shape \[1, 1, 20, 22\], .* \[1, 2, 20, 22\]"),
        ((IMAGE, IMAGE), {"mask": IMAGE[..., 1:]}, "^mask has shape "),
        ((IMAGE, IMAGE), {"moving_mask": IMAGE[..., 1:]}, "^moving_mask has shape "),
        ((IMAGE, IMAGE), {"labels": (IMAGE, IMAGE[..., 1:])}, "^labels has shape "),
        ((IMAGE, IMAGE), {"smoothness": -1}, "smoothness .* -1"),
        ((IMAGE, IMAGE), {"step_sigma": -1}, "step_sigma .* -1"),
        ((IMAGE, IMAGE), {"spacing": (1.0, 0.0)}, r"spacing of 2-D images .* \(1.0, 0.0\)"),
        ((IMAGE, IMAGE), {"spacing": (1.0, 1.0, 1.0)}, r"spacing of 2-D images .* \(1.0, 1.0, 1.0\)"),
        ((IMAGE, IMAGE), {"inverse_ddf": IMAGE}, "inverse_ddf .* symmetric"),
    ],
)
def test_what_cannot_be_refined(images, options, message):
    with pytest.raises(ValueError, match=message):
        refine(*images, **options)
