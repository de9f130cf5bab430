"""What a page shows of a registration: slices with anatomy, windows, a hidden face, the map at low resolution."""

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

SLICES = 12  # of each plane, at most; their number is even, so that none lies in the fissure between the hemispheres
PIXELS = 256  # of a slice, along each side, at most: pages of 0.5 mm scans are no larger than those of 1 mm
OCTAVES = 2.0  # of the change of volume that a page can show: a quarter to four times
_STEP = 5.0  # mm between the vectors of a page, where that takes at most as many as the next line says
_VECTORS = 44  # along each axis
_EDGE = 0.08  # of the extent of the anatomy, at either end, where slices show little of it
START = (0.35, 0.45, 0.55)  # which slice is shown first: through a hemisphere, not between them
_BUFFER = 8.0  # mm between the brain and the part of the head that is hidden
_BRAIN = 2.2  # litres: what shows more is a head, air around it included; the largest brains have 1.9
_MEAN_BRAIN = 1.83  # litres, of MNI152
_TO_FACE = np.array([0.0, 1.0, -1.0]) / np.sqrt(2)  # in MNI152: to the front and down
_BRAIN_ONLY = 1.5  # times what is found to be brain: the head of a newborn shows more, too
_CLEAR = 0.8  # R2 of a pose that needs no second look: 0.85 was seen for upright heads, 0.6 for a chest
_SAMPLES = 200_000  # voxels that percentiles are taken of
_AIR = -500.0  # Hounsfield units: the background of a CT is below
_TISSUE = (-100.0, 300.0)  # Hounsfield units, between which the median of a body lies, lungs left out


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
    """Intensities that are drawn black and white."""

    low: float
    high: float

    def grey(self, image: Array) -> NDArray[np.uint8]:
        """An image as levels of grey, 0 to 255."""
        return (255 * self.scale(image)).astype(np.uint8)

    def scale(self, image: Array) -> NDArray[np.float32]:
        """An image as fractions from black to white, 0 to 1."""
        return np.clip((image.astype(np.float32) - self.low) / (self.high - self.low), 0, 1)


CT_WINDOWS = {"soft tissue": Window(-160, 240), "lung": Window(-1350, 150), "bone": Window(-500, 1300)}
"""What a CT is looked at with, in Hounsfield units."""


class Face(NamedTuple):
    """The brain of a head, and the half-space in front of and below it that holds the face.

    Attributes:
        brain: points in it, ``(N, 3)``, RAS mm.
        normal: from the brain to the face, half forward and half down in the head's own axes: ``(3,)``, RAS.
        limit: mm along ``normal`` beyond which a head is hidden; infinite if the skull is already stripped.
    """

    brain: Array
    normal: Array
    limit: float

    def hides(self, points: Array) -> NDArray[np.bool_]:
        """Which of ``points`` ``(3, ...)`` (RAS, mm) belong to the face."""
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
    """Find the face in a scan of a head in any pose; None if there is no head.

    Everything more than 8 mm beyond the plane that touches the brain from the front and from below, at 45 degrees, is
    hidden: eyes, nose, mouth, chin. The plane is that of MNI152, mapped to the scan by the pose of the head, so the
    same is hidden in any pose. It is the cut of quickshear (Schimke and Hale, Quickshear defacing for neuroimages,
    HealthSec 2011) at a fixed angle. The brain and what is behind it are shown.

    Args:
        scan: any scan.
        network: network that finds brains.
        is_head: it is known to show a head. Otherwise a fine look must confirm what the coarse one takes for a brain,
            unless that is clear: in a chest, the coarse look may take the heart between the lungs for one.
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
    """Of a brain that is stripped already."""
    shown = np.flatnonzero(scan.array > scan.background)
    some = np.stack(np.unravel_index(shown[:: max(1, len(shown) // _SAMPLES)], scan.shape))
    return Face(apply_affine(scan.affine, some.astype(float)).T, np.zeros(3), np.inf)


def _voxels_at(scan: Scan, points: Array) -> Array:
    """Values of a scan at ``points`` ``(N, 3)``, of the nearest voxels; what lies outside is left out."""
    index = np.rint(apply_affine(np.linalg.inv(scan.affine), points.T)).astype(int)
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(index, scan.shape, strict=True)])
    values: Array = scan.array[tuple(index[:, inside])]
    return values


def _foreground(scan: Scan) -> Array:
    """Some of the voxels above the background."""
    some = scan.array.ravel()[:: max(1, scan.array.size // _SAMPLES)]
    return some[some > scan.background]


def is_ct(scan: Scan) -> bool:
    """Whether intensities are Hounsfield units: air far below 0, and most of the rest near it."""
    if scan.background > _AIR:
        return False
    body = _foreground(scan)
    body = body[body > -200]
    return bool(len(body) and _TISSUE[0] < np.median(body) < _TISSUE[1])


def windows_of(scan: Scan, face: Face | None = None) -> dict[str, Window]:
    """Windows of a scan by name, the first one to show first: those of radiology for a CT, else only one."""
    if not is_ct(scan):
        return {"": window_of(scan, face)}
    if face is not None:
        return {"brain": window_of(scan, face), "bone": CT_WINDOWS["bone"]}
    return dict(CT_WINDOWS)


def window_of(scan: Scan, face: Face | None = None) -> Window:
    """Window of a scan from the percentiles of its brain, or of everything that it shows if no brain is known.

    The bright fat of a head does not count. All images of one scan, before and after, share its window.
    """
    values = _foreground(scan) if face is None else _voxels_at(scan, face.brain)
    if not len(values):
        return Window(scan.background, scan.background + 1.0)
    # of a rough mask some voxels are fat; beyond the 95th percentile tissue goes on by about as much again
    top, more = (99.5, 0.0) if face is None else (95, 0.2)
    low, high = (float(v) for v in np.percentile(values.astype(np.float64), (2, top)))
    low, high = low - 0.08 * (high - low), high + more * (high - low)
    return Window(max(low, scan.background), high) if high > low else Window(low - 1.0, low)


class Frame(NamedTuple):
    """A grid with its axes reordered to right, front, up.

    Attributes:
        change: nibabel's orientation transform for the axes of an array.
        affine: affine of the grid in the new order (RAS, mm).
        shape: voxels to the right, to the front, up.
    """

    change: Array
    affine: Affine
    shape: tuple[int, ...]

    @classmethod
    def of(cls, grid: ImageGrid) -> "Frame":
        """Frame of a grid in any order."""
        change = ornt_transform(io_orientation(grid.affine), axcodes2ornt("RAS"))
        order = np.argsort(change[:, 0])
        affine = grid.affine @ inv_ornt_aff(change, tuple(grid.size))
        return cls(change, affine, tuple(int(grid.size[axis]) for axis in order))

    @property
    def spacing(self) -> Affine:
        """Sides of a voxel in mm, ``(3,)``."""
        return spacing(self.affine)

    def orient(self, volume: Array) -> Array:
        """An array ``(X, Y, Z)`` of the grid in the new order."""
        turned: Array = apply_orientation(volume, self.change)
        return turned


def shown_box(volume: Array, threshold: float) -> Array:
    """First and last voxel along each axis of what lies above ``threshold``: ``(3, 2)``. A few voxels do not count."""
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
        axis: axis across the slices; 0 sagittal, 1 coronal, 2 axial.
        positions: their indices along it, in the frame.
        start: number of the slice to show first.
        rows: index along the upward axis of each row of pixels, from the top, ``(R,)``; nearest voxels.
        columns: index along the other axis of each column, ``(C,)``.
    """

    axis: int
    positions: list[int]
    start: int
    rows: Array
    columns: Array

    @property
    def across(self) -> int:
        """Axis that runs along the columns: to the right, or of a sagittal slice to the front."""
        return 1 if self.axis == 0 else 0

    @property
    def up(self) -> int:
        """Axis that runs up the picture."""
        return 1 if self.axis == 2 else 2

    @property
    def name(self) -> str:
        """Its name in radiology."""
        return ("sagittal", "coronal", "axial")[self.axis]

    def take(self, volume: Array, position: int) -> Array:
        """Slice ``(up, across)`` of an array in the frame, its first row the lowest."""
        part: Array = np.moveaxis(volume, self.axis, 0)[position]  # a view: np.take would copy the volume
        return part.T

    def nearest(self, volume: Array) -> Array:
        """The slices ``(n, R, C)`` of an array in the frame, by nearest neighbour."""
        return np.stack([self.take(volume, p)[np.ix_(self.rows, self.columns)] for p in self.positions])

    def grid(self) -> Array:
        """Frame indices of all pixels: ``(3, n, R, C)``."""
        parts = [np.array(self.positions)[:, None, None]] * 3
        parts[self.up], parts[self.across] = self.rows[None, :, None], self.columns[None, None, :]
        return np.stack(np.broadcast_arrays(*parts))


def _pixels(low: int, high: int) -> Array:
    """Nearest voxels of the pixels of a side that spans the voxels ``low`` to ``high``."""
    count = high - low + 1
    number = min(count, PIXELS)
    return low + np.minimum(((np.arange(number) + 0.5) * count / number).astype(int), count - 1)


def _positions(low: int, high: int) -> list[int]:
    """Up to twelve slices evenly spaced between two ends, the same distance from either."""
    number = min(SLICES, high - low + 1)
    return np.unique(np.rint(np.linspace(low, high, number)).astype(int)).tolist()


class Views:
    """Everything that a page shows of a registration, in the frame of the fixed scan.

    Args:
        result: the registration.
        network: network that finds brains (default: none; windows and slices go by everything that the scans show, and
            no face is hidden).
        show_face: hide nothing.
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
        names = max(fixed, moving, key=len)  # of a CT, if the other is none
        self.choices = {
            name: tuple(each.get(name, next(iter(each.values()))) for each in (fixed, moving)) for name in names
        }
        self.windows = next(iter(self.choices.values()))
        self.box = self._box()
        self.planes = list(self._planes())

    def _box(self) -> Array:
        """What is drawn of the frame: all that the fixed scan shows, and a margin."""
        volume, window = self.frame.orient(self.result.fixed.array), self.windows[0]
        threshold = max(window.low + 0.15 * (window.high - window.low), self.result.fixed.background)
        box = shown_box(volume, threshold)
        margin = np.ceil(0.04 * (box[:, 1] - box[:, 0] + 1)).astype(int)
        last = np.array(self.frame.shape) - 1
        return np.stack([np.maximum(box[:, 0] - margin, 0), np.minimum(box[:, 1] + margin, last)], axis=1)

    def _anatomy(self) -> Array:
        """Lowest and highest frame index of the brain, or of what is drawn: ``(3, 2)``."""
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
        """Grey slices ``(n, R, C)`` of an array on the fixed grid; what is ``hidden`` is black."""
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
        """Where the whole map takes the pixels of a plane: ``(3, n, R, C)``, RAS mm of the moving scan."""
        points = apply_affine(self.frame.affine, plane.grid())
        vectors = np.stack([plane.nearest(self.frame.orient(part)) for part in self.result.ddf])
        return points + np.tensordot(self.result.fixed.affine[:3, :3], vectors, 1)

    def starts(self) -> tuple[int, int, int]:
        """Frame indices of the first slices that are shown: sagittal, coronal, axial."""
        middle = self.box.mean(axis=1).astype(int).tolist()
        for plane in self.planes:
            middle[plane.axis] = plane.positions[plane.start]
        return middle[0], middle[1], middle[2]

    def drawn(self) -> tuple[Array, Array, Array]:
        """The linearly aligned, the fixed and the warped scan on the fixed grid, without faces, from 0 to 1."""
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
        """The slices of the fixed, the linearly aligned and the warped scan, without faces: ``(n, R, C)`` each.

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

        0 is a fold; 1 to 255 stand for a quarter to four times, evenly in the logarithm.

        Args:
            plane: the slices.
            determinant: Jacobian determinant of the whole map, on the fixed grid.
        """
        linear = abs(np.linalg.det(self.result.forward.linear[:3, :3]))
        values = plane.nearest(self.frame.orient(determinant))
        n, rows, columns = values.shape
        values = np.pad(values, ((0, 0), (0, rows % 2), (0, columns % 2)), mode="edge")
        blocks = values.reshape(n, (rows + 1) // 2, 2, (columns + 1) // 2, 2)
        folds = (blocks <= 0).any(axis=(2, 4))  # none gets lost
        octaves = np.log2(np.maximum(blocks / linear, 2.0**-OCTAVES)).mean(axis=(2, 4))
        level = np.clip(np.rint(128 + 127 * octaves / OCTAVES), 1, 255)
        return np.where(folds, 0, level).astype(np.uint8)

    def vectors(self) -> tuple[tuple[int, ...], NDArray[np.int16], float]:
        """The displacement without the linear part, on a coarse lattice over what is drawn.

        Returns:
            Size of the lattice, whose first and last points are the corners of :attr:`box`; vectors ``(3, *size)`` in
            voxels of the frame, in units of the third, a number.
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
        """Slices of a label map on the fixed grid, its ``numbers`` counted from 1: ``(n, R, C)``."""
        values = plane.nearest(self.frame.orient(scan.array))
        place = np.searchsorted(numbers, values).clip(max=len(numbers) - 1)
        return np.where(numbers[place] == values, place + 1, 0).astype(np.uint8)
