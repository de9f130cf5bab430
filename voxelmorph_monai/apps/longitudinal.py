r"""Measure volume changes between visits of one person, without choosing one visit as the reference.

The visits are aligned rigidly in a space halfway between them, resampled once, and matched in intensity. Two visits are
then registered to each other, more than two to their mean, so that the velocities from their average shape to all
visits add up to 0. If :math:`J_i` is the Jacobian determinant of the map from the average shape to visit :math:`i`, the
volume at a point has changed by :math:`J_i / J_1 - 1` since the first visit. The rigid alignment changes no volume.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.anatomy import load_anatomy, segment
from voxelmorph_monai.apps.options import SIMILARITIES, check_choice
from voxelmorph_monai.apps.register import padded_field
from voxelmorph_monai.apps.shipped import choose_device, shipped_anatomy
from voxelmorph_monai.blocks import integrate, jacobian_determinant
from voxelmorph_monai.groupwise import centred_velocities
from voxelmorph_monai.io.atomic import atomic_folder, require_replaceable, write_json
from voxelmorph_monai.maps.grids import write_ends
from voxelmorph_monai.maps.spatial_map import SpatialMap, warp_scan
from voxelmorph_monai.progress import Progress
from voxelmorph_monai.space.middle import grid_around, linear_mean, rigid_both_ways
from voxelmorph_monai.space.resampling import resample, rescale
from voxelmorph_monai.space.scan import Scan

__all__ = ["FILES", "Change", "longitudinal", "longitudinal_files"]

FILES = ("visit_*.nii.gz", "change_*.nii.gz", "to_visit_*.h5", "structures.csv", "summary.json")
"""Patterns for the names of the output files."""

_BIAS = 25.0  # SD of a Gaussian in mm; smoother differences come from the coils, not from tissue
_WHOLE = "all that is shown"


class Change(NamedTuple):
    """Result of :func:`longitudinal`.

    Attributes:
        visits: the visits in the space halfway between them, with intensities from 0 to about 1.
        maps: maps from points of the average shape to points of each visit.
        change: local change of volume since the first visit in percent, one map for each later visit.
        volumes: by structure, the volume at each visit in ml.
    """

    visits: list[Scan]
    maps: list[SpatialMap]
    change: list[Scan]
    volumes: dict[str, list[float]]


def _rigid(scans: Sequence[Scan], progress: bool) -> list[Affine]:
    """Rigid maps from points of the middle space to points of each scan; the order of the scans does not matter."""
    first = scans[0]
    to_others = [np.eye(4)]
    with Progress("align", len(scans) - 1, "visit", shown=progress) as told:
        for other in scans[1:]:
            to_others.append(rigid_both_ways(other, first))
            told.advance()
    middle = np.linalg.inv(linear_mean(to_others))
    found = [each @ middle for each in to_others]
    for each in found:
        each[3] = [0, 0, 0, 1]  # removes rounding errors
    return found


def _harmonised(images: list[NDArray[np.float32]], side: float) -> list[NDArray[np.float32]]:
    """Give images ``(X, Y, Z)`` of voxel size ``side`` (mm) the brightness and shading of their mean."""
    shown = np.logical_and.reduce([image > 0.05 for image in images])
    logs = [np.log(np.maximum(image, 0.05)) for image in images]
    mean = np.mean(logs, axis=0)
    weight = ndimage.gaussian_filter(shown.astype(np.float32), _BIAS / side) + 1e-6
    shading = [ndimage.gaussian_filter(np.where(shown, each - mean, 0), _BIAS / side) / weight for each in logs]
    return [(image / np.exp(each)).astype(np.float32) for image, each in zip(images, shading, strict=True)]


def _shares(labels: Sequence[Scan], maps: Sequence[SpatialMap], like: Scan, label: int) -> NDArray[np.float32]:
    """Fraction of each voxel of the middle space that has a label, averaged over the visits: ``(X, Y, Z)``."""
    shares = np.zeros(like.shape, np.float32)
    for scan, map_ in zip(labels, maps, strict=True):
        one = scan.like((scan.array == label).astype(np.float32))
        shares += warp_scan(one, map_.on_grid(like.grid), like).array / len(labels)
    return shares


def longitudinal(
    visits: Sequence[Scan],
    *,
    labels: Sequence[Scan] | None = None,
    excluded: Sequence[Scan] | None = None,
    steps: int = 20,
    similarity: str = "lncc",
    spacing: float | None = None,
    names: Mapping[int, str] | None = None,
    progress: bool = False,
) -> Change:
    """Measure the change of volume between visits of one person.

    Args:
        visits: two or more volumes, brains or heads, in chronological order.
        labels: label map of each visit, on its grid, for the change of each structure.
        excluded: mask of each visit, on its grid; regions above 0, for example lesions, are not compared.
        steps: number of refinement steps at each resolution.
        similarity: one of :data:`~voxelmorph_monai.apps.options.SIMILARITIES`.
        spacing: voxel size of the middle space in mm (default: that of the finest visit).
        names: names of the labels.
        progress: show what is being done, on standard error.

    Raises:
        ValueError: the visits cannot be compared; the message says why.
    """
    if len(visits) < 2:
        raise ValueError(f"a change needs at least two visits, but the number of visits is {len(visits)}.")
    check_choice("similarity", similarity, SIMILARITIES)
    for what, given in (("label maps", labels), ("masks", excluded)):
        if given is not None and len(given) != len(visits):
            raise ValueError(f"there are {len(given)} {what} for {len(visits)} visits: give one for each.")
        for visit, scan in zip(visits, given or [], strict=False):
            visit.check_same_grid(scan)
    for visit in visits:
        if visit.is_slice:
            raise ValueError(f"{visit.name} is a slice, but changes can be measured only in volumes.")
    scaled = [rescale(visit) for visit in visits]
    rigid = _rigid(scaled, progress)
    grid = grid_around(scaled, rigid, spacing)
    side = float(grid.affine[0, 0])
    placed = [resample(scan, grid, mapping).array for scan, mapping in zip(scaled, rigid, strict=True)]
    arrays = _harmonised(placed, side)
    mask: Tensor | None = None
    if excluded is not None:
        hidden = np.zeros(tuple(grid.size), bool)
        for scan, mapping in zip(excluded, rigid, strict=True):
            hidden |= resample(scan.like((scan.array > 0).astype(np.float32)), grid, mapping).array > 0
        mask = torch.from_numpy(~hidden)[None, None]
    images = [torch.from_numpy(array)[None, None] for array in arrays]
    velocities = centred_velocities(images, steps=steps, similarity=similarity, mask=mask, progress=progress)
    fields = [integrate(velocity) for velocity in velocities]
    maps = [
        SpatialMap(np.eye(4), mapping, padded_field(field, grid.affine), name=f"middle -> {visit.name}")
        for mapping, field, visit in zip(rigid, fields, visits, strict=True)
    ]
    middle = [Scan(array, grid.affine, visit.name) for array, visit in zip(arrays, visits, strict=True)]
    jacobians = [jacobian_determinant(field)[0, 0].numpy().clip(1e-3) for field in fields]
    change = [middle[0].like(100 * (each / jacobians[0] - 1)) for each in jacobians[1:]]
    seen = [visit.like((visit.array > visit.background).astype(np.uint8)) for visit in visits]
    regions = {_WHOLE: _shares(seen, maps, middle[0], 1)}
    numbers = sorted(set().union(*(np.unique(scan.array).tolist() for scan in labels or [])) - {0})
    with Progress("measure", len(numbers), "structure", shown=progress) as told:
        for label in numbers:
            regions[(names or {}).get(label, str(label))] = _shares(labels or [], maps, middle[0], label)
            told.advance()
    volumes = {
        name: [float((share * each).sum()) * side**3 / 1000 for each in jacobians] for name, share in regions.items()
    }
    return Change(middle, maps, change, volumes)


def _rows(change: Change) -> list[dict[str, Any]]:
    """Rows of ``structures.csv``: ml at each visit, change in percent, and change relative to the whole scan."""
    rows, whole = [], change.volumes[_WHOLE]
    for name, volumes in change.volumes.items():
        row: dict[str, Any] = {"structure": name}
        row |= {f"ml_{i}": f"{volume:.4f}" for i, volume in enumerate(volumes, 1)}
        for i, volume in enumerate(volumes[1:], 2):
            ratio = volume / volumes[0] if volumes[0] else np.nan
            row[f"change_percent_{i}"] = f"{100 * (ratio - 1):.3f}"
            row[f"relative_change_percent_{i}"] = f"{100 * (ratio * whole[0] / whole[i - 1] - 1):.3f}"
        rows.append(row)
    return rows


def longitudinal_files(
    visits: Sequence[str | Path],
    output: str | Path,
    *,
    labels: Sequence[str | Path] | None = None,
    anatomy: bool = False,
    excluded: Sequence[str | Path] | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure the change between visits in files, and write the results into a folder, completely or not at all.

    The folder contains ``visit_N.nii.gz`` (each visit in the space halfway between them), ``change_N.nii.gz`` (local
    change of volume in percent since the first visit, in the average shape), ``to_visit_N.h5`` (the map from the
    average shape to the visit), ``structures.csv`` and ``summary.json``.

    Args:
        visits: files or DICOM folders, in chronological order.
        output: folder to write.
        labels: label map of each visit.
        anatomy: label each visit with the network of ``vxm segment`` instead.
        excluded: mask of the regions to ignore, for each visit.
        overwrite: replace ``output``.
        device: device for the network of ``anatomy``.
        progress: show what is being done, on standard error.
        options: options of :func:`longitudinal`.

    Returns:
        The rows of ``structures.csv``.
    """
    output = Path(output).absolute()
    require_replaceable(output, overwrite, "'vxm longitudinal'", FILES)
    scans = [Scan.read(path) for path in visits]
    maps = None if labels is None else [Scan.read_labels(path) for path in labels]
    if anatomy:
        network, maps = load_anatomy(shipped_anatomy()).to(choose_device(device)), []
        with Progress("segment", len(scans), "visit", shown=progress) as told:
            for scan in scans:
                maps.append(segment(scan, network).labels)
                told.advance()
    masks = None if excluded is None else [Scan.read_labels(path) for path in excluded]
    found = longitudinal(scans, labels=maps, excluded=masks, progress=progress, **options)
    rows = _rows(found)
    with atomic_folder(output) as folder:
        for i, (visit, map_, scan) in enumerate(zip(found.visits, found.maps, scans, strict=True), 1):
            visit.save(folder / f"visit_{i}.nii.gz")
            map_.save(folder / f"to_visit_{i}.h5")
            write_ends(folder / f"to_visit_{i}.h5", visit.grid, scan.grid)
        for i, change in enumerate(found.change, 2):
            change.save(folder / f"change_{i}.nii.gz")
        with (folder / "structures.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        summary = {
            "visits": [str(path) for path in visits],
            "meaning": "change is local and includes scaling; the motion between the visits is rigid",
            "rigid": [map_.post.tolist() for map_ in found.maps],
            "volumes_ml": found.volumes,
            "options": {key: value for key, value in options.items() if key != "names"},
        }
        write_json(folder / "summary.json", summary)
    return rows
