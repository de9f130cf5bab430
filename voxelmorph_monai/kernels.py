"""Choose between torch's operators and the compiled loops in ``loops``, which need fewer passes over memory.

The loops support dense float32 and float64 tensors on CPUs. In all other cases torch's operators are used: on other
devices, in scripted, exported or compiled graphs, and if ``switch`` turns the loops off.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from voxelmorph_monai.switch import compiled_module

__all__ = ["loops"]


def loops(*tensors: Tensor) -> Any:
    """Return the module ``loops`` if it can compute with ``tensors``, otherwise None."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return None
    kinds = {(tensor.device.type, tensor.dtype, tensor.layout) for tensor in tensors}
    if len(kinds) > 1 or not kinds <= {("cpu", kind, torch.strided) for kind in (torch.float32, torch.float64)}:
        return None
    return compiled_module("loops") if all(tensor.numel() for tensor in tensors) else None
