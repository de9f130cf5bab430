"""The direction of a transform: files tell the grids of both scans, and `vxm apply` goes by them."""

import logging
import shutil
from pathlib import Path

import h5py
import itk
import numpy as np
import pytest
import SimpleITK as sitk
from fields import FIXED, MIRRORED, MOVING, OBLIQUE, affine_map, fade, image, smooth

from voxelmorph_monai import cli
from voxelmorph_monai.affines import ImageGrid
from voxelmorph_monai.io.images import read_image, save_image
from voxelmorph_monai.maps.displacements import save_displacement
from voxelmorph_monai.maps.grids import Ends, is_backwards, read_ends, write_ends
from voxelmorph_monai.maps.spatial_map import Displacement, SpatialMap

F, M = ImageGrid(FIXED, OBLIQUE), ImageGrid(MOVING, MIRRORED)


def elsewhere(grid: ImageGrid, shift: float) -> ImageGrid:
    affine = grid.affine.copy()
    affine[:3, 3] += shift
    return ImageGrid(grid.size, affine)


def vxm(words: str) -> int:
    return cli.main(words.split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_image("moving.nii.gz", image(), MIRRORED)
    save_image("fixed.nii.gz", image(FIXED), OBLIQUE)
    field = Displacement(fade(smooth(FIXED, 1)).astype(np.float32), OBLIQUE)
    SpatialMap(np.eye(4), affine_map(), field).save("forward.h5")
    shutil.copy("forward.h5", "plain.h5")
    write_ends("forward.h5", F, M)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_other_programs_read_the_file_as_before() -> None:
    for read in (sitk.ReadTransform, lambda name: itk.transformread(name)[0]):
        with_grids, without = read("forward.h5"), read("plain.h5")
        for point in ([1.0, 2, 3], [-4.0, 0, 5]):
            assert tuple(with_grids.TransformPoint(point)) == tuple(without.TransformPoint(point))
    with h5py.File("forward.h5") as file:
        assert "TransformGroup" in file


@pytest.mark.usefixtures("folder")
def test_the_grids_come_back() -> None:
    for found, expected in zip(read_ends("forward.h5"), (F, M), strict=True):
        assert tuple(found.size) == tuple(expected.size)
        np.testing.assert_array_equal(found.affine, expected.affine)
    assert read_ends("plain.h5") == Ends(None, None)
    save_displacement("field.nii.gz", smooth(FIXED, 1), OBLIQUE)
    fixed, moving = read_ends("field.nii.gz")
    assert tuple(fixed.size) == FIXED
    assert moving is None


def test_which_way() -> None:
    names = ("a", "b")
    ends = Ends(F, M)
    assert not is_backwards(ends, M, F, names)
    assert is_backwards(ends, F, M, names)
    assert not is_backwards(Ends(F, F), F, F, names)  # both lie on one grid: as it was asked
    finer = ImageGrid([2 * n for n in MOVING], MIRRORED @ np.diag([0.5, 0.5, 0.5, 1]))
    assert not is_backwards(ends, finer, F, names)  # any other image of the same space
    assert not is_backwards(ends, finer, ImageGrid((9, 9, 9), OBLIQUE), names)
    assert not is_backwards(Ends(None, None), F, M, names)
    far = Ends(F, elsewhere(M, 500))
    assert not is_backwards(far, elsewhere(finer, 500), ImageGrid((9, 9, 9), OBLIQUE), names)
    assert is_backwards(far, ImageGrid((9, 9, 9), OBLIQUE), elsewhere(finer, 500), names)
    with pytest.raises(ValueError, match="b overlaps neither"):
        is_backwards(far, elsewhere(finer, 500), elsewhere(F, 2000), names)
    with pytest.raises(ValueError, match="a overlaps neither"):
        is_backwards(far, elsewhere(finer, -500), F, names)


@pytest.mark.usefixtures("folder")
def test_apply_goes_the_way_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    words = "--image fixed.nii.gz --reference moving.nii.gz --output"
    with caplog.at_level(logging.WARNING):
        assert vxm(f"apply [plain.h5,1] {words} asked.nii.gz") == 0
        assert not caplog.records
        assert vxm(f"apply forward.h5 {words} taken.nii.gz") == 0
    assert [r.getMessage() for r in caplog.records if "forward.h5" in r.getMessage() and "inverse" in r.getMessage()]
    np.testing.assert_array_equal(read_image("taken.nii.gz")[0], read_image("asked.nii.gz")[0])
    words = "--image moving.nii.gz --reference fixed.nii.gz --output"
    caplog.clear()
    assert vxm(f"apply forward.h5 {words} a.nii.gz") == 0
    assert not caplog.records
    assert vxm(f"apply plain.h5 {words} b.nii.gz") == 0
    np.testing.assert_array_equal(read_image("a.nii.gz")[0], read_image("b.nii.gz")[0])


@pytest.mark.usefixtures("folder")
def test_apply_refuses_an_image_of_another_pair(capsys: pytest.CaptureFixture[str]) -> None:
    save_image("far.nii.gz", image(), elsewhere(M, 3000).affine)
    assert (
        cli.main(
            ["apply", "forward.h5", "--image", "far.nii.gz", "--reference", "fixed.nii.gz", "--output", "a.nii.gz"]
        )
        == 2
    )
    assert "far.nii.gz overlaps neither" in capsys.readouterr().err
    assert not Path("a.nii.gz").exists()


@pytest.mark.usefixtures("folder")
def test_what_vxm_invert_writes_says_its_grids_too() -> None:
    words = "--reference moving.nii.gz --moving fixed.nii.gz"
    assert vxm(f"invert forward.h5 --output back.h5 {words}") == 0
    fixed, moving = read_ends("back.h5")
    assert (tuple(fixed.size), tuple(moving.size)) == (MOVING, FIXED)
