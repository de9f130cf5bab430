"""Ignite handlers: training can be stopped at any moment and goes on as if nothing had happened; results are kept."""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from torch import nn

from voxelmorph_monai.data import PairSampler, process
from voxelmorph_monai.engines import pair_paths
from voxelmorph_monai.evaluation import check_folder, compare_affine, save_evaluation, summarise, tabulate
from voxelmorph_monai.files import atomic, sweep
from voxelmorph_monai.networks import read_state

__all__ = ["EpochSeed", "KeepBest", "Ramp", "Resume", "SaveEvaluation"]

_SAME_DICE = 0.01  # two means are within it if they are of the same scans and labels, or of half of those scans


class Stateful(Protocol):
    """Whatever has a state to save: modules, optimisers, schedulers, handlers."""

    def state_dict(self) -> Mapping[str, object]:
        """Give the state."""

    def load_state_dict(self, state_dict: Mapping[str, object]) -> object:
        """Take the state."""


def _gather(values: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Lists of all processes, one after the other as MONAI's metrics put them, in each of the processes."""
    _, world = process()
    if world == 1:
        return values
    lists: list[list[tuple[str, str]]] = [[]] * world
    torch.distributed.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def _save(state: object, path: Path) -> None:
    """Write ``path`` whole or not at all (MONAI's CheckpointSaver leaves half a file when it is killed)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        torch.save(state, temporary)


class EpochSeed:
    """Seed every random generator from ``(seed, epoch, process)`` when an epoch starts.

    What an epoch draws then depends on no earlier epoch, and a resumed training repeats it bit by bit without the
    states of generators, which live in many places (transforms, samplers, workers), having to be saved.
    """

    def __init__(self, seed: int = 0, sampler: PairSampler | None = None) -> None:
        self.seed = seed
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed for the epoch that ``engine`` starts."""
        state = np.random.SeedSequence([self.seed, engine.state.epoch, process()[0]])
        first, second, third = (int(s) for s in state.generate_state(3))
        torch.manual_seed(first)
        np.random.seed(second)
        random.seed(third)
        if self.sampler is not None:
            self.sampler.set_epoch(engine.state.epoch)


class Ramp:
    """Let a weight of the loss grow from 0 in the first epoch, by equal steps, to its value after ``num_epochs``.

    Args:
        module: what has the weight, such as ``RegistrationLoss``.
        name: of the attribute, a number.
        num_epochs: epochs with less than the full weight; 0: none.
    """

    def __init__(self, module: nn.Module, name: str, num_epochs: int) -> None:
        if num_epochs < 0:
            raise ValueError(f"num_epochs of the ramp of {name} must be 0 or more, got {num_epochs}.")
        self.module = module
        self.name = name
        self.num_epochs = num_epochs
        self.full = getattr(module, name)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the weight for the epoch that ``engine`` starts; it depends on no earlier one."""
        share = min(1.0, (engine.state.epoch - 1) / self.num_epochs) if self.num_epochs else 1.0
        setattr(self.module, self.name, self.full * share)


class KeepBest:
    """Keep the network's weights of the best validation, as a plain state dict.

    Args:
        network: whose weights.
        path: file to write, replaced at each improvement.
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
            raise ValueError(f"{self.metric} must be a number to keep the best weights, got NaN: nothing to measure.")
        if value > self.best:
            state = self.network.state_dict()
            if broken := [name for name, weights in state.items() if not bool(weights.isfinite().all())]:
                raise ValueError(
                    f"weights must be finite to be kept, but {len(broken)} parameters are not, first {broken[0]}: the "
                    "training diverged, a lower learning rate may help."
                )
            self.best = value
            if process()[0] == 0:
                _save(state, self.path)

    def state_dict(self) -> dict[str, float]:
        """Give the best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Take the best value so far."""
        self.best = state_dict["best"]


class Resume:
    """Save all that a training needs after each epoch, and go on from there when it is started again.

    Args:
        path: the checkpoint; if it exists when the training starts, it is loaded.
        objects: what has a state, by name: network, optimiser, scheduler, :class:`KeepBest`, early stop.
        settings: plain values that must be what they were when the checkpoint was written.
    """

    def __init__(
        self, path: str, objects: Mapping[str, Stateful], settings: Mapping[str, str | float | None] | None = None
    ) -> None:
        self.path = Path(path)
        self.objects = objects
        self.settings = dict(settings or {})

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after everything that changes what is saved (so: last)."""
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        """Set all objects, and the epoch of ``engine``, to what the checkpoint holds, if there is one."""
        if self.path.parent.is_dir() and process()[0] == 0:
            sweep(self.path.parent)  # what a training left that was killed while it saved
        if not self.path.exists():
            return
        try:
            state = read_state(self.path)
            if missing := {"epoch", "settings", *self.objects} - set(state):
                raise ValueError(f"a dict without {sorted(missing)}")
            saved, ours = state["settings"], self.settings
            was, now = (
                {key: value for key, value in one.items() if (key, value) not in other.items()}
                for one, other in ((saved, ours), (ours, saved))
            )
            if was or now:
                raise ValueError(f"settings {was}, now {now}")
            for name, stateful in self.objects.items():
                stateful.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:  # as load_state_dict may raise
            raise ValueError(
                f"checkpoint {self.path} must fit this training to be resumed (else name another output_dir), "
                f"got: {error}"
            ) from error
        engine.state.epoch = state["epoch"]
        # Of whole epochs as long as they are now: Ignite would take a remainder for the place to start within one.
        engine.state.iteration = engine.state.epoch * engine.state.epoch_length  # type: ignore[operator] # it is set
        if any(isinstance(o, EarlyStopping) and o.counter >= o.patience for o in self.objects.values()):
            engine.terminate()  # it had stopped before
        engine.logger.info(f"Resumed from {self.path} after epoch {engine.state.epoch}.")

    def save(self, engine: Engine) -> None:
        """Write the checkpoint, from one process."""
        if process()[0] == 0:
            state: dict[str, object] = {name: stateful.state_dict() for name, stateful in self.objects.items()}
            _save(state | {"epoch": engine.state.epoch, "settings": self.settings}, self.path)


class SaveEvaluation:
    """Write the tables, the summary and the pictures of an evaluation (``evaluation.save_evaluation``).

    In place of MONAI's ``MetricsSaver``, which calls the structures class0, class1, ..., knows no groups of them,
    writes a file for each measure and replaces those of an earlier run without a word.

    Args:
        folder: to write, new. It is looked at here, before any work is done.
        structures: names of what measures of structures measure, label 1 first; or how many there are.
        groups: names of the structures to merge, by the name of the group; the value of a group is the mean of its
            structures' values.
        settings: what is to be remembered of the evaluation.
        overwrite: replace the folder if it holds an earlier evaluation.
        affine_dice: mean Dice before the registration as it was published, over ``structures``, over ``groups`` or
            both. It is noted beside what is found here, with a warning where the two differ.
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
        """Attach to an evaluator, whose metrics are measures of :func:`~voxelmorph_monai.evaluation.tabulate`."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.note)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def start(self, engine: Engine) -> None:
        """Forget the pairs of an earlier run of ``engine``."""
        self.paths = []

    def note(self, engine: Engine) -> None:
        """Note whose turn it was."""
        self.paths += pair_paths(engine.state.batch)  # type: ignore[arg-type] # decollated, so a list

    def save(self, engine: Engine) -> None:
        """Write what all processes have measured, from one of them."""
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
                        f"mean Dice over {over} before the registration must be {dice['published']}, as published, to "
                        f"compare with the literature, got {dice['measured']}: other scans, labels or alignment."
                    )
            engine.logger.info(f"{self.folder}, {len(paths)} pairs:\n{summarise(evaluation).to_string()}")
