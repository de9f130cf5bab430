"""Anatomy in any scan: where the network looks, where its labels end up. Mostly with thresholds for a network."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from voxelmorph_monai import anatomy
from voxelmorph_monai.affines import ImageGrid
from voxelmorph_monai.anatomy import (
    STRUCTURES,
    AnatomyNet,
    BlockUNet,
    Segmentation,
    clean,
    colour_table,
    mirror_pairs,
    restore,
    seen_anatomy,
    segment,
    to_freesurfer,
)
from voxelmorph_monai.space.scan import Scan

pytestmark = pytest.mark.usefixtures("one_thread")

SKIN, BRAIN, MARKER = 40.0, 120.0, 220.0
SEMI_AXES = np.array([65.0, 82.0, 65.0])  # of the brain, mm
BRAIN_MM3 = 4 / 3 * np.pi * SEMI_AXES.prod()
BALL = np.array([-30.0, 20.0, 20.0]), 9.0  # centre of the marker, on the left, and its radius
LEFT_HIPPOCAMPUS = 1 + [s.number for s in STRUCTURES].index(17)


class Thresholds(nn.Module):
    """In place of a U-Net: bright voxels are of the last class, brighter ones of that of the marker."""

    def __init__(self, num_classes: int, marker: int) -> None:
        super().__init__()
        self.num_classes, self.marker = num_classes, marker

    def forward(self, image: Tensor) -> Tensor:
        scores = torch.full((1, self.num_classes, *image.shape[2:]), -50.0)
        brain, marker = 20 * (image - 0.65), 20 * (image - 1.4)  # of the brain's brightness
        scores[:, 0] = 0
        scores[:, self.marker] = torch.minimum(brain, marker)[:, 0]
        scores[:, -1] = torch.minimum(brain, -marker)[:, 0]
        return scores


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> AnatomyNet:
    monkeypatch.setattr(anatomy, "_LEAST_LIKE", 0.0)  # thresholds find two structures only
    network = AnatomyNet()
    network.coarse, network.fine = Thresholds(9, 1), Thresholds(31, LEFT_HIPPOCAMPUS)
    return network.eval()


def points_of(size: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """Points (RAS, mm) of all voxels: ``(*size, 3)``."""
    index = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in size], indexing="ij", copy=False), -1)
    return index @ affine[:3, :3].T.astype(np.float32) + affine[:3, 3].astype(np.float32)


def head(size: tuple[int, ...], affine: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """A head about the origin, and its labels."""
    points = points_of(size, affine)
    brain = (points / SEMI_AXES.astype(np.float32)) ** 2 @ np.ones(3, np.float32) <= 1
    skin = (points / np.float32([75, 95, 85])) ** 2 @ np.ones(3, np.float32) <= 1
    ball = ((points - np.float32(BALL[0])) ** 2).sum(-1) <= BALL[1] ** 2
    image = np.where(ball, MARKER, np.where(brain, BRAIN, np.where(skin, SKIN, 0))).astype(np.float32)
    image += np.random.default_rng(0).normal(0, 3, size).astype(np.float32)
    return image, np.where(ball, 17, np.where(brain, 24, 0)).astype(np.int16)


def placed(size: tuple[int, ...], spacing: tuple[float, ...], angles: tuple[float, ...], axes: str) -> ImageGrid:
    """A grid about the origin, turned by ``angles`` (degrees) and with the array axes in the order ``axes``."""
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    ornt = nib.orientations.axcodes2ornt(axes)
    matrix = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(ornt):
        matrix[int(world), axis] = sign * spacing[axis]
    affine[:3, :3] = turn @ matrix
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return ImageGrid(size, affine)


GRIDS = {
    "1 mm": placed((160, 200, 180), (1.0, 1.0, 1.0), (0, 0, 0), "RAS"),
    "oblique, slices of 5 mm": placed((192, 240, 36), (0.9, 0.9, 5.0), (12, -7, 20), "LPS"),
    "oblique, sagittal slices of 3 mm": placed((56, 110, 100), (3.0, 2.0, 2.0), (-12, 7, 30), "AIL"),
    "coarse": placed((40, 52, 46), (4.5, 4.0, 4.2), (5, 0, 170), "SAR"),
}


def dice(found: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def centre(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    return nib.affines.apply_affine(affine, np.argwhere(mask).mean(0))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_labels_lie_where_the_head_lies_on_any_grid(stub: AnatomyNet, grid: ImageGrid) -> None:
    image, labels = head(*grid)
    found = segment(Scan(image, grid.affine), stub)
    assert found.labels.array.shape == image.shape
    assert set(np.unique(found.labels.array)) == {0, 17, 24}
    assert dice(found.mask.array > 0, labels > 0) > 0.97
    np.testing.assert_allclose(centre(found.mask.array > 0, grid.affine), 0, atol=0.5)
    np.testing.assert_allclose(
        centre(found.labels.array == 17, grid.affine), BALL[0], atol=0.7
    )  # few voxels, 5 mm apart
    assert sum(found.volumes.values()) == pytest.approx(BRAIN_MM3, rel=0.03)
    assert found.volumes["Left-Hippocampus"] == pytest.approx(4 / 3 * np.pi * BALL[1] ** 3, rel=0.2)  # 3054 mm3
    voxel = abs(np.linalg.det(grid.affine[:3, :3]))
    assert sum(found.volumes.values()) == pytest.approx(found.mask.array.sum() * voxel, rel=0.03)


@pytest.mark.parametrize(
    ("size", "middle"), [((300, 300, 300), (210, 85, 215)), ((400, 180, 400), (260, 90, 200))], ids=str
)
def test_a_head_anywhere_in_a_large_view_is_found(
    stub: AnatomyNet, size: tuple[int, ...], middle: tuple[int, ...]
) -> None:
    affine = np.eye(4)
    affine[:3, 3] = -np.array(middle)
    image, labels = head(size, affine)
    found = segment(Scan(image, affine), stub)
    assert dice(found.mask.array > 0, labels > 0) > 0.97
    np.testing.assert_allclose(centre(found.mask.array > 0, affine), centre(labels > 0, affine), atol=0.5)
    brain = found.posteriors[1:].sum(0) > 0.5
    for axis in range(3):  # nothing touches the end of the fine look
        others = tuple(d for d in range(3) if d != axis)
        assert not brain.amax(others)[[0, -1]].any()


def test_what_is_seen_of_a_view_has_the_volume_of_the_scan() -> None:
    grid = placed((6, 5, 7), (4.0, 3.0, 4.0), (0, 0, 0), "PSR")
    view = placed((40, 40, 40), (1.0, 1.0, 1.0), (0, 0, 0), "LIA")
    grid.affine[:3, 3] += (2.0, -3.0, 0.5)  # its ends lie between voxels of the view
    seen = seen_anatomy(torch.ones(2, *view.size), view, grid).seen
    assert int(seen.sum()) == (6 * 4) * (5 * 3) * (7 * 4)  # mm3
    middle = centre(seen.numpy(), np.asarray(view.affine))
    np.testing.assert_allclose(middle, (2.0, -3.0, 0.5), atol=1e-12)  # halves are exact


def test_holes_of_a_brain_are_filled_but_nothing_around_it() -> None:
    index = np.indices((30, 28, 26)) - np.reshape((14, 14, 13), (3, 1, 1, 1))
    ball, hole = (index**2).sum(0) < 10**2, (index**2).sum(0) < 3**2
    pit = (np.abs(index[0]) < 2) & (np.abs(index[1]) < 2) & (index[2] > 5)  # open at the top
    speck = np.zeros_like(ball)
    speck[1:4, 1:4, 1:4] = True
    brain = torch.from_numpy((ball & ~hole & ~pit) | speck)
    posteriors = torch.rand(5, *brain.shape, dtype=torch.float64)
    posteriors[0] = torch.where(brain, 0.0, posteriors[0] + 4.0)  # of 4 others, up to 1 each
    posteriors /= posteriors.sum(0)
    cleaned = clean(posteriors)
    filled, open_, loose = (torch.from_numpy(mask) for mask in (hole, pit, speck))
    assert not cleaned[0, filled].any()
    torch.testing.assert_close(cleaned[-1, filled], posteriors[-1, filled] + posteriors[0, filled])
    assert torch.equal(cleaned[1:-1, filled], posteriors[1:-1, filled])
    at_the_wall = open_ & torch.from_numpy(ndimage.binary_dilation(ball & ~pit))
    for kept in (at_the_wall, torch.from_numpy(ball & ~hole & ~pit)):
        assert torch.equal(cleaned[:, kept], posteriors[:, kept])
    assert (cleaned[0, loose] == 1).all()
    torch.testing.assert_close(cleaned.sum(0), torch.ones_like(cleaned[0]))
    assert torch.equal(cleaned[0] < 0.5, torch.from_numpy(ball & ~pit))


def test_a_head_cut_by_the_view_is_labelled_to_its_end(stub: AnatomyNet) -> None:
    grid = placed((160, 200, 110), (1.0, 1.0, 1.0), (0, 0, 0), "RAS")  # 110 of 130 mm
    image, labels = head(*grid)
    found = segment(Scan(image, grid.affine), stub)
    assert dice(found.mask.array > 0, labels > 0) > 0.97
    assert dice(found.mask.array[:, :, 0] > 0, labels[:, :, 0] > 0) > 0.95
    assert sum(found.volumes.values()) == pytest.approx((labels > 0).sum(), rel=0.03)


def test_a_long_axis_of_one_is_no_axis_and_a_series_is_refused(stub: AnatomyNet, tmp_path: Path) -> None:
    grid = GRIDS["coarse"]
    image, _ = head(*grid)
    expected = segment(Scan(image, grid.affine), stub).labels.array
    for name, array in (("one", image[..., None]), ("series", np.stack([image] * 3, -1))):
        nib.save(nib.Nifti1Image(array, grid.affine), tmp_path / f"{name}.nii")
    assert np.array_equal(segment(tmp_path / "one.nii", stub).labels.array, expected)
    with pytest.raises(ValueError, match=re.escape("series.nii") + ".*" + re.escape(str((*image.shape, 3)))):
        segment(tmp_path / "series.nii", stub)
    with pytest.raises(ValueError, match=r"a slice.*single slice"):
        segment(Scan(image[:, :, :1], grid.affine, "a slice"), stub)


def test_what_shows_no_head_is_refused(stub: AnatomyNet) -> None:
    size, affine = (60, 60, 60), np.diag([3.0, 3, 3, 1])
    phantom = np.zeros(size, np.float32)
    phantom[25:35, 25:35, 25:35] = 1000  # 27 ml
    full = np.ones(size, np.float32)  # 5.8 l
    for image in (phantom * 0, phantom, full):
        with pytest.raises(ValueError, match=r"chest.nii.* no head"):
            segment(Scan(image, affine, "chest.nii"), stub)


VIEW = placed((32, 32, 32), (2.0, 2.0, 2.0), (0, 20, 0), "LIA")


@pytest.mark.parametrize(
    ("grid", "radius", "within"),
    [
        (placed((96, 96, 96), (0.7, 0.7, 0.7), (0, 0, 0), "RAS"), 10.0, 0.05),
        (placed((96, 96, 96), (0.7, 0.7, 0.7), (0, 0, 0), "RAS"), 3.0, 0.15),
        (placed((64, 64, 14), (1.0, 1.0, 5.0), (0, 0, 0), "LPS"), 10.0, 0.1),
    ],
)
def test_touching_structures_stay_themselves_on_the_way_to_another_grid(
    grid: ImageGrid, radius: float, within: float
) -> None:
    points = points_of(VIEW.size, VIEW.affine)
    posteriors = torch.zeros(31, *VIEW.size)
    for number, side in ((17, -1), (53, 1)):
        away = np.linalg.norm(points - np.float32([side * radius, 0, 0]), axis=-1)
        share = torch.from_numpy(np.clip((radius - away) / 2 + 0.5, 0, 1))  # of a voxel of 2 mm
        posteriors[1 + [s.number for s in STRUCTURES].index(number)] = share
    posteriors[0] = 1 - posteriors.sum(0)
    classes, volumes = restore(posteriors, VIEW, grid)
    labels = to_freesurfer(classes)
    assert set(np.unique(labels)) == {0, 17, 53}
    voxel, expected = abs(np.linalg.det(grid.affine[:3, :3])), 4 / 3 * np.pi * radius**3
    for number, name in ((17, "Left-Hippocampus"), (53, "Right-Hippocampus")):
        assert (labels == number).sum() * voxel == pytest.approx(expected, rel=within)
        assert volumes[name] == pytest.approx(expected, rel=within)
    assert centre(labels == 17, grid.affine)[0] < 0 < centre(labels == 53, grid.affine)[0]


@pytest.mark.parametrize("size", [(32, 16, 48), (19, 34, 21)])
def test_the_network_takes_any_size_and_can_be_scripted(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network, image = AnatomyNet().eval(), torch.rand(2, 1, *size)
    with torch.no_grad():
        found = network(image)
        assert found.shape == (2, 31, *size)
        assert torch.equal(torch.jit.script(network)(image), found)
        padded = torch.zeros(2, 1, 48, 48, 48)
        padded[:, :, : size[0], : size[1], : size[2]] = image
        if size == (32, 16, 48):
            assert found.std() > 0
        else:
            multiple = padded[:, :, :32, :48, :32]
            expected = network(multiple)[:, :, : size[0], : size[1], : size[2]]
            assert torch.equal(found, expected)  # what is padded is what surrounds a head: nothing


def test_blocks_and_voxels_correspond() -> None:
    """A network whose convolutions pass their first channels on gives back the image, voxel by voxel."""
    network = BlockUNet(1, (8, 8), 8)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        for channel in range(8):
            network.head.weight[channel, channel] = 1.0

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, -8:]

    network.encoder = nn.ModuleList([First(), First()])
    network.decoder = nn.ModuleList([First()])
    image = torch.rand(1, 1, 9, 10, 11)
    assert torch.equal(network(image), image)


def test_the_colour_table_is_one_that_readers_take() -> None:
    rows = [line.split() for line in colour_table().splitlines()]
    assert all(len(row) == 6 for row in rows)
    numbers, names = [int(row[0]) for row in rows], [row[1] for row in rows]
    assert numbers == sorted(set(numbers))
    assert len(set(names)) == len(names) == 31
    assert rows[0] == ["0", "Unknown", "0", "0", "0", "0"]
    assert all(0 <= int(value) <= 255 for row in rows for value in row[2:])
    assert {row[5] for row in rows} == {"0"}


def test_each_left_structure_has_a_right_one() -> None:
    names = ["", *(structure.name for structure in STRUCTURES)]
    pairs = {(names[a], names[b]) for a, b in mirror_pairs()}
    assert len(pairs) == 13
    assert all(a.replace("Left", "") == b.replace("Right", "") != a for a, b in pairs)
    assert sum("Left" in name or "Right" in name for name in names) == 26


def test_the_mask_is_all_that_has_a_label() -> None:
    found = Segmentation(Scan(np.int16([[[0, 24], [2, 0]]]), np.eye(4)), {}, torch.zeros(0), VIEW)
    assert found.mask.array.tolist() == [[[0, 1], [1, 0]]]
