"""``VxmDense`` of the package voxelmorph 0.2, with our network, for code and checkpoints made for that class.

It gives the same numbers, for networks of any width. Two convolutions per level and probabilities are not supported.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxelmorph_monai.blocks import warp
from voxelmorph_monai.networks import VoxelMorph, read_state, wrong_parameters

__all__ = ["VxmDense"]

_WIDTHS = ((16, 32, 32, 32), (32, 32, 32, 32, 32, 16, 16))
_OTHERS = {
    "nb_unet_levels": None,
    "unet_feat_mult": 1,
    "nb_unet_conv_per_level": 1,
    "use_probs": False,
    "unet_half_res": False,
}


def _their_name(name: str, levels: int) -> str:
    """Name in their checkpoint of one of our parameters."""
    name = re.sub(r"unet\.encoder\.(\d+)\.conv", r"unet_model.encoder.\1.0.main", name)
    name = re.sub(rf"unet\.decoder\.{levels}\.(\d+)\.conv", r"unet_model.remaining.\1.main", name)
    return re.sub(r"unet\.decoder\.(\d+)\.0\.conv", r"unet_model.decoder.\1.0.main", name)


def _widths_of(state: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Widths of the encoder and of the decoder, by the shapes of a checkpoint."""
    found: dict[str, list[int]] = {"encoder": [], "decoder": [], "remaining": []}
    for part, widths in found.items():
        inner = "" if part == "remaining" else r"\.0"
        pattern = re.compile(rf"unet_model\.{part}\.(\d+){inner}\.main\.weight")
        numbered = {int(name[1]): len(tensor) for key, tensor in state.items() if (name := pattern.fullmatch(key))}
        widths += [numbered[k] for k in sorted(numbered)]
    return found["encoder"], found["decoder"] + found["remaining"]


class VxmDense(nn.Module):
    """Register pairs as ``voxelmorph.torch.networks.VxmDense`` of voxelmorph 0.2 does, with its arguments.

    >>> network = VxmDense((32, 48), nb_unet_features=[[8, 8], [8, 8, 8]])
    >>> moved, velocity = network(torch.rand(1, 1, 32, 48), torch.rand(1, 1, 32, 48))
    >>> moved.shape, velocity.shape
    (torch.Size([1, 1, 32, 48]), torch.Size([1, 2, 16, 24]))

    Args:
        inshape: size of the images; it says only whether they are in 2-D or 3-D, as any size can be registered.
        nb_unet_features: widths of the encoder, one for each level, and of the decoder, which has at least one more.
        int_steps: number of squarings that integrate the velocity; 0: the network predicts the displacement.
        int_downsize: the velocity is integrated at one in this many voxels along each axis: 1, 2, 4, ...
        bidir: warp the target too.
        src_feats: channels of the source.
        trg_feats: channels of the target, the same number.
        others: other arguments of that class, which have to keep their defaults.

    Raises:
        ValueError: such a network is not supported; the message names the argument.
    """

    def __init__(
        self,
        inshape: Sequence[int],
        nb_unet_features: Sequence[Sequence[int]] | None = None,
        *,
        int_steps: int = 7,
        int_downsize: int = 2,
        bidir: bool = False,
        src_feats: int = 1,
        trg_feats: int = 1,
        **others: Any,
    ) -> None:
        super().__init__()
        for name, value in others.items():
            if name not in _OTHERS or value != _OTHERS[name]:
                raise ValueError(f"{name} is {value!r}, which VxmDense does not support here; leave it out.")
        encoder, decoder = nb_unet_features or _WIDTHS
        if len(decoder) <= len(encoder):
            raise ValueError(
                f"nb_unet_features has {len(decoder)} widths of the decoder; give {len(encoder) + 1} or more."
            )
        if int_downsize < 1 or int_downsize & (int_downsize - 1):
            raise ValueError(f"int_downsize is {int_downsize}. Give a power of two.")
        if src_feats != trg_feats:
            raise ValueError(f"src_feats is {src_feats} and trg_feats {trg_feats}. Give the same number.")
        self.bidir = bidir
        self.levels = len(encoder)
        self.network = VoxelMorph(
            "vxmdense",
            len(inshape),
            src_feats + trg_feats,
            encoder=tuple(encoder),
            decoder=(*((width,) for width in decoder[: self.levels]), tuple(decoder[self.levels :])),
            num_steps=int_steps,
            integration_level=int(math.log2(int_downsize)) if int_steps else 0,  # theirs resizes velocities only
        )

    def forward(self, source: Tensor, target: Tensor, registration: bool = False) -> tuple[Tensor, ...]:
        """Register ``source`` to ``target``, both ``(B, C, *spatial)``.

        Returns:
            The warped source, with ``bidir`` the warped target, and the velocity on its own grid, or, with
            ``registration``, the warped source and the displacement ``(B, D, *spatial)`` in voxels.
        """
        network, size = self.network, list(source.shape[2:])
        velocity = network.fields(network.features(network.coarse(torch.cat([source, target], dim=1))))[0]
        ddf = network.full(network.displacement(velocity), size)
        moved = warp(source, ddf, padding_mode="zeros")
        if registration:
            return moved, ddf
        if not self.bidir:
            return moved, velocity
        back = network.full(network.displacement(-velocity), size)
        return moved, warp(target, back, padding_mode="zeros"), velocity

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "VxmDense":
        """Read a file of their ``save``, of any width.

        Raises:
            ValueError: it is none, or of a network that is not supported here.
        """
        try:
            content = read_state(path)
            state, config = content["model_state"], dict(content["config"])
            encoder, decoder = _widths_of(state)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"weights {path} cannot be read as a checkpoint of VxmDense: {error}.") from error
        config["nb_unet_features"] = [encoder, decoder]
        if not encoder:
            raise ValueError(f"weights {path} contain no VxmDense layers.")
        found = cls(**config)
        weights = {name: tensor.float() for name, tensor in state.items() if not name.endswith(".grid")}
        ours = found.network.state_dict()
        names = {name: _their_name(name, found.levels) for name in ours}
        if wrong := wrong_parameters({names[name]: tensor for name, tensor in ours.items()}, weights):
            raise ValueError(f"weights {path} do not fit the network of their config: {'; '.join(wrong[:3])}.")
        found.network.load_state_dict({name: weights[names[name]] for name in ours})
        return found.to(device)
