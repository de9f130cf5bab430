"""Series, vectors and gradients: each number against the same work done volume by volume, or by another way."""

import io
import re
import sys
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fields import FIXED, MIRRORED, MOVING, OBLIQUE, affine_map, fade, grid, image, smooth
from scipy.spatial.transform import Rotation

from voxelmorph_monai import cli
from voxelmorph_monai.apps.apply_series import apply_to_series, turn_gradients
from voxelmorph_monai.io.images import read_image, save_image
from voxelmorph_monai.maps.chains import chain, field_transform, map_points
from voxelmorph_monai.maps.displacements import save_displacement
from voxelmorph_monai.space.itk_bridge import linear_transform, save_transform

PAIR = ["1Warp.nii.gz", "0GenericAffine.mat"]


def vxm(words: str) -> int:
    return cli.main(words.split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_image("fixed.nii.gz", image(FIXED), OBLIQUE)
    save_displacement("1Warp.nii.gz", fade(smooth(FIXED, 1)), OBLIQUE)
    save_transform("0GenericAffine.mat", linear_transform(affine_map()))
    return tmp_path


def series(count: int = 3, name: str = "series.nii.gz") -> None:
    made = nib.Nifti1Image(np.stack([image(seed=seed) for seed in range(count)], axis=-1), MIRRORED)
    made.header.set_zooms((*made.header.get_zooms()[:3], 2.5))
    made.header.set_xyzt_units("mm", "sec")
    made.set_qform(MIRRORED, 1)
    nib.save(made, name)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_every_volume_is_resampled_as_it_would_be_by_itself(ending: str) -> None:
    series()
    command = f"apply {' '.join(PAIR)} --reference fixed.nii.gz --interpolation bspline"
    assert vxm(f"{command} --image series.nii.gz --output out.{ending}") == 0
    found = nib.load(f"out.{ending}")
    assert found.shape == (*FIXED, 3)
    assert found.header.get_zooms()[3] == 2.5
    assert found.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-5)
    for t in range(3):
        save_image(f"volume{t}.nii.gz", image(seed=t), MIRRORED)
        assert vxm(f"{command} --image volume{t}.nii.gz --output out{t}.nii.gz") == 0
        np.testing.assert_array_equal(found.dataobj[..., t], read_image(f"out{t}.nii.gz")[0])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("watched", [False, True])
def test_a_series_says_how_far_it_is(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    series()
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: watched)
    monkeypatch.setattr(sys, "stderr", shown)
    assert vxm(f"apply {' '.join(PAIR)} --reference fixed.nii.gz --image series.nii.gz --output out.nii.gz") == 0
    last = shown.getvalue().split("\r")[-1]
    if watched:
        assert re.match(r"apply: 100%.* 3/3 \[", last)
    else:
        assert re.fullmatch(r"apply: 3 of 3 volumes in \d\d:\d\d\n", shown.getvalue())


@pytest.mark.usefixtures("folder")
def test_memory_does_not_grow_with_the_series() -> None:
    peaks = []
    for count in (2, 12):
        series(count, "series.nii")
        tracemalloc.start()
        try:
            apply_to_series(PAIR, "series.nii", "fixed.nii.gz", "out.nii", overwrite=True)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.usefixtures("folder")
def test_vectors_follow_the_points_next_to_them() -> None:
    """A vector is the difference of two points close by, which go back along the transform."""
    ddf = smooth(FIXED, 1, reach=0.5)
    save_displacement("field.nii.gz", ddf, OBLIQUE)
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xz", (20, 60), degrees=True).as_matrix() @ np.diag([1.2, 0.9, 1])
    save_transform("turn.txt", linear_transform(turn))
    transforms = chain([field_transform(ddf, OBLIQUE), linear_transform(turn)])
    v = np.array([0.3, -0.5, 0.8])
    made = nib.Nifti1Image(
        np.broadcast_to(v.astype("f4"), (60, 60, 60, 1, 3)), grid((60,) * 3, np.eye(3), (2,) * 3, (0,) * 3)
    )
    nib.save(made, "vectors.nii.gz")
    command = "apply field.nii.gz turn.txt --vectors vectors.nii.gz --reference fixed.nii.gz"
    assert vxm(f"{command} --coordinates RAS --output out.nii.gz") == 0
    found = nib.load("out.nii.gz").get_fdata()
    assert found.shape == (*FIXED, 1, 3)
    index = np.random.default_rng(1).integers(4, 10, (40, 3))
    points = index @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]
    w, step = found[tuple(index.T)][:, 0], 0.5
    ahead, behind = (map_points(transforms, points + sign * step * w) for sign in (1, -1))
    # as they move along T, w has to become v; within the curvature of a displacement of half a voxel
    np.testing.assert_allclose((ahead - behind) / (2 * step), np.broadcast_to(v, (40, 3)), atol=0.05)
    assert np.abs(w - v).max() > 0.2


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("intent", "flip"), [(1006, 1), (1007, -1)])
def test_the_axes_of_vectors(intent: int, flip: int) -> None:
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    save_transform("turn.txt", linear_transform(turn))
    vectors = np.zeros((*MOVING, 1, 3), np.float32)
    vectors[..., 1] = flip  # to the front
    made = nib.Nifti1Image(vectors, MIRRORED)
    made.header.set_intent(intent)
    nib.save(made, "vectors.nii.gz")
    command = "apply turn.txt --vectors vectors.nii.gz --reference fixed.nii.gz --output out.nii.gz"
    assert vxm(command) == 0
    found = nib.load("out.nii.gz")
    assert found.header["intent_code"] == intent
    centre = found.dataobj[9, 11, 7, 0]
    np.testing.assert_allclose(centre, [flip, 0, 0], atol=1e-5)  # the moving scan's front is the fixed one's right
    assert vxm(f"{command} --overwrite --coordinates {'LPS' if flip > 0 else 'RAS'}") == 2


def test_gradients_turn_with_the_anatomy() -> None:
    """A gradient along a fibre stays along it: both are followed in the world."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", (10, 20, -30), degrees=True).as_matrix()
    rng = np.random.default_rng(0)
    for moving, fixed in ((MIRRORED, OBLIQUE), (OBLIQUE, MIRRORED), (OBLIQUE, OBLIQUE)):
        fibres = rng.standard_normal((3, 6))
        fibres /= np.linalg.norm(fibres, axis=0)
        stated = []
        for affine, world in ((moving, turn[:3, :3] @ fibres), (fixed, fibres)):
            axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
            along = np.linalg.solve(axes, world)
            along[0] *= -1 if np.linalg.det(axes) > 0 else 1  # FSL's rule
            stated.append(along)
        found = turn_gradients(stated[0], chain([linear_transform(turn)]), moving, fixed)
        np.testing.assert_allclose(found, stated[1], atol=1e-9)


def test_of_an_affine_map_gradients_take_the_rotation() -> None:
    turn = Rotation.from_euler("y", 25, degrees=True).as_matrix()
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([1.3, 0.8, 1.1])  # stretched first, along the axes: the nearest rotation is `turn`
    g = np.eye(3)
    affine = np.diag([1.0, 1, -1, 1])  # determinant below 0: FSL counts along its axes, z downwards
    expected = np.diag([1, 1, -1]) @ turn.T @ np.diag([1, 1, -1])
    np.testing.assert_allclose(turn_gradients(g, linear_transform(matrix), affine, affine), expected, atol=1e-9)


@pytest.mark.usefixtures("folder")
def test_gradients_are_refused_where_they_are_not_defined(capsys: pytest.CaptureFixture[str]) -> None:
    series()
    np.savetxt("series.bvec", np.eye(3))
    words = "--image series.nii.gz --bvec series.bvec --reference fixed.nii.gz --output out.nii.gz"
    assert vxm(f"apply {' '.join(PAIR)} {words}") == 2
    assert "each voxel differently" in capsys.readouterr().err
    assert not Path("out.nii.gz").exists()
    assert vxm(f"apply {PAIR[1]} {words}") == 0
    turned = np.loadtxt("out.bvec")
    np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-6)
    np.savetxt("short.bvec", np.eye(3)[:, :2])
    assert vxm(f"apply {PAIR[1]} {words.replace('series.bvec', 'short.bvec')} --overwrite") == 2
    assert "short.bvec has 3 rows and 2 columns" in capsys.readouterr().err
    mirror = np.diag([-1.0, 1, 1, 1])
    with pytest.raises(ValueError, match="reflection"):
        turn_gradients(np.eye(3), linear_transform(mirror), mirror, mirror)


@pytest.mark.usefixtures("folder")
def test_vectors_say_what_is_wrong_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    series(2)
    command = f"apply {PAIR[1]} --reference fixed.nii.gz --output out.nii.gz --vectors"
    assert vxm(f"{command} series.nii.gz") == 2
    assert "series.nii.gz has shape (21, 17, 25, 2)" in capsys.readouterr().err
    series(3)
    assert vxm(f"{command} series.nii.gz") == 2
    assert "series.nii.gz does not state" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("what", ["image", "vectors"])
def test_transforms_of_flat_images_are_refused(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    series(3)
    save_transform("flat.txt", linear_transform(np.eye(3)))
    words = f"--{what} series.nii.gz --reference fixed.nii.gz --output out.nii.gz"
    assert vxm(f"apply flat.txt {words}{' --coordinates RAS' * (what == 'vectors')}") == 2
    assert "series.nii.gz does not fit the transforms, which are in 2-D" in capsys.readouterr().err
    assert not Path("out.nii.gz").exists()
