"""Metrics for MONAI and Ignite, which collect the measures of ``metrics`` over an epoch.

Call ``metric(y_pred, y)`` for each batch, with batched tensors or lists of unbatched ones, on all processes, and then
``aggregate()``. It averages over the structures of each pair, then over the pairs, and leaves out NaN. The mean of no
values is NaN, where MONAI's reduction returns 0. ``monai.handlers.IgniteMetricHandler(metric_fn=...)`` attaches a
metric to an engine.
"""

from typing import Any

from monai.metrics.metric import CumulativeIterationMetric
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor

from voxelmorph_monai.metrics import (
    Spacing,
    dice,
    folding,
    hausdorff95,
    inverse_consistency,
    log_jacobian_sd,
    non_diffeomorphic_volume,
    target_registration_error,
)

__all__ = [
    "Folding",
    "Hausdorff95",
    "InverseConsistency",
    "LabelDice",
    "LogJacobianSD",
    "NonDiffeomorphicVolume",
    "PairValue",
    "TargetRegistrationError",
]


class _PairMetric(CumulativeIterationMetric):
    """Metric that collects the ``_values`` of each pair."""

    y_is_optional = False

    def __call__(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        # MONAI would ignore a y that is not a tensor, and what exceeds the length of the shorter list.
        name = type(self).__name__
        if not isinstance(y, (Tensor, list, tuple)) and not (y is None and self.y_is_optional):
            raise TypeError(f"y of {name} is a {type(y).__name__}. Give a tensor or a list of tensors.")
        if y is not None and len(y) != len(y_pred):
            raise ValueError(f"y of {name} has {len(y)} items, but y_pred has {len(y_pred)}. Give one for each.")
        return super().__call__(y_pred, y, **kwargs)

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        # Plain tensors, because the header of a MetaTensor does not describe the values and would be gathered, too.
        plain = None if y is None else convert_to_tensor(y, track_meta=False)
        return self._values(convert_to_tensor(y_pred, track_meta=False), plain, **kwargs)

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        raise NotImplementedError

    def aggregate(self) -> Tensor:
        """Mean over the structures of each pair, then over the pairs, without NaN: a scalar."""
        values = self.get_buffer()
        if values is None:
            raise ValueError(f"{type(self).__name__} has no values to aggregate. Call it with at least one pair first.")
        return values.reshape(len(values), -1).nanmean(1).nanmean()


class LabelDice(_PairMetric):
    """``metrics.dice`` of label maps ``(B, 1, *spatial)``: ``metric(labels, reference)``."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return dice(y_pred, y, self.num_labels)


class Hausdorff95(_PairMetric):
    """``metrics.hausdorff95`` of label maps ``(B, 1, *spatial)``, in mm: ``metric(labels, reference)``."""

    def __init__(self, num_labels: int, spacing: Spacing = 1.0) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.spacing = spacing

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return hausdorff95(y_pred, y, self.num_labels, spacing=self.spacing)


class Folding(_PairMetric):
    """``metrics.folding`` in percent: ``metric(ddf)`` or ``metric(ddf, mask)``."""

    y_is_optional = True

    def __init__(self, scheme: str = "central") -> None:
        super().__init__()
        self.scheme = scheme

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return folding(y_pred, y, scheme=self.scheme)


class LogJacobianSD(_PairMetric):
    """``metrics.log_jacobian_sd``: ``metric(ddf)`` or ``metric(ddf, mask)``."""

    y_is_optional = True

    def __init__(self, definition: str = "plain") -> None:
        super().__init__()
        self.definition = definition

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return log_jacobian_sd(y_pred, y, definition=self.definition)


class NonDiffeomorphicVolume(_PairMetric):
    """``metrics.non_diffeomorphic_volume`` in percent: ``metric(ddf)`` or ``metric(ddf, mask)``."""

    y_is_optional = True

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return non_diffeomorphic_volume(y_pred, y)


class PairValue(_PairMetric):
    """Metric that collects values measured elsewhere, such as the seconds of each pair: ``metric(values)``."""

    y_is_optional = True

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return y_pred.double()


class TargetRegistrationError(_PairMetric):
    """Mean of ``metrics.target_registration_error`` over the points of each pair, in mm: ``metric(ddf, points)``.

    ``points`` is ``(B, 2, N, D)`` in voxels: moving points, then fixed points. Different calls may have different
    numbers of points.

    >>> import torch
    >>> metric = TargetRegistrationError(spacing=2.0)
    >>> fixed = torch.tensor([[[1.0, 1.5], [2.0, 0.0]]])
    >>> metric(torch.zeros(1, 2, 4, 5), torch.stack([fixed + torch.tensor([3.0, 4.0]), fixed], dim=1))
    tensor([10.], dtype=torch.float64)
    >>> metric.aggregate()
    tensor(10., dtype=torch.float64)
    """

    def __init__(self, spacing: Spacing) -> None:
        super().__init__()
        self.spacing = spacing

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        if y.ndim != 4 or y.shape[1] != 2:
            raise ValueError(f"points has shape {list(y.shape)}. Give (B, 2, N, D), moving then fixed points.")
        return target_registration_error(y[:, 0], y[:, 1], y_pred, self.spacing).mean(1)


class InverseConsistency(_PairMetric):
    """``metrics.inverse_consistency`` over the whole grid, in mm: ``metric(ddf, inverse_ddf)``."""

    def __init__(self, spacing: Spacing = 1.0) -> None:
        super().__init__()
        self.spacing = spacing

    def _values(self, y_pred: Tensor, y: Any) -> Tensor:
        return inverse_consistency(y_pred, y, spacing=self.spacing)
