"""Change between visits whose truth is known: made by a map, seen on other grids, in another pose, with noise."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from voxelmorph_monai import cli
from voxelmorph_monai.apps.longitudinal import Change, _harmonised, longitudinal
from voxelmorph_monai.groupwise import centred_velocities
from voxelmorph_monai.maps.files import read_transform
from voxelmorph_monai.maps.grids import read_ends
from voxelmorph_monai.space.middle import grid_around, linear_mean
from voxelmorph_monai.space.scan import Scan

SIZE, SIDE = (36, 40, 34), 2.5
CENTRE, RADIUS = np.array([-6.0, 5.0, 3.0]), 14.0  # mm, of the ball that changes
STEPS = 10


class Visit(NamedTuple):
    image: Scan
    labels: Scan


def placed(angles: tuple[float, float, float], shift: tuple[float, float, float]) -> NDArray[Any]:
    affine = np.eye(4)
    affine[:3, :3] = SIDE * Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine[:3, 3] = np.array(shift) - affine[:3, :3] @ ((np.array(SIZE) - 1) / 2)
    return affine


def visit(growth: float, seed: int, grid: NDArray[Any], pose: NDArray[Any]) -> Visit:
    """A head with a ball whose volume is ``growth`` times what it was, seen on a grid, in a pose."""
    points = np.moveaxis(np.indices(SIZE), 0, -1) @ grid[:3, :3].T + grid[:3, 3]
    away = points - CENTRE
    distance, side = np.linalg.norm(away, axis=-1), growth ** (1 / 3)
    fading = np.exp(-(np.maximum(distance - RADIUS * side, 0) ** 2) / (2 * 6.0**2))
    before = CENTRE + away * (1 + (1 / side - 1) * fading)[..., None]  # where it was in the first visit
    head = np.linalg.norm(before / [36, 42, 35], axis=-1)
    ball = np.linalg.norm(before - CENTRE, axis=-1)
    image = 0.5 / (1 + np.exp(15 * (head - 0.9))) + 0.4 / (1 + np.exp(1.5 * (ball - RADIUS)))
    rng = np.random.default_rng(7)
    for _ in range(25):
        place, width = rng.uniform(-22, 22, 3), rng.uniform(4, 7)
        image += rng.choice([-0.15, 0.15]) * np.exp(-((before - place) ** 2).sum(-1) / (2 * width**2)) * (head < 0.8)
    image += 0.004 * np.random.default_rng(seed).standard_normal(SIZE) * (head < 1.1)
    labels = (ball < RADIUS).astype(np.uint8) * 17
    array = (1000 * np.where(image > 0.01, image, 0)).astype(np.float32)
    return Visit(Scan(array, pose @ grid, f"visit {seed}"), Scan(labels, pose @ grid, f"labels {seed}"))


def pose() -> NDArray[Any]:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.from_euler("z", 6, degrees=True).as_matrix(), [4, 2, -3]
    return matrix


GRIDS = placed((1, 2, -2), (0, 0, 0)), placed((5, -4, 8), (3, -2, 1))


def pair(growth: float) -> tuple[Visit, Visit]:
    return visit(1.0, 1, GRIDS[0], np.eye(4)), visit(growth, 2, GRIDS[1], pose())


def measure(*visits: Visit, **options: Any) -> Change:
    images, labels = zip(*visits, strict=True)
    return longitudinal(images, labels=labels, steps=STEPS, **options)


@pytest.fixture(scope="module")
def grown() -> Change:
    return measure(*pair(1.08))


def percent(change: Change, name: str = "17") -> float:
    return 100 * (change.volumes[name][1] / change.volumes[name][0] - 1)


def test_a_change_is_recovered(grown: Change) -> None:
    assert percent(grown) == pytest.approx(8, abs=0.8)  # a tenth of its size
    truth = 4 / 3 * np.pi * RADIUS**3 / 1000
    assert grown.volumes["17"][0] == pytest.approx(truth, rel=0.03)  # voxels of 2.5 mm count a ball to 2 %
    local, middle = grown.change[0], np.linalg.inv(grown.maps[0].post) @ [*CENTRE, 1.0]
    points = np.moveaxis(np.indices(local.shape), 0, -1) @ local.affine[:3, :3].T + local.affine[:3, 3]
    distance = np.linalg.norm(points - middle[:3], axis=-1)
    assert local.array[distance < RADIUS].mean() == pytest.approx(8, abs=2)  # its voxels at the edge change less


def test_the_middle_is_half_way(grown: Change) -> None:
    to_first, to_second = (map_.post for map_ in grown.maps)
    motion = to_second @ np.linalg.inv(to_first)
    np.testing.assert_allclose(motion, pose(), atol=0.3)  # mm
    np.testing.assert_allclose(to_first @ to_second, np.eye(4), atol=1e-6)


def test_no_change_is_none_and_swapping_turns_the_sign() -> None:
    first, second = pair(1.0)
    there, back = measure(first, second), measure(second, first)
    assert abs(percent(there)) < 1  # 740 voxels: an edge that is right to 0.02 of one
    assert abs(percent(there, "all that is shown")) < 0.5
    assert there.change[0].shape == back.change[0].shape
    logs = [np.log1p(found.change[0].array / 100) for found in (there, back)]
    assert np.abs(logs[0] + logs[1])[there.visits[0].array > 0.1].mean() <= 0.01
    assert percent(back) == pytest.approx(-percent(there), abs=0.02)


def test_a_few_bright_voxels_do_not_make_the_rest_darker() -> None:
    """They set the scale of their visit, by the brightest half percent, which is a gain for all else."""
    first = visit(1.0, 1, GRIDS[0], np.eye(4)).image
    bright = np.random.default_rng(3).uniform(size=SIZE) < 0.02
    second = first.like(np.where(bright, 3, 1).astype(np.float32) * first.array, "bright")
    one, other = (each.array for each in longitudinal([first, second], steps=1).visits)
    shown = (one > 0.2) & (other > 0.05)
    # It is 0.26 without; the bright voxels themselves pull the mean of the logarithms by 2 % of log(3), or 0.02.
    assert abs(np.median(np.log(one[shown] / other[shown]))) < 0.1


def test_gain_and_shading_are_those_of_the_mean() -> None:
    """A Gaussian leaves exp(-(k s)^2 / 2) of a cosine of k a mm, which is what is known of the shading."""
    side, wave = 5.0, 2 * np.pi / 300
    x = side * np.arange(81)[:, None, None]
    shading = np.broadcast_to(0.2 + 0.1 * np.cos(wave * x), (81, 20, 20))  # half of the logarithm of the ratio
    images = [0.4 * np.exp(sign * shading).astype(np.float32) for sign in (1, -1)]
    first, second = (np.log(image / 0.4) for image in _harmonised(images, side))
    np.testing.assert_allclose(first, -second, atol=1e-5)  # float32, and the weight of what is not shown
    left = (1 - np.exp(-((25 * wave) ** 2) / 2)) * 0.1 * np.cos(wave * x)
    inner = slice(20, -20)  # 100 mm, four deviations, from the ends
    np.testing.assert_allclose(first[inner], np.broadcast_to(left, first.shape)[inner], atol=2e-4)  # the last deviation


def save(folder: Path) -> list[str]:
    paths = []
    for i, each in enumerate(pair(1.0), 1):
        each.image.save(folder / f"v{i}.nii.gz")
        each.labels.save(folder / f"l{i}.nii.gz")
        paths += [str(folder / f"v{i}.nii.gz")]
    return paths


def test_the_command_writes_what_was_found(
    grown: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("voxelmorph_monai.apps.longitudinal.longitudinal", lambda *_, **__: grown)
    out, visits = tmp_path / "out", save(tmp_path)
    labels = ["--labels", str(tmp_path / "l1.nii.gz"), str(tmp_path / "l2.nii.gz")]
    command = ["longitudinal", *visits, "--output", str(out), *labels]
    assert cli.main(command) == 0
    assert "17: " in capsys.readouterr().out
    rows = list(csv.DictReader((out / "structures.csv").read_text().splitlines()))
    assert [row["structure"] for row in rows] == ["all that is shown", "17"]
    assert float(rows[1]["change_percent_2"]) == pytest.approx(percent(grown), abs=1e-3)
    relative = (1 + percent(grown) / 100) / (1 + percent(grown, "all that is shown") / 100) - 1
    assert float(rows[1]["relative_change_percent_2"]) == pytest.approx(100 * relative, abs=1e-3)
    np.testing.assert_allclose(nib.load(out / "change_2.nii.gz").get_fdata(), grown.change[0].array, rtol=1e-5)
    assert tuple(read_ends(out / "to_visit_2.h5").moving.size) == SIZE
    assert read_transform(out / "to_visit_1.h5").GetInputSpaceDimension() == 3
    assert json.loads((out / "summary.json").read_text())["volumes_ml"]["17"] == grown.volumes["17"]
    assert cli.main(command) == 2
    assert f"{out} already exists" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0


def test_the_command_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visits, labels = save(tmp_path), [str(tmp_path / f"l{i}.nii.gz") for i in (1, 2)]
    words = [*visits, "--labels", *labels, "--output", str(tmp_path / "out"), "--steps", "1", "--spacing", "5"]
    assert cli.main(["longitudinal", *words]) == 0
    shown = re.sub(r"\d\d:\d\d", "TIME", capsys.readouterr().err).splitlines()
    assert shown[0] == "align: 1 of 1 visits in TIME"
    assert re.fullmatch(r"register: 2 of 2 registrations in TIME, loss -?\d+\.\d{4}", shown[1])
    assert shown[2:] == ["measure: 1 of 1 structures in TIME"]


def test_three_visits_are_registered_to_their_mean_twice(capsys: pytest.CaptureFixture[str]) -> None:
    images = [torch.from_numpy(each.image.array[None, None] / 1000) for each in (*pair(1.0), pair(1.0)[0])]
    centred_velocities(images, steps=1)
    assert not capsys.readouterr().err
    centred_velocities(images, steps=1, progress=True)
    assert "register: 6 of 6 registrations in " in capsys.readouterr().err


def test_visits_are_counted_as_they_are_labelled(
    grown: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = "voxelmorph_monai.apps.longitudinal"
    given: list[Scan] = []
    monkeypatch.setattr(f"{module}.longitudinal", lambda *_, labels, **__: given.extend(labels) or grown)
    monkeypatch.setattr(f"{module}.load_anatomy", lambda _: torch.nn.Identity())
    monkeypatch.setattr(f"{module}.segment", lambda scan, _: SimpleNamespace(labels=scan))
    visits = save(tmp_path)
    assert cli.main(["longitudinal", *visits, "--anatomy", "--output", str(tmp_path / "out")]) == 0
    assert [scan.name for scan in given] == visits
    assert "segment: 2 of 2 visits in " in capsys.readouterr().err


def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visits = save(tmp_path)
    out = ["--output", str(tmp_path / "out")]
    assert cli.main(["longitudinal", visits[0], *out]) == 2
    assert "visits is 1" in capsys.readouterr().err
    assert cli.main(["longitudinal", *visits, *out, "--labels", str(tmp_path / "l1.nii.gz")]) == 2
    assert "1 label maps for 2 visits" in capsys.readouterr().err
    assert (
        cli.main(["longitudinal", *visits, *out, "--labels", str(tmp_path / "l2.nii.gz"), str(tmp_path / "l1.nii.gz")])
        == 2
    )
    assert "v1.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_mean_of_linear_maps() -> None:
    m = pose()
    np.testing.assert_allclose(linear_mean([m, np.linalg.inv(m)]), np.eye(4), atol=1e-12)
    root = linear_mean([m, np.eye(4)])
    np.testing.assert_allclose(root @ root, m, atol=1e-12)
    scale = linear_mean([np.diag([2.0, 2, 2, 1]), np.diag([8.0, 2, 2, 1])])
    np.testing.assert_allclose(scale, np.diag([4.0, 2, 2, 1]), atol=1e-12)  # geometric


def test_the_grid_holds_what_all_show() -> None:
    array = np.zeros((8, 9, 7), np.float32)
    array[2:5, 3:6, 2:4] = 1
    scan, turn = Scan(array, placed((10, 20, 30), (5, 5, 5))), pose()
    size, affine = grid_around([scan, scan], [np.eye(4), turn])
    corners = np.stack(np.meshgrid([2, 4], [3, 5], [2, 3], indexing="ij")).reshape(3, -1)
    for mapping in (np.eye(4), turn):
        world = np.linalg.inv(mapping) @ scan.affine @ np.vstack([corners, np.ones(8)])
        index = (np.linalg.inv(affine) @ world)[:3]
        assert (index >= 7.5).all()  # 8 voxels of margin, but for half of one that the size is rounded by
        assert (np.array(size) - 8.5 >= index.T).all()
    assert affine[0, 0] == pytest.approx(SIDE)
