"""The convolutions of the U-Net are those of torch, whatever they save on the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from voxelmorph_monai import unet

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64 with another order of summation


@pytest.mark.parametrize(("size", "slabs"), [((7, 5, 4), [7]), ((19, 256, 3), [9, 10]), ((33, 256), [11, 11, 11])])
def test_heads_convolve_bfloat16_in_float32(size, slabs):
    torch.manual_seed(0)
    features = torch.randn(2, 5, *size).bfloat16().requires_grad_()
    assert [stop - start for start, stop in unet._slabs(features)] == slabs
    weight, bias = torch.randn(3, 5, *[3] * len(size), requires_grad=True), torch.randn(3, requires_grad=True)
    found = unet.convolve_exactly(features, weight, bias)
    direction = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (features, weight, bias), direction)
    exact = [x.detach().double().requires_grad_() for x in (features, weight, bias)]
    expected = (F.conv2d if len(size) == 2 else F.conv3d)(*exact, padding=1)
    assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)  # bfloat16 would be off by 4e-3
    *others, of_features = reversed(torch.autograd.grad(expected, exact, direction.double()))
    assert_close(gradients[0], of_features.bfloat16(), rtol=2**-7, atol=1e-4)  # it has the type of the features
    for one, right in zip(reversed(gradients[1:]), others, strict=True):
        assert_close(one.double(), right, rtol=1e-4, atol=1e-3)  # sums of up to 29,184 products of about 1


@pytest.mark.parametrize("dims", [2, 3])
def test_bfloat16_is_pooled_and_kept_in_bfloat16(dims):
    x = torch.randn(1, 4, *[8] * dims).bfloat16().requires_grad_()
    saved = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.dtype) or tensor, lambda x: x),
    ):
        found = unet._max_pool(x)
    assert_close(found, (F.max_pool2d if dims == 2 else F.max_pool3d)(x, 2), rtol=0, atol=0)
    assert torch.float32 not in saved


@pytest.mark.parametrize("dims", [2, 3])
def test_upsampled_features_are_convolved_at_their_own_resolution(dims):
    torch.manual_seed(0)
    low = (3, 5, 4)[:dims]
    x = torch.randn(2, 3, *low, dtype=torch.float64)
    skip = torch.randn(2, 2, *(2 * n for n in low), dtype=torch.float64)
    convolution = unet.Convolution(dims, 5, 4).double()
    nn.init.normal_(convolution.conv.bias)
    whole = x
    for axis in range(2, 2 + dims):
        whole = whole.repeat_interleave(2, axis)
    results, gradients = [], []
    for found in (convolution(x, skip), convolution(torch.cat([whole, skip], dim=1))):
        results.append(found)
        gradients.append(torch.autograd.grad(found.square().sum(), list(convolution.parameters())))
    assert_close(*results, **EXACT)
    assert_close(*gradients, **EXACT)
