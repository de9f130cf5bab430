"""Halves, logarithms and centred velocities of maps."""

import pytest
import torch
from torch import Tensor

from voxelmorph_monai.blocks import integrate, smooth, warp
from voxelmorph_monai.groupwise import centred_velocities, logarithm, velocity_between

SIZE = (22, 19, 20)


def velocity(seed: int = 0, reach: float = 1.5) -> Tensor:
    """Smooth, up to ``reach`` voxels per unit of time, 0 near the border."""
    field = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    inside = torch.zeros(1, 1, *SIZE)
    inside[..., 6:-6, 6:-6, 6:-6] = 1
    field = smooth(field * inside, 2.0)
    return reach * field / field.abs().max()


def test_the_logarithm_is_that_of_the_exponential() -> None:
    v = velocity()
    found = logarithm(integrate(v, num_steps=10))
    torch.testing.assert_close(found, v, atol=0.05, rtol=0)  # of 1.5 voxels; interpolation loses the sharpest parts
    assert float((integrate(v) - v).abs().max()) > 0.1
    torch.testing.assert_close(logarithm(integrate(-v, num_steps=10)), -found, atol=0.08, rtol=0)


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    pattern = smooth(torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(5)), 1.5)
    pattern = (pattern - pattern.min()) / (pattern.max() - pattern.min())
    return [warp(pattern, integrate(velocity(seed, 1.0))) for seed in range(3)]


def test_swapping_two_images_turns_the_velocity_over(images: list[Tensor]) -> None:
    there = velocity_between(images[0], images[1], steps=6)
    torch.testing.assert_close(velocity_between(images[1], images[0], steps=6), -there)
    before = (images[1] - images[0]).square().mean()
    after = (warp(images[1], integrate(there)) - images[0]).square().mean()
    assert float(after) < 0.4 * float(before)
    two = centred_velocities(images[:2], steps=6)
    torch.testing.assert_close(two[1], there / 2)
    torch.testing.assert_close(two[0], -there / 2)


def test_no_images_and_unknown_similarities_are_refused(images: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"images is empty"):
        centred_velocities([])
    for number in (2, 3):
        with pytest.raises(ValueError, match=r"^similarity is 'ncc'\. Choose one of lncc, mi, mind\."):
            centred_velocities(images[:number], similarity="ncc")


def test_velocities_of_three_add_up_to_nothing_in_any_order(images: list[Tensor]) -> None:
    found = centred_velocities(images, steps=6, rounds=1)
    torch.testing.assert_close(sum(found), torch.zeros_like(found[0]), atol=1e-5, rtol=0)
    warped = torch.cat([warp(image, integrate(v)) for image, v in zip(images, found, strict=True)])
    assert float(warped.var(0).mean()) < 0.5 * float(torch.cat(images).var(0).mean())
    turned = centred_velocities([images[i] for i in (2, 0, 1)], steps=6, rounds=1)
    # sums in another order, and what refinement makes of the last digit
    torch.testing.assert_close(turned[1], found[0], atol=1e-2, rtol=0)
