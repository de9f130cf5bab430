"""MONAI Label app: labels of one study for another, registration of two studies, and training, by VoxelMorph.

Start it by ``monailabel start_server --app FOLDER --studies STUDIES``. What needs MONAI Label is here; the rest is in
the package ``voxelmorph_monai``.
"""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import itk
from fastapi import HTTPException
from monai.bundle import ConfigWorkflow
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.train import TrainTask

from voxelmorph_monai import __version__
from voxelmorph_monai.files import atomic, write_json
from voxelmorph_monai.networks import PRESETS
from voxelmorph_monai.preparation import Grid, prepare
from voxelmorph_monai.propagation import Study, number_structures, propagate, rank, renumbered, structures
from voxelmorph_monai.registration import (
    SPACES,
    TRANSFORMS,
    choose_device,
    load_network,
    register_files,
    shipped_bundle,
    shipped_weights,
)
from voxelmorph_monai.results import NAMES
from voxelmorph_monai.spaces import open_volume, read_image, save_image, save_image_like, to_itk

logger = logging.getLogger(__name__)

_SIMILAR = "most similar"
_PRESET = "wide"  # of the weights that come along
_LONGEST = 600.0  # seconds to refine: MONAI Label's clients wait no longer
_MOST = 9  # studies to fuse
_RESULTS = {
    "warped": "warped.nii.gz",
    "transform": "forward.h5",
    "inverse": "inverse.h5",
    "displacement": "displacement.nii.gz",
    "jacobian": "jacobian.nii.gz",
    "report": "report.png",
}
_ENDINGS = (".nii", ".nii.gz", ".nrrd")  # of label maps


def _one_of(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got '{value}'.")
    return str(value)


def _number(name: str, value: Any, least: float, most: float, kind: Callable[[Any], Any] = float) -> Any:
    try:
        found = kind(value)
        cut = isinstance(value, float) and found != value  # 2.7 is no whole number
        if math.isfinite(found) and least <= found <= most and not cut:
            return found
    except (ValueError, TypeError, OverflowError):
        pass
    what = "a whole number" if kind is int else "a number"
    raise ValueError(f"{name} must be {what} from {least:g} to {most:g}, got '{value}'.")


def _first(default: str, known: Sequence[str]) -> list[str]:
    """Choices as 3D Slicer shows them, which sends the first one unless another is chosen."""
    return [default, *(each for each in known if each != default)]


class Settings(NamedTuple):
    """How to register: what ``--conf KEY VALUE`` says, and for one request what that one says.

    Attributes:
        weights: file of the network's weights, or ``none``; None: those that fit.
        preset: of the network.
        device: to compute on.
        grid: where displacements are found; None: the literature's for brains, one that fits for anything else.
        space: where the network works.
        transform: to align scans with.
        budget: seconds to refine, 0 not at all.
        num_studies: how many of the most similar studies give their labels.
    """

    weights: str | None
    preset: str
    device: str | None
    grid: Grid | None
    space: str = SPACES[0]
    transform: str = TRANSFORMS[0]
    budget: float = 30.0
    num_studies: int = 1

    @classmethod
    def read(cls, conf: Mapping[str, str]) -> "Settings":
        """Read the options of the server.

        Raises:
            ValueError: an option is unknown or cannot be used.
        """
        known = {*cls._fields, "size", "spacing"} - {"grid"}
        unknown = conf.keys() - known - {"preload", "server_mode"}  # of MONAI Label
        if unknown:
            raise ValueError(f"--conf must be of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}.")
        weights, device = conf.get("weights"), conf.get("device")
        if weights not in (None, "none") and not Path(weights).is_file():
            raise ValueError(f"weights must be a file, or none, got '{weights}'.")
        preset = _one_of("preset", conf.get("preset", _PRESET), list(PRESETS))
        if weights is None and preset != _PRESET:
            raise ValueError(
                f"weights must come with preset {preset}, a file, or none, as those that come along are of preset "
                f"{_PRESET}."
            )
        choose_device(device)
        size = tuple(_number("size", n, 8, 1024, int) for n in conf.get("size", "160,192,224").split(","))
        grid = Grid(size, _number("spacing", conf.get("spacing", 1.0), 0.01, 100))
        return cls(
            weights=weights,
            preset=preset,
            device=device,
            grid=grid if conf.keys() & {"size", "spacing"} else None,
        ).asked(conf)

    def asked(self, request: Mapping[str, Any]) -> "Settings":
        """What a request makes of them; a field that is empty in a client's form changes nothing.

        Raises:
            ValueError: an option cannot be used.
        """
        given = {key: value for key, value in request.items() if value not in (None, "")}
        return self._replace(
            space=_one_of("space", given.get("space", self.space), SPACES),
            transform=_one_of("transform", given.get("transform", self.transform), TRANSFORMS),
            budget=_number("budget", given.get("budget", self.budget), 0, _LONGEST),
            num_studies=_number("num_studies", given.get("num_studies", self.num_studies), 1, _MOST, int),
        )

    def shown(self) -> dict[str, Any]:
        """The options of a request, as a client shows them."""
        return {
            "space": _first(self.space, SPACES),
            "transform": _first(self.transform, TRANSFORMS),
            "budget": self.budget,
        }

    def weights_in_use(self, trained: Path) -> str | None:
        """File of the weights in MNI152; ``trained``: where those lie that were trained here, if they were."""
        if self.weights is None:
            return str(trained if trained.is_file() else shipped_weights())
        return None if self.weights == "none" else self.weights

    def register_options(self, trained: Path) -> dict[str, Any]:
        """Options of ``register_files``; ``trained`` as in :meth:`weights_in_use`."""
        unknown = self.weights is None and self.space != "mni152"  # what comes along knows brains alone
        return {
            "weights": None if unknown else self.weights_in_use(trained),
            "preset": self.preset,
            "device": self.device,
            "budget": self.budget,
            "space": self.space,
            "transform": self.transform,
            "grid": self.grid,
        }


@contextmanager
def _answering(names: Mapping[str, str]) -> Iterator[None]:
    """Answer wrong input with 422 and its reason, files called by their ``names``; anything else is a fault, 500."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        for path, name in names.items():
            reason = reason.replace(path, name)
        raise HTTPException(422, reason) from error


@contextmanager
def _answer(ending: str) -> Iterator[Path]:
    """A new file to fill, which MONAI Label removes once it is sent; after an error it is gone."""
    handle, name = tempfile.mkstemp(suffix=ending)
    os.close(handle)
    try:
        yield Path(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _names(info: Mapping[str, Any]) -> dict[int, str]:
    """Names of structures by value, as clients (``label_info``) or models (``label_names``) leave them, if they do."""
    try:
        named = {int(item["idx"]): str(item["name"]) for item in info.get("label_info") or []}
        found = (info.get("params") or {}).get("label_names") or {}
        return named or {int(value): str(name) for name, value in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError):  # MONAI Label takes whatever is sent
        return {}


class _Studies:
    """The studies of a datastore, by id."""

    def __init__(self, datastore: Datastore, trained: Path) -> None:
        self.datastore = datastore
        self.trained = trained

    def image(self, study: str) -> Path:
        """File of a study's image; HTTP 404 if there is no such study."""
        if not study:
            raise HTTPException(404, "a study must be named, or a session that has not ended.")
        path = self.datastore.get_image_uri(study) if isinstance(study, str) else ""
        if not path:
            raise HTTPException(404, f"there is no study '{study}' in the datastore.")
        return Path(path)

    def labelled(self, tag: str = DefaultLabelTag.FINAL) -> dict[str, Study]:
        """Studies that somebody has submitted labels for."""
        found = {}
        for study in sorted(self.datastore.list_images()):
            label = self.datastore.get_label_by_image_id(study, tag)
            if label:
                info = self.datastore.get_label_info(label, tag) or {}
                path = Path(self.datastore.get_label_uri(label, tag))
                found[study] = Study(study, self.image(study), path, _names(info))
        return found

    def usable(self) -> dict[str, Study]:
        """Labelled studies whose label maps can be read; the others are left to the log."""
        found = {}
        for name, study in self.labelled().items():
            try:
                structures(study)
            except (ValueError, OSError) as error:
                logger.warning(f"study {name} is left out: {error}")
            else:
                found[name] = study
        return found


class LabelPropagation(InferTask):
    """Labels of labelled studies for the open one."""

    def __init__(self, studies: _Studies, settings: Settings) -> None:
        super().__init__(
            type=InferType.SEGMENTATION,
            labels=[],
            dimension=3,
            description="Labels for the open study from a labelled one, or the most similar ones, by registration",
        )
        self.studies = studies
        self.settings = settings

    def is_valid(self) -> bool:
        """Whether MONAI Label may list it."""
        return True

    def info(self) -> dict[str, Any]:
        """What clients show of it: it depends on what is labelled by now."""
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
        """Studies of ``labelled`` to take labels from, and what to tell of the choice."""
        if moving != _SIMILAR:
            chosen = [moving] if isinstance(moving, str) else moving
            if not isinstance(chosen, list):
                raise ValueError(f"moving must be the id of a study, or several, got {moving}.")
            if not 1 <= len(chosen) <= _MOST:
                raise ValueError(f"moving must name 1 to {_MOST} studies, got {len(chosen)}.")
            for name in chosen:
                if self.studies.image(name) and name not in labelled:
                    raise ValueError(f"study {name} must have labels that can be read, but it has none.")
            return [labelled[name] for name in chosen], {"studies": chosen}
        others = [study for study in labelled.values() if study.image != fixed]
        if not others:
            raise ValueError("another study of the datastore must have labels, but none has.")
        if len(others) <= 1:
            return others, {"studies": [study.name for study in others]}
        ranked, reasons = rank(others, fixed, space=settings.space, transform=settings.transform)
        if not ranked:
            name, reason = next(iter(reasons.items()))
            raise ValueError(f"no labelled study can be compared with this one; {name}: {reason}")
        best = ranked[: settings.num_studies]
        similarity = {study.name: round(value, 4) for value, study in best}
        return [study for _, study in best], {
            "studies": list(similarity),
            "similarity": similarity,
            "left_out": sorted(reasons),
        }

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Label map on the grid of ``request["image"]``, and the names of the structures in it by their order."""
        fixed, ending = Path(request["image"]), request.get("result_extension") or ".nii.gz"
        settings = self.settings.asked(request)
        _one_of("result_extension", ending, _ENDINGS)
        labelled = self.studies.usable()
        chosen, told = self._chosen(labelled, request.get("moving") or _SIMILAR, fixed, settings)
        numbers = number_structures(list(labelled.values()))
        options = settings.register_options(self.studies.trained)
        weights, preset = (options.pop(key) for key in ("weights", "preset"))
        network = None if weights is None else load_network(weights, preset, device=options["device"])
        labels = propagate(chosen, fixed, numbers, network=network, **options)
        present = {name: value for name, value in numbers.items() if (labels == value).any()}
        with _answer(ending) as path:
            if ending == ".nrrd":
                affine = open_volume(fixed, planar=True)[1]
                itk.imwrite(to_itk(labels, affine), str(path), compression=bool(request.get("result_compress", True)))
            else:
                save_image_like(path, labels, fixed)
        return str(path), {"label_names": present, **told}


class Register(InferTask):
    """The registration of two studies."""

    def __init__(self, studies: _Studies, settings: Settings) -> None:
        super().__init__(
            type="registration",
            labels=[],
            dimension=3,
            description="Another study, or the file sent as label, on the grid of the open study; or the transform",
        )
        self.studies = studies
        self.settings = settings

    def is_valid(self) -> bool:
        """Whether MONAI Label may list it."""
        return True

    def info(self) -> dict[str, Any]:
        """What clients show of it."""
        studies = sorted(self.studies.datastore.list_images())
        self._config = {"moving": studies, "result": list(_RESULTS), **self.settings.shown()}
        return super().info()

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The file that ``request["result"]`` names of the registration of ``moving`` to the open study."""
        settings, result = self.settings.asked(request), _one_of("result", request.get("result", "warped"), [*_RESULTS])
        if request.get("save_label"):
            raise ValueError("a registration gives no labels to save: take label_propagation.")
        moving = Path(request["label"]) if request.get("label") else self.studies.image(request.get("moving", ""))
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "registered"
            register_files(moving, request["image"], output, **settings.register_options(self.studies.trained))
            summary = json.loads((output / NAMES["summary"]).read_text(encoding="utf-8"))
            with _answer("".join(Path(_RESULTS[result]).suffixes)) as path:
                shutil.move(output / _RESULTS[result], path)
        del summary["inputs"]  # paths of the server
        return str(path), {"result": result, **summary}


class Training(TrainTask):
    """The training of the network on the labelled studies, by the bundle's own config."""

    def __init__(self, studies: _Studies, settings: Settings) -> None:
        super().__init__("Train the registration of the open datastore's kind of scans on its labelled studies")
        self.studies = studies
        self.settings = settings

    def config(self) -> dict[str, Any]:
        """Options of a training, as a client shows them."""
        return {
            "max_epochs": 10,
            "pairs_per_epoch": 100,
            "learning_rate": "0.0001",
            "val_split": 0.2,
            "pretrained": True,
        }

    def _write_scans(self, studies: Sequence[Study], folder: Path) -> int:
        """Write all scans and label maps under one numbering; returns the largest number."""
        numbers = number_structures(studies)
        for study in studies:
            save_image(folder / f"{study.name}_image.nii.gz", *read_image(study.image))
            save_image(folder / f"{study.name}_label.nii.gz", *renumbered(study, numbers))
        return len(numbers)

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Align the studies to MNI152, train, and put the weights where the other tasks look for them."""
        with _answering({}):
            given = {**self.config(), **request}
            epochs = _number("max_epochs", given["max_epochs"], 1, 10_000, int)
            pairs = _number("pairs_per_epoch", given["pairs_per_epoch"], 1, 100_000, int)
            rate = _number("learning_rate", given["learning_rate"], 0, 1)
            share = _number("val_split", given["val_split"], 0, 1)
            studies = list(self.studies.usable().values())
            held_back = max(2, round(share * len(studies)))
            if len(studies) < held_back + 2:
                raise ValueError(
                    "studies with labels must be at least 2 for training and 2 for validation, got "
                    f"{len(studies)}, of which {held_back} are for validation."
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
                    grid=self.settings.grid or Grid(),
                    split=folder / "split.json",
                )
                if prepared.errors:
                    raise ValueError(f"all studies must be aligned to MNI152, but not these: {prepared.errors}.")
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
    """Tasks of the segmentation bundles in ``folder``, by the names of their folders."""
    tasks = {}
    for bundle in sorted(path.parent.parent for path in folder.glob("*/configs/inference.json")):
        from monailabel.tasks.infer.bundle import BundleInferTask  # needs torchvision, which nothing else does

        task = BundleInferTask(str(bundle), conf)
        if task.is_valid():
            tasks[bundle.name] = task
    return tasks


class VoxelMorphApp(MONAILabelApp):
    """The app, as MONAI Label finds it."""

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        self.settings = Settings.read(conf)
        self.model_dir = Path(app_dir) / "model"
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=dict(conf),
            name=f"VoxelMorph on MONAI ({__version__})",
            description="Labels and registration of brain scans and others by VoxelMorph",
            version=__version__,
        )

    def _studies(self) -> _Studies:
        return _Studies(self.datastore(), self.model_dir / "voxelmorph" / "model.pt")

    def init_infers(self) -> dict[str, InferTask]:
        """Tasks that give an answer at once."""
        return {
            "label_propagation": LabelPropagation(self._studies(), self.settings),
            "register": Register(self._studies(), self.settings),
            **_bundles(self.model_dir, self.conf),
        }

    def init_trainers(self) -> dict[str, TrainTask]:
        """Tasks that take their time."""
        return {"voxelmorph": Training(self._studies(), self.settings)}

    def infer(self, request: Mapping[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Do what is asked; wrong input is answered with 4xx and one sentence."""
        model, image = request.get("model"), request.get("image", "")
        if model not in self._infers:
            raise HTTPException(404, f"there is no model '{model}', only {', '.join(self._infers)}.")
        named = {str(request.get("label")): "the file sent as label"}
        if isinstance(image, str):
            path = image if os.path.exists(image) else str(self._studies().image(image))
            named = {path: "the scan" if path == image else image, **named}
        with _answering({**named, f"{self.studies.rstrip('/')}/": ""}):
            if isinstance(image, str):
                open_volume(path, planar=True)
            return super().infer(request, datastore)
