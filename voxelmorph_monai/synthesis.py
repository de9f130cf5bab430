r"""Images made from label maps, to train networks that no image of a patient has to be shown to.

:class:`Synthesis` draws from each label map an image that no scanner took: the map is deformed, each tissue gets an
intensity (near that of T1-weighted scans, or any at all), and bias field, blur, noise and gamma are added (SynthMorph,
Hoffmann et al., IEEE TMI 2022). What is to be aligned is known exactly: the loss is judged on the labels and on clean
T1-like pictures of the same anatomy, whatever the network was shown.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

from voxelmorph_monai.blocks import identity_grid, integrate, resize, smooth, warp
from voxelmorph_monai.losses import RegistrationLoss

__all__ = ["FREESURFER", "Anatomyd", "Synthesis", "SynthesisLoss", "Tissue", "paint", "partial_volumes"]


class Tissue(NamedTuple):
    """A tissue that looks alike everywhere.

    Attributes:
        labels: its numbers in the label maps.
        intensity: of a T1-weighted scan whose white matter is about 0.85.
        brain: whether it stays when the skull is stripped.
    """

    labels: tuple[int, ...]
    intensity: float
    brain: bool = True


# The label maps of SynthSeg (Billot et al., Medical Image Analysis 2023): FreeSurfer's numbers, left and right, and
# 502 to 530 for what is outside the brain. Intensities as they are usual in skull-stripped MPRAGE scans.
FREESURFER: dict[str, Tissue] = {
    "cerebral white matter": Tissue((2, 41), 0.86),
    "cerebral cortex": Tissue((3, 42), 0.57),
    "ventricles": Tissue((4, 5, 14, 15, 43, 44), 0.16),
    "cerebellar white matter": Tissue((7, 46), 0.82),
    "cerebellar cortex": Tissue((8, 47), 0.56),
    "thalamus": Tissue((10, 49), 0.71),
    "caudate": Tissue((11, 50), 0.60),
    "putamen": Tissue((12, 51), 0.66),
    "pallidum": Tissue((13, 52), 0.77),
    "brain stem": Tissue((16,), 0.78),
    "hippocampus": Tissue((17, 53), 0.56),
    "amygdala": Tissue((18, 54), 0.55),
    "cerebrospinal fluid": Tissue((24,), 0.20),
    "accumbens": Tissue((26, 58), 0.57),
    "ventral diencephalon": Tissue((28, 60), 0.74),
    "other": Tissue((25, 30, 57, 62, 72, 77, 85, 136, 137, 163, 164), 0.60),
    "dura and vessels": Tissue((502, 506, 512, 514, 530), 0.45, brain=False),
    "muscle and skin": Tissue((507, 508, 509, 515, 516), 0.40, brain=False),
    "skull": Tissue((511,), 0.12, brain=False),
}


def _table(groups: Iterable[Sequence[int]], top: int) -> Tensor:
    """Number of the group (1, 2, ...; 0 is none) by label: ``(top + 1,)``."""
    table = torch.zeros(top + 1, dtype=torch.long)
    for number, labels in enumerate(groups, start=1):
        table[[label for label in labels if label <= top]] = number
    return table


def paint(labels: Tensor, tissues: Mapping[str, Tissue] = FREESURFER) -> Tensor:
    """Skull-stripped T1-like picture of a label map, any shape: float32, 0 outside the brain.

    >>> paint(torch.tensor([0, 2, 3, 511]))
    tensor([0.0000, 0.8600, 0.5700, 0.0000])
    """
    intensities = torch.tensor([0.0, *(tissue.intensity * tissue.brain for tissue in tissues.values())])
    labels = labels.long()
    return intensities[_table((tissue.labels for tissue in tissues.values()), int(labels.max()))[labels]]


def partial_volumes(labels: Tensor, groups: Sequence[Sequence[int]], factor: int = 1) -> Tensor:
    """Partial volume of each group of labels in blocks of ``factor`` voxels a side: ``(K, *spatial / factor)``, uint8.

    Args:
        labels: ``(1, *spatial)``; what remains of a size that is not a multiple of ``factor`` is left out.
        groups: K of them, the numbers that belong together; 255 means all of the block.
        factor: 1 or more.
    """
    labels = labels.long()
    number = _table(groups, int(labels.max())).to(labels.device)[labels]
    size = [n // factor for n in labels.shape[1:]]
    count = torch.zeros(len(groups) + 1, *size, device=labels.device)
    one = torch.ones(1, *size, device=labels.device)
    for start in product(range(factor), repeat=len(size)):  # voxel of the block; far faster than pooling one-hots
        voxel = tuple(slice(first, first + factor * n, factor) for first, n in zip(start, size, strict=True))
        count.scatter_add_(0, number[(slice(None), *voxel)], one)
    return (count[1:] * (255 / factor ** len(size))).round().to(torch.uint8)


class Anatomyd(MapTransform):
    """Turn a label map into what :class:`Synthesis` draws images from.

    The scan keeps ``label``, the number of the structure that fills most of a voxel (0: none), and gets as ``image``
    the :func:`partial_volumes` of the tissues.

    Args:
        keys: the label map, ``(1, *spatial)`` with the numbers of ``tissues`` and ``structures``.
        structures: what the Dice loss compares: labels by name.
        tissues: what images are made of.
        factor: how many voxels of the map make a voxel of the image, along each axis.
    """

    def __init__(
        self,
        structures: Mapping[str, Sequence[int]],
        keys: KeysCollection = "label",
        tissues: Mapping[str, Tissue] = FREESURFER,
        factor: int = 1,
    ) -> None:
        super().__init__(keys)
        self.structures = list(structures.values())
        self.tissues = [tissue.labels for tissue in tissues.values()]
        self.factor = factor

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give ``image`` and ``label`` of one scan."""
        labels = torch.as_tensor(data[self.keys[0]]).as_subclass(Tensor).long()
        wanted = [number for group in self.structures for number in group]
        if not torch.isin(labels, torch.tensor(wanted, device=labels.device)).any():
            raise ValueError(f"structures must occur in the label map, got none of {wanted}.")
        parts = partial_volumes(labels, self.structures, self.factor).short()
        parts = torch.cat([255 - parts.sum(0, keepdim=True), parts])
        label = parts.argmax(0, keepdim=True).to(torch.uint8)
        return {**data, "image": partial_volumes(labels, self.tissues, self.factor), "label": label}


def _max_pool(image: Tensor, radius: int) -> Tensor:
    """Largest value within ``radius`` voxels along each axis, one axis after the other."""
    for axis in range(2, image.ndim):
        lines = image.movedim(axis, -1)
        pooled = F.max_pool1d(lines.reshape(-1, 1, lines.shape[-1]), 2 * radius + 1, 1, radius)
        image = pooled.view(lines.shape).movedim(-1, axis)
    return image


def _smooth(shape: Sequence[int], knots: int, device: torch.device) -> Tensor:
    """Smooth noise ``(B, C, *spatial)``: SD 1 at knots every ``knots`` voxels, linear and less between."""
    coarse = [max(-(-n // knots) + 1, 2) for n in shape[2:]]
    mode = "trilinear" if len(coarse) == 3 else "bilinear"
    return F.interpolate(
        torch.randn(*shape[:2], *coarse, device=device), list(shape[2:]), mode=mode, align_corners=True
    )


def _uniform(like: Tensor, low: float, high: float) -> Tensor:
    """One draw per batch item, ``(B, 1, ...)`` with the dimensions of ``like``."""
    shape = [len(like), *[1] * (like.ndim - 1)]
    return torch.empty(shape, device=like.device).uniform_(low, high)


class Synthesis:
    """Images from anatomy, both at random: ``prepare_batch`` of MONAI's engines.

    From a batch of pairs of :class:`Anatomyd` it makes the network's input ``(B, 2, *spatial)`` and the loss's target:
    ``moving`` and ``fixed``, clean pictures of the anatomy, and ``moving_label`` and ``fixed_label``. Draws come from
    torch's global generator.

    Args:
        tissues: what the partial volumes are of.
        t1_probability: of a batch of pairs in which both images are T1-like; else each tissue gets any intensity, in
            each image its own.
        same_probability: of a batch of pairs of one and the same anatomy, so that a network learns to leave people
            alone who are scanned twice.
        intensity_sd: by which T1-like intensities vary around those of ``tissues``.
        skull_probability: of an image that keeps what is not brain.
        rim: largest number of voxels around the brain that the skull stripping leaves.
        fluid_probability: of an image that keeps the fluid around the brain.
        flip_probability: of both images mirrored along the first axis.
        deformation: largest SD (voxels) of the random velocity.
        deformation_knots: voxels between its knots.
        rotation: largest angle (degrees) about each axis.
        scaling: largest relative change of size.
        shift: largest translation (voxels).
        bias: largest SD of the logarithm of the bias field.
        bias_knots: voxels between its knots.
        blur: largest SD (voxels) of the blur.
        noise: largest SD of the noise, of intensities in [0, 1].
        gamma: largest logarithm of the exponent of the intensities.
    """

    def __init__(
        self,
        tissues: Mapping[str, Tissue] = FREESURFER,
        t1_probability: float = 0.8,
        same_probability: float = 0.0,
        intensity_sd: float = 0.05,
        skull_probability: float = 0.0,
        rim: int = 1,
        fluid_probability: float = 0.4,
        flip_probability: float = 0.5,
        deformation: float = 1.0,
        deformation_knots: int = 10,
        rotation: float = 2.0,
        scaling: float = 0.03,
        shift: float = 1.0,
        bias: float = 0.25,
        bias_knots: int = 32,
        blur: float = 0.6,
        noise: float = 0.06,
        gamma: float = 0.35,
    ) -> None:
        options = {name: value for name, value in locals().items() if isinstance(value, int | float)}
        for name, value in options.items():
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}.")
            least = 1 if name.endswith("_knots") else 0
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if "cerebrospinal fluid" not in tissues:
            raise ValueError(
                f"tissues must name 'cerebrospinal fluid', which surrounds the brain, got {list(tissues)}."
            )
        self.intensities = torch.tensor([tissue.intensity for tissue in tissues.values()])
        self.brain = torch.tensor([float(tissue.brain) for tissue in tissues.values()])
        self.fluid = list(tissues).index("cerebrospinal fluid")
        self.t1_probability = t1_probability
        self.same_probability = same_probability
        self.intensity_sd = intensity_sd
        self.skull_probability = skull_probability
        self.rim = rim
        self.fluid_probability = fluid_probability
        self.flip_probability = flip_probability
        self.deformation = deformation
        self.deformation_knots = deformation_knots
        self.rotation = rotation
        self.scaling = scaling
        self.shift = shift
        self.bias = bias
        self.bias_knots = bias_knots
        self.blur = blur
        self.noise = noise
        self.gamma = gamma

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        device: torch.device | str | None = None,
        non_blocking: bool = False,
        **kwargs: object,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw the images of ``batch``: ``moving``, ``fixed`` (partial volumes), ``moving_label``, ``fixed_label``."""
        flip = bool(torch.rand(()) < self.flip_probability)
        t1 = bool(torch.rand(()) < self.t1_probability)
        if bool(torch.rand(()) < self.same_probability):
            batch = {**batch, "moving": batch["fixed"], "moving_label": batch["fixed_label"]}
        inputs, target = [], {}
        for role in ("moving", "fixed"):
            parts, label = (
                torch.as_tensor(batch[key]).as_subclass(Tensor).to(device, non_blocking=non_blocking)
                for key in (role, f"{role}_label")
            )
            if flip:
                parts, label = parts.flip(2), label.flip(2)
            image, target[role], target[f"{role}_label"] = self._draw(parts.float(), label, t1)
            inputs.append(image)
        return torch.cat(inputs, dim=1), target

    def _draw(self, parts: Tensor, label: Tensor, t1: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Image, clean picture and labels of one anatomy in a new shape."""
        ddf = self._deform(parts)
        means = self.intensities.to(parts).expand(len(parts), -1)
        drawn = means + self.intensity_sd * torch.randn_like(means) if t1 else torch.rand_like(means)
        brain = self.brain.to(parts).expand_as(means)
        solid = brain.clone()
        solid[:, self.fluid] = 0
        # one product for all four: to read the partial volumes is what costs
        pictures = torch.einsum("bck,bk...->bc...", torch.stack([drawn, means * brain, brain, solid], 1) / 255, parts)
        image, clean, inside, firm = pictures.split(1, dim=1)
        # Around the brain the clean picture shows fluid, so that no edge comes from where a skull was stripped.
        clean = clean + self.intensities[self.fluid].item() * (1 - inside)
        image, clean, mask = warp(torch.cat([image, clean, self._mask(inside, firm)], 1), ddf).split(1, dim=1)
        label = warp(label.float(), ddf, mode="nearest").to(label.dtype)
        return self._spoil(image) * mask, clean, label

    def _mask(self, inside: Tensor, firm: Tensor) -> Tensor:
        """What is left: the whole head, or the brain with the fluid around it, or with a rim around what is firm."""
        if bool(torch.rand(()) < self.skull_probability):
            return torch.ones_like(inside)
        rim = int(torch.randint(0, self.rim + 1, ()))
        closed = -_max_pool(-_max_pool((firm > 0.3).float(), rim + 2), 2)  # sulci belong to the brain
        if bool(torch.rand(()) < self.fluid_probability):
            return torch.maximum(closed, (inside > 0.5).float())
        return closed

    def _deform(self, parts: Tensor) -> Tensor:
        """Displacement of a random affine map after a random smooth one: ``(B, D, *spatial)``, voxels."""
        size, spatial_dims = list(parts.shape[2:]), parts.ndim - 2
        knots = self.deformation_knots
        coarse = [max(-(-2 * n // knots), 4) for n in size]  # two voxels between knots
        dvf = _smooth([len(parts), spatial_dims, *coarse], 2, parts.device) * _uniform(parts, 0, self.deformation)
        dvf = dvf * (2 / knots)
        ddf = resize(integrate(dvf, 5), size)
        grid = identity_grid(ddf)
        centre = torch.tensor([(n - 1) / 2 for n in size], device=ddf.device).view(1, -1, *[1] * spatial_dims)
        matrix = torch.eye(spatial_dims, device=ddf.device)
        angles = torch.empty_like(matrix).uniform_(-1, 1).mul_(self.rotation * torch.pi / 180).triu(1)
        scale = torch.empty(spatial_dims, device=ddf.device).uniform_(-self.scaling, self.scaling)
        matrix = torch.linalg.matrix_exp(angles - angles.T + torch.diag(scale))
        shift = torch.empty(spatial_dims, device=ddf.device).uniform_(-self.shift, self.shift)
        points = grid + ddf - centre
        moved = torch.einsum("ij,bj...->bi...", matrix, points) + centre + shift.view(1, -1, *[1] * spatial_dims)
        return moved - grid

    def _spoil(self, image: Tensor) -> Tensor:
        """Bias field, blur, noise and gamma; intensities from 0 to 1, as prepared scans have them."""
        bias = _smooth(image.shape, self.bias_knots, image.device) * _uniform(image, 0, self.bias)
        image = image * bias.exp()
        image = smooth(image, float(torch.rand(())) * self.blur)
        image = image + torch.randn_like(image) * _uniform(image, 0, self.noise)
        image = image.clamp_(min=0)
        some = image.flatten(1)[:, ::7]
        bright = [item[item > 0.05] for item in some]
        top = torch.stack([x.quantile(0.995) if len(x) else x.new_ones(()) for x in bright])  # nothing to scale by
        image = (image / top.view(-1, *[1] * (image.ndim - 1))).clamp_(0, 1)
        return image ** _uniform(image, -self.gamma, self.gamma).exp()


class SynthesisLoss(RegistrationLoss):
    """The loss judged on clean pictures of the anatomy instead of the images that the network was shown."""

    def terms(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weighted parts by name, as :class:`~voxelmorph_monai.losses.RegistrationLoss` gives them."""
        clean = {"warped": warp(target["moving"], prediction["ddf"])}
        if "inverse_ddf" in prediction:
            clean["warped_fixed"] = warp(target["fixed"], prediction["inverse_ddf"])
        return super().terms({**prediction, **clean}, target)
