r"""Register two scans in any position and on any grids.

The map from points of the fixed scan to points of the moving one is :math:`A_m \circ (id + u) \circ A_f^{-1}` in mm.
The affine maps :math:`A_f` and :math:`A_m` lead from a common space to the two scans, and :math:`u` is the displacement
that the network and the refinement find in this space. The three parts are stored separately. Warping an image
evaluates them at the voxels of the fixed scan, so that the moving scan is interpolated only once.
"""

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.affines import Affine, ImageGrid, half_map, spacing
from voxelmorph_monai.apps.heads import Head, align_to_mni152, find_brains
from voxelmorph_monai.apps.options import DEFAULTS, PRESET, Options
from voxelmorph_monai.apps.result import RegistrationResult
from voxelmorph_monai.apps.shipped import choose_device, network_of
from voxelmorph_monai.blocks import invert
from voxelmorph_monai.folds import remove_folds
from voxelmorph_monai.maps.spatial_map import Displacement, SpatialMap, map_name, warp_scan
from voxelmorph_monai.networks import Registration
from voxelmorph_monai.objective import SIMILARITIES
from voxelmorph_monai.progress import Progress
from voxelmorph_monai.refinement import mean_map, refine
from voxelmorph_monai.space.alignment import align
from voxelmorph_monai.space.middle import rigid_both_ways
from voxelmorph_monai.space.resampling import SCALINGS, cut_off, fraction_inside, resample_intensities
from voxelmorph_monai.space.scan import Plane, Scan, ScanLike
from voxelmorph_monai.space.template import STANDARD_GRID, WorkingGrid, check_brain, check_in_grid
from voxelmorph_monai.threads import num_threads, run

__all__ = ["network_input", "padded_field", "register", "register_scans"]

_TAPER = 16  # voxels around the network's grid within which its displacement tapers to 0
_LEAST_IN_COMMON = 0.25  # smallest fraction of one scan that must lie in the other; a slab or half a head is enough


class _Stages:
    """Durations of the stages of a registration; shows the current stage if ``progress`` is true."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the time spent in the ``with`` block."""
        start = time.perf_counter()
        with Progress(name, shown=self.progress):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _check_dimensions(network: Registration | None, space: str, spatial_dims: int) -> None:
    if network is not None and network.training:
        raise ValueError("the network is in training mode: call network.eval() first.")
    if network is not None and (network.network.spatial_dims, network.network.in_channels) != (spatial_dims, 2):
        raise ValueError(
            f"the network takes {network.network.in_channels} channels in {network.network.spatial_dims}-D, but these "
            f"scans need a network with 2 channels in {spatial_dims}-D. Choose other weights."
        )
    if space == "mni152" and spatial_dims == 2:
        raise ValueError("slices and 2-D images cannot be aligned to MNI152, a volume: use space 'fixed'.")


def _check_pair(moving: Scan, fixed: Scan) -> None:
    if moving.is_slice != fixed.is_slice:
        raise ValueError(
            f"{moving.name} has shape {moving.shape} and {fixed.name} has {fixed.shape}: register two volumes, or two "
            "slices."
        )
    if fixed.is_slice:
        source = Plane.of(fixed)
        cosine = float(source.matrix[:3, 2] @ Plane.of(moving, source).matrix[:3, 2])
        if cosine < 0.7:  # near a right angle, the axes of the two planes cannot be matched
            angle = np.degrees(np.arccos(cosine))
            raise ValueError(
                f"the planes of {moving.name} and {fixed.name} differ by {angle:.0f} degrees; at most 45 are supported."
            )


def _shown(scan: Scan, mask: Scan | None, space: str) -> Scan:
    """Return the part of a scan to register: what the mask covers, or all of it; raises ValueError if it is empty."""
    if mask is not None:
        scan.check_same_grid(mask)
        outside = scan.background if space == "fixed" else 0.0
        found = scan.like(np.where(mask.array > 0, scan.array, np.asarray(outside, scan.array.dtype)))
        if not found.array.max() > outside:
            raise ValueError(
                f"the mask {mask.name} does not overlap {scan.name}: all its {np.count_nonzero(mask.array > 0)} voxels "
                "are background there."
            )
        scan = found
    if not scan.shows_something:
        raise ValueError(f"{scan.name} is empty: no voxel is above its background, {scan.background:g}.")
    if space == "mni152":
        check_brain(scan)
    return scan


def _check_overlap(moving: Scan, fixed: Scan, mapping: Affine) -> None:
    """Raise ValueError if two scans hardly overlap; ``mapping`` takes fixed points to moving points (mm)."""
    of_fixed = fraction_inside(fixed, moving.grid, mapping)
    common = max(of_fixed, fraction_inside(moving, fixed.grid, np.linalg.inv(mapping)))
    if common < _LEAST_IN_COMMON:
        raise ValueError(
            f"{moving.name} and {fixed.name} overlap by only {common:.0%} once they are aligned; at least "
            f"{_LEAST_IN_COMMON:.0%} is needed. Check the positions in their headers."
        )


def _taper(ddf: Tensor) -> NDArray[np.float32]:
    """Pad ``ddf`` ``(1, D, *spatial)`` on all sides by a margin where it tapers to 0; returns ``(3, X, Y, Z)``.

    ITK treats the displacement outside the grid as 0, so without this margin the map would jump at the border. A 2-D
    field becomes the field of a slice, ``(3, X, Y, 1)``. X varies fastest in memory, as in scans and files.
    """
    dims = ddf.ndim - 2
    reverse = (0, *range(dims, 0, -1))
    there = ddf[0].float().cpu().permute(reverse).contiguous().numpy()
    array = np.pad(there, [(0, 0), *[(_TAPER, _TAPER)] * dims], mode="edge")
    ramp = np.arange(_TAPER, dtype=np.float32) / _TAPER
    for axis in range(1, dims + 1):
        along = np.moveaxis(array, axis, -1)
        along[..., :_TAPER] *= ramp
        along[..., -_TAPER:] *= ramp[::-1]
    array = array.transpose(reverse)
    return array if dims == 3 else np.pad(array, [(0, 1), (0, 0), (0, 0)])[..., None]


def padded_field(ddf: Tensor, affine: Affine) -> Displacement:
    """Convert ``ddf`` ``(1, D, *spatial)`` to the field of a map, with a margin where it tapers to 0.

    Args:
        ddf: displacement in voxels.
        affine: affine of its grid (RAS, mm), without the margin.
    """
    wider, dims = affine.copy(), ddf.ndim - 2
    wider[:3, 3] -= affine[:3, :dims] @ np.full(dims, _TAPER)
    return Displacement(_taper(ddf), wider)


def _channels(arrays: Iterable[NDArray[Any]], grid: ImageGrid, dims: int) -> Tensor:
    """Stack arrays ``(X, Y, Z)`` on a grid as channels: ``(1, C, *spatial)``."""
    images = torch.stack([torch.from_numpy(array.T) for array in arrays])[None]  # X varies fastest in scans, Z in torch
    return images.permute(0, 1, 4, 3, 2).reshape(1, -1, *grid.size[:dims]).contiguous()


def network_input(
    scans: tuple[Scan, Scan],
    maps: tuple[Affine, Affine],
    grid: ImageGrid,
    dims: int = 3,
    *,
    outside: float | None = 0.0,
) -> Tensor:
    """Sample two scans, scaled to [0, 1], on the grid of a network: ``(1, 2, *spatial)`` in ``dims`` dimensions.

    ``maps`` take points of the grid to points of the moving and the fixed scan (mm); ``outside`` is the value beyond
    the scans, None to repeat their outermost voxels.
    """
    pairs = zip(scans, maps, strict=True)
    return _channels((resample_intensities(scan, grid, to, outside).array for scan, to in pairs), grid, dims)


class _Seen(NamedTuple):
    """Images and masks for the refinement, if the field of view of a scan cuts something off.

    Attributes:
        images: both scans, ``(1, 2, *spatial)``, continued beyond their fields of view, so that the borders of these do
            not look like edges.
        masks: whether a voxel lies in the field of view of each scan, ``(1, 2, *spatial)``.
    """

    images: Tensor
    masks: Tensor

    @classmethod
    def of(cls, scans: tuple[Scan, Scan], maps: tuple[Affine, Affine], grid: ImageGrid, dims: int) -> "_Seen | None":
        """Sample two scans, with the arguments of :func:`network_input`; None if nothing is cut off."""
        lost = [cut_off(scan, grid, mapping) for scan, mapping in zip(scans, maps, strict=True)]
        if not any(each.any() for each in lost):
            return None
        images = network_input(scans, maps, grid, dims, outside=None)
        return cls(images, _channels((~each for each in lost), grid, dims))


def _predict(
    network: Registration | None,
    options: Options,
    images: Tensor,
    seen: _Seen | None,
    spacing: float,
    stages: _Stages,
) -> tuple[Tensor, Tensor]:
    """Displacement that registers ``images`` ``(1, 2, *spatial)``, and its inverse, ``(1, D, *spatial)``; no folds."""
    found: dict[str, Tensor] = {}
    if network is not None:
        with stages.stage("network"), torch.inference_mode():
            found = network(images)
            if options.symmetric:
                found |= {f"opposite_{name}": field for name, field in network(images.flip(1)).items()}
    if options.refines:
        with stages.stage("refine"):
            limited = refine if options.steps is None else partial(refine, max_steps=options.steps)
            if seen is not None:
                images = seen.images.to(images.device)
                moving_mask, mask = seen.masks.to(images.device).split(1, dim=1)
                limited = partial(limited, mask=mask, moving_mask=moving_mask)
            refined = limited(
                images[:, :1],
                images[:, 1:],
                ddf=found.get("ddf"),
                inverse_ddf=found.get("opposite_ddf"),
                similarity=SIMILARITIES[options.similarity],
                symmetric=options.symmetric,
                smoothness=options.smoothness_mm,
                spacing=spacing,
                budget=options.budget if options.steps is None else math.inf,
                progress=stages.progress,
            )
        return refined.ddf, refined.inverse_ddf
    with stages.stage("folds"):
        ddf = remove_folds(found["ddf"])
        inverse_ddf = remove_folds(found["inverse_ddf"] if "inverse_ddf" in found else invert(ddf)[0])
        if not options.symmetric:
            return ddf, inverse_ddf
        back = remove_folds(found["opposite_ddf"])
        there = remove_folds(found["opposite_inverse_ddf"] if "inverse_ddf" in found else invert(back)[0])
        return mean_map((ddf + there) / 2, (inverse_ddf + back) / 2)


def _towards_each_other(to_moving: Affine, to_fixed: Affine, mapping: Affine) -> tuple[Affine, Affine]:
    """Change the maps from a common space to two scans equally, so that ``mapping`` takes fixed to moving points."""
    half = half_map(np.linalg.inv(to_moving) @ mapping @ to_fixed)
    return to_moving @ half, to_fixed @ np.linalg.inv(half)


def _linear_maps(scaled: tuple[Scan, Scan], heads: Sequence[Head | None], options: Options) -> tuple[Affine, Affine]:
    """Align two scans: maps from points of the common space to points of the moving and of the fixed scan (mm)."""
    if options.space == "fixed":
        return align(*scaled, "rigid" if options.same_person else options.alignment), np.eye(4)
    kind = "rigid" if options.same_person else options.alignment
    pairs = [*zip(scaled, heads, strict=True)]
    to_moving, to_fixed = run(lambda pair: align_to_mni152(*pair, kind), pairs, num_threads())
    if options.same_person:
        return _towards_each_other(to_moving, to_fixed, rigid_both_ways(*scaled))
    return to_moving, to_fixed


def _fields(
    network: Registration | None,
    options: Options,
    scaled: tuple[Scan, Scan],
    maps: tuple[Affine, Affine],
    grid: ImageGrid,
    dims: int,
    device: torch.device,
    stages: _Stages,
) -> tuple[Displacement, Displacement]:
    """Find the displacement between two scans on the working grid, and its inverse."""
    images = network_input(scaled, maps, grid, dims).to(device)
    seen = _Seen.of(scaled, maps, grid, dims) if options.refines else None
    found = _predict(network, options, images, seen, float(spacing(grid.affine)[:dims].max()), stages)
    there, back = run(lambda field: padded_field(field, grid.affine), found, num_threads())
    return there, back


def register_scans(
    moving: Scan,
    fixed: Scan,
    options: Options = DEFAULTS,
    *,
    progress: bool = False,
    moving_labels: Scan | None = None,
    fixed_labels: Scan | None = None,
    moving_mask: Scan | None = None,
    fixed_mask: Scan | None = None,
) -> RegistrationResult:
    """Register two scans in memory; :func:`register` reads its inputs and calls this function.

    Raises:
        ValueError: a scan or an option cannot be used; the message says which and why.
    """
    dims = 2 if fixed.is_slice else 3
    _check_dimensions(None, options.space, dims)
    for scan, labels in ((moving, moving_labels), (fixed, fixed_labels)):
        if labels is not None:
            scan.check_same_grid(labels)
    stages = _Stages(progress)
    with stages.stage("brain"):
        heads, options, notes = find_brains((moving, fixed), (moving_mask, fixed_mask), options)
    loaded = network_of(options, dims)
    network, card = loaded or (None, None)
    _check_dimensions(network, options.space, dims)
    device = next(network.parameters()).device if network else torch.device(choose_device(options.device))
    brains = [scan if head is None else head.brain for scan, head in zip((moving, fixed), heads, strict=True)]
    scans = _shown(brains[0], moving_mask, options.space), _shown(brains[1], fixed_mask, options.space)
    _check_pair(*scans)
    around = scans[1] if options.space == "fixed" else None
    working, grid = None, None
    if network is not None or options.refines:
        usual = STANDARD_GRID if card is None or card.size is None else WorkingGrid(card.size, card.spacing or 1.0)
        working = options.grid or (usual if around is None else WorkingGrid.fitting(around))
        grid = working.around(around)
    scale = SCALINGS["percentile" if card is None else card.intensities]
    moving_scaled, fixed_scaled = run(scale, scans, num_threads())
    scaled = moving_scaled, fixed_scaled
    with stages.stage("affine"):
        maps = _linear_maps(scaled, heads, options)
    if options.space == "fixed":
        _check_overlap(*scans, maps[0])
    elif grid is not None:
        for scan, mapping in zip(scans, maps, strict=True):
            check_in_grid(scan, mapping, grid)
    fields: tuple[Displacement | None, Displacement | None] = (None, None)
    if grid is not None:
        fields = _fields(network, options, scaled, maps, grid, dims, device, stages)
    dims, (to_moving, to_fixed) = fixed.spatial_dims, maps
    forward = SpatialMap(np.linalg.inv(to_fixed), to_moving, fields[0], dims, map_name(fixed, moving))
    inverse = SpatialMap(np.linalg.inv(to_moving), to_fixed, fields[1], dims, map_name(moving, fixed))
    with stages.stage("compose"):
        whole_ddf = forward.on_grid(fixed.grid)
    with stages.stage("warp"):
        warped = warp_scan(moving, whole_ddf, fixed, outside=moving.background)
        warped_labels = None if moving_labels is None else warp_scan(moving_labels, whole_ddf, fixed, order=0)
    if not warped.array.max() > moving.background:
        raise ValueError(
            f"{moving.name} and {fixed.name} do not overlap after the alignment. Check the positions in their headers."
        )
    record = options.record() | {
        "preset": None if network is None else card.preset if card else options.preset or PRESET,
        "grid": None if working is None else {"size": [*map(int, working.size)], "spacing": float(working.spacing)},
    }
    return RegistrationResult(
        moving=moving,
        fixed=fixed,
        warped=warped,
        forward=forward,
        inverse=inverse,
        ddf=whole_ddf,
        seconds=stages.seconds,
        grid=working,
        moving_labels=moving_labels,
        fixed_labels=fixed_labels,
        warped_labels=warped_labels,
        options=record,
        notes=tuple(notes),
        anatomy={role: head.labels for role, head in zip(("moving", "fixed"), heads, strict=True) if head is not None},
    )


def register(
    moving: ScanLike,
    fixed: ScanLike,
    *,
    moving_labels: ScanLike | None = None,
    fixed_labels: ScanLike | None = None,
    moving_mask: ScanLike | None = None,
    fixed_mask: ScanLike | None = None,
    weights: str | Path | Registration | None = DEFAULTS.weights,
    preset: str | None = DEFAULTS.preset,
    device: str | None = DEFAULTS.device,
    refine: bool = DEFAULTS.refine,
    budget: float = DEFAULTS.budget,
    steps: int | None = DEFAULTS.steps,
    similarity: str = DEFAULTS.similarity,
    smoothness: float | str = DEFAULTS.smoothness,
    symmetric: bool = DEFAULTS.symmetric,
    same_person: bool = DEFAULTS.same_person,
    space: str = DEFAULTS.space,
    alignment: str = DEFAULTS.alignment,
    brain_extraction: str = DEFAULTS.brain_extraction,
    grid: WorkingGrid | None = DEFAULTS.grid,
    progress: bool = False,
) -> RegistrationResult:
    """Register two scans, with the defaults of ``vxm register``.

    A scan is a path, a :class:`~voxelmorph_monai.space.scan.Scan`, a nibabel image, a MONAI ``MetaTensor`` or an ITK
    image: a volume, a slice or a 2-D image. Slices are registered within their planes: the map takes the plane of the
    fixed one to that of the moving one.

    Args:
        moving: scan to warp. Its background is 0, or, with ``space="fixed"``, its lowest intensity if that is far below
            0, as in CT.
        fixed: scan to warp it to.
        moving_labels: label map on the grid of the moving scan, to be warped too.
        fixed_labels: label map on the grid of the fixed scan; with both, the measures include Dice.
        moving_mask: mask on the grid of the moving scan. The registration treats the scan as empty where the mask is 0,
            for example outside the brain. The whole scan is warped nevertheless.
        fixed_mask: the same for the fixed scan.
        weights: see :class:`~voxelmorph_monai.apps.options.Options`, which explains all options down to ``grid``.
        preset: see ``Options``.
        device: see ``Options``.
        refine: see ``Options``.
        budget: see ``Options``.
        steps: see ``Options``.
        similarity: see ``Options``.
        smoothness: see ``Options``.
        symmetric: see ``Options``.
        same_person: see ``Options``.
        space: see ``Options``.
        alignment: see ``Options``.
        brain_extraction: see ``Options``.
        grid: see ``Options``.
        progress: show the current stage on standard error.

    Raises:
        TypeError: an input is not a scan.
        ValueError: a scan or an option cannot be used; the message says which and why.
        FileNotFoundError: a file does not exist.
    """
    options = Options(
        weights=weights,
        preset=preset,
        device=device,
        refine=refine,
        budget=budget,
        steps=steps,
        similarity=similarity,
        smoothness=smoothness,
        symmetric=symmetric,
        same_person=same_person,
        space=space,
        alignment=alignment,
        brain_extraction=brain_extraction,
        grid=grid,
    )
    scans = Scan.of(moving, "moving"), Scan.of(fixed, "fixed")
    given = {
        "moving_labels": moving_labels,
        "fixed_labels": fixed_labels,
        "moving_mask": moving_mask,
        "fixed_mask": fixed_mask,
    }
    maps = {name: Scan.of(each, name, labels=True) for name, each in given.items() if each is not None}
    result = register_scans(*scans, options, progress=progress, **maps)
    for note in result.notes:
        warnings.warn(note, stacklevel=2)
    return result
