"""What ``import voxelmorph_monai as vxm`` offers: the names, and that they do what the command line does."""

import ast
import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from phantoms import AFFINES, Write, phantom

import voxelmorph_monai as vxm
from voxelmorph_monai.apps.result import FILES
from voxelmorph_monai.cli import main
from voxelmorph_monai.io.images import save_image

pytestmark = pytest.mark.usefixtures("one_thread")

STUB = Path(vxm.__file__).with_name("__init__.pyi")
PAIR = {"space": "fixed", "alignment": "rigid", "grid": vxm.WorkingGrid((24, 28, 30), 6.0)}


def test_names_are_those_that_type_checkers_are_told() -> None:
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    told = {
        alias.asname: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {name: (f"voxelmorph_monai.{module}", name) for name, module in vxm._PUBLIC.items()}
    others = [node for node in tree.body if not isinstance(node, ast.ImportFrom)]
    assert [ast.unparse(node) for node in others] == ["__version__: str"]
    assert vxm.__all__ == ["__version__", *vxm._PUBLIC]


@pytest.mark.parametrize("name", vxm._PUBLIC)
def test_every_name_is_there(name: str) -> None:
    module = import_module(f"voxelmorph_monai.{vxm._PUBLIC[name]}")
    assert getattr(vxm, name) is getattr(module, name)
    assert name in dir(vxm)
    assert name in module.__all__


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match="module 'voxelmorph_monai' has no attribute 'regsiter'"):
        vxm.regsiter  # noqa: B018


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    script = """
import sys
import voxelmorph_monai as vxm
heavy = {"torch", "itk", "numpy", "monai", "nibabel", "scipy"}
assert "register" in dir(vxm)
print(sorted(heavy & set(sys.modules)))
vxm.Options
print(sorted(heavy & set(sys.modules)))
vxm.warp
print(sorted({"itk", "monai", "nibabel", "scipy"} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["[]", "[]", "[]"]


def test_defaults_are_the_same_everywhere() -> None:
    given = {name: option.default for name, option in inspect.signature(vxm.register).parameters.items()}
    assert vxm.Options() == vxm.Options(**{name: given[name] for name in vxm.Options.__dataclass_fields__})


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """Two scans with labels in files, and weights of a network that bends them by some mm."""
    write = Write(tmp_path)
    paths = {**write("moving", AFFINES["flipped"], bend=4.0), **write("fixed", AFFINES["oblique"])}
    torch.manual_seed(3)
    model = vxm.VoxelMorph("vm1")
    torch.nn.init.normal_(model.flow.weight, std=0.1)
    paths["weights"] = tmp_path / "weights.pt"
    torch.save(model.state_dict(), paths["weights"])
    return paths


def voxels(path: Path) -> NDArray[Any]:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("steps", [None, 2])
def test_python_does_what_the_command_line_does(pair: dict[str, Path], tmp_path: Path, steps: int | None) -> None:
    """Bit for bit: the warped scan, its labels, the map and all that is made of it."""
    refined = ["--no-refine"] if steps is None else ["--steps", str(steps)]
    words = ["register", str(pair["moving"]), str(pair["fixed"]), "--output", str(tmp_path / "command")]
    words += ["--moving-labels", str(pair["moving_labels"]), "--weights", str(pair["weights"]), "--preset", "vm1"]
    words += ["--space", "fixed", "--alignment", "rigid", "--size", "24", "28", "30", "--spacing", "6"]
    assert main([*words, *refined]) == 0
    result = vxm.register(
        pair["moving"],
        str(pair["fixed"]),
        moving_labels=pair["moving_labels"],
        weights=pair["weights"],
        preset="vm1",
        refine=steps is not None,
        steps=steps,
        **PAIR,
    )
    assert np.abs(result.ddf).max() > 1
    summary = result.save(tmp_path / "python")
    np.testing.assert_array_equal(result.warped, voxels(tmp_path / "command" / "warped.nii.gz"))
    assert result.warped_labels is not None
    np.testing.assert_array_equal(result.warped_labels, voxels(tmp_path / "command" / "warped_labels.nii.gz"))
    for name in ("displacement.nii.gz", "jacobian.nii.gz", "warped.nii.gz"):
        saved = nib.load(tmp_path / "python" / name)
        np.testing.assert_array_equal(np.asarray(saved.dataobj), voxels(tmp_path / "command" / name))
        np.testing.assert_array_equal(saved.affine, nib.load(tmp_path / "command" / name).affine)
    assert {path.name for path in (tmp_path / "python").iterdir()} == set(FILES.values())
    points = np.argwhere(result.fixed.array > 0)[::97] @ AFFINES["oblique"][:3, :3].T + AFFINES["oblique"][:3, 3]
    forward, lps = sitk.ReadTransform(str(tmp_path / "command" / "forward.h5")), np.array([-1.0, -1.0, 1.0])
    theirs = [np.array(forward.TransformPoint(point)) * lps for point in (points * lps).tolist()]
    np.testing.assert_allclose(result.forward.apply(points), theirs, atol=1e-4)  # mm: the file holds float32
    assert summary["options"]["steps"] == steps
    told = json.loads((tmp_path / "command" / "summary.json").read_text())
    same = summary.keys() - {"seconds"}
    assert {name: summary[name] for name in same} == {name: told[name] for name in same}


def test_a_scan_may_come_as_what_people_have(pair: dict[str, Path]) -> None:
    """Paths, nibabel images of integers, tensors of MONAI, images of ITK: the same scan gives the same result."""
    whole = np.rint(phantom(AFFINES["flipped"], 4.0)[0]).astype(np.int16)
    save_image(pair["moving"], whole, AFFINES["flipped"])
    affine = nib.load(pair["moving"]).affine
    expected = vxm.register(pair["moving"], pair["fixed"], refine=False, space="fixed", alignment="none")
    assert np.unique(expected.warped.array % 1).size > 100  # interpolated, not rounded
    moving = {
        "nibabel": nib.load(pair["moving"]),
        "MetaTensor": MetaTensor(torch.from_numpy(whole)[None], affine=torch.from_numpy(affine)),
        "ITK": itk.imread(str(pair["moving"])),
        "Scan": vxm.Scan(whole, affine),
    }
    for kind, scan in moving.items():
        found = vxm.register(scan, pair["fixed"], refine=False, space="fixed", alignment="none")
        # 800 over 5 mm times the 1e-5 mm of ITK's own affine, which it takes from the quaternion in float32
        np.testing.assert_allclose(found.warped, expected.warped, atol=1e-2, err_msg=kind)
        assert found.warped.array.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"moving": np.ones((9, 9, 9))}, ("moving", "ndarray", "Scan(array, affine)")),
        ({"moving": torch.ones(9, 9, 9)}, ("moving", "Tensor", "Scan(array, affine)")),
        ({"fixed": None}, ("fixed", "NoneType", "a path, a Scan, a nibabel image")),
        ({"moving_labels": 3}, ("moving_labels", "int", "a path, a Scan, a nibabel image")),
        ({"fixed_mask": (1, 2)}, ("fixed_mask", "tuple", "a path, a Scan, a nibabel image")),
        ({"weights": 3}, ("weights", "int", "a path")),
        ({"weights": vxm.VoxelMorph("vm1")}, ("weights", "VoxelMorph", "Registration")),
        ({"preset": 2}, ("preset", "int", "a name")),
        ({"device": 0}, ("device", "int", "a name")),
        ({"refine": "no"}, ("refine", "str", "True or False")),
        ({"budget": "5"}, ("budget", "str", "a number")),
        ({"budget": None}, ("budget", "NoneType", "a number")),
        ({"steps": 2.5}, ("steps", "float", "a whole number")),
        ({"steps": True}, ("steps", "bool", "a whole number")),
        ({"smoothness": None}, ("smoothness", "NoneType", "a name or a number of mm")),
        ({"symmetric": 1}, ("symmetric", "int", "True or False")),
        ({"same_person": "yes"}, ("same_person", "str", "True or False")),
        ({"grid": (160, 192, 224)}, ("grid", "tuple", "a WorkingGrid")),
    ],
)
def test_a_wrong_type_is_said_in_a_sentence(given: dict[str, Any], words: tuple[str, ...]) -> None:
    scan = vxm.Scan(phantom(AFFINES["straight"])[0], AFFINES["straight"])
    with pytest.raises(TypeError) as caught:
        vxm.register(**{"moving": scan, "fixed": scan, **PAIR, **given})
    message = str(caught.value)
    assert message.startswith(f"{words[0]} is a {words[1]}")
    assert words[2] in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("name", "value"), [("space", None), ("alignment", ["affine"]), ("similarity", 5), ("space", "MNI152")]
)
def test_a_wrong_choice_is_answered_with_the_right_ones(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is '.*'\. .*(mni152, fixed|affine, rigid, none|lncc, mi, mind)"):
        vxm.Options(**{name: value})


def test_numbers_of_numpy_are_numbers() -> None:
    options = vxm.Options(budget=np.float32(5), steps=np.int64(2))  # type: ignore[arg-type]  # which mypy cannot know
    assert json.loads(json.dumps(options.record())) == vxm.Options(budget=5, steps=2).record()


def test_scans_without_a_name_are_called_by_what_they_are_for() -> None:
    array, affine = phantom(AFFINES["straight"])[0], AFFINES["straight"]
    scans = vxm.Scan(array, affine), vxm.Scan(array, affine + 900 * np.eye(4, k=3))
    with pytest.raises(ValueError, match=r"^moving and fixed overlap by only 0%"):
        vxm.register(*scans, space="fixed", alignment="none", refine=False)


def test_what_is_shown_at_the_prompt_is_short(pair: dict[str, Path]) -> None:
    options: dict[str, Any] = {**PAIR, "alignment": "none", "refine": False}
    network = vxm.load_network(pair["weights"], "vm1", device="cpu")
    result = vxm.register(pair["moving"], pair["fixed"], weights=network, **options)
    lies = f"of 4.2 x 3.5 x 5.1 mm, {result.fixed.orientation}"
    assert repr(result.warped) == f"<Scan moving: 26 x 31 x 23 voxels {lies}, float32>"
    assert repr(result.forward) == "<SpatialMap fixed -> moving: displacement on 56 x 60 x 62 voxels, 3-D>"
    assert repr(result.inverse) == "<SpatialMap moving -> fixed: displacement on 56 x 60 x 62 voxels, 3-D>"
    assert repr(result).startswith("<RegistrationResult moving -> fixed, ")
    assert repr(result).endswith(" s>")
    shown = [result, vxm.Options(), vxm.Options(network, **PAIR), result.grid, vxm.mni152()]
    assert all(len(repr(each)) <= 120 and "\n" not in repr(each) for each in shown)
