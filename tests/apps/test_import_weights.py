"""The authors' weights do here what they did there: against a forward pass in NumPy, written from the papers' code.

The files are written by the tests in the layout of the published ones, with random weights. What stands here for the
authors' PyTorch network was compared with the package voxelmorph 0.2 itself: 1e-5 voxels apart, in 2-D and 3-D.
"""

import sys
from itertools import product

import h5py
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from voxelmorph_monai.apps.import_weights import import_weights
from voxelmorph_monai.cli import main
from voxelmorph_monai.networks import VoxelMorph, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = [(2, 16), (16, 32), (32, 32), (32, 32), (32, 32), (64, 32), (64, 32), (48, 32)]
FILES = {
    "vm1": ([*COMMON, (32, 8), (10, 8)], {"flow": 8}),
    "vm2": ([*COMMON, (32, 32), (34, 16), (16, 16)], {"flow": 16}),
    "miccai2018": ([*COMMON, (32, 16)], {"flow": 16, "log_sigma": 16}),
}
SIZE = (32, 48, 16)
CONVOLUTION = "conv3d_{}"


def layers(preset, seed=0):
    """Name, kernel and bias of each layer; the displacement gets about two voxels large, in every component its own."""
    rng = np.random.default_rng(seed)
    widths, heads = FILES[preset]
    found = []
    for number, (inner, outer) in enumerate(widths, start=41):  # the numbers of a session's later networks
        kernel = rng.standard_normal((3, 3, 3, inner, outer)) * (2 / (27 * inner)) ** 0.5
        found.append((CONVOLUTION.format(number), kernel, 0.1 * rng.standard_normal(outer)))
    for name, inner in heads.items():
        kernel = rng.standard_normal((3, 3, 3, inner, 3)) * 0.2 / inner**0.5
        found.append((name, kernel, np.array([1.5, -0.7, 0.4]) if name == "flow" else np.array([-8.0, -9.0, -7.0])))
    return [(name, kernel.astype(np.float32), bias.astype(np.float32)) for name, kernel, bias in found]


def write(path, preset="vm1", given=None, order=None):
    """Write a file as Keras 2.2.4 does: scopes that are named otherwise, layers without weights, names in bytes."""
    given = layers(preset) if given is None else given
    names = order or ["input_1", "concatenate_7", *(name for name, _, _ in given), "spatial_transformer_3"]
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = [name.encode() for name in names]
        for name in sorted(names):
            root.create_group(name)
        for name, kernel, bias in given:
            scope = root[name].create_group(f"{name}_34" if name in ("flow", "log_sigma") else name)
            scope["kernel:0"], scope["bias:0"] = kernel, bias
    return path


# Keras in NumPy, channels last, without a batch axis


def convolve(x, kernel, bias, stride=1):
    """Sum over the taps; "same": 1 voxel before and after, with stride 2 on even sizes 0 before and 1 after."""
    before, dims = 1 if stride == 1 else 0, x.ndim - 1
    x = np.pad(x, [(before, 1)] * dims + [(0, 0)])
    n = [(size - 3) // stride + 1 for size in x.shape[:-1]]
    out = np.zeros((*n, kernel.shape[-1])) + bias
    for tap in np.ndindex(*[3] * dims):
        cut = tuple(slice(t, t + stride * (m - 1) + 1, stride) for t, m in zip(tap, n, strict=True))
        out = out + x[cut] @ kernel[tap].astype(np.float64)
    return out


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def doubled(x):
    for axis in range(x.ndim - 1):
        x = x.repeat(2, axis=axis)
    return x


def sample(volume, points, beyond="nearest"):
    """Values (..., C) of ``volume`` at ``points`` (..., D), linear; beyond it the border, or 0 ("grid-constant")."""
    at = np.moveaxis(points, -1, 0)
    channels = [map_coordinates(channel, at, order=1, mode=beyond) for channel in np.moveaxis(volume, -1, 0)]
    return np.stack(channels, axis=-1)


def resampled(field, size):
    """Linear, corners on corners; vectors stay as they are."""
    axes = [np.linspace(0, m - 1, n) for m, n in zip(field.shape, size, strict=False)]
    return sample(field, np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1))


def flowed(velocity, steps=7, divide=True, beyond="nearest"):
    """Squarings, as the authors' layers do them."""
    grid = np.stack(np.meshgrid(*map(np.arange, velocity.shape[:-1]), indexing="ij"), axis=-1)
    field = velocity / 2**steps if divide else velocity
    for _ in range(steps):
        field = field + sample(field, grid + field, beyond)
    return field


def expected(preset, given, pair, xy=False):
    """Displacement (*spatial, 3) in voxels, array axes in order."""
    queue = iter(given)

    def convolution(x, stride=1):
        _, kernel, bias = next(queue)
        return leaky(convolve(x, kernel, bias, stride))

    skips, x = [], pair
    for _ in range(4):
        skips.append(x)
        x = convolution(x, stride=2)
    x = convolution(x)
    for _ in range(3):
        x = convolution(np.concatenate([doubled(x), skips.pop()], axis=-1))
    x = convolution(x)
    if preset != "miccai2018":
        x = np.concatenate([doubled(x), skips.pop()], axis=-1)
        for _ in range(1 if preset == "vm1" else 2):
            x = convolution(x)
    _, kernel, bias = next(queue)
    flow = convolve(x, kernel, bias)
    if preset != "miccai2018":
        return flow
    if xy:  # channel 0 moved along array axis 1
        flow = flow[..., [1, 0, 2]]
    return resampled(2 * flowed(flow, divide=not xy), pair.shape[:3])


def random_pair(size=SIZE):
    return np.random.default_rng(1).random((*size, 2))


def found(preset, path, pair):
    network = VoxelMorph(preset, pair.ndim - 1)
    load_weights(network, str(path))
    with torch.no_grad():
        ddf = network(torch.from_numpy(pair).float().movedim(-1, 0)[None])
    return ddf[0].movedim(0, -1).numpy()


@pytest.mark.parametrize("preset", FILES)
def test_imported_weights_give_the_authors_displacement(preset, tmp_path):
    path = write(tmp_path / "authors.h5", preset)
    assert import_weights(path, tmp_path / "ours.pt") == preset
    pair = random_pair()
    theirs, ours = expected(preset, layers(preset), pair), found(preset, tmp_path / "ours.pt", pair)
    assert np.abs(theirs).mean() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=2e-5)  # float32, fields of a few voxels


def test_xy_files_count_axes_otherwise_and_do_not_divide(tmp_path):
    given = [(n, k / 100, b / 100) if n == "flow" else (n, k, b) for n, k, b in layers("miccai2018")]
    path = write(tmp_path / "authors.h5", given=given)
    assert import_weights(path, tmp_path / "ours.pt", xy=True) == "miccai2018"
    pair = random_pair()
    theirs = expected("miccai2018", given, pair, xy=True)
    assert np.abs(theirs).mean() > 0.5
    np.testing.assert_allclose(found("miccai2018", tmp_path / "ours.pt", pair), theirs, atol=2e-5)
    import_weights(path, tmp_path / "ij.pt")
    state, plain = (torch.load(tmp_path / name, weights_only=True) for name in ("ours.pt", "ij.pt"))
    # one standard deviation of the velocity, 128 times as large and with the axes in order
    deviations = [torch.exp(0.5 * each["log_variance.bias"]) for each in (state, plain)]
    torch.testing.assert_close(deviations[0], 128 * deviations[1][[1, 0, 2]])
    assert torch.equal(state["log_variance.weight"], plain["log_variance.weight"][[1, 0, 2]])


def test_the_right_geometry_differs_from_the_authors_by_a_known_ratio(tmp_path):
    import_weights(write(tmp_path / "authors.h5", "miccai2018"), tmp_path / "ours.pt")
    pair = random_pair()
    doubling, scaling = (found(preset, tmp_path / "ours.pt", pair) for preset in ("miccai2018", "diffeomorphic"))
    n = np.array(SIZE)
    np.testing.assert_allclose(scaling, doubling * (n - 1) / (n / 2 - 1) / 2, atol=1e-5)  # float32
    assert np.abs(scaling - doubling).max() > 0.05


def test_order_of_the_file_counts_and_numbers_do_not(tmp_path):
    renamed = [(f"conv3d_{(7 * i) % 11}", k, b) for i, (_, k, b) in enumerate(layers("vm2")[:-1])]
    import_weights(write(tmp_path / "a.h5", given=[*renamed, layers("vm2")[-1]]), tmp_path / "a.pt")
    given = layers("miccai2018")
    heads_first = [given[-1][0], given[-2][0], *(name for name, _, _ in given[:-2])]
    assert import_weights(write(tmp_path / "b.h5", given=given, order=heads_first), tmp_path / "b.pt") == "miccai2018"
    for preset, name in (("vm2", "a"), ("miccai2018", "b")):
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        kernels = [kernel for _, kernel, _ in layers(preset)]
        for kernel, weight in zip(kernels, (w for key, w in state.items() if key.endswith("weight")), strict=True):
            assert np.array_equal(kernel.transpose(4, 3, 0, 1, 2), weight.numpy())


def without(given, index):
    return [layer for layer in given if layer is not given[index]]


def changed(given, index, **arrays):
    name, kernel, bias = given[index]
    return [*given[:index], (name, arrays.get("kernel", kernel), arrays.get("bias", bias)), *given[index + 1 :]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (without(layers("vm1"), 3), r"none of the networks.*flow 8->3 .*heads last: vm1: 2->16, 16->32, "),
        (without(layers("vm1"), -1), r"none of the networks"),
        (without(layers("miccai2018"), -2), r"none of the networks.*log_sigma 16->3 \(3 x 3 x 3\)"),
        ([("flow_34" if n == "flow" else n, k, b) for n, k, b in layers("vm1")], r"none of the networks.*flow_34"),
        (changed(layers("vm1"), 2, kernel=np.zeros((5, 3, 3, 32, 32))), r"conv3d_43 32->32 \(5 x 3 x 3\)"),
        (changed(layers("vm1"), 2, bias=np.zeros(31)), r"none of the networks"),
        (changed(layers("vm1"), 2, kernel=np.zeros((3, 3, 32, 32))), r"layer conv3d_43 .* 3-D convolution"),
        (changed(layers("vm1"), 2, bias=np.full(32, np.nan)), r"NaN .* layer conv3d_43\b"),
        ([], r"convolutions are none\b.* heads last"),
    ],
)
def test_other_networks_are_refused(given, message, tmp_path):
    path = write(tmp_path / "other.h5", given=given)
    with pytest.raises(ValueError, match=rf"^weights {path} .*{message}"):
        import_weights(path, tmp_path / "ours.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["other.h5"]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^weights .*nowhere.h5 do not exist"):
        import_weights(tmp_path / "nowhere.h5", tmp_path / "ours.pt")
    text = tmp_path / "text.h5"
    text.write_text("no weights")
    with pytest.raises(ValueError, match=rf"^weights {text} cannot be read as a Keras file"):
        import_weights(text, tmp_path / "ours.pt")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"\['data'\].* no group model_weights"):
        import_weights(tmp_path / "other.h5", tmp_path / "ours.pt")
    with pytest.raises(ValueError, match=r"vm1\.h5 are of vm1, but xy "):
        import_weights(write(tmp_path / "vm1.h5"), tmp_path / "ours.pt", xy=True)
    missing = write(tmp_path / "missing.h5")
    with h5py.File(missing, "r+") as file:
        del file["model_weights/conv3d_44"]
    with pytest.raises(ValueError, match=r"cannot be read as a Keras file.*conv3d_44"):
        import_weights(missing, tmp_path / "ours.pt")
    (tmp_path / "ours.pt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"ours\.pt already exists"):
        import_weights(tmp_path / "vm1.h5", tmp_path / "ours.pt")
    assert (tmp_path / "ours.pt").read_text() == "mine"


def test_command(tmp_path, capsys):
    path = write(tmp_path / "authors.h5", "miccai2018")
    assert main(["import-weights", str(path), str(tmp_path / "new" / "ours.pt")]) == 0
    assert capsys.readouterr().out.endswith("ours.pt: weights of preset miccai2018, for intensities in [0, 1]\n")
    load_weights(VoxelMorph("miccai2018"), str(tmp_path / "new" / "ours.pt"))
    assert main(["import-weights", str(path), str(tmp_path / "new" / "ours.pt")]) == 2
    assert "ours.pt already exists" in capsys.readouterr().err
    assert main(["import-weights", str(path), str(tmp_path / "xy.pt"), "--xy"]) == 0


# Checkpoints of the authors' PyTorch network

VXMDENSE = [(2, 16), (16, 32), (32, 32), (32, 32), (32, 32), (64, 32), (64, 32), (64, 32), (48, 32), (32, 16), (16, 16)]
CONFIG = {"inshape": SIZE, "nb_unet_features": None, "int_steps": 7, "int_downsize": 2, "bidir": False}


def vxmdense(dims=3):
    """State dict of VxmDense, without grids."""
    rng = np.random.default_rng(2)
    parts = ["encoder.0.0", "encoder.1.0", "encoder.2.0", "encoder.3.0", "decoder.0.0", "decoder.1.0", "decoder.2.0"]
    names = [f"unet_model.{part}.main" for part in (*parts, "decoder.3.0", "remaining.0", "remaining.1", "remaining.2")]
    state = {}
    for name, (inner, outer) in zip(names, VXMDENSE, strict=True):
        state[f"{name}.weight"] = rng.standard_normal((outer, inner, *[3] * dims)) * (2 / (3**dims * inner)) ** 0.5
        state[f"{name}.bias"] = 0.1 * rng.standard_normal(outer)
    state["flow.weight"] = 0.4 * rng.standard_normal((dims, 16, *[3] * dims)) / 4
    state["flow.bias"] = np.array([3.0, -1.4, 0.8])[:dims]
    return {name: torch.from_numpy(array).float() for name, array in state.items()}


def checkpoint(state=None, **config):
    return {"config": {**CONFIG, **config}, "model_state": vxmdense() if state is None else state}


def displacement(state, pair):
    """What VxmDense gives: its forward pass, with 0 beyond the velocity's grid and vectors that double."""

    def convolution(x, name):
        kernel, bias = (state[f"{name}.{part}"].double().numpy() for part in ("weight", "bias"))
        return convolve(x, np.moveaxis(kernel, (0, 1), (-1, -2)), bias)

    x, skips, dims = pair, [], pair.ndim - 1
    for level in range(4):
        x = leaky(convolution(x, f"unet_model.encoder.{level}.0.main"))
        skips.append(x)
        x = np.max([x[tuple(slice(k, None, 2) for k in corner)] for corner in product((0, 1), repeat=dims)], axis=0)
    for level in range(4):
        x = leaky(convolution(x, f"unet_model.decoder.{level}.0.main"))
        x = np.concatenate([doubled(x), skips.pop()], axis=-1)
    for level in range(3):
        x = leaky(convolution(x, f"unet_model.remaining.{level}.main"))
    velocity = resampled(convolution(x, "flow"), [n // 2 for n in pair.shape[:-1]]) / 2
    return resampled(2 * flowed(velocity, beyond="grid-constant"), pair.shape[:-1])


@pytest.mark.parametrize("size", [SIZE, (64, 48)])
@pytest.mark.parametrize("grids", [False, True])
def test_checkpoints_give_the_authors_displacement(size, grids, tmp_path):
    state, pair = vxmdense(len(size)), random_pair(size)
    saved = checkpoint(state, inshape=size)
    if grids:  # as torch.save(model.state_dict(), ...) writes it
        whole, half = (torch.zeros(1, len(size), *[n // k for n in size]) for k in (1, 2))
        saved = {**state, "integrate.transformer.grid": half, "transformer.grid": whole}
    torch.save(saved, tmp_path / "authors.pt")
    assert import_weights(tmp_path / "authors.pt", tmp_path / "ours.pt") == "vxmdense"
    theirs, ours = displacement(state, pair), found("vxmdense", tmp_path / "ours.pt", pair)
    assert np.abs(theirs).mean() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=2e-5)  # float32, fields of a few voxels
    # dense is the network as it is meant: the velocity goes on beyond its grid, vectors grow as corners move apart
    assert np.abs(found("dense", tmp_path / "ours.pt", pair) - theirs).max() > 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: checkpoint(int_steps=5), r"with int_steps 5, int_downsize 2\. .*int_steps 7, int_downsize 2"),
        (lambda s: checkpoint(int_downsize=1), r"with int_steps 7, int_downsize 1\. .*int_steps 7, int_downsize 2"),
        (
            lambda s: {**s, "transformer.grid": torch.zeros(1, 3, *SIZE)},
            r"trained with int_steps 0, int_downsize 2\.",
        ),
        (
            lambda s: {**s, **{f"{n}transformer.grid": torch.zeros(1, 3, *SIZE) for n in ("", "integrate.")}},
            r"trained with int_steps 7, int_downsize 1\.",
        ),
        (
            lambda s: {key: value for key, value in s.items() if key != "flow.bias"},
            r"1 parameters differ from a VxmDense .*: flow\.bias \[3\] is missing\.",
        ),
        (lambda s: {**s, "sigma.bias": torch.zeros(3)}, r"1 parameters .*: sigma.bias \[3\] is unknown\."),
        (
            lambda s: {**s, "unet_model.remaining.2.main.weight": torch.zeros(8, 16, 3, 3, 3)},
            r"unet_model.remaining.2.main.weight is \[8, 16, 3, 3, 3\] instead of \[16, 16, 3, 3, 3\]\.",
        ),
        (lambda s: VoxelMorph("dense").state_dict(), r"44 parameters differ from a VxmDense .*: unet_model.encoder"),
        (lambda s: {**s, "flow.weight": s["flow.weight"] / 0}, r"NaN .* layer flow\b"),
        (lambda s: [1, 2], r"a checkpoint of VxmDense: it holds a list, not a dict\."),
        (lambda s: {}, r"it holds \[\], but no state dict\."),
        (lambda s: {"epoch": 3, "state": s}, r"it holds \['epoch', 'state'\], but no state dict\."),
        (lambda s: {"model_state": 3}, r"its model_state is a int, not a dict\."),
        (lambda s: {"model_state": s, "config": None}, r"its config is a NoneType, not a dict\."),
        (lambda s: checkpoint(inshape=sys.settrace), r"VxmDense: Weights only load failed"),
    ],
)
def test_other_checkpoints_are_refused(change, message, tmp_path):
    path = tmp_path / "other.pt"
    torch.save(change(vxmdense()), path)
    with pytest.raises(ValueError, match=rf"^weights {path} .*{message}"):
        import_weights(path, tmp_path / "ours.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["other.pt"]


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^weights {path} cannot be read as a checkpoint of VxmDense: .+\.$"):
        import_weights(path, tmp_path / "ours.pt")


def test_xy_is_not_for_checkpoints(tmp_path):
    torch.save(checkpoint(), tmp_path / "authors.pt")
    with pytest.raises(ValueError, match=r"^weights .*authors\.pt .*\(\.h5\), but xy "):
        import_weights(tmp_path / "authors.pt", tmp_path / "ours.pt", xy=True)
