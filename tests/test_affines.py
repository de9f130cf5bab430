"""Rotations that cover all turns of a head."""

import numpy as np
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import even_rotations


def test_rotations_are_spread_evenly() -> None:
    found = even_rotations(500)
    np.testing.assert_allclose(found[0], np.eye(3))
    np.testing.assert_allclose(found @ found.transpose(0, 2, 1), np.broadcast_to(np.eye(3), found.shape), atol=1e-12)
    assert np.allclose(np.linalg.det(found), 1)
    any_turn = Rotation.random(2000, random_state=0).as_matrix()
    nearest = np.einsum("nij,mij->mn", found, any_turn).max(axis=1)
    farthest = np.degrees(np.arccos((nearest.min() - 1) / 2))
    # 500 balls of 22 degrees have the volume of all rotations, so that none can cover them with less
    assert 22 < farthest < 33
