"""Segment head scans in files, as ``vxm segment`` does."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from voxelmorph_monai.anatomy import STRUCTURES, load_anatomy, segment
from voxelmorph_monai.anatomy_transforms import SEGMENTATION_FILES, save_anatomy
from voxelmorph_monai.apps.shipped import choose_device, shipped_anatomy
from voxelmorph_monai.io.atomic import atomic, atomic_folder, require_new, require_replaceable
from voxelmorph_monai.io.formats import scan_name
from voxelmorph_monai.io.tables import read_table
from voxelmorph_monai.progress import Progress
from voxelmorph_monai.space.scan import Scan

__all__ = ["BRAIN", "Segmented", "by_name", "read_list", "segment_file", "segment_files"]

_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh", ".nrrd", ".mha", ".mhd")

_RESERVED = ("..", "volumes.csv", "index.html", "thumbnails")  # vxm report writes the last two

BRAIN = "brain.nii.gz"
"""Name of the file with the brain: the scan, with its background outside the brain."""


def segment_file(
    scan: str | Path,
    output: str | Path,
    *,
    weights: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    """Segment a scan and write the result.

    Args:
        scan: file or DICOM folder.
        output: new folder for labels, brain mask, brain, volumes and colours; or a NIfTI file for the labels only.
        weights: weights of the network (default: those of the bundle ``brain_anatomy_segmentation``).
        device: device to compute on (default: a GPU if there is one).
        overwrite: replace ``output``.

    Raises:
        FileNotFoundError: the scan or the weights do not exist.
        FileExistsError: the output exists.
        ValueError: the file is not a scan, or the scan shows no head.
    """
    output = Path(output)
    only_labels = output.name.endswith((".nii", ".nii.gz"))
    if not only_labels:
        require_replaceable(output, overwrite, "a segmentation", (*SEGMENTATION_FILES, BRAIN))
    else:
        require_new(output, overwrite)
    image = Scan.read(scan)
    network = load_anatomy(weights or shipped_anatomy())
    found = segment(image, network.to(choose_device(device)))
    if only_labels:
        found.labels.save(output)
        return
    with atomic_folder(output) as folder:
        save_anatomy(folder, found.labels, found.volumes)
        shown = np.where(found.mask.array > 0, image.array, np.float32(image.background))
        image.like(shown).save(folder / BRAIN)


class Segmented(NamedTuple):
    """Result of :func:`segment_files`.

    Attributes:
        table: path of ``volumes.csv``.
        num_skipped: number of scans that an earlier call had segmented.
        errors: reasons of failed scans, by name of the scan.
    """

    table: Path
    num_skipped: int
    errors: dict[str, str]


def read_list(path: str | Path) -> dict[str, Path]:
    """Read a list of scans, by name, from a CSV file with the column ``scan`` and optionally ``name``.

    Paths in it are relative to its folder.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the file is not such a list; the message names the line.
    """
    columns, rows = read_table(Path(path), "a list of scans")
    if not {"scan"} <= set(columns) <= {"scan", "name"} or not rows:
        raise ValueError(
            f"{path} has {len(rows)} lines and the columns {', '.join(columns)}. Give at least one line, and the "
            "columns scan and, optionally, name."
        )
    scans: dict[str, Path] = {}
    for line, row, cells in rows:
        if len(row) != len(columns) or not cells["scan"]:
            raise ValueError(f"{path}, line {line}: give {len(columns)} cells, one of them with the path of a scan.")
        _add(scans, cells.get("name"), Path(path).parent / cells["scan"], f"{path}, line {line}")
    return scans


def _add(scans: dict[str, Path], name: str | None, scan: Path, where: str) -> None:
    name = name or scan_name(str(scan))
    if name in scans:
        raise ValueError(f"{where}: another scan is also called {name}. Give each its own name, in a list (--list).")
    if Path(name).name != name or name in _RESERVED:
        raise ValueError(f"{where}: {name} cannot be the name of a folder.")
    scans[name] = scan


def segment_files(
    scans: Mapping[str, Path],
    output: str | Path,
    *,
    weights: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> Segmented:
    """Segment many scans, each into its own folder, and collect their volumes in one table, ``volumes.csv``.

    A second call continues: complete folders stay as they are. A scan that fails does not stop the others.

    Args:
        scans: files or DICOM folders, by the names of their output folders.
        output: folder for the table and the folders of the scans.
        weights: as for :func:`segment_file`.
        device: as for :func:`segment_file`.
        overwrite: segment all scans again.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    errors: dict[str, str] = {}
    todo = [
        name for name in scans if overwrite or not all((output / name / file).exists() for file in SEGMENTATION_FILES)
    ]
    with Progress("segment", len(todo), "scan") as progress:
        for name in todo:
            try:
                segment_file(scans[name], output / name, weights=weights, device=device, overwrite=overwrite)
            except (ValueError, OSError) as error:
                errors[name] = " ".join(str(error).split())
            progress.advance(failed=name in errors)
    structures = [structure.name for structure in STRUCTURES]
    table = output / "volumes.csv"
    with atomic(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, ["name", "scan", "reason", *structures], lineterminator="\n")
        rows.writeheader()
        for name, scan in scans.items():
            row: dict[str, object] = {"name": name, "scan": scan, "reason": errors.get(name, "")}
            if name not in errors:
                with (output / name / "volumes.csv").open(encoding="utf-8", newline="") as volumes:
                    row |= {each["structure"]: each["volume_mm3"] for each in csv.DictReader(volumes)}
            rows.writerow(row)
    return Segmented(table, len(scans) - len(todo), errors)


def by_name(scans: list[Path]) -> dict[str, Path]:
    """Name scans after their files; a folder that holds scans in other formats than DICOM stands for these.

    Raises:
        ValueError: two scans have the same name, or a folder holds no scan.
    """
    found: dict[str, Path] = {}
    for scan in scans:
        inside = sorted(p for p in scan.glob("*") if p.name.endswith(_SUFFIXES)) if scan.is_dir() else []
        for each in inside or [scan]:
            _add(found, None, each, str(each))
    return found
