"""Scans on other grids and in other intensities."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from voxelmorph_monai import switch
from voxelmorph_monai.affines import ImageGrid
from voxelmorph_monai.space.resampling import (
    cut_off,
    fraction_inside,
    resample,
    resample_intensities,
    rescale,
    scale_white_matter,
)
from voxelmorph_monai.space.scan import Scan


def block(start: int, stop: int) -> Scan:
    """30 voxels of 2 mm a side, of which those from start to stop along x show something."""
    array = np.zeros((30, 30, 30), np.float32)
    array[start:stop, 5:25, 5:25] = 100
    return Scan(array, np.diag([2.0, 2, 2, 1]))


@pytest.mark.parametrize(("shift", "fraction"), [(0, 1.0), (20, 0.5), (-20, 0.5), (30, 0.25), (60, 0.0)])
def test_the_fraction_inside_counts_what_is_shown(shift: float, fraction: float) -> None:
    scan, mapping = block(5, 25), np.eye(4)  # it shows x from 10 to 48 mm
    mapping[0, 3] = shift
    there = np.diag([1.0, 1, 1, 1])
    there[:3, 3] = (10, 0, 0)  # the grid goes from 10 to 49 mm
    assert fraction_inside(scan, ImageGrid((40, 60, 60), there), mapping) == pytest.approx(fraction, abs=0.03)


def test_the_fraction_inside_does_not_count_the_background() -> None:
    scan = block(0, 3)
    ct = scan.like(np.where(scan.array > 0, -100, -1000).astype(np.float32))
    half = ImageGrid((15, 30, 30), scan.affine)
    assert fraction_inside(scan, half, np.eye(4)) == fraction_inside(ct, half, np.eye(4)) == 1
    assert fraction_inside(block(27, 30), half, np.eye(4)) == 0


@pytest.mark.parametrize("order", [0, 1, 3])  # 3 by SciPy alone
@pytest.mark.parametrize("enabled", [True, False])
def test_every_order_is_scipys(order: int, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "enabled", enabled)
    array = gaussian_filter(np.random.default_rng(3).normal(size=(24, 20, 22)), 1.5).astype(np.float32)
    mapping = np.eye(4)
    mapping[:3, :3] = Rotation.from_euler("xyz", [9, -14, 20], degrees=True).as_matrix()
    mapping[:3, 3] = (1.3, -0.7, 2.1)
    grid = ImageGrid((14, 11, 12), np.diag([1.1, 1.3, 1.2, 1.0]))
    grid.affine[:3, 3] = (6, 5, 4)  # where cubic splines are all inside
    found = resample(Scan(array, np.eye(4)), grid, mapping, order).array
    points = (mapping @ grid.affine)[:3, :3] @ np.indices(grid.size).reshape(3, -1) + (mapping @ grid.affine)[:3, 3:]
    expected = map_coordinates(array, points, np.float64, order=order, mode="constant").reshape(grid.size)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(array).max()


def test_the_profile_of_a_coarser_voxel_is_as_wide_as_the_voxel() -> None:
    """A Gaussian stays one; the squares of widths at half height, 2 sqrt(2 log 2) of its deviation, add up."""
    sides, coarse, deviation = np.array([1.0, 2.0, 4.0]), 4.0, 6.0  # mm; along the last axis nothing is lost
    affine = np.diag([*sides, 1])
    affine[:3, 3] = -sides * (24, 12, 6)
    points = np.indices((49, 25, 13)) * sides.reshape(3, 1, 1, 1) + affine[:3, 3].reshape(3, 1, 1, 1)
    scan = Scan(np.exp(-(points**2).sum(0) / (2 * deviation**2)), affine)
    grid = ImageGrid((2, 2, 2), np.diag([coarse, coarse, coarse, 1]))  # its first voxel is at the top
    kernel = (coarse**2 - sides**2) / (8 * np.log(2))
    expected = np.sqrt(deviation**2 / (deviation**2 + kernel)).prod()
    # The scan ends at four deviations, and the kernel is sampled: together 1 in 1000. Without any kernel it were 1.
    assert resample_intensities(scan, grid, np.eye(4)).array[0, 0, 0] == pytest.approx(expected, rel=2e-3)


def test_what_a_field_of_view_cuts_off_lies_beyond_a_side_that_shows_something() -> None:
    wider = np.diag([2.0, 2, 2, 1])
    wider[:3, 3] = -10
    grid = ImageGrid((40, 40, 40), wider)  # five voxels more at each end
    expected = np.zeros(grid.size, bool)
    expected[:5] = True
    np.testing.assert_array_equal(cut_off(block(0, 20), grid, np.eye(4)), expected)
    assert not cut_off(block(1, 29), grid, np.eye(4)).any()
    assert not cut_off(block(0, 20), ImageGrid((30, 30, 30), np.diag([2.0, 2, 2, 1])), np.eye(4)).any()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_scan_continues_with_its_border_where_that_is_wanted(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(switch, "enabled", False)
    wider = np.diag([2.0, 2, 2, 1])
    wider[:3, 3] = -10
    scan = Scan(np.random.default_rng(0).random((30, 30, 30), np.float32), np.diag([2.0, 2, 2, 1]))
    found = resample(scan, ImageGrid((40, 40, 40), wider), np.eye(4), outside=None).array
    np.testing.assert_allclose(found, np.pad(scan.array, 5, mode="edge"), rtol=1e-6)  # float32


def tissues(modes: tuple[float, float, float], volumes: tuple[int, int, int], vessels: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    parts = [rng.normal(mode, 0.06 * modes[2], volume) for mode, volume in zip(modes, volumes, strict=True)]
    bright = rng.uniform(1.2 * modes[2], 3 * modes[2], int(vessels * sum(volumes)))
    shown = np.concatenate([*parts, bright]).clip(1e-3)
    return np.concatenate([np.zeros(64**3 - len(shown)), shown]).reshape(64, 64, 64).astype(np.float32)


@pytest.mark.parametrize("volumes", [(20_000, 60_000, 50_000), (40_000, 90_000, 30_000), (10_000, 30_000, 60_000)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("vessels", [0.0, 0.02])
def test_white_matter_arrives_at_110_of_255(volumes: tuple[int, int, int], scale: float, vessels: float) -> None:
    scan = Scan(tissues((0.3 * scale, 0.7 * scale, scale), volumes, vessels), np.eye(4))
    found = scale_white_matter(scan).array
    assert found.dtype == np.float32
    seen = (scan.array > 0) & (found < 1)  # one factor, but for what is clipped
    factor = np.median(found[seen] / scan.array[seen])
    # A bin is 0.4 % of the range, which vessels stretch to three times; smoothing pulls towards grey matter.
    assert factor * scale == pytest.approx(110 / 255, rel=0.03)
    assert found.max() <= 1


def test_rescaling_ends_at_the_brightest_half_percent() -> None:
    scan = Scan(tissues((0.3, 0.7, 1), (20_000, 60_000, 50_000), 0.004), np.eye(4))
    found = rescale(scan)
    assert np.mean(found.array[scan.array > 0] == 1) == pytest.approx(0.005, abs=1e-4)
    assert found.background == 0
