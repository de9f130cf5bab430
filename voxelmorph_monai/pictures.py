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
_PLACES = (0.35, 0.45, 0.55)  # slices, as fractions of the head from the left, the back and below; beside the fissure


def _slice(volume: Array, axis: int, index: int) -> Array:
    """Slice ``(..., rows, columns)`` of ``(..., X, Y, Z)`` in RAS; its rows go up to the head or nose, left is left."""
    return np.swapaxes(np.moveaxis(volume, axis - 3, 0)[index], -1, -2)  # np.take would copy the volume first


def _to_ras(affine: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Change of orientation of arrays to RAS, and the array axis of each RAS axis with its sign, ``(3, 2)``."""
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
    """Write a picture of a registration as a PNG, with a row for an axial, a coronal and a sagittal slice.

    A row shows moving, fixed and warped image, the differences before and after, the deformed grid, and the change of
    volume. If the images are a single slice, there is only one row. The deformed grid is drawn on the moving image: its
    lines are where the map takes rows and columns of the fixed image.

    Args:
        path: file to write; it is never left incomplete.
        moving: moving image ``(X, Y, Z)`` on the fixed grid, intensities in [0, 1].
        fixed: fixed image, of the same shape and range.
        warped: warped moving image, of the same shape and range.
        ddf: displacement ``(3, X, Y, Z)`` in voxels.
        determinant: Jacobian determinant ``(X, Y, Z)``; 1 keeps the volume, and folds (<= 0) are drawn red.
        affine: affine of the fixed grid (RAS, mm), with which slices are drawn in their anatomical orientation.
        title: title above the picture.
        slices: numbers of the sagittal, coronal and axial slice, from the left, the back and below (default: the
            sagittal slice passes through the left hemisphere, the others near the middle).
    """
    change, source = _to_ras(affine)
    volumes: Sequence[Array] = [apply_orientation(v, change) for v in (moving, fixed, warped, determinant)]
    field = [apply_orientation(ddf[old], change) for old, _ in source]
    fixed = volumes[1]
    size = spacing(affine)[source[:, 0]]
    box = shown_box(fixed, 0.1 * float(fixed.max()))
    if slices is None:
        slices = [round(low + part * (high - low)) for part, (low, high) in zip(_PLACES, box, strict=True)]
    bright = float(np.percentile(fixed[fixed > 0], 99.5))  # not the maximum: bright vessels would make the brain dark
    margin = np.ceil(0.05 * (box[:, 1] - box[:, 0])) + 0.5  # 0.5 shows the outermost voxels whole
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
    """Write box plots as a PNG: for each column, a box for each of the ``series`` side by side.

    A box spans the quartiles, with a line at the median. Whiskers reach to the last value within 1.5 times the length
    of the box; values further out are drawn as points. NaN is left out.

    Args:
        path: file to write; it is never left incomplete.
        series: tables by the name to show in the legend, with a row for each pair, and the same columns.
        label: label of the axis of values.
        title: title above the plot.
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
        axes.fill_between([], [], color=colour, alpha=0.6, label=name)  # adds an entry to the legend
    axes.set_xticks(places, columns, rotation=90)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.4)
    axes.legend(loc="lower left")  # loc="best" would take seconds
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)
