from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from threadpoolctl import threadpool_limits

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.io.images import read_image
from voxelmorph_monai.space.alignment import register_affine
from voxelmorph_monai.space.template import mni152, sample_scan

Image = tuple[NDArray[Any], Affine]

STEP = 3  # every third voxel: the tests then take seconds


def thinned(array: NDArray[Any], affine: Affine) -> Image:
    return ndimage.uniform_filter(array, STEP)[::STEP, ::STEP, ::STEP], affine @ np.diag([STEP, STEP, STEP, 1])


@cache
def template() -> Image:
    return thinned(mni152().array, mni152().affine)


@cache
def other_brain() -> Image:
    return thinned(*read_image(sample_scan("colin27")))


@cache
def alignment() -> Affine:
    """Of the other brain to the template, with as many threads as there are."""
    return register_affine(other_brain(), template())


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
    found = register_affine(moved(template(), matrix), template())
    # Interpolation blurs the moved image, which seems the larger for it: by 0.5 %, 0.33 mm, where ITK finds 0.22 mm.
    assert distance(found, matrix) < 0.4


def test_a_known_rotation_is_found_again() -> None:
    matrix = pose(-60, 80)
    found = register_affine(moved(template(), matrix), template(), kind="rigid")
    assert distance(found, matrix) < 0.3
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)  # double
    assert np.linalg.det(found[:3, :3]) > 0


def test_what_is_a_millimetre_long_is_aligned_as_a_brain_is() -> None:
    matrix, smaller = pose(20, 30, 0.05), np.diag([0.01, 0.01, 0.01, 1.0])
    image = moved(template(), matrix)
    found = register_affine((image[0], smaller @ image[1]), (template()[0], smaller @ template()[1]))
    assert distance(np.linalg.inv(smaller) @ found @ smaller, matrix) < 0.4  # as for the brain, 0.33 mm


def test_another_brain_is_aligned_alike_from_any_pose() -> None:
    matrix = pose(120, -90, -0.08, 0.04)
    turned = register_affine(moved(other_brain(), matrix), template())
    # The optimum is shallow: 0.2 mm between starts on the same image, and the moved image is a smoothed one.
    assert distance(np.linalg.inv(matrix) @ turned, alignment()) < 0.5
    assert distance(alignment(), np.eye(4)) < 12  # both lie in the space of MNI already, and differ in size alone


@pytest.mark.parametrize("name", ["1005", "1014"])
def test_real_scans_are_aligned_alike_from_any_pose(malf: Path, name: str) -> None:
    scan, matrix = thinned(*read_image(malf / f"{name}_t1.nii.gz")), pose(40, 60, 0.1, 0.05)
    straight = register_affine(scan, template())
    turned = register_affine(moved(scan, matrix), template())
    assert distance(np.linalg.inv(matrix) @ turned, straight) < 0.5


def cut(image: Image, start: tuple[int, int, int], stop: tuple[int, int, int]) -> Image:
    """What a smaller field of view shows: these voxels."""
    shifted = image[1].copy()
    shifted[:3, 3] += image[1][:3, :3] @ start
    return image[0][tuple(slice(a, b) for a, b in zip(start, stop, strict=True))], shifted


def thick(image: Image, factor: int) -> Image:
    """Slices so many times as thick."""
    array, affine = image
    number = array.shape[2] // factor
    thicker = affine @ np.diag([1.0, 1, factor, 1])
    thicker[:3, 3] = (affine @ [0, 0, (factor - 1) / 2, 1])[:3]
    return array[..., : number * factor].reshape(*array.shape[:2], number, factor).mean(axis=3), thicker


# Where the fields of view of two scans of one brain end, in voxels of the template (66 x 78 x 63 of 3 mm, its brain
# from 9 to 57, 10 to 68 and 3 to 52).
CUTS = {
    "half in common": (((0, 0, 0), (66, 78, 38)), ((0, 0, 16), (66, 78, 63))),
    "slab": (((0, 0, 14), (66, 78, 40)), ((0, 0, 18), (66, 78, 44))),
    "vertex": (((0, 0, 0), (66, 78, 40)), ((0, 0, 0), (66, 78, 44))),
    "half a brain": (((0, 0, 0), (38, 78, 63)), ((0, 0, 0), (66, 78, 63))),
    "tight": (((12, 12, 4), (55, 66, 51)), ((9, 10, 3), (57, 68, 52))),
}


@pytest.mark.parametrize("kind", ["rigid", "affine"])
@pytest.mark.parametrize("name", CUTS)
def test_what_a_field_of_view_cuts_off_does_not_count(name: str, kind: str) -> None:
    """The same brain, its header turned and shifted: the bodies are aligned, not the ends of the fields of view."""
    matrix = pose(6, 20)
    of_moving, of_fixed = (cut(template(), *ends) for ends in CUTS[name])
    if name == "slab":
        of_moving, of_fixed = thick(of_moving, 2), thick(of_fixed, 2)
    found = register_affine((of_moving[0], matrix @ of_moving[1]), of_fixed, kind)
    array, affine = template()
    start, stop = (np.array(ends) for ends in CUTS[name][1])
    index = np.argwhere(array > 0)
    points = index[((index >= start) & (index < stop)).all(axis=1)] @ affine[:3, :3].T + affine[:3, 3]
    missed = np.linalg.norm(points @ (found - matrix)[:3, :3].T + (found - matrix)[:3, 3], axis=1).mean()
    assert missed < 0.5  # mm, a sixth of a voxel; the header is off by 20 mm


def test_noise_around_a_body_is_background() -> None:
    rng, matrix = np.random.default_rng(0), pose(15, 20)
    images = [
        (array + np.abs(rng.normal(0, 0.02 * array.max(), array.shape)), affine)
        for array, affine in (moved(template(), matrix), template())
    ]
    assert distance(register_affine(*images, kind="rigid"), matrix) < 0.3


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_another_contrast_is_aligned_alike(kind: str) -> None:
    """Bright and dark exchanged within the brain, as in T2: mutual information does not mind."""
    matrix = pose(30, 40)
    array, affine = moved(template(), matrix)
    other = np.where(array > 0.05 * array.max(), 1.2 * array.max() - array, 0)
    assert distance(register_affine((other, affine), template(), kind), matrix) < 0.5  # the rim is mixed otherwise


def test_images_that_are_the_same_stay_where_they_are() -> None:
    array, affine = template()
    part = cut((array, affine), (0, 0, 0), (50, 78, 50))
    np.testing.assert_array_equal(register_affine(part, (array, affine)), np.eye(4))
    np.testing.assert_array_equal(register_affine((3 * array, affine), (array, affine), "rigid"), np.eye(4))


def test_the_result_depends_neither_on_the_number_of_threads_nor_on_earlier_calls() -> None:
    with threadpool_limits(1):
        again = register_affine(other_brain(), template())
    np.testing.assert_array_equal(again, alignment())


def test_what_cannot_be_registered_is_refused() -> None:
    image = np.ones((5, 6, 7), np.float32), np.eye(4)
    with pytest.raises(ValueError, match=r"kind is 'similarity'\. .*'rigid' or 'affine'"):
        register_affine(image, image, kind="similarity")
    with pytest.raises(ValueError, match=r"moving has shape \(5, 6\), .* \(4, 4\)\. .* 3 x 3"):
        register_affine((np.ones((5, 6)), np.eye(4)), image)
    with pytest.raises(ValueError, match=r"fixed has shape \(5, 6, 7\), 0 voxels above 0"):
        register_affine(image, (np.zeros((5, 6, 7)), np.eye(4)))
    with pytest.raises(ValueError, match=r"moving .* same intensity everywhere"):
        register_affine(image, image)
    with pytest.raises(ValueError, match="axes of moving are not at right angles"):
        register_affine((image[0], pose(0, 0, shear=0.1)), image)
