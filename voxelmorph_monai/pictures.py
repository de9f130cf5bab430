"""Pictures of a registration, for people who would rather look than read."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from voxelmorph_monai.files import atomic
from voxelmorph_monai.spaces import spacing

__all__ = ["save_box_plot", "save_registration_picture"]

Array = NDArray[np.floating]
_COLUMNS = ("moving", "fixed", "warped", "moving - fixed", "warped - fixed", "deformed grid", "Jacobian determinant")
_LINES = 30  # of the deformed grid, along the longer side of a slice
_RANGE = 1.5  # shown of the determinant's logarithm to the base of 2
_VOLUME = colormaps["PuOr"].with_extremes(under="red")


def _slice(volume: Array, axis: int, index: int) -> Array:
    """Slice ``(..., rows, columns)`` of ``(..., X, Y, Z)`` in RAS, drawn head (or nose) up, left on the left."""
    return np.swapaxes(np.take(volume, index, axis=volume.ndim - 3 + axis), -1, -2)


def _draw_grid(axes: Axes, displacement: Array) -> None:
    """Draw where the map takes the rows and columns of the fixed image: ``displacement`` ``(2, rows, columns)``."""
    rows, columns = np.indices(displacement.shape[1:])
    x, y = columns + displacement[0], rows + displacement[1]
    step = max(1, max(rows.shape) // _LINES)
    axes.plot(x[::step].T, y[::step].T, color="gold", linewidth=0.5)
    axes.plot(x[:, ::step], y[:, ::step], color="gold", linewidth=0.5)
    axes.set(xlim=(-0.5, columns.max() + 0.5), ylim=(-0.5, rows.max() + 0.5))  # the frame of the image below


def _log2(determinant: Array) -> Array:
    """Logarithm that ends at the range shown, but far below it for what folds."""
    return np.where(determinant > 0, np.log2(np.maximum(determinant, 2.0**-_RANGE)), -9.0)


def _draw_slices(
    panels: Sequence[Axes], at: Sequence[Array], displacement: Array, aspect: float, bright: float
) -> None:
    """Draw one row of the picture: slices ``at`` of moving, fixed, warped and determinant, and the deformed grid."""
    moving, fixed, warped, determinant = at
    show = partial(Axes.imshow, origin="lower", aspect=aspect)
    grey = partial(show, cmap="gray", vmin=0, vmax=bright)
    difference = partial(show, cmap="RdBu_r", vmin=-bright, vmax=bright)
    grey(panels[0], moving)
    grey(panels[1], fixed)
    grey(panels[2], warped)
    difference(panels[3], moving - fixed)
    difference(panels[4], warped - fixed)
    grey(panels[5], moving / 2)
    _draw_grid(panels[5], displacement)
    show(panels[6], _log2(determinant), cmap=_VOLUME, vmin=-_RANGE, vmax=_RANGE)


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

    Of a slice, one of whose axes has length 1, it shows that. The deformed grid lies on the moving image: its lines are
    where the fixed image's rows and columns look.

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
    fixed = volumes[1]
    size = spacing(affine)[source[:, 0]]
    middle = [int(np.round(c)) for c in np.argwhere(fixed > 0.1 * fixed.max()).mean(axis=0)]
    bright = float(np.percentile(fixed[fixed > 0], 99.5))  # a few bright vessels would leave the brain in the dark
    shown = [axis for axis in range(3) if fixed.shape[axis] == 1] or [0, 1, 2]
    figure = Figure(figsize=(17.5, 2.8 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 7, squeeze=False)
    for panel, name in zip(panels[0], _COLUMNS, strict=True):
        panel.set_title(name, fontsize=11)
    for axis, row in zip(shown, panels, strict=True):
        across, up = (a for a in range(3) if a != axis)
        at = [_slice(v, axis, middle[axis]) for v in volumes]
        displacement = _slice(field, axis, middle[axis])[[across, up]]
        _draw_slices(row, at, displacement, size[up] / size[across], bright)
        if across == 0:
            for x, side in ((0.04, "L"), (0.9, "R")):
                row[0].text(x, 0.04, side, color="white", transform=row[0].transAxes)
        for panel in row:
            panel.set_axis_off()
    bar = figure.colorbar(panels[0, 6].images[0], ax=panels[:, 6], shrink=0.6, ticks=[-1, 0, 1], extend="min")
    bar.ax.set_yticklabels(["½", "1", "2"])
    figure.suptitle(title, fontsize=12)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=80)


def save_box_plot(path: str | Path, series: Mapping[str, pd.DataFrame], *, label: str, title: str = "") -> None:
    """Write a PNG of box plots side by side: a box for each column of each of the ``series``.

    A box spans the quartiles, its line is the median, whiskers reach to the last value within 1.5 times the box, what
    lies further out is a point. NaN is left out.

    Args:
        path: the PNG, written whole or not at all.
        series: tables by the name to show, with a row for each pair and the same columns.
        label: of the axis of values.
        title: a line above.
    """
    columns = next(iter(series.values())).columns
    figure = Figure(figsize=(2.5 + 0.25 * len(columns) * (1 + len(series)), 5.5), layout="constrained")
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
