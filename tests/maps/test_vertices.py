"""Many points moved together, against ITK, which moves one at a time."""

import numpy as np
import pytest
from fields import FIXED, OBLIQUE, affine_map, fade, inner, smooth

from voxelmorph_monai.maps.chains import chain, field_transform, invert_points, map_points
from voxelmorph_monai.maps.vertices import Mover
from voxelmorph_monai.space.itk_bridge import linear_transform


def transform() -> object:
    return chain([field_transform(fade(smooth(FIXED, 1)), OBLIQUE), linear_transform(affine_map())])


def test_points_go_where_itk_takes_them() -> None:
    mover = Mover(transform(), "fixed")
    np.testing.assert_allclose(mover(inner()), map_points(transform(), inner()), atol=1e-9)
    assert mover.outside == 0
    assert mover.residual == 0


def test_points_come_back() -> None:
    there = map_points(transform(), inner())
    mover = Mover(transform(), "moving")
    found = mover(there)
    np.testing.assert_allclose(found, inner(), atol=2e-3)  # twice the 1e-3 mm that the search may miss by
    np.testing.assert_allclose(found, invert_points(transform(), there)[0], atol=2e-3)
    assert 0 < mover.residual <= 1e-3


def test_a_steep_displacement_is_undone_by_half_steps() -> None:
    index = np.indices(FIXED, dtype=float)
    ddf = 1.4 * (index - np.reshape(FIXED, (3, 1, 1, 1)) / 2)  # stretches by 2.4: full steps run away
    mover = Mover(field_transform(ddf, OBLIQUE), "moving")
    there = map_points(field_transform(ddf, OBLIQUE), inner())
    np.testing.assert_allclose(mover(there), inner(), atol=2e-3)


def test_beyond_the_grid_a_displacement_continues() -> None:
    ddf = np.zeros((3, *FIXED))
    ddf[1] = 2.0  # voxels of 1.6 mm, up to the border: ITK's map would tear there
    moved = OBLIQUE[:3, 1] * 2.0
    line = np.linspace([9.0, 11, 7], [9.0, 40, 7], 50)  # 23 voxels along the second axis
    points = line @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]
    for side, sign in (("fixed", 1), ("moving", -1)):
        mover = Mover(field_transform(ddf, OBLIQUE), side)
        np.testing.assert_allclose(mover(points), points + sign * moved, atol=1e-3)
        end = 22.5 + (2.0 if side == "moving" else 0.0)  # what comes back is outside where it arrives
        assert mover.outside == int((line[:, 1] >= end).sum())


def test_a_tear_is_searched_point_by_point() -> None:
    ddf = np.zeros((3, *FIXED))
    ddf[0, 10:] = 8.0  # a voxel becomes 9: too much for half steps, too
    tear = field_transform(ddf, OBLIQUE)
    index = np.array([[9.5, 8.0, 7.0], [9.2, 12, 5], [6, 8, 7], [12, 8, 7]])
    points = index @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]
    np.testing.assert_allclose(Mover(tear, "moving")(map_points(tear, points)), points, atol=2e-3)


@pytest.mark.parametrize("mirrored", [False, True])
def test_mirrors(mirrored: bool) -> None:
    turn = np.diag([-1.0 if mirrored else 1.0, 1, 1, 1])
    assert Mover(chain([transform(), linear_transform(turn)]), "moving").mirrors is mirrored


def test_no_points_are_no_points() -> None:
    assert Mover(transform(), "moving")(np.zeros((0, 3))).shape == (0, 3)
