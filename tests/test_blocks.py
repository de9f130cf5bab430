"""Laws of the geometry, and outside oracles: NumPy, SciPy, SimpleITK, onnxruntime.

Grids have unequal sides, so that a swapped axis cannot pass. Where a law is exact for linear interpolation, the fields
are linear about the centre of the grid and pull inwards, so that nothing is sampled outside; then float64 leaves only
rounding, and the tolerance is ``ROUNDING``.
"""

import io
import re
from collections.abc import Callable, Iterator
from inspect import signature
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import onnxruntime
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from scipy.ndimage import convolve1d, gaussian_filter, map_coordinates
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from voxelmorph_monai import blocks, kernels, loops, switch
from voxelmorph_monai.blocks import (
    as_signed,
    compose,
    half,
    identity_grid,
    integrate,
    invert,
    jacobian_determinant,
    linear_weights,
    ranges,
    resize,
    sample,
    smooth,
    smooth_axes,
    warp,
    warp_labels,
    weighted_vote,
)

SIZES = [(17, 23), (9, 11, 14)]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
ROUNDING = 1e-10  # float64 has 16 digits; coordinates up to 30 lose 2, products and sums of a few dozen terms 2 more
sizes = pytest.mark.parametrize("size", SIZES, ids=["2-D", "3-D"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["loops", "torch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled loops or torch's operators."""
    monkeypatch.setattr(switch, "enabled", request.param == "loops")
    # as little as the tests have is shared among threads, and walked through in blocks that the rows do not fill
    monkeypatch.setattr(loops, "_FEW", 0)
    monkeypatch.setattr(loops, "_PLANES", 2)


both_paths = pytest.mark.usefixtures("_path")


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _warn_always() -> Iterator[None]:
    torch.set_warn_always(True)  # else torch tells once a process, so that the order of tests would decide
    yield
    torch.set_warn_always(False)


def same(actual: Any, expected: Any, atol: float = ROUNDING) -> None:
    assert_close(actual, expected, rtol=0, atol=atol)


def centred(size: tuple[int, ...]) -> Tensor:
    """Voxel coordinates about the centre of the grid: ``(D, *size)``."""
    axes = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def linear(a: Tensor, size: tuple[int, ...]) -> Tensor:
    """The displacement ``u(x) = A (x - centre)``: ``(1, D, *size)``."""
    return torch.einsum("ij,j...->i...", a, centred(size))[None]


def contraction(spatial_dims: int, shear: float = 0.1) -> Tensor:
    """A matrix, not symmetric, that moves every point of the grids above inwards."""
    a = torch.diag(torch.tensor([-0.7, -0.5, -0.6], dtype=torch.float64))
    a[0, 1], a[1, 0], a[2, 0], a[1, 2] = shear, -0.5 * shear, 0.7 * shear, -shear
    return a[:spatial_dims, :spatial_dims].clone()


def swirl(size: tuple[int, ...]) -> Tensor:
    """A velocity ``(1, D, *size)`` that dies out at the border: everything stays inside, no map has a closed form."""
    window = torch.stack([torch.cos(torch.pi * x / (n - 1)) ** 2 for x, n in zip(centred(size), size, strict=True)])
    a = torch.tensor([[0.1, 0.3, -0.2], [-0.4, 0.1, 0.1], [0.2, -0.1, 0.2]], dtype=torch.float64)
    return linear(a[: len(size), : len(size)], size) * window.prod(0)


def noise(size: tuple[int, ...], batch: int = 1, reach: float = 3.0) -> Tensor:
    """A rough field; its points are off the voxels, and some lie outside the grid."""
    whole = torch.randint(-int(reach), int(reach) + 1, (batch, len(size), *size))
    off = 0.1 + 0.3 * torch.rand(whole.shape, dtype=torch.float64)  # neither on a voxel nor half way to the next
    return whole + off + 0.5 * torch.randint(0, 2, whole.shape)


def sampled(image: Tensor, ddf: Tensor, order: int, mode: str) -> Tensor:
    """SciPy's answer for one image ``(1, C, *size)``: it takes points in voxels, in the order of the array axes."""
    points = np.indices(image.shape[2:]) + ddf[0].numpy()
    return torch.stack([torch.from_numpy(map_coordinates(c, points, order=order, mode=mode)) for c in image[0].numpy()])


# identity_grid


@sizes
def test_identity_grid_is_numpy_indices(size: tuple[int, ...]) -> None:
    grid = identity_grid(torch.zeros(2, 5, *size, dtype=torch.float64))
    assert_close(grid, torch.from_numpy(np.indices(size))[None].double(), rtol=0, atol=0)


def test_coordinates_of_a_bfloat16_field_are_float32() -> None:
    grid = identity_grid(torch.zeros(1, 2, 300, 3, dtype=torch.bfloat16))
    assert grid.dtype == torch.float32
    assert grid[0, 0].unique().numel() == 300  # bfloat16 itself tells 279 of them apart


# warp


@both_paths
@sizes
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
def test_whole_voxels_shift_the_array(size: tuple[int, ...], mode: str, padding_mode: str) -> None:
    image = torch.rand(1, 2, *size, dtype=torch.float64)
    for axis in range(len(size)):
        ddf = torch.zeros(1, len(size), *size, dtype=torch.float64)
        ddf[:, axis] = 2
        n = size[axis]
        last = image.narrow(axis + 2, n - 1, 1) * (padding_mode == "border")
        expected = torch.cat([image.narrow(axis + 2, 2, n - 2), last, last], dim=axis + 2)
        same(warp(image, ddf, mode, padding_mode), expected)


@both_paths
@sizes
@pytest.mark.parametrize(("mode", "order"), [("bilinear", 1), ("nearest", 0)])
@pytest.mark.parametrize(("padding_mode", "scipy_mode"), [("border", "nearest"), ("zeros", "grid-constant")])
def test_warp_is_scipys(size: tuple[int, ...], mode: str, order: int, padding_mode: str, scipy_mode: str) -> None:
    image, ddf = torch.rand(1, 2, *size, dtype=torch.float64), noise(size)
    same(warp(image, ddf, mode, padding_mode)[0], sampled(image, ddf, order, scipy_mode))


@sizes
def test_warp_is_itks(size: tuple[int, ...]) -> None:
    # ITK counts axes from the last one and displaces in millimetres: a spacing that is not 1 tells the units apart.
    spacing = torch.tensor([1.5, 0.8, 2.0], dtype=torch.float64)[: len(size)]
    image = torch.rand(1, 1, *size, dtype=torch.float64)
    inside = linear(contraction(len(size)), size) + 0.2 * torch.rand(1, len(size), *size)
    image_mm = sitk.GetImageFromArray(image[0, 0].numpy())
    image_mm.SetSpacing(spacing.flip(0).tolist())
    vectors = torch.einsum("d...,d->...d", inside[0], spacing).flip(-1).contiguous()
    field_mm = sitk.GetImageFromArray(vectors.numpy(), isVector=True)
    field_mm.CopyInformation(image_mm)
    transform = sitk.DisplacementFieldTransform(field_mm)
    expected = sitk.GetArrayFromImage(sitk.Resample(image_mm, image_mm, transform, sitk.sitkLinear))
    same(warp(image, inside)[0, 0], torch.from_numpy(expected))


@both_paths
def test_single_voxel_axes_stay() -> None:
    size = (1, 5, 1)
    image, ddf = torch.rand(1, 1, *size, dtype=torch.float64), noise(size)
    same(warp(image, ddf)[0], sampled(image, ddf, 1, "nearest"))
    same(resize(ddf, [1, 9, 1])[:, [0, 2]], torch.zeros(1, 2, 1, 9, 1).double())  # no length, so no displacement
    along = 1 + (ddf[0, 1, 0, 2:, 0] - ddf[0, 1, 0, :-2, 0]) / 2
    same(jacobian_determinant(ddf)[0, 0, 0, 1:-1, 0], along)
    same(sum(w for _, w in linear_weights(ddf)), torch.ones(1, *size).double())


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64, *UNSIGNED],
    ids=str,
)
def test_nearest_keeps_values_and_dtype(dtype: torch.dtype) -> None:
    labels = torch.randint(0, 100, (1, 1, 6, 7)).to(dtype)
    shifted = warp(labels, torch.ones(1, 2, 6, 7), mode="nearest")
    assert_close(shifted[..., :-1, :-1], labels[..., 1:, 1:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_takes_halves_to_the_even_voxel(dtype: torch.dtype) -> None:
    for n in range(2, 60):
        ddf = torch.zeros(1, 2, n, 3, dtype=dtype)
        ddf[:, 0] = 0.5
        warped = warp(torch.arange(n).view(1, 1, n, 1).expand(1, 1, n, 3), ddf, mode="nearest")
        assert_close(warped[0, 0, :, 0], (torch.arange(n) + 0.5).round().long().clamp(max=n - 1))


def test_labels_past_the_digits_of_float32_are_exact() -> None:
    labels = 2**24 + torch.randint(0, 100, (1, 1, 6, 7))
    assert (labels.float().long() != labels).any()
    ddf = torch.ones(1, 2, 6, 7)
    for warped in (warp(labels, ddf, mode="nearest"), warp_labels(labels, ddf)):
        assert_close(warped[..., :-1, :-1], labels[..., 1:, 1:], rtol=0, atol=0)


@both_paths
def test_bfloat16_coordinates_would_move_the_image() -> None:
    image = torch.rand(1, 1, 300, 3).bfloat16()
    ddf = torch.zeros(1, 2, 300, 3, dtype=torch.bfloat16)
    ddf[:, 0] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warped = warp(image, ddf)
        field = integrate(ddf)
    assert warped.dtype == torch.bfloat16  # as the image
    same(
        warped[:, :, :-1].float(), image[:, :, 1:].float(), atol=2**-8
    )  # half a unit in bfloat16's last place, below 1
    assert field.dtype == torch.float32
    same(field, ddf.float(), atol=1e-6)  # a constant velocity, in float32


@sizes
def test_float64_stays_float64_under_autocast(size: tuple[int, ...]) -> None:
    image, ddf = torch.rand(1, 1, *size, dtype=torch.float64), noise(size)
    expected = warp(image, ddf), resize(ddf, [5] * len(size)), jacobian_determinant(ddf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close((warp(image, ddf), resize(ddf, [5] * len(size)), jacobian_determinant(ddf)), expected)


@both_paths
def test_mixed_precision_keeps_the_wider_coordinates() -> None:
    image, ddf = torch.rand(1, 1, 17, 23), noise((17, 23))
    assert warp(image, ddf).dtype == torch.float32  # as the image, whatever the field
    same(warp(image, ddf), warp(image.double(), ddf).float(), atol=0)
    assert compose(ddf.float(), ddf).dtype == torch.float64


@both_paths
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("size", [(10, 7), (9, 4, 5), (12, 3, 2), (7, 2, 3)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_threads_change_nothing(size: tuple[int, ...], batch: int, channels: int, mode: str) -> None:
    image = torch.rand(batch, channels, *size, dtype=torch.float64, requires_grad=True)
    ddf = noise(size, batch).requires_grad_()
    weight = torch.rand(image.shape, dtype=torch.float64)
    results = []
    for threads in (1, 2, 3, 6):  # 1 runs grid_sample as it is
        torch.set_num_threads(threads)
        warped = warp(image, ddf, mode, "zeros")
        results.append((warped, *torch.autograd.grad((warped * weight).sum(), (image, ddf))))
    for result in results[1:]:
        same(result, results[0])


@both_paths
@sizes
def test_warp_keeps_its_image_and_field_alone(size: tuple[int, ...]) -> None:
    image, ddf = torch.rand(1, 1, *size, dtype=torch.float64, requires_grad=True), noise(size).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        warp(image, ddf)
    assert [tensor.data_ptr() for tensor in saved] == [image.data_ptr(), ddf.data_ptr()]


@pytest.mark.usefixtures("_threads")
def test_loops_and_torch_agree_across_threads_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points that go far, over more voxels than a thread, a tile or a block takes."""
    torch.set_num_threads(3)
    for size, reach in (((40, 33, 70), 3.0), ((40, 33, 70), 30.0), ((300, 150), 5.0)):
        image = torch.rand(2, 2, *size, dtype=torch.float64, requires_grad=True)
        ddf = noise(size, 2, reach).requires_grad_()
        weight = torch.rand_like(image)
        results = []
        for enabled in (True, False):
            monkeypatch.setattr(switch, "enabled", enabled)
            warped, ddf_1 = warp(image, ddf), integrate(ddf, 3)
            of_warp = torch.autograd.grad((warped * weight).sum(), (image, ddf))
            results.append((warped, ddf_1, *of_warp, *torch.autograd.grad((ddf_1 * weight[:, :1]).sum(), ddf)))
        same(results[0], results[1])


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("side", [4.0, -4.0])
def test_rounds_keep_threads_apart(scale: float, side: float) -> None:
    """No two slabs of a round may add to one voxel, and each slab is in one round."""
    field = side * noise((48, 30, 40), 2).abs()
    rounds = loops._rounds(field.numpy(), scale)
    assert 1 < len(rounds) < 12
    for slabs in rounds:
        touched = torch.zeros(2, 48, dtype=torch.int64)
        for item, first, last in slabs:
            along = (scale * field[item, 0, first:last] + torch.arange(first, last)[:, None, None]).clamp(0, 47)
            planes = torch.cat([along.floor(), along.ceil()]).long().unique()
            own = torch.arange(first, last)  # where it writes the gradient of the field
            touched[item, torch.cat([planes, own]).unique()] += 1
        assert touched.max() == 1
    assert sorted(slab for slabs in rounds for slab in slabs) == [
        (b, k, k + 8) for b in (0, 1) for k in range(0, 48, 8)
    ]


def test_points_that_are_no_numbers_are_harmless() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        image, ddf = torch.rand(1, 1, 5, 6, requires_grad=True), torch.zeros(1, 2, 5, 6)
        ddf[0, :, 2, 3] = value
        warped = warp(image, ddf.requires_grad_())
        gradients = torch.autograd.grad(warped.sum(), (image, ddf))
        assert all(t.isfinite().all() for t in (warped, *gradients))
        assert (warped >= image.min()).all()
        assert (warped <= image.max()).all()


def test_the_switch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    field = torch.zeros(1, 2, 5, 4)
    assert kernels.loops(field, field) is loops
    assert kernels.loops(field, field.double()) is None
    assert kernels.loops(field.bfloat16()) is None
    assert kernels.loops(field.to("meta")) is None
    assert kernels.loops(field[:0]) is None
    with FakeTensorMode():
        assert integrate(torch.zeros(1, 2, 5, 4)).shape == (1, 2, 5, 4)
    monkeypatch.setattr(switch, "enabled", False)
    assert kernels.loops(field) is None


class Operators(TorchDispatchMode):
    """Counts torch's operators. Loops are hidden from whoever counts, so that the switch is forced."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("one_thread")  # several look first at which parts of a field they share
def test_fields_take_one_pass_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator of torch's goes over a whole field beside the loops: with one, the speed would be lost unseen."""
    calls: list[str] = []

    def spied(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return call

    for name in ("sample", "sample_backward", "square", "square_backward"):
        monkeypatch.setattr(loops, name, spied(name, getattr(loops, name)))
    monkeypatch.setattr(blocks, "loops", lambda *tensors: loops)
    image, dvf = torch.rand(1, 1, 5, 6, requires_grad=True), torch.rand(1, 2, 5, 6, requires_grad=True)
    with Operators() as seen:
        warped, ddf = warp(image, dvf), integrate(dvf, 4)
        torch.autograd.grad((warped, ddf), (image, dvf), (torch.ones_like(warped), torch.ones_like(ddf)))
    assert calls == ["sample", *["square"] * 4, *["square_backward"] * 4, "sample_backward"]
    # allowed: memory for results, the sum of the two gradients, and what shares memory
    views = {"new_empty", "new_zeros", "zero_", "detach", "alias", "ones_like", "view", "empty", "unsqueeze", "add"}
    names = [name.split(".")[1] for name in seen.names]
    assert set(names) <= views
    assert names.count("add") <= 1


# compose


@both_paths
@sizes
def test_composing_linear_maps_multiplies_matrices(size: tuple[int, ...]) -> None:
    eye = torch.eye(len(size), dtype=torch.float64)
    outer, inner = torch.randn(len(size), len(size), dtype=torch.float64), contraction(len(size))
    assert (outer @ inner - inner @ outer).abs().max() > 0.1  # else the order could not be seen
    expected = linear((eye + outer) @ (eye + inner) - eye, size)
    same(compose(linear(outer, size), linear(inner, size)), expected)


@sizes
def test_warping_twice_is_warping_by_the_composition(size: tuple[int, ...]) -> None:
    image = torch.einsum("cj,j...->c...", torch.randn(2, len(size), dtype=torch.float64), centred(size))[None]
    outer, inner = linear(contraction(len(size)), size), linear(contraction(len(size), shear=-0.2), size)
    same(warp(warp(image, outer), inner), warp(image, compose(outer, inner)))


# integrate


@sizes
def test_integrate_is_the_matrix_exponential(size: tuple[int, ...]) -> None:
    a = contraction(len(size))
    exact = linear(torch.linalg.matrix_exp(a) - torch.eye(len(size)), size)
    errors = [(integrate(linear(a, size), n) - exact).abs().max() for n in (6, 7, 8)]
    for coarse, fine in pairwise(errors):
        same(coarse / fine, torch.tensor(2.0).double(), atol=0.02)  # first order: 2 up to terms of relative size 2^-6
    same(integrate(linear(a, size), 24), exact, atol=1e-6)  # 2^-24 times 10 voxels


@both_paths
@sizes
def test_default_is_seven_squarings_of_one_step(size: tuple[int, ...]) -> None:
    a, eye = contraction(len(size)), torch.eye(len(size), dtype=torch.float64)
    for num_steps in (0, 1, 3):
        power = torch.linalg.matrix_power(eye + a / 2**num_steps, 2**num_steps)
        same(integrate(linear(a, size), num_steps), linear(power - eye, size))
    same(integrate(linear(a, size)), integrate(linear(a, size), 7), atol=0)


@both_paths
@sizes
@pytest.mark.parametrize(("padding_mode", "scipy_mode"), [("border", "nearest"), ("zeros", "grid-constant")])
def test_squarings_are_scipys(size: tuple[int, ...], padding_mode: str, scipy_mode: str) -> None:
    dvf = 4 * noise(size)  # some of it leaves the grid in each squaring
    expected = dvf / 2**3
    for _ in range(3):
        expected = expected + sampled(expected, expected, 1, scipy_mode)
    same(integrate(dvf, 3, padding_mode), expected)
    if padding_mode == "border":
        same(integrate(dvf, 3), expected)


@sizes
def test_minus_the_velocity_gives_the_inverse(size: tuple[int, ...]) -> None:
    errors = []
    for grid in (size, tuple(2 * n - 1 for n in size)):
        dvf = swirl(grid)
        there, back = integrate(dvf, 12), integrate(-dvf, 12)
        left = torch.cat([compose(there, back), compose(back, there)])
        errors.append(float(left.abs().max() / there.abs().max()))
    # What is left is linear interpolation: h^2 u'' / 8 for each axis, with u'' = (2 pi / 8)^2 u / 2 on the short one.
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 3  # second order in the size of a voxel: 4 times less, in the limit


@sizes
def test_half_resolution_integrates_the_same_flow(size: tuple[int, ...]) -> None:
    a, half = contraction(len(size)), [9, 13] if len(size) == 2 else [5, 7, 8]  # a ratio for each axis
    ddf = resize(integrate(resize(linear(a, size), half), 24), list(size))
    exact = linear(torch.linalg.matrix_exp(a) - torch.eye(len(size)), size)
    same(ddf, exact, atol=1e-6)  # 2^-24 times 10 voxels


@pytest.mark.parametrize("num_steps", [-1, 31])
def test_integrate_refuses(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"^num_steps is {num_steps}\b.* 0 to 30"):
        integrate(torch.zeros(1, 2, 5, 4), num_steps)
    assert integrate(torch.zeros(1, 2, 5, 4), 30).shape == (1, 2, 5, 4)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (1, 3, 5, 4), (1, 2, 5, 4, 3), (1, 1, 5)])
@pytest.mark.parametrize(
    ("function", "name"),
    [(integrate, "dvf"), (invert, "ddf"), (half, "ddf"), (jacobian_determinant, "ddf"), (linear_weights, "ddf")],
)
def test_what_is_no_field_is_refused(function: Callable[..., Any], name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} has shape {list(shape)}. A field is (B, 2, H, W) or ")):
        function(torch.zeros(shape))


# invert


@sizes
def test_inverse_of_linear_maps(size: tuple[int, ...]) -> None:
    # phi stretches, so that its inverse stays inside the grid.
    a, eye = -contraction(len(size)), torch.eye(len(size), dtype=torch.float64)
    ddf = linear(a, size)
    inverse, residual = invert(ddf, max_iterations=300, tolerance=1e-8)
    # |I + A| >= 1 brings nothing further apart, so the error is at most the tolerance.
    same(inverse, linear(torch.linalg.inv(eye + a) - eye, size), atol=1e-8)
    assert (residual <= 1e-8).all()
    assert residual.shape == (1,)


@sizes
def test_residual_is_what_is_left_after_composition(size: tuple[int, ...]) -> None:
    ddf = torch.cat([0.3 * torch.rand(1, len(size), *size), torch.zeros(1, len(size), *size)]).double()
    inverse, residual = invert(ddf, max_iterations=2, tolerance=0)
    left = torch.linalg.vector_norm(compose(ddf, inverse), dim=1).flatten(1).max(dim=1).values
    assert left[0] > 1e-3  # two passes are not enough
    assert left[1] == 0  # each item has a residual of its own
    same(residual, left)
    enough, residual = invert(ddf)
    assert (residual <= 1e-3).all()
    assert torch.linalg.vector_norm(compose(ddf, enough), dim=1).max() <= 1e-3  # the documented default
    assert residual[0] > 1e-6  # and it stops there


@sizes
def test_half_twice_is_the_whole(size: tuple[int, ...]) -> None:
    ddf = integrate(noise(size, batch=2, reach=1.5))
    found = half(ddf)
    assert_close(compose(found, found), ddf, rtol=0, atol=1.1e-3)  # the search stops at 1e-3
    assert float((found - ddf / 2).abs().max()) > 0.02  # which is not half of the vectors
    assert_close(half(ddf, max_iterations=0), ddf / 2)


def test_invert_without_a_pass_is_the_first_guess() -> None:
    ddf = noise((6, 7))
    same(invert(ddf, max_iterations=0)[0], -ddf, atol=0)


@sizes
def test_residual_tells_that_a_map_folds(size: tuple[int, ...]) -> None:
    ddf = 20 * swirl(size)
    assert jacobian_determinant(ddf).min() < -1
    _, residual = invert(ddf, max_iterations=20)
    assert (residual > 1).all()


# resize


@sizes
def test_resize_changes_grid_and_unit(size: tuple[int, ...]) -> None:
    a, new = contraction(len(size)), (9, 29, 15)[: len(size)]  # a ratio for each axis, smaller and larger
    ratio = torch.tensor([(m - 1) / (n - 1) for m, n in zip(new, size, strict=True)], dtype=torch.float64)
    resized = resize(linear(a, size), list(new))
    same(resized, linear(torch.diag(ratio) @ a @ torch.diag(1 / ratio), new))
    same(resize(resized, list(size)), linear(a, size))


@sizes
def test_resize_samples_between_the_corners(size: tuple[int, ...]) -> None:
    field, new = torch.rand(1, len(size), *size, dtype=torch.float64), (13, 29, 6)[: len(size)]
    axes = [np.linspace(0, n - 1, m) for n, m in zip(size, new, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    for d, component in enumerate(resize(field, list(new))[0]):
        ratio = (new[d] - 1) / (size[d] - 1)
        expected = ratio * map_coordinates(field[0, d].numpy(), points, order=1, mode="nearest")
        same(component, torch.from_numpy(expected))


@sizes
def test_resize_to_the_same_size_is_the_identity(size: tuple[int, ...]) -> None:
    field = noise(size)
    assert_close(resize(field, list(size)), field, rtol=0, atol=0)
    assert resize(field.bfloat16(), list(size)).dtype == torch.float32


@pytest.mark.parametrize("size", [(8,), (8, 9, 7), (0, 9)])
def test_resize_refuses_sizes(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"size {list(size)} ") + r".* field of shape \[1, 2, 5, 4\]"):
        resize(torch.zeros(1, 2, 5, 4), list(size))


@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (1, 1, 5)])
def test_resize_refuses_fields_of_other_spaces(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^size .* field of shape " + re.escape(str(list(shape)))):
        resize(torch.zeros(shape), list(shape[2:]))


# smooth


@sizes
@pytest.mark.parametrize(("sigma", "passes"), [(0.6, 1), (0.75, 2), (1.2, 3)])
def test_smooth_convolves_along_each_axis(size: tuple[int, ...], sigma: float, passes: int) -> None:
    image = torch.rand(1, 2, *size, dtype=torch.float64)
    weight = sigma**2 / (2 * passes)
    expected = image.numpy()
    for axis in range(2, expected.ndim):
        for _ in range(passes):
            expected = convolve1d(expected, [weight, 1 - 2 * weight, weight], axis, mode="nearest")
    same(smooth(image, sigma), torch.from_numpy(expected))
    same(smooth(image, 0.0), image, atol=0)


def test_smooth_has_the_width_of_its_gaussian() -> None:
    pulse = torch.zeros(1, 1, 41, 43, dtype=torch.float64)
    pulse[..., 20, 21] = 1
    found = smooth(pulse, 1.5)[0, 0]
    same(found.sum(), torch.tensor(1.0).double())
    same((found.sum(1) * (torch.arange(41) - 20.0).square()).sum(), torch.tensor(1.5**2).double())
    gaussian = torch.from_numpy(gaussian_filter(pulse[0, 0].numpy(), 1.5))
    # a binomial of 10 steps: 1 / 40 lower at its peak, along each of two axes
    assert (found - gaussian).abs().max() < 0.05 * gaussian.max()
    same(smooth(pulse[..., 20:21, 21:22], 0.6), pulse[..., 20:21, 21:22])  # one voxel, whose border is itself


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_smooth_refuses_what_is_no_width(sigma: float) -> None:
    with pytest.raises(ValueError, match=rf"^sigma is {sigma}\."):
        smooth(torch.zeros(1, 1, 4, 5), sigma)


# jacobian_determinant


@sizes
@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_determinant_of_linear_maps(size: tuple[int, ...], scheme: str) -> None:
    for a in (contraction(len(size)), torch.randn(len(size), len(size), dtype=torch.float64)):
        det = torch.linalg.det(torch.eye(len(size)) + a)
        same(jacobian_determinant(linear(a, size), scheme), det.expand(1, 1, *size))


@sizes
def test_central_differences_are_numpys_gradient(size: tuple[int, ...]) -> None:
    ddf = noise(size)
    phi = np.indices(size) + ddf[0].numpy()
    gradient = np.stack([np.stack(np.gradient(component)) for component in phi])  # one-sided at the border as well
    same(jacobian_determinant(ddf)[0, 0], torch.from_numpy(np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)))))


@sizes
def test_forward_differences_repeat_the_last(size: tuple[int, ...]) -> None:
    ddf = noise(size)
    phi = np.indices(size) + ddf[0].numpy()
    rows = []
    for axis in range(1, len(size) + 1):
        step = np.diff(phi, axis=axis)
        rows.append(np.concatenate([step, np.take(step, [-1], axis=axis)], axis=axis))
    expected = np.linalg.det(np.moveaxis(np.stack(rows), (0, 1), (-2, -1)))
    same(jacobian_determinant(ddf, "forward")[0, 0], torch.from_numpy(expected))


@sizes
def test_central_differences_are_exact_for_quadratics(size: tuple[int, ...]) -> None:
    x, dims = centred(size), len(size)
    q = 0.02 * torch.randn(dims, dims, dims, dtype=torch.float64)
    ddf = torch.einsum("ijk,j...,k...->i...", q, x, x)[None]
    gradient = torch.einsum("ijk,k...->...ij", q + q.transpose(1, 2), x)
    inner = (slice(1, -1),) * dims
    expected = torch.linalg.det(torch.eye(dims) + gradient)
    same(jacobian_determinant(ddf)[0, 0][inner], expected[inner])


def test_closed_form_in_2d() -> None:
    # x -> x + s x y: d(phi_0)/dx = 1 + s y, and the other row keeps phi_1 = y.
    x, y = centred((17, 23))
    ddf = torch.stack([0.2 * x * y, torch.zeros_like(x)])[None]
    determinant = jacobian_determinant(ddf)[0, 0]
    same(determinant, 1 + 0.2 * y)
    assert (determinant[:, :6] < 0).all()  # y < -5 folds
    assert (determinant[:, 7:] > 0).all()


@sizes
def test_only_forward_differences_see_a_checkerboard(size: tuple[int, ...]) -> None:
    sign = 1 - 2 * (torch.from_numpy(np.indices(size)).sum(0) % 2).double()
    ddf = torch.zeros(1, len(size), *size, dtype=torch.float64)
    ddf[:, 0] = 0.6 * sign  # neighbours along the first axis change places: steps of 1 - 1.2 and 1 + 1.2
    inner = (slice(None), slice(None), *(slice(1, -1),) * len(size))
    same(jacobian_determinant(ddf)[inner], torch.ones_like(ddf[:, :1])[inner])
    same(jacobian_determinant(ddf, "forward")[inner], 1 - 1.2 * sign[None, None][inner])


@sizes
def test_a_mirror_has_a_negative_determinant(size: tuple[int, ...]) -> None:
    for axis in range(len(size)):
        a = torch.zeros(len(size), len(size), dtype=torch.float64)
        a[axis, axis] = -2.0
        same(jacobian_determinant(linear(a, size)), torch.full((1, 1, *size), -1.0).double())


@sizes
@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("number", [2, 3, 1000])
def test_determinant_does_not_depend_on_the_slabs(
    size: tuple[int, ...], scheme: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ddf = noise(size)
    whole = jacobian_determinant(ddf, scheme)
    monkeypatch.setattr(blocks, "slabs", lambda image, numbers: ranges(image.shape[2], number))
    assert torch.equal(jacobian_determinant(ddf, scheme), whole)


def test_determinant_refuses_other_schemes() -> None:
    with pytest.raises(ValueError, match=r"^scheme is 'backward'\. .*'central' or 'forward'"):
        jacobian_determinant(torch.zeros(1, 2, 5, 4), "backward")


# linear_weights and warp_labels


@sizes
def test_smaller_steps_invert_what_stretches_more(size: tuple[int, ...]) -> None:
    middle = torch.tensor(size).double().view(1, -1, *[1] * len(size)) / 2
    away = identity_grid(torch.zeros(1, 1, *size).double()) - middle
    ddf = 1.5 * away.clamp(-2, 2)  # by 150 % about the middle
    assert float(invert(ddf)[1]) > 0.5
    inverse, residual = invert(ddf, step=0.5)  # converges up to 300 %
    assert float(residual) <= 1e-3
    same(compose(ddf, inverse), torch.zeros_like(ddf), atol=1e-3)


@both_paths
@sizes
def test_linear_weights_reassemble_the_warp_and_its_gradient(size: tuple[int, ...]) -> None:
    image, ddf = torch.rand(2, 1, *size, dtype=torch.float64), noise(size, batch=2).requires_grad_()
    found = linear_weights(ddf)
    assert len(found) == 2 ** len(size)
    same(sum(weight for _, weight in found), torch.ones(2, *size).double())
    assert all((weight >= 0).all() and index.dtype == torch.int64 for index, weight in found)
    gathered = sum(image.flatten(1).gather(1, i.flatten(1)).view_as(weight) * weight for i, weight in found)
    warped = warp(image, ddf)[:, 0]
    same(gathered, warped)
    share = torch.rand_like(warped)
    same(torch.autograd.grad((gathered * share).sum(), ddf), torch.autograd.grad((warped * share).sum(), ddf))


@sizes
def test_linear_weights_of_another_grid_are_its_voxels(size: tuple[int, ...]) -> None:
    other, ddf = [n + 3 for n in size[::-1]], noise(size)
    image = torch.rand(1, 1, *other, dtype=torch.float64)
    found = linear_weights(ddf, other)
    gathered = sum(image.flatten(1).gather(1, i.flatten(1)).view_as(weight) * weight for i, weight in found)
    common = [max(n, m) for n, m in zip(size, other, strict=True)]  # a grid for both, cut to where points lie within
    points = (ddf + identity_grid(ddf)).clamp(min=0)
    within = torch.stack([point <= n - 1 for point, n in zip(points.unbind(1), other, strict=True)]).all(0)
    ends = [pad for n, m in zip(reversed(common), reversed(size), strict=True) for pad in (0, n - m)]
    wider = torch.nn.functional.pad(points - identity_grid(ddf), ends)
    ends = [pad for n, m in zip(reversed(common), reversed(other), strict=True) for pad in (0, n - m)]
    warped = warp(torch.nn.functional.pad(image, ends), wider)[:, 0][(..., *(slice(n) for n in size))]
    assert within.double().mean() > 0.5
    same(gathered[within], warped[within])


def test_linear_weights_refuse_a_size_of_another_space() -> None:
    with pytest.raises(ValueError, match=r"^size \[5\] .* ddf of 2 components"):
        linear_weights(torch.zeros(1, 2, 5, 4), [5])


def test_linear_weights_on_a_voxel_are_that_voxel() -> None:
    (here, share), *others = linear_weights(torch.zeros(2, 2, 5, 4))
    assert_close(here, torch.arange(20).view(1, 5, 4).expand(2, 5, 4))
    assert (share == 1).all()
    assert all((weight == 0).all() for _, weight in others)


@sizes
@pytest.mark.parametrize("offset", ["rough", "half a voxel"])
def test_labels_go_to_the_largest_share(size: tuple[int, ...], offset: str) -> None:
    values = torch.tensor([-3, 0, 7, 2035])
    chosen = torch.randint(0, 4, (1, 1, *size))
    ddf = noise(size) if offset == "rough" else torch.full((1, len(size), *size), 0.5).double()
    one_hot = torch.cat([(chosen == k).double() for k in range(4)], dim=1)
    shares = sampled(one_hot, ddf, 1, "nearest").numpy()
    if offset == "half a voxel":  # every share is a multiple of 1/8, so that ties are exact; NumPy takes the first
        assert (np.sort(shares, axis=0)[-1] == np.sort(shares, axis=0)[-2]).mean() > 0.1
    assert_close(warp_labels(values[chosen], ddf)[0, 0], values[torch.from_numpy(shares.argmax(axis=0))])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float32, *UNSIGNED], ids=str
)
def test_warped_labels_keep_their_dtype(dtype: torch.dtype) -> None:
    labels = torch.randint(0, 2, (2, 1, 6, 7)).to(dtype)
    assert_close(warp_labels(labels, torch.zeros(2, 2, 6, 7)), labels, rtol=0, atol=0)


def test_warp_labels_takes_one_channel() -> None:
    with pytest.raises(ValueError, match=r"^labels of shape \[1, 2, 5, 4\] have 2 channels"):
        warp_labels(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))


@pytest.mark.parametrize(("option", "value"), [("mode", "bicubic"), ("padding_mode", "reflection")])
def test_warp_refuses_modes_that_are_not_ours(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} is '{value}'\. .*'\w+' or '\w+'"):
        warp(torch.zeros(1, 1, 5, 4), torch.zeros(1, 2, 5, 4), **{option: value})


# all of them


@pytest.mark.parametrize(
    ("image", "ddf", "expected"),
    [
        ((1, 1, 5, 4), (1, 3, 5, 4), "[1, 2, 5, 4]"),
        ((1, 1, 5, 4), (1, 2, 4, 5), "[1, 2, 5, 4]"),
        ((2, 1, 5, 4), (1, 2, 5, 4), "[2, 2, 5, 4]"),
        ((1, 1, 5, 4, 3), (1, 2, 5, 4), "[1, 3, 5, 4, 3]"),
        ((1, 1, 5), (1, 1, 5), "[1, 1, 5]"),
    ],
)
@pytest.mark.parametrize("function", [warp, warp_labels])
def test_fields_of_another_grid_are_refused(
    function: Callable[..., Tensor], image: tuple[int, ...], ddf: tuple[int, ...], expected: str
) -> None:
    shapes = [re.escape(str(shape)) for shape in (list(ddf), list(image), expected)]
    with pytest.raises(ValueError, match="^ddf of shape {}.* image of shape {}.* {}".format(*shapes)):
        function(torch.zeros(image), torch.zeros(ddf))


def test_labels_are_not_interpolated() -> None:
    with pytest.raises(TypeError, match=r"image of torch\.uint8 .*mode='nearest'"):
        warp(torch.zeros(1, 1, 5, 4, dtype=torch.uint8), torch.zeros(1, 2, 5, 4))


def off_voxels(size: tuple[int, ...], low: float) -> Tensor:
    """A field that lands between ``low`` and ``low + 0.2`` past a voxel: derivatives jump only on the voxels."""
    return (low + 0.2 * torch.rand(1, len(size), *size, dtype=torch.float64)).requires_grad_()


@both_paths
@pytest.mark.parametrize("size", [(3, 4), (2, 3, 3)], ids=["2-D", "3-D"])
def test_gradients(size: tuple[int, ...]) -> None:
    image = torch.rand(1, 2, *size, dtype=torch.float64, requires_grad=True)
    ddf, other = off_voxels(size, 0.3), off_voxels(size, -0.6)
    functions: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (warp, (image, ddf)),
        (lambda x, u: warp(x, u, padding_mode="zeros"), (image, other)),
        (compose, (other, ddf)),
        (lambda v: integrate(v, 2), (ddf,)),  # passes 1/4 and 1/2 of the way: off the voxels too
        (lambda u: resize(u, [4, 2, 5][: len(size)]), (ddf,)),
        (jacobian_determinant, (ddf,)),
        (lambda u: jacobian_determinant(u, "forward"), (ddf,)),
        (lambda u: [weight for _, weight in linear_weights(u)], (ddf,)),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.usefixtures("_warn_always")
def test_gradient_of_the_inverse() -> None:
    ddf = off_voxels((3, 4), 0.3)
    assert torch.autograd.gradcheck(lambda u: invert(u, max_iterations=2, tolerance=0), ddf)


def inputs(size: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "image": torch.rand(batch, 2, *size, dtype=torch.float64),
        "labels": torch.randint(0, 5, (batch, 1, *size)),
        "ddf": noise(size, batch),
        "dvf": noise(size, batch, reach=1.0),
        "size": [6, 11, 8][: len(size)],
        "small": 0.3 * torch.rand(batch, len(size), *size, dtype=torch.float64),
        "votes": torch.randint(0, 2, (batch, len(size), *size)),
    }


CALLS: list[tuple[Callable[..., Any], list[str], dict[str, Any]]] = [
    (identity_grid, ["image"], {}),
    (warp, ["image", "ddf"], {}),
    (warp, ["image", "ddf"], {"padding_mode": "zeros"}),
    (warp, ["labels", "ddf"], {"mode": "nearest"}),
    (sample, ["image", "ddf"], {}),
    (compose, ["dvf", "ddf"], {}),
    (integrate, ["dvf"], {}),
    (integrate, ["dvf"], {"num_steps": 3, "padding_mode": "zeros"}),
    (invert, ["small"], {"max_iterations": 4, "tolerance": 0.0}),  # a fixed number of passes, whoever shares the batch
    (half, ["small"], {"max_iterations": 1}),
    (resize, ["ddf", "size"], {}),
    (smooth, ["image"], {"sigma": 1.2}),
    (smooth_axes, ["image"], {"sigmas": [1.2, 0.6]}),
    (jacobian_determinant, ["ddf"], {}),
    (jacobian_determinant, ["ddf"], {"scheme": "forward"}),
    (linear_weights, ["ddf"], {}),
    (linear_weights, ["ddf", "size"], {}),
    (weighted_vote, ["votes", "small"], {}),
    (as_signed, ["labels"], {}),
    (warp_labels, ["labels", "ddf"], {}),
]


def call(function: Callable[..., Any], names: list[str], options: dict[str, Any], given: dict[str, Any]) -> Any:
    return function(*(given[name] for name in names), **options)


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors(part)]


def each(given: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in given.items()}


@both_paths
@sizes
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
def test_sampling_where_voxels_go_is_warping(size: tuple[int, ...], mode: str, padding_mode: str) -> None:
    image, ddf = inputs(size, batch=2)["image"], inputs(size, batch=2)["ddf"]
    found = sample(image, identity_grid(ddf) + ddf, mode, padding_mode)
    expected = warp(image, ddf, mode, padding_mode)
    # Float32 coordinates of up to 30 voxels, and loops that add up in another order. A point between two voxels may
    # fall to either.
    assert ((found - expected).abs() > 1e-4).float().mean() < (0.01 if mode == "nearest" else 1e-6)


def test_every_public_function_is_called() -> None:
    # for other modules: the first takes rows of tensors, the others give no tensors
    parts = {"determinant", "check_field", "ranges", "slabs"}
    assert {function.__name__ for function, _, _ in CALLS} == set(blocks.__all__) - parts


@both_paths
@sizes
@pytest.mark.parametrize(("function", "names", "options"), CALLS)
def test_a_batch_is_its_items(
    function: Callable[..., Any], names: list[str], options: dict[str, Any], size: tuple[int, ...]
) -> None:
    given = inputs(size, batch=3)
    whole = tensors(call(function, names, options, given))
    for i in range(3):
        one = tensors(call(function, names, options, each(given, itemgetter(slice(i, i + 1)))))
        same(one, [t[min(i, len(t) - 1)][None] for t in whole])  # the identity grid is one for all


@sizes
@pytest.mark.parametrize(("function", "names", "options"), CALLS)
def test_a_batch_of_none_gives_none(
    function: Callable[..., Any], names: list[str], options: dict[str, Any], size: tuple[int, ...]
) -> None:
    results = [tensors(call(function, names, options, inputs(size, batch=n))) for n in (0, 1)]
    for none, one in zip(*results, strict=True):
        batch = 1 if function is identity_grid else 0  # one for all
        assert (none.shape, none.dtype) == ((batch, *one.shape[1:]), one.dtype)


@both_paths
@sizes
@pytest.mark.parametrize(("function", "names", "options"), CALLS)
def test_memory_layout_does_not_matter(
    function: Callable[..., Any], names: list[str], options: dict[str, Any], size: tuple[int, ...]
) -> None:
    given = inputs(size, batch=2)
    last = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    layouts = [
        each(given, lambda t: t.contiguous(memory_format=last)),
        each(given, lambda t: t.repeat_interleave(2, -1)[..., ::2]),
        each(given, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)),
    ]
    expected = call(function, names, options, given)
    for layout in layouts:
        assert not layout["ddf"].is_contiguous()
        same(call(function, names, options, layout), expected)


@both_paths
@sizes
@pytest.mark.parametrize(("function", "names", "options"), CALLS)
def test_a_metatensor_is_its_values(
    function: Callable[..., Any], names: list[str], options: dict[str, Any], size: tuple[int, ...]
) -> None:
    given = inputs(size, batch=2)
    results, gradients = [], []
    for kind in (Tensor, MetaTensor):
        leaves = each(given, lambda t: t.clone().requires_grad_(t.is_floating_point()))
        result = tensors(call(function, names, options, each(leaves, kind)))
        results.append([t.detach().as_subclass(Tensor) for t in result])
        sum((t.as_subclass(Tensor).square().sum() for t in result), leaves["ddf"].sum()).backward()
        gradients.append([leaves[name].grad for name in ("image", "ddf", "dvf", "small")])
    same(results[1], results[0], atol=0)
    same(*gradients, atol=0)


# Deprecated or not, it is what MONAI exports a bundle with.
@pytest.mark.filterwarnings("ignore:`torch.jit.(script|save|load)` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("function", dict.fromkeys(f for f, _, _ in CALLS))
def test_scripts_give_the_same(function: Callable[..., Any]) -> None:
    scripted, file = torch.jit.script(function), io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    defaults = {p.name: p.default for p in signature(function).parameters.values() if p.default is not p.empty}
    for size in [(17, 23), (17, 23), (9, 12), (9, 11, 14), (5, 6, 7)]:  # the second call is optimised for the first
        for _, names, options in [c for c in CALLS if c[0] is function]:
            given = inputs(size, batch=2)
            expected = call(function, names, options, given)
            same(call(scripted, names, options, given), expected)
            absent = {name: value for name, value in defaults.items() if name not in names}  # a file keeps no defaults
            same(call(loaded, names, absent | options, given), expected)


class HalfResolution(torch.nn.Module):
    def forward(self, image: Tensor, dvf: Tensor) -> Tensor:
        return warp(image, resize(integrate(dvf, 3), list(image.shape[2:])))


# The exporter walks torch's own trees by a spelling that torch deprecates.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_onnx_gives_the_same() -> None:
    """In 2-D; test_distribution exports networks of 3-D."""
    image, dvf = torch.rand(1, 1, 9, 12), noise((5, 7)).float()
    program = torch.onnx.export(HalfResolution().eval(), (image, dvf), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    (warped,) = session.run(None, dict(zip(names, (image.numpy(), dvf.numpy()), strict=True)))
    # float32: coordinates up to 12 err by 1e-6, times 4 interpolations, times a slope of at most 1 per voxel.
    same(torch.from_numpy(warped), HalfResolution()(image, dvf), atol=1e-5)
