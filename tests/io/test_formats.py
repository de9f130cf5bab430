"""Scans in every format, read as SimpleITK or nibabel read them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.io.formats import scan_name, spatial_dims_of
from voxelmorph_monai.io.images import open_volume, read_image, read_labels, save_image
from voxelmorph_monai.space.scan import Frame

SIZE = (9, 12, 7)
LIA = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def oblique(angles: tuple[float, float, float] = (20, -35, 50)) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ LIA @ np.diag([0.9, 1.1, 3])
    affine[:3, 3] = [-31.0, 17.5, 44.25]
    return affine


def noise(dtype: Any = np.int16) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 200, SIZE).astype(dtype)


def itk_image(array: NDArray[Any], affine: Affine) -> sitk.Image:
    """What SimpleITK makes of an array in LPS."""
    dims = array.ndim
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    lps, sides = (np.diag([-1.0, -1, 1, 1]) @ affine)[:dims], np.linalg.norm(affine[:3, :dims], axis=0)
    image.SetSpacing(sides.tolist())
    image.SetOrigin(lps[:, 3].tolist())
    image.SetDirection((lps[:, :dims] / sides).ravel().tolist())
    return image


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd", "scan.nrrd", "scan.nhdr"])
def test_what_simpleitk_writes_is_read(tmp_path: Path, name: str, dtype: Any) -> None:
    path = tmp_path / name
    sitk.WriteImage(itk_image(noise(dtype), oblique()), str(path))
    array, affine = read_image(path)
    np.testing.assert_array_equal(array, noise(dtype))
    np.testing.assert_allclose(affine, oblique(), atol=1e-9)  # text in double
    labels, _ = read_labels(path)
    assert labels.dtype == (dtype if np.dtype(dtype).kind in "iu" else np.uint8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4", "u4", "i8", "f4", "f8"])
def test_every_type_and_byte_order_of_nifti_is_read(tmp_path: Path, kind: str, order: str) -> None:
    header = nib.Nifti1Header(endianness=order)
    image = nib.Nifti1Image(noise(kind), oblique(), header, dtype=np.dtype(kind))
    nib.save(image, tmp_path / "scan.nii.gz")
    array, affine = read_image(tmp_path / "scan.nii.gz")
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, noise(kind))
    np.testing.assert_allclose(affine, oblique(), atol=1e-5)  # float32 in the header


def test_a_dicom_series_lies_where_its_slices_say(tmp_path: Path, save_dicom: Callable[..., None]) -> None:
    save_dicom(tmp_path / "series", noise(), oblique())
    array, affine = read_image(tmp_path / "series")
    if np.linalg.norm(affine[:3, 3] - oblique()[:3, 3]) > 1:  # the other way round: slices have no order of their own
        array, affine = array[..., ::-1], affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 6], [0, 0, 0, 1]])
    np.testing.assert_array_equal(array, noise())
    np.testing.assert_allclose(affine, oblique(), atol=1e-4)  # the text in the files
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    theirs = reader.Execute()
    again, affine = read_image(tmp_path / "series")
    for index in [(0, 0, 0), (8, 11, 6), (3, 2, 5)]:
        point = (affine @ [*index, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(theirs.TransformIndexToPhysicalPoint(index), point, atol=1e-4)
        assert theirs.GetPixel(index) == again[index]


def test_a_tilted_gantry_is_not_straightened(tmp_path: Path, save_dicom: Callable[..., None]) -> None:
    tilted = oblique() @ np.array([[1, 0, 0.6, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    save_dicom(tmp_path / "series", noise(), tilted)
    _, affine = open_volume(tmp_path / "series")
    cosine = affine[:3, 0] @ affine[:3, 2] / np.prod(np.linalg.norm(affine[:3, [0, 2]], axis=0))
    expected = tilted[:3, 0] @ tilted[:3, 2] / np.prod(np.linalg.norm(tilted[:3, [0, 2]], axis=0))
    assert abs(cosine) == pytest.approx(abs(expected), abs=1e-5)


def test_analyze_with_a_matrix_is_read(tmp_path: Path) -> None:
    nib.save(nib.Spm99AnalyzeImage(noise(), oblique()), tmp_path / "old.img")
    array, affine = read_image(tmp_path / "old.img")
    np.testing.assert_array_equal(array, noise())
    np.testing.assert_allclose(affine, oblique(), atol=1e-9)
    (tmp_path / "old.mat").unlink()
    with pytest.raises(ValueError, match=r"old\.img has no position: .*\.mat file"):
        read_image(tmp_path / "old.img")


def nifti(path: Path, sform: tuple[Affine, int], qform: tuple[Affine, int], unit: int = 2) -> Path:
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.set_sform(*sform)
    image.set_qform(*qform)
    image.header["xyzt_units"] = unit
    nib.save(image, path)
    return path


def test_the_form_whose_code_is_set_counts(tmp_path: Path) -> None:
    one, other = oblique(), oblique((5, 5, 5))
    for sform, qform in (((one, 1), (other, 0)), ((other, 0), (one, 1)), ((one, 4), (one, 1))):
        path = nifti(tmp_path / "scan.nii", sform, qform)
        np.testing.assert_allclose(read_image(path)[1], one, atol=1e-5)  # float32 in the header
        theirs = sitk.ReadImage(str(path))
        np.testing.assert_allclose(
            theirs.TransformIndexToPhysicalPoint((8, 11, 6)) * np.array([-1, -1, 1]),
            (one @ [8, 11, 6, 1])[:3],
            atol=1e-4,
        )


def test_nifti_files_that_tools_put_in_different_places_are_refused(tmp_path: Path) -> None:
    moved = oblique()
    moved[0, 3] += 0.08  # the smallest voxel is 0.9 mm
    read_image(nifti(tmp_path / "scan.nii", (moved, 1), (oblique(), 1)))
    moved[0, 3] += 0.02
    with pytest.raises(ValueError, match=r"scan\.nii .*sform .*qform .*0\.1 mm"):
        read_image(nifti(tmp_path / "scan.nii", (moved, 1), (oblique(), 1)))
    with pytest.raises(ValueError, match=r"scan\.nii .*sform_code and qform_code are both 0"):
        read_image(nifti(tmp_path / "scan.nii", (moved, 0), (oblique(), 0)))
    with pytest.raises(ValueError, match=r"scan\.nii .*metres .*xyzt_units"):
        read_image(nifti(tmp_path / "scan.nii", (moved, 1), (moved, 1), unit=1))
    read_image(nifti(tmp_path / "scan.nii", (moved, 1), (moved, 1), unit=0))


PLANE = np.array([[-1.5, 0, 0, 12], [0, 0.8, 0, -9], [0, 0, 1, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("name", ["image.nii.gz", "image.mha", "image.nrrd"])
def test_a_2d_image_is_a_slice(tmp_path: Path, name: str) -> None:
    array, path = noise()[..., 0], tmp_path / name
    if "nii" in name:
        nib.save(nib.Nifti1Image(array, PLANE), path)
    else:
        sitk.WriteImage(itk_image(array, PLANE), str(path))
    found, affine = read_image(path, planar=True)
    np.testing.assert_array_equal(found, array[..., None])
    np.testing.assert_allclose(affine, PLANE, atol=1e-6)  # float32 in a header
    theirs = sitk.ReadImage(str(path))
    np.testing.assert_allclose(theirs.TransformIndexToPhysicalPoint((8, 11)), (affine @ [8, 11, 0, 1])[:2] * [-1, -1])
    assert spatial_dims_of(path) == theirs.GetDimension() == 2
    with pytest.raises(ValueError, match=r"3-D volume.*\(9, 12, 1\)"):
        read_image(path)
    Frame.read(path).save(tmp_path / "like.nii.gz", found)
    like = sitk.ReadImage(str(tmp_path / "like.nii.gz"))
    assert like.GetSize() == theirs.GetSize()
    np.testing.assert_allclose(
        like.TransformIndexToPhysicalPoint((8, 11)), theirs.TransformIndexToPhysicalPoint((8, 11)), atol=1e-5
    )  # float32 in the header


def test_a_2d_image_off_its_plane_is_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(noise()[..., 0], oblique()), tmp_path / "image.nii")
    with pytest.raises(ValueError, match=r"image\.nii is a 2-D image that does not lie in a plane of constant z"):
        open_volume(tmp_path / "image.nii", planar=True)
    save_image(tmp_path / "slice.nii", noise()[..., :1], oblique())  # a slice may
    assert open_volume(tmp_path / "slice.nii", planar=True)[0].shape == (9, 12, 1)
    assert spatial_dims_of(tmp_path / "slice.nii") == 3


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/d.1/sub-01.v2.nii.gz", "sub-01.v2"),
        ("a.NII.GZ", "a"),
        ("a.mgh.gz", "a"),
        ("a.hdr", "a"),
        ("a.nrrd", "a"),
        ("a", "a"),
        (".a.nii", ".a"),
    ],
)
def test_a_scan_is_called_by_its_file_without_the_ending(path: str, name: str) -> None:
    assert scan_name(path) == name
    assert scan_name(Path(path)) == name


def test_a_series_is_called_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "visit.01").mkdir()
    assert scan_name(tmp_path / "visit.01") == "visit.01"


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz"])
def test_a_file_that_fails_its_checksum_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{ending}"
    kind = nib.MGHImage if ending == ".mgz" else nib.Nifti1Image
    nib.save(kind(noise(np.int16), oblique()), path)
    read_image(path)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum, which is all that tells of a wrong bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match="CRC check failed"):
        read_image(path)
