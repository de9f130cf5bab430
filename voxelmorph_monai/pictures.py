"""Pictures of a registration, for people who would rather look than read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from voxelmorph_monai.spaces import atomic, spacing

__all__ = ["save_registration_picture"]

Array = NDArray[np.floating]
_LINES = 40  # of the deformed grid, along the longer side of a slice


def _slice(volume: Array, axis: int, index: int) -> Array:
    """Slice ``(..., rows, columns)`` of ``(..., X, Y, Z)`` in RAS, drawn head (or nose) up, left on the left."""
    return np.swapaxes(np.take(volume, index, axis=volume.ndim - 3 + axis), -1, -2)


def _draw_grid(axes: Axes, points: Array) -> None:
    """Draw lines through ``points`` ``(2, rows, columns)``: where the map takes the fixed image's rows and columns."""
    step = max(1, max(points.shape[1:]) // _LINES)
    axes.plot(points[0, ::step].T, points[1, ::step].T, color="black", linewidth=0.4)
    axes.plot(points[0, :, ::step], points[1, :, ::step], color="black", linewidth=0.4)


def _to_ras(affine: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Orientation change of arrays to RAS, and for each RAS axis the array axis it comes from, with its sign."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt("RAS"))
    source = np.zeros((3, 2), dtype=np.int64)
    for old, (new, sign) in enumerate(change):
        source[int(new)] = old, int(sign)
    return change, source


def save_registration_picture(
    path: str | Path,
    moving: Array,
    fixed: Array,
    warped: Array,
    ddf: Array,
    determinant: Array,
    affine: NDArray[np.float64],
    title: str = "",
) -> None:
    """Write a PNG of three middle slices: moving, fixed, warped, what they differ by, deformed grid, change of volume.

    Args:
        path: the PNG, written whole or not at all.
        moving: ``(X, Y, Z)``, on the fixed grid like all the others, intensities in [0, 1].
        fixed: ``(X, Y, Z)``.
        warped: ``(X, Y, Z)``.
        ddf: ``(3, X, Y, Z)`` in voxels.
        determinant: ``(X, Y, Z)``, of the Jacobian; 1 keeps the volume, and what folds (<= 0) is drawn red.
        affine: of the fixed grid (RAS, mm), so that right is drawn right whatever the orientation of the arrays.
        title: a line above.
    """
    change, source = _to_ras(affine)
    volumes: Sequence[Array] = [apply_orientation(v, change) for v in (moving, fixed, warped, determinant)]
    field = np.stack([sign * apply_orientation(ddf[old], change) for old, sign in source])
    moving, fixed, warped, determinant = volumes
    size = spacing(affine)[source[:, 0]]
    middle = [int(np.round(c)) for c in np.argwhere(fixed > 0.1 * fixed.max()).mean(axis=0)]
    figure = Figure(figsize=(17.5, 8.4), layout="constrained")
    panels = figure.subplots(3, 7)
    names = ["moving", "fixed", "warped", "moving - fixed", "warped - fixed", "deformed grid", "Jacobian determinant"]
    for row, axis in enumerate((0, 1, 2)):
        plane = [a for a in range(3) if a != axis]
        at = [_slice(v, axis, middle[axis]) for v in (moving, fixed, warped, determinant)]
        shown = [*at[:3], at[0] - at[1], at[2] - at[1]]
        aspect = size[plane[1]] / size[plane[0]]
        for column, (panel, name) in enumerate(zip(panels[row], names, strict=True)):
            panel.set_axis_off()
            panel.set_title(name if row == 0 else "", fontsize=11)
            if column < 3:
                panel.imshow(shown[column], cmap="gray", vmin=0, vmax=1, origin="lower", aspect=aspect)
            elif column < 5:
                panel.imshow(shown[column], cmap="RdBu_r", vmin=-1, vmax=1, origin="lower", aspect=aspect)
        displacement = _slice(field, axis, middle[axis])[plane]
        rows, columns = np.indices(at[1].shape)
        _draw_grid(panels[row][5], np.stack([columns, rows]) + displacement)
        panels[row][5].set_aspect(aspect)
        panels[row][5].set(xlim=(0, columns.max()), ylim=(0, rows.max()))
        colours = panels[row][6].imshow(
            np.log2(np.maximum(at[3], 2.0**-10)), cmap="PuOr", vmin=-1.5, vmax=1.5, origin="lower", aspect=aspect
        )
        panels[row][6].contourf(at[3] <= 0, levels=[0.5, 1.5], colors=["red"])
    bar = figure.colorbar(colours, ax=panels[:, 6], shrink=0.6, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["½", "1", "2"])
    figure.suptitle(title, fontsize=12)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=80)
