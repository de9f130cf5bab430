"""How numba compiles loops here.

A loop runs over some planes of a volume without Python's lock, so that several threads can share the planes. They are
threads of Python's own (``threads``), made for each call: numba's would die when a process forks, and do not let two
threads of the caller in at once. What is compiled lies in a cache on the disk.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["compiled"]


def compiled(function: Callable[..., Any]) -> Any:
    """Have numba compile a function when it is first called with arguments of some types."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for a cache: neither the package's nor the user's own can be written
        return njit(**options)(function)
