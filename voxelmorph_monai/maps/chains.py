r"""Chain, evaluate, invert and apply transforms of points in mm with ITK, whichever program wrote them.

As in ITK, a transform :math:`T` takes points of the fixed image to points of the moving one, so it resamples a moving
image on the fixed grid. The parts of a chain are listed in the order in which a point of the fixed image passes through
them, as on ANTs' command line; ITK's composite holds the same parts in the opposite order. Points and affines are in
RAS mm, as in the whole package; the transforms themselves are ITK objects (LPS, float64).

Transforms of 2-D images are lifted to 3-D transforms that keep z; the images lie in the plane z = 0.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from voxelmorph_monai.affines import (
    Affine,
    ImageGrid,
    apply_affine,
    in_plane,
    inside,
    points_to_lps,
    require_right_angles,
    slabs,
    spacing,
)
from voxelmorph_monai.blocks import compose, invert, jacobian_determinant, linear_weights, weighted_vote
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.maps.spatial_map import INTERPOLATIONS, LABEL_INTERPOLATIONS, SpatialMap
from voxelmorph_monai.space.itk_bridge import Transform, from_itk, linear_transform, to_itk
from voxelmorph_monai.space.scan import Plane, Scan

__all__ = [
    "chain",
    "chain_of_map",
    "field_of",
    "field_transform",
    "flatten",
    "invert_points",
    "invert_transform",
    "is_field",
    "lift",
    "lower",
    "map_points",
    "matrix_of",
    "on_grid",
    "resample_image",
    "resample_labels",
]

itk, optimize = lazy("itk"), lazy("scipy.optimize")

_MISS = 1e-3  # largest error in mm of an inverse point; far below the voxel size of any image


def flatten(transform: Transform) -> list[Transform]:
    """Split a transform, including nested composites, into its parts, in the order in which a point passes them."""
    transform = itk.down_cast(transform)
    if not isinstance(transform, (itk.CompositeTransform[itk.D, 2], itk.CompositeTransform[itk.D, 3])):
        return [transform]
    held = [transform.GetNthTransform(i) for i in reversed(range(transform.GetNumberOfTransforms()))]
    return [part for each in held for part in flatten(each)]


def chain(transforms: Iterable[Transform]) -> Transform:
    """Combine transforms, in the order in which a point passes through them, into an ITK composite.

    Consecutive linear transforms become one affine transform without loss.

    >>> turn, shift = linear_transform(np.diag([2.0, 2, 2, 1])), linear_transform(np.eye(4) + np.eye(4, k=3))
    >>> map_points(chain([turn, shift]), np.array([[5.0, 3, 4]])).tolist()  # 2 * 5 + 1
    [[11.0, 6.0, 8.0]]
    """
    parts: list[Transform] = []
    for part in (part for transform in transforms for part in flatten(transform)):
        if parts and part.IsLinear() and parts[-1].IsLinear():
            part = linear_transform(matrix_of(part) @ matrix_of(parts.pop()))
        parts.append(part)
    composite = itk.CompositeTransform[itk.D, parts[0].GetInputSpaceDimension()].New()
    for part in reversed(parts):  # ITK applies what was added last first
        composite.AddTransform(part)
    return composite


def map_points(transform: Transform, points: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Map ``points`` ``(N, 3)`` (RAS, mm) by the transform, from the fixed image to the moving one."""
    mapped = [tuple(transform.TransformPoint(point)) for point in points_to_lps(points).tolist()]
    return points_to_lps(np.array(mapped, dtype=np.float64).reshape(points.shape))


def matrix_of(transform: Transform) -> Affine:
    """Matrix of a linear transform of any ITK class, in RAS mm: 4 x 4, or 3 x 3 in 2-D."""
    spatial_dims = transform.GetInputSpaceDimension()
    origin, *ends = map_points(transform, np.eye(spatial_dims + 1, spatial_dims, k=-1))
    matrix = np.eye(spatial_dims + 1)
    matrix[:-1, :-1], matrix[:-1, -1] = (np.array(ends) - origin).T, origin
    return matrix


def is_field(transform: Transform) -> bool:
    """Whether a transform is a displacement on a grid."""
    return isinstance(transform, (itk.DisplacementFieldTransform[itk.D, 2], itk.DisplacementFieldTransform[itk.D, 3]))


def field_transform(ddf: NDArray[np.floating[Any]], affine: Affine) -> Transform:
    """Convert a displacement ``(3, X, Y, Z)`` in voxels, and the affine of its grid (RAS, mm), to an ITK transform.

    A displacement ``(2, X, Y)`` with a 3 x 3 affine becomes a 2-D transform. Outside the grid ITK uses 0.
    """
    require_right_angles(affine, "a displacement")
    sides, lps = spacing(affine), points_to_lps(affine[:-1].T).T
    grid = [*ddf.shape[1:], *lps[:, -1], *sides, *(lps[:, :-1] / sides).flat]  # size, origin, spacing, direction
    transform = itk.DisplacementFieldTransform[itk.D, len(ddf)].New()
    transform.SetFixedParameters(itk.OptimizerParameters[itk.D]([float(number) for number in grid]))
    vectors = itk.array_view_from_image(transform.GetDisplacementField())  # memory that belongs to the transform
    vectors[:] = points_to_lps(np.tensordot(affine[:-1, :-1], ddf, axes=1).T)
    return transform


def _to_voxels(affine: Affine) -> NDArray[Any]:
    """Matrix from vectors in mm (LPS) to vectors in voxels: 3 x 3, or 2 x 2 in 2-D."""
    return np.linalg.inv(points_to_lps(affine[:-1, :-1].T).T)


def field_of(transform: Transform) -> tuple[NDArray[np.float64], Affine]:
    """Convert an ITK transform to a displacement ``(3, X, Y, Z)`` in voxels, and the affine of its grid (RAS, mm).

    This reverses :func:`field_transform`; a 2-D transform gives ``(2, X, Y)`` and a 3 x 3 affine.
    """
    vectors, affine = from_itk(transform.GetDisplacementField())
    return np.tensordot(_to_voxels(affine), vectors, axes=1), affine


def lift(transform: Transform) -> Transform:
    """Convert a 2-D transform to 3-D, the same at every z within half a metre; a 3-D transform is returned unchanged.

    The parts of a 2-D transform must be linear or displacements.
    """
    if transform.GetInputSpaceDimension() == 3:
        return transform
    parts, plane = [], Plane(np.eye(4))
    for part in flatten(transform):
        if part.IsLinear():
            parts.append(linear_transform(plane.place(matrix_of(part))))
        else:
            ddf, affine = field_of(part)
            thick = plane.place(affine) @ np.diag([1.0, 1, 1000, 1])
            parts.append(field_transform(np.pad(ddf, [(0, 1), (0, 0), (0, 0)])[..., None], thick))
    return chain(parts)


def lower(transform: Transform) -> Transform:
    """Convert a 3-D transform that :func:`lift` returned back to 2-D."""
    parts = []
    for part in flatten(transform):
        if is_field(part):
            ddf, affine = field_of(part)
            parts.append(field_transform(ddf[:2, ..., 0], in_plane(affine)))
        else:
            parts.append(linear_transform(in_plane(matrix_of(part))))
    return chain(parts)


def chain_of_map(map_: SpatialMap) -> Transform:
    """Convert the map of a registration to an ITK transform in double precision."""
    middle = [] if map_.field is None else [field_transform(*map_.field)]
    return chain([linear_transform(map_.pre), *middle, linear_transform(map_.post)])


def _scalars() -> Any:
    """ITK's class for 3-D images in float32."""
    return itk.Image[itk.F, 3]


def _interpolator(name: str) -> Any:
    """ITK's interpolation function for one of ``INTERPOLATIONS``."""
    if name == "linear":
        return itk.LinearInterpolateImageFunction[_scalars(), itk.D].New()
    if name == "nearest":
        return itk.NearestNeighborInterpolateImageFunction[_scalars(), itk.D].New()
    if name == "bspline":
        return itk.BSplineInterpolateImageFunction[_scalars(), itk.D, itk.F].New()
    return itk.WindowedSincInterpolateImageFunction[_scalars(), 3, itk.LanczosWindowFunction[3]].New()


def on_grid(transform: Transform, grid: ImageGrid) -> NDArray[np.float32]:
    """Sample a transform as one displacement ``(3, X, Y, Z)`` in voxels of a grid."""
    sample = itk.TransformToDisplacementFieldFilter[itk.Image[itk.Vector[itk.F, 3], 3], itk.D].New()
    sample.SetTransform(transform)
    sample.SetReferenceImage(to_itk(np.zeros(grid.size, np.uint8), grid.affine))
    sample.UseReferenceImageOn()
    sample.Update()
    vectors = from_itk(sample.GetOutput())[0]
    return np.einsum("ij,jxyz->ixyz", _to_voxels(grid.affine).astype(np.float32), vectors)


def resample_image(
    image: Scan, transform: Transform, grid: ImageGrid, interpolation: str = "linear"
) -> NDArray[np.float32]:
    """Resample an image on a grid through a transform; returns ``(X, Y, Z)``.

    The result is 0 where the transform leads more than half a voxel beyond the outermost voxels of the image.

    Args:
        image: image to resample.
        transform: from points of the grid to points of the image.
        grid: grid to sample on.
        interpolation: one of ``INTERPOLATIONS``; ``"bspline"`` is cubic, ``"lanczos"`` a windowed sinc of radius 3.
            These two can exceed the lowest and the highest intensity of the image.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"'{interpolation}' is not an interpolation of images. Choose one of {', '.join(INTERPOLATIONS)}."
        )
    resample = itk.ResampleImageFilter[_scalars(), _scalars()].New()
    resample.SetInput(to_itk(image.array.astype(np.float32, copy=False), image.affine))
    resample.SetTransform(transform)
    resample.SetInterpolator(_interpolator(interpolation))
    resample.SetReferenceImage(to_itk(np.zeros(grid.size, np.uint8), grid.affine))
    resample.UseReferenceImageOn()
    resample.Update()
    return from_itk(resample.GetOutput())[0]


def _shift(affine: Affine, start: Sequence[int]) -> Affine:
    """Affine of a grid that starts at voxel ``start`` of the grid with this affine."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start)
    return moved


def resample_labels(
    labels: Scan, transform: Transform, grid: ImageGrid, interpolation: str = "nearest"
) -> NDArray[Any]:
    """Resample a label map on a grid through a transform; returns ``(X, Y, Z)`` with labels of the map only.

    ``"linear"`` is the same as resampling the one-hot image of each label linearly and taking the argmax, with the
    smaller label if two are equal, but its memory does not depend on the number of labels. The border is treated as in
    :func:`resample_image`.

    Args:
        labels: label map to resample.
        transform: from points of the grid to points of the label map.
        grid: grid to sample on.
        interpolation: ``"nearest"`` for the label of the nearest voxel, ``"linear"`` for the label with the largest
            linearly interpolated weight.
    """
    if interpolation not in LABEL_INTERPOLATIONS:
        known = ", ".join(LABEL_INTERPOLATIONS)
        raise ValueError(f"'{interpolation}' is not an interpolation of label maps. Choose one of {known}.")
    array, to_voxels = labels.array, np.linalg.inv(labels.affine) @ grid.affine
    flat = torch.from_numpy(array.astype(np.int64)).flatten()
    resampled = np.zeros(grid.size, dtype=array.dtype)
    for part, index in slabs(grid.size):
        ddf = on_grid(transform, ImageGrid(index.shape[1:], _shift(grid.affine, (part.start, 0, 0))))
        at = apply_affine(to_voxels, index + ddf)
        if interpolation == "nearest":
            at = np.floor(at + 0.5)  # halves go up, as in ITK
        index[0] -= part.start  # `linear_weights` takes indices within the slab
        found = linear_weights(torch.from_numpy(at - index)[None], list(array.shape))
        votes = torch.stack([flat[voxel] for voxel, _ in found], dim=1)
        best = weighted_vote(votes, torch.stack([weight for _, weight in found], dim=1))[0, 0].numpy()
        resampled[part] = np.where(inside(at, array.shape), best, 0)
    return resampled


def _border_fit(ddf: NDArray[np.float64]) -> Affine:
    """Fit a 4 x 4 map of voxel indices to ``id + ddf`` in the outermost voxels of ``ddf`` ``(3, X, Y, Z)``."""
    border = np.ones(ddf.shape[1:], dtype=bool)
    border[tuple(slice(1, -1) if n > 1 else slice(None) for n in ddf.shape[1:])] = False  # for a slice, the rim
    points = np.vstack([np.argwhere(border).T, np.ones(border.sum())])
    fit = np.eye(4)
    fit[:3] += np.linalg.lstsq(points.T, ddf[:, border].T, rcond=None)[0].T
    return fit


def _require_no_folds(ddf: torch.Tensor) -> None:
    folds = int((jacobian_determinant(ddf, "forward") <= 0).sum())
    if folds:
        count = ddf[0, 0].numel()
        raise ValueError(
            f"the displacement has no inverse: it folds in {folds} of {count} voxels ({100 * folds / count:.2g} %)."
        )


def _invert_field(ddf: NDArray[np.float64], affine: Affine) -> tuple[list[Transform], float]:
    r"""Invert ``id + ddf``; returns a linear map followed by a displacement, and the largest error in mm.

    The linear map :math:`L` that fits the border is separated first, so that the rest, :math:`L^{-1} (id + u)`, stays
    near its grid even if ``ddf`` includes an affine registration. For a displacement with a border of zeros,
    :math:`L` is the identity. The rest is inverted on its grid, which is enlarged by the displacement at its border.
    """
    fit = _border_fit(ddf)
    _require_no_folds(torch.from_numpy(ddf)[None])
    back = np.linalg.inv(fit)
    index = np.indices(ddf.shape[1:], dtype=np.float64)
    rest = apply_affine(back, index + ddf) - index
    outermost = max(np.abs(rest.take([0, -1], axis + 1)).max() for axis in range(3))
    margin = int(np.ceil(outermost - 1e-6))  # tolerates rounding errors of the fit
    margins = [margin if n > 1 else 0 for n in ddf.shape[1:]]  # a slice remains a slice
    wider = torch.from_numpy(np.pad(rest, [(0, 0), *[(m, m) for m in margins]], mode="edge"))[None]
    inverse, left = invert(wider, step=0.5)  # converges for any stretch below 300 %
    if float(left) > 0.1:
        raise ValueError(
            f"the displacement cannot be inverted: the numerical inverse has an error of {float(left):.3g} voxels."
        )
    x, y, z = (slice(m, m + n) for m, n in zip(margins, ddf.shape[1:], strict=True))
    missed = compose(inverse, wider)[0, :, x, y, z].numpy()
    residual = np.linalg.norm(np.tensordot(affine[:3, :3], missed, axes=1), axis=0).max()
    parts = [field_transform(inverse[0].numpy(), _shift(affine, [-m for m in margins]))]
    if not np.allclose(fit, np.eye(4), atol=1e-9):
        parts.insert(0, linear_transform(affine @ back @ np.linalg.inv(affine)))
    return parts, float(residual)


def invert_transform(transform: Transform) -> tuple[Transform, float]:
    """Invert a chain: linear transforms exactly, displacements numerically.

    Each displacement is inverted on its own grid by the fixed-point iteration of
    :func:`~voxelmorph_monai.blocks.invert`.

    Returns:
        The inverse :math:`T'`, and its largest error in mm, :math:`|T'(T(x)) - x|` over the voxels of all
        displacements; 0 for linear transforms.

    Raises:
        ValueError: a part folds, has no inverse, or is neither linear nor a displacement.
    """
    parts, residual = [], 0.0
    for part in reversed(flatten(transform)):
        if part.IsLinear():
            parts.append(linear_transform(np.linalg.inv(matrix_of(part))))
        elif is_field(part):
            found, missed = _invert_field(*field_of(part))
            parts, residual = parts + found, max(residual, missed)
        else:
            raise ValueError(
                f"a {part.GetNameOfClass()} cannot be inverted. Write it as a displacement first: vxm convert --to "
                "1007 --reference FILE."
            )
    return chain(parts), residual


def _solve(part: Transform, point: NDArray[np.float64], starts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Find the point that ``part`` maps to ``point``, trying the starts in turn; the closest one if none succeeds."""

    def miss(guess: NDArray[np.float64]) -> NDArray[np.float64]:
        return map_points(part, guess[None])[0] - point

    found = []
    for start in starts:
        found.append(optimize.root(miss, start, tol=1e-10).x)
        if np.linalg.norm(miss(found[-1])) < _MISS:
            break
    return min(found, key=lambda guess: float(np.linalg.norm(miss(guess))))


def invert_points(transform: Transform, points: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], float]:
    """Map ``points`` ``(N, 3)`` (RAS, mm) by the inverse of the transform, from the moving image to the fixed one.

    Each part is inverted separately: exactly if it is linear, otherwise point by point with Powell's hybrid method.

    Returns:
        The points ``(N, 3)``, and the largest distance in mm between ``points`` and where the transform maps them.

    Raises:
        ValueError: the transform maps no point to one of ``points``.
    """
    found = np.asarray(points, dtype=np.float64)
    for part in reversed(flatten(transform)):
        if part.IsLinear():
            found = map_points(linear_transform(np.linalg.inv(matrix_of(part))), found)
            continue
        ends = [found, 2 * found - map_points(part, found)]
        if is_field(part):
            ddf, affine = field_of(part)
            back = affine @ np.linalg.inv(affine @ _border_fit(ddf))
            ends.insert(0, found @ back[:3, :3].T + back[:3, 3])
        found = np.array([_solve(part, *each) for each in zip(found, zip(*ends, strict=True), strict=True)]).reshape(
            -1, 3
        )
    missed = np.linalg.norm(map_points(transform, found) - points, axis=1)
    if missed.size and not missed.max() <= _MISS:
        worst = int(missed.argmax())
        raise ValueError(
            f"no point maps to {np.asarray(points)[worst].round(3).tolist()} (RAS, mm): the closest result is "
            f"{missed[worst]:.3g} mm away. The transform folds there, or does not reach this point."
        )
    return found, float(missed.max(initial=0.0))
