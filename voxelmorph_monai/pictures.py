"""Pictures of a registration, and box plots of measures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from voxelmorph_monai.affines import spacing
from voxelmorph_monai.drawing import Row, png
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.pages.views import shown_box

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["save_box_plot", "save_registration_picture"]

figures = lazy("matplotlib.figure")

Array = NDArray[np.floating]
_PLACES = (0.35, 0.45, 0.55)  # fractions of the content from left, back and below: a hemisphere, not the fissure


def _slice(volume: Array, axis: int, index: int) -> Array:
    """Slice ``(..., rows, columns)`` of ``(..., X, Y, Z)`` in RAS, drawn head (or nose) up, left on the left."""
    return np.swapaxes(np.moveaxis(volume, axis - 3, 0)[index], -1, -2)  # np.take would copy the volume first


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
    last = np.array(fixed.shape) - 0.5
    frames = np.clip(box + margin[:, None] * [-1, 1], -0.5, last[:, None])  # beyond the grid there is nothing to draw
    rows = []
    for axis in [axis for axis in range(3) if fixed.shape[axis] == 1] or [2, 1, 0]:
        across, up = (a for a in range(3) if a != axis)
        displacement = np.stack([source[a, 1] * _slice(field[a], axis, slices[axis]) for a in (across, up)])
        images = np.stack([_slice(v, axis, slices[axis]) for v in volumes])
        sides, pixel = "PA" if across == 1 else "LR", (float(size[across]), float(size[up]))
        rows.append(Row(images, displacement, frames[[across, up]], sides, pixel))
    with atomic(path) as temporary:
        temporary.write_bytes(png(rows, bright, title))


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
