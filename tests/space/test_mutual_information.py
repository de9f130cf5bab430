"""Laws of the mutual information that alignments climb; the oracles are SciPy's splines and finite differences."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation

from voxelmorph_monai import switch
from voxelmorph_monai.affines import Affine
from voxelmorph_monai.space.mutual_information import Copy, MutualInformation, coarsen, generators, maximise

SIZES = {2: (36, 44), 3: (30, 36, 26)}


@pytest.fixture(autouse=True, params=["loops", "NumPy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws hold for both."""
    monkeypatch.setattr(switch, "enabled", request.param == "loops")


def place(dims: int) -> Affine:
    """An affine whose axes are neither straight nor alike."""
    affine = np.eye(dims + 1)
    turned = Rotation.from_rotvec([0, 0, 0.4] if dims == 2 else [0.3, -0.2, 0.4]).as_matrix()[:dims, :dims]
    affine[:-1, :-1] = turned @ np.diag([-1.5, 1.0, 2.0][:dims])
    affine[:-1, -1] = [20, -30, 10][:dims]
    return affine


def blobs(dims: int, moved: Affine | None = None) -> NDArray[np.float64]:
    """A body with smooth blobs in the middle of the grid, 0 around it; moved along a map in mm."""
    affine, size, rng = place(dims), SIZES[dims], np.random.default_rng(3)
    back = np.linalg.inv(affine) @ np.linalg.inv(np.eye(dims + 1) if moved is None else moved) @ affine
    index = np.tensordot(back[:-1, :-1], np.indices(size), 1) + back[:-1, -1].reshape(-1, *[1] * dims)
    middle = ((np.array(size) - 1) / 2).reshape(-1, *[1] * dims)
    image = 0.5 / (1 + np.exp(3 * (np.sqrt(((index - middle) ** 2).sum(axis=0)) - 9)))
    for _ in range(12):
        centre = middle + rng.uniform(-7, 7, dims).reshape(-1, *[1] * dims)
        image += rng.uniform(0.2, 0.6) * np.exp(-((index - centre) ** 2).sum(axis=0) / (2 * rng.uniform(2, 3) ** 2))
    return np.where(image > 0.02, image, 0)


def change(dims: int, size: float) -> Affine:
    matrix = np.eye(dims + 1)
    matrix[:-1] += size * np.random.default_rng(5).normal(size=(dims, dims + 1)) * [*[0.01] * dims, 0.5]
    return matrix


def pair(dims: int, moved: float = 2, contrast: float = 0.5) -> tuple[Copy, Copy]:
    moving = blobs(dims, change(dims, moved)) ** contrast
    (first,), (second,) = (coarsen(each, place(dims), (1.0,), 6) for each in (moving, blobs(dims)))
    return first, second


@pytest.mark.parametrize("dims", [2, 3])
def test_copies_lie_where_the_image_does(dims: int) -> None:
    """Means of a ramp are the ramp at the middle of what they are of."""
    affine, slope = place(dims), np.array([0.3, -0.5, 0.2])[:dims]

    def ramp(size: tuple[int, ...], where: Affine) -> NDArray[Any]:
        points = np.tensordot(where[:-1, :-1], np.indices(size), 1) + where[:-1, -1].reshape(-1, *[1] * dims)
        return 100 + np.tensordot(slope, points, 1)

    whole = np.pad(ramp(SIZES[dims], affine), 15)  # what is 0 around it is cut off, but for a margin
    wider = affine.copy()
    wider[:-1, -1] -= affine[:-1, :-1] @ np.full(dims, 15)
    for copy in coarsen(whole, wider, (8, 4, 2), 3):
        inner = ndimage.binary_erosion(copy.array > 30, iterations=2)  # all around are means of the ramp only
        assert inner.sum() > 3
        np.testing.assert_allclose(copy.array[inner], ramp(copy.array.shape, copy.affine)[inner], rtol=1e-5)  # float32
        assert copy.known is None


def test_what_is_cut_off_is_unknown_and_background_goes_on() -> None:
    (copy,) = coarsen(blobs(3)[:14], place(3), (1.0,), 4)
    assert copy.known is not None
    width = 3  # voxels of 1.5 mm in a margin of 4 mm
    last = copy.shown[-width - 1]
    assert last.any()
    for k in range(1, width + 1):
        np.testing.assert_array_equal(copy.known[-k] == 0, last)
    assert copy.known[:-width].all()
    assert not copy.shown[-width:].any()


@pytest.mark.parametrize("dims", [2, 3])
def test_the_value_is_the_formula(dims: int) -> None:
    moving, fixed = pair(dims)
    information, matrix = MutualInformation(moving, fixed, 5), change(dims, 1)
    index = np.argwhere(
        ndimage.maximum_filter(fixed.shown, 1 + 2 * np.rint(5 / np.array([1.5, 1, 2][:dims])).astype(int))
    )
    to_voxels = np.linalg.inv(moving.affine) @ matrix @ fixed.affine
    at = to_voxels[:-1, :-1] @ index.T + to_voxels[:-1, -1:]
    bins = information.bins
    warped = ndimage.map_coordinates(moving.array, at, order=1, mode="nearest")
    warped = (warped - moving.array.min()) / np.ptp(moving.array) * bins
    values = (fixed.array[tuple(index.T)] - fixed.array.min()) / np.ptp(fixed.array) * bins
    weights = np.stack(
        [BSpline.basis_element(np.arange(-2, 3) + k, extrapolate=False)(warped) for k in range(-1, bins + 2)]
    )
    rows = np.minimum(values.astype(int), bins - 1) == np.arange(bins)[:, None]
    joint = rows.astype(float) @ np.nan_to_num(weights).T / len(index)
    apart = joint.sum(axis=0) * joint.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nansum(joint * np.log(joint / apart))
    assert information(matrix) == pytest.approx(expected, rel=5e-3)  # intensities count by a sixteenth of a bin


@pytest.mark.parametrize("dims", [2, 3])
def test_the_gradient_is_that_of_finite_differences(dims: int) -> None:
    moving, fixed = pair(dims)
    information, matrix = MutualInformation(moving, fixed, 5), change(dims, -1)
    slope, step = information.slope(matrix, with_fisher=True), 0.01
    assert slope.fisher is not None
    for direction, found in zip(generators("affine", dims), slope.gradient, strict=True):
        ends = [information(information.change(matrix, sign * step * direction)[0]) for sign in (-1, 1)]
        expected = (ends[1] - ends[0]) / (2 * step)
        assert found == pytest.approx(expected, abs=0.05 * np.abs(slope.gradient).max())  # bends between voxels
    np.testing.assert_allclose(slope.fisher, slope.fisher.T, rtol=1e-9, atol=1e-12)
    assert np.linalg.eigvalsh(slope.fisher).min() > 0


@pytest.mark.parametrize("dims", [2, 3])
def test_the_climb_ends_at_the_map_between_the_images(dims: int) -> None:
    moving, fixed = pair(dims, moved=4, contrast=1)
    information, truth = MutualInformation(moving, fixed, 5), change(dims, 4)
    found = maximise(information, np.eye(dims + 1), "affine", 0.01)
    points = fixed.affine[:-1] @ np.append(np.argwhere(fixed.shown), np.ones((fixed.shown.sum(), 1)), axis=1).T
    missed = np.linalg.norm((found - truth)[:-1] @ np.append(points, np.ones((1, points.shape[1])), axis=0), axis=0)
    assert missed.mean() < 0.35  # mm, a quarter of a voxel, of 1.3 and 5.8 mm at the start; blurred bodies seem larger
    assert information(found) >= information(truth) - 1e-3


@pytest.mark.parametrize("dims", [2, 3])
def test_a_glance_sees_the_nearest_voxels(dims: int) -> None:
    moving, fixed = pair(dims)
    information = MutualInformation(moving, fixed, 5)

    def shifted(voxels: float) -> Affine:
        matrix = np.eye(dims + 1)
        matrix[:-1, -1] = voxels * moving.affine[:-1, 0]
        return matrix

    looked = information.glance([shifted(voxels) for voxels in (0.1, 0.4, 0.6, 0.9)])
    assert looked[0] == looked[1]
    assert looked[2] == looked[3]
    np.testing.assert_allclose(looked[1:3], [information(shifted(voxels)) for voxels in (0, 1)], rtol=0.1)  # half of it
    assert looked[0] != pytest.approx(looked[2], rel=0.05)
