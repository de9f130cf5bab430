import re
from inspect import signature

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.losses import LocalNormalizedCrossCorrelationLoss
from scipy.interpolate import BSpline
from scipy.ndimage import shift, uniform_filter
from torch.testing import assert_close

from voxelmorph_monai import loops, losses, switch
from voxelmorph_monai.blocks import warp
from voxelmorph_monai.losses import (
    BendingEnergyLoss,
    GradientLoss,
    KLLoss,
    LabelDiceLoss,
    LNCCLoss,
    MINDLoss,
    MSELoss,
    MutualInformationLoss,
    RegistrationLoss,
)

SIZES = [(6, 9), (5, 7, 4)]  # unequal, odd and even sides


@pytest.fixture(params=["loops", "torch"])
def _path(request, monkeypatch):
    """Compiled loops or torch's operators."""
    monkeypatch.setattr(switch, "enabled", request.param == "loops")


both_paths = pytest.mark.usefixtures("_path")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rand(*shape, **kwargs):
    return torch.rand(shape, dtype=torch.float64, **kwargs)


def gradcheck(function, *inputs):
    """Compare gradients with finite differences, along random directions: all of them would take a minute."""
    return torch.autograd.gradcheck(function, [x.detach().clone().requires_grad_() for x in inputs], fast_mode=True)


def linear_field(matrix, size):
    """``u(x) = matrix @ x``: component c changes by ``matrix[c, d]`` a voxel along axis d."""
    axes = [torch.arange(n, dtype=torch.float64) for n in size]
    return torch.einsum("cd,d...->c...", matrix, torch.stack(torch.meshgrid(*axes, indexing="ij")))[None]


def checkerboard(size):
    return (1 - 2.0 * (sum(np.indices(size)) % 2)).astype(float)


# ---------------------------------------------------------------------------------------------------------------------
# What all losses share
# ---------------------------------------------------------------------------------------------------------------------


def images(size):
    return rand(2, 1, *size), rand(2, 1, *size)


def fields(size):
    return (rand(2, len(size), *size),)


def distributions(size):
    return rand(2, len(size), *size), -rand(2, len(size), *size)


def labels(size):
    return torch.randint(4, (2, 1, *size)), torch.randint(4, (2, 1, *size)), rand(2, len(size), *size) - 0.5


LOSSES = [
    pytest.param(LNCCLoss(3), images, id="lncc"),
    pytest.param(MSELoss(0.1), images, id="mse"),
    pytest.param(MutualInformationLoss(8), images, id="mutual information"),
    pytest.param(MINDLoss(distance=1), images, id="mind"),
    pytest.param(GradientLoss("l2"), fields, id="gradient l2"),
    pytest.param(GradientLoss("l1"), fields, id="gradient l1"),
    pytest.param(BendingEnergyLoss(), fields, id="bending"),
    pytest.param(LabelDiceLoss(3), labels, id="dice"),
    pytest.param(KLLoss(), distributions, id="kl official"),
    pytest.param(KLLoss(mode="exact"), distributions, id="kl exact"),
]


def cast(inputs, dtype):
    return [x.to(dtype) if x.is_floating_point() else x for x in inputs]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("loss", "make"), LOSSES)
class TestEveryLoss:
    def test_is_the_mean_over_batch_items(self, loss, make, size):
        inputs = make(size)
        items = [loss(*(x[i : i + 1] for x in inputs)) for i in range(2)]
        value = loss(*inputs)
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert_close(value, (items[0] + items[1]) / 2)
        assert abs(items[0] - items[1]) > 1e-4  # or it would not matter which item counts

    def test_float32_agrees_with_float64(self, loss, make, size):
        inputs = make(size)
        value = loss(*cast(inputs, torch.float32))
        assert value.dtype == torch.float32
        assert_close(value.double(), loss(*inputs), rtol=1e-4, atol=1e-6)  # about 1e3 roundings of 6e-8

    def test_computes_bfloat16_in_float32_also_under_autocast(self, loss, make, size):
        inputs = cast(make(size), torch.bfloat16)
        expected = loss(*cast(inputs, torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(loss(*inputs), expected, rtol=0, atol=0)
        assert_close(loss(*inputs), expected, rtol=0, atol=0)

    def test_takes_metatensors_and_gives_a_plain_tensor(self, loss, make, size):
        inputs = make(size)
        value = loss(*(MetaTensor(x) for x in inputs))
        assert type(value) is torch.Tensor
        assert_close(value, loss(*inputs), rtol=0, atol=0)

    def test_gradient_is_that_of_the_value(self, loss, make, size):
        inputs = make(size)
        if isinstance(loss, MutualInformationLoss):  # its range counts as given: pin the extremes
            for x in inputs:
                x[:, :, 0, 0], x[:, :, 0, 1] = -0.1, 1.1
            inner = [x[:, :, 1:] for x in inputs]
            heads = [x[:, :, :1] for x in inputs]
            assert gradcheck(lambda *xs: loss(*(torch.cat(p, 2) for p in zip(heads, xs, strict=True))), *inner)
        else:
            tail = [x for x in inputs if x.is_floating_point()]
            head = [x for x in inputs if not x.is_floating_point()]
            assert gradcheck(lambda *xs: loss(*head, *xs), *tail)


@pytest.mark.parametrize(("loss", "make"), [p for p in LOSSES if p.id not in ("mutual information", "dice")])
def test_the_device_is_never_waited_for(loss, make):
    """The meta device has no values to wait for. Mutual information enters autocast, which it lacks; Dice checks."""
    inputs = [x.to("meta").requires_grad_() for x in make((5, 7, 4))]
    loss(*inputs).backward()
    assert all(x.grad.device.type == "meta" for x in inputs)


@pytest.mark.parametrize("loss", [LNCCLoss(), MSELoss(), MutualInformationLoss()])
@pytest.mark.parametrize("other", [(1, 1, 5, 7), (2, 1, 6, 7), (2, 1, 5)])
def test_images_of_different_shape_are_refused(loss, other):
    with pytest.raises(ValueError, match=r"warped and fixed .*\[2, 1, 5, 7\] and " + re.escape(str(list(other)))):
        loss(torch.zeros(2, 1, 5, 7), torch.zeros(other))


@pytest.mark.parametrize("loss", [LNCCLoss(), MSELoss(), MutualInformationLoss(), MINDLoss()])
def test_a_batch_of_none_has_no_loss(loss):
    none = torch.zeros(0, 1, 5, 7)
    with pytest.raises(ValueError, match=r"^warped and fixed of shape \[0, 1, 5, 7\] have no voxels"):
        loss(none, none)


@pytest.mark.parametrize(("loss", "make"), [p for p in LOSSES if p.values[1] is images])
def test_the_wider_of_two_types_counts(loss, make):
    exact = [x.float().double() for x in make((8, 9))]
    narrow = [x.float() for x in exact]
    for mixed in ((exact[0], narrow[1]), (narrow[0], exact[1])):
        assert_close(loss(*mixed), loss(*exact), rtol=0, atol=0)


@pytest.mark.parametrize("loss", [GradientLoss(), BendingEnergyLoss()])
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (1, 2, 5, 7, 4), (3, 5, 7)])
def test_what_is_no_field_is_refused(loss, shape):
    with pytest.raises(ValueError, match="^field has shape " + re.escape(str(list(shape)))):
        loss(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MSELoss", {"image_sigma": 0.02}),
        ("LNCCLoss", {"window": 7}),
        ("MutualInformationLoss", {"num_bins": 16}),
        ("MINDLoss", {"distance": 3, "radius": 2}),
        ("GradientLoss", {"penalty": "l1"}),
        ("BendingEnergyLoss", {}),
        ("LabelDiceLoss", {"num_labels": 4}),
        ("KLLoss", {"prior_lambda": 20.5, "mode": "exact"}),
    ],
)
def test_the_text_of_a_loss_names_its_parameters(name, options):
    loss = getattr(losses, name)
    assert str(loss(**options)) == f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
    assert signature(loss).parameters.keys() - {"args", "kwargs"} == options.keys()


def test_losses_of_other_parameters_have_other_texts():
    def text(sigma=0.02, penalty="l1", **weights):
        return str(RegistrationLoss(MSELoss(sigma), GradientLoss(penalty), **weights))

    others = [text(0.5), text(penalty="l2"), text(smoothness_weight=0.3), text(dice_weight=0.3), text(prior=KLLoss())]
    assert len({text(), *others}) == 6
    assert text(smoothness_weight=1) == text(smoothness_weight=1.0)  # as an option of the command line may be written
    loss = RegistrationLoss(MSELoss())
    assert str(loss.eval()) == str(loss.train())


# ---------------------------------------------------------------------------------------------------------------------
# Local normalised cross-correlation
# ---------------------------------------------------------------------------------------------------------------------


def window_statistics(a, b, window):
    """Sums of squares and products about the mean of every zero-padded window, by the definition."""
    dims = tuple(range(2, a.ndim))
    padding = [(0, 0), (0, 0)] + [(window // 2, window // 2)] * len(dims)
    views = [
        np.lib.stride_tricks.sliding_window_view(np.pad(x.numpy(), padding), [window] * len(dims), dims) for x in (a, b)
    ]
    inside = tuple(range(-len(dims), 0))
    da, db = (v - v.mean(inside, keepdims=True) for v in views)
    return (da * db).sum(inside), (da * da).sum(inside), (db * db).sum(inside)


@both_paths
@pytest.mark.parametrize("window", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("size", SIZES)
def test_lncc_is_its_definition(size, window):
    a, b = rand(2, 3, *size), rand(2, 3, *size)
    cross, var_a, var_b = window_statistics(a, b, window)
    assert_close(LNCCLoss(window)(a, b).item(), -(cross**2 / (var_a * var_b)).mean())
    official = -(cross**2 / (var_a * var_b + 1e-5)).mean()
    # The variances here are near 1/12 a voxel: 0.7 for 9 voxels, so that 1e-5 changes less than 1e-4.
    assert_close(LNCCLoss(window)(a, b).item(), official, rtol=1e-4, atol=0)


@both_paths
@pytest.mark.parametrize("contrast", [1, 3e-3, 1e-3])  # variances far above, around and below the floor of 1e-5
@pytest.mark.parametrize("size", [(13, 16), (10, 12, 9)])
def test_lncc_is_monai_s_in_float64(size, contrast):
    """Of images whose largest deviation from their mean is 1, as ours counts contrast."""
    inputs = [contrast * rand(2, 1, *size) for _ in range(2)]
    axes = tuple(range(2, 2 + len(size)))
    for x in inputs:
        x.flatten(2)[..., -1] = 1
        x /= (x - x.mean(axes, keepdim=True)).abs().amax(axes, keepdim=True)
        x.requires_grad_()
    ours = LNCCLoss()(*inputs)
    theirs = LocalNormalizedCrossCorrelationLoss(spatial_dims=len(size), kernel_size=9)(*inputs)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs))


@both_paths
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e10])
def test_lncc_does_not_depend_on_the_scale(scale):
    a, b = rand(2, 2, 13, 16).float().requires_grad_(), rand(2, 2, 13, 16).float()
    scaled = (scale * a).detach().requires_grad_()
    loss, same = LNCCLoss()(a, b), LNCCLoss()(scaled, -b / 7)
    assert_close(same, loss, rtol=1e-5, atol=0)  # roundings
    (expected,), (found,) = torch.autograd.grad(loss, a), torch.autograd.grad(same, scaled)
    assert_close(found * scale, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@both_paths
def test_lncc_of_nothing_is_nothing():
    nothing = torch.zeros(1, 1, 7, 8).requires_grad_()
    loss = LNCCLoss()(nothing, rand(1, 1, 7, 8).float())
    loss.backward()
    assert loss == 0
    assert nothing.grad.isfinite().all()


@both_paths
def test_lncc_gives_each_input_its_gradient_alone():
    a, b = rand(1, 2, 5, 6), rand(1, 2, 5, 6)
    both = torch.autograd.grad(LNCCLoss(3)(*(pair := [a.clone().requires_grad_(), b.clone().requires_grad_()])), pair)
    alone_a = a.clone().requires_grad_()
    alone_b = b.clone().requires_grad_()
    (2 * LNCCLoss(3)(alone_a, b)).backward()
    (3 * LNCCLoss(3)(a, alone_b)).backward()
    assert_close(alone_a.grad, 2 * both[0])
    assert_close(alone_b.grad, 3 * both[1])


@pytest.mark.parametrize("window", [-1, 0, 4, 7])
def test_box_sum_refuses_windows_without_a_middle_or_larger_than_the_image(window):
    with pytest.raises(ValueError, match=rf"^window is {window} voxels, .* shape \[2, 1, 9, 6\]\. "):
        losses.box_sum(torch.zeros(2, 1, 9, 6), window)
    assert losses.box_sum(torch.zeros(2, 1, 9, 6), 5).shape == (2, 1, 5, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slab", [1, 40, 70])  # voxels: ranges of one, and of uneven numbers of them
def test_lncc_does_not_depend_on_the_slabs(size, slab, monkeypatch):
    whole, cut, box = [rand(2, 2, *size, requires_grad=True) for _ in range(2)], [], losses.box_sum
    monkeypatch.setattr(switch, "enabled", False)
    value = LNCCLoss(5)(*whole)
    expected = torch.autograd.grad(value, whole)
    monkeypatch.setattr(losses, "box_sum", lambda image, window: cut.append(image.shape[2]) or box(image, window))
    monkeypatch.setattr(losses, "_SLAB_VOXELS", slab)
    assert_close(LNCCLoss(5)(*whole), value)
    assert max(cut) < size[0] + 4  # voxels with the margins of a window
    for found, right in zip(torch.autograd.grad(LNCCLoss(5)(*whole), whole), expected, strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("size", [(70, 61), (40, 5, 33), (3, 40, 2)])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_lncc_in_loops_is_that_of_torch(size, wanted, monkeypatch):
    """Where threads share the planes of windows that reach over them, in a batch of several channels."""
    monkeypatch.setattr(loops, "_FEW", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    pair = [rand(2, 2, *size).requires_grad_(each) for each in wanted]
    pair[0].data[0, :, :8] = 0  # a background, beside an image without one, which is lifted
    pair[1].data[1, :, :8] = 0.5  # no contrast
    leaves = [image for image in pair if image.requires_grad]
    results = []
    for enabled in (True, False):
        monkeypatch.setattr(switch, "enabled", enabled)
        value = LNCCLoss(5)(*pair)
        results.append((value, *(x * x.numel() for x in torch.autograd.grad(value, leaves))))
    torch.set_num_threads(threads)
    # float64: sums of 125 voxels lose 2 digits, the division by the smallest variance that counts, 1e-5, 5 more
    assert_close(results[0], results[1], rtol=0, atol=1e-9)


@both_paths
def test_lncc_saves_one_map_for_the_backward_pass():
    saved = []
    a, b = torch.rand(1, 1, 20, 21, 22, requires_grad=True), torch.rand(1, 1, 20, 21, 22)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        LNCCLoss()(a, b)
    assert sum(saved) == a.numel()


def noise(mean, deviation, size=(50, 40)):
    return (mean + deviation * torch.randn(1, 1, *size, dtype=torch.float64)).float()


def constant(value, size=(50, 40)):
    return torch.full((1, 1, *size), value)


def beside_nothing(image):
    return torch.cat([image, torch.zeros_like(image)], dim=2)


HALF = (25, 40)
HARD = {
    "0.9 ± 1e-3": lambda: noise(0.9, 1e-3),
    "200 ± 0.01": lambda: noise(200, 0.01),
    "1000 ± 1": lambda: noise(1e3, 1),
    "0 to 4000": lambda: noise(0, 1e3).abs(),
    "0.3": lambda: constant(0.3),
    "0": lambda: constant(0.0),
    "0.9 ± 1e-4 beside 0": lambda: beside_nothing(noise(0.9, 1e-4, HALF)),
    "200 ± 0.01 beside 0": lambda: beside_nothing(noise(200, 0.01, HALF)),
    "4000 ± 0.1 beside 0": lambda: beside_nothing(noise(4000, 0.1, HALF)),
    "123.4 beside 0": lambda: beside_nothing(constant(123.4, HALF)),
}


@both_paths
@pytest.mark.parametrize("second", ["200 ± 0.01", "0.3", "0.9 ± 1e-4 beside 0", "200 ± 0.01 beside 0"])
@pytest.mark.parametrize("first", HARD)
def test_lncc_of_hard_images_in_float32(first, second):
    a, b = HARD[first]().requires_grad_(), HARD[second]().requires_grad_()
    loss = LNCCLoss()(a, b)
    loss.backward()
    assert -1 <= loss <= 0
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()
    # Half of the windows at most have a contrast below 2e-3 of the intensity, which float32 does not see. Of such
    # noise 1 / 80 correlates by chance.
    assert_close(loss.double(), LNCCLoss()(a.double(), b.double()), rtol=0, atol=1 / 160)


@both_paths
@pytest.mark.parametrize(("mean", "deviation"), [(0.9, 1e-3), (200, 0.01), (1e3, 1)])
def test_lncc_sees_little_contrast_on_a_large_offset(mean, deviation):
    """Whole images, so that the centre takes the offset away: the same correlation and gradient as in float64."""
    a, b = noise(mean, deviation).requires_grad_(), noise(mean, deviation)
    exact = a.detach().double().requires_grad_()
    loss, reference = LNCCLoss()(a, b), LNCCLoss()(exact, b.double())
    assert_close(loss.double(), reference, rtol=1e-4, atol=0)
    loss.backward()
    reference.backward()
    assert_close(a.grad.double(), exact.grad, rtol=0, atol=1e-3 * float(exact.grad.abs().max()))


@both_paths
def test_lncc_centres_each_image_of_a_batch():
    images = [noise(0, 1), noise(1e4, 1)]
    apart = sum(LNCCLoss()(image, image.flip(2)) for image in images) / 2
    batch = torch.cat(images)
    assert_close(LNCCLoss()(batch, batch.flip(2)), apart, rtol=1e-5, atol=0)  # a few roundings
    assert_close(LNCCLoss()(batch.transpose(0, 1), batch.flip(2).transpose(0, 1)), apart, rtol=1e-5, atol=0)


@both_paths
def test_lncc_sees_one_percent_of_contrast_beside_nothing():
    """Here the centre is 0.5 off, but 0.01 is ten times what float32 cannot see: the windows must count in full.

    Rounding leaves 2 to 3 digits of a variance of 0.01**2 beside 0.5**2.
    """
    image = beside_nothing(noise(1, 0.01, HALF))
    assert_close(LNCCLoss()(image, image).double(), LNCCLoss()(image.double(), image.double()), rtol=5e-3, atol=0)


@both_paths
def test_lncc_of_an_image_with_itself_is_perfect_at_any_contrast():
    image = noise(0.5, 0.2)
    assert_close(LNCCLoss()(image, image), torch.tensor(-1.0))
    assert_close(LNCCLoss()(image, -4000 * image), torch.tensor(-1.0))


@both_paths
def test_lncc_pulls_nothing_in_an_empty_background():
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(2, 1, 1, 24, 20, 28)
    images[..., 8:16, 6:14, 10:18] = 0.5 + 0.1 * torch.rand(2, 1, 1, 8, 8, 8, generator=generator)
    warped, fixed = images[0].requires_grad_(), images[1]
    LNCCLoss(window=5)(warped, fixed).backward()
    far = F.max_pool3d((fixed > 0).float(), 9, stride=1, padding=4) == 0  # no window of theirs meets the block
    assert bool((warped.grad[far] == 0).all())
    assert float(warped.grad[~far].abs().max()) > 1e-5


@both_paths
def test_lncc_never_rounds_past_perfect():
    """Little contrast far from the centre: windows here round to 1.01 as easily as to 0.99."""
    for _ in range(5):
        image = torch.cat([noise(1, 0.004, (30, 40)), noise(-1, 0.004, (30, 40))], dim=2)
        assert LNCCLoss(5)(image, 3 * image) >= -1


@both_paths
@pytest.mark.parametrize("level", [0.7, 123.4, 4000.1])
def test_lncc_has_no_gradient_in_flat_windows(level):
    """Two constants side by side: between the steps rounding must not push voxels about."""
    a, b = (beside_nothing(constant(level * x, (30, 40))).requires_grad_() for x in (1, 3))
    (LNCCLoss()(a, b) * a.numel()).backward()
    for image in (a, b):
        flat = image.grad[:, :, 9:21, 9:31]  # no window around these voxels reaches a step
        # The gradient is in 1 / intensity: this change of the loss of one window is what moving by the step would do.
        assert (flat * level).abs().max() < 1e-2


@pytest.mark.parametrize("window", [-1, 0, 1, 8])
def test_lncc_refuses_windows_without_a_middle(window):
    with pytest.raises(ValueError, match=rf"^window is {window}\b"):
        LNCCLoss(window)(torch.zeros(1, 1, 5, 6), torch.zeros(1, 1, 5, 6))


# ---------------------------------------------------------------------------------------------------------------------
# Squared differences and mutual information
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_mse_is_in_units_of_the_noise(size):
    a, b = rand(2, 3, *size), rand(2, 3, *size)
    assert_close(MSELoss()(a, b).item(), ((a - b).numpy() ** 2).mean())
    assert_close(MSELoss(0.02)(a, a + 0.06), torch.tensor(9.0).double())


def mutual_information(a, b, num_bins):
    """Of two vectors: SciPy's B-splines in a histogram of all voxels and bins at once."""
    spline = BSpline.basis_element(np.arange(-2, 3), extrapolate=False)
    tables = []
    for x in (a, b):
        position = 1 + (num_bins - 3) * (x - x.min()) / (x.max() - x.min())
        tables.append(np.nan_to_num(spline(position[:, None] - np.arange(num_bins))))
    joint = tables[0].T @ tables[1] / len(a)
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return (joint[seen] * np.log(joint[seen] / independent[seen])).sum()


@pytest.mark.parametrize("num_bins", [4, 5, 16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_mutual_information_is_its_definition(size, num_bins):
    a, b = rand(2, 3, *size), rand(2, 3, *size)
    pairs = zip(a.flatten(0, 1).flatten(1).numpy(), b.flatten(0, 1).flatten(1).numpy(), strict=True)
    expected = -np.mean([mutual_information(x, y, num_bins) for x, y in pairs])
    assert_close(MutualInformationLoss(num_bins)(a, b).item(), expected)


def test_mutual_information_ignores_how_intensities_are_scaled():
    a, b = rand(1, 1, 20, 21), rand(1, 1, 20, 21)
    loss = MutualInformationLoss()
    assert_close(loss(1000 - 70 * a, 3 * b - 1), loss(a, b))
    assert_close(loss(b, a), loss(a, b))
    assert loss(a, a.square()) < 3 * loss(a, b)  # what depends on the other image tells more of it


def test_mutual_information_of_a_constant_image_is_nothing():
    a = rand(1, 1, 6, 7).float().requires_grad_()
    constant = torch.full((1, 1, 6, 7), 0.3, requires_grad=True)
    for pair in ((a, constant), (constant, a), (constant, constant)):
        loss = MutualInformationLoss()(*pair)
        loss.backward()
        assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)  # rounding of sums of 42 voxels
    assert a.grad.isfinite().all()
    assert constant.grad.isfinite().all()


def test_mutual_information_of_an_invalid_image_is_invalid():
    """It must not look for the bin of NaN: on a GPU that ends the process."""
    assert MutualInformationLoss()(torch.full((1, 1, 5, 6), torch.nan), torch.rand(1, 1, 5, 6)).isnan()


def test_mutual_information_does_not_depend_on_the_chunks(monkeypatch):
    inputs = [rand(1, 1, 9, 11, requires_grad=True) for _ in range(2)]
    whole = MutualInformationLoss()(*inputs)
    gradients = torch.autograd.grad(whole, inputs)
    monkeypatch.setattr(MutualInformationLoss, "chunk", 7)  # 14 chunks and a voxel
    parts = MutualInformationLoss()(*inputs)
    assert_close(parts, whole)
    assert_close(torch.autograd.grad(parts, inputs), gradients)


def test_mutual_information_saves_no_table_of_voxels_by_bins(monkeypatch):
    monkeypatch.setattr(MutualInformationLoss, "chunk", 1000)
    a, b = torch.rand(1, 1, 20, 20, 20, requires_grad=True), torch.rand(1, 1, 20, 20, 20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        MutualInformationLoss(64)(a, b)
    assert sum(saved) < 6 * a.numel()  # the images and their scaling, and a few histograms; a table has 64 * numel


def test_mutual_information_refuses_less_bins_than_a_spline_covers():
    with pytest.raises(ValueError, match=r"^num_bins is 3\b.* 4 or more"):
        MutualInformationLoss(3)(torch.zeros(1, 1, 5, 6), torch.zeros(1, 1, 5, 6))


@pytest.mark.parametrize("sigma", [0, -0.1, float("nan")])
def test_noise_of_no_size_is_refused(sigma):
    image = rand(1, 1, 5, 6)
    with pytest.raises(ValueError, match=rf"^image_sigma is {sigma}\. "):
        MSELoss(sigma)(image, image)


def self_similarity(image, distance, radius):
    """MIND-SSC written out with SciPy: the neighbours' patches, those a right angle apart, compared."""
    spatial_dims = image.ndim
    neighbours = [sign * distance * row for row in np.eye(spatial_dims) for sign in (1, -1)]
    found = []
    for i, a in enumerate(neighbours):
        for b in neighbours[i + 1 :]:
            if np.isclose(((a - b) ** 2).sum(), 2 * distance**2):
                moved = (shift(image, -offset, order=0, mode="nearest") for offset in (a, b))
                found.append(uniform_filter((next(moved) - next(moved)) ** 2, 2 * radius + 1, mode="nearest"))
    found = np.array(found) - np.min(found, axis=0)
    scale = found.mean(0)
    return np.exp(-found / scale.clip(scale.mean() / 1000, scale.mean() * 1000))


@pytest.mark.parametrize(("size", "channels"), [((14, 17), 4), ((9, 11, 8), 12)])
@pytest.mark.parametrize(("distance", "radius"), [(1, 1), (2, 1), (2, 0)])
def test_mind_is_the_self_similarity_of_its_paper(size, channels, distance, radius):
    image = rand(2, 1, *size)
    image[:, :, :4] = image[:, :, :4].round(decimals=1) * 1e-4  # so flat that the limits of the scale matter
    found = MINDLoss(distance, radius).descriptor(image)
    assert found.shape == (2, channels, *size)
    expected = np.stack([self_similarity(item[0].numpy(), distance, radius) for item in image])
    assert_close(found, torch.from_numpy(expected))


@pytest.mark.parametrize("size", SIZES)
def test_mind_does_not_know_contrast_but_place(size):
    image = rand(1, 1, *size)
    assert_close(MINDLoss()(image, 3 - 0.5 * image).item(), 0.0)
    assert MINDLoss()(image, image.roll(1, 2)) > 0.01
    flat = torch.full_like(image, 0.3).requires_grad_()
    loss = MINDLoss()(flat, torch.full_like(image, 7.0))
    loss.backward()
    assert loss == 0
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize(("distance", "radius"), [(0, 1), (1, -1)])
def test_mind_refuses(distance, radius):
    with pytest.raises(ValueError, match=rf"^distance is {distance} and radius is {radius}\b"):
        MINDLoss(distance, radius)(rand(1, 1, 5, 6), rand(1, 1, 5, 6))


# ---------------------------------------------------------------------------------------------------------------------
# Smoothness
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_a_linear_field_is_its_matrix(size):
    matrix = torch.randn(len(size), len(size), dtype=torch.float64)
    field = linear_field(matrix, size)
    assert_close(GradientLoss("l2")(field), matrix.square().mean())
    assert_close(GradientLoss("l1")(field), matrix.abs().mean())


@pytest.mark.parametrize("size", SIZES)
def test_gradient_averages_each_axis_before_the_axes(size):
    field = rand(2, len(size), *size)
    steps = [np.diff(field.numpy(), axis=axis) for axis in range(2, field.ndim)]
    assert_close(GradientLoss("l2")(field).item(), np.mean([np.mean(step**2) for step in steps]))
    assert_close(GradientLoss("l1")(field).item(), np.mean([np.mean(abs(step)) for step in steps]))


@pytest.mark.parametrize("size", SIZES)
def test_smoothness_sees_a_checkerboard(size):
    field = 0.9 * torch.from_numpy(checkerboard(size)).expand(1, len(size), *size)
    assert_close(GradientLoss("l2")(field).item(), 1.8**2)
    # Second differences are 4 * 0.9 everywhere: in D components, for D * D pairs of axes.
    assert_close(BendingEnergyLoss()(field).item(), len(size) ** 3 * 3.6**2)


def test_an_axis_of_one_voxel_adds_nothing():
    field = rand(2, 3, 5, 1, 7, requires_grad=True)
    steps = [np.diff(field.detach().numpy(), axis=axis) for axis in (2, 4)]
    assert_close(GradientLoss()(field).item(), sum(np.mean(step**2) for step in steps) / 3)
    (GradientLoss()(field) + BendingEnergyLoss()(field)).backward()
    assert field.grad.isfinite().all()


def test_gradient_refuses_an_unknown_penalty():
    with pytest.raises(ValueError, match=r"^penalty is 'l3'.*'l1' or 'l2'"):
        GradientLoss("l3")(torch.zeros(1, 2, 5, 6))


@pytest.mark.parametrize("size", SIZES)
def test_bending_of_a_quadratic_field_is_its_second_derivatives(size):
    d = len(size)
    hessians = torch.randn(d, d, d, dtype=torch.float64)
    hessians = hessians + hessians.mT
    x = linear_field(torch.eye(d, dtype=torch.float64), size)[0]
    quadratic = torch.einsum("cij,i...,j...->c...", hessians, x, x)[None] / 2
    affine = linear_field(torch.randn(d, d, dtype=torch.float64), size) + 5
    assert_close(BendingEnergyLoss()(quadratic + affine), hessians.square().sum())


# ---------------------------------------------------------------------------------------------------------------------
# Overlap of labels
# ---------------------------------------------------------------------------------------------------------------------


def one_hot_dice(moving, fixed, ddf, num_labels):
    def one_hot(label):
        return F.one_hot(label[:, 0], num_labels + 1).movedim(-1, 1).double()

    a, b = warp(one_hot(moving), ddf)[:, 1:].flatten(2), one_hot(fixed)[:, 1:].flatten(2)
    present = ((one_hot(moving) + one_hot(fixed))[:, 1:].flatten(2).sum(2) > 0).double()
    dice = 2 * (a * b).sum(2) / (a.sum(2) + b.sum(2)).clamp_min(1e-9)
    return -((dice * present).sum(1) / present.sum(1)).mean()


@pytest.mark.parametrize(
    "num_labels", [5, 9]
)  # one item has 1, 2; the other 2 to 4 against 3 to 5; the rest is nowhere
@pytest.mark.parametrize("size", SIZES)
def test_dice_is_that_of_warped_one_hot_images(size, num_labels):
    moving = torch.stack([torch.randint(3, (1, *size)), torch.randint(2, 5, (1, *size))])
    fixed = torch.stack([torch.randint(3, (1, *size)), torch.randint(3, 6, (1, *size))])
    ddf = (3 * (rand(2, len(size), *size) - 0.5)).requires_grad_()  # past the border, too
    ours, reference = LabelDiceLoss(num_labels)(moving, fixed, ddf), one_hot_dice(moving, fixed, ddf, num_labels)
    assert_close(ours, reference)
    assert_close(torch.autograd.grad(ours, ddf), torch.autograd.grad(reference, ddf))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_dice_of_equal_maps_is_perfect(size, dtype):
    label = torch.randint(4, (2, 1, *size)).to(dtype)
    assert_close(LabelDiceLoss(200)(label, label, torch.zeros(2, len(size), *size)), torch.tensor(-1.0))


def test_dice_of_labels_out_of_sight_or_absent():
    moving = torch.zeros(1, 1, 6, 7, dtype=torch.int64)
    moving[..., 0] = 3
    fixed = torch.zeros_like(moving)
    ddf = torch.zeros(1, 2, 6, 7)
    ddf[:, 1] = 2
    ddf.requires_grad_()
    for maps in ((moving, fixed), (fixed, fixed)):  # warped out of sight; none at all
        loss = LabelDiceLoss(3)(*maps, ddf)
        loss.backward()
        assert loss == 0
        assert ddf.grad.isfinite().all()


def test_dice_counts_many_voxels_in_float32():
    """One running sum of a million shares in float32 would be off by 1e-4."""
    moving, fixed = torch.randint(2, (2, 1, 1, 1000, 1100))
    ddf = (rand(1, 2, 1, 1) - 0.5).expand(1, 2, 1000, 1100)
    exact = LabelDiceLoss(1)(moving, fixed, ddf)
    assert_close(LabelDiceLoss(1)(moving, fixed, ddf.float()).double(), exact, rtol=2e-6, atol=0)  # 30 roundings


def test_dice_refuses_what_are_no_labels():
    good, ddf = torch.ones(1, 1, 5, 6, dtype=torch.int64), torch.zeros(1, 2, 5, 6)
    for bad, got in ((good * 4, "1 to 4"), (good * -2, "-2 to 1")):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match=f"labels from {got}, but num_labels is 3"):
                LabelDiceLoss(3)(*pair, ddf)
    with pytest.raises(TypeError, match=r"^fixed_label .*torch.float32"):
        LabelDiceLoss(3)(good, good.float(), ddf)
    for maps in ((good[..., 1:], good), (good, good.expand(1, 2, 5, 6))):
        with pytest.raises(ValueError, match=r"_label .* ddf of shape \[1, 2, 5, 6\] needs \[1, 1, 5, 6\]"):
            LabelDiceLoss(3)(*maps, ddf)
    with pytest.raises(ValueError, match=r"^ddf has shape \[1, 3, 5, 6\]"):
        LabelDiceLoss(3)(good, good, torch.zeros(1, 3, 5, 6))


# ---------------------------------------------------------------------------------------------------------------------
# Prior of the probabilistic model
# ---------------------------------------------------------------------------------------------------------------------


def laplacian(size):
    """Dense matrix: number of face neighbours on the diagonal, -1 for each neighbour."""
    points = list(np.ndindex(*size))
    adjacency = np.array([[sum(abs(a - b) for a, b in zip(p, q, strict=True)) == 1 for q in points] for p in points])
    return np.diag(adjacency.sum(1)) - adjacency.astype(float)


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 4), (1, 5)])
@pytest.mark.parametrize("prior_lambda", [1.0, 25.0])
def test_kl_exact_is_the_divergence_from_the_dense_prior(size, prior_lambda):
    """Against the textbook formula, with constant fields (which the prior ignores) taken out of its determinant."""
    precision = prior_lambda * laplacian(size)
    eigenvalues = np.linalg.eigvalsh(precision)[1:]
    mean, log_variance = rand(2, len(size), *size) - 0.5, -2 * rand(2, len(size), *size)
    total = 0.0
    for mu, ls in zip(
        mean.flatten(0, 1).flatten(1).numpy(), log_variance.flatten(0, 1).flatten(1).numpy(), strict=True
    ):
        trace, log_det = np.trace(precision @ np.diag(np.exp(ls))), np.linalg.slogdet(np.diag(np.exp(ls)))[1]
        total += (trace + mu @ precision @ mu - log_det - len(mu) - np.log(eigenvalues).sum()) / 2
    voxels = np.prod(size)
    constant = -len(size) * (voxels + np.log(eigenvalues).sum()) / 2 / voxels
    loss = KLLoss(prior_lambda, mode="exact")(mean, log_variance)
    assert_close(loss.item() + constant, total / 2 / voxels)


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("prior_lambda", [1.0, 25.0])
def test_kl_official_is_the_official_formula(size, prior_lambda):
    d = len(size)
    degree = np.diag(laplacian(size)).reshape(size)
    mean, log_variance = rand(2, d, *size) - 0.5, -2 * rand(2, d, *size)
    sigma_term = (prior_lambda * degree * np.exp(log_variance.numpy()) - log_variance.numpy()).mean()
    steps = [np.diff(mean.numpy(), axis=axis) for axis in range(2, d + 2)]
    precision_term = prior_lambda * 0.5 * sum((step**2).mean() for step in steps) / d
    assert_close(KLLoss(prior_lambda)(mean, log_variance).item(), 0.5 * d * (sigma_term + precision_term))


@pytest.mark.parametrize("size", [(60, 80), (20, 30, 40)])
def test_kl_modes_differ_by_the_number_of_neighbours(size):
    """Far from the border: the official precision term is ``2 * D`` times smaller, the rest the same."""
    d = len(size)
    log_variance = torch.zeros(1, d, *size, dtype=torch.float64)
    field = linear_field(torch.randn(d, d, dtype=torch.float64), size)
    terms = [KLLoss(1, m)(field, log_variance) - KLLoss(1, m)(0 * field, log_variance) for m in ("exact", "official")]
    assert_close(terms[0] / terms[1], torch.tensor(2.0 * d).double(), rtol=0.05, atol=0)  # 1 of 20 has no neighbour
    assert_close(KLLoss(1, "exact")(0 * field, log_variance), KLLoss(1)(0 * field, log_variance))


def test_kl_is_least_where_the_posterior_is_the_conditional_prior():
    """Without a mean, the best variance of a voxel is 1 / (lambda * neighbours): there the gradient vanishes."""
    size, prior_lambda = (4, 5), 10.0
    degree = np.diag(laplacian(size)).reshape(size)
    log_variance = torch.from_numpy(-np.log(prior_lambda * degree)).expand(1, 2, *size).clone().requires_grad_()
    KLLoss(prior_lambda)(torch.zeros_like(log_variance), log_variance).backward()
    assert_close(log_variance.grad, torch.zeros_like(log_variance))


def test_kl_refuses_what_it_does_not_know():
    field = torch.zeros(1, 2, 5, 6)
    with pytest.raises(ValueError, match=r"^mode is 'true'.*'official' or 'exact'"):
        KLLoss(mode="true")(field, field)
    with pytest.raises(ValueError, match=r"^mean and log_variance .*\[1, 2, 5, 6\] and \[1, 2, 5, 5\]"):
        KLLoss()(field, field[..., 1:])
    with pytest.raises(ValueError, match=r"^mean has shape \[1, 1, 5, 6\]"):
        KLLoss()(field[:, :1], field[:, :1])


# ---------------------------------------------------------------------------------------------------------------------
# All together
# ---------------------------------------------------------------------------------------------------------------------


def prediction(*keys):
    shapes = {"warped": 1, "warped_fixed": 1}
    return {key: rand(2, shapes.get(key, 2), 6, 7) for key in keys}


def target():
    made = {"moving": rand(2, 1, 6, 7), "fixed": rand(2, 1, 6, 7)}
    return made | {f"{key}_label": torch.randint(4, (2, 1, 6, 7)) for key in made}


PARTS = {"similarity": MSELoss(0.3), "smoothness": GradientLoss(), "dice": LabelDiceLoss(3), "prior": KLLoss()}
WEIGHTED = RegistrationLoss(**PARTS, smoothness_weight=0.25, dice_weight=3)


def test_registration_one_way():
    p, t = prediction("warped", "ddf", "dvf", "log_variance"), target()
    terms = WEIGHTED.terms(p, t)
    assert list(terms) == ["similarity", "smoothness", "dice", "prior"]
    assert_close(terms["similarity"], PARTS["similarity"](p["warped"], t["fixed"]))
    assert_close(terms["smoothness"], 0.25 * PARTS["smoothness"](p["dvf"]))
    assert_close(terms["dice"], 3 * PARTS["dice"](t["moving_label"], t["fixed_label"], p["ddf"]))
    assert_close(terms["prior"], PARTS["prior"](p["dvf"], p["log_variance"]))
    assert_close(WEIGHTED(p, t), sum(terms.values()))


def test_registration_both_ways_is_the_mean_of_the_ways():
    p, t = prediction("warped", "ddf", "dvf", "log_variance", "warped_fixed", "inverse_ddf"), target()
    back = p | {"warped": p["warped_fixed"], "ddf": p["inverse_ddf"]}
    swapped = {"moving": t["fixed"], "fixed": t["moving"]}
    swapped |= {"moving_label": t["fixed_label"], "fixed_label": t["moving_label"]}
    for way in (back, p_alone := dict(p)):
        del way["warped_fixed"], way["inverse_ddf"]
    assert_close(WEIGHTED(p, t), (WEIGHTED(p_alone, t) + WEIGHTED(back, swapped)) / 2)


def test_registration_of_a_displacement_network_smooths_the_ddf():
    p, t = prediction("warped", "ddf"), target()
    loss = RegistrationLoss(MSELoss(), BendingEnergyLoss(), 0.5)
    assert list(loss.terms(p, t)) == ["similarity", "smoothness"]
    assert_close(loss(p, t), MSELoss()(p["warped"], t["fixed"]) + 0.5 * BendingEnergyLoss()(p["ddf"]))
    assert_close(RegistrationLoss(MSELoss())(p, t), MSELoss()(p["warped"], t["fixed"]))


def test_registration_gives_plain_tensors_and_trains_all_that_is_predicted():
    p = {key: x.requires_grad_() for key, x in prediction("warped", "ddf", "dvf", "log_variance").items()}
    t = {key: MetaTensor(x) for key, x in target().items()}
    similarity = torch.nn.MSELoss()  # any function of two images will do
    loss = RegistrationLoss(similarity, GradientLoss(), 1.0, LabelDiceLoss(3), 1.0, KLLoss())
    assert all(type(term) is torch.Tensor for term in loss.terms(p, t).values())
    loss(p, t).backward()
    assert all(x.grad.abs().sum() > 0 for x in p.values())


@pytest.mark.parametrize(
    ("missing", "term", "where"),
    [
        ("warped", "similarity", "prediction"),
        ("ddf", "dice", "prediction"),
        ("inverse_ddf", "dice", "prediction"),
        ("dvf", "prior", "prediction"),
        ("log_variance", "prior", "prediction"),
        ("fixed", "similarity", "target"),
        ("moving", "similarity", "target"),
        ("moving_label", "dice", "target"),
        ("fixed_label", "dice", "target"),
    ],
)
def test_registration_names_what_a_term_misses(missing, term, where):
    p, t = prediction("warped", "ddf", "dvf", "log_variance", "warped_fixed", "inverse_ddf"), target()
    values = p if where == "prediction" else t
    del values[missing]
    with pytest.raises(ValueError, match=f"{where} has no '{missing}', .*{term}.*\\['"):
        WEIGHTED(p, t)


def test_smoothness_needs_a_field():
    with pytest.raises(ValueError, match=r"prediction has no 'ddf', .*smoothness.*\['warped'\]"):
        RegistrationLoss(MSELoss(), GradientLoss())(prediction("warped"), target())


def test_a_predicted_weight_trades_similarity_for_smoothness():
    generator = torch.Generator().manual_seed(0)
    warped, fixed, moving = torch.rand(3, 2, 1, 6, 7, generator=generator).unbind()
    ddf = torch.rand(2, 2, 6, 7, generator=generator)
    loss = RegistrationLoss(MSELoss(), GradientLoss(), smoothness_weight=100)
    prediction = {"warped": warped, "ddf": ddf, "smoothness_weight": torch.tensor(0.3)}
    terms = loss.terms(prediction, {"moving": moving, "fixed": fixed})
    torch.testing.assert_close(terms["similarity"], 0.7 * MSELoss()(warped, fixed))
    torch.testing.assert_close(terms["smoothness"], 0.3 * GradientLoss()(ddf))
