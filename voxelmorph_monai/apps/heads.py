"""Whole heads among the scans to register: find their brains, their contrast and their pose."""

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
"""White matter is brighter than cortex, and cortex than ventricles."""

_LARGEST_BRAIN = 2.3  # litres that a skull-stripped scan shows at most, enlarged to MNI152's size; heads show 2.6 to 10


class Head(NamedTuple):
    """A whole head in a scan.

    Attributes:
        brain: the scan with 0 outside its brain.
        anatomy: its structures, with voxels of 4 mm.
        labels: FreeSurfer's numbers of them, with voxels of 2 mm.
        order: the numbers 0 (white matter), 1 (cortex) and 2 (ventricles), the brightest first.
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
    """Of the medians of white matter, cortex and lateral ventricles, where the network is sure of them."""
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
    """Find the brains in those of two scans that are heads without a mask; use no T1 network for other contrasts.

    Returns:
        The heads (None for a scan that is used as it is), the options for their contrasts, and notes on these.

    Raises:
        ValueError: a scan shows more than a brain, but no head.
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
    """Map from points of MNI152 to points of a scan, from the structures of a head or the image of a brain."""
    if head is None or alignment == "none":
        return align(scan, mni152(), alignment)
    return fit(head.anatomy, anatomy_of_mni152(), alignment)
