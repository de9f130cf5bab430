"""Find the bundled models, and load networks on a device."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from voxelmorph_monai.apps.options import PRESET, Options
from voxelmorph_monai.model_card import ModelCard, read_card
from voxelmorph_monai.networks import Registration, load_weights

__all__ = [
    "LoadedNetwork",
    "card_of",
    "choose_device",
    "load_network",
    "network_of",
    "shipped_anatomy",
    "shipped_bundle",
    "shipped_weights",
    "weights_file",
]


def shipped_bundle(name: str) -> Path:
    """Folder of a bundled model: next to the package in a clone, inside the package in a wheel."""
    package = Path(__file__).parents[1]
    return (package if (package / "bundles").is_dir() else package.parent) / "bundles" / name


def shipped_weights() -> Path:
    """Bundled weights for skull-stripped brains (preset ``wide``); the bundle's README reports their accuracy."""
    return shipped_bundle("brain_t1_registration") / "models" / "model.pt"


def shipped_anatomy() -> Path:
    """Bundled weights that recognise the anatomy of a head; see :func:`~voxelmorph_monai.anatomy.load_anatomy`."""
    return shipped_bundle("brain_anatomy_segmentation") / "models" / "model.pt"


def choose_device(device: str | None) -> str:
    """Return ``device``, or by default a GPU if there is one; raises ValueError if it cannot be used."""
    if device is None:  # without a test tensor, as the GPU may not be needed
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError if torch was built without CUDA
        raise ValueError(f"device '{device}' cannot be used here. Choose cpu, or cuda if there is a GPU.") from error
    return device


def load_network(
    weights: str | Path | None = None,
    preset: str | None = None,
    spatial_dims: int | None = None,
    device: str | None = None,
) -> Registration:
    """Load weights that a training wrote (``model.pt``), ready for :func:`register`.

    ``preset`` and ``spatial_dims`` are only needed for weights without a model card
    (``model.json``, :class:`~voxelmorph_monai.model_card.ModelCard`).

    Args:
        weights: file of the weights (default: :func:`shipped_weights`).
        preset: preset of the network (default: from the model card; without one ``"wide"``).
        spatial_dims: 2 for slices and 2-D images (default: from the model card; without one 3).
        device: device to compute on (default: a GPU if there is one).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds no weights, or weights of another network.
    """
    path = Path(weights or shipped_weights())
    network = card_of(path, preset, spatial_dims).network()
    load_weights(network, str(path))
    return Registration(network, bidirectional=network.num_steps > 0).to(choose_device(device)).eval()


def card_of(weights: Path, preset: str | None = None, spatial_dims: int | None = None) -> ModelCard:
    """Model card of weights: the one next to them, or one made from ``preset`` and ``spatial_dims``.

    Raises:
        ValueError: the card contradicts ``preset`` or ``spatial_dims``.
    """
    card = read_card(weights) or ModelCard(preset or PRESET, spatial_dims=spatial_dims or 3)
    if preset not in (None, card.preset):
        raise ValueError(
            f"{weights} has the preset {card.preset} according to {weights.stem}.json, not {preset}. Leave out the "
            "preset, or choose other weights."
        )
    if spatial_dims not in (None, card.spatial_dims):
        raise ValueError(
            f"{weights} is for {card.spatial_dims}-D scans, but these are {spatial_dims}-D. Choose other weights."
        )
    return card


class LoadedNetwork(NamedTuple):
    """A network and its model card; a network created in Python has no card."""

    registration: Registration
    card: ModelCard | None


@lru_cache(maxsize=1)  # a process that registers many pairs loads their network once
def _load_network_once(
    weights: Path, preset: str | None, spatial_dims: int, device: str | None, changed: tuple[int, ...]
) -> LoadedNetwork:
    card = card_of(weights, preset, spatial_dims)
    return LoadedNetwork(load_network(weights, preset, spatial_dims, device), card)


def weights_file(options: Options) -> Path | None:
    """File of the weights that ``options`` select; None without a network, or for a network object."""
    weights = options.weights
    if isinstance(weights, Registration) or str(weights) == "none":
        return None
    if weights is None:
        known = options.space == "mni152" and not options.same_person  # trained on brains of different people
        return shipped_weights() if known else None
    return Path(weights).absolute()


def network_of(options: Options, spatial_dims: int) -> LoadedNetwork | None:
    """Load the network that ``options`` select, in evaluation mode; None without a network.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds no weights, or weights of another network.
    """
    if isinstance(options.weights, Registration):
        return LoadedNetwork(options.weights, None)
    path = weights_file(options)
    if path is None:
        return None
    changed = tuple(each.stat().st_mtime_ns for each in (path, path.with_suffix(".json")) if each.exists())
    return _load_network_once(path, options.preset, spatial_dims, options.device, changed)
