"""Ignite handlers: resume a training exactly where it stopped, keep the best weights, save evaluations."""

import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from scipy import ndimage
from torch import nn

from voxelmorph_monai.data import PairSampler, check_seed, process
from voxelmorph_monai.engines import pair_paths
from voxelmorph_monai.evaluation import check_folder, compare_affine, save_evaluation, summarise, tabulate
from voxelmorph_monai.io.atomic import atomic, sweep
from voxelmorph_monai.model_card import ModelCard, write_card
from voxelmorph_monai.networks import VoxelMorph, read_state

__all__ = [
    "EpochSeed",
    "KeepBest",
    "Ramp",
    "Resume",
    "SaveEvaluation",
    "SaveSubmission",
    "ValidationSeed",
]

_SAME_DICE = 0.01  # largest plausible difference of mean Dice to a publication, also for half of its scans


class Stateful(Protocol):
    """Any object with a state to save: modules, optimisers, schedulers, handlers."""

    def state_dict(self) -> Mapping[str, object]:
        """Return the state."""

    def load_state_dict(self, state_dict: Mapping[str, object]) -> object:
        """Restore the state."""


def _gather(values: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join the lists of all processes, on each process, in the order in which MONAI's metrics gather their values."""
    _, world = process()
    if world == 1:
        return values
    lists: list[list[tuple[str, str]]] = [[]] * world
    torch.distributed.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def _save(state: object, path: Path) -> None:
    """Write ``path`` so that it is never incomplete (MONAI's CheckpointSaver, if killed, leaves an incomplete file)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        torch.save(state, temporary)


class EpochSeed:
    """Handler that seeds all random generators from ``(seed, epoch, process)`` at the start of an epoch.

    The random numbers of an epoch then do not depend on earlier epochs. A resumed training repeats them exactly,
    without saving the states of the many generators in transforms, samplers and workers.

    Args:
        seed: random seed of the training, from 0 to 2^32 - 1.
        sampler: sampler that is told the number of each epoch.
    """

    def __init__(self, seed: int = 0, sampler: PairSampler | None = None) -> None:
        self.seed = check_seed(seed)
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the generators for the epoch that ``engine`` starts."""
        state = np.random.SeedSequence([self.seed, engine.state.epoch, process()[0]])
        first, second, third = (int(s) for s in state.generate_state(3))
        torch.manual_seed(first)
        np.random.seed(second)
        random.seed(third)
        if self.sampler is not None:
            self.sampler.set_epoch(engine.state.epoch)


class ValidationSeed:
    """Handler that seeds torch at the start of a validation, so that each validation uses the same random images.

    Use it together with :class:`EpochSeed`; otherwise the training would draw the same random numbers in each epoch.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_seed(seed)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed torch."""
        torch.manual_seed(self.seed)


class Ramp:
    """Handler that increases a weight of the loss linearly, from 0 in the first epoch to its full value.

    Args:
        module: module with the weight, such as ``RegistrationLoss``.
        name: name of the attribute that holds the weight.
        num_epochs: number of epochs with less than the full weight; with 0 the weight is full from the start.
    """

    def __init__(self, module: nn.Module, name: str, num_epochs: int) -> None:
        if num_epochs < 0:
            raise ValueError(f"num_epochs of the ramp of {name} is {num_epochs}. Give 0 or more.")
        self.module = module
        self.name = name
        self.num_epochs = num_epochs
        self.full = getattr(module, name)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the weight for the epoch that ``engine`` starts; it does not depend on earlier epochs."""
        fraction = min(1.0, (engine.state.epoch - 1) / self.num_epochs) if self.num_epochs else 1.0
        setattr(self.module, self.name, self.full * fraction)


class KeepBest:
    """Handler that saves the weights of the best validation as a plain state dict, with a model card next to it.

    Args:
        network: the network.
        path: file to write; each improvement replaces it.
        metric: name of the evaluator's metric; higher is better.
    """

    def __init__(self, network: nn.Module, path: str, metric: str) -> None:
        self.network = network
        self.path = Path(path)
        self.metric = metric
        self.best = float("-inf")

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save the weights if the evaluation that ``engine`` completed is the best so far."""
        value = float(engine.state.metrics[self.metric])
        if math.isnan(value):
            raise ValueError(
                f"the validation gave {self.metric} = NaN, because it measured nothing. Check the validation labels."
            )
        if value > self.best:
            state = self.network.state_dict()
            if broken := [name for name, weights in state.items() if not bool(weights.isfinite().all())]:
                raise ValueError(
                    f"the training diverged: {len(broken)} parameters hold NaN or infinity, the first is {broken[0]}. "
                    "Try a lower learning rate."
                )
            self.best = value
            if process()[0] == 0:
                _save(state, self.path)
                if isinstance(self.network, VoxelMorph):
                    write_card(self.path, ModelCard.of(self.network))

    def state_dict(self) -> dict[str, float]:
        """Return the best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Restore the best value so far."""
        self.best = state_dict["best"]


class Resume:
    """Handler that saves a checkpoint after each epoch, and continues from it when the training is started again.

    Args:
        path: checkpoint file; if it exists when the training starts, it is loaded.
        objects: objects with a state, by name: network, optimiser, scheduler, :class:`KeepBest`, early stopping.
        settings: plain values that must be the same when the training is resumed.
    """

    def __init__(
        self, path: str, objects: Mapping[str, Stateful], settings: Mapping[str, str | float | None] | None = None
    ) -> None:
        self.path = Path(path)
        self.objects = objects
        self.settings = dict(settings or {})

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer; do this last, because it must run after all handlers that change the saved objects."""
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        """Restore all objects and the epoch of ``engine`` from the checkpoint, if there is one."""
        if self.path.parent.is_dir() and process()[0] == 0:
            sweep(self.path.parent)  # remove incomplete files of a training that was killed while saving
        if not self.path.exists():
            return
        try:
            state = read_state(self.path)
            if missing := {"epoch", "settings", *self.objects} - set(state):
                raise ValueError(f"it has no {sorted(missing)}")
            saved, ours = state["settings"], self.settings
            was, now = (
                {key: value for key, value in one.items() if (key, value) not in other.items()}
                for one, other in ((saved, ours), (ours, saved))
            )
            if was or now:
                raise ValueError(f"different settings {was}, now {now}")
            for name, stateful in self.objects.items():
                stateful.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:  # as load_state_dict may raise
            raise ValueError(
                f"this training cannot be resumed from the checkpoint {self.path}: {error}. Use the options of the "
                "checkpoint, or choose another output_dir to start a new training."
            ) from error
        engine.state.epoch = state["epoch"]
        # A multiple of the present epoch length: with any other number, Ignite would start within an epoch.
        engine.state.iteration = engine.state.epoch * engine.state.epoch_length  # type: ignore[operator] # it is set
        if any(isinstance(o, EarlyStopping) and o.counter >= o.patience for o in self.objects.values()):
            engine.terminate()  # early stopping had already ended this training
        engine.logger.info(f"Resumed from {self.path} after epoch {engine.state.epoch}.")

    def save(self, engine: Engine) -> None:
        """Write the checkpoint; only the first process does."""
        if process()[0] == 0:
            state: dict[str, object] = {name: stateful.state_dict() for name, stateful in self.objects.items()}
            _save(state | {"epoch": engine.state.epoch, "settings": self.settings}, self.path)


class SaveEvaluation:
    """Handler that writes the tables, summary and box plots of an evaluation (``evaluation.save_evaluation``).

    It replaces MONAI's ``MetricsSaver``, which calls the structures class0, class1, ..., has no groups, writes one file
    per measure, and silently replaces the files of an earlier run.

    Args:
        folder: new folder to write. The constructor already checks that it may be written.
        structures: names of the structures, label 1 first, or the number of structures.
        groups: names of the structures in each group, by name of the group; the value of a group is the mean over its
            structures.
        settings: settings of the evaluation to record in the summary.
        overwrite: replace the folder of an earlier evaluation.
        affine_dice: published mean Dice before the registration, over ``structures``, over ``groups`` or both. The
            summary records it next to the measured value; a difference causes a warning.
    """

    def __init__(
        self,
        folder: str,
        structures: Sequence[str] | int,
        groups: Mapping[str, Sequence[str]] | None = None,
        settings: Mapping[str, object] | None = None,
        overwrite: bool = False,
        affine_dice: Mapping[str, float] | None = None,
    ) -> None:
        check_folder(folder, overwrite)
        self.folder = folder
        self.structures = list(structures if not isinstance(structures, int) else map(str, range(1, structures + 1)))
        self.groups = groups
        self.settings = dict(settings or {})
        self.overwrite = overwrite
        self.affine_dice = affine_dice
        self.paths: list[tuple[str, str]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator; its metrics become the measures in the tables."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.note)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def start(self, engine: Engine) -> None:
        """Forget the pairs of an earlier run of ``engine``."""
        self.paths = []

    def note(self, engine: Engine) -> None:
        """Record the paths of the pairs in the batch."""
        self.paths += pair_paths(engine.state.batch)  # type: ignore[arg-type] # decollated, so a list

    def save(self, engine: Engine) -> None:
        """Gather the measures of all processes, and write them; only the first process writes."""
        paths = _gather(self.paths)
        if process()[0] == 0:
            details: Mapping[str, torch.Tensor] = engine.state.metric_details  # type: ignore[attr-defined] # MONAI's
            measures = {name: values.cpu().double().numpy() for name, values in details.items()}
            evaluation = tabulate(paths, measures, self.structures, self.groups)
            affine = {"affine_dice": compare_affine(evaluation, self.affine_dice)} if self.affine_dice else {}
            save_evaluation(self.folder, evaluation, {**self.settings, **affine}, self.overwrite)
            for over, dice in affine.get("affine_dice", {}).items():
                if not abs((dice["measured"] or 0) - dice["published"]) <= _SAME_DICE:
                    engine.logger.warning(
                        f"mean Dice over {over} before the registration is {dice['measured']}, but {dice['published']} "
                        "was published. The scans, labels or alignment differ: do not compare the results with those "
                        "of the publication."
                    )
            engine.logger.info(f"{self.folder}, {len(paths)} pairs:\n{summarise(evaluation).to_string()}")


def _subject(path: str) -> int:
    """Number of the OASIS subject of a scan, from its path in the folder of neurite-OASIS or Learn2Reg."""
    numbers = re.findall(r"OASIS_(?:OAS1_)?(\d{4})", path)
    if not numbers:
        raise ValueError(f"{path} has no OASIS subject number in its path. Name it like OASIS_0438_0000.nii.gz.")
    return int(numbers[-1])


class SaveSubmission:
    """Handler that writes the displacements of an evaluation in the format of Learn2Reg: half resolution, float16.

    Each pair gets a file ``disp_FIXED_MOVING.npz`` with the array ``arr_0`` ``(3, *spatial / 2)``: displacements in
    voxels of the full grid, resampled with splines of order 2 (Hering et al., IEEE TMI 2023). The challenge
    resamples them to the full grid in the same way.

    Args:
        output_dir: folder to write to.
        overwrite: replace the fields of an earlier evaluation; otherwise existing fields are an error.
    """

    def __init__(self, output_dir: str, overwrite: bool = False) -> None:
        self.output_dir = Path(output_dir)
        self.overwrite = overwrite

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Check the folder before any work is done."""
        existing = next(self.output_dir.glob("disp_*.npz"), None)
        if existing is not None and not self.overwrite:
            raise FileExistsError(f"{existing} already exists. Choose another output_dir, or set overwrite.")
        idist.barrier()  # no process may write before all have checked

    def __call__(self, engine: Engine) -> None:
        """Write the pairs of the batch that ``engine`` has registered."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        pairs = zip(engine.state.batch, engine.state.output, strict=True)  # type: ignore[call-overload] # both are set
        for item, prediction in pairs:
            fixed, moving = (_subject(item[role].meta["filename_or_obj"]) for role in ("fixed", "moving"))
            ddf = prediction["ddf"].cpu().numpy()
            if any(n % 2 for n in ddf.shape[1:]):
                raise ValueError(
                    f"a field of {list(ddf.shape[1:])} voxels cannot be halved for the submission: each length must be "
                    "even."
                )
            half = np.stack([ndimage.zoom(component, 0.5, order=2, mode="nearest") for component in ddf])
            with atomic(self.output_dir / f"disp_{fixed:04d}_{moving:04d}.npz") as temporary:
                np.savez_compressed(temporary, half.astype(np.float16))
