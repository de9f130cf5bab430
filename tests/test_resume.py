"""A training is killed with SIGKILL, again and again, and ends with the weights of one that was left alone, bit by bit.

Processes are real ones, forked from a server that has imported everything once; each kills itself at a given moment, so
that the moments are the same in every run of the tests.
"""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

BUNDLE = Path(__file__).parents[1] / "bundles" / "brain_t1_registration"
MAX_EPOCHS = 4


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(path, how, save=torch.save, replace=os.replace):
    """Arrange that the process dies when a file called ``path`` is written: with half of it, all of it, or renamed."""

    def half(state, file):
        save(state, file)
        if str(file).endswith(path):
            os.truncate(file, Path(file).stat().st_size // 2)
            kill()

    def rename(source, target):
        if how == "renamed" or not str(target).endswith(path):
            replace(source, target)
        if str(target).endswith(path):
            kill()

    if how == "half":
        torch.save = half
    else:
        os.replace = rename


def train(prepared, output, moment, epoch):
    """Train in this process, which dies at ``moment`` of ``epoch`` (None: never)."""
    torch.set_num_threads(1)
    os.chdir(BUNDLE)
    options = {"max_epochs": MAX_EPOCHS, "pairs_per_epoch": 2, "num_labels": 4, "learning_rate": 1e-3}
    files = ["configs/train.json", "configs/mse.yaml", "configs/flip.yaml", "configs/diffeomorphic.yaml"]
    workflow = ConfigWorkflow(
        files, logging_file=False, workflow_type="train", dataset_dir=prepared, output_dir=output, **options
    )
    workflow.initialize()
    trainer = workflow.trainer
    if moment == "step":
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2 * epoch - 1), kill)
    elif moment == "validation":
        kill_later = Events.EPOCH_STARTED(once=epoch)
        validated = workflow.evaluator.add_event_handler
        trainer.add_event_handler(kill_later, lambda _: validated(Events.ITERATION_COMPLETED(once=1), kill))
    elif moment is not None:
        path, how = moment
        trainer.add_event_handler(Events.EPOCH_STARTED(once=epoch), lambda _: kill_while_writing(path, how))
    workflow.run()


def run(context, *arguments):
    process = context.Process(target=train, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and forked servers are of POSIX")
def test_killed_at_any_moment_it_ends_the_same(prepared, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["monai.bundle", "monai.engines", "monai.handlers", "voxelmorph_monai.handlers"])
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    assert run(context, str(prepared), whole, None, 0) == 0
    moments = [
        ("step", 1),  # before anything was saved
        (("checkpoint.pt", "half"), 1),
        (("model.pt", "renamed"), 1),  # best weights without a checkpoint that knows of them
        ("step", 2),
        ("validation", 2),
        (("checkpoint.pt", "whole"), 3),  # written, not yet in its place
        (("checkpoint.pt", "renamed"), 3),
        (("checkpoint.pt", "renamed"), 4),  # the last one
    ]
    for moment, epoch in moments:
        assert run(context, str(prepared), cut, moment, epoch) == -signal.SIGKILL, (moment, epoch)
    assert run(context, str(prepared), cut, None, 0) == 0
    for name in ("checkpoint.pt", "model.pt"):
        states = [torch.load(Path(folder, name), weights_only=True) for folder in (whole, cut)]
        if name == "checkpoint.pt":
            assert states[0]["epoch"] == states[1]["epoch"] == MAX_EPOCHS
            assert states[0]["best"] == states[1]["best"]
            assert states[0]["early_stop"] == states[1]["early_stop"]
            optimizers = [state.pop("optimizer")["state"] for state in states]
            for ours, theirs in zip(*(each.values() for each in optimizers), strict=True):
                assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
            states = [state["network"] for state in states]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
