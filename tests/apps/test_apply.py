"""Files of transforms and points, and the commands that use them, against SimpleITK (and ANTs, where it is there)."""

import json
import os
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from fields import FIXED, LPS, MIRRORED, OBLIQUE, POINT, affine_map, fade, image, inner, smooth
from nitransforms import nonlinear
from numpy.typing import NDArray

from voxelmorph_monai import cli
from voxelmorph_monai.affines import ImageGrid
from voxelmorph_monai.apps.apply import apply
from voxelmorph_monai.io.images import read_image, save_image
from voxelmorph_monai.maps import files as transform_files
from voxelmorph_monai.maps.chains import (
    chain,
    field_transform,
    invert_transform,
    map_points,
    resample_image,
    resample_labels,
)
from voxelmorph_monai.maps.displacements import read_displacement, save_displacement
from voxelmorph_monai.maps.files import FORMATS, read_chain, read_transform, save_chain
from voxelmorph_monai.maps.points import read_points
from voxelmorph_monai.maps.spatial_map import Displacement, SpatialMap
from voxelmorph_monai.space import itk_bridge
from voxelmorph_monai.space.itk_bridge import linear_transform, save_transform
from voxelmorph_monai.space.scan import Scan


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A moving and a fixed image, labels, and a registration as ANTs leaves one: Warp and GenericAffine."""
    monkeypatch.chdir(tmp_path)
    save_image("moving.nii.gz", image(), MIRRORED)
    save_image("fixed.nii.gz", image(FIXED), OBLIQUE)
    save_image("labels.nii.gz", (image() // 15).astype(np.int16), MIRRORED)
    save_displacement("1Warp.nii.gz", fade(smooth(FIXED, 1)), OBLIQUE)
    save_transform("0GenericAffine.mat", linear_transform(affine_map()))
    return tmp_path


PAIR = ["1Warp.nii.gz", "0GenericAffine.mat"]


def vxm(words: str) -> int:
    return cli.main(words.split())


def expected() -> Any:
    return chain([field_transform(fade(smooth(FIXED, 1)), OBLIQUE), linear_transform(affine_map())])


def sitk_points(transform: sitk.Transform, points: NDArray[Any]) -> NDArray[Any]:
    return np.array([transform.TransformPoint(point) for point in (points * LPS).tolist()]) * LPS


@pytest.mark.usefixtures("folder")
def test_the_order_is_that_of_ants() -> None:
    transform, residual, _ = read_chain(PAIR)
    assert residual == 0
    np.testing.assert_allclose(map_points(transform, inner()), map_points(expected(), inner()), atol=POINT)
    assert np.abs(map_points(read_chain(PAIR[::-1])[0], inner()) - map_points(transform, inner())).max() > 0.1


@pytest.mark.usefixtures("folder")
def test_a_marked_file_is_inverted() -> None:
    transform, residual, _ = read_chain(["[0GenericAffine.mat,1]"])
    assert residual == 0
    back = np.linalg.inv(affine_map())
    np.testing.assert_allclose(map_points(transform, inner()), inner() @ back[:3, :3].T + back[:3, 3], atol=POINT)
    unmarked = read_chain(["[0GenericAffine.mat, 0]"]).transform
    np.testing.assert_allclose(
        map_points(unmarked, inner()), map_points(linear_transform(affine_map()), inner()), atol=POINT
    )
    _, residual, _ = read_chain(["[0GenericAffine.mat,1]", "[1Warp.nii.gz,1]"])
    assert residual > 0


def sitk_transforms() -> dict[str, sitk.Transform]:
    affine = sitk.AffineTransform([1.1, 0.1, 0, -0.1, 0.9, 0.05, 0, 0.02, 1.0], [3, -4, 5], [10, -7, 2])
    euler = sitk.Euler3DTransform((5, -3, 2), 0.1, -0.2, 0.3, (1, 2, 3))
    spline = sitk.BSplineTransformInitializer(sitk.Image(20, 20, 20, sitk.sitkFloat32), [3, 3, 3])
    spline.SetParameters((np.sin(np.arange(len(spline.GetParameters()))) * 2).tolist())
    return {
        "affine.tfm": affine,
        "affine.mat": affine,
        "affine.txt": affine,
        "affine.h5": affine,
        "euler.tfm": euler,
        "shift.tfm": sitk.TranslationTransform(3, (1.5, -2, 4)),
        "spline.tfm": spline,
        "composite.h5": sitk.CompositeTransform([affine, euler, spline]),
        "composite.tfm": sitk.CompositeTransform([euler, affine]),
        "nested.h5": sitk.CompositeTransform([sitk.CompositeTransform([affine, spline]), euler]),
    }


@pytest.mark.parametrize("name", sitk_transforms())
def test_simpleitk_s_files_do_what_simpleitk_does(name: str, tmp_path: Path) -> None:
    written = sitk_transforms()[name]
    if name == "nested.h5":
        written.FlattenTransform()  # the format holds one level
    sitk.WriteTransform(written, str(tmp_path / name))
    found = chain([read_transform(tmp_path / name)])
    np.testing.assert_allclose(map_points(found, inner()), sitk_points(written, inner()), atol=1e-9)


def test_our_composites_are_read(tmp_path: Path) -> None:
    ours = SpatialMap(
        np.linalg.inv(affine_map()), affine_map(), Displacement(fade(smooth(FIXED, 1)).astype(np.float32), OBLIQUE)
    )
    ours.save(tmp_path / "forward.h5")
    found = read_transform(tmp_path / "forward.h5")
    np.testing.assert_allclose(map_points(found, inner()), ours.apply(inner()), atol=2e-5)  # written in float32


@pytest.mark.parametrize("intent", [1006, 1007])
def test_a_displacement_is_read_as_simpleitk_reads_it(intent: int, tmp_path: Path) -> None:
    path = tmp_path / "field.nii.gz"
    save_displacement(path, smooth(FIXED, 2), OBLIQUE, intent=intent)
    assert nib.load(path).header["intent_code"] == intent
    vectors = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    peer = sitk_points(sitk.DisplacementFieldTransform(vectors), inner())
    np.testing.assert_allclose(map_points(read_transform(path), inner()), peer, atol=POINT)
    ddf, affine = read_displacement(path)
    np.testing.assert_allclose(ddf, smooth(FIXED, 2), atol=1e-5)  # float32
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-4)  # float32


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("form", "name", "files"),
    [
        ("itk", "out.h5", ["out.h5"]),
        ("1006", "out.nii.gz", ["out.nii.gz"]),
        ("1007", "out.nii", ["out.nii"]),
        ("ants", "out_", ["out_1Warp.nii.gz", "out_0GenericAffine.mat"]),
    ],
)
def test_every_format_comes_back(form: str, name: str, files: list[str]) -> None:
    assert vxm(f"compose {' '.join(PAIR)} --output {name} --to {form}") == 0
    found = read_chain(files).transform
    np.testing.assert_allclose(map_points(found, inner()), map_points(expected(), inner()), atol=2 * POINT)
    assert vxm(f"convert {files[0]} again.h5 --overwrite") == 0
    np.testing.assert_allclose(
        map_points(read_transform("again.h5"), inner()), map_points(read_transform(files[0]), inner()), atol=POINT
    )


def test_the_command_line_offers_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vxm("convert --help")
    assert "{" + ",".join(FORMATS) + "}" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_an_ants_pair_of_our_composite_is_the_same_map() -> None:
    outer = np.diag([1.1, 0.9, 1.0, 1.0])
    ours = SpatialMap(affine_map(), outer, Displacement(fade(smooth(FIXED, 1)).astype(np.float32), OBLIQUE))
    ours.save("forward.h5")
    assert vxm("convert forward.h5 a_ --to ants --reference fixed.nii.gz") == 0
    found = read_chain(["a_1Warp.nii.gz", "a_0GenericAffine.mat"]).transform
    index = np.random.default_rng(2).integers(3, 12, (50, 3))  # on voxels: between them it is linear on another grid
    points = index @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]
    np.testing.assert_allclose(map_points(found, points), ours.apply(points), atol=5e-5)
    linear = map_points(read_transform("a_0GenericAffine.mat"), points)
    np.testing.assert_allclose(linear, map_points(linear_transform(ours.linear), points), atol=POINT)


@pytest.mark.usefixtures("folder")
def test_a_linear_pair_has_no_warp_and_no_old_one() -> None:
    assert vxm(f"compose {' '.join(PAIR)} --output a_ --to ants") == 0
    assert vxm("convert 0GenericAffine.mat a_ --to ants --overwrite") == 0
    assert not Path("a_1Warp.nii.gz").exists()
    np.testing.assert_allclose(
        map_points(read_transform("a_0GenericAffine.mat"), inner()),
        map_points(linear_transform(affine_map()), inner()),
        atol=POINT,
    )


@pytest.mark.usefixtures("folder")
def test_images_and_labels_are_resampled_onto_the_reference() -> None:
    chain_ = " ".join(PAIR)
    assert vxm(f"apply {chain_} --image moving.nii.gz --reference fixed.nii.gz --output w.nii.gz") == 0
    warped, affine = read_image("w.nii.gz")
    np.testing.assert_array_equal(affine, nib.load("fixed.nii.gz").affine)
    transform = read_chain(PAIR).transform
    moving, grid = Scan.read("moving.nii.gz"), ImageGrid(FIXED, affine)
    np.testing.assert_array_equal(warped, resample_image(moving, transform, grid))
    np.testing.assert_array_equal(apply(PAIR, "moving.nii.gz", "fixed.nii.gz").array, warped)
    sharp = "--interpolation lanczos --overwrite"
    assert vxm(f"apply {chain_} --image moving.nii.gz --reference fixed.nii.gz --output w.nii.gz {sharp}") == 0
    np.testing.assert_array_equal(read_image("w.nii.gz")[0], resample_image(moving, transform, grid, "lanczos"))
    labels = Scan.read_labels("labels.nii.gz")
    for option, interpolation in (
        ("", "nearest"),
        ("--interpolation linear --overwrite", "linear"),
        ("--interpolation label --overwrite", "linear"),  # its former name
    ):
        words = f"apply {chain_} --labels labels.nii.gz --reference fixed.nii.gz --output l.nii.gz {option}"
        assert vxm(words) == 0
        found = nib.load("l.nii.gz")
        assert found.get_data_dtype() == np.int16
        np.testing.assert_array_equal(
            np.asanyarray(found.dataobj), resample_labels(labels, transform, grid, interpolation)
        )


@pytest.mark.usefixtures("folder")
def test_the_jacobian_is_that_of_simpleitk_s_points_and_holds_the_affine_part() -> None:
    assert vxm(f"jacobian {' '.join(PAIR)} --reference fixed.nii.gz --output j.nii.gz") == 0
    assert vxm(f"jacobian {' '.join(PAIR)} --reference fixed.nii.gz --output log.nii.gz --log") == 0
    found = nib.load("j.nii.gz").get_fdata()
    np.testing.assert_allclose(np.log(found), nib.load("log.nii.gz").get_fdata(), atol=1e-6)
    warp = sitk.DisplacementFieldTransform(sitk.ReadImage("1Warp.nii.gz", sitk.sitkVectorFloat64))
    peer = sitk.CompositeTransform([sitk.ReadTransform("0GenericAffine.mat"), warp])
    for index in np.random.default_rng(4).integers(1, np.array(FIXED) - 1, (20, 3)):
        steps = np.concatenate([np.eye(3), -np.eye(3)]) + index  # central differences, voxel to voxel
        ends = sitk_points(peer, steps @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3])
        change = np.linalg.det((ends[:3] - ends[3:]) / 2) / np.linalg.det(OBLIQUE[:3, :3])
        assert abs(found[tuple(index)] - change) < 1e-4  # float32 displacements over voxels of 1.6 mm
    assert abs(found[0, 0, 0] - np.linalg.det(affine_map()[:3, :3])) < 1e-4  # there the displacement is 0


@pytest.mark.usefixtures("folder")
def test_the_jacobian_on_a_slice_is_that_on_the_volume_around_it() -> None:
    """What changes across the slice counts too."""
    assert vxm(f"jacobian {' '.join(PAIR)} --reference fixed.nii.gz --output whole.nii.gz") == 0
    whole = nib.load("whole.nii.gz").get_fdata()
    for axis, at in ((0, 7), (2, 5)):
        affine, size = OBLIQUE.copy(), np.array(FIXED)
        affine[:3, 3] += at * OBLIQUE[:3, axis]
        size[axis] = 1
        save_image("slice.nii.gz", np.arange(size.prod(), dtype=np.float32).reshape(size), affine)
        assert vxm(f"jacobian {' '.join(PAIR)} --reference slice.nii.gz --output j.nii.gz --overwrite") == 0
        expected = np.take(whole, [at], axis)
        np.testing.assert_allclose(nib.load("j.nii.gz").get_fdata(), expected, atol=1e-4)  # as above
        assert np.abs(expected - 1).max() > 0.01


@pytest.mark.usefixtures("folder")
def test_a_transform_whose_parameters_are_cut_off_is_no_identity(capsys: pytest.CaptureFixture[str]) -> None:
    transform = sitk.AffineTransform(3)
    transform.SetTranslation((3.0, -2.0, 1.0))
    sitk.WriteTransform(transform, "whole.txt")
    whole = Path("whole.txt").read_text()
    assert vxm("convert whole.txt again.txt") == 0
    for i, end in enumerate((70, len(whole) // 2, whole.index("FixedParameters"), len(whole) - 1)):
        Path("cut.txt").write_text(whole[:end])
        assert vxm(f"convert cut.txt never{i}.txt") == 2
        assert "cut.txt is cut off" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_a_transform_that_the_disk_does_not_take_leaves_the_old_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("old.txt").write_text("old")

    def full(transforms: Any, path: str, compression: bool = False) -> None:
        Path(path).write_text("")  # so does ITK on a full disk, and says nothing

    monkeypatch.setattr(itk_bridge.itk, "transformwrite", full)
    assert vxm("convert 0GenericAffine.mat old.txt --overwrite") == 2
    assert "old.txt cannot be written: is the disk full?" in capsys.readouterr().err
    assert Path("old.txt").read_text() == "old"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["invert", "compose"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output old.h5", "old.h5 "),
        ("--output nowhere/x.h5", "nowhere/x.h5 "),
        ("--output x.xyz", "x.xyz "),
        ("--output x.nii.gz --reference missing.nii.gz", "missing.nii.gz "),
    ],
)
def test_where_nothing_can_be_written_nothing_is_inverted(
    command: str, words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("old.h5").write_text("old")
    monkeypatch.setattr(transform_files, "read_transform", None)  # is not reached
    assert vxm(f"{command} {' '.join(PAIR)} {words}") == 2
    assert message in capsys.readouterr().err


def test_the_beginning_of_names_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vxm("convert 0GenericAffine.mat folder/ --to ants")
    assert "'folder/' is a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_an_inverse_says_by_how_much_it_misses(capsys: pytest.CaptureFixture[str]) -> None:
    assert vxm("invert 0GenericAffine.mat --output back.txt") == 0
    assert capsys.readouterr().out == ""
    assert sitk.ReadTransform("back.txt").GetName() == "AffineTransform"
    assert vxm(f"invert {' '.join(PAIR)} --output back.h5") == 0
    inverse, residual = invert_transform(read_chain(PAIR).transform)
    assert capsys.readouterr().out == f"inverted numerically, with an error of at most {residual:.2g} mm\n"
    np.testing.assert_allclose(map_points(read_transform("back.h5"), inner()), map_points(inverse, inner()), atol=POINT)


# points

SLICER = """# Markups fiducial file version = 4.11
# CoordinateSystem = {system}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
"""


def csv_file(points: NDArray[Any]) -> str:
    rows = [f'{i},{x!r},{y!r},{z!r},"left, upper"' for i, (x, y, z) in enumerate(points.tolist())]
    return "\n".join(["t,X, y,z,label", *rows]) + "\n"


def fcsv_file(points: NDArray[Any], system: str) -> str:
    rows = [f"n{i},{x},{y},{z},0,0,0,1,1,1,0,F-{i},," for i, (x, y, z) in enumerate(points.tolist())]
    return SLICER.format(system=system) + "\n".join(rows) + "\n"


def json_file(points: NDArray[Any], system: str) -> str:
    placed = [{"id": str(i), "label": f"é-{i}", "position": p} for i, p in enumerate(points.tolist())]
    unplaced = {"id": "u", "label": "later", "position": None, "positionStatus": "undefined"}
    markup = {"type": "Curve", "coordinateSystem": system, "coordinateUnits": "mm", "measurements": [{"value": 7}]}
    return json.dumps({"@schema": "s", "markups": [{**markup, "controlPoints": [*placed, unplaced]}]})


def files(points: NDArray[Any]) -> dict[str, tuple[str, str, str]]:
    """Name, content, options; the points (RAS) in each."""
    lps = points * LPS
    return {
        "CSV RAS": ("p.csv", csv_file(points), "--coordinates RAS"),
        "CSV LPS": ("p.csv", csv_file(lps), "--coordinates LPS"),
        "fcsv LPS": ("p.fcsv", fcsv_file(lps, "LPS"), ""),
        "fcsv 1": ("p.fcsv", fcsv_file(lps, "1"), ""),
        "fcsv RAS": ("p.fcsv", fcsv_file(points, "RAS"), "--coordinates RAS"),
        "fcsv 0": ("p.fcsv", fcsv_file(points, "0"), ""),
        "json LPS": ("p.mrk.json", json_file(lps, "LPS"), ""),
        "json RAS": ("p.mrk.json", json_file(points, "RAS"), ""),
    }


def test_a_row_that_begins_with_a_hash_is_a_point(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('name,x,y,z\n#5,1,2,3\n"two\nlines",4,5,6\n')
    found = read_points(tmp_path / "p.csv", "RAS")
    np.testing.assert_array_equal(found.points, [[1, 2, 3], [4, 5, 6]])
    assert found.text(found.points).splitlines()[1].startswith("#5,1.0")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("kind", files(inner(3)))
@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_points_go_to_the_other_image(kind: str, side: str, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = inner(3), map_points(read_chain(PAIR).transform, inner(3))
    given, goal = (here, there) if side == "fixed" else (there, here)
    name, content, options = files(given)[kind]
    Path(name).write_text(content, encoding="utf-8")
    assert vxm(f"apply {' '.join(PAIR)} --points {name} --points-of {side} {options} --output moved.{name}") == 0
    assert ("inverted numerically" in capsys.readouterr().out) == (side == "moving")
    system = options.split()[-1] if name == "p.csv" else None
    moved = read_points(f"moved.{name}", system)
    np.testing.assert_allclose(moved.points, goal, atol=2e-6)  # six decimals
    text = Path(f"moved.{name}").read_text(encoding="utf-8")
    if name == "p.csv":
        assert text.splitlines()[0] == "t,X, y,z,label"
        assert text.splitlines()[3].endswith(',"left, upper"')
    elif name == "p.fcsv":
        assert text.startswith(content[: content.index("n0")])
        assert text.splitlines()[-1].endswith(",0,0,0,1,1,1,0,F-2,,")
    else:
        markup = json.loads(text)["markups"][0]
        assert [point["label"] for point in markup["controlPoints"]] == ["é-0", "é-1", "é-2", "later"]
        assert "measurements" not in markup


def markups(**changes: Any) -> str:
    document = json.loads(json_file(inner(2), "RAS"))
    document["markups"][0].update(changes)
    return json.dumps(document)


BAD_POINTS = {
    "no file": ("p.csv", None, r"p\.csv does not exist"),
    "unknown ending": ("p.txt", "x,y,z\n1,2,3\n", r"p\.txt .*\.fcsv, \.csv, \.mrk\.json"),
    "no system": ("p.csv", "x,y,z\n1,2,3\n", r"p\.csv .*RAS or LPS.*\(--coordinates\)"),
    "no columns": ("r.csv", "a,b\n1,2\n", r"r\.csv .*x, y and z.* a, b"),
    "empty": ("r.csv", "", r"r\.csv .*x, y and z.* missing"),
    "no points": ("r.csv", "x,y,z\n", r"r\.csv .*no points"),
    "a short row": ("r.csv", "x,y,z\n\n1,2\n", r"r\.csv, line 3, .*\['1', '2'\]"),
    "words": ("r.csv", "x,y,z\n1,2,three\n", r"r\.csv, line 2, .*three"),
    "NaN": ("r.csv", "x,y,z\n1,2,nan\n", r"r\.csv, line 2, .*nan"),
    "an open quote": (
        "r.csv",
        'x,y,z,n\n1,2,3,a\n4,5,6,"b\n7,8,9,c\n',
        r"r\.csv .*line 4 ",
    ),
    "an open quote, long": ("r.csv", 'x,y,z\n"' + "1,2,3\n" * 30_000, r"r\.csv .*field larger than"),
    "an open quote in fcsv": ("p.fcsv", fcsv_file(inner(2), "LPS").replace("F-0", '"F'), r"p\.fcsv .*line "),
    "binary": ("r.csv", b"\xff\xfe\x00x", r"r\.csv .*UTF-8"),
    "a cell without end": ("r.csv", "x" * 200_000, r"r\.csv .*line 1 .*field larger"),
    "another system": ("r.fcsv", fcsv_file(inner(1), "LPS"), r"r\.fcsv .*LPS.*--coordinates RAS"),
    "no CoordinateSystem": (
        "p.fcsv",
        "n,1,2,3\n",
        r"p\.fcsv .*CoordinateSystem.*None",
    ),
    "voxels": ("p.fcsv", fcsv_file(inner(1), "2"), r"p\.fcsv .*CoordinateSystem.* 2"),
    "cut off": ("p.mrk.json", markups()[:90], r"p\.mrk\.json .*3D Slicer"),
    "other JSON": ("p.mrk.json", "[1, 2]", r"p\.mrk\.json .*3D Slicer"),
    "a plane": ("p.mrk.json", markups(type="Plane"), r"p\.mrk\.json .*Plane.*Fiducial, Line"),
    "no system here": ("p.mrk.json", markups(coordinateSystem=None), r"p\.mrk\.json .*coordinateSystem.*'None'"),
    "micrometres": ("p.mrk.json", markups(coordinateUnits="um"), r"p\.mrk\.json .*mm.*\['um'\]"),
    "two numbers": ("p.mrk.json", markups(controlPoints=[{"position": [1, 2]}]), r"p\.mrk\.json, point 1, .*\[1, 2\]"),
    "a number": ("p.mrk.json", markups(controlPoints=[{"position": 7}]), r"p\.mrk\.json, point 1, .* 7"),
    "a text": ("p.mrk.json", markups(controlPoints=[{"position": "123"}]), r"p\.mrk\.json, point 1, .* 123"),
    "two systems": ("p.mrk.json", markups(coordinateSystem=["RAS"]), r"p\.mrk\.json .*coordinateSystem.*LPS"),
    "none placed": ("p.mrk.json", markups(controlPoints=[]), r"p\.mrk\.json .*no points"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_POINTS.values(), ids=BAD_POINTS.keys())
def test_bad_points_are_named(name: str, content: Any, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = FileNotFoundError if content is None else ValueError
    with pytest.raises(error, match=message):
        read_points(name, "RAS" if name.startswith("r.") else None)


# what cannot be used


def vector_file(path: str, array: NDArray[Any], intent: int = 1007, affine: NDArray[Any] = OBLIQUE) -> None:
    written = nib.Nifti1Image(array.astype(np.float32), affine)
    written.header.set_intent(intent)
    nib.save(written, path)


def bad_files() -> None:
    """Write transforms that cannot be used, into the working directory."""
    field = np.zeros((5, 6, 7, 1, 3))
    vector_file("scan.nii", field[..., 0, 0])
    vector_file("four.nii", field[..., 0, :])
    vector_file("two.nii", np.zeros((5, 6, 7, 1, 2)))
    vector_file("line.nii", np.zeros((5, 1, 1, 1, 3)))
    vector_file("time.nii", np.zeros((5, 6, 7, 2, 3)))
    vector_file("intent.nii", field, 0)
    vector_file("nan.nii", field + np.nan)
    vector_file("sheared.nii", field, affine=OBLIQUE @ (np.eye(4) + np.diag([0.2, 0, 0], 1)))
    whole = Path("1Warp.nii.gz").read_bytes()
    Path("cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    Path("empty.nii.gz").write_bytes(b"")
    Path("words.nii").write_text("not an image")
    save_chain("both.h5", expected())
    Path("cut.h5").write_bytes(Path("both.h5").read_bytes()[:3000])
    Path("empty.h5").write_bytes(b"")
    Path("words.tfm").write_text("hello\n")
    np.savetxt("fsl.mat", np.eye(4))
    sitk.WriteTransform(sitk.BSplineTransformInitializer(sitk.Image(9, 9, sitk.sitkFloat32), [3, 3]), "spline.tfm")
    for name in ("warp.m3z", "words.lta"):
        Path(name).write_text("hello\n")
    one = "#Insight Transform File V1.0\n#Transform {}\nTransform: AffineTransform_double_3_3\nParameters: {}\n"
    one += "FixedParameters: 0 0 0\n"
    identity = "1 0 0 0 1 0 0 0 1 0 0 0"
    second = one.format(1, identity).split("\n", 1)[1]
    Path("two.tfm").write_text(one.format(0, identity) + second)
    Path("singular.tfm").write_text(one.format(0, "1 0 0 0 1 0 0 0 0 0 0 0"))
    euler = one.format(0, "0 {} 0 0 0 0").replace("Affine", "Euler3D").replace(": 0 0 0\n", ": 0 0 0 {}\n")
    for name, numbers in {"nan.txt": ("nan", 0), "inf.tfm": (0, "1e999"), "word.txt": ("x", 0)}.items():
        Path(name).write_text(euler.format(*numbers))  # ITK itself stops at such a number, and reads past its memory
    Path("few.txt").write_text(euler.format(0, 0).replace("0 0 0 0 0 0", "0 0 0 0 0"))  # ITK might crash on it
    sitk.WriteTransform(sitk.TranslationTransform(3, (0.0, np.nan, 0.0)), "nan.mat")
    field_of_nan = np.zeros((3, 5, 6, 7))
    field_of_nan[1, 2, 3, 4] = np.nan
    save_chain("nan.h5", chain([linear_transform(affine_map()), field_transform(field_of_nan, OBLIQUE)]))
    spline = sitk.BSplineTransformInitializer(sitk.Image(9, 9, 9, sitk.sitkFloat32), [3, 3, 3])
    spline.SetParameters([np.nan, *spline.GetParameters()[1:]])
    sitk.WriteTransform(spline, "nan.hdf5")
    Path("nothing.tfm").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: CompositeTransform_double_3_3\n"
    )


BAD_TRANSFORMS = {
    "absent.h5": "does not exist",
    "fixed.mrk": "does not exist",
    "scan.nii": r"shape \(5, 6, 7\)",
    "four.nii": r"shape \(5, 6, 7, 3\)",
    "two.nii": r"shape \(5, 6, 7, 1, 2\)",
    "line.nii": r"shape \(5, 1, 1, 1, 3\)",
    "time.nii": r"shape \(5, 6, 7, 2, 3\)",
    "intent.nii": "intent is 0.* 1006 .* 1007",
    "nan.nii": "630 numbers.*NaN",
    "sheared.nii": "right angles",
    "cut.nii.gz": "cannot be read",
    "empty.nii.gz": "cannot be read",
    "words.nii": "cannot be read",
    "cut.h5": r"cut\.h5 is damaged",
    "empty.h5": r"empty\.h5 is damaged",
    "words.tfm": "ITK cannot read",
    "fsl.mat": "ITK cannot read.*vxm convert --from fsl",
    "spline.tfm": "BSplineTransform in 2-D",
    "warp.m3z": "FreeSurfer.*mri_warp_convert --inm3z",
    "words.lta": "FreeSurfer",
    "two.tfm": "2 transforms",
    "singular.tfm": "without an inverse",
    "few.txt": "5 parameters of a Euler3DTransform.* 6",
    "nan.txt": "finite numbers: 0 nan 0 0 0 0",
    "inf.tfm": "finite numbers: 0 0 0 1e999",
    "word.txt": "finite numbers: 0 x 0 0 0 0",
    "nan.mat": "NaN or Inf in its TranslationTransform",
    "nan.h5": "NaN or Inf in its DisplacementFieldTransform",
    "nan.hdf5": "NaN or Inf in its BSplineTransform",
    "nothing.tfm": "empty composite",
    "moving.txt.gz": r"\.h5, .*, \.nii\.gz",
}


@pytest.mark.parametrize("name", transform_files._NUM_PARAMETERS)
def test_numbers_of_parameters_are_itk_s(name: str) -> None:
    for dims, number in zip((2, 3), transform_files._NUM_PARAMETERS[name], strict=True):
        kind = getattr(itk, name)
        keys = [key for key in ((itk.D,), (itk.D, dims), (itk.D, dims, dims)) if key in set(kind)]
        made = [kind[key if len(key) > 1 else key[0]].New() for key in keys]
        (found,) = [one.GetNumberOfParameters() for one in made if one.GetInputSpaceDimension() == dims] or [0]
        assert found == number


@pytest.mark.usefixtures("folder")
def test_bad_transforms_are_one_line_each(capfd: pytest.CaptureFixture[str]) -> None:
    bad_files()
    Path("moving.txt.gz").write_bytes(b"x")
    before = sorted(os.listdir())
    capfd.readouterr()
    for name, message in BAD_TRANSFORMS.items():
        assert vxm(f"apply {name} --image moving.nii.gz --reference fixed.nii.gz --output w.nii.gz") == 2, name
        shown = capfd.readouterr().err  # of the libraries too
        assert shown.count("\n") == 1, shown
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_chain([name])
        assert name in shown
    assert sorted(os.listdir()) == before


BAD_COMMANDS = {
    "apply W --image moving.nii.gz --output w.nii.gz": "--reference",
    "apply W --labels labels.nii.gz --reference fixed.nii.gz --output w.nii --points-of fixed": "no --points-of",
    "apply W --points p.csv --coordinates RAS --output o.csv": "--points-of",
    "apply W --points p.csv --points-of fixed --coordinates RAS --output o.fcsv": r"o\.fcsv .*\.csv",
    "apply W --points p.csv --points-of fixed --coordinates RAS --output p.csv --overwrite": r"p\.csv .*input",
    "apply W --image moving.nii.gz --reference fixed.nii.gz --output fixed.nii.gz": r"fixed\.nii\.gz .*input",
    "apply W --image moving.nii.gz --reference fixed.nii.gz --output labels.nii.gz": r"labels\.nii\.gz .*--overwrite",
    "apply W --image moving.nii.gz --reference fixed.nii.gz --output w.png": r"w\.png .*\.nii or \.nii\.gz",
    "apply W --image moving.nii.gz --reference fixed.nii.gz --output no/w.nii": "no/w.nii .*folder",
    "apply W --image moving.nii.gz --reference none.nii.gz --output w.nii": r"none\.nii\.gz ",
    "apply W --labels labels.nii.gz --reference fixed.nii.gz --output w.nii --interpolation bspline": "bspline",
    "compose [W,1] --output 1Warp.nii.gz --overwrite": r"1Warp\.nii\.gz .*input",
    "compose W --output w.mat": r"w\.mat .*not linear.*\.h5",
    "compose W --output w.xfm": r"w\.xfm .*\.h5",
    "compose W --output w.nii --to itk": r"w\.nii .*itk.*\.h5",
    "compose W --output w.h5 --to 1007": r"w\.h5 .*1007.*\.nii",
    "convert 0GenericAffine.mat w.nii.gz": r"grid .*\(--reference\)",
    "convert W w.lta": r"lta .*\(--reference and --moving\)",
    "convert W w.lta --reference fixed.nii.gz --moving moving.nii.gz": r"w\.lta .*not linear",
    "convert W w.mat --to fsl --reference fixed.nii.gz --moving moving.nii.gz": r"w\.mat .*not linear",
    "convert W w.h5 --from fsl --reference fixed.nii.gz": r"FSL .*--reference and --moving",
    "convert W w.h5 --from fsl --reference fixed.nii.gz --moving moving.nii.gz": r"1Warp\.nii\.gz cannot be read",
    "compose W flat.nii --output w.h5": r"1Warp\.nii\.gz in 3-D, flat\.nii in 2-D",
    "apply flat.nii --image moving.nii.gz --reference fixed.nii.gz --output w.nii": r"moving\.nii\.gz .*2-D",
    "jacobian flat.nii --reference fixed.nii.gz --output w.nii": r"fixed\.nii\.gz .*2-D",
    "convert flat.nii w.nii --reference fixed.nii.gz": r"fixed\.nii\.gz .*2-D",
    "compose flat.nii --reference fixed.nii.gz --output w.nii": r"fixed\.nii\.gz .*2-D",
    "invert flat.nii --moving moving.nii.gz --output w.nii": r"moving\.nii\.gz .*2-D",
    "convert flat.nii w.lta": r"w\.lta .*lta .*2-D",
    "convert W 0 --to ants": r"01Warp\.nii\.gz .*--overwrite",
    "jacobian fold.nii --reference fixed.nii.gz --output j.nii --log": r"folds in \d+ of 6555 voxels",
    "invert fold.nii --output back.h5": r"folds in \d+ of 6555 voxels",
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("words", "message"), BAD_COMMANDS.items())
def test_bad_commands_are_one_line_and_write_nothing(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.csv").write_text("x,y,z\n1,2,3\n")
    fold = np.zeros((3, *FIXED))
    fold[0, 8:11] = [[[4.0]], [[0.0]], [[-4.0]]]
    save_displacement("fold.nii", fold, OBLIQUE)
    vector_file("flat.nii", np.zeros((5, 6, 1, 1, 2)), affine=np.eye(4))
    Path("01Warp.nii.gz").touch()
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    assert vxm(words.replace("W", "1Warp.nii.gz", 1)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"vxm {words.split()[0]}: ")
    assert shown.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(shown)
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before


@pytest.mark.usefixtures("folder")
def test_overwriting_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    words = "convert 0GenericAffine.mat out.txt"
    assert [vxm(words), vxm(words), vxm(f"{words} --overwrite")] == [0, 2, 0]
    assert "out.txt " in capsys.readouterr().err


# peers


@pytest.fixture
def ants() -> Any:
    return pytest.importorskip("ants", reason="antspyx is not installed")  # it has wheels for some systems alone


def same_as_ants(ants: Any, names: list[str]) -> None:
    """Whether ANTs takes points and the moving image where we do, by transforms from the fixed to the moving image."""
    transform = read_chain(names).transform
    points = pd.DataFrame(inner() * LPS, columns=list("xyz"))
    moved = ants.apply_transforms_to_points(3, points, names)[["x", "y", "z"]].to_numpy() * LPS
    np.testing.assert_allclose(map_points(transform, inner()), moved, atol=1e-4)  # mm: ANTs reads and counts in float32
    fixed, moving = ants.image_read("fixed.nii.gz"), ants.image_read("moving.nii.gz")
    expected_image = ants.apply_transforms(fixed, moving, names).numpy()
    assert np.ptp(expected_image) > 10
    resampled = resample_image(Scan.read("moving.nii.gz"), transform, Scan.read("fixed.nii.gz").grid)
    assert (np.abs(resampled - expected_image) > 0.05).mean() < 1e-3  # those at the edge of the moving image


@pytest.mark.usefixtures("folder")
def test_ants_applies_our_files_as_we_do(ants: Any) -> None:
    same_as_ants(ants, PAIR)
    ours = SpatialMap(np.eye(4), affine_map(), Displacement(fade(smooth(FIXED, 1)).astype(np.float32), OBLIQUE))
    ours.save("forward.h5")
    same_as_ants(ants, ["forward.h5"])


@pytest.mark.usefixtures("folder")
def test_we_apply_ants_own_files_as_ants_does(ants: Any) -> None:
    fixed, moving = ants.image_read("fixed.nii.gz"), ants.image_read("moving.nii.gz")
    options = {"aff_iterations": (5,), "aff_shrink_factors": (1,), "aff_smoothing_sigmas": (1,), "random_seed": 1}
    found = ants.registration(fixed, moving, "SyN", outprefix="ants_", reg_iterations=(4,), **options)["fwdtransforms"]
    assert [Path(name).name for name in found] == ["ants_1Warp.nii.gz", "ants_0GenericAffine.mat"]
    assert np.abs(read_displacement("ants_1Warp.nii.gz")[0]).max() > 0.2  # voxels
    same_as_ants(ants, found)


@pytest.mark.usefixtures("folder")
def test_nitransforms_reads_our_displacement() -> None:
    field = nonlinear.load("1Warp.nii.gz", fmt="itk")
    index = np.random.default_rng(2).integers(5, np.array(FIXED) - 5, (50, 3))  # on voxels: between them it is cubic
    points = index @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]
    np.testing.assert_allclose(field.map(points), map_points(read_transform("1Warp.nii.gz"), points), atol=1e-3)


def test_a_real_scan_is_resampled_as_by_simpleitk(malf: Path, tmp_path: Path) -> None:
    moving, fixed = (malf / f"{number}_t1.nii.gz" for number in (1000, 1001))
    field = smooth((20, 24, 18), 3, 1.5)
    affine = nib.load(fixed).affine @ np.diag([8.0, 8.5, 9, 1])
    SpatialMap(np.eye(4), affine_map(), Displacement(fade(field).astype(np.float32), affine)).save(
        tmp_path / "forward.h5"
    )
    words = f"apply {tmp_path}/forward.h5 --image {moving} --reference {fixed} --output {tmp_path}/w.nii.gz"
    assert vxm(words) == 0
    images = [sitk.ReadImage(str(path), sitk.sitkFloat32) for path in (moving, fixed)]
    peer = sitk.Resample(*images, sitk.ReadTransform(str(tmp_path / "forward.h5")), sitk.sitkLinear, 0.0)
    off = np.abs(nib.load(tmp_path / "w.nii.gz").get_fdata() - sitk.GetArrayFromImage(peer).T)
    assert off.max() < 0.5  # of intensities up to 4000, with slopes of 1000 a voxel
