"""Draw the figures of the documentation: ``python docs/make_figures.py``.

What they show is computed by the package, so that a picture cannot contradict the code.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from numpy.typing import ArrayLike, NDArray

from voxelmorph_monai.blocks import identity_grid, integrate, warp

__all__ = ["conventions"]

SIZE = (14, 18)  # unequal, so that a swapped axis would be seen
VOXEL = (4, 11)  # whose arrow is drawn
MOVING, FIXED = "#d95f02", "#1b7a8c"


def _letter() -> torch.Tensor:
    """Picture ``(1, 1, *SIZE)`` without any symmetry: an F with shaded strokes."""
    image = torch.zeros(1, 1, *SIZE)
    image[..., 2:12, 5:7] = 0.85
    image[..., 2:4, 5:14] = 1.0
    image[..., 6:8, 5:12] = 0.6
    return image


def _displacement() -> torch.Tensor:
    """Smooth displacement ``(1, 2, *SIZE)`` in voxels, with a different shape along each axis."""
    x, y = identity_grid(_letter())[0]
    bump = torch.exp(-((x - 5) ** 2) / 18 - (y - 10) ** 2 / 30)
    return integrate(torch.stack([3.2 * bump, -4.2 * bump])[None])


def _show(axes: Axes, image: torch.Tensor, title: str, colour: str) -> None:
    axes.imshow(image[0, 0], cmap="gray_r", vmin=0, vmax=2.2)
    axes.set_title(title, color=colour, fontsize=11)
    axes.set_xlabel("array axis 1 (voxels)")
    axes.set_ylabel("array axis 0 (voxels)")
    axes.set(xticks=range(0, SIZE[1], 3), yticks=range(0, SIZE[0], 3))
    axes.tick_params(length=2)
    for spine in axes.spines.values():
        spine.set_color("0.7")


def _lines(axes: Axes, points: NDArray[np.float32], colour: str) -> None:
    """Draw the lines through ``points`` ``(2, rows, columns)``, given as array axis 0, array axis 1."""
    style: dict[str, Any] = {"color": colour, "linewidth": 0.6, "alpha": 0.7}
    axes.plot(points[1].T, points[0].T, **style)
    axes.plot(points[1], points[0], **style)


def _label(axes: Axes, text: str, *, at: tuple[float, float], to: ArrayLike, colour: str) -> None:
    """Write ``text`` with its left end ``at`` a point, with a line ``to`` another (both: array axis 0, axis 1)."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
    line = {"arrowstyle": "-", "color": colour, "shrinkB": 3}
    axes.annotate(
        text,
        np.asarray(to)[::-1],
        at[::-1],
        color=colour,
        fontsize=12,
        va="center",
        arrowprops=line,
        bbox=box,
        zorder=6,
    )


def conventions(path: Path) -> None:
    """Draw both grids, the arrow of one voxel, and what is read and written along it."""
    moving, ddf = _letter(), _displacement()
    warped = warp(moving, ddf)
    x = np.array(VOXEL, dtype=float)
    u = ddf[0, :, VOXEL[0], VOXEL[1]].numpy()
    target = x + u
    figure = Figure(figsize=(11, 5.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    _show(left, warped, "fixed grid, with the warped image", FIXED)
    _show(right, moving, r"moving image, with the fixed grid where $\varphi$ takes it", MOVING)
    grid = identity_grid(ddf)
    _lines(left, grid[0].numpy(), FIXED)
    _lines(right, (grid + ddf)[0].numpy(), FIXED)

    left.add_patch(Rectangle((x[1] - 0.5, x[0] - 0.5), 1, 1, fill=False, edgecolor=FIXED, linewidth=2.2))
    _label(left, f"voxel x = ({VOXEL[0]}, {VOXEL[1]})", at=(8.2, 10.2), to=(x[0] + 0.5, x[1]), colour=FIXED)
    arrow = {"arrowstyle": "-|>", "color": MOVING, "linewidth": 2.4, "shrinkA": 4, "shrinkB": 0, "mutation_scale": 18}
    right.annotate("", tuple(target[::-1]), tuple(x[::-1]), arrowprops=arrow, zorder=4)
    right.plot(x[1], x[0], "o", markersize=7, markerfacecolor="white", markeredgecolor=FIXED, zorder=5)
    _label(right, "x", at=(3.4, 11.4), to=x, colour=FIXED)
    _label(right, f"u(x) = ({u[0]:+.1f}, {u[1]:+.1f}) voxels", at=(9.1, 9.2), to=x + 0.5 * u, colour=MOVING)
    _label(right, rf"$\varphi$(x) = ({target[0]:.1f}, {target[1]:.1f})", at=(11.3, 7.6), to=target, colour=MOVING)
    figure.add_artist(
        ConnectionPatch(
            tuple(target[::-1]),
            tuple(x[::-1]),
            "data",
            "data",
            axesA=right,
            axesB=left,
            arrowstyle="-|>",
            linestyle="--",
            color="0.2",
            mutation_scale=16,
            shrinkA=3,
            shrinkB=9,
            connectionstyle="arc3,rad=0.1",
        )
    )
    figure.supxlabel(
        r"warped(x) = moving($\varphi$(x)),  $\varphi$(x) = x + u(x):  u points to where the value is read, "
        "so the picture moves against the arrow",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    conventions(Path(__file__).parent / "figures" / "conventions.png")
