"""Physical space at the border of the package: files, affines, ITK.

An ``affine`` is nibabel's: a 4 x 4 matrix that takes voxel indices to millimetres in RAS (x grows to the right, y to
the front, z up). ITK and its files count in LPS: the first two coordinates change sign, here and, as scans are read by
ITK, in :mod:`~voxelmorph_monai.formats`; nowhere else.
Arrays are ``(X, Y, Z)`` as nibabel gives them; ITK's index ``(i, j, k)`` is the array's.

A 2-D image is a slice ``(X, Y, 1)`` in the plane of z = 0. Slices may lie anywhere; across one there is nothing to
interpolate, and what is said of it holds for its whole thickness. :class:`Plane` gives its coordinates within the
plane, ``(X, Y)`` and a 3 x 3 affine, with which the functions for ITK work as with 3-D ones.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import itk
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from voxelmorph_monai.files import atomic
from voxelmorph_monai.formats import Affine as Affine  # for all that import it from here
from voxelmorph_monai.formats import (
    Volume,
    check_gzip,
    check_nifti,
    corner_distance,
    is_nifti,
    open_file,
    reading,
    silent_stderr,
    spatial_dims_of,
)

__all__ = [
    "Composite",
    "ImageGrid",
    "Plane",
    "apply_affine",
    "from_itk",
    "in_plane",
    "inside",
    "linear_transform",
    "open_volume",
    "points_to_lps",
    "read_displacement",
    "read_image",
    "read_labels",
    "require_right_angles",
    "require_same_grid",
    "save_displacement",
    "save_image",
    "save_image_like",
    "save_nifti",
    "save_transform",
    "slabs",
    "spacing",
    "to_itk",
    "to_lps",
    "transform_affine",
    "warp_scan",
]

_SLAB_VOXELS = 2**20  # that are worked at together


class ImageGrid(NamedTuple):
    """Where the voxels of an image lie.

    Attributes:
        size: of the image, ``(X, Y, Z)``.
        affine: of the image (RAS, mm).
    """

    size: Sequence[int]
    affine: Affine


def _lps(spatial_dims: int) -> Affine:
    """RAS to LPS and back: its own inverse."""
    return np.diag([-1.0, -1.0, *[1.0] * (spatial_dims - 1)])


def spacing(affine: Affine) -> Affine:
    """Distance between neighbouring voxels along each array axis, in mm: ``(3,)``, or ``(2,)`` within a plane.

    >>> spacing(np.diag([-2.0, 1.0, 3.0, 1.0])).tolist()
    [2.0, 1.0, 3.0]
    """
    return np.linalg.norm(affine[:-1, :-1], axis=0)


def _check_affine(affine: Affine, subject: str) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError(f"affine of {subject} must be 4 x 4 finite numbers, got {affine.tolist()}.")
    volume = abs(np.linalg.det(affine[:3, :3]))
    if volume <= 1e-6 * np.prod(spacing(affine)):
        raise ValueError(f"affine of {subject} must have an inverse, got {affine[:3, :3].tolist()}.")


def _sheared(affine: Affine) -> bool:
    """Whether the axes are off the right angle by more than the rounding of headers (1e-3: 0.25 mm in a brain)."""
    direction = affine[:-1, :-1] / spacing(affine)
    return not np.allclose(direction.T @ direction, np.eye(len(direction)), atol=1e-3)


def require_right_angles(affine: Affine, subject: str) -> None:
    """Raise ValueError if the axes of an image are sheared, which neither ITK nor a qform can express."""
    if _sheared(affine):
        raise ValueError(f"axes of {subject} must be at right angles, got the affine {affine.tolist()}.")


def open_volume(path: str | Path, *, planar: bool = False) -> tuple[Volume, Affine]:
    """Open a scan and check its header, leaving the voxels ``(X, Y, Z)`` on disk.

    Scans are files of NIfTI, MGZ, NRRD, MetaImage and what else nibabel reads, or folders that hold one DICOM series.
    Of a NIfTI header the sform counts if its code is above 0, else the qform. Files that tools put in different places
    are refused: two such forms that disagree by more than 0.1 mm or a tenth of a voxel, none, units that are not mm,
    and ANALYZE without an SPM ``.mat`` file.

    Args:
        path: of the file or folder.
        planar: take a single slice too; a 2-D image becomes one in the plane of z = 0, ``(X, Y, 1)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a scan, one real number a voxel, one 3-D volume, an affine with an inverse.
    """
    volume, affine = open_file(Path(path))
    if sorted(volume.shape)[1 if planar else 0] < 2 or min(volume.shape) < 1:
        raise ValueError(f"{path} must be one 3-D volume, got shape {volume.shape}.")
    _check_affine(affine, str(path))
    return volume, affine


def _read(path: str | Path, planar: bool) -> tuple[NDArray[Any], Affine]:
    """Voxels ``(X, Y, Z)`` in the type they are stored in, and the affine."""
    volume, affine = open_volume(path, planar=planar)
    with reading(Path(path)):
        array = np.asanyarray(volume)
        check_gzip(Path(path))
    return array.astype(array.dtype.newbyteorder("="), copy=False), affine


def read_image(path: str | Path, *, planar: bool = False) -> tuple[NDArray[np.float32], Affine]:
    """Read a scan, as :func:`open_volume` finds it: intensities ``(X, Y, Z)`` in float32 and the affine (RAS, mm).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole 3-D scan of finite numbers that differ, with an affine that has an inverse.
    """
    array, affine = _read(path, planar)
    with np.errstate(over="ignore"):  # float64 past the range of float32 becomes Inf, and is found below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"{path} must hold finite numbers, got {count} voxels of NaN or Inf.")
    if array.min() == array.max():
        raise ValueError(f"{path} must show something, but all its voxels are {array.flat[0]:g}.")
    return array, affine


def read_labels(path: str | Path, *, planar: bool = False) -> tuple[NDArray[Any], Affine]:
    """Read a label map in any format of :func:`open_volume`: integers ``(X, Y, Z)`` and the affine (RAS, mm).

    They are of the type they are stored in; stored as floating point, of the smallest unsigned one that holds them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole 3-D map of whole numbers >= 0, one of them > 0, with an affine that has an inverse.
    """
    array, affine = _read(path, planar)
    least, most = array.min(), array.max()
    if not (least >= 0 and 0 < most < np.inf):  # NaN fails too
        raise ValueError(f"{path} must hold labels >= 0, one of them > 0, got values from {least} to {most}.")
    if most > 2**53:  # SciPy resamples in double precision
        raise ValueError(f"{path} must hold labels of at most 2^53, got {most}.")
    if array.dtype.kind == "f":
        broken = array[array != np.rint(array)]
        if broken.size:
            raise ValueError(f"{path} must hold whole numbers as labels, got {broken.size} others, first {broken[0]}.")
        array = array.astype(np.min_scalar_type(int(most)))
    return array, affine


def require_same_grid(
    first: tuple[Volume, Affine],
    second: tuple[Volume, Affine],
    names: tuple[str, str],
    tolerance: float | None = None,
) -> None:
    """Raise ValueError unless two images have one shape and place each voxel at one point.

    Args:
        first: ``(array, affine)``.
        second: ``(array, affine)``.
        names: what to call them in the error.
        tolerance: largest distance, in mm, between the two places of a voxel; the default, 0.1 mm or a tenth of the
            shortest side of a voxel, is far above the rounding of headers and far below a voxel.
    """
    if tolerance is None:
        tolerance = min(0.1, 0.1 * float(spacing(first[1]).min()))
    shape, other = first[0].shape, second[0].shape
    if shape != other:
        raise ValueError(f"{names[0]} and {names[1]} must have one shape, got {shape} and {other}.")
    apart = corner_distance(first[1], second[1], shape)
    if not apart <= tolerance:
        raise ValueError(
            f"{names[0]} and {names[1]} must lie on one grid within {tolerance:.3g} mm, but their affines put a voxel "
            f"{apart:.3g} mm apart: {first[1].tolist()} and {second[1].tolist()}."
        )


def to_itk(array: NDArray[Any], affine: Affine) -> itk.Image:
    """Copy ``array`` ``(X, Y, Z)`` with its affine (RAS) to an ITK image (LPS) of the same pixel type.

    An array ``(X, Y)`` with a 3 x 3 affine becomes a 2-D image.
    """
    if array.ndim == 3:
        _check_affine(affine, "an image for ITK")
    require_right_angles(affine, "an image for ITK")
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    _set_grid(image, affine)
    return image


def _set_grid(image: itk.Image, affine: Affine) -> None:
    """Put an ITK image where the affine (RAS) says."""
    lps = _lps(len(affine) - 1) @ affine
    image.SetSpacing(spacing(affine).tolist())
    image.SetOrigin(lps[:-1, -1].tolist())
    image.SetDirection(itk.matrix_from_array(lps[:-1, :-1] / spacing(affine)))


def from_itk(image: itk.Image) -> tuple[NDArray[Any], Affine]:
    """Copy an ITK image (LPS) to an array ``(X, Y, Z)`` and its affine (RAS), or ``(X, Y)`` and one of 3 x 3."""
    spatial_dims = image.GetImageDimension()
    lps = np.eye(spatial_dims + 1)
    lps[:-1, :-1] = itk.array_from_matrix(image.GetDirection()) * np.asarray(image.GetSpacing())
    lps[:-1, -1] = image.GetOrigin()
    return itk.array_from_image(image).T, _lps(spatial_dims) @ lps


def to_lps(value: NDArray[np.floating[Any]]) -> Affine:
    """Restate a point ``(3,)`` or a map of points ``(4, 4)`` of RAS in LPS, or one of LPS in RAS; in 2-D too."""
    if value.ndim == 1:
        return _lps(len(value))[:-1, :-1] @ value
    return _lps(len(value) - 1) @ value @ _lps(len(value) - 1)


def points_to_lps(points: NDArray[np.floating[Any]]) -> NDArray[Any]:
    """Restate points or vectors ``(..., 3)`` or ``(..., 2)`` of RAS in LPS, or those of LPS in RAS."""
    return points * np.array([-1, -1, 1])[: points.shape[-1]]


def transform_affine(transform: itk.Transform) -> Affine:
    """4 x 4 matrix of a linear ITK transform (LPS) between points in RAS, mm; 3 x 3 of one in 2-D."""
    lps = np.eye(transform.GetInputSpaceDimension() + 1)
    lps[:-1, :-1] = itk.array_from_matrix(transform.GetMatrix())
    lps[:-1, -1] = transform.GetOffset()
    return to_lps(lps)


def linear_transform(matrix: NDArray[np.floating[Any]], kind: Any = itk.D) -> itk.Transform:
    """ITK transform (LPS) of a map of points in RAS, mm; the inverse of :func:`transform_affine`.

    Args:
        matrix: the map, 4 x 4, or 3 x 3 in 2-D.
        kind: type of its parameters, ``itk.D`` or ``itk.F``.
    """
    transform = itk.AffineTransform[kind, len(matrix) - 1].New()
    lps = to_lps(matrix).astype(np.float64 if kind is itk.D else np.float32)
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:-1, :-1])))
    transform.SetTranslation(lps[:-1, -1].tolist())
    return transform


def in_plane(matrix: NDArray[np.floating[Any]]) -> Affine:
    """Rows and columns of x and y of a 4 x 4 matrix: 3 x 3. It is the whole of one that keeps the plane of z = 0."""
    return matrix[np.ix_([0, 1, 3], [0, 1, 3])].astype(np.float64)


def _across(shape: Sequence[int]) -> int:
    """The axis across a slice of this shape."""
    return list(shape).index(1)


class Plane(NamedTuple):
    """The plane that a slice lies in, with an origin and axes that do not depend on the axes of its array.

    Attributes:
        matrix: 4 x 4, rigid: from ``(along, along, across)`` the plane, in mm, to RAS. In the plane of z = 0 it is the
            identity.
    """

    matrix: Affine

    @classmethod
    def of(cls, image: tuple[NDArray[Any], Affine], like: "Plane | None" = None) -> "Plane":
        """The plane of a slice ``(array, affine)``, one of whose axes has length 1.

        Args:
            image: the slice.
            like: a plane whose axes its own shall follow; by default those of RAS that are nearest.
        """
        array, affine = image
        along = [axis for axis in range(3) if axis != _across(array.shape)]
        normal = np.cross(*affine[:3, along].T)
        nearest = np.roll(np.eye(3), -1 - int(np.argmax(np.abs(normal))), axis=1)  # that across the plane last
        axes = nearest if like is None else like.matrix[:3, :3]
        normal *= np.sign(normal @ axes[:, 2]) / np.linalg.norm(normal)
        first = axes[:, 0] - normal * (normal @ axes[:, 0])
        first /= np.linalg.norm(first)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([first, np.cross(normal, first), normal], axis=1)
        matrix[:3, 3] = normal * (normal @ affine[:3, 3])
        return cls(matrix)

    def flatten(self, image: tuple[NDArray[Any], Affine]) -> tuple[NDArray[Any], Affine]:
        """A slice in the coordinates of the plane: ``(X, Y)`` and a 3 x 3 affine."""
        array, affine = image
        across, within = _across(array.shape), np.linalg.inv(self.matrix) @ affine
        return array.squeeze(across), np.delete(np.delete(within, across, axis=1), 2, axis=0)

    def place(self, matrix: Affine) -> Affine:
        """Take what ends in the plane's coordinates, 3 x 3, to RAS: 4 x 4, with its third axis across the plane."""
        placed = np.eye(4)
        placed[np.ix_([0, 1, 3], [0, 1, 3])] = matrix
        return self.matrix @ placed

    def map_to(self, target: "Plane", matrix: Affine) -> Affine:
        """Map of RAS points, 4 x 4, from this plane to another one by ``matrix``, 3 x 3, in their coordinates."""
        return target.place(matrix) @ np.linalg.inv(self.matrix)


def apply_affine(matrix: NDArray[np.floating[Any]], points: NDArray[Any]) -> NDArray[np.float64]:
    """Map ``points`` ``(3, ...)`` by a 4 x 4 matrix."""
    shift = matrix[:3, 3].reshape(3, *[1] * (points.ndim - 1))
    return np.tensordot(matrix[:3, :3], points, axes=1) + shift


def _within(index: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.float64]:
    """Set the coordinate across a slice to 0: there SciPy takes for outside what is only rounding."""
    index[np.array(shape) == 1] = 0.0
    return index


def slabs(size: Sequence[int]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Cut a grid along its first axis into parts of about a million voxels: the slice, and the indices ``(3, ...)``."""
    step = max(1, _SLAB_VOXELS // (size[1] * size[2]))
    for start in range(0, size[0], step):
        stop = min(start + step, size[0])
        index = np.indices((stop - start, size[1], size[2]), dtype=np.float64)
        index[0] += start
        yield slice(start, stop), index


def inside(index: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.bool_]:
    """Whether indices ``(3, ...)`` lie in an image of this shape: at most half a voxel from its outermost ones."""
    end = np.reshape(shape, (3, *[1] * (index.ndim - 1))) - 0.5
    return np.logical_and.reduce((index >= -0.5) & (index < end))


def background(array: NDArray[Any]) -> float:
    """Intensity around what a scan shows: 0, or its lowest if that is far below 0, as CT has it (Hounsfield units).

    >>> background(np.array([-1000, 40, 700])), background(np.array([-2, 0, 40]))  # interpolation undershoots a little
    (-1000.0, 0.0)
    """
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    return low if low < -0.1 * high else 0.0


def _vectors(ddf: NDArray[Any], affine: Affine) -> NDArray[Any]:
    """A displacement in voxels ``(3, X, Y, Z)`` as vectors in mm along LPS: ``(X, Y, Z, 3)``."""
    ddf = np.asarray(ddf, dtype=np.result_type(ddf, np.float32))
    return np.einsum("ij,j...->...i", (_lps(3) @ affine)[:3, :3].astype(ddf.dtype), ddf)


class Composite(NamedTuple):
    r"""Map of points in RAS mm, :math:`p \mapsto O A (x + u(x))` with :math:`x = A^{-1} I p`: linear, bent, linear.

    Attributes:
        inner: 4 x 4 matrix :math:`I`, applied first: from the points' space to the field's.
        outer: 4 x 4 matrix :math:`O`, applied last.
        field: the displacement :math:`u` ``(3, X, Y, Z)`` in voxels of its own grid, and the affine :math:`A` of that
            grid; None for no displacement. Beyond the grid the displacement is 0, as it is for ITK: a field should end
            in zeros.
    """

    inner: NDArray[np.floating[Any]]
    outer: NDArray[np.floating[Any]]
    field: tuple[NDArray[np.float32], Affine] | None = None

    @property
    def linear(self) -> NDArray[np.floating[Any]]:
        """The map without its displacement, a 4 x 4 matrix."""
        return self.outer @ self.inner

    def _map(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map ``points`` ``(3, ...)``."""
        points = apply_affine(self.inner, points)
        if self.field is not None:
            ddf, affine = self.field
            index = _within(apply_affine(np.linalg.inv(affine), points), ddf.shape[1:])
            offset = np.stack([ndimage.map_coordinates(u, index, np.float64, order=1, mode="nearest") for u in ddf])
            offset *= inside(index, ddf.shape[1:])
            points = points + np.tensordot(affine[:3, :3], offset, axes=1)
        return apply_affine(self.outer, points)

    def points(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """Map ``points`` ``(N, 3)`` in mm (RAS)."""
        return self._map(np.asarray(points, dtype=np.float64).T).T

    def on_grid(self, size: Sequence[int], affine: Affine) -> NDArray[np.float32]:
        """The whole map as one displacement ``(3, *size)`` in voxels of the grid with this affine (RAS, mm)."""
        ddf = np.empty((3, *size), dtype=np.float32)
        back = np.linalg.inv(affine)
        for part, index in slabs(size):
            ddf[:, part] = apply_affine(back, self._map(apply_affine(affine, index))) - index
        return ddf

    def to_itk(self, spatial_dims: int = 3) -> itk.Transform:
        """Copy to an ITK composite transform (LPS) of the same maps, in float32: 1e-5 mm in a brain.

        Args:
            spatial_dims: of the transform: 2 of a map that keeps the plane of z = 0.
        """
        restrict = in_plane if spatial_dims == 2 else np.asarray
        composite = itk.CompositeTransform[itk.F, spatial_dims].New()
        composite.AddTransform(linear_transform(restrict(self.outer), itk.F))  # ITK applies what was added last first
        if self.field is not None:
            ddf, affine = self.field
            vectors = _vectors(ddf, affine).astype(np.float32).transpose(2, 1, 0, 3)
            if spatial_dims == 2:
                vectors = vectors[0, ..., :2]
            kind = itk.Image[itk.Vector[itk.F, spatial_dims], spatial_dims]
            image = itk.image_from_array(np.ascontiguousarray(vectors), ttype=kind)
            _set_grid(image, restrict(affine))
            transform = itk.DisplacementFieldTransform[itk.F, spatial_dims].New()
            transform.SetDisplacementField(image)
            composite.AddTransform(transform)
        composite.AddTransform(linear_transform(restrict(self.inner), itk.F))
        return composite

    def save(self, path: str | Path, spatial_dims: int = 3) -> None:
        """Write the map as an ITK transform of 2 or 3 dimensions, ``.h5``; whole or not at all."""

        def write(temporary: Path) -> None:
            writer = itk.TransformFileWriterTemplate[itk.F].New()  # itk.transformwrite would write float64
            writer.SetFileName(str(temporary))
            writer.SetUseCompression(True)
            writer.SetInput(self.to_itk(spatial_dims))
            writer.Update()

        _write_by_itk(path, write)


def warp_scan(
    image: tuple[NDArray[Any], Affine],
    ddf: NDArray[np.float32],
    affine: Affine,
    order: int = 1,
    outside: float = 0.0,
) -> NDArray[Any]:
    """Pull ``image`` ``(array, affine)`` onto another grid along a displacement, by a single interpolation.

    Args:
        image: what to warp; the result has its type.
        ddf: ``(3, X, Y, Z)`` in voxels of the other grid, from its points to those of the image.
        affine: of the other grid (RAS, mm).
        order: 1 linear; 0 nearest, which invents no label.
        outside: what the result is further than half a voxel from the outermost voxels; 0, as ITK has it.
    """
    array, to_voxels = image[0], np.linalg.inv(image[1]) @ affine
    warped = np.zeros(ddf.shape[1:], dtype=array.dtype)
    for part, index in slabs(ddf.shape[1:]):
        at = _within(apply_affine(to_voxels, index + ddf[:, part]), array.shape)
        values = ndimage.map_coordinates(array, at, array.dtype, order=order, mode="nearest")
        warped[part] = np.where(inside(at, array.shape), values, outside)
    return warped


def _write_by_itk(path: str | Path, write: Callable[[Path], None]) -> None:
    """Have ITK write ``path``, whole or not at all, and raise an OSError if it cannot."""
    with atomic(path) as temporary:
        reason = None
        with silent_stderr():  # on which HDF5 prints a page, and another when the writer is gone
            try:
                write(temporary)
            except RuntimeError as error:
                reason = " ".join(str(error).split()).rsplit("ITK ERROR: ")[-1]
        if reason is not None:
            raise OSError(f"{path} cannot be written: {reason or 'is the disk full?'}")


def save_nifti(path: str | Path, image: nib.Nifti1Image) -> None:
    """Write an image with its affine in both forms of the header; whole or not at all."""
    if not str(path).endswith((".nii", ".nii.gz")):
        raise ValueError(f"an image is saved as .nii or .nii.gz, got {path}.")
    affine = image.affine
    # Code 2, "aligned to another image": what this package writes lies on a grid that was chosen, not scanned. Readers
    # differ in which of the two forms they prefer, so both say the same; the qform cannot hold shear and is then left
    # unset (0) rather than wrong.
    image.set_sform(affine, 2)
    image.set_qform(None if _sheared(affine) else affine, 0 if _sheared(affine) else 2)
    image.header.set_xyzt_units("mm")
    with atomic(path) as temporary:
        nib.save(image, temporary)


def save_image(path: str | Path, array: NDArray[Any], affine: Affine, spatial_dims: int = 3) -> None:
    """Write ``array`` ``(X, Y, Z)`` in its own type with its affine (RAS, mm) as NIfTI; whole or not at all.

    With ``spatial_dims`` 2 a slice ``(X, Y, 1)`` is written as a 2-D image.
    """
    if array.ndim != 3:
        raise ValueError(f"{path} must be given a 3-D array, got shape {array.shape}.")
    _check_affine(affine, str(path))
    save_nifti(path, nib.Nifti1Image(array if spatial_dims == 3 else array[..., 0], affine, dtype=array.dtype))


def save_image_like(path: str | Path, array: NDArray[Any], like: str | Path) -> None:
    """Write ``array`` ``(X, Y, Z)`` in its own type with the header of the file ``like``; whole or not at all.

    Shape, position (both forms and their codes), units and description are those of ``like``. Of other formats than
    NIfTI only shape and position.
    """
    if not is_nifti(Path(like)):
        save_image(path, array, open_volume(like, planar=True)[1], spatial_dims_of(Path(like)))
        return
    model = cast(nib.Nifti1Pair, nib.load(like))
    kind = nib.Nifti2Image if isinstance(model.header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(array.reshape(model.shape), model.affine, model.header, dtype=array.dtype)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the range to show was that of other intensities
    with atomic(path) as temporary:
        nib.save(image, temporary)


def save_transform(path: str | Path, transform: itk.Transform) -> None:
    """Write an ITK transform in the format of the ending, ``.txt``, ``.mat`` or ``.h5``; whole or not at all."""

    def write(temporary: Path) -> None:
        itk.transformwrite([transform], str(temporary), compression=True)
        if temporary.suffix not in (".h5", ".hdf5"):  # on a full disk ITK leaves an empty file, and says nothing
            try:
                (again,) = itk.transformread(str(temporary))
                whole = np.allclose(again.GetParameters(), transform.GetParameters(), rtol=1e-6, atol=1e-6)
            except RuntimeError:
                whole = False
            if not whole:
                raise RuntimeError

    _write_by_itk(path, write)


def save_displacement(
    path: str | Path, ddf: NDArray[Any], affine: Affine, *, spatial_dims: int = 3, intent: int = 1007
) -> None:
    """Write a displacement so that ITK, ANTs and 3D Slicer apply it as it is; whole or not at all.

    The file is a NIfTI vector image ``(X, Y, Z, 1, 3)`` (intent 1007), its vectors in mm along LPS:
    :math:`diag(-1, -1, 1) A u` with the linear part :math:`A` of the affine. Like ``ddf`` it takes points of the fixed
    image to points of the moving one, which is ITK's direction.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        ddf: ``(3, X, Y, Z)``, in voxels of the fixed grid.
        affine: of the fixed image (RAS, mm).
        spatial_dims: 2 writes that of a 2-D image, ``(X, Y, 1, 1, 2)``.
        intent: 1007, vectors along LPS, which every program takes for such; or 1006, displacements along RAS.
    """
    if ddf.ndim != 4 or ddf.shape[0] != 3:
        raise ValueError(f"ddf for {path} must be (3, X, Y, Z), got {ddf.shape}.")
    if not np.isfinite(ddf).all():
        raise ValueError(f"ddf for {path} must be finite, got NaN or Inf.")
    _check_affine(affine, str(path))
    require_right_angles(affine, str(path))
    vectors = _vectors(ddf, affine)[:, :, :, None, :spatial_dims]
    if intent == 1006:
        vectors = points_to_lps(vectors)
    image = nib.Nifti1Image(vectors.astype(np.float32), affine)
    image.header.set_intent(intent)
    save_nifti(path, image)


def read_displacement(path: str | Path) -> tuple[NDArray[np.float64], Affine]:
    """Read a displacement as :func:`save_displacement` and ANTs write it: ``(3, X, Y, Z)`` in voxels, and the affine.

    That of a 2-D image, ``(X, Y, 1, 1, 2)``, becomes ``(2, X, Y)`` and a 3 x 3 affine. The intent says how the vectors
    count: 1006 in mm along RAS, 1007 in mm along LPS.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole NIfTI file ``(X, Y, Z, 1, 3)`` of finite numbers with one of these intents.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a NIfTI file, but there is no such file.")
    with reading(Path(path)):
        image = cast(nib.Nifti1Image, nib.load(path))
        header, shape = image.header, image.shape
        vectors = np.asarray(image.dataobj, dtype=np.float64) if shape[4:] in ((2,), (3,)) else None
        check_gzip(Path(path))
    intent = int(header["intent_code"])
    check_nifti(header, Path(path), shape[:3])
    if vectors is None or shape[3] != 1 or sorted(shape[:3])[1] < 2 or (shape[4] == 2 and shape[2] > 1):
        raise ValueError(
            f"{path} must be a displacement, shape (X, Y, Z, 1, 3), or (X, Y, 1, 1, 2) of a 2-D image, got {shape}."
        )
    if intent not in (1006, 1007):
        raise ValueError(f"{path} must have intent 1006 (displacement along RAS) or 1007 (along LPS), got {intent}.")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{path} must hold finite displacements, got {int((~np.isfinite(vectors)).sum())} others.")
    affine = image.affine
    _check_affine(affine, str(path))
    require_right_angles(affine, str(path))
    vectors = vectors[:, :, :, 0] if shape[4] == 3 else vectors[:, :, 0, 0]
    affine = affine if shape[4] == 3 else in_plane(affine)
    along_ras = points_to_lps(vectors) if intent == 1007 else vectors
    return np.einsum("ij,...j->i...", np.linalg.inv(affine[:-1, :-1]), along_ras), affine
