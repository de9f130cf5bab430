r"""Geometry of displacement fields: warp, compose, integrate, invert, resize, differentiate, smooth.

A field ``u`` of shape ``(B, D, *spatial)`` gives each voxel ``x`` an offset **in voxels of its own grid**, component
``d`` along array axis ``d``. It stands for the map :math:`\phi(x) = x + u(x)` and pulls images back: the warped image
at ``x`` is the moving image at :math:`\phi(x)`. Outside its grid a field, like an image, continues with its border
value. Every other module takes its conventions from here, and nothing else knows of ``grid_sample``'s [-1, 1].

Fields are computed in float32 or wider whatever comes in: bfloat16 cannot count voxels past 256. Everything works in
2-D and 3-D, is differentiable, and can be scripted (``torch.jit.script``) and exported to ONNX.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "compose",
    "corners",
    "identity_grid",
    "integrate",
    "invert",
    "jacobian_determinant",
    "majority",
    "resize",
    "signed",
    "smooth",
    "warp",
    "warp_labels",
]


def _widen(field: Tensor) -> Tensor:
    """Give ``field`` in float32 or wider."""
    return field if field.dtype == torch.float64 else field.float()


def _axis(field: Tensor, axis: int) -> Tensor:
    """Voxel coordinates of the grid of ``field`` along array axis ``axis``, to broadcast over ``(B, *spatial)``."""
    shape = [1] * (field.ndim - 1)
    shape[axis + 1] = field.shape[axis + 2]
    return torch.arange(field.shape[axis + 2], dtype=field.dtype, device=field.device).view(shape)


def _check_ddf(image: Tensor, ddf: Tensor) -> None:
    expected = [image.shape[0], image.ndim - 2] + list(image.shape[2:])
    if image.ndim not in (4, 5) or list(ddf.shape) != expected:
        raise ValueError(
            f"ddf for an image of shape {list(image.shape)} must be {expected} in 2-D or 3-D, got {list(ddf.shape)}."
        )


def identity_grid(field: Tensor) -> Tensor:
    """Voxel coordinates ``x`` of the grid of ``field`` ``(B, C, *spatial)``: ``(1, D, *spatial)``, float32 or wider.

    >>> identity_grid(torch.zeros(1, 1, 2, 3))[0, 1]
    tensor([[0., 1., 2.],
            [0., 1., 2.]])
    """
    wide = _widen(field)
    axes = [_axis(wide, d).expand([1] + list(field.shape[2:])) for d in range(field.ndim - 2)]
    return torch.stack(axes, dim=1)


def _to_unit(ddf: Tensor, axis: int) -> float:
    """Factor from voxels along ``axis`` to ``grid_sample``'s [-1, 1]."""
    return 2.0 / max(ddf.shape[axis + 2] - 1, 1)


def _grid(ddf: Tensor, mode: str) -> Tensor:
    r"""What ``grid_sample`` takes for :math:`\phi` of ``ddf``: ``(B, *spatial, D)``, from -1 to 1, last axis first."""
    components = ddf.unbind(1)  # one gradient for all; indexed one by one, each would fill a whole field with zeros
    unit = []
    for d in range(ddf.shape[1] - 1, -1, -1):
        point = components[d] + _axis(ddf, d)
        if mode == "nearest":
            point = point.round()  # here, where halves are exact: the way to [-1, 1] and back is not
        unit.append(point * _to_unit(ddf, d) - 1.0)
    return torch.stack(unit, dim=-1)


def _parts(grid: Tensor) -> int:
    """In how many parts to sample, for all threads to work: on a CPU torch gives each batch item one thread."""
    parts = torch.get_num_threads() // grid.shape[0] if grid.device.type == "cpu" else 1
    while parts > 1 and grid.shape[1] % parts:
        parts -= 1
    return max(parts, 1)


class _Sample(torch.autograd.Function):
    """Linear ``grid_sample`` of an image along a displacement, by all threads, that keeps these two alone.

    The first axis is cut into as many items of a batch as there are threads: on 2 cores warp is 1.5 times faster,
    integrate with its gradient 1.7 times. As no grid is kept, warp takes 0.6 and integrate 0.5 of the memory.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, ddf: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(image, ddf)
        ctx.padding = padding
        out = _Sample.operator(image, "")(*_Sample.cut(image, ddf), 0, padding, True)
        parts = len(out) // len(image)
        return out if parts == 1 else out.unflatten(0, (-1, parts)).transpose(1, 2).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        image, ddf = ctx.saved_tensors
        copies, grid = _Sample.cut(image, ddf)
        parts = len(copies) // len(image)
        if parts > 1:
            grad_output = grad_output.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)
        needed = list(ctx.needs_input_grad[:2])
        backward = _Sample.operator(image, "_backward")
        of_image, of_grid = backward(grad_output, copies, grid, 0, ctx.padding, True, [needed[0], True])
        of_ddf = None
        if needed[1]:
            of_ddf = torch.empty_like(ddf)
            for d, component in enumerate(of_grid.view(len(ddf), *ddf.shape[2:], -1).unbind(-1)[::-1]):
                torch.mul(component, _to_unit(ddf, d), out=of_ddf[:, d])
        if needed[0]:
            of_image, *others = of_image.unflatten(0, (-1, parts)).unbind(1)
            for other in others:
                of_image += other
        return of_image if needed[0] else None, of_ddf, None

    @staticmethod
    def operator(image: Tensor, end: str) -> Any:
        """``grid_sampler`` of ``image`` or, with the ``end`` ``_backward``, its gradient."""
        return getattr(torch.ops.aten, f"grid_sampler_{image.ndim - 2}d{end}")

    @staticmethod
    def cut(image: Tensor, ddf: Tensor) -> tuple[Tensor, Tensor]:
        """Image, repeated without a copy where it can be, and grid of each part."""
        grid = image.new_empty((len(ddf), *ddf.shape[2:], ddf.shape[1]))  # MONAI's MetaTensor takes no loose sizes
        for d, component in enumerate(grid.unbind(-1)[::-1]):  # as _grid, to the last bit, without a copy
            torch.sub((ddf[:, d] + _axis(ddf, d)).mul_(_to_unit(ddf, d)), 1.0, out=component)
        parts = _parts(grid)
        copies = image[:, None].expand(-1, parts, *image.shape[1:]).flatten(0, 1)
        return copies, grid.unflatten(1, (parts, -1)).flatten(0, 1)


def _sample(image: Tensor, ddf: Tensor, mode: str, padding_mode: str) -> Tensor:
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips what stands under this one condition
        if mode == "bilinear" and len(image) and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            return _Sample.apply(image, ddf, 0 if padding_mode == "zeros" else 1)
    return F.grid_sample(image, _grid(ddf, mode).to(image.dtype), mode, padding_mode, align_corners=True)


def warp(image: Tensor, ddf: Tensor, mode: str = "bilinear", padding_mode: str = "border") -> Tensor:
    r"""Pull ``image`` ``(B, C, *spatial)`` back along ``ddf`` ``(B, D, *spatial)``: :math:`I \circ \phi`.

    Args:
        image: any dtype; the result has the same. Integers only with ``mode="nearest"``, and then exactly.
        ddf: displacement in voxels.
        mode: ``"bilinear"`` (linear in 3-D too) or ``"nearest"`` (halves go to the even voxel).
        padding_mode: ``"border"`` repeats the outermost voxel, ``"zeros"`` surrounds the image with 0 (but not along
            an axis of one voxel, which has no outside).

    >>> image = torch.tensor([[[[0.0, 1.0, 4.0]]]])
    >>> half_a_voxel_right = torch.tensor([0.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    >>> warp(image, half_a_voxel_right)
    tensor([[[[0.5000, 2.5000, 4.0000]]]])
    """
    _check_ddf(image, ddf)
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"mode must be 'bilinear' or 'nearest', got '{mode}'.")
    if padding_mode not in ("border", "zeros"):
        raise ValueError(f"padding_mode must be 'border' or 'zeros', got '{padding_mode}'.")
    ddf = _widen(ddf)
    dtype = torch.float64 if image.dtype == torch.float64 else ddf.dtype
    if not image.is_floating_point():
        if mode != "nearest":
            raise TypeError(f"only mode='nearest' keeps labels: linear interpolation got an image of {image.dtype}.")
        dtype = torch.float64  # float32 would round labels past 2^24
    return _sample(image.to(dtype), ddf, mode, padding_mode).to(image.dtype)


def compose(outer: Tensor, inner: Tensor, padding_mode: str = "border") -> Tensor:
    r"""Displacement of :math:`\phi_{outer} \circ \phi_{inner}`, that is ``inner(x) + outer(x + inner(x))``.

    An image warped by the composition is the image warped by ``outer``, then by ``inner``. ``padding_mode`` says what
    ``outer`` is beyond its grid, as in :func:`warp`.
    """
    return _widen(inner) + warp(_widen(outer), inner, padding_mode=padding_mode)


def integrate(dvf: Tensor, num_steps: int = 7, padding_mode: str = "border") -> Tensor:
    r"""Displacement at time 1 of the flow of the stationary velocity ``dvf`` (voxels per unit time): :math:`\exp(v)`.

    Scaling and squaring, :math:`\exp(v) = \exp(v / 2^n)^{2^n}`, starting from :math:`\exp(v / 2^n) \approx v / 2^n`
    (Arsigny et al., MICCAI 2006). The error halves with each step; ``-dvf`` gives the inverse map. With
    ``padding_mode="zeros"`` the velocity ends at the border of its grid, which tears what flows across it.

    >>> shift = integrate(torch.ones(1, 2, 5, 4))
    >>> bool((shift == 1).all())  # a constant velocity moves everything by itself
    True
    """
    if not 0 <= num_steps <= 30:
        raise ValueError(f"num_steps must be 0 to 30 (the velocity is divided by 2^num_steps), got {num_steps}.")
    ddf = _widen(dvf) * (0.5**num_steps)
    for _ in range(num_steps):
        ddf = compose(ddf, ddf, padding_mode)
    return ddf


def _length(field: Tensor) -> Tensor:
    return torch.linalg.vector_norm(field, dim=1)


def invert(ddf: Tensor, max_iterations: int = 100, tolerance: float = 1e-3, step: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Inverse of a displacement that comes without a velocity, and how far it is from one.

    Fixed point :math:`u^{-1} \leftarrow -u \circ (id + u^{-1})` (Chen et al., Medical Physics 2008). It converges where
    ``u`` stretches nothing by 100 % or more, with a smaller ``step`` by ``2 / step - 1``; elsewhere the residual tells
    what is left. A small residual does not rule out folds, as of several points that meet in one it finds one:
    :func:`jacobian_determinant` sees them.

    Args:
        ddf: displacement in voxels, ``(B, D, *spatial)``.
        max_iterations: passes at most.
        tolerance: stop when no voxel is further than this (voxels) from being undone.
        step: share of its error that each pass takes off.

    Returns:
        The inverse, same shape, and the residual ``(B,)``: the largest :math:`|\phi(\phi^{-1}(x)) - x|` in voxels.
    """
    ddf = _widen(ddf)
    inverse = -ddf
    error = compose(ddf, inverse)
    for _ in range(max_iterations):
        if bool((_length(error.detach()) <= tolerance).all()):
            break
        inverse = inverse - step * error
        error = compose(ddf, inverse)
    return inverse, _length(error).flatten(1).amax(dim=1)


def resize(field: Tensor, size: list[int]) -> Tensor:
    """Resample ``field`` to the spatial ``size`` (a sequence) and restate its vectors in voxels of the new grid.

    The corner voxels of the two grids coincide: component ``d`` is scaled by ``(new - 1) / (old - 1)``.
    """
    field = _widen(field)
    if len(size) not in (2, 3) or field.ndim - 2 != len(size) or field.shape[1] != len(size) or min(size) < 1:
        raise ValueError(f"size for a field of shape {list(field.shape)} must be as many sizes > 0, got {list(size)}.")
    if list(field.shape[2:]) == list(size):
        return field
    mode = "bilinear" if len(size) == 2 else "trilinear"
    resampled = F.interpolate(field, list(size), mode=mode, align_corners=True)
    # One number for each component: a tensor of them would be rounded to float32 by TorchScript.
    ratio = [(size[d] - 1) / max(field.shape[d + 2] - 1, 1) for d in range(len(size))]
    components = resampled.unbind(1)
    return torch.stack([components[d] * ratio[d] for d in range(len(size))], dim=1)


def smooth(field: Tensor, sigma: float) -> Tensor:
    r"""Convolve ``field`` ``(B, C, *spatial)`` with what stands for a Gaussian of ``sigma`` voxels.

    :math:`[w, 1 - 2 w, w]` of the same variance along each axis, :math:`\lceil 2 \sigma^2 \rceil` times: a sixth of the
    time of a sampled Gaussian. Beyond the border stands the border value. A ``sigma`` of 0 gives ``field`` itself.

    >>> smooth(torch.tensor([[[[0.0, 0.0, 8.0, 0.0, 0.0]]]]), sigma=1.0)
    tensor([[[[0.5000, 2.0000, 3.0000, 2.0000, 0.5000]]]])
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be a number of voxels, at least 0, got {sigma}.")
    field = _widen(field)
    passes = math.ceil(2 * sigma**2)
    weight = sigma**2 / (2 * max(passes, 1))
    for axis in range(2, field.ndim):
        n = field.shape[axis]
        for _ in range(passes):
            wide = field * (1 - 2 * weight)
            wide.narrow(axis, 1, n - 1).add_(field.narrow(axis, 0, n - 1), alpha=weight)
            wide.narrow(axis, 0, n - 1).add_(field.narrow(axis, 1, n - 1), alpha=weight)
            for end in (0, n - 1):
                wide.narrow(axis, end, 1).add_(field.narrow(axis, end, 1), alpha=weight)
            field = wide
    return field


def _difference(field: Tensor, axis: int, scheme: str) -> Tensor:
    """Derivative per voxel along tensor dimension ``axis``, one-sided where a neighbour is missing."""
    n = field.shape[axis]
    if n == 1:
        return torch.zeros_like(field)
    step = field.narrow(axis, 1, n - 1) - field.narrow(axis, 0, n - 1)
    last = step.narrow(axis, n - 2, 1)
    if scheme == "forward":
        return torch.cat([step, last], dim=axis)
    inner = (step.narrow(axis, 1, n - 2) + step.narrow(axis, 0, n - 2)) * 0.5
    return torch.cat([step.narrow(axis, 0, 1), inner, last], dim=axis)


def ranges(n: int, number: int) -> list[tuple[int, int]]:
    """Cut 0 to ``n`` into ``number`` ranges of about one length, but 1 at least and ``n`` at most: start and stop.

    >>> ranges(7, 3)
    [(0, 2), (2, 4), (4, 7)]
    """
    number = max(min(number, n), 1)
    return [(n * k // number, n * (k + 1) // number) for k in range(number)]


def slabs(image: Tensor, numbers: int) -> list[tuple[int, int]]:
    """Cut the first spatial axis of ``image`` into ranges of that many numbers, which a processor's cache holds.

    A GPU prefers fewer, larger steps: there it is one range.
    """
    return ranges(image.shape[2], -(-image.numel() // numbers) if image.device.type == "cpu" else 1)


def _determinant(ddf: Tensor, scheme: str) -> Tensor:
    spatial_dims = ddf.shape[1]
    rows: list[list[Tensor]] = []  # rows[j][i] is the derivative of phi_i along axis j
    for j in range(spatial_dims):
        components = [_difference(ddf.narrow(1, i, 1), j + 2, scheme) for i in range(spatial_dims)]
        components[j] = components[j] + 1.0
        rows.append(components)
    a, b = rows[0], rows[1]
    if spatial_dims == 2:
        return torch.addcmul(a[0] * b[1], a[1], b[0], value=-1)
    c = rows[2]
    x = torch.addcmul(b[1] * c[2], b[2], c[1], value=-1)
    y = torch.addcmul(b[2] * c[0], b[0], c[2], value=-1)
    z = torch.addcmul(b[0] * c[1], b[1], c[0], value=-1)
    return torch.addcmul(torch.addcmul(a[0] * x, a[1], y), a[2], z)


def jacobian_determinant(ddf: Tensor, scheme: str = "central") -> Tensor:
    r"""Local change of volume :math:`\det(I + \nabla u)` of ``ddf`` ``(B, D, *spatial)``: ``(B, 1, *spatial)``.

    1 keeps the volume, 2 means that :math:`\phi` doubles it, 0 or less that it folds.

    Args:
        ddf: displacement in voxels.
        scheme: ``"central"`` differences, blind to a checkerboard, as the literature reports; or ``"forward"``, which
            sees each cell. Both are one-sided at the border, so that the shape stays.
    """
    if scheme not in ("central", "forward"):
        raise ValueError(f"scheme must be 'central' or 'forward', got '{scheme}'.")
    spatial_dims = ddf.ndim - 2
    if spatial_dims not in (2, 3) or ddf.shape[1] != spatial_dims:
        raise ValueError(f"ddf must be (B, 2, H, W) or (B, 3, H, W, D), got {list(ddf.shape)}.")
    ddf, n = _widen(ddf), ddf.shape[2]
    found: list[Tensor] = []
    # At 160 x 192 x 224 a fifth of the CPU time that it takes at once, or two thirds where freed memory is kept.
    for start, stop in slabs(ddf, 1 << 20):
        first = max(start - 1, 0)  # with the neighbours
        slab = _determinant(ddf.narrow(2, first, min(stop + 1, n) - first), scheme)
        found.append(slab.narrow(2, start - first, stop - start))
    return torch.cat(found, dim=2)


def corners(ddf: Tensor, size: list[int] | None = None) -> list[tuple[Tensor, Tensor]]:
    r"""Voxels that linear interpolation mixes at :math:`\phi(x)`, with their shares.

    For each of the ``2**D`` corners of the cell around :math:`\phi(x)`: the flat index ``(B, *spatial)`` of the voxel
    (int64, into the grid of one batch item) and its weight ``(B, *spatial)``, differentiable in ``ddf``. The weights of
    a point sum to 1. What a warp does to label maps can so be computed for all labels at once, without one-hot images.

    Args:
        ddf: displacement in voxels.
        size: of the grid that the voxels belong to, when it is another one: :math:`\phi(x)` counts in its voxels.
    """
    _check_ddf(ddf, ddf)
    ddf = _widen(ddf)
    grid = list(ddf.shape[2:]) if size is None else list(size)
    if len(grid) != ddf.shape[1] or min(grid) < 1:
        raise ValueError(f"size for a ddf of {ddf.shape[1]} components must be as many sizes > 0, got {grid}.")
    found = [(torch.zeros_like(ddf[:, 0], dtype=torch.int64), torch.ones_like(ddf[:, 0]))]
    for d in range(ddf.shape[1]):
        n = grid[d]
        point = (ddf[:, d] + _axis(ddf, d)).clamp(0, n - 1)
        low = point.detach().floor()
        share = point - low
        index = low.long()
        ends = [(index, 1 - share), ((index + 1).clamp(max=n - 1), share)]
        finer: list[tuple[Tensor, Tensor]] = []
        for i, weight in found:
            for end, part in ends:
                finer.append((i * n + end, weight * part))
        found = finer
    return found


def majority(labels: Tensor, shares: Tensor) -> Tensor:
    """Of labels with their shares, ``(B, K, *spatial)`` both, the one with the largest sum: ``(B, 1, *spatial)``.

    Of labels with equal shares the smaller one wins.

    >>> majority(torch.tensor([[2, 5, 3], [2, 5, 5]]), torch.tensor([[0.4, 0.35, 0.25]]).expand(2, 3))
    tensor([[2],
            [5]])
    """
    given, weights = labels.unbind(1), shares.unbind(1)
    best, most = given[0], torch.zeros_like(weights[0])
    for label in given:
        share = torch.zeros_like(most)
        for other, weight in zip(given, weights):  # noqa: B905, TorchScript knows no strict=True
            share = share + weight * (other == label)
        better = (share > most) | ((share == most) & (label < best))
        best, most = torch.where(better, label, best), torch.where(better, share, most)
    return best.unsqueeze(1)


def signed(labels: Tensor) -> Tensor:
    """Give ``labels`` as int64 if they are of an unsigned type of 16 bits or more: torch stores them, and little else.

    >>> signed(torch.tensor([3, 40000], dtype=torch.uint16)).max()
    tensor(40000)
    """
    return labels.long() if labels.dtype in (torch.uint16, torch.uint32, torch.uint64) else labels


def warp_labels(labels: Tensor, ddf: Tensor) -> Tensor:
    """Warp a label map ``(B, 1, *spatial)`` along ``ddf``: the label with the largest linearly interpolated share.

    Equal to warping every label's one-hot image linearly and taking the argmax, at the cost of the ``2**D`` voxels
    around each point instead of one image a label. Of labels with equal shares the smaller one wins.
    """
    _check_ddf(labels, ddf)
    if labels.shape[1] != 1:
        raise ValueError(f"labels must have one channel, got shape {list(labels.shape)}.")
    found = corners(ddf.detach())
    flat = signed(labels).flatten(1)
    there = torch.stack([flat.gather(1, index.flatten(1)).view_as(index) for index, _ in found], dim=1)
    return majority(there, torch.stack([weight for _, weight in found], dim=1)).to(labels.dtype)
