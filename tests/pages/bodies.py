"""Registrations whose truth is known: maps that are given, not found."""

from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import Affine, ImageGrid, apply_affine
from voxelmorph_monai.apps.result import RegistrationResult
from voxelmorph_monai.maps.spatial_map import Displacement, SpatialMap, warp_scan
from voxelmorph_monai.space.scan import Scan

SIZE = (44, 50, 42)
SIDE = 4.1  # mm
OPTIONS = {
    "space": "fixed",
    "alignment": "affine",
    "budget": 0.0,
    "steps": None,
    "similarity": "lncc",
    "preset": None,
    "grid": None,
}


def grid_of(codes: str = "RAS", size: tuple[int, ...] = SIZE, spacing: tuple[float, ...] = (SIDE,) * 3) -> Affine:
    """Affine of a grid with these axes, or oblique ones (``OBL``), around the origin."""
    affine = np.diag([*spacing, 1.0])
    if codes == "OBL":
        affine[:3, :3] = Rotation.from_euler("xyz", (12, -7, 20), degrees=True).as_matrix() @ affine[:3, :3]
    elif codes != "RAS":
        change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
        turned = np.diag([*np.abs(inv_ornt_aff(change, size)[:3, :3].T @ spacing), 1.0])
        affine = inv_ornt_aff(change, size)
        affine[:3, :3] = affine[:3, :3] * np.diag(turned)[:3]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine


def points_of(affine: Affine, size: tuple[int, ...] = SIZE) -> NDArray[Any]:
    """Points (RAS, mm) of a grid ``(3, *size)``."""
    return apply_affine(affine, np.indices(size))


def ball(points: NDArray[Any], centre: tuple[float, ...], radii: tuple[float, ...]) -> NDArray[np.bool_]:
    """Whether points lie in an ellipsoid."""
    parts = ((p - c) / r for p, c, r in zip(points, centre, radii, strict=True))
    return sum(part**2 for part in parts) < 1  # type: ignore[no-any-return]


def head(affine: Affine, size: tuple[int, ...] = SIZE, name: str = "scan", centre: Any = (0, 0, 0)) -> Scan:
    """Skin, brain, and a bright ball in it on the patient's left."""
    points = points_of(affine, size) - np.reshape(centre, (3, 1, 1, 1))
    image = np.random.default_rng(0).normal(0, 3, size)
    image += 40 * ball(points, (0, 0, 0), (75, 95, 85)) + 80 * ball(points, (0, 0, 0), (65, 82, 65))
    image += 100 * ball(points, (-30, 20, 20), (9, 9, 9)) - 60 * ball(points, (10, -30, 5), (14, 9, 12))
    return Scan(image.clip(0).astype(np.float32), affine, name)


def chest(affine: Affine, size: tuple[int, ...], name: str = "chest") -> Scan:
    """A CT in Hounsfield units: fat around soft tissue, lungs, ribs, spine, heart, liver; the ends are cut off."""
    x, y, z = points_of(affine, size)
    out = np.full(size, -1000.0)
    body, wall = np.sqrt((x / 150) ** 2 + (y / 100) ** 2), np.sqrt((x / 135) ** 2 + (y / 88) ** 2)
    out = np.where(body < 1, 40 + 25 * np.sin(x / 25) * np.cos(y / 30) * np.sin(z / 28), out)
    for side in (-1, 1):
        out[ball((x, y, z), (side * 70, 10, 10), (45, 55, 90))] = -820  # type: ignore[arg-type]
    out = np.where((x / 16) ** 2 + ((y + 70) / 18) ** 2 < 1, 500 + 200 * np.sin(z / 9), out)
    out[(np.abs(wall - 1) < 0.06) & (np.sin((z + 0.3 * y) / 6) > 0.2) & (z > -80)] = 700
    out[ball((x, y, z), (20, 40, 0), (40, 35, 45))] = 160  # type: ignore[arg-type]
    out[ball((x, y, z), (50, 5, -90), (60, 40, 40))] = 110  # type: ignore[arg-type]
    noise = np.random.default_rng(0).normal(0, 12, size)
    return Scan((out + noise).round().astype(np.int16), affine, name)


def labels_of(scan: Scan, numbers: tuple[int, ...] = (2, 41, 10, 49, 17, 53)) -> Scan:
    """FreeSurfer's numbers: halves of the brain, and two nuclei in each, the first of each pair on the left."""
    points = points_of(scan.affine, scan.shape)
    labels = np.zeros(scan.shape, np.int16)
    brain = ball(points, (0, 0, 0), (65, 82, 65))
    labels[brain & (points[0] < 0)] = numbers[0]
    labels[brain & (points[0] >= 0)] = numbers[1]
    for number, sign in zip(numbers[2:4], (-1, 1), strict=True):
        labels[ball(points, (sign * 18, -5, 5), (14, 16, 14))] = number
    for number, sign in zip(numbers[4:], (-1, 1), strict=True):
        labels[ball(points, (sign * 35, -20, -15), (14, 18, 12))] = number
    return scan.like(labels, "labels")


def wave(affine: Affine, size: tuple[int, ...] = SIZE, height: float = 1.2) -> Displacement:
    """A smooth displacement that ends in zeros: ``height`` voxels at most along each axis."""
    index = np.indices(size) / np.reshape(size, (3, 1, 1, 1))
    fade = np.prod(np.sin(np.pi * index), axis=0)
    ddf = np.stack([fade * np.sin(2 * np.pi * index[(d + 1) % 3] + d) for d in range(3)])
    return Displacement((height * ddf).astype(np.float32), affine)


def registered(
    fixed: Scan,
    moving: Scan,
    matrix: Affine | None = None,
    field: Displacement | None = None,
    **given: Any,
) -> RegistrationResult:
    """The registration whose map is ``matrix`` after ``field`` (default: nothing)."""
    matrix = np.eye(4) if matrix is None else matrix
    forward = SpatialMap(np.eye(4), matrix, field)
    back = None if field is None else Displacement(-field.ddf, field.affine)  # good to 0.1 voxels for a small one
    inverse = SpatialMap(np.linalg.inv(matrix), np.eye(4), back)
    ddf = forward.on_grid(ImageGrid(fixed.shape, fixed.affine))
    labels = given.get("moving_labels")
    found = {
        "moving_labels": labels,
        "fixed_labels": None,
        "warped_labels": None if labels is None else warp_scan(labels, ddf, fixed, order=0),
        "options": OPTIONS,
        "seconds": {"affine": 1.0, "warp": 0.5},
    }
    return RegistrationResult(
        moving=moving,
        fixed=fixed,
        warped=warp_scan(moving, ddf, fixed),
        forward=forward,
        inverse=inverse,
        ddf=ddf,
        grid=None,
        **{**found, **given},
    )
