r"""Transforms of points in mm, whoever made them: chain, evaluate, invert and use them, by ITK.

A transform :math:`T` takes points of the fixed image to points of the moving one, as ITK resamples: it pulls images
from the moving grid to the fixed one. A chain of parts is written in the order in which a point of the fixed image goes
through them, which is the order of ANTs' command line; ITK's composite holds the same parts the other way round. Points
and affines are in RAS mm as everywhere in the package, the transforms themselves are ITK's (LPS, float64).

Those of 2-D images are lifted to 3-D ones that keep z; the images lie in the plane of z = 0.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import itk
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize

from voxelmorph_monai.blocks import compose, corners, invert, jacobian_determinant, majority
from voxelmorph_monai.spaces import (
    Affine,
    Plane,
    apply_affine,
    from_itk,
    in_plane,
    inside,
    linear_transform,
    points_to_lps,
    require_right_angles,
    slabs,
    spacing,
    to_itk,
)

__all__ = [
    "INTERPOLATIONS",
    "LABEL_INTERPOLATIONS",
    "chain",
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
    "pull_image",
    "pull_labels",
]

_Vectors = itk.Image[itk.Vector[itk.F, 3], 3]
_Scalars = itk.Image[itk.F, 3]
_MISS = 1e-3  # mm by which an inverse point may miss; finer than any image

INTERPOLATIONS = {
    "linear": itk.LinearInterpolateImageFunction[_Scalars, itk.D],
    "nearest": itk.NearestNeighborInterpolateImageFunction[_Scalars, itk.D],
    "bspline": itk.BSplineInterpolateImageFunction[_Scalars, itk.D, itk.F],  # cubic
    "lanczos": itk.WindowedSincInterpolateImageFunction[_Scalars, 3, itk.LanczosWindowFunction[3]],
}
"""How an image is read between voxels: names, and ITK's classes for images in float32."""

LABEL_INTERPOLATIONS = ("label", "nearest")
"""How a label map is read between voxels: the label with the largest linear share, or that of the nearest voxel."""


def flatten(transform: itk.Transform) -> list[itk.Transform]:
    """Parts of a transform, of composites in composites too, in the order in which a point goes through them."""
    transform = itk.down_cast(transform)
    if not isinstance(transform, (itk.CompositeTransform[itk.D, 2], itk.CompositeTransform[itk.D, 3])):
        return [transform]
    held = [transform.GetNthTransform(i) for i in reversed(range(transform.GetNumberOfTransforms()))]
    return [part for each in held for part in flatten(each)]


def chain(transforms: Iterable[itk.Transform]) -> itk.Transform:
    """One composite of transforms, given in the order in which a point goes through them.

    Linear neighbours become one affine transform, exactly.

    >>> turn, shift = linear_transform(np.diag([2.0, 2, 2, 1])), linear_transform(np.eye(4) + np.eye(4, k=3))
    >>> map_points(chain([turn, shift]), np.array([[5.0, 3, 4]])).tolist()  # 2 * 5 + 1
    [[11.0, 6.0, 8.0]]
    """
    parts: list[itk.Transform] = []
    for part in (part for transform in transforms for part in flatten(transform)):
        if parts and part.IsLinear() and parts[-1].IsLinear():
            part = linear_transform(matrix_of(part) @ matrix_of(parts.pop()))
        parts.append(part)
    composite = itk.CompositeTransform[itk.D, parts[0].GetInputSpaceDimension()].New()
    for part in reversed(parts):  # ITK applies what was added last first
        composite.AddTransform(part)
    return composite


def map_points(transform: itk.Transform, points: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Take ``points`` ``(N, 3)`` (RAS, mm) along the transform: points of the fixed image to the moving one."""
    mapped = [tuple(transform.TransformPoint(point)) for point in points_to_lps(points).tolist()]
    return points_to_lps(np.array(mapped, dtype=np.float64).reshape(points.shape))


def matrix_of(transform: itk.Transform) -> Affine:
    """4 x 4 matrix of a linear transform (RAS, mm), of whichever of ITK's classes; 3 x 3 in 2-D."""
    spatial_dims = transform.GetInputSpaceDimension()
    origin, *ends = map_points(transform, np.eye(spatial_dims + 1, spatial_dims, k=-1))
    matrix = np.eye(spatial_dims + 1)
    matrix[:-1, :-1], matrix[:-1, -1] = (np.array(ends) - origin).T, origin
    return matrix


def is_field(transform: itk.Transform) -> bool:
    """Whether a transform is a displacement on a grid."""
    return isinstance(transform, (itk.DisplacementFieldTransform[itk.D, 2], itk.DisplacementFieldTransform[itk.D, 3]))


def field_transform(ddf: NDArray[np.floating[Any]], affine: Affine) -> itk.Transform:
    """ITK transform of a displacement ``(3, X, Y, Z)`` in voxels of the grid with this affine (RAS, mm).

    One of ``(2, X, Y)`` with a 3 x 3 affine becomes a 2-D transform. Beyond the grid ITK takes the displacement for 0.
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
    """3 x 3 matrix from vectors in mm (LPS) to vectors in voxels; 2 x 2 in 2-D."""
    return np.linalg.inv(points_to_lps(affine[:-1, :-1].T).T)


def field_of(transform: itk.Transform) -> tuple[NDArray[np.float64], Affine]:
    """Displacement ``(3, X, Y, Z)`` in voxels of its own grid, and the affine of that grid (RAS, mm); in 2-D as given.

    The inverse of :func:`field_transform`.
    """
    vectors, affine = from_itk(transform.GetDisplacementField())
    return np.tensordot(_to_voxels(affine), vectors, axes=1), affine


def lift(transform: itk.Transform) -> itk.Transform:
    """A 2-D transform as one in 3-D, which does the same at any z within half a metre; a 3-D one as it is.

    In 2-D, its parts must be linear or displacements.
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


def lower(transform: itk.Transform) -> itk.Transform:
    """The 2-D transform that :func:`lift` makes this one of."""
    parts = []
    for part in flatten(transform):
        if is_field(part):
            ddf, affine = field_of(part)
            parts.append(field_transform(ddf[:2, ..., 0], in_plane(affine)))
        else:
            parts.append(linear_transform(in_plane(matrix_of(part))))
    return chain(parts)


def on_grid(transform: itk.Transform, size: Sequence[int], affine: Affine) -> NDArray[np.float32]:
    """Sample a transform as one displacement ``(3, *size)`` in voxels of the grid with this affine (RAS, mm)."""
    sample = itk.TransformToDisplacementFieldFilter[_Vectors, itk.D].New()
    sample.SetTransform(transform)
    sample.SetReferenceImage(to_itk(np.zeros(size, np.uint8), affine))
    sample.UseReferenceImageOn()
    sample.Update()
    vectors = from_itk(sample.GetOutput())[0]
    return np.einsum("ij,jxyz->ixyz", _to_voxels(affine).astype(np.float32), vectors)


def pull_image(
    image: tuple[NDArray[np.float32], Affine],
    transform: itk.Transform,
    size: Sequence[int],
    affine: Affine,
    interpolation: str = "linear",
) -> NDArray[np.float32]:
    """Pull an image ``(array, affine)`` onto another grid: the result at a point is the image at its mapped point.

    More than half a voxel beyond the outermost voxels the image is 0.

    Args:
        image: intensities ``(X, Y, Z)`` and affine (RAS, mm).
        transform: from points of the other grid to points of the image.
        size: of the other grid.
        affine: of the other grid (RAS, mm).
        interpolation: one of ``INTERPOLATIONS``; ``"bspline"`` is cubic, ``"lanczos"`` a windowed sinc of radius 3. The
            last two reach beyond the image's lowest and highest intensity.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got '{interpolation}'.")
    resample = itk.ResampleImageFilter[_Scalars, _Scalars].New()
    resample.SetInput(to_itk(image[0].astype(np.float32, copy=False), image[1]))
    resample.SetTransform(transform)
    resample.SetInterpolator(INTERPOLATIONS[interpolation].New())
    resample.SetReferenceImage(to_itk(np.zeros(size, np.uint8), affine))
    resample.UseReferenceImageOn()
    resample.Update()
    return from_itk(resample.GetOutput())[0]


def _shift(affine: Affine, start: Sequence[int]) -> Affine:
    """Affine of a grid that starts at voxel ``start`` of the grid with this affine."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start)
    return moved


def pull_labels(
    labels: tuple[NDArray[Any], Affine],
    transform: itk.Transform,
    size: Sequence[int],
    affine: Affine,
    interpolation: str = "label",
) -> NDArray[Any]:
    """Pull a label map ``(array, affine)`` onto another grid: the label with the largest linearly interpolated share.

    Equal to pulling the one-hot image of each label linearly and taking the argmax; of equal shares the smaller label
    wins. The memory it needs does not depend on the number of labels. Arguments and border as in :func:`pull_image`.

    Args:
        labels: whole numbers ``(X, Y, Z)`` and affine (RAS, mm).
        transform: from points of the other grid to points of the label map.
        size: of the other grid.
        affine: of the other grid (RAS, mm).
        interpolation: ``"label"``, or ``"nearest"`` for the label of the nearest voxel.
    """
    if interpolation not in LABEL_INTERPOLATIONS:
        known = ", ".join(LABEL_INTERPOLATIONS)
        raise ValueError(f"interpolation of labels must be one of {known}, got '{interpolation}'.")
    array, to_voxels = labels[0], np.linalg.inv(labels[1]) @ affine
    flat = torch.from_numpy(array.astype(np.int64)).flatten()
    pulled = np.zeros(size, dtype=array.dtype)
    for part, index in slabs(size):
        ddf = on_grid(transform, index.shape[1:], _shift(affine, (part.start, 0, 0)))
        at = apply_affine(to_voxels, index + ddf)
        if interpolation == "nearest":
            at = np.floor(at + 0.5)  # halves go up, as in ITK
        index[0] -= part.start  # for `corners` the slab is all there is
        found = corners(torch.from_numpy(at - index)[None], list(array.shape))
        votes = torch.stack([flat[voxel] for voxel, _ in found], dim=1)
        best = majority(votes, torch.stack([weight for _, weight in found], dim=1))[0, 0].numpy()
        pulled[part] = np.where(inside(at, array.shape), best, 0)
    return pulled


def _border_fit(ddf: NDArray[np.float64]) -> Affine:
    """4 x 4 map of voxels that comes closest to ``id + ddf`` in the outermost voxels of ``ddf`` ``(3, X, Y, Z)``."""
    border = np.ones(ddf.shape[1:], dtype=bool)
    border[tuple(slice(1, -1) if n > 1 else slice(None) for n in ddf.shape[1:])] = False  # of a slice, its rim
    points = np.vstack([np.argwhere(border).T, np.ones(border.sum())])
    fit = np.eye(4)
    fit[:3] += np.linalg.lstsq(points.T, ddf[:, border].T, rcond=None)[0].T
    return fit


def _require_no_folds(ddf: torch.Tensor) -> None:
    folds = int((jacobian_determinant(ddf, "forward") <= 0).sum())
    if folds:
        count = ddf[0, 0].numel()
        raise ValueError(
            f"a displacement must not fold to have an inverse, but it does in {folds} of {count} voxels "
            f"({100 * folds / count:.2g} %)."
        )


def _invert_field(ddf: NDArray[np.float64], affine: Affine) -> tuple[list[itk.Transform], float]:
    r"""Inverse of ``id + ddf`` as a linear map, then a displacement, and the residual in mm.

    The linear map :math:`L` that fits the border is taken off first, so that the rest, :math:`L^{-1} (id + u)`, stays
    near its grid even where ``ddf`` holds an affine registration; for a displacement that ends in zeros it is the
    identity. The rest is inverted on its grid, widened by what leaves it.
    """
    fit = _border_fit(ddf)
    _require_no_folds(torch.from_numpy(ddf)[None])
    back = np.linalg.inv(fit)
    index = np.indices(ddf.shape[1:], dtype=np.float64)
    rest = apply_affine(back, index + ddf) - index
    outermost = max(np.abs(rest.take([0, -1], axis + 1)).max() for axis in range(3))
    margin = int(np.ceil(outermost - 1e-6))  # the fit of a border of zeros is off by rounding
    margins = [margin if n > 1 else 0 for n in ddf.shape[1:]]  # a slice stays one
    wider = torch.from_numpy(np.pad(rest, [(0, 0), *[(m, m) for m in margins]], mode="edge"))[None]
    inverse, left = invert(wider, step=0.5)  # converges for any stretch below 300 %
    if float(left) > 0.1:
        raise ValueError(
            f"a displacement must have an inverse, but the search for it is still {float(left):.3g} voxels off."
        )
    x, y, z = (slice(m, m + n) for m, n in zip(margins, ddf.shape[1:], strict=True))
    missed = compose(inverse, wider)[0, :, x, y, z].numpy()
    residual = np.linalg.norm(np.tensordot(affine[:3, :3], missed, axes=1), axis=0).max()
    parts = [field_transform(inverse[0].numpy(), _shift(affine, [-m for m in margins]))]
    if not np.allclose(fit, np.eye(4), atol=1e-9):
        parts.insert(0, linear_transform(affine @ back @ np.linalg.inv(affine)))
    return parts, float(residual)


def invert_transform(transform: itk.Transform) -> tuple[itk.Transform, float]:
    """Inverse of a chain of linear transforms, exactly, and displacements, numerically.

    A displacement is inverted by the fixed point of :func:`~voxelmorph_monai.blocks.invert` on its own grid.

    Returns:
        The inverse :math:`T'` and its residual in mm: of each displacement, at the voxels of its grid, the largest
        :math:`|T'(T(x)) - x|`; 0 for linear transforms.

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
                f"a transform to invert must be linear or a displacement, got a {part.GetNameOfClass()}: write it as a "
                "displacement first (vxm convert --to 1007 --reference FILE)."
            )
    return chain(parts), residual


def _solve(
    part: itk.Transform, point: NDArray[np.float64], starts: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Point that ``part`` takes to ``point``, searched from each start until one is found; otherwise the closest."""

    def miss(guess: NDArray[np.float64]) -> NDArray[np.float64]:
        return map_points(part, guess[None])[0] - point

    found = []
    for start in starts:
        found.append(optimize.root(miss, start, tol=1e-10).x)
        if np.linalg.norm(miss(found[-1])) < _MISS:
            break
    return min(found, key=lambda guess: float(np.linalg.norm(miss(guess))))


def invert_points(transform: itk.Transform, points: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], float]:
    """Take ``points`` ``(N, 3)`` (RAS, mm) back along the transform: points of the moving image to the fixed one.

    Each part is undone by itself: exactly where it is linear, elsewhere point by point, by Powell's hybrid method.

    Returns:
        The points, and by how much the transform misses where they came from, in mm, at most.

    Raises:
        ValueError: a point has no counterpart.
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
            f"a point must have a counterpart, but none comes closer to {np.asarray(points)[worst].round(3).tolist()} "
            f"(RAS, mm) than {missed[worst]:.3g} mm: the transform folds there, or does not reach it."
        )
    return found, float(missed.max(initial=0.0))
