"""Draw the figures of the documentation: ``python docs/make_figures.py``, in the folder where ``vxm quickstart`` ran.

What they show is computed by the package, so that a picture cannot contradict the code.
"""

import doctest
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import ndimage

from voxelmorph_monai.affines import apply_affine
from voxelmorph_monai.blocks import identity_grid, integrate, warp
from voxelmorph_monai.maps.chains import map_points
from voxelmorph_monai.maps.files import read_chain
from voxelmorph_monai.space.scan import Scan

__all__ = ["animation", "conventions", "gallery", "picture"]

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


def _slices(brain: NDArray[np.bool_], margin: int = 6) -> list[NDArray[np.intp]]:
    """Voxels ``(3, rows, columns)`` of a coronal, an axial and a sagittal slice, upright and off the midline."""
    slices = []
    for axis, place in ((1, 0.5), (2, 0.5), (0, 0.33)):
        ranges = [np.arange(each.min() - margin, each.max() + margin + 1) for each in np.nonzero(brain)]
        ranges[axis] = ranges[axis][[int(place * len(ranges[axis]))]]
        slices.append(np.squeeze(np.stack(np.meshgrid(*ranges, indexing="ij")), axis + 1).transpose(0, 2, 1)[:, ::-1])
    return slices


def _frame(pictures: list[NDArray[Any]], outlines: list[NDArray[np.bool_]]) -> Image.Image:
    """Pictures from 0 to 1 beside each other, with outlines drawn over them."""
    height = max(picture.shape[0] for picture in pictures)
    panels = []
    for picture, outline in zip(pictures, outlines, strict=True):
        panel = np.repeat((255 * np.clip(picture, 0, 1)).astype(np.uint8)[..., None], 3, axis=-1)
        panel[outline] = 255, 140, 0
        above = height - picture.shape[0]
        panels.append(np.pad(panel, ((above // 2, above - above // 2), (2, 2), (0, 0))))
    return Image.fromarray(np.concatenate(panels, axis=1))


def animation(path: Path, quickstart: Path, *, frames: int = 10) -> None:
    """Bend Colin27 from its affine alignment to the end of its registration, under the outlines of MNI152.

    Args:
        path: GIF to write.
        quickstart: what ``vxm quickstart`` wrote.
        frames: from the beginning to the end.
    """
    fixed, moving = (Scan.read(quickstart / "scans" / f"{name}.nii.gz") for name in ("mni152", "colin27"))
    tissue = Scan.read_labels(quickstart / "scans" / "mni152_tissue.nii.gz").array
    slices = _slices(tissue > 0)
    points = [apply_affine(fixed.affine, index.reshape(3, -1).astype(float)) for index in slices]
    forward = read_chain([str(quickstart / "registered" / "forward.h5")]).transform
    ends = [map_points(forward, each.T).T for each in points]
    homogeneous = np.vstack([np.hstack(points), np.ones(sum(each.shape[1] for each in points))])
    affine = np.linalg.lstsq(homogeneous.T, np.hstack(ends).T, rcond=None)[0].T  # what is linear of the map
    outlines = []
    for index in slices:
        white = tissue[tuple(index)] == 3
        outlines.append(white & ~ndimage.binary_erosion(white))
    pictures, brightest = [], 1.2 * np.percentile(moving.array[moving.array > 0], 99)
    for share in (1 - np.cos(np.pi * np.arange(frames) / (frames - 1))) / 2:
        panels = []
        for index, start, end in zip(slices, points, ends, strict=True):
            begin = affine[:, :3] @ start + affine[:, 3:]
            where = apply_affine(np.linalg.inv(moving.affine), begin + share * (end - begin))
            panels.append(ndimage.map_coordinates(moving.array, where, order=1).reshape(index.shape[1:]) / brightest)
        pictures.append(_frame(panels, outlines).quantize(48))
    loop = [*pictures, *pictures[-2:0:-1]]
    durations = [1200 if picture is pictures[0] or picture is pictures[-1] else 70 for picture in loop]
    loop[0].save(path, save_all=True, append_images=loop[1:], duration=durations, loop=0, optimize=True)


def picture(path: Path, quickstart: Path) -> None:
    """Save ``report.png`` of ``vxm quickstart`` in 256 colours, which halves its size."""
    Image.open(quickstart / "registered" / "report.png").convert("RGB").quantize().save(path, optimize=True)


def gallery(page: Path, figures: Path) -> None:
    """Run the code of the page, which saves its pictures, in the folder of figures."""
    code = "".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), 0)
    before = os.getcwd()
    os.chdir(figures)
    try:
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    finally:
        os.chdir(before)


if __name__ == "__main__":
    docs = Path(__file__).parent
    conventions(docs / "figures" / "conventions.png")
    gallery(docs / "gallery.md", docs / "figures")
    animation(docs / "figures" / "registration.gif", Path("quickstart"))
    picture(docs / "figures" / "quickstart.png", Path("quickstart"))
