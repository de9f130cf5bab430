r"""Register two scans as they are: wherever they lie, whatever their grids.

The map from points of the fixed scan to points of the moving one is :math:`A_m \circ (id + u) \circ A_f^{-1}` in mm.
The affine transforms :math:`A_f` and :math:`A_m` lead from the space that the network works in to the two scans, and
:math:`u` is what the network predicts there. It is kept in these three parts; only when an image is warped are they
evaluated, at the voxels of the fixed scan, and the moving scan is interpolated once.
"""

import hashlib
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai import __version__
from voxelmorph_monai.affine import register_affine
from voxelmorph_monai.blocks import invert
from voxelmorph_monai.networks import Registration, VoxelMorph, load_weights
from voxelmorph_monai.preparation import (
    Grid,
    check_brain,
    grid_affine,
    mni152,
    resample,
    resample_intensities,
    rescale,
)
from voxelmorph_monai.refinement import refine
from voxelmorph_monai.results import Images, correlation, overlap, regularity, save_results
from voxelmorph_monai.spaces import (
    Affine,
    Composite,
    atomic_folder,
    linear_transform,
    read_image,
    read_labels,
    require_right_angles,
    require_same_grid,
    save_image_like,
    save_transform,
    transform_affine,
    warp_scan,
)

__all__ = ["RegistrationResult", "load_network", "register", "register_files"]

Image = tuple[NDArray[np.float32], Affine]
Labels = tuple[NDArray[Any], Affine]

_SPACES = ("mni152", "fixed")
_TRANSFORMS = ("affine", "rigid", "none")
_FADE = 16  # voxels around the network's grid within which its displacement fades to 0
_NUM_POINTS = 100_000  # at which the inverse is checked
_WRITTEN = {
    "affine.txt",
    "displacement.nii.gz",
    "forward.h5",
    "inverse.h5",
    "jacobian.nii.gz",
    "report.png",
    "summary.json",
    "warped.nii.gz",
    "warped_labels.nii.gz",
}


class RegistrationResult(NamedTuple):
    """What :func:`register` finds.

    Attributes:
        warped: the moving scan on the fixed grid, ``(X, Y, Z)``.
        ddf: the whole map on the fixed grid, ``(3, X, Y, Z)`` in its voxels, affine part included.
        forward: the map from points of the fixed scan to points of the moving one, which warps moving images.
        inverse: the map back, which warps fixed images.
        seconds: duration of each stage.
    """

    warped: NDArray[np.float32]
    ddf: NDArray[np.float32]
    forward: Composite
    inverse: Composite
    seconds: dict[str, float]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


def load_network(weights: str | Path, preset: str = "diffeomorphic") -> Registration:
    """Load trained weights, as the bundle's training writes them (``model.pt``), ready for :func:`register`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no weights, or those of another preset.
    """
    network = VoxelMorph(preset)
    load_weights(network, str(weights))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Registration(network, bidirectional=network.num_steps > 0).to(device).eval()


def _check_options(network: Registration | None, space: str, transform: str) -> None:
    if space not in _SPACES:
        raise ValueError(f"space must be one of {', '.join(_SPACES)}, got '{space}'.")
    if transform not in _TRANSFORMS:
        raise ValueError(f"transform must be one of {', '.join(_TRANSFORMS)}, got '{transform}'.")
    if network is not None and network.training:
        raise ValueError("network must be in evaluation mode: call network.eval() first.")
    if network is not None and (network.network.spatial_dims, network.network.in_channels) != (3, 2):
        raise ValueError(
            f"network must take two 3-D images of one channel, got spatial_dims {network.network.spatial_dims} and "
            f"in_channels {network.network.in_channels}."
        )


def _check_scan(image: Image, space: str, subject: str) -> None:
    array = image[0]
    if array.ndim != 3 or min(array.shape) < 2 or not np.isfinite(array).all() or not (array > 0).any():
        raise ValueError(
            f"{subject} must be one 3-D volume of finite numbers, some of them above 0, got shape {array.shape}, "
            f"{int(np.isfinite(array).sum())} finite numbers and {int((array > 0).sum())} above 0."
        )
    if space == "mni152":
        check_brain(image, subject)
    require_right_angles(image[1], subject)


def _align(moving: Image, fixed: Image, transform: str) -> Affine:
    """Linear map from points of ``fixed`` to points of ``moving`` (RAS, mm)."""
    if transform == "none":
        return np.eye(4)
    try:
        return transform_affine(register_affine(moving, fixed, transform))
    except RuntimeError as error:  # ITK: the images do not overlap, or one has no structure to go by
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"moving and fixed must show something alike, but ITK cannot align them: {reason}") from error


def _fade(ddf: Tensor) -> NDArray[np.float32]:
    """Continue ``ddf`` ``(1, 3, X, Y, Z)`` beyond its grid, fading to 0: ``(3, ...)``, larger by twice the margin.

    ITK takes the displacement for 0 beyond the grid. Without a margin the map would tear at the border.
    """
    array = np.pad(ddf[0].float().cpu().numpy(), [(0, 0), *[(_FADE, _FADE)] * 3], mode="edge")
    for axis in range(1, 4):
        index = np.arange(array.shape[axis])
        share = np.minimum(np.minimum(index, index[::-1]) / _FADE, 1).astype(np.float32)
        array *= share.reshape(-1, *[1] * (3 - axis))
    return array


def _predict(
    network: Registration | None,
    budget: float | None,
    moving: Image,
    fixed: Image,
    maps: tuple[Affine, Affine],
    grid: Grid,
    affine: Affine,
) -> tuple[tuple[NDArray[np.float32], Affine], tuple[NDArray[np.float32], Affine]]:
    """Displacement and its inverse as fields of :class:`Composite`; ``maps`` lead from the grid to the two scans."""
    pair = [resample_intensities(image, grid.size, affine, m) for image, m in zip((moving, fixed), maps, strict=True)]
    device = torch.device("cpu") if network is None else next(network.parameters()).device
    images = torch.from_numpy(np.stack(pair)[None]).to(device)
    found: dict[str, Tensor] = {}
    if network is not None:
        with torch.inference_mode():
            found = network(images)
    if budget is not None:
        refined = refine(images[:, :1], images[:, 1:], ddf=found.get("ddf"), budget=budget)
        found = {"ddf": refined.ddf, "inverse_ddf": refined.inverse_ddf}
    inverse = found["inverse_ddf"] if "inverse_ddf" in found else invert(found["ddf"])[0]
    wider = affine.copy()
    wider[:3, 3] -= affine[:3, :3] @ np.full(3, _FADE)
    return (_fade(found["ddf"]), wider), (_fade(inverse), wider)


def register(
    moving: Image,
    fixed: Image,
    *,
    network: Registration | None = None,
    budget: float | None = None,
    space: str = "mni152",
    transform: str = "affine",
    grid: Grid = Grid(),  # noqa: B008, a constant
    names: tuple[str, str] = ("moving", "fixed"),
) -> RegistrationResult:
    """Register two scans ``(array, affine)``, as :func:`~voxelmorph_monai.spaces.read_image` gives them.

    In three lines, for two files of skull-stripped brains::

        moving, fixed = read_image("moving.nii.gz"), read_image("fixed.nii.gz")
        result = register(moving, fixed, network=load_network("model.pt"))
        points_in_moving = result.forward.points(points_in_fixed)  # (N, 3), RAS mm

    Args:
        moving: intensities ``(X, Y, Z)``, 0 around what is to be registered, and the affine (RAS, mm).
        fixed: the same.
        network: in evaluation mode, as :func:`load_network` gives it; without one the map is affine, unless refined.
        budget: seconds to refine the map on the two scans (:func:`~voxelmorph_monai.refinement.refine`), from what the
            network says or from the affine map; None: not at all.
        space: where the network works. ``"mni152"``: both scans are skull-stripped brains and aligned to MNI152, as
            ``vxm prepare`` does, so that the network sees what it was trained on. ``"fixed"``: the moving scan is
            aligned to the fixed one and the grid lies around it, for anything else.
        transform: of the alignment: ``"affine"``, ``"rigid"``, or ``"none"`` for scans that are aligned already (to
            MNI152 or to each other).
        grid: of the network.
        names: what to call the scans in an error.

    Raises:
        ValueError: a scan or an option cannot be used; the message says which and why.
    """
    _check_options(network, space, transform)
    for image, name in zip((moving, fixed), names, strict=True):
        _check_scan(image, space, name)
    bends = network is not None or budget is not None
    affine = grid_affine(grid, fixed if space == "fixed" else None) if bends else np.eye(4)
    seconds: dict[str, float] = {}
    scaled = (rescale(moving[0]), moving[1]), (rescale(fixed[0]), fixed[1])
    with _timed(seconds, "affine"):
        if space == "mni152":
            to_moving, to_fixed = (_align(image, mni152(), transform) for image in scaled)
        else:
            to_moving, to_fixed = _align(*scaled, transform), np.eye(4)
    fields: tuple[Any, Any] = (None, None)
    with _timed(seconds, "network"):
        if bends:
            fields = _predict(network, budget, *scaled, (to_moving, to_fixed), grid, affine)
    forward = Composite(np.linalg.inv(to_fixed), to_moving, fields[0])
    inverse = Composite(np.linalg.inv(to_moving), to_fixed, fields[1])
    with _timed(seconds, "compose"):
        ddf = forward.on_grid(fixed[0].shape, fixed[1])
    with _timed(seconds, "warp"):
        warped = warp_scan(moving, ddf, fixed[1])
    if not (warped > 0).any():
        raise ValueError(f"{names[0]} and {names[1]} must overlap once they are aligned, but they do not.")
    return RegistrationResult(warped, ddf, forward, inverse, seconds)


def _inverse_consistency(result: RegistrationResult, fixed: Image) -> float:
    """Mean distance (mm) by which the inverse misses where the forward map came from, over the fixed image."""
    array, affine = fixed
    inside = np.flatnonzero(array > 0)
    some = inside[:: max(1, len(inside) // _NUM_POINTS)]
    points = np.stack(np.unravel_index(some, array.shape), axis=1) @ affine[:3, :3].T + affine[:3, 3]
    again = result.inverse.points(result.forward.points(points))
    return float(np.linalg.norm(again - points, axis=1).mean())


def _stages(image: Labels, fixed: Labels, result: RegistrationResult, order: int) -> dict[str, NDArray[Any]]:
    """The moving image on the fixed grid where its header puts it, after the affine transform, and after all."""
    array, affine = fixed
    return {
        "before": resample(image, array.shape, affine, np.eye(4), order),
        "affine": resample(image, array.shape, affine, result.forward.linear, order),
        "after": warp_scan(image, result.ddf, affine, order),
    }


def _summary(
    result: RegistrationResult, images: tuple[Image, Image], labels: tuple[Labels | None, Labels | None]
) -> tuple[dict[str, Any], Images]:
    """The numbers that say how good a registration is, and the images to draw."""
    moving, fixed = images
    stages = {**_stages(moving, fixed, result, order=1), "after": result.warped}
    similarity = {f"similarity_{stage}": correlation(image, fixed[0]) for stage, image in stages.items()}
    table = None
    if labels[0] is not None and labels[1] is not None:
        table = overlap(_stages(labels[0], labels[1], result, order=0), labels[1][0])
    summary = {
        "dice": table,
        **similarity,
        **regularity(result.ddf),
        "inverse_consistency_mm": _inverse_consistency(result, fixed),
        "seconds": result.seconds,
    }
    top = np.percentile(moving[0][moving[0] > 0], 99.5)
    drawn = [np.clip(stages[stage] / top, 0, 1) for stage in ("affine", "after")]
    return summary, Images(drawn[0], rescale(fixed[0]), drawn[1])


def _save(
    folder: Path,
    paths: Mapping[str, Path],
    result: RegistrationResult,
    fixed: Image,
    moving_labels: Labels | None,
    images: Images,
    summary: Mapping[str, Any],
) -> None:
    save_image_like(folder / "warped.nii.gz", result.warped, paths["fixed"])
    if moving_labels is not None:
        warped = warp_scan(moving_labels, result.ddf, fixed[1], order=0)
        save_image_like(folder / "warped_labels.nii.gz", warped, paths["fixed"])
    forward = result.forward
    save_transform(folder / "affine.txt", linear_transform(forward.linear))
    forward.save(folder / "forward.h5")
    result.inverse.save(folder / "inverse.h5")
    # What lies between the fixed and the affinely aligned image, which are drawn.
    bend = forward._replace(outer=np.linalg.inv(forward.inner)).on_grid(fixed[0].shape, fixed[1])
    save_results(folder, images, result.ddf, fixed[1], summary, bend=bend)


def _check_output(output: Path, inputs: Mapping[str, Path], overwrite: bool) -> None:
    held = [path for path in inputs.values() if output in path.absolute().parents]
    if held:
        raise ValueError(f"{output} must not hold an input, got {held[0]}.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} must be new, or be overwritten (--overwrite), but it exists.")
    if output.exists() and (not output.is_dir() or {path.name for path in output.iterdir()} - _WRITTEN):
        raise ValueError(f"{output} must be made by 'vxm register' to be overwritten, but something else is there.")


def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("itk", "monai", "nibabel", "numpy", "scipy", "torch")}
    return {"voxelmorph_monai": __version__, "python": platform.python_version(), **others}


def register_files(
    moving: str | Path,
    fixed: str | Path,
    output: str | Path,
    *,
    moving_labels: str | Path | None = None,
    fixed_labels: str | Path | None = None,
    weights: str | Path | None = None,
    preset: str = "diffeomorphic",
    budget: float | None = None,
    space: str = "mni152",
    transform: str = "affine",
    grid: Grid = Grid(),  # noqa: B008, a constant
    overwrite: bool = False,
) -> dict[str, Any]:
    """Register two files, NIfTI or MGZ, into the folder ``output``, which appears complete or not at all.

    It gets ``warped.nii.gz`` (with the header of the fixed scan), ``warped_labels.nii.gz`` if there are moving labels,
    ``forward.h5`` and ``inverse.h5`` (ITK transforms; ``forward.h5`` warps the moving image, and takes points of the
    fixed scan to the moving one), ``displacement.nii.gz`` (the same as one field on the fixed grid), ``affine.txt``
    (ITK, its linear part), ``jacobian.nii.gz`` (change of volume, affine part included), ``report.png`` and
    ``summary.json``: similarity and Dice where the headers put the scans (``before``), after the affine transform and
    after all, over the fixed grid. Where a NIfTI header holds two positions, its sform counts.

    Args:
        moving: scan, as :func:`register` takes it.
        fixed: scan.
        output: folder to write; it must not exist yet.
        moving_labels: label map on the grid of the moving scan.
        fixed_labels: label map on the grid of the fixed scan; with both of them the summary has Dice.
        weights: of the network; without them the map is affine, unless refined.
        preset: of the network.
        budget: as in :func:`register`.
        space: as in :func:`register`.
        transform: as in :func:`register`.
        grid: as in :func:`register`.
        overwrite: let ``output`` take the place of an earlier registration.

    Returns:
        What is in ``summary.json``.

    Raises:
        ValueError: an input or an option cannot be used; the message says which and why.
        FileNotFoundError: an input does not exist.
        FileExistsError: ``output`` exists.
    """
    given = {
        "moving": moving,
        "fixed": fixed,
        "moving_labels": moving_labels,
        "fixed_labels": fixed_labels,
        "weights": weights,
    }
    paths, output = {role: Path(path) for role, path in given.items() if path is not None}, Path(output).absolute()
    _check_output(output, paths, overwrite)
    images = read_image(moving), read_image(fixed)
    labels = [read_labels(paths[role]) if role in paths else None for role in ("moving_labels", "fixed_labels")]
    for image, label, role in zip(images, labels, ("moving", "fixed"), strict=True):
        if label is not None:
            require_same_grid(image, label, (str(paths[role]), str(paths[f"{role}_labels"])))
    network = None if weights is None else load_network(weights, preset)
    names = str(moving), str(fixed)
    result = register(*images, network=network, budget=budget, space=space, transform=transform, grid=grid, names=names)
    measures, drawn = _summary(result, images, (labels[0], labels[1]))
    summary = {
        **measures,
        "versions": _versions(),
        "inputs": {
            role: {"path": str(path.absolute()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for role, path in paths.items()
        },
        "options": {
            "space": space,
            "transform": transform,
            "preset": preset if weights is not None else None,
            "budget": budget,
            "grid": {"size": list(grid.size), "spacing": grid.spacing},
        },
    }
    with atomic_folder(output) as folder:
        _save(folder, paths, result, images[1], labels[0], drawn, summary)
    return summary
