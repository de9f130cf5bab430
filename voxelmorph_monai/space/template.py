"""The mean brain MNI152, and the grids on which networks work.

The axes of such a grid run left, inferior, anterior (LIA, as in FreeSurfer), and its centre is the centre of the
template's brain. The standard grid has 160 x 192 x 224 voxels of 1 mm, as in most publications.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import LIA, ImageGrid, corners
from voxelmorph_monai.io.formats import load_nibabel
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.space.resampling import fraction_inside
from voxelmorph_monai.space.scan import Plane, Scan

__all__ = [
    "STANDARD_GRID",
    "TISSUES",
    "WorkingGrid",
    "check_brain",
    "check_in_grid",
    "mni152",
    "mni152_tissue",
    "sample_scan",
]

datasets = lazy("nilearn.datasets")

_MARGIN = 8  # voxels around the image in a grid that fits it
_LEAST_IN_GRID = 0.75  # smallest fraction of a brain that must lie in a grid around MNI152; aligned ones lie in it


@dataclass(frozen=True)
class WorkingGrid:
    """Size and spacing of the grid on which a network works; :meth:`around` gives it a position.

    Attributes:
        size: number of voxels along left, inferior, anterior, or along the two axes of a plane.
        spacing: voxel size in mm.

    Raises:
        ValueError: the number of sizes is not 2 or 3, or a size or the spacing is not above 0.
    """

    size: tuple[int, ...] = (160, 192, 224)
    spacing: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError if the size or the spacing is impossible."""
        if len(self.size) not in (2, 3) or min(self.size) < 1 or not 0 < self.spacing < np.inf:
            raise ValueError(
                f"a grid of size {self.size} and spacing {self.spacing} is not possible. Give 2 or 3 sizes above 0 and "
                "a spacing above 0 (--size, --spacing)."
            )

    @classmethod
    def fitting(cls, scan: Scan) -> "WorkingGrid":
        """Grid that fits the part of a scan above its background, with a margin.

        Its voxel size is the smallest of the scan, or larger, so that it has no more voxels than the standard grid.
        """
        plane, axes, low, high = _extent(scan)
        sides = scan.spacing
        side = float(sides.min() if plane is None else sides[np.array(scan.shape) > 1].min())
        while True:
            size = np.ceil(np.abs(axes.T @ (high - low)) / side - 1e-3).astype(int) + 1 + 2 * _MARGIN
            if size.prod() <= np.prod(STANDARD_GRID.size):
                return cls(tuple(size.tolist()), side)
            side *= 1.02

    def around(self, scan: Scan | None = None) -> ImageGrid:
        """Place the grid around the content of a scan (default: the brain of MNI152), or in the plane of a slice.

        Returns:
            Size and affine (RAS, mm); the size is ``(X, Y, 1)`` for a slice.

        Raises:
            ValueError: the grid has the wrong number of dimensions, or is too small for the content.
        """
        plane, axes, low, high = _extent(scan)
        what = "the template's brain" if scan is None else scan.name
        if len(self.size) != len(axes):
            raise ValueError(f"a grid of size {self.size} does not fit {what}. Give {len(axes)} sizes (--size).")
        extent, needed = np.multiply(self.size, self.spacing), np.abs(axes.T @ (high - low))
        if (extent < needed).any():
            raise ValueError(
                f"a grid of {extent.round(1).tolist()} mm is too small for {what}, which needs "
                f"{needed.round(1).tolist()} mm: choose a larger one (--size, --spacing)."
            )
        affine = np.eye(len(axes) + 1)
        affine[:-1, :-1] = self.spacing * axes
        affine[:-1, -1] = (low + high) / 2 - affine[:-1, :-1] @ ((np.array(self.size) - 1) / 2)
        return ImageGrid((*self.size, 1)[:3], affine if plane is None else plane.place(affine))


STANDARD_GRID = WorkingGrid()
"""The grid of most publications: 160 x 192 x 224 voxels of 1 mm."""

TISSUES = {1: "cerebrospinal fluid", 2: "grey matter", 3: "white matter"}
"""Names of the labels of :func:`mni152_tissue`."""


@cache
def mni152() -> Scan:
    """Mean adult brain MNI152 without skull, 1 mm: intensities in [0, 1], 0 outside the brain.

    The scan is read once and shared, so its arrays are read-only.
    """
    image = load_nibabel(sample_scan("mni152"))
    scan = Scan(np.asarray(image.dataobj, np.float32) / np.float32(255), image.affine, "MNI152")
    for array in (scan.array, scan.affine):
        array.flags.writeable = False
    return scan


def mni152_tissue() -> Scan:
    """Most probable tissue in each voxel of MNI152: 0 outside the brain, 1 CSF, 2 grey, 3 white matter (uint8).

    In the brain, the probability of CSF is 1 minus the probabilities of grey and white matter.
    """
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata()
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata()
    mask = datasets.load_mni152_brain_mask(resolution=1)
    tissue = np.argmax([1 - grey - white, grey, white], axis=0) + 1
    return Scan(np.where(mask.get_fdata() > 0, tissue, 0).astype(np.uint8), mask.affine, "tissues of MNI152")


def sample_scan(name: str) -> Path:
    """Path of a scan that is included in the package.

    The names are ``"colin27"``, ``"colin27_tissue"`` (with the labels of :func:`mni152_tissue`) and ``"mni152"``
    (with intensities up to 255).
    """
    folder = Path(__file__).parents[1] / "sample"
    names = sorted(path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz"))
    if name not in names:
        raise ValueError(f"there is no sample '{name}', only {', '.join(names)}.")
    return folder / f"{name}.nii.gz"


def _box(array: NDArray[np.bool_], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lower and upper corner (mm) of the box around all True voxels, for any orientation of the array."""
    lines = [np.flatnonzero(array.any(axis=tuple({*range(array.ndim)} - {axis}))) for axis in range(array.ndim)]
    ends = corners(affine, [line[0] for line in lines], [line[-1] for line in lines])
    return ends.min(axis=1), ends.max(axis=1)


@cache
def _template_box() -> tuple[NDArray[Any], NDArray[Any]]:
    return _box(mni152().array > 0, mni152().affine)


def _extent(scan: Scan | None) -> tuple[Plane | None, NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Plane of a slice, or None; the axes of a grid, in columns; and the box (mm) that the grid must contain."""
    if scan is None:
        return None, LIA, *_template_box()
    shown = scan.like(scan.array > scan.background)
    if scan.is_slice:
        plane = Plane.of(scan)
        return plane, np.eye(2), *_box(*plane.flatten(shown))
    return None, LIA, *_box(shown.array, scan.affine)


def check_brain(scan: Scan) -> None:
    """Raise ValueError unless a scan may show a skull-stripped brain: a volume of 0.3 to about 2.5 litres above 0."""
    if scan.is_slice:
        raise ValueError(f"{scan.name} has shape {scan.shape}, a slice, but a brain is a volume.")
    if scan.background < 0:
        raise ValueError(
            f"{scan.name} has a background of {scan.background:.3g}, but the background of a skull-stripped brain is 0."
        )
    litres = np.count_nonzero(scan.array > 0) * np.prod(scan.spacing) * 1e-6
    # Interpolation adds up to two voxels slightly above 0 all around a brain, whose surface has 0.1 square metres.
    most = 2.5 + 0.2 * scan.spacing.mean()
    if not 0.3 < litres < most:
        raise ValueError(
            f"{scan.name} shows {litres:.2g} litres above 0, but a skull-stripped brain has 0.3 to {most:.2g} litres "
            "at this spacing: strip the skull first, or give a mask of the brain."
        )


def check_in_grid(scan: Scan, mapping: NDArray[np.floating[Any]], grid: ImageGrid) -> None:
    """Raise ValueError unless at least 75 % of a brain lies in a grid around MNI152.

    Args:
        scan: skull-stripped brain.
        mapping: 4 x 4, from points of MNI152 to points of the scan (RAS, mm).
        grid: grid around MNI152.
    """
    fraction = fraction_inside(scan, grid, np.linalg.inv(mapping))
    if fraction < _LEAST_IN_GRID:
        raise ValueError(
            f"only {fraction:.0%} of {scan.name} lies in the network's grid around MNI152, but at least "
            f"{_LEAST_IN_GRID:.0%} is needed. Align it (alignment 'affine'), or use space 'fixed'."
        )
