import gzip
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from voxelmorph_monai import switch
from voxelmorph_monai.affines import (
    Affine,
    ImageGrid,
    in_plane,
    require_right_angles,
    slabs,
    spacing,
    to_lps,
)
from voxelmorph_monai.blocks import warp
from voxelmorph_monai.io.images import read_image, read_labels, save_image
from voxelmorph_monai.maps.displacements import read_displacement, save_displacement
from voxelmorph_monai.maps.spatial_map import Displacement, SpatialMap, warp_scan
from voxelmorph_monai.space.itk_bridge import from_itk, linear_transform, save_transform, to_itk, transform_affine
from voxelmorph_monai.space.scan import Scan

SIZE = (9, 12, 7)
HEADER = 1e-4  # mm: headers are float32, and the qform keeps a rotation as three of its four quaternion entries


def grid(axes: NDArray[Any], sides: tuple[float, float, float], angles: tuple[float, float, float]) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes @ np.diag(sides)
    affine[:3, 3] = [-31.0, 17.5, 44.25]
    return affine


RAS, LAS, LIA = np.eye(3), np.diag([-1, 1, 1]), np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]])
AFFINES = {
    "straight": grid(RAS, (1, 1, 1), (0, 0, 0)),
    "flipped": grid(LAS, (1, 1, 1), (0, 0, 0)),
    "permuted": grid(LIA, (1.5, 0.8, 2), (0, 0, 0)),
    "oblique": grid(LIA, (0.9, 1.1, 3), (20, -35, 50)),
    "mirrored oblique": grid(LAS, (0.7, 1.3, 2.1), (-8, 15, 100)),
}
affines = pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())


@pytest.fixture(params=[True, False], ids=["loops", "scipy"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "enabled", request.param)


SHEARED = AFFINES["oblique"] @ np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def noise(dtype: Any = np.float32) -> NDArray[Any]:
    return np.random.default_rng(0).uniform(0, 200, SIZE).astype(dtype)


def lps_of_voxel(affine: Affine, index: Any) -> NDArray[Any]:
    return ((affine @ [*index, 1])[:3]) * [-1, -1, 1]


@affines
@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
def test_simpleitk_finds_each_voxel_of_a_saved_image_at_its_point(tmp_path: Path, affine: Affine, name: str) -> None:
    array = noise()
    save_image(tmp_path / name, array, affine)
    image = sitk.ReadImage(str(tmp_path / name))
    for index in [(0, 0, 0), (8, 0, 0), (0, 11, 0), (0, 0, 6), (5, 3, 2)]:
        point = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(point, lps_of_voxel(affine, index), atol=HEADER)
        assert image.GetPixel(index) == array[index]


@affines
def test_a_saved_image_comes_back(tmp_path: Path, affine: Affine) -> None:
    array = noise()
    save_image(tmp_path / "image.nii.gz", array, affine)
    again, found = read_image(tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(again, array)
    np.testing.assert_allclose(found, affine, atol=HEADER)
    header = nib.load(tmp_path / "image.nii.gz").header
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=HEADER)
    assert (header["sform_code"], header["qform_code"], header.get_xyzt_units()[0]) == (2, 2, "mm")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.float32, np.float64])
def test_saving_keeps_the_type(tmp_path: Path, dtype: Any) -> None:
    save_image(tmp_path / "image.nii", noise(dtype), np.eye(4))
    image = nib.load(tmp_path / "image.nii")
    assert image.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), noise(dtype))


def test_a_sheared_image_is_saved_without_a_qform(tmp_path: Path) -> None:
    save_image(tmp_path / "image.nii", noise(), SHEARED)
    header = nib.load(tmp_path / "image.nii").header
    np.testing.assert_allclose(header.get_sform(), SHEARED, atol=HEADER)
    assert header["qform_code"] == 0


def test_mgz_is_read(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(noise(np.int16), AFFINES["oblique"]), tmp_path / "scan.mgz")
    array, affine = read_image(tmp_path / "scan.mgz")
    assert array.dtype == np.float32
    assert array.dtype.isnative  # MGZ is big-endian, which torch refuses
    np.testing.assert_array_equal(array, noise(np.int16))
    np.testing.assert_allclose(affine, AFFINES["oblique"], atol=HEADER)
    labels, _ = read_labels(tmp_path / "scan.mgz")
    assert labels.dtype == np.int16
    assert labels.dtype.isnative


def test_a_fourth_axis_of_length_one_is_dropped(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(noise()[..., None], np.eye(4)), tmp_path / "image.nii")
    assert read_image(tmp_path / "image.nii")[0].shape == SIZE


def test_stored_scaling_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "image.nii")
    expected = np.asanyarray(nib.load(tmp_path / "image.nii").dataobj)
    np.testing.assert_allclose(read_image(tmp_path / "image.nii")[0], expected, rtol=1e-6)  # float32


@affines
def test_itk_images_have_the_points_of_the_affine(affine: Affine) -> None:
    array = noise()
    image = to_itk(array, affine)
    for index in [(0, 0, 0), (8, 11, 6), (5, 3, 2)]:
        point = np.asarray(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose(point, lps_of_voxel(affine, index), atol=1e-9)  # double all the way
        assert image.GetPixel(index) == array[index]
    again, found = from_itk(image)
    np.testing.assert_array_equal(again, array)
    np.testing.assert_allclose(found, affine, atol=1e-9)


def test_the_matrix_of_an_itk_transform_moves_points_as_it_does() -> None:
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetCenter([3.0, -20.0, 11.0])
    transform.SetParameters(itk.OptimizerParameters[itk.D]([0.9, 0.1, 0.2, -0.3, 1.1, 0.05, 0, 0.2, 1, 4, -7, 12]))
    matrix = transform_affine(transform)
    for point in np.random.default_rng(1).uniform(-90, 90, (5, 3)):
        moved = matrix[:3, :3] @ point + matrix[:3, 3]
        expected = np.asarray(transform.TransformPoint((point * [-1, -1, 1]).tolist())) * [-1, -1, 1]
        np.testing.assert_allclose(moved, expected, atol=1e-9)
        np.testing.assert_allclose(to_lps(point), point * [-1, -1, 1])


def displaced(affine: Affine) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """A moving image, a displacement in voxels that differs by axis, and the warped image by ``blocks.warp``."""
    x = np.indices(SIZE) / np.reshape(SIZE, (3, 1, 1, 1))
    ddf = np.stack([1.3 * np.sin(3 * x[1]), 0.4 - 2 * x[2], 0.9 * x[0] - 0.6])
    moving = noise(np.float64)
    warped = warp(torch.from_numpy(moving)[None, None], torch.from_numpy(ddf)[None])[0, 0].numpy()
    return moving, ddf, warped


@affines
def test_itk_applies_a_saved_displacement_as_warp_does(tmp_path: Path, affine: Affine) -> None:
    moving, ddf, warped = displaced(affine)
    save_image(tmp_path / "moving.nii.gz", moving, affine)
    save_displacement(tmp_path / "ddf.nii.gz", ddf, affine)
    assert nib.load(tmp_path / "ddf.nii.gz").header["intent_code"] == 1007
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "ddf.nii.gz"), sitk.sitkVectorFloat64))
    image = sitk.ReadImage(str(tmp_path / "moving.nii.gz"))
    resampled = sitk.GetArrayFromImage(sitk.Resample(image, image, field, sitk.sitkLinear, -1.0)).T
    sampled = np.indices(SIZE) + ddf  # beyond the outermost voxels the two fill in different values
    inside = np.all([(p > 0.01) & (p < n - 1.01) for p, n in zip(sampled, SIZE, strict=True)], axis=0)
    assert inside.sum() > 200
    # float32 displacements and headers (1e-4 voxels at worst) times a slope of 200 per voxel
    np.testing.assert_allclose(resampled[inside], warped[inside], atol=0.02)


def test_spacing_is_the_length_of_the_columns() -> None:
    np.testing.assert_allclose(spacing(AFFINES["oblique"]), [0.9, 1.1, 3])


def test_a_plane_keeps_its_shift() -> None:
    assert in_plane(np.arange(16).reshape(4, 4)).tolist() == [[0, 1, 3], [4, 5, 7], [12, 13, 15]]


@pytest.mark.parametrize(("size", "parts"), [((3, 2000, 1000), 3), ((7, 500, 1000), 4), ((40, 3, 5), 1)])
def test_slabs_of_about_a_million_voxels_cover_a_grid(size: tuple[int, int, int], parts: int) -> None:
    found = list(slabs(size))
    assert len(found) == parts
    last, index = found[-1]
    assert last.stop == size[0]
    assert index[:, -1, -1, -1].tolist() == [n - 1 for n in size]


def test_images_on_one_grid_may_differ_by_rounding() -> None:
    scan, moved = Scan(noise(), AFFINES["oblique"], "a.nii"), AFFINES["oblique"].copy()
    moved[0, 3] += 0.08
    scan.check_same_grid(Scan(noise(), moved))
    turned = Scan(noise(), AFFINES["oblique"] @ np.diag([1.05, 1, 1, 1]), "b.nii")
    # 8 voxels of 0.9 mm: the last ones are 0.36 mm apart
    with pytest.raises(ValueError, match=r"a\.nii and b\.nii .* 0\.36 mm apart"):
        scan.check_same_grid(turned)
    with pytest.raises(ValueError, match=r"a\.nii has shape \(9, 12, 7\) and b\.nii has \(7, 12, 9\)"):
        Scan(noise(), np.eye(4), "a.nii").check_same_grid(Scan(noise().T, np.eye(4), "b.nii"))


@pytest.mark.parametrize(("side", "allowed"), [(0.02, 0.002), (3.0, 0.1)])
def test_one_grid_is_one_to_a_tenth_of_a_voxel(side: float, allowed: float) -> None:
    affine = np.diag([side, side, 2 * side, 1])
    for apart in (0.9 * allowed, 1.1 * allowed):
        moved = affine.copy()
        moved[2, 3] += apart
        with pytest.raises(ValueError, match="are not on one grid") if apart > allowed else nullcontext():
            Scan(noise(), affine).check_same_grid(Scan(noise(), moved))


def test_itk_s_reason_for_not_writing_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("/itk/source.cxx:12:\nITK ERROR: Failed to allocate memory for image.")

    monkeypatch.setattr(itk, "transformwrite", fail)
    with pytest.raises(OSError, match=r"a\.h5 cannot be written: Failed to allocate memory for image\.$"):
        save_transform(tmp_path / "a.h5", linear_transform(np.eye(4)))
    assert not list(tmp_path.iterdir())


def write(path: Path, array: NDArray[Any], affine: Affine | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def with_value(value: float) -> NDArray[Any]:
    array = noise()
    array[2, 3, 4] = value
    return array


RGB = np.zeros(SIZE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD_ARRAYS = {
    "4-D": (np.zeros((*SIZE, 2), np.float32), r"3-D volume.*\(9, 12, 7, 2\)"),
    "2-D": (np.zeros(SIZE[:2], np.float32), r"3-D volume.*\(9, 12, 1\)"),
    "slice": (np.zeros((9, 1, 7), np.float32), r"3-D volume.*\(9, 1, 7\)"),
    "colour": (RGB, "scalar.*uint8|scalar.*u1"),
    "complex": (np.ones(SIZE, np.complex64), "scalar.*complex64"),
}


@pytest.mark.parametrize("read", [read_image, read_labels])
@pytest.mark.parametrize(("array", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_are_no_volume_are_refused(tmp_path: Path, read: Any, array: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"bad\.nii .*(" + message + ")"):
        read(write(tmp_path / "bad.nii", array))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (with_value(np.nan), " 1 voxels of NaN"),
        (with_value(-np.inf), " 1 voxels of NaN"),
        (with_value(0).astype(np.float64) * 1e300, " voxels of NaN"),
        (np.zeros(SIZE, np.int16), "constant.* 0"),
        (np.full(SIZE, 7.5, np.float32), "constant.* 7.5"),
    ],
)
def test_images_that_show_nothing_are_refused(tmp_path: Path, array: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"bad\.nii .*" + message):
        read_image(write(tmp_path / "bad.nii", array))


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.diag([0.0, 1, 1, 1]), "affine of .*bad.nii has no inverse"),
        (
            np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
            "affine of .*bad.nii has no inverse",
        ),
        (np.diag([np.nan, 1, 1, 1]), "affine of .*bad.nii is not a matrix of 4 x 4 finite numbers"),
    ],
)
def test_affines_without_inverse_are_refused(tmp_path: Path, affine: Affine, message: str) -> None:
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.header.set_sform(affine, 1)
    image.header.set_qform(None, 0)
    raw = image.to_bytes()  # nibabel itself would not save it
    (tmp_path / "bad.nii").write_bytes(raw)
    content = bytearray(raw)
    for row in range(3):
        content[280 + 16 * row : 296 + 16 * row] = affine[row].astype("<f4").tobytes()
    (tmp_path / "bad.nii").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "bad.nii")


@pytest.mark.parametrize("cut", [10, 400, -200])
@pytest.mark.parametrize("compressed", [True, False])
def test_truncated_files_are_refused(tmp_path: Path, cut: int, compressed: bool) -> None:
    whole = nib.Nifti1Image(noise(), np.eye(4)).to_bytes()
    content = gzip.compress(whole)[:cut] if compressed else whole[:cut]
    path = tmp_path / ("bad.nii.gz" if compressed else "bad.nii")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.nii.* cannot be read: \S"):
        read_image(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.nii does not exist"):
        read_image(tmp_path / "nothing.nii")
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"photo\.png is a picture"):
        read_image(tmp_path / "photo.png")


@pytest.mark.parametrize(("most", "dtype"), [(3, np.uint8), (300, np.uint16), (70000, np.uint32)])
def test_labels_stored_as_floats_become_the_smallest_integers(tmp_path: Path, most: int, dtype: Any) -> None:
    array = np.zeros(SIZE)
    array[1, 2, 3] = most
    labels, _ = read_labels(write(tmp_path / "labels.nii", array))
    assert labels.dtype == dtype
    np.testing.assert_array_equal(labels, array)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_labels_keep_their_type(tmp_path: Path, dtype: Any) -> None:
    labels, _ = read_labels(write(tmp_path / "labels.nii", noise(dtype)))
    assert labels.dtype == dtype
    np.testing.assert_array_equal(labels, noise(dtype))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (with_value(2.5).round() + 0.25, " 756 .*whole numbers"),
        (with_value(np.nan).round(), "values run from nan"),
        (with_value(np.inf).round(), "values run from 0.0 to inf"),
        (with_value(-1).astype(np.int16), "values run from -1"),
        (np.zeros(SIZE, np.uint8), "values run from 0 to 0"),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, array: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"bad\.nii .*" + message):
        read_labels(write(tmp_path / "bad.nii", array))


def test_shear_is_refused_where_it_cannot_be_expressed() -> None:
    with pytest.raises(ValueError, match="axes of an image for ITK are not at right angles in the affine"):
        to_itk(noise(), SHEARED)
    with pytest.raises(ValueError, match="axes of a scan are not at right angles"):
        require_right_angles(SHEARED, "a scan")
    for affine in AFFINES.values():
        require_right_angles(affine.astype(np.float32).astype(np.float64), "a header's rounding")


def test_saving_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image\.png .*\.nii"):
        save_image(tmp_path / "image.png", noise(), np.eye(4))
    with pytest.raises(ValueError, match=r"image\.nii .*\(1, 9, 12, 7\)"):
        save_image(tmp_path / "image.nii", noise()[None], np.eye(4))
    with pytest.raises(ValueError, match=r"ddf for .*\(2, 9, 12, 7\)"):
        save_displacement(tmp_path / "ddf.nii", np.zeros((2, *SIZE)), np.eye(4))
    with pytest.raises(ValueError, match=r"ddf for .*ddf\.nii .*NaN"):
        save_displacement(tmp_path / "ddf.nii", np.full((3, *SIZE), np.nan), np.eye(4))
    with pytest.raises(ValueError, match=r"affine of .*image\.nii has no inverse"):
        save_image(tmp_path / "image.nii", noise(), np.diag([1.0, 0, 1, 1]))
    assert not list(tmp_path.iterdir())


def bent(affine: Affine) -> SpatialMap:
    """Linear, displaced and linear again; the field ends in zeros."""
    rng = np.random.default_rng(5)
    linear = []
    for _ in range(2):
        matrix = np.eye(4)
        matrix[:3] += rng.normal(0, 0.1, (3, 4)) + np.array([0, 0, 0, 4.0])
        linear.append(matrix)
    ddf = np.pad(rng.normal(0, 0.4, (3, *(n - 2 for n in SIZE))), [(0, 0), *[(1, 1)] * 3])
    return SpatialMap(linear[0], linear[1], Displacement(ddf.astype(np.float32), affine))


@pytest.mark.usefixtures("both_paths")
@affines
def test_simpleitk_moves_points_by_a_saved_map_as_we_do(tmp_path: Path, affine: Affine) -> None:
    map_ = bent(affine)
    map_.save(tmp_path / "forward.h5")
    theirs = sitk.ReadTransform(str(tmp_path / "forward.h5"))
    index = np.random.default_rng(6).uniform(-3, np.add(SIZE, 3), (200, 3))  # of the field's grid, and around it
    points = index @ affine[:3, :3].T + affine[:3, 3]
    points = (points - map_.pre[:3, 3]) @ np.linalg.inv(map_.pre[:3, :3]).T
    moved = map_.apply(points)
    expected = [np.array(theirs.TransformPoint(point)) * [-1, -1, 1] for point in points * [-1, -1, 1]]
    np.testing.assert_allclose(moved, expected, atol=1e-4)  # float32 in the file
    straight = points @ map_.linear[:3, :3].T + map_.linear[:3, 3]
    assert np.linalg.norm(moved - straight, axis=1).max() > 0.5
    np.testing.assert_allclose(SpatialMap(map_.pre, map_.post).apply(points), straight, atol=1e-9)


@pytest.mark.usefixtures("both_paths")
def test_a_map_on_a_grid_is_where_the_voxels_go() -> None:
    map_, affine = bent(AFFINES["oblique"]), AFFINES["mirrored oblique"]
    size = (3, 1100, 1000)  # cut into slabs of one row
    ddf = map_.on_grid(ImageGrid(size, affine))
    assert (ddf.dtype, ddf.shape) == (np.float32, (3, *size))
    for index in [(0, 0, 0), (2, 7, 4), (1, 1099, 999)]:
        target = affine @ [*(index + ddf[(slice(None), *index)].astype(float)), 1]
        source = (affine @ [*index, 1])[None, :3]
        # mm: a float32 of up to 1000 voxels
        np.testing.assert_allclose(target[:3], map_.apply(source)[0], atol=1e-3)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("moving", "fixed"), [("straight", "permuted"), ("oblique", "mirrored oblique")])
def test_a_scan_is_warped_as_simpleitk_warps_it(tmp_path: Path, moving: str, fixed: str, order: int) -> None:
    array = noise(np.float32 if order else np.int16)
    shift = AFFINES[moving].copy()
    shift[:3, 3] += AFFINES[fixed][:3, :3] @ [4.0, 5.0, 3.0] - AFFINES[moving][:3, :3] @ [4.0, 5.0, 3.0]
    ddf = np.random.default_rng(7).normal(0, 0.7, (3, *SIZE)).astype(np.float32)
    ours = warp_scan(Scan(array, shift), ddf, Scan(noise(), AFFINES[fixed]), order).array
    assert ours.dtype == array.dtype
    save_image(tmp_path / "moving.nii", array, shift)
    save_displacement(tmp_path / "displacement.nii", ddf, AFFINES[fixed])
    field = sitk.ReadImage(str(tmp_path / "displacement.nii"), sitk.sitkVectorFloat64)
    reference = sitk.ReadImage(str(tmp_path / "displacement.nii"))
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(
            sitk.ReadImage(str(tmp_path / "moving.nii")),
            reference.GetSize(),
            sitk.DisplacementFieldTransform(field),
            sitk.sitkLinear if order else sitk.sitkNearestNeighbor,
            reference.GetOrigin(),
            reference.GetSpacing(),
            reference.GetDirection(),
            0.0,
        )
    ).T
    # A point at the very border of the image or between two voxels falls to either side by rounding of the headers;
    # elsewhere 1e-4 mm of voxels that differ by up to 200.
    assert np.mean(np.abs(ours - theirs) > 0.1) < 0.005
    assert 0.3 < np.mean(ours > 0) < 0.95  # inside, outside and the border between


def test_a_matrix_becomes_the_transform_that_has_it() -> None:
    matrix = np.array([[0.9, 0.1, 0, 4], [-0.2, 1.1, 0.3, -7], [0.05, 0, 1, 12], [0, 0, 0, 1]])
    np.testing.assert_allclose(transform_affine(linear_transform(matrix)), matrix, atol=1e-12)  # double


@affines
def test_a_displacement_in_whole_voxels_comes_back(tmp_path: Path, affine: Affine) -> None:
    ddf = np.random.default_rng(3).integers(-3, 4, (3, *SIZE))
    save_displacement(tmp_path / "ddf.nii.gz", ddf, affine)
    again, found = read_displacement(tmp_path / "ddf.nii.gz")
    np.testing.assert_allclose(again, ddf, atol=1e-4)  # float32 in the file
    np.testing.assert_allclose(found, affine, atol=HEADER)


@pytest.mark.usefixtures("both_paths")
@affines
def test_a_map_bends_its_outermost_voxels_as_itk_does(affine: Affine) -> None:
    """Half a voxel beyond them the field ends; rounding must not end it earlier."""
    ddf = np.full((3, *SIZE), 1.5, np.float32)
    map_ = SpatialMap(np.eye(4), np.eye(4), Displacement(ddf, affine))
    np.testing.assert_allclose(map_.on_grid(ImageGrid(SIZE, affine)), ddf, atol=1e-5)
    peer = map_.to_itk()
    for index in [(-0.4, 3, 2), (8.4, 11.4, 6.4), (-0.6, 3, 2), (4, 5, 6.6)]:
        point = (affine @ [*index, 1])[:3]
        moved = map_.apply(point[None])[0]
        np.testing.assert_allclose(moved * [-1, -1, 1], peer.TransformPoint((point * [-1, -1, 1]).tolist()), atol=1e-3)


def test_displacements_that_others_would_place_elsewhere_are_refused(tmp_path: Path) -> None:
    path, ddf = tmp_path / "ddf.nii.gz", np.zeros((3, *SIZE), np.float32)
    with pytest.raises(ValueError, match="right angles"):
        save_displacement(path, ddf, SHEARED)
    save_displacement(path, ddf, np.diag([2.0, 2, 2, 1]))
    image = nib.load(path)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), None, image.header), path)
    with pytest.raises(ValueError, match="no position: sform_code and qform_code are both 0"):
        read_displacement(path)
    save_displacement(path, ddf, np.diag([2.0, 2, 2, 1]))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum
    path.write_bytes(content)
    with pytest.raises(ValueError, match="CRC check failed"):
        read_displacement(path)
