"""Functions and classes that MONAI's engines need for pairs of images: they prepare batches and time the network."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

__all__ = ["TimedInferer", "pair_paths", "prepare_both_orders", "prepare_pair"]


def prepare_pair(
    batch: Mapping[str, Tensor], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn a batch of pairs into the network's input and the loss's target (``prepare_batch`` of MONAI's engines).

    Args:
        batch: ``moving`` and ``fixed`` ``(B, C, *spatial)``; ``moving_label`` and ``fixed_label`` are optional.
        device: device to copy to.
        non_blocking: as in ``torch.Tensor.to``.
        kwargs: further arguments of ``torch.Tensor.to``.

    Returns:
        ``moving`` and ``fixed`` as one tensor ``(B, 2C, *spatial)``, and a dict of all items. They are plain tensors,
        because a warped image must not keep the header of the moving image: it lies on the fixed grid.
    """
    keys = [k for k in ("moving", "fixed", "moving_label", "fixed_label") if k in batch]
    missing = {"moving", "fixed"} - set(keys)
    if missing:
        raise ValueError(f"batch has no {sorted(missing)}, only {sorted(batch)}. Add 'moving' and 'fixed'.")
    options = {"non_blocking": non_blocking, **kwargs}
    target = {
        k: torch.as_tensor(batch[k]).as_subclass(Tensor).to(device, **options)  # type: ignore[call-overload] # kwargs: object
        for k in keys
    }
    if target["moving"].shape != target["fixed"].shape:
        raise ValueError(
            f"moving and fixed differ in shape: {list(target['moving'].shape)} and {list(target['fixed'].shape)}. "
            "Resample them to one grid."
        )
    return torch.cat([target["moving"], target["fixed"]], dim=1), target


def prepare_both_orders(
    batch: Mapping[str, Tensor], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Prepare a batch like :func:`prepare_pair`, then append all pairs with moving and fixed exchanged (``2 B``)."""
    pair, target = prepare_pair(batch, device, non_blocking, **kwargs)
    moving, fixed = pair.chunk(2, dim=1)
    both = {}
    for role, other in (("moving", "fixed"), ("fixed", "moving")):
        for end in ("", "_label"):
            if role + end in target:
                both[role + end] = torch.cat([target[role + end], target[other + end]])
    return torch.cat([pair, torch.cat([fixed, moving], dim=1)]), both


class TimedInferer(Inferer):
    """Inferer that adds ``seconds`` to the network's result: the time for each pair, ``(B,)``, float32."""

    def __call__(
        self, inputs: Tensor, network: Callable[..., dict[str, Tensor]], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Result of ``network`` for ``inputs`` ``(B, 2C, *spatial)``, with ``seconds``."""
        start = time.perf_counter()
        result = network(inputs, *args, **kwargs)
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        seconds = (time.perf_counter() - start) / len(inputs)
        return result | {"seconds": torch.full((len(inputs),), seconds)}


def pair_paths(batch: Sequence[Mapping[str, MetaTensor]]) -> list[tuple[str, str]]:
    """Paths of the moving and the fixed image of each pair in a decollated batch."""
    return [(str(p["moving"].meta["filename_or_obj"]), str(p["fixed"].meta["filename_or_obj"])) for p in batch]
