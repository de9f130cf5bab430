"""Scans: images and label maps in physical space.

The whole package passes scans as :class:`Scan` objects, which are checked once, when they are created.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import SpatialImage
from numpy.typing import ArrayLike, NDArray

from voxelmorph_monai.affines import Affine, ImageGrid, check_affine, check_same_grid, require_right_angles, spacing
from voxelmorph_monai.io.formats import check_nifti, is_nifti, load_nibabel, scan_name, spatial_dims_of
from voxelmorph_monai.io.images import as_labels, open_volume, read_image, read_labels, save_image, save_image_as
from voxelmorph_monai.space.itk_bridge import from_itk

__all__ = ["Frame", "Plane", "Scan", "ScanLike"]

ScanLike = Any
"""A path, a :class:`Scan`, a nibabel image, a MONAI ``MetaTensor`` or an ITK image; see :meth:`Scan.of`."""


_UNNAMED = "scan"


class Scan:
    """An image or a label map in physical space; treat its voxels and its position as constant.

    A slice is a volume with one axis of length 1. A 2-D image is a slice ``(X, Y, 1)`` in the plane z = 0.

    Args:
        array: real, finite numbers ``(X, Y, Z)``, or ``(X, Y)`` for a 2-D image.
        affine: 4 x 4, from voxel indices to RAS in mm, with axes at right angles.
        name: name of the scan in messages, for example its path.
        header: NIfTI header to save the scan with; its position must be that of ``affine``.
        spatial_dims: 2 to save the scan as a 2-D image.

    Raises:
        TypeError: ``array`` does not hold real numbers.
        ValueError: the shape, the numbers or the affine are not those of a scan.

    >>> scan = Scan(np.eye(3, dtype=np.float32), np.diag([2.0, 2.0, 1.0, 1.0]), "example")
    >>> scan
    <Scan example: 3 x 3 x 1 voxels of 2 x 2 x 1 mm, RAS, float32>
    >>> scan.is_slice, scan.background
    (True, 0.0)
    """

    def __init__(
        self,
        array: ArrayLike,
        affine: ArrayLike,
        name: str = _UNNAMED,
        *,
        header: nib.Nifti1Header | None = None,
        spatial_dims: int | None = None,
    ) -> None:
        voxels, place = np.asarray(array), np.array(affine, dtype=np.float64)
        if voxels.dtype.kind not in "biuf":
            raise TypeError(f"{name} has voxels of type {voxels.dtype}, but a scan has real numbers.")
        if voxels.ndim not in (2, 3) or sorted(voxels.shape)[voxels.ndim - 2] < 2 or 0 in voxels.shape:
            raise ValueError(f"{name} has shape {voxels.shape}, but a scan is one volume (X, Y, Z) or one slice.")
        check_affine(place, name)
        require_right_angles(place, name)
        self.array: NDArray[Any] = voxels if voxels.ndim == 3 else voxels[..., None]
        self.affine: Affine = place
        self.name = name
        self.header = header
        self.spatial_dims = spatial_dims or voxels.ndim
        self._range = float(voxels.min()), float(voxels.max())
        if not np.isfinite(self._range).all():
            wrong = int(voxels.size - np.isfinite(voxels).sum())
            raise ValueError(f"{name} has {wrong} voxels that are NaN or infinite. Replace them, for example by 0.")

    @classmethod
    def read(cls, path: str | Path, series: int | None = None) -> "Scan":
        """Read an image as float32: NIfTI, MGZ, NRRD, MetaImage, DICOM, or another format that nibabel reads.

        Args:
            path: file or DICOM folder.
            series: number of the series if a folder holds several (:func:`~voxelmorph_monai.io.dicom.list_series`).

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a scan, the scan is constant, or programs disagree on its position.
        """
        return cls(*read_image(path, planar=True, series=series), str(path), **_header(Path(path)))

    @classmethod
    def read_labels(cls, path: str | Path, series: int | None = None) -> "Scan":
        """Read a label map as integers, from the same formats as :meth:`read`.

        Args:
            path: file or DICOM folder.
            series: as in :meth:`read`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a label map, or programs disagree on its position.
        """
        return cls(*read_labels(path, planar=True, series=series), str(path), **_header(Path(path)))

    @classmethod
    def of(cls, value: ScanLike, name: str, *, labels: bool = False) -> "Scan":
        """Convert a path, a Scan, a nibabel image, a ``MetaTensor`` or an ITK image to a scan.

        Args:
            value: object to convert.
            name: name in messages, unless the value has its own.
            labels: whether it is a label map; otherwise its intensities become float32, as in :meth:`read`.

        Raises:
            TypeError: the value is of another type; convert an array by ``Scan(array, affine)``.
            ValueError, FileNotFoundError: like :meth:`read` and :meth:`read_labels`.
        """
        if isinstance(value, cls):
            scan = value
        elif isinstance(value, str | Path):
            return cls.read_labels(value) if labels else cls.read(value)
        elif isinstance(value, SpatialImage):
            scan = cls._of_nibabel(value, value.get_filename() or name)
        elif hasattr(value, "affine") and hasattr(value, "meta"):
            array = value.detach().cpu().numpy()
            scan = cls(array[0] if array.ndim == 4 and len(array) == 1 else array, value.affine.cpu().numpy(), name)
        elif hasattr(value, "GetLargestPossibleRegion"):
            array, affine = from_itk(value)
            if array.ndim == 2:
                affine = np.insert(np.insert(affine, 2, 0, axis=0), 2, [0, 0, 1, 0], axis=1)
            scan = cls(array, affine, name)
        else:
            hint = " An array needs its affine: vxm.Scan(array, affine)." if hasattr(value, "ndim") else ""
            raise TypeError(
                f"{name} is a {type(value).__name__}. Give a path, a Scan, a nibabel image, a MetaTensor or an ITK "
                f"image.{hint}"
            )
        own = name if scan.name == _UNNAMED else scan.name
        voxels = as_labels(scan.array, own) if labels else scan.array.astype(np.float32, copy=False)
        return scan if voxels is scan.array and own == scan.name else scan.like(voxels, own)

    @classmethod
    def _of_nibabel(cls, image: SpatialImage, name: str) -> "Scan":
        header = None
        if isinstance(image, nib.Nifti1Pair):
            header = image.header
            check_nifti(header, Path(name), image.shape[:3])
        shape = image.shape[:3] if all(n == 1 for n in image.shape[3:]) else image.shape
        return cls(np.asanyarray(image.dataobj).reshape(shape), image.affine, name, header=header)

    def like(self, array: NDArray[Any], name: str | None = None) -> "Scan":
        """Create a scan with other voxels ``(X, Y, Z)`` but the same position and header."""
        return Scan(array, self.affine, name or self.name, header=self.header, spatial_dims=self.spatial_dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of voxels along each axis, ``(X, Y, Z)``."""
        return self.array.shape

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Distance between neighbouring voxels along each axis, in mm, ``(3,)``."""
        return spacing(self.affine)

    @property
    def grid(self) -> ImageGrid:
        """Size and position of the voxels."""
        return ImageGrid(self.shape, self.affine)

    @property
    def orientation(self) -> str:
        """Directions of the axes, for example ``"LIA"``: left, inferior, anterior."""
        return "".join(aff2axcodes(self.affine))

    @property
    def is_slice(self) -> bool:
        """Whether one axis has length 1."""
        return 1 in self.shape

    @cached_property
    def background(self) -> float:
        """Intensity of the background: 0, or the lowest intensity if that is far below 0, as in CT (Hounsfield units).

        >>> [Scan(np.reshape(values, (1, 1, 3)) * np.ones((2, 2, 1)), np.eye(4)).background
        ...  for values in ([-1000, 40, 700], [-2, 0, 40])]  # interpolation undershoots a little
        [-1000.0, 0.0]
        """
        low, high = min(self._range[0], 0.0), max(self._range[1], 0.0)
        return low if low < -0.1 * high else 0.0

    @property
    def shows_something(self) -> bool:
        """Whether any voxel lies above the background."""
        return self._range[1] > self.background

    def check_same_grid(self, other: "Scan") -> None:
        """Raise ValueError unless another scan, such as its label map, is on the same grid."""
        check_same_grid(self.grid, other.grid, (self.name, other.name))

    def save(self, path: str | Path) -> None:
        """Write a NIfTI file (``.nii``, ``.nii.gz``) in the type of the voxels, completely or not at all.

        A scan that was read from NIfTI keeps the position, units and description of its header.
        """
        Frame(self.name, self.grid, self.header, self.spatial_dims).save(path, self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Let NumPy functions take a scan as an array of its voxels."""
        return np.array(self.array, dtype=dtype) if copy else np.asarray(self.array, dtype=dtype)

    def __repr__(self) -> str:
        size, sides = (" x ".join(f"{n:.4g}" for n in values) for values in (self.shape, self.spacing))
        return (
            f"<Scan {scan_name(self.name)}: {size} voxels of {sides} mm, {self.orientation}, {self.array.dtype.name}>"
        )


def _header(path: Path) -> dict[str, Any]:
    """NIfTI header and number of dimensions of a file, with which its scan is saved."""
    header = load_nibabel(path).header if is_nifti(path) else None
    return {"header": header, "spatial_dims": spatial_dims_of(path)}


class Frame(NamedTuple):
    """Header of a scan, without its voxels: their position, and how to save other voxels in the same way.

    Attributes:
        name: name of the scan in messages.
        grid: size and affine (RAS, mm).
        header: NIfTI header; None for other formats.
        spatial_dims: 2 for a 2-D image, otherwise 3.
    """

    name: str
    grid: ImageGrid
    header: nib.Nifti1Header | None
    spatial_dims: int

    @classmethod
    def read(cls, path: str | Path, *, planar: bool = True, series: int | None = None) -> "Frame":
        """Read the header of a file.

        Args:
            path: file or DICOM folder, in a format of :meth:`Scan.read`.
            planar: also accept a slice or a 2-D image.
            series: as in :meth:`Scan.read`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not one volume with axes at right angles, or programs disagree on its position.
        """
        volume, affine = open_volume(path, planar=planar, series=series)
        require_right_angles(affine, str(path))
        return cls(str(path), ImageGrid(volume.shape, affine), **_header(Path(path)))

    def save(self, path: str | Path, array: NDArray[Any]) -> None:
        """Write voxels ``(X, Y, Z)`` on this grid and with this header as NIfTI, completely or not at all."""
        if self.header is None:
            save_image(path, array, self.grid.affine, self.spatial_dims)
        else:
            save_image_as(path, array, self.grid.affine, self.header)


class Plane(NamedTuple):
    """Plane of a slice, with an origin and axes that do not depend on the axes of the slice's array.

    Values are never interpolated across a slice, which is treated as infinitely thick. In coordinates of the plane, a
    slice is a 2-D image: an array ``(X, Y)`` with a 3 x 3 affine.

    Attributes:
        matrix: 4 x 4, rigid, from coordinates of the plane in mm (two within the plane, one across it) to RAS; the
            identity for the plane z = 0.
    """

    matrix: Affine

    @classmethod
    def of(cls, scan: Scan, like: "Plane | None" = None) -> "Plane":
        """Plane of a slice.

        Args:
            scan: the slice.
            like: plane whose axes to follow (default: the nearest axes of RAS).
        """
        affine = scan.affine
        along = [axis for axis in range(3) if axis != _across(scan.shape)]
        normal = np.cross(*affine[:3, along].T)
        nearest = np.roll(
            np.eye(3), -1 - int(np.argmax(np.abs(normal))), axis=1
        )  # the axis across the plane comes last
        axes = nearest if like is None else like.matrix[:3, :3]
        normal *= np.sign(normal @ axes[:, 2]) / np.linalg.norm(normal)
        first = axes[:, 0] - normal * (normal @ axes[:, 0])
        first /= np.linalg.norm(first)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([first, np.cross(normal, first), normal], axis=1)
        matrix[:3, 3] = normal * (normal @ affine[:3, 3])
        return cls(matrix)

    def flatten(self, scan: Scan) -> tuple[NDArray[Any], Affine]:
        """Convert a slice to coordinates of the plane: an array ``(X, Y)`` and its 3 x 3 affine."""
        across, within = _across(scan.shape), np.linalg.inv(self.matrix) @ scan.affine
        return scan.array.squeeze(across), np.delete(np.delete(within, across, axis=1), 2, axis=0)

    def place(self, matrix: Affine) -> Affine:
        """Convert a 3 x 3 affine into coordinates of the plane to a 4 x 4 affine into RAS, third axis across it."""
        placed = np.eye(4)
        placed[np.ix_([0, 1, 3], [0, 1, 3])] = matrix
        return self.matrix @ placed

    def map_to(self, target: "Plane", matrix: Affine) -> Affine:
        """Convert ``matrix``, 3 x 3, from coordinates of this plane to those of ``target``, to a 4 x 4 map in RAS."""
        return target.place(matrix) @ np.linalg.inv(self.matrix)


def _across(shape: Sequence[int]) -> int:
    """Axis across a slice of this shape."""
    return list(shape).index(1)
