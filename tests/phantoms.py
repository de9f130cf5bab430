"""Bodies without symmetry on grids of every orientation, as arrays and in files."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.io.images import save_image


def placed(angles: tuple[float, float, float], sides: tuple[float, float, float], axes: NDArray[Any]) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes @ np.diag(sides)
    affine[:3, 3] = np.array([4.0, -6.0, 9.0]) - affine[:3, :3] @ ((np.array(SIZE) - 1) / 2)
    return affine


SIZE = (26, 31, 23)


RAS, LAS, LIA = np.eye(3), np.diag([-1.0, 1, 1]), np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


AFFINES = {
    "straight": placed((0, 0, 0), (4, 4, 4), RAS),
    "flipped": placed((0, 0, 0), (4.4, 3.6, 4.8), LAS),
    "oblique": placed((20, -35, 50), (4.2, 3.5, 5.1), LIA),
    "mirrored oblique": placed((-8, 15, 100), (3.7, 4.3, 4.9), LAS),
}


def world(affine: Affine, size: tuple[int, ...] = SIZE) -> NDArray[Any]:
    """Points (RAS, mm) of a grid: ``(3, *size)``."""
    return np.tensordot(affine[:3, :3], np.indices(size), 1) + affine[:3, 3].reshape(3, 1, 1, 1)


def phantom(affine: Affine, bend: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Image (0 to 800) and labels (0, 40, 7, 300) of a body without symmetry in the world, on the grid of an affine."""
    x, y, z = world(affine) - np.array([4.0, -6.0, 9.0]).reshape(3, 1, 1, 1)
    x = x + bend * np.sin(y / 15)
    radius = np.sqrt((x / 34) ** 2 + (y / 42) ** 2 + (z / 30) ** 2 + 0.2 * (x + 10) * z / 1000)
    core = np.sqrt(((x - 12) / 11) ** 2 + ((y + 9) / 16) ** 2 + ((z - 4) / 9) ** 2)
    image = 400 / (1 + np.exp(12 * (radius - 0.9))) + 400 / (1 + np.exp(6 * (core - 1)))
    labels = np.where(radius < 0.9, 40, 0) + np.where(core < 1, -33, 0) + np.where((radius < 0.9) & (y > 20), 260, 0)
    return np.where(image > 8, image, 0).astype(np.float32), labels.clip(0).astype(np.int16)


class Write:
    """Scans and labels in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, affine: Affine, bend: float = 0.0) -> dict[str, Path]:
        image, labels = phantom(affine, bend)
        paths = {name: self.folder / f"{name}.nii.gz", f"{name}_labels": self.folder / f"{name}_labels.nii.gz"}
        for path, array in zip(paths.values(), (image, labels), strict=True):
            save_image(path, array, affine)
        return paths
