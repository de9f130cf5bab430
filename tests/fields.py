"""Displacements, maps and images on two oblique grids, for tests of transforms."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import Affine

FIXED, MOVING = (19, 23, 15), (21, 17, 25)


POINT = 1e-5  # mm: headers and displacements are float32, 60 mm off the origin


LPS = np.array([-1.0, -1.0, 1.0])


def grid(size: Any, axes: Any, sides: Any, angles: Any) -> Affine:
    """Affine of a grid about the origin of the world."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes @ np.diag(sides)
    affine[:3, 3] = [2.0, -3.0, 1.5] - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine


LIA, LAS = np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]]), np.diag([-1, 1, 1])


OBLIQUE = grid(FIXED, LIA, (2.0, 1.6, 3.0), (20, -35, 50))


MIRRORED = grid(MOVING, LAS, (1.8, 2.5, 1.4), (-8, 15, 30))


def smooth(size: Any, seed: int, reach: float = 2.0) -> NDArray[np.float64]:
    """Displacement in voxels, smooth, folding nowhere; it does not end in zeros."""
    rng = np.random.default_rng(seed)
    ddf = np.stack([gaussian_filter(rng.standard_normal(size), 3) for _ in size])
    return reach * ddf / np.abs(ddf).max()


def fade(ddf: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make a displacement end in zeros."""
    for axis, n in enumerate(ddf.shape[1:], 1):
        window = np.minimum(np.arange(n), np.arange(n)[::-1]).clip(max=4) / 4
        ddf = ddf * window.reshape(-1, *[1] * (3 - axis))
    return ddf


def affine_map() -> Affine:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", (9, -4, 6), degrees=True).as_matrix() @ np.diag([1.05, 0.95, 1.1])
    matrix[:3, 3] = [1.5, -2.0, 3.0]
    return matrix


def inner(num: int = 200, seed: int = 3) -> NDArray[np.float64]:
    """Points (RAS, mm) well within the fixed grid, between voxels."""
    index = np.random.default_rng(seed).uniform(4.5, np.array(FIXED) - 5.5, (num, 3))
    return index @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]


def image(size: Any = MOVING, seed: int = 5) -> NDArray[np.float32]:
    return (100 * gaussian_filter(np.random.default_rng(seed).random(size), 1)).astype(np.float32)


def read_submission(path: Path) -> NDArray[np.float32]:
    """Displacement ``(3, *spatial)`` in voxels, enlarged from a submitted file as in Learn2Reg's evaluation."""
    half = np.load(path)["arr_0"].astype(np.float32)
    return np.stack([zoom(component, 2, order=2) for component in half])
