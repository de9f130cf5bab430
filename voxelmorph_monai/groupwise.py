r"""Register several images to the shape in their middle, so that none of them is the reference.

A map without folds is taken to be the flow of a velocity, :math:`\phi = \exp(v)`. Velocities can be added, divided and
averaged, and :math:`\exp(-v)` is the inverse of :math:`\exp(v)`. The middle of several images is therefore where the
velocities to all images add up to 0 (Arsigny et al., MICCAI 2006). Fields are in voxels, as in
:mod:`~voxelmorph_monai.blocks`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from voxelmorph_monai.blocks import compose, half, integrate, warp
from voxelmorph_monai.objective import SIMILARITIES
from voxelmorph_monai.progress import Progress
from voxelmorph_monai.refinement import refine

__all__ = ["centred_velocities", "logarithm", "velocity_between"]

# Differences between the images are small, so maps are smoother than by default, in order not to follow noise.
_STEP_SIGMA = 3.0  # SD of the Gaussian that smooths each step of the refinement, voxels
_SMOOTHNESS = 2.0  # smoothness of the refinement, voxels
_HALVINGS = 4  # number of square roots after which a displacement is close enough to its velocity


def logarithm(ddf: Tensor) -> Tensor:
    r"""Velocity ``(B, D, *spatial)`` of a map that does not fold: :math:`\exp(v) = id + u`.

    Inverse scaling and squaring (Arsigny et al., MICCAI 2006): the map is replaced by its square root
    :math:`\phi^{2^{-n}} = id + w` until its displacement is close to its velocity,
    :math:`v = 2^n \log \phi^{2^{-n}} \approx 2^n (w - \frac{1}{2} (w \circ (id + w) - w))`.

    Args:
        ddf: displacement :math:`u` in voxels, ``(B, D, *spatial)``.
    """
    for _ in range(_HALVINGS):
        ddf = half(ddf)
    # exp(v) = id + v + Dv v / 2 + ...: subtracting the second term leaves an error of third order.
    return (ddf - (compose(ddf, ddf) - 2 * ddf) / 2) * 2**_HALVINGS


def _velocity(
    moving: Tensor, fixed: Tensor, steps: int, similarity: str, mask: Tensor | None, told: Progress
) -> Tensor:
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
    told.advance(notes=f"loss {found.curve[-1].loss:.4f}" if found.curve else "")
    return logarithm(found.ddf)


def velocity_between(
    first: Tensor,
    second: Tensor,
    *,
    steps: int = 20,
    similarity: str = "lncc",
    mask: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """Velocity of the map from points of one image to points of another; exchanging the images negates it.

    Each image is registered to the other, and the two velocities are averaged.

    Args:
        first: image ``(1, 1, *spatial)``.
        second: image of the same shape.
        steps: largest number of refinement steps at each resolution.
        similarity: ``"lncc"``, ``"mi"`` or ``"mind"``.
        mask: nonzero where the images are compared, ``(1, 1, *spatial)``.
        progress: show a bar on standard error.

    Returns:
        The velocity in voxels per unit time, ``(1, D, *spatial)``.

    Raises:
        ValueError: the similarity is unknown.
    """
    with Progress("register", 2, "registration", shown=progress) as told:
        there = _velocity(second, first, steps, similarity, mask, told)
        back = _velocity(first, second, steps, similarity, mask, told)
    return (there - back) / 2


def centred_velocities(
    images: Sequence[Tensor],
    *,
    steps: int = 20,
    rounds: int = 2,
    similarity: str = "lncc",
    mask: Tensor | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """Velocities of the maps from the middle shape of several images to each of them; their sum is 0.

    Two images are registered to each other; more images are registered to their mean, ``rounds`` times. The order of
    the images does not matter.

    Args:
        images: images ``(1, 1, *spatial)`` of one shape.
        steps: largest number of refinement steps at each resolution.
        rounds: number of times to compute the mean of three or more images and register them to it.
        similarity: ``"lncc"``, ``"mi"`` or ``"mind"``.
        mask: nonzero where the images are compared, ``(1, 1, *spatial)``.
        progress: show a bar on standard error.

    Returns:
        A velocity in voxels per unit time, ``(1, D, *spatial)``, for each image.

    Raises:
        ValueError: there are no images, or the similarity is unknown.
    """
    if not images:
        raise ValueError("the list of images is empty. Give two or more.")
    if len(images) == 2:
        whole = velocity_between(*images, steps=steps, similarity=similarity, mask=mask, progress=progress)
        return [-whole / 2, whole / 2]
    mean = torch.stack(list(images)).mean(0)
    found: list[Tensor] = []
    with Progress("register", rounds * len(images), "registration", shown=progress) as told:
        for _ in range(rounds):
            found = [_velocity(image, mean, steps, similarity, mask, told) for image in images]
            middle = torch.stack(found).mean(0)
            found = [velocity - middle for velocity in found]
            warped = [warp(image, integrate(velocity)) for image, velocity in zip(images, found, strict=True)]
            mean = torch.stack(warped).mean(0)
    return found
