"""Scans: what they are made from, what they refuse, and what they know."""

from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from phantoms import AFFINES, SIZE

from voxelmorph_monai.affines import spacing
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.space.itk_bridge import to_itk
from voxelmorph_monai.space.scan import Scan

AFFINE = AFFINES["oblique"]
PLANE = np.array([[0.0, -2, 0, 5], [3, 0, 0, -7], [0, 0, 1, 0], [0, 0, 0, 1]])  # of a 2-D image


def noise(size: tuple[int, ...] = SIZE, dtype: Any = np.float32) -> NDArray[Any]:
    return np.random.default_rng(4).uniform(1, 200, size).astype(dtype)


def meta_tensor() -> MetaTensor:
    return MetaTensor(torch.from_numpy(noise())[None], affine=torch.from_numpy(AFFINE))


@pytest.mark.parametrize(
    "made",
    [
        lambda folder: folder / "scan.nii.gz",
        lambda folder: str(folder / "scan.nii.gz"),
        lambda folder: nib.load(folder / "scan.nii.gz"),
        lambda folder: nib.Nifti1Image(noise()[..., None], AFFINE),
        lambda folder: meta_tensor(),
        lambda folder: meta_tensor()[0],
        lambda folder: to_itk(noise(), AFFINE),
        lambda folder: itk.imread(str(folder / "scan.nii.gz")),
        lambda folder: Scan(noise(), AFFINE, "mine"),
    ],
    ids=["Path", "str", "nibabel file", "nibabel 4-D", "MetaTensor", "no channel", "ITK", "ITK file", "Scan"],
)
def test_a_scan_is_made_from_whatever_people_hold(tmp_path: Path, made: Any) -> None:
    save_image(tmp_path / "scan.nii.gz", noise(), AFFINE)
    scan = Scan.of(made(tmp_path), "moving")
    np.testing.assert_array_equal(scan.array, noise())
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-4)  # a header's float32


def test_a_2d_itk_image_lies_in_the_plane_of_z_0() -> None:
    within = np.delete(np.delete(PLANE, 2, 0), 2, 1)
    scan = Scan.of(to_itk(noise((5, 6)), within), "slice")
    assert (scan.shape, scan.spatial_dims, scan.is_slice) == ((5, 6, 1), 2, True)
    np.testing.assert_allclose(scan.affine, PLANE, atol=1e-9)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (noise(), ["moving", "ndarray", r"Scan\(array, affine\)"]),
        (torch.zeros(3, 4, 5), ["moving", "Tensor", r"Scan\(array, affine\)"]),
        (None, ["moving", "NoneType", "path"]),
        (7, ["moving", "int", "path"]),
        ((noise(), AFFINE), ["moving", "tuple", "path"]),
    ],
)
def test_what_is_no_scan_gets_a_sentence(value: Any, words: list[str]) -> None:
    with pytest.raises(TypeError, match=".*".join(words)) as caught:
        Scan.of(value, "moving")
    assert ("affine" in str(caught.value)) == hasattr(value, "ndim")


@pytest.mark.parametrize(
    ("array", "affine", "error", "words"),
    [
        (noise() * np.nan, AFFINE, ValueError, f"a.nii.* {np.prod(SIZE)} voxels"),
        (np.where(noise() > 199, np.inf, noise()), AFFINE, ValueError, r"a.nii.* \d+ voxels"),
        (noise().astype(complex), AFFINE, TypeError, "a.nii.*complex128"),
        (noise((3, 4, 5, 2)), AFFINE, ValueError, r"a.nii.*\(3, 4, 5, 2\)"),
        (noise((1, 1, 5)), AFFINE, ValueError, r"a.nii.*\(1, 1, 5\)"),
        (noise((4, 0, 5)), AFFINE, ValueError, r"a.nii.*\(4, 0, 5\)"),
        (noise(), np.diag([1.0, 0, 1, 1]), ValueError, "affine of a.nii"),
        (noise(), AFFINE[:3], ValueError, "affine of a.nii"),
        (noise(), AFFINE @ (np.eye(4) + 0.1 * np.eye(4, k=1)), ValueError, "right angles"),
    ],
)
def test_what_cannot_be_a_scan_is_refused(array: Any, affine: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Scan(array, affine, "a.nii")


def test_a_series_is_no_scan() -> None:
    with pytest.raises(ValueError, match=r"series .*\(4, 5, 6, 2\)"):
        Scan.of(nib.Nifti1Image(noise((4, 5, 6, 2)), AFFINE), "series")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_labels_of_any_kind_are_whole_numbers(dtype: Any) -> None:
    labels = noise(dtype=np.uint8).astype(dtype)
    found = Scan.of(nib.Nifti1Image(labels, AFFINE), "labels", labels=True)
    assert found.array.dtype == (np.uint8 if dtype == np.float64 else dtype)
    np.testing.assert_array_equal(found.array, labels)
    with pytest.raises(ValueError, match=r"labels .*whole"):
        Scan.of(Scan(noise() + 0.3, AFFINE, "labels"), "labels", labels=True)


@pytest.mark.parametrize("name", AFFINES)
def test_a_scan_knows_its_grid(name: str) -> None:
    affine = AFFINES[name]
    scan = Scan(noise(), affine)
    np.testing.assert_allclose(scan.spacing, spacing(affine))
    assert scan.orientation == "".join(nib.aff2axcodes(affine))
    assert scan.grid.size == SIZE
    np.testing.assert_array_equal(scan.grid.affine, affine)
    assert not scan.is_slice


@pytest.mark.parametrize(
    ("low", "high", "background"), [(-1024, 3000, -1024), (-3, 100, 0), (0, 100, 0), (5, 100, 0), (-20, -10, -20)]
)
def test_the_background_is_0_unless_the_scan_goes_far_below(low: float, high: float, background: float) -> None:
    array = np.full(SIZE, (low + high) / 2, np.float32)
    array[0, 0, 0], array[1, 1, 1] = low, high
    scan = Scan(array, AFFINE)
    assert scan.background == background
    assert scan.shows_something


@pytest.mark.parametrize("codes", [(1, 1), (4, 1), (2, 0)])
def test_what_is_saved_has_the_header_that_it_came_with(tmp_path: Path, codes: tuple[int, int]) -> None:
    image = nib.Nifti1Image(noise(dtype=np.int16), AFFINE)
    image.set_sform(AFFINE, codes[0])
    image.set_qform(AFFINE if codes[1] else None, codes[1])
    image.header["descrip"] = b"a scan"
    nib.save(image, tmp_path / "scan.nii.gz")
    scan = Scan.read(tmp_path / "scan.nii.gz")
    scan.like(noise(SIZE)).save(tmp_path / "other.nii.gz")
    written = nib.load(tmp_path / "other.nii.gz")
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == codes
    assert written.header["descrip"] == b"a scan"
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), noise())
    theirs = sitk.ReadImage(str(tmp_path / "other.nii.gz"))
    point = (AFFINE @ [3, 4, 5, 1])[:3] * [-1, -1, 1]
    np.testing.assert_allclose(theirs.TransformIndexToPhysicalPoint((3, 4, 5)), point, atol=1e-4)  # float32


def test_a_scan_is_short_to_look_at_and_an_array_for_numpy() -> None:
    scan = Scan(noise(dtype=np.int16), np.diag([-1.0, 1, 2.5, 1]), "/data/sub-01_T1w.nii.gz")
    assert repr(scan) == "<Scan sub-01_T1w: 26 x 31 x 23 voxels of 1 x 1 x 2.5 mm, LAS, int16>"
    assert np.asarray(scan) is scan.array
    assert np.mean(scan) == pytest.approx(scan.array.mean())
