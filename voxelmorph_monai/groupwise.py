r"""The mean shape of several images, none of which is the reference: means and halves of maps.

A map near the identity is the flow of a velocity, :math:`\phi = \exp(v)`. Velocities can be added, divided and
averaged, and :math:`\exp(-v)` undoes :math:`\exp(v)`; so the middle of several maps is where their velocities add up to
0 (Arsigny et al., MICCAI 2006). Fields are those of :mod:`~voxelmorph_monai.blocks`, in voxels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from voxelmorph_monai.blocks import compose, half, integrate, warp
from voxelmorph_monai.objective import SIMILARITIES
from voxelmorph_monai.refinement import refine

__all__ = ["centred_velocities", "logarithm", "velocity_between"]

# Changes are small, and noise is not to be followed.
_STEP_SIGMA = 3.0  # SD in voxels of the Gaussian that smooths steps
_SMOOTHNESS = 2.0  # in voxels
_HALVINGS = 4  # times to halve a map, until it is close enough to the identity to be its own velocity


def logarithm(ddf: Tensor) -> Tensor:
    r"""Velocity ``(B, D, *spatial)`` of a map that does not fold: :math:`\exp(v) = id + u`, by repeated halves."""
    for _ in range(_HALVINGS):
        ddf = half(ddf)
    # exp(v) = id + v + Dv v / 2 + ...: taking off the second term makes the error one of third order
    return (ddf - (compose(ddf, ddf) - 2 * ddf) / 2) * 2**_HALVINGS


def _velocity(moving: Tensor, fixed: Tensor, steps: int, similarity: str, mask: Tensor | None) -> Tensor:
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity is '{similarity}'. Choose one of {', '.join(SIMILARITIES)}.")
    found = refine(
        moving,
        fixed,
        similarity=SIMILARITIES[similarity],
        mask=mask,
        step_sigma=_STEP_SIGMA,
        smoothness=_SMOOTHNESS,
        max_steps=steps,
        budget=float("inf"),
    )
    return logarithm(found.ddf)


def velocity_between(
    first: Tensor, second: Tensor, *, steps: int = 20, similarity: str = "lncc", mask: Tensor | None = None
) -> Tensor:
    """Velocity from points of one image to those of another, both ``(1, 1, *spatial)``; swapping them negates it.

    Each is registered to the other, and the two velocities are averaged.

    Raises:
        ValueError: the similarity is unknown.
    """
    return (_velocity(second, first, steps, similarity, mask) - _velocity(first, second, steps, similarity, mask)) / 2


def centred_velocities(
    images: Sequence[Tensor],
    *,
    steps: int = 20,
    rounds: int = 2,
    similarity: str = "lncc",
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Velocities from the shape in the middle of all images ``(1, 1, *spatial)`` to each of them; their sum is 0.

    Two images are registered to each other, more of them to their mean, ``rounds`` times. Their order does not matter.

    Raises:
        ValueError: there are no images, or the similarity is unknown.
    """
    if not images:
        raise ValueError("there are no images, so they have no middle. Give two or more.")
    if len(images) == 2:
        whole = velocity_between(images[0], images[1], steps=steps, similarity=similarity, mask=mask)
        return [-whole / 2, whole / 2]
    mean = torch.stack(list(images)).mean(0)
    found: list[Tensor] = []
    for _ in range(rounds):
        found = [_velocity(image, mean, steps, similarity, mask) for image in images]
        middle = torch.stack(found).mean(0)
        found = [velocity - middle for velocity in found]
        warped = [warp(image, integrate(velocity)) for image, velocity in zip(images, found, strict=True)]
        mean = torch.stack(warped).mean(0)
    return found
