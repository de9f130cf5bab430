"""Import slow libraries when they are first used, because many calls do not need them.

Seconds of processor time that an import takes in addition to torch: MONAI 4 to 8, ITK 0.3 and up to 9 once its classes
are used, matplotlib 1.2, pandas 0.8, SciPy's ``ndimage`` 0.4, numba 0.3, nilearn 3.
"""

from importlib import import_module
from typing import Any

__all__ = ["lazy"]


class _Lazy:
    """Stands for a module until an attribute of it is asked for, by whichever thread."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def lazy(name: str) -> Any:
    """Return the module with this dotted name; it is imported when it is first used.

    >>> html = lazy("html.entities")
    >>> html.name2codepoint["eacute"]
    233
    """
    return _Lazy(name)
