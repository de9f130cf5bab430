"""Run the workflows of a copied bundle, for tests of the bundles."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from torch import nn

QUIET = [
    # printed for every config that is parsed; what it asks is said in the README
    pytest.mark.filterwarnings("ignore:parsing config_file.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # MONAI's MetaTensor under Ignite's metrics
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar"),
]


@contextmanager
def copied(bundle: Path, network: type[nn.Module], folder: Path) -> Iterator[Path]:
    """A copy of a bundle in ``folder`` with random weights of ``network``, seed 0, as the working directory."""
    copy = folder / bundle.name
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("models"))
    (copy / "models").mkdir()
    torch.manual_seed(0)
    torch.save(network().state_dict(), copy / "models" / "model.pt")
    before = Path.cwd()
    os.chdir(copy)
    yield copy
    os.chdir(before)


def workflow(files: Sequence[str], kind: str = "train", **options: object) -> ConfigWorkflow:
    """An initialised workflow of the bundle in the working directory, from files in its folder ``configs``."""
    found = ConfigWorkflow(
        [f"configs/{name}" for name in files],
        meta_file="configs/metadata.json",
        logging_file=False,
        workflow_type=kind,
        **options,
    )
    found.initialize()
    return found
