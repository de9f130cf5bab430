"""MONAI Label app for VoxelMorph: label a study from other studies, register two studies, and train.

Start it with ``monailabel start_server --app FOLDER --studies STUDIES``. This file contains only the code that needs
MONAI Label; everything else is in the package ``voxelmorph_monai``.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import itk
from fastapi import HTTPException
from monai.bundle import ConfigWorkflow
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.train import TrainTask

from voxelmorph_monai import __version__
from voxelmorph_monai.apps.label_propagation import Study, number_structures, propagate, rank, renumbered, structures
from voxelmorph_monai.apps.label_settings import MOST, Settings, read_number
from voxelmorph_monai.apps.options import check_choice
from voxelmorph_monai.apps.prepare import prepare
from voxelmorph_monai.apps.register_files import register_files
from voxelmorph_monai.apps.shipped import shipped_bundle
from voxelmorph_monai.io.atomic import atomic, write_json
from voxelmorph_monai.io.images import open_volume
from voxelmorph_monai.report import NAMES
from voxelmorph_monai.space.itk_bridge import to_itk
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import WorkingGrid

logger = logging.getLogger(__name__)

_SIMILAR = "most similar"
_RESULTS = {
    "warped": "warped.nii.gz",
    "transform": "forward.h5",
    "inverse": "inverse.h5",
    "displacement": "displacement.nii.gz",
    "jacobian": "jacobian.nii.gz",
    "report": "report.png",
}
_ENDINGS = (".nii", ".nii.gz", ".nrrd")  # file formats of label maps


@contextmanager
def _answering(names: Mapping[str, str]) -> Iterator[None]:
    """Answer wrong input with status 422 and the reason, where ``names`` replace paths; other errors stay 500."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        for path, name in names.items():
            reason = reason.replace(path, name)
        raise HTTPException(422, reason) from error


@contextmanager
def _answer(ending: str) -> Iterator[Path]:
    """Create a file for an answer. MONAI Label removes it after sending it; after an error it is removed here."""
    handle, name = tempfile.mkstemp(suffix=ending)
    os.close(handle)
    try:
        yield Path(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _names(info: Mapping[str, Any]) -> dict[int, str]:
    """Names of structures by value, from clients (``label_info``) or models (``label_names``); empty if unknown."""
    try:
        named = {int(item["idx"]): str(item["name"]) for item in info.get("label_info") or []}
        predicted = (info.get("params") or {}).get("label_names") or {}
        return named or {int(value): str(name) for name, value in predicted.items()}
    except (AttributeError, KeyError, TypeError, ValueError):  # MONAI Label accepts any content
        return {}


class _Studies:
    """Access to the studies of a datastore by id."""

    def __init__(self, datastore: Datastore, trained: Path) -> None:
        self.datastore = datastore
        self.trained = trained

    def image(self, study: str) -> Path:
        """File of a study's image; HTTP 404 if there is no such study."""
        if not study:
            raise HTTPException(404, "the request has no study, or its session has ended.")
        path = self.datastore.get_image_uri(study) if isinstance(study, str) else ""
        if not path:
            raise HTTPException(404, f"the datastore has no study '{study}'.")
        return Path(path)

    def labelled(self, tag: str = DefaultLabelTag.FINAL) -> dict[str, Study]:
        """Studies that have labels with this tag (default: submitted labels), by id."""
        labelled = {}
        for study in sorted(self.datastore.list_images()):
            label = self.datastore.get_label_by_image_id(study, tag)
            if label:
                info = self.datastore.get_label_info(label, tag) or {}
                path = Path(self.datastore.get_label_uri(label, tag))
                labelled[study] = Study(study, self.image(study), path, _names(info))
        return labelled

    def usable(self) -> dict[str, Study]:
        """Labelled studies whose label maps can be read; the others are only logged."""
        usable = {}
        for name, study in self.labelled().items():
            try:
                structures(study)
            except (ValueError, OSError) as error:
                logger.warning(f"study {name} is left out: {error}")
            else:
                usable[name] = study
        return usable


class LabelPropagation(InferTask):
    """Task that labels the open study from labelled studies."""

    def __init__(self, studies: _Studies, settings: Settings) -> None:
        super().__init__(
            type=InferType.SEGMENTATION,
            labels=[],
            dimension=3,
            description="Label the open study by registering one labelled study, or the most similar ones, to it",
        )
        self.studies = studies
        self.settings = settings

    def is_valid(self) -> bool:
        """Whether MONAI Label may offer this task."""
        return True

    def info(self) -> dict[str, Any]:
        """Describe the task to clients; the description depends on the studies labelled so far."""
        studies = self.studies.usable()
        self.labels = number_structures(list(studies.values()))
        self._config = {
            "moving": [_SIMILAR, *studies],
            "num_studies": str(self.settings.num_studies),
            **self.settings.shown(),
        }
        return super().info()

    def _chosen(
        self, labelled: Mapping[str, Study], moving: Any, fixed: Path, settings: Settings
    ) -> tuple[list[Study], dict[str, Any]]:
        """Choose studies from ``labelled``; also returns what the answer says about the choice."""
        if moving != _SIMILAR:
            chosen = [moving] if isinstance(moving, str) else moving
            if not isinstance(chosen, list):
                raise ValueError(f"moving is {moving}. Give the id of a study, or a list of ids.")
            if not 1 <= len(chosen) <= MOST:
                raise ValueError(f"moving names {len(chosen)} studies. Name 1 to {MOST}.")
            for name in chosen:
                if self.studies.image(name) and name not in labelled:
                    raise ValueError(f"study {name} has no labels that can be read. Choose another one, or label it.")
            return [labelled[name] for name in chosen], {"studies": chosen}
        others = [study for study in labelled.values() if study.image != fixed]
        if not others:
            raise ValueError("no other study in the datastore has labels yet. Label one first.")
        if len(others) <= 1:
            return others, {"studies": [study.name for study in others]}
        ranked, reasons = rank(others, fixed, space=settings.space, alignment=settings.alignment)
        if not ranked:
            name, reason = next(iter(reasons.items()))
            raise ValueError(f"no labelled study can be compared with this one. The first, {name}: {reason}")
        best = ranked[: settings.num_studies]
        similarity = {study.name: round(value, 4) for value, study in best}
        return [study for _, study in best], {
            "studies": list(similarity),
            "similarity": similarity,
            "left_out": sorted(reasons),
        }

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Write a label map on the grid of ``request["image"]``; returns its path and the names of its structures."""
        fixed, ending = Path(request["image"]), request.get("result_extension") or ".nii.gz"
        settings = self.settings.asked(request)
        check_choice("result_extension", ending, _ENDINGS)
        labelled = self.studies.usable()
        chosen, choice = self._chosen(labelled, request.get("moving") or _SIMILAR, fixed, settings)
        numbers = number_structures(list(labelled.values()))
        labels = propagate(chosen, fixed, numbers, settings.options(self.studies.trained))
        present = {name: value for name, value in numbers.items() if (labels.array == value).any()}
        with _answer(ending) as path:
            if ending == ".nrrd":
                image = to_itk(labels.array, labels.affine)
                itk.imwrite(image, str(path), compression=bool(request.get("result_compress", True)))
            else:
                labels.save(path)
        return str(path), {"label_names": present, **choice}


class Register(InferTask):
    """Task that registers another study to the open one."""

    def __init__(self, studies: _Studies, settings: Settings) -> None:
        super().__init__(
            type="registration",
            labels=[],
            dimension=3,
            description="Register another study, or the file sent as label, to the open study",
        )
        self.studies = studies
        self.settings = settings

    def is_valid(self) -> bool:
        """Whether MONAI Label may offer this task."""
        return True

    def info(self) -> dict[str, Any]:
        """Describe the task to clients."""
        studies = sorted(self.studies.datastore.list_images())
        self._config = {"moving": studies, "result": list(_RESULTS), **self.settings.shown()}
        return super().info()

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Register ``moving`` to the open study; returns the file that ``request["result"]`` names, and the summary."""
        settings, result = (
            self.settings.asked(request),
            check_choice("result", request.get("result", "warped"), [*_RESULTS]),
        )
        if request.get("save_label"):
            raise ValueError("save_label is set, but a registration has no labels to save. Use label_propagation.")
        moving = Path(request["label"]) if request.get("label") else self.studies.image(request.get("moving", ""))
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "registered"
            register_files(moving, request["image"], output, options=settings.options(self.studies.trained))
            summary = json.loads((output / NAMES["summary"]).read_text(encoding="utf-8"))
            with _answer("".join(Path(_RESULTS[result]).suffixes)) as path:
                shutil.move(output / _RESULTS[result], path)
        del summary["inputs"]  # paths of the server
        return str(path), {"result": result, **summary}


class Training(TrainTask):
    """Task that trains the network on the labelled studies, with the config of the bundle."""

    def __init__(self, studies: _Studies, settings: Settings) -> None:
        super().__init__("Train the registration on the labelled studies of this datastore")
        self.studies = studies
        self.settings = settings

    def config(self) -> dict[str, Any]:
        """Options that a client shows in its form for a training."""
        return {
            "max_epochs": 10,
            "pairs_per_epoch": 100,
            "learning_rate": "0.0001",
            "val_split": 0.2,
            "pretrained": True,
        }

    def _write_scans(self, studies: Sequence[Study], folder: Path) -> int:
        """Write all scans and label maps with a common numbering; returns the largest number."""
        numbers = number_structures(studies)
        for study in studies:
            Scan.read(study.image).save(folder / f"{study.name}_image.nii.gz")
            renumbered(study, numbers).save(folder / f"{study.name}_label.nii.gz")
        return len(numbers)

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Align the studies to MNI152, train, and save the weights for the other tasks."""
        with _answering({}):
            given = {**self.config(), **request}
            epochs = read_number("max_epochs", given["max_epochs"], 1, 10_000, int)
            pairs = read_number("pairs_per_epoch", given["pairs_per_epoch"], 1, 100_000, int)
            rate = read_number("learning_rate", given["learning_rate"], 0, 1)
            fraction = read_number("val_split", given["val_split"], 0, 1)
            studies = list(self.studies.usable().values())
            held_back = max(2, round(fraction * len(studies)))
            if len(studies) < held_back + 2:
                raise ValueError(
                    f"{len(studies)} studies have labels, of which {held_back} are for validation. At least 2 must "
                    "remain for training: label more studies, or lower val_split."
                )
            target = self.studies.trained
            start = self.settings.weights_in_use(target) if given["pretrained"] else None
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                (folder / "scans").mkdir()
                num_labels = self._write_scans(studies, folder / "scans")
                every = max(len(studies) // held_back, 1)
                validation = [study.name for study in studies[every - 1 :: every]][:held_back]
                training = [study.name for study in studies if study.name not in validation]
                write_json(folder / "split.json", {"training": training, "validation": validation})
                prepared = prepare(
                    [folder / "scans"],
                    folder / "prepared",
                    images="*_image.nii.gz",
                    labels="*_label.nii.gz",
                    grid=self.settings.grid or WorkingGrid(),
                    split=folder / "split.json",
                )
                if prepared.errors:
                    raise ValueError(f"some studies cannot be aligned to MNI152: {prepared.errors}.")
                bundle = shipped_bundle("brain_t1_registration")
                workflow = ConfigWorkflow(
                    str(bundle / "configs" / "train.json"),
                    meta_file=str(bundle / "configs" / "metadata.json"),
                    logging_file=False,
                    workflow_type="train",
                    bundle_root=str(bundle),
                    dataset_dir=str(folder / "prepared"),
                    output_dir=str(folder / "training"),
                    preset=self.settings.preset,
                    pretrained=start,
                    num_labels=num_labels,
                    max_epochs=epochs,
                    pairs_per_epoch=pairs,
                    learning_rate=rate,
                )
                workflow.initialize()
                workflow.run()
                dice = workflow.parser.get_parsed_content("validate#keep_best").best
                workflow.finalize()
                with atomic(target) as whole:
                    shutil.move(folder / "training" / "model.pt", whole)
        return {"weights": str(target), "training": training, "validation": validation, "dice": dice}


def _bundles(folder: Path, conf: Mapping[str, str]) -> dict[str, InferTask]:
    """Tasks of the segmentation bundles in ``folder``, by name of their folder."""
    tasks = {}
    for bundle in sorted(path.parent.parent for path in folder.glob("*/configs/inference.json")):
        from monailabel.tasks.infer.bundle import BundleInferTask  # needs torchvision, unlike everything else

        task = BundleInferTask(str(bundle), conf)
        if task.is_valid():
            tasks[bundle.name] = task
    return tasks


class VoxelMorphApp(MONAILabelApp):
    """App that MONAI Label loads."""

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        self.settings = Settings.read(conf)
        self.model_dir = Path(app_dir) / "model"
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=dict(conf),
            name=f"VoxelMorph on MONAI ({__version__})",
            description="Label and register scans, of brains and others, with VoxelMorph",
            version=__version__,
        )

    def _studies(self) -> _Studies:
        return _Studies(self.datastore(), self.model_dir / "voxelmorph" / "model.pt")

    def init_infers(self) -> dict[str, InferTask]:
        """Create the tasks that answer a request directly, by name."""
        return {
            "label_propagation": LabelPropagation(self._studies(), self.settings),
            "register": Register(self._studies(), self.settings),
            **_bundles(self.model_dir, self.conf),
        }

    def init_trainers(self) -> dict[str, TrainTask]:
        """Create the tasks that run in the background, by name."""
        return {"voxelmorph": Training(self._studies(), self.settings)}

    def infer(self, request: Mapping[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Run a task; wrong input is answered with status 4xx and the reason."""
        model, image = request.get("model"), request.get("image", "")
        if model not in self._infers:
            raise HTTPException(404, f"there is no model '{model}'. Choose one of {', '.join(self._infers)}.")
        named = {str(request.get("label")): "the file sent as label"}
        if isinstance(image, str):
            path = image if os.path.exists(image) else str(self._studies().image(image))
            named = {path: "the scan" if path == image else image, **named}
        with _answering({**named, f"{self.studies.rstrip('/')}/": ""}):
            if isinstance(image, str):
                open_volume(path, planar=True)
            return super().infer(request, datastore)
