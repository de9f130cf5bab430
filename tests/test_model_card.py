"""What weights say of themselves."""

import json
from pathlib import Path

import pytest
import torch

from voxelmorph_monai.apps.options import PRESET, Options
from voxelmorph_monai.apps.shipped import load_network, network_of, shipped_bundle, shipped_weights
from voxelmorph_monai.model_card import INTENSITIES, ModelCard, read_card, write_card
from voxelmorph_monai.networks import PRESETS, VoxelMorph
from voxelmorph_monai.space.template import STANDARD_GRID

SMALL = {"encoder": (4, 8), "decoder": ((8,), (8,)), "velocity_sigma": 0.7, "cascades": 2}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    network = VoxelMorph("diffeomorphic", spatial_dims=2, probabilistic=False, **SMALL)
    torch.save(network.state_dict(), tmp_path / "small.pt")
    write_card(tmp_path / "small.pt", ModelCard.of(network, size=(40, 50), spacing=2.0))
    return tmp_path / "small.pt"


def test_a_card_makes_the_network_again(weights: Path) -> None:
    card = read_card(weights)
    assert card is not None
    assert card.changes == {**SMALL, "probabilistic": False}
    assert (card.size, card.spacing, card.intensities) == ((40, 50), 2.0, "percentile")
    network = load_network(weights).network
    assert network.architecture == PRESETS["diffeomorphic"]._replace(**SMALL, probabilistic=False)
    assert network.spatial_dims == 2


def test_a_network_that_takes_its_smoothness_is_made_again(tmp_path: Path) -> None:
    network = VoxelMorph("vm1", spatial_dims=2, smoothness_weight=0.3)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    write_card(tmp_path / "model.pt", ModelCard.of(network))
    assert load_network(tmp_path / "model.pt").network.smoothness_weight == 0.3


def test_a_state_dict_stays_a_plain_one(weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_what_contradicts_the_card_is_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"small\.pt.*diffeomorphic.*small\.json.*vm2"):
        load_network(weights, preset="vm2")
    with pytest.raises(ValueError, match=r"small\.pt.*2-D.*3-D"):
        network_of(Options(weights=weights), 3)
    load_network(weights, preset="diffeomorphic", spatial_dims=2)


def test_weights_without_a_card_load_as_they_did(tmp_path: Path) -> None:
    torch.save(VoxelMorph("vm1", spatial_dims=2).state_dict(), tmp_path / "old.pt")
    assert read_card(tmp_path / "old.pt") is None
    assert load_network(tmp_path / "old.pt", "vm1", 2).network.architecture == PRESETS["vm1"]
    with pytest.raises(ValueError, match=r"old\.pt"):
        load_network(tmp_path / "old.pt", spatial_dims=2)  # it is none of the default preset


def test_the_shipped_weights_say_what_they_are() -> None:
    bundle = shipped_bundle("brain_t1_registration")
    card = read_card(shipped_weights())
    assert card is not None
    config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
    assert card.preset == PRESET == config["preset"]
    assert card.network().architecture == VoxelMorph(config["preset"], input_level=config["input_level"]).architecture
    assert (card.size, card.spacing) == (STANDARD_GRID.size, STANDARD_GRID.spacing)
    loaded = network_of(Options(), 3)
    assert loaded is not None
    assert loaded.card == card


def test_a_changed_card_is_read_again(tmp_path: Path) -> None:
    network = VoxelMorph("vm1", spatial_dims=2)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    for intensities in INTENSITIES:
        write_card(tmp_path / "model.pt", ModelCard.of(network, intensities=intensities))
        loaded = network_of(Options(weights=tmp_path / "model.pt"), 2)
        assert loaded is not None
        assert loaded.card is not None
        assert loaded.card.intensities == intensities


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "small.json"),
        ("[1]", "preset"),
        ("{}", "preset"),
        (json.dumps({"preset": "vm9"}), "vm9"),
        (json.dumps({"preset": "vm1", "intensities": "none"}), "intensities 'none'"),
        (json.dumps({"preset": "vm1", "changes": {"colour": 3}}), "colour"),
        (json.dumps({"preset": "vm1", "program": "rm"}), "program"),
        (json.dumps({"preset": "vm1", "changes": [1]}), "small.json"),
    ],
)
def test_a_broken_card_is_named(weights: Path, text: str, words: str) -> None:
    weights.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=r"small\.json") as caught:
        load_network(weights)
    assert words in str(caught.value)
