"""Laws of the metrics, and what outside references say of the same numbers."""

import csv
import math
import re
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler, MetricsSaver
from monai.metrics import DiceMetric
from monai.metrics.utils import get_mask_edges
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.distance import cdist
from surface_distance import compute_robust_hausdorff, compute_surface_distances
from torch.testing import assert_close

from voxelmorph_monai.blocks import identity_grid, integrate
from voxelmorph_monai.epoch_metrics import (
    Folding,
    Hausdorff95,
    InverseConsistency,
    LabelDice,
    LogJacobianSD,
    NonDiffeomorphicVolume,
    PairValue,
    TargetRegistrationError,
)
from voxelmorph_monai.metrics import (
    dice,
    folding,
    hausdorff95,
    inverse_consistency,
    log_jacobian_sd,
    non_diffeomorphic_volume,
    target_registration_error,
)

SIZES = [(17, 23), (9, 14, 11)]
SPACINGS = {2: (1.7, 0.6), 3: (1.7, 0.6, 1.1)}
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 with other orders of summation


def smooth(size, seed, sigma=1.5):
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(size), sigma)
    return noise / noise.std()


def blobs(size, num_labels, seed, batch=2):
    """Random label maps ``(batch, 1, *size)`` with background all around."""
    maps = []
    for item in range(batch):
        seeds = 100 * (seed + 10 * item) + np.arange(num_labels + 1)
        image = np.argmax([smooth(size, s) for s in seeds], axis=0)
        maps.append(np.pad(image[(slice(1, -1),) * len(size)], 1))
    return torch.tensor(np.stack(maps)[:, None])


def field(size, seed, amplitude, batch=2, sigma=1.5):
    spatial_dims = len(size)
    parts = [smooth(size, 1000 * seed + i, sigma) for i in range(batch * spatial_dims)]
    return amplitude * torch.tensor(np.stack(parts)).view(batch, spatial_dims, *size)


def centred_grid(size):
    grid = identity_grid(torch.zeros(1, 1, *size, dtype=torch.float64))
    return grid - (torch.tensor(size).double().view(1, -1, *[1] * len(size)) - 1) / 2


def linear_field(matrix, size):
    return torch.einsum("ij,bj...->bi...", matrix, centred_grid(size))


def ramp(size, row):
    """Field along axis 0 whose displacement in row ``x`` is ``row[x]``."""
    ddf = torch.zeros(1, len(size), *size, dtype=torch.float64)
    ddf[:, 0] = torch.as_tensor(row, dtype=torch.float64).view(-1, *[1] * (len(size) - 1))
    return ddf


def half_mask(size):
    """Mask of two different items: the whole of each row, but only rows 3 to 6, and rows 2 to 7 of the other."""
    mask = torch.zeros(2, 1, *size)
    mask[0, :, 3:7] = 1
    mask[1, :, 2:8] = 1
    return mask


# Non-diffeomorphic volume


def divisions(spatial_dims):
    """The two ways to cut a cell of the grid into simplices, each a list of corners (0 or 1 along each axis)."""
    cell = list(product((0, 1), repeat=spatial_dims))
    for parity in (0, 1):
        cut = [c for c in cell if sum(c) % 2 == parity]  # at these a corner is cut off
        ends = [[c, *([*c[:d], 1 - c[d], *c[d + 1 :]] for d in range(spatial_dims))] for c in cut]
        if spatial_dims == 3:
            ends.append([c for c in cell if sum(c) % 2 != parity])  # what remains in the middle
        yield np.array(ends)


def turned_volume(phi):
    """Volume of simplices whose orientation ``phi`` ``(D, *size)`` changes, by cells, mean of the two divisions."""
    spatial_dims, total = len(phi), 0.0
    for cell in product(*(range(n - 1) for n in phi.shape[1:])):
        for simplices in divisions(spatial_dims):
            for corners in simplices:
                image = np.stack([phi[(slice(None), *(np.array(cell) + c))] for c in corners])
                before = np.linalg.det((corners[1:] - corners[0]).astype(float))
                after = np.linalg.det(image[1:] - image[0])
                total += max(-after * np.sign(before), 0) / math.factorial(spatial_dims) / 2
    return total


@pytest.mark.parametrize("size", [(11, 13), (8, 9, 10)])
def test_non_diffeomorphic_volume_is_that_of_turned_simplices(size):
    ddf = field(size, seed=3, amplitude=1.5)
    core = (slice(None), slice(None), *(slice(3, -3) for _ in size))
    still = torch.zeros_like(ddf)
    still[core] = ddf[core]  # at the border, whose voxels are not counted, nothing folds
    expected = [turned_volume((item + identity_grid(ddf)[0]).numpy()) for item in still]
    counted = math.prod(n - 2 for n in size)
    assert min(expected) > 0.1
    found = non_diffeomorphic_volume(still)
    assert_close(found, 100 * torch.tensor(expected).double() / counted, **EXACT)
    assert_close(non_diffeomorphic_volume(still.float()), found, rtol=1e-4, atol=0)  # float32 differences


@pytest.mark.parametrize("size", SIZES)
def test_a_mirrored_half_is_its_volume(size):
    rows = torch.arange(size[0])
    ddf = torch.cat([ramp(size, -2.0 * (rows - m).clamp(min=0)) for m in (4, 5)])
    found = non_diffeomorphic_volume(ddf, half_mask(size))  # half of what is around row m is turned, all beyond
    expected = torch.tensor([100 * 2.5 / 4, 100 * 2.5 / 6], dtype=torch.float64)
    assert_close(found, expected, **EXACT)
    assert_close(non_diffeomorphic_volume(torch.zeros_like(ddf)), torch.zeros(2).double(), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("measure", [folding, log_jacobian_sd, non_diffeomorphic_volume])
def test_half_precision_fields_are_measured_in_float32(measure, dtype):
    ddf = 100 * field((11, 13), seed=3, amplitude=2.0).to(dtype)  # its determinants are too large for float16
    assert_close(measure(ddf), measure(ddf.float()), **EXACT)


def test_non_diffeomorphic_volume_sees_a_checkerboard_and_depth():
    board = ramp((12, 7), 0.75 * (-1.0) ** torch.arange(12))  # every other slope is -1.5
    shallow, deep = non_diffeomorphic_volume(board), non_diffeomorphic_volume(2 * board)
    assert_close(shallow, torch.tensor([100 * 0.5 / 2]).double(), **EXACT)
    assert_close(deep, torch.tensor([100 * 2.0 / 2]).double(), **EXACT)


def test_values_of_pairs_are_kept_as_they_are():
    metric = PairValue()
    metric(torch.tensor([0.5, 0.25]))
    metric(torch.tensor([2.0]))
    assert metric.get_buffer().tolist() == [0.5, 0.25, 2.0]
    assert metric.aggregate() == pytest.approx(2.75 / 3)


# Dice


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_dice_is_the_overlap_of_each_mask(size, dtype):
    labels, reference = blobs(size, 4, seed=1).to(dtype), blobs(size, 4, seed=2).to(dtype)
    labels[1][labels[1] == 4] = 0  # absent from one
    for image in (labels, reference):
        image[0][image[0] == 2] = 0  # absent from both
    expected = torch.full((2, 4), torch.nan, dtype=torch.float64)
    for b, k in product(range(2), range(1, 5)):
        x, y = (labels[b] == k).numpy(), (reference[b] == k).numpy()
        if x.any() or y.any():
            expected[b, k - 1] = 2 * (x & y).sum() / (x.sum() + y.sum())
    assert expected[0, 1].isnan()
    assert expected[1, 3] == 0
    assert 0 < expected[0, 0] < 1
    assert_close(dice(labels, reference, 4), expected, **EXACT, equal_nan=True)
    assert_close(dice(reference, labels, 4), expected, **EXACT, equal_nan=True)


@pytest.mark.parametrize("measure", [dice, hausdorff95])
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_labels_may_be_large(measure, dtype):
    labels = 300 * box((8, 9), (2, 2), (5, 5)).short()
    labels[0, 0, 6, 6] = 300 - 256
    labels = labels.to(dtype)
    found = measure(labels, labels, 300)[0]
    assert found.isfinite().nonzero().flatten().tolist() == [43, 299]


@pytest.mark.parametrize("num_labels", [5, 190])  # pairs counted in 16 bits, in 32
def test_dice_of_more_voxels_than_pairs_of_labels(num_labels):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(num_labels + 1, (2, 1, 200, 210), generator=generator)
    reference = torch.where(torch.rand(labels.shape, generator=generator) < 0.5, labels, labels.flip(-1))
    assert labels[0].numel() > (num_labels + 1) ** 2
    structures = torch.arange(1, num_labels + 1)
    one, two = ((x.flatten(1)[:, None] == structures[:, None]) for x in (labels, reference))
    expected = 2 * (one & two).sum(2).double() / (one.sum(2) + two.sum(2))
    assert_close(dice(labels, reference, num_labels), expected, **EXACT)


def test_dice_is_that_of_monai():
    labels, reference = blobs((9, 14, 11), 4, seed=1), blobs((9, 14, 11), 4, seed=2)
    monai = DiceMetric(include_background=False, num_classes=5)(labels, reference)
    assert_close(dice(labels, reference, 4).float(), monai, rtol=1e-6, atol=0)  # MONAI's is float32


# Folding and log-Jacobian


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_folding_counts_rows_whose_slope_is_minus_one_or_less(size, scheme):
    rows = torch.arange(size[0])
    ddf = torch.cat([ramp(size, -2.0 * (rows - m).clamp(min=0)) for m in (4, 5)])  # central: slope -1 in row m itself
    expected = torch.tensor([100 * (size[0] - m) / size[0] for m in (4, 5)], dtype=torch.float64)
    assert_close(folding(ddf, scheme=scheme), expected, **EXACT)
    inside = torch.tensor([100 * 3 / 4, 100 * 3 / 6], dtype=torch.float64)  # rows 4-6 of 3-6, rows 5-7 of 2-7
    assert_close(folding(ddf, half_mask(size), scheme=scheme), inside, **EXACT)
    assert_close(folding(ddf.float(), half_mask(size) > 0, scheme=scheme), inside, **EXACT)


def test_folding_by_forward_differences_sees_a_checkerboard():
    board = ramp((12, 7), 0.75 * (-1.0) ** torch.arange(12))  # every other slope is -1.5
    inner = torch.zeros(1, 1, 12, 7)
    inner[:, :, 1:-1] = 1  # at the border central differences are one-sided, and see it too
    assert folding(board, inner).item() == 0
    assert folding(board, inner, scheme="forward").item() == pytest.approx(50)


def test_nan_counts_as_folded():
    ddf = torch.zeros(1, 2, 8, 9)
    ddf[0, :, 4, 5] = torch.nan
    assert folding(ddf).item() == pytest.approx(100 * 5 / 72)  # the voxel and its four neighbours


def reference_log_jacobian_sd(ddf, mask, definition):
    """By the definition, with NumPy's derivatives and determinant."""
    spatial_dims = len(ddf)
    slopes = np.stack([np.stack(np.gradient(component)) for component in ddf])  # [i, j]: of phi_i along axis j
    determinant = np.linalg.det(np.moveaxis(slopes, (0, 1), (-2, -1)) + np.eye(spatial_dims))
    if definition == "learn2reg":
        core = (slice(2, -2),) * spatial_dims
        return np.log(np.clip(determinant[core] + 3, 1e-9, 1e9))[mask[core]].std()
    return np.log(determinant[mask & (determinant > 0)]).std()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("definition", ["plain", "learn2reg"])
@pytest.mark.parametrize("amplitude", [0.3, 6.0])  # the second folds, below -3 too
def test_log_jacobian_sd_is_that_of_numpy(size, definition, amplitude):
    ddf = field(size, 3, amplitude)
    assert (amplitude == 6) == bool(folding(ddf).max() > 5)
    for mask in (None, half_mask(size)):
        flags = np.ones((2, *size), bool) if mask is None else mask[:, 0].bool().numpy()
        expected = [reference_log_jacobian_sd(u.numpy(), m, definition) for u, m in zip(ddf, flags, strict=True)]
        got = log_jacobian_sd(ddf, mask, definition=definition)
        assert_close(got, torch.tensor(expected), rtol=1e-10, atol=0)  # logarithms of small determinants
        rounded = log_jacobian_sd(ddf.float(), mask, definition=definition)
        assert_close(rounded, got, rtol=1e-3, atol=0)  # the same for float32


@pytest.mark.parametrize("size", SIZES)
def test_log_jacobian_sd_of_a_parabola(size):
    x = torch.arange(size[0]).double()
    c = 0.02
    ddf = ramp(size, c * x**2)  # central differences are exact: |J| = 1 + 2 c x inside
    inner = torch.zeros(1, 1, *size, dtype=torch.bool)
    inner[:, :, 1:-1] = True
    assert_close(log_jacobian_sd(ddf, inner), torch.log(1 + 2 * c * x[1:-1]).std(correction=0).view(1), **EXACT)
    challenge = torch.log(4 + 2 * c * x[2:-2]).std(correction=0).view(1)
    assert_close(log_jacobian_sd(ddf, definition="learn2reg"), challenge, **EXACT)


def test_log_jacobian_sd_where_all_folds_is_nan():
    assert log_jacobian_sd(ramp((7, 9), -2.0 * torch.arange(7))).isnan().all()


# Hausdorff distance


def contour_2d(mask, spacing):
    """Contour elements by the rule of marching squares, cell by cell: positions in mm and lengths."""
    padded = np.pad(mask, 1)
    points, lengths = [], []
    diagonal = math.hypot(*spacing)
    for i, j in product(*(range(n - 1) for n in padded.shape)):
        cell = padded[i : i + 2, j : j + 2]
        if 0 < cell.sum() < 4:
            if cell.sum() != 2:
                length = diagonal / 2  # cuts one corner off
            elif cell[0, 0] == cell[1, 1]:
                length = diagonal  # cuts two corners off
            else:
                length = spacing[1] if cell[0, 0] == cell[0, 1] else spacing[0]
            points.append((i * spacing[0], j * spacing[1]))
            lengths.append(length)
    return np.array(points), np.array(lengths)


def weighted_percentile(distances, areas):
    """Smallest distance within which 95 % of the area lies, by trying all of them."""
    for d in np.unique(distances):
        if areas[distances <= d].sum() >= 0.95 * areas.sum() * (1 - 1e-12):  # a tie is not decided by rounding
            return d
    raise AssertionError


def brute_force(points, others, area, other_area):
    table = cdist(points, others)
    return max(weighted_percentile(table.min(1), area), weighted_percentile(table.min(0), other_area))


@pytest.mark.parametrize("spacing", [(1.0, 1.0), SPACINGS[2], (5.0, 0.5)])
def test_hausdorff95_by_brute_force_in_2d(spacing):
    labels, reference = blobs((17, 23), 3, seed=4), blobs((17, 23), 3, seed=5)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for b, k in product(range(2), range(3)):
        (x, area_x), (y, area_y) = (contour_2d(m[b, 0].numpy() == k + 1, spacing) for m in (labels, reference))
        expected[b, k] = brute_force(x, y, area_x, area_y)
    assert_close(hausdorff95(labels, reference, 3, spacing=spacing), expected, **EXACT)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACINGS[3], (0.5, 0.5, 5.0)])
def test_hausdorff95_by_brute_force_in_3d(spacing):
    labels, reference = blobs((9, 14, 11), 3, seed=6), blobs((9, 14, 11), 3, seed=7)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for b, k in product(range(2), range(3)):
        pair = [image[b, 0] == k + 1 for image in (labels, reference)]  # MONAI has the surface, but no percentile of it
        edges = get_mask_edges(*pair, crop=False, spacing=spacing)
        points = [np.argwhere(e.numpy()) * spacing for e in edges[:2]]
        areas = [a.numpy()[e.numpy()].astype(float) for e, a in zip(edges[:2], edges[2:], strict=True)]
        expected[b, k] = brute_force(*points, *areas)
    assert_close(hausdorff95(labels, reference, 3, spacing=spacing), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:Please .* from the `scipy.ndimage` namespace:DeprecationWarning")  # the package's
@pytest.mark.parametrize("size", SIZES)
def test_hausdorff95_is_that_of_the_surface_distance_package(size):
    for seed in range(5):
        check_by_surface_distance(
            blobs(size, 3, 8 + seed, batch=1), blobs(size, 3, 20 + seed, batch=1), 3, SPACINGS[len(size)]
        )


def check_by_surface_distance(labels, reference, num_labels, spacing):
    found = hausdorff95(labels, reference, num_labels, spacing=spacing)
    for k in range(num_labels):
        pair = [image[0, 0].numpy() == k + 1 for image in (labels, reference)]
        expected = compute_robust_hausdorff(compute_surface_distances(*pair, spacing), 95)
        assert found[0, k].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Please .* from the `scipy.ndimage` namespace:DeprecationWarning")  # the package's
def test_overlap_and_surfaces_of_real_labels(malf):
    numbers = [59, 60, 36, 37, 47, 48, 51, 52]  # thalamus to lateral ventricle of both sides, as raters drew them
    maps = []
    for name in ("1005", "1018"):
        whole = np.asarray(nib.load(malf / f"{name}_labels.nii.gz").dataobj)[50:110, 70:140, 40:120]
        maps.append(sum((k + 1) * (whole == n) for k, n in enumerate(numbers)))
    assert all(set(np.unique(m)) >= set(range(1, 9)) for m in maps)
    labels, reference = (torch.from_numpy(m)[None, None] for m in maps)
    check_by_surface_distance(labels, reference, 8, (1.0, 1.2, 0.9))
    expected = [2 * ((maps[0] == k) & (maps[1] == k)).sum() / ((maps[0] == k).sum() + (maps[1] == k).sum())
                for k in range(1, 9)]  # fmt: skip
    assert_close(dice(labels, reference, 8)[0], torch.tensor(expected), **EXACT)


def box(size, start, stop):
    image = torch.zeros(1, 1, *size, dtype=torch.uint8)
    image[(0, 0, *(slice(a, b) for a, b in zip(start, stop, strict=True)))] = 1
    return image


@pytest.mark.parametrize("size", [(20, 25), (20, 25, 22)])
def test_hausdorff95_of_a_shifted_box_is_the_shift_in_mm(size):
    d = len(size)
    spacing = SPACINGS[d]
    fixed = box(size, [4] * d, [12] * d)
    for axis, k in product(range(d), (0, 1, 3)):
        moved = fixed.roll(k, dims=axis + 2)  # a whole side of the box, a quarter or sixth of it, is k voxels away
        expected = torch.tensor([[k * spacing[axis]]], dtype=torch.float64)
        assert_close(hausdorff95(moved, fixed, 1, spacing=spacing), expected, **EXACT)
        assert_close(hausdorff95(moved, fixed, 1, spacing=2.0), torch.tensor([[2.0 * k]]).double(), **EXACT)


@pytest.mark.parametrize("size", [(24, 25), (24, 25, 26)])
def test_hausdorff95_sees_a_cavity(size):
    d = len(size)
    solid = box(size, [2] * d, [22] * d)
    hollow = solid - box(size, [9] * d, [15] * d)  # its walls, 23 or 8 % of the surface, are all 7 voxels from outside
    for pair in ((solid, hollow), (hollow, solid)):
        assert hausdorff95(*pair, 1, spacing=1.5).item() == pytest.approx(7 * 1.5, rel=1e-12)


def test_hausdorff95_weighs_by_area_and_takes_the_worse_direction():
    # A spine 4 voxels high and 1 wide on a square of 30: 8 of 128 contour elements (6 %) are 1 voxel or more away. By
    # length they are 7.4 of 125.7 mm (6 %) where voxels are square, 15 of 600 mm (2.5 %) where they are 9 mm wide.
    square, spine = box((50, 40), (5, 5), (35, 35)), box((50, 40), (35, 20), (39, 21))
    for pair in ((square | spine, square), (square, square | spine)):  # all of the square's own contour is near
        assert hausdorff95(*pair, 1).item() == 1
        assert hausdorff95(*pair, 1, spacing=(1.0, 9.0)).item() == 0


def test_hausdorff95_of_concentric_balls_is_the_difference_of_their_radii():
    spacing = (1.0, 0.8, 1.25)
    grid = identity_grid(torch.zeros(1, 1, 40, 50, 32))[0] * torch.tensor(spacing).view(3, 1, 1, 1)
    radius = (grid - torch.tensor([20.0, 20.0, 20.0]).view(3, 1, 1, 1)).norm(dim=0)
    small, large = ((radius <= r).long()[None, None] for r in (9, 14))
    found = hausdorff95(small, large, 1, spacing=spacing).item()
    assert found == pytest.approx(5, abs=1)  # within a voxel


def test_hausdorff95_of_structures_at_the_border_needs_no_padding():
    labels, reference = blobs((9, 14, 11), 3, seed=6), blobs((9, 14, 11), 3, seed=7)
    core = (slice(None), slice(None), *[slice(2, -2)] * 3)
    cut = [image[core] for image in (labels, reference)]
    padded = [torch.nn.functional.pad(image, [3, 1, 2, 4, 1, 2]) for image in cut]
    assert_close(hausdorff95(*cut, 3), hausdorff95(*padded, 3), **EXACT)


def test_hausdorff95_of_a_missing_structure_is_nan():
    both = box((8, 9), (2, 2), (5, 5))
    found = hausdorff95(torch.cat([both, both * 2]), torch.cat([both, both]), 3)
    assert_close(found, torch.tensor([[0.0, math.nan, math.nan], [math.nan] * 3]).double(), **EXACT, equal_nan=True)


# Landmarks and inverses


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_registration_error_by_map_coordinates(size, dtype):
    d = len(size)
    generator = torch.Generator().manual_seed(0)
    ddf = field(size, 5, 2.0).to(dtype)
    scale = torch.tensor(size).double()
    fixed = (torch.rand(2, 30, d, generator=generator).double() * 1.4 - 0.2) * (scale - 1)  # some outside the grid
    fixed[:, 0], fixed[:, 1] = 0, scale - 1  # both corners
    moving = fixed + torch.randn(2, 30, d, generator=generator).double()
    expected = torch.zeros(2, 30, dtype=torch.float64)
    for b in range(2):
        u = np.stack([map_coordinates(c, fixed[b].T.numpy(), order=1, mode="nearest") for c in ddf[b].double().numpy()])
        error = (fixed[b].numpy() + u.T - moving[b].numpy()) * SPACINGS[d]
        expected[b] = torch.tensor(np.sqrt((error**2).sum(1)))
    assert_close(target_registration_error(moving, fixed, ddf, SPACINGS[d]), expected, **EXACT)


@pytest.mark.parametrize("size", SIZES)
def test_inverse_consistency_of_linear_maps_is_that_of_their_matrices(size):
    d = len(size)
    generator = torch.Generator().manual_seed(1)
    spread = torch.eye(d).double()
    a = 0.1 * torch.randn(d, d, generator=generator).double() - 0.3 * spread
    b = 0.1 * torch.randn(d, d, generator=generator).double() - 0.3 * spread  # moves inwards: no value from outside
    left_over = linear_field(a + b + b @ a, size) * torch.tensor(SPACINGS[d], dtype=torch.float64).view(1, -1, *[1] * d)
    length = left_over.norm(dim=1)
    found = inverse_consistency(linear_field(a, size), linear_field(b, size), spacing=SPACINGS[d])
    assert_close(found, length.mean().view(1), **EXACT)
    mask = half_mask(size)
    pair = [linear_field(m, size).expand(2, *[-1] * (d + 1)) for m in (a, b)]
    expected = torch.stack([length[0][mask[i, 0] > 0].mean() for i in range(2)])
    assert_close(inverse_consistency(*pair, spacing=SPACINGS[d], mask=mask), expected, **EXACT)


@pytest.mark.parametrize("size", SIZES)
def test_inverse_consistency_of_a_flow_and_its_reverse_vanishes(size):
    dvf = field(size, 6, 0.4, sigma=3)
    there, back = integrate(dvf), integrate(-dvf)
    before, after = inverse_consistency(there, torch.zeros_like(dvf)), inverse_consistency(there, back)
    assert (after < 0.05 * before).all()  # what is left is linear interpolation between few voxels


# Metric objects


def example(size=(9, 14, 11)):
    """Each metric with a batch of two pairs for it, and the values its function gives."""
    spacing = SPACINGS[len(size)]
    labels, reference = blobs(size, 3, seed=1), blobs(size, 3, seed=2)
    labels[0][labels[0] == 2] = 0
    reference[0][reference[0] == 2] = 0
    ddf, inverse = field(size, 3, 2.0), field(size, 4, 0.5)
    mask = half_mask(size)
    points = torch.rand(2, 2, 6, len(size), generator=torch.Generator().manual_seed(0)) * 8
    errors = target_registration_error(points[:, 0], points[:, 1], ddf, spacing)
    return [
        (LabelDice(3), labels, reference, dice(labels, reference, 3)),
        (Hausdorff95(3, spacing), labels, reference, hausdorff95(labels, reference, 3, spacing=spacing)),
        (Folding("forward"), ddf, None, folding(ddf, scheme="forward")),
        (Folding(), ddf, mask, folding(ddf, mask)),
        (NonDiffeomorphicVolume(), ddf, mask, non_diffeomorphic_volume(ddf, mask)),
        (LogJacobianSD("learn2reg"), ddf, None, log_jacobian_sd(ddf, definition="learn2reg")),
        (LogJacobianSD(), ddf, mask, log_jacobian_sd(ddf, mask)),
        (TargetRegistrationError(spacing), ddf, points, errors.mean(1)),
        (InverseConsistency(spacing), ddf, inverse, inverse_consistency(ddf, inverse, spacing=spacing)),
    ]


@pytest.mark.parametrize("index", range(8))
def test_metric_takes_batches_and_lists_and_averages_pairs(index):
    metric, y_pred, y, expected = example()[index]
    mean = expected.reshape(2, -1).nanmean(1).mean()
    assert_close(metric(y_pred, y), expected, equal_nan=True)
    assert_close(metric.aggregate(), mean)
    metric.reset()
    ways = [(list, (MetaTensor, torch.as_tensor)), (tuple, (torch.as_tensor, MetaTensor))]
    for i, (collect, kinds) in enumerate(ways):
        pair = [None if x is None else collect([kind(x[i])]) for kind, x in zip(kinds, (y_pred, y), strict=True)]
        assert type(metric(*pair)) is torch.Tensor
    assert_close(metric.get_buffer(), expected, equal_nan=True)
    assert_close(metric.aggregate(), mean)


def test_mean_is_over_structures_then_pairs_and_skips_what_has_no_value():
    metric = LabelDice(3)
    metric(torch.tensor([[[[1, 1, 2, 0]]]]), torch.tensor([[[[1, 1, 0, 0]]]]))  # 1, 0, absent: mean 1/2
    metric(torch.tensor([[[[3, 0, 0, 0]]]]), torch.tensor([[[[3, 0, 0, 0]]]]))  # 1
    metric(torch.zeros(1, 1, 2, 2, dtype=torch.long), torch.zeros(1, 1, 2, 2, dtype=torch.long))  # nothing
    assert metric.aggregate().item() == 0.75
    metric.reset()
    metric(torch.zeros(1, 1, 2, 2, dtype=torch.long), torch.zeros(1, 1, 2, 2, dtype=torch.long))
    assert metric.aggregate().isnan()


def test_pairs_may_have_different_numbers_of_landmarks():
    metric = TargetRegistrationError(2.0)
    points = [torch.zeros(2, n, 2) for n in (3, 5)]
    metric([torch.ones(2, 4, 5), torch.zeros(2, 4, 5)], points)
    assert metric.aggregate().item() == pytest.approx(math.sqrt(2))


class Predictor(torch.nn.Module):
    """Takes the field as it is, and a label map of one structure from it."""

    def forward(self, ddf):
        return {"ddf": ddf, "label": (ddf[:, :1] > 0).long()}


def test_metrics_work_in_an_evaluator_and_its_reports(tmp_path):
    size = (9, 8, 7)
    ddf, reference = field(size, 3, 2.0, batch=3).float(), blobs(size, 1, seed=2, batch=3)
    labels = Predictor()(ddf)["label"]

    def handler(metric, transform):
        return IgniteMetricHandler(
            metric, output_transform=lambda items: tuple(zip(*map(transform, items), strict=True))
        )

    def two_labels(item):
        return item["pred"]["label"], item["label"]

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(
            [{"image": MetaTensor(u), "label": MetaTensor(y)} for u, y in zip(ddf, reference, strict=True)],
            batch_size=2,
        ),
        network=Predictor(),
        key_val_metric={"dice": handler(LabelDice(1), two_labels)},
        additional_metrics={
            "hd95": handler(Hausdorff95(1), two_labels),
            "folding": IgniteMetricHandler(
                Folding(), output_transform=lambda items: ([x["pred"]["ddf"] for x in items], None)
            ),
        },
        val_handlers=[
            MetricsSaver(
                str(tmp_path),
                metric_details="*",
                summary_ops="*",
                batch_transform=lambda batch: [x["label"].meta for x in batch],
            )
        ],
    )
    evaluator.run()
    expected = {"dice": dice(labels, reference, 1), "hd95": hausdorff95(labels, reference, 1), "folding": folding(ddf)}
    for name, values in expected.items():
        assert evaluator.state.metrics[name] == pytest.approx(values.mean().item())
        with (tmp_path / f"{name}_raw.csv").open() as file:
            rows = list(csv.reader(file))[1:]
        written = torch.tensor([float(row[1]) for row in rows]).double()
        assert_close(written, values.flatten(), rtol=0, atol=5.1e-5)  # written with 4 digits


def gather(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    labels, reference = blobs((17, 23), 3, seed=1, batch=3), blobs((17, 23), 3, seed=2, batch=3)
    ddf = field((17, 23), 3, 2.0, batch=3)
    mine = slice(0, 2) if rank == 0 else slice(2, 3)  # one process has more pairs than the other
    overlap, folds = LabelDice(3), Folding()
    overlap(labels[mine], reference[mine])
    folds(ddf[mine])
    assert_close(overlap.get_buffer(), dice(labels, reference, 3))
    assert_close(overlap.aggregate(), dice(labels, reference, 3).mean())
    assert_close(folds.get_buffer(), folding(ddf))
    torch.distributed.destroy_process_group()


def test_metrics_gather_over_processes(tmp_path):
    torch.multiprocessing.spawn(gather, args=(tmp_path / "store",), nprocs=2)


# Errors

LABELS = torch.ones(2, 1, 6, 7, dtype=torch.long)
DDF = torch.zeros(2, 2, 6, 7)
POINTS = torch.zeros(2, 4, 2)


@pytest.mark.parametrize("measure", [dice, hausdorff95])
@pytest.mark.parametrize(
    ("labels", "reference", "num_labels", "error", "match"),
    [
        (LABELS, LABELS[:1], 2, ValueError, r"^labels and reference .*\[2, 1, 6, 7\] and \[1, 1, 6, 7\]"),
        (LABELS[0], LABELS[0], 2, ValueError, r"^labels and reference .* \[1, 6, 7\] and"),
        (
            LABELS.expand(2, 3, 6, 7),
            LABELS.expand(2, 3, 6, 7),
            2,
            ValueError,
            r"^labels and reference .* \[2, 3, 6, 7\] and",
        ),
        (LABELS.float(), LABELS, 2, TypeError, r"^labels .*torch.float32"),
        (LABELS, LABELS.double(), 2, TypeError, r"^reference .*torch.float64"),
        (LABELS, 3 * LABELS, 2, ValueError, r"^reference .* 3 to 3, .*num_labels is 2\b"),
        (-LABELS, LABELS, 2, ValueError, r"^labels .* -1 to -1, .*num_labels is 2\b"),
        (LABELS, LABELS, 0, ValueError, r"^num_labels is 0\b.* 1 or more"),
    ],
)
def test_label_maps_are_checked(measure, labels, reference, num_labels, error, match):
    with pytest.raises(error, match=match):
        measure(labels, reference, num_labels)


@pytest.mark.parametrize("spacing", [(1.0, 2.0, 3.0), 0.0, (1.0, -1.0), math.nan, math.inf])
@pytest.mark.parametrize(
    "measure",
    [
        lambda spacing: hausdorff95(LABELS, LABELS, 1, spacing=spacing),
        lambda spacing: target_registration_error(POINTS, POINTS, DDF, spacing),
        lambda spacing: inverse_consistency(DDF, DDF, spacing=spacing),
    ],
)
def test_spacing_is_checked(measure, spacing):
    with pytest.raises(ValueError, match="^spacing of 2-D images is " + re.escape(str(spacing)) + ". .*1 or 2 lengths"):
        measure(spacing)


@pytest.mark.parametrize(
    "measure", [folding, log_jacobian_sd, lambda ddf, mask: inverse_consistency(ddf, ddf, mask=mask)]
)
def test_mask_is_checked(measure):
    with pytest.raises(ValueError, match=r"^mask has shape \[2, 2, 6, 7\], .* \[2, 1, 6, 7\]"):
        measure(DDF, torch.ones(2, 2, 6, 7))
    empty = torch.ones(2, 1, 6, 7)
    empty[1] = 0
    with pytest.raises(ValueError, match=r"\[42, 0\] voxels in the mask\b.* 0 outermost"):
        measure(DDF, empty)


def test_mask_must_reach_inside_the_border_that_learn2reg_leaves_out():
    edge = torch.zeros(2, 1, 6, 7)
    edge[:, :, :2] = 1
    with pytest.raises(ValueError, match=r"\[0, 0\] voxels .* 2 outermost"):
        log_jacobian_sd(DDF, edge, definition="learn2reg")
    with pytest.raises(ValueError, match=r"\[0, 0\] voxels .* 2 outermost"):
        log_jacobian_sd(DDF[..., :4], definition="learn2reg")


def test_fields_and_options_are_checked():
    with pytest.raises(ValueError, match=r"^definition is 'L2R'.*'plain' or 'learn2reg'"):
        log_jacobian_sd(DDF, definition="L2R")
    with pytest.raises(ValueError, match=r"^scheme is 'backward'"):
        folding(DDF, scheme="backward")
    for measure in (folding, log_jacobian_sd, non_diffeomorphic_volume):
        with pytest.raises(ValueError, match=r"^ddf has shape \[2, 1, 6, 7\]"):
            measure(DDF[:, :1])
    with pytest.raises(ValueError, match=r"^ddf has shape \[2, 3, 6, 7\]"):
        target_registration_error(POINTS, POINTS, torch.zeros(2, 3, 6, 7), 1.0)
    with pytest.raises(ValueError, match=r"^inverse_ddf has shape \[2, 2, 7, 6\], .*\[2, 2, 6, 7\]"):
        inverse_consistency(DDF, DDF.transpose(2, 3))
    with pytest.raises(ValueError, match=r"^ddf has shape \[2, 3, 6, 7\]"):
        inverse_consistency(torch.zeros(2, 3, 6, 7), torch.zeros(2, 3, 6, 7))


def test_points_are_checked():
    for pair in ((POINTS, POINTS[:1]), (POINTS[:, :3], POINTS), (POINTS[0], POINTS[0]), (POINTS[..., :1],) * 2):
        with pytest.raises(ValueError, match=r"^moving_points and fixed_points .*\(2, N, 2\)"):
            target_registration_error(*pair, DDF, 1.0)
    for pair, name in (((POINTS, POINTS * math.nan), "fixed_points"), ((POINTS + math.inf, POINTS), "moving_points")):
        with pytest.raises(ValueError, match=f"^{name} holds NaN or infinity"):
            target_registration_error(*pair, DDF, 1.0)
    with pytest.raises(ValueError, match=r"^points has shape \[2, 4, 2\]"):
        TargetRegistrationError(1.0)(DDF, POINTS)


def test_metric_objects_are_checked():
    with pytest.raises(TypeError, match=r"^y of LabelDice is a NoneType"):
        LabelDice(1)(LABELS)
    with pytest.raises(TypeError, match=r"^y of Folding is a ndarray"):
        Folding()(DDF, np.ones((2, 1, 6, 7)))
    with pytest.raises(ValueError, match=r"^y of LabelDice has 1 items, .* 2\b"):
        LabelDice(1)(list(LABELS), list(LABELS[:1]))
    with pytest.raises(ValueError, match=r"^Folding has no values"):
        Folding().aggregate()
