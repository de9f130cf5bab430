"""Model card: a file next to the weights with the preset, options, intensities and grid of the network.

The weights, ``model.pt``, stay a plain state dict, which MONAI and MONAI Label can load directly. The card,
``model.json``, describes the network and how its images are scaled. Weights without a card are loaded into the preset
that the caller names, and are taken to be trained on scans divided by their 99.5th percentile.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from voxelmorph_monai import __version__
from voxelmorph_monai.io.atomic import write_json
from voxelmorph_monai.networks import PRESETS, VoxelMorph

__all__ = ["INTENSITIES", "ModelCard", "read_card", "write_card"]

INTENSITIES = ("percentile", "white_matter")
"""Scaling of images for a network: divided by their 99.5th percentile, or with the mode of white matter at 110/255."""


@dataclass(frozen=True)
class ModelCard:
    """Architecture of a trained network, and the images that it expects.

    Attributes:
        preset: one of :data:`~voxelmorph_monai.networks.PRESETS`.
        changes: fields of the architecture that differ from the preset.
        spatial_dims: 2 or 3.
        in_channels: number of channels of both images together.
        smoothness_weight: weight to register with, if the network takes it as an input; None otherwise.
        intensities: one of :data:`INTENSITIES`.
        size: size of the training grid in voxels, along axes that run left, inferior, anterior; None if unknown.
        spacing: voxel size of that grid in mm; None if unknown.
        version: version of the package that wrote the card.
    """

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    spatial_dims: int = 3
    in_channels: int = 2
    smoothness_weight: float | None = None
    intensities: str = "percentile"
    size: tuple[int, ...] | None = None
    spacing: float | None = None
    version: str = __version__

    @classmethod
    def of(cls, network: VoxelMorph, **others: Any) -> "ModelCard":
        """Card of a network; ``others`` are fields that the network does not store, such as ``spacing``."""
        usual, own = PRESETS[network.preset]._asdict(), network.architecture._asdict()
        changes = {name: value for name, value in own.items() if value != usual[name]}
        weight = network.smoothness_weight if network.amortised else None
        return cls(network.preset, changes, network.spatial_dims, network.in_channels, weight, **others)

    def network(self) -> VoxelMorph:
        """Create the network that the card describes, with random weights."""
        return VoxelMorph(self.preset, self.spatial_dims, self.in_channels, self.smoothness_weight, **self.changes)


def _path(weights: str | Path) -> Path:
    return Path(weights).with_suffix(".json")


def write_card(weights: str | Path, card: ModelCard) -> None:
    """Write the card next to its file of weights; the file is never left incomplete."""
    write_json(_path(weights), asdict(card))


def read_card(weights: str | Path) -> ModelCard | None:
    """Read the card of a file of weights; None if it has no card.

    Raises:
        ValueError: the file next to the weights is not a valid card.
    """
    path = _path(weights)
    if not path.is_file() or path == Path(weights):
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "preset" not in content:
            raise ValueError("it names no preset")
        tuples = {name: _tuples(value) for name, value in content.get("changes", {}).items()}
        card = ModelCard(**{**content, "changes": tuples, "size": _tuples(content.get("size"))})
        if card.intensities not in INTENSITIES:
            raise ValueError(f"unknown intensities '{card.intensities}' instead of {' or '.join(INTENSITIES)}")
        card.network()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a valid card for the weights next to it: {error}. Correct it, or move it away."
        ) from error
    return card


def _tuples(value: Any) -> Any:
    """Convert lists, also nested ones, to tuples: JSON has only lists."""
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
