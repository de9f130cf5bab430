"""Compile loops with numba.

A loop runs over some planes of a volume without Python's lock, so that several threads can share the planes. These are
Python threads (``threads``), created for each call: numba's own threads would die when a process forks, and cannot
serve two calling threads at once. Compiled code is cached on disk.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["compiled"]


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function with numba when it is first called with arguments of new types."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for a cache: neither the package's nor the user's own can be written
        return njit(**options)(function)
