"""Compute the pictures of a report: slices through the anatomy, intensity windows, hidden faces, a coarse map."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray
from PIL import Image

from voxelmorph_monai.affines import Affine, ImageGrid, apply_affine, slabs, spacing
from voxelmorph_monai.anatomy import AnatomyNet, is_stripped, locate, shows_brain
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.maps.spatial_map import SpatialMap
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import mni152

__all__ = [
    "OCTAVES",
    "START",
    "Face",
    "Frame",
    "Plane",
    "Registered",
    "Views",
    "Window",
    "find_face",
    "is_ct",
    "shown_box",
    "window_of",
    "windows_of",
]

ndimage = lazy("scipy.ndimage")

Array = NDArray[Any]

SLICES = 12  # largest number of slices per plane; even, so that none lies in the fissure between the hemispheres
PIXELS = 256  # largest number of pixels along a side, so that finer scans do not make larger pages
OCTAVES = 2.0  # largest change of volume that a page can show: a quarter to four times
_STEP = 5.0  # distance in mm between the vectors of a page, unless they are too many
_VECTORS = 44  # largest number of vectors along each axis
_EDGE = 0.08  # fraction of the extent of the anatomy to skip at both ends, where slices show little of it
START = (0.35, 0.45, 0.55)  # position of the first slice to show, through a hemisphere
_BUFFER = 8.0  # mm between the brain and the hidden part of the head
_BRAIN = 2.2  # litres; a scan that shows more is a head, perhaps with air around it; the largest brains have 1.9
_MEAN_BRAIN = 1.83  # volume of the brain of MNI152 in litres
_TO_FACE = np.array([0.0, 1.0, -1.0]) / np.sqrt(2)  # in MNI152: to the front and down
_BRAIN_ONLY = 1.5  # a scan that shows less than this multiple of its brain is a brain; the head of a newborn shows more
_CLEAR = 0.8  # R2 above which a pose needs no second look; upright heads reached 0.85, a chest 0.6
_SAMPLES = 200_000  # number of voxels to compute percentiles from
_AIR = -500.0  # Hounsfield units; the background of a CT is below
_TISSUE = (-100.0, 300.0)  # Hounsfield units between which the median of a body without lungs lies


class Registered(Protocol):
    """The part of a registration that a page reads; see :class:`~voxelmorph_monai.apps.result.RegistrationResult`."""

    @property
    def moving(self) -> Scan: ...  # noqa: D102
    @property
    def fixed(self) -> Scan: ...  # noqa: D102
    @property
    def warped(self) -> Scan: ...  # noqa: D102
    @property
    def aligned(self) -> Scan: ...  # noqa: D102
    @property
    def forward(self) -> SpatialMap: ...  # noqa: D102
    @property
    def ddf(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def moving_labels(self) -> Scan | None: ...  # noqa: D102
    @property
    def fixed_labels(self) -> Scan | None: ...  # noqa: D102
    @property
    def warped_labels(self) -> Scan | None: ...  # noqa: D102
    @property
    def outlines(self) -> Mapping[str, Scan]: ...  # noqa: D102
    @property
    def anatomy(self) -> Mapping[str, Scan]: ...  # noqa: D102
    @property
    def options(self) -> Mapping[str, Any]: ...  # noqa: D102


class Window(NamedTuple):
    """Intensities to draw as black (``low``) and white (``high``)."""

    low: float
    high: float

    def grey(self, image: Array) -> NDArray[np.uint8]:
        """Convert an image to grey levels from 0 to 255."""
        return (255 * self.scale(image)).astype(np.uint8)

    def scale(self, image: Array) -> NDArray[np.float32]:
        """Convert an image to values from 0 (black) to 1 (white)."""
        return np.clip((image.astype(np.float32) - self.low) / (self.high - self.low), 0, 1)


CT_WINDOWS = {"soft tissue": Window(-160, 240), "lung": Window(-1350, 150), "bone": Window(-500, 1300)}
"""Windows for CT, in Hounsfield units."""


class Face(NamedTuple):
    """The brain of a head, and the half-space in front of and below it that contains the face.

    Attributes:
        brain: points in the brain, ``(N, 3)`` (RAS, mm).
        normal: unit vector from the brain to the face, forward and down at 45 degrees in the head's axes: ``(3,)``.
        limit: distance in mm along ``normal`` beyond which the head is hidden; infinite for a stripped brain.
    """

    brain: Array
    normal: Array
    limit: float

    def hides(self, points: Array) -> NDArray[np.bool_]:
        """Whether each of ``points`` ``(3, ...)`` (RAS, mm) belongs to the face."""
        return np.tensordot(self.normal, points, 1) > self.limit


@cache
def _template() -> tuple[Array, float]:
    """Points ``(3, N)`` inside the brain of MNI152 (RAS, mm), and how far it reaches to the front and down."""
    brain = mni152()
    every = (slice(None, None, 3),) * 3
    mask = brain.array[every] > 0
    affine = brain.affine @ np.diag([3.0, 3.0, 3.0, 1.0])
    points = apply_affine(affine, np.argwhere(mask).T.astype(float))
    inner = apply_affine(affine, np.argwhere(ndimage.binary_erosion(mask)).T.astype(float))
    return inner, float((_TO_FACE @ points).max())


def find_face(scan: Scan, network: AnatomyNet, *, is_head: bool = False) -> Face | None:
    """Find the face in a scan of a head in any pose; None if the scan shows no head.

    A plane at 45 degrees touches the brain from the front and from below. Everything more than 8 mm beyond it is
    hidden: eyes, nose, mouth and chin. The plane is defined in MNI152 and mapped to the scan by the pose of the head,
    so the same part is hidden in any pose. This is the cut of quickshear (Schimke and Hale, Quickshear defacing for
    neuroimages, HealthSec 2011) at a fixed angle.

    Args:
        scan: any scan.
        network: network that finds brains.
        is_head: whether the scan is known to show a head. Otherwise, if the coarse search is not certain, a fine search
            must confirm the brain: in a chest, the coarse search can mistake the heart between the lungs for a brain.
    """
    if scan.is_slice:
        return None
    shown = np.count_nonzero(scan.array > scan.background) * np.prod(scan.spacing) * 1e-6
    if shown < _BRAIN and is_stripped(scan, network):
        return _no_face(scan)
    try:
        view, pose = locate(scan, network)[0]
    except ValueError:
        return None
    if not is_head and pose.explained < _CLEAR and not shows_brain(scan, view, network):
        return None
    mapping = np.asarray(pose.mapping, dtype=np.float64)
    inside, reach = _template()
    if shown < min(_BRAIN, _BRAIN_ONLY * _MEAN_BRAIN * abs(np.linalg.det(mapping[:3, :3]))):
        return _no_face(scan)
    back = np.linalg.inv(mapping)
    normal = _TO_FACE @ back[:3, :3]
    length = np.linalg.norm(normal)
    limit = (reach + _BUFFER - _TO_FACE @ back[:3, 3]) / length
    return Face(apply_affine(mapping, inside).T, normal / length, float(limit))


def _no_face(scan: Scan) -> Face:
    """Face of a skull-stripped brain: nothing is hidden."""
    shown = np.flatnonzero(scan.array > scan.background)
    some = np.stack(np.unravel_index(shown[:: max(1, len(shown) // _SAMPLES)], scan.shape))
    return Face(apply_affine(scan.affine, some.astype(float)).T, np.zeros(3), np.inf)


def _voxels_at(scan: Scan, points: Array) -> Array:
    """Values of the nearest voxels at ``points`` ``(N, 3)`` (RAS, mm), without points outside the scan."""
    index = np.rint(apply_affine(np.linalg.inv(scan.affine), points.T)).astype(int)
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(index, scan.shape, strict=True)])
    values: Array = scan.array[tuple(index[:, inside])]
    return values


def _foreground(scan: Scan) -> Array:
    """Values of a sample of the voxels above the background."""
    some = scan.array.ravel()[:: max(1, scan.array.size // _SAMPLES)]
    return some[some > scan.background]


def is_ct(scan: Scan) -> bool:
    """Whether intensities are Hounsfield units: air far below 0, most other voxels near 0."""
    if scan.background > _AIR:
        return False
    body = _foreground(scan)
    body = body[body > -200]
    return bool(len(body) and _TISSUE[0] < np.median(body) < _TISSUE[1])


def windows_of(scan: Scan, face: Face | None = None) -> dict[str, Window]:
    """Windows of a scan by name: several for a CT, the first to show first; otherwise one without a name."""
    if not is_ct(scan):
        return {"": window_of(scan, face)}
    if face is not None:
        return {"brain": window_of(scan, face), "bone": CT_WINDOWS["bone"]}
    return dict(CT_WINDOWS)


def window_of(scan: Scan, face: Face | None = None) -> Window:
    """Window of a scan from the percentiles of its brain or, if no brain is known, of all voxels above the background.

    With a brain, the bright fat of a head has no effect. All images of a scan, before and after, share one window.
    """
    values = _foreground(scan) if face is None else _voxels_at(scan, face.brain)
    if not len(values):
        return Window(scan.background, scan.background + 1.0)
    # the brain is approximate and may contain fat, so its top is extrapolated from the 95th percentile
    top, more = (99.5, 0.0) if face is None else (95, 0.2)
    low, high = (float(v) for v in np.percentile(values.astype(np.float64), (2, top)))
    low, high = low - 0.08 * (high - low), high + more * (high - low)
    return Window(max(low, scan.background), high) if high > low else Window(low - 1.0, low)


class Frame(NamedTuple):
    """A grid with its axes reordered to right, front, up.

    Attributes:
        change: nibabel's orientation transform that reorders the axes of an array.
        affine: affine of the reordered grid (RAS, mm).
        shape: number of voxels to the right, to the front and up.
    """

    change: Array
    affine: Affine
    shape: tuple[int, ...]

    @classmethod
    def of(cls, grid: ImageGrid) -> "Frame":
        """Frame of a grid with axes in any order."""
        change = ornt_transform(io_orientation(grid.affine), axcodes2ornt("RAS"))
        order = np.argsort(change[:, 0])
        affine = grid.affine @ inv_ornt_aff(change, tuple(grid.size))
        return cls(change, affine, tuple(int(grid.size[axis]) for axis in order))

    @property
    def spacing(self) -> Affine:
        """Voxel size in mm, ``(3,)``."""
        return spacing(self.affine)

    def orient(self, volume: Array) -> Array:
        """Reorder an array ``(X, Y, Z)`` of the grid to right, front, up."""
        turned: Array = apply_orientation(volume, self.change)
        return turned


def shown_box(volume: Array, threshold: float) -> Array:
    """First and last index along each axis of voxels above ``threshold``, ``(3, 2)``; isolated voxels are ignored."""
    shown = volume > threshold
    box = np.empty((3, 2), int)
    for axis in range(3):
        counts = shown.sum(axis=tuple(a for a in range(3) if a != axis))
        there = np.flatnonzero(counts > 0.01 * counts.max()) if counts.any() else np.arange(volume.shape[axis])
        box[axis] = there[0], there[-1]
    return box


class Plane(NamedTuple):
    """Parallel slices through the frame.

    Attributes:
        axis: axis across the slices: 0 sagittal, 1 coronal, 2 axial.
        positions: index of each slice along this axis of the frame.
        start: number of the slice to show first.
        rows: nearest voxel of each row of pixels along the upward axis, from the top, ``(R,)``.
        columns: nearest voxel of each column of pixels along the other axis, ``(C,)``.
    """

    axis: int
    positions: list[int]
    start: int
    rows: Array
    columns: Array

    @property
    def across(self) -> int:
        """Axis that runs across the picture: to the right, or to the front in a sagittal slice."""
        return 1 if self.axis == 0 else 0

    @property
    def up(self) -> int:
        """Axis that runs up the picture."""
        return 1 if self.axis == 2 else 2

    @property
    def name(self) -> str:
        """Name of the plane: sagittal, coronal or axial."""
        return ("sagittal", "coronal", "axial")[self.axis]

    def take(self, volume: Array, position: int) -> Array:
        """Take a slice ``(up, across)`` from an array in the frame; its first row is the lowest."""
        part: Array = np.moveaxis(volume, self.axis, 0)[position]  # a view: np.take would copy the volume
        return part.T

    def nearest(self, volume: Array) -> Array:
        """Take all slices ``(n, R, C)`` from an array in the frame, by nearest neighbour."""
        return np.stack([self.take(volume, p)[np.ix_(self.rows, self.columns)] for p in self.positions])

    def grid(self) -> Array:
        """Frame indices of all pixels: ``(3, n, R, C)``."""
        parts = [np.array(self.positions)[:, None, None]] * 3
        parts[self.up], parts[self.across] = self.rows[None, :, None], self.columns[None, None, :]
        return np.stack(np.broadcast_arrays(*parts))


def _pixels(low: int, high: int) -> Array:
    """Nearest voxel of each pixel along a side from voxel ``low`` to ``high``."""
    count = high - low + 1
    number = min(count, PIXELS)
    return low + np.minimum(((np.arange(number) + 0.5) * count / number).astype(int), count - 1)


def _positions(low: int, high: int) -> list[int]:
    """Indices of up to twelve evenly spaced slices from ``low`` to ``high``."""
    number = min(SLICES, high - low + 1)
    return np.unique(np.rint(np.linspace(low, high, number)).astype(int)).tolist()


class Views:
    """All pictures of the report of a registration, in the frame of the fixed scan.

    Args:
        result: registration to show.
        network: network that finds brains (default: none; then windows and slices are chosen from the whole content,
            and no face is hidden).
        show_face: do not hide faces.
    """

    def __init__(self, result: Registered, network: AnatomyNet | None = None, *, show_face: bool = False) -> None:
        self.result = result
        self.frame = Frame.of(result.fixed.grid)
        self.faces = tuple(
            None if network is None else find_face(scan, network, is_head=role in result.anatomy)
            for role, scan in (("fixed", result.fixed), ("moving", result.moving))
        )
        self.hides = not show_face and any(face is not None and np.isfinite(face.limit) for face in self.faces)
        fixed, moving = (
            windows_of(scan, face) for scan, face in zip((result.fixed, result.moving), self.faces, strict=True)
        )
        names = max(fixed, moving, key=len)  # if only one scan is a CT, its windows
        self.choices = {
            name: tuple(each.get(name, next(iter(each.values()))) for each in (fixed, moving)) for name in names
        }
        self.windows = next(iter(self.choices.values()))
        self.box = self._box()
        self.planes = list(self._planes())

    def _box(self) -> Array:
        """Part of the frame to draw: the content of the fixed scan with a margin, ``(3, 2)`` indices."""
        volume, window = self.frame.orient(self.result.fixed.array), self.windows[0]
        threshold = max(window.low + 0.15 * (window.high - window.low), self.result.fixed.background)
        box = shown_box(volume, threshold)
        margin = np.ceil(0.04 * (box[:, 1] - box[:, 0] + 1)).astype(int)
        last = np.array(self.frame.shape) - 1
        return np.stack([np.maximum(box[:, 0] - margin, 0), np.minimum(box[:, 1] + margin, last)], axis=1)

    def _anatomy(self) -> Array:
        """Lowest and highest frame index of the brain, or of the drawn part without a brain: ``(3, 2)``."""
        if self.faces[0] is None:
            return self.box.astype(float)
        index = apply_affine(np.linalg.inv(self.frame.affine), self.faces[0].brain.T)
        return np.clip(np.stack([index.min(1), index.max(1)], axis=1), self.box[:, :1], self.box[:, 1:])

    def _planes(self) -> Iterator[Plane]:
        anatomy = self._anatomy()
        flat = [axis for axis in range(3) if self.frame.shape[axis] == 1]
        for axis in flat or (2, 1, 0):
            low, high = anatomy[axis]
            edge = _EDGE * (high - low)
            positions = _positions(int(np.ceil(low + edge)), int(np.floor(high - edge)))
            start = round(START[axis] * (len(positions) - 1))
            up, across = 1 if axis == 2 else 2, 1 if axis == 0 else 0
            yield Plane(axis, positions, start, _pixels(*self.box[up])[::-1], _pixels(*self.box[across]))

    def slices(self, plane: Plane, volume: Array, window: Window, hidden: Array | None) -> NDArray[np.uint8]:
        """Grey slices ``(n, R, C)`` of an array on the fixed grid; ``hidden`` pixels are black."""
        turned, tiles = self.frame.orient(volume), []
        rows, columns = self.box[plane.up], self.box[plane.across]
        for position in plane.positions:
            part = plane.take(turned, position)[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1][::-1]
            tile = window.grey(part)
            if tile.shape != (len(plane.rows), len(plane.columns)):
                size = len(plane.columns), len(plane.rows)
                tile = np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BOX))
            tiles.append(tile)
        found = np.stack(tiles)
        return found if hidden is None else np.where(hidden, np.uint8(0), found)

    def _moving_points(self, plane: Plane) -> Array:
        """Map the pixels of a plane to points of the moving scan by the whole map: ``(3, n, R, C)`` (RAS, mm)."""
        points = apply_affine(self.frame.affine, plane.grid())
        vectors = np.stack([plane.nearest(self.frame.orient(part)) for part in self.result.ddf])
        return points + np.tensordot(self.result.fixed.affine[:3, :3], vectors, 1)

    def starts(self) -> tuple[int, int, int]:
        """Frame indices of the slices to show first: sagittal, coronal, axial."""
        middle = self.box.mean(axis=1).astype(int).tolist()
        for plane in self.planes:
            middle[plane.axis] = plane.positions[plane.start]
        return middle[0], middle[1], middle[2]

    def drawn(self) -> tuple[Array, Array, Array]:
        """The aligned, the fixed and the warped scan on the fixed grid, from 0 to 1, with faces hidden."""
        result, (window, other) = self.result, self.windows
        images = [other.scale(result.aligned.array), window.scale(result.fixed.array), other.scale(result.warped.array)]
        if self.hides:
            whole = np.zeros(result.fixed.shape, bool)
            linear = np.zeros(result.fixed.shape, bool)
            face, moving_face = self.faces
            for part, index in slabs(result.fixed.shape):
                points = apply_affine(result.fixed.affine, index)
                if face is not None:
                    linear[part] = whole[part] = face.hides(points)
                if moving_face is not None:
                    linear[part] |= moving_face.hides(apply_affine(result.forward.linear, points))
                    moved = points + np.tensordot(result.fixed.affine[:3, :3], result.ddf[:, part], 1)
                    whole[part] |= moving_face.hides(moved)
            for image, hidden in zip(images, (linear, whole, whole), strict=True):
                image[hidden] = 0
        return images[0], images[1], images[2]

    def images(self, plane: Plane, windows: str | None = None) -> dict[str, NDArray[np.uint8]]:
        """Slices ``(n, R, C)`` of the fixed, the aligned and the warped scan, with faces hidden.

        ``windows`` is one of :attr:`choices` (default: the first).
        """
        result, (face, other) = self.result, self.faces
        chosen = self.windows if windows is None else self.choices[windows]
        hidden: dict[str, Array | None] = dict.fromkeys(("fixed", "aligned", "warped"))
        if self.hides:
            points = apply_affine(self.frame.affine, plane.grid())
            both = np.zeros(points.shape[1:], bool) if face is None else face.hides(points)
            linear = both if other is None else both | other.hides(apply_affine(result.forward.linear, points))
            whole = both if other is None else both | other.hides(self._moving_points(plane))
            hidden = {"fixed": whole, "aligned": linear, "warped": whole}  # one cut may hide what the other missed
        scans = {"fixed": result.fixed, "aligned": result.aligned, "warped": result.warped}
        return {
            name: self.slices(plane, scan.array, chosen[name != "fixed"], hidden[name]) for name, scan in scans.items()
        }

    def volume_change(self, plane: Plane, determinant: Array) -> NDArray[np.uint8]:
        """Change of volume without the linear part, at half the resolution: ``(n, R / 2, C / 2)``.

        The value 0 marks a fold; 1 to 255 are a quarter to four times the volume on a logarithmic scale.

        Args:
            plane: plane of the slices.
            determinant: Jacobian determinant of the whole map, on the fixed grid.
        """
        linear = abs(np.linalg.det(self.result.forward.linear[:3, :3]))
        values = plane.nearest(self.frame.orient(determinant))
        n, rows, columns = values.shape
        values = np.pad(values, ((0, 0), (0, rows % 2), (0, columns % 2)), mode="edge")
        blocks = values.reshape(n, (rows + 1) // 2, 2, (columns + 1) // 2, 2)
        folds = (blocks <= 0).any(axis=(2, 4))  # keeps every fold
        octaves = np.log2(np.maximum(blocks / linear, 2.0**-OCTAVES)).mean(axis=(2, 4))
        level = np.clip(np.rint(128 + 127 * octaves / OCTAVES), 1, 255)
        return np.where(folds, 0, level).astype(np.uint8)

    def vectors(self) -> tuple[tuple[int, ...], NDArray[np.int16], float]:
        """Sample the displacement without the linear part on a coarse lattice over the drawn part.

        Returns:
            The size of the lattice, whose first and last points are the corners of :attr:`box`; integer vectors
            ``(3, *size)``; and the factor that converts them to voxels of the frame.
        """
        sides = (self.box[:, 1] - self.box[:, 0]) * self.frame.spacing
        size = tuple(int(n) for n in np.where(sides > 0, np.clip(np.ceil(sides / _STEP) + 1, 2, _VECTORS), 1))
        axes = [np.linspace(ends[0], ends[1], n) for ends, n in zip(self.box, size, strict=True)]
        index = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
        points = apply_affine(self.frame.affine, index)
        moving = self.result.forward.apply(points.T).T
        bent = apply_affine(np.linalg.inv(self.result.forward.linear @ self.frame.affine), moving) - index
        unit = max(float(np.abs(bent).max()), 1e-6) / 32000
        return size, np.rint(bent / unit).astype("<i2").reshape(3, *size), unit

    def labels(self, plane: Plane, scan: Scan, numbers: Array) -> NDArray[np.uint8]:
        """Slices ``(n, R, C)`` of a label map on the fixed grid, with ``numbers`` renumbered from 1."""
        values = plane.nearest(self.frame.orient(scan.array))
        place = np.searchsorted(numbers, values).clip(max=len(numbers) - 1)
        return np.where(numbers[place] == values, place + 1, 0).astype(np.uint8)
