"""Read and write ITK transform files without ITK: linear maps as text, chains with a field as HDF5.

Importing ITK would take 2 to 9 s of processor time, ``h5py`` takes 0.1 s. Other transforms and other ITK files are read
with ITK in :mod:`~voxelmorph_monai.maps.files`.

A chain is a list of parts, in the order in which a point passes through them. A part is a 4 x 4 matrix between points
in RAS mm, or a pair of a displacement ``(3, X, Y, Z)`` in voxels and the affine of its grid (RAS, mm).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, in_plane, ras_to_lps, require_right_angles, spacing, to_lps
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.maps.displacements import lps_vectors, transform_vectors

__all__ = ["Part", "check_chain_file", "read_chain_file", "save_chain_file", "save_linear"]

h5py = lazy("h5py")

Part = NDArray[np.floating[Any]] | tuple[NDArray[np.floating[Any]], Affine]
_DAMAGED = (OSError, RuntimeError, LookupError, ValueError, TypeError)  # errors that h5py raises for damaged files
_KIND = re.compile(rb"(AffineTransform|DisplacementFieldTransform)_(?:double|float)_3_3")


def _parameters(matrix: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """ITK's parameters of a linear map, 4 x 4 or 3 x 3 in 2-D (RAS, mm): the matrix by rows and the shift, in LPS."""
    lps = to_lps(matrix)
    return np.concatenate([lps[:-1, :-1].ravel(), lps[:-1, -1]])


def save_linear(path: str | Path, matrix: NDArray[np.floating[Any]]) -> None:
    """Write a linear map, 4 x 4 or 3 x 3 in 2-D (RAS, mm), as an ITK text file ``.txt``, completely or not at all."""
    dims = len(matrix) - 1
    lines = [
        "#Insight Transform File V1.0",
        "#Transform 0",
        f"Transform: AffineTransform_double_{dims}_{dims}",
        f"Parameters: {' '.join(map(repr, _parameters(matrix).tolist()))}",
        f"FixedParameters: {' '.join(['0'] * dims)}",
    ]
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="ascii")


def _add(group: Any, kind: str, parameters: NDArray[np.float32], fixed: Sequence[float], dims: int) -> None:
    _add_text(group, "TransformType", f"{kind}_float_{dims}_{dims}")
    # Not compressed: it would take seconds of processor time and save only a tenth of the size of a field in float32.
    group.create_dataset("TransformParameters", data=parameters.reshape(-1))
    group.create_dataset("TransformFixedParameters", data=np.asarray(fixed, np.float64))


def _add_text(group: Any, name: str, text: str) -> None:
    group.create_dataset(name, data=[text], dtype=h5py.string_dtype("ascii"))


def save_chain_file(path: str | Path, parts: Sequence[Part], spatial_dims: int = 3) -> None:
    """Write a chain of maps as an ITK composite in float32, ``.h5``, completely or not at all.

    If ``spatial_dims`` is 2, maps that keep the plane z = 0 are written as transforms of 2-D images.

    Raises:
        OSError: the file cannot be written.
    """
    dims = spatial_dims
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        _add_text(file, "ITKVersion", "5.4.0")
        _add_text(file, "HDFVersion", f"HDF5 library version: {h5py.version.hdf5_version}")
        whole = file.create_group("TransformGroup")
        _add_text(whole.create_group("0"), "TransformType", f"CompositeTransform_float_{dims}_{dims}")
        for number, part in enumerate(reversed(parts), start=1):  # ITK applies the last one first
            group = whole.create_group(str(number))
            if isinstance(part, tuple):
                ddf, affine = part
                require_right_angles(affine, "a displacement")
                vectors = lps_vectors(ddf, affine).astype(np.float32, copy=False).transpose(2, 1, 0, 3)
                placed = in_plane(affine) if dims == 2 else affine
                sides, lps = spacing(placed), ras_to_lps(dims) @ placed
                # size, origin, spacing, direction
                grid = [*ddf.shape[1 : dims + 1], *lps[:-1, -1], *sides, *(lps[:-1, :-1] / sides).flat]
                vectors = vectors if dims == 3 else vectors[0, ..., :2]
                _add(group, "DisplacementFieldTransform", np.ascontiguousarray(vectors), grid, dims)
            else:
                numbers = _parameters(in_plane(part) if dims == 2 else part)
                _add(group, "AffineTransform", numbers.astype(np.float32), [0.0] * dims, dims)


def read_chain_file(path: str | Path) -> list[Part] | None:
    """Read a chain of linear maps and displacements in 3-D that ITK, ANTs or this package wrote as HDF5.

    Returns None for any other or damaged file, which the caller can pass to ITK.
    """
    try:
        with h5py.File(path) as file:
            groups = [file["TransformGroup"][str(number)] for number in range(len(file["TransformGroup"]))]
            if groups[0]["TransformType"][0].startswith(b"CompositeTransform_"):
                groups.pop(0)
            elif len(groups) > 1:
                return None
            found = [_read_part(group) for group in groups]
    except (*_DAMAGED, AttributeError):
        return None
    parts = [part for part in reversed(found) if part is not None]  # ITK applies the last one first
    return parts if len(parts) == len(found) > 0 else None


def check_chain_file(path: str | Path) -> None:
    """Read all of an HDF5 transform file before ITK does, because ITK may crash on a damaged one.

    Raises:
        ValueError: the file is damaged, or holds no transforms.
    """
    try:
        with h5py.File(path) as file:
            for group in file["TransformGroup"].values():
                names = {"TransformType", "TransformParameters", "TransformFixedParameters"}
                if group["TransformType"][0].startswith(b"CompositeTransform_"):
                    names = {"TransformType"}
                for name in names:
                    group[name][:]
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged, or holds no transform of ITK: {error}.") from error


def _read_part(group: Any) -> Part | None:
    """Read one transform of a file; None if it is of another kind, or damaged."""
    kind = _KIND.fullmatch(group["TransformType"][0])
    if kind is None:
        return None
    fixed, numbers = group["TransformFixedParameters"][:], group["TransformParameters"][:]
    if kind[1] == b"AffineTransform":
        return _read_linear(numbers.astype(np.float64), fixed)
    size, origin, sides = fixed[:3].astype(int), fixed[3:6], fixed[6:9]
    direction = fixed[9:].reshape(3, 3)
    if not np.isfinite(numbers).all() or abs(abs(np.linalg.det(direction)) - 1) > 1e-3:
        return None
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * sides, origin
    affine = ras_to_lps(3) @ affine
    vectors = np.moveaxis(numbers.reshape(*size[::-1], 3), -1, 0).transpose(0, 3, 2, 1)
    return transform_vectors(np.linalg.inv((ras_to_lps(3) @ affine)[:3, :3]), vectors), affine


def _read_linear(numbers: NDArray[np.float64], centre: NDArray[np.float64]) -> Affine | None:
    lps = np.eye(4)
    lps[:3, :3] = numbers[:9].reshape(3, 3)
    lps[:3, 3] = numbers[9:] + centre - lps[:3, :3] @ centre
    usable = np.isfinite(lps).all() and np.linalg.cond(lps[:3, :3]) < 1e6
    return to_lps(lps) if usable else None
