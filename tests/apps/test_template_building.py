"""Templates of small bodies whose mean shape is known."""

import json
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from voxelmorph_monai import cli, report
from voxelmorph_monai.apps import cohort, template_building
from voxelmorph_monai.apps.processes import attempt
from voxelmorph_monai.apps.template_building import _robust_mean, build_template
from voxelmorph_monai.io.images import read_image, read_labels, save_image

SIZE, SIDE = (18, 22, 16), 4.0
AXES = np.array([1.0, 1.25, 0.8])  # of an ellipsoid as large as a ball
RADII = (20, 24, 28)
TOP = 120.0


class Inline:
    """The pool of a cohort, in this process: starting others takes seconds."""

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, /, *args: Any) -> "Future[str | None]":
        future: Future[str | None] = Future()
        future.set_result(attempt(function, args))
        return future


def quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cohort, "_pool", lambda *_: Inline())
    patch.setattr(report, "save_registration_picture", lambda path, *_, **__: path.touch())  # a second each


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


def placed(shift: tuple[float, float, float]) -> NDArray[Any]:
    affine = np.diag([-SIDE, SIDE, SIDE, 1])
    affine[:3, 3] = np.array(shift) - affine[:3, :3] @ ((np.array(SIZE) - 1) / 2)
    return affine


def body(radius: float, shift: tuple[float, float, float]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """An ellipsoid with a marker on its left, its labels, and its affine."""
    affine = placed(shift)
    points = np.tensordot(affine[:3, :3], np.indices(SIZE), 1) + affine[:3, 3].reshape(3, 1, 1, 1)
    points = (points - np.reshape(shift, (3, 1, 1, 1))) / (radius * AXES.reshape(3, 1, 1, 1))
    away = np.linalg.norm(points, axis=0)
    marker = np.linalg.norm(points - np.reshape([-0.4, 0.2, 0.3], (3, 1, 1, 1)), axis=0)
    image = TOP / (1 + np.exp(radius * (away - 1))) + 100 / (1 + np.exp(radius * (marker - 0.3)))
    labels = np.where(away < 1, 41, 0) + np.where(marker < 0.3, -24, 0)
    return np.where(image > 1, image, 0).astype(np.float32), labels.clip(0).astype(np.uint8), affine


def write(folder: Path, order: Any = range(3)) -> Path:
    """Scans that lie apart, in units and with a background of their own, and their list."""
    folder.mkdir(exist_ok=True)
    for i in range(len(RADII)):
        array, label, affine = body(RADII[i], (3.0 * i, -2.0 * i, i))
        save_image(folder / f"s{i}.nii.gz", (array, 1000 * array, np.where(array > 0, array, -1024))[i], affine)
        save_image(folder / f"l{i}.nii.gz", label, affine)
    path = folder / "list.csv"
    path.write_text("\n".join(["image,labels", *(f"s{i}.nii.gz,l{i}.nii.gz" for i in order)]) + "\n")
    return path


OPTIONS: dict[str, Any] = {"rounds": 2, "steps": 4}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        build_template(write(folder / "scans"), folder / "template", **OPTIONS)
    return folder / "template"


def radius_of(volume: float) -> float:
    return float((volume * 3 / (4 * np.pi)) ** (1 / 3))


def test_the_template_is_as_large_as_the_mean(built: Path) -> None:
    labels, affine = read_labels(built / "template_labels.nii.gz")
    side = affine[0, 0] ** 3
    assert set(np.unique(labels)) == {0, 17, 41}
    probability = sum(read_image(built / f"round_2/probabilities/label_{n}.nii.gz")[0] for n in (17, 41))
    # of the three radii the geometric mean is 23.8; voxels of 4 mm count them to 0.1 mm
    assert radius_of(probability.sum() * side) == pytest.approx(23.8, abs=0.4)
    assert radius_of((labels > 0).sum() * side) == pytest.approx(23.8, abs=0.6)
    share = probability[labels > 0]
    assert share.mean() > 0.85  # the labels lie on each other, but for the voxels of the edge


def test_the_template_moves_to_the_middle_and_the_scans_grow_alike(built: Path) -> None:
    rounds = [json.loads((built / f"round_{i}" / "round.json").read_text()) for i in range(3)]
    moved = [each["mean_displacement_mm"] for each in rounds]
    assert moved[0] > 1  # at first it was one of the scans, which lie apart
    assert moved[2] < 0.8 * moved[0]
    assert rounds[2]["correlation"] > 0.98


def test_the_template_is_in_the_middle_of_the_scans(built: Path) -> None:
    """The maps to the scans, as they are after the correction, lead nowhere on average."""
    for number in (1, 2):
        left = json.loads((built / f"round_{number}" / "round.json").read_text())["left_mm"]
        assert 0 < left < 0.1  # mm, of voxels of 4 mm, between which the maps are interpolated


@pytest.mark.parametrize(("deviations", "counts"), [(2.85, True), (3.15, False), (-2.85, True), (-3.15, False)])
def test_what_is_three_standard_deviations_off_is_left_out(deviations: float, counts: bool) -> None:
    """One more value among those of a normal distribution; it changes their median absolute deviation by 2 %."""
    values = norm(1000, 100).ppf(np.arange(1, 100) / 100)
    stack = np.append(values, 1000 + 100 * deviations).astype(np.float32).reshape(-1, 1, 1, 1)
    expected = stack.mean() if counts else values.mean()
    assert _robust_mean(stack).item() == pytest.approx(expected, rel=1e-6)  # float32


def test_the_range_of_intensities(built: Path) -> None:
    mean = read_image(built / "mean.nii.gz")[0]
    assert mean.min() == 0
    assert 0.9 < mean.max() <= 1.0


def test_a_call_that_died_is_taken_up_and_neither_order_nor_names_matter(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are the same, also after deaths among registrations and while a template is made."""
    path = write(tmp_path / "scans", order=(2, 0, 1))
    shutil.move(tmp_path / "scans" / "s2.nii.gz", tmp_path / "scans" / "zz.nii.gz")
    path.write_text(path.read_text().replace("s2.nii.gz", "zz.nii.gz"))
    register, save, calls = cohort.register_files, template_building._save_labels, {"register": 0, "save": 0}

    def registers(*args: Any, **kwargs: Any) -> Any:
        calls["register"] += 1
        if calls["register"] == 2:
            raise KeyboardInterrupt
        return register(*args, **kwargs)

    def saves(*args: Any) -> None:
        calls["save"] += 1
        if calls["save"] == 2:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(cohort, "register_files", registers)
    monkeypatch.setattr(template_building, "_save_labels", saves)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build_template(path, tmp_path / "template", **OPTIONS)
    build_template(path, tmp_path / "template", **OPTIONS)
    assert calls == {"register": 10, "save": 4}  # one of each was lost, nothing was done twice
    for name in ("template.nii.gz", "template_labels.nii.gz"):
        a, b = (read_image(folder / name)[0] for folder in (built, tmp_path / "template"))
        np.testing.assert_array_equal(a, b)


def test_where_a_scan_ends_the_others_count() -> None:
    stack = np.full((3, 4, 4, 4), 0.8, np.float32)
    stack[1, :, :, 2:] = template_building._OUTSIDE
    stack[2, 0] = 5.0  # an outlier
    stack[:, 3, 3] = template_building._OUTSIDE
    mean = template_building._robust_mean(stack)
    np.testing.assert_allclose(mean[1:3], 0.8)
    np.testing.assert_allclose(mean[0, :, :2], 0.8)
    np.testing.assert_array_equal(mean[3, 3], 0)


def test_bad_lists_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = write(tmp_path / "scans")
    lines = scans.read_text().splitlines()
    for text, message in (
        ("moving\na.nii.gz\n", "needs image"),
        ("\n".join(lines[:2]) + "\n", "lists 1 scans"),
        ("\n".join([*lines, lines[1]]) + "\n", "twice"),
        ("\n".join([*lines[:2], "s1.nii.gz,"]) + "\n", "labels for only some"),
    ):
        scans.write_text(text)
        assert cli.main(["template", str(scans), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_another_group_needs_another_folder(built: Path, tmp_path: Path) -> None:
    scans = write(tmp_path / "scans", order=range(2))
    with pytest.raises(ValueError, match="other scans or options"):
        build_template(scans, built, **OPTIONS)
    with pytest.raises(ValueError, match="not made by 'vxm template'"):
        build_template(scans, tmp_path / "scans", **OPTIONS)
