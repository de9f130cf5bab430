"""Compile loops with numba.

Compiled loops release Python's global lock, so that several threads can share the planes of a volume. The threads are
Python's (see ``threads``), created for each call: numba's own threads would die when a process forks, and cannot serve
two calling threads at once. Compiled code is cached on disk.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["compiled"]


def compiled(function: Callable[..., Any]) -> Any:
    """Decorator that compiles a function with numba when it is first called with arguments of new types."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the folder of the package nor the user's cache folder is writable
        return njit(**options)(function)
