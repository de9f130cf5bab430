import hashlib
import json
import math
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nitransforms import linear, nonlinear
from nitransforms.manip import TransformChain
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from voxelmorph_monai import registration
from voxelmorph_monai.blocks import jacobian_determinant
from voxelmorph_monai.losses import LNCCLoss, MINDLoss, MutualInformationLoss
from voxelmorph_monai.metrics import folding
from voxelmorph_monai.networks import Registration, VoxelMorph
from voxelmorph_monai.preparation import Grid, fitting_grid, grid_affine, sample_scan
from voxelmorph_monai.refinement import Refinement, refine
from voxelmorph_monai.registration import load_network, register, register_files, shipped_weights
from voxelmorph_monai.spaces import Affine, read_image, save_image, spacing

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid((36, 40, 44), 4.0)
ALIGNED = {"space": "fixed", "transform": "none", "grid": GRID}


def placed(angles: tuple[float, float, float], sides: tuple[float, float, float], axes: NDArray[Any]) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes @ np.diag(sides)
    affine[:3, 3] = np.array([4.0, -6.0, 9.0]) - affine[:3, :3] @ ((np.array(SIZE) - 1) / 2)
    return affine


SIZE = (26, 31, 23)
RAS, LAS, LIA = np.eye(3), np.diag([-1.0, 1, 1]), np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
AFFINES = {
    "straight": placed((0, 0, 0), (4, 4, 4), RAS),
    "flipped": placed((0, 0, 0), (4.4, 3.6, 4.8), LAS),
    "oblique": placed((20, -35, 50), (4.2, 3.5, 5.1), LIA),
    "mirrored oblique": placed((-8, 15, 100), (3.7, 4.3, 4.9), LAS),
}


def world(affine: Affine, size: tuple[int, ...] = SIZE) -> NDArray[Any]:
    """Points (RAS, mm) of a grid: ``(3, *size)``."""
    return np.tensordot(affine[:3, :3], np.indices(size), 1) + affine[:3, 3].reshape(3, 1, 1, 1)


def phantom(affine: Affine, bend: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Image (0 to 800) and labels (0, 40, 7, 300) of a body without symmetry in the world, on the grid of an affine."""
    x, y, z = world(affine) - np.array([4.0, -6.0, 9.0]).reshape(3, 1, 1, 1)
    x = x + bend * np.sin(y / 15)
    radius = np.sqrt((x / 34) ** 2 + (y / 42) ** 2 + (z / 30) ** 2 + 0.2 * (x + 10) * z / 1000)
    core = np.sqrt(((x - 12) / 11) ** 2 + ((y + 9) / 16) ** 2 + ((z - 4) / 9) ** 2)
    image = 400 / (1 + np.exp(12 * (radius - 0.9))) + 400 / (1 + np.exp(6 * (core - 1)))
    labels = np.where(radius < 0.9, 40, 0) + np.where(core < 1, -33, 0) + np.where((radius < 0.9) & (y > 20), 260, 0)
    return np.where(image > 8, image, 0).astype(np.float32), labels.clip(0).astype(np.int16)


def network(preset: str = "diffeomorphic") -> Registration:
    """Untrained, but it bends: by some 4 mm at most."""
    torch.manual_seed(3)
    decoder, std = {"diffeomorphic": (((8,), (8,)), 0.03), "vm1": (((8,), (8,), (8,)), 0.1)}[preset]
    model = VoxelMorph(preset, encoder=(4, 8), decoder=decoder)
    torch.nn.init.normal_(model.flow.weight, std=std)
    return Registration(model, bidirectional=model.num_steps > 0, amp=False).eval()


class Write:
    """Scans and labels in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, affine: Affine, bend: float = 0.0) -> dict[str, Path]:
        image, labels = phantom(affine, bend)
        paths = {name: self.folder / f"{name}.nii.gz", f"{name}_labels": self.folder / f"{name}_labels.nii.gz"}
        for path, array in zip(paths.values(), (image, labels), strict=True):
            save_image(path, array, affine)
        return paths


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return Write(tmp_path)


@pytest.fixture
def bent(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Weights come from nowhere: the network of these tests."""

    def use(preset: str) -> None:
        monkeypatch.setattr(registration, "load_network", lambda *_: network(preset))

    return use


def sitk_array(image: sitk.Image) -> NDArray[Any]:
    return sitk.GetArrayFromImage(image).T


@pytest.mark.parametrize(
    ("moving", "fixed", "preset"),
    [
        ("straight", "oblique", "diffeomorphic"),
        ("oblique", "flipped", "vm1"),
        ("mirrored oblique", "oblique", "diffeomorphic"),
    ],
)
def test_simpleitk_applies_the_files_as_we_do(
    tmp_path: Path, write: Write, bent: Callable[[str], None], moving: str, fixed: str, preset: str
) -> None:
    bent(preset)
    paths = {**write("moving", AFFINES[moving], bend=4.0), **write("fixed", AFFINES[fixed])}
    out, weights = tmp_path / "out", tmp_path / "weights.pt"
    weights.write_bytes(b"never read")
    summary = register_files(output=out, weights=weights, **paths, **ALIGNED)  # type: ignore[arg-type]
    scan, target = (sitk.ReadImage(str(paths[name])) for name in ("moving", "fixed"))
    forward = sitk.ReadTransform(str(out / "forward.h5"))
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / "displacement.nii.gz"), sitk.sitkVectorFloat64))
    warped = sitk.ReadImage(str(out / "warped.nii.gz"))
    assert np.abs(np.asarray(warped.GetOrigin()) - target.GetOrigin()).max() < 1e-4  # float32 in the headers
    ours = sitk_array(warped)
    straight = sitk_array(sitk.Resample(scan, target, sitk.Transform(), sitk.sitkLinear))
    assert np.abs(ours - straight).max() > 80  # a tenth of the range: there is something to agree on
    for transform in (forward, field):
        theirs = sitk_array(sitk.Resample(scan, target, transform, sitk.sitkLinear, 0.0))
        # 800 grey values over some 5 mm, times the 1e-4 mm of headers and of a field in float32
        assert np.abs(ours - theirs).max() < 0.1
    labels = sitk_array(sitk.ReadImage(str(out / "warped_labels.nii.gz")))
    nearest = sitk.Resample(sitk.ReadImage(str(paths["moving_labels"])), target, forward, sitk.sitkNearestNeighbor, 0)
    assert labels.dtype == np.int16
    assert set(np.unique(labels)) == {0, 7, 40, 300}
    assert np.mean(labels != sitk_array(nearest)) < 1e-4  # a point may fall halfway between two voxels
    check_points(out, AFFINES[fixed], forward, field, summary)


@pytest.mark.filterwarnings("ignore:Reference space not set:UserWarning")  # nitransforms, to itself
def test_ants_and_nitransforms_apply_the_files_as_we_do(
    tmp_path: Path, write: Write, bent: Callable[[str], None]
) -> None:
    ants = pytest.importorskip("ants", reason="antspyx is not installed")  # it has wheels for some systems alone
    bent("diffeomorphic")
    paths = {**write("moving", AFFINES["oblique"], bend=4.0), **write("fixed", AFFINES["flipped"])}
    out, weights = tmp_path / "out", tmp_path / "weights.pt"
    weights.write_bytes(b"never read")
    register_files(output=out, weights=weights, **paths, **ALIGNED)  # type: ignore[arg-type]
    warped, lps = nib.load(out / "warped.nii.gz").get_fdata(), np.array([-1.0, -1, 1])
    inside = world(AFFINES["flipped"])[:, phantom(AFFINES["flipped"])[0] > 0].T
    transform = sitk.ReadTransform(str(out / "forward.h5"))
    expected = np.array([transform.TransformPoint(point) for point in inside * lps])
    assert np.linalg.norm(expected - inside * lps, axis=1).max() > 2
    fixed, moving = (ants.image_read(str(paths[name])) for name in ("fixed", "moving"))
    for name in ("forward.h5", "displacement.nii.gz"):
        files = [str(out / name)]
        assert np.abs(ants.apply_transforms(fixed, moving, files).numpy() - warped).max() < 0.1  # of 800
        points = ants.apply_transforms_to_points(3, pd.DataFrame(inside * lps, columns=list("xyz")), files)
        np.testing.assert_allclose(points[["x", "y", "z"]], expected, atol=1e-3, err_msg=name)  # mm: float32 in ANTs
    back = ants.apply_transforms_to_points(3, pd.DataFrame(expected, columns=list("xyz")), [str(out / "inverse.h5")])
    assert np.linalg.norm(back[["x", "y", "z"]] - inside * lps, axis=1).mean() < 0.3  # mm, as above

    field = nonlinear.load(out / "displacement.nii.gz", fmt="itk")
    np.testing.assert_allclose(field.map(inside) * lps, expected, atol=1e-3)
    chain = TransformChain.from_filename(str(out / "forward.h5"), fmt="itk")
    voxels = grid_affine(GRID, read_image(paths["fixed"]))  # on them, as between them it interpolates with splines
    inner = world(voxels, GRID.size)[:, 9:-9:3, 9:-9:3, 9:-9:3].reshape(3, -1).T
    there = np.array([transform.TransformPoint(point) for point in inner * lps])
    np.testing.assert_allclose(chain.map(inner) * lps, there, atol=1e-3)
    np.testing.assert_allclose(
        linear.load(out / "affine.txt", fmt="itk").map(inner), inner, atol=1e-6
    )  # none was asked


def check_points(
    out: Path, fixed: Affine, forward: sitk.Transform, field: sitk.Transform, summary: dict[str, Any]
) -> None:
    """The files agree on where points go, back they come, and the inverse misses by what the summary says."""
    inverse, determinant = sitk.ReadTransform(str(out / "inverse.h5")), nib.load(out / "jacobian.nii.gz").get_fdata()
    image = nib.load(out.parent / "fixed.nii.gz").get_fdata()

    def moved(index: NDArray[Any]) -> NDArray[Any]:
        return np.array(forward.TransformPoint((fixed @ [*index, 1])[:3] * [-1, -1, 1]))

    misses, inside = [], np.argwhere(image > 0)
    for index in inside:
        point = (fixed @ [*index, 1])[:3] * [-1, -1, 1]
        assert np.linalg.norm(moved(index) - field.TransformPoint(point)) < 1e-3  # mm: the displacement is in float32
        misses.append(np.linalg.norm(inverse.TransformPoint(moved(index)) - point))
    for index in inside[::97]:
        columns = [(moved(index + step) - moved(index - step)) / 2 for step in np.eye(3)]
        change = np.linalg.det(np.stack(columns, axis=1)) / np.linalg.det(fixed[:3, :3] * [[-1], [-1], [1]])
        assert determinant[tuple(index)] == pytest.approx(change, abs=1e-3)  # float32
    assert determinant.std() > 0.01
    assert np.mean(misses) == pytest.approx(summary["inverse_consistency_mm"], abs=1e-4)  # mm: float32 in the files
    assert np.mean(misses) < 0.3  # mm, of displacements of 4 mm on voxels of 4 mm


def relabelled(image: tuple[NDArray[Any], Affine], codes: str) -> tuple[NDArray[Any], Affine]:
    """The same voxels in the world, the axes of their array running in other directions."""
    array, affine = image
    change = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    return np.ascontiguousarray(apply_orientation(array, change)), affine @ inv_ornt_aff(change, array.shape)


def test_the_order_of_the_axes_does_not_matter() -> None:
    """All orders and all directions of the axes of the moving scan, and others of the fixed scan."""
    affines = {"moving": AFFINES["oblique"], "fixed": AFFINES["mirrored oblique"]}
    images = {name: (phantom(affine)[0], affine) for name, affine in affines.items()}
    bend = network()
    expected = register(**images, network=bend, **ALIGNED)  # type: ignore[arg-type]
    assert np.abs(expected.ddf).max() > 0.5
    orders = ["".join(codes) for axes in permutations(("LR", "PA", "IS")) for codes in product(*axes)]
    assert len(set(orders)) == 48
    few = [orders[9 * n % 48] for n in range(12)]  # of all 6 orders and all 8 directions
    assert {frozenset(codes) for codes in few} == {frozenset(codes) for codes in orders}
    assert {order // 8 for order in map(orders.index, few)} == set(range(6))
    for moving, fixed in zip(few, few[5:] + few[:5], strict=True):
        pair = {"moving": relabelled(images["moving"], moving), "fixed": relabelled(images["fixed"], fixed)}
        found = register(**pair, network=bend, **ALIGNED)  # type: ignore[arg-type]
        again = relabelled((found.warped, pair["fixed"][1]), "".join(nib.aff2axcodes(affines["fixed"])))[0]
        # The same samples in another order: float32 rounding, which the network passes on.
        np.testing.assert_allclose(again, expected.warped, atol=0.2, err_msg=f"{moving} {fixed}")


def test_spacing_and_origin_do_not_matter() -> None:
    """The map is one of the world: grids twice as fine, and scans put elsewhere, give the same."""
    affines = AFFINES["oblique"], AFFINES["flipped"]
    images = [(phantom(affine)[0], affine) for affine in affines]
    bend = network()
    expected = register(images[0], images[1], network=bend, **ALIGNED)  # type: ignore[arg-type]
    points = np.argwhere(images[1][0] > 0)[::7] @ affines[1][:3, :3].T + affines[1][:3, 3]
    there = expected.forward.points(points)
    assert np.linalg.norm(there - points, axis=1).max() > 2
    for which in (0, 1):
        finer = list(images)
        fine = affines[which] @ np.diag([0.5, 0.5, 0.5, 1.0])
        finer[which] = ndimage.zoom(images[which][0], [(2 * n - 1) / n for n in SIZE], order=1), fine
        found = register(finer[0], finer[1], network=bend, **ALIGNED)  # type: ignore[arg-type]
        # mm: the finer image is smoothed a little more before the network sees it at 4 mm
        assert np.linalg.norm(found.forward.points(points) - there, axis=1).max() < 0.5
    shift = np.eye(4)
    shift[:3, 3] = (113, -71, 40)
    moved = register(*((array, shift @ affine) for array, affine in images), network=bend, **ALIGNED)  # type: ignore[arg-type]
    # mm: the network's grid goes along; float32 fields
    np.testing.assert_allclose(moved.forward.points(points + shift[:3, 3]) - shift[:3, 3], there, atol=1e-2)


@pytest.mark.parametrize("codes", ["PIR", "SAL"])
def test_the_alignment_does_not_depend_on_the_order_of_the_axes(codes: str) -> None:
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", (20, -15, 25), degrees=True).as_matrix()
    pose[:3, 3] = (30, -40, 20)
    fixed = phantom(AFFINES["straight"])[0], AFFINES["straight"]
    moving = phantom(AFFINES["flipped"])[0], pose @ AFFINES["flipped"]
    result = register(relabelled(moving, codes), relabelled(fixed, codes[::-1]), space="fixed", transform="rigid")
    points = np.argwhere(fixed[0] > 0)[::7] @ AFFINES["straight"][:3, :3].T + AFFINES["straight"][:3, 3]
    expected = points @ pose[:3, :3].T + pose[:3, 3]
    # mm, a quarter of a voxel: the two are samples of one smooth body on different grids
    assert np.linalg.norm(result.forward.points(points) - expected, axis=1).mean() < 1.0


def test_masks_say_what_is_registered_and_the_whole_scan_is_warped(tmp_path: Path, write: Write) -> None:
    """A bright block beside each body, elsewhere in each, leads astray unless it is masked."""
    affine = AFFINES["straight"]
    body = phantom(affine)[0]
    mask = ndimage.binary_dilation(body > 0)
    scans = {}
    for name, corner in (("moving", np.s_[:4, :6, -6:]), ("fixed", np.s_[-5:, -5:, :9])):
        array = body.copy()
        array[corner] = np.where(mask[corner], array[corner], 1500)
        scans[name] = array
    shifted = affine.copy()
    shifted[:3, 3] += (12, -8, 16)
    save_image(tmp_path / "moving.nii", scans["moving"], shifted)
    save_image(tmp_path / "moving_mask.nii", mask.astype(np.uint8), shifted)
    save_image(tmp_path / "fixed.nii", scans["fixed"], affine)
    save_image(tmp_path / "fixed_mask.nii", mask.astype(np.uint8), affine)
    masks = {"moving_mask": tmp_path / "moving_mask.nii", "fixed_mask": tmp_path / "fixed_mask.nii"}
    out = tmp_path / "out"
    summary = register_files(
        tmp_path / "moving.nii", tmp_path / "fixed.nii", out, space="fixed", transform="rigid", **masks
    )
    transform = sitk.ReadTransform(str(out / "forward.h5"))
    moved = np.array(transform.TransformPoint((3.0, -4.0, 5.0)))
    np.testing.assert_allclose(moved, [3 - 12, -4 + 8, 5 + 16], atol=0.5)  # mm, an eighth of a voxel
    warped = nib.load(out / "warped.nii.gz").get_fdata()
    np.testing.assert_allclose(warped[1:-1, 1:-1, 1:-1].max(), 1500, rtol=0.05)  # the block is still there
    assert summary["inputs"].keys() == {"moving", "fixed", "moving_mask", "fixed_mask"}


def test_derivatives_are_named_as_bids_has_it(tmp_path: Path, write: Write) -> None:
    paths = {**write("moving", AFFINES["straight"]), **write("fixed", AFFINES["oblique"])}
    moving = paths["moving"].rename(tmp_path / "sub-07_ses-a_T2w.nii.gz")
    fixed = paths["fixed"].rename(tmp_path / "tpl-X_res-1_T1w.nii.gz")
    out = tmp_path / "out"
    options: dict[str, Any] = {"moving_labels": paths["moving_labels"], "bids": True, **ALIGNED}
    register_files(moving, fixed, out, **options)
    there, here = "sub-07_ses-a_from-sub07sesaT2w_to-tplXres1T1w_mode-image", "sub-07_ses-a_space-tplXres1T1w"
    assert {path.name for path in out.iterdir()} == {
        f"{here}_T2w.nii.gz",
        f"{here}_dseg.nii.gz",
        f"{here}_desc-jacobian_T2w.nii.gz",
        f"{there}_xfm.h5",
        "sub-07_ses-a_from-tplXres1T1w_to-sub07sesaT2w_mode-image_xfm.h5",
        f"{there}_desc-affine_xfm.txt",
        f"{there}_desc-displacement_xfm.nii.gz",
        f"{there}_desc-registration_report.png",
        f"{there}_desc-registration_summary.json",
    }
    register_files(moving, fixed, out, overwrite=True, **options)
    with pytest.raises(ValueError, match="must hold only what 'vxm register' writes here, to be overwritten"):
        register_files(moving, fixed, out, overwrite=True, **ALIGNED)  # type: ignore[arg-type]


def test_the_map_is_that_of_the_three_parts_and_the_network_sees_aligned_scans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both scans show one body, each moved by a map of its own, which the alignment finds."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", (12, -20, 7), degrees=True).as_matrix() * 1.1
    turn[:3, 3] = (14, -9, 5)
    shift = np.eye(4)
    shift[:3, :3] += [[0, 0.1, 0], [0, 0, -0.05], [0.03, 0, 0.1]]
    shift[:3, 3] = (-20, 3, 11)
    base, other = AFFINES["straight"], AFFINES["oblique"]
    moving, fixed = (phantom(base)[0], turn @ base), (phantom(other)[0], shift @ other)
    maps = iter([turn, shift])
    monkeypatch.setattr(registration, "_align", lambda *_: next(maps))
    monkeypatch.setattr(registration, "check_brain", lambda *_: None)
    monkeypatch.setattr(registration, "require_right_angles", lambda *_: None)  # the maps shear the affines
    monkeypatch.setattr(registration, "mni152", lambda: None)
    seen: list[Tensor] = []
    bend = network()
    bend.register_forward_hook(lambda _, pair, found: seen.extend([pair[0], found["ddf"]]))
    grid = Grid((150, 170, 190), 1.0)
    result = register(moving, fixed, network=bend, grid=grid)
    pair, ddf = seen[0][0].numpy(), seen[1][0].numpy()
    # One body, sampled 4 mm apart along other axes.
    assert np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1] > 0.99
    affine = grid_affine(grid)
    for index in ([60, 80, 90], [80, 100, 110], [75, 71, 92]):
        point = shift @ affine @ [*index, 1]
        expected = turn @ affine @ [*(index + ddf[(slice(None), *index)]), 1]
        np.testing.assert_allclose(result.forward.points(point[None, :3])[0], expected[:3], atol=1e-4)  # float32


def test_a_real_scan_is_found_again_where_it_is_and_in_another_pose() -> None:
    array, affine = read_image(sample_scan("colin27"))
    small = ndimage.uniform_filter(array, 3)[::3, ::3, ::3], affine @ np.diag([3, 3, 3, 1])
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", (25, -20, 30), degrees=True).as_matrix()
    pose[:3, 3] = (30, -40, 35)
    points = world(small[1], small[0].shape)[:, small[0] > 0].T
    for matrix, transform in ((np.eye(4), "affine"), (pose, "rigid")):
        result = register((small[0], matrix @ small[1]), small, space="fixed", transform=transform)
        expected = points @ matrix[:3, :3].T + matrix[:3, 3]
        # mm, a tenth of a voxel: where the optimiser stops. No image is interpolated to make the other one.
        assert np.linalg.norm(result.forward.points(points) - expected, axis=1).mean() < 0.3
        np.testing.assert_allclose(result.inverse.points(expected), points, atol=0.6)  # no further away at the rim
        assert np.corrcoef(result.warped.ravel(), small[0].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_the_warped_scan_has_the_header_of_the_fixed_one(tmp_path: Path, write: Write, kind: Any) -> None:
    moving, fixed = write("moving", AFFINES["flipped"])["moving"], tmp_path / "fixed.nii"
    affine = AFFINES["oblique"]
    image = kind((phantom(affine)[0] * 10).astype(np.int16)[..., None], affine)
    image.set_sform(affine, 4)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(0.25, 0)
    image.header["descrip"] = b"scanner of the north"
    nib.save(image, fixed)
    register_files(moving, fixed, tmp_path / "out", **ALIGNED)  # type: ignore[arg-type]
    given, found = nib.load(fixed).header, nib.load(tmp_path / "out" / "warped.nii.gz").header
    kept = set(given) - {"magic", "datatype", "bitpix", "scl_slope", "scl_inter", "vox_offset", "cal_min", "cal_max"}
    assert {"dim", "pixdim", "srow_x", "quatern_b", "sform_code", "qform_code", "descrip", "xyzt_units"} <= kept
    for field in kept:
        np.testing.assert_array_equal(found[field], given[field], err_msg=field)
    assert type(found) is (nib.Nifti1Header if kind is nib.Nifti1Image else nib.Nifti2Header)
    assert found.get_data_dtype() == np.float32


def test_a_fixed_scan_in_mgz_gives_its_grid(tmp_path: Path, write: Write) -> None:
    affine = AFFINES["oblique"]
    nib.save(nib.MGHImage(phantom(affine)[0], affine), tmp_path / "fixed.mgz")
    register_files(write("moving", AFFINES["flipped"])["moving"], tmp_path / "fixed.mgz", tmp_path / "out", **ALIGNED)  # type: ignore[arg-type]
    warped = nib.load(tmp_path / "out" / "warped.nii.gz")
    assert warped.shape == SIZE
    np.testing.assert_allclose(warped.affine, affine, atol=1e-4)  # float32 in the headers


def test_the_summary_says_what_was_done_and_how_good_it_is(
    tmp_path: Path, write: Write, bent: Callable[[str], None]
) -> None:
    bent("diffeomorphic")
    paths = {**write("moving", AFFINES["straight"], bend=4.0), **write("fixed", AFFINES["oblique"])}
    paths["weights"] = tmp_path / "weights.pt"
    paths["weights"].write_bytes(b"never read")
    out = tmp_path / "deep" / "out"
    summary = register_files(output=out, **paths, **ALIGNED)  # type: ignore[arg-type]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {path.name for path in out.iterdir()} == set(registration._NAMES.values())
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for role, path in paths.items():
        assert summary["inputs"][role]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert summary["options"] == {
        **ALIGNED,
        "preset": "wide",
        "budget": 0.0,
        "similarity": "lncc",
        "grid": {"size": [36, 40, 44], "spacing": GRID.spacing},
    }
    assert summary["seconds"].keys() == {"affine", "network", "unfold", "compose", "warp"}
    assert summary["versions"]["torch"] == torch.__version__
    fixed, warped = (nib.load(path).get_fdata() for path in (paths["fixed"], out / "warped.nii.gz"))
    assert summary["similarity_after"] == pytest.approx(np.corrcoef(fixed.ravel(), warped.ravel())[0, 1], abs=1e-6)
    assert summary["similarity_before"] == summary["similarity_affine"] != summary["similarity_after"]
    labels, reference = (
        np.asarray(nib.load(path).dataobj) for path in (out / "warped_labels.nii.gz", paths["fixed_labels"])
    )
    after = {}
    for label in (7, 40, 300):
        a, b = labels == label, reference == label
        after[str(label)] = 2 * (a & b).sum() / (a.sum() + b.sum())
    after["mean"] = np.mean(list(after.values()))
    assert summary["dice"]["after"] == pytest.approx(after, abs=1e-9)
    assert summary["dice"]["before"].keys() == after.keys()
    ddf = register(read_image(paths["moving"]), read_image(paths["fixed"]), network=network(), **ALIGNED).ddf  # type: ignore[arg-type]
    determinant = jacobian_determinant(torch.from_numpy(ddf)[None]).numpy()
    found = nib.load(out / "jacobian.nii.gz").get_fdata()
    np.testing.assert_allclose(found, determinant[0, 0], atol=1e-5)  # float32
    assert summary["folding_percent"] == 100 * np.mean(determinant <= 0)
    assert summary["sdlogj"] == pytest.approx(np.log(determinant[determinant > 0]).std(), rel=1e-4)


def test_without_a_network_the_map_is_the_affine(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    pose = np.eye(4)
    pose[:3, 3] = (8, -4, 6)
    monkeypatch.setattr(registration, "_align", lambda *_: pose)
    paths = {**write("moving", AFFINES["straight"]), **write("fixed", AFFINES["oblique"])}
    summary = register_files(output=tmp_path / "out", space="fixed", **paths)  # type: ignore[arg-type]
    assert summary["options"]["preset"] is None
    point = (3.0, -20.0, 7.0)
    for name in ("affine.txt", "forward.h5"):
        moved = sitk.ReadTransform(str(tmp_path / "out" / name)).TransformPoint(point)
        np.testing.assert_allclose(moved, np.add(point, (-8, 4, 6)), atol=1e-5)  # LPS; float32
    assert summary["similarity_before"] != pytest.approx(summary["similarity_affine"], abs=1e-3)
    assert summary["similarity_affine"] == pytest.approx(summary["similarity_after"], abs=1e-6)  # float32


@pytest.mark.parametrize("given", [False, True], ids=["from affine", "from network"])
def test_refining_brings_the_scans_closer(given: bool) -> None:
    start = network() if given else None
    moving, fixed = (phantom(AFFINES["straight"], bend)[0] for bend in (3.0, 0.0))
    pair = (moving, AFFINES["straight"]), (fixed, AFFINES["straight"])
    before = register(*pair, network=start, **ALIGNED)  # type: ignore[arg-type]
    found = register(*pair, network=start, budget=20, **ALIGNED)  # type: ignore[arg-type]
    assert np.abs(found.warped - fixed).mean() < 0.8 * np.abs(before.warped - fixed).mean()


@pytest.mark.parametrize("preset", ["diffeomorphic", "vm1"])
def test_one_pass_leaves_no_fold(preset: str) -> None:
    """Whatever the network says, to and fro."""
    wild = network(preset)
    torch.nn.init.normal_(wild.network.flow.weight, std=2.0)
    scans = [(phantom(AFFINES["straight"], bend)[0], AFFINES["straight"]) for bend in (4.0, 0.0)]
    said: list[Tensor] = []
    wild.register_forward_hook(lambda module, seen, found: said.append(found["ddf"].clone()))
    result = register(*scans, network=wild, **ALIGNED)  # type: ignore[arg-type]
    assert float(folding(said[0], scheme="forward")) > 0
    for composite in (result.forward, result.inverse):
        assert composite.field is not None
        fade = registration._FADE
        field = torch.from_numpy(composite.field[0])[None, :, fade:-fade, fade:-fade, fade:-fade]
        assert float(field.abs().max()) > 1
        for scheme in ("central", "forward"):
            assert float(folding(field, scheme=scheme)) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_hounsfield_units_count_from_air(masked: bool) -> None:
    """As if air were 0; what lies outside the moving scan is air."""
    affine = AFFINES["straight"]
    scans = [(phantom(affine, bend)[0], affine) for bend in (4.0, 0.0)]
    mask = np.zeros(SIZE, bool)
    mask[:, 8:] = True
    options: dict[str, Any] = {"space": "fixed", "transform": "none", "network": network()}
    options["masks"] = (mask, mask) if masked else (None, None)
    shifted = affine.copy()
    shifted[:3, 3] += [9, 0, 0]
    expected = register(scans[0], (scans[1][0], shifted), **options)
    found = register(*((image - 1000, at) for image, at in ((scans[0][0], affine), (scans[1][0], shifted))), **options)
    assert found.grid == expected.grid
    np.testing.assert_allclose(found.ddf, expected.ddf, atol=2e-3)  # float32 has 3 digits less of 1000
    np.testing.assert_allclose(found.warped, expected.warped - 1000, atol=0.5)
    assert (found.warped == -1000).any()


def test_a_scan_against_itself_stays_where_it_is() -> None:
    """Whatever the network says of it."""
    array, affine = read_image(sample_scan("colin27"))
    scan = ndimage.uniform_filter(array, 4)[::4, ::4, ::4], affine @ np.diag([4, 4, 4, 1])
    options: dict[str, Any] = {**ALIGNED, "grid": Grid((48, 56, 48), 4.0), "network": network()}
    assert np.abs(register(scan, scan, **options).ddf).max() > 0.5
    result = register(scan, scan, budget=5, **options)
    points = np.argwhere(scan[0] > 0) @ scan[1][:3, :3].T + scan[1][:3, 3]
    np.testing.assert_allclose(result.forward.points(points), points, atol=1e-6)
    np.testing.assert_allclose(result.inverse.points(points), points, atol=1e-6)
    np.testing.assert_allclose(result.warped, scan[0], atol=1e-3)  # of 200: float32


def test_scans_are_refined_by_the_similarity_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def noted(*images: torch.Tensor, similarity: object, **options: Any) -> Any:
        used.append(similarity)
        return refine(*images, **options)

    monkeypatch.setattr(registration, "refine", noted)
    scan = phantom(AFFINES["straight"])[0], AFFINES["straight"]
    for similarity in ("lncc", "mi", "mind"):
        register(scan, scan, budget=1e-9, similarity=similarity, **ALIGNED)  # type: ignore[arg-type]
    assert [type(loss) for loss in used] == [LNCCLoss, MutualInformationLoss, MINDLoss]
    with pytest.raises(ValueError, match=r"similarity must be one of lncc, mi, mind, got 'ncc'\."):
        register(scan, scan, budget=1, similarity="ncc", **ALIGNED)  # type: ignore[arg-type]


def test_without_a_network_the_refinement_runs_on_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, float]] = []

    def noted(moving: torch.Tensor, fixed: torch.Tensor, *, budget: float, **_: Any) -> Any:
        used.append((moving.device.type, budget))
        nothing = torch.zeros(1, 3, *fixed.shape[2:])
        return Refinement(nothing, nothing, [])

    monkeypatch.setattr(registration, "refine", noted)
    scan = phantom(AFFINES["straight"])[0], AFFINES["straight"]
    register(scan, scan, budget=math.inf, device="meta", **ALIGNED)  # type: ignore[arg-type]
    register(scan, scan, budget=5, network=network(), device="meta", **ALIGNED)  # type: ignore[arg-type]
    assert used == [("meta", math.inf), ("cpu", 5)]  # that of the network


def test_an_affine_map_is_found_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there, which this torch could not use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", None)  # nothing is put anywhere
    scan = phantom(AFFINES["straight"])[0], AFFINES["straight"]
    assert not register(scan, scan, **ALIGNED).ddf.any()  # type: ignore[arg-type]


def test_the_default_grid_fits_scans_of_any_size() -> None:
    """A body longer than the grid for brains."""
    affine = AFFINES["straight"] @ np.diag([3.0, 3, 3, 1])
    scan = phantom(AFFINES["straight"])[0], affine
    result = register(scan, scan, budget=1e-9, space="fixed", transform="none")
    assert result.grid == fitting_grid(scan)
    index = np.linalg.inv(grid_affine(result.grid, scan)) @ affine
    inside = np.argwhere(scan[0] > 0)
    places = inside @ index[:3, :3].T + index[:3, 3]
    np.testing.assert_allclose(places.min(axis=0), 8, atol=0.51)  # voxels of margin; the size is a whole number
    np.testing.assert_allclose(places.max(axis=0), np.array(result.grid.size) - 9, atol=0.51)
    assert result.grid.spacing == pytest.approx(spacing(affine).min())


def test_a_fitting_grid_has_no_more_voxels_than_that_of_the_literature() -> None:
    scan = np.ones((500, 400, 300), np.uint8), np.diag([0.5, 0.5, 0.5, 1])
    grid = fitting_grid(scan)
    voxels = math.prod(Grid().size)
    assert 0.93 * voxels < math.prod(grid.size) <= voxels
    grid_affine(grid, scan)  # which refuses one that is too small


def test_weights_are_loaded_and_wrong_ones_refused(tmp_path: Path) -> None:
    torch.save(VoxelMorph("vm2").state_dict(), tmp_path / "vm2.pt")
    loaded = load_network(tmp_path / "vm2.pt", "vm2")
    assert not loaded.training
    assert loaded.bidirectional is False
    for name, tensor in torch.load(tmp_path / "vm2.pt").items():
        assert torch.equal(loaded.network.state_dict()[name].cpu(), tensor)
    (tmp_path / "text.pt").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"weights .*vm2.pt must be of the network's own preset, got"):
        load_network(tmp_path / "vm2.pt", "vm1")
    for name in ("text.pt", "list.pt"):
        with pytest.raises(ValueError, match=f"{name} must be of the network's own preset, got"):
            load_network(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_network(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"masks": (np.zeros(SIZE), None)}, "the mask of moving must hold some of what the scan shows"),
        ({"budget": -1.0}, r"budget must be seconds, 0 or more, got -1\.0"),
        ({"budget": float("nan")}, "budget must be seconds, 0 or more, got nan"),
        ({"space": "moving"}, "space must be one of mni152, fixed, got 'moving'"),
        ({"transform": "bspline"}, "transform must be one of affine, rigid, none, got 'bspline'"),
        ({"network": network().train()}, "network must be in evaluation mode"),
        ({"network": Registration(VoxelMorph(spatial_dims=2)).eval()}, "network must take two 3-D images"),
        (
            {"space": "mni152"},
            "moving must be a skull-stripped head, 0 around a brain of 0.3 to 3.3 litres at this spacing",
        ),
        ({"network": network(), "grid": Grid((9, 9, 9))}, r"a grid must hold the fixed image, .* but has \[9\.0, 9"),
        ({"moving": (np.zeros(SIZE, np.float32), np.eye(4))}, "moving must be one 3-D volume of finite numbers"),
        ({"fixed": (np.ones(SIZE[:2], np.float32), np.eye(4))}, "fixed must be one 3-D volume of finite numbers"),
        ({"moving": (np.ones((9, 0, 9), np.float32), np.eye(4))}, "moving must be one 3-D volume of finite numbers"),
        ({"moving": (np.full(SIZE, np.nan, np.float32), np.eye(4))}, "0 finite numbers and 0 above it"),
        ({"fixed": (phantom(np.diag([2.0, 2, 2, 1]))[0], np.eye(4) + np.eye(4, k=1))}, "axes of fixed must be at righ"),
        ({"moving": (phantom(AFFINES["straight"])[0], np.eye(4) + 900 * np.eye(4, k=3))}, "must overlap"),
    ],
)
def test_what_cannot_be_registered_is_refused(options: dict[str, Any], match: str) -> None:
    affine = AFFINES["straight"]
    image = phantom(affine)[0] * (phantom(affine)[0] > 300), affine
    with pytest.raises(ValueError, match=match):
        register(**{"moving": image, "fixed": image, **ALIGNED, **options})


def test_what_is_known_to_fail_fails_before_the_work(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write("moving", AFFINES["straight"])
    same = tmp_path / "elsewhere" / paths["moving"].name
    same.parent.mkdir()
    same.write_bytes(paths["moving"].read_bytes())
    monkeypatch.setattr(registration, "register", None)  # is not reached
    with pytest.raises(ValueError, match="moving and fixed must differ in name, as files get both names"):
        register_files(paths["moving"], same, tmp_path / "out", bids=True, **ALIGNED)  # type: ignore[arg-type]
    save_image(tmp_path / "slice.nii.gz", np.eye(9, dtype=np.float32)[..., None], np.eye(4))
    pair = [tmp_path / "slice.nii.gz"] * 2
    with pytest.raises(ValueError, match="space must be 'fixed' for slices and 2-D images"):  # not of its weights
        register_files(*pair, tmp_path / "out", weights=shipped_weights())
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(registration.os.path, "ismount", lambda path: path == tmp_path / "mounted")
    with pytest.raises(ValueError, match="mounted must be replaced as a whole, but it is a mount point"):
        register_files(*pair, tmp_path / "mounted", overwrite=True, space="fixed")


def test_an_earlier_registration_is_overwritten_whole_or_not_at_all(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {**write("moving", AFFINES["straight"], bend=4.0), **write("fixed", AFFINES["oblique"])}
    out = tmp_path / "out"
    register_files(output=out, **paths, **ALIGNED)  # type: ignore[arg-type]
    del paths["moving_labels"]
    with pytest.raises(FileExistsError, match="out must be new, or be overwritten"):
        register_files(output=out, **paths, **ALIGNED)  # type: ignore[arg-type]
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(registration, "save_results", full)
        with pytest.raises(OSError, match="No space left"):
            register_files(output=out, overwrite=True, **paths, **ALIGNED)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    register_files(output=out, overwrite=True, **paths, **ALIGNED)  # type: ignore[arg-type]
    assert {path.name for path in out.iterdir()} == set(registration._NAMES.values()) - {"warped_labels.nii.gz"}
    assert not list(tmp_path.glob(".*"))


def test_what_itk_cannot_align_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(
            "itkImageToImageMetricv4.hxx:241:\nITK ERROR: All samples map outside moving image buffer.\n"
        )

    monkeypatch.setattr(registration, "register_affine", fail)
    image = phantom(AFFINES["straight"])[0], AFFINES["straight"]
    with pytest.raises(
        ValueError, match=r"something alike, but ITK cannot align them: ITK ERROR: All samples map o.*\.$"
    ):
        register(image, image, space="fixed")


def test_the_displacement_fades_to_0_around_the_grid_of_the_network() -> None:
    bend, seen = network(), []
    torch.nn.init.constant_(bend.network.flow.bias, 1.0)  # a displacement at the border too
    bend.register_forward_hook(lambda _, pair, found: seen.append(found["ddf"][0].numpy()))
    images = [(phantom(AFFINES[name])[0], AFFINES[name]) for name in ("flipped", "oblique")]
    field = register(*images, network=bend, **ALIGNED).forward.field  # type: ignore[arg-type]
    assert field is not None
    ddf, affine = field
    margin = tuple(slice(registration._FADE, -registration._FADE) for _ in range(3))
    np.testing.assert_array_equal(ddf[(slice(None), *margin)], seen[0])
    for axis in (1, 2, 3):
        assert not np.take(ddf, [0, -1], axis).any()
        edge = np.abs(np.take(seen[0], [0, -1], axis)).max()
        assert edge > 0.5
        steps = np.abs(np.diff(ddf, axis=axis)).max()
        assert steps <= max(np.abs(np.diff(seen[0], axis=axis)).max(), edge / registration._FADE) * 1.001  # float32
    corner = grid_affine(GRID, images[1]) @ [0, 0, 0, 1]
    np.testing.assert_allclose(affine @ [*[registration._FADE] * 3, 1], corner, atol=1e-9)
