"""What keeps a training step fast on a GPU: it never waits for a number, and makes nothing on the host.

There need be no GPU: torch's device "meta" has shapes but no values, so that reading one raises, as mixing in a tensor
of the host does.
"""

from contextlib import nullcontext

import pytest
import torch

from voxelmorph_monai.losses import GradientLoss, KLLoss, LNCCLoss, MSELoss, RegistrationLoss
from voxelmorph_monai.networks import Registration, VoxelMorph

SIZE = (32, 48, 64)


@pytest.fixture
def without_autocast(monkeypatch):
    """Autocast knows no device "meta"; here, where it would be off, it is left out."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


def test_the_device_refuses_what_would_wait():
    tensor = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        float(tensor.sum())
    with pytest.raises(NotImplementedError, match="meta"):
        tensor.nonzero()
    with pytest.raises(RuntimeError, match="meta"):
        tensor + torch.ones(3)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("preset", "loss"),
    [
        ("diffeomorphic", RegistrationLoss(MSELoss(0.02), prior=KLLoss())),
        ("dense", RegistrationLoss(LNCCLoss(), GradientLoss())),
        ("wide", RegistrationLoss(LNCCLoss(), GradientLoss())),
    ],
)
def test_a_step_neither_waits_nor_uses_the_host(preset, loss, bidirectional, without_autocast):
    registration = Registration(VoxelMorph(preset), bidirectional=bidirectional).to("meta").train()
    optimizer = torch.optim.Adam(registration.parameters())
    pair = torch.empty(1, 2, *SIZE, device="meta")
    found = registration(pair)
    terms = loss.terms(found, {"moving": pair[:, :1], "fixed": pair[:, 1:]})
    torch.stack(list(terms.values())).sum().backward()
    optimizer.step()
    assert {value.device.type for value in found.values()} == {"meta"}
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in registration.parameters())
