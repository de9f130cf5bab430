"""Slices and 2-D images, registered within their planes; the oracle is SimpleITK, in 2-D and in 3-D."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from voxelmorph_monai import cli
from voxelmorph_monai.affines import Affine
from voxelmorph_monai.apps import shipped
from voxelmorph_monai.apps.options import Options
from voxelmorph_monai.apps.register import register
from voxelmorph_monai.apps.register_files import register_files
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.networks import Registration, VoxelMorph
from voxelmorph_monai.report import volume_change
from voxelmorph_monai.space.alignment import register_affine
from voxelmorph_monai.space.scan import Plane, Scan
from voxelmorph_monai.space.template import WorkingGrid

pytestmark = pytest.mark.usefixtures("one_thread")


def turn(degrees: float, scale: float = 1.0, shift: tuple[float, float] = (0, 0)) -> Affine:
    """Map within a plane, 3 x 3."""
    matrix = np.eye(3)
    matrix[:2, :2] = scale * Rotation.from_euler("z", degrees, degrees=True).as_matrix()[:2, :2]
    matrix[:2, 2] = shift
    return matrix


def body(size: tuple[int, int], affine: Affine) -> NDArray[np.float32]:
    """A body without symmetry about the origin of a plane, on the grid of a 3 x 3 affine (mm)."""
    x, y = np.tensordot(affine[:2, :2], np.indices(size), 1) + affine[:2, 2].reshape(2, 1, 1)
    radius = np.sqrt((x / 34) ** 2 + (y / 42) ** 2 + 0.2 * x * y / 1500)
    core = np.sqrt(((x - 12) / 9) ** 2 + ((y + 13) / 15) ** 2)
    spot = np.sqrt(((x + 14) / 7) ** 2 + ((y - 15) / 5) ** 2)
    image = (
        400 / (1 + np.exp(12 * (radius - 0.9)))
        + 400 / (1 + np.exp(6 * (core - 1)))
        + 300 / (1 + np.exp(8 * (spot - 1)))
    )
    return np.where(image > 8, image, 0).astype(np.float32)


def grid(size: tuple[int, int], sides: tuple[float, float]) -> Affine:
    """Affine 3 x 3 of a grid about the origin, its first axis running left."""
    affine = np.diag([-sides[0], sides[1], 1.0])
    affine[:2, 2] = -affine[:2, :2] @ ((np.array(size) - 1) / 2)
    return affine


MOVING, FIXED = ((70, 82), (1.6, 1.5)), ((66, 58), (1.7, 2.1))
POSE = turn(40, 1.1, (36, -48))  # 60 mm


def points(number: int = 50) -> NDArray[Any]:
    return np.concatenate([np.random.default_rng(3).uniform(-30, 30, (number, 2)).T, np.ones((1, number))])


@pytest.mark.parametrize(("transform", "pose"), [("affine", POSE), ("rigid", turn(-100, 1.0, (30, 20)))])
def test_a_known_map_in_2d_is_found_again(transform: str, pose: Affine) -> None:
    moving = body(MOVING[0], grid(*MOVING)), pose @ grid(*MOVING)
    found = register_affine(moving, (body(FIXED[0], grid(*FIXED)), grid(*FIXED)), transform)
    # mm, a quarter of a pixel: the images are samples of one body on two grids
    assert np.linalg.norm(((found - pose) @ points())[:2], axis=0).mean() < 0.5


def tilted(plane: Affine, flat: Affine, across: int) -> Affine:
    """Affine 4 x 4 of a slice that lies in a plane (4 x 4, rigid), its thickness along an axis of the array."""
    affine = np.eye(4)
    affine[:2, :2], affine[:2, 3], affine[2, 2] = flat[:2, :2], flat[:2, 2], 5.0
    order = [axis for axis in range(3) if axis != across]
    return plane @ affine[:, [*np.argsort([*order, across]), 3]]


def rigid(angles: tuple[float, float, float], shift: tuple[float, float, float]) -> Affine:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


def scan(
    which: tuple[tuple[int, int], tuple[float, float]], place: Affine, across: int = 2, name: str = "scan"
) -> Scan:
    """The body as a slice in a plane (4 x 4, rigid)."""
    return Scan(np.expand_dims(body(which[0], grid(*which)), across), tilted(place, grid(*which), across), name)


@pytest.mark.parametrize("across", [0, 1, 2])
@pytest.mark.parametrize("angles", [(0, 0, 0), (20, -15, 10), (90, 5, 0), (0, 85, 30)])
def test_the_coordinates_of_a_plane_do_not_depend_on_the_axes_of_the_array(
    angles: tuple[float, float, float], across: int
) -> None:
    place = rigid(angles, (5, -7, 60))
    expected = Plane.of(scan(FIXED, place))
    assert np.linalg.det(expected.matrix[:3, :3]) == pytest.approx(1)
    image = scan(FIXED, place, across)
    for flipped in (False, True):
        if flipped:
            axis = (across + 1) % 3
            change = np.eye(4)
            change[axis, axis], change[axis, 3] = -1, image.shape[axis] - 1
            image = Scan(np.flip(image.array, axis), image.affine @ change)
        plane = Plane.of(image)
        np.testing.assert_allclose(plane.matrix, expected.matrix, atol=1e-12)
        flat, affine = plane.flatten(image)
        index = np.array([3, 8])
        point = plane.place(affine) @ [*index, 0, 1]
        full = np.insert(index, across, 0)
        np.testing.assert_allclose(point, image.affine @ [*full, 1], atol=1e-9)
        assert flat[tuple(index)] == image.array[tuple(full)]


def test_slices_at_either_side_of_45_degrees_are_described_alike() -> None:
    images = [scan(FIXED, rigid((0, angle, 0), (0, 0, 0))) for angle in (42, 48)]
    first = Plane.of(images[0])
    turned = first.matrix[:3, :3].T @ Plane.of(images[1], first).matrix[:3, :3]
    assert np.degrees(Rotation.from_matrix(turned).magnitude()) == pytest.approx(6, abs=1e-6)


def save_2d(path: Path, array: NDArray[Any], affine: Affine) -> Path:
    lifted = np.eye(4)
    lifted[:2, :2], lifted[:2, 3] = affine[:2, :2], affine[:2, 2]
    nib.save(nib.Nifti1Image(array, lifted), path)
    return path


def network() -> Registration:
    """Untrained, but it bends: by some 4 mm at most."""
    torch.manual_seed(3)
    model = VoxelMorph("diffeomorphic", 2, encoder=(4, 8), decoder=((8,), (8,)))
    torch.nn.init.normal_(model.flow.weight, std=0.15)
    return Registration(model, bidirectional=True, amp=False).eval()


@pytest.fixture
def bend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Register ``moving.nii.gz`` to ``fixed.nii.gz`` of the working directory into ``out``, by the network."""
    monkeypatch.setattr(shipped, "load_network", lambda *_: network())
    monkeypatch.chdir(tmp_path)
    Path("weights.pt").write_bytes(b"never read")
    pair = "moving.nii.gz", "fixed.nii.gz", "out"
    options = Options("weights.pt", refine=False, space="fixed", alignment="none", grid=WorkingGrid((64, 72), 1.5))
    return lambda grid=options.grid, **files: register_files(*pair, options=replace(options, grid=grid), **files)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A moving and a fixed image in 2-D, and labels of both."""
    for name, (size, sides) in (("moving", MOVING), ("fixed", FIXED)):
        image = body(size, grid(size, sides))
        save_2d(tmp_path / f"{name}.nii.gz", image, grid(size, sides))
        save_2d(tmp_path / f"{name}_labels.nii.gz", (image > 450).astype(np.uint8), grid(size, sides))
    return tmp_path


def test_simpleitk_applies_the_transforms_of_2d_images(flat: Path, bend: Any) -> None:
    moving, fixed, out = (flat / name for name in ("moving.nii.gz", "fixed.nii.gz", "out"))
    summary = bend(fixed_labels="fixed_labels.nii.gz")
    assert json.loads((out / "summary.json").read_text()) == summary
    warped, target = sitk.ReadImage(str(out / "warped.nii.gz")), sitk.ReadImage(str(fixed))
    assert warped.GetDimension() == 2
    ours = sitk.GetArrayFromImage(warped)
    straight = sitk.GetArrayFromImage(
        sitk.Resample(sitk.ReadImage(str(moving)), target, sitk.Transform(2, sitk.sitkIdentity))
    )
    assert np.abs(ours - straight).max() > 80  # of 800: there is something to agree on
    field = sitk.ReadImage(str(out / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    for transform in (sitk.ReadTransform(str(out / "forward.h5")), sitk.DisplacementFieldTransform(field)):
        theirs = sitk.GetArrayFromImage(sitk.Resample(sitk.ReadImage(str(moving)), target, transform, sitk.sitkLinear))
        assert np.abs(ours - theirs).max() < 0.1  # 800 over some 5 mm, times the 1e-4 mm of float32 headers and fields
    forward, inverse = (sitk.ReadTransform(str(out / f"{name}.h5")) for name in ("forward", "inverse"))
    misses = [np.linalg.norm(np.subtract(inverse.TransformPoint(forward.TransformPoint(p)), p)) for p in points()[:2].T]
    assert np.mean(misses) < 0.2  # mm, of displacements of 4 mm on pixels of 1.5 mm
    assert summary["inverse_consistency_mm"] < 0.2
    assert 0 < summary["sdlogj"] < 0.5
    assert sitk.ReadImage(str(out / "jacobian.nii.gz")).GetSize() == target.GetSize()
    assert (out / "report.png").stat().st_size > 10_000


def vxm(words: str) -> None:
    assert cli.main(words.split()) == 0


def array(name: str) -> NDArray[Any]:
    return sitk.GetArrayFromImage(sitk.ReadImage(name))


def moved(*names: str) -> NDArray[Any]:
    """Where SimpleITK takes points of the fixed 2-D image along files of transforms, the first of them first."""
    transform = sitk.CompositeTransform([sitk.ReadTransform(name) for name in reversed(names)])
    return np.array([transform.TransformPoint(point) for point in points()[:2].T])


@pytest.mark.usefixtures("flat")
def test_2d_transforms_are_applied_as_by_simpleitk(bend: Any) -> None:
    bend()
    sitk.WriteTransform(sitk.Euler2DTransform((3, -5), 0.2, (4, 6)), "turn.tfm")
    euler = sitk.ReadTransform("turn.tfm")
    peer = sitk.CompositeTransform([euler, sitk.ReadTransform("out/forward.h5")])  # the last one is applied first
    fixed = sitk.ReadImage("fixed.nii.gz")
    # Of 800 over some 5 mm, times the 1e-4 mm of float32 headers and fields; labels just at half a pixel.
    for name, kind, peers, most in (
        ("moving", "image", {"linear": sitk.sitkLinear, "bspline": sitk.sitkBSpline}, 0.1),
        ("moving_labels", "labels", {"nearest": sitk.sitkNearestNeighbor}, 1),
    ):
        for interpolation, theirs in peers.items():
            words = f"--{kind} {name}.nii.gz --reference fixed.nii.gz --interpolation {interpolation} --overwrite"
            vxm(f"apply out/forward.h5 turn.tfm {words} --output pulled.nii.gz")
            expected = sitk.Resample(sitk.ReadImage(f"{name}.nii.gz"), fixed, peer, theirs)
            off = np.abs(array("pulled.nii.gz").astype(float) - sitk.GetArrayFromImage(expected))
            assert off.max() <= most
            assert (off > 0.1).mean() < 1e-3
            assert sitk.ReadImage("pulled.nii.gz").GetDimension() == 2
    vxm("apply out/displacement.nii.gz --image moving.nii.gz --reference fixed.nii.gz --output pulled.nii --overwrite")
    assert np.abs(array("pulled.nii") - array("out/warped.nii.gz")).max() < 0.1
    rows = "".join(f"{x!r},{y!r},5\n" for x, y in points()[:2].T.tolist())
    Path("p.csv").write_text(f"x,y,z\n{rows}")
    vxm("apply out/forward.h5 turn.tfm --points p.csv --coordinates LPS --points-of fixed --output q.csv")
    found = np.loadtxt("q.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(found[:, :2], moved("out/forward.h5", "turn.tfm"), atol=2e-6)  # six decimals
    np.testing.assert_array_equal(found[:, 2], 5)
    vxm("apply out/forward.h5 turn.tfm --points q.csv --coordinates LPS --points-of moving --output r.csv")
    np.testing.assert_allclose(np.loadtxt("r.csv", delimiter=",", skiprows=1)[:, :2], points()[:2].T, atol=1e-4)


@pytest.mark.usefixtures("flat")
def test_2d_transforms_stay_in_2d(bend: Any) -> None:
    bend()
    vxm("compose out/forward.h5 out/affine.txt --output both.h5")
    np.testing.assert_allclose(moved("both.h5"), moved("out/forward.h5", "out/affine.txt"), atol=1e-5)  # mm
    vxm("convert out/affine.txt again.mat")
    np.testing.assert_allclose(moved("again.mat"), moved("out/affine.txt"), atol=1e-9)
    vxm("invert out/forward.h5 --output back.h5")
    # mm, of pixels of 1.5 mm between whose centres the inverse is linear
    assert np.linalg.norm(moved("out/forward.h5", "back.h5") - points()[:2].T, axis=1).max() < 0.2
    vxm("convert out/forward.h5 pair_ --to ants --reference fixed.nii.gz")
    vxm("convert out/forward.h5 1006.nii.gz --to 1006 --reference fixed.nii.gz")
    field = sitk.DisplacementFieldTransform(sitk.ReadImage("pair_1Warp.nii.gz", sitk.sitkVectorFloat64))
    pair = sitk.CompositeTransform([sitk.ReadTransform("pair_0GenericAffine.mat"), field])
    index = np.random.default_rng(5).integers(5, np.array(FIXED[0]) - 5, (30, 2))  # pixels: between them it is linear
    places = [sitk.ReadImage("fixed.nii.gz").TransformIndexToPhysicalPoint(at) for at in index.tolist()]
    expected = [sitk.ReadTransform("out/forward.h5").TransformPoint(place) for place in places]
    np.testing.assert_allclose([pair.TransformPoint(place) for place in places], expected, atol=1e-4)  # mm, float32
    vectors = nib.load("1006.nii.gz").get_fdata()[tuple(index.T)][:, 0, 0]  # along RAS
    np.testing.assert_allclose(places - vectors, expected, atol=1e-4)
    vxm("jacobian out/forward.h5 --reference fixed.nii.gz --output jacobian.nii.gz")
    np.testing.assert_allclose(array("jacobian.nii.gz"), array("out/jacobian.nii.gz"), atol=1e-3)  # float32 transforms


def test_the_commands_take_tilted_slices(bend: Any) -> None:
    for name, (size, sides), place in (
        ("moving", MOVING, rigid((15, 70, 25), (-20, 9, 30))),
        ("fixed", FIXED, rigid((10, 65, 20), (-20, 9, 30))),
    ):
        save_image(f"{name}.nii.gz", body(size, grid(size, sides))[..., None], tilted(place, grid(size, sides), 2))
    bend(grid=WorkingGrid((96, 90), 1.5))
    vxm("apply out/forward.h5 --image moving.nii.gz --reference fixed.nii.gz --output pulled.nii.gz")
    images = [sitk.ReadImage(f"{name}.nii.gz") for name in ("moving", "fixed")]
    peer = sitk.GetArrayFromImage(sitk.Resample(*images, sitk.ReadTransform("out/forward.h5")))
    assert peer.max() > 400
    for expected in (peer, array("out/warped.nii.gz")):
        assert np.abs(array("pulled.nii.gz") - expected).max() < 0.1  # as above
    vxm("jacobian out/displacement.nii.gz --reference fixed.nii.gz --output jacobian.nii.gz")
    np.testing.assert_allclose(array("jacobian.nii.gz"), array("out/jacobian.nii.gz"), atol=1e-3)
    for name in ("forward.h5", "displacement.nii.gz"):  # three parts, and one from plane to plane
        vxm(f"invert out/{name} --output back.h5 --overwrite")
        back, there = sitk.ReadTransform("back.h5"), sitk.ReadTransform("out/forward.h5")
        places = [images[1].TransformContinuousIndexToPhysicalPoint((x, y, 0)) for x, y in ((30.2, 25.7), (20.4, 31.5))]
        again = [back.TransformPoint(there.TransformPoint(place)) for place in places]
        assert np.linalg.norm(np.subtract(again, places), axis=1).max() < 0.3  # mm, as above, of larger pixels


def test_slices_of_two_planes_are_registered_from_plane_to_plane(tmp_path: Path) -> None:
    places = rigid((10, 65, 20), (5, -7, 60)), rigid((15, 70, 25), (-20, 9, 30))
    moving, fixed = scan(MOVING, places[0], 1), scan(FIXED, places[1])
    result = register(moving, fixed, space="fixed", alignment="rigid", refine=False)
    change = volume_change(result.ddf, fixed.affine)
    np.testing.assert_allclose(change, 1, atol=1e-4)  # rigid, though 45 degrees or less lie between the planes
    flat = np.insert(points(), 2, 0, axis=0)
    found = result.forward.apply((places[1] @ flat)[:3].T)
    # mm, a quarter of a pixel
    assert np.linalg.norm(found - (places[0] @ flat)[:3].T, axis=1).mean() < 0.5
    np.testing.assert_allclose(result.inverse.apply(found), (places[1] @ flat)[:3].T, atol=1e-9)
    assert result.warped.shape == (*FIXED[0], 1)
    assert np.corrcoef(result.warped.array.ravel(), fixed.array.ravel())[0, 1] > 0.99


def test_a_tilted_slice_is_bent_all_over() -> None:
    """Across it, rounding must not be taken for outside of the field."""
    place = rigid((15, 70, 25), (-20, 9, 30))
    images = [scan(which, place) for which in (MOVING, FIXED)]
    options: dict[str, Any] = {"space": "fixed", "alignment": "none", "grid": WorkingGrid((96, 90), 1.5)}
    result = register(*images, weights=network(), refine=False, **options)
    length = np.linalg.norm(result.ddf[:2, ..., 0], axis=0)[images[1].array[..., 0] > 100]
    assert length.max() > 0.5
    assert np.mean(length == 0) < 0.01
    np.testing.assert_allclose(result.ddf[2], 0, atol=1e-5)  # float32


def test_a_2d_grid_lies_around_the_slice_in_its_plane() -> None:
    place = rigid((15, 70, 25), (-20, 9, 30))
    fixed = scan(FIXED, place)
    affine = WorkingGrid((80, 90), 1.5).around(fixed).affine
    inside = np.argwhere(fixed.array > 0)
    index = np.linalg.inv(affine) @ fixed.affine @ np.concatenate([inside.T, np.ones((1, len(inside)))])
    np.testing.assert_allclose(index[2], 0, atol=1e-9)
    assert (index[:2] >= 0).all()
    assert (index[:2].T <= [79, 89]).all()
    middle = (index[:2].min(axis=1) + index[:2].max(axis=1)) / 2
    np.testing.assert_allclose(middle, [39.5, 44.5], atol=0.6)  # of pixels


def test_slices_are_registered_without_a_word_about_a_grid() -> None:
    result = register(scan(MOVING, np.eye(4)), scan(FIXED, np.eye(4)), space="fixed", budget=1)
    assert result.grid is not None
    assert len(result.grid.size) == 2
    assert result.grid.spacing == pytest.approx(min(FIXED[1]))


@pytest.mark.parametrize(
    ("place", "options", "match"),
    [
        (rigid((0, 90, 0), (0, 0, 0)), {}, r"planes of moving and fixed differ by 90 degrees; at most 45"),
        (np.eye(4), {"space": "mni152"}, r"slices and 2-D images .* MNI152.* space 'fixed'"),
        (np.eye(4), {"weights": Registration(VoxelMorph()).eval()}, r"network takes 2 channels in 3-D, .* 2-D"),
        (
            np.eye(4),
            {"weights": network(), "grid": WorkingGrid()},
            r"grid of size \(160, 192, 224\) does not fit fixed\. Give 2 sizes",
        ),
    ],
)
def test_slices_that_cannot_be_registered_are_refused(place: Affine, options: dict[str, Any], match: str) -> None:
    moving, fixed = scan(MOVING, place, name="moving"), scan(FIXED, np.eye(4), name="fixed")
    with pytest.raises(ValueError, match=match):
        register(moving, fixed, **{"space": "fixed", "alignment": "none", "refine": False, **options})
