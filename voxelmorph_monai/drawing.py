"""Draw the picture of a registration, optionally in a separate process.

Importing and running matplotlib takes 1.5 s in one thread that holds Python's global lock. :func:`beside` starts a
process that imports it while this process does other work.
"""

import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.lazy import lazy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Row", "beside", "png", "serve"]

matplotlib, figures, effects = lazy("matplotlib"), lazy("matplotlib.figure"), lazy("matplotlib.patheffects")

Array = NDArray[Any]
_COLUMNS = ("moving", "fixed", "warped", "moving - fixed", "warped - fixed", "deformed grid", "change of volume")
_LINES = 30  # lines of the deformed grid along the longer side of a slice
_RANGE = 1.5  # largest change of volume shown, as a logarithm to base 2
_process: subprocess.Popen[bytes] | None = None


class Row(NamedTuple):
    """One row of the picture: a slice of a registration, and how to show it.

    Attributes:
        images: slices of moving, fixed, warped and determinant, ``(4, rows, columns)``, with the first row at the
            bottom.
        displacement: displacement to the right and up in pixels, ``(2, rows, columns)``.
        frame: ``[[first, last column], [first, last row]]`` to show, in pixels.
        sides: letters to write at the left and the right side, such as ``"LR"``.
        pixel: width and height of a pixel in mm.
    """

    images: Array
    displacement: Array
    frame: Array
    sides: str
    pixel: tuple[float, float]

    @property
    def height(self) -> float:
        """Height of the frame divided by its width, both in mm."""
        (left, right), (bottom, top) = self.frame
        return float((top - bottom) * self.pixel[1] / ((right - left) * self.pixel[0]))


def _draw_grid(axes: "Axes", displacement: Array) -> None:
    """Draw lines where the map takes rows and columns of the fixed image: ``displacement`` ``(2, rows, columns)``."""
    rows, columns = np.indices(displacement.shape[1:])
    x, y = columns + displacement[0], rows + displacement[1]
    step = max(1, max(rows.shape) // _LINES)
    for lines in ((x[::step], y[::step]), (x.T[::step], y.T[::step])):
        # One line, interrupted by NaN: 60 separate lines would take 0.2 s.
        axes.plot(*[np.pad(part, [(0, 0), (0, 1)], constant_values=np.nan).ravel() for part in lines], "gold", lw=0.5)


def _mark(axes: "Axes", sides: str, side: float) -> None:
    """Write the letters of the left and the right side into an image, and draw a scale bar.

    Args:
        axes: axes of the image.
        sides: the two letters.
        side: width of a pixel in mm.
    """
    look: dict[str, Any] = {
        "color": "white",
        "transform": axes.transAxes,
        "path_effects": [effects.withStroke(linewidth=2, foreground="black")],
    }
    plate = {"facecolor": "black", "edgecolor": "none", "pad": 1.5}  # legible on whatever is in the corner
    axes.text(0.03, 0.96, sides[0], ha="left", va="top", weight="bold", bbox=plate, **look)
    axes.text(0.97, 0.96, sides[1], ha="right", va="top", weight="bold", bbox=plate, **look)
    width = float(np.ptp(axes.get_xlim())) * side
    bar = next((mm for mm in (50, 20, 10, 5, 2, 1) if mm < 0.5 * width), 0.5 * width)
    axes.plot([0.96 - bar / width, 0.96], [0.04, 0.04], linewidth=2, scalex=False, scaley=False, clip_on=False, **look)
    axes.text(0.96, 0.06, f"{bar:g} mm", ha="right", va="bottom", fontsize=9, **look)


def _log2(determinant: Array) -> Array:
    """Logarithm to base 2, not below the range shown; folds become -9, which is drawn in another colour."""
    return np.where(determinant > 0, np.log2(np.maximum(determinant, 2.0**-_RANGE)), -9.0)


def _draw_row(panels: "Sequence[Axes]", row: Row, bright: float) -> None:
    moving, fixed, warped, determinant = row.images
    show: dict[str, Any] = {"origin": "lower", "aspect": row.pixel[1] / row.pixel[0]}
    grey = show | {"cmap": "gray", "vmin": 0, "vmax": bright}
    difference = show | {"cmap": "RdBu_r", "vmin": -bright, "vmax": bright}
    volume = matplotlib.colormaps["PuOr"].with_extremes(under="red")
    panels[0].imshow(moving, **grey)
    panels[1].imshow(fixed, **grey)
    panels[2].imshow(warped, **grey)
    panels[3].imshow(moving - fixed, **difference)
    panels[4].imshow(warped - fixed, **difference)
    panels[5].imshow(moving / 2, **grey)
    _draw_grid(panels[5], row.displacement)
    panels[6].imshow(_log2(determinant), **show, cmap=volume, vmin=-_RANGE, vmax=_RANGE)
    for panel in panels:
        panel.set(xlim=row.frame[0], ylim=row.frame[1])
        panel.set_axis_off()
    _mark(panels[0], row.sides, row.pixel[0])


def _draw(rows: Sequence[Row], bright: float, title: str) -> bytes:
    heights = [row.height for row in rows]
    # Fixed places: matplotlib's automatic layout would take as long as drawing.
    width, height = 17.5, 2.35 * sum(heights) + 0.75
    figure = figures.Figure(figsize=(width, height))
    places = {"left": 0.005, "right": 0.94, "bottom": 0.05 / height, "top": 1 - 0.7 / height, "wspace": 0.03}
    panels = figure.subplots(len(rows), 7, squeeze=False, height_ratios=heights, gridspec_kw=places | {"hspace": 0.03})
    for panel, name in zip(panels[0], _COLUMNS, strict=True):
        panel.set_title(name, fontsize=11)
    for row, line in zip(rows, panels, strict=True):
        _draw_row(line, row, bright)
    beside = figure.add_axes((0.947, 0.2, 0.008, 0.6))
    bar = figure.colorbar(panels[0, 6].images[0], cax=beside, ticks=[-1, 0, 1], extend="min")
    bar.ax.set_yticklabels(["-50 %", "0", "+100 %"])
    figure.suptitle(title, fontsize=12, y=1 - 0.1 / height, va="top")
    file = BytesIO()
    figure.savefig(file, dpi=80, pil_kwargs={"compress_level": 3})  # the default, 6, saves 5 % of the size in 0.1 s
    return file.getvalue()


@contextmanager
def beside() -> Iterator[None]:
    """Start a process that imports matplotlib and draws the next picture; if it cannot start, this process draws it."""
    global _process
    code = "from voxelmorph_monai.drawing import serve; serve()"
    process = None
    with suppress(OSError):
        process = _process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    try:
        yield
    finally:
        _process = None
        if process is not None:
            process.kill()
            process.communicate()


def serve() -> None:
    """Draw the rows that arrive on standard input (pickled), and write the PNG to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the process that waits for the picture
    blank = Row(np.zeros((4, 2, 2)), np.zeros((2, 2, 2)), np.array([[0, 1], [0, 1]]), "LR", (1, 1))
    _draw([blank], 1.0, "a first picture loads fonts and colours")
    with suppress(EOFError):  # the other process ended without a picture
        sys.stdout.buffer.write(_draw(*pickle.load(sys.stdin.buffer)))


def png(rows: Sequence[Row], bright: float, title: str = "") -> bytes:
    """Draw slices of a registration as a PNG.

    Args:
        rows: slices to show, from top to bottom.
        bright: intensity that is shown white.
        title: title above the slices.

    Returns:
        Content of the PNG file.
    """
    global _process
    process, _process = _process, None
    if process is not None:
        found, _ = process.communicate(pickle.dumps((rows, bright, title)))
        if process.returncode == 0 and found:
            return found
    return _draw(rows, bright, title)
