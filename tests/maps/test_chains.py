"""Chains of transforms against SimpleITK, which reads, chains and resamples by itself."""

import re
from pathlib import Path
from typing import Any

import itk
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from fields import FIXED, LPS, MIRRORED, MOVING, OBLIQUE, POINT, affine_map, fade, image, inner, smooth
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import Affine, ImageGrid
from voxelmorph_monai.blocks import jacobian_determinant
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.maps.chains import (
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
    resample_image,
    resample_labels,
)
from voxelmorph_monai.maps.displacements import save_displacement
from voxelmorph_monai.space.itk_bridge import linear_transform
from voxelmorph_monai.space.scan import Scan


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
def test_images_are_resampled_as_by_simpleitk(ours: Any, peer: sitk.Transform, name: str, tmp_path: Path) -> None:
    moving = sitk_image(image(), MIRRORED, tmp_path / "moving.nii.gz")
    fixed = sitk_image(image(FIXED), OBLIQUE, tmp_path / "fixed.nii.gz")
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, peer, PEERS[name], 0.0)).T
    resampled = resample_image(Scan(image(), MIRRORED), ours, ImageGrid(FIXED, OBLIQUE), name)
    assert resampled.dtype == np.float32
    assert 0.3 < (resampled != 0).mean() < 1  # part of the fixed grid sees the moving image, part lies beyond
    off = np.abs(resampled - expected) > 0.01  # points differ by 1e-5 mm, intensities by 30 a voxel
    assert off.mean() < 1e-3  # those that lie just within or just beyond half a voxel


def test_lanczos_is_its_formula() -> None:
    array, offset = image(), np.array([0.5, 0.25, 0.4])
    shift = np.eye(4)
    shift[:3, 3] = offset
    resampled = resample_image(Scan(array, np.eye(4)), linear_transform(shift), ImageGrid(MOVING, np.eye(4)), "lanczos")
    expected = array.astype(np.float64)
    for axis, part in enumerate(offset):
        taps = np.arange(-2, 4)  # the three voxels to each side
        weights = np.sinc(part - taps) * np.sinc((part - taps) / 3)
        expected = sum(w * np.roll(expected, -k, axis) for k, w in zip(taps, weights, strict=True))
    within = (slice(3, -4),) * 3
    np.testing.assert_allclose(resampled[within], expected[within], atol=1e-3)  # float32 of intensities up to 100


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
    resampled = resample_labels(Scan(labels, MIRRORED), ours, ImageGrid(FIXED, OBLIQUE), "linear")
    assert resampled.dtype == np.int16
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(resampled[clear], values[total.argmax(axis=0)][clear])
    assert set(np.unique(resampled)) == set(values)
    assert not resampled[total.sum(axis=0) == 0].any()  # beyond the moving image
    nearest = resample_labels(Scan(labels, MIRRORED), ours, ImageGrid(FIXED, OBLIQUE))
    as_image = resample_image(Scan(labels.astype(np.float32), MIRRORED), ours, ImageGrid(FIXED, OBLIQUE), "nearest")
    assert (nearest != as_image).mean() < 1e-3  # float32 displacements, at the same half voxels
    assert (nearest != resampled).any()


def test_of_two_nearest_voxels_labels_take_the_upper_one_as_itk_does() -> None:
    labels = np.arange(1, 1 + np.prod(MOVING), dtype=np.int32).reshape(MOVING)
    half = np.eye(4)
    half[:3, 3] = 0.5, -0.5, 0  # mm, half a voxel
    resampled = resample_labels(Scan(labels, np.eye(4)), linear_transform(half), ImageGrid(MOVING, np.eye(4)))
    np.testing.assert_array_equal(resampled[:-1], labels[1:])
    as_float = Scan(labels.astype(np.float32), np.eye(4))
    as_image = resample_image(as_float, linear_transform(half), ImageGrid(MOVING, np.eye(4)), "nearest")
    np.testing.assert_array_equal(resampled[:-1, 1:], as_image[:-1, 1:])  # within the image


def test_slabs_do_not_show(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(1).integers(0, 5, MOVING)
    whole = resample_labels(Scan(labels, MIRRORED), ours, ImageGrid(FIXED, OBLIQUE), "linear")
    monkeypatch.setattr("voxelmorph_monai.affines._SLAB_VOXELS", 4 * FIXED[1] * FIXED[2])
    parts = resample_labels(Scan(labels, MIRRORED), ours, ImageGrid(FIXED, OBLIQUE), "linear")
    assert (whole != parts).mean() < 1e-3  # origins of slabs are rounded differently


def test_a_field_comes_back() -> None:
    ddf, affine = field_of(field_transform(smooth(FIXED, 2), OBLIQUE))
    np.testing.assert_allclose(ddf, smooth(FIXED, 2), atol=1e-12)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-12)


def test_a_field_on_its_own_grid_is_itself() -> None:
    # float32, to the outermost voxels, of displacements up to 2 voxels
    np.testing.assert_allclose(
        on_grid(field_transform(smooth(FIXED, 2), OBLIQUE), ImageGrid(FIXED, OBLIQUE)), smooth(FIXED, 2), atol=1e-5
    )


def test_on_another_grid_it_is_the_same_map(ours: Any) -> None:
    coarse = OBLIQUE @ np.diag([2, 2, 2, 1])
    ddf = on_grid(ours, ImageGrid((9, 11, 7), coarse))
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


def test_a_field_that_stretches_to_almost_threefold_is_inverted() -> None:
    size, affine = (41, 9, 8), np.diag([1.5, 2, 1.2, 1])
    along = np.arange(41) - 20.0
    ddf = np.zeros((3, *size))
    ddf[0] = (4 * np.tanh(along / 2.2) * np.clip((20 - abs(along)) / 14, 0, 1)).reshape(-1, 1, 1)
    assert 1.6 < np.diff(ddf[0], axis=0).max() < 2  # beyond 1, where a fixed point with whole steps runs away
    transform = field_transform(ddf, affine)
    inverse, residual = invert_transform(transform)
    points = np.array([[x, 7.0, 4] for x in np.arange(20, 41)])
    missed = np.linalg.norm(map_points(inverse, map_points(transform, points)) - points, axis=1)
    assert residual < 0.75  # half a voxel, as above
    assert missed.max() < 0.75


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
    with pytest.raises(ValueError, match=rf"folds in {count} of 6555 voxels"):
        invert_transform(field_transform(folding(), OBLIQUE))


def test_a_point_that_nothing_is_taken_to_is_named() -> None:
    ddf = np.zeros((3, *FIXED))
    ddf[0] = 5.0  # within the grid all is shifted, beyond it nothing is: a gap of 5 voxels opens at one side
    gap = OBLIQUE @ [2.0, 11.0, 7.0, 1.0]
    with pytest.raises(ValueError, match=re.escape(f"{gap[:3].round(3).tolist()} (RAS, mm)")):
        invert_points(field_transform(ddf, OBLIQUE), gap[None, :3])


def test_what_is_neither_linear_nor_a_displacement_is_not_inverted() -> None:
    spline = itk.BSplineTransform[itk.D, 3, 3].New()
    with pytest.raises(ValueError, match=r"BSplineTransform .*vxm convert"):
        invert_transform(spline)


def test_unknown_interpolations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'cubic'.* linear, nearest, bspline, lanczos"):
        resample_image(Scan(image(), MIRRORED), linear_transform(np.eye(4)), ImageGrid(FIXED, OBLIQUE), "cubic")
