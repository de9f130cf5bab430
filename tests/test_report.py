import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import spacing
from voxelmorph_monai.report import Images, correlation, overlap, regularity, save_results, volume_change

SIZE = (7, 9, 8)


def scale(factor: float) -> np.ndarray:
    """Displacement ``(3, X, Y, Z)`` of the map that multiplies each index by ``factor`` along the first axis."""
    ddf = np.zeros((3, *SIZE), np.float32)
    ddf[0] = (factor - 1) * np.indices(SIZE)[0]
    return ddf


def test_correlation_is_that_of_numpy_and_0_where_nothing_is_seen() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.gamma(2.0, 500.0, (2, *SIZE)).astype(np.float32)
    second += 0.4 * first
    assert correlation(first, second) == pytest.approx(np.corrcoef(first.ravel(), second.ravel())[0, 1], abs=1e-12)
    assert correlation(first, -3 * first + 7) == pytest.approx(-1, abs=1e-6)  # float32
    assert correlation(first, np.full(SIZE, 4.0)) == 0
    where = first > np.median(first)
    expected = np.corrcoef(first[where], second[where])[0, 1]
    assert correlation(first, second, where) == pytest.approx(expected, abs=1e-12)
    assert correlation(first, second, np.zeros(SIZE, bool)) == 0


def test_correlation_of_integers_does_not_overflow() -> None:
    full = np.full((50, 50, 50), 20_000, np.int16)  # whose squares are no int16
    assert correlation(full, full) == 0.0
    image = np.random.default_rng(0).integers(15_000, 32_000, (50, 50, 50)).astype(np.int16)
    assert correlation(image, (image - 15_000).astype(np.int16)) == pytest.approx(1.0)
    assert correlation(image, full) == 0.0


def test_overlap_counts_the_labels_of_the_result_and_of_the_fixed_map() -> None:
    rng = np.random.default_rng(1)
    values = np.array([0, 4, 17, 30000], np.int16)
    before, after, fixed = values[rng.integers(0, 4, (3, *SIZE))]
    before[0, 0, 0], after[after == 17], fixed[fixed == 4] = 99, 0, 0
    table = overlap({"before": before, "after": after}, fixed)
    for stage, labels in (("before", before), ("after", after)):
        expected = {}
        for label in (4, 17, 30000):  # 99 is gone in the end; 4 and 17 are each in one of the two
            a, b = labels == label, fixed == label
            expected[str(label)] = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert table[stage] == pytest.approx(expected | {"mean": np.mean(list(expected.values()))}, abs=1e-12)
    nothing = np.zeros(SIZE, np.uint8)
    assert overlap({"after": nothing}, nothing) == {"after": {"mean": 0.0}}


def test_regularity_of_maps_that_are_known() -> None:
    assert regularity(scale(1.5)) == {"folding_percent": 0.0, "sdlogj": pytest.approx(0, abs=1e-6)}  # float32
    assert regularity(scale(-1.0)) == {"folding_percent": 100.0, "sdlogj": None}


@pytest.mark.parametrize("factor", [1.5, 0.5, -0.5])
def test_the_area_of_a_slice_that_is_turned_over_is_negative(factor: float) -> None:
    """Whatever the plane lies in, as in a volume: the determinant of the map."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix() @ np.diag([0.8, 3.0, 1.2])
    np.testing.assert_allclose(volume_change(scale(factor)[:, :, 3:4], affine), factor, rtol=1e-6)  # float32
    np.testing.assert_allclose(volume_change(scale(factor), affine), factor, rtol=1e-6)


def test_what_is_saved(tmp_path: Path) -> None:
    affine = np.diag([2.0, -1.5, 1.0, 1.0])
    image = np.random.default_rng(2).uniform(size=SIZE).astype(np.float32)
    summary = {"correlation_before": 0.25, "correlation_after": 0.5, "folding_percent": 0.0, "sdlogj": None}
    save_results(tmp_path, Images(image, image, image), scale(1.25), affine, summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    determinant = nib.load(tmp_path / "jacobian.nii.gz")
    np.testing.assert_allclose(determinant.get_fdata(), 1.25, atol=1e-6)  # float32
    np.testing.assert_allclose(spacing(determinant.affine), [2, 1.5, 1], atol=1e-6)
    vectors = nib.load(tmp_path / "displacement.nii.gz").get_fdata()[..., 0, 0]
    np.testing.assert_allclose(vectors, -2.0 * scale(1.25)[0], atol=1e-5)  # mm along L
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_slice_is_measured_in_its_plane_and_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    ddf = scale(1.5)[:, :, 3:4]
    assert regularity(ddf) == {"folding_percent": 0.0, "sdlogj": pytest.approx(0, abs=1e-6)}  # float32
    image = np.random.default_rng(2).uniform(size=ddf.shape[1:]).astype(np.float32)
    summary = {"correlation_before": 0.25, "correlation_after": 0.5, "folding_percent": 0.0}
    odd = {"sdlogj": float("nan"), "dice": {"after": {"7": float("inf"), "8": 0.5}}}
    save_results(tmp_path, Images(image, image, image), ddf, np.eye(4), summary | odd)
    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert found == summary | {"sdlogj": None, "dice": {"after": {"7": None, "8": 0.5}}}
    np.testing.assert_allclose(nib.load(tmp_path / "jacobian.nii.gz").get_fdata(), 1.5, atol=1e-6)
