"""Ignite handlers for a training that can be stopped at any moment and goes on as if nothing had happened."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from torch import nn

from voxelmorph_monai.data import PairSampler, process
from voxelmorph_monai.spaces import atomic

__all__ = ["EpochSeed", "KeepBest", "Resume"]


class Stateful(Protocol):
    """Whatever has a state to save: modules, optimisers, schedulers, handlers."""

    def state_dict(self) -> Mapping[str, object]:
        """Give the state."""

    def load_state_dict(self, state_dict: Mapping[str, object]) -> object:
        """Take the state."""


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
            self.best = value
            if process()[0] == 0:
                _save(self.network.state_dict(), self.path)

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
        self, path: str, objects: Mapping[str, Stateful], settings: Mapping[str, str | float] | None = None
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
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["settings"] != self.settings:
                raise ValueError(f"settings {state['settings']}, now {self.settings}")
            for name, stateful in self.objects.items():
                stateful.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
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
