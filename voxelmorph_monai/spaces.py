"""Physical space at the border of the package: files, affines, ITK.

An ``affine`` is nibabel's: a 4 x 4 matrix that takes voxel indices to millimetres in RAS (x grows to the right, y to
the front, z up). ITK and its files count in LPS: the first two coordinates change sign, and that happens here alone.
Arrays are ``(X, Y, Z)`` as nibabel gives them; ITK's index ``(i, j, k)`` is the array's.
"""

import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import itk
import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from scipy import ndimage

__all__ = [
    "Composite",
    "atomic",
    "atomic_folder",
    "from_itk",
    "linear_transform",
    "open_volume",
    "read_displacement",
    "read_image",
    "read_labels",
    "require_right_angles",
    "require_same_grid",
    "save_displacement",
    "save_image",
    "save_image_like",
    "save_transform",
    "spacing",
    "to_itk",
    "to_lps",
    "transform_affine",
    "warp_scan",
]

Affine = NDArray[np.float64]

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse: RAS to LPS and back


def spacing(affine: Affine) -> Affine:
    """Distance between neighbouring voxels along each array axis, in mm: ``(3,)``.

    >>> spacing(np.diag([-2.0, 1.0, 3.0, 1.0])).tolist()
    [2.0, 1.0, 3.0]
    """
    return np.linalg.norm(affine[:3, :3], axis=0)


def _check_affine(affine: Affine, subject: str) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError(f"affine of {subject} must be 4 x 4 finite numbers, got {affine.tolist()}.")
    volume = abs(np.linalg.det(affine[:3, :3]))
    if volume <= 1e-6 * np.prod(spacing(affine)):
        raise ValueError(f"affine of {subject} must have an inverse, got {affine[:3, :3].tolist()}.")


def _sheared(affine: Affine) -> bool:
    """Whether the axes are off the right angle by more than the rounding of headers (1e-3: 0.25 mm in a brain)."""
    direction = affine[:3, :3] / spacing(affine)
    return not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3)


def require_right_angles(affine: Affine, subject: str) -> None:
    """Raise ValueError if the axes of an image are sheared, which neither ITK nor a qform can express."""
    if _sheared(affine):
        raise ValueError(f"axes of {subject} must be at right angles, got the affine {affine.tolist()}.")


def open_volume(path: str | Path) -> tuple[nib.arrayproxy.ArrayProxy, Affine]:
    """Open a NIfTI or MGZ file of one 3-D volume and check its header, leaving the voxels ``(X, Y, Z)`` on disk.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NIfTI or MGZ file of one real number a voxel, one 3-D volume, an affine with an inverse.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a NIfTI or MGZ file, but there is no such file.")
    try:
        image = nib.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole NIfTI or MGZ file, but reading it failed: {error}.") from error
    if not isinstance(image, nib.Nifti1Pair | nib.MGHImage):
        raise ValueError(f"{path} must be a NIfTI or MGZ file, got a {type(image).__name__}.")
    if image.get_data_dtype().kind not in "iuf":
        raise ValueError(f"{path} must hold one real number a voxel, got {image.get_data_dtype()}.")
    shape = image.shape[:3]
    if len(shape) < 3 or min(shape) < 2 or np.prod(image.shape) != np.prod(shape):
        raise ValueError(f"{path} must be one 3-D volume, got shape {image.shape}.")
    _check_affine(image.affine, str(path))
    return cast(nib.arrayproxy.ArrayProxy, image.dataobj).reshape(shape), image.affine


def _read(path: str | Path) -> tuple[NDArray[Any], Affine]:
    """Voxels ``(X, Y, Z)`` in the type they are stored in, and the affine."""
    volume, affine = open_volume(path)
    try:
        array = np.asanyarray(volume)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole NIfTI or MGZ file, but reading it failed: {error}.") from error
    return array.astype(array.dtype.newbyteorder("="), copy=False), affine


def read_image(path: str | Path) -> tuple[NDArray[np.float32], Affine]:
    """Read a NIfTI or MGZ scan: intensities ``(X, Y, Z)`` in float32 and the affine (RAS, mm).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole 3-D scan of finite numbers that differ, with an affine that has an inverse.
    """
    array, affine = _read(path)
    with np.errstate(over="ignore"):  # float64 past the range of float32 becomes Inf, and is found below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"{path} must hold finite numbers, got {count} voxels of NaN or Inf.")
    if array.min() == array.max():
        raise ValueError(f"{path} must show something, but all its voxels are {array.flat[0]:g}.")
    return array, affine


def read_labels(path: str | Path) -> tuple[NDArray[Any], Affine]:
    """Read a NIfTI or MGZ label map: integers ``(X, Y, Z)`` of the stored type and the affine (RAS, mm).

    Labels stored as floating point come back as the smallest unsigned integers that hold them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole 3-D map of whole numbers >= 0, one of them > 0, with an affine that has an inverse.
    """
    array, affine = _read(path)
    least, most = array.min(), array.max()
    if not (least >= 0 and 0 < most < np.inf):  # NaN fails too
        raise ValueError(f"{path} must hold labels >= 0, one of them > 0, got values from {least} to {most}.")
    if array.dtype.kind == "f":
        broken = array[array != np.rint(array)]
        if broken.size:
            raise ValueError(f"{path} must hold whole numbers as labels, got {broken.size} others, first {broken[0]}.")
        array = array.astype(np.min_scalar_type(int(most)))
    return array, affine


def require_same_grid(
    first: tuple[NDArray[Any] | nib.arrayproxy.ArrayProxy, Affine],
    second: tuple[NDArray[Any] | nib.arrayproxy.ArrayProxy, Affine],
    names: tuple[str, str],
    tolerance: float = 0.1,
) -> None:
    """Raise ValueError unless two images have one shape and place each voxel at one point.

    Args:
        first: ``(array, affine)``.
        second: ``(array, affine)``.
        names: what to call them in the error.
        tolerance: largest distance, in mm, between the two places of a voxel; the default is far above the rounding of
            headers and far below a voxel.
    """
    shape, other = first[0].shape, second[0].shape
    if shape != other:
        raise ValueError(f"{names[0]} and {names[1]} must have one shape, got {shape} and {other}.")
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(4, -1)
    apart = np.linalg.norm((first[1] - second[1]) @ corners, axis=0).max()
    if not apart <= tolerance:
        raise ValueError(
            f"{names[0]} and {names[1]} must lie on one grid within {tolerance} mm, but their affines put a voxel "
            f"{apart:.3g} mm apart: {first[1].tolist()} and {second[1].tolist()}."
        )


def to_itk(array: NDArray[Any], affine: Affine) -> itk.Image:
    """Copy ``array`` ``(X, Y, Z)`` with its affine (RAS) to an ITK image (LPS) of the same pixel type."""
    _check_affine(affine, "an image for ITK")
    require_right_angles(affine, "an image for ITK")
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    _set_grid(image, affine)
    return image


def _set_grid(image: itk.Image, affine: Affine) -> None:
    """Put an ITK image where the affine (RAS) says."""
    lps = _LPS @ affine
    image.SetSpacing(spacing(affine).tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing(affine)))


def from_itk(image: itk.Image) -> tuple[NDArray[Any], Affine]:
    """Copy a 3-D ITK image (LPS) to an array ``(X, Y, Z)`` and its affine (RAS)."""
    lps = np.eye(4)
    lps[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.asarray(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    return itk.array_from_image(image).T, _LPS @ lps


def to_lps(value: NDArray[np.floating[Any]]) -> Affine:
    """Restate points or vectors ``(..., 3)`` or a map of points ``(4, 4)`` of RAS in LPS, or those of LPS in RAS."""
    return value * np.diag(_LPS)[:3] if value.shape[-1] == 3 else _LPS @ value @ _LPS


def transform_affine(transform: itk.Transform) -> Affine:
    """4 x 4 matrix of a linear ITK transform (LPS) between points in RAS, mm."""
    lps = np.eye(4)
    lps[:3, :3] = itk.array_from_matrix(transform.GetMatrix())
    lps[:3, 3] = transform.GetOffset()
    return to_lps(lps)


def linear_transform(matrix: NDArray[np.floating[Any]], kind: Any = itk.D) -> itk.Transform:
    """ITK transform (LPS) of a 4 x 4 map of points in RAS, mm; the inverse of :func:`transform_affine`.

    Args:
        matrix: the map.
        kind: type of its parameters, ``itk.D`` or ``itk.F``.
    """
    transform = itk.AffineTransform[kind, 3].New()
    lps = to_lps(matrix).astype(np.float64 if kind is itk.D else np.float32)
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3])))
    transform.SetTranslation(lps[:3, 3].tolist())
    return transform


def _apply(matrix: NDArray[np.floating[Any]], points: NDArray[Any]) -> NDArray[np.float64]:
    """Map ``points`` ``(3, ...)`` by a 4 x 4 matrix."""
    shift = matrix[:3, 3].reshape(3, *[1] * (points.ndim - 1))
    return np.tensordot(matrix[:3, :3], points, axes=1) + shift


def _slabs(size: Sequence[int]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Cut a grid along its first axis into parts of about a million voxels: the slice, and the indices ``(3, ...)``."""
    step = max(1, 2**20 // (size[1] * size[2]))
    for start in range(0, size[0], step):
        stop = min(start + step, size[0])
        index = np.indices((stop - start, size[1], size[2]), dtype=np.float64)
        index[0] += start
        yield slice(start, stop), index


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
        points = _apply(self.inner, points)
        if self.field is not None:
            ddf, affine = self.field
            index = _apply(np.linalg.inv(affine), points)
            offset = np.stack([ndimage.map_coordinates(u, index, np.float64, order=1) for u in ddf])
            points = points + np.tensordot(affine[:3, :3], offset, axes=1)
        return _apply(self.outer, points)

    def points(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """Map ``points`` ``(N, 3)`` in mm (RAS)."""
        return self._map(np.asarray(points, dtype=np.float64).T).T

    def on_grid(self, size: Sequence[int], affine: Affine) -> NDArray[np.float32]:
        """The whole map as one displacement ``(3, *size)`` in voxels of the grid with this affine (RAS, mm)."""
        ddf = np.empty((3, *size), dtype=np.float32)
        back = np.linalg.inv(affine)
        for part, index in _slabs(size):
            ddf[:, part] = _apply(back, self._map(_apply(affine, index))) - index
        return ddf

    def to_itk(self) -> itk.Transform:
        """Copy to an ITK composite transform (LPS) of the same maps, in float32: 1e-5 mm in a brain."""
        composite = itk.CompositeTransform[itk.F, 3].New()
        composite.AddTransform(linear_transform(self.outer, itk.F))  # ITK applies what was added last first
        if self.field is not None:
            ddf, affine = self.field
            vectors = np.einsum("ij,jxyz->zyxi", (_LPS @ affine)[:3, :3].astype(np.float32), ddf)
            image = itk.image_from_array(np.ascontiguousarray(vectors), ttype=itk.Image[itk.Vector[itk.F, 3], 3])
            _set_grid(image, affine)
            transform = itk.DisplacementFieldTransform[itk.F, 3].New()
            transform.SetDisplacementField(image)
            composite.AddTransform(transform)
        composite.AddTransform(linear_transform(self.inner, itk.F))
        return composite

    def save(self, path: str | Path) -> None:
        """Write the map as an ITK transform, ``.h5``; whole or not at all."""
        with atomic(path) as temporary:
            writer = itk.TransformFileWriterTemplate[itk.F].New()  # itk.transformwrite would write float64
            writer.SetFileName(str(temporary))
            writer.SetUseCompression(True)
            writer.SetInput(self.to_itk())
            writer.Update()


def warp_scan(
    image: tuple[NDArray[Any], Affine], ddf: NDArray[np.float32], affine: Affine, order: int = 1
) -> NDArray[Any]:
    """Pull ``image`` ``(array, affine)`` onto another grid along a displacement, by a single interpolation.

    Outside the image, further than half a voxel from its outermost ones, the result is 0, as ITK has it.

    Args:
        image: what to warp; the result has its type.
        ddf: ``(3, X, Y, Z)`` in voxels of the other grid, from its points to those of the image.
        affine: of the other grid (RAS, mm).
        order: 1 linear; 0 nearest, which invents no label.
    """
    array, to_voxels = image[0], np.linalg.inv(image[1]) @ affine
    end = np.reshape(array.shape, (3, 1, 1, 1)) - 0.5
    warped = np.zeros(ddf.shape[1:], dtype=array.dtype)
    for part, index in _slabs(ddf.shape[1:]):
        at = _apply(to_voxels, index + ddf[:, part])
        values = ndimage.map_coordinates(array, at, array.dtype, order=order, mode="nearest")
        warped[part] = np.where(((at >= -0.5) & (at < end)).all(axis=0), values, 0)
    return warped


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give the name of a temporary file in the folder of ``path`` to write; it takes the place of ``path`` at the end.

    Nobody ever sees half a file: after an error the temporary file is gone and ``path`` is what it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic(f"{folder}/notes.txt") as temporary:
    ...         number_of_characters = temporary.write_text("whole")
    ...     os.listdir(folder)
    ['notes.txt']
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # the ending stays: writers choose the format by it
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` to fill; it takes the place of ``path``, and of all in it, at the end.

    Nobody ever sees half of it: after an error the temporary folder is gone and ``path`` is what it was.
    """
    path = Path(path).absolute()
    temporary, former = (path.with_name(f".{os.getpid()}.{path.name}{end}") for end in ("", ".former"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.replace(path, former)
        os.replace(temporary, path)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(path: str | Path, image: nib.Nifti1Image) -> None:
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


def save_image(path: str | Path, array: NDArray[Any], affine: Affine) -> None:
    """Write ``array`` ``(X, Y, Z)`` in its own type with its affine (RAS, mm) as NIfTI; whole or not at all."""
    if array.ndim != 3:
        raise ValueError(f"{path} must be given a 3-D array, got shape {array.shape}.")
    _check_affine(affine, str(path))
    _save(path, nib.Nifti1Image(array, affine, dtype=array.dtype))


def save_image_like(path: str | Path, array: NDArray[Any], like: str | Path) -> None:
    """Write ``array`` ``(X, Y, Z)`` in its own type with the header of the file ``like``; whole or not at all.

    Shape, position (both forms and their codes), units and description are those of ``like``; of the header of an MGZ
    file NIfTI holds only shape and position.
    """
    model = nib.load(like)
    if not isinstance(model, nib.Nifti1Pair):
        save_image(path, array, cast(nib.MGHImage, model).affine)
        return
    kind = nib.Nifti2Image if isinstance(model.header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(array.reshape(model.shape), model.affine, model.header, dtype=array.dtype)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the range to show was that of other intensities
    with atomic(path) as temporary:
        nib.save(image, temporary)


def save_transform(path: str | Path, transform: itk.Transform) -> None:
    """Write an ITK transform as text, ``.txt``; whole or not at all."""
    with atomic(path) as temporary:
        itk.transformwrite([transform], str(temporary))


def save_displacement(path: str | Path, ddf: NDArray[Any], affine: Affine, intent: int = 1007) -> None:
    """Write a displacement so that ITK, ANTs and 3D Slicer apply it as it is; whole or not at all.

    The file is a NIfTI vector image ``(X, Y, Z, 1, 3)`` (intent 1007), its vectors in mm along LPS:
    :math:`diag(-1, -1, 1) A u` with the linear part :math:`A` of the affine. Like ``ddf`` it takes points of the fixed
    image to points of the moving one, which is ITK's direction.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        ddf: ``(3, X, Y, Z)``, in voxels of the fixed grid.
        affine: of the fixed image (RAS, mm).
        intent: 1007, vectors along LPS, which every program takes for such; or 1006, displacements along RAS.
    """
    if ddf.ndim != 4 or ddf.shape[0] != 3:
        raise ValueError(f"ddf for {path} must be (3, X, Y, Z), got {ddf.shape}.")
    if not np.isfinite(ddf).all():
        raise ValueError(f"ddf for {path} must be finite, got NaN or Inf.")
    _check_affine(affine, str(path))
    vectors = np.einsum("ij,jxyz->xyzi", affine[:3, :3], ddf)
    vectors = to_lps(vectors) if intent == 1007 else vectors
    image = nib.Nifti1Image(vectors[:, :, :, None].astype(np.float32), affine)
    image.header.set_intent(intent)
    _save(path, image)


def read_displacement(path: str | Path) -> tuple[NDArray[np.float64], Affine]:
    """Read a displacement as :func:`save_displacement` and ANTs write it: ``(3, X, Y, Z)`` in voxels, and the affine.

    The intent says how the vectors count: 1006 in mm along RAS, 1007 in mm along LPS.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole NIfTI file ``(X, Y, Z, 1, 3)`` of finite numbers with one of these intents.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a NIfTI file, but there is no such file.")
    try:
        image = cast(nib.Nifti1Image, nib.load(path))
        header, shape = image.header, image.shape
        vectors = np.asarray(image.dataobj, dtype=np.float64) if shape[4:] == (3,) else None
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole NIfTI file, but reading it failed: {error}.") from error
    intent = int(header["intent_code"])
    if vectors is None or shape[3] != 1 or min(shape[:3]) < 2:
        raise ValueError(f"{path} must be a displacement in 3-D, shape (X, Y, Z, 1, 3), got {shape}.")
    if intent not in (1006, 1007):
        raise ValueError(f"{path} must have intent 1006 (displacement along RAS) or 1007 (along LPS), got {intent}.")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{path} must hold finite displacements, got {int((~np.isfinite(vectors)).sum())} others.")
    _check_affine(image.affine, str(path))
    require_right_angles(image.affine, str(path))
    along_ras = to_lps(vectors) if intent == 1007 else vectors
    return np.einsum("ij,xyzkj->ixyz", np.linalg.inv(image.affine[:3, :3]), along_ras), image.affine
