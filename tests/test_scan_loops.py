"""The compiled loops over scans give what SciPy, and torch, give without them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from voxelmorph_monai import scan_loops, switch
from voxelmorph_monai.affines import Affine, ImageGrid
from voxelmorph_monai.anatomy import restore
from voxelmorph_monai.maps.spatial_map import Displacement, SpatialMap, warp_scan
from voxelmorph_monai.report import volume_change
from voxelmorph_monai.space.mutual_information import MutualInformation, coarsen
from voxelmorph_monai.space.resampling import resample
from voxelmorph_monai.space.scan import Scan

SIZE = (19, 23, 17)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def place(turn: float, shift: float, sides: tuple[float, float, float] = (1.1, 0.9, 1.3)) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [turn, -turn, 2 * turn]).as_matrix() * sides
    affine[:3, 3] = [shift, -shift, 1.0]
    return affine


def field(rng: np.random.Generator, size: tuple[int, ...], reach: float) -> NDArray[np.float32]:
    smooth = gaussian_filter(rng.normal(size=(3, *size)), (0, 2, 2, 2))
    return (reach * smooth / np.abs(smooth).max()).astype(np.float32)


def both(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> tuple[Any, Any]:
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(switch, "enabled", enabled)
        found.append(work())
    return found[0], found[1]


def test_the_switch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert switch.compiled_module("scan_loops") is scan_loops
    monkeypatch.setattr(switch, "enabled", False)
    assert switch.compiled_module("scan_loops") is None


@pytest.mark.parametrize("memory", ["C", "F"])
@pytest.mark.parametrize(
    ("kind", "order"), [("f4", 1), ("f8", 1), ("f4", 0), ("u1", 0), ("i2", 0), ("i8", 0), (">f4", 1)]
)
def test_scans_are_interpolated_as_by_scipy(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, kind: str, order: int, memory: Any
) -> None:
    scan = Scan(np.asarray(100 * rng.random(SIZE), kind, order=memory), place(0.2, 3.0))
    grid = ImageGrid((21, 18, 25), place(0.0, -2.0))
    ddf, like = field(rng, (21, 18, 25), 4.0), Scan(np.zeros(grid.size), grid.affine)
    for work in (
        lambda: resample(scan, grid, place(0.1, 0.0), order, 7.0).array,
        lambda: warp_scan(scan, ddf, like, order, 7.0).array,
    ):
        ours, scipys = both(monkeypatch, work)
        assert ours.dtype.name == scipys.dtype.name == scan.array.dtype.name
        assert 0.1 < np.mean(scipys == 7) < 0.9  # the border is among what is compared
        # Both compute in float64, and are rounded to the type of the scan.
        np.testing.assert_allclose(ours, scipys, rtol=1e-12 if kind == "f8" else 2e-7)


@pytest.mark.parametrize("shape", [SIZE, (19, 1, 17)])
def test_maps_are_sampled_as_by_scipy(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    middle = Displacement(field(rng, shape, 3.0), place(0.3, 1.0))
    map_ = SpatialMap(place(0.1, 2.0, (1.0, 1.0, 1.0)), place(-0.1, 1.0), middle)
    grid = ImageGrid((20, 15, 22), place(0.2, -1.0))
    ours, scipys = both(monkeypatch, lambda: map_.on_grid(grid))
    assert ours.dtype == scipys.dtype == np.float32
    np.testing.assert_allclose(ours, scipys, rtol=0, atol=1e-5)  # float32 of up to 50 voxels
    points = 40 * rng.random((300, 3)) - 10
    ours, scipys = both(monkeypatch, lambda: map_.apply(points))
    np.testing.assert_allclose(ours, scipys, rtol=0, atol=1e-10)
    assert np.abs(ours - SpatialMap(map_.pre, map_.post).apply(points)).max() > 1  # the displacement counts


def test_an_outermost_voxel_belongs_to_the_scan() -> None:
    """Rounding may put it outside by less than a millionth of a voxel."""
    scan = Scan(1 + np.indices(SIZE).sum(0).astype(np.float32), np.eye(4))
    almost = np.eye(4)
    almost[:3, 3] = 1e-12, -1e-12, 1e-12
    np.testing.assert_allclose(resample(scan, scan.grid, almost).array, scan.array, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_volumes_change_as_torch_says(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, kind: Any) -> None:
    ddf = field(rng, SIZE, 3.0).astype(kind)
    ours, torchs = both(monkeypatch, lambda: volume_change(ddf, np.eye(4)))
    assert ours.dtype == torchs.dtype == kind
    np.testing.assert_allclose(ours, torchs, rtol=0, atol=1e-12 if kind is np.float64 else 2e-6)
    assert np.ptp(ours) > 0.5


def test_threads_share_a_volume(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    scan = Scan(rng.random((33, 40, 47)).astype(np.float32), np.eye(4))
    once = resample(scan, scan.grid, place(0.1, 1.0)).array
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    np.testing.assert_array_equal(resample(scan, scan.grid, place(0.1, 1.0)).array, once)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_across_a_slice_nothing_lies_outside(axis: int) -> None:
    size = [5, 6, 7]
    size[axis] = 1
    points = np.full((3, 4), 2.0)
    points[axis] = -4, -0.6, 0.7, 9
    np.testing.assert_array_equal(scan_loops.displace(np.full((3, *size), 3.0), points), np.full((3, 4), 3.0))


@pytest.mark.parametrize("cut", [False, True])
def test_mutual_information(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    """Of images that their border cuts off, a part of the points is unknown."""
    affine = place(0.2, 3)
    images = [gaussian_filter(rng.random(SIZE), 2) for _ in range(2)]
    if not cut:
        images = [np.pad(image[6:-6, 6:-6, 6:-6], 6) for image in images]
    moving, fixed = (coarsen(image, affine, (1.0,), 4)[0] for image in images)
    assert (moving.known is None) != cut
    # no point lies in a voxel's centre, where the slope jumps
    maps = [place(0.0, 0.4, (1, 1, 1)), place(0.05, 1, (1, 1, 1)), place(-0.1, 2, (1.1, 0.9, 1))]

    def work() -> list[NDArray[Any]]:
        information = MutualInformation(moving, fixed, 2)
        slopes = [information.slope(each, with_fisher=True) for each in maps]
        assert all(slope.fisher is not None for slope in slopes)
        return [
            information.glance(maps),
            np.array([information(each) for each in maps]),
            np.stack([slope.gradient for slope in slopes]),
            np.stack([slope.fisher for slope in slopes if slope.fisher is not None]),
        ]

    for loops, other in zip(*both(monkeypatch, work), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(loops, other, atol=1e-9 * np.abs(other).max())  # sums of thousands, in float64


def test_classes(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid reaches beyond the posteriors on all sides."""
    smooth = gaussian_filter(rng.normal(size=(31, *SIZE)), (0, 1, 1, 1)).astype(np.float32)
    posteriors = torch.from_numpy(20 * smooth).softmax(0)
    view, grid = ImageGrid(SIZE, place(0.3, 2, (2, 2, 2))), ImageGrid((40, 44, 30), place(0.1, -3, (1.3, 1.1, 1.4)))
    (loops, volumes), (other, same) = both(monkeypatch, lambda: restore(posteriors, view, grid))
    assert (other == 0).mean() > 0.1
    assert len(np.unique(other)) == 31
    assert volumes == same
    assert (loops != other).mean() < 1e-4  # where two classes are as likely, rounding decides
