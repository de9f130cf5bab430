"""Transforms of ITK's class MatrixOffsetTransformBase, which Python's ITK does not create, against SimpleITK."""

from pathlib import Path
from typing import Any

import itk
import numpy as np
import pytest
import SimpleITK as sitk
from fields import FIXED, LPS, OBLIQUE, fade, inner, smooth

from voxelmorph_monai import cli
from voxelmorph_monai.maps.chains import field_transform, flatten, map_points
from voxelmorph_monai.maps.files import read_chain, read_transform

CLOSE = 1e-4  # mm


def base(dims: int = 3, turn: float = 0.1) -> Any:
    """A transform with a centre, a shear and a shift, different along each axis."""
    transform = itk.MatrixOffsetTransformBase[itk.D, dims, dims].New()
    transform.SetCenter([5.0, -6, 7][:dims])
    matrix = np.array([[1.1, turn, 0.02], [-0.1, 0.9, 0.05], [0.03, 0, 1.0]])[:dims, :dims]
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(matrix)))
    transform.SetTranslation([1.0, 2, -3][:dims])
    return transform


def composite(*parts: Any) -> Any:
    whole = itk.CompositeTransform[itk.D, parts[0].GetInputSpaceDimension()].New()
    for part in parts:
        whole.AddTransform(part)
    return whole


def shift(dims: int = 3) -> Any:
    transform = itk.TranslationTransform[itk.D, dims].New()
    transform.SetOffset([4.0, -8, 2][:dims])
    return transform


def written() -> dict[str, Any]:
    field = field_transform(fade(smooth(FIXED, 1)), OBLIQUE)
    return {
        "alone.txt": base(),
        "alone.tfm": base(),
        "alone.mat": base(),
        "alone.h5": base(),
        "alone.hdf5": base(),
        "composite.h5": composite(base()),
        "composite.tfm": composite(base(), shift()),
        "two.h5": composite(base(), shift(), base(turn=-0.2)),
        "with_a_field.h5": composite(base(), field),
        "flat.txt": base(2),
        "flat.mat": base(2),
        "flat.h5": base(2),
        "flat_composite.h5": composite(base(2), shift(2)),
    }


@pytest.mark.parametrize("name", written())
def test_it_does_what_simpleitk_does(name: str, tmp_path: Path) -> None:
    itk.transformwrite([written()[name]], str(tmp_path / name), compression=True)
    assert b"MatrixOffsetTransformBase_double" in (tmp_path / name).read_bytes()
    dims = 2 if name.startswith("flat") else 3
    peer, points = sitk.ReadTransform(str(tmp_path / name)), inner()[:, :dims]
    expected = np.array([peer.TransformPoint(point) for point in (points * LPS[:dims]).tolist()]) * LPS[:dims]
    np.testing.assert_allclose(map_points(read_transform(tmp_path / name), points), expected, atol=CLOSE)


TEXT = """#Insight Transform File V1.0
#Transform 0
Transform: MatrixOffsetTransformBase_{kind}_3_3
Parameters: {numbers}
FixedParameters: 0 0 0
"""
NUMBERS = "1.1 0.1 0 -0.1 0.9 0 0 0 1 1 2 3"


@pytest.mark.parametrize("kind", ["double", "float"])
def test_a_text_of_either_precision_is_read_and_inverted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c3d.txt"  # as c3d_affine_tool -oitk writes it
    path.write_text(TEXT.format(kind=kind, numbers=NUMBERS))
    peer = sitk.ReadTransform(str(path))
    for transform, name in ((peer, str(path)), (peer.GetInverse(), f"[{path},1]")):
        expected = np.array([transform.TransformPoint(point) for point in (inner() * LPS).tolist()]) * LPS
        np.testing.assert_allclose(map_points(read_chain([name]).transform, inner()), expected, atol=CLOSE)


def test_what_is_written_of_it_is_read_by_simpleitk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c3d.txt").write_text(TEXT.format(kind="double", numbers=NUMBERS))
    assert cli.main(["compose", "c3d.txt", "c3d.txt", "--output", "twice.mat"]) == 0
    twice, peer = sitk.ReadTransform("twice.mat"), sitk.ReadTransform("c3d.txt")
    np.testing.assert_allclose(
        twice.TransformPoint((10, -20, 30)), peer.TransformPoint(peer.TransformPoint((10, -20, 30))), atol=CLOSE
    )
    assert [part.GetNameOfClass() for part in flatten(read_transform("c3d.txt"))] == ["AffineTransform"]


BAD = {
    "eleven numbers": (NUMBERS[:-2], "11 parameters.*12"),
    "a word": (NUMBERS.replace("0.9", "none"), "not finite numbers.*none"),
    "no inverse": (NUMBERS.replace("0 0 1 1", "0 0 0 1"), "without an inverse"),
}


@pytest.mark.parametrize(("numbers", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_one_is_named(numbers: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text(TEXT.format(kind="double", numbers=numbers))
    with pytest.raises(ValueError, match=rf"bad\.txt .*{message}"):
        read_transform(tmp_path / "bad.txt")


@pytest.mark.parametrize(("name", "message"), [("alone.mat", "ITK cannot read"), ("composite.h5", "is damaged")])
def test_a_cut_one_is_named(name: str, message: str, tmp_path: Path) -> None:
    itk.transformwrite([written()[name]], str(tmp_path / name))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2 + 30])
    with pytest.raises(ValueError, match=rf"(?=.*{name}).*{message}"):
        read_transform(tmp_path / name)


def test_a_parameter_file_of_elastix_is_named(tmp_path: Path) -> None:
    path = tmp_path / "TransformParameters.0.txt"
    path.write_text('(Transform "EulerTransform")\n(NumberOfParameters 6)\n(TransformParameters 0 0 0 1 2 3)\n')
    with pytest.raises(ValueError, match=r"TransformParameters\.0\.txt .*elastix.*transformix -def all"):
        read_transform(path)
