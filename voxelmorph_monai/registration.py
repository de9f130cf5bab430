r"""Register two scans as they are: wherever they lie, whatever their grids.

The map from points of the fixed scan to points of the moving one is :math:`A_m \circ (id + u) \circ A_f^{-1}` in mm.
The affine transforms :math:`A_f` and :math:`A_m` lead from the space that the network works in to the two scans, and
:math:`u` is what the network predicts there. It is kept in these three parts; only when an image is warped are they
evaluated, at the voxels of the fixed scan, and the moving scan is interpolated once.
"""

import hashlib
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from voxelmorph_monai import __version__
from voxelmorph_monai.affine import register_affine
from voxelmorph_monai.blocks import invert
from voxelmorph_monai.files import atomic_folder, require_replaceable, scan_files
from voxelmorph_monai.formats import scan_name, spatial_dims_of
from voxelmorph_monai.networks import Registration, VoxelMorph, load_weights
from voxelmorph_monai.preparation import (
    LITERATURE,
    Grid,
    check_brain,
    fitting_grid,
    grid_affine,
    mni152,
    resample,
    resample_intensities,
    rescale,
)
from voxelmorph_monai.refinement import SIMILARITIES, refine, unfold
from voxelmorph_monai.results import NAMES, Images, correlation, overlap, regularity, save_results
from voxelmorph_monai.spaces import (
    Affine,
    Composite,
    Plane,
    background,
    in_plane,
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

__all__ = [
    "SPACES",
    "TRANSFORMS",
    "RegistrationResult",
    "check_options",
    "check_output_folder",
    "choose_device",
    "extended",
    "load_network",
    "network_input",
    "register",
    "register_files",
    "shipped_bundle",
    "shipped_weights",
]

Image = tuple[NDArray[np.float32], Affine]
Labels = tuple[NDArray[Any], Affine]

SPACES = ("mni152", "fixed")
"""Where the network works."""

TRANSFORMS = ("affine", "rigid", "none")
"""What aligns the scans before it does."""

_FADE = 16  # voxels around the network's grid within which its displacement fades to 0
_NUM_POINTS = 100_000  # at which the inverse is checked
_LONGEST_NAME = 220  # bytes: file systems take 255, and a temporary name is longer
_NAMES = {
    **NAMES,
    "warped": "warped.nii.gz",
    "warped_labels": "warped_labels.nii.gz",
    "affine": "affine.txt",
    "forward": "forward.h5",
    "inverse": "inverse.h5",
}
_BIDS = re.compile(r"(sub-[0-9A-Za-z]+(?:_[0-9A-Za-z]+-[0-9A-Za-z]+)*)_([0-9A-Za-z]+)")  # entities and suffix


class RegistrationResult(NamedTuple):
    """What :func:`register` finds.

    Attributes:
        warped: the moving scan on the fixed grid, ``(X, Y, Z)``.
        ddf: the whole map on the fixed grid, ``(3, X, Y, Z)`` in its voxels, affine part included.
        forward: the map from points of the fixed scan to points of the moving one, which warps moving images.
        inverse: the map back, which warps fixed images.
        seconds: duration of each stage.
        grid: where the displacement was found; None if there is none.
    """

    warped: NDArray[np.float32]
    ddf: NDArray[np.float32]
    forward: Composite
    inverse: Composite
    seconds: dict[str, float]
    grid: Grid | None


class _Stages:
    """How long each stage of a registration takes, and on the way, if wanted, which one it is at."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        start = time.perf_counter()
        with tqdm(desc=name, bar_format="{desc} ...", leave=False, disable=None if self.progress else True):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def shipped_bundle(name: str) -> Path:
    """Folder of a bundle that comes along: in a clone bundles lie beside the package, in a wheel inside it."""
    package = Path(__file__).parent
    return (package if (package / "bundles").is_dir() else package.parent) / "bundles" / name


def shipped_weights() -> Path:
    """Weights of the bundle, for skull-stripped brains (preset ``wide``): how good they are is on its page."""
    return shipped_bundle("brain_t1_registration") / "models" / "model.pt"


def choose_device(device: str | None) -> str:
    """``device``, or a GPU if there is one; raises ValueError where it cannot be used."""
    if device is None:  # nothing is put on a GPU that may not be needed
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"device must be cpu, or cuda where there is a GPU, got '{device}'.") from error
    return device


def load_network(
    weights: str | Path | None = None, preset: str = "wide", spatial_dims: int = 3, device: str | None = None
) -> Registration:
    """Load trained weights, as the bundle's training writes them (``model.pt``), ready for :func:`register`.

    Args:
        weights: the file (default: :func:`shipped_weights`).
        preset: of the network.
        spatial_dims: 2 for a network of slices and 2-D images.
        device: to compute on (default: a GPU if there is one).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no weights, or those of another preset.
    """
    network = VoxelMorph(preset, spatial_dims)
    load_weights(network, str(weights or shipped_weights()))
    return Registration(network, bidirectional=network.num_steps > 0).to(choose_device(device)).eval()


@lru_cache(maxsize=1)  # a process that registers many pairs loads their network once
def _load_network_once(
    weights: Path, preset: str, spatial_dims: int, device: str | None, time_of_change: int
) -> Registration:
    return load_network(weights, preset, spatial_dims, device)


def _is_slice(image: Labels) -> bool:
    return 1 in image[0].shape


def check_options(space: str, transform: str, similarity: str, budget: float) -> None:
    """Raise ValueError unless these are options of :func:`register`."""
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got '{space}'.")
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)}, got '{transform}'.")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got '{similarity}'.")
    if not budget >= 0:
        raise ValueError(f"budget must be seconds, 0 or more, got {budget}.")


def _check_dimensions(network: Registration | None, space: str, spatial_dims: int) -> None:
    if network is not None and network.training:
        raise ValueError("network must be in evaluation mode: call network.eval() first.")
    if network is not None and (network.network.spatial_dims, network.network.in_channels) != (spatial_dims, 2):
        raise ValueError(
            f"network must take two {spatial_dims}-D images of one channel, got spatial_dims "
            f"{network.network.spatial_dims} and in_channels {network.network.in_channels}."
        )
    if space == "mni152" and spatial_dims == 2:
        raise ValueError("space must be 'fixed' for slices and 2-D images: MNI152 is a volume.")


def _check_scan(image: Image, space: str, subject: str) -> None:
    array = image[0]
    shown = int((array > background(array)).sum())
    if array.ndim != 3 or sorted(array.shape)[1] < 2 or not np.isfinite(array).all() or not shown:
        raise ValueError(
            f"{subject} must be one 3-D volume of finite numbers, some of them above the background, got shape "
            f"{array.shape}, {int(np.isfinite(array).sum())} finite numbers and {shown} above it."
        )
    if space == "mni152":
        check_brain(image, subject)
    require_right_angles(image[1], subject)


def _check_pair(moving: Image, fixed: Image, names: tuple[str, str]) -> None:
    if _is_slice(moving) != _is_slice(fixed):
        raise ValueError(
            f"{names[0]} and {names[1]} must both be volumes or both slices, got shapes {moving[0].shape} and "
            f"{fixed[0].shape}."
        )
    if _is_slice(fixed):
        source = Plane.of(fixed)
        cosine = float(source.matrix[:3, 2] @ Plane.of(moving, source).matrix[:3, 2])
        if cosine < 0.7:  # across a right angle, the axes of one say nothing of the other's
            angle = np.degrees(np.arccos(cosine))
            raise ValueError(f"slices {names[0]} and {names[1]} must lie within 45 degrees, but are {angle:.0f} apart.")


def _headers(moving: Labels, fixed: Labels) -> Affine:
    """Map from points of ``fixed`` to those of ``moving`` as the headers have it: for slices, from plane to plane."""
    if not _is_slice(fixed):
        return np.eye(4)
    source = Plane.of(fixed)
    return source.map_to(Plane.of(moving, source), np.eye(3))


def _align(moving: Image, fixed: Image, transform: str) -> Affine:
    """Linear map from points of ``fixed`` to points of ``moving`` (RAS, mm)."""
    if transform == "none":
        return _headers(moving, fixed)
    try:
        if not _is_slice(fixed):
            return transform_affine(register_affine(moving, fixed, transform))
        source = Plane.of(fixed)
        target = Plane.of(moving, source)
        found = register_affine(target.flatten(moving), source.flatten(fixed), transform)
        return source.map_to(target, transform_affine(found))
    except RuntimeError as error:  # ITK: the images do not overlap, or one has no structure to go by
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"moving and fixed must show something alike, but ITK cannot align them: {reason}") from error


def _masked(image: Image, mask: NDArray[Any] | None, subject: str, outside: float) -> Image:
    if mask is None:
        return image
    array = np.where(mask > 0, image[0], outside)
    if not (array > outside).any():
        raise ValueError(
            f"the mask of {subject} must hold some of what the scan shows, but where it is above 0 ({(mask > 0).sum()} "
            "voxels) the scan is nowhere."
        )
    return array, image[1]


def _fade(ddf: Tensor) -> NDArray[np.float32]:
    """Continue ``ddf`` ``(1, D, *spatial)`` beyond its grid, fading to 0: ``(3, X, Y, Z)``, larger by twice the margin.

    ITK takes the displacement for 0 beyond the grid. Without a margin the map would tear at the border. In 2-D it
    becomes that of a slice, ``(3, X, Y, 1)``.
    """
    dims = ddf.ndim - 2
    array = np.pad(ddf[0].float().cpu().numpy(), [(0, 0), *[(_FADE, _FADE)] * dims], mode="edge")
    for axis in range(1, dims + 1):
        index = np.arange(array.shape[axis])
        share = np.minimum(np.minimum(index, index[::-1]) / _FADE, 1).astype(np.float32)
        array *= share.reshape(-1, *[1] * (dims - axis))
    return array if dims == 3 else np.pad(array, [(0, 1), (0, 0), (0, 0)])[..., None]


def extended(ddf: Tensor, affine: Affine) -> tuple[NDArray[np.float32], Affine]:
    """Field of a :class:`Composite` for ``ddf`` ``(1, D, *spatial)`` on a grid: continued beyond it, fading to 0."""
    wider, dims = affine.copy(), ddf.ndim - 2
    wider[:3, 3] -= affine[:3, :dims] @ np.full(dims, _FADE)
    return _fade(ddf), wider


def network_input(images: tuple[Image, Image], maps: tuple[Affine, Affine], grid: Grid, affine: Affine) -> Tensor:
    """Sample two scans, scaled to [0, 1], on ``grid``, whose affine is ``affine``: ``(1, 2, *grid.size)``.

    ``maps`` lead from points of the grid to points of the moving and the fixed scan.
    """
    size = (*grid.size, 1)[:3]
    pair = [resample_intensities(image, size, affine, m) for image, m in zip(images, maps, strict=True)]
    return torch.from_numpy(np.stack(pair)[None]).reshape(1, 2, *grid.size)


def _predict(
    network: Registration | None, budget: float, similarity: str, images: Tensor, stages: _Stages
) -> tuple[Tensor, Tensor]:
    """Displacement of ``images`` ``(1, 2, *spatial)``, and its inverse: ``(1, D, *spatial)``, neither with a fold."""
    found: dict[str, Tensor] = {}
    if network is not None:
        with stages.stage("network"), torch.inference_mode():
            found = network(images)
    if budget > 0:
        with stages.stage("refine"):
            refined = refine(
                images[:, :1],
                images[:, 1:],
                ddf=found.get("ddf"),
                similarity=SIMILARITIES[similarity],
                budget=budget,
                progress=stages.progress,
            )
        return refined.ddf, refined.inverse_ddf
    with stages.stage("unfold"):
        ddf = unfold(found["ddf"])
        return ddf, unfold(found["inverse_ddf"] if "inverse_ddf" in found else invert(ddf)[0])


def register(
    moving: Image,
    fixed: Image,
    *,
    network: Registration | None = None,
    budget: float = 0.0,
    similarity: str = "lncc",
    space: str = "mni152",
    transform: str = "affine",
    grid: Grid | None = None,
    device: str | None = None,
    masks: tuple[NDArray[Any] | None, NDArray[Any] | None] = (None, None),
    names: tuple[str, str] = ("moving", "fixed"),
    progress: bool = False,
) -> RegistrationResult:
    """Register two scans ``(array, affine)``, as :func:`~voxelmorph_monai.spaces.read_image` gives them.

    Two slices, ``(X, Y, 1)`` or with another axis of length 1, are registered within their planes: the map takes the
    fixed one's plane to the moving one's.

    In three lines, for two files of skull-stripped brains::

        moving, fixed = read_image("moving.nii.gz"), read_image("fixed.nii.gz")
        result = register(moving, fixed, network=load_network(), budget=30)
        points_in_moving = result.forward.points(points_in_fixed)  # (N, 3), RAS mm

    Args:
        moving: intensities ``(X, Y, Z)`` and the affine (RAS, mm); around what is to be registered they are 0, or, with
            ``space="fixed"``, the lowest of all far below 0, as in CT.
        fixed: the same.
        network: in evaluation mode, as :func:`load_network` gives it; without one the map is affine, unless refined.
            Of slices, a 2-D one.
        budget: seconds to refine the map on the two scans (:func:`~voxelmorph_monai.refinement.refine`), from what the
            network says or from the affine map; 0: not at all; infinite: until nothing improves.
        similarity: what it compares: ``"lncc"`` for scans of one contrast, ``"mi"`` or ``"mind"`` for two.
        space: where the network works. ``"mni152"``: both scans are skull-stripped brains and aligned to MNI152, as
            ``vxm prepare`` does, so that the network sees what it was trained on. ``"fixed"``: the moving scan is
            aligned to the fixed one and the grid lies around it, for anything else.
        transform: of the alignment: ``"affine"``, ``"rigid"``, or ``"none"`` for scans that are aligned already (to
            MNI152 or to each other).
        grid: where the displacement is found; for slices with two sizes. Default: the literature's (``Grid()``) in
            ``"mni152"``, in ``"fixed"`` that of :func:`~voxelmorph_monai.preparation.fitting_grid`.
        device: to refine on without a network, whose own it is otherwise (default: a GPU if there is one).
        masks: of the moving and the fixed scan, in their shapes: the map is sought as if scans showed nothing where
            these are 0, which strips a skull. What is warped is the whole scan.
        names: what to call the scans in an error.
        progress: show what is being done, if standard error is a terminal.

    Raises:
        ValueError: a scan or an option cannot be used; the message says which and why.
    """
    check_options(space, transform, similarity, budget)
    own = next(network.parameters()).device if network is not None else torch.device(choose_device(device))
    _check_dimensions(network, space, 2 if _is_slice(fixed) else 3)
    whole, outside = moving, background(moving[0])
    moving, fixed = (
        _masked(image, mask, name, background(image[0]) if space == "fixed" else 0.0)
        for image, mask, name in zip((moving, fixed), masks, names, strict=True)
    )
    for image, name in zip((moving, fixed), names, strict=True):
        _check_scan(image, space, name)
    _check_pair(moving, fixed, names)
    if network is None and not budget:
        grid = None
    elif grid is None:
        grid = fitting_grid(fixed) if space == "fixed" else LITERATURE
    affine = np.eye(4) if grid is None else grid_affine(grid, fixed if space == "fixed" else None)
    stages = _Stages(progress)
    scaled = (rescale(moving[0]), moving[1]), (rescale(fixed[0]), fixed[1])
    with stages.stage("affine"):
        if space == "mni152":
            to_moving, to_fixed = (_align(image, mni152(), transform) for image in scaled)
        else:
            to_moving, to_fixed = _align(*scaled, transform), np.eye(4)
    fields: tuple[Any, Any] = (None, None)
    if grid is not None:
        seen = network_input(scaled, (to_moving, to_fixed), grid, affine).to(own)
        ddf, inverse_ddf = _predict(network, budget, similarity, seen, stages)
        fields = extended(ddf, affine), extended(inverse_ddf, affine)
    forward = Composite(np.linalg.inv(to_fixed), to_moving, fields[0])
    inverse = Composite(np.linalg.inv(to_moving), to_fixed, fields[1])
    with stages.stage("compose"):
        whole_ddf = forward.on_grid(fixed[0].shape, fixed[1])
    with stages.stage("warp"):
        warped = warp_scan(whole, whole_ddf, fixed[1], outside=outside)
    if not (warped > outside).any():
        raise ValueError(f"{names[0]} and {names[1]} must overlap once they are aligned, but they do not.")
    return RegistrationResult(warped, whole_ddf, forward, inverse, stages.seconds, grid)


def _inverse_consistency(result: RegistrationResult, fixed: Image) -> float:
    """Mean distance (mm) by which the inverse misses where the forward map came from, over the fixed image."""
    array, affine = fixed
    inside = np.flatnonzero(array > background(array))
    some = inside[:: max(1, len(inside) // _NUM_POINTS)]
    points = np.stack(np.unravel_index(some, array.shape), axis=1) @ affine[:3, :3].T + affine[:3, 3]
    again = result.inverse.points(result.forward.points(points))
    return float(np.linalg.norm(again - points, axis=1).mean())


def _stages(image: Labels, fixed: Labels, result: RegistrationResult, order: int) -> dict[str, NDArray[Any]]:
    """The moving image on the fixed grid where its header puts it, after the affine transform, and after all."""
    array, affine = fixed
    outside = background(image[0]) if order else 0  # of labels there is none
    return {
        "before": resample(image, array.shape, affine, _headers(image, fixed), order, outside),
        "affine": resample(image, array.shape, affine, result.forward.linear, order, outside),
        "after": warp_scan(image, result.ddf, affine, order, outside),
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
    low = background(moving[0])
    top = np.percentile(moving[0][moving[0] > low] - low, 99.5)
    drawn = [np.clip((stages[stage] - low) / top, 0, 1) for stage in ("affine", "after")]
    return summary, Images(drawn[0], rescale(fixed[0]), drawn[1])


def _save(
    folder: Path,
    names: Mapping[str, str],
    fixed: tuple[Path, Image],
    result: RegistrationResult,
    moving_labels: Labels | None,
    images: Images,
    summary: Mapping[str, Any],
) -> None:
    path, affine, spatial_dims = fixed[0], fixed[1][1], spatial_dims_of(fixed[0])
    save_image_like(folder / names["warped"], result.warped, path)
    if moving_labels is not None:
        warped = warp_scan(moving_labels, result.ddf, affine, order=0)
        save_image_like(folder / names["warped_labels"], warped, path)
    forward = result.forward
    linear = in_plane(forward.linear) if spatial_dims == 2 else forward.linear
    save_transform(folder / names["affine"], linear_transform(linear))
    forward.save(folder / names["forward"], spatial_dims)
    result.inverse.save(folder / names["inverse"], spatial_dims)
    # What lies between the fixed and the affinely aligned image, which are drawn.
    bend = forward._replace(outer=np.linalg.inv(forward.inner)).on_grid(images.fixed.shape, affine)
    save_results(folder, images, result.ddf, affine, summary, bend=bend, names=names, spatial_dims=spatial_dims)


def _bids_names(moving: Path, fixed: Path) -> dict[str, str]:
    """Names of the files as derivatives of the moving scan (BIDS 1.10, and its proposal 14 for transforms).

    >>> names = _bids_names(Path("sub-01_ses-2_T1w.nii.gz"), Path("tpl-MNI152_T1w.nii.gz"))
    >>> names["warped"], names["forward"]
    ('sub-01_ses-2_space-tplMNI152T1w_T1w.nii.gz', 'sub-01_ses-2_from-sub01ses2T1w_to-tplMNI152T1w_mode-image_xfm.h5')
    """
    spaces = [re.sub("[^0-9A-Za-z]", "", scan_name(path)) for path in (moving, fixed)]
    for path, space in zip((moving, fixed), spaces, strict=True):
        if not space:
            raise ValueError(f"{path} must have letters or digits (A-Z, a-z, 0-9) in its name, which BIDS keeps alone.")
    if spaces[0] == spaces[1]:  # from here to there, and back, would be one name
        raise ValueError(f"moving and fixed must differ in name, as files get both names, got {moving} and {fixed}.")
    match = _BIDS.fullmatch(scan_name(moving))
    entities, suffix = match.groups() if match else (f"sub-{spaces[0]}", "T1w")
    there, back = (f"{entities}_from-{a}_to-{b}_mode-image" for a, b in (spaces, spaces[::-1]))
    here = f"{entities}_space-{spaces[1]}"
    names = {
        "warped": f"{here}_{suffix}.nii.gz",
        "warped_labels": f"{here}_dseg.nii.gz",
        "jacobian": f"{here}_desc-jacobian_{suffix}.nii.gz",
        "forward": f"{there}_xfm.h5",
        "inverse": f"{back}_xfm.h5",
        "displacement": f"{there}_desc-displacement_xfm.nii.gz",
        "affine": f"{there}_desc-affine_xfm.txt",
        "report": f"{there}_desc-registration_report.png",
        "summary": f"{there}_desc-registration_summary.json",
    }
    if len(set(names.values())) < len(names):
        raise ValueError(f"{moving} must be a scan's name, as its files are named after it, got that of a {suffix}.")
    return names


def check_output_folder(output: Path, inputs: Iterable[Path], names: Iterable[str], overwrite: bool | None) -> None:
    """Raise an error where a folder cannot be written, or writing it would harm something.

    Args:
        output: the folder, an absolute path.
        inputs: files and folders that are read for it.
        names: of the files that it gets.
        overwrite: whether it may take the place of one with such files; None: never, there is no such option.
    """
    names, real = list(names), output.resolve()
    for path in inputs:
        if real == path.resolve() or real in path.resolve().parents:
            raise ValueError(f"{output} must not hold an input, got {path}.")
        if path.is_dir() and path.resolve() in real.parents:
            raise ValueError(f"{output} must not lie within an input, got {path}.")
    for name in (output.name, *names):
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise ValueError(
                f"{output} and the files in it must have names of {_LONGEST_NAME} bytes at most, got {name}."
            )
    try:
        str(output).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(output)!r} must be a path in UTF-8, as ITK writes to no other.") from error
    require_replaceable(output, overwrite, "'vxm register'", names)
    above = next(folder for folder in output.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{output} must be a folder that can be made, but nothing can be written in {above}.")


def _sha256(path: Path) -> str:
    """Hash of a file, or of all files of a scan in the order of their names."""
    digest = hashlib.sha256()
    for file in scan_files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("itk", "monai", "nibabel", "numpy", "scipy", "torch")}
    return {"voxelmorph_monai": __version__, "python": platform.python_version(), **others}


def _on_grid_of(image: Image, paths: Mapping[str, Path], scan: str, kind: str) -> Labels | None:
    """The ``kind`` (labels or mask) that belongs to a scan, if there is one."""
    path = paths.get(f"{scan}_{kind}")
    if path is None:
        return None
    labels = read_labels(path, planar=True)
    require_same_grid(image, labels, (str(paths[scan]), str(path)))
    return labels


def register_files(
    moving: str | Path,
    fixed: str | Path,
    output: str | Path,
    *,
    moving_labels: str | Path | None = None,
    fixed_labels: str | Path | None = None,
    moving_mask: str | Path | None = None,
    fixed_mask: str | Path | None = None,
    weights: str | Path | None = None,
    preset: str = "wide",
    device: str | None = None,
    budget: float = 0.0,
    similarity: str = "lncc",
    space: str = "mni152",
    transform: str = "affine",
    grid: Grid | None = None,
    bids: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Register two scans into the folder ``output``, which appears complete or not at all.

    A scan is a file of NIfTI, MGZ, NRRD or MetaImage, or a folder that holds one DICOM series
    (:func:`~voxelmorph_monai.spaces.open_volume` says more); a volume, a slice, or a 2-D image.

    It gets ``warped.nii.gz`` (with the header of the fixed scan), ``warped_labels.nii.gz`` if there are moving labels,
    ``forward.h5`` and ``inverse.h5`` (ITK transforms; ``forward.h5`` warps the moving image, and takes points of the
    fixed scan to the moving one), ``displacement.nii.gz`` (the same as one field on the fixed grid), ``affine.txt``
    (ITK, its linear part), ``jacobian.nii.gz`` (change of volume, affine part included), ``report.png`` and
    ``summary.json``: similarity and Dice where the headers put the scans (``before``), after the affine transform and
    after all, over the fixed grid. The transforms of 2-D images are 2-D ones.

    Args:
        moving: scan, as :func:`register` takes it.
        fixed: scan.
        output: folder to write; it must not exist yet.
        moving_labels: label map on the grid of the moving scan.
        fixed_labels: label map on the grid of the fixed scan; with both of them the summary has Dice.
        moving_mask: what to register of the moving scan: a mask on its grid, above 0 there.
        fixed_mask: the same of the fixed scan.
        weights: of the network, :func:`shipped_weights` for example; without them the map is affine, unless refined.
        preset: of the network.
        device: to compute on (default: a GPU if there is one).
        budget: as in :func:`register`.
        similarity: as in :func:`register`.
        space: as in :func:`register`.
        transform: as in :func:`register`.
        grid: as in :func:`register`.
        bids: name the files as BIDS derivatives of the moving scan.
        overwrite: let ``output`` take the place of an earlier registration.
        progress: as in :func:`register`.

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
        "moving_mask": moving_mask,
        "fixed_mask": fixed_mask,
        "weights": weights,
    }
    paths, output = {role: Path(path) for role, path in given.items() if path is not None}, Path(output).absolute()
    files = _bids_names(Path(moving), Path(fixed)) if bids else _NAMES
    check_options(space, transform, similarity, budget)
    choose_device(device)  # here, as scans are read before the network
    check_output_folder(output, paths.values(), files.values(), overwrite)
    images = read_image(moving, planar=True), read_image(fixed, planar=True)
    dims = 2 if _is_slice(images[1]) else 3
    _check_dimensions(None, space, dims)
    labels = _on_grid_of(images[0], paths, "moving", "labels"), _on_grid_of(images[1], paths, "fixed", "labels")
    masks = _on_grid_of(images[0], paths, "moving", "mask"), _on_grid_of(images[1], paths, "fixed", "mask")
    network = None
    if weights is not None:
        changed = paths["weights"].stat().st_mtime_ns if paths["weights"].exists() else 0
        network = _load_network_once(paths["weights"].absolute(), preset, dims, device, changed)
    result = register(
        *images,
        network=network,
        budget=budget,
        similarity=similarity,
        space=space,
        transform=transform,
        grid=grid,
        device=device,
        progress=progress,
        masks=(masks[0] and masks[0][0], masks[1] and masks[1][0]),
        names=(str(moving), str(fixed)),
    )
    measures, drawn = _summary(result, images, labels)
    summary = {
        **measures,
        "versions": _versions(),
        "inputs": {role: {"path": str(path.absolute()), "sha256": _sha256(path)} for role, path in paths.items()},
        "options": {
            "space": space,
            "transform": transform,
            "preset": preset if weights is not None else None,
            "budget": budget if budget < math.inf else "inf",  # JSON knows no infinity
            "similarity": similarity,
            "grid": None if result.grid is None else {"size": list(result.grid.size), "spacing": result.grid.spacing},
        },
    }
    with atomic_folder(output) as folder:
        _save(folder, files, (paths["fixed"], images[1]), result, labels[0], drawn, summary)
    return summary
