"""Weights of the authors: read from the Keras files of the papers and from checkpoints of their PyTorch code, exactly.

A Keras file holds, under ``model_weights``, one group for each layer and its names in the order of the network
(``layer_names``). Numbers in names mean nothing, so arrays are taken by that order, the two heads by their names
``flow`` and ``log_sigma``, and all by their shapes. Kernels are ``(d, h, w, in, out)``. To read one takes h5py:
``pip install 'voxelmorph_monai[import]'``.

A checkpoint is a state dict of ``VxmDense``, alone or as ``model_state`` beside the ``config`` it was made with. Names
and shapes say which network it is of; how the velocity is integrated only the config does, or the grids that a state
dict holds for it.
"""

import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.files import atomic, require_new
from voxelmorph_monai.networks import VoxelMorph, read_state, wrong_parameters

__all__ = ["import_weights"]

_PRESETS = ("vm1", "vm2", "miccai2018")
_HEADS = {"flow": "flow", "log_sigma": "log_variance"}
_VXMDENSE = (  # names of ours, names of theirs
    (r"unet\.encoder\.(\d+)\.conv", r"unet_model.encoder.\1.0.main"),
    (r"unet\.decoder\.4\.(\d+)\.conv", r"unet_model.remaining.\1.main"),
    (r"unet\.decoder\.(\d+)\.0\.conv", r"unet_model.decoder.\1.0.main"),
)
_INTEGRATION = {"int_steps": 7, "int_downsize": 2}


class _Layer(NamedTuple):
    """One convolution of a Keras file."""

    name: str
    kernel: NDArray[np.float32]  # (d, h, w, in, out)
    bias: NDArray[np.float32]

    def __str__(self) -> str:
        sizes = " x ".join(str(n) for n in self.kernel.shape[:-2])
        return f"{self.name} {self.kernel.shape[-2]}->{self.kernel.shape[-1]} ({sizes})"


def _read_layer(group: Any, name: str) -> _Layer | None:
    """Kernel and bias of one layer, whatever the scope between is called; None of a layer without weights."""
    arrays: dict[str, NDArray[np.float32]] = {}

    def visit(path: str, item: Any) -> None:
        if hasattr(item, "shape"):  # a data set, not a group
            arrays[path.rpartition("/")[2]] = np.asarray(item, dtype=np.float32)

    group.visititems(visit)
    if not arrays:
        return None
    if set(arrays) != {"kernel:0", "bias:0"} or arrays["kernel:0"].ndim != 5 or arrays["bias:0"].ndim != 1:
        shapes = {path: array.shape for path, array in arrays.items()}
        raise ValueError(f"layer {name} must be a 3-D convolution with a kernel:0 and a bias:0, got {shapes}")
    return _Layer(name, arrays["kernel:0"], arrays["bias:0"])


def _read_layers(path: Path) -> list[_Layer]:
    """Convolutions of a Keras file in the order of the network, the heads last: ``flow``, ``log_sigma``."""
    try:
        h5py = importlib.import_module("h5py")  # optional: nothing else needs it
    except ImportError as error:
        raise ValueError(f"to read it takes h5py: pip install 'voxelmorph_monai[import]' ({error})") from error
    with h5py.File(path, "r") as file:
        if "model_weights" not in file or "layer_names" not in file["model_weights"].attrs:
            raise ValueError(f"there must be a group model_weights that lists its layer_names, got {list(file)}")
        weights = file["model_weights"]
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in weights.attrs["layer_names"]]
        layers = [layer for name in names if (layer := _read_layer(weights[name], name))]
    heads = [layer for head in _HEADS for layer in layers if layer.name == head]
    return [layer for layer in layers if layer.name not in _HEADS] + heads


def _parameters(preset: str) -> list[tuple[str, Tensor]]:
    """Name and weight of each convolution of ``preset``, in the order of a Keras file."""
    state = VoxelMorph(preset).state_dict()
    return [(name.removesuffix(".weight"), tensor) for name, tensor in state.items() if name.endswith(".weight")]


def _fits(layers: list[_Layer], preset: str) -> bool:
    expected = _parameters(preset)
    return len(layers) == len(expected) and all(
        layer.kernel.transpose(4, 3, 0, 1, 2).shape == weight.shape
        and layer.bias.shape == weight.shape[:1]
        and (layer.name == "flow") == (name == "flow")
        and (layer.name == "log_sigma") == (name == "log_variance")
        for layer, (name, weight) in zip(layers, expected, strict=True)
    )


def _widths(preset: str) -> str:
    return ", ".join(f"{weight.shape[1]}->{weight.shape[0]}" for _, weight in _parameters(preset))


def _to_ij(layer: _Layer) -> _Layer:
    r"""Restate a head of the paper's first code, which counted axes as x, y and did not divide the velocity by 2^7.

    Axis 0 and 1 change places. Starting the squarings from :math:`v` is starting them from :math:`128 v / 2^7`; the
    log of the variance grows by :math:`2 \log 128`.
    """
    kernel, bias = (array[..., [1, 0, 2]] for array in (layer.kernel, layer.bias))
    if layer.name == "flow":
        return _Layer(layer.name, kernel * 2.0**7, bias * 2.0**7)
    return _Layer(layer.name, kernel, bias + np.float32(2 * math.log(2.0**7)))


def _from_keras(source: Path, xy: bool) -> tuple[str, dict[str, Tensor]]:
    """Preset and state dict of a Keras file."""
    try:
        layers = _read_layers(source)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"weights {source} must be a Keras file of the authors (.h5), but: {error}.") from error
    preset = next((preset for preset in _PRESETS if _fits(layers, preset)), None)
    if preset is None:
        expected = "; ".join(f"{preset}: {_widths(preset)}" for preset in _PRESETS)
        raise ValueError(
            f"weights {source} must be 3 x 3 x 3 convolutions of one of these networks, heads last: {expected}; "
            f"got {', '.join(map(str, layers)) or 'none'}."
        )
    if xy and preset != "miccai2018":
        raise ValueError(f"xy is for a file of the MICCAI paper, got one of {preset}: {source}.")
    state = {}
    for layer, (name, _) in zip(layers, _parameters(preset), strict=True):
        restated = _to_ij(layer) if xy and layer.name in _HEADS else layer
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(restated.kernel.transpose(4, 3, 0, 1, 2)))
        state[f"{name}.bias"] = torch.from_numpy(np.ascontiguousarray(restated.bias))
        _check_finite(source, layer.name, state[f"{name}.weight"], state[f"{name}.bias"])
    return preset, state


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """State dict and config of a checkpoint."""
    found = read_state(path)
    state, config = (found["model_state"], found.get("config", {})) if "model_state" in found else (found, {})
    if not isinstance(state, dict) or not isinstance(config, dict):
        raise ValueError(
            f"model_state and config must be dicts, got {type(state).__name__} and {type(config).__name__}"
        )
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError(f"it must hold a state dict, alone or as model_state, got {[*map(str, state)][:5]}")
    return state, config or _config_of_grids(state)


def _config_of_grids(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What the grids of voxels that a state dict may hold say of the integration."""
    grid, coarse = (state.get(f"{name}.grid") for name in ("transformer", "integrate.transformer"))
    if grid is None:
        return {}
    return {"int_steps": 0} if coarse is None else {"int_downsize": round(grid.shape[-1] / coarse.shape[-1])}


def _vxmdense_name(name: str) -> str:
    """What a parameter of ours is called in a checkpoint.

    >>> _vxmdense_name("unet.decoder.3.0.conv.bias"), _vxmdense_name("unet.decoder.4.1.conv.bias")
    ('unet_model.decoder.3.0.main.bias', 'unet_model.remaining.1.main.bias')
    """
    for ours, theirs in _VXMDENSE:
        name = re.sub(ours, theirs, name)
    return name


def _from_checkpoint(source: Path) -> tuple[str, dict[str, Tensor]]:
    """Preset and state dict of a checkpoint of the authors' PyTorch code."""
    try:
        found, config = _read_checkpoint(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"weights {source} must be a checkpoint of the authors' VxmDense, but: {error}.") from error
    weights = {name: tensor.float() for name, tensor in found.items() if not name.endswith(".grid")}
    spatial_dims = 2 if "flow.weight" in weights and weights["flow.weight"].ndim == 4 else 3
    ours = VoxelMorph("vxmdense", spatial_dims).state_dict()
    if wrong := wrong_parameters({_vxmdense_name(name): tensor for name, tensor in ours.items()}, weights):
        raise ValueError(
            f"weights {source} must be of VxmDense for two images of one channel, of its default widths (16, 32, 32, "
            f"32; 32, 32, 32, 32, 32, 16, 16), but {len(wrong)} parameters are not: {'; '.join(wrong[:3])}."
        )
    integration = {key: config.get(key, value) for key, value in _INTEGRATION.items()}
    if integration != _INTEGRATION:
        wanted, given = (", ".join(f"{k} {v}" for k, v in each.items()) for each in (_INTEGRATION, integration))
        raise ValueError(f"weights {source} must be of VxmDense with {wanted}, got {given}.")
    for name, tensor in weights.items():
        _check_finite(source, name.rpartition(".")[0], tensor)
    return "vxmdense", {name: weights[_vxmdense_name(name)] for name in ours}


def _check_finite(source: Path, name: str, *tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"weights {source} must be finite, but those of layer {name} are not.")


def import_weights(source: str | Path, output: str | Path, *, xy: bool = False) -> str:
    """Write weights of the authors as a state dict of ours, and give the name of the preset they belong to.

    Keras files (``.h5``) are those of ``models/`` in the branch ``legacy`` of github.com/voxelmorph/voxelmorph:
    ``cvpr2018_vm1_*.h5`` and ``cvpr2018_vm2_*.h5`` (presets ``vm1``, ``vm2``; Balakrishnan et al., CVPR 2018) and
    ``miccai2018_*.h5`` (preset ``miccai2018``; Dalca et al., MICCAI 2018).

    Any other file is a checkpoint of ``VxmDense``, the network of the package ``voxelmorph`` 0.2 in PyTorch, in 2-D or
    3-D, with the default widths and integration (preset ``vxmdense``): what its ``save`` writes, or a state dict. It
    can hold nothing but tensors, numbers and text: no program in it is run.

    Args:
        source: the file.
        output: file to write, new.
        xy: the file is of ``models/xy/``, from the first code of the MICCAI paper: axes counted as x, y, and velocities
            that were not divided by the number of squarings.

    Raises:
        FileNotFoundError, FileExistsError: no source, or an output that is there.
        ValueError: not a file of the authors, or of another network.
    """
    source, output = Path(source), Path(output)
    if not source.is_file():
        raise FileNotFoundError(f"weights {source} must be a Keras file (.h5) or a checkpoint, but there is none.")
    require_new(output)
    if source.suffix in (".h5", ".hdf5"):
        preset, state = _from_keras(source, xy)
    elif xy:
        raise ValueError(f"xy is for a Keras file (.h5) of the MICCAI paper, got {source}.")
    else:
        preset, state = _from_checkpoint(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as temporary:
        torch.save(state, temporary)
    return preset
