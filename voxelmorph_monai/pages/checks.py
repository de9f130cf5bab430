"""Check a registration without ground truth, and warn about problems in plain words.

The checks look at points every few millimetres over the fixed scan, so they take only a fraction of a second. A
registration that passes all checks can still be wrong.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, apply_affine, inside
from voxelmorph_monai.anatomy import STRUCTURES, mirror_pairs
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.pages.views import Frame, Registered
from voxelmorph_monai.space.scan import Scan

__all__ = ["Concern", "concerns"]

ndimage = lazy("scipy.ndimage")

Array = NDArray[Any]

_POINTS = 48  # largest number of lattice points along each axis
_STEP = 4.0  # smallest distance in mm between lattice points
_FAR = 8.0  # distance in mm between the contents of the scans above which they are misplaced
_LITTLE = 0.85  # Dice of the contents of the scans below which they hardly overlap
_OUTSIDE = 0.1  # fraction of the fixed scan outside the moving scan that is reported
_FOLDS = 0.05  # largest acceptable percentage of folded voxels
_UNLIKE = 0.5  # smallest acceptable correlation of two scans of the same contrast
_MISS = 2.0  # largest acceptable error of the inverse in mm, unless voxels are larger
_SCALES = (0.7, 1.4)  # acceptable scales of the linear part; adult heads differ by less
_TURN = 75.0  # largest acceptable rotation in degrees
_STRETCH = (0.1, 10.0)  # acceptable change of volume, apart from the linear part
_STRETCHED = 0.01  # largest acceptable fraction of tissue with a larger change
_LOOSE = 0.1  # largest acceptable fraction of labelled voxels where the scan shows nothing
_BETTER = 0.15  # how much more of the variance the labels of the other scan may explain than a scan's own labels
_ALIKE = 0.5  # fraction of common numbers above which two label maps are comparable
_FEW = 20  # lattice points in a structure below which its position is unreliable


class Concern(NamedTuple):
    """A warning about a registration.

    Attributes:
        check: name of the check, the same in all registrations.
        text: what looks wrong, and the likely reason.
    """

    check: str
    text: str


class _Lattice:
    """Values of both scans at lattice points spread over the fixed grid."""

    def __init__(self, result: Registered) -> None:
        frame = Frame.of(result.fixed.grid)
        sides = (np.array(frame.shape) - 1) * frame.spacing
        size = np.clip(np.ceil(sides / _STEP) + 1, 1, np.minimum(frame.shape, _POINTS)).astype(int)
        axes = [np.linspace(0, n - 1, m) for n, m in zip(frame.shape, size, strict=True)]
        index = np.stack(np.meshgrid(*axes, indexing="ij"))
        self.step = np.array([side / max(m - 1, 1) for side, m in zip(sides, size, strict=True)])
        self.points = apply_affine(frame.affine, index)
        self.moved = result.forward.apply(self.points.reshape(3, -1).T).T.reshape(self.points.shape)
        at = apply_affine(np.linalg.inv(result.moving.affine), self.moved)
        at[np.array(result.moving.shape) == 1] = 0.0
        self.common = inside(at, result.moving.shape)
        self.fixed = _at(result.fixed, apply_affine(np.linalg.inv(result.fixed.affine), self.points))
        self.warped = np.where(self.common, _at(result.moving, at), result.moving.background)
        self.shown = _shown(self.fixed, result.fixed.background)
        self.shown_warped = _shown(self.warped, result.moving.background) & self.common
        self.moving_index = at


def _at(scan: Scan, index: Array) -> Array:
    """Linearly interpolated values of a scan at voxel indices ``(3, ...)``."""
    return ndimage.map_coordinates(scan.array, index, np.float64, order=1, mode="nearest")


def _shown(values: Array, background: float) -> NDArray[np.bool_]:
    """Whether each value is above background and noise."""
    above = values[values > background]
    level = background + 0.12 * (np.percentile(above, 95) - background) if len(above) else background
    return values > level


def _where(vector: Array) -> str:
    """Describe the longest components of a vector (RAS, mm): ``20 mm to the right and 5 mm down``."""
    names = (("to the left", "to the right"), ("to the back", "to the front"), ("down", "up"))
    size = np.abs(vector)
    return " and ".join(
        f"{size[axis]:.0f} mm {names[axis][int(vector[axis] > 0)]}"
        for axis in np.argsort(-size)
        if size[axis] >= max(1.0, 0.3 * size.max())
    )


def _of_place(lattice: _Lattice) -> Iterator[Concern]:
    """Check whether both scans have content at the same places."""
    shown, other = lattice.shown & lattice.common, lattice.shown_warped
    outside = 1 - shown.sum() / max(lattice.shown.sum(), 1)
    if outside > _OUTSIDE:
        yield Concern(
            "field of view",
            f"{outside:.0%} of the content of the fixed scan lies outside the moving scan. Nothing was registered "
            "there, and the warped scan is empty.",
        )
    if not shown.any() or not other.any():
        yield Concern("place", "The warped scan is empty where the fixed scan is not: they do not overlap.")
        return
    vector = lattice.points[:, shown].mean(axis=1) - lattice.points[:, other].mean(axis=1)
    both = 2 * (shown & other).sum() / (shown.sum() + other.sum())
    if np.linalg.norm(vector) > _FAR or both < _LITTLE:
        text = f"The two scans overlap by only {both:.0%} (Dice)"
        if np.linalg.norm(vector) > _FAR:
            text += f"; to match, the warped scan would have to move {_where(vector)}"
        yield Concern("place", f"{text}. The alignment may have failed, or one scan shows more of the body.")


def _best_shift(lattice: _Lattice) -> tuple[Array, float, float]:
    """Shift (mm) of the warped scan for which edges match best, and the correlation of edges with and without it."""
    edges = []
    for image, there in ((lattice.fixed, lattice.shown), (lattice.warped, lattice.shown_warped)):
        level = np.percentile(image[there], 95) if there.any() else 1.0
        parts = np.gradient(np.clip(image / (level or 1.0), 0, 1.2), axis=[a for a in range(3) if image.shape[a] > 1])
        edge = np.sqrt(sum(part**2 for part in (parts if isinstance(parts, list | tuple) else [parts])))
        edges.append(edge - edge.mean())
    size = [2 * n if n > 1 else 1 for n in edges[0].shape]
    spectrum = np.fft.rfftn(edges[0], size, (0, 1, 2)) * np.conj(np.fft.rfftn(edges[1], size, (0, 1, 2)))
    match = np.fft.irfftn(spectrum, size, (0, 1, 2)) / max(
        float(np.linalg.norm(edges[0]) * np.linalg.norm(edges[1])), 1e-12
    )
    place = np.array(np.unravel_index(match.argmax(), match.shape))
    steps = np.where(place > np.array(size) // 2, place - np.array(size), place)
    return steps * lattice.step, float(match.max()), float(match.flat[0])


def _of_shift(lattice: _Lattice, turn: Affine) -> Iterator[Concern]:
    """Check whether the warped scan would match better elsewhere; ``turn`` is the rotation from frame axes to RAS."""
    if not lattice.shown.any() or not lattice.shown_warped.any():
        return
    shift, there, here = _best_shift(lattice)
    if np.linalg.norm(shift) > _FAR and there > here + 0.1:
        yield Concern(
            "shift",
            f"The edges of the warped scan would match those of the fixed scan better if it were moved "
            f"{_where(turn @ shift)} (correlation {there:.2f} instead of {here:.2f}).",
        )


def _of_linear(linear: NDArray[np.floating[Any]]) -> Iterator[Concern]:
    """Check whether the linear part of the map mirrors, rotates or scales more than bodies differ."""
    matrix = linear[:3, :3]
    if np.linalg.det(matrix) < 0:
        yield Concern(
            "mirrored",
            "The map mirrors the scan: its determinant is negative, so left and right (or another pair of opposite "
            "sides) are swapped. One of the headers may have an inverted axis.",
        )
        return
    u, scales, vt = np.linalg.svd(matrix)
    if scales.min() < _SCALES[0] or scales.max() > _SCALES[1]:
        sizes = ", ".join(f"{1 / scale:.2f}" for scale in scales)
        yield Concern(
            "scale",
            f"The linear part scales the moving scan by {sizes} along its axes. Check the voxel sizes in both headers.",
        )
    angle = float(np.degrees(np.arccos(np.clip((np.trace(u @ vt) - 1) / 2, -1, 1))))
    if angle > _TURN:
        yield Concern(
            "turn",
            f"The linear part rotates the scan by {angle:.0f} degrees. Check the orientation in both headers, and "
            "whether the warped scan is upright.",
        )


def _of_measures(measures: Mapping[str, Any], options: Mapping[str, Any], side: float) -> Iterator[Concern]:
    """Check the measures of quality; ``side`` is the longest side of a fixed voxel in mm."""
    before, after = measures["correlation_before"], measures["correlation_after"]
    one_contrast = options.get("similarity", "lncc") == "lncc"
    if one_contrast and after < before - 0.01:
        yield Concern(
            "worse",
            f"The scans are less alike than before: their correlation fell from {before:.2f} to {after:.2f}.",
        )
    if one_contrast and after < _UNLIKE:
        yield Concern(
            "unlike",
            f"The scans are still not alike: their correlation is {after:.2f}. If their contrasts differ, register "
            "them with --similarity mind.",
        )
    folds = measures["folding_percent"]
    if folds > _FOLDS:
        yield Concern(
            "folds",
            f"The map folds in {folds:.2g} % of the voxels: it takes several points to the same point there, which is "
            "impossible for tissue.",
        )
    miss = measures["inverse_consistency_mm"]
    if miss > max(_MISS, side):
        yield Concern(
            "inverse",
            f"The inverse is wrong: points mapped there and back end {miss:.1f} mm from their start on average.",
        )
    dice = measures.get("dice")
    if dice and dice["after"]["mean"] < dice["before"]["mean"] - 0.01:
        yield Concern(
            "Dice",
            f"The labels overlap less than before: the mean Dice fell from {dice['before']['mean']:.2f} to "
            f"{dice['after']['mean']:.2f}.",
        )
    elif dice and one_contrast and after > 0.9 and dice["after"]["mean"] < 0.4:
        yield Concern(
            "Dice",
            f"The images agree (correlation {after:.2f}), but their labels do not (mean Dice "
            f"{dice['after']['mean']:.2f}). One of the label files may belong to another scan.",
        )


def _of_volumes(result: Registered, determinant: Array, lattice: _Lattice) -> Iterator[Concern]:
    """Check whether much of the tissue grows or shrinks more than is anatomically possible."""
    linear = abs(np.linalg.det(result.forward.linear[:3, :3]))
    index = apply_affine(np.linalg.inv(result.fixed.affine), lattice.points[:, lattice.shown])
    change = determinant[tuple(np.rint(index).astype(int))] / linear
    share = float(np.mean((change < _STRETCH[0]) | (change > _STRETCH[1]))) if change.size else 0.0
    if share > _STRETCHED:
        yield Concern(
            "volumes",
            f"{share:.0%} of the tissue shrinks to less than a tenth of its volume or grows more than tenfold.",
        )


def _numbered(labels: Scan, index: Array) -> Array:
    """Labels of the nearest voxels at voxel indices ``(3, ...)``; 0 outside."""
    at = np.rint(index).astype(int)
    there = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(at, labels.shape, strict=True)])
    at = np.where(there, at, 0)
    return np.where(there, labels.array[tuple(at)], 0)


def _of_fit(labels: Array, image: Array, background: float, name: str) -> Iterator[Concern]:
    """Check whether the labels lie where their scan shows something."""
    labelled = labels != 0
    if labelled.sum() < _FEW:
        return
    empty = float(np.mean(~_shown(image, background)[labelled]))
    if empty > _LOOSE:
        yield Concern(
            "labels",
            f"{empty:.0%} of the labelled voxels of the {name} scan lie where it shows nothing: the label file may "
            "belong to another scan.",
        )


def _centres(labels: Array, points: Array) -> dict[int, Array]:
    """Mean point ``(3,)`` (RAS, mm) of each structure with enough lattice points."""
    numbers, counts = np.unique(labels[labels != 0], return_counts=True)
    return {
        int(number): points[:, labels == number].mean(axis=1)
        for number, count in zip(numbers, counts, strict=True)
        if count >= _FEW
    }


def _of_sides(labels: Array, points: Array, name: str) -> Iterator[Concern]:
    """Check whether FreeSurfer's left structures lie to the left of their right counterparts."""
    numbers = {structure.number for structure in STRUCTURES}
    centres = _centres(labels, points)
    if len(centres) < 4 or len(numbers & centres.keys()) < 0.6 * len(centres):
        return  # not FreeSurfer's numbers
    pairs = [(STRUCTURES[a - 1].number, STRUCTURES[b - 1].number) for a, b in mirror_pairs()]
    known = [(left, right) for left, right in pairs if left in centres and right in centres]
    wrong = [left for left, right in known if centres[left][0] > centres[right][0]]
    if len(wrong) > len(known) / 2:
        yield Concern(
            "sides",
            f"In {len(wrong)} of {len(known)} pairs of structures, the left structure of the {name} scan lies on the "
            "right: left and right are swapped in its label file or in its header.",
        )


def _of_exchange(moved: Array, fixed: Array) -> Iterator[Concern]:
    """Check whether two structures of one label map lie in each other's place in the other map."""
    both = (moved != 0) & (fixed != 0)
    if both.sum() < _FEW:
        return
    numbers = np.union1d(np.unique(moved[both]), np.unique(fixed[both]))
    a, b = (np.searchsorted(numbers, each[both]) for each in (moved, fixed))
    table = np.bincount(a * len(numbers) + b, minlength=len(numbers) ** 2).reshape(len(numbers), -1)
    best = table.argmax(axis=1)
    exchanged = [
        f"{numbers[i]} and {numbers[best[i]]}"
        for i in range(len(numbers))
        if i < best[i] and best[best[i]] == i and min(table[i].sum(), table[best[i]].sum()) >= _FEW
    ]
    if exchanged:
        more = f", and {len(exchanged) - 3} more" if len(exchanged) > 3 else ""
        yield Concern(
            "sides",
            f"Labels {', '.join(exchanged[:3])}{more} lie in each other's place: the two label files differ in left "
            "and right or in their numbers.",
        )


def _explained(image: Array, labels: Array) -> float:
    """Fraction (0 to 1) of the variance of an image that labels explain; both ``(N,)``."""
    _, place = np.unique(labels, return_inverse=True)
    means = np.bincount(place, image) / np.bincount(place)
    return 1 - float(np.sum((image - means[place]) ** 2)) / max(float(np.sum((image - image.mean()) ** 2)), 1e-12)


def _of_other_scans(moved: Array, fixed: Array, lattice: _Lattice) -> Iterator[Concern]:
    """Check whether the labels of one scan explain the other image better than that scan's own labels do.

    For two registered brains of OASIS, a scan's own labels explained 0.71 to 0.76 of the variance, the warped labels of
    the other scan 0.55 to 0.58, and the labels of a third person 0.09 to 0.33.
    """
    both = (moved != 0) & (fixed != 0)
    of_moved, of_fixed = np.unique(moved[both]), np.unique(fixed[both])
    common = len(np.intersect1d(of_moved, of_fixed))
    if both.sum() < 10 * _FEW or common < max(2, _ALIKE * len(np.union1d(of_moved, of_fixed))):
        return  # too few points, or label maps of different structures
    for name, image, own, other in (
        ("fixed", lattice.fixed, fixed, moved),
        ("moving", lattice.warped, moved, fixed),
    ):
        mine, others = (_explained(image[both], each[both]) for each in (own, other))
        if others > mine + _BETTER:
            yield Concern(
                "labels",
                f"The labels of the other scan explain {others:.0%} of the contrast in the {name} scan, its own labels "
                f"only {mine:.0%}: the label file of the {name} scan may belong to another scan.",
            )


def concerns(result: Registered, measures: Mapping[str, Any], determinant: Array) -> list[Concern]:
    """Run all checks of a registration; returns those that failed.

    Args:
        result: registration to check.
        measures: ``correlation_before`` and ``_after``, ``folding_percent``, ``inverse_consistency_mm``, ``dice``.
        determinant: Jacobian determinant of the whole map, on the fixed grid.
    """
    lattice = _Lattice(result)
    frame = Frame.of(result.fixed.grid)
    found = [
        *_of_linear(result.forward.linear),
        *_of_place(lattice),
        *_of_shift(lattice, frame.affine[:3, :3] / frame.spacing),
        *_of_measures(measures, result.options, float(result.fixed.spacing.max())),
        *_of_volumes(result, determinant, lattice),
    ]
    fixed = moved = None
    if result.fixed_labels is not None:
        fixed = _numbered(result.fixed_labels, apply_affine(np.linalg.inv(result.fixed.affine), lattice.points))
        found += _of_fit(fixed, lattice.fixed, result.fixed.background, "fixed")
        found += _of_sides(fixed, lattice.points, "fixed")
    if result.moving_labels is not None:
        moved = _numbered(result.moving_labels, lattice.moving_index)
        found += _of_fit(moved, lattice.warped, result.moving.background, "moving")
        found += _of_sides(moved, lattice.moved, "moving")
    if fixed is not None and moved is not None:
        found += _of_exchange(moved, fixed)
        found += _of_other_scans(moved, fixed, lattice)
    return found
