r"""Build the template of a group of scans: their mean shape and mean intensity.

Each round registers all scans to the current template, as ``vxm register --list`` does, and computes the next template:
its shape is corrected by the mean of the linear maps and the mean of the velocities, the scans are resampled once, from
their own grids to the corrected shape, and their intensities are averaged without outliers and sharpened slightly
(Avants et al., NeuroImage 2010). In round 0 the scans are only aligned, to the first of them or to MNI152.

Scans are taken in the order of a hash of their voxels: neither the order of the list nor a name changes the result.
Everything that a round needs is in its folder, complete or not at all, so a call that was killed can be continued.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from voxelmorph_monai.affines import Affine, ImageGrid, apply_affine
from voxelmorph_monai.apps.cohort import register_cohort
from voxelmorph_monai.apps.options import Options, check_choice
from voxelmorph_monai.apps.register import padded_field
from voxelmorph_monai.blocks import integrate, invert
from voxelmorph_monai.groupwise import logarithm
from voxelmorph_monai.io.atomic import atomic, write_json
from voxelmorph_monai.io.tables import read_table
from voxelmorph_monai.maps.chains import chain, chain_of_map, matrix_of, on_grid
from voxelmorph_monai.maps.displacements import read_displacement
from voxelmorph_monai.maps.files import read_transform
from voxelmorph_monai.maps.spatial_map import SpatialMap, warp_scan
from voxelmorph_monai.progress import Progress
from voxelmorph_monai.report import correlation
from voxelmorph_monai.space.middle import grid_around, linear_mean
from voxelmorph_monai.space.resampling import rescale
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import mni152

__all__ = ["build_template"]

_OUTSIDE = -1.0  # marks where a scan shows nothing; intensities are 0 or more
_OUTLIER = 3.0  # robust standard deviations from the median, beyond which an intensity is an outlier
_SHARPEN = 0.5  # fraction of the difference between a voxel and its surroundings that is added
_SLAB = 8  # planes that are averaged together


class _Member(NamedTuple):
    """A scan of the group; ``name`` is a hash of its voxels."""

    name: str
    image: Path
    labels: Path | None


def _read_members(path: Path) -> list[_Member]:
    """Read the scans of a list, ordered by a hash of their voxels."""
    columns, rows = read_table(path, "a list of scans")
    if not {"image"} <= set(columns) <= {"image", "labels", "name"}:
        raise ValueError(f"{path} has the columns {', '.join(columns) or 'none'}; it needs image, and may have labels.")
    members = []
    for line, row, cells in rows:
        if len(row) != len(columns) or not cells.get("image"):
            raise ValueError(f"{path}, line {line}, does not have the {len(columns)} cells of its header.")
        image = (path.parent / cells["image"]).absolute()
        labels = (path.parent / cells["labels"]).absolute() if cells.get("labels") else None
        scan = Scan.read(image)
        if scan.is_slice:
            raise ValueError(f"{image} is a slice; a template is made of volumes.")
        digest = hashlib.sha256(scan.array.tobytes() + scan.affine.tobytes()).hexdigest()[:16]
        members.append(_Member(digest, image, labels))
    members.sort()
    twice = [a for a, b in pairwise(members) if a.name == b.name]
    if twice:
        raise ValueError(f"{path} lists {twice[0].image} twice, or a copy of it. Remove one, as it would count twice.")
    if len(members) < 2:
        raise ValueError(f"{path} lists {len(members)} scans; a group needs two or more.")
    if len({member.labels is None for member in members}) > 1:
        raise ValueError(f"{path} has labels for only some of the scans. Give them for all, or for none.")
    return members


def _velocity(folder: Path, aligned_only: bool) -> tuple[Affine, Tensor | None]:
    """Linear part of a registration, and velocity of its deformation on the template's grid (None if only aligned)."""
    linear = matrix_of(read_transform(folder / "affine.txt"))
    if aligned_only:
        return linear, None
    ddf, affine = read_displacement(folder / "displacement.nii.gz")
    index = np.indices(ddf.shape[1:], dtype=np.float64)
    bend = apply_affine(np.linalg.inv(affine) @ np.linalg.inv(linear) @ affine, index + ddf) - index
    return linear, logarithm(torch.from_numpy(bend.astype(np.float32))[None])


def _mean_bend(maps: Iterable[tuple[NDArray[np.float32], Affine]], grid: ImageGrid) -> NDArray[np.float32]:
    """Mean over the scans of where their maps lead without the linear parts: a displacement ``(3, *size)`` in voxels.

    Args:
        maps: for each scan the displacement ``(3, *size)`` of its map in voxels of the grid, and the linear part in mm.
        grid: grid of the displacements.
    """
    index = np.indices(tuple(grid.size), np.float32)
    mean, number = np.zeros(index.shape, np.float32), 0
    for ddf, linear in maps:
        back = np.linalg.inv(grid.affine) @ np.linalg.inv(linear) @ grid.affine
        mean += (apply_affine(back, index + ddf) - index).astype(np.float32)
        number += 1
    return (mean / number).astype(np.float32)


def _robust_mean(stack: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over the first axis, without outliers and voxels outside a scan; 0 where no scan shows anything."""
    seen = np.where(stack > _OUTSIDE / 2, stack, np.nan)
    nothing = np.isnan(seen).all(0)
    seen[:, nothing] = 0.0
    middle = np.nanmedian(seen, axis=0)
    off = np.abs(seen - middle)
    limit = _OUTLIER * 1.4826 * np.nanmedian(off, axis=0) + 0.02  # keeps a third scan where two are equal
    mean: NDArray[np.float32] = np.nanmean(np.where(off <= limit, seen, np.nan), axis=0)
    return mean.astype(np.float32)


def _sharpened(mean: NDArray[np.float32]) -> NDArray[np.float32]:
    sharp = mean + _SHARPEN * (mean - ndimage.gaussian_filter(mean, 1.0))
    return np.asarray(np.clip(sharp, 0, mean.max()), dtype=np.float32)


def _label_numbers(members: Sequence[_Member]) -> list[int]:
    return sorted(
        set().union(*(np.unique(Scan.read_labels(each.labels).array).tolist() for each in members if each.labels))
    )


def _save_labels(shares: NDArray[np.float32], labels: Sequence[int], like: Scan, folder: Path) -> None:
    """Write the most probable label of each voxel, and the probability of each label but 0."""
    winner = np.stack([np.argmax(shares[:, x], axis=0) for x in range(like.shape[0])])
    like.like(np.array(labels)[winner].astype(np.uint16)).save(folder / "template_labels.nii.gz")
    (folder / "probabilities").mkdir(exist_ok=True)
    for label, share in zip(labels, shares, strict=True):
        if label:
            like.like(np.array(share)).save(folder / "probabilities" / f"label_{label}.nii.gz")


@contextmanager
def _on_disk(path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Array of zeros in a file, which may exceed the memory; the file is removed afterwards."""
    try:
        yield np.lib.format.open_memmap(path, "w+", np.float32, shape)
    finally:
        path.unlink(missing_ok=True)


def _next(members: Sequence[_Member], template: Scan, folder: Path, aligned_only: bool, spacing: float | None) -> None:
    """Compute the next template from the registrations of a round; writes ``round.json`` last."""
    found = [_velocity(folder / "registered" / member.name, aligned_only) for member in members]
    mean_linear = linear_mean([linear for linear, _ in found])
    velocities = [velocity for _, velocity in found if velocity is not None]
    middle = torch.stack(velocities).mean(0) if velocities else None
    correction = SpatialMap(np.linalg.inv(mean_linear), np.eye(4))
    if middle is not None:
        correction = correction._replace(field=padded_field(integrate(-middle), template.affine))
    scans = [rescale(Scan.read(member.image)) for member in members]  # all at once: the grid encloses what they show
    maps = [linear @ np.linalg.inv(mean_linear) for linear, _ in found]
    grid = grid_around(scans, maps, spacing)
    like = Scan(np.zeros(tuple(grid.size), np.float32), grid.affine, "template")
    forwards = [read_transform(folder / "registered" / member.name / "forward.h5") for member in members]
    centring = SpatialMap(np.eye(4), np.eye(4))
    if middle is not None:  # the mean of the velocities is not quite that of the maps
        fields = (on_grid(chain([chain_of_map(correction), forward]), grid) for forward in forwards)
        mean_bend = _mean_bend(zip(fields, maps, strict=True), grid)
        inverse, _ = invert(torch.from_numpy(mean_bend)[None])
        centring = centring._replace(field=padded_field(inverse, grid.affine))
    labels = _label_numbers(members)
    bends = np.zeros((3, *like.shape), np.float32)
    with (
        _on_disk(folder / "warped.npy", (len(members), *like.shape)) as stack,
        _on_disk(folder / "shares.npy", (max(1, len(labels)), *like.shape)) as shares,
    ):
        with Progress("average", len(members), "scan") as told:
            for i, (member, scan, forward) in enumerate(zip(members, scans, forwards, strict=True)):
                ddf = on_grid(chain([chain_of_map(centring), chain_of_map(correction), forward]), grid)
                bends += _mean_bend([(ddf, maps[i])], grid) / len(members)
                stack[i] = warp_scan(scan, ddf, like, outside=_OUTSIDE).array
                given = Scan.read_labels(member.labels) if member.labels else None
                for share, label in zip(shares, labels, strict=False):
                    one = given.like((given.array == label).astype(np.float32)) if given else scan
                    share += warp_scan(one, ddf, like, outside=float(label == 0)).array / len(members)
                told.advance()
        slabs = [slice(x, x + _SLAB) for x in range(0, like.shape[0], _SLAB)]
        mean = np.concatenate([_robust_mean(np.array(stack[:, slab])) for slab in slabs])
        likeness = [correlation(np.maximum(each, 0), mean) for each in stack]
        like.like(mean).save(folder / "mean.nii.gz")
        if labels:
            _save_labels(shares, labels, like, folder)
    like.like(_sharpened(mean)).save(folder / "template.nii.gz")
    bend = None if middle is None else padded_field(integrate(middle), template.affine)
    # Displacement of the whole map, because its linear part and its field can cancel each other.
    mean_map = SpatialMap(np.eye(4), mean_linear, bend).on_grid(template.grid)
    off = np.linalg.norm(mean_map, axis=0)[template.array > template.array.mean()] * float(template.spacing.mean())
    left = np.linalg.norm(bends, axis=0)[mean > mean.mean()] * float(like.spacing.mean())
    write_json(
        folder / "round.json",
        {
            "mean_displacement_mm": float(off.mean()),
            "left_mm": float(left.mean()),
            "correlation": float(np.mean(likeness)),
        },
    )


def _same_group(output: Path, told: dict[str, Any]) -> None:
    """Raise ValueError unless ``output`` is new, empty, or from the same scans and options, which it records."""
    from_before = output / "template.json"
    if from_before.exists():
        if json.loads(from_before.read_text()) != told:
            raise ValueError(f"{output} holds a template of other scans or options. Choose another folder.")
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} was not made by 'vxm template', and is not empty. Choose another folder.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(from_before, told)


def build_template(
    scans: str | Path,
    output: str | Path,
    *,
    rounds: int = 4,
    steps: int = 20,
    similarity: str = "lncc",
    start: str = "scans",
    spacing: float | None = None,
    jobs: int | None = None,
    scheduler: str | None = None,
) -> Path:
    """Build the template of the scans of a list in the folder ``output``, or continue where an earlier call stopped.

    The folder contains ``template.nii.gz`` in intensities from 0 to about 1 (the 99.5th percentile of each scan is 1),
    ``mean.nii.gz`` (the same before sharpening), ``template_labels.nii.gz`` if the scans have labels, and a folder for
    each round. This holds the registrations of the round, its template, the ``probabilities/`` of labels, and
    ``round.json``: the mean correction of the shape in mm, the mean displacement that is left after it, and the mean
    correlation of the scans with their mean.

    Args:
        scans: CSV file with a column ``image``, and optionally ``labels``; paths are relative to its folder.
        output: folder to write or to continue.
        rounds: number of rounds of deformable registration, after a first round that only aligns.
        steps: number of refinement steps at each resolution, so that every run gives the same result.
        similarity: one of :data:`~voxelmorph_monai.apps.options.SIMILARITIES`.
        start: what the scans are aligned to first: ``"scans"`` (one of the scans) or ``"mni152"`` (that template, for
            skull-stripped brains).
        spacing: voxel size of the template in mm (default: that of the finest scan).
        jobs: as in :func:`~voxelmorph_monai.apps.cohort.register_cohort`.
        scheduler: as in :func:`~voxelmorph_monai.apps.cohort.register_cohort`.

    Returns:
        Path of the template.

    Raises:
        ValueError: a scan, the list or an option cannot be used, or a registration failed; the message says which.
    """
    check_choice("start", start, ("scans", "mni152"))
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}. Give 1 or more.")
    members, output = _read_members(Path(scans)), Path(output).absolute()
    told = {"scans": [member.name for member in members], "rounds": rounds, "steps": steps, "similarity": similarity}
    _same_group(output, told | {"start": start, "spacing": spacing})
    first = output / "start.nii.gz"
    if not first.exists():
        (mni152() if start == "mni152" else rescale(Scan.read(members[0].image))).save(first)
    template = first
    for number in range(rounds + 1):
        folder = output / f"round_{number}"
        if not (folder / "round.json").exists():
            folder.mkdir(exist_ok=True)
            lines = [f"{member.name},{member.image},{template}" for member in members]
            with atomic(folder / "pairs.csv") as temporary:
                temporary.write_text("\n".join(["name,moving,fixed", *lines]) + "\n", encoding="utf-8")
            options = Options(weights="none", refine=number > 0, steps=steps, similarity=similarity, space="fixed")
            done = register_cohort(
                folder / "pairs.csv",
                folder / "registered",
                jobs=jobs,
                scheduler=scheduler,
                options=options,
                title=f"round {number} of {rounds}" if number else "align",
            )
            if done.errors:
                name, reason = next(iter(sorted(done.errors.items())))
                image = next(member.image for member in members if member.name == name)
                raise ValueError(f"{image} and {len(done.errors) - 1} others cannot be registered: {reason}")
            _next(members, Scan.read(template), folder, number == 0, spacing)
        template = folder / "template.nii.gz"
    for name in ("template.nii.gz", "mean.nii.gz", "template_labels.nii.gz"):
        if (template.parent / name).exists():
            with atomic(output / name) as temporary:
                shutil.copyfile(template.parent / name, temporary)
    return output / "template.nii.gz"
