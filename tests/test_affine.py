from functools import cache
from pathlib import Path
from typing import Any

import itk
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affine import _transform, register_affine
from voxelmorph_monai.preparation import mni152, sample_scan
from voxelmorph_monai.spaces import Affine, read_image, transform_affine

Image = tuple[NDArray[Any], Affine]

STEP = 3  # every third voxel: the tests then take seconds


def thinned(array: NDArray[Any], affine: Affine) -> Image:
    return ndimage.uniform_filter(array, STEP)[::STEP, ::STEP, ::STEP], affine @ np.diag([STEP, STEP, STEP, 1])


@cache
def template() -> Image:
    return thinned(*mni152())


@cache
def other_brain() -> Image:
    return thinned(*read_image(sample_scan("colin27")))


@cache
def alignment() -> Affine:
    """Of the other brain to the template, with as many threads as there are."""
    return transform_affine(register_affine(other_brain(), template()))


def distance(first: Affine, second: Affine) -> float:
    """Mean distance in mm between where two maps put the voxels of the template's brain."""
    array, affine = template()
    points = np.argwhere(array > 0) @ affine[:3, :3].T + affine[:3, 3]
    difference = first - second
    return float(np.linalg.norm(points @ difference[:3, :3].T + difference[:3, 3], axis=1).mean())


def pose(degrees: float, shift: float, stretch: float = 0.0, shear: float = 0.0) -> Affine:
    """Map that turns about a skew axis, stretches the three axes differently, shears, and shifts (mm)."""
    axis = np.array([2.0, -1.0, 1.5]) / np.linalg.norm([2.0, -1.0, 1.5])
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix()
    matrix[:3, :3] @= np.diag([1 + stretch, 1 - stretch, 1 + stretch / 2]) + shear * np.eye(3, k=1)
    matrix[:3, 3] = shift * np.array([0.6, -0.64, 0.48])
    return matrix


def moved(image: Image, matrix: Affine) -> Image:
    """The image, its content moved along ``matrix``, on a straight grid of 3 mm that holds all of it."""
    array, affine = image
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in array.shape], [1], indexing="ij")).reshape(4, -1)
    ends = (matrix @ affine @ corners)[:3]
    grid = np.diag([STEP, -STEP, STEP, 1.0])  # another handedness than the original's
    grid[:3, 3] = [ends[0].min(), ends[1].max(), ends[2].min()]
    size = np.ceil(np.ptp(ends, axis=1) / STEP).astype(int) + 1
    back = np.linalg.inv(matrix @ affine) @ grid
    return ndimage.affine_transform(array, back, output_shape=tuple(size), order=1), grid


@pytest.mark.parametrize("matrix", [pose(40, 60, 0.1, 0.05), pose(175, 150)], ids=["stretched", "upside down"])
def test_a_known_affine_is_found_again(matrix: Affine) -> None:
    found = transform_affine(register_affine(moved(template(), matrix), template()))
    # a tenth of the voxels: what the interpolation of the moved image costs (0.01 to 0.1 mm were seen)
    assert distance(found, matrix) < 0.3


def test_a_known_rotation_is_found_again() -> None:
    matrix = pose(-60, 80)
    found = transform_affine(register_affine(moved(template(), matrix), template(), transform="rigid"))
    assert distance(found, matrix) < 0.3
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)  # double
    assert np.linalg.det(found[:3, :3]) > 0


def test_what_is_a_millimetre_long_is_aligned_as_a_brain_is() -> None:
    matrix, smaller = pose(20, 30, 0.05), np.diag([0.01, 0.01, 0.01, 1.0])
    image = moved(template(), matrix)
    found = transform_affine(register_affine((image[0], smaller @ image[1]), (template()[0], smaller @ template()[1])))
    assert distance(np.linalg.inv(smaller) @ found @ smaller, matrix) < 0.3


def test_another_brain_is_aligned_alike_from_any_pose() -> None:
    matrix = pose(120, -90, -0.08, 0.04)
    turned = transform_affine(register_affine(moved(other_brain(), matrix), template()))
    # The optimum is shallow: 0.2 mm between starts on the same image, and the moved image is a smoothed one.
    assert distance(np.linalg.inv(matrix) @ turned, alignment()) < 0.5
    assert distance(alignment(), np.eye(4)) < 12  # both lie in the space of MNI already, and differ in size alone


@pytest.mark.parametrize("name", ["1005", "1014"])
def test_real_scans_are_aligned_alike_from_any_pose(malf: Path, name: str) -> None:
    scan, matrix = thinned(*read_image(malf / f"{name}_t1.nii.gz")), pose(40, 60, 0.1, 0.05)
    straight = transform_affine(register_affine(scan, template()))
    turned = transform_affine(register_affine(moved(scan, matrix), template()))
    assert distance(np.linalg.inv(matrix) @ turned, straight) < 0.5


@pytest.mark.parametrize(("kind", "stretch"), [("rigid", 0.0), ("similarity", 0.0), ("affine", 0.2)])
def test_the_centre_of_the_parameters_does_not_change_the_map(kind: str, stretch: float) -> None:
    matrix, centre = pose(70, 30, stretch), np.array([3.0, -18.0, 11.0])
    transform = _transform(kind, matrix, centre)
    np.testing.assert_allclose(transform_affine(transform), matrix, atol=1e-9)  # double
    np.testing.assert_allclose(transform.GetCenter(), [-3, 18, 11])  # LPS


def test_the_result_depends_neither_on_the_number_of_threads_nor_on_earlier_calls() -> None:
    number = itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads()
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(number + 3)
    try:
        again = transform_affine(register_affine(other_brain(), template()))
    finally:
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(number)
    np.testing.assert_array_equal(again, alignment())


def test_what_cannot_be_registered_is_refused() -> None:
    image = np.ones((5, 6, 7), np.float32), np.eye(4)
    with pytest.raises(ValueError, match="transform must be 'rigid' or 'affine', got 'similarity'"):
        register_affine(image, image, transform="similarity")
    with pytest.raises(ValueError, match=r"moving must be \(X, Y, Z\) and not 0 everywhere, got \(5, 6\)"):
        register_affine((np.ones((5, 6)), np.eye(4)), image)
    with pytest.raises(ValueError, match=r"fixed must be \(X, Y, Z\) and not 0 everywhere, got \(5, 6, 7\)"):
        register_affine(image, (np.zeros((5, 6, 7)), np.eye(4)))
    with pytest.raises(ValueError, match="axes of moving must be at right angles"):
        register_affine((image[0], pose(0, 0, shear=0.1)), image)
