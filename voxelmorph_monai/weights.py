"""Weights of the authors: read from the Keras files of the papers, exactly.

A file holds, under ``model_weights``, one group for each layer and its names in the order of the network
(``layer_names``). Numbers in names mean nothing, so arrays are taken by that order, the two heads by their names
``flow`` and ``log_sigma``, and all by their shapes. Kernels are ``(d, h, w, in, out)``. This module needs h5py:
``pip install 'voxelmorph_monai[import]'``.
"""

import math
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.networks import VoxelMorph
from voxelmorph_monai.spaces import atomic

__all__ = ["import_weights"]

_PRESETS = ("vm1", "vm2", "miccai2018")
_HEADS = {"flow": "flow", "log_sigma": "log_variance"}


class _Layer(NamedTuple):
    """One convolution of a file."""

    name: str
    kernel: NDArray[np.float32]  # (d, h, w, in, out)
    bias: NDArray[np.float32]

    def __str__(self) -> str:
        sizes = " x ".join(str(n) for n in self.kernel.shape[:-2])
        return f"{self.name} {self.kernel.shape[-2]}->{self.kernel.shape[-1]} ({sizes})"


def _read_layer(group: h5py.Group, name: str) -> _Layer | None:
    """Kernel and bias of one layer, whatever the scope between is called; None of a layer without weights."""
    arrays: dict[str, NDArray[np.float32]] = {}

    def visit(path: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
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
    with h5py.File(path, "r") as file:
        if "model_weights" not in file or "layer_names" not in file["model_weights"].attrs:
            raise ValueError(f"there must be a group model_weights that lists its layer_names, got {list(file)}")
        weights = file["model_weights"]
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in weights.attrs["layer_names"]]
        layers = [layer for name in names if (layer := _read_layer(weights[name], name))]
    heads = [layer for head in _HEADS for layer in layers if layer.name == head]
    return [layer for layer in layers if layer.name not in _HEADS] + heads


def _parameters(preset: str) -> list[tuple[str, Tensor]]:
    """Name and weight of each convolution of ``preset``, in the order of a file."""
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


def import_weights(source: str | Path, output: str | Path, *, xy: bool = False) -> str:
    """Write the weights of a Keras file of the authors as a state dict, and give the name of the preset they belong to.

    The files are those of ``models/`` in the branch ``legacy`` of github.com/voxelmorph/voxelmorph:
    ``cvpr2018_vm1_*.h5`` and ``cvpr2018_vm2_*.h5`` (presets ``vm1``, ``vm2``; Balakrishnan et al., CVPR 2018) and
    ``miccai2018_*.h5`` (preset ``miccai2018``; Dalca et al., MICCAI 2018).

    Args:
        source: the file.
        output: file to write, new.
        xy: the file is of ``models/xy/``, from the first code of the MICCAI paper: axes counted as x, y, and velocities
            that were not divided by the number of squarings.

    Raises:
        FileNotFoundError, FileExistsError: no source, or an output that is there.
        ValueError: not a Keras file, or of another network.
    """
    source, output = Path(source), Path(output)
    if not source.is_file():
        raise FileNotFoundError(f"weights {source} must be a Keras file (.h5), but there is no such file.")
    if output.exists():
        raise FileExistsError(f"output must be new, but there is a {output}.")
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
        if not (np.isfinite(layer.kernel).all() and np.isfinite(layer.bias).all()):
            raise ValueError(f"weights {source} must be finite, but those of layer {layer.name} are not.")
        restated = _to_ij(layer) if xy and layer.name in _HEADS else layer
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(restated.kernel.transpose(4, 3, 0, 1, 2)))
        state[f"{name}.bias"] = torch.from_numpy(np.ascontiguousarray(restated.bias))
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as temporary:
        torch.save(state, temporary)
    return preset
