"""The result of a registration: warped scan, maps in both directions, measures of quality, and how to save them."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import in_plane
from voxelmorph_monai.anatomy import load_anatomy
from voxelmorph_monai.apps.outputs import check_output_folder
from voxelmorph_monai.apps.shipped import shipped_anatomy
from voxelmorph_monai.io.atomic import atomic_folder
from voxelmorph_monai.io.formats import scan_name
from voxelmorph_monai.maps.grids import write_ends
from voxelmorph_monai.maps.itk_files import save_linear
from voxelmorph_monai.maps.spatial_map import SpatialMap, warp_scan
from voxelmorph_monai.pages.checks import concerns
from voxelmorph_monai.pages.registration import save_page
from voxelmorph_monai.pages.views import Views
from voxelmorph_monai.report import NAMES, Images, correlation, overlap, regularity, save_results, volume_change
from voxelmorph_monai.space.alignment import header_map
from voxelmorph_monai.space.resampling import resample, viewed
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import WorkingGrid
from voxelmorph_monai.threads import num_threads, run

__all__ = ["FILES", "RegistrationResult", "write_result"]

_NUM_POINTS = 100_000  # number of points at which the inverse is checked

FILES = {
    **NAMES,
    "warped": "warped.nii.gz",
    "warped_labels": "warped_labels.nii.gz",
    "affine": "affine.txt",
    "forward": "forward.h5",
    "inverse": "inverse.h5",
}
"""Names of the files of a registration."""


@dataclass(frozen=True, eq=False)
class RegistrationResult:
    """Result of :func:`~voxelmorph_monai.apps.register.register`.

    Attributes:
        moving: the moving scan.
        fixed: the fixed scan.
        warped: the moving scan on the grid of the fixed one.
        forward: the map from points of the fixed scan to points of the moving one, which warps moving images.
        inverse: the map back, which warps fixed images.
        ddf: the whole forward map on the fixed grid, ``(3, X, Y, Z)`` in its voxels, affine part included.
        seconds: duration of each stage.
        grid: size and spacing of the grid on which the displacement was found; None without a displacement.
        moving_labels: label map of the moving scan, if there is one.
        fixed_labels: label map of the fixed scan, if there is one.
        warped_labels: the moving labels on the grid of the fixed scan, interpolated by nearest neighbour.
        options: options of the registration, as in the summary.
        notes: remarks on the registration, one sentence each.
        anatomy: label maps of the structures found in whole heads, by role (``moving``, ``fixed``), in voxels of 2 mm.
    """

    moving: Scan
    fixed: Scan
    warped: Scan
    forward: SpatialMap
    inverse: SpatialMap
    ddf: NDArray[np.float32]
    seconds: dict[str, float]
    grid: WorkingGrid | None
    moving_labels: Scan | None
    fixed_labels: Scan | None
    warped_labels: Scan | None
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    anatomy: Mapping[str, Scan] = field(default_factory=dict)

    def __repr__(self) -> str:
        seconds = f"{sum(self.seconds.values()):.1f} s"
        return f"<RegistrationResult {scan_name(self.moving.name)} -> {scan_name(self.fixed.name)}, {seconds}>"

    def _before(self, scan: Scan) -> Scan:
        """Resample a moving image or label map on the fixed grid, aligned by the headers only."""
        outside, order = (0, 0) if scan is self.moving_labels else (scan.background, 1)  # labels have no background
        return resample(scan, self.fixed.grid, header_map(scan, self.fixed), order, outside)

    def _aligned(self, scan: Scan) -> Scan:
        """Resample a moving image or label map on the fixed grid by the linear part of the forward map."""
        outside, order = (0, 0) if scan is self.moving_labels else (scan.background, 1)
        return resample(scan, self.fixed.grid, self.forward.linear, order, outside)

    @cached_property
    def aligned(self) -> Scan:
        """The moving scan on the fixed grid, resampled by the linear part of the forward map."""
        return self._aligned(self.moving)

    @cached_property
    def outlines(self) -> dict[str, Scan]:
        """Label maps to outline on the fixed grid, ``fixed`` and ``warped``: the given ones, or anatomy of heads."""
        given = {"fixed": self.fixed_labels, "warped": self.warped_labels}
        found = {name: labels for name, labels in given.items() if labels is not None}
        if found:
            return found
        if "fixed" in self.anatomy:
            found["fixed"] = resample(self.anatomy["fixed"], self.fixed.grid, np.eye(4), order=0)
        if "moving" in self.anatomy:
            found["warped"] = warp_scan(self.anatomy["moving"], self.ddf, self.fixed, order=0)
        return found

    @cached_property
    def volume_change(self) -> NDArray[Any]:
        """Jacobian determinant of the whole forward map on the fixed grid, ``(X, Y, Z)``."""
        return volume_change(self.ddf, self.fixed.affine)

    def measures(self) -> dict[str, Any]:
        """Measure the quality of the registration on the fixed grid.

        Returns:
            ``dice`` (by label and ``mean``, 0 to 1; None without labels of both scans) and ``correlation_before``
            (aligned by the headers only), ``_affine`` (after the alignment) and ``_after``, each over the voxels of the
            fixed scan that lie in the field of view of the moving one;
            ``folding_percent``, ``sdlogj``, ``inverse_consistency_mm``, the ``seconds`` of each stage, and
            ``warnings``: what looks wrong, each with the ``check`` and a ``text``.
        """
        stages = {"before": self._before(self.moving), "affine": self.aligned, "after": self.warped}
        still = {"before": header_map(self.moving, self.fixed), "affine": self.forward.linear}

        def likeness(stage: str) -> float:
            way = (still[stage],) if stage in still else (np.eye(4), self.ddf)
            return correlation(stages[stage].array, self.fixed.array, viewed(self.moving, self.fixed.grid, *way))

        correlations = run(likeness, [*stages], num_threads())
        dice = None
        if self.moving_labels is not None and self.fixed_labels is not None and self.warped_labels is not None:
            moved = {
                "before": self._before(self.moving_labels),
                "affine": self._aligned(self.moving_labels),
                "after": self.warped_labels,
            }
            dice = overlap({stage: scan.array for stage, scan in moved.items()}, self.fixed_labels.array)
        found = {
            "dice": dice,
            **{f"correlation_{stage}": value for stage, value in zip(stages, correlations, strict=True)},
            **regularity(self.ddf, self.volume_change),
            "inverse_consistency_mm": self._inverse_consistency(),
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
        warnings = concerns(self, found, self.volume_change)
        return {**found, "warnings": [warning._asdict() for warning in warnings]}

    def report(self, path: str | Path, *, show_face: bool = False) -> None:
        """Write a report as one HTML page that needs no other file: images to compare, numbers, warnings.

        Args:
            path: file of the page, ``.html``.
            show_face: show the faces of whole heads; by default they are hidden.
        """
        summary = {**self.measures(), "options": dict(self.options)}
        save_page(path, self._views(show_face), self.volume_change, summary)

    def _views(self, show_face: bool) -> Views:
        return Views(self, load_anatomy(shipped_anatomy()) if not self.fixed.is_slice else None, show_face=show_face)

    def _inverse_consistency(self) -> float:
        """Mean distance (mm) from points of the fixed scan to where the forward and then the inverse map take them."""
        array, affine = self.fixed.array, self.fixed.affine
        inside = np.flatnonzero(array > self.fixed.background)
        some = inside[:: max(1, len(inside) // _NUM_POINTS)]
        points = np.stack(np.unravel_index(some, array.shape), axis=1) @ affine[:3, :3].T + affine[:3, 3]
        again = self.inverse.apply(self.forward.apply(points))
        return float(np.linalg.norm(again - points, axis=1).mean())

    def save(
        self, folder: str | Path, *, overwrite: bool = False, report: bool = True, show_face: bool = False
    ) -> dict[str, Any]:
        """Write the files of ``vxm register`` into a new folder, completely or not at all.

        Args:
            folder: folder to write.
            overwrite: replace an earlier registration in the folder.
            report: write ``report.png`` and ``report.html``.
            show_face: show the faces of whole heads in them; by default they are hidden.

        Returns:
            The summary: :meth:`measures`, and the options of the registration.

        Raises:
            FileExistsError, ValueError: the folder cannot be written, or writing it would damage other files.
        """
        output = Path(folder).absolute()
        check_output_folder(output, (), FILES.values(), overwrite)
        summary = {**self.measures(), "options": dict(self.options)}
        with atomic_folder(output) as temporary:
            write_result(temporary, FILES, self, summary, report=report, show_face=show_face)
        return summary


def write_result(
    folder: Path,
    names: Mapping[str, str],
    result: RegistrationResult,
    summary: Mapping[str, Any],
    *,
    report: bool = True,
    show_face: bool = False,
) -> None:
    """Write the files of a registration into an existing folder."""
    fixed, forward = result.fixed, result.forward

    def save_scans_and_maps() -> None:
        result.warped.save(folder / names["warped"])
        if result.warped_labels is not None:
            result.warped_labels.save(folder / names["warped_labels"])
        save_linear(folder / names["affine"], in_plane(forward.linear) if forward.spatial_dims == 2 else forward.linear)
        forward.save(folder / names["forward"])
        write_ends(folder / names["forward"], fixed.grid, result.moving.grid)
        result.inverse.save(folder / names["inverse"])
        write_ends(folder / names["inverse"], result.moving.grid, fixed.grid)

    views = result._views(show_face) if report else None
    # The displacement between the two images in the picture: the fixed and the affinely aligned one.
    bend = forward._replace(post=np.linalg.inv(forward.pre)).on_grid(fixed.grid)
    with ThreadPoolExecutor(1) as pool:  # saves 1 s: meanwhile the picture is drawn in one thread
        saving = pool.submit(save_scans_and_maps)
        save_results(
            folder,
            None if views is None else Images(*views.drawn()),
            result.ddf,
            fixed.affine,
            summary,
            bend=bend,
            determinant=result.volume_change,
            slices=None if views is None else views.starts(),
            names=names,
            spatial_dims=fixed.spatial_dims,
        )
        if views is not None:
            save_page(folder / names["page"], views, result.volume_change, summary)
        saving.result()
