r"""Networks that predict the displacement between two images.

:class:`VoxelMorph` is the network that is saved and exported. Its input is one tensor ``(B, 2C, *spatial)`` with the
channels of the moving image first, and its output the displacement in voxels. :class:`Registration` wraps it for
training and evaluation, and returns a dict of everything that losses and metrics need.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from voxelmorph_monai.blocks import compose, integrate, resize, smooth, warp
from voxelmorph_monai.unet import Architecture, UNet, convolve_exactly

__all__ = [
    "PRESETS",
    "Registration",
    "VoxelMorph",
    "has_fast_bfloat16",
    "load_weights",
    "read_state",
    "wrong_parameters",
]


PRESETS: dict[str, Architecture] = {
    # Balakrishnan et al., CVPR 2018 and IEEE TMI 2019: displacement at full resolution.
    "vm1": Architecture(decoder=((32,), (32,), (32,), (32, 8), (8,)), num_steps=0, integration_level=0),
    "vm2": Architecture(decoder=((32,), (32,), (32,), (32, 32), (16, 16)), num_steps=0, integration_level=0),
    # The authors' later default (github.com/voxelmorph/voxelmorph, 2020): velocity integrated at half resolution.
    "dense": Architecture(decoder=((32,), (32,), (32,), (32,), (32, 16, 16)), downsampling="max"),
    # Numerically identical to that PyTorch code, for weights trained with it (vxm import-weights).
    "vxmdense": Architecture(
        decoder=((32,), (32,), (32,), (32,), (32, 16, 16)), downsampling="max", scale_by_two=True, padding_mode="zeros"
    ),
    # Dalca et al., MICCAI 2018: mean and log-variance of the velocity, at half resolution.
    "diffeomorphic": Architecture(probabilistic=True),
    # Numerically identical to the authors' Keras code, for their weights (vxm import-weights).
    "miccai2018": Architecture(probabilistic=True, scale_by_two=True),
    # The bundled network: three passes at half resolution, wider at coarse levels, with a smooth velocity.
    "wide": Architecture(
        (16, 32, 64, 96),
        ((96,), (64,), (64,), (32, 32), (16, 16)),
        num_steps=5,
        integration_level=0,
        input_level=1,
        cascades=3,
        velocity_sigma=1.5,
    ),
}


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether ``device`` multiplies bfloat16 natively, so that networks run faster in bfloat16 than in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(device).type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def _check_architecture(architecture: Architecture, spatial_dims: int) -> None:
    levels = len(architecture.encoder)
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims is {spatial_dims}. Use 2 or 3.")
    if architecture.input_level < 0:
        raise ValueError(f"input_level is {architecture.input_level}. Use 0 for full resolution, 1 for half, ...")
    if not 1 <= len(architecture.decoder) <= levels + 1 or not all(architecture.decoder):
        raise ValueError(
            f"decoder is {architecture.decoder}, which does not fit an encoder of {levels} levels. Give 1 to "
            f"{levels + 1} tuples with at least one width each."
        )
    if architecture.downsampling not in ("stride", "max"):
        raise ValueError(f"downsampling is '{architecture.downsampling}'. Use 'stride' or 'max'.")
    if architecture.padding_mode not in ("border", "zeros"):
        raise ValueError(f"padding_mode is '{architecture.padding_mode}'. Use 'border' or 'zeros'.")
    if not 0 <= architecture.integration_level <= levels:
        raise ValueError(f"integration_level is {architecture.integration_level}. Use 0 to {levels}.")
    sigma = architecture.velocity_sigma
    if not isinstance(sigma, int | float) or not 0 <= sigma < math.inf or (sigma and architecture.probabilistic):
        raise ValueError(f"velocity_sigma is {sigma!r}. Give 0 or more voxels, and 0 for a probabilistic network.")
    if architecture.cascades < 1 or (architecture.cascades > 1 and architecture.probabilistic):
        raise ValueError(f"cascades is {architecture.cascades}. Give 1 or more, and 1 for a probabilistic network.")
    if not 0 <= architecture.num_steps <= 30:
        raise ValueError(f"num_steps is {architecture.num_steps}. Give a number of squarings from 0 to 30.")
    if architecture.probabilistic and architecture.num_steps == 0:
        raise ValueError("num_steps is 0, but a probabilistic network integrates a velocity. Give 1 or more.")
    if architecture.probabilistic and architecture.integration_level != architecture.feature_level:
        raise ValueError(
            f"integration_level is {architecture.integration_level}, but a probabilistic network integrates at the "
            f"level where its decoder stops: {architecture.feature_level}. Make the two equal."
        )


def _warp_moving(pair: Tensor, ddf: Tensor) -> Tensor:
    """Warp the moving image of ``pair`` ``(B, 2C, *spatial)`` along ``ddf``, and keep the fixed image."""
    moving, fixed = pair.chunk(2, dim=1)
    return torch.cat([warp(moving, ddf), fixed], dim=1)


class VoxelMorph(nn.Module):
    """Network that predicts the displacement from a fixed to a moving image.

    >>> network = VoxelMorph("vm2", spatial_dims=2)
    >>> network(torch.rand(1, 2, 30, 45)).shape  # works for any size
    torch.Size([1, 2, 30, 45])

    Args:
        preset: one of :data:`PRESETS`: ``"vm1"``, ``"vm2"``, ``"dense"``, ``"vxmdense"``, ``"diffeomorphic"``,
            ``"miccai2018"``, ``"wide"``.
        spatial_dims: 2 or 3.
        in_channels: number of channels of both images together.
        smoothness_weight: weight of the smoothness to register with, 0 to 1. The network then has it as an additional
            input channel, and is trained for all weights at once (see :class:`Registration`). With None, the network
            does not have this input.
        changes: fields of :class:`Architecture` that differ from the preset, for example ``num_steps=5``; None leaves
            a field unchanged.
    """

    def __init__(
        self,
        preset: str = "wide",
        spatial_dims: int = 3,
        in_channels: int = 2,
        smoothness_weight: float | None = None,
        **changes: object,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset '{preset}' is unknown. Choose one of {', '.join(PRESETS)}.")
        unknown = set(changes) - set(Architecture._fields)
        if unknown:
            raise ValueError(f"a network has no options {sorted(unknown)}. Choose from {Architecture._fields}.")
        if in_channels < 2 or in_channels % 2:
            raise ValueError(f"in_channels is {in_channels}. Give 2, 4, ...: the channels of both images together.")
        if smoothness_weight is not None and not 0 <= smoothness_weight <= 1:
            raise ValueError(f"smoothness_weight is {smoothness_weight}. Give a number from 0 to 1.")
        changes = {name: value for name, value in changes.items() if value is not None}
        architecture = PRESETS[preset]._replace(**changes)  # type: ignore[arg-type] # checked by name above
        _check_architecture(architecture, spatial_dims)
        self.preset = preset
        self.architecture = architecture  # for records; TorchScript reads only the plain attributes below
        self.in_channels = in_channels
        self.spatial_dims = spatial_dims
        self.num_steps = architecture.num_steps
        self.integration_level = architecture.integration_level
        self.feature_level = architecture.feature_level
        self.block = 2**architecture.input_level
        self.scale_by_two = architecture.scale_by_two
        self.cascades = architecture.cascades
        self.velocity_sigma = float(architecture.velocity_sigma)
        self.padding_mode = architecture.padding_mode
        self.multiple = 2 ** (len(architecture.encoder) + architecture.input_level)
        self.amortised = smoothness_weight is not None
        self.smoothness_weight = float(smoothness_weight or 0)
        self.unet = UNet(spatial_dims, in_channels + self.amortised, architecture)
        self.flow = self._head(std=1e-5)
        self.log_variance = self._head(std=1e-10, bias=-10.0) if architecture.probabilistic else None
        if spatial_dims == 3:
            # In bfloat16 on a CPU, this memory format is 1.3 times faster.
            self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload] # torch types it for 4-D only

    def _head(self, *, std: float, bias: float = 0.0) -> nn.Conv2d | nn.Conv3d:
        conv = nn.Conv2d if self.spatial_dims == 2 else nn.Conv3d
        head = conv(self.unet.out_channels, self.spatial_dims, 3, padding=1)
        nn.init.normal_(head.weight, std=std)
        nn.init.constant_(head.bias, bias)  # type: ignore[arg-type] # there is a bias
        return head

    def _padded(self, size: list[int]) -> list[int]:
        return [-(-n // self.multiple) * self.multiple for n in size]

    def coarse(self, pair: Tensor) -> Tensor:
        """Pad ``pair`` ``(B, in_channels, *spatial)`` and average blocks: ``(B, in_channels, *padded / block)``."""
        if pair.ndim != self.spatial_dims + 2 or pair.shape[1] != self.in_channels:
            sizes = "H, W" if self.spatial_dims == 2 else "H, W, D"
            raise ValueError(
                f"pair has shape {list(pair.shape)}. Give (B, {self.in_channels}, {sizes}) with the moving image first."
            )
        size = list(pair.shape[2:])
        missing = [m - n for m, n in zip(self._padded(size), size)]  # noqa: B905, TorchScript does not support strict
        padding: list[int] = []
        for n in missing[::-1]:
            padding += [0, n]
        if sum(missing) > 0:
            pair = F.pad(pair, padding, mode="replicate")
        if self.block > 1:
            pair = F.avg_pool3d(pair, self.block) if self.spatial_dims == 3 else F.avg_pool2d(pair, self.block)
        return pair

    def features(self, pair: Tensor, smoothness_weight: Tensor | None = None) -> Tensor:
        """Features of a :meth:`coarse` ``pair``: ``(B, channels, *padded / 2**(input_level + feature_level))``.

        A ``smoothness_weight``, a scalar, replaces the network's own one.
        """
        if self.amortised:
            weight = torch.full_like(pair[:, :1], self.smoothness_weight)
            if smoothness_weight is not None:
                weight = torch.ones_like(weight) * smoothness_weight
            pair = torch.cat([pair, weight], dim=1)
        if self.spatial_dims == 3:
            pair = pair.contiguous(memory_format=torch.channels_last_3d)
        return self.unet(pair)

    def fields(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the velocity (of the displacement if ``num_steps=0``) on the integration grid.

        Both are ``(B, D, *padded / 2**(input_level + integration_level))`` in the dtype of the weights (float32). The
        mean is in voxels of that grid, and already smoothed. The log-variance is None unless the network is
        probabilistic.
        """
        if torch.jit.is_scripting():  # scripts run without autocast
            mean, log_variance = self._fields(features)
        else:
            with torch.autocast(features.device.type, enabled=False):  # bfloat16, with 8 bits, is too coarse for fields
                mean, log_variance = self._fields(features)
        return mean, log_variance

    def _fields(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        size = [(n << self.feature_level) >> self.integration_level for n in features.shape[2:]]
        flow = convolve_exactly(features, self.flow.weight, self.flow.bias).contiguous()
        mean = self._resize(flow, size, self.feature_level - self.integration_level)
        if self.velocity_sigma > 0:
            mean = smooth(mean, self.velocity_sigma)
        if self.log_variance is not None:
            return mean, convolve_exactly(features, self.log_variance.weight, self.log_variance.bias).contiguous()
        return mean, None

    def _resize(self, field: Tensor, size: list[int], levels: int) -> Tensor:
        """Resample ``field`` to ``size``, ``levels`` levels finer, and scale its vectors to voxels of the new grid."""
        if not self.scale_by_two:
            return resize(field, size)
        mode = "bilinear" if self.spatial_dims == 2 else "trilinear"
        return F.interpolate(field * 2.0**levels, size, mode=mode, align_corners=True)

    def displacement(self, field: Tensor) -> Tensor:
        """Displacement ``(B, D, *padded / block)`` of a velocity ``field``, in voxels of the :meth:`coarse` grid.

        The field is one of :meth:`fields`. If ``num_steps`` is 0, it is already a displacement, and only resampled.
        """
        size = [n << self.integration_level for n in field.shape[2:]]
        return self._resize(integrate(field, self.num_steps, self.padding_mode), size, self.integration_level)

    def full(self, ddf: Tensor, size: list[int]) -> Tensor:
        """Resample a :meth:`displacement` ``(B, D, *padded / block)`` to ``(B, D, *size)``, in voxels of the images."""
        padded = self._padded(size)
        if self.block > 1:  # a coarse voxel lies in the middle of a block, so the corner voxels do not coincide
            mode = "trilinear" if self.spatial_dims == 3 else "bilinear"
            ddf = self.block * F.interpolate(ddf, padded, mode=mode, align_corners=False)
        for d in range(self.spatial_dims):
            if size[d] < padded[d]:  # narrow would copy the gradient of the field even if nothing is cropped
                ddf = ddf.narrow(d + 2, 0, size[d])
        return ddf.contiguous()

    def forward(self, pair: Tensor) -> Tensor:
        """Predict the displacement ``(B, D, *spatial)``, in voxels, for ``pair`` ``(B, in_channels, *spatial)``."""
        coarse = self.coarse(pair)
        ddf = self.displacement(self.fields(self.features(coarse))[0])
        for _ in range(self.cascades - 1):
            ddf = compose(ddf, self.displacement(self.fields(self.features(_warp_moving(coarse, ddf)))[0]))
        return self.full(ddf, list(pair.shape[2:]))


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a dict written by ``torch.save``; tensors are loaded to the CPU.

    Files with anything but tensors, numbers and text are rejected, because they could run code.

    Raises:
        ValueError: the file does not hold such a dict. The message does not name the file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # any kind, for bytes that torch.save did not write
        raise ValueError((str(error).strip() or "an empty file").splitlines()[0].rstrip(". ")) from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    return content


def wrong_parameters(expected: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[str]:
    """Describe each parameter of ``given`` that is missing, unknown, or has another shape than ``expected``.

    >>> wrong_parameters({"bias": torch.zeros(3)}, {"bias": torch.zeros(2), "epoch": 1})
    ['bias is [2] instead of [3]', 'epoch (int) is unknown']
    >>> wrong_parameters({"bias": torch.zeros(3)}, {})
    ['bias [3] is missing']
    """

    def shape(value: Any) -> str:
        return str(list(value.shape)) if isinstance(value, Tensor) else f"({type(value).__name__})"

    missing = [f"{name} {shape(value)} is missing" for name, value in expected.items() if name not in given]
    wrong = [
        f"{name} is {shape(given[name])} instead of {shape(value)}"
        for name, value in expected.items()
        if name in given and shape(given[name]) != shape(value)
    ]
    unknown = [f"{name} {shape(value)} is unknown" for name, value in given.items() if name not in expected]
    return [*wrong, *missing, *unknown]


def load_weights(network: nn.Module, path: str) -> None:
    """Load a state dict, saved from any device, into ``network``; the file may hold only tensors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a state dict, or belongs to another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights {path} do not exist. Give the model.pt of a training.")
    try:
        state = read_state(path)
        if wrong := wrong_parameters(network.state_dict(), state):
            raise ValueError(f"{len(wrong)} parameters differ, the first: {wrong[0]}")
    except ValueError as error:
        raise ValueError(
            f"weights {path} do not fit the network: {error}. Use the preset with which the weights were trained."
        ) from error
    network.load_state_dict(state)


class Registration(nn.Module):
    """Network for training and evaluation: predicts the displacement, and warps the images along it.

    A single ``forward`` does all the work, so that DDP can wrap this module. Its result is a dict of:

    * ``warped`` ``(B, C, *spatial)``: the moving image on the fixed grid, and ``ddf`` ``(B, D, *spatial)``: the
      displacement in voxels.
    * ``dvf`` ``(B, D, *coarse)``, if the network predicts a velocity: the mean velocity, on the grid on which it is
      integrated, in voxels of this grid.
    * ``log_variance``, of the shape of ``dvf``, if the network is probabilistic. In training, the displacement of such
      a network comes from a sample of the velocity instead of its mean (Dalca et al., MICCAI 2018).
    * ``inverse_ddf`` and ``warped_fixed``, the fixed image on the moving grid, if ``bidirectional``; they have the
      shapes of ``ddf`` and ``warped``.

    For a network with several cascades, ``dvf`` is the velocity of the last one. Each training step runs a random
    number of cascades, and trains the last of them. A network that takes the weight of the smoothness as an input gets
    a random weight, uniform in [0, 1], in each training step; the result then includes ``smoothness_weight``. (Hoopes
    et al., IPMI 2021, instead predict all weights of the network from the weight of the smoothness.)

    >>> registration = Registration(VoxelMorph("diffeomorphic", spatial_dims=2), bidirectional=True)
    >>> sorted(registration(torch.rand(1, 2, 32, 48)))
    ['ddf', 'dvf', 'inverse_ddf', 'log_variance', 'warped', 'warped_fixed']

    Args:
        network: the network; it is not copied.
        bidirectional: also return the inverse, for which the velocity is integrated backwards.
        amp: run the U-Net in bfloat16 on devices where that is fast; fields, warps and losses stay in float32. (MONAI's
            engines use autocast only on CUDA.)
    """

    def __init__(self, network: VoxelMorph, bidirectional: bool = False, amp: bool = True) -> None:
        super().__init__()
        if bidirectional and network.num_steps == 0:
            raise ValueError(
                "bidirectional needs a velocity to integrate backwards, but num_steps of this network is 0. Use a "
                "network with num_steps above 0, or leave bidirectional out."
            )
        self.network = network
        self.bidirectional = bidirectional
        self.amp = amp

    def _in_bfloat16(self, pair: Tensor) -> bool:
        # With 2 voxels along an axis, oneDNN's bfloat16 gradient of the weights is random, or even infinite (torch
        # 2.13, AVX512); with 3 or more it is correct.
        coarsest = min(-(-n // self.network.multiple) for n in pair.shape[2:])
        return self.amp and has_fast_bfloat16(pair.device) and coarsest > 2

    def forward(self, pair: Tensor) -> dict[str, Tensor]:
        """Register ``pair`` ``(B, 2C, *spatial)``, moving image first; see the class for the result."""
        network, size = self.network, list(pair.shape[2:])
        moving, fixed = pair.chunk(2, dim=1)
        weight = torch.rand((), device=pair.device) if network.amortised and self.training else None
        cascades = network.cascades
        if self.training and cascades > 1:
            cascades = int(torch.randint(cascades, ())) + 1
        coarse, result = network.coarse(pair), {} if weight is None else {"smoothness_weight": weight}
        ddf = inverse_ddf = None
        for k in range(cascades):
            with torch.set_grad_enabled(torch.is_grad_enabled() and k == cascades - 1):
                seen = coarse if ddf is None else _warp_moving(coarse, ddf)
                with torch.autocast(pair.device.type, torch.bfloat16, enabled=self._in_bfloat16(pair)):
                    features = network.features(seen, weight)
                mean, log_variance = network.fields(features)
                field = mean
                if log_variance is not None and self.training:
                    field = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
                step = network.displacement(field)
                ddf = step if ddf is None else compose(ddf, step)
                if self.bidirectional:
                    back = network.displacement(-field)
                    inverse_ddf = back if inverse_ddf is None else compose(back, inverse_ddf)
        assert ddf is not None  # there is at least one cascade
        if network.num_steps > 0:
            result["dvf"] = mean
        if log_variance is not None:
            result["log_variance"] = log_variance
        result["ddf"] = network.full(ddf, size)
        result["warped"] = warp(moving, result["ddf"])
        if inverse_ddf is not None:
            result["inverse_ddf"] = network.full(inverse_ddf, size)
            result["warped_fixed"] = warp(fixed, result["inverse_ddf"])
        return result
