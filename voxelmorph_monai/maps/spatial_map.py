"""The map between two scans that a registration finds, and functions that warp scans with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelmorph_monai.affines import Affine, ImageGrid, apply_affine, in_plane, inside, slabs
from voxelmorph_monai.io.formats import scan_name
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.maps.displacements import lps_vectors, read_displacement
from voxelmorph_monai.maps.itk_files import read_chain_file, save_chain_file
from voxelmorph_monai.space.itk_bridge import Transform, linear_transform, set_grid
from voxelmorph_monai.space.resampling import loops_for
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.switch import compiled_module

__all__ = [
    "INTERPOLATIONS",
    "LABEL_INTERPOLATIONS",
    "Displacement",
    "SpatialMap",
    "map_name",
    "warp_scan",
    "warp_to_grid",
]

itk, ndimage = lazy("itk"), lazy("scipy.ndimage")

INTERPOLATIONS = ("linear", "nearest", "bspline", "lanczos")
"""Interpolations of images: ``"bspline"`` is cubic, ``"lanczos"`` a windowed sinc of radius 3."""

LABEL_INTERPOLATIONS = ("nearest", "linear")
"""Interpolations of label maps: label of the nearest voxel, or label with the largest linearly interpolated weight."""


def _within(index: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.float64]:
    """Set the coordinate across a slice to 0, as SciPy would treat rounding errors in it as outside."""
    index[np.array(shape) == 1] = 0.0
    return index


class Displacement(NamedTuple):
    """A displacement on a grid.

    Attributes:
        ddf: ``(3, X, Y, Z)`` in voxels of the grid.
        affine: affine of the grid (RAS, mm).
    """

    ddf: NDArray[np.floating[Any]]
    affine: Affine


class SpatialMap(NamedTuple):
    r"""Map of points in RAS mm, :math:`p \mapsto B A (x + u(x))` with :math:`x = A^{-1} P p`.

    Attributes:
        pre: 4 x 4 matrix :math:`P`, applied first: from the space of the points to the space of the displacement.
        post: 4 x 4 matrix :math:`B`, applied last.
        field: displacement :math:`u` on a grid with the affine :math:`A`, or None. As in ITK, the displacement is 0
            outside the grid, so it should taper to 0 at the border.
        spatial_dims: 2 to save a map that keeps the plane z = 0 as a transform of 2-D images.
        name: name of the map to show, such as ``moving -> fixed``.
    """

    pre: NDArray[np.floating[Any]]
    post: NDArray[np.floating[Any]]
    field: Displacement | None = None
    spatial_dims: int = 3
    name: str = "map"

    def __repr__(self) -> str:
        field = "linear"
        if self.field is not None:
            field = f"displacement on {' x '.join(map(str, self.field.ddf.shape[1:]))} voxels"
        return f"<SpatialMap {self.name}: {field}, {self.spatial_dims}-D>"

    @property
    def linear(self) -> NDArray[np.floating[Any]]:
        """Linear part of the map, without its displacement: a 4 x 4 matrix."""
        return self.post @ self.pre

    def _map(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map ``points`` ``(3, ...)``."""
        points = apply_affine(self.pre, points)
        if self.field is not None:
            ddf, affine = self.field
            index = _within(apply_affine(np.linalg.inv(affine), points), ddf.shape[1:])
            loops = compiled_module("scan_loops")
            if loops is not None:
                offset = loops.displace(ddf, index)
            else:
                offset = np.stack([ndimage.map_coordinates(u, index, np.float64, order=1, mode="nearest") for u in ddf])
                offset *= inside(index, ddf.shape[1:])
            points = points + np.tensordot(affine[:3, :3], offset, axes=1)
        return apply_affine(self.post, points)

    def apply(self, points: ArrayLike) -> NDArray[np.float64]:
        """Map ``points`` ``(N, 3)`` in RAS mm; returns ``(N, 3)``."""
        given = np.asarray(points, dtype=np.float64)
        if given.ndim != 2 or given.shape[1] != 3:
            raise ValueError(f"points have shape {given.shape}. Give (N, 3), in mm (RAS).")
        return self._map(given.T).T

    def on_grid(self, grid: ImageGrid) -> NDArray[np.float32]:
        """Sample the whole map as one displacement ``(3, X, Y, Z)`` in voxels of a grid."""
        back, loops = np.linalg.inv(grid.affine), compiled_module("scan_loops")
        if loops is not None and self.field is not None:  # 15 times less processor time than SciPy
            to_field = np.linalg.inv(self.field.affine) @ self.pre @ grid.affine
            after = (back @ self.post @ self.field.affine)[:3, :3]
            return loops.bend(self.field.ddf, to_field, back @ self.linear @ grid.affine, after, grid.size)
        ddf = np.empty((3, *grid.size), dtype=np.float32)
        for part, index in slabs(grid.size):
            ddf[:, part] = apply_affine(back, self._map(apply_affine(grid.affine, index))) - index
        return ddf

    @classmethod
    def read(cls, path: str | Path) -> "SpatialMap | None":
        """Read a 3-D map from :meth:`save` or :func:`~voxelmorph_monai.maps.displacements.save_displacement`.

        Returns None for other transform files; :func:`~voxelmorph_monai.maps.files.read_chain` reads those.

        Raises:
            ValueError: the file is NIfTI, but cannot be used as a displacement.
        """
        if str(path).endswith((".nii", ".nii.gz")):
            ddf, affine = read_displacement(path)
            return cls(np.eye(4), np.eye(4), Displacement(ddf, affine)) if len(ddf) == 3 else None
        if not str(path).endswith((".h5", ".hdf5")):
            return None
        parts = read_chain_file(path)
        linear, field = [np.eye(4), np.eye(4)], None  # what comes before the displacement, and after it
        for part in parts or ():
            if not isinstance(part, tuple):
                linear[field is not None] = part @ linear[field is not None]
            elif field is None:
                field = Displacement(*part)
            else:
                return None
        return cls(linear[0], linear[1], field) if parts else None

    def to_itk(self) -> Transform:
        """Convert to an ITK composite transform (LPS) in float32, with errors of at most 1e-5 mm in a brain."""
        dims = self.spatial_dims
        restrict = in_plane if dims == 2 else np.asarray
        composite = itk.CompositeTransform[itk.F, dims].New()
        composite.AddTransform(
            linear_transform(restrict(self.post), double=False)
        )  # ITK applies what was added last first
        if self.field is not None:
            ddf, affine = self.field
            vectors = lps_vectors(ddf, affine).astype(np.float32).transpose(2, 1, 0, 3)
            if dims == 2:
                vectors = vectors[0, ..., :2]
            kind = itk.Image[itk.Vector[itk.F, dims], dims]
            image = itk.image_from_array(np.ascontiguousarray(vectors), ttype=kind)
            set_grid(image, restrict(affine))
            transform = itk.DisplacementFieldTransform[itk.F, dims].New()
            transform.SetDisplacementField(image)
            composite.AddTransform(transform)
        composite.AddTransform(linear_transform(restrict(self.pre), double=False))
        return composite

    def save(self, path: str | Path) -> None:
        """Write the map as an ITK transform ``.h5``, completely or not at all."""
        middle = [] if self.field is None else [(self.field.ddf, self.field.affine)]
        save_chain_file(path, [self.pre, *middle, self.post], self.spatial_dims)


def map_name(source: Scan, target: Scan) -> str:
    """Name of a map that takes points of ``source`` to points of ``target``."""
    return f"{scan_name(source.name)} -> {scan_name(target.name)}"


def warp_to_grid(
    scan: Scan, ddf: NDArray[np.floating[Any]], grid: ImageGrid, order: int = 1, outside: float = 0.0
) -> NDArray[Any]:
    """Warp a scan to a grid by a displacement, with a single interpolation: ``(X, Y, Z)`` in the type of the scan.

    Args:
        scan: scan to warp.
        ddf: ``(3, X, Y, Z)`` in voxels of the grid, from points of the grid to points of ``scan``.
        grid: size and affine of the grid.
        order: 1 for linear, 0 for nearest-neighbour interpolation, which suits labels.
        outside: value more than half a voxel beyond the outermost voxels of ``scan`` (default: 0, as in ITK).
    """
    to_voxels = np.linalg.inv(scan.affine) @ grid.affine
    loops = loops_for(scan, order)
    if loops is not None:
        return loops.pull(scan.array, to_voxels, ddf.shape[1:], ddf, order, outside, 0.5)
    warped = np.zeros(ddf.shape[1:], dtype=scan.array.dtype)
    for part, index in slabs(ddf.shape[1:]):
        at = _within(apply_affine(to_voxels, index + ddf[:, part]), scan.shape)
        values = ndimage.map_coordinates(scan.array, at, scan.array.dtype, order=order, mode="nearest")
        warped[part] = np.where(inside(at, scan.shape), values, outside)
    return warped


def warp_scan(scan: Scan, ddf: NDArray[np.floating[Any]], like: Scan, order: int = 1, outside: float = 0.0) -> Scan:
    """Warp a scan to the grid of ``like`` with :func:`warp_to_grid`; the result has the header of ``like``."""
    return like.like(warp_to_grid(scan, ddf, like.grid, order, outside), scan.name)
