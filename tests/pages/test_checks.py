"""Registrations that are wrong in a known way say so, and good ones say nothing."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.pages.bodies import SIZE, ball, grid_of, head, labels_of, points_of, registered, wave
from voxelmorph_monai.apps.result import RegistrationResult
from voxelmorph_monai.space.scan import Scan


def shift(x: float = 0, y: float = 0, z: float = 0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = x, y, z
    return matrix


def checks(result: RegistrationResult) -> dict[str, str]:
    return {warning["check"]: warning["text"] for warning in result.measures()["warnings"]}


def pair(codes: str = "LPI"):
    return head(grid_of()), head(grid_of(codes))


@pytest.mark.parametrize("codes", ["RAS", "LPI", "OBL"])
def test_good_registrations_are_not_warned_of(codes: str) -> None:
    fixed, moving = pair(codes)
    labels = {"fixed_labels": labels_of(fixed), "moving_labels": labels_of(moving)}
    assert checks(registered(fixed, moving, **labels)) == {}
    assert checks(registered(fixed, moving, field=wave(fixed.affine, height=0.1), **labels)) == {}


@pytest.mark.parametrize(
    ("matrix", "direction"),
    [
        (shift(x=20), "20 mm to the right"),  # the warped scan shows what lies 20 mm to the right: it lies to the left
        (shift(y=-20), "20 mm to the back"),
        (shift(z=20), "20 mm up"),
    ],
)
def test_a_shift_of_20_mm(matrix: np.ndarray, direction: str) -> None:
    fixed, moving = pair()
    found = checks(registered(fixed, moving, matrix))
    assert "place" in found or "shift" in found
    words = found.get("shift", "") + found.get("place", "")
    side = direction.split(" mm ")[1]
    assert f"mm {side}" in words


@pytest.mark.parametrize(("place", "side"), [(61.5, "right"), (-61.5, "left")])
def test_a_shift_of_more_than_half_the_field_of_view(place: float, side: str) -> None:
    """The points of the lattice are voxels, so a shift by 30 of them is one by 123 mm, of 180."""
    affine = grid_of()
    fixed, moving = (
        Scan(100 * ball(points_of(affine), (x, 0, 0), (20, 20, 20)).astype(np.float32), affine) for x in (place, -place)
    )
    assert f"if it were moved 123 mm to the {side}" in checks(registered(fixed, moving))["shift"]


def test_an_axis_inverted() -> None:
    fixed, moving = pair()
    found = checks(registered(fixed, moving, np.diag([-1.0, 1, 1, 1])))
    assert "left and right" in found["mirrored"]
    assert "mirrored" not in checks(registered(fixed, moving, np.diag([-1.0, -1, 1, 1])))  # half a turn
    assert "180 degrees" in checks(registered(fixed, moving, np.diag([-1.0, -1, 1, 1])))["turn"]


def test_negative_headers_are_no_mirrors() -> None:
    fixed, moving = head(grid_of("LAS")), head(grid_of("LPS"))
    assert checks(registered(fixed, moving)) == {}


def test_scale_and_turn() -> None:
    fixed, moving = pair()
    assert "2.00" in checks(registered(fixed, moving, np.diag([0.5, 1, 1, 1])))["scale"]
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("x", 90, degrees=True).as_matrix()
    found = checks(registered(fixed, moving, turned))
    assert "90 degrees" in found["turn"]
    assert "scale" not in found


def test_folds() -> None:
    fixed, moving = pair()
    found = checks(registered(fixed, moving, field=wave(fixed.affine, height=14)))
    assert "%" in found["folds"]
    assert "inverse" in found


def test_sides_of_labels_that_contradict_the_header() -> None:
    fixed, moving = pair()
    wrong = (41, 2, 49, 10, 53, 17)
    both = {"fixed_labels": labels_of(fixed, wrong), "moving_labels": labels_of(moving, wrong)}
    found = [w["text"] for w in registered(fixed, moving, **both).measures()["warnings"] if w["check"] == "sides"]
    assert len(found) == 2
    assert "fixed" in found[0]
    assert "moving" in found[1]
    assert all("3 of 3" in text for text in found)


def test_sides_that_contradict_each_other_whatever_the_numbers() -> None:
    fixed, moving = pair()
    labels = {
        "fixed_labels": labels_of(fixed, (101, 102, 103, 104, 105, 106)),
        "moving_labels": labels_of(moving, (102, 101, 104, 103, 106, 105)),
    }
    assert "101 and 102" in checks(registered(fixed, moving, **labels))["sides"]


@pytest.mark.parametrize("role", ["fixed", "moving"])
def test_labels_of_another_scan(role: str) -> None:
    fixed, moving = pair()
    other = head(grid_of("RAS" if role == "fixed" else "LPI"), centre=(45, 30, -25))
    labels = {"fixed_labels": labels_of(fixed), "moving_labels": labels_of(moving)}
    scan = fixed if role == "fixed" else moving
    points = points_of(scan.affine) - np.reshape((45, 30, -25), (3, 1, 1, 1))
    labels[f"{role}_labels"] = scan.like((5 * ball(points, (0, 0, 0), (65, 82, 65))).astype(np.int16), other.name)
    found = checks(registered(fixed, moving, **labels))
    assert role in found["labels"]


@pytest.mark.parametrize("role", ["fixed", "moving", None])
def test_labels_of_another_scan_in_the_same_place(role: str | None) -> None:
    """The other brain has the same outline, and its parts elsewhere."""
    fixed, moving = pair("RAS")

    def parts(scan: Scan, sign: int) -> Scan:
        points = points_of(scan.affine)
        labels = ball(points, (0, 0, 0), (65, 82, 65)).astype(np.int16)
        labels[ball(points, (-30 * sign, 20, 20), (9, 9, 9))] = 2
        labels[ball(points, (10 * sign, -30 * sign, 5), (14, 9, 12))] = 3
        return scan.like(labels)

    labels = {f"{name}_labels": parts(fixed, -1 if name == role else 1) for name in ("fixed", "moving")}
    found = [w["text"] for w in registered(fixed, moving, **labels).measures()["warnings"] if w["check"] == "labels"]
    assert len(found) == (role is not None)
    assert role is None or f"the label file of the {role} scan" in found[0]


def test_labels_of_different_things_are_not_compared() -> None:
    fixed, moving = pair("RAS")
    halves = fixed.like(np.where(points_of(fixed.affine)[0] < 0, 100, 200).astype(np.int16))
    labels = {"fixed_labels": labels_of(fixed), "moving_labels": halves}
    assert "labels of the other scan" not in str(registered(fixed, moving, **labels).measures()["warnings"])


def test_a_moving_scan_that_ends_early() -> None:
    fixed, moving = pair("RAS")
    half = type(moving)(moving.array[:, :, : SIZE[2] // 2], moving.affine)
    found = checks(registered(fixed, half))
    assert "%" in found["field of view"]
    assert "place" not in found  # what both can show is compared


def test_scans_that_got_worse() -> None:
    fixed, moving = pair()
    found = checks(registered(fixed, moving, shift(40, 30, 0)))
    assert "worse" in found


def test_two_contrasts_may_have_a_low_correlation() -> None:
    fixed, moving = pair()
    inverted = moving.like(np.where(moving.array > 20, 160 - moving.array, 0).clip(0))
    options = registered(fixed, moving).options
    found = checks(registered(fixed, inverted, options={**options, "similarity": "mind"}))
    assert found.keys().isdisjoint({"worse", "unlike"})
    assert "worse" not in checks(registered(fixed, moving, shift(40, 30, 0), options={**options, "similarity": "mind"}))


def test_empty_scans_give_sentences() -> None:
    fixed, moving = pair()
    empty = moving.like(np.zeros_like(moving.array))
    assert "do not overlap" in checks(registered(fixed, empty))["place"]


def test_slices_are_checked_too() -> None:
    affine = grid_of()
    scan = head(affine)
    flat = type(scan)(scan.array[:, :, 24:25], affine)
    assert checks(registered(flat, flat)) == {}
    assert checks(registered(flat, flat, shift(x=20))).keys() & {"place", "shift"}
