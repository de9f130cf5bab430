"""Surfaces of every format, on oblique grids, against nibabel, NumPy and the files of points."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fields import FIXED, MIRRORED, MOVING, OBLIQUE, affine_map, fade, grid, image, inner, smooth
from nibabel.freesurfer.io import read_geometry, write_geometry
from numpy.typing import NDArray
from scipy.spatial import ConvexHull

from voxelmorph_monai import cli
from voxelmorph_monai.affines import ImageGrid
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.maps.displacements import save_displacement
from voxelmorph_monai.maps.surfaces import read_surface, save_surface, tkr_affine
from voxelmorph_monai.space.itk_bridge import linear_transform, save_transform

pytest.importorskip("vtkmodules")
from vtkmodules import vtkCommonCore, vtkCommonDataModel, vtkIOGeometry, vtkIOLegacy, vtkIOPLY, vtkIOXML
from vtkmodules.util import numpy_support

Array = NDArray[Any]
FLOAT32 = 1e-5  # mm: coordinates of 60 mm in float32
WRITERS = {
    ".vtk": (vtkIOLegacy.vtkPolyDataReader, vtkIOLegacy.vtkPolyDataWriter),
    ".vtp": (vtkIOXML.vtkXMLPolyDataReader, vtkIOXML.vtkXMLPolyDataWriter),
    ".stl": (vtkIOGeometry.vtkSTLReader, vtkIOGeometry.vtkSTLWriter),
    ".ply": (vtkIOPLY.vtkPLYReader, vtkIOPLY.vtkPLYWriter),
}


def ball() -> tuple[Array, Array]:
    """Vertices of a closed surface within the fixed grid, and its triangles, whose normals point outwards."""
    rng = np.random.default_rng(4)
    normals = rng.standard_normal((60, 3))
    points = 7 * normals / np.linalg.norm(normals, axis=1)[:, None] + inner().mean(0)
    triangles = ConvexHull(points).simplices
    sides = points[triangles]
    normal = np.cross(sides[:, 1] - sides[:, 0], sides[:, 2] - sides[:, 0])
    inward = np.einsum("ij,ij->i", normal, sides.mean(1) - points.mean(0)) < 0
    triangles[inward] = triangles[inward][:, ::-1]
    return points, triangles


def signed_volume(points: Array, triangles: Array) -> float:
    a, b, c = points[triangles].transpose(1, 0, 2)
    return float(np.einsum("ij,ij->i", a - points.mean(0), np.cross(b - points.mean(0), c - points.mean(0))).sum() / 6)


def gifti(points: Array, triangles: Array, space: str = "NIFTI_XFORM_SCANNER_ANAT", **kinds: Any) -> nib.GiftiImage:
    system = nib.gifti.GiftiCoordSystem(space, "NIFTI_XFORM_TALAIRACH", np.eye(4))
    arrays = [
        nib.gifti.GiftiDataArray(points.astype("f4"), "NIFTI_INTENT_POINTSET", coordsys=system, **kinds),
        nib.gifti.GiftiDataArray(triangles.astype("i4"), "NIFTI_INTENT_TRIANGLE", **kinds),
        nib.gifti.GiftiDataArray(np.arange(len(points), dtype="f4"), "NIFTI_INTENT_SHAPE", **kinds),
    ]
    return nib.GiftiImage(darrays=arrays, meta=nib.gifti.GiftiMetaData({"Name": "ball"}))


def write_mesh(path: Path, points: Array, triangles: Array, header: str = "") -> None:
    mesh, cells, places = (
        vtkCommonDataModel.vtkPolyData(),
        vtkCommonDataModel.vtkCellArray(),
        vtkCommonCore.vtkPoints(),
    )
    places.SetData(numpy_support.numpy_to_vtk(points.astype("f4"), deep=True))
    for corners in triangles.tolist():
        cells.InsertNextCell(3, corners)
    mesh.SetPoints(places)
    mesh.SetPolys(cells)
    scalars = numpy_support.numpy_to_vtk(np.arange(len(points), dtype="f4"), deep=True)
    scalars.SetName("thickness")
    mesh.GetPointData().AddArray(scalars)
    writer = WRITERS[path.suffix][1]()
    writer.SetFileName(str(path))
    writer.SetInputData(mesh)
    if header and path.suffix == ".ply":
        writer.AddComment(header)
    elif header:
        writer.SetHeader(header)
    writer.Write()


def read_mesh(path: Path) -> tuple[Array, Array, Any]:
    reader = WRITERS[path.suffix][0]()
    reader.SetFileName(str(path))
    reader.Update()
    mesh = reader.GetOutput()
    cells = numpy_support.vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).reshape(-1, 3)
    return numpy_support.vtk_to_numpy(mesh.GetPoints().GetData()), cells, reader


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_image("moving.nii.gz", image(), MIRRORED)
    save_image("fixed.nii.gz", image(FIXED), OBLIQUE)
    save_displacement("1Warp.nii.gz", fade(smooth(FIXED, 1)), OBLIQUE)
    save_transform("0GenericAffine.mat", linear_transform(affine_map()))
    return tmp_path


def vxm(words: str) -> int:
    return cli.main(words.split())


def footer(size: Any, affine: Array) -> dict[str, Any]:
    """As FreeSurfer writes it."""
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    axes = (affine[:3, :3] / sides).T
    return {
        "head": np.array([2, 0, 20], np.int32),
        "valid": "1  # volume info valid",
        "filename": "../mri/filled.mgz",
        "volume": np.array(size),
        "voxelsize": sides,
        **dict(zip(("xras", "yras", "zras"), axes, strict=True)),
        "cras": affine[:3, :3] @ (np.array(size) / 2) + affine[:3, 3],
    }


def test_tkr_is_nibabel_s() -> None:
    for size, affine in ((FIXED, OBLIQUE), (MOVING, MIRRORED)):
        peer = nib.MGHImage(np.zeros(size, np.float32), affine).header
        to_scanner = affine @ np.linalg.inv(peer.get_vox2ras_tkr())
        np.testing.assert_allclose(tkr_affine(ImageGrid(size, affine)), to_scanner, atol=1e-4)  # header: float32


def points_by_csv(side: str) -> Array:
    np.savetxt("points.csv", ball()[0], delimiter=",", header="x,y,z", comments="", fmt="%.9f")
    transforms = "1Warp.nii.gz 0GenericAffine.mat"
    command = f"apply {transforms} --points points.csv --coordinates RAS --points-of {side} --output moved.csv"
    assert vxm(f"{command} --overwrite") == 0
    return np.loadtxt("moved.csv", delimiter=",", skiprows=1)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("side", ["fixed", "moving"])
@pytest.mark.parametrize("name", ["ball.gii", "ball.vtk", "ball.vtp", "ball.stl", "ball.ply", "lh.white"])
def test_surfaces_go_where_points_go(name: str, side: str) -> None:
    expected = points_by_csv(side)
    points, triangles = ball()
    path, flip = Path(name), np.array([-1, -1, 1])
    reference = {"fixed": "moving", "moving": "fixed"}[side]
    size, affine = {"fixed": (FIXED, OBLIQUE), "moving": (MOVING, MIRRORED)}[reference]
    if name == "lh.white":  # made from the image of the side, in whose tkr frame it lies
        own = ImageGrid(*{"fixed": (FIXED, OBLIQUE), "moving": (MOVING, MIRRORED)}[side])
        back = np.linalg.inv(tkr_affine(own))
        write_geometry(name, points @ back[:3, :3].T + back[:3, 3], triangles, volume_info=footer(*own))
    elif name == "ball.gii":
        nib.save(gifti(points, triangles), name)
    else:
        write_mesh(path, points * flip, triangles)
    command = f"apply 1Warp.nii.gz 0GenericAffine.mat --surface {name} --points-of {side} --output out{path.suffix}"
    out = Path(f"out{path.suffix}")
    assert vxm(f"{command} --reference {reference}.nii.gz") == 0
    if name == "lh.white":
        found, _, info = read_geometry(out, read_metadata=True)
        there = tkr_affine(ImageGrid(size, affine))
        found = found @ there[:3, :3].T + there[:3, 3]
        np.testing.assert_allclose(info["cras"], footer(size, affine)["cras"], atol=1e-3)
        np.testing.assert_array_equal(info["volume"], size)
        assert info["filename"] == "../mri/filled.mgz"
    elif name == "ball.gii":
        found = nib.load(out).darrays[0].data
    else:
        found = read_mesh(out)[0] * flip
    if name == "ball.stl":  # which numbers vertices anew
        found, expected = (array[np.lexsort(array.round(2).T)] for array in (found, expected))
    np.testing.assert_allclose(found, expected, atol=2e-3)  # two searches may miss by 1e-3 mm each


@pytest.mark.parametrize("real", [False, True])
def test_the_identity_keeps_a_freesurfer_surface(real: bool, tmp_path: Path) -> None:
    points, triangles = ball()
    write_geometry(tmp_path / "lh.pial", points, triangles, volume_info=footer(FIXED, OBLIQUE))
    content = (tmp_path / "lh.pial").read_bytes()
    marks = np.array([2, real, 20], ">i4").tobytes()  # nibabel writes no "real RAS" itself
    content = content.replace(np.array([2, 0, 20], ">i4").tobytes(), marks)
    (tmp_path / "lh.pial").write_bytes(content)
    surface = read_surface(tmp_path / "lh.pial")
    assert surface.frame == ("RAS" if real else "tkr")
    save_surface(tmp_path / "out.pial", surface, surface.points, ImageGrid(FIXED, OBLIQUE), False)
    found, cells = read_geometry(tmp_path / "out.pial")
    np.testing.assert_allclose(found, points, atol=1e-4)
    np.testing.assert_array_equal(cells, triangles)
    again = (tmp_path / "out.pial").read_bytes()
    assert again[again.index(marks) :] == content[content.index(marks) :]  # the footer, letter by letter


def test_a_freesurfer_surface_without_footer_asks_for_its_volume(tmp_path: Path) -> None:
    points, triangles = ball()
    write_geometry(tmp_path / "lh.white", points, triangles)
    with pytest.raises(ValueError, match=r"lh\.white .*--volume"):
        read_surface(tmp_path / "lh.white")
    surface = read_surface(tmp_path / "lh.white", volume=ImageGrid(FIXED, OBLIQUE))
    there = tkr_affine(ImageGrid(FIXED, OBLIQUE))
    np.testing.assert_allclose(surface.points, points @ there[:3, :3].T + there[:3, 3], atol=FLOAT32)
    with pytest.raises(ValueError, match="--reference"):
        save_surface(tmp_path / "lh.out", surface, surface.points, None, False)
    assert not (tmp_path / "lh.out").exists()


def test_gifti_says_one_space(tmp_path: Path) -> None:
    """Already in scanner space, whatever other matrices and FreeSurfer's metadata say."""
    points, triangles = ball()
    stale = gifti(points, triangles)
    stale.darrays[0].meta["VolGeomC_R"] = "50.0"
    stale.darrays[0].meta["AnatomicalStructurePrimary"] = "CortexLeft"
    nib.save(stale, tmp_path / "a.gii")
    text = (tmp_path / "a.gii").read_text()
    at = text.index("<CoordinateSystemTransformMatrix>")
    end = text.index("</CoordinateSystemTransformMatrix>") + len("</CoordinateSystemTransformMatrix>")
    second = text[at:end].replace("SCANNER_ANAT", "UNKNOWN")
    (tmp_path / "a.gii").write_text(text[:end] + second + text[end:])
    surface = read_surface(tmp_path / "a.gii")
    np.testing.assert_allclose(surface.points, points, atol=FLOAT32)
    save_surface(tmp_path / "b.gii", surface, surface.points, None, False)
    found = nib.load(tmp_path / "b.gii")
    np.testing.assert_array_equal(found.darrays[0].data, points.astype("f4"))
    text = (tmp_path / "b.gii").read_text().split("</DataArray>")[0]  # of the vertices
    assert text.count("<CoordinateSystemTransformMatrix>") == 1
    assert "VolGeom" not in text
    assert found.darrays[0].meta["AnatomicalStructurePrimary"] == "CortexLeft"
    assert found.meta["Name"] == "ball"
    np.testing.assert_array_equal(found.darrays[2].data, np.arange(60))


def test_a_gifti_that_may_be_in_tkr_is_asked_about(tmp_path: Path) -> None:
    points, triangles = ball()
    made = gifti(points, triangles, "NIFTI_XFORM_UNKNOWN")
    info = footer(FIXED, OBLIQUE)
    axes = {"X": info["xras"], "Y": info["yras"], "Z": info["zras"], "C": info["cras"]}
    for name, values in axes.items():
        for axis, number in zip("RAS", values, strict=True):
            made.darrays[0].meta[f"VolGeom{name}_{axis}"] = f"{number:.9f}"
    nib.save(made, tmp_path / "lh.gii")
    with pytest.raises(ValueError, match=r"lh\.gii .*--coordinates"):
        read_surface(tmp_path / "lh.gii")
    there = tkr_affine(ImageGrid(FIXED, OBLIQUE))
    tkr = read_surface(tmp_path / "lh.gii", "tkr").points
    np.testing.assert_allclose(tkr, points @ there[:3, :3].T + there[:3, 3], atol=1e-4)
    np.testing.assert_allclose(read_surface(tmp_path / "lh.gii", "RAS").points, points, atol=FLOAT32)


@pytest.mark.parametrize("encoding", ["ASCII", "B64BIN", "B64GZ"])
def test_gifti_is_written_in_types_that_all_read(encoding: str, tmp_path: Path) -> None:
    points, triangles = ball()
    made = gifti(points, triangles, encoding=f"GIFTI_ENCODING_{encoding}")
    made.darrays[0].data, made.darrays[0].datatype = points, 64
    made.darrays[1].data, made.darrays[1].datatype = triangles.astype("i8"), 1024
    made.darrays[1].ind_ord = 2  # column-major
    if encoding == "ASCII":
        made.darrays[1].ind_ord = 1
    (tmp_path / "a.gii").write_bytes(made.to_xml(mode="force"))
    surface = read_surface(tmp_path / "a.gii")
    np.testing.assert_allclose(surface.points, points, atol=FLOAT32)
    save_surface(tmp_path / "b.gii", surface, surface.points, None, False)
    found = nib.load(tmp_path / "b.gii")
    assert [array.data.dtype for array in found.darrays] == ["float32", "int32", "float32"]
    np.testing.assert_array_equal(found.darrays[1].data, triangles)


@pytest.mark.parametrize(
    ("header", "option", "expected"),
    [
        ("x SPACE=LPS", None, (5, 20, 30)),
        ("x SPACE=RAS", None, (15, 20, 30)),
        ("x", None, (5, 20, 30)),
        ("x", "RAS", (15, 20, 30)),
    ],
)
@pytest.mark.parametrize("ending", [".vtk", ".stl", ".ply"])
def test_the_space_of_meshes(header: str, option: str | None, expected: Any, ending: str, tmp_path: Path) -> None:
    """A vertex at (10, 20, 30) of a file, and a map that goes 5 mm to the right."""
    path, out = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    write_mesh(path, np.array([[10.0, 20, 30], [40, 20, 30], [10, 60, 30]]), np.array([[0, 1, 2]]), header)
    surface = read_surface(path, option)
    assert bool(surface.note) is ("SPACE" not in header and option is None)
    save_surface(out, surface, surface.points + np.array([5.0, 0, 0]), None, False)
    found = read_mesh(out)[0]
    np.testing.assert_allclose(found[0], expected, atol=FLOAT32)
    said = f"SPACE={option or ('RAS' if 'RAS' in header else 'LPS')}"
    assert said.encode() in out.read_bytes()[:400]  # in the header
    assert read_surface(out).frame == said[-3:]
    with pytest.raises(ValueError, match=r"b\..*contradicts --coordinates"):
        read_surface(out, "LPS" if said.endswith("RAS") else "RAS")


@pytest.mark.parametrize("name", ["a.gii", "a.vtk", "a.vtp", "a.stl", "a.ply", "lh.white"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_no_surface_is_turned_inside_out(name: str, mirrored: bool, tmp_path: Path) -> None:
    points, triangles = ball()
    path, out = tmp_path / name, tmp_path / f"out_{name}"
    assert signed_volume(points, triangles) > 0
    volume = ImageGrid(FIXED, grid(FIXED, np.diag([-1, 1, 1]) @ np.eye(3), (1, 1, 1), (0, 0, 0)))
    if name == "lh.white":
        write_geometry(path, points, triangles, volume_info=footer(*volume))
    elif name == "a.gii":
        nib.save(gifti(points, triangles), path)
    else:
        write_mesh(path, points, triangles)
    surface = read_surface(path)
    save_surface(out, surface, surface.points * ([-1, 1, 1] if mirrored else [1, 1, 1]), volume, mirrored)
    if name == "lh.white":
        found = read_geometry(out)[:2]
    elif name == "a.gii":
        found = nib.load(out).darrays[0].data, nib.load(out).darrays[1].data
    else:
        found = read_mesh(out)[:2]
    assert signed_volume(*found) == pytest.approx(signed_volume(points, triangles), rel=1e-4)


def test_arrays_of_a_mesh_are_kept(tmp_path: Path) -> None:
    write_mesh(tmp_path / "a.vtk", *ball())
    surface = read_surface(tmp_path / "a.vtk")
    save_surface(tmp_path / "b.vtk", surface, surface.points + 1, None, False)
    array = read_mesh(tmp_path / "b.vtk")[2].GetOutput().GetPointData().GetArray("thickness")
    np.testing.assert_array_equal(numpy_support.vtk_to_numpy(array), np.arange(60))


@pytest.mark.parametrize("name", ["a.gii", "a.vtk", "a.ply", "lh.white"])
def test_what_is_no_surface_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("nothing of the kind")
    with pytest.raises(ValueError, match=name):
        read_surface(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"b\.gii"):
        read_surface(tmp_path / "b.gii")
