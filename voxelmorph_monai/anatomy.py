r"""Anatomy of the head in any scan: the structure of each voxel, and the brain mask.

Two networks look at the scan. The coarse look, at the whole field of view with voxels of 4 mm, finds the brain and the
pose of the head (:mod:`~voxelmorph_monai.pose`). The fine look, at the upright brain with voxels of 2 mm, gives the
posteriors, which are then interpolated at the voxels of the scan. Both networks are trained on images generated from
label maps (:class:`~voxelmorph_monai.synthesis.HeadSynthesis`; SynthSeg, Billot et al., Medical Image Analysis 2023),
so they work for any contrast.

A view is the grid (:class:`~voxelmorph_monai.affines.ImageGrid`) on which a network sees the scan. Posteriors are the
probabilities ``(K, *view.size)`` of the K classes there: class 0 is the background, class k the k-th of
:data:`STRUCTURES`, counted from 1.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelmorph_monai.affines import LIA, Affine, ImageGrid, corners, inside, spacing
from voxelmorph_monai.blocks import sample
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.networks import has_fast_bfloat16, load_weights
from voxelmorph_monai.pose import Anatomy, Pose, anatomy_of_mni152, find_poses, fit, fit_centres, likeness, rotation_of
from voxelmorph_monai.space.scan import Scan, ScanLike
from voxelmorph_monai.switch import compiled_module

__all__ = [
    "STRUCTURES",
    "AnatomyNet",
    "BlockUNet",
    "Segmentation",
    "Structure",
    "brain_mask",
    "clean",
    "colour_table",
    "find_head",
    "is_stripped",
    "load_anatomy",
    "locate",
    "look",
    "mirror_pairs",
    "restore",
    "see",
    "seen_anatomy",
    "segment",
    "shows_brain",
    "to_freesurfer",
]

ndimage = lazy("scipy.ndimage")


class Structure(NamedTuple):
    """A structure in FreeSurfer's numbering.

    Attributes:
        number: its number in FreeSurfer's label maps.
        name: its name in FreeSurfer's colour table.
        colour: red, green, blue, 0 to 255.
        part: class of the structure in the coarse look, which only tells 8 parts of the brain apart: 1 and 2 are the
            left and the right half of the cerebrum, 3 and 4 those of the cerebellum, 5 and 6 the left and the right
            nuclei and lateral ventricle, 7 is the brain stem, and 8 everything in the middle.
    """

    number: int
    name: str
    colour: tuple[int, int, int]
    part: int


# Classes 1, 2, ...; class 0 is everything outside the brain. The last class is the rest of the brain mask: mainly the
# fluid around the brain, but also vessels, the optic chiasm, lesions, and the inferior horns of the ventricles.
STRUCTURES = (
    Structure(2, "Left-Cerebral-White-Matter", (245, 245, 245), 1),
    Structure(41, "Right-Cerebral-White-Matter", (245, 245, 245), 2),
    Structure(3, "Left-Cerebral-Cortex", (205, 62, 78), 1),
    Structure(42, "Right-Cerebral-Cortex", (205, 62, 78), 2),
    Structure(4, "Left-Lateral-Ventricle", (120, 18, 134), 5),
    Structure(43, "Right-Lateral-Ventricle", (120, 18, 134), 6),
    Structure(7, "Left-Cerebellum-White-Matter", (220, 248, 164), 3),
    Structure(46, "Right-Cerebellum-White-Matter", (220, 248, 164), 4),
    Structure(8, "Left-Cerebellum-Cortex", (230, 148, 34), 3),
    Structure(47, "Right-Cerebellum-Cortex", (230, 148, 34), 4),
    Structure(10, "Left-Thalamus", (0, 118, 14), 5),
    Structure(49, "Right-Thalamus", (0, 118, 14), 6),
    Structure(11, "Left-Caudate", (122, 186, 220), 5),
    Structure(50, "Right-Caudate", (122, 186, 220), 6),
    Structure(12, "Left-Putamen", (236, 13, 176), 5),
    Structure(51, "Right-Putamen", (236, 13, 176), 6),
    Structure(13, "Left-Pallidum", (12, 48, 255), 5),
    Structure(52, "Right-Pallidum", (13, 48, 255), 6),
    Structure(14, "3rd-Ventricle", (204, 182, 142), 8),
    Structure(15, "4th-Ventricle", (42, 204, 164), 8),
    Structure(16, "Brain-Stem", (119, 159, 176), 7),
    Structure(17, "Left-Hippocampus", (220, 216, 20), 1),
    Structure(53, "Right-Hippocampus", (220, 216, 20), 2),
    Structure(18, "Left-Amygdala", (103, 255, 255), 1),
    Structure(54, "Right-Amygdala", (103, 255, 255), 2),
    Structure(26, "Left-Accumbens-area", (255, 165, 0), 1),
    Structure(58, "Right-Accumbens-area", (255, 165, 0), 2),
    Structure(28, "Left-VentralDC", (165, 42, 42), 5),
    Structure(60, "Right-VentralDC", (165, 42, 42), 6),
    Structure(24, "CSF", (60, 60, 60), 8),
)

NUM_CLASSES = len(STRUCTURES) + 1
NUM_PARTS = 8
COARSE, FINE = 4.0, 2.0  # side of a voxel in each look, mm
_MARGIN = 6.0  # smallest margin around the brain in the fine look, mm
# Smallest size of the fine look, the one that it is trained with; a larger brain gets a larger view. The network
# normalises over all voxels, so another amount of air around the head makes the result worse.
_VIEW = (96, 96, 112)
_LITRES = (0.2, 3.0)  # plausible volume of a brain: from newborns up, with room for errors of the coarse look
_MAX_LOOKS = 3  # largest number of fine looks from one pose
_LOOSE = 0.8  # look again if a view with less than this fraction of the voxels would hold the brain
_ASKEW = 20.0  # poses that differ by less are the same, degrees; the fine look is trained for larger rotations
_SURE = 0.86  # a pose with a larger R2 is certain; heads that were turned upside down had 0.77 to 0.84
_LEAST_EXPLAINED = 0.5  # if no pose has a larger R2, the scan shows no brain
_LEAST_LIKE = 0.58  # smallest Dice with MNI152 of a brain; brains had .68 to .79, noise and phantoms .04 to .52
_MAX_VIEWS = 2  # largest number of poses to try the fine look on, until one shows a brain
_MAX_POSES = 4  # largest number of coarse looks, until a pose is certain
_BRIGHT = 0.1  # intensity above which a voxel shows something; air and its noise are darker
# Largest fraction of the visible voxels that may lie more than 12 mm from the brain of a stripped scan: stripped scans
# had at most .0034, whole heads at least .015.
_BARE = 0.008
_VIEW_COARSE = 56  # smallest number of voxels along each axis of the coarse look, as in its training (see _VIEW)
_TILTED = 8.0  # largest tilt of the fine look, degrees; a larger one makes structures less accurate
_WRONG = 12.0  # largest error of fitted centres that can be a brain, mm; real brains stay below 6


def mirror_pairs() -> list[list[int]]:
    """Classes of the left and the right part of each structure that has two.

    >>> mirror_pairs()[0], len(mirror_pairs())
    ([1, 2], 13)
    """
    classes = {structure.name: number for number, structure in enumerate(STRUCTURES, start=1)}
    return [[i, classes[name.replace("Left", "Right")]] for name, i in classes.items() if name.startswith("Left")]


def colour_table() -> str:
    """Colour table for FreeSurfer and 3D Slicer, a line per structure: number, name, red, green, blue, transparency."""
    rows = sorted([Structure(0, "Unknown", (0, 0, 0), 0), *STRUCTURES])
    return "".join(f"{row.number} {row.name} {' '.join(map(str, row.colour))} 0\n" for row in rows)


class _Block(nn.Module):
    """Two convolutions, then one normalisation."""

    def __init__(self, inputs: int, between: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(inputs, between, 3, padding=1)
        self.second = nn.Conv3d(between, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.second(F.leaky_relu(self.first(x), 0.1))), 0.1)


class BlockUNet(nn.Module):
    """U-Net that turns each block of 2 x 2 x 2 voxels into channels, so that even its finest level is fast.

    The network of Ronneberger et al. (MICCAI 2015) with one group normalisation per level (Wu and He, ECCV 2018). It
    reads and writes blocks as in sub-pixel convolution (Shi et al., CVPR 2016).

    Args:
        num_classes: number of classes K, including the background.
        widths: channels of each level, finest first, multiples of 4.
        top: channels of the last layer before the prediction, a multiple of 8.
    """

    def __init__(
        self, num_classes: int = NUM_CLASSES, widths: Sequence[int] = (24, 48, 80, 112), top: int = 64
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.multiple = 2 ** len(widths)
        self.encoder = nn.ModuleList(_Block(i, o, o, 4) for i, o in zip([8, *widths[:-1]], widths, strict=True))
        blocks = []
        for width, below in zip(widths[-2:0:-1], widths[:1:-1], strict=True):
            blocks.append(_Block(below + width, width, width, 4))
        blocks.append(_Block(widths[1] + widths[0], widths[0] + 8, top, top // 8))
        self.decoder = nn.ModuleList(blocks)
        self.head = nn.Conv3d(top, num_classes * 8, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, K, X, Y, Z)`` of ``image`` ``(B, 1, X, Y, Z)``, any size; intensities above 1 count as 1."""
        sx, sy, sz = image.shape[2], image.shape[3], image.shape[4]
        m = self.multiple
        image = F.pad(image.clamp(0.0, 1.0), [0, -sz % m, 0, -sy % m, 0, -sx % m])
        b, x, y, z = image.shape[0], image.shape[2] // 2, image.shape[3] // 2, image.shape[4] // 2
        f = image.reshape(b, x, 2, y, 2, z, 2).permute(0, 2, 4, 6, 1, 3, 5).reshape(b, 8, x, y, z)
        skips: list[Tensor] = []
        for block in self.encoder:
            f = block(F.max_pool3d(f, 2) if len(skips) else f)
            skips.append(f)
        level = len(skips) - 1
        for block in self.decoder:
            level -= 1
            f = block(torch.cat([F.interpolate(f, scale_factor=2.0, mode="nearest"), skips[level]], 1))
        f = self.head(f).reshape(b, self.num_classes, 2, 2, 2, x, y, z)
        f = f.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, self.num_classes, 2 * x, 2 * y, 2 * z)
        return f[:, :, :sx, :sy, :sz]


class AnatomyNet(nn.Module):
    """The two networks that find anatomy, coarse and fine; calling it runs the fine one.

    Attributes:
        coarse: network for voxels of 4 mm. It finds the brain in any pose, and the parts of the brain if the head is
            upright.
        fine: network for voxels of 2 mm and a roughly upright head, whose array axes run left, inferior, anterior.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coarse = BlockUNet(NUM_PARTS + 1, (16, 32, 64, 96), 24)
        self.fine = BlockUNet()

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, 31, X, Y, Z)`` of ``image`` ``(B, 1, X, Y, Z)``, any size; intensities above 1 count as 1."""
        return self.fine(image)


class Segmentation(NamedTuple):
    """The anatomy found in a scan.

    Attributes:
        labels: label map with FreeSurfer's numbers on the grid of the scan, int16; 0 outside the brain.
        volumes: volume of each structure in mm3, by name, computed from the posteriors.
        posteriors: probability of each class on the grid of the fine look, ``(K, *view.size)``, float32.
        view: grid of the fine look.
    """

    labels: Scan
    volumes: dict[str, float]
    posteriors: Tensor
    view: ImageGrid

    @property
    def anatomy(self) -> Anatomy:
        """Posteriors and their position, as :func:`~voxelmorph_monai.pose.fit` takes them."""
        return seen_anatomy(self.posteriors, self.view, self.labels.grid)

    @property
    def mask(self) -> Scan:
        """Brain mask, uint8: 1 in tissue, ventricles, and the fluid around the brain."""
        return self.labels.like((self.labels.array > 0).astype(np.uint8))


def segment(scan: ScanLike, network: AnatomyNet) -> Segmentation:
    """Label the anatomy of the head in a scan of any contrast, resolution and orientation, with or without skull.

    Args:
        scan: a path, a Scan, a nibabel image, a ``MetaTensor`` or an ITK image.
        network: the trained network, in evaluation mode.

    Raises:
        ValueError: the scan is not one volume of finite numbers, or shows no head.
    """
    scan = Scan.of(scan, "the scan")
    posteriors, view = look(scan, network)
    classes, volumes = restore(posteriors, view, scan.grid)
    return Segmentation(scan.like(to_freesurfer(classes)), volumes, posteriors, view)


def find_head(scan: Scan, network: AnatomyNet) -> ImageGrid:
    """Grid for the fine look at a scan: voxels of 2 mm around the brain, upright with the head.

    Raises:
        ValueError: the scan shows no head.
    """
    return locate(scan, network)[0][0]


@torch.no_grad()
def locate(scan: Scan, network: AnatomyNet) -> list[tuple[ImageGrid, Pose]]:
    """Grids of 2 mm around the brain in a scan, with the pose of the head; one for each possible pose, likeliest first.

    The coarse look finds the brain in any pose, but more exactly in an upright head. It is therefore repeated in the
    likeliest poses (:func:`~voxelmorph_monai.pose.find_poses`), until a pose explains the intensities of the brain well
    enough.

    Raises:
        ValueError: the scan shows no head.
    """
    if scan.is_slice:
        raise ValueError(f"{scan.name} is a single slice. Segmentation needs a volume.")
    view = _whole(scan.grid)
    image, view = _framed(see(scan, view), view)
    found: list[tuple[ImageGrid, Pose]] = []
    tried: list[Affine] = []
    for _ in range(_MAX_POSES):
        parts = _posteriors(network.coarse, image).cpu()
        brain = _largest((parts[0] < 0.5).numpy())
        litres = brain.sum() * COARSE**3 * 1e-6
        if _LITRES[0] < litres < _LITRES[1]:
            near = torch.from_numpy(ndimage.binary_dilation(brain))
            poses = find_poses(image[0, 0].clamp(max=1), (1 - parts[0]) * near, np.asarray(view.affine))
            found += [(_around(brain, view, rotation_of(pose.mapping) @ LIA), pose) for pose in poses]
            found.sort(key=lambda each: -each[1].explained)
        elif not found:
            raise ValueError(
                f"{scan.name} shows no head: the only brain-like part has a volume of {litres:.2g} litres. Check that "
                "it is a scan of a head, with the correct voxel size in its header."
            )
        left = [pose for _, pose in found if all(_angle(rotation_of(pose.mapping), turn) > _ASKEW for turn in tried)]
        if not left or found[0][1].explained > _SURE:
            break
        pose = left[0]
        tried.append(rotation_of(pose.mapping))
        axes = tried[-1] @ LIA
        middle = axes.T @ (pose.mapping @ [*anatomy_of_mni152().middle, 1.0])[:3]
        half = COARSE * _VIEW_COARSE / 2
        view = _grid(middle - half, middle + half, axes, COARSE, 1)
        image = see(scan, view)
    if found[0][1].explained < _LEAST_EXPLAINED:
        raise ValueError(
            f"{scan.name} shows no head: its intensities are not arranged like the tissues of a brain. Check that it "
            "is a scan of a head."
        )
    others: list[tuple[ImageGrid, Pose]] = []
    for view, pose in found:
        if all(_angle(rotation_of(pose.mapping), rotation_of(other.mapping)) > _ASKEW for _, other in others):
            others.append((view, pose))
    return others


@torch.no_grad()
def is_stripped(scan: Scan, network: AnatomyNet) -> bool:
    """Whether a scan shows almost nothing but a brain, by one coarse look that is upright according to the header.

    If it is, at most 0.8 % of the voxels that show something are more than 12 mm away from the brain. If the header is
    wrong by a large rotation, the coarse look may miss a part of the brain; the answer is then no.
    """
    view = _whole(scan.grid)
    image, _ = _framed(see(scan, view), view)
    background = _posteriors(network.coarse, image)[0].cpu().numpy()
    away = COARSE * ndimage.distance_transform_edt(~_largest(background < 0.5)) > 12
    shown = image[0, 0].numpy() > _BRIGHT
    return bool(np.count_nonzero(shown & away) <= _BARE * np.count_nonzero(shown))


@torch.no_grad()
def look(scan: Scan, network: AnatomyNet) -> tuple[Tensor, ImageGrid]:
    """Posteriors ``(K, *size)`` of the brain in a scan, and their grid with voxels of 2 mm.

    They are those of the first pose whose structures are like MNI152's, once both are aligned
    (:func:`~voxelmorph_monai.pose.likeness`).

    Raises:
        ValueError: the scan shows no head.
    """
    for view, _ in locate(scan, network)[:_MAX_VIEWS]:
        posteriors, closer = _look_closely(scan, view, network)
        if _is_brain(posteriors, closer):
            return posteriors, closer
    raise ValueError(
        f"{scan.name} shows no head: its brain-like part lacks the structures of a brain. Check that it is a scan of a "
        "head."
    )


@torch.no_grad()
def shows_brain(scan: Scan, view: ImageGrid, network: AnatomyNet) -> bool:
    """Whether what :func:`locate` found has the structures of a brain, by a fine look."""
    try:
        return _is_brain(*_look_closely(scan, view, network))
    except ValueError:
        return False


def _is_brain(posteriors: Tensor, view: ImageGrid) -> bool:
    """Whether posteriors ``(K, *size)`` on a grid have the structures of a brain."""
    seen = Anatomy(posteriors[1:].cpu(), np.asarray(view.affine)).coarser(2)
    return likeness(seen, anatomy_of_mni152(), fit(seen, anatomy_of_mni152())) >= _LEAST_LIKE


def _look_closely(scan: Scan, view: ImageGrid, network: AnatomyNet) -> tuple[Tensor, ImageGrid]:
    """Posteriors of the fine look, and its grid.

    If the coarse look was inaccurate, the brain reaches the border of the view, is tilted, or fills little of it. The
    fine look is then repeated with a better view.
    """
    for number in range(1, _MAX_LOOKS + 1):
        posteriors = clean(_posteriors(network.fine, see(scan, view)))
        brain = (posteriors[0] < 0.5).cpu().numpy()
        if not brain.any():
            raise ValueError(f"{scan.name} shows no head: no brain was found. Check that it is a scan of a head.")
        axes = np.asarray(view.affine)[:3, :3] / FINE
        mapping, missed = fit_centres(Anatomy(posteriors[1:].cpu(), np.asarray(view.affine)), anatomy_of_mni152())
        upright = rotation_of(mapping) @ LIA
        askew = missed < _WRONG and _angle(upright, axes) > _TILTED
        closer = _around(brain, view, upright if askew else axes)
        loose = np.prod(closer.size) < _LOOSE * np.prod(view.size)
        if number == _MAX_LOOKS or not (askew or loose or _touches(brain, view, scan.grid)):
            break
        view = closer
    return posteriors, view


def _posteriors(network: BlockUNet, image: Tensor) -> Tensor:
    """Probabilities ``(K, *size)`` of the classes in an image ``(1, 1, *size)``, float32, on the network's device."""
    device = next(network.parameters(), image).device
    with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
        logits = network(image.to(device))
    return logits.float().softmax(1)[0]


def see(scan: Scan, view: ImageGrid) -> Tensor:
    """Resample a scan on the grid ``view``: ``(1, 1, *size)``, float32, about 1 in bright tissue, 0 outside the scan.

    Smaller voxels of the scan are averaged first. The background becomes 0, and the 99.5th percentile of the voxels
    that are brighter than a twentieth of the brightest ones becomes 1.
    """
    image = torch.from_numpy(np.ascontiguousarray(scan.array - np.float32(scan.background), np.float32))[None, None]
    side = float(spacing(view.affine)[0])
    factors = np.maximum(np.floor(side / scan.spacing + 0.25), 1).astype(int)
    factors = np.minimum(factors, scan.shape)
    pooled = F.avg_pool3d(image, factors.tolist(), ceil_mode=True, count_include_pad=False)
    coarser = scan.affine @ np.diag([*factors, 1.0])
    coarser[:3, 3] = (scan.affine @ [*((factors - 1) / 2), 1.0])[:3]
    to_scan = torch.from_numpy(np.linalg.inv(coarser) @ view.affine).to(image)
    index = torch.from_numpy(np.indices(view.size, np.float32).reshape(3, -1))
    points = (to_scan[:3, :3] @ index + to_scan[:3, 3:]).view(1, 3, *view.size)
    there = _within(view, scan.grid).to(image)
    seen = sample(pooled, points).clamp_(min=0) * there
    # quantile over visible voxels only: the scale must not depend on the amount of air, nor on a few spikes
    values = seen.flatten()[:: 1 + seen.numel() // 2**18]
    shown = values[values > 0.05 * values.quantile(0.999)]
    return seen / shown.quantile(0.995) if len(shown) else seen


def restore(posteriors: Tensor, view: ImageGrid, grid: ImageGrid) -> tuple[NDArray[np.uint8], dict[str, float]]:
    r"""Class of each voxel of ``grid``, and volume of each structure, from posteriors on the grid ``view``.

    A voxel that is more likely brain than background gets the likeliest structure:

    .. math:: c(x) = \begin{cases} \arg\max_{k > 0} p_k(x) & \sum_{k > 0} p_k(x) > p_0(x) \\ 0 & \text{else} \end{cases}

    The volume of structure :math:`k` is :math:`v \sum_x p_k(x)`, summed over the voxels of ``view`` that lie in the
    scan, each of :math:`v` mm3.

    Args:
        posteriors: ``(K, *view.size)``.
        view: grid of the fine look.
        grid: grid of the scan.

    Returns:
        Classes ``grid.size``, uint8, and volumes in mm3 by name.
    """
    known = posteriors * _within(view, grid).to(posteriors)  # voxels beyond the scan have no class at all
    volumes = known[1:].flatten(1).double().sum(1) * float(np.prod(spacing(view.affine)))
    names = [structure.name for structure in STRUCTURES]
    return _classes(known, view, grid), dict(zip(names, volumes.tolist(), strict=True))


def seen_anatomy(posteriors: Tensor, view: ImageGrid, grid: ImageGrid) -> Anatomy:
    """Posteriors ``(K, *view.size)`` as an :class:`Anatomy`, which marks the voxels that a scan on ``grid`` shows."""
    return Anatomy(posteriors[1:].cpu(), np.asarray(view.affine), _within(view, grid))


def brain_mask(posteriors: Tensor, view: ImageGrid, grid: ImageGrid) -> NDArray[np.bool_]:
    """Brain mask ``grid.size`` by posteriors ``(K, *view.size)``: where :func:`restore` gives a structure."""
    known = posteriors[:1] * _within(view, grid).to(posteriors)
    shown = _within(view, grid).to(posteriors)
    return _classes(torch.stack([known[0], shown - known[0]]), view, grid) > 0


def to_freesurfer(classes: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Convert classes, numbered as in ``STRUCTURES``, to FreeSurfer's numbers, in an array of any shape.

    >>> to_freesurfer(np.array([0, 1, 2], np.uint8)).tolist()
    [0, 2, 41]
    """
    return np.array([0, *(structure.number for structure in STRUCTURES)], np.int16)[classes]


def clean(posteriors: Tensor) -> Tensor:
    """Clean the posteriors ``(K, *size)`` of a brain: keep its largest connected part, and fill the holes in it.

    Brain is where the background is less likely than 1/2. What is more than a voxel away from the largest part becomes
    background. In the holes, the probability of the background is added to the last class, the rest of the brain mask.
    """
    brain = _largest((posteriors[0] < 0.5).cpu().numpy())
    near = torch.from_numpy(ndimage.binary_dilation(brain)).to(posteriors.device)
    hole = torch.from_numpy(brain).to(posteriors.device) & (posteriors[0] >= 0.5)
    cleaned = posteriors * near
    cleaned[-1] += cleaned[0] * hole
    cleaned[0] = torch.where(near, cleaned[0] * ~hole, torch.ones_like(cleaned[0]))
    return cleaned


def _classes(posteriors: Tensor, view: ImageGrid, grid: ImageGrid) -> NDArray[np.uint8]:
    """Class of each voxel of ``grid``: 0 unless brain is more likely than background, else that of the likeliest."""
    found = np.zeros(grid.size, np.uint8)
    first, last = _box_in(view, grid)
    to_view = np.linalg.inv(view.affine) @ grid.affine
    to_view[:3, 3] += to_view[:3, :3] @ first
    part = found[tuple(slice(*ends) for ends in zip(first, last + 1, strict=True))]
    brain = posteriors[1:].sum(0) - posteriors[0]  # above 0 in the brain
    loops = compiled_module("scan_loops") if posteriors.device.type == "cpu" else None
    if loops is not None:
        likely = posteriors[1:].permute(1, 2, 3, 0).contiguous()
        part[...] = loops.likeliest(likely.numpy(), brain.numpy(), to_view, part.shape)
    else:
        _classify(posteriors, brain, torch.from_numpy(to_view).to(posteriors), part)
    return found


def _classify(posteriors: Tensor, brain: Tensor, to_view: Tensor, classes: NDArray[np.uint8]) -> None:
    """Write ``classes``; ``to_view``: from their voxels to those of the posteriors."""
    step = max(1, 2**21 // int(np.prod(classes.shape[1:])))
    for start in range(0, len(classes), step):
        part = classes[start : start + step]
        axes = [torch.arange(n, device=posteriors.device, dtype=posteriors.dtype) for n in part.shape]
        axes[0] += start
        index = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        points = (to_view[:3, :3] @ index + to_view[:3, 3:]).view(1, 3, -1, 1, 1)
        is_brain = sample(brain[None, None], points, padding_mode="zeros").flatten() > 0
        likeliest = sample(posteriors[None, 1:], points[:, :, is_brain]).flatten(2)[0].argmax(0)
        found = torch.zeros(is_brain.shape, dtype=torch.uint8, device=posteriors.device)
        found[is_brain] = 1 + likeliest.to(torch.uint8)
        part[...] = found.view(part.shape).cpu().numpy()


def _whole(grid: ImageGrid) -> ImageGrid:
    """Grid of the coarse look that contains ``grid``, upright according to its affine."""
    ends = LIA.T @ corners(grid.affine, [-0.5] * 3, np.array(grid.size) - 0.5)
    return _grid(ends.min(1), ends.max(1), LIA, COARSE, 1)


def _framed(image: Tensor, view: ImageGrid) -> tuple[Tensor, ImageGrid]:
    """Crop an image ``(1, 1, *size)`` to its content, pad it to the size of the training, and adapt the grid."""
    shown = (image[0, 0] > _BRIGHT).nonzero()
    if not len(shown):
        return image, view
    low, high = shown.amin(0).numpy(), shown.amax(0).numpy() + 1
    pad = np.maximum(_VIEW_COARSE - (high - low), 0)
    cut = image[:, :, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    ends = [int(n) for d in (2, 1, 0) for n in (pad[d] // 2, pad[d] - pad[d] // 2)]
    framed, affine = F.pad(cut, ends), np.array(view.affine)
    affine[:3, 3] = (view.affine @ [*(low - pad // 2), 1.0])[:3]
    return framed, ImageGrid(tuple(framed.shape[2:]), affine)


def _grid(low: NDArray[Any], high: NDArray[Any], axes: NDArray[Any], side: float, multiple: int) -> ImageGrid:
    """Grid with voxels of ``side`` mm around the box from ``low`` to ``high`` (mm along ``axes``).

    Its size is a multiple of ``multiple`` along each axis.
    """
    size = np.maximum(np.ceil((high - low) / side / multiple).astype(int), 1) * multiple
    affine = np.eye(4)
    affine[:3, :3] = side * axes
    affine[:3, 3] = axes @ ((low + high) / 2 - side * (size - 1) / 2)
    return ImageGrid(tuple(size.tolist()), affine)


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Largest connected part of ``mask``, with its holes filled."""
    parts, number = ndimage.label(mask)
    if number > 1:
        mask = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    return ndimage.binary_fill_holes(mask)


def _angle(first: Affine, second: Affine) -> float:
    """Angle between two rotations, degrees."""
    return float(np.degrees(np.arccos(np.clip((np.trace(first.T @ second) - 1) / 2, -1, 1))))


def _around(brain: NDArray[np.bool_], view: ImageGrid, axes: Affine) -> ImageGrid:
    """Grid for the fine look around ``brain``, a mask on the grid ``view``; the columns of ``axes`` are its axes."""
    surface = brain & ~ndimage.binary_erosion(brain)
    points = axes.T @ (view.affine[:3, :3] @ np.argwhere(surface).T + view.affine[:3, 3:])
    margin = _MARGIN + spacing(view.affine)[0] / 2
    low, high = points.min(1) - margin, points.max(1) + margin
    wanted = np.maximum(high - low, FINE * np.array(_VIEW))
    return _grid((low + high - wanted) / 2, (low + high + wanted) / 2, axes, FINE, 16)


def _touches(brain: NDArray[np.bool_], view: ImageGrid, grid: ImageGrid) -> bool:
    """Whether the brain reaches the border of the view where the scan continues beyond it."""
    edge = np.ones(brain.shape, bool)
    edge[2:-2, 2:-2, 2:-2] = False
    return bool((brain & edge & _within(view, grid).cpu().numpy()).any())


def _within(view: ImageGrid, grid: ImageGrid) -> Tensor:
    """Which voxels of ``view`` lie in ``grid``, which ends half a voxel beyond its outermost voxels."""
    to_grid = np.linalg.inv(grid.affine) @ view.affine
    axes = np.ogrid[tuple(slice(n) for n in view.size)]
    index = (sum(row[k] * axes[k] for k in range(3)) + row[3] for row in to_grid[:3])
    return torch.from_numpy(inside(index, grid.size))


def _box_in(view: ImageGrid, grid: ImageGrid) -> tuple[NDArray[Any], NDArray[Any]]:
    """First and last voxel of ``grid`` along each axis that may lie in ``view``."""
    ends = corners(np.linalg.inv(grid.affine) @ view.affine, [-1] * 3, view.size)
    last = np.array(grid.size) - 1
    return np.clip(np.floor(ends.min(1)), 0, last).astype(int), np.clip(np.ceil(ends.max(1)), 0, last).astype(int)


@lru_cache(maxsize=1)
def _loaded(weights: str, time_of_change: int) -> AnatomyNet:
    network = AnatomyNet()
    load_weights(network, weights)
    return network.eval()


def load_anatomy(weights: str | Path) -> AnatomyNet:
    """Load the trained network on the CPU, in evaluation mode; the file is read again only if it has changed."""
    path = Path(weights)
    return _loaded(str(path), path.stat().st_mtime_ns if path.exists() else 0)
