"""Convert images and linear transforms to ITK and back.

Arrays are ``(X, Y, Z)``, as in nibabel; ITK's index ``(i, j, k)`` is the index of the array.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, check_affine, ras_to_lps, require_right_angles, spacing, to_lps
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.io.formats import silent_stderr
from voxelmorph_monai.lazy import lazy

__all__ = [
    "Image",
    "Transform",
    "from_itk",
    "linear_transform",
    "save_transform",
    "set_grid",
    "to_itk",
    "transform_affine",
]

itk = lazy("itk")

Image = Any
"""An ITK image; ITK has no type annotations."""

Transform = Any
"""An ITK transform."""


def to_itk(array: NDArray[Any], affine: Affine) -> Image:
    """Copy ``array`` ``(X, Y, Z)`` with its affine (RAS) to an ITK image (LPS) of the same pixel type.

    An array ``(X, Y)`` with a 3 x 3 affine becomes a 2-D image.
    """
    if array.ndim == 3:
        check_affine(affine, "an image for ITK")
    require_right_angles(affine, "an image for ITK")
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    set_grid(image, affine)
    return image


def set_grid(image: Image, affine: Affine) -> None:
    """Set the spacing, origin and direction of an ITK image from an affine (RAS, mm), 4 x 4, or 3 x 3 in 2-D."""
    lps = ras_to_lps(len(affine) - 1) @ affine
    image.SetSpacing(spacing(affine).tolist())
    image.SetOrigin(lps[:-1, -1].tolist())
    image.SetDirection(itk.matrix_from_array(lps[:-1, :-1] / spacing(affine)))


def from_itk(image: Image) -> tuple[NDArray[Any], Affine]:
    """Copy an ITK image (LPS) to an array ``(X, Y, Z)`` and its affine (RAS), 3 x 3 for a 2-D image ``(X, Y)``."""
    spatial_dims = image.GetImageDimension()
    lps = np.eye(spatial_dims + 1)
    lps[:-1, :-1] = itk.array_from_matrix(image.GetDirection()) * np.asarray(image.GetSpacing())
    lps[:-1, -1] = image.GetOrigin()
    return itk.array_from_image(image).T, ras_to_lps(spatial_dims) @ lps


def transform_affine(transform: Transform) -> Affine:
    """Convert a linear ITK transform (LPS) to the matrix that maps points in RAS, mm: 4 x 4, or 3 x 3 in 2-D.

    >>> to_the_left = itk.Euler3DTransform[itk.D].New()  # for example, as registered by ITK
    >>> to_the_left.SetTranslation([5.0, 0.0, 0.0])
    >>> transform_affine(to_the_left)[:3, 3].tolist()
    [-5.0, 0.0, 0.0]
    """
    lps = np.eye(transform.GetInputSpaceDimension() + 1)
    lps[:-1, :-1] = itk.array_from_matrix(transform.GetMatrix())
    lps[:-1, -1] = transform.GetOffset()
    return to_lps(lps)


def linear_transform(matrix: NDArray[np.floating[Any]], double: bool = True) -> Transform:
    """Convert a map of points in RAS, mm, to an ITK transform (LPS); reverses :func:`transform_affine`.

    Args:
        matrix: the map, 4 x 4, or 3 x 3 in 2-D.
        double: whether the parameters have double precision (otherwise single).
    """
    transform = itk.AffineTransform[itk.D if double else itk.F, len(matrix) - 1].New()
    lps = to_lps(matrix).astype(np.float64 if double else np.float32)
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:-1, :-1])))
    transform.SetTranslation(lps[:-1, -1].tolist())
    return transform


def _write_by_itk(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ITK write ``path``, completely or not at all; raises OSError if ITK cannot."""
    with atomic(path) as temporary:
        reason = None
        with silent_stderr():  # HDF5 prints long messages there, even when the writer is deleted
            try:
                write(temporary)
            except RuntimeError as error:
                reason = " ".join(str(error).split()).rsplit("ITK ERROR: ")[-1]
        if reason is not None:
            raise OSError(f"{path} cannot be written: {reason or 'is the disk full?'}")


def save_transform(path: str | Path, transform: Transform) -> None:
    """Write an ITK transform as ``.txt``, ``.mat`` or ``.h5``, by the extension; completely or not at all."""

    def write(temporary: Path) -> None:
        itk.transformwrite([transform], str(temporary), compression=True)
        if temporary.suffix not in (".h5", ".hdf5"):  # on a full disk, ITK writes an empty file without an error
            try:
                (again,) = itk.transformread(str(temporary))
                whole = np.allclose(again.GetParameters(), transform.GetParameters(), rtol=1e-6, atol=1e-6)
            except RuntimeError:
                whole = False
            if not whole:
                raise RuntimeError

    _write_by_itk(path, write)
