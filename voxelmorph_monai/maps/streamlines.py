"""Rewrite streamline files with other points: TRK and TCK with nibabel, TRX as a zip archive.

All points in memory are in scanner RAS. Streamlines are processed in parts, so that memory does not depend on their
number. Lengths, order, and the data of points, streamlines and groups are kept.
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import aff2axcodes
from nibabel.streamlines.tractogram import TractogramItem
from nibabel.streamlines.trk import get_affine_trackvis_to_rasmm
from numpy.typing import NDArray

from voxelmorph_monai.affines import ImageGrid, spacing
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.io.formats import reading

__all__ = ["ENDINGS", "move_streamlines"]

ENDINGS = (".trk", ".tck", ".trx")
"""Extensions of streamline files."""

_PART = 1 << 18  # points to move together
_Move = Callable[[NDArray[Any]], NDArray[Any]]


def _checked(points: NDArray[Any], path: Path) -> NDArray[Any]:
    if not np.isfinite(points).all():
        raise ValueError(f"{path} has {int((~np.isfinite(points)).any(1).sum())} points of NaN or infinity.")
    return points


def _parts(items: Iterable[TractogramItem]) -> Iterator[list[TractogramItem]]:
    part: list[TractogramItem] = []
    count = 0
    for item in items:
        part.append(item)
        count += len(item.streamline) + 1
        if count >= _PART:
            yield part
            part, count = [], 0
    if part:
        yield part


class _Stream:
    """Streamlines that are moved in a single pass while nibabel writes them, with the interface of a tractogram.

    nibabel's own lazy tractogram reads the first streamline twice, and loses the affine if points and their data are
    requested together.
    """

    def __init__(self, items: Iterable[TractogramItem], affine: NDArray[Any]) -> None:
        self.items = items
        self.affine = affine

    def to_world(self, lazy: bool = True) -> "_Stream":
        return self

    def apply_affine(self, affine: NDArray[Any], lazy: bool = True) -> "_Stream":
        return _Stream(self.items, affine @ self.affine)

    def __iter__(self) -> Iterator[TractogramItem]:
        for item in self.items:
            moved = apply_affine(self.affine, item.streamline)
            yield TractogramItem(moved, item.data_for_streamline, item.data_for_points)


def _moved(
    items: Iterable[TractogramItem], to_world: NDArray[Any], move: _Move, path: Path
) -> Iterator[TractogramItem]:
    for part in _parts(items):
        points = _checked(np.concatenate([item.streamline for item in part]), path)
        ends = np.cumsum([len(item.streamline) for item in part])[:-1]
        for item, streamline in zip(part, np.split(move(apply_affine(to_world, points)), ends), strict=True):
            yield TractogramItem(streamline, item.data_for_streamline, item.data_for_points)


def _space(grid: ImageGrid) -> dict[str, Any]:
    """Fields in the header of a TRK file that describe the image of the streamlines."""
    return {
        "voxel_to_rasmm": grid.affine.astype(np.float32),
        "dimensions": np.array(grid.size, np.int16),
        "voxel_sizes": spacing(grid.affine).astype(np.float32),
        "voxel_order": "".join(aff2axcodes(grid.affine)),
    }


def _by_nibabel(path: Path, target: Path, move: _Move, grid: ImageGrid | None) -> int:
    with reading(path):
        file = nib.streamlines.load(str(path), lazy_load=True)
    header, count = dict(file.header), 0
    is_trk = path.suffix.lower() == ".trk"
    if is_trk:
        if grid is None:
            raise ValueError(
                f"TRK files store the grid of an image. Give the image that {path} is mapped to (--reference)."
            )
        header |= _space(grid)

    to_world = get_affine_trackvis_to_rasmm(file.header) if is_trk else np.eye(4)

    def items() -> Iterator[TractogramItem]:
        nonlocal count
        with reading(path):
            for item in _moved(file.tractogram.data, to_world, move, path):
                count += 1
                yield item

    type(file)(_Stream(items(), np.eye(4)), header).save(str(target))
    return count


def _trx(path: Path, target: Path, move: _Move, grid: ImageGrid | None) -> int:
    with reading(path), zipfile.ZipFile(path) as given:
        header = json.loads(given.read("header.json"))
        counts = header["NB_VERTICES"], header["NB_STREAMLINES"]
        members = given.infolist()
    if grid is not None:
        header |= {"VOXEL_TO_RASMM": grid.affine.tolist(), "DIMENSIONS": [int(n) for n in grid.size]}
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(target, "w") as written:
        for member in members:
            kind = member.filename.rpartition(".")[2]
            if member.filename == "header.json":
                written.writestr("header.json", json.dumps(header))
            elif member.filename.startswith("positions.3."):
                if member.file_size != counts[0] * 3 * np.dtype(kind).itemsize:
                    raise ValueError(
                        f"{path} is cut short: it has fewer than the {counts[0]} points stated in its header."
                    )
                name = zipfile.ZipInfo("positions.3.float32", member.date_time)
                name.compress_type = member.compress_type
                with given.open(member) as source, written.open(name, "w", force_zip64=True) as output:
                    while block := source.read(3 * np.dtype(kind).itemsize * _PART):
                        points = np.frombuffer(block, kind).reshape(-1, 3).astype(np.float64)
                        output.write(move(_checked(points, path)).astype("<f4").tobytes())
            else:
                with given.open(member) as source, written.open(member.filename, "w", force_zip64=True) as output:
                    shutil.copyfileobj(source, output)
    return int(counts[1])


def move_streamlines(path: str | Path, output: str | Path, move: _Move, grid: ImageGrid | None = None) -> int:
    """Write a file of streamlines with moved points in the same format, completely or not at all.

    Points are written as float32, even for a TRX file with float16, whose error is 0.05 mm at 170 mm.

    Args:
        path: ``.trk``, ``.tck`` or ``.trx``.
        output: file to write, with the same extension.
        move: function that maps points ``(N, 3)`` in scanner RAS, mm.
        grid: grid of the image that the streamlines are moved to, which TRK and TRX files store.

    Returns:
        Number of streamlines.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a complete file of streamlines with finite points.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path} is not a file of streamlines: its name does not end in {', '.join(ENDINGS)}.")
    write = _trx if path.suffix.lower() == ".trx" else _by_nibabel
    with atomic(output) as temporary:
        return write(path, temporary, move, grid)
