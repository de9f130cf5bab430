"""The one switch between compiled loops and the equivalent operators of torch, NumPy and SciPy.

Both give the same numbers up to rounding. The loops are not used on machines without ``numba``, or if the environment
variable ``VXM_KERNELS`` is ``torch``.
"""

import os
from functools import cache
from importlib import import_module
from typing import Any

__all__ = ["compiled_module"]

enabled = os.environ.get("VXM_KERNELS", "") != "torch"


@cache
def _import(name: str) -> Any:
    """Import loops when they are first needed: numba takes 0.2 s."""
    try:
        return import_module(f"voxelmorph_monai.{name}")
    except ImportError:
        return None


def compiled_module(name: str) -> Any:
    """Return a module of compiled loops, ``"loops"`` or ``"scan_loops"``, or None if they are not to be used."""
    return _import(name) if enabled else None
