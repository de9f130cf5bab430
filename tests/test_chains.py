"""Chains of transforms against SimpleITK, which reads, chains and resamples by itself."""

from pathlib import Path
from typing import Any

import itk
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from voxelmorph_monai.blocks import jacobian_determinant
from voxelmorph_monai.chains import (
    chain,
    field_of,
    field_transform,
    flatten,
    invert_points,
    invert_transform,
    is_field,
    map_points,
    matrix_of,
    on_grid,
    pull_image,
    pull_labels,
)
from voxelmorph_monai.spaces import Affine, linear_transform, save_displacement, save_image

FIXED, MOVING = (19, 23, 15), (21, 17, 25)
POINT = 1e-5  # mm: headers and displacements are float32, 60 mm off the origin
LPS = np.array([-1.0, -1.0, 1.0])


def grid(size: Any, axes: Any, sides: Any, angles: Any) -> Affine:
    """Affine of a grid about the origin of the world."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes @ np.diag(sides)
    affine[:3, 3] = [2.0, -3.0, 1.5] - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine


LIA, LAS = np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]]), np.diag([-1, 1, 1])
OBLIQUE = grid(FIXED, LIA, (2.0, 1.6, 3.0), (20, -35, 50))
MIRRORED = grid(MOVING, LAS, (1.8, 2.5, 1.4), (-8, 15, 30))


def smooth(size: Any, seed: int, reach: float = 2.0) -> NDArray[np.float64]:
    """Displacement in voxels, smooth, folding nowhere; it does not end in zeros."""
    rng = np.random.default_rng(seed)
    ddf = np.stack([gaussian_filter(rng.standard_normal(size), 3) for _ in size])
    return reach * ddf / np.abs(ddf).max()


def fade(ddf: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make a displacement end in zeros."""
    for axis, n in enumerate(ddf.shape[1:], 1):
        window = np.minimum(np.arange(n), np.arange(n)[::-1]).clip(max=4) / 4
        ddf = ddf * window.reshape(-1, *[1] * (3 - axis))
    return ddf


def affine_map() -> Affine:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", (9, -4, 6), degrees=True).as_matrix() @ np.diag([1.05, 0.95, 1.1])
    matrix[:3, 3] = [1.5, -2.0, 3.0]
    return matrix


def inner(num: int = 200, seed: int = 3) -> NDArray[np.float64]:
    """Points (RAS, mm) well within the fixed grid, between voxels."""
    index = np.random.default_rng(seed).uniform(4.5, np.array(FIXED) - 5.5, (num, 3))
    return index @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]


def image(size: Any = MOVING, seed: int = 5) -> NDArray[np.float32]:
    return (100 * gaussian_filter(np.random.default_rng(seed).random(size), 1)).astype(np.float32)


@pytest.fixture
def peer(tmp_path: Path) -> sitk.Transform:
    """The map of ``ours`` as SimpleITK reads it from files and chains it: the displacement first, then the affine."""
    save_displacement(tmp_path / "warp.nii.gz", smooth(FIXED, 1), OBLIQUE)
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "warp.nii.gz"), sitk.sitkVectorFloat64))
    lps = np.diag([*LPS, 1]) @ affine_map() @ np.diag([*LPS, 1])
    linear = sitk.AffineTransform(lps[:3, :3].ravel().tolist(), lps[:3, 3].tolist())
    return sitk.CompositeTransform([linear, field])  # the last one is applied first


@pytest.fixture
def ours() -> Any:
    return chain([field_transform(smooth(FIXED, 1), OBLIQUE), linear_transform(affine_map())])


def test_points_go_where_simpleitk_takes_them(ours: Any, peer: sitk.Transform) -> None:
    points = inner()
    expected = [peer.TransformPoint(point) for point in (points * LPS).tolist()]
    np.testing.assert_allclose(map_points(ours, points), np.array(expected) * LPS, atol=POINT)
    assert map_points(ours, np.zeros((0, 3))).shape == (0, 3)


def sitk_image(array: NDArray[Any], affine: Affine, path: Path) -> sitk.Image:
    save_image(path, array, affine)
    return sitk.ReadImage(str(path))


PEERS = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "bspline": sitk.sitkBSpline}


@pytest.mark.parametrize("name", PEERS)
def test_images_are_pulled_as_by_simpleitk(ours: Any, peer: sitk.Transform, name: str, tmp_path: Path) -> None:
    moving = sitk_image(image(), MIRRORED, tmp_path / "moving.nii.gz")
    fixed = sitk_image(image(FIXED), OBLIQUE, tmp_path / "fixed.nii.gz")
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, peer, PEERS[name], 0.0)).T
    pulled = pull_image((image(), MIRRORED), ours, FIXED, OBLIQUE, name)
    assert pulled.dtype == np.float32
    assert 0.3 < (pulled != 0).mean() < 1  # part of the fixed grid sees the moving image, part lies beyond
    off = np.abs(pulled - expected) > 0.01  # points differ by 1e-5 mm, intensities by 30 a voxel
    assert off.mean() < 1e-3  # those that lie just within or just beyond half a voxel


def test_lanczos_is_its_formula() -> None:
    array, offset = image(), np.array([0.5, 0.25, 0.4])
    shift = np.eye(4)
    shift[:3, 3] = offset
    pulled = pull_image((array, np.eye(4)), linear_transform(shift), MOVING, np.eye(4), "lanczos")
    expected = array.astype(np.float64)
    for axis, part in enumerate(offset):
        taps = np.arange(-2, 4)  # the three voxels to each side
        weights = np.sinc(part - taps) * np.sinc((part - taps) / 3)
        expected = sum(w * np.roll(expected, -k, axis) for k, w in zip(taps, weights, strict=True))
    within = (slice(3, -4),) * 3
    np.testing.assert_allclose(pulled[within], expected[within], atol=1e-3)  # float32 of intensities up to 100


def test_labels_are_the_largest_share_of_all_one_hot_images(ours: Any, peer: sitk.Transform, tmp_path: Path) -> None:
    values = np.array([0, 3, 17, 2035], np.int16)
    rough = gaussian_filter(np.random.default_rng(7).random(MOVING), 1)
    labels = values[np.digitize(rough, np.quantile(rough, [0.25, 0.5, 0.75]))]
    fixed = sitk_image(image(FIXED), OBLIQUE, tmp_path / "fixed.nii.gz")
    shares = []
    for value in values:
        one = sitk_image((labels == value).astype(np.float32), MIRRORED, tmp_path / "one.nii.gz")
        shares.append(sitk.GetArrayFromImage(sitk.Resample(one, fixed, peer, sitk.sitkLinear, 0.0)).T)
    total = np.array(shares)
    clear = np.sort(total, axis=0)[-1] - np.sort(total, axis=0)[-2] > 1e-4  # ties are decided by rounding
    pulled = pull_labels((labels, MIRRORED), ours, FIXED, OBLIQUE)
    assert pulled.dtype == np.int16
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(pulled[clear], values[total.argmax(axis=0)][clear])
    assert set(np.unique(pulled)) == set(values)
    assert not pulled[total.sum(axis=0) == 0].any()  # beyond the moving image
    nearest = pull_labels((labels, MIRRORED), ours, FIXED, OBLIQUE, "nearest")
    as_image = pull_image((labels.astype(np.float32), MIRRORED), ours, FIXED, OBLIQUE, "nearest")
    assert (nearest != as_image).mean() < 1e-3  # float32 displacements, at the same half voxels
    assert (nearest != pulled).any()


def test_slabs_do_not_show(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(1).integers(0, 5, MOVING)
    whole = pull_labels((labels, MIRRORED), ours, FIXED, OBLIQUE)
    monkeypatch.setattr("voxelmorph_monai.spaces._SLAB_VOXELS", 4 * FIXED[1] * FIXED[2])
    parts = pull_labels((labels, MIRRORED), ours, FIXED, OBLIQUE)
    assert (whole != parts).mean() < 1e-3  # origins of slabs are rounded differently


def test_a_field_comes_back() -> None:
    ddf, affine = field_of(field_transform(smooth(FIXED, 2), OBLIQUE))
    np.testing.assert_allclose(ddf, smooth(FIXED, 2), atol=1e-12)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-12)


def test_a_field_on_its_own_grid_is_itself() -> None:
    # float32, to the outermost voxels, of displacements up to 2 voxels
    np.testing.assert_allclose(
        on_grid(field_transform(smooth(FIXED, 2), OBLIQUE), FIXED, OBLIQUE), smooth(FIXED, 2), atol=1e-5
    )


def test_on_another_grid_it_is_the_same_map(ours: Any) -> None:
    coarse = OBLIQUE @ np.diag([2, 2, 2, 1])
    ddf = on_grid(ours, (9, 11, 7), coarse)
    index = np.array([[2, 3, 4], [7, 5, 1]])
    points = index @ coarse[:3, :3].T + coarse[:3, 3]
    moved = (index + ddf[(slice(None), *index.T)].T) @ coarse[:3, :3].T + coarse[:3, 3]
    np.testing.assert_allclose(moved, map_points(ours, points), atol=POINT)


def test_linear_neighbours_become_one_matrix() -> None:
    a, b = affine_map(), np.diag([1.1, 0.9, 1.0, 1.0])
    field = field_transform(smooth(FIXED, 2), OBLIQUE)
    parts = flatten(chain([linear_transform(a), chain([linear_transform(b), field]), linear_transform(b)]))
    assert [part.IsLinear() for part in parts] == [True, False, True]
    assert is_field(parts[1])
    np.testing.assert_allclose(matrix_of(parts[0]), b @ a, atol=1e-12)  # a first


def test_an_inverse_of_linear_transforms_is_exact() -> None:
    inverse, residual = invert_transform(chain([linear_transform(affine_map())]))
    assert residual == 0
    np.testing.assert_allclose(matrix_of(inverse) @ affine_map(), np.eye(4), atol=1e-12)


MAPS = {
    "fading": [fade(smooth(FIXED, 4, 2.5))],
    "to the border": [smooth(FIXED, 4, 1.5)],
    "between affines": [affine_map(), fade(smooth(FIXED, 4)), np.diag([1.1, 0.9, 1, 1])],
}


@pytest.mark.parametrize("parts", MAPS.values(), ids=MAPS.keys())
def test_a_numerical_inverse_undoes_the_map_within_its_residual(parts: list[NDArray[Any]]) -> None:
    transform = chain([linear_transform(p) if p.ndim == 2 else field_transform(p, OBLIQUE) for p in parts])
    inverse, residual = invert_transform(transform)
    missed = np.linalg.norm(map_points(inverse, map_points(transform, inner())) - inner(), axis=1)
    assert 0 < residual < 0.8  # half a voxel: between its voxels the inverse is linear
    assert missed.max() < 1.2 * residual  # an affine part may stretch it by 1.1


def with_affine() -> NDArray[np.float64]:
    """Displacement that holds an affine registration with a bend: rotation by 70 degrees, which -u cannot undo."""
    matrix = (
        np.linalg.inv(OBLIQUE)
        @ np.block(
            [[Rotation.from_euler("z", 70, degrees=True).as_matrix(), np.array([[9.0], [-30], [4]])], [np.eye(4)[3:]]]
        )
        @ OBLIQUE
    )
    index = np.indices(FIXED)
    bent = index + fade(smooth(FIXED, 6))
    return np.tensordot(matrix[:3, :3], bent, axes=1) + matrix[:3, 3].reshape(3, 1, 1, 1) - index


def test_a_field_that_holds_an_affine_registration_is_inverted() -> None:
    transform = field_transform(with_affine(), OBLIQUE)
    inverse, residual = invert_transform(transform)
    assert residual < 0.5
    moved = map_points(transform, inner())
    np.testing.assert_allclose(map_points(inverse, moved), inner(), atol=0.5)
    back, missed = invert_points(transform, moved)
    np.testing.assert_allclose(back, inner(), atol=1e-6)  # point by point: no grid in between
    assert missed < 1e-6


def test_points_go_back_to_where_they_came_from(ours: Any) -> None:
    back, residual = invert_points(ours, map_points(ours, inner()))
    np.testing.assert_allclose(back, inner(), atol=1e-6)
    assert residual < 1e-6


def folding() -> NDArray[np.float64]:
    ddf = np.zeros((3, *FIXED))
    ddf[0, 8:11] = [[[4.0]], [[0.0]], [[-4.0]]]  # the neighbours of a plane change sides
    return fade(ddf)


def test_what_folds_has_no_inverse() -> None:
    count = int((jacobian_determinant(torch.from_numpy(folding())[None], "forward") <= 0).sum())
    with pytest.raises(ValueError, match=rf"a displacement must not fold .* it does in {count} of 6555 voxels"):
        invert_transform(field_transform(folding(), OBLIQUE))


def test_a_point_that_nothing_is_taken_to_is_named() -> None:
    ddf = np.zeros((3, *FIXED))
    ddf[0] = 5.0  # within the grid all is shifted, beyond it nothing is: a gap of 5 voxels opens at one side
    gap = OBLIQUE @ [2.0, 11.0, 7.0, 1.0]
    with pytest.raises(
        ValueError, match=r"a point must have a counterpart, but none comes closer to \[.*\] \(RAS, mm\)"
    ):
        invert_points(field_transform(ddf, OBLIQUE), gap[None, :3])


def test_what_is_neither_linear_nor_a_displacement_is_not_inverted() -> None:
    spline = itk.BSplineTransform[itk.D, 3, 3].New()
    with pytest.raises(ValueError, match=r"must be linear or a displacement, got a BSplineTransform: write it as"):
        invert_transform(spline)


def test_unknown_interpolations_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^interpolation must be one of linear, nearest, bspline, lanczos, got 'cubic'"
    ):
        pull_image((image(), MIRRORED), linear_transform(np.eye(4)), FIXED, OBLIQUE, "cubic")
