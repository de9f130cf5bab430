"""Loss and precision of the anatomy network's training."""

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from voxelmorph_monai.anatomy_training import DiceCrossEntropy, LowPrecisionInferer
from voxelmorph_monai.networks import has_fast_bfloat16


def example(*size: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(size[0], classes, *size[1:], generator=generator)
    label = torch.randint(0, classes - 1, (size[0], 1, *size[1:]), generator=generator)  # the last class is absent
    return logits.requires_grad_(), label


@pytest.mark.parametrize("size", [(1, 6, 7, 8), (2, 5, 4, 3), (2, 9, 8)])
@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_loss_and_its_gradient_equal_monai(size: tuple[int, ...], weight: float) -> None:
    oracle = DiceCELoss(
        to_onehot_y=True,
        softmax=True,
        smooth_nr=1.0,
        smooth_dr=1.0,
        lambda_ce=weight,
        batch=True,
        include_background=True,
    )
    logits, label = example(*size)
    expected = oracle(logits, label)
    found = DiceCrossEntropy(weight)(logits, label.to(torch.uint8))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)  # sums of some hundred float32 numbers
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-4, atol=1e-7)


def test_a_perfect_prediction_costs_nothing() -> None:
    _, label = example(1, 6, 7, 8)
    logits = 100.0 * nn.functional.one_hot(label[:, 0], 5).movedim(-1, 1)
    assert DiceCrossEntropy()(logits, label).item() == pytest.approx(0, abs=1e-6)


def test_a_certain_mistake_keeps_the_loss_finite() -> None:
    logits, label = example(1, 6, 7, 8)
    loss = DiceCrossEntropy()(1e4 * logits, label)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_network_runs_in_bfloat16_only_where_that_is_fast() -> None:
    seen: list[torch.dtype] = []

    class Network(nn.Conv2d):
        def forward(self, image: Tensor) -> Tensor:
            seen.append((out := super().forward(image)).dtype)
            return out

    network = Network(1, 2, 3)
    outputs = [
        LowPrecisionInferer(amp)(torch.ones(1, 1, 40, size), network)
        for amp, size in ((True, 40), (True, 32), (False, 40))
    ]
    assert seen == [torch.bfloat16 if has_fast_bfloat16("cpu") else torch.float32, torch.float32, torch.float32]
    assert [out.dtype for out in outputs] == [torch.float32] * 3
