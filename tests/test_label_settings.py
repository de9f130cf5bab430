"""What of the app for MONAI Label needs no server: its options, and the files that it answers with."""

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from voxelmorph_monai.apps import label_propagation as propagation
from voxelmorph_monai.apps.options import Options
from voxelmorph_monai.apps.shipped import shipped_weights, weights_file
from voxelmorph_monai.space.template import WorkingGrid


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The app, with nothing behind the names that it imports from MONAI Label."""
    stubs: dict[str, dict[str, Any]] = {
        "fastapi": {"HTTPException": type("HTTPException", (Exception,), {})},
        "monailabel.interfaces.app": {"MONAILabelApp": object},
        "monailabel.interfaces.datastore": {"Datastore": object, "DefaultLabelTag": SimpleNamespace(FINAL="final")},
        "monailabel.interfaces.tasks.infer_v2": {"InferTask": object, "InferType": SimpleNamespace()},
        "monailabel.interfaces.tasks.train": {"TrainTask": object},
    }
    for name, content in stubs.items():
        for parent in [name[:i] for i, letter in enumerate(name) if letter == "."]:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(content)
    path = Path(propagation.__file__).parents[1] / "label_app" / "main.py"
    spec = importlib.util.spec_from_file_location("label_app", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_preset_needs_weights_of_its_own(app: Any, tmp_path: Path) -> None:
    weights, trained = tmp_path / "vm2.pt", tmp_path / "model.pt"
    weights.touch()
    with pytest.raises(ValueError, match=r"weights are for preset wide, not vm2\b"):
        app.Settings.read({"preset": "vm2"})
    with pytest.raises(ValueError, match=r"^preset is 'vm3'\. "):
        app.Settings.read({"preset": "vm3"})
    given = app.Settings.read({"preset": "vm2", "weights": str(weights)}).options(trained)
    assert (given.preset, given.weights) == ("vm2", str(weights))
    without = app.Settings.read({"preset": "vm2", "weights": "none"})
    assert [weights_file(each.options(trained)) for each in (without, without.asked({"space": "fixed"}))] == [None] * 2


def test_weights_are_the_trained_ones_or_those_that_come_along(app: Any, tmp_path: Path) -> None:
    trained, settings = tmp_path / "model.pt", app.Settings.read({})
    assert weights_file(settings.options(trained)) == shipped_weights()
    trained.touch()
    assert weights_file(settings.options(trained)) == trained
    assert weights_file(settings.asked({"space": "fixed"}).options(trained)) is None


@pytest.mark.parametrize("value", [2.7, 0, 10, "2.7", "two", float("inf"), float("nan"), [2]])
def test_a_whole_number_is_one(app: Any, value: Any) -> None:
    settings = app.Settings.read({})
    assert [settings.asked({"num_studies": each}).num_studies for each in (2, 2.0, "2")] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"^num_studies is .* a whole number from 1 to 9"):
        settings.asked({"num_studies": value})


def test_an_answer_that_cannot_be_written_leaves_no_file(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(FileNotFoundError), app._answer(".nii.gz") as path:
        path.with_name("missing").read_bytes()
    assert list(tmp_path.iterdir()) == []
    with app._answer(".nii.gz") as path:
        path.write_text("whole")
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_word_about_it_the_grid_fits_what_is_registered(app: Any) -> None:
    assert app.Settings.read({"space": "fixed"}).grid is None
    assert app.Settings.read({"size": "80,96"}).grid == WorkingGrid((80, 96), 1.0)
    assert app.Settings.read({"spacing": "2"}).grid == WorkingGrid(spacing=2.0)


def test_the_former_name_of_the_alignment_is_known(app: Any, tmp_path: Path) -> None:
    settings = app.Settings.read({"transform": "rigid"})
    assert settings.options(tmp_path / "model.pt").alignment == "rigid"
    assert settings.asked({"transform": "none"}).alignment == "none"
    assert settings.asked({"transform": "none", "alignment": "affine"}).alignment == "affine"
    with pytest.raises(ValueError, match=r"^alignment is 'bent'\. .* affine, rigid, none"):
        settings.asked({"transform": "bent"})


@pytest.mark.parametrize("weights", ["none", None])
def test_labels_are_propagated_on_the_device_that_is_given(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str | None
) -> None:
    used: list[Options] = []

    def propagate(studies: Any, fixed: Any, numbers: Any, options: Options) -> None:
        used.append(options)
        raise StopIteration

    monkeypatch.setattr(app, "number_structures", lambda _: {})
    monkeypatch.setattr(app, "propagate", propagate)
    task = object.__new__(app.LabelPropagation)  # its first class is MONAI Label's
    task.settings = app.Settings.read({"device": "cpu"})._replace(weights=weights)
    study = propagation.Study("a", tmp_path / "a.nii", tmp_path / "a_labels.nii", {})
    task.studies = SimpleNamespace(trained=tmp_path / "model.pt", usable=lambda: {"a": study})
    with pytest.raises(StopIteration):
        task({"image": tmp_path / "b.nii"})
    (options,) = used
    assert (options.device, weights_file(options)) == ("cpu", None if weights else shipped_weights())
