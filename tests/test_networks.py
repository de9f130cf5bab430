"""The networks: against an own forward pass in NumPy, MONAI's network, the published sizes, and their laws."""

import io
import os
import re
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import VoxelMorphUNet
from scipy.ndimage import convolve1d, gaussian_filter, map_coordinates
from torch import nn
from torch.testing import assert_close

from voxelmorph_monai import networks
from voxelmorph_monai.blocks import compose, integrate, resize, warp
from voxelmorph_monai.losses import GradientLoss, MSELoss, RegistrationLoss
from voxelmorph_monai.metrics import dice
from voxelmorph_monai.networks import PRESETS, Registration, VoxelMorph, load_weights, read_state

pytestmark = pytest.mark.usefixtures("one_thread")
presets = pytest.mark.parametrize("preset", PRESETS)
sizes = pytest.mark.parametrize("size", [(17, 35), (9, 21, 18)])
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64 through a dozen convolutions with other orders of summation


def random_pair(size, seed=0, batch=2, dtype=torch.float64):
    return torch.rand(batch, 2, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(preset, spatial_dims, flow=0.02, log_variance=-4.0, **changes):
    """Network in float64 whose heads and biases are far from their initial zeros, as after a training."""
    network = VoxelMorph(preset, spatial_dims, **changes).double()
    generator = torch.Generator().manual_seed(1)
    for name, weight in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.1, generator=generator)
    nn.init.normal_(network.flow.weight, std=flow, generator=generator)
    if network.log_variance is not None:
        nn.init.normal_(network.log_variance.weight, std=flow, generator=generator)
        nn.init.constant_(network.log_variance.bias, log_variance)
    return network.eval()


# What was published

CHANNELS = {  # every convolution in order, in and out, the heads last
    "vm1": "2 16, 16 32, 32 32, 32 32, 32 32, 64 32, 64 32, 48 32, 32 8, 10 8, 8 3",
    "vm2": "2 16, 16 32, 32 32, 32 32, 32 32, 64 32, 64 32, 48 32, 32 32, 34 16, 16 16, 16 3",
    "dense": "2 16, 16 32, 32 32, 32 32, 32 32, 64 32, 64 32, 64 32, 48 32, 32 16, 16 16, 16 3",
    "diffeomorphic": "2 16, 16 32, 32 32, 32 32, 32 32, 64 32, 64 32, 48 32, 32 16, 16 3, 16 3",
}


@pytest.mark.parametrize(
    ("preset", "count"), [("vm1", 259_675), ("vm2", 300_547), ("dense", 327_331), ("diffeomorphic", 266_374)]
)
def test_parameters_are_the_published_ones(preset, count):
    network = VoxelMorph(preset)
    assert sum(p.numel() for p in network.parameters()) == count
    kernels = [p for p in network.parameters() if p.ndim == 5]
    assert ", ".join(f"{k.shape[1]} {k.shape[0]}" for k in kernels) == CHANNELS[preset]
    assert all(k.shape[2:] == (3, 3, 3) for k in kernels)


@presets
def test_weights_start_as_published(preset):
    torch.manual_seed(0)  # each SD is within its interval but for 1 draw in 16,000
    network = VoxelMorph(preset)
    flow, n = network.flow.weight.detach(), network.flow.weight.numel()
    assert float(flow.std()) == pytest.approx(1e-5, rel=4 / (2 * n) ** 0.5)  # 4 standard errors of an SD of n numbers
    assert float(flow.mean()) == pytest.approx(0, abs=4e-5 / n**0.5)
    assert not network.flow.bias.any()
    if network.log_variance is not None:
        assert (network.log_variance.bias == -10).all()
        assert float(network.log_variance.weight.detach().std()) == pytest.approx(1e-10, rel=4 / (2 * n) ** 0.5)
    for convolution in (m for m in network.unet.modules() if isinstance(m, nn.Conv3d)):
        n = convolution.weight.numel()
        expected = (2 / (27 * convolution.in_channels)) ** 0.5  # He et al., ICCV 2015
        assert float(convolution.weight.detach().std()) == pytest.approx(expected, rel=4 / (2 * n) ** 0.5)
        assert not convolution.bias.any()
    ddf = network(random_pair((16, 20, 18), dtype=torch.float32))
    assert 0 < ddf.abs().max() < 0.01  # the features of an image in [0, 1] are about 1, and 432 of them meet 1e-5


def test_same_seed_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return VoxelMorph("vm1", 2).state_dict()

    assert_close(weights(3), weights(3), rtol=0, atol=0)
    assert not torch.equal(weights(3)["flow.weight"], weights(4)["flow.weight"])


# Against other implementations


def keras_convolution(x, weight, bias, stride=1):
    """Convolve ``x`` ``(C, *spatial)`` as Keras does with padding="same": of an odd padding the more comes after."""
    padding = [(0, 0)]
    for n in x.shape[1:]:
        total = max((-(-n // stride) - 1) * stride + 3 - n, 0)
        padding.append((total // 2, total - total // 2))
    x, size = np.pad(x, padding), [-(-n // stride) for n in x.shape[1:]]
    out = np.zeros((len(weight), *size))
    for offset in product(range(3), repeat=len(size)):
        part = x[(slice(None), *[slice(o, o + stride * n, stride) for o, n in zip(offset, size, strict=True)])]
        out += np.tensordot(weight[(slice(None), slice(None), *offset)], part, axes=1)
    return out + bias.reshape(-1, *[1] * len(size))


def keras_flow(preset, state, pair):
    """Output of the ``flow`` head of the authors' networks of CVPR and MICCAI 2018, for one pair ``(2, *spatial)``."""
    arrays = [array.numpy() for array in state.values()]
    layers = list(zip(arrays[::2], arrays[1::2], strict=True))

    def convolve(x, stride=1):
        x = keras_convolution(x, *layers.pop(0), stride)
        return np.where(x > 0, x, 0.2 * x)

    def up(x, skip):
        for axis in range(1, x.ndim):
            x = x.repeat(2, axis)
        return np.concatenate([x, skip])

    x0 = pair
    x1 = convolve(x0, 2)
    x2 = convolve(x1, 2)
    x3 = convolve(x2, 2)
    y = convolve(convolve(x3, 2))
    y = convolve(up(y, x3))
    y = convolve(up(y, x2))
    y = convolve(convolve(up(y, x1)))
    if preset == "vm2":
        y = convolve(convolve(up(y, x0)))
    return keras_convolution(y, *layers.pop(0))


@pytest.mark.parametrize("preset", ["vm2", "diffeomorphic"])
@pytest.mark.parametrize("size", [(16, 48), (16, 32, 16)])
def test_forward_is_that_of_keras(preset, size):
    network, pair = trained(preset, len(size)), random_pair(size)
    expected = [keras_flow(preset, network.state_dict(), item) for item in pair.numpy()]
    with torch.no_grad():
        mean, _ = network.fields(network.features(network.coarse(pair)))
    assert_close(mean, torch.tensor(np.stack(expected)), **EXACT)


def test_dense_is_the_network_of_monai():
    network, pair = trained("dense", 2, num_steps=0, integration_level=0), random_pair((48, 32))
    theirs = VoxelMorphUNet(2, 2, 32, channels=(16, *[32] * 7), final_conv_channels=(16, 16)).double()
    state = list(network.state_dict().items())
    for i, (name, weight) in enumerate(state):
        if name.startswith("unet.decoder") and ".0.conv.weight" in name and not name.startswith("unet.decoder.0"):
            state[i] = (name, torch.cat([weight[:, 32:], weight[:, :32]], dim=1))  # [up, skip] to [skip, up]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), (weight for _, weight in state), strict=True)))
    assert_close(network(pair), theirs(pair), **EXACT)


# Laws


@presets
@sizes
def test_any_size_is_padded_with_its_border_and_cut(preset, size):
    torch.manual_seed(0)  # of the weights, on which the displacement depends
    network, pair = trained(preset, len(size)), random_pair(size)
    padded = np.pad(pair, [(0, 0), (0, 0), *[(0, -n % 16) for n in size]], mode="edge")
    with torch.no_grad():
        ddf, whole = network(pair), network(torch.from_numpy(padded))
    assert ddf.shape == (2, len(size), *size)
    assert ddf.is_contiguous()
    assert ddf.abs().max() > 0.1
    assert_close(ddf, whole[(slice(None), slice(None), *map(slice, size))], **EXACT)


@pytest.mark.parametrize(("preset", "level"), [("vm1", 0), ("vm2", 0), ("dense", 1), ("diffeomorphic", 1)])
@pytest.mark.parametrize("size", [(32, 48), (16, 16, 32)])
def test_field_is_the_integrated_velocity(preset, level, size):
    network, pair = trained(preset, len(size)), random_pair(size)
    features = network.features(network.coarse(pair))
    head = network.flow(features)
    mean, log_variance = network.fields(features)
    grid = [n // 2**level for n in size]
    assert_close(mean, resize(head, grid), **EXACT)
    assert (log_variance is None) == (preset != "diffeomorphic")
    if log_variance is not None:
        assert_close(log_variance, network.log_variance(features), **EXACT)
    steps = 7 if level else 0
    assert_close(network(pair), resize(integrate(resize(head, grid), steps), list(size)), **EXACT)


@pytest.mark.parametrize("scale_by_two", [False, True])
@sizes
def test_vectors_grow_by_2_a_level_or_by_the_ratio_of_lengths(size, scale_by_two):
    network = VoxelMorph("dense", len(size), num_steps=0, integration_level=2, scale_by_two=scale_by_two).double()
    size = [-(-n // 16) * 16 for n in size]
    lengths = [4.0 if scale_by_two else (n - 1) / (n // 4 - 1) for n in size]
    found = network.displacement(torch.ones(1, len(size), *(n // 4 for n in size), dtype=torch.float64))
    for component, length in zip(found[0], lengths, strict=True):
        assert_close(component, torch.full_like(component, length), **EXACT)
    nn.init.ones_(network.flow.bias)  # and smaller from the features' full grid to that of integration
    nn.init.zeros_(network.flow.weight)
    mean, _ = network.fields(torch.zeros(1, network.unet.out_channels, *size, dtype=torch.float64))
    for component, length in zip(mean[0], lengths, strict=True):
        assert_close(component, torch.full_like(component, 1 / length), **EXACT)


@pytest.mark.parametrize(("padding_mode", "last"), [("border", 2.0), ("zeros", 1.0)])
def test_a_velocity_goes_on_or_ends_at_the_border(padding_mode, last):
    network = VoxelMorph("dense", 2, num_steps=1, integration_level=0, padding_mode=padding_mode).double()
    velocity = torch.zeros(1, 2, 16, 16, dtype=torch.float64)
    velocity[:, 0] = 2.0  # half of it, and half of it again where that ends
    expected = velocity.clone()
    expected[:, 0, -1] = last
    assert_close(network.displacement(velocity), expected, **EXACT)


def test_changes_replace_fields_of_the_preset():
    network, pair = trained("dense", 2, num_steps=3, integration_level=0), random_pair((32, 16))
    assert_close(network(pair), integrate(network.flow(network.features(network.coarse(pair))), 3), **EXACT)
    assert len(VoxelMorph("vm1", 2, encoder=(4, 4), decoder=((4,), (4,), (4,))).unet.encoder) == 2


@presets
def test_every_parameter_learns_from_one_forward(preset):
    registration = Registration(VoxelMorph(preset, 2), amp=False)
    found = registration(random_pair((32, 48), dtype=torch.float32))
    sum(value.square().sum() for value in found.values()).backward()
    assert [name for name, p in registration.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_several_channels():
    pair = random_pair((20, 18)).repeat_interleave(2, dim=1)
    found = Registration(trained("vm1", 2, in_channels=4))(pair)
    assert_close(found["warped"], warp(pair[:, :2], found["ddf"]), rtol=0, atol=0)


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\..*` is (deprecated|not supported):DeprecationWarning")  # in torch
# vm1 has the branches of vm2, miccai2018 those of diffeomorphic with what vxmdense doubles.
@pytest.mark.parametrize("preset", ["vm2", "dense", "vxmdense", "diffeomorphic", "wide"])
def test_scripted_is_eager(preset):
    network = trained(preset, 3).float()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in [(16, 17, 20), (23, 16, 9)]:
        pair = random_pair(size, dtype=torch.float32)
        with torch.no_grad():
            # two orders of summation in float32 (eps 1e-7), enlarged by 7 squarings of a field that is not smooth
            assert_close(scripted(pair), network(pair), rtol=1e-4, atol=1e-4)


def test_weights_survive_a_file(tmp_path):
    network, pair = trained("diffeomorphic", 3), random_pair((16, 9, 20))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    other = VoxelMorph("diffeomorphic").double()
    load_weights(other, str(tmp_path / "model.pt"))
    assert_close(other(pair), network(pair), rtol=0, atol=0)


# Registration


@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        ("vm1", {"ddf", "warped"}),
        ("vm2", {"ddf", "warped"}),
        ("dense", {"ddf", "warped", "dvf"}),
        ("diffeomorphic", {"ddf", "warped", "dvf", "log_variance"}),
    ],
)
@sizes
def test_registration_names_its_results(preset, keys, size):
    network, pair = trained(preset, len(size)), random_pair(size)
    found = Registration(network).eval()(pair)
    assert found.keys() == keys
    assert_close(found["ddf"], network(pair), rtol=0, atol=0)
    assert_close(found["warped"], warp(pair[:, :1], found["ddf"]), rtol=0, atol=0)
    mean, log_variance = network.fields(network.features(network.coarse(pair)))
    if "dvf" in keys:
        assert_close(found["dvf"], mean, rtol=0, atol=0)
    if "log_variance" in keys:
        assert_close(found["log_variance"], log_variance, rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["dense", "diffeomorphic"])
@sizes
def test_bidirectional_integrates_the_negative_velocity(preset, size):
    network, pair = trained(preset, len(size)), random_pair(size)
    found = Registration(network, bidirectional=True).eval()(pair)
    padded = [-(-n // 16) * 16 for n in size]
    back = resize(integrate(-found["dvf"]), padded)[(slice(None), slice(None), *map(slice, size))]
    assert_close(found["inverse_ddf"], back, **EXACT)
    assert_close(found["warped_fixed"], warp(pair[:, 1:], found["inverse_ddf"]), rtol=0, atol=0)


def test_inverse_undoes_a_smooth_displacement():
    class Smooth(VoxelMorph):
        def _fields(self, features):
            rng = np.random.default_rng(0)
            grid = [n // 2 for n in size]
            noise = [gaussian_filter(rng.standard_normal(grid), 4, mode="constant") for _ in size]
            centre = np.prod([np.sin(np.pi * (x + 0.5) / n) for x, n in zip(np.indices(grid), grid, strict=True)], 0)
            field = np.stack(noise) / np.std(noise) * centre  # 0 at the border, so that nothing leaves the grid
            return torch.tensor(field)[None], None

    size = (64, 48)
    found = Registration(Smooth("dense", 2).double(), bidirectional=True)(random_pair(size, batch=1))
    assert found["ddf"].abs().max() > 2
    for outer, inner in [("ddf", "inverse_ddf"), ("inverse_ddf", "ddf")]:
        residual = compose(found[outer], found[inner])
        assert residual.abs().max() < 0.1  # linear interpolation between voxels of half resolution is not exact


@sizes
@pytest.mark.parametrize("input_level", [0, 1])
def test_a_second_pass_sees_the_image_that_the_first_one_warped(size, input_level):
    network = trained("dense", len(size), flow=0.2, cascades=2, input_level=input_level)
    once = VoxelMorph("dense", len(size), input_level=input_level).double()
    once.load_state_dict(network.state_dict())
    size = tuple(-(-n // 32) * 32 for n in size)  # whole blocks: nothing is padded
    pair = random_pair(size, batch=1)
    pool = (F.avg_pool2d if len(size) == 2 else F.avg_pool3d)(pair, 2**input_level)
    seen = once.coarse(pair)
    assert_close(seen, pool)
    first = once.displacement(once.fields(once.features(seen))[0])
    again = torch.cat([warp(pool[:, :1], first), pool[:, 1:]], dim=1)
    second = once.displacement(once.fields(once.features(again))[0])
    assert second.abs().max() > 0.1  # voxels: the second pass does something
    assert_close(network(pair), once.full(compose(first, second), list(size)), **EXACT)
    found = Registration(network, bidirectional=True, amp=False).eval()(pair)
    assert_close(found["ddf"], network(pair), **EXACT)
    assert not torch.equal(found["ddf"], once(pair))


@sizes
def test_a_velocity_is_smoothed(size):
    rough, smooth = (trained("dense", len(size), flow=0.2, velocity_sigma=sigma) for sigma in (0, 0.6))
    features = rough.features(rough.coarse(random_pair(size, batch=1)))
    expected = rough.fields(features)[0].numpy(force=True)
    for axis in range(2, expected.ndim):
        expected = convolve1d(expected, [0.18, 0.64, 0.18], axis, mode="nearest")  # variance 0.36
    assert_close(smooth.fields(features)[0].numpy(force=True), expected, **EXACT)


def test_the_inverse_of_several_passes_undoes_them():
    torch.manual_seed(0)  # of the weights, on which the displacement depends
    network = trained("wide", 2, flow=0.01, cascades=3)
    pair = F.avg_pool2d(random_pair((70, 84), batch=1), 5, 1, 2)  # as smooth as scans, and their displacements
    found = Registration(network, bidirectional=True, amp=False).eval()(pair)
    inner = (..., slice(12, -12), slice(12, -12))
    assert found["ddf"].abs().max() > 1
    # 0.004 of a displacement above 1: fields are interpolated on half of the grid
    assert compose(found["ddf"], found["inverse_ddf"])[inner].abs().max() < 0.02


def test_the_inverse_undoes_the_last_pass_first(monkeypatch):
    network = VoxelMorph("dense", 2, integration_level=0, cascades=2).double()
    x = torch.from_numpy(np.indices((48, 48)) - 23.5)[None]
    turn, shift = 0.3 * torch.stack([-x[:, 1], x[:, 0]], dim=1), torch.tensor([[[[4.0]], [[1.0]]]]).expand_as(x)
    velocities = iter([turn, shift.double()])
    monkeypatch.setattr(network, "fields", lambda features: (next(velocities), None))
    found = Registration(network, bidirectional=True, amp=False).eval()(random_pair((48, 48), batch=1))
    rotation = torch.tensor([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])  # 0.3 rad by the velocity turn
    expected = {
        "ddf": torch.einsum("ij,bj...->bi...", rotation, x + shift) - x,
        "inverse_ddf": torch.einsum("ji,bj...->bi...", rotation, x) - shift - x,
    }
    inner = (..., slice(12, -12), slice(12, -12))  # what the border does not reach
    for key, field in expected.items():  # 128 steps along chords end 0.3^2 / 256 outside the circle
        assert_close(found[key][inner], field[inner], rtol=0, atol=0.01)


def test_training_goes_through_the_last_of_a_random_number_of_passes(monkeypatch):
    network, pair = trained("dense", 2, cascades=3), random_pair((32, 16), batch=1)
    registration, seen = Registration(network, amp=False).train(), []
    features = network.features
    monkeypatch.setattr(network, "features", lambda x, weight=None: seen.append(torch.is_grad_enabled()) or features(x))
    counts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        seen.clear()
        registration(pair)["ddf"].sum().backward()
        assert seen == [False] * (len(seen) - 1) + [True]
        counts.add(len(seen))
    assert counts == {1, 2, 3}
    seen.clear()
    registration.eval()(pair)
    assert len(seen) == 3


def test_training_samples_the_velocity(monkeypatch):
    network = trained("diffeomorphic", 2, log_variance=-3.0)
    pair = random_pair((32, 16), batch=1).expand(400, -1, -1, -1)
    fields = []  # what becomes a displacement
    displacement = network.displacement
    monkeypatch.setattr(network, "displacement", lambda field: fields.append(field) or displacement(field))
    registration = Registration(network, bidirectional=True).train()
    with torch.no_grad():
        mean, log_variance = network.fields(network.features(network.coarse(pair)))
        found = registration(pair)
        registration.eval()(pair)
    sample, inverse, *evaluated = fields
    assert_close(found["dvf"], mean, rtol=0, atol=0)  # the losses know the mean, not the sample
    assert_close(inverse, -sample, rtol=0, atol=0)  # one sample for both ways
    standard = (sample - mean) / torch.exp(log_variance / 2)
    n = standard.numel()
    assert float(standard.mean()) == pytest.approx(0, abs=4 / n**0.5)  # 4 standard errors
    assert float(standard.var()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    assert standard.std(dim=0).min() > 0.8  # each voxel for itself: 1 within 6 standard errors of an SD of 400
    assert_close(evaluated, [mean, -mean], rtol=0, atol=0)


def test_displacement_depends_on_the_sample_only_in_training():
    registration, pair = Registration(trained("diffeomorphic", 2)), random_pair((17, 35))
    assert not torch.equal(registration.train()(pair)["ddf"], registration(pair)["ddf"])
    assert torch.equal(registration.eval()(pair)["ddf"], registration(pair)["ddf"])


@pytest.mark.parametrize(("size", "padded"), [((41, 66), (64, 96)), ((20, 35, 17), (32, 64, 32))])
def test_input_level_registers_block_means(size, padded):
    network, pair = trained("dense", len(size), input_level=1), random_pair(size)
    inner = trained("dense", len(size))
    inner.load_state_dict(network.state_dict())
    missing = [(0, n - m) for n, m in zip(padded, size, strict=True)]
    blocks = np.pad(pair.numpy(), [(0, 0), (0, 0), *missing], mode="edge")
    for axis in range(2, pair.ndim):  # means of 2 x 2 (x 2) voxels
        blocks = blocks.reshape(*blocks.shape[:axis], -1, 2, *blocks.shape[axis + 1 :]).mean(axis + 1)
    with torch.no_grad():
        found = Registration(network, bidirectional=True).eval()(pair)
        inside = Registration(inner, bidirectional=True).eval()(torch.from_numpy(blocks))
    assert_close(found["dvf"], inside["dvf"], **EXACT)
    # the voxel at x lies (x - 1/2) / 2 voxels into the grid of blocks; beyond the middle of the last one SciPy repeats
    points = np.stack([(np.indices(size)[d] - 0.5) / 2 for d in range(len(size))])
    for key in ("ddf", "inverse_ddf"):
        expected = [
            [map_coordinates(c, points, order=1, mode="nearest") for c in field] for field in 2 * inside[key].numpy()
        ]
        assert_close(found[key], torch.from_numpy(np.array(expected)), **EXACT)
    assert_close(found["warped"], warp(pair[:, :1], found["ddf"]), rtol=0, atol=0)  # the image itself stays fine


@presets
def test_bfloat16_is_close_and_its_fields_float32(preset, monkeypatch):
    torch.manual_seed(0)  # of the weights, on which the error depends
    monkeypatch.setattr(networks, "has_fast_bfloat16", lambda device: True)
    network, pair = trained(preset, 2).float(), random_pair((66, 70), dtype=torch.float32)
    with torch.no_grad():
        exact = Registration(network, amp=False).eval()(pair)
        found = Registration(network).eval()(pair)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert not torch.equal(found["ddf"], exact["ddf"])
    # bfloat16 has 8 bits, so each of the 12 convolutions is off by 2^-9 of its values; a field rounded to it would
    # lie on few values besides
    error = (found["ddf"] - exact["ddf"]).square().mean().sqrt() / exact["ddf"].square().mean().sqrt()
    assert error < 0.02
    assert found["ddf"].unique().numel() > 0.9 * found["ddf"].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fields_are_those_of_float32_whatever_autocast_surrounds_them(dtype):
    network, pair = trained("diffeomorphic", 2).float(), random_pair((32, 48), dtype=torch.float32)
    with torch.no_grad():
        features = network.features(network.coarse(pair)).to(dtype)
        expected = network.fields(features)
        with torch.autocast("cpu", torch.bfloat16):
            found = network.fields(features)
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "expected"), [((33, 50), True), ((32, 50), False), ((66, 66), True)])
def test_bfloat16_only_where_its_gradient_is_right(size, expected, monkeypatch):
    monkeypatch.setattr(networks, "has_fast_bfloat16", lambda device: True)
    network, seen = VoxelMorph("vm1", 2), []
    network.unet.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    Registration(network)(random_pair(size, dtype=torch.float32))
    Registration(network, amp=False)(random_pair(size, dtype=torch.float32))
    assert seen == [torch.bfloat16 if expected else torch.float32, torch.float32]


def test_bfloat16_counts_the_grid_of_the_unet(monkeypatch):
    monkeypatch.setattr(networks, "has_fast_bfloat16", lambda device: True)
    network, seen = VoxelMorph("vm1", 2, input_level=1), []
    network.unet.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    Registration(network)(random_pair((64, 70), dtype=torch.float32))
    assert seen == [torch.float32]


OLD_PROCESSOR = """
import sys, torch
from voxelmorph_monai.networks import Registration, VoxelMorph
torch.cpu._is_avx512_bf16_supported = lambda: False
network = VoxelMorph("dense", 3)
saved = torch.load(sys.argv[1])
network.load_state_dict(saved["state"])
found = Registration(network)(saved["pair"])
found["warped"].square().sum().backward()
print(torch.backends.cpu.get_cpu_capability())
torch.save({"ddf": found["ddf"].detach(), "gradient": network.unet.decoder[4][0].conv.weight.grad}, sys.argv[1])
"""


def test_a_processor_without_bfloat16_falls_back(tmp_path):
    network, pair = trained("dense", 3).float(), random_pair((48, 48, 50), batch=1, dtype=torch.float32)
    torch.save({"state": network.state_dict(), "pair": pair}, tmp_path / "exchange.pt")
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OLD_PROCESSOR, str(tmp_path / "exchange.pt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "AVX2"
    old = torch.load(tmp_path / "exchange.pt")
    found = Registration(network, amp=False)(pair)
    found["warped"].square().sum().backward()
    # float32 summed in other orders, enlarged by 7 squarings of a field that is not smooth; bfloat16 is 1e-2 off
    assert_close(old["ddf"], found["ddf"].detach(), rtol=1e-3, atol=1e-3)
    gradient = network.unet.decoder[4][0].conv.weight.grad
    assert (old["gradient"] - gradient).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("preset", ["vm2", "diffeomorphic"])
def test_overfits_one_pair(preset):
    torch.manual_seed(0)
    rows, columns = np.indices((32, 32))
    discs = np.stack([(rows - y) ** 2 + (columns - x) ** 2 < 90 for y, x in [(14, 15), (18, 17)]])[None]
    moving_label, fixed_label = torch.tensor(discs.astype(np.uint8)).split(1, dim=1)
    pair = torch.tensor(gaussian_filter(discs.astype(np.float32), (0, 0, 1.5, 1.5)))
    registration = Registration(VoxelMorph(preset, 2), amp=False)
    criterion = RegistrationLoss(nn.MSELoss(), GradientLoss(), smoothness_weight=0.01)
    optimizer = torch.optim.Adam(registration.parameters(), 1e-3)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = criterion(registration(pair), {"moving": pair[:, :1], "fixed": pair[:, 1:]})
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    ddf = registration.eval()(pair)["ddf"]
    before, after = (float(dice(x, fixed_label, 1)) for x in (moving_label, warp(moving_label, ddf, mode="nearest")))
    assert history[-1] < history[0] / 3
    assert before < 0.8
    assert after > 0.92


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"preset": "vm3"},
            r"^preset 'vm3' .*vm1, vm2, dense, vxmdense, diffeomorphic, miccai2018, wide",
        ),
        ({"widths": 3}, r"\['widths'\].* \('encoder', .*\)"),
        ({"in_channels": 3}, r"^in_channels is 3\b"),
        ({"in_channels": 0}, r"^in_channels is 0\b"),
        ({"spatial_dims": 1}, r"^spatial_dims is 1\b"),
        (
            {"decoder": ()},
            r"^decoder is \(\), .*4 levels.* 1 to 5 tuples",
        ),
        ({"decoder": ((8,), ())}, r"^decoder is \(\(8,\), \(\)\)"),
        ({"decoder": ((8,),) * 6}, r"^decoder is \(\(8,\), .* 1 to 5 tuples"),
        ({"downsampling": "mean"}, r"^downsampling is 'mean'\."),
        ({"padding_mode": "reflection"}, r"^padding_mode is 'reflection'\."),
        ({"preset": "vm1", "integration_level": 5}, r"^integration_level is 5\b.* 0 to 4"),
        ({"preset": "vm1", "integration_level": -1}, r"^integration_level is -1\b"),
        (
            {"preset": "diffeomorphic", "num_steps": 0},
            r"num_steps is 0\b.*probabilistic",
        ),
        ({"preset": "dense", "cascades": 0}, r"^cascades is 0\b"),
        ({"preset": "diffeomorphic", "cascades": 2}, r"^cascades is 2\b.* probabilistic"),
        (
            {"preset": "dense", "velocity_sigma": float("nan")},
            r"^velocity_sigma is nan\b",
        ),
        ({"preset": "dense", "velocity_sigma": "1.5"}, r"^velocity_sigma is '1\.5'"),
        ({"preset": "dense", "num_steps": 31}, r"^num_steps is 31\b.* 0 to 30"),
        ({"preset": "dense", "velocity_sigma": -1}, r"^velocity_sigma is -1\b"),
        (
            {"preset": "diffeomorphic", "velocity_sigma": 1},
            r"^velocity_sigma is 1\b.* probabilistic",
        ),
        (
            {"preset": "diffeomorphic", "integration_level": 0},
            r"integration_level is 0\b.*probabilistic .* decoder stops: 1\b",
        ),
    ],
)
def test_architectures_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        VoxelMorph(**options)


@pytest.mark.parametrize(
    ("spatial_dims", "shape"), [(3, (1, 2, 16, 16)), (2, (1, 3, 16, 16)), (3, (2, 16, 16, 16)), (2, (1, 2, 16, 16, 16))]
)
def test_wrong_pair(spatial_dims, shape):
    message = rf"^pair has shape {re.escape(str(list(shape)))}.*\(B, 2, H, W{', D' * (spatial_dims - 2)}\)"
    with pytest.raises(ValueError, match=message):
        VoxelMorph("vm1", spatial_dims)(torch.zeros(shape))


def test_wrong_weights(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match=rf"weights {path} do not exist"):
        load_weights(VoxelMorph("vm1", 2), str(path))
    wrong = rf"weights {path} do not fit the network: "
    for content in (VoxelMorph("vm2", 2).state_dict(), VoxelMorph("vm1", 3).state_dict(), [1, 2]):
        torch.save(content, path)
        with pytest.raises(ValueError, match=wrong):
            load_weights(VoxelMorph("vm1", 2), str(path))
    preset = VoxelMorph("vm1", 2).state_dict()
    for content, reason in (
        (
            VoxelMorph("vm2", 2).state_dict(),
            r"7 parameters differ, the first: unet\.decoder\.3\.1\.conv\.weight is "
            r"\[32, 32, 3, 3\] instead of \[8, 32, 3, 3\]\.",
        ),
        ([1, 2], r"it holds a list, not a dict\."),
        (
            {"network": preset, "epoch": 3},
            r"24 parameters differ, the first: unet\.encoder\.0\.conv\.weight \[16, 2, 3, 3\] is missing\.",
        ),
        ({**preset, "epoch": 3}, r"1 parameters differ, the first: epoch \(int\) is unknown\."),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"{wrong}{reason}"):
            load_weights(VoxelMorph("vm1", 2), str(path))
    for half in (path.read_bytes()[:100], b""):
        path.write_bytes(half)
        with pytest.raises(ValueError, match=wrong):
            load_weights(VoxelMorph("vm1", 2), str(path))


def test_a_file_with_wrong_bytes_says_so(tmp_path):
    path, random = tmp_path / "model.pt", np.random.default_rng(0)
    for zipped in (True, False):
        torch.save({"a": torch.zeros(3), "b": 1}, path, _use_new_zipfile_serialization=zipped)
        assert read_state(path).keys() == {"a", "b"}
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        messages = []
        for _ in range(300):
            broken = whole.copy()
            broken[random.integers(len(broken), size=3)] = random.integers(256, size=3)
            path.write_bytes(broken.tobytes())
            try:  # anything but what it says it raises is an error
                assert isinstance(read_state(path), dict)
            except ValueError as error:
                messages.append(str(error))
        assert len(messages) > 50
        assert not [message for message in messages if "\n" in message]


def test_wrong_registration():
    with pytest.raises(ValueError, match=r"^bidirectional .*num_steps .*is 0\b"):
        Registration(VoxelMorph("vm2", 2), bidirectional=True)
    with pytest.raises(ValueError, match=r"^input_level is -1\b"):
        VoxelMorph("vm2", 2, input_level=-1)


def test_none_leaves_the_preset_as_it_is():
    assert VoxelMorph("wide", 2, num_steps=None).num_steps == PRESETS["wide"].num_steps == 5


# Smoothness as an input


def blob(at):
    x, y = (torch.arange(n) for n in (32, 48))
    return torch.exp(-((x[:, None] - at[0]) ** 2 + (y - at[1]) ** 2) / 40)[None, None]


def test_one_training_serves_any_smoothness():
    torch.manual_seed(0)
    network = VoxelMorph("vm1", 2, smoothness_weight=0.5, encoder=(8, 8), decoder=((8,), (8,), (8,)))
    registration = Registration(network, amp=False)
    loss = RegistrationLoss(MSELoss(image_sigma=0.2), GradientLoss())
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    moving, fixed = blob((14, 22)), blob((18, 26))
    pair, target = torch.cat([moving, fixed], dim=1), {"moving": moving, "fixed": fixed}
    drawn = []
    for _ in range(300):
        found = registration(pair)
        drawn.append(float(found["smoothness_weight"]))
        optimizer.zero_grad()
        loss(found, target).backward()
        optimizer.step()
    assert 0.4 < sum(drawn) / len(drawn) < 0.6
    assert min(drawn) < 0.1 < 0.9 < max(drawn)
    registration.eval()
    roughness, errors = [], []
    for weight in (0.05, 0.5, 0.95):
        network.smoothness_weight = weight
        with torch.no_grad():
            found = registration(pair)
        assert "smoothness_weight" not in found
        assert torch.equal(found["ddf"], network(pair))
        roughness.append(float(GradientLoss()(found["ddf"])))
        errors.append(float(MSELoss()(found["warped"], fixed)))
    assert roughness[0] > 1.5 * roughness[2] > 0
    assert errors[0] < errors[1] < errors[2] < float(MSELoss()(moving, fixed)) / 2


@presets
def test_smoothness_is_one_more_channel_and_exports(preset):
    torch.manual_seed(0)
    network, plain = VoxelMorph(preset, 2, smoothness_weight=0.25).double(), VoxelMorph(preset, 2)
    sizes = [each.unet.encoder[0].conv.weight.shape[1] for each in (network, plain)]
    assert sizes == [3, 2]
    with torch.no_grad():
        network.flow.weight.normal_()
        pair = torch.rand(
            1, 2, 20, 33, dtype=torch.float64
        )  # with which a compiled graph's other order of sums is not seen
        torch.testing.assert_close(torch.jit.script(network)(pair), network(pair))
        own, given = network.features(network.coarse(pair)), network.features(network.coarse(pair), torch.tensor(0.25))
        assert torch.equal(own, given)
        assert not torch.equal(own, network.features(network.coarse(pair), torch.tensor(0.5)))
    with pytest.raises(ValueError, match=r"^smoothness_weight is 1\.5\. .*0 to 1"):
        VoxelMorph(preset, smoothness_weight=1.5)


def test_heads_are_left_to_onednn():
    features = torch.randn(1, 16, 40, 48, 8).bfloat16()  # of 8 planes torch's own convolution takes 10 times as long
    network = VoxelMorph("diffeomorphic")
    with torch.no_grad(), torch.profiler.profile() as profile:
        network.fields(features)
    assert not [event.key for event in profile.key_averages() if "slow" in event.key]
