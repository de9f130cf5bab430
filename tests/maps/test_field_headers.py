"""Fields of SPM, NiftyReg and others in NIfTI files, against the map that they were made from."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from fields import FIXED, LPS, MIRRORED, OBLIQUE, affine_map, image, inner
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from voxelmorph_monai import cli
from voxelmorph_monai.affines import in_plane
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.maps.chains import map_points
from voxelmorph_monai.maps.displacements import save_displacement
from voxelmorph_monai.maps.files import read_transform

CLOSE = 1e-4  # mm: positions up to 100 mm in float32, in a header in float32


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def there(points: NDArray[Any]) -> NDArray[np.float64]:
    """The map of all files here, of points ``(..., 3)`` (RAS, mm): affine and bent, and the same along no two axes."""
    matrix = affine_map()
    return points @ matrix[:3, :3].T + matrix[:3, 3] + 2 * np.sin(points[..., [1, 2, 0]] / 15)


def places(size: Any = FIXED, affine: NDArray[Any] = OBLIQUE) -> NDArray[np.float64]:
    return np.moveaxis(np.indices(size), 0, -1) @ affine[:-1, :-1].T + affine[:-1, -1]


def write(path: str, vectors: NDArray[Any], intent: int, name: str = "", kind: float = 0, note: bytes = b"") -> None:
    written = nib.Nifti1Image(vectors[:, :, :, None].astype(np.float32), OBLIQUE)
    written.header.set_intent(intent, name=name)
    written.header["intent_p1"], written.header["descrip"] = kind, note
    nib.save(written, path)


# intent, name, intent_p1, descrip; the files hold positions unless the name says otherwise
READ = {
    "SPM's Deformations": (1007, "Mapping", 0, b"Deformation field"),
    "SPM's Segment": (0, "", 0, b"Deformation"),  # which sets no intent
    "SPM's Segment, and what lay in memory": (0, "", 0, b"Deformation\0\0 of something else"),
    "SPM's Shoot": (0, "", 0, b"Deformation (templ. to. ind.)"),
    "NiftyReg, deformation": (1007, "NREG_TRANS", 0, b""),
    "NiftyReg, of -comp": (1007, "NREG_TRANS", 0, b"Deformation field from NiftyReg (reg_transform -comp)"),
    "NiftyReg, displacement": (1007, "NREG_TRANS", 1, b""),
    "NiftyReg, displacement marked for Slicer": (1006, "NREG_TRANS", 1, b""),
    "displacement along RAS": (1006, "", 0, b"5.0.10"),
    "displacement that says so": (1006, "DISPVECT", 0, b""),
}


@pytest.mark.parametrize("kind", READ)
def test_fields_are_the_map_that_they_were_made_from(kind: str) -> None:
    held = there(places()) - (places() if "displacement" in kind else 0)
    write("field.nii.gz", held, *READ[kind])
    transform = read_transform("field.nii.gz")
    np.testing.assert_allclose(
        map_points(transform, places().reshape(-1, 3)), there(places()).reshape(-1, 3), atol=CLOSE
    )
    index = (inner() - OBLIQUE[:3, 3]) @ np.linalg.inv(OBLIQUE[:3, :3]).T
    between = [map_coordinates(axis, index.T, order=1) for axis in np.moveaxis(there(places()), -1, 0)]
    np.testing.assert_allclose(map_points(transform, inner()), np.transpose(between), atol=CLOSE)


@pytest.mark.parametrize(
    ("header", "dtype"), [(nib.Nifti2Image, ">f8"), (nib.Nifti1Image, ">i2"), (nib.Nifti1Image, "<f8")]
)
def test_numbers_may_be_stored_in_any_way(header: Any, dtype: str) -> None:
    written = header(there(places())[:, :, :, None], OBLIQUE)
    written.header.set_intent(1007, name="Mapping")
    written = header(written.dataobj, OBLIQUE, written.header.as_byteswapped(dtype[0]))
    written.set_data_dtype(dtype)
    nib.save(written, "y_field.nii")
    moved = map_points(read_transform("y_field.nii"), places().reshape(-1, 3))
    step = 150 / 2**16 if dtype == ">i2" else CLOSE  # of numbers between -75 and 75 mm, in 16 bits
    np.testing.assert_allclose(moved, there(places()).reshape(-1, 3), atol=step)


def test_the_place_may_come_from_the_qform() -> None:
    written = nib.Nifti1Image(there(places())[:, :, :, None].astype(np.float32), None)
    written.set_qform(OBLIQUE, 1)
    written.header.set_intent(1007, name="NREG_TRANS")
    nib.save(written, "field.nii")
    moved = map_points(read_transform("field.nii"), places().reshape(-1, 3))
    np.testing.assert_allclose(moved, there(places()).reshape(-1, 3), atol=10 * CLOSE)  # a quaternion in float32


@pytest.mark.parametrize("kind", [0, 1])
def test_fields_of_slices_are_read(kind: int) -> None:
    flat = np.array([[2.0, 0, -20], [0, 1.5, 9], [0, 0, 1]])
    affine = np.eye(4)
    affine[np.ix_([0, 1, 3], [0, 1, 3])] = flat
    points = places((19, 23), in_plane(affine))
    moved = points @ [[0.98, 0.17], [-0.17, 1.05]] + [3.0, -2] + np.sin(points[..., ::-1] / 15)
    written = nib.Nifti1Image((moved - (points if kind else 0))[:, :, None, None], affine)
    written.header.set_intent(1007, name="NREG_TRANS")
    written.header["intent_p1"] = kind
    nib.save(written, "flat.nii")
    found = map_points(read_transform("flat.nii"), points.reshape(-1, 2))
    np.testing.assert_allclose(found, moved.reshape(-1, 2), atol=CLOSE)


def vxm(words: str) -> int:
    return cli.main(words.split())


def test_every_command_takes_positions() -> None:
    write("y_sub.nii", there(places()), 0, note=b"Deformation")
    save_image("moving.nii.gz", image(), MIRRORED)
    save_image("fixed.nii.gz", image(FIXED), OBLIQUE)
    on = "--reference fixed.nii.gz --output"
    assert vxm(f"apply y_sub.nii --image moving.nii.gz {on} warped.nii.gz") == 0
    index = (there(places()) - MIRRORED[:3, 3]) @ np.linalg.inv(MIRRORED[:3, :3]).T
    seen = ((index >= 0) & (index <= np.array(image().shape) - 1)).all(-1)
    expected = map_coordinates(image(), np.moveaxis(index, -1, 0), order=1)
    off = np.abs(nib.load("warped.nii.gz").get_fdata() - expected)[seen]
    assert off.size > 1000
    assert off.max() < 0.01  # points differ by 1e-4 mm, intensities by 30 a voxel

    assert vxm("convert y_sub.nii as_itk.nii.gz") == 0
    peer = sitk.DisplacementFieldTransform(sitk.ReadImage("as_itk.nii.gz", sitk.sitkVectorFloat64))
    some = places()[4:9, 5:9, 3:8].reshape(-1, 3)
    moved = np.array([peer.TransformPoint(point) for point in (some * LPS).tolist()]) * LPS
    np.testing.assert_allclose(moved, there(some), atol=CLOSE)

    assert vxm(f"jacobian y_sub.nii {on} volume.nii.gz") == 0
    slope = np.broadcast_to(affine_map()[:3, :3], (*some.shape, 3)).copy()
    for i, j in ((0, 1), (1, 2), (2, 0)):
        slope[:, i, j] += 2 / 15 * np.cos(some[:, j] / 15)
    volume = nib.load("volume.nii.gz").get_fdata()[4:9, 5:9, 3:8].ravel()
    np.testing.assert_allclose(volume, np.linalg.det(slope), atol=2e-3)  # differences over 6 mm: h^2 / 6 of u''' 6e-4

    assert vxm("invert y_sub.nii --output back.h5") == 0
    np.testing.assert_allclose(map_points(read_transform("back.h5"), there(inner())), inner(), atol=0.1)
    assert vxm("compose y_sub.nii back.h5 --output round.h5") == 0
    np.testing.assert_allclose(map_points(read_transform("round.h5"), inner()), inner(), atol=0.1)


# intent, name, intent_p1, descrip; what the message names, and what it says to do
REFUSED = {
    "cubic control points": ((1007, "NREG_TRANS", 2, b""), "control points.*NiftyReg.*reg_transform .* -def"),
    "velocities": ((1007, "NREG_TRANS", 3, b""), "velocities.*NiftyReg.*reg_transform"),
    "velocities by displacements": ((1007, "NREG_TRANS", 4, b""), "velocities.*NiftyReg.*reg_transform"),
    "control points of a velocity": ((1007, "NREG_TRANS", 5, b""), "velocity.*NiftyReg.*reg_transform"),
    "linear control points": ((1007, "NREG_TRANS", 6, b""), "control points.*NiftyReg.*reg_transform"),
    "what NiftyReg may write some day": ((1007, "NREG_TRANS", 7, b""), "unknown type 7.*NiftyReg"),
    "no type": ((1007, "NREG_TRANS", np.nan, b""), "unknown type nan.*NiftyReg"),
    "NiftyReg 1.3, control points": ((1007, "NREG_CPP_FILE", 0, b""), "control points.*NiftyReg"),
    "NiftyReg 1.3, velocities": ((1007, "NREG_VEL_STEP", 6, b""), "control points.*NiftyReg"),
    "DARTEL": ((0, "", 0, b"Flow Field"), "SPM velocities.*DARTEL"),
    "DARTEL with an intent": ((1007, "", 0, b"Flow Field"), "SPM velocities.*DARTEL"),
    "Shoot": ((0, "", 0, b"Velocity (1e-05 0.0001 0.2 0.05 0.2)"), "SPM velocities.*Shoot"),
    "unknown": ((1007, "STEERABLE", 0, b""), "'STEERABLE'"),
    "unknown along RAS": ((1006, "voxels", 0, b""), "'voxels'"),
    "FSL": ((2006, "", 0, b""), "FSL.*--from fsl"),
    "no mark": ((0, "", 0, b"made by hand"), "intent is 0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_map_of_points_is_refused_by_name(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    marks, message = REFUSED[kind]
    write("field.nii", 0 * places(), *marks)
    assert vxm("convert field.nii out.h5") == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    with pytest.raises(ValueError, match=rf"field\.nii .*{message}"):
        raise ValueError(shown)
    assert not Path("out.h5").exists()


@pytest.mark.parametrize("intent", [1006, 1007])
@pytest.mark.parametrize("system", [LPS, 1])
@pytest.mark.parametrize(
    "move", [there, lambda points: points, lambda points: points + 300], ids=["moved", "identity", "far"]
)
def test_positions_that_do_not_say_so_are_not_taken_for_displacements(intent: int, system: Any, move: Any) -> None:
    write("field.nii", move(places()) * system, intent)
    with pytest.raises(ValueError, match=r"field\.nii .*positions"):
        read_transform("field.nii")


@pytest.mark.parametrize("scale", [0.7, 1.5])
def test_displacements_may_hold_a_change_of_size_and_a_turn(scale: float) -> None:
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # by 90 degrees
    for map_, name in ((scale * np.eye(3), "scale.nii"), (turn, "turn.nii"), (np.diag([-1, -1, 1]), "half_turn.nii")):
        moved = places() @ map_.T
        ddf = np.moveaxis((moved - places()) @ np.linalg.inv(OBLIQUE[:3, :3]).T, -1, 0)
        save_displacement(name, ddf, OBLIQUE)
        np.testing.assert_allclose(
            map_points(read_transform(name), places().reshape(-1, 3)), moved.reshape(-1, 3), atol=CLOSE
        )


def test_positions_that_are_not_numbers_are_counted() -> None:
    positions = there(places())
    positions[2, 3, 4] = np.nan  # as SPM marks what it did not invert
    write("iy_sub.nii", positions, 1007, "Mapping")
    with pytest.raises(ValueError, match=r"iy_sub\.nii .*\b3 numbers.*NaN"):
        read_transform("iy_sub.nii")
