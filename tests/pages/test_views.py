"""Pictures show the body as it is, whatever the arrays: sides, proportions, brightness, and no face."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.pages.bodies import SIDE, SIZE, chest, grid_of, head, labels_of, registered, wave
from voxelmorph_monai.affines import apply_affine
from voxelmorph_monai.anatomy import is_stripped, load_anatomy
from voxelmorph_monai.apps.shipped import shipped_anatomy
from voxelmorph_monai.pages.views import (
    CT_WINDOWS,
    OCTAVES,
    Face,
    Views,
    Window,
    find_face,
    is_ct,
    window_of,
    windows_of,
)
from voxelmorph_monai.report import volume_change
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import sample_scan

CHEST = (84, 64, 50)
UP = np.array([0.0, 1.0, 0.0])  # of a plane in front of which everything is hidden, in the tests: RAS


def views_of(scan: Scan, **options: object) -> Views:
    return Views(registered(scan, scan), **options)  # type: ignore[arg-type]


def marker(tiles: np.ndarray) -> np.ndarray:
    """Where the brightest part of slices ``(n, R, C)`` is, from 0 (above, left) to 1: row and column."""
    return np.argwhere(tiles == 255).mean(axis=0)[1:] / tiles.shape[1:]


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "PSR", "OBL"])
def test_left_is_left_and_up_is_up(codes: str) -> None:
    views = views_of(head(grid_of(codes)))
    views.windows = (Window(0, 180),) * 2  # in which only the ball is white
    scan = views.result.fixed
    ball = scan.like((scan.array > 180).astype(np.int16))
    for plane in views.planes:
        row, column = marker(views.images(plane)["fixed"])
        assert np.allclose(marker(255 * views.labels(plane, ball, np.array([1]))), (row, column), atol=0.03)
        assert row < 0.45  # the ball lies in front of the middle and above it
        assert column < 0.45 if plane.axis != 0 else column > 0.52


def test_proportions_are_those_of_the_body() -> None:
    scan = head(grid_of(spacing=(0.9 * 3, 0.9 * 3, 5.0), size=(66, 78, 40)), size=(66, 78, 40))
    views = views_of(scan)
    for plane, (wide, high) in zip(views.planes, ((150, 190), (150, 170), (190, 170)), strict=True):
        brain = views.images(plane)["fixed"].max(axis=0) > 60
        rows, columns = (np.ptp(np.flatnonzero(brain.any(axis=axis))) + 1 for axis in (1, 0))
        span = (views.box[:, 1] - views.box[:, 0] + 1) * views.frame.spacing  # what the page stretches the pixels to
        found = columns / brain.shape[1] * span[plane.across], rows / brain.shape[0] * span[plane.up]
        for mm, true, voxel in zip(found, (wide, high), views.frame.spacing[[plane.across, plane.up]], strict=True):
            assert abs(mm - true) < 2 * voxel  # a voxel at either end


def test_a_small_head_in_a_large_field_fills_the_tile() -> None:
    size = (90, 85, 80)
    scan = head(grid_of(size=size), size=size, centre=(60, -40, 30))
    for plane, (wide, high) in zip(views_of(scan).planes, ((150, 190), (150, 170), (190, 170)), strict=True):
        tile = len(plane.columns) * len(plane.rows) * SIDE**2
        assert wide * high * np.pi / 4 > 0.6 * tile


def test_slices_leave_out_the_midline_and_the_ends() -> None:
    views = views_of(head(grid_of()))
    for plane in views.planes:
        inside = np.array(plane.positions) - views.box[plane.axis, 0]
        length = np.ptp(views.box[plane.axis])
        assert len(plane.positions) == 12
        assert 0.07 * length < inside[0]
        assert inside[-1] < 0.93 * length
        assert plane.positions == sorted(set(plane.positions))
    sagittal = next(plane for plane in views.planes if plane.axis == 0)
    mm = SIDE * (np.array(sagittal.positions) - (SIZE[0] - 1) / 2)
    assert np.abs(mm).min() > 3
    assert -40 < mm[sagittal.start] < -10  # of the left hemisphere


def test_a_slice_is_one_picture() -> None:
    scan = head(grid_of())
    flat = Scan(scan.array[:, :, 24:25], scan.affine)
    (plane,) = views_of(flat).planes
    assert (plane.name, plane.positions) == ("axial", [0])


def test_fat_does_not_darken_the_brain() -> None:
    scan = head(grid_of())
    bright = scan.like(np.where((scan.array > 20) & (scan.array < 60), 900, scan.array))
    points = np.random.default_rng(0).uniform(-40, 40, (500, 3))
    window = window_of(bright, Face(points, UP, np.inf))
    assert window.high < 260 < window_of(bright).high
    assert window.high > 127  # tissue, 120 with noise of 3, is not clipped


@pytest.mark.parametrize("value", [0.0, 7.0, -3.0])
def test_constant_scans_have_a_window(value: float) -> None:
    window = window_of(Scan(np.full((4, 5, 6), value, np.float32), np.eye(4)))
    assert window.high > window.low
    assert np.isfinite(window.grey(np.array([value]))).all()


def test_integers_do_not_overflow() -> None:
    scan = Scan(np.random.default_rng(0).integers(19_000, 32_000, (20, 20, 20)).astype(np.int16), np.eye(4))
    grey = window_of(scan).grey(scan.array)
    order = np.argsort(scan.array, axis=None)
    assert (np.diff(grey.ravel()[order].astype(int)) >= 0).all()


def test_a_ct_has_the_windows_of_radiology() -> None:
    grid = grid_of(size=CHEST, spacing=(5.0, 5.0, 6.0))
    body = chest(grid, CHEST)
    assert windows_of(body) == CT_WINDOWS
    assert Views(registered(body, body)).windows == (CT_WINDOWS["soft tissue"],) * 2
    brain = windows_of(body, Face(np.zeros((1, 3)), UP, 70.0))
    assert [*brain] == ["brain", "bone"]
    mixed = Views(registered(body, head(grid, CHEST)))
    assert [*mixed.choices] == [*CT_WINDOWS]
    assert len({moving for _, moving in mixed.choices.values()}) == 1  # no window of CT for another modality
    plane = mixed.planes[0]
    lung, soft = (mixed.images(plane, name)["fixed"] for name in ("lung", "soft tissue"))
    inside = np.abs(body.array.astype(float) + 820) < 40  # of the lungs
    at = np.stack([plane.nearest(mixed.frame.orient(inside))])[0]
    assert (soft[at] == 0).all()
    assert np.median(lung[at]) > 60


def test_what_goes_far_below_zero_is_not_always_a_ct() -> None:
    values = np.random.default_rng(0).uniform(-4096, 4096, (20, 20, 20))
    assert not is_ct(Scan(values.astype(np.int16), np.eye(4)))  # the phase of a complex image
    assert not is_ct(head(grid_of()))
    padded = chest(grid_of(size=CHEST, spacing=(5.0, 5.0, 6.0)), CHEST).array.copy()
    padded[:, :, 0] = -2000  # what lies outside the ring of the scanner
    assert is_ct(Scan(padded, np.eye(4)))


@pytest.mark.parametrize("codes", ["RAS", "LPI"])
def test_the_face_of_either_scan_is_hidden_in_all_images(codes: str) -> None:
    fixed = head(grid_of(codes))
    moved = np.eye(4)
    moved[1, 3] = 30.0  # the moving head lies 30 mm in front
    moving = head(grid_of("LAS"), centre=(0, 30, 0))
    views = Views(registered(fixed, moving, moved))
    views.faces, views.hides = (None, Face(np.zeros((1, 3)), UP, 70.0)), True  # 40 mm in front of the middle
    (_, _, sagittal), front = views.planes, views.frame.affine[1, 1]
    y = views.frame.affine[1, 3] + front * sagittal.columns
    for tiles in views.images(sagittal).values():
        assert (tiles[:, :, y > 40] == 0).all()
        assert (tiles[:, :, (y > 20) & (y < 38)].max(axis=(0, 1)) > 100).all()
    turned = [views.frame.orient(image) for image in views.drawn()]
    for image in turned:
        last = np.flatnonzero(image.max(axis=(0, 2)) > 0.3)[-1]
        assert 40 - 2 * SIDE < views.frame.affine[1, 3] + front * last <= 40
    views.hides = False
    assert all((tiles[:, :, y > 45].max() > 100) for tiles in views.images(sagittal).values())


@pytest.fixture(scope="module")
def network():
    return load_anatomy(shipped_anatomy())


def test_a_chest_has_no_face(network) -> None:
    """The coarse look takes the heart between the lungs for a brain."""
    scan = chest(grid_of(size=CHEST, spacing=(5.0, 5.0, 6.0)), CHEST)
    assert find_face(scan, network, is_head=True) is not None
    assert find_face(scan, network) is None


def test_a_brain_without_skull_hides_nothing(network, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look tells: the search for its pose takes five times as long."""
    monkeypatch.setattr("voxelmorph_monai.pages.views.locate", lambda *_: pytest.fail("its pose was sought"))
    face = find_face(Scan.read(sample_scan("colin27")), network)
    assert face is not None
    assert face.limit == np.inf


@pytest.mark.parametrize("part", [np.s_[:], np.s_[:, 120:], np.s_[:, :, :90], np.s_[:, 60:, :110]])
def test_no_part_of_a_head_is_taken_for_a_brain_without_skull(colin27: Path, network, part) -> None:
    """Whole; its front, where the face is; what lies below; front and below."""
    head = nib.load(colin27 / "ch2.nii.gz").slicer[part]
    assert not is_stripped(Scan(head.get_fdata(dtype=np.float32), head.affine), network)


@pytest.mark.parametrize("turn", [0.0, -15.0])
def test_a_real_head_loses_its_face_and_keeps_its_brain(colin27: Path, network, turn: float) -> None:
    """Colin27 lies in the space of MNI152: nose, eyes and chin are where an atlas has them."""
    image = nib.load(colin27 / "ch2.nii.gz")
    brain = nib.load(colin27 / "ch2bet.nii.gz").get_fdata() > 0
    pose = np.eye(4)
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    pose[1:3, 1:3] = [[c, -s], [s, c]]  # nodding
    face = find_face(Scan(image.get_fdata(dtype=np.float32), pose @ image.affine), network)
    assert face is not None
    features = np.array([[0, 84, -40], [-30, 76, -38], [30, 76, -38], [0, 90, -60]], float)  # nasion, eyes, nose; mm
    assert face.hides(apply_affine(pose, features.T)).all()
    points = apply_affine(pose @ image.affine, np.argwhere(brain)[::50].T.astype(float))
    assert face.hides(points).mean() < 2e-3  # bet's mask goes into the orbits a little


def test_change_of_volume_is_encoded_and_no_fold_is_lost() -> None:
    scan = head(grid_of())
    matrix = np.diag([1.2, 1.0, 1.0, 1.0])
    views = Views(registered(scan, scan, matrix))
    determinant = np.full(SIZE, 1.2)  # the linear part takes it to 1
    determinant[:, 10], determinant[:, 20], determinant[25, 31, 29] = 2.4, 0.3, -0.01
    plane = views.planes[2]._replace(positions=[25])
    level = views.volume_change(plane, determinant)[0]
    columns = {y: np.flatnonzero(plane.columns == y)[0] // 2 for y in (10, 20, 31, 40)}
    octave = 127 / OCTAVES
    assert set(level[:, columns[40]]) == {128}
    # a block of two columns holds the mean of 2.4 / 1.2 and 1 in the logarithm: half an octave, and -1 octave
    assert level[0, columns[10]] == pytest.approx(128 + 0.5 * octave, abs=1)
    assert level[0, columns[20]] == pytest.approx(128 - 1.0 * octave, abs=1)
    assert (level == 0).sum() == 1
    assert level[np.flatnonzero(plane.rows == 29)[0] // 2, columns[31]] == 0


@pytest.mark.parametrize("codes", ["RAS", "LIA", "OBL"])
def test_vectors_say_where_the_map_goes(codes: str) -> None:
    fixed = head(grid_of(codes))
    matrix = np.eye(4)
    matrix[:3, :3] *= 1.1
    result = registered(fixed, fixed, matrix, wave(fixed.affine))
    views = Views(result)
    size, vectors, unit = views.vectors()
    assert vectors.dtype == np.dtype("<i2")
    axes = [np.linspace(*ends, n) for ends, n in zip(views.box, size, strict=True)]
    index = np.stack(np.meshgrid(*axes, indexing="ij"))
    points = apply_affine(views.frame.affine, index).reshape(3, -1).T
    found = apply_affine(result.forward.linear @ views.frame.affine, index + vectors * unit).reshape(3, -1).T
    assert np.abs(found - result.forward.apply(points)).max() < 2e-3  # mm: a unit is a 32,000th of the largest vector


def test_labels_are_counted() -> None:
    scan = head(grid_of("LPI"))
    labels = labels_of(scan)
    views = views_of(scan)
    plane = views.planes[0]
    numbers = np.array([2, 10, 17, 41])
    tiles = views.labels(plane, labels, numbers)
    expected = plane.nearest(views.frame.orient(labels.array))
    for place, number in enumerate(numbers, start=1):
        assert np.array_equal(tiles == place, expected == number)
    assert set(np.unique(tiles)) == {0, 1, 2, 3, 4}


def test_volume_change_of_the_result_is_that_of_its_map() -> None:
    scan = head(grid_of())
    result = registered(scan, scan, np.diag([1.1, 1.0, 0.9, 1.0]))
    np.testing.assert_allclose(result.volume_change, volume_change(result.ddf, scan.affine))
    assert result.volume_change.mean() == pytest.approx(0.99, abs=1e-4)  # float32
