"""Find the brain, the contrast and the pose of whole heads."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from voxelmorph_monai.affines import Affine, apply_affine, inside
from voxelmorph_monai.anatomy import AnatomyNet, brain_mask, load_anatomy, look, seen_anatomy, to_freesurfer
from voxelmorph_monai.apps.options import Options
from voxelmorph_monai.apps.shipped import choose_device, shipped_anatomy
from voxelmorph_monai.pose import Anatomy, anatomy_of_mni152, fit
from voxelmorph_monai.space.alignment import align
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import check_brain, mni152

__all__ = ["T1_WEIGHTED", "Head", "align_to_mni152", "find_brain", "find_brains", "may_be_head"]

T1_WEIGHTED = (0, 1, 2)
"""Order of brightness in T1-weighted scans: white matter (0), cortex (1), ventricles (2)."""

_LARGEST_BRAIN = 2.3  # litres; skull-stripped scans, even at the size of MNI152, show less, and heads 2.6 to 10


class Head(NamedTuple):
    """A whole head in a scan.

    Attributes:
        brain: the scan with 0 outside the brain.
        anatomy: probabilities of the structures, in voxels of 4 mm.
        labels: label map of the structures with FreeSurfer's numbers, in voxels of 2 mm.
        order: 0 (white matter), 1 (cortex) and 2 (ventricles) in the order of their brightness, the brightest first.
    """

    brain: Scan
    anatomy: Anatomy
    labels: Scan
    order: tuple[int, ...] = T1_WEIGHTED


def may_be_head(scan: Scan) -> bool:
    """Whether a scan shows more than a brain, and is not a CT."""
    if scan.is_slice or scan.background < 0:
        return False
    litres = np.count_nonzero(scan.array > 0) * np.prod(scan.spacing) * 1e-6
    return bool(litres > _LARGEST_BRAIN)


def _network(device: str | None) -> AnatomyNet:
    return load_anatomy(shipped_anatomy()).to(choose_device(device))


def find_brain(scan: Scan, device: str | None = None) -> Head | None:
    """Find the brain in a scan of a head, of any contrast and in any pose; None if the scan may be a brain itself.

    Raises:
        ValueError: the scan shows neither a head nor a brain.
    """
    if not may_be_head(scan):
        return None
    try:
        posteriors, view = look(scan, _network(device))
    except ValueError:
        check_brain(scan)
        return None
    mask = brain_mask(posteriors, view, scan.grid)
    brain = scan.like(np.where(mask, scan.array, np.float32(0)))
    anatomy = seen_anatomy(posteriors, view, scan.grid).coarser(2)
    classes = posteriors.argmax(0).cpu().numpy().astype(np.uint8)
    return Head(brain, anatomy, Scan(to_freesurfer(classes), view.affine, "labels"), _order(brain, anatomy))


def _order(brain: Scan, anatomy: Anatomy) -> tuple[int, ...]:
    """Order white matter, cortex and lateral ventricles by their median intensity where they are certain."""
    medians = []
    for classes in ([0, 1], [2, 3], [4, 5]):
        share = anatomy.posteriors[classes].sum(0)
        points = apply_affine(anatomy.affine, (share > min(0.8, 0.9 * float(share.max()))).nonzero().T.numpy())
        index = np.rint(apply_affine(np.linalg.inv(brain.affine), points)).astype(int)
        index = index[:, inside(index, brain.shape)]
        medians.append(float(np.median(brain.array[tuple(index)])) if index.size else 0.0)
    return tuple(int(n) for n in np.argsort(-np.array(medians)))


def find_brains(
    scans: Sequence[Scan], masks: Sequence[Scan | None], options: Options
) -> tuple[list[Head | None], Options, list[str]]:
    """Find the brains of whole heads that have no mask, and adapt the options if a head is not T1-weighted.

    Returns:
        For each scan its head (None for a scan that is used as it is), the adapted options, and notes on what changed.

    Raises:
        ValueError: a scan shows neither a brain nor a head.
    """
    wanted = options.space == "mni152" and options.brain_extraction == "auto"
    heads = [
        find_brain(scan, options.device) if wanted and mask is None else None
        for scan, mask in zip(scans, masks, strict=True)
    ]
    orders = [T1_WEIGHTED if head is None else head.order for head in heads]
    others = [scan.name for scan, order in zip(scans, orders, strict=True) if order != T1_WEIGHTED]
    if not others or options.weights is not None:
        return heads, options, []
    changed, said = replace(options, weights="none"), "without the network, which knows T1-weighted scans only"
    if orders[0] != orders[1] and options.refines and options.similarity == "lncc":
        changed, said = replace(changed, similarity="mind"), f"{said}, and refined by mind, as the contrasts differ"
    verb = "is" if len(others) == 1 else "are"
    return heads, changed, [f"{' and '.join(others)} {verb} not T1-weighted: registered {said}."]


def align_to_mni152(scan: Scan, head: Head | None, alignment: str) -> Affine:
    """Align a scan to MNI152 by the structures of a head or the image of a brain: map from MNI152 to scan (mm)."""
    if head is None or alignment == "none":
        return align(scan, mni152(), alignment)
    return fit(head.anatomy, anatomy_of_mni152(), alignment)
