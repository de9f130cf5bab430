"""What MONAI's engines lack to train and evaluate on pairs of images."""

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

__all__ = ["TimedInferer", "keep_freed_memory", "pair_names", "prepare_pair"]


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees for its next tensors, to train faster on a CPU.

    glibc gives large blocks back to the system at once, so that each training step gets its tensors as new pages, which
    the system fills with zeros first: a fifth of the CPU time of a step of ``dense``. Kept, they leave the process at
    its peak until it ends, and the peak a sixth higher, as blocks of different sizes do not fit each other's gaps.

    Returns:
        Whether the C library took it: glibc does, others have no such setting and stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # (what, value) of glibc's malloc.h: M_MMAP_MAX, no block is a mapping of its own; M_TRIM_THRESHOLD, never shrink
    return mallopt is not None and all([mallopt(-4, 0), mallopt(-1, -1)])


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


def pair_names(batch: Sequence[Mapping[str, MetaTensor]]) -> list[dict[str, str]]:
    """Name the pairs of a decollated batch for MONAI's ``MetricsSaver``: ``"1005 to 1018"``, from names of files."""
    names = [[Path(str(item[key].meta["filename_or_obj"])).name for key in ("moving", "fixed")] for item in batch]
    return [{"filename_or_obj": " to ".join(name.removesuffix(".nii.gz") for name in pair)} for pair in names]
