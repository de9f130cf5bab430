"""DICOM: what the slices say of their position counts, in files of many frames as in folders of many files."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import RLELossless, generate_uid
from scipy.spatial.transform import Rotation

from tests.dicoms import classic, enhanced, item, new, save, slices
from voxelmorph_monai.affines import Affine
from voxelmorph_monai.io.dicom import list_series
from voxelmorph_monai.io.formats import is_dicom, is_nifti, spatial_dims_of
from voxelmorph_monai.io.images import open_volume, read_image, read_labels

SIZE = (9, 12, 8)
N = SIZE[2]


def oblique(shear: float = 0.0) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix() @ np.diag([0.9, 1.1, 3])
    affine[:3, 3] = [-31.0, 17.5, 44.25]
    return affine @ np.array([[1, 0, 0, 0], [0, 1, shear, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def noise() -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(1, 900, SIZE).astype(np.int16)


def assert_same(found: tuple[NDArray[Any], Affine], array: NDArray[Any], affine: Affine, atol: float = 0) -> None:
    """Each voxel of ``array`` is found at its point: the two may count their slices from either end."""
    voxels, place = found
    index = np.indices(array.shape).reshape(3, -1)
    there = np.linalg.inv(place) @ affine @ np.vstack([index, np.ones(index.shape[1])])
    np.testing.assert_allclose(there, np.rint(there), atol=1e-4)  # voxels: text of 10 digits
    there = np.rint(there[:3]).astype(int)
    assert voxels.shape == array.shape
    assert (there >= 0).all()
    assert (there.max(axis=1) == np.array(SIZE) - 1).all()
    np.testing.assert_allclose(voxels[tuple(there)], array[tuple(index)], rtol=1e-6, atol=atol)  # float32


SAGITTAL = np.array([[0, 0, -3.0, 40], [0.9, 0, 0, -20], [0, -1.1, 0, 30], [0, 0, 0, 1]])  # one height for all slices
ORDERS = {
    "in order": [*range(N)],
    "from the other end": [*range(N)][::-1],
    "interleaved": [*range(0, N, 2), *range(1, N, 2)],
    "three packages": [*range(0, N, 3), *range(1, N, 3), *range(2, N, 3)],
    "at random": np.random.default_rng(3).permutation(N).tolist(),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("affine", [oblique(), oblique(0.7), SAGITTAL], ids=["oblique", "tilted gantry", "sagittal"])
@pytest.mark.parametrize("by", ["frames", "files"])
def test_slices_lie_where_they_say(tmp_path: Path, by: str, affine: Affine, order: list[int]) -> None:
    if by == "frames":
        enhanced(tmp_path / "scan" / "IM1", noise()[..., order], slices(affine, order))
        assert_same(read_image(tmp_path / "scan" / "IM1"), noise(), affine)
    else:
        classic(tmp_path / "scan", noise()[..., order], slices(affine, order))
    assert_same(read_image(tmp_path / "scan"), noise(), affine)


def test_frames_that_simpleitk_can_order_are_read_as_it_does(tmp_path: Path) -> None:
    enhanced(tmp_path / "IM1.dcm", noise(), slices(oblique(), range(N)))
    theirs, (array, affine) = sitk.ReadImage(str(tmp_path / "IM1.dcm")), read_image(tmp_path / "IM1.dcm")
    for index in [(0, 0, 0), (8, 11, 7), (3, 2, 5)]:
        point = (affine @ [*index, 1])[:3] * [-1, -1, 1]
        assert theirs.GetPixel(theirs.TransformPhysicalPointToIndex(point.tolist())) == array[index]


def test_a_file_of_frames_is_a_scan_of_three_dimensions(tmp_path: Path) -> None:
    enhanced(tmp_path / "IM1", noise(), slices(oblique(), range(N)))
    assert is_dicom(tmp_path / "IM1")
    assert not is_nifti(tmp_path / "IM1")
    assert spatial_dims_of(tmp_path / "IM1") == spatial_dims_of(tmp_path) == 3
    labels, _ = read_labels(tmp_path / "IM1")
    assert labels.dtype == np.int16


@pytest.mark.parametrize("by", ["frames", "files"])
def test_each_slice_has_its_own_scaling(tmp_path: Path, by: str) -> None:
    """Philips' scanners scale each slice anew, which ITK leaves out for classic MR and takes from frame 1 else."""
    order, rng = ORDERS["interleaved"], np.random.default_rng(1)
    slopes, intercepts = rng.uniform(0.5, 4, N).round(6), rng.uniform(-20, 20, N).round(6)
    truth = noise() * slopes + intercepts
    if by == "frames":
        scaling = [(slopes[k], intercepts[k]) for k in order]
        enhanced(tmp_path / "IM1", noise()[..., order], slices(oblique(), order), scaling=scaling)
    else:
        each = {
            "RescaleSlope": [str(slopes[k]) for k in order],
            "RescaleIntercept": [str(intercepts[k]) for k in order],
        }
        classic(tmp_path, noise()[..., order], slices(oblique(), order), **each)
    assert_same(read_image(tmp_path), truth, oblique(), atol=1e-3)  # float32 of 3600


def test_a_compressed_file_is_read(tmp_path: Path) -> None:
    order = ORDERS["at random"]
    dataset = enhanced(tmp_path / "plain" / "IM1", noise()[..., order], slices(oblique(), order))
    dataset.compress(RLELossless)
    save(dataset, tmp_path / "IM1")
    assert_same(read_image(tmp_path / "IM1"), noise(), oblique())


def two(values: Sequence[Any], sequence: str, element: str) -> list[dict[str, DicomSequence]]:
    """The first half of 2 N frames has one value of an element, the second another."""
    return [{sequence: item(**{element: value})} for value in np.repeat(np.array(values, object), N)]


TWICE = {
    "two echoes": (two([0.01, 0.02], "MREchoSequence", "EffectiveEchoTime"), "echo time"),
    "two stacks": (two(["1", "2"], "FrameContentSequence", "StackID"), "stack"),
    "two times": (two([1, 2], "FrameContentSequence", "TemporalPositionIndex"), "point in time"),
    "two b-values": (two([0.0, 1000.0], "MRDiffusionSequence", "DiffusionBValue"), "b-value"),
}


@pytest.mark.parametrize(("frames", "difference"), TWICE.values(), ids=TWICE.keys())
def test_two_volumes_in_one_file_are_refused(tmp_path: Path, frames: Any, difference: str) -> None:
    twice = np.concatenate([noise(), noise()], axis=2)
    enhanced(tmp_path / "IM1", twice, slices(oblique(), [*range(N)] * 2), frames=frames)
    with pytest.raises(ValueError, match=rf"IM1 .* 16 frames .* 8 positions.* differ in {difference}\."):
        open_volume(tmp_path)


def test_two_echoes_in_one_series_are_refused(tmp_path: Path) -> None:
    twice, echoes = np.concatenate([noise(), noise()], axis=2), ["10"] * N + ["20"] * N
    classic(tmp_path, twice, slices(oblique(), [*range(N)] * 2), EchoTime=echoes)
    with pytest.raises(ValueError, match=r"16 slices .* 8 positions.* differ in echo time\."):
        open_volume(tmp_path)


@pytest.mark.parametrize("by", ["frames", "files"])
@pytest.mark.parametrize("missing", [[3], [4, 5]])
def test_missing_slices_are_refused(tmp_path: Path, by: str, missing: list[int]) -> None:
    there = [k for k in range(N) if k not in missing]
    write = classic if by == "files" else lambda folder, *rest: enhanced(folder / "IM1", *rest)
    write(tmp_path, noise()[..., there], slices(oblique(), there))
    with pytest.raises(ValueError, match=rf"{len(there)} (slices|frames) .*not evenly spaced"):
        open_volume(tmp_path)


def turned(degrees: float) -> Affine:
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
    return turn @ oblique()


@pytest.mark.parametrize("by", ["frames", "files"])
@pytest.mark.parametrize(
    "odd",
    [turned(3), turned(90), oblique() @ np.diag([1.1, 1.1, 1, 1])],
    ids=["tilted", "another plane", "larger pixels"],
)
def test_slices_that_are_not_parallel_and_alike_are_refused(tmp_path: Path, by: str, odd: Affine) -> None:
    affines = [*slices(oblique(), range(N - 1)), *slices(odd, [N - 1])]
    (classic if by == "files" else lambda folder, *rest: enhanced(folder / "IM1", *rest))(tmp_path, noise(), affines)
    with pytest.raises(ValueError, match=r"8 (slices|frames) differ in orientation or pixel size"):
        open_volume(tmp_path)


@pytest.mark.parametrize("turn", [0.02, 0.05])
def test_orientations_may_differ_by_rounding(tmp_path: Path, turn: float) -> None:
    affines = [*slices(oblique(), range(N - 1)), *slices(turned(turn), [N - 1])]
    enhanced(tmp_path / "IM1", noise(), affines)
    assert open_volume(tmp_path)[0].shape == SIZE


def test_frames_without_a_position_are_refused(tmp_path: Path) -> None:
    dataset = enhanced(tmp_path / "whole" / "IM1", noise(), slices(oblique(), range(N)))
    del dataset.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    save(dataset, tmp_path / "one" / "IM1")
    del dataset.PerFrameFunctionalGroupsSequence
    save(dataset, tmp_path / "all" / "IM1")
    for folder in ("one", "all"):
        with pytest.raises(ValueError, match="8 frames, but not the position of each frame"):
            open_volume(tmp_path / folder)


def test_part_of_a_concatenation_is_refused(tmp_path: Path) -> None:
    enhanced(
        tmp_path / "IM1", noise(), slices(oblique(), range(N)), InConcatenationNumber=1, InConcatenationTotalNumber=3
    )
    with pytest.raises(ValueError, match=r"IM1 holds part 1 of 3"):
        open_volume(tmp_path)


def test_a_mosaic_is_refused(tmp_path: Path) -> None:
    classic(tmp_path, noise()[..., :1], [oblique()], ImageType=[["ORIGINAL", "PRIMARY", "M", "MOSAIC"]])
    with pytest.raises(ValueError, match="mosaic"):
        open_volume(tmp_path, planar=True)


def test_without_pydicom_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enhanced(tmp_path / "IM1", noise(), slices(oblique(), range(N)))
    classic(tmp_path / "classic", noise(), slices(oblique(), range(N)))

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"IM1 .* pip install 'voxelmorph_monai\[dicom\]'"):
        open_volume(tmp_path / "IM1")
    assert open_volume(tmp_path / "classic")[0].shape == SIZE  # which needs nothing more


# Several series in one folder -------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A localizer of three planes (2), a head (7), the same as one enhanced file (12), and a report."""
    planes = [oblique(), turned(90), turned(30)]
    classic(tmp_path, noise()[..., :3], planes, number=2, SeriesDescription=["localizer"] * 3)
    classic(tmp_path, noise(), slices(oblique(), range(N)), number=7, SeriesDescription=["T1 sag"] * N)
    enhanced(tmp_path / "enhanced.dcm", noise() + 1, slices(oblique(), range(N)), number=12)
    save(new("1.2.840.10008.5.1.4.1.1.88.11", 90, Modality="SR"), tmp_path / "report.dcm")
    (tmp_path / "notes.txt").write_text("no DICOM")
    return tmp_path


def test_the_series_of_a_folder_are_listed_and_chosen(study: Path) -> None:
    listed = [(each.number, each.description, each.size, len(each.files)) for each in list_series(study)]
    assert listed == [(2, "localizer", (9, 12, 3), 3), (7, "T1 sag", SIZE, N), (12, "", SIZE, 1)]
    assert_same(read_image(study, series=7), noise(), oblique())
    assert_same(read_image(study, series=12), noise() + 1, oblique())
    labels, _ = read_labels(study, series=12)
    np.testing.assert_array_equal(np.unique(labels), np.unique(noise() + 1))
    with pytest.raises(ValueError, match=r"holds 3 series: 2 localizer \(9 x 12 x 3\), 7 T1 sag .* 12 .*--series"):
        read_image(study)
    with pytest.raises(ValueError, match=r"has no series 3.* 2 localizer .* 7 T1 sag"):
        read_image(study, series=3)
    with pytest.raises(ValueError, match="3 slices differ in orientation"):
        read_image(study, series=2)
    with pytest.raises(ValueError, match=r"enhanced\.dcm is a file"):
        read_image(study / "enhanced.dcm", series=12)


def test_series_that_share_a_number_are_counted(tmp_path: Path) -> None:
    """Scanners write a file for each volume of a series: two echoes, which have one number."""
    for echo in (1, 2):
        enhanced(tmp_path / f"IM{echo}", noise() + np.int16(echo), slices(oblique(), range(N)), number=5)
    assert [each.number for each in list_series(tmp_path)] == [1, 2]
    for echo in (1, 2):
        assert_same(read_image(tmp_path, series=echo), noise() + echo, oblique())


def test_series_without_a_number_are_counted(tmp_path: Path) -> None:
    for name, number in (("a", 4), ("b", 5)):
        dataset = enhanced(tmp_path / name, noise(), slices(oblique(), range(N)), number=number)
        dataset.SeriesInstanceUID = generate_uid()
        if name == "b":
            del dataset.SeriesNumber
        save(dataset, tmp_path / name)
    assert sorted(each.number for each in list_series(tmp_path)) == [1, 2]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    save(new("1.2.840.10008.5.1.4.1.1.88.11", 90, Modality="SR"), tmp_path / "report.dcm")
    with pytest.raises(ValueError, match="without DICOM images"):
        open_volume(tmp_path)
