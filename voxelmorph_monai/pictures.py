"""Pictures of a registration, and box plots of measures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from voxelmorph_monai.affines import spacing
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.pages.views import shown_box

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["save_box_plot", "save_registration_picture"]

matplotlib, figures, effects = lazy("matplotlib"), lazy("matplotlib.figure"), lazy("matplotlib.patheffects")

Array = NDArray[np.floating]
_COLUMNS = ("moving", "fixed", "warped", "moving - fixed", "warped - fixed", "deformed grid", "change of volume")
_LINES = 30  # lines of the deformed grid along the longer side of a slice
_PLACES = (0.35, 0.45, 0.55)  # fractions of the content from left, back and below: a hemisphere, not the fissure
_RANGE = 1.5  # range of the logarithm of the determinant to base 2 that is shown


def _slice(volume: Array, axis: int, index: int) -> Array:
    """Slice ``(..., rows, columns)`` of ``(..., X, Y, Z)`` in RAS, drawn head (or nose) up, left on the left."""
    return np.swapaxes(np.moveaxis(volume, axis - 3, 0)[index], -1, -2)  # np.take would copy the volume first


def _draw_grid(axes: "Axes", displacement: Array) -> None:
    """Draw where the map takes the rows and columns of the fixed image: ``displacement`` ``(2, rows, columns)``."""
    rows, columns = np.indices(displacement.shape[1:])
    x, y = columns + displacement[0], rows + displacement[1]
    step = max(1, max(rows.shape) // _LINES)
    axes.plot(x[::step].T, y[::step].T, color="gold", linewidth=0.5)
    axes.plot(x[:, ::step], y[:, ::step], color="gold", linewidth=0.5)


def _mark(axes: "Axes", sides: str, side: float) -> None:
    """Say which sides an image shows on the left and on the right, and how long it is; ``side``: of a pixel, mm."""
    look: dict[str, Any] = {
        "color": "white",
        "transform": axes.transAxes,
        "path_effects": [effects.withStroke(linewidth=2, foreground="black")],
    }
    axes.text(0.03, 0.5, sides[0], ha="left", va="center", **look)
    axes.text(0.97, 0.5, sides[1], ha="right", va="center", **look)
    width = float(np.ptp(axes.get_xlim())) * side
    bar = next((mm for mm in (50, 20, 10, 5, 2, 1) if mm < 0.5 * width), 0.5 * width)
    axes.plot([0.96 - bar / width, 0.96], [0.04, 0.04], linewidth=2, scalex=False, scaley=False, clip_on=False, **look)
    axes.text(0.96, 0.06, f"{bar:g} mm", ha="right", va="bottom", fontsize=9, **look)


def _log2(determinant: Array) -> Array:
    """Logarithm that ends at the range shown, but far below it for what folds."""
    return np.where(determinant > 0, np.log2(np.maximum(determinant, 2.0**-_RANGE)), -9.0)


def _draw_slices(
    panels: "Sequence[Axes]", at: Sequence[Array], displacement: Array, aspect: float, bright: float
) -> None:
    """Draw one row of the picture: slices ``at`` of moving, fixed, warped and determinant, and the deformed grid."""
    moving, fixed, warped, determinant = at
    show: dict[str, Any] = {"origin": "lower", "aspect": aspect}
    grey = show | {"cmap": "gray", "vmin": 0, "vmax": bright}
    difference = show | {"cmap": "RdBu_r", "vmin": -bright, "vmax": bright}
    volume = matplotlib.colormaps["PuOr"].with_extremes(under="red")
    panels[0].imshow(moving, **grey)
    panels[1].imshow(fixed, **grey)
    panels[2].imshow(warped, **grey)
    panels[3].imshow(moving - fixed, **difference)
    panels[4].imshow(warped - fixed, **difference)
    panels[5].imshow(moving / 2, **grey)
    _draw_grid(panels[5], displacement)
    panels[6].imshow(_log2(determinant), **show, cmap=volume, vmin=-_RANGE, vmax=_RANGE)


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
    slices: Sequence[int] | None = None,
) -> None:
    """Write a PNG of three slices: moving, fixed, warped, their difference, deformed grid, change of volume.

    For a slice, with one axis of length 1, it shows only that slice. The deformed grid lies on the moving image: its
    lines are where the map takes the rows and columns of the fixed image.

    Args:
        path: the PNG, written completely or not at all.
        moving: ``(X, Y, Z)``, on the fixed grid like all the others, intensities in [0, 1].
        fixed: ``(X, Y, Z)``.
        warped: ``(X, Y, Z)``.
        ddf: ``(3, X, Y, Z)`` in voxels.
        determinant: Jacobian determinant ``(X, Y, Z)``; 1 keeps the volume, and folds (<= 0) are drawn red.
        affine: affine of the fixed grid (RAS, mm), so that right is drawn right whatever the orientation of the arrays.
        title: a line above.
        slices: numbers of the sagittal, coronal and axial slice, from the left, the back and below (default: through
            the left hemisphere, where a sagittal slice shows more than in the fissure, and through the middle).
    """
    change, source = _to_ras(affine)
    volumes: Sequence[Array] = [apply_orientation(v, change) for v in (moving, fixed, warped, determinant)]
    field = [apply_orientation(ddf[old], change) for old, _ in source]
    fixed = volumes[1]
    size = spacing(affine)[source[:, 0]]
    box = shown_box(fixed, 0.1 * float(fixed.max()))
    if slices is None:
        slices = [round(low + part * (high - low)) for part, (low, high) in zip(_PLACES, box, strict=True)]
    bright = float(np.percentile(fixed[fixed > 0], 99.5))  # a few bright vessels would leave the brain in the dark
    margin = np.ceil(0.05 * (box[:, 1] - box[:, 0])) + 0.5  # half a voxel: whole ones are drawn
    frames = box + margin[:, None] * [-1, 1]
    sides = (frames[:, 1] - frames[:, 0]) * size
    shown = [axis for axis in range(3) if fixed.shape[axis] == 1] or [2, 1, 0]
    heights = [sides[1 if axis == 2 else 2] / sides[1 if axis == 0 else 0] for axis in shown]
    # by hand: a layout that matplotlib works out takes as long as all that is drawn
    width, height = 17.5, 2.35 * sum(heights) + 0.75
    figure = figures.Figure(figsize=(width, height))
    places = {"left": 0.005, "right": 0.94, "bottom": 0.05 / height, "top": 1 - 0.7 / height, "wspace": 0.03}
    panels = figure.subplots(len(shown), 7, squeeze=False, height_ratios=heights, gridspec_kw=places | {"hspace": 0.03})
    for panel, name in zip(panels[0], _COLUMNS, strict=True):
        panel.set_title(name, fontsize=11)
    for axis, row in zip(shown, panels, strict=True):
        across, up = (a for a in range(3) if a != axis)
        at = [_slice(v, axis, slices[axis]) for v in volumes]
        displacement = np.stack([source[a, 1] * _slice(field[a], axis, slices[axis]) for a in (across, up)])
        _draw_slices(row, at, displacement, size[up] / size[across], bright)
        for panel in row:
            panel.set(xlim=frames[across], ylim=frames[up])
            panel.set_axis_off()
        _mark(row[0], "PA" if across == 1 else "LR", size[across])
    beside = figure.add_axes((0.947, 0.2, 0.008, 0.6))
    bar = figure.colorbar(panels[0, 6].images[0], cax=beside, ticks=[-1, 0, 1], extend="min")
    bar.ax.set_yticklabels(["-50 %", "0", "+100 %"])
    figure.suptitle(title, fontsize=12, y=1 - 0.1 / height, va="top")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=80)


def save_box_plot(path: str | Path, series: "Mapping[str, pd.DataFrame]", *, label: str, title: str = "") -> None:
    """Write a PNG of box plots side by side: a box for each column of each of the ``series``.

    A box spans the quartiles, its line is the median, whiskers reach to the last value within 1.5 times the box, and
    values further out are points. NaN is left out.

    Args:
        path: the PNG, written completely or not at all.
        series: tables by the name to show, with a row for each pair and the same columns.
        label: label of the axis of values.
        title: a line above.
    """
    columns = next(iter(series.values())).columns
    figure = figures.Figure(figsize=(2.5 + 0.25 * len(columns) * (1 + len(series)), 5.5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(columns))
    width = 0.8 / len(series)
    for number, (name, table) in enumerate(series.items()):
        colour = f"C{number}"
        axes.boxplot(
            [table[column].dropna().to_numpy() for column in columns],
            positions=places + (number - (len(series) - 1) / 2) * width,
            widths=0.8 * width,
            patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.6},
            medianprops={"color": "black"},
            flierprops={"markersize": 3},
            manage_ticks=False,
        )
        axes.fill_between([], [], color=colour, alpha=0.6, label=name)  # for the legend
    axes.set_xticks(places, columns, rotation=90)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.4)
    axes.legend(loc="lower left")  # the "best" place is searched for, which takes seconds and then warns
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)
