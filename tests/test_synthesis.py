from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelmorph_monai.blocks import jacobian_determinant, warp
from voxelmorph_monai.losses import GradientLoss, LabelDiceLoss, MSELoss, RegistrationLoss
from voxelmorph_monai.synthesis import (
    FREESURFER,
    HEAD,
    Anatomyd,
    HeadSynthesis,
    Synthesis,
    SynthesisLoss,
    Tissue,
    paint,
    partial_volumes,
)

STRUCTURES = {"left white": [2], "right white": [41], "ventricles": [4, 43]}
STILL = {"flip_probability": 0.0, "deformation": 0.0, "rotation": 0.0, "scaling": 0.0, "shift": 0.0}
CLEAN = {"intensity_sd": 0.0, "bias": 0.0, "blur": 0.0, "noise": 0.0, "gamma": 0.0, "rim": 0, "fluid_probability": 1.0}


def head(size: tuple[int, ...]) -> Tensor:
    """Shells around a point off the middle, ``(1, *size)``: skull, fluid, cortex, white matter by side, ventricles."""
    axes = torch.meshgrid(*[torch.linspace(-1.0, 1.1, n) for n in size], indexing="ij")
    radius = torch.stack(axes).square().sum(0).sqrt()
    white = torch.where(axes[0] < 0, 2, 41)
    labels = torch.zeros(size, dtype=torch.long)
    for limit, label in ((0.95, 511), (0.85, 24), (0.75, 3), (0.6, white), (0.25, 4)):
        labels = torch.where(radius < limit, torch.as_tensor(label), labels)
    return labels[None]


def batch(size: tuple[int, ...], count: int = 1) -> dict[str, Tensor]:
    scan = Anatomyd(STRUCTURES)({"label": head(size)})
    many = {key: torch.stack([value] * count) for key, value in scan.items()}
    return {
        "moving": many["image"],
        "fixed": many["image"],
        "moving_label": many["label"],
        "fixed_label": many["label"],
    }


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_label_maps_may_be_unsigned(dtype: torch.dtype) -> None:
    labels = head((12, 9, 14))
    found, expected = (Anatomyd(STRUCTURES)({"label": x}) for x in (labels.to(dtype), labels))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(paint(labels.to(dtype)), paint(labels), rtol=0, atol=0)


def test_each_tissue_is_painted_in_its_intensity() -> None:
    labels = head((21, 18, 25))
    expected = np.zeros(labels.shape, np.float32)
    for tissue in FREESURFER.values():
        expected[np.isin(labels.numpy(), tissue.labels)] = tissue.intensity if tissue.brain else 0
    np.testing.assert_array_equal(paint(labels).numpy(), expected)


@pytest.mark.parametrize("size", [(8, 12, 6), (10, 14)])
def test_partial_volumes_are_those_of_the_voxels_of_a_block(size: tuple[int, ...]) -> None:
    labels = torch.randint(0, 6, (1, *size), generator=torch.Generator().manual_seed(0))
    groups = [[1, 5], [3], [2]]
    found = partial_volumes(labels, groups, factor=2)
    blocks = labels[0].numpy().reshape([part for n in size for part in (n // 2, 2)])
    for part, group in zip(found, groups, strict=True):
        expected = np.isin(blocks, group).mean(axis=tuple(range(1, 2 * len(size), 2)))
        np.testing.assert_allclose(part.numpy(), 255 * expected, atol=0.5)  # stored as whole numbers


def test_what_does_not_fill_a_block_is_left_out() -> None:
    labels = head((9, 12, 15))
    found, expected = (partial_volumes(x, [[3]], 2) for x in (labels, labels[:, :8, :, :14]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_label_is_what_fills_most_of_a_voxel() -> None:
    row = torch.tensor([[2, 2, 41], [2, 41, 41], [0, 0, 43], [0, 0, 4]])
    scan = Anatomyd(STRUCTURES, factor=1)({"label": row[None]})
    assert scan["label"][0].tolist() == [[1, 1, 2], [1, 2, 2], [0, 0, 3], [0, 0, 3]]
    blocks = torch.tensor([[2, 2, 4, 0, 41, 3], [2, 41, 43, 4, 3, 3]])
    assert Anatomyd(STRUCTURES, factor=2)({"label": blocks[None]})["label"][0].tolist() == [[1, 3, 0]]


@pytest.mark.parametrize("size", [(24, 30, 20), (32, 26)])
def test_undisturbed_it_shows_the_anatomy(size: tuple[int, ...]) -> None:
    pair, target = Synthesis(t1_probability=1.0, **STILL, **CLEAN)(batch(size, count=2))
    picture = paint(head(size))
    brain = torch.isin(head(size), torch.tensor([label for t in FREESURFER.values() if t.brain for label in t.labels]))
    assert pair.shape == (2, 2, *size)
    # one float32 rounding each: partial volumes, their product, the warp, the division by the brightest tissue
    torch.testing.assert_close(pair[:, :1], (picture / picture.max()).expand(2, 1, *size), rtol=0, atol=1e-5)
    fluid = FREESURFER["cerebrospinal fluid"].intensity
    expected = torch.where(brain, picture, fluid).expand(2, 1, *size)
    torch.testing.assert_close(target["moving"], expected, rtol=0, atol=1e-5)
    assert torch.equal(target["fixed_label"], batch(size, count=2)["fixed_label"])


@pytest.mark.parametrize("size", [(24, 30, 20), (32, 26)])
def test_images_look_like_prepared_scans(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for _ in range(5):
        pair, target = Synthesis()(batch(size, count=2))
        assert pair.dtype == torch.float32
        assert torch.isfinite(pair).all()
        assert pair.min() == 0
        assert 0.9 < pair.max() <= 1 + 1e-6  # a rounding of the power
        assert (pair == 0).float().mean() > 0.1  # background
        assert set(target) == {"moving", "fixed", "moving_label", "fixed_label"}
        assert not torch.equal(pair[0, 0], pair[1, 0])
        assert not torch.equal(target["moving"], target["fixed"])


def test_the_same_seed_draws_the_same() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Synthesis()(batch((20, 24, 18)))[0]

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_labels_and_pictures_are_deformed_together() -> None:
    torch.manual_seed(0)
    size = (32, 40, 36)
    _, target = Synthesis(t1_probability=1.0, deformation=2.0)(batch(size))
    for role in ("moving", "fixed"):
        white = (target[f"{role}_label"] == 1) | (target[f"{role}_label"] == 2)
        bright = target[role] > (0.86 + 0.57) / 2  # half way between white matter and what surrounds it
        overlap = 2 * (white & bright).sum() / (white.sum() + bright.sum())
        assert overlap > 0.95  # they differ at the border, where the picture is interpolated
        moved = batch(size)["moving_label"] != target[f"{role}_label"]
        assert moved.float().mean() > 0.01  # it was deformed at all


@pytest.mark.parametrize("size", [(24, 30, 20), (32, 26)])
def test_an_affine_change_is_one(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parts = torch.zeros(2, 1, *size)
    rigid = Synthesis(deformation=0.0, rotation=20.0, scaling=0.0, shift=3.0)._deform(parts)
    torch.testing.assert_close(  # differences of float32 coordinates up to 30
        jacobian_determinant(rigid), torch.ones(2, 1, *size), rtol=0, atol=1e-4
    )
    assert rigid.abs().max() > 1
    stretched = jacobian_determinant(Synthesis(deformation=0.0, rotation=0.0, scaling=0.1, shift=0.0)._deform(parts))
    assert stretched.std() < 1e-4
    assert 1e-3 < (stretched.mean() - 1).abs() < np.exp(0.1 * len(size)) - 1


@pytest.mark.parametrize("size", [(25, 31, 21), (33, 27)])
def test_turns_are_about_the_middle_and_as_large_as_asked(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dims, angles = len(size), []
    for _ in range(20):
        ddf = Synthesis(deformation=0.0, rotation=20.0, scaling=0.0, shift=0.0)._deform(torch.zeros(1, 1, *size))[0]
        torch.testing.assert_close(ddf[(slice(None), *(n // 2 for n in size))], torch.zeros(dims), rtol=0, atol=1e-5)
        corner = ddf[(slice(None), *[slice(2)] * dims)]
        slopes = [corner.diff(dim=axis + 1).flatten(1)[:, 0] for axis in range(dims)]
        matrix = (torch.eye(dims) + torch.stack(slopes, dim=1)).double()
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(dims).double(), rtol=0, atol=1e-5)
        angles.append(np.rad2deg(np.arccos((float(matrix.trace()) - dims + 2) / 2)))
    assert 15 < max(angles) < 20 * (dims * (dims - 1) / 2) ** 0.5  # about one axis, or about each of three


def test_a_deformation_does_not_fold() -> None:
    torch.manual_seed(0)
    ddf = Synthesis(deformation=2.0)._deform(torch.zeros(3, 1, 40, 36, 32))
    assert jacobian_determinant(ddf).min() > 0
    assert ddf.std() > 0.5


def test_the_strength_is_that_asked_for() -> None:
    torch.manual_seed(0)
    options = {**STILL, **CLEAN, "noise": 0.2}
    images = [Synthesis(t1_probability=1.0, **options)(batch((24, 24, 24)))[0] for _ in range(20)]
    still = Synthesis(t1_probability=1.0, **STILL, **CLEAN)(batch((24, 24, 24)))[0]
    outside = torch.stack(images)[:, :, :, paint(head((24, 24, 24)))[0] == 0]
    assert outside.max() < 1e-5  # none where the skull was stripped, but for the rounding of the mask's warp
    white = batch((24, 24, 24))["moving_label"] == 1
    spread = torch.stack([(image[:, :1] - still[:, :1])[white].std() for image in images])
    assert spread.max() < 0.25  # 0.2, enlarged where the brightest voxel is darker than 1
    assert 0.05 < spread.mean() < 0.12  # uniform between 0 and 0.2, cut off at 1


@pytest.mark.parametrize("size", [(21, 25, 23), (25, 29)])
@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.5])
def test_a_blur_is_as_wide_as_asked(size: tuple[int, ...], sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", torch.ones)  # the largest that may be drawn
    image = torch.ones(1, 1, *size)
    middle = [n // 2 for n in size]
    image[(0, 0, *middle)] = 0  # dark on bright: the brightest voxels, which are scaled to 1, stay as they are
    dent = 1 - Synthesis(**{**CLEAN, "blur": sigma})._spoil(image)[0, 0].double()
    assert float(dent.sum()) == pytest.approx(1, abs=1e-4)  # float32 of thousands of voxels
    for axis, (n, at) in enumerate(zip(size, middle, strict=True)):
        distance = torch.arange(n).double() - at
        profile = dent.sum([d for d in range(len(size)) if d != axis])
        assert float((profile * distance**2).sum()) == pytest.approx(sigma**2, rel=1e-3)


@pytest.mark.parametrize(("probability", "ordered"), [(1.0, True), (0.0, False)])
def test_contrast_is_that_of_t1_or_any(probability: float, ordered: bool) -> None:
    torch.manual_seed(0)
    pictures = batch((24, 24, 24))
    labels = pictures["moving_label"]
    order = []
    for _ in range(12):
        pair, _ = Synthesis(t1_probability=probability, **STILL, noise=0.0, bias=0.0)(pictures)
        for image in pair.split(1, dim=1):
            order.append(bool(image[labels == 1].mean() > image[labels == 3].mean()))  # white matter and ventricles
    assert all(order) == ordered
    assert any(order)


def test_the_clean_picture_is_that_of_t1_whatever_is_shown() -> None:
    torch.manual_seed(0)
    options = {**STILL, **CLEAN, "intensity_sd": 0.1}
    shown, clean = zip(*(Synthesis(t1_probability=p, **options)(batch((20, 24, 18))) for p in (0.0, 1.0)), strict=True)
    assert not torch.equal(*shown)
    _, undisturbed = Synthesis(t1_probability=1.0, **STILL, **CLEAN)(batch((20, 24, 18)))
    for target in clean:
        torch.testing.assert_close(target, undisturbed, rtol=0, atol=1e-5)


def test_tissues_vary_as_asked() -> None:
    torch.manual_seed(0)
    many = batch((16, 18, 14), count=60)
    pair, _ = Synthesis(t1_probability=1.0, **STILL, **{**CLEAN, "intensity_sd": 0.05})(many)
    cortex = pair[:, 0, (head((16, 18, 14)) == 3)[0]]
    torch.testing.assert_close(cortex.amin(1), cortex.amax(1), rtol=0, atol=1e-5)  # a tissue looks alike everywhere
    white, grey = FREESURFER["cerebral white matter"].intensity, FREESURFER["cerebral cortex"].intensity
    expected = 0.05 / white * (1 + (grey / white) ** 2) ** 0.5  # of cortex / white matter, which is brightest
    assert float(cortex[:, 0].std()) == pytest.approx(expected, rel=4 / (2 * 60) ** 0.5)  # 4 standard errors


def test_gamma_is_drawn_for_each_image() -> None:
    torch.manual_seed(0)
    many = batch((16, 18, 14), count=20)
    still, _ = Synthesis(t1_probability=1.0, **STILL, **CLEAN)(many)
    pair, _ = Synthesis(t1_probability=1.0, **STILL, **{**CLEAN, "gamma": 0.35})(many)
    exponents = (pair.log() / still.log())[:, :, head((16, 18, 14))[0] == 3]
    torch.testing.assert_close(exponents.amin(2), exponents.amax(2), rtol=1e-4, atol=0)
    found = exponents.amin(2).log()
    assert found.unique().numel() == found.numel()
    assert -0.36 < found.min() < -0.25
    assert 0.25 < found.max() < 0.36


@pytest.mark.parametrize(("probability", "same"), [(0.0, False), (1.0, True)])
def test_pairs_are_of_one_anatomy_as_often_as_asked(probability: float, same: bool) -> None:
    other = Anatomyd(STRUCTURES)({"label": head((20, 24, 16)).flip(1)})
    pair = {**batch((20, 24, 16)), "moving": other["image"][None], "moving_label": other["label"][None]}
    _, target = Synthesis(**STILL, **CLEAN, t1_probability=1.0, same_probability=probability)(pair)
    assert torch.equal(target["moving_label"], target["fixed_label"]) == same
    assert torch.equal(target["moving"], target["fixed"]) == same
    assert torch.equal(target["fixed_label"], pair["fixed_label"])


def test_an_image_that_shows_nothing_stays_dark() -> None:
    pair = batch((24, 30), count=2)
    pair["moving"] = pair["moving"] * torch.tensor([0, 1], dtype=torch.uint8).view(2, 1, 1, 1)
    images, _ = Synthesis(**CLEAN)(pair)
    assert images[0, 0].max() == 0
    assert images[1, 0].max() == 1


def test_both_images_are_mirrored_or_none() -> None:
    still = {**STILL, **CLEAN, "t1_probability": 1.0}
    plain, target = Synthesis(**still)(batch((20, 24, 18)))
    mirrored, flipped = Synthesis(**{**still, "flip_probability": 1.0})(batch((20, 24, 18)))
    # they may be scaled apart: the brightest percentile is taken from some of the voxels
    torch.testing.assert_close(mirrored / mirrored.max(), (plain / plain.max()).flip(2), rtol=1e-5, atol=1e-5)
    assert torch.equal(flipped["moving_label"], target["moving_label"].flip(2))


def test_the_skull_stays_if_asked_for() -> None:
    skull = head((24, 30, 20)) == 511
    for probability in (0.0, 1.0):
        pair, _ = Synthesis(t1_probability=1.0, skull_probability=probability, **STILL, **CLEAN)(batch((24, 30, 20)))
        assert bool((pair[0, :1][skull] > 0).all()) == (probability == 1)


def test_a_rim_and_the_fluid_are_kept_or_not() -> None:
    labels = head((24, 30, 20))
    fluid = labels == 24
    options: dict[str, Any] = {**STILL, **CLEAN, "t1_probability": 1.0}
    stripped = Synthesis(**{**options, "fluid_probability": 0.0})(batch((24, 30, 20)))[0][0, :1]
    assert (stripped[labels == 3] > 0).all()
    assert (stripped[fluid] > 0).float().mean() < 0.5
    assert (Synthesis(**options)(batch((24, 30, 20)))[0][0, :1][fluid] > 0).all()


@pytest.mark.parametrize("both_ways", [False, True])
def test_the_loss_judges_clean_pictures(both_ways: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    size = (8, 9, 7)
    target = {key: torch.rand(1, 1, *size, generator=generator) for key in ("moving", "fixed")}
    target |= {key: torch.randint(0, 3, (1, 1, *size), generator=generator) for key in ("moving_label", "fixed_label")}
    ddf, back = torch.randn(2, 1, 3, *size, generator=generator)
    shown = {"warped": torch.full((1, 1, *size), 9.0), "ddf": ddf}
    clean = {"warped": warp(target["moving"], ddf), "ddf": ddf}
    if both_ways:
        shown |= {"warped_fixed": torch.full((1, 1, *size), 9.0), "inverse_ddf": back}
        clean |= {"warped_fixed": warp(target["fixed"], back), "inverse_ddf": back}
    parts = MSELoss(), GradientLoss(), 1.0, LabelDiceLoss(num_labels=2)
    torch.testing.assert_close(SynthesisLoss(*parts)(shown, target), RegistrationLoss(*parts)(clean, target))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^t1_probability is 1\.5\. .*0 to 1"):
        Synthesis(t1_probability=1.5)
    with pytest.raises(ValueError, match=r"^noise is -1\. .*0 or more"):
        Synthesis(noise=-1)
    with pytest.raises(ValueError, match=r"^gamma is nan\. .*0 or more"):
        Synthesis(gamma=float("nan"))
    for name in ("deformation_knots", "bias_knots"):
        with pytest.raises(ValueError, match=rf"^{name} is 0\. .*1 or more"):
            Synthesis(**{name: 0})
        Synthesis(**{name: 1})(batch((8, 10, 9)))
    with pytest.raises(ValueError, match=r"^tissues \['bone'\] lack 'cerebrospinal fluid'"):
        Synthesis({"bone": FREESURFER["skull"]})


def test_labels_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"label map .*\[900\]"):
        Anatomyd({"nothing": [900]})({"label": head((8, 8, 8))})


WHOLE = {"skull_probability": 1.0, "lesion_probability": 0.0, "slice_probability": 0.0, "cut_probability": 0.0}
SAME = {**STILL, **CLEAN, **WHOLE, "texture": 0.0}  # nothing at random but the intensities
MIRROR = [[1, 2]]


def one_head(size: tuple[int, ...]) -> dict[str, Tensor]:
    scan = Anatomyd(STRUCTURES, tissues=HEAD)({"label": head(size)})
    return {key: scan[key][None] for key in ("image", "label")}


def draw(
    size: tuple[int, ...], of: tuple[int, ...] | None = None, seed: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return HeadSynthesis(size, MIRROR, **{**SAME, **options})(one_head(of or size))


def test_the_tissues_of_a_head_are_those_of_freesurfer_and_each_label_outside_the_brain() -> None:
    def labels(tissues: dict[str, Tissue], brain: bool) -> list[int]:
        return sorted(label for tissue in tissues.values() if tissue.brain == brain for label in tissue.labels)

    for brain in (True, False):
        assert labels(HEAD, brain) == labels(FREESURFER, brain)
    assert all(len(tissue.labels) == 1 for tissue in HEAD.values() if not tissue.brain)


@pytest.mark.parametrize("size", [(24, 30, 20), (32, 26)])
def test_a_head_at_rest_is_seen_around_its_middle(size: tuple[int, ...]) -> None:
    """Where a label is constant, so is the image; the middle of the view is that of the labels."""
    scan = one_head(size)
    view = tuple(n - 7 for n in size)
    image, label = draw(view, size)
    assert image.shape == label.shape == (1, 1, *view)
    assert label.dtype == torch.uint8
    known = scan["label"][0, 0] > 0
    middle = known.nonzero().float().mean(0) - (torch.tensor(size) - 1) / 2
    seen = (label[0, 0] > 0).nonzero().float().mean(0) - (torch.tensor(view) - 1) / 2
    assert float((seen).abs().max()) < 0.5  # it is cut to whole voxels
    assert float(middle.abs().max()) > 0.5  # the head lies off the middle of its map
    shares = {number: float((label == number).float().mean()) * np.prod(view) for number in (1, 2, 3)}
    for number, count in shares.items():
        assert count == pytest.approx(float((scan["label"] == number).sum()), rel=0.1)  # sampled between voxels


@pytest.mark.parametrize("size", [(24, 30, 20), (32, 26)])
def test_a_mirrored_head_has_its_sides_exchanged(size: tuple[int, ...]) -> None:
    """The same draw with and without the mirror: images are mirrored, and so are labels but for left and right."""
    (image, label), (mirrored, exchanged) = (draw(size, flip_probability=p) for p in (0.0, 1.0))
    # float32 coordinates from the other end, times the steepest edge of an image of values from 0 to 1
    torch.testing.assert_close(mirrored, image.flip(2), rtol=0, atol=1e-4)
    sides = torch.tensor([0, 2, 1, 3], dtype=torch.uint8)
    agree = exchanged == sides[label.flip(2).long()]
    assert agree.float().mean() > 0.98  # halves between two voxels may go either way
    assert not torch.equal(exchanged, label.flip(2))


def test_what_is_cut_off_is_neither_seen_nor_labelled() -> None:
    size = (24, 30, 20)
    image, label = draw(size)
    cut, rest = draw(size, cut_probability=1.0, cut=0.4, seed=0)
    gone = cut != image
    assert 0 < gone.float().mean() < 0.9
    assert bool((cut[gone] == 0).all())
    changed = rest != label
    assert bool((rest[changed] == 0).all())


def test_thick_slices_blur_one_axis_and_keep_the_mean() -> None:
    size = (24, 32, 40)
    image, _ = draw(size)
    for seed in range(6):
        torch.manual_seed(seed)
        thick = HeadSynthesis(size, slice_probability=1.0, thickness=4.0)._slices(image)
        assert thick.shape == image.shape
        rough, before = ([float(x.diff(dim=d).square().mean()) for d in (2, 3, 4)] for x in (thick, image))
        ratios = sorted(a / b for a, b in zip(rough, before, strict=True))
        assert ratios[0] < 0.95 * ratios[1]  # one axis more than the others
        assert float(thick.mean()) == pytest.approx(float(image.mean()), rel=0.05)


def test_lesions_lie_in_white_matter_and_leave_the_labels_alone() -> None:
    size = (40, 40, 40)
    image, label = draw(size)
    spotted, same = draw(size, lesion_probability=1.0)
    assert torch.equal(same, label)
    white = torch.nn.functional.max_pool3d(((label == 1) | (label == 2)).float(), 5, 1, 2) > 0  # and its rim
    scale = (spotted / image)[image > 0.01], white[image > 0.01]
    assert float(scale[0][~scale[1]].std()) < 1e-4  # the brightest lesion changes that of all, by one factor
    assert float(scale[0][scale[1]].std()) > 0.01


def test_without_skull_what_is_no_brain_is_dark() -> None:
    size = (40, 30, 36)
    whole, stripped = (draw(size, skull_probability=p)[0] for p in (1.0, 0.0))
    labels = head(size)
    for image, count in ((whole, (labels > 0).sum()), (stripped, ((labels > 0) & (labels != 511)).sum())):
        assert int((image > 0.01).sum()) == pytest.approx(int(count), rel=0.15)  # voxels of the rim are shared
    assert bool((whole[stripped > 0.01] > 0).all())


def test_all_at_random_it_stays_an_image_with_labels() -> None:
    size = (32, 24, 40)
    for seed in range(4):
        torch.manual_seed(seed)
        image, label = HeadSynthesis(size, MIRROR, rotation=180.0, scaling=0.2, shift=8.0)(one_head((30, 36, 28)))
        assert torch.isfinite(image).all()
        assert image.min() >= 0
        assert image.max() <= 1 + 1e-5
        assert set(label.unique().tolist()) <= {0, 1, 2, 3}
