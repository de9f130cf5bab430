import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import cached_property
from inspect import signature
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
from phantoms import AFFINES, SIZE, Write, phantom, world
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from voxelmorph_monai.affines import Affine, spacing
from voxelmorph_monai.apps import register as registration
from voxelmorph_monai.apps import register_files as files_app
from voxelmorph_monai.apps import result as result_app
from voxelmorph_monai.apps import shipped
from voxelmorph_monai.apps.options import SAME_PERSON, SMOOTHNESS, Options
from voxelmorph_monai.apps.register import register
from voxelmorph_monai.apps.register_files import register_files
from voxelmorph_monai.apps.result import FILES
from voxelmorph_monai.apps.shipped import load_network, shipped_weights
from voxelmorph_monai.blocks import jacobian_determinant
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.losses import LNCCLoss, MINDLoss, MutualInformationLoss
from voxelmorph_monai.maps.spatial_map import SpatialMap
from voxelmorph_monai.metrics import folding
from voxelmorph_monai.networks import Registration, VoxelMorph
from voxelmorph_monai.refinement import Refinement, refine
from voxelmorph_monai.space import scan as scan_module
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import WorkingGrid, mni152, sample_scan

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = WorkingGrid((36, 40, 44), 4.0)
ALIGNED: dict[str, Any] = {"space": "fixed", "alignment": "none", "grid": GRID, "budget": 0.0}


def body(affine: Affine, bend: float = 0.0, name: str = "body") -> Scan:
    return Scan(phantom(affine, bend)[0], affine, name)


def network(preset: str = "diffeomorphic") -> Registration:
    """Untrained, but it bends: by some 4 mm at most."""
    torch.manual_seed(3)
    decoder, std = {"diffeomorphic": (((8,), (8,)), 0.03), "vm1": (((8,), (8,), (8,)), 0.1)}[preset]
    model = VoxelMorph(preset, encoder=(4, 8), decoder=decoder)
    torch.nn.init.normal_(model.flow.weight, std=std)
    return Registration(model, bidirectional=model.num_steps > 0, amp=False).eval()


def coarse_brain(name: str = "brain") -> Scan:
    """Colin27 with voxels of 4 mm."""
    fine = Scan.read(sample_scan("colin27"))
    return Scan(ndimage.uniform_filter(fine.array, 4)[::4, ::4, ::4], fine.affine @ np.diag([4, 4, 4, 1]), name)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return Write(tmp_path)


@pytest.fixture
def bent(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Weights come from nowhere: the network of these tests."""

    def use(preset: str) -> None:
        monkeypatch.setattr(shipped, "load_network", lambda *_: network(preset))

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
    summary = register_files(output=out, options=Options(weights, **ALIGNED), **paths)  # type: ignore[arg-type]
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
    register_files(output=out, options=Options(weights, **ALIGNED), **paths)  # type: ignore[arg-type]
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
    voxels = GRID.around(Scan.read(paths["fixed"])).affine  # on them, as between them it interpolates with splines
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


def relabelled(scan: Scan, codes: str) -> Scan:
    """The same voxels in the world, the axes of their array running in other directions."""
    change = ornt_transform(io_orientation(scan.affine), axcodes2ornt(codes))
    array = np.ascontiguousarray(apply_orientation(scan.array, change))
    return Scan(array, scan.affine @ inv_ornt_aff(change, scan.shape), scan.name)


def test_the_order_of_the_axes_does_not_matter() -> None:
    """All orders and all directions of the axes of the moving scan, and others of the fixed scan."""
    affines = {"moving": AFFINES["oblique"], "fixed": AFFINES["mirrored oblique"]}
    images = {name: body(affine) for name, affine in affines.items()}
    bend = network()
    expected = register(**images, weights=bend, **ALIGNED)
    assert np.abs(expected.ddf).max() > 0.5
    orders = ["".join(codes) for axes in permutations(("LR", "PA", "IS")) for codes in product(*axes)]
    assert len(set(orders)) == 48
    few = [orders[9 * n % 48] for n in range(12)]  # of all 6 orders and all 8 directions
    assert {frozenset(codes) for codes in few} == {frozenset(codes) for codes in orders}
    assert {order // 8 for order in map(orders.index, few)} == set(range(6))
    for moving, fixed in zip(few, few[5:] + few[:5], strict=True):
        pair = {"moving": relabelled(images["moving"], moving), "fixed": relabelled(images["fixed"], fixed)}
        found = register(**pair, weights=bend, **ALIGNED)
        again = relabelled(found.warped, images["fixed"].orientation).array
        # The same samples in another order: float32 rounding, which the network passes on.
        np.testing.assert_allclose(again, expected.warped.array, atol=0.2, err_msg=f"{moving} {fixed}")


def test_spacing_and_origin_do_not_matter() -> None:
    """The map is one of the world: grids twice as fine, and scans put elsewhere, give the same."""
    affines = AFFINES["oblique"], AFFINES["flipped"]
    images = [body(affine) for affine in affines]
    bend = network()
    expected = register(images[0], images[1], weights=bend, **ALIGNED)
    points = np.argwhere(images[1].array > 0)[::7] @ affines[1][:3, :3].T + affines[1][:3, 3]
    there = expected.forward.apply(points)
    assert np.linalg.norm(there - points, axis=1).max() > 2
    for which in (0, 1):
        finer = list(images)
        fine = affines[which] @ np.diag([0.5, 0.5, 0.5, 1.0])
        finer[which] = Scan(ndimage.zoom(images[which].array, [(2 * n - 1) / n for n in SIZE], order=1), fine)
        found = register(finer[0], finer[1], weights=bend, **ALIGNED)
        # mm: the finer image is smoothed a little more before the network sees it at 4 mm
        assert np.linalg.norm(found.forward.apply(points) - there, axis=1).max() < 0.5
    shift = np.eye(4)
    shift[:3, 3] = (113, -71, 40)
    moved = register(*(Scan(scan.array, shift @ scan.affine) for scan in images), weights=bend, **ALIGNED)
    # mm: the network's grid goes along; float32 fields
    np.testing.assert_allclose(moved.forward.apply(points + shift[:3, 3]) - shift[:3, 3], there, atol=1e-2)


@pytest.mark.parametrize("codes", ["PIR", "SAL"])
def test_the_alignment_does_not_depend_on_the_order_of_the_axes(codes: str) -> None:
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", (20, -15, 25), degrees=True).as_matrix()
    pose[:3, 3] = (30, -40, 20)
    fixed = body(AFFINES["straight"])
    moving = Scan(phantom(AFFINES["flipped"])[0], pose @ AFFINES["flipped"])
    options: dict[str, Any] = {"space": "fixed", "alignment": "rigid", "refine": False}
    result = register(relabelled(moving, codes), relabelled(fixed, codes[::-1]), **options)
    points = np.argwhere(fixed.array > 0)[::7] @ AFFINES["straight"][:3, :3].T + AFFINES["straight"][:3, 3]
    expected = points @ pose[:3, :3].T + pose[:3, 3]
    # mm, a quarter of a voxel: the two are samples of one smooth body on different grids
    assert np.linalg.norm(result.forward.apply(points) - expected, axis=1).mean() < 1.0


def test_masks_say_what_is_registered_and_the_whole_scan_is_warped(tmp_path: Path, write: Write) -> None:
    """A bright block beside each body, elsewhere in each, leads astray unless it is masked."""
    affine = AFFINES["straight"]
    image = phantom(affine)[0]
    mask = ndimage.binary_dilation(image > 0)
    scans = {}
    for name, corner in (("moving", np.s_[:4, :6, -6:]), ("fixed", np.s_[-5:, -5:, :9])):
        array = image.copy()
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
    options = Options(space="fixed", alignment="rigid", refine=False)
    summary = register_files(tmp_path / "moving.nii", tmp_path / "fixed.nii", out, options=options, **masks)
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
    how: dict[str, Any] = {"bids": True, "options": Options(**ALIGNED)}
    register_files(moving, fixed, out, moving_labels=paths["moving_labels"], **how)
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
        f"{there}_desc-registration_report.html",
        f"{there}_desc-registration_summary.json",
    }
    register_files(moving, fixed, out, moving_labels=paths["moving_labels"], overwrite=True, **how)
    with pytest.raises(ValueError, match=r"is not overwritten, because it holds .*'vxm register'"):
        register_files(moving, fixed, out, overwrite=True, options=Options(**ALIGNED))


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
    monkeypatch.setattr(scan_module, "require_right_angles", lambda *_: None)  # the maps shear the affines
    moving, fixed = Scan(phantom(base)[0], turn @ base), Scan(phantom(other)[0], shift @ other)
    maps = {"moving": turn, "fixed": shift}
    monkeypatch.setattr(registration, "align_to_mni152", lambda scan, *_: maps[scan.name])
    monkeypatch.setattr(registration, "check_brain", lambda *_: None)
    seen: list[Tensor] = []
    bend = network()
    bend.register_forward_hook(lambda _, pair, found: seen.extend([pair[0], found["ddf"]]))
    grid = WorkingGrid((150, 170, 190), 1.0)
    result = register(moving, fixed, weights=bend, grid=grid, refine=False)
    pair, ddf = seen[0][0].numpy(), seen[1][0].numpy()
    # One body, sampled 4 mm apart along other axes.
    assert np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1] > 0.99
    affine = grid.around().affine
    for index in ([60, 80, 90], [80, 100, 110], [75, 71, 92]):
        point = shift @ affine @ [*index, 1]
        expected = turn @ affine @ [*(index + ddf[(slice(None), *index)]), 1]
        np.testing.assert_allclose(result.forward.apply(point[None, :3])[0], expected[:3], atol=1e-4)  # float32


def test_a_real_scan_is_found_again_where_it_is_and_in_another_pose() -> None:
    scan = Scan.read(sample_scan("colin27"))
    small = Scan(ndimage.uniform_filter(scan.array, 3)[::3, ::3, ::3], scan.affine @ np.diag([3, 3, 3, 1]))
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", (25, -20, 30), degrees=True).as_matrix()
    pose[:3, 3] = (30, -40, 35)
    points = world(small.affine, small.shape)[:, small.array > 0].T
    for matrix, kind in ((np.eye(4), "affine"), (pose, "rigid")):
        moved = Scan(small.array, matrix @ small.affine)
        result = register(moved, small, space="fixed", alignment=kind, refine=False)
        expected = points @ matrix[:3, :3].T + matrix[:3, 3]
        # mm, a tenth of a voxel: where the optimiser stops. No image is interpolated to make the other one.
        assert np.linalg.norm(result.forward.apply(points) - expected, axis=1).mean() < 0.3
        np.testing.assert_allclose(result.inverse.apply(expected), points, atol=0.6)  # no further away at the rim
        assert np.corrcoef(result.warped.array.ravel(), small.array.ravel())[0, 1] > 0.99


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
    register_files(moving, fixed, tmp_path / "out", options=Options(**ALIGNED))
    given, found = nib.load(fixed).header, nib.load(tmp_path / "out" / "warped.nii.gz").header
    kept = set(given) - {"magic", "datatype", "bitpix", "scl_slope", "scl_inter", "vox_offset", "cal_min", "cal_max"}
    assert {"dim", "pixdim", "srow_x", "quatern_b", "sform_code", "qform_code", "descrip", "xyzt_units"} <= kept
    for field in kept:
        if field.startswith("quatern"):  # worked out anew, so that both forms say the same: float32
            np.testing.assert_allclose(found[field], given[field], atol=1e-6, err_msg=field)
        else:
            np.testing.assert_array_equal(found[field], given[field], err_msg=field)
    assert type(found) is (nib.Nifti1Header if kind is nib.Nifti1Image else nib.Nifti2Header)
    assert found.get_data_dtype() == np.float32


def test_a_fixed_scan_in_mgz_gives_its_grid(tmp_path: Path, write: Write) -> None:
    affine = AFFINES["oblique"]
    nib.save(nib.MGHImage(phantom(affine)[0], affine), tmp_path / "fixed.mgz")
    moving = write("moving", AFFINES["flipped"])["moving"]
    register_files(moving, tmp_path / "fixed.mgz", tmp_path / "out", options=Options(**ALIGNED))
    warped = nib.load(tmp_path / "out" / "warped.nii.gz")
    assert warped.shape == SIZE
    np.testing.assert_allclose(warped.affine, affine, atol=1e-4)  # float32 in the headers


def test_the_summary_says_what_was_done_and_how_good_it_is(
    tmp_path: Path, write: Write, bent: Callable[[str], None]
) -> None:
    bent("diffeomorphic")
    paths = {**write("moving", AFFINES["straight"], bend=4.0), **write("fixed", AFFINES["oblique"])}
    weights, out = tmp_path / "weights.pt", tmp_path / "deep" / "out"
    weights.write_bytes(b"never read")
    summary = register_files(output=out, options=Options(weights, **ALIGNED), **paths)  # type: ignore[arg-type]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {path.name for path in out.iterdir()} == set(FILES.values())
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert summary["inputs"].keys() == {*paths, "weights"}
    for role, path in {**paths, "weights": weights}.items():
        assert summary["inputs"][role]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert summary["options"] == {
        **ALIGNED,
        "preset": "wide",
        "steps": None,
        "similarity": "lncc",
        "brain_extraction": "auto",
        "same_person": False,
        "smoothness": 0.5,
        "symmetric": False,
        "grid": {"size": [36, 40, 44], "spacing": GRID.spacing},
        "command": "vxm register MOVING FIXED --output DIR --weights WEIGHTS --space fixed --alignment none "
        f"--no-refine --size 36 40 44 --spacing {GRID.spacing:g}",
    }
    assert summary["seconds"].keys() == {"brain", "affine", "network", "folds", "compose", "warp"}
    assert summary["versions"]["torch"] == torch.__version__
    fixed, warped = (nib.load(path).get_fdata() for path in (paths["fixed"], out / "warped.nii.gz"))
    result = register(paths["moving"], paths["fixed"], weights=network(), **ALIGNED)
    at = np.tensordot(result.fixed.affine[:3, :3], np.indices(SIZE) + result.ddf, 1)
    at += (result.fixed.affine - result.moving.affine)[:3, 3].reshape(3, 1, 1, 1)
    at = np.tensordot(np.linalg.inv(result.moving.affine[:3, :3]), at, 1)
    known = np.all((at >= 0) & (at <= np.reshape(SIZE, (3, 1, 1, 1)) - 1), axis=0)
    assert 0.5 < known.mean() < 1
    expected = np.corrcoef(fixed[known], warped[known])[0, 1]
    assert summary["correlation_after"] == pytest.approx(expected, abs=1e-5)  # a point at the border may fall out
    assert summary["correlation_before"] == summary["correlation_affine"] != summary["correlation_after"]
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
    determinant = jacobian_determinant(torch.from_numpy(result.ddf)[None]).numpy()
    found = nib.load(out / "jacobian.nii.gz").get_fdata()
    np.testing.assert_allclose(found, determinant[0, 0], atol=1e-5)  # float32
    assert summary["folding_percent"] == 100 * np.mean(determinant <= 0)
    assert summary["sdlogj"] == pytest.approx(np.log(determinant[determinant > 0]).std(), rel=1e-4)


def part(scan: Scan, start: int, stop: int) -> Scan:
    """What a smaller field of view shows: these planes."""
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ (0, 0, start)
    return Scan(scan.array[..., start:stop], affine, scan.name)


# Planes of a phantom that shows something in 3 to 19 of 23.
VIEWS = {"half in common": ((0, 14), (8, 23)), "slab": ((5, 15), (8, 18)), "vertex cut": ((0, 13), (0, 16))}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_what_lies_outside_a_field_of_view_counts_neither_in_the_refinement_nor_in_the_correlation(
    views: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    """Two views of one body: there is nothing to move, and where both show it they are the same."""
    of_moving, of_fixed = (part(body(AFFINES["straight"]), *view) for view in views)
    result = register(of_moving, of_fixed, weights="none", space="fixed", alignment="none", steps=15)
    start, stop = (max(views[0][0], views[1][0]) - views[1][0], min(views[0][1], views[1][1]) - views[1][0])
    shown = of_fixed.array[..., start:stop] > 0
    moved = np.linalg.norm(result.ddf, axis=0)[..., start:stop]
    assert moved[shown].mean() < 0.1  # voxels
    measures = result.measures()
    assert measures["correlation_before"] == pytest.approx(1, abs=1e-6)
    assert measures["correlation_after"] > 0.99


def test_without_a_network_the_map_is_the_affine(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    pose = np.eye(4)
    pose[:3, 3] = (8, -4, 6)
    monkeypatch.setattr(registration, "align", lambda *_: pose)
    paths = {**write("moving", AFFINES["straight"]), **write("fixed", AFFINES["oblique"])}
    options = Options(space="fixed", refine=False)
    summary = register_files(output=tmp_path / "out", options=options, **paths)  # type: ignore[arg-type]
    assert summary["options"]["preset"] is None
    point = (3.0, -20.0, 7.0)
    for name in ("affine.txt", "forward.h5"):
        moved = sitk.ReadTransform(str(tmp_path / "out" / name)).TransformPoint(point)
        np.testing.assert_allclose(moved, np.add(point, (-8, 4, 6)), atol=1e-5)  # LPS; float32
    assert summary["correlation_before"] != pytest.approx(summary["correlation_affine"], abs=1e-3)
    assert summary["correlation_affine"] == pytest.approx(summary["correlation_after"], abs=1e-6)  # float32


@pytest.mark.parametrize("given", [False, True], ids=["from affine", "from network"])
def test_refining_brings_the_scans_closer(given: bool) -> None:
    start = network() if given else None
    moving, fixed = (body(AFFINES["straight"], bend) for bend in (3.0, 0.0))
    before = register(moving, fixed, weights=start, **ALIGNED)
    found = register(moving, fixed, weights=start, **{**ALIGNED, "budget": 20})
    off, left = (np.abs(result.warped.array - fixed.array).mean() for result in (before, found))
    assert left < 0.8 * off


@pytest.mark.parametrize("preset", ["diffeomorphic", "vm1"])
def test_one_pass_leaves_no_fold(preset: str) -> None:
    """Whatever the network says, to and fro."""
    wild = network(preset)
    torch.nn.init.normal_(wild.network.flow.weight, std=2.0)
    scans = [body(AFFINES["straight"], bend) for bend in (4.0, 0.0)]
    said: list[Tensor] = []
    wild.register_forward_hook(lambda module, seen, found: said.append(found["ddf"].clone()))
    result = register(*scans, weights=wild, **ALIGNED)
    assert float(folding(said[0], scheme="forward")) > 0
    for found in (result.forward, result.inverse):
        assert found.field is not None
        taper = registration._TAPER
        field = torch.from_numpy(found.field.ddf)[None, :, taper:-taper, taper:-taper, taper:-taper]
        assert float(field.abs().max()) > 1
        for scheme in ("central", "forward"):
            assert float(folding(field, scheme=scheme)) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_hounsfield_units_count_from_air(masked: bool) -> None:
    """As if air were 0; what lies outside the moving scan is air."""
    affine = AFFINES["straight"]
    shifted = affine.copy()
    shifted[:3, 3] += [9, 0, 0]
    scans = [Scan(phantom(affine, bend)[0], at) for bend, at in ((4.0, affine), (0.0, shifted))]
    mask = np.zeros(SIZE, bool)
    mask[:, 8:] = True
    options: dict[str, Any] = {"space": "fixed", "alignment": "none", "weights": network(), "refine": False}
    if masked:
        options |= {"moving_mask": Scan(mask, affine), "fixed_mask": Scan(mask, shifted)}
    expected = register(*scans, **options)
    found = register(*(Scan(scan.array - 1000, scan.affine) for scan in scans), **options)
    assert found.grid == expected.grid
    np.testing.assert_allclose(found.ddf, expected.ddf, atol=2e-3)  # float32 has 3 digits less of 1000
    np.testing.assert_allclose(found.warped.array, expected.warped.array - 1000, atol=0.5)
    assert (found.warped.array == -1000).any()


def test_a_scan_against_itself_stays_where_it_is() -> None:
    """Whatever the network says of it."""
    scan = coarse_brain()
    options: dict[str, Any] = {**ALIGNED, "grid": WorkingGrid((48, 56, 48), 4.0), "weights": network()}
    assert np.abs(register(scan, scan, **options).ddf).max() > 0.5
    result = register(scan, scan, **{**options, "budget": 5})
    points = np.argwhere(scan.array > 0) @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    np.testing.assert_allclose(result.forward.apply(points), points, atol=1e-6)
    np.testing.assert_allclose(result.inverse.apply(points), points, atol=1e-6)
    np.testing.assert_allclose(result.warped.array, scan.array, atol=1e-3)  # of 200: float32


@pytest.mark.parametrize("refined", [False, True])
def test_exchanged_scans_get_the_inverse(refined: bool) -> None:
    moving = coarse_brain()
    fixed = moving.like(moving.array[::-1].copy())  # in the mirror
    grid = WorkingGrid((48, 56, 48), 4.0)
    options: dict[str, Any] = {"alignment": "none", "weights": network(), "grid": grid, "refine": refined, "steps": 4}
    options["smoothness"] = 2.0  # in voxels as much as the default is at 1 mm
    there, back = (register(*pair, symmetric=True, **options) for pair in ((moving, fixed), (fixed, moving)))
    for one, other in ((there.forward, back.inverse), (there.inverse, back.forward)):
        assert one.field is not None
        assert other.field is not None
        np.testing.assert_allclose(one.field.ddf, other.field.ddf, atol=1e-3)  # voxels
        assert np.abs(one.field.ddf).max() > 0.1
    points = np.argwhere(fixed.array > 0) @ fixed.affine[:3, :3].T + fixed.affine[:3, 3]
    missed = np.linalg.norm(there.inverse.apply(there.forward.apply(points)) - points, axis=1)
    assert np.percentile(missed, 99) < 0.1 * 4  # mm, of a voxel
    one_way = [register(*pair, **options) for pair in ((moving, fixed), (fixed, moving))]
    fields = one_way[0].forward.field, one_way[1].inverse.field
    assert np.abs(fields[0].ddf - fields[1].ddf).max() > 0.1  # type: ignore[union-attr]  # both are there


def rigid(degrees: tuple[float, float, float], shift: tuple[float, float, float]) -> Affine:
    found = np.eye(4)
    found[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    found[:3, 3] = shift
    return found


def test_scans_of_one_person_are_aligned_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rigidly, to and fro, whatever the errors of their alignment to the template; exchanged, they get the inverse."""
    scans = coarse_brain("m"), coarse_brain("f")
    found = {
        ("m", "t"): rigid((3, 5, -4), (7, -2, 3)),
        ("f", "t"): rigid((-6, 1, 2), (1, 4, -5)),
        ("m", "f"): rigid((9, 4, -6), (6, -6, 8)),
        ("f", "m"): np.linalg.inv(rigid((9.4, 4.2, -6.1), (6.2, -6.1, 8.3))),
    }
    kinds = []

    def noted(moving: Scan, fixed: Scan | None, kind: str) -> Affine:
        kinds.append(kind)
        return found[moving.name, fixed.name if fixed is not None else "t"]

    monkeypatch.setattr("voxelmorph_monai.space.middle.align", noted)
    monkeypatch.setattr(registration, "align_to_mni152", noted)
    monkeypatch.setitem(registration.SCALINGS, "percentile", lambda scan: scan)
    there, back = (
        register(*pair, weights="none", refine=False, same_person=True, brain_extraction="off")
        for pair in (scans, scans[::-1])
    )
    np.testing.assert_allclose(there.forward.linear, back.inverse.linear, atol=1e-9)
    np.testing.assert_allclose(there.forward.linear @ back.forward.linear, np.eye(4), atol=1e-9)
    assert set(kinds) == {"rigid"}
    points = np.array([[0.0, 0.0, 0.0], [60.0, -70.0, 50.0]])
    for direct in (found["m", "f"], np.linalg.inv(found["f", "m"])):  # half way between the two
        error = there.forward.apply(points) - (points @ direct[:3, :3].T + direct[:3, 3])
        assert 0.05 < np.abs(error).max() < 0.5  # mm


def test_one_person_gets_no_network_and_a_smoothness_of_its_own() -> None:
    assert shipped.weights_file(Options(same_person=True)) is None
    assert shipped.weights_file(Options()) == shipped_weights()
    assert Options(same_person=True).smoothness_mm == SAME_PERSON
    assert Options(same_person=True, smoothness=2).smoothness_mm == 2
    assert Options().smoothness_mm == SMOOTHNESS["default"] == signature(refine).parameters["smoothness"].default


def test_scans_are_refined_by_the_similarity_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def noted(*images: torch.Tensor, similarity: object, **options: Any) -> Any:
        used.append(similarity)
        return refine(*images, **options)

    monkeypatch.setattr(registration, "refine", noted)
    scan = body(AFFINES["straight"])
    for similarity in ("lncc", "mi", "mind"):
        register(scan, scan, similarity=similarity, **{**ALIGNED, "budget": 1e-9})
    assert [type(loss) for loss in used] == [LNCCLoss, MutualInformationLoss, MINDLoss]
    with pytest.raises(ValueError, match=r"similarity is 'ncc'\. .* lncc, mi, mind\.$"):
        register(scan, scan, similarity="ncc", **{**ALIGNED, "budget": 1})


def test_without_a_network_the_refinement_runs_on_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, float]] = []

    def noted(moving: torch.Tensor, fixed: torch.Tensor, *, budget: float, **_: Any) -> Any:
        used.append((moving.device.type, budget))
        nothing = torch.zeros(1, 3, *fixed.shape[2:])
        return Refinement(nothing, nothing, [])

    monkeypatch.setattr(registration, "refine", noted)
    scan = body(AFFINES["straight"])
    register(scan, scan, device="meta", **{**ALIGNED, "budget": math.inf})
    register(scan, scan, weights=network(), device="meta", **{**ALIGNED, "budget": 5})
    assert used == [("meta", math.inf), ("cpu", 5)]  # that of the network


def test_an_affine_map_is_found_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there, which this torch could not use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", None)  # nothing is put anywhere
    scan = body(AFFINES["straight"])
    assert not register(scan, scan, **ALIGNED).ddf.any()


def test_the_default_grid_fits_scans_of_any_size() -> None:
    """A body longer than the grid for brains."""
    affine = AFFINES["straight"] @ np.diag([3.0, 3, 3, 1])
    scan = Scan(phantom(AFFINES["straight"])[0], affine)
    result = register(scan, scan, budget=1e-9, space="fixed", alignment="none")
    assert result.grid == WorkingGrid.fitting(scan)
    index = np.linalg.inv(result.grid.around(scan).affine) @ affine
    inside = np.argwhere(scan.array > 0)
    places = inside @ index[:3, :3].T + index[:3, 3]
    np.testing.assert_allclose(places.min(axis=0), 8, atol=0.51)  # voxels of margin; the size is a whole number
    np.testing.assert_allclose(places.max(axis=0), np.array(result.grid.size) - 9, atol=0.51)
    assert result.grid.spacing == pytest.approx(spacing(affine).min())


def test_a_fitting_grid_has_no_more_voxels_than_that_of_the_literature() -> None:
    scan = Scan(np.ones((500, 400, 300), np.uint8), np.diag([0.5, 0.5, 0.5, 1]))
    grid = WorkingGrid.fitting(scan)
    voxels = math.prod(WorkingGrid().size)
    assert 0.93 * voxels < math.prod(grid.size) <= voxels
    grid.around(scan)  # which refuses one that is too small


def test_weights_are_loaded_and_wrong_ones_refused(tmp_path: Path) -> None:
    torch.save(VoxelMorph("vm2").state_dict(), tmp_path / "vm2.pt")
    loaded = load_network(tmp_path / "vm2.pt", "vm2")
    assert not loaded.training
    assert loaded.bidirectional is False
    for name, tensor in torch.load(tmp_path / "vm2.pt").items():
        assert torch.equal(loaded.network.state_dict()[name].cpu(), tensor)
    (tmp_path / "text.pt").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"weights .*vm2.pt do not fit the network"):
        load_network(tmp_path / "vm2.pt", "vm1")
    for name in ("text.pt", "list.pt"):
        with pytest.raises(ValueError, match=f"{name} do not fit the network"):
            load_network(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.pt do not exist"):
        load_network(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"moving_mask": (np.zeros(SIZE), AFFINES["straight"])}, "moving_mask is not a label map.*0.0"),
        ({"moving_mask": (phantom(AFFINES["straight"])[0] <= 300, AFFINES["straight"])}, "mask moving_mask .* moving"),
        ({"budget": -1.0}, r"budget is -1\.0\. .*0 seconds or more"),
        ({"budget": float("nan")}, r"budget is nan\. .*0 seconds or more"),
        ({"steps": 0}, r"steps is 0\. .*1 or more"),
        ({"space": "moving"}, r"space is 'moving'\. .* mni152, fixed"),
        ({"alignment": "bspline"}, r"alignment is 'bspline'\. .* affine, rigid, none"),
        ({"weights": network().train()}, r"network is in training mode: call network\.eval"),
        ({"weights": Registration(VoxelMorph(spatial_dims=2)).eval()}, "network takes 2 channels in 2-D, .* 3-D"),
        ({"space": "mni152"}, r"moving shows 0\.\d+ litres .* 0\.3 to 3\.3 litres at this spacing"),
        ({"weights": network(), "grid": WorkingGrid((9, 9, 9))}, r"grid of \[9\.0, 9.* too small for fixed, .* needs"),
        ({"moving": (np.zeros(SIZE, np.float32), np.eye(4))}, "moving is empty: .* background, 0"),
        ({"fixed": (np.ones(SIZE[:2], np.float32), np.eye(4))}, r"moving .* \(26, 31, 23\) .* fixed .* \(26, 31, 1\)"),
        ({"moving": (np.ones((9, 0, 9), np.float32), np.eye(4))}, r"moving has shape \(9, 0, 9\)"),
        ({"moving": (np.full(SIZE, np.nan, np.float32), np.eye(4))}, "moving has 18538 voxels that are NaN"),
        ({"fixed": (phantom(np.diag([2.0, 2, 2, 1]))[0], np.eye(4) + np.eye(4, k=1))}, "axes of fixed are not at righ"),
        (
            {"moving": (phantom(AFFINES["straight"])[0], np.eye(4) + 900 * np.eye(4, k=3))},
            "moving and fixed overlap by only 0%",
        ),
    ],
)
def test_what_cannot_be_registered_is_refused(options: dict[str, Any], match: str) -> None:
    affine = AFFINES["straight"]
    image = phantom(affine)[0] * (phantom(affine)[0] > 300), affine
    given = {"moving": image, "fixed": image, **ALIGNED, **options}
    with pytest.raises(ValueError, match=match):
        register(**{name: Scan(*value, name) if _is_pair(value) else value for name, value in given.items()})


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and isinstance(value[0], np.ndarray)


def test_what_is_known_to_fail_fails_before_the_work(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write("moving", AFFINES["straight"])
    same = tmp_path / "elsewhere" / paths["moving"].name
    same.parent.mkdir()
    same.write_bytes(paths["moving"].read_bytes())
    monkeypatch.setattr(registration, "network_of", None)  # is not reached
    save_image(tmp_path / "slice.nii.gz", np.eye(9, dtype=np.float32)[..., None], np.eye(4))
    pair = [tmp_path / "slice.nii.gz"] * 2
    with pytest.raises(ValueError, match=r"slices and 2-D images .* MNI152.* space 'fixed'"):  # not of its weights
        register_files(*pair, tmp_path / "out", options=Options(shipped_weights()))
    monkeypatch.setattr(files_app, "register_scans", None)
    with pytest.raises(ValueError, match=r"^moving .* and fixed .* same name in BIDS"):
        register_files(paths["moving"], same, tmp_path / "out", bids=True, options=Options(**ALIGNED))
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mounted")
    with pytest.raises(ValueError, match="mounted is a mount point"):
        register_files(*pair, tmp_path / "mounted", overwrite=True, options=Options(space="fixed"))


def test_an_earlier_registration_is_overwritten_whole_or_not_at_all(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {**write("moving", AFFINES["straight"], bend=4.0), **write("fixed", AFFINES["oblique"])}
    out = tmp_path / "out"
    options = Options(**ALIGNED)
    register_files(output=out, options=options, **paths)  # type: ignore[arg-type]
    del paths["moving_labels"]
    with pytest.raises(FileExistsError, match="out already exists"):
        register_files(output=out, options=options, **paths)  # type: ignore[arg-type]
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(result_app, "save_results", full)
        with pytest.raises(OSError, match="No space left"):
            register_files(output=out, overwrite=True, options=options, **paths)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    register_files(output=out, overwrite=True, options=options, **paths)  # type: ignore[arg-type]
    assert {path.name for path in out.iterdir()} == set(FILES.values()) - {"warped_labels.nii.gz"}
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_aligned_is_said_in_one_line() -> None:
    moving, fixed = (body(AFFINES["straight"], name=name) for name in ("a.nii", "b.nii"))
    even = moving.like(np.full(moving.shape, 7, np.float32))
    with pytest.raises(ValueError, match=r"^a\.nii .* same intensity everywhere, .*\.$"):
        register(even, fixed, space="fixed")


def test_the_displacement_tapers_to_0_around_the_grid_of_the_network() -> None:
    bend, seen = network(), []
    torch.nn.init.constant_(bend.network.flow.bias, 1.0)  # a displacement at the border too
    bend.register_forward_hook(lambda _, pair, found: seen.append(found["ddf"][0].numpy()))
    images = [body(AFFINES[name]) for name in ("flipped", "oblique")]
    field = register(*images, weights=bend, **ALIGNED).forward.field
    assert field is not None
    ddf, affine = field
    margin = tuple(slice(registration._TAPER, -registration._TAPER) for _ in range(3))
    np.testing.assert_array_equal(ddf[(slice(None), *margin)], seen[0])
    for axis in (1, 2, 3):
        assert not np.take(ddf, [0, -1], axis).any()
        edge = np.abs(np.take(seen[0], [0, -1], axis)).max()
        assert edge > 0.5
        steps = np.abs(np.diff(ddf, axis=axis)).max()
        assert steps <= max(np.abs(np.diff(seen[0], axis=axis)).max(), edge / registration._TAPER) * 1.001  # float32
    corner = GRID.around(images[1]).affine @ [0, 0, 0, 1]
    np.testing.assert_allclose(affine @ [*[registration._TAPER] * 3, 1], corner, atol=1e-9)


@pytest.mark.parametrize(("labelled", "steps"), [(False, None), (True, None), (True, 1)])
def test_nothing_is_worked_out_twice(
    tmp_path: Path,
    write: Write,
    bent: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    labelled: bool,
    steps: int | None,
) -> None:
    """Passes over the voxels are what a registration of large scans waits for, apart from the network."""
    bent("diffeomorphic")
    backgrounds, warps, maps = [], [], []
    background, on_grid = Scan.background.func, SpatialMap.on_grid

    def counted(scan: Scan) -> float:
        backgrounds.append(scan.name)
        return background(scan)

    def noted(function: Callable[..., Scan], of_map: Callable[..., NDArray[Any]]) -> Callable[..., Scan]:
        def call(scan: Scan, *args: Any, **options: Any) -> Scan:
            warps.append((scan.name, of_map(*args).tobytes()))
            return function(scan, *args, **options)

        return call

    monkeypatch.setattr(Scan, "background", property_like(counted))
    monkeypatch.setattr(registration, "warp_scan", noted(registration.warp_scan, lambda ddf, *_: ddf))
    monkeypatch.setattr(result_app, "resample", noted(result_app.resample, lambda grid, mapping, *_: mapping))
    monkeypatch.setattr(SpatialMap, "on_grid", lambda *args: maps.append(args[0].linear.tobytes()) or on_grid(*args))
    paths = {**write("moving", AFFINES["straight"], bend=4.0), **write("fixed", AFFINES["oblique"])}
    if not labelled:
        paths = {name: paths[name] for name in ("moving", "fixed")}
    (tmp_path / "weights.pt").write_bytes(b"never read")
    refinement = {} if steps is None else {"refine": True, "steps": steps}
    options = Options(tmp_path / "weights.pt", **{**ALIGNED, "alignment": "rigid", **refinement})
    assert options.refines == (steps is not None)
    register_files(output=tmp_path / "out", options=options, **paths)  # type: ignore[arg-type]
    assert {str(paths["moving"]), str(paths["fixed"])} <= set(backgrounds)
    assert len(backgrounds) <= 4
    assert len(warps) == len(set(warps)) == (6 if labelled else 3)  # by the headers, aligned, and all the way
    assert len(maps) == len(set(maps)) == 2  # the whole map, and what the picture shows of it


def property_like(function: Callable[[Scan], float]) -> Any:
    found = cached_property(function)
    found.__set_name__(Scan, "background")
    return found


def head(shift: float) -> Scan:
    """A block of 1.2 litres as a brain, so many mm to the right of where MNI152's brain lies."""
    matrix, shown = mni152().affine, np.argwhere(mni152().array > 0)
    middle = matrix[:3, :3] @ (shown.min(axis=0) + shown.max(axis=0)) / 2 + matrix[:3, 3]  # its axes are those of RAS
    affine = np.diag([5.0, 5.0, 5.0, 1.0])
    array = np.zeros((40, 30, 30), np.float32)
    array[10:30, 5:25, 5:29] = 100 + np.indices((20, 20, 24)).sum(axis=0)
    affine[:3, 3] = middle + np.array([shift, 0, 0]) - affine[:3, :3] @ [19.5, 14.5, 16.5]
    return Scan(array, affine, f"head {shift:g} mm off")


@pytest.mark.parametrize(("shift", "fraction"), [(71.0, 0.60), (-91.0, 0.40), (300.0, 0.0)])
def test_brains_beside_mni152_are_refused_unless_they_are_aligned(shift: float, fraction: float) -> None:
    """The grid reaches 80 mm to both sides of the middle, the brain 50 mm; its voxels are 5 mm wide."""
    options: dict[str, Any] = {"weights": "none", "alignment": "none", "budget": 1e-9}
    with pytest.raises(ValueError, match=f"only {fraction:.0%} of head {shift:g} mm off .* MNI152"):
        register(head(0), head(shift), **options)
    with pytest.raises(ValueError, match=f"only {fraction:.0%} of head {shift:g} mm off .* MNI152"):
        register(head(shift), head(0), **options)


def test_brains_that_reach_a_little_beyond_the_grid_are_registered() -> None:
    """A fifth of one is cut off: what the refinement sees of it is most of it."""
    grid = WorkingGrid((40, 48, 56), 4.0)
    assert register(head(0), head(51), weights="none", alignment="none", steps=1, grid=grid).grid == grid


@pytest.mark.parametrize(("layers", "fraction"), [(12, 0.5), (21, 0.125), (24, 0.0)])
def test_slabs_must_overlap(layers: int, fraction: float) -> None:
    """Two slabs of one body, 24 voxels thick, the second so many layers further on."""
    affine = AFFINES["oblique"]
    whole = 100 + np.indices((9, 8, 48), np.float32).sum(axis=0)
    place = affine.copy()
    place[:3, 3] += place[:3, 2] * layers
    lower, upper = Scan(whole[..., :24], affine, "lower"), Scan(whole[..., layers : layers + 24], place, "upper")
    options: dict[str, Any] = {"space": "fixed", "alignment": "none", "refine": False}
    if fraction < 0.25:
        for pair in ((lower, upper), (upper, lower)):
            with pytest.raises(ValueError, match=f"{pair[0].name} and {pair[1].name} overlap by only {fraction:.0%}"):
                register(*pair, **options)
        return
    warped = register(lower, upper, **options).warped.array
    np.testing.assert_allclose(warped[..., : 24 - layers], upper.array[..., : 24 - layers], atol=1e-3)  # float32
    assert not warped[..., 24 - layers :].any()
