"""Output of every registration: the displacement, a picture, and measures of its quality."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.blocks import jacobian_determinant
from voxelmorph_monai.io.atomic import write_json
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.maps.displacements import save_displacement
from voxelmorph_monai.metrics import dice
from voxelmorph_monai.pictures import save_registration_picture
from voxelmorph_monai.switch import compiled_module

__all__ = ["NAMES", "Images", "correlation", "overlap", "regularity", "save_results", "volume_change"]

NAMES = {
    "displacement": "displacement.nii.gz",
    "jacobian": "jacobian.nii.gz",
    "report": "report.png",
    "page": "report.html",
    "summary": "summary.json",
}
Array = NDArray[np.floating[Any]]


class Images(NamedTuple):
    """Images of a registration for the picture, all ``(X, Y, Z)`` on the fixed grid with intensities in [0, 1].

    Attributes:
        moving: the moving image before the deformation.
        fixed: the fixed image.
        warped: the moving image after the deformation.
    """

    moving: Array
    fixed: Array
    warped: Array


def correlation(first: NDArray[Any], second: NDArray[Any], where: NDArray[np.bool_] | None = None) -> float:
    """Pearson's correlation of the intensities of two images: -1 to 1, and 0 if one image is constant.

    Args:
        first: first image ``(X, Y, Z)``.
        second: second image, of the same shape.
        where: mask of the voxels to compare, ``(X, Y, Z)`` (default: all).
    """
    if where is not None and not where.all():
        first, second = first[where], second[where]
    if not first.size:
        return 0.0
    a, b = (image.astype(np.float64) - image.mean(dtype=np.float64) for image in (first, second))
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def overlap(stages: Mapping[str, NDArray[Any]], fixed: NDArray[Any]) -> dict[str, dict[str, float]]:
    """Dice of each label with the fixed label map, and the mean, at each stage of a registration.

    Args:
        stages: moving label map on the fixed grid at each stage, by name; the last stage is the result.
        fixed: fixed label map, of the same shape.

    Returns:
        For each stage, the Dice (0 to 1) of each label in the result or in the fixed map, and ``mean``.

    >>> overlap({"before": np.array([[7, 0, 0]]), "after": np.array([[7, 7, 0]])}, np.array([[7, 7, 0]]))
    {'before': {'7': 0.6666666666666666, 'mean': 0.6666666666666666}, 'after': {'7': 1.0, 'mean': 1.0}}
    """
    *_, result = stages.values()
    structures = np.union1d(result, fixed)
    structures = structures[structures > 0]
    reference = _number(fixed, structures)
    table = {}
    for stage, labels in stages.items():
        # A label of the result may be missing in the fixed map and at an earlier stage: its NaN counts as 0.
        values = dice(_number(labels, structures), reference, max(len(structures), 1))[0].nan_to_num(0.0).tolist()
        row = {str(label): value for label, value in zip(structures.tolist(), values, strict=False)}
        table[stage] = row | {"mean": float(np.mean(values))}
    return table


def _number(labels: NDArray[Any], structures: NDArray[Any]) -> torch.Tensor:
    """Number the labels in ``structures`` 1, 2, ... and all others 0, for fast counting: ``(1, 1, *spatial)``."""
    place = np.searchsorted(structures, labels)
    known = structures[np.minimum(place, len(structures) - 1)] == labels if len(structures) else np.zeros_like(labels)
    return torch.from_numpy(np.where(known, place + 1, 0).astype(np.int32))[None, None]


def _field(ddf: Array) -> torch.Tensor:
    """Displacement ``(3, X, Y, Z)`` as a tensor ``(1, 3, X, Y, Z)``; of a single slice, the 2-D field in its plane."""
    along = [axis for axis in range(3) if ddf.shape[axis + 1] > 1]
    return torch.from_numpy(ddf[along].reshape(len(along), *(ddf.shape[axis + 1] for axis in along)))[None]


def volume_change(ddf: Array, affine: NDArray[np.floating[Any]]) -> Array:
    """Jacobian determinant ``(X, Y, Z)`` of a displacement; for a single slice, the change of its area.

    The area is measured in mm2 in the plane of the slice, and in the plane to which the map takes it.

    Args:
        ddf: displacement ``(3, X, Y, Z)`` in voxels.
        affine: affine of the grid (RAS, mm).
    """
    if 1 not in ddf.shape[1:]:
        loops = compiled_module("scan_loops")
        if loops is not None:
            return loops.volume_change(ddf)
        determinant: Array = jacobian_determinant(torch.from_numpy(ddf)[None])[0, 0].numpy()
        return determinant
    columns, along = affine[:3, :3], [axis for axis in range(3) if ddf.shape[axis + 1] > 1]
    sides = [columns[:, axis] for axis in along]  # sides of a pixel in mm, before and (bent) after the map
    bent = [
        np.moveaxis(np.tensordot(columns, np.gradient(ddf, axis=axis + 1), axes=1), 0, -1) + side
        for axis, side in zip(along, sides, strict=True)
    ]
    before, after = np.cross(sides[0], sides[1]), np.cross(bent[0], bent[1])
    area = np.linalg.norm(after, axis=-1) / np.linalg.norm(before)
    return (area * np.sign(after @ before)).astype(np.float32)


def regularity(ddf: Array, determinant: Array | None = None) -> dict[str, float | None]:
    """Measures of regularity for the summary: ``folding_percent``, and ``sdlogj`` or None if all voxels fold.

    Args:
        ddf: displacement ``(3, X, Y, Z)`` in voxels.
        determinant: :func:`volume_change` of ``ddf``, if it is already known.
    """
    if 1 in ddf.shape[1:]:  # for a single slice, only displacements within its plane
        determinant = jacobian_determinant(_field(ddf)).numpy()
    elif determinant is None:
        determinant = volume_change(ddf, np.eye(4))
    kept = determinant[determinant > 0]
    deviation = float(np.log(kept).std(dtype=np.float64)) if kept.size else None
    return {"folding_percent": 100 * (1 - kept.size / determinant.size), "sdlogj": deviation}


def save_results(
    folder: Path,
    images: Images | None,
    ddf: Array,
    affine: Affine,
    summary: Mapping[str, Any],
    *,
    bend: Array | None = None,
    determinant: Array | None = None,
    names: Mapping[str, str] = NAMES,
    spatial_dims: int = 3,
    slices: Sequence[int] | None = None,
) -> None:
    """Write ``displacement.nii.gz``, ``jacobian.nii.gz``, ``report.png`` and, last, ``summary.json``.

    Args:
        folder: existing folder to write to.
        images: images for the picture; None for no picture.
        ddf: displacement ``(3, X, Y, Z)`` from fixed to moving points, in voxels of the fixed grid.
        affine: affine of the fixed grid (RAS, mm).
        summary: content of ``summary.json``, with ``correlation_before``, ``correlation_after`` and
            ``folding_percent``. Numbers that are not finite become null.
        bend: displacement from ``images.fixed`` to ``images.moving``, for the deformed grid in the picture (default:
            ``ddf``).
        determinant: :func:`volume_change` of ``ddf``, if it is already known.
        names: names of the files, by their keys in :data:`NAMES`.
        spatial_dims: 2 writes files of a 2-D image.
        slices: slices of the picture, see :func:`~voxelmorph_monai.pictures.save_registration_picture`.
    """
    if determinant is None:
        determinant = volume_change(ddf, affine)
    with ThreadPoolExecutor(1) as pool:  # the other files are written while the picture is drawn
        saving = [
            pool.submit(save_displacement, folder / names["displacement"], ddf, affine, spatial_dims=spatial_dims),
            pool.submit(save_image, folder / names["jacobian"], determinant, affine, spatial_dims),
        ]
        if images is not None:
            save_registration_picture(
                folder / names["report"],
                *images,
                ddf if bend is None else bend,
                determinant,
                affine,
                title=f"correlation {summary['correlation_before']:.3f} -> {summary['correlation_after']:.3f}, "
                f"folding {summary['folding_percent']:.4f} %",
                slices=slices,
            )
        for each in saving:
            each.result()
    write_json(folder / names["summary"], summary)
