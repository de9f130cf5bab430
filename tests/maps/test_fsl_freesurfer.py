"""Transforms of FSL and FreeSurfer, against their formulas and libraries that read them by themselves."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fields import FIXED, MOVING, OBLIQUE, affine_map, fade, grid, image, inner, smooth
from fsl.data.image import Nifti
from fsl.transform import fnirt, nonlinear
from nibabel.affines import voxel_sizes
from nitransforms import linear
from numpy.typing import NDArray

from voxelmorph_monai import cli
from voxelmorph_monai.affines import Affine
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.maps.chains import chain, field_transform, map_points
from voxelmorph_monai.maps.displacements import save_displacement
from voxelmorph_monai.maps.files import read_transform
from voxelmorph_monai.space.itk_bridge import linear_transform, save_transform

POINT = 1e-4  # mm: a chain of headers, displacements and matrices of which each is kept in float32
BOTH = "--reference fixed.nii.gz --moving moving.nii.gz"
RAS = grid(MOVING, np.eye(3), (1.8, 2.5, 1.4), (-8, 15, 30))  # its determinant is > 0, so that FSL turns an axis
GRIDS = {"fixed": (FIXED, OBLIQUE), "moving": (MOVING, RAS)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (size, affine) in GRIDS.items():
        save_image(f"{name}.nii.gz", image(size), affine)
    save_transform("affine.txt", linear_transform(affine_map()))


def vxm(words: str) -> int:
    return cli.main(words.split())


def to_fsl(name: str) -> Affine:
    """From RAS to FSL's coordinates of an image: scaled voxels, the first axis turned where the determinant is > 0."""
    size, affine = GRIDS[name]
    scale = np.diag([*voxel_sizes(affine), 1.0])
    if np.linalg.det(affine[:3, :3]) > 0:
        scale[0] = [-scale[0, 0], 0, 0, (size[0] - 1) * scale[0, 0]]
    return scale @ np.linalg.inv(affine)


def move(matrix: Affine, points: NDArray[Any]) -> NDArray[Any]:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def test_a_flirt_matrix_is_its_formula_and_that_of_nitransforms() -> None:
    assert vxm(f"convert affine.txt flirt.mat --to fsl {BOTH}") == 0
    written = np.loadtxt("flirt.mat")  # from the moving image's coordinates to those of the fixed one
    np.testing.assert_allclose(
        np.linalg.inv(to_fsl("moving")) @ np.linalg.inv(written) @ to_fsl("fixed"), affine_map(), atol=POINT
    )
    peer = linear.load("flirt.mat", fmt="fsl", reference="fixed.nii.gz", moving="moving.nii.gz")
    np.testing.assert_allclose(peer.map(inner()), move(affine_map(), inner()), atol=POINT)
    assert vxm(f"convert flirt.mat back.txt --from fsl {BOTH}") == 0
    np.testing.assert_allclose(map_points(read_transform("back.txt"), inner()), move(affine_map(), inner()), atol=POINT)


def bent() -> Any:
    return chain([field_transform(fade(smooth(FIXED, 1)), OBLIQUE), linear_transform(affine_map())])


def voxels() -> tuple[NDArray[Any], NDArray[Any]]:
    """Voxels of the fixed grid, between which a warp on that grid is linear, and their places (RAS, mm)."""
    index = np.random.default_rng(2).integers(0, FIXED, (50, 3))
    return index, move(OBLIQUE, index)


def test_a_fnirt_warp_is_its_formula_and_comes_back() -> None:
    index, places = voxels()
    expected = map_points(bent(), places)
    save_displacement("warp.nii.gz", fade(smooth(FIXED, 1)), OBLIQUE)
    assert vxm("compose warp.nii.gz affine.txt --output both.h5") == 0
    assert vxm(f"convert both.h5 fnirt.nii.gz --to fsl {BOTH}") == 0
    found = nib.load("fnirt.nii.gz")
    assert (found.shape, int(found.header["intent_code"])) == ((*FIXED, 3), 2006)  # FSL_FNIRT_DISPLACEMENT_FIELD
    there = move(to_fsl("fixed"), places) + found.get_fdata()[tuple(index.T)]
    np.testing.assert_allclose(move(np.linalg.inv(to_fsl("moving")), there), expected, atol=POINT)
    assert vxm(f"convert fnirt.nii.gz back.nii.gz --from fsl {BOTH}") == 0
    np.testing.assert_allclose(map_points(read_transform("back.nii.gz"), places), expected, atol=POINT)


def test_absolute_warps_are_told_by_their_spread() -> None:
    _, places = voxels()
    expected = map_points(bent(), places)
    everywhere = np.moveaxis(np.indices(FIXED), 0, -1).reshape(-1, 3)
    there = move(to_fsl("fixed"), map_points(bent(), move(OBLIQUE, everywhere)))  # between images with one grid
    written = nib.Nifti1Image(there.reshape(*FIXED, 3).astype(np.float32), OBLIQUE)
    written.header.set_intent(2006)
    nib.save(written, "absolute.nii.gz")
    both = "--reference fixed.nii.gz --moving fixed.nii.gz"
    assert vxm(f"convert absolute.nii.gz back.nii.gz --from fsl {both}") == 0
    np.testing.assert_allclose(map_points(read_transform("back.nii.gz"), places), expected, atol=POINT)


def test_a_linear_map_may_become_a_warp() -> None:
    _, places = voxels()
    assert vxm(f"convert affine.txt linear.nii.gz --to fsl {BOTH}") == 0
    assert vxm(f"convert linear.nii.gz back.nii.gz --from fsl {BOTH}") == 0
    np.testing.assert_allclose(
        map_points(read_transform("back.nii.gz"), places), move(affine_map(), places), atol=POINT
    )


def test_a_file_of_coefficients_is_what_fslpy_makes_of_it() -> None:
    knots = (4, 5, 3)  # voxels between them
    coefficients = np.random.default_rng(6).normal(
        size=(*(-(-n // k) + 3 for n, k in zip(FIXED, knots, strict=True)), 3)
    )
    written = nib.Nifti1Image(coefficients.astype(np.float32), None)
    start = to_fsl("fixed") @ np.linalg.inv(affine_map()) @ np.linalg.inv(to_fsl("moving"))  # FLIRT's matrix
    qform = np.diag([*knots, 1.0])
    qform[:3, 3] = FIXED
    written.set_sform(start, 1)
    written.set_qform(qform, 1)
    written.header.set_zooms((*knots, 1))
    written.header["intent_code"] = 2007  # cubic B-splines; the parameters are sides of the fixed image's voxels
    for i, side in enumerate(voxel_sizes(OBLIQUE), 1):
        written.header[f"intent_p{i}"] = side
    nib.save(written, "coefficients.nii.gz")
    assert vxm(f"convert coefficients.nii.gz back.nii.gz --from fsl {BOTH}") == 0
    fixed, moving = Nifti(nib.load("fixed.nii.gz").header), Nifti(nib.load("moving.nii.gz").header)
    peer = fnirt.readFnirt("coefficients.nii.gz", moving, fixed)
    assert isinstance(peer, nonlinear.CoefficientField)
    _, places = voxels()
    expected = peer.transform(places, "world", "world")
    np.testing.assert_allclose(map_points(read_transform("back.nii.gz"), places), expected, atol=POINT)
    assert np.linalg.norm(expected - move(affine_map(), places), axis=1).max() > 0.5  # it bends


def test_an_lta_leads_from_src_to_dst() -> None:
    assert vxm(f"convert affine.txt reg.lta {BOTH}") == 0
    np.testing.assert_allclose(map_points(read_transform("reg.lta"), inner()), move(affine_map(), inner()), atol=POINT)
    np.testing.assert_allclose(linear.load("reg.lta", fmt="fs").map(inner()), move(affine_map(), inner()), atol=POINT)
    lines = Path("reg.lta").read_text(encoding="utf-8").splitlines()
    at = {role: lines.index(f"{role} volume info") for role in ("src", "dst")}
    for role, (size, affine) in (("src", GRIDS["moving"]), ("dst", GRIDS["fixed"])):
        assert lines[at[role] + 3].split("=")[1].split() == [str(n) for n in size]
        centre = np.array(lines[at[role] + 8].split("=")[1].split(), float)  # of FreeSurfer: voxel n / 2
        np.testing.assert_allclose(centre, move(affine, np.array(size) / 2), atol=POINT)
    matrix = np.array([line.split() for line in lines[6:10]], float)  # from src to dst, as the image goes
    np.testing.assert_allclose(matrix, np.linalg.inv(affine_map()), atol=POINT)


def lta(kind: int, matrix: Affine, size: tuple[int, ...] = (21, 17, 25)) -> str:
    """Text of an LTA as FreeSurfer writes it, between two volumes of 1 mm along the axes of RAS."""
    geometry = (
        "valid = 1  # volume info valid\nfilename = a.mgz\nvolume = {} {} {}\n"
        "voxelsize = 1.0 1.0 1.0\nxras   = 1.0 0.0 0.0\nyras   = 0.0 1.0 0.0\nzras   = 0.0 0.0 1.0\n"
        "cras   = 5.0 6.0 7.0\n"
    ).format(*size)
    rows = "".join(" ".join(f"{number:.15e}" for number in row) + " \n" for row in matrix)
    return (
        f"# transform file\ntype      = {kind} # what it is\nnxforms   = 1\nmean      = 0.0 0.0 0.0\nsigma     = 1.0\n"
        f"1 4 4\n{rows}src volume info\n{geometry}dst volume info\n{geometry}subject a\nfscale 0.1\n"
    )


def test_an_lta_between_voxels_counts_from_freesurfer_s_centre() -> None:
    Path("vox.lta").write_text(lta(0, affine_map()), encoding="utf-8")
    origin = np.eye(4)
    origin[:3, 3] = np.array([5.0, 6, 7]) - np.array([21, 17, 25]) / 2
    expected = np.linalg.inv(origin @ affine_map() @ np.linalg.inv(origin))
    np.testing.assert_allclose(map_points(read_transform("vox.lta"), inner()), move(expected, inner()), atol=POINT)


def test_surfa_reads_our_files() -> None:
    surfa = pytest.importorskip("surfa", reason="surfa is not installed")
    assert vxm(f"convert affine.txt reg.lta {BOTH}") == 0
    back = surfa.load_affine("reg.lta").convert(space="world").matrix  # the way of the image
    np.testing.assert_allclose(back, np.linalg.inv(affine_map()), atol=POINT)
    save_displacement("ras.nii.gz", fade(smooth(FIXED, 1)), OBLIQUE, intent=1006)
    warp = surfa.load_warp("ras.nii.gz")
    assert warp.format == surfa.Warp.Format.disp_ras
    np.testing.assert_allclose(np.asarray(warp.geom.vox2world.matrix), OBLIQUE, atol=POINT)
    index, places = voxels()
    moved = map_points(read_transform("ras.nii.gz"), places)
    np.testing.assert_allclose(places + np.asarray(warp.framed_data)[tuple(index.T)], moved, atol=POINT)


BAD = {
    "absent.mat": "absent.mat does not exist",
    "words.mat": "words.mat .*FLIRT.* 4 x 4 numbers.*hello",
    "short.mat": r"short.mat .*FLIRT.* 4 x 4 numbers.*\[\[1.0, 0.0, 0.0\]",
    "singular.mat": "singular.mat .*FLIRT.* inverse",
    "scan.nii.gz": "scan.nii.gz cannot be read: Cannot determine type of nonlinear warp field",
    "other.nii.gz": r"other.nii.gz .*\(5, 6, 7\).* \(19, 23, 15\)",
    "nan.nii.gz": "nan.nii.gz .*19665.*NaN",
}


@pytest.mark.parametrize(("name", "message"), BAD.items())
def test_bad_files_of_fsl_are_one_line_each(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("words.mat").write_text("hello\n")
    np.savetxt("short.mat", np.eye(3))
    np.savetxt("singular.mat", np.diag([1.0, 1, 0, 1]))
    save_image("scan.nii.gz", image(FIXED), OBLIQUE)
    for path, size, value in (("other.nii.gz", (5, 6, 7), 0), ("nan.nii.gz", FIXED, np.nan)):
        written = nib.Nifti1Image(np.full((*size, 3), value, np.float32), OBLIQUE)
        written.header.set_intent(2006)
        nib.save(written, path)
    before = sorted(Path().iterdir())
    assert vxm(f"convert {name} out.h5 --from fsl {BOTH}") == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(shown)
    assert sorted(Path().iterdir()) == before


BAD_LTA = {
    "words": ".*FreeSurfer",
    "half": ".*FreeSurfer",
    "register.dat": ".*type 14",
    "singular": ".*FreeSurfer.*Singular matrix",
}


@pytest.mark.parametrize(("name", "message"), BAD_LTA.items())
def test_bad_ltas_are_named(name: str, message: str) -> None:
    whole = lta(1, affine_map())
    text = {
        "words": "hello\n",
        "half": whole[: len(whole) // 2],
        "register.dat": lta(14, affine_map()),
        "singular": lta(1, np.diag([1.0, 1, 0, 1])),
    }[name]
    Path("bad.lta").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"bad\.lta {message}"):
        read_transform("bad.lta")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsl.transform.flirt", None)
    assert vxm(f"convert affine.txt flirt.mat --to fsl {BOTH}") == 2
    assert "need fslpy and nitransforms: pip install 'voxelmorph_monai[transforms]'" in capsys.readouterr().err
