"""Collect segmentations or prepared scans for their index: a picture and measures of each."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from voxelmorph_monai.anatomy import STRUCTURES
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.pages.index import Entry, Index, Kind, Measure, address, number, thumbnail_of, without_paths
from voxelmorph_monai.pages.views import START, Frame, Plane, shown_box, window_of
from voxelmorph_monai.progress import Progress
from voxelmorph_monai.space.resampling import resample
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import WorkingGrid, mni152

__all__ = ["draw_scan", "find_prepared", "find_segmentations", "holds_prepared", "holds_segmentations"]

_HEIGHT = 200  # pixels of a picture
_ORANGE = (255, 90, 0)
_TABLE, _LABELS, _BRAIN = "volumes.csv", "labels.nii.gz", "brain.nii.gz"
_PREPARED = "scans.csv"

_SEGMENTATIONS = Kind(
    "Segmentations",
    "scan",
    "scans",
    "brain with outlines of its structures",
    "There are no segmentations in this folder.",
)
_SCANS = Kind(
    "Prepared scans",
    "scan",
    "scans",
    "scan with the outline of the template's brain",
    "There are no prepared scans in this folder.",
)
_OF_PREPARED = (
    Measure("ncc", "correlation with the template", 3, "low"),
    Measure("volume", "volume relative to the template", 2, "both"),
)
_Row = dict[str, str]


# ---- pictures


def _edges(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels of a label map ``(R, C)`` that touch another label."""
    edges = np.zeros(labels.shape, bool)
    for turned, at in ((labels, edges), (labels.T, edges.T)):
        change = turned[:-1] != turned[1:]
        at[:-1] |= change
        at[1:] |= change
    return edges


def draw_scan(image: Scan, labels: NDArray[Any], colours: Mapping[int, tuple[int, int, int]]) -> NDArray[np.uint8]:
    """Draw a sagittal, a coronal and an axial slice side by side, with outlines of labels: ``(R, C, 3)``.

    Args:
        image: brain to draw.
        labels: label map on the grid of the image, ``(X, Y, Z)``.
        colours: red, green and blue (0 to 255) by label; other labels are white.
    """
    frame, window = Frame.of(image.grid), window_of(image)
    volume, numbers = frame.orient(image.array), frame.orient(labels)
    low, high = shown_box(volume, window.low + 0.15 * (window.high - window.low)).T
    low, high = np.maximum(low - 2, 0), np.minimum(high + 2, np.array(frame.shape) - 1)
    voxels = [np.arange(first, last + 1) for first, last in zip(low, high, strict=True)]
    sides = (high - low + 1) * frame.spacing
    pixels = np.maximum(np.rint(sides * _HEIGHT / sides[1:].max()), 1).astype(int)  # one scale for all planes
    tiles = []
    for axis, (up, across) in enumerate(((2, 1), (2, 0), (1, 0))):
        at = round(float(low[axis] + START[axis] * (high[axis] - low[axis])))
        plane = Plane(axis, [at], 0, voxels[up][::-1], voxels[across])
        size = int(pixels[across]), int(pixels[up])
        grey = Image.fromarray(window.grey(plane.nearest(volume)[0])).resize(size, Image.Resampling.BOX)
        drawn = Image.fromarray(plane.nearest(numbers)[0].astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        tiles.append(_tile(grey, np.asarray(drawn), colours, axis))
    return np.concatenate(tiles, axis=1)


def _tile(grey: Image.Image, labels: NDArray[Any], colours: Mapping[int, Any], axis: int) -> NDArray[np.uint8]:
    """Draw a slice with outlines and letters for its sides (L R or P A), padded to the height of the picture."""
    pixels = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    edges = _edges(labels)
    for label in np.unique(labels[edges]):
        if label:
            pixels[edges & (labels == label)] = colours.get(int(label), (255, 255, 255))
    missing = _HEIGHT - len(pixels)
    pixels = np.pad(pixels, [(missing // 2, missing - missing // 2), (12, 12), (0, 0)])
    tile = Image.fromarray(pixels)
    pen = ImageDraw.Draw(tile)
    for letter, x in zip("PA" if axis == 0 else "LR", (2, tile.width - 9), strict=True):
        pen.text((x, _HEIGHT // 2 - 6), letter, fill=(255, 255, 255))
    return np.asarray(tile)


def _picture(name: str, folder: Path, source: Path, draw: Callable[[], NDArray[np.uint8]]) -> str:
    """Draw the picture of an entry if ``source`` is newer than it; returns its address, empty without a picture."""
    target = thumbnail_of(name, folder)
    if source.exists() and (not target.exists() or target.stat().st_mtime < source.stat().st_mtime):
        target.parent.mkdir(exist_ok=True)
        with atomic(target) as temporary:
            Image.fromarray(draw()).save(temporary, "JPEG", quality=85, subsampling=0)  # outlines stay sharp
    return address(target, folder) if target.exists() else ""


def _drawn(entries: Iterable[Entry], draw: Callable[[Entry], str]) -> None:
    """Draw the picture of each entry; entries that cannot be drawn are marked as failed."""
    entries = [entry for entry in entries if not entry.failed]
    with Progress("draw", len(entries), "picture") as progress:
        for entry in entries:
            try:
                entry.picture = entry.thumbnail = draw(entry)
            except (OSError, ValueError) as error:
                entry.failed = f"it cannot be drawn: {' '.join(str(error).split())}"
            progress.advance(failed=bool(entry.failed))


def _rows(path: Path) -> list[_Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- segmentations


def _segmented(folder: Path) -> list[Path]:
    """Folders of segmentations in a folder, in the order of their names."""
    return [path.parent for path in sorted(folder.glob(f"*/{_TABLE}")) if (path.parent / _LABELS).exists()]


def holds_segmentations(folder: Path) -> bool:
    """Whether a folder holds a table of segmentations, or folders with segmentations."""
    return (folder / _TABLE).is_file() or bool(_segmented(folder))


def _merged(structure: str) -> str:
    """Common name of a structure and its counterpart on the other side."""
    return structure.removeprefix("Left-").removeprefix("Right-").replace("-", " ")


def _of_segmentations() -> list[Measure]:
    names = dict.fromkeys(_merged(structure.name) for structure in STRUCTURES)
    return [
        Measure("brain", "brain, ml", 0, "both"),
        Measure("asymmetry", "largest left-right difference, %", 0, "high"),
        *(Measure(name, f"{name}, ml", 2, "both") for name in names),
    ]


def _volumes(rows: Iterable[_Row]) -> dict[str, float | None]:
    """Measures of a segmentation from its table, with volumes in ml; missing structures have no measure."""
    single = {row["structure"]: value / 1000 for row in rows if (value := number(row["volume_mm3"])) is not None}
    found: dict[str, float | None] = {"brain": sum(single.values()) if single else None}
    pairs = [
        (single[left], single[right])
        for left in single
        if (right := left.replace("Left-", "Right-")) in single and right != left
    ]
    sides = [200 * abs(left - right) / (left + right) for left, right in pairs if left + right > 0]
    found["asymmetry"] = max(sides, default=None)
    for name, value in single.items():
        found[_merged(name)] = (found.get(_merged(name)) or 0.0) + value
    return found


def find_segmentations(folder: Path) -> Index:
    """Find the segmentations listed in ``volumes.csv``, and all folders with a segmentation, with their volumes."""
    colours = {structure.number: structure.colour for structure in STRUCTURES}
    entries = {}
    for path in _segmented(folder):
        entries[path.name] = Entry(path.name, values=_volumes(_rows(path / _TABLE)))
    for row in _rows(folder / _TABLE) if (folder / _TABLE).is_file() else ():
        if row.get("name") and (row.get("reason") or row["name"] not in entries):
            reason = without_paths(row.get("reason") or "its folder is missing", {row.get("scan") or "": "SCAN"})
            entries[row["name"]] = Entry(row["name"], failed=reason)

    def draw(entry: Entry) -> str:
        of = folder / entry.name
        return _picture(
            entry.name,
            folder,
            of / _BRAIN,
            lambda: draw_scan(Scan.read(of / _BRAIN), Scan.read_labels(of / _LABELS).array, colours),
        )

    _drawn(entries.values(), draw)
    return Index(_SEGMENTATIONS, _of_segmentations(), [*entries.values()])


# ---- scans prepared for training


def holds_prepared(folder: Path) -> bool:
    """Whether a folder was written by ``vxm prepare``."""
    return (folder / _PREPARED).is_file()


def find_prepared(folder: Path) -> Index:
    """Find the prepared scans listed in ``scans.csv``, with their agreement with the template."""
    entries = [
        Entry(
            row["name"],
            failed=row["reason"],
            values={measure.key: number(row[measure.key]) for measure in _OF_PREPARED},
        )
        for row in _rows(folder / _PREPARED)
    ]

    @cache
    def template() -> NDArray[Any]:
        of = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
        grid = WorkingGrid(tuple(of["size"]), of["spacing"]).around()
        return resample(mni152(), grid, np.eye(4)).array > 0

    def draw(entry: Entry) -> str:
        image = folder / "images" / f"{entry.name}.nii.gz"
        return _picture(entry.name, folder, image, lambda: draw_scan(Scan.read(image), template(), {1: _ORANGE}))

    _drawn(entries, draw)
    return Index(_SCANS, _OF_PREPARED, entries)
