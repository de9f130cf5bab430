"""U-Net described by data, and the convolutions that it is made of."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from voxelmorph_monai.blocks import ranges

__all__ = ["Architecture", "Convolution", "UNet", "convolve_exactly"]


class Architecture(NamedTuple):
    """Options that distinguish one VoxelMorph network from another.

    ``encoder`` lists the width of each level's convolution, fine to coarse; each level halves the resolution.
    ``decoder`` lists the widths of each resolution's convolutions, coarse to fine; it may stop before full resolution.
    """

    encoder: tuple[int, ...] = (16, 32, 32, 32)
    decoder: tuple[tuple[int, ...], ...] = ((32,), (32,), (32,), (32, 16))
    downsampling: str = "stride"  # "stride": strided convolution; "max": max-pooling after the convolution
    num_steps: int = 7  # number of squarings that integrate the velocity; 0: the network predicts the displacement
    integration_level: int = 1  # resolution of the integrated field: 0 full, 1 half, ...
    probabilistic: bool = False  # a second head predicts the log-variance of the velocity
    input_level: int = 0  # resolution of the images that the U-Net sees: 0 full, 1 half (block averages), ...
    scale_by_two: bool = False  # scale vectors by 2 per level, like the authors' code; else by (new - 1) / (old - 1)
    cascades: int = 1  # number of passes; each registers the moving image warped so far, and the maps are composed
    velocity_sigma: float = 0.0  # sigma of the Gaussian that smooths the velocity (or displacement), voxels of its grid
    padding_mode: str = "border"  # velocity beyond its grid; "zeros" in the authors' PyTorch code

    @property
    def feature_level(self) -> int:
        """Resolution at which the decoder stops: 0 full, 1 half, ..."""
        return len(self.encoder) + 1 - len(self.decoder)


def _convolve_upsampled(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``x``, each voxel repeated 2 times along each axis, concatenated with ``skip``."""
    # Along each axis, the three weights meet only two different voxels of x, so add them up first: this gives a
    # transposed convolution with four weights. It needs no upsampled or concatenated image (0.6 of the CPU time).
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
    """3-voxel convolution of bfloat16 features in the type of its weights; forward and backward work slab by slab.

    Features of the wider type and their gradient never exist as a whole. For the float32 head of ``dense`` this saves
    0.8 GiB in a training step at 160 x 192 x 224, and as slabs fit the cache, more than half of the CPU time.
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
                # For a transposed float32 convolution torch would use its own code, 50 times slower than oneDNN.
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


_ONEDNN_NUMBERS = 20480  # oneDNN is used only above this product of the first four sizes
_MIN_SLAB_VOXELS = 8  # along the cut axis; each slab is convolved with two more


def _slabs(x: Tensor) -> list[tuple[int, int]]:
    """Cut the first spatial axis of ``x`` into short ranges.

    torch uses oneDNN for a float32 convolution only above a size, which it computes from the first four dimensions; its
    own code is far slower. The ranges are the shortest above that size.
    """
    n = x.shape[2]
    voxels = _ONEDNN_NUMBERS // (x.shape[0] * x.shape[1] * x.shape[3]) + 1
    return ranges(n, n // max(voxels, _MIN_SLAB_VOXELS))


def _with_neighbours(x: Tensor, start: int, stop: int) -> Tensor:
    """Slab of ``x`` along its first spatial axis with one more voxel on each side; 0 outside ``x``."""
    slab = x[:, :, max(start - 1, 0) : stop + 1]
    missing = [int(start == 0), int(stop == x.shape[2])]
    return F.pad(slab, [0] * (2 * (x.ndim - 3)) + missing) if any(missing) else slab


def convolve_exactly(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``features`` of any type in the type of ``weight``, which the result has; beyond the border they are 0.

    Args:
        features: ``(B, C, *spatial)``.
        weight: kernel of 3 voxels a side, ``(O, C, 3, 3)`` or ``(O, C, 3, 3, 3)``.
        bias: ``(O,)``, or None for none.

    Returns:
        ``(B, O, *spatial)``.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips only a branch with this single condition
        if features.dtype != weight.dtype and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            return _ExactConvolution.apply(features, weight, bias)
    features = features.to(weight.dtype)
    if features.ndim == 5:
        return F.conv3d(features, weight, bias, padding=1)
    return F.conv2d(features, weight, bias, padding=1)


class Convolution(nn.Module):
    """3-voxel convolution and LeakyReLU(0.2), He-initialised; ``stride=2`` halves an even size.

    A stride of 2 pads 0 voxels before and 1 after, like Keras with "same", so that the authors' weights can be used.
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

        With ``skip`` ``(B, C, *spatial * 2)``, ``x`` is repeated to that resolution and concatenated with ``skip``; the
        result is ``(B, out_channels, *spatial * 2)``.
        """
        if skip is not None:
            x = _convolve_upsampled(x, skip, self.conv.weight, self.conv.bias)
        else:
            if len(self.padding) > 0:
                x = F.pad(x, self.padding)
            x = self.conv(x)
        return F.leaky_relu(x, 0.2, inplace=True)


class Block(nn.Sequential):
    """Convolutions at one resolution; the first also takes features from the resolution below."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map ``(B, in_channels, *spatial)`` to ``(B, out_channels, *spatial)``.

        With ``skip`` ``(B, C, *spatial * 2)``, the result is ``(B, out_channels, *spatial * 2)``.
        """
        for convolution in self:
            x = convolution(x, skip)
            skip = None
        return x


def _max_pool(x: Tensor) -> Tensor:
    """Maximum of each 2 x 2 (x 2) voxels, in the type of ``x``."""
    if not torch.jit.is_scripting():  # scripts run without autocast
        # On a CPU autocast would pool in float32 and save that copy: 0.4 GiB for ``dense`` at 160 x 192 x 224.
        with torch.autocast(x.device.type, enabled=False):
            return F.max_pool3d(x, 2) if x.ndim == 5 else F.max_pool2d(x, 2)
    return F.max_pool3d(x, 2) if x.ndim == 5 else F.max_pool2d(x, 2)


class UNet(nn.Module):
    """U-Net of an :class:`Architecture`: maps ``(B, in_channels, *spatial)`` to features of its last resolution.

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
        """Features ``(B, out_channels, *spatial / 2**k)``, ``k`` levels below ``x`` ``(B, in_channels, *spatial)``."""
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
