r"""Map the many points of surfaces and streamlines by a transform or its inverse.

:func:`~voxelmorph_monai.maps.chains.map_points` calls ITK for each point; here NumPy maps all points together. There is
one difference: outside the grid of a displacement, ITK uses 0, which would tear a shape that crosses the border. Here
the value at the border is used, and the points outside are counted.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import apply_affine, inside
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.maps.chains import field_of, flatten, invert_points, is_field, map_points, matrix_of
from voxelmorph_monai.space.itk_bridge import Transform

__all__ = ["Mover"]

ndimage = lazy("scipy.ndimage")

_MISS = 1e-3  # largest error in mm of an inverse point, as in `invert_points`
_ROUNDS = ((1.0, 30), (0.5, 200))  # step and count: full steps are fast, half steps converge up to 300 % stretch
_Points = NDArray[np.float64]


class _Bent:
    """A displacement as a map of points, which uses the value at the border outside its grid."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        self.ddf, self.affine = field_of(transform)
        self.to_voxels = np.linalg.inv(self.affine)

    def outside(self, points: _Points) -> NDArray[np.bool_]:
        return ~inside(apply_affine(self.to_voxels, points.T), self.ddf.shape[1:])

    def __call__(self, points: _Points) -> _Points:
        index = apply_affine(self.to_voxels, points.T)
        index[np.array(self.ddf.shape[1:]) == 1] = 0.0  # a slice extends without limit across its plane
        offset = np.stack([ndimage.map_coordinates(u, index, np.float64, order=1, mode="nearest") for u in self.ddf])
        return points + (self.affine[:3, :3] @ offset).T

    def back(self, points: _Points) -> _Points:
        """Search the points that this map takes to ``points`` by fixed-point iteration, which may not converge."""
        found, left = points.copy(), np.arange(len(points))
        for step, number in _ROUNDS:
            for _ in range(number):
                missed = self(found[left]) - points[left]
                left, missed = (each[np.linalg.norm(missed, axis=1) > _MISS / 10] for each in (left, missed))
                if not len(left):
                    return found
                found[left] -= step * missed
        return found


class Mover:
    """Map points by a transform or its inverse, and record problems over all calls.

    Args:
        transform: 3-D transform from points of the fixed image to points of the moving one.
        drawn_in: image of the points: ``"fixed"`` maps them to the moving image by the transform, ``"moving"`` maps
            them to the fixed image by the inverse.

    Attributes:
        outside: number of points so far that lay outside the grid of a displacement.
        residual: largest error of a numerical inverse so far, in mm.
        mirrors: whether the linear parts swap left and right.

    >>> from voxelmorph_monai.space.itk_bridge import linear_transform
    >>> Mover(linear_transform(np.diag([2.0, 2, 2, 1])), "moving")(np.array([[2.0, 4, 6]])).tolist()
    [[1.0, 2.0, 3.0]]
    """

    def __init__(self, transform: Transform, drawn_in: str) -> None:
        self.backwards = drawn_in == "moving"
        parts = flatten(transform)[:: -1 if self.backwards else 1]
        matrices = [matrix_of(part) for part in parts if part.IsLinear()]
        self.mirrors = bool(np.prod([np.linalg.det(matrix) for matrix in matrices]) < 0)
        self._parts: list[Any] = [
            matrix_of(part) if part.IsLinear() else _Bent(part) if is_field(part) else part for part in parts
        ]
        self.outside, self.residual = 0, 0.0

    def __call__(self, points: NDArray[np.floating[Any]]) -> _Points:
        """Map ``points`` ``(N, 3)`` (RAS, mm); returns ``(N, 3)``.

        Raises:
            ValueError: a point cannot be mapped by the inverse, as the transform folds there or does not reach it.
        """
        found = np.asarray(points, dtype=np.float64).reshape(-1, 3)
        beyond = np.zeros(len(found), dtype=bool)
        for part in self._parts:
            if isinstance(part, np.ndarray):
                matrix = np.linalg.inv(part) if self.backwards else part
                found = apply_affine(matrix, found.T).T
            elif not isinstance(part, _Bent):
                found = invert_points(part, found)[0] if self.backwards else map_points(part, found)
            elif self.backwards:
                found = self._undo(part, found)
                beyond |= part.outside(found)
            else:
                beyond |= part.outside(found)
                found = part(found)
        self.outside += int(beyond.sum())
        return found

    def _undo(self, part: _Bent, points: _Points) -> _Points:
        found = part.back(points)
        wrong = ~(np.linalg.norm(part(found) - points, axis=1) <= _MISS)
        if wrong.any():  # stretched or folded too much for the iteration to converge
            found[wrong] = invert_points(part.transform, points[wrong])[0]
        self.residual = max(self.residual, float(np.linalg.norm(part(found) - points, axis=1).max(initial=0.0)))
        return found
