r"""Losses for training: similarity of images, smoothness of fields, overlap of labels, and the probabilistic prior.

Images are ``(B, C, *spatial)``, fields ``(B, D, *spatial)`` in voxels of their own grid (see ``blocks``), in 2-D or
3-D. Each loss is a module, which a config can create, and returns a scalar; smaller is better. All losses compute in
float32 or float64, also under autocast, and return plain tensors, also for subclasses such as MONAI's ``MetaTensor``.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from voxelmorph_monai.blocks import check_field, linear_weights, slabs
from voxelmorph_monai.kernels import loops

__all__ = [
    "BendingEnergyLoss",
    "GradientLoss",
    "KLLoss",
    "LNCCLoss",
    "LabelDiceLoss",
    "MINDLoss",
    "MSELoss",
    "MutualInformationLoss",
    "RegistrationLoss",
    "box_sum",
]


def _plain(tensor: Tensor) -> Tensor:
    """Convert ``tensor`` to a plain tensor in float32 or wider."""
    tensor = tensor.as_subclass(Tensor)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _images(names: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Check that two images can be compared voxel by voxel, and convert both to the wider of their types."""
    if first.ndim not in (4, 5) or first.shape != second.shape:
        raise ValueError(
            f"{names} have shapes {list(first.shape)} and {list(second.shape)}. Give two images of one shape "
            "(B, C, *spatial) in 2-D or 3-D."
        )
    if not first.numel():
        raise ValueError(f"{names} of shape {list(first.shape)} have no voxels. Give images with at least one voxel.")
    first, second = _plain(first), _plain(second)
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def _field(name: str, field: Tensor) -> Tensor:
    """Check the shape of ``field``, and convert it to a plain tensor in float32 or wider."""
    check_field(name, field)
    return _plain(field)


def _mean_or_zero(values: Tensor) -> Tensor:
    """Mean, or 0 for an empty tensor, such as the differences along an axis of one voxel."""
    return values.mean() if values.numel() else values.sum()


class _Loss(nn.Module):
    """Base class of the losses: its ``repr`` includes all options.

    A resumed training compares this text to check that its loss has not changed.
    """

    def extra_repr(self) -> str:
        """Names and values of the options, as text."""
        options = {k: v for k, v in vars(self).items() if isinstance(v, int | float | str) and k != "training"}
        return ", ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={v:.12g}" for k, v in options.items())


class MSELoss(_Loss):
    r"""Mean squared difference of ``warped`` and ``fixed``, :math:`\frac{1}{\sigma^2} \overline{(w - f)^2}`.

    Args:
        image_sigma: standard deviation :math:`\sigma` of the noise between aligned images, in units of their
            intensity. 1 is plain MSE (Balakrishnan et al., IEEE TMI 2019); the probabilistic model uses 0.01 to 0.02
            for images in [0, 1] (Dalca et al., MICCAI 2018).

    >>> MSELoss(image_sigma=0.02)
    MSELoss(image_sigma=0.02)
    """

    def __init__(self, image_sigma: float = 1.0) -> None:
        super().__init__()
        self.image_sigma = image_sigma

    def forward(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Loss of two images ``(B, C, *spatial)``, a scalar."""
        if not self.image_sigma > 0:
            raise ValueError(f"image_sigma is {self.image_sigma}. Give a standard deviation above 0.")
        warped, fixed = _images("warped and fixed", warped, fixed)
        return F.mse_loss(warped, fixed) / self.image_sigma**2


def box_sum(image: Tensor, window: int) -> Tensor:
    """Sum an image over each window of ``window`` voxels a side that lies inside it.

    Along each axis in turn, sums of 1, 2, 4, ... voxels are added up. On a CPU this takes a tenth of the time of
    average pooling if the image fits into the cache, and two thirds if not. In float32, it is one digit more accurate
    than cumulative sums.

    Args:
        image: image ``(B, C, *spatial)``.
        window: side of the window in voxels, odd.

    Returns:
        The sums, with ``window - 1`` voxels fewer along each axis.

    Raises:
        ValueError: ``window`` is not an odd number, or larger than the shortest side of the image.
    """
    if window < 1 or window % 2 == 0 or window > min(list(image.shape[2:])):
        raise ValueError(
            f"window is {window} voxels, for an image of shape {list(image.shape)}. Give an odd number, at most the "
            "length of its shortest side."
        )
    for axis in range(2, image.ndim):
        num_windows = image.shape[axis] - window + 1
        run, length = image, 1  # run: sums over length voxels
        total, covered = image.narrow(axis, 0, num_windows), 1  # total: sums over the first ``covered`` voxels
        while covered < window:
            rest = run.shape[axis] - length
            run = run.narrow(axis, 0, rest) + run.narrow(axis, length, rest)
            length *= 2
            if window & length:
                total = total + run.narrow(axis, covered, num_windows)
                covered += length
        image = total
    return image


# Voxels in a slab of LNCC. At 160 x 192 x 224, slabs save a fifth of the CPU time, and need 0.4 instead of 0.9 GiB.
_SLAB_VOXELS = 1 << 21


class _LocalMoments(NamedTuple):
    total: Tensor  # sum over each window
    variance: Tensor  # n times the variance of each window, at least the floor
    free: Tensor  # mask of the windows whose variance is above the floor


def _local_moments(image: Tensor, window: int) -> _LocalMoments:
    total, squares = box_sum(image, window), box_sum(image * image, window)
    variance = torch.addcmul(squares, total, total, value=-1 / window ** (image.ndim - 2))
    # In a window without contrast, the variance is only rounding error: at most 4.2 eps of the squares, measured with
    # windows of 3 to 15 voxels a side and many offsets.
    floor = squares.mul_(32 * torch.finfo(image.dtype).eps).clamp_min_(1e-5)
    free = variance > floor
    return _LocalMoments(total, torch.maximum(variance, floor, out=variance), free)


def _centre(image: Tensor) -> tuple[Tensor, Tensor]:
    """Offset to subtract from each channel, and factor that then scales its intensities to [-1, 1].

    The offset is the mean, or 0 if the intensities include 0: a background of 0 then stays exactly 0, without rounding
    errors that look like contrast. Because of the factor, the smallest contrast that counts does not depend on the unit
    of the intensities.
    """
    axes = tuple(range(2, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    centre = image.mean(axes, keepdim=True) * ((low > 0) | (high < 0))
    largest = torch.maximum(high - centre, centre - low)
    return centre, (1 / largest).where(largest > 0, 1.0)


class _MeanLNCC(torch.autograd.Function):
    r"""Mean squared local correlation. The forward pass also computes the gradient, and saves a map for each image.

    With sums :math:`S` over the :math:`n` voxels of a window, :math:`c = S_{ab} - S_a S_b / n` and
    :math:`v_a = S_{aa} - S_a^2 / n`, the value of a window is :math:`c^2 / (v_a v_b)`. Its derivative with respect to
    :math:`c` is :math:`2 p`, with :math:`p = c / (v_a v_b)`; with respect to :math:`v_a` it is :math:`-q`, with
    :math:`q = p c / v_a`. The derivative with respect to a voxel of :math:`a` is then
    :math:`2 [b \sum p - a \sum q - \frac{1}{n} \sum (p S_b - q S_a)]`, summed over the windows around the voxel.
    """

    @staticmethod
    def forward(ctx: Any, warped: Tensor, fixed: Tensor, window: int) -> Tensor:
        n, margin, reach = window ** (warped.ndim - 2), window // 2, window - 1
        # Subtracting a constant does not change the variance, but the squares of small numbers lose fewer digits. Pad
        # first, so that the zeros around the images are shifted, too. The offset needs no gradient, because it does not
        # change the value.
        padding = [margin] * (2 * (warped.ndim - 2))
        scales = [_centre(x) for x in (warped, fixed)]
        compiled = loops(warped, fixed)
        if compiled is not None:
            value, slopes = compiled.correlation((warped, fixed), scales, window, ctx.needs_input_grad[:2])
            ctx.save_for_backward(*slopes)
            return value
        images = [
            F.pad(x, padding).sub_(centre).mul_(scale)
            for x, (centre, scale) in zip((warped, fixed), scales, strict=True)
        ]
        needed = [i for i in range(2) if ctx.needs_input_grad[i]]
        # Maps of p, and for each image with a gradient q and p S_b - q S_a, for all windows; padded with zeros.
        maps = [torch.zeros_like(images[0]) for _ in range(1 + 2 * len(needed))]
        core: tuple[Any, ...] = (..., *[slice(margin, -margin)] * (warped.ndim - 2))
        sums = []
        for start, stop in slabs(warped, _SLAB_VOXELS):
            near = [x[:, :, start : stop + reach] for x in images]
            moments = [_local_moments(x, window) for x in near]
            (a_total, a_variance, _), (b_total, b_variance, _) = moments
            cross = box_sum(near[0] * near[1], window).addcmul_(a_total, b_total, value=-1 / n)
            p, *others = (x[:, :, start : stop + reach][core] for x in maps)
            torch.div(cross, a_variance * b_variance, out=p)
            cc = cross.mul_(p)
            for i, q, of_means in zip(needed, others[::2], others[1::2], strict=True):
                torch.div(cc, moments[i].variance, out=q).mul_(moments[i].free)
                torch.mul(p, moments[1 - i].total, out=of_means).addcmul_(q, moments[i].total, value=-1)
            sums.append(cc.clamp_max_(1).sum())  # rounding errors can exceed 1
        gradients: list[Tensor | None] = [None, None]
        for k, i in enumerate(needed):
            gradients[i] = gradient = torch.empty_like(warped)
            for start, stop in slabs(warped, _SLAB_VOXELS):
                near = [x[:, :, start : stop + reach] for x in (maps[0], *maps[2 * k + 1 : 2 * k + 3])]
                p, q, of_means = (box_sum(x, window) for x in near)
                a, b = (x[:, :, start : stop + reach][core] for x in (images[i], images[1 - i]))
                slab = torch.mul(b, p, out=gradient[:, :, start:stop])
                slab.addcmul_(a, q, value=-1).sub_(of_means, alpha=1 / n).mul_(scales[i][1] * (2 / warped.numel()))
        ctx.save_for_backward(*gradients)
        return torch.stack(sums).sum() / warped.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * grad_output for g in ctx.saved_tensors), None


class LNCCLoss(_Loss):
    r"""Negative mean squared local normalised cross-correlation of ``warped`` and ``fixed``: -1 (best) to 0 (worst).

    .. math:: \frac{(\sum w f - \sum w \sum f / n)^2}{(\sum w^2 - (\sum w)^2 / n) (\sum f^2 - (\sum f)^2 / n)}

    where the sums are over the :math:`n` voxels of the window around each voxel (Avants et al., Medical Image Analysis
    2008; Balakrishnan et al., IEEE TMI 2019). Windows extend beyond the border, where images are taken to be 0.
    Channels are independent. The value of a window whose contrast is below the rounding error is nearly 0.

    MONAI's ``LocalNormalizedCrossCorrelationLoss`` has the same value in float64. In float32 its differences cancel,
    and flat windows get values up to 1e12. It is also several times slower.

    Args:
        window: side of the window in voxels, odd.

    >>> image = torch.rand(1, 1, 20, 24)
    >>> round(float(LNCCLoss()(1e-4 * image, -3 * image)), 3)  # neither scale nor sign matters
    -1.0
    """

    def __init__(self, window: int = 9) -> None:
        super().__init__()
        self.window = window

    def forward(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Loss of two images ``(B, C, *spatial)``, a scalar."""
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"window is {self.window} voxels. Give an odd number, 3 or more.")
        warped, fixed = _images("warped and fixed", warped, fixed)
        return -_MeanLNCC.apply(warped, fixed, self.window)


def _scaled(image: Tensor, num_bins: int) -> Tensor:
    """Shift and scale each row of ``image`` ``(N, voxels)`` to [1, num_bins - 2]; a constant row becomes 1."""
    image_min, image_max = image.detach().aminmax(dim=1, keepdim=True)
    span = (image_max - image_min).where(image_max > image_min, torch.inf)
    return 1 + (num_bins - 3) * (image - image_min) / span


def _parzen(position: Tensor, num_bins: int) -> Tensor:
    """Weight of each bin at ``position`` ``(voxels,)``, from cubic B-splines around the bins: ``(voxels, num_bins)``.

    Four weights of each voxel differ from 0; they sum to 1.
    """
    low = position.detach().long().clamp(1, num_bins - 3)
    t = position - low
    near = [(1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3]
    index = low[:, None] + torch.arange(-1, 3, device=position.device)
    return position.new_zeros(len(position), num_bins).scatter(1, index, torch.stack(near, dim=1) / 6)


def _joint_counts(fixed: Tensor, warped: Tensor, num_bins: int) -> Tensor:
    return _parzen(fixed, num_bins).T @ _parzen(warped, num_bins)


def _entropy(probability: Tensor) -> Tensor:
    return -(probability * probability.clamp_min(torch.finfo(probability.dtype).tiny).log()).sum()


class MutualInformationLoss(_Loss):
    r"""Negative mutual information of ``warped`` and ``fixed`` in nats, for images of different contrast.

    .. math:: I = H(w) + H(f) - H(w, f)

    with the entropies of the joint histogram and its margins. The histogram uses cubic B-splines as Parzen windows for
    both images (Mattes et al., IEEE TMI 2003, use them for one). Each channel of each batch item is first scaled to its
    own range, which is treated as a constant in the gradient. For a constant image the loss is 0. The histogram is
    summed over chunks of voxels, which the backward pass computes again, so that memory does not grow with
    ``voxels * num_bins``.

    Args:
        num_bins: number of bins for each image, at least 4.
    """

    chunk = 1 << 17  # voxels in a chunk; two tables of chunk * num_bins weights are in memory at a time

    def __init__(self, num_bins: int = 32) -> None:
        super().__init__()
        self.num_bins = num_bins

    def forward(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Loss of two images ``(B, C, *spatial)``, a scalar."""
        if self.num_bins < 4:
            raise ValueError(f"num_bins is {self.num_bins}. Give 4 or more, because a cubic B-spline covers 4 bins.")
        warped, fixed = _images("warped and fixed", warped, fixed)
        with torch.autocast(warped.device.type, enabled=False):
            pairs = zip(
                _scaled(fixed.flatten(0, 1).flatten(1), self.num_bins),
                _scaled(warped.flatten(0, 1).flatten(1), self.num_bins),
                strict=True,
            )
            return -torch.stack([self._information(*pair) for pair in pairs]).mean()

    def _information(self, fixed: Tensor, warped: Tensor) -> Tensor:
        joint = fixed.new_zeros(self.num_bins, self.num_bins)
        for f, w in zip(fixed.split(self.chunk), warped.split(self.chunk), strict=True):
            joint = joint + checkpoint(
                _joint_counts, f, w, self.num_bins, use_reentrant=False, preserve_rng_state=False
            )
        joint = joint / fixed.numel()
        return _entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint)


def _shift(image: Tensor, offset: Sequence[int]) -> Tensor:
    """Values of ``image`` at ``x + offset`` for each voxel ``x``; the border value continues beyond the border."""
    for axis, step in enumerate(offset, start=2):
        if step:
            index = torch.arange(image.shape[axis], device=image.device) + step
            image = image.index_select(axis, index.clamp_(0, image.shape[axis] - 1))
    return image


class MINDLoss(_Loss):
    r"""Mean squared difference of the self-similarities of ``warped`` and ``fixed``, for images of different contrast.

    The self-similarity of a voxel (MIND-SSC, Heinrich et al., MICCAI 2013) compares the patches around its neighbours
    :math:`x + a` and :math:`x + b`, for all pairs of neighbours that lie on different axes:

    .. math:: \exp\left( -(D - \min D) / \overline{D - \min D} \right), \quad D = \overline{(I(x + a) - I(x + b))^2}

    :math:`D` is the mean over the patch; the minimum and the mean of :math:`D - \min D` are over the pairs. These are
    12 numbers in 3-D and 4 in 2-D, which hardly depend on the contrast.

    Args:
        distance: distance of the neighbours from the voxel, in voxels.
        radius: radius of the patches, which are ``2 * radius + 1`` voxels a side.

    >>> image = torch.rand(1, 1, 20, 24)
    >>> float(MINDLoss()(image, 1 - 2 * image)) < 1e-9  # neither scale nor sign matters
    True
    """

    def __init__(self, distance: int = 2, radius: int = 1) -> None:
        super().__init__()
        self.distance = distance
        self.radius = radius

    def forward(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Loss of two images ``(B, C, *spatial)``, a scalar."""
        if self.distance < 1 or self.radius < 0:
            raise ValueError(
                f"distance is {self.distance} and radius is {self.radius}. Give a distance of at least 1 voxel and a "
                "radius of at least 0."
            )
        warped, fixed = _images("warped and fixed", warped, fixed)
        return F.mse_loss(self.descriptor(warped), self.descriptor(fixed))

    def descriptor(self, image: Tensor) -> Tensor:
        """Self-similarity of ``image`` ``(B, C, *spatial)``: ``(B, K C, *spatial)``, 0 to 1, with K = 12 (2-D: 4)."""
        spatial_dims = image.ndim - 2
        axes = [[self.distance * int(d == axis) for d in range(spatial_dims)] for axis in range(spatial_dims)]
        around = [_shift(image, [sign * n for n in offset]) for offset in axes for sign in (1, -1)]
        window = 2 * self.radius + 1
        distances = []
        for i, j in combinations(range(len(around)), 2):
            if i // 2 != j // 2:  # not on one axis
                wide = F.pad((around[i] - around[j]).square(), [self.radius] * (2 * spatial_dims), mode="replicate")
                distances.append(box_sum(wide, window) / window**spatial_dims)
        stacked = torch.stack(distances)
        stacked = stacked - stacked.amin(0)
        scale = stacked.mean(0)
        # The limits bound the effect of outliers and flat regions; differences below 1e-6 are rounding errors.
        typical = scale.mean(tuple(range(2, image.ndim)), keepdim=True).detach()
        scale = scale.clamp(1e-3 * typical, 1e3 * typical).clamp_min(1e-12)
        return (-stacked / scale).exp().transpose(0, 1).flatten(1, 2)


class GradientLoss(_Loss):
    r"""Roughness of a ``ddf`` or ``dvf``: its forward differences, squared or absolute, averaged over voxels and axes.

    .. math:: \frac{1}{D} \sum_d \overline{|u(x + e_d) - u(x)|^p}, \quad p = 1, 2

    where the mean is over batch, components and voxels (Balakrishnan et al., IEEE TMI 2019). It is normalised like the
    authors' code, so that published weights of the loss can be used. MONAI's ``DiffusionLoss`` uses central
    differences, which miss a checkerboard, and sums over the axes.

    Args:
        penalty: ``"l2"`` (p = 2) or ``"l1"`` (p = 1), which allows sharper edges.

    >>> ddf = torch.zeros(1, 2, 5, 4)
    >>> ddf[0, 1] = 0.5 * torch.arange(4)  # stretches the second axis by half: one of 2 x 2 derivatives is 0.5
    >>> float(GradientLoss()(ddf)), float(GradientLoss("l1")(ddf))
    (0.0625, 0.125)
    """

    def __init__(self, penalty: str = "l2") -> None:
        super().__init__()
        self.penalty = penalty

    def forward(self, field: Tensor) -> Tensor:
        """Loss of ``field`` ``(B, D, *spatial)``, a scalar."""
        if self.penalty not in ("l1", "l2"):
            raise ValueError(f"penalty is '{self.penalty}'. Use 'l1' or 'l2'.")
        field = _field("field", field)
        size = torch.square if self.penalty == "l2" else torch.abs
        axes = range(2, field.ndim)
        return torch.stack([_mean_or_zero(size(field.diff(dim=axis))) for axis in axes]).mean()


class BendingEnergyLoss(_Loss):
    r"""Bending energy of a ``ddf`` or ``dvf``, which is 0 for affine maps.

    .. math:: \sum_c \sum_{d, e} \overline{\left( \partial_d \partial_e u_c \right)^2}

    with the mean over batch and voxels; mixed derivatives are counted twice (Rueckert et al., IEEE TMI 1999). Second
    derivatives are differences of neighbours: ``[1, -2, 1]`` along an axis, and a cell of 2 x 2 voxels for mixed
    derivatives.

    MONAI's ``BendingEnergyLoss`` averages over the components c, and causes a warning of torch 2.13.
    """

    def forward(self, field: Tensor) -> Tensor:
        """Loss of ``field`` ``(B, D, *spatial)``, a scalar."""
        field = _field("field", field)
        axes = range(2, field.ndim)
        slopes = [field.diff(dim=d) for d in axes]
        pure = [_mean_or_zero(slopes[d - 2].diff(dim=d).square()) for d in axes]
        mixed = [_mean_or_zero(slopes[d - 2].diff(dim=e).square()) for d, e in combinations(axes, 2)]
        return (torch.stack(pure).sum() + 2 * torch.stack(mixed).sum()) * field.shape[1]


def _count(label: Tensor, weight: Tensor, num_bins: int) -> Tensor:
    """Sum of ``weight`` over the voxels of each label, both ``(B, *spatial)``: ``(B, num_bins)``.

    Each slice of the first axis is summed separately, because long sums in float32 are inaccurate.
    """
    slices = label.flatten(2)
    sums = weight.new_zeros(*slices.shape[:2], num_bins).scatter_add(2, slices, weight.flatten(2))
    return sums.sum(1)


class LabelDiceLoss(_Loss):
    r"""Negative soft Dice of the linearly warped moving labels and the fixed labels: -1 (best) to 0 (worst).

    .. math:: -\frac{1}{|L|} \sum_{l \in L} \frac{2 \sum a_l b_l}{\sum a_l + \sum b_l}

    where :math:`a_l` is the warped one-hot image of label :math:`l`, :math:`b_l` the fixed one, and :math:`L` the set
    of labels in either map of the batch item, without the background 0 (Balakrishnan et al., IEEE TMI 2019). One-hot
    images are not computed: each of the ``2**D`` voxels that interpolation mixes adds its weight to the count of its
    label.

    Args:
        num_labels: largest label value.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels

    def forward(self, moving_label: Tensor, fixed_label: Tensor, ddf: Tensor) -> Tensor:
        """Loss, a scalar, of integer maps ``(B, 1, *spatial)`` for ``ddf`` ``(B, D, *spatial)`` in voxels."""
        moving, fixed, ddf = self._check(moving_label, fixed_label, ddf)
        bins = self.num_labels + 1
        # Volume of each warped label that lies outside and inside the same label of the fixed map.
        agreement = ddf.new_zeros(len(ddf), 2, bins)
        for index, weight in linear_weights(ddf):
            label = moving.flatten(1).gather(1, index.flatten(1)).view_as(fixed)
            agreement = agreement + _count(label + bins * (label == fixed), weight, 2 * bins).unflatten(1, (2, bins))
        moving_volume, fixed_volume = (_count(m, torch.ones_like(ddf[:, 0]), bins) for m in (moving, fixed))
        present = ((moving_volume > 0) | (fixed_volume > 0))[:, 1:]
        volumes = (agreement.sum(1) + fixed_volume)[:, 1:]
        # A label that is warped out of the image has no volume, and its Dice is 0.
        dice = 2 * agreement[:, 1, 1:] / volumes.clamp_min(torch.finfo(ddf.dtype).eps)
        return -(dice.sum(1) / present.sum(1).clamp_min(1)).mean()

    def _check(self, moving_label: Tensor, fixed_label: Tensor, ddf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Check the label maps and the field; return the maps ``(B, *spatial)`` as int64, and the field."""
        shape = [ddf.shape[0], 1, *ddf.shape[2:]]
        if list(moving_label.shape) != shape or list(fixed_label.shape) != shape:
            raise ValueError(
                f"moving_label and fixed_label have shapes {list(moving_label.shape)} and {list(fixed_label.shape)}, "
                f"but a ddf of shape {list(ddf.shape)} needs {shape}."
            )
        maps = []
        for name, label in (("moving_label", moving_label), ("fixed_label", fixed_label)):
            if label.is_floating_point():
                raise TypeError(f"{name} has the type {label.dtype}. Give integers.")
            maps.append(label.as_subclass(Tensor)[:, 0].long())
        extremes = torch.stack([extreme for label in maps for extreme in label.aminmax()]).tolist()  # wait only once
        low, high = min(extremes), max(extremes)
        if low < 0 or high > self.num_labels:
            raise ValueError(
                f"moving_label and fixed_label hold labels from {low} to {high}, but num_labels is {self.num_labels}. "
                "Correct num_labels, or merge the labels."
            )
        return maps[0], maps[1], _field("ddf", ddf)


def _num_neighbours(field: Tensor) -> Tensor:
    """Number of voxels that share a face with each voxel of ``field`` ``(B, C, *spatial)``: ``(1, 1, *spatial)``."""
    count = field.new_zeros(1, 1, *field.shape[2:])
    for axis in range(2, field.ndim):
        num_pairs = field.shape[axis] - 1
        count.narrow(axis, 0, num_pairs).add_(1)
        count.narrow(axis, 1, num_pairs).add_(1)
    return count


class KLLoss(_Loss):
    r"""Kullback-Leibler divergence of the predicted velocity from its smooth prior, per voxel.

    The network predicts independent normal velocities, :math:`N(\mu, \Sigma)` with diagonal :math:`\Sigma`. The prior
    of each component is :math:`N(0, \Lambda^{-1})` with :math:`\Lambda = \lambda (D - A)`, where :math:`A` is the
    adjacency matrix of voxels that share a face, and :math:`D` is diagonal with the number of such neighbours (Dalca
    et al., MICCAI 2018). The divergence is

    .. math:: \frac{1}{2} \left[ \operatorname{tr}(\Lambda \Sigma) - \log\det \Sigma + \mu^T \Lambda \mu \right]

    plus the constant :math:`-\frac{1}{2} (n + \log\det \Lambda)`, which is dropped. :math:`n` is the number of voxels
    times components, and :math:`\log\det \Lambda` excludes constant fields, which the prior does not penalise. The
    result is divided by the batch size and the number of voxels of the velocity's own grid, but not by the number of
    components.

    Args:
        prior_lambda: precision :math:`\lambda` of the prior, in 1 / (voxels per unit time)^2.
        mode: ``"exact"`` is the formula above. ``"official"`` computes the last term, of :math:`\mu`, like the authors'
            code: :math:`\frac{\lambda}{4} \sum_d \overline{(\mu(x + e_d) - \mu(x))^2}`, averaged over components and
            neighbours. Away from the border this is smaller by a factor of twice the number of dimensions. Published
            values of ``prior_lambda`` assume it.
    """

    def __init__(self, prior_lambda: float = 10.0, mode: str = "official") -> None:
        super().__init__()
        self.prior_lambda = prior_lambda
        self.mode = mode

    def forward(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Loss, a scalar, of the mean and the log-variance of the velocity, both ``(B, D, *spatial)``."""
        if self.mode not in ("official", "exact"):
            raise ValueError(f"mode is '{self.mode}'. Use 'official' or 'exact'.")
        if mean.shape != log_variance.shape:
            raise ValueError(
                f"mean and log_variance differ in shape: {list(mean.shape)} and {list(log_variance.shape)}. Give both "
                "on one grid."
            )
        mean, log_variance = _field("mean", mean), _field("log_variance", log_variance)
        variance = (self.prior_lambda * _num_neighbours(mean) * log_variance.exp() - log_variance).mean()
        squares = [mean.diff(dim=axis).square() for axis in range(2, mean.ndim)]
        if self.mode == "official":
            precision = torch.stack([_mean_or_zero(square) for square in squares]).sum() / (2 * mean.shape[1])
        else:
            precision = torch.stack([square.sum() for square in squares]).sum() / mean.numel()
        return mean.shape[1] / 2 * (variance + self.prior_lambda * precision)


def _get(values: Mapping[str, Tensor], key: str, term: str, owner: str) -> Tensor:
    """Plain tensor ``key`` of a prediction or target; the error, if it is missing, names the term that needs it."""
    if key not in values:
        raise ValueError(
            f"the {owner} has no '{key}', which the term {term} needs; it has {sorted(values)}. Add it, or remove the "
            "term."
        )
    return values[key].as_subclass(Tensor)


class RegistrationLoss(_Loss):
    r"""Loss of a registration network: a weighted sum of several terms.

    Args:
        similarity: term for images, called with ``(warped, fixed)``. If the network warps both ways, the value is
            averaged with that of ``(warped_fixed, moving)``.
        smoothness: term for the field, called with ``dvf`` (on its own grid) if the network predicts a velocity, and
            with ``ddf`` otherwise.
        smoothness_weight: weight of ``smoothness``.
        dice: term for labels, called with ``(moving_label, fixed_label, ddf)``. If the network warps both ways, the
            value is averaged with that of ``(fixed_label, moving_label, inverse_ddf)``.
        dice_weight: weight of ``dice``.
        prior: term for a probabilistic network, called with ``(dvf, log_variance)``. Its weight is always 1; balance it
            by ``image_sigma`` of :class:`MSELoss`.

    If the prediction contains a ``smoothness_weight`` :math:`\lambda` in [0, 1], it replaces the argument, and the
    similarity is multiplied by :math:`1 - \lambda` (Hoopes et al., IPMI 2021).

    >>> loss = RegistrationLoss(similarity=MSELoss(), smoothness=GradientLoss(), smoothness_weight=0.01)
    >>> image = torch.rand(1, 1, 5, 6)
    >>> loss.terms({"warped": image + 2, "ddf": torch.zeros(1, 2, 5, 6)}, {"moving": image, "fixed": image})
    {'similarity': tensor(4.), 'smoothness': tensor(0.)}
    """

    def __init__(
        self,
        similarity: Callable[[Tensor, Tensor], Tensor],
        smoothness: Callable[[Tensor], Tensor] | None = None,
        smoothness_weight: float = 1.0,
        dice: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        dice_weight: float = 1.0,
        prior: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.similarity = similarity
        self.smoothness = smoothness
        self.smoothness_weight = smoothness_weight
        self.dice = dice
        self.dice_weight = dice_weight
        self.prior = prior

    def forward(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        """Sum of the weighted :meth:`terms`, a scalar."""
        return torch.stack(list(self.terms(prediction, target).values())).sum()

    def terms(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weighted terms by name, scalars: ``similarity``, and ``smoothness``, ``dice`` and ``prior`` if they are used.

        Args:
            prediction: ``warped`` and ``ddf``; also ``dvf`` of a velocity network, ``log_variance`` of a probabilistic
                network, and ``warped_fixed`` and ``inverse_ddf`` if the network warps both ways.
            target: ``moving`` and ``fixed``, and ``moving_label`` and ``fixed_label`` if there are segmentations.
        """

        def predicted(key: str, term: str) -> Tensor:
            return _get(prediction, key, term, "prediction")

        def given(key: str, term: str) -> Tensor:
            return _get(target, key, term, "target")

        both_ways = "warped_fixed" in prediction
        terms = {"similarity": self.similarity(predicted("warped", "similarity"), given("fixed", "similarity"))}
        if both_ways:
            back = self.similarity(predicted("warped_fixed", "similarity"), given("moving", "similarity"))
            terms["similarity"] = (terms["similarity"] + back) / 2
        weight: float | Tensor = self.smoothness_weight
        if "smoothness_weight" in prediction:
            weight = predicted("smoothness_weight", "smoothness")
            terms["similarity"] = (1 - weight) * terms["similarity"]
        if self.smoothness is not None:
            field = predicted("dvf" if "dvf" in prediction else "ddf", "smoothness")
            terms["smoothness"] = weight * self.smoothness(field)
        if self.dice is not None:
            moving, fixed = given("moving_label", "dice"), given("fixed_label", "dice")
            dice = self.dice(moving, fixed, predicted("ddf", "dice"))
            if both_ways:
                dice = (dice + self.dice(fixed, moving, predicted("inverse_ddf", "dice"))) / 2
            terms["dice"] = self.dice_weight * dice
        if self.prior is not None:
            terms["prior"] = self.prior(predicted("dvf", "prior"), predicted("log_variance", "prior"))
        return terms
