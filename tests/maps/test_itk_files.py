"""Files of maps are written as ITK writes them, and read as ITK reads them."""

from pathlib import Path
from typing import Any

import h5py
import itk
import numpy as np
import pytest
import SimpleITK as sitk
from fields import FIXED, OBLIQUE, affine_map, fade, inner, smooth

from voxelmorph_monai.affines import in_plane
from voxelmorph_monai.maps.chains import chain, field_transform, map_points
from voxelmorph_monai.maps.itk_files import read_chain_file, save_chain_file, save_linear
from voxelmorph_monai.maps.spatial_map import Displacement, SpatialMap
from voxelmorph_monai.space.itk_bridge import linear_transform, save_transform


def bent() -> SpatialMap:
    field = Displacement(fade(smooth(FIXED, 1)).astype(np.float32), OBLIQUE)
    return SpatialMap(np.linalg.inv(affine_map()), affine_map() @ np.diag([1.1, 0.9, 1.0, 1.0]), field)


def flat() -> SpatialMap:
    """A map of 2-D images: it keeps the plane of z = 0."""
    linear, ddf = np.eye(4), smooth((*FIXED[:2], 1), 2).astype(np.float32)
    linear[:2, :2], linear[:2, 3] = [[0.9, -0.2], [0.1, 1.1]], [3.0, -4.0]
    ddf[2] = 0
    return SpatialMap(linear, np.linalg.inv(linear), Displacement(ddf, np.diag([1.5, 2.0, 1.0, 1.0])), spatial_dims=2)


def datasets(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.mark.parametrize("map_", [bent(), bent()._replace(field=None), flat()], ids=["bent", "linear", "2-D"])
def test_a_file_holds_what_itk_would_write(map_: SpatialMap, tmp_path: Path) -> None:
    map_.save(tmp_path / "ours.h5")
    writer = itk.TransformFileWriterTemplate[itk.F].New(FileName=str(tmp_path / "itk.h5"))
    writer.SetInput(map_.to_itk())
    writer.Update()
    ours, itks = datasets(tmp_path / "ours.h5"), datasets(tmp_path / "itk.h5")
    assert ours.keys() == {name for name in itks if not name.startswith("OS")}  # the operating system
    for name, value in itks.items():
        if name.startswith("TransformGroup"):
            assert ours[name].dtype == value.dtype
            assert ours[name].shape == value.shape
            if value.dtype.kind == "f":  # ITK computes the grid from its own image, which rounds otherwise
                np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=1e-12)
            else:
                assert list(ours[name]) == list(value)


def test_no_dataset_is_compressed(tmp_path: Path) -> None:
    """Deflate would take seconds of processor time to make noise a tenth smaller."""
    bent().save(tmp_path / "forward.h5")
    with h5py.File(tmp_path / "forward.h5") as file:
        assert file["TransformGroup/2/TransformParameters"].compression is None


@pytest.mark.parametrize("dims", [2, 3])
def test_a_linear_map_in_text_is_that_of_itk(dims: int, tmp_path: Path) -> None:
    matrix = affine_map() if dims == 3 else in_plane(flat().pre)
    save_linear(tmp_path / "affine.txt", matrix)
    (found,) = itk.transformread(str(tmp_path / "affine.txt"))
    expected = linear_transform(matrix)
    assert found.GetTransformTypeAsString() == expected.GetTransformTypeAsString()
    np.testing.assert_array_equal(np.array(found.GetParameters()), np.array(expected.GetParameters()))
    assert sitk.ReadTransform(str(tmp_path / "affine.txt")).GetDimension() == dims


@pytest.mark.parametrize("compressed", [True, False])
def test_what_itk_and_simpleitk_write_is_read(compressed: bool, tmp_path: Path) -> None:
    linear = linear_transform(affine_map())
    linear.SetCenter([10.0, -20.0, 5.0])  # which moves the map, as the shift of ITK's parameters stays
    itks = chain([linear])
    itks = chain([linear, field_transform(fade(smooth(FIXED, 1)), OBLIQUE), linear_transform(affine_map())])
    itk.transformwrite([itks], str(tmp_path / "chain.h5"), compression=compressed)
    found = SpatialMap.read(tmp_path / "chain.h5")
    assert found is not None
    np.testing.assert_allclose(found.apply(inner()), map_points(itks, inner()), atol=1e-9)  # float64 in the file
    theirs = sitk.AffineTransform(3)
    theirs.SetMatrix((1.1, 0.2, 0, 0, 0.9, 0.1, 0, 0, 1.2))
    theirs.SetTranslation((1, 2, 3))
    theirs.SetCenter((10, -20, 5))
    sitk.WriteTransform(theirs, str(tmp_path / "affine.h5"))
    found = SpatialMap.read(tmp_path / "affine.h5")
    assert found is not None
    expected = [np.array(theirs.TransformPoint(point)) * [-1, -1, 1] for point in inner() * [-1, -1, 1]]
    np.testing.assert_allclose(found.apply(inner()), expected, atol=1e-9)


def test_a_map_comes_back(tmp_path: Path) -> None:
    bent().save(tmp_path / "forward.h5")
    found = SpatialMap.read(tmp_path / "forward.h5")
    assert found is not None
    np.testing.assert_allclose(found.apply(inner()), bent().apply(inner()), atol=2e-5)  # float32 of 100 mm


def test_other_files_are_left_to_itk(tmp_path: Path) -> None:
    field = field_transform(fade(smooth(FIXED, 1)), OBLIQUE)
    save_transform(tmp_path / "two.h5", chain([field, field]))
    flat().save(tmp_path / "flat.h5")
    spline = sitk.BSplineTransform(3)
    sitk.WriteTransform(sitk.CompositeTransform([sitk.Euler3DTransform(), spline]), str(tmp_path / "spline.h5"))
    nothing = np.full((3, *FIXED), np.nan)
    save_transform(tmp_path / "nan.h5", chain([field_transform(nothing, OBLIQUE)]))
    bent().save(tmp_path / "whole.h5")
    (tmp_path / "cut.h5").write_bytes((tmp_path / "whole.h5").read_bytes()[:5000])
    save_linear(tmp_path / "affine.txt", np.eye(4))
    for name in ("two.h5", "flat.h5", "spline.h5", "nan.h5", "cut.h5", "affine.txt", "missing.h5"):
        assert SpatialMap.read(tmp_path / name) is None, name
    assert len(read_chain_file(tmp_path / "two.h5") or []) == 2


def test_a_shear_cannot_be_the_grid_of_a_displacement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="right angles"):
        save_chain_file(tmp_path / "a.h5", [(np.zeros((3, 4, 4, 4), np.float32), np.eye(4) + 0.3 * np.eye(4, k=1))])
    assert not list(tmp_path.iterdir())
