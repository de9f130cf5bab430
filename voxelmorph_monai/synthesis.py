r"""Images generated from label maps, to train networks without any image of a patient.

:class:`Synthesis` generates an image from each label map: the map is deformed, each tissue gets a random intensity
(near that of T1-weighted scans, or any value), and bias field, blur, noise and gamma are added (SynthMorph, Hoffmann et
al., IEEE TMI 2022). The anatomy is known exactly, so the loss compares the labels, and clean T1-like pictures of the
same anatomy, whatever image the network was shown.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

from voxelmorph_monai.blocks import identity_grid, integrate, resize, sample, smooth, warp
from voxelmorph_monai.losses import RegistrationLoss

__all__ = [
    "FREESURFER",
    "HEAD",
    "Anatomyd",
    "HeadSynthesis",
    "Synthesis",
    "SynthesisLoss",
    "Tissue",
    "paint",
    "partial_volumes",
]


class Tissue(NamedTuple):
    """A tissue with the same appearance everywhere.

    Attributes:
        labels: numbers of the tissue in the label maps.
        intensity: its intensity in a T1-weighted scan whose white matter is about 0.85.
        brain: whether skull stripping keeps it.
    """

    labels: tuple[int, ...]
    intensity: float
    brain: bool = True


# The label maps of SynthSeg (Billot et al., Medical Image Analysis 2023): FreeSurfer's numbers, left and right, and
# 502 to 530 outside the brain. The intensities are typical of skull-stripped MPRAGE scans.
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

# The same, but each label outside the brain has its own brightness: for networks that see whole heads.
HEAD: dict[str, Tissue] = {
    **{name: tissue for name, tissue in FREESURFER.items() if tissue.brain},
    **{
        f"{name} {label}": Tissue((label,), tissue.intensity, brain=False)
        for name, tissue in FREESURFER.items()
        for label in tissue.labels
        if not tissue.brain
    },
}


def _table(groups: Iterable[Sequence[int]], top: int) -> Tensor:
    """Number of the group (1, 2, ...; 0 for none) of each label: ``(top + 1,)``."""
    table = torch.zeros(top + 1, dtype=torch.long)
    for number, labels in enumerate(groups, start=1):
        table[[label for label in labels if label <= top]] = number
    return table


def paint(labels: Tensor) -> Tensor:
    """Paint a label map of any shape, in FreeSurfer's numbers, as a skull-stripped T1-like picture of the same shape.

    The intensities, float32, are those of :data:`FREESURFER`, and 0 outside the brain.

    >>> paint(torch.tensor([0, 2, 3, 511]))
    tensor([0.0000, 0.8600, 0.5700, 0.0000])
    """
    tissues = FREESURFER.values()
    intensities = torch.tensor([0.0, *(tissue.intensity * tissue.brain for tissue in tissues)])
    labels = labels.long()
    return intensities[_table((tissue.labels for tissue in tissues), int(labels.max()))[labels]]


def partial_volumes(labels: Tensor, groups: Sequence[Sequence[int]], factor: int = 1) -> Tensor:
    """Partial volume of each group of labels in blocks of ``factor`` voxels a side: ``(K, *spatial / factor)``, uint8.

    255 means that the group fills the block.

    Args:
        labels: label map ``(1, *spatial)``; a remainder that does not fill a block is left out.
        groups: labels of each of the K groups.
        factor: side of a block in voxels, 1 or more.
    """
    labels = labels.long()
    number = _table(groups, int(labels.max())).to(labels.device)[labels]
    size = [n // factor for n in labels.shape[1:]]
    count = torch.zeros(len(groups) + 1, *size, device=labels.device)
    one = torch.ones(1, *size, device=labels.device)
    for start in product(range(factor), repeat=len(size)):  # voxel of the block; far faster than pooling one-hot maps
        voxel = tuple(slice(first, first + factor * n, factor) for first, n in zip(start, size, strict=True))
        count.scatter_add_(0, number[(slice(None), *voxel)], one)
    return (count[1:] * (255 / factor ** len(size))).round().to(torch.uint8)


class Anatomyd(MapTransform):
    """Convert a label map to the input of :class:`Synthesis`.

    ``image`` becomes the :func:`partial_volumes` of the tissues, and ``label`` the number of the structure that fills
    most of a voxel (0: none).

    Args:
        structures: labels by name of the structures that the Dice loss compares.
        keys: item with the label map, ``(1, *spatial)``, with the numbers of ``tissues`` and ``structures``.
        tissues: tissues to generate images from.
        factor: number of voxels of the map per voxel of the image, along each axis.
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
        """Compute ``image`` and ``label`` of one scan."""
        labels = torch.as_tensor(data[self.keys[0]]).as_subclass(Tensor).long()
        wanted = [number for group in self.structures for number in group]
        if not torch.isin(labels, torch.tensor(wanted, device=labels.device)).any():
            raise ValueError(
                f"the label map has none of the structures' labels {wanted}. Check the table of structures."
            )
        parts = partial_volumes(labels, self.structures, self.factor).short()
        parts = torch.cat([255 - parts.sum(0, keepdim=True), parts])
        label = parts.argmax(0, keepdim=True).to(torch.uint8)
        return {**data, "image": partial_volumes(labels, self.tissues, self.factor), "label": label}


def _max_pool(image: Tensor, radius: int) -> Tensor:
    """Maximum within ``radius`` voxels along each axis, one axis after the other."""
    for axis in range(2, image.ndim):
        lines = image.movedim(axis, -1)
        pooled = F.max_pool1d(lines.reshape(-1, 1, lines.shape[-1]), 2 * radius + 1, 1, radius)
        image = pooled.view(lines.shape).movedim(-1, axis)
    return image


def _smooth(shape: Sequence[int], knots: int, device: torch.device) -> Tensor:
    """Smooth noise ``(B, C, *spatial)``: SD 1 at knots every ``knots`` voxels, interpolated linearly between them."""
    coarse = [max(-(-n // knots) + 1, 2) for n in shape[2:]]
    mode = "trilinear" if len(coarse) == 3 else "bilinear"
    return F.interpolate(
        torch.randn(*shape[:2], *coarse, device=device), list(shape[2:]), mode=mode, align_corners=True
    )


def _uniform(like: Tensor, low: float, high: float) -> Tensor:
    """One random number per batch item, ``(B, 1, ...)`` with as many dimensions as ``like``."""
    shape = [len(like), *[1] * (like.ndim - 1)]
    return torch.empty(shape, device=like.device).uniform_(low, high)


def _moved(
    batch: Mapping[str, Tensor], keys: Sequence[str], device: torch.device | str | None, non_blocking: bool
) -> list[Tensor]:
    """Plain tensors of some items of ``batch`` on ``device``."""
    return [torch.as_tensor(batch[key]).as_subclass(Tensor).to(device, non_blocking=non_blocking) for key in keys]


class Synthesis:
    """Random images of randomly deformed anatomy: ``prepare_batch`` of MONAI's engines.

    From a batch of pairs from :class:`Anatomyd` it makes the input of the network ``(B, 2, *spatial)`` and the target
    of the loss: ``moving`` and ``fixed``, which are clean pictures of the anatomy, ``moving_label`` and
    ``fixed_label``. It uses torch's global random generator.

    Args:
        tissues: tissues of the partial volumes.
        t1_probability: probability that both images of a batch are T1-like; otherwise each tissue gets any intensity,
            a different one in each image.
        same_probability: probability that both images of a batch show the same anatomy, so that the network learns to
            keep a repeated scan unchanged.
        intensity_sd: SD of T1-like intensities around those of ``tissues``.
        skull_probability: probability that an image is not skull-stripped.
        rim: largest number of voxels that skull stripping leaves around the brain.
        fluid_probability: probability that an image keeps the fluid around the brain.
        flip_probability: probability that both images are mirrored along the first axis.
        deformation: largest SD of the random velocity, in voxels.
        deformation_knots: distance between its knots, in voxels.
        rotation: largest angle about each axis, in degrees.
        scaling: largest relative change of size.
        shift: largest translation, in voxels.
        bias: largest SD of the logarithm of the bias field.
        bias_knots: distance between its knots, in voxels.
        blur: largest SD of the blur, in voxels.
        noise: largest SD of the noise, for intensities in [0, 1].
        gamma: largest logarithm of the exponent that is applied to intensities.
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
                raise ValueError(f"{name} is {value}. Give a probability from 0 to 1.")
            least = 1 if name.endswith("_knots") else 0
            if not value >= least:
                raise ValueError(f"{name} is {value}. Give {least} or more.")
        if "cerebrospinal fluid" not in tissues:
            raise ValueError(f"tissues {list(tissues)} lack 'cerebrospinal fluid', which surrounds the brain. Add it.")
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
        """Generate the images and the target of a batch.

        Args:
            batch: ``moving`` and ``fixed``, partial volumes ``(B, K, *spatial)``, uint8, and ``moving_label`` and
                ``fixed_label`` ``(B, 1, *spatial)``.
            device: device to generate on.
            non_blocking: as in ``torch.Tensor.to``.
            kwargs: ignored.

        Returns:
            Both images ``(B, 2, *spatial)`` in [0, 1], moving image first, and the target: clean pictures and labels,
            ``(B, 1, *spatial)``.
        """
        flip = bool(torch.rand(()) < self.flip_probability)
        t1 = bool(torch.rand(()) < self.t1_probability)
        if bool(torch.rand(()) < self.same_probability):
            batch = {**batch, "moving": batch["fixed"], "moving_label": batch["fixed_label"]}
        inputs, target = [], {}
        for role in ("moving", "fixed"):
            parts, label = _moved(batch, (role, f"{role}_label"), device, non_blocking)
            if flip:
                parts, label = parts.flip(2), label.flip(2)
            image, target[role], target[f"{role}_label"] = self._draw(parts.float(), label, t1)
            inputs.append(image)
        return torch.cat(inputs, dim=1), target

    def _draw(self, parts: Tensor, label: Tensor, t1: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Image, clean picture and labels of one anatomy after a random deformation."""
        ddf = self._deform(parts)
        means, drawn, brain, solid = self._tissues(parts, t1)
        # one product for all four, because reading the partial volumes takes most of the time
        pictures = torch.einsum("bck,bk...->bc...", torch.stack([drawn, means * brain, brain, solid], 1) / 255, parts)
        image, clean, inside, firm = pictures.split(1, dim=1)
        # The clean picture shows fluid around the brain, so that skull stripping leaves no edge.
        clean = clean + self.intensities[self.fluid].item() * (1 - inside)
        image, clean, mask = warp(torch.cat([image, clean, self._mask(inside, firm)], 1), ddf).split(1, dim=1)
        label = warp(label.float(), ddf, mode="nearest").to(label.dtype)
        return self._spoil(image) * mask, clean, label

    def _tissues(self, parts: Tensor, t1: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each tissue, ``(B, K)``: usual and drawn intensity, whether it is brain, whether it is solid brain."""
        means = self.intensities.to(parts).expand(len(parts), -1)
        drawn = means + self.intensity_sd * torch.randn_like(means) if t1 else torch.rand_like(means)
        brain = self.brain.to(parts).expand_as(means)
        solid = brain.clone()
        solid[:, self.fluid] = 0
        return means, drawn, brain, solid

    def _mask(self, inside: Tensor, firm: Tensor) -> Tensor:
        """Mask of the visible part: the whole head, the brain with its fluid, or solid tissue with a rim."""
        if bool(torch.rand(()) < self.skull_probability):
            return torch.ones_like(inside)
        rim = int(torch.randint(0, self.rim + 1, ()))
        closed = -_max_pool(-_max_pool((firm > 0.3).float(), rim + 2), 2)  # sulci belong to the brain
        if bool(torch.rand(()) < self.fluid_probability):
            return torch.maximum(closed, (inside > 0.5).float())
        return closed

    def _deform(self, parts: Tensor) -> Tensor:
        """Random displacement, a smooth map followed by an affine one: ``(B, D, *spatial)``, voxels."""
        return self._points(parts, list(parts.shape[2:])) - identity_grid(parts)

    def _points(self, parts: Tensor, size: list[int]) -> Tensor:
        """Position in ``parts`` (voxels) of each voxel of a grid of ``size``: ``(B, D, *size)``, roughly centred."""
        spatial_dims = parts.ndim - 2
        knots = self.deformation_knots
        coarse = [max(-(-2 * n // knots), 4) for n in size]  # two voxels between knots
        dvf = _smooth([len(parts), spatial_dims, *coarse], 2, parts.device) * _uniform(parts, 0, self.deformation)
        dvf = dvf * (2 / knots)
        ddf = resize(integrate(dvf, 5), size)

        def centre(size: Sequence[int]) -> Tensor:
            return torch.tensor([(n - 1) / 2 for n in size], device=ddf.device).view(1, -1, *[1] * spatial_dims)

        matrix = torch.eye(spatial_dims, device=ddf.device)
        angles = torch.empty_like(matrix).uniform_(-1, 1).mul_(self.rotation * torch.pi / 180).triu(1)
        scale = torch.empty(spatial_dims, device=ddf.device).uniform_(-self.scaling, self.scaling)
        matrix = torch.linalg.matrix_exp(angles - angles.T + torch.diag(scale))
        shift = torch.empty(spatial_dims, device=ddf.device).uniform_(-self.shift, self.shift)
        points = identity_grid(ddf) + ddf - centre(size)
        moved = torch.einsum("ij,bj...->bi...", matrix, points)
        return moved + centre(parts.shape[2:]) + shift.view(1, -1, *[1] * spatial_dims)

    def _spoil(self, image: Tensor) -> Tensor:
        """Add bias field, blur, noise and gamma; intensities are 0 to 1, like those of prepared scans."""
        bias = _smooth(image.shape, self.bias_knots, image.device) * _uniform(image, 0, self.bias)
        image = image * bias.exp()
        image = smooth(image, float(torch.rand(())) * self.blur)
        image = image + torch.randn_like(image) * _uniform(image, 0, self.noise)
        image = image.clamp_(min=0)
        sampled = image.flatten(1)[:, ::7]
        bright = [item[item > 0.05] for item in sampled]
        top = torch.stack([x.quantile(0.995) if len(x) else x.new_ones(()) for x in bright])  # nothing to scale by
        image = (image / top.view(-1, *[1] * (image.ndim - 1))).clamp_(0, 1)
        return image ** _uniform(image, -self.gamma, self.gamma).exp()


class HeadSynthesis(Synthesis):
    """Random image of a head with its labels: ``prepare_batch`` of MONAI's engines for segmentation.

    From a batch from :class:`Anatomyd` it generates an image ``(B, 1, *size)`` and its labels, of the same shape. The
    image shows a part of the head in any pose, centred on the brain up to ``shift``. It uses torch's global random
    generator.

    Args:
        size: size of the images in voxels.
        swap: pairs of class numbers to exchange when the head is mirrored (left and right).
        texture: largest SD of the noise within a tissue, which differs between tissues, unlike the scanner's noise.
        lesion_probability: probability that an image has dark or bright spots in its white matter.
        slice_probability: probability that an image consists of thick slices, along any axis.
        thickness: largest thickness of the slices, in voxels.
        cut_probability: probability that the field of view is smaller than the grid.
        cut: largest missing part at either end of each axis, as a fraction of ``size``.
        tissues, options: see :class:`Synthesis`. Lesions are in the first tissue of ``tissues``.
    """

    def __init__(
        self,
        size: Sequence[int],
        swap: Sequence[Sequence[int]] = (),
        tissues: Mapping[str, Tissue] = HEAD,
        texture: float = 0.08,
        lesion_probability: float = 0.3,
        slice_probability: float = 0.5,
        thickness: float = 3.0,
        cut_probability: float = 0.3,
        cut: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(tissues, **options)
        self.size = list(size)
        self.swap = [list(pair) for pair in swap]
        self.texture = texture
        self.lesion_probability = lesion_probability
        self.slice_probability = slice_probability
        self.thickness = thickness
        self.cut_probability = cut_probability
        self.cut = cut

    def __call__(  # type: ignore[override] # one image and its labels, not a pair
        self,
        batch: Mapping[str, Tensor],
        device: torch.device | str | None = None,
        non_blocking: bool = False,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Generate the images and labels of a batch.

        Args:
            batch: ``image``, partial volumes ``(B, K, *spatial)``, uint8, and ``label`` ``(B, 1, *spatial)``.
            device: device to generate on.
            non_blocking: as in ``torch.Tensor.to``.
            kwargs: ignored.

        Returns:
            Images in [0, 1] and labels, ``(B, 1, *size)``.
        """
        parts, label = _moved(batch, ("image", "label"), device, non_blocking)
        off_centre = self._off_centre(label)
        points = self._points(parts, self.size) + off_centre
        if bool(torch.rand(()) < self.flip_probability):
            points[:, 0] = parts.shape[2] - 1 + 2 * off_centre[:, 0] - points[:, 0]
            label = self._mirrored(label)
        axes = tuple(range(2, points.ndim))
        first = [max(0, min(int(x), n - 1)) for x, n in zip(points.amin((0, *axes)), parts.shape[2:], strict=True)]
        last = [max(0, min(int(x) + 1, n - 1)) for x, n in zip(points.amax((0, *axes)), parts.shape[2:], strict=True)]
        seen = tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))  # paint only the visible part
        where = (slice(None), slice(None), *seen)
        parts, label = parts[where].float(), label[where]
        points -= torch.tensor(first, device=points.device).view(1, -1, *[1] * len(first))
        image, sd, mask, lesions = sample(self._layers(parts), points, padding_mode="zeros").split(1, dim=1)
        label = sample(label, points, mode="nearest", padding_mode="zeros")
        image = image + sd * torch.randn_like(image)
        if bool(torch.rand(()) < self.lesion_probability):
            knots = int(torch.randint(3, 9, ()))
            spots = (_smooth(image.shape, knots, image.device) * 2 - 2.5).clamp(0, 1)
            image = torch.lerp(image, torch.rand((), device=image.device).expand_as(image), spots * lesions)
        image = self._slices(self._spoil(image.clamp_(min=0)) * mask)
        return self._view(image, label)

    def _off_centre(self, label: Tensor) -> Tensor:
        """Vector from the middle of the grid to the centre of the labels: ``(1, D, 1, ...)``, voxels."""
        density = (label > 0).float().mean((0, 1))
        middle = []
        for axis, n in enumerate(density.shape):
            profile = density.mean([d for d in range(density.ndim) if d != axis])
            weights = torch.arange(n, device=profile.device) - (n - 1) / 2
            middle.append(float((profile * weights).sum() / profile.sum().clamp_min(1e-9)))
        return torch.tensor(middle, device=label.device).view(1, -1, *[1] * len(middle))

    def _mirrored(self, label: Tensor) -> Tensor:
        """Exchange left and right labels for a mirrored head."""
        number = torch.arange(256, dtype=label.dtype, device=label.device)
        for a, b in self.swap:
            number[a], number[b] = b, a
        return number[label.long()]

    def _layers(self, parts: Tensor) -> Tensor:
        """Intensity, SD of the texture, mask, and fraction where lesions may be: ``(B, 4, *spatial)``."""
        t1 = bool(torch.rand(()) < self.t1_probability)
        means, drawn, brain, solid = self._tissues(parts, t1)
        if t1:  # tissues outside the brain vary much more
            drawn = torch.where(brain > 0, drawn, torch.rand_like(means))
        spotted = torch.zeros_like(brain)
        spotted[:, 0] = 1
        sd = torch.rand_like(means) * float(torch.rand(())) * self.texture
        pictures = torch.einsum("bck,bk...->bc...", torch.stack([drawn, sd, spotted, brain, solid], 1) / 255, parts)
        image, texture, lesions, inside, firm = pictures.split(1, dim=1)
        return torch.cat([image, texture, self._mask(inside, firm), lesions], 1)

    def _slices(self, image: Tensor) -> Tensor:
        """Simulate thick slices, and interpolate them back to the grid of the image."""
        if bool(torch.rand(()) >= self.slice_probability):
            return image
        size = list(image.shape[2:])
        axis = int(torch.randint(0, len(size), ()))
        fewer = list(size)
        fewer[axis] = max(1, round(size[axis] / (1 + float(torch.rand(())) * (self.thickness - 1))))
        mode = "trilinear" if len(size) == 3 else "bilinear"
        gaps = bool(torch.rand(()) < 0.5)
        thick = F.interpolate(image, fewer, mode=mode if gaps else "area")
        return F.interpolate(thick, size, mode=mode)

    def _view(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Set image and labels outside a random field of view to 0."""
        if bool(torch.rand(()) < self.cut_probability):
            for axis in range(2, image.ndim):
                n = image.shape[axis]
                for start in (True, False):
                    if bool(torch.rand(()) < 0.5):
                        continue
                    gone = int(float(torch.rand(())) * self.cut * n)
                    for each in (image, label):
                        each.narrow(axis, 0 if start else n - gone, gone).zero_()
        return image, label


class SynthesisLoss(RegistrationLoss):
    """Loss on clean pictures of the anatomy, instead of the images that the network was shown."""

    def terms(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weighted terms by name, like those of :class:`~voxelmorph_monai.losses.RegistrationLoss`."""
        clean = {"warped": warp(target["moving"], prediction["ddf"])}
        if "inverse_ddf" in prediction:
            clean["warped_fixed"] = warp(target["fixed"], prediction["inverse_ddf"])
        return super().terms({**prediction, **clean}, target)
