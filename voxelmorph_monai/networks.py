r"""Networks that predict the displacement between two images: one U-Net, described by data.

:class:`VoxelMorph` is what is trained, saved and exported: one tensor in, ``(B, 2C, *spatial)`` with the moving image's
channels first, and one tensor out, the displacement field in voxels. :class:`Registration` wraps it for training and
evaluation and names everything that losses and metrics need.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from voxelmorph_monai.blocks import compose, integrate, ranges, resize, smooth, warp

__all__ = [
    "PRESETS",
    "Architecture",
    "Registration",
    "UNet",
    "VoxelMorph",
    "has_fast_bfloat16",
    "load_weights",
    "read_state",
    "wrong_parameters",
]


class Architecture(NamedTuple):
    """What distinguishes one VoxelMorph from another.

    ``encoder`` holds the width of each level's convolution, fine to coarse; each level halves the resolution.
    ``decoder`` holds the widths of each resolution's convolutions, coarse to fine; it may stop before the full one.
    """

    encoder: tuple[int, ...] = (16, 32, 32, 32)
    decoder: tuple[tuple[int, ...], ...] = ((32,), (32,), (32,), (32, 16))
    downsampling: str = "stride"  # "stride": by the convolution itself; "max": by a max-pool after it
    num_steps: int = 7  # squarings of the velocity's integration; 0: the network predicts the displacement itself
    integration_level: int = 1  # resolution of the integrated field: 0 full, 1 half, ...
    probabilistic: bool = False  # a second head predicts the log-variance of the velocity
    input_level: int = 0  # resolution of the images that the U-Net sees: 0 full, 1 half (means of blocks), ...
    doubles: bool = False  # vectors grow by 2 a level, as in the authors' code; else by (new - 1) / (old - 1)
    passes: int = 1  # each pass after the first sees the moving image as warped so far; the maps are composed
    smoothing: float = 0.0  # sigma of the Gaussian that smooths the velocity (or displacement), voxels of its grid
    padding_mode: str = "border"  # of a velocity beyond its grid; "zeros" as in the authors' PyTorch code

    @property
    def feature_level(self) -> int:
        """Resolution at which the decoder stops: 0 full, 1 half, ..."""
        return len(self.encoder) + 1 - len(self.decoder)


PRESETS: dict[str, Architecture] = {
    # Balakrishnan et al., CVPR 2018 and IEEE TMI 2019: displacement at full resolution.
    "vm1": Architecture(decoder=((32,), (32,), (32,), (32, 8), (8,)), num_steps=0, integration_level=0),
    "vm2": Architecture(decoder=((32,), (32,), (32,), (32, 32), (16, 16)), num_steps=0, integration_level=0),
    # The authors' later default (github.com/voxelmorph/voxelmorph, 2020): velocity integrated at half resolution.
    "dense": Architecture(decoder=((32,), (32,), (32,), (32,), (32, 16, 16)), downsampling="max"),
    # The same to the last digit of its PyTorch code, for weights trained with that (weights.import_weights).
    "vxmdense": Architecture(
        decoder=((32,), (32,), (32,), (32,), (32, 16, 16)), downsampling="max", doubles=True, padding_mode="zeros"
    ),
    # Dalca et al., MICCAI 2018: stops at half resolution, mean and log-variance of the velocity.
    "diffeomorphic": Architecture(probabilistic=True),
    # The same to the last digit of the authors' Keras code, for their weights (weights.import_weights).
    "miccai2018": Architecture(probabilistic=True, doubles=True),
    # The shipped one: sees images of half the resolution, three times; wider where voxels are few; a smooth velocity.
    "wide": Architecture(
        (16, 32, 64, 96),
        ((96,), (64,), (64,), (32, 32), (16, 16)),
        num_steps=5,
        integration_level=0,
        input_level=1,
        passes=3,
        smoothing=1.5,
    ),
}


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether ``device`` multiplies bfloat16 natively, so that a network runs faster in it than in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(device).type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def _convolve_upsampled(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``x``, each voxel repeated 2 times along each axis, concatenated with ``skip``."""
    # The three weights along an axis meet only two different voxels of x, so they are added up first: a transposed
    # convolution of four. No upsampled or concatenated image is made (forward and backward take 0.6 of the CPU time).
    wide = weight[:, : x.shape[1]].transpose(0, 1)
    for axis in range(2, weight.ndim):
        a, b, c = wide.unbind(axis)
        wide = torch.stack([c, b + c, a + b, a], dim=axis)
    narrow = weight[:, x.shape[1] :]
    if x.ndim == 5:
        out = F.conv_transpose3d(x, wide, bias, stride=2, padding=1)
        return out.add_(F.conv3d(skip, narrow, padding=1))
    out = F.conv_transpose2d(x, wide, bias, stride=2, padding=1)
    return out.add_(F.conv2d(skip, narrow, padding=1))


class _ExactConvolution(torch.autograd.Function):
    """3-voxel convolution of bfloat16 features in the type of its weights, both ways slab by slab.

    No features of the wider type are kept or made as a whole, nor their gradient: of the float32 head of ``dense`` this
    takes 0.8 GiB off a training step at 160 x 192 x 224, and what fits the cache takes less than half the CPU time.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(features, weight)
        out = weight.new_empty(features.shape[0], weight.shape[0], *features.shape[2:])
        ones = [1] * (features.ndim - 2)
        for start, stop in _slabs(features):
            slab = _with_neighbours(features, start, stop).to(weight.dtype)
            out[:, :, start:stop] = torch.convolution(slab, weight, bias, ones, [0, *ones[1:]], ones, False, [0], 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        of_features, of_weight = torch.empty_like(features), torch.zeros_like(weight)
        with torch.autocast(features.device.type, enabled=False):
            for start, stop in _slabs(features):
                slab = _with_neighbours(features, start, stop).to(weight.dtype)
                # A transposed convolution of float32 would be torch's own, 50 times slower than oneDNN's gradient.
                of_features[:, :, start:stop] = _convolution_backward(
                    _with_neighbours(grad_output, start, stop), slab[:, :, 1:-1], weight, padding=2, number=0
                )
                of_weight += _convolution_backward(grad_output[:, :, start:stop], slab, weight, padding=0, number=1)
        return of_features, of_weight, grad_output.flatten(2).sum((0, 2)) if ctx.needs_input_grad[2] else None


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *, padding: int, number: int) -> Tensor:
    """Gradient of ``x`` (``number=0``) or ``weight`` (1) in a convolution that pads the first axis by ``padding``."""
    ones = [1] * (x.ndim - 2)
    mask = [number == 0, number == 1, False]
    all_gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, ones, [padding, *ones[1:]], ones, False, [0], 1, mask
    )
    return all_gradients[number]


_ONEDNN_NUMBERS = 20480  # the product of the first four sizes has to be larger
_MIN_SLAB_VOXELS = 8  # along the axis that is cut; two more are convolved with each slab


def _slabs(x: Tensor) -> list[tuple[int, int]]:
    """Cut the first spatial axis of ``x`` into short ranges.

    torch hands a convolution of float32 to oneDNN only above a size that it reckons from the first four dimensions;
    below it, its own is far slower. So: the shortest ranges above that size.
    """
    n = x.shape[2]
    voxels = _ONEDNN_NUMBERS // (x.shape[0] * x.shape[1] * x.shape[3]) + 1
    return ranges(n, n // max(voxels, _MIN_SLAB_VOXELS))


def _with_neighbours(x: Tensor, start: int, stop: int) -> Tensor:
    """Take a slab of ``x`` along its first spatial axis and the voxel beyond either side, 0 outside ``x``."""
    slab = x[:, :, max(start - 1, 0) : stop + 1]
    missing = [int(start == 0), int(stop == x.shape[2])]
    return F.pad(slab, [0] * (2 * (x.ndim - 3)) + missing) if any(missing) else slab


def _convolve_exactly(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``features`` of any type in the type of ``weight``, and give it in that."""
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips what stands under this one condition
        if features.dtype != weight.dtype and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            return _ExactConvolution.apply(features, weight, bias)
    features = features.to(weight.dtype)
    if features.ndim == 5:
        return F.conv3d(features, weight, bias, padding=1)
    return F.conv2d(features, weight, bias, padding=1)


class Convolution(nn.Module):
    """3-voxel convolution and LeakyReLU(0.2), He-initialised; with ``stride=2`` it halves an even size.

    A stride of 2 pads 0 voxels before and 1 after, as Keras does ("same"), so that the authors' weights mean here what
    they meant there.
    """

    padding: list[int]

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.conv = conv(in_channels, out_channels, 3, stride, padding=0 if stride == 2 else 1)
        self.padding = [0, 1] * spatial_dims if stride == 2 else []
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type] # there is a bias

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map ``(B, in_channels, *spatial)`` to ``(B, out_channels, *spatial / stride)``.

        With ``skip`` ``(B, C, *spatial * 2)`` the input is ``x``, repeated to that resolution, and ``skip``.
        """
        if skip is not None:
            x = _convolve_upsampled(x, skip, self.conv.weight, self.conv.bias)
        else:
            if len(self.padding) > 0:
                x = F.pad(x, self.padding)
            x = self.conv(x)
        return F.leaky_relu(x, 0.2, inplace=True)


class Block(nn.Sequential):
    """Convolutions of one resolution, the first one of features from the resolution below."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map ``x``, half as fine as ``skip`` where that is given, through all convolutions."""
        for convolution in self:
            x = convolution(x, skip)
            skip = None
        return x


def _max_pool(x: Tensor) -> Tensor:
    """Largest of each 2 x 2 (x 2) voxels, in the type of ``x``."""
    if not torch.jit.is_scripting():  # scripts run without autocast
        # It would pool in float32 on a CPU, and keep that copy, 0.4 GiB of ``dense`` at 160 x 192 x 224.
        with torch.autocast(x.device.type, enabled=False):
            return F.max_pool3d(x, 2) if x.ndim == 5 else F.max_pool2d(x, 2)
    return F.max_pool3d(x, 2) if x.ndim == 5 else F.max_pool2d(x, 2)


class UNet(nn.Module):
    """U-Net of :class:`Architecture`: ``(B, in_channels, *spatial)`` to the features of its last resolution.

    Each spatial size must be a multiple of ``2 ** len(encoder)``. Skips are concatenated as [upsampled, skip].
    """

    def __init__(self, spatial_dims: int, in_channels: int, architecture: Architecture) -> None:
        super().__init__()
        encoder, decoder, self.max_pool = architecture.encoder, architecture.decoder, architecture.downsampling == "max"
        width, skips = in_channels, []
        self.encoder = nn.ModuleList()
        for channels in encoder:
            self.encoder.append(Convolution(spatial_dims, width, channels, stride=1 if self.max_pool else 2))
            skips.append(channels if self.max_pool else width)
            width = channels
        self.decoder = nn.ModuleList()
        for level, widths in enumerate(decoder):
            width += skips[-level] if level else 0
            convolutions = []
            for channels in widths:
                convolutions.append(Convolution(spatial_dims, width, channels))
                width = channels
            self.decoder.append(Block(*convolutions))
        self.out_channels = width

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, out_channels, *spatial / 2**k)``, ``k`` levels below the input's resolution."""
        skips: list[Tensor] = []
        for convolution in self.encoder:
            if self.max_pool:
                x = convolution(x)
                skips.append(x)
                x = _max_pool(x)
            else:
                skips.append(x)
                x = convolution(x)
        for level, block in enumerate(self.decoder):
            x = block(x, skips.pop() if level > 0 else None)
        return x


def _check_architecture(architecture: Architecture, spatial_dims: int) -> None:
    levels = len(architecture.encoder)
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    if architecture.input_level < 0:
        raise ValueError(f"input_level must be at least 0, got {architecture.input_level}.")
    if not 1 <= len(architecture.decoder) <= levels + 1 or not all(architecture.decoder):
        raise ValueError(
            f"decoder for an encoder of {levels} levels must hold 1 to {levels + 1} non-empty tuples of widths, "
            f"got {architecture.decoder}."
        )
    if architecture.downsampling not in ("stride", "max"):
        raise ValueError(f"downsampling must be 'stride' or 'max', got '{architecture.downsampling}'.")
    if architecture.padding_mode not in ("border", "zeros"):
        raise ValueError(f"padding_mode must be 'border' or 'zeros', got '{architecture.padding_mode}'.")
    if not 0 <= architecture.integration_level <= levels:
        raise ValueError(f"integration_level must be 0 to {levels}, got {architecture.integration_level}.")
    sigma = architecture.smoothing
    if not isinstance(sigma, int | float) or not 0 <= sigma < math.inf or (sigma and architecture.probabilistic):
        raise ValueError(f"smoothing must be a number of voxels, and 0 for probabilistic networks, got {sigma!r}.")
    if architecture.passes < 1 or (architecture.passes > 1 and architecture.probabilistic):
        raise ValueError(f"passes must be at least 1, and 1 for probabilistic, got {architecture.passes}.")
    if not 0 <= architecture.num_steps <= 30:
        raise ValueError(f"num_steps must be 0 to 30, as in blocks.integrate, got {architecture.num_steps}.")
    if architecture.probabilistic and architecture.num_steps == 0:
        raise ValueError("probabilistic needs a velocity to sample: num_steps must be at least 1, got 0.")
    if architecture.probabilistic and architecture.integration_level != architecture.feature_level:
        raise ValueError(
            f"probabilistic needs the velocity integrated where the decoder stops, at level "
            f"{architecture.feature_level}, got integration_level {architecture.integration_level}."
        )


def _warp_moving(pair: Tensor, ddf: Tensor) -> Tensor:
    """``pair`` ``(B, 2C, *spatial)`` with its moving image warped by ``ddf`` ``(B, D, *spatial)``."""
    moving, fixed = pair.chunk(2, dim=1)
    return torch.cat([warp(moving, ddf), fixed], dim=1)


class VoxelMorph(nn.Module):
    """Displacement field that aligns a moving image with a fixed one, in one pass.

    >>> network = VoxelMorph("vm2", spatial_dims=2)
    >>> network(torch.rand(1, 2, 30, 45)).shape  # any size: padded inside, and cut back
    torch.Size([1, 2, 30, 45])

    Args:
        preset: one of :data:`PRESETS`: ``"vm1"``, ``"vm2"``, ``"dense"``, ``"vxmdense"``, ``"diffeomorphic"``,
            ``"miccai2018"``, ``"wide"``.
        spatial_dims: 2 or 3.
        in_channels: channels of the two images together.
        smoothness_weight: None, or the weight of smoothness to register with, 0 to 1: the network then takes it as an
            input, one more channel, and is trained for all weights at once (:class:`Registration`).
        changes: fields of :class:`Architecture` that differ from the preset, for example ``num_steps=5``; None leaves
            a field as it is.
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
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got '{preset}'.")
        unknown = set(changes) - set(Architecture._fields)
        if unknown:
            raise ValueError(f"changes must name fields of {Architecture._fields}, got {sorted(unknown)}.")
        if in_channels < 2 or in_channels % 2:
            raise ValueError(f"in_channels counts two images alike and must be even, got {in_channels}.")
        if smoothness_weight is not None and not 0 <= smoothness_weight <= 1:
            raise ValueError(f"smoothness_weight must be 0 to 1, got {smoothness_weight}.")
        changes = {name: value for name, value in changes.items() if value is not None}
        architecture = PRESETS[preset]._replace(**changes)  # type: ignore[arg-type] # checked by name above
        _check_architecture(architecture, spatial_dims)
        self.architecture = architecture  # for those who record it: a script reads none but plain attributes
        self.in_channels = in_channels
        self.spatial_dims = spatial_dims
        self.num_steps = architecture.num_steps
        self.integration_level = architecture.integration_level
        self.feature_level = architecture.feature_level
        self.block = 2**architecture.input_level
        self.doubles = architecture.doubles
        self.passes = architecture.passes
        self.smoothing = float(architecture.smoothing)
        self.padding_mode = architecture.padding_mode
        self.multiple = 2 ** (len(architecture.encoder) + architecture.input_level)
        self.amortised = smoothness_weight is not None
        self.smoothness_weight = float(smoothness_weight or 0)
        self.unet = UNet(spatial_dims, in_channels + self.amortised, architecture)
        self.flow = self._head(std=1e-5)
        self.log_variance = self._head(std=1e-10, bias=-10.0) if architecture.probabilistic else None
        if spatial_dims == 3:
            # 1.3 times faster in bfloat16 than contiguous, on a CPU
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
        """What the U-Net sees of ``pair`` ``(B, in_channels, *spatial)``: ``(B, in_channels, *padded / block)``."""
        if pair.ndim != self.spatial_dims + 2 or pair.shape[1] != self.in_channels:
            raise ValueError(
                f"pair must be (B, {self.in_channels}, and {self.spatial_dims} sizes), moving image first, "
                f"got {list(pair.shape)}."
            )
        size = list(pair.shape[2:])
        missing = [m - n for m, n in zip(self._padded(size), size)]  # noqa: B905, TorchScript knows no strict
        padding: list[int] = []
        for n in missing[::-1]:
            padding += [0, n]
        if sum(missing) > 0:
            pair = F.pad(pair, padding, mode="replicate")
        if self.block > 1:
            pair = F.avg_pool3d(pair, self.block) if self.spatial_dims == 3 else F.avg_pool2d(pair, self.block)
        return pair

    def features(self, pair: Tensor, smoothness_weight: Tensor | None = None) -> Tensor:
        """Features of a :meth:`coarse` ``pair``.

        ``smoothness_weight``, a scalar, takes the place of the network's own one.
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
        """Mean and log-variance of the velocity (``num_steps=0``: the displacement), on the grid of integration.

        Both are ``(B, D, *padded / 2**(input_level + integration_level))``, of the weights' type (float32); the mean in
        voxels of that grid, already smoothed; the log-variance None unless the network is probabilistic.
        """
        if torch.jit.is_scripting():  # scripts run without autocast
            mean, log_variance = self._fields(features)
        else:
            with torch.autocast(features.device.type, enabled=False):  # a field in bfloat16 would have 8 bits
                mean, log_variance = self._fields(features)
        return mean, log_variance

    def _fields(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        size = [(n << self.feature_level) >> self.integration_level for n in features.shape[2:]]
        flow = _convolve_exactly(features, self.flow.weight, self.flow.bias).contiguous()
        mean = self._resize(flow, size, self.feature_level - self.integration_level)
        if self.smoothing > 0:
            mean = smooth(mean, self.smoothing)
        if self.log_variance is not None:
            return mean, _convolve_exactly(features, self.log_variance.weight, self.log_variance.bias).contiguous()
        return mean, None

    def _resize(self, field: Tensor, size: list[int], levels: int) -> Tensor:
        """Bring ``field`` to ``size``, which is ``levels`` levels finer."""
        if not self.doubles:
            return resize(field, size)
        mode = "bilinear" if self.spatial_dims == 2 else "trilinear"
        return F.interpolate(field * 2.0**levels, size, mode=mode, align_corners=True)

    def displacement(self, field: Tensor) -> Tensor:
        """Displacement ``(B, D, *padded / block)`` in voxels of the :meth:`coarse` grid, of a velocity ``field``.

        Where ``num_steps`` is 0, ``field`` is a displacement already.
        """
        size = [n << self.integration_level for n in field.shape[2:]]
        return self._resize(integrate(field, self.num_steps, self.padding_mode), size, self.integration_level)

    def full(self, ddf: Tensor, size: list[int]) -> Tensor:
        """Bring ``ddf`` from the :meth:`coarse` grid to that of the images: ``(B, D, *size)``, in its voxels."""
        padded = self._padded(size)
        if self.block > 1:  # a voxel of the U-Net lies in the middle of a block: corners do not coincide
            mode = "trilinear" if self.spatial_dims == 3 else "bilinear"
            ddf = self.block * F.interpolate(ddf, padded, mode=mode, align_corners=False)
        for d in range(self.spatial_dims):
            if size[d] < padded[d]:  # each cut, even of nothing, copies the field's gradient
                ddf = ddf.narrow(d + 2, 0, size[d])
        return ddf.contiguous()

    def forward(self, pair: Tensor) -> Tensor:
        """Displacement field ``(B, D, *spatial)`` in voxels, of ``pair`` ``(B, in_channels, *spatial)``."""
        coarse = self.coarse(pair)
        ddf = self.displacement(self.fields(self.features(coarse))[0])
        for _ in range(self.passes - 1):
            ddf = compose(ddf, self.displacement(self.fields(self.features(_warp_moving(coarse, ddf)))[0]))
        return self.full(ddf, list(pair.shape[2:]))


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a dict that ``torch.save`` wrote, onto the CPU; it can hold nothing but tensors, numbers and text.

    Raises:
        ValueError: what it holds instead; which file it is, and what it should have been, is for the caller to add.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # any, for bytes that torch.save has not written
        raise ValueError((str(error).strip() or "an empty file").splitlines()[0].rstrip(". ")) from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dict")
    return found


def wrong_parameters(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> list[str]:
    """Say of each parameter that is not in both or has another shape what it must be, and what it is.

    >>> wrong_parameters({"bias": torch.zeros(3)}, {"bias": torch.zeros(2), "epoch": 1})
    ['bias must be [3], is [2]', 'epoch must be absent, is int']
    """

    def shape(state: Mapping[str, Any], name: str) -> str:
        if name not in state:
            return "absent"
        value = state[name]
        return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    names = dict.fromkeys([*expected, *found])
    pairs = ((name, shape(expected, name), shape(found, name)) for name in names)
    return [f"{name} must be {wanted}, is {given}" for name, wanted, given in pairs if wanted != given]


def load_weights(network: nn.Module, path: str) -> None:
    """Load a state dict, from whatever device it was saved, into ``network``; the file can hold nothing but tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not the weights of a network of this preset: how many parameters differ, and how the first one does.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights {path} must be a file that a training wrote, but there is no such file.")
    try:
        state = read_state(path)
        if wrong := wrong_parameters(network.state_dict(), state):
            raise ValueError(f"{len(wrong)} parameters differ, first {wrong[0]}")
    except ValueError as error:
        raise ValueError(
            f"weights {path} must be of the network's own preset, got another content: {error}."
        ) from error
    network.load_state_dict(state)


class Registration(nn.Module):
    """What a training or an evaluation needs of a network, all of it from one ``forward`` (so that DDP can wrap it).

    The result is a dict: ``warped`` (moving image on the fixed grid) and ``ddf``; for velocity networks ``dvf``, the
    mean velocity on the grid and in the voxels of its integration; for probabilistic ones ``log_variance``, and while
    training the displacement comes from a sample of the velocity instead of its mean (Dalca et al., MICCAI 2018);
    with ``bidirectional``, ``inverse_ddf`` and ``warped_fixed`` (fixed image on the moving grid).

    Of a network of several passes the velocity is that of the last one, and in training the last of a random number of
    passes is trained. One that takes the weight of smoothness as an input is trained for a random one, uniform in
    [0, 1], in each step, which the result has as ``smoothness_weight`` (Hoopes et al., IPMI 2021, who predict all
    weights of the network from it instead).

    >>> registration = Registration(VoxelMorph("diffeomorphic", spatial_dims=2), bidirectional=True)
    >>> sorted(registration(torch.rand(1, 2, 32, 48)))
    ['ddf', 'dvf', 'inverse_ddf', 'log_variance', 'warped', 'warped_fixed']

    Args:
        network: the network, shared with whoever saves it.
        bidirectional: also give the inverse, by integrating the velocity backwards.
        amp: run the U-Net in bfloat16 where that is fast; fields, warps and losses stay in float32. It is done here
            because MONAI's engines autocast on CUDA alone.
    """

    def __init__(self, network: VoxelMorph, bidirectional: bool = False, amp: bool = True) -> None:
        super().__init__()
        if bidirectional and network.num_steps == 0:
            raise ValueError("bidirectional needs a network that predicts a velocity (num_steps > 0), got num_steps 0.")
        self.network = network
        self.bidirectional = bidirectional
        self.amp = amp

    def _in_bfloat16(self, pair: Tensor) -> bool:
        # On 2 voxels along an axis oneDNN's bfloat16 gradient of the weights is random bits, Inf among them
        # (torch 2.13, AVX512; right from 3 on).
        coarsest = min(-(-n // self.network.multiple) for n in pair.shape[2:])
        return self.amp and has_fast_bfloat16(pair.device) and coarsest > 2

    def forward(self, pair: Tensor) -> dict[str, Tensor]:
        """Register ``pair`` ``(B, 2C, *spatial)``, moving image first."""
        network, size = self.network, list(pair.shape[2:])
        moving, fixed = pair.chunk(2, dim=1)
        weight = torch.rand((), device=pair.device) if network.amortised and self.training else None
        passes = network.passes
        if self.training and passes > 1:
            passes = int(torch.randint(passes, ())) + 1
        coarse, found = network.coarse(pair), {} if weight is None else {"smoothness_weight": weight}
        ddf = inverse_ddf = None
        for k in range(passes):
            with torch.set_grad_enabled(torch.is_grad_enabled() and k == passes - 1):
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
        assert ddf is not None  # there is one pass at least
        if network.num_steps > 0:
            found["dvf"] = mean
        if log_variance is not None:
            found["log_variance"] = log_variance
        found["ddf"] = network.full(ddf, size)
        found["warped"] = warp(moving, found["ddf"])
        if inverse_ddf is not None:
            found["inverse_ddf"] = network.full(inverse_ddf, size)
            found["warped_fixed"] = warp(fixed, found["inverse_ddf"])
        return found
