"""What MONAI's engines lack to train and evaluate on pairs of images."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

__all__ = ["TimedInferer", "pair_paths", "prepare_pair"]


def prepare_pair(
    batch: Mapping[str, Tensor], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn a batch of pairs into the network's input and the loss's target (``prepare_batch`` of MONAI's engines).

    Returns:
        ``moving`` and ``fixed`` as one tensor ``(B, 2C, *spatial)``, and a dict of ``moving``, ``fixed`` and, where the
        batch has them, ``moving_label`` and ``fixed_label``; all on ``device``, and plain tensors: a warped image does
        not lie on the moving image's grid, so its header must not travel with it.
    """
    keys = [k for k in ("moving", "fixed", "moving_label", "fixed_label") if k in batch]
    missing = {"moving", "fixed"} - set(keys)
    if missing:
        raise ValueError(f"batch must have 'moving' and 'fixed', got only {sorted(batch)}.")
    target = {
        k: torch.as_tensor(batch[k]).as_subclass(Tensor).to(device, non_blocking=non_blocking, **kwargs)  # type: ignore[call-overload]
        for k in keys
    }
    if target["moving"].shape != target["fixed"].shape:
        raise ValueError(
            f"moving and fixed must have the same shape, got {list(target['moving'].shape)} and "
            f"{list(target['fixed'].shape)}."
        )
    return torch.cat([target["moving"], target["fixed"]], dim=1), target


class TimedInferer(Inferer):
    """Call the network, and add to its result how many ``seconds`` each pair took: ``(B,)``, float32."""

    def __call__(
        self, inputs: Tensor, network: Callable[..., dict[str, Tensor]], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Give what ``network`` gives for ``inputs``, and ``seconds``."""
        start = time.perf_counter()
        found = network(inputs, *args, **kwargs)
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        seconds = (time.perf_counter() - start) / len(inputs)
        return found | {"seconds": torch.full((len(inputs),), seconds)}


def pair_paths(batch: Sequence[Mapping[str, MetaTensor]]) -> list[tuple[str, str]]:
    """Files that the moving and the fixed image of each pair of a decollated batch come from."""
    return [(str(p["moving"].meta["filename_or_obj"]), str(p["fixed"].meta["filename_or_obj"])) for p in batch]
