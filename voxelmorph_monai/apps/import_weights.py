"""Import the authors' weights: Keras files of the papers, and checkpoints of their PyTorch code.

A Keras file holds one group per layer under ``model_weights``, whose attribute ``layer_names`` lists them in the order
of the network. The numbers in layer names have no meaning, so layers are matched by this order, except for the two
heads, which are named ``flow`` and ``log_sigma``. The shapes are checked. Kernels are ``(d, h, w, in, out)``.

A checkpoint is a state dict of ``VxmDense``, either by itself or as ``model_state`` next to its ``config``. Names and
shapes identify the network. The integration of the velocity follows from the config, or from the grids in the state
dict.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.io.atomic import atomic, require_new
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.model_card import ModelCard, write_card
from voxelmorph_monai.networks import VoxelMorph, read_state, wrong_parameters

__all__ = ["import_weights"]

h5py = lazy("h5py")

_PRESETS = ("vm1", "vm2", "miccai2018")
_HEADS = {"flow": "flow", "log_sigma": "log_variance"}
_VXMDENSE = (  # our names, their names
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
    """Read kernel and bias of one layer, with any name of its scope; None for a layer without weights."""
    arrays: dict[str, NDArray[np.float32]] = {}

    def visit(path: str, item: Any) -> None:
        if hasattr(item, "shape"):  # a data set, not a group
            arrays[path.rpartition("/")[2]] = np.asarray(item, dtype=np.float32)

    group.visititems(visit)
    if not arrays:
        return None
    if set(arrays) != {"kernel:0", "bias:0"} or arrays["kernel:0"].ndim != 5 or arrays["bias:0"].ndim != 1:
        shapes = {path: array.shape for path, array in arrays.items()}
        raise ValueError(f"layer {name} holds {shapes}, not the kernel:0 and bias:0 of a 3-D convolution")
    return _Layer(name, arrays["kernel:0"], arrays["bias:0"])


def _read_layers(path: Path) -> list[_Layer]:
    """Convolutions of a Keras file in the order of the network, the heads last: ``flow``, ``log_sigma``."""
    with h5py.File(path, "r") as file:
        if "model_weights" not in file or "layer_names" not in file["model_weights"].attrs:
            raise ValueError(f"it holds {list(file)}, but no group model_weights with layer_names")
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
    r"""Convert a head of the paper's first code, which ordered axes as x, y and did not divide the velocity by 2^7.

    Axes 0 and 1 are swapped. Squaring that starts from :math:`v` equals squaring that starts from :math:`128 v / 2^7`,
    so the velocity is multiplied by 128, and :math:`2 \log 128` is added to the log-variance.
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
        raise ValueError(f"weights {source} cannot be read as a Keras file of the authors: {error}.") from error
    preset = next((preset for preset in _PRESETS if _fits(layers, preset)), None)
    if preset is None:
        expected = "; ".join(f"{preset}: {_widths(preset)}" for preset in _PRESETS)
        raise ValueError(
            f"weights {source} belong to none of the networks that can be imported: their convolutions are "
            f"{', '.join(map(str, layers)) or 'none'}, but these are needed, 3 x 3 x 3, heads last: {expected}."
        )
    if xy and preset != "miccai2018":
        raise ValueError(f"weights {source} are of {preset}, but xy applies only to files of the MICCAI paper.")
    state = {}
    for layer, (name, _) in zip(layers, _parameters(preset), strict=True):
        restated = _to_ij(layer) if xy and layer.name in _HEADS else layer
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(restated.kernel.transpose(4, 3, 0, 1, 2)))
        state[f"{name}.bias"] = torch.from_numpy(np.ascontiguousarray(restated.bias))
        _check_finite(source, layer.name, state[f"{name}.weight"], state[f"{name}.bias"])
    return preset, state


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """State dict and config of a checkpoint."""
    content = read_state(path)
    state, config = (content["model_state"], content.get("config", {})) if "model_state" in content else (content, {})
    for name, value in (("model_state", state), ("config", config)):
        if not isinstance(value, dict):
            raise ValueError(f"its {name} is a {type(value).__name__}, not a dict")
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError(f"it holds {[*map(str, state)][:5]}, but no state dict")
    return state, config or _config_of_grids(state)


def _config_of_grids(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Integration options that follow from the voxel grids in a state dict, if it has any."""
    grid, coarse = (state.get(f"{name}.grid") for name in ("transformer", "integrate.transformer"))
    if grid is None:
        return {}
    return {"int_steps": 0} if coarse is None else {"int_downsize": round(grid.shape[-1] / coarse.shape[-1])}


def _vxmdense_name(name: str) -> str:
    """Convert the name of a parameter of this package to its name in a checkpoint.

    >>> _vxmdense_name("unet.decoder.3.0.conv.bias"), _vxmdense_name("unet.decoder.4.1.conv.bias")
    ('unet_model.decoder.3.0.main.bias', 'unet_model.remaining.1.main.bias')
    """
    for ours, theirs in _VXMDENSE:
        name = re.sub(ours, theirs, name)
    return name


def _from_checkpoint(source: Path) -> tuple[str, dict[str, Tensor]]:
    """Preset and state dict of a checkpoint of the authors' PyTorch code."""
    try:
        state, config = _read_checkpoint(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"weights {source} cannot be read as a checkpoint of VxmDense: {error}.") from error
    weights = {name: tensor.float() for name, tensor in state.items() if not name.endswith(".grid")}
    spatial_dims = 2 if "flow.weight" in weights and weights["flow.weight"].ndim == 4 else 3
    ours = VoxelMorph("vxmdense", spatial_dims).state_dict()
    if wrong := wrong_parameters({_vxmdense_name(name): tensor for name, tensor in ours.items()}, weights):
        raise ValueError(
            f"weights {source} cannot be imported: {len(wrong)} parameters differ from a VxmDense for two images of one"
            f" channel with default widths (16, 32, 32, 32; 32, 32, 32, 32, 32, 16, 16): {'; '.join(wrong[:3])}."
        )
    integration = {key: config.get(key, value) for key, value in _INTEGRATION.items()}
    if integration != _INTEGRATION:
        wanted, given = (", ".join(f"{k} {v}" for k, v in each.items()) for each in (_INTEGRATION, integration))
        raise ValueError(f"weights {source} were trained with {given}. Only VxmDense with {wanted} can be imported.")
    for name, tensor in weights.items():
        _check_finite(source, name.rpartition(".")[0], tensor)
    return "vxmdense", {name: weights[_vxmdense_name(name)] for name in ours}


def _check_finite(source: Path, name: str, *tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"weights {source} hold NaN or infinity in the layer {name}. Get an undamaged file.")


def import_weights(source: str | Path, output: str | Path, *, xy: bool = False) -> str:
    """Convert the authors' weights to a state dict of this package; returns the name of their preset.

    A model card (:class:`~voxelmorph_monai.model_card.ModelCard`) is written next to ``output``. It records the preset,
    and that the network expects FreeSurfer's intensities, with the mode of white matter at 110/255.

    Keras files (``.h5``) are those of ``models/`` in the branch ``legacy`` of github.com/voxelmorph/voxelmorph:
    ``cvpr2018_vm1_*.h5`` and ``cvpr2018_vm2_*.h5`` (presets ``vm1``, ``vm2``; Balakrishnan et al., CVPR 2018) and
    ``miccai2018_*.h5`` (preset ``miccai2018``; Dalca et al., MICCAI 2018).

    Any other file is read as a checkpoint of ``VxmDense``, the PyTorch network of the package ``voxelmorph`` 0.2, in
    2-D or 3-D, with default widths and integration (preset ``vxmdense``): a file from its ``save``, or a state dict. It
    may hold only tensors, numbers and text; code in it is never run.

    Args:
        source: file to read.
        output: new file to write.
        xy: the file is from ``models/xy/``, written by the first code of the MICCAI paper: axes in the order x, y, and
            velocities that were not divided by the number of squarings.

    Raises:
        FileNotFoundError, FileExistsError: ``source`` does not exist, or ``output`` does.
        ValueError: the file is not by the authors, or of another network.
    """
    source, output = Path(source), Path(output)
    if not source.is_file():
        raise FileNotFoundError(f"weights {source} do not exist. Name a Keras file (.h5) or a checkpoint.")
    require_new(output)
    if source.suffix in (".h5", ".hdf5"):
        preset, state = _from_keras(source, xy)
    elif xy:
        raise ValueError(
            f"weights {source} are not a Keras file (.h5), but xy applies only to Keras files of the MICCAI paper."
        )
    else:
        preset, state = _from_checkpoint(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    spatial_dims = state["flow.weight"].ndim - 2
    with atomic(output) as temporary:
        torch.save(state, temporary)
        write_card(output, ModelCard(preset, spatial_dims=spatial_dims, intensities="white_matter"))
    return preset
