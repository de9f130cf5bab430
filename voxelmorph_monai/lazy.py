"""Import slow libraries only when they are first used, because many calls do not need them.

CPU seconds that an import takes in addition to that of torch: MONAI 4 to 8, ITK 0.3 (up to 9 when its classes are
used), matplotlib 1.2, pandas 0.8, SciPy's ``ndimage`` 0.4, numba 0.3, nilearn 3.
"""

from importlib import import_module
from typing import Any

__all__ = ["lazy"]


class _Lazy:
    """Placeholder that imports its module when an attribute is first used; it may be used by several threads."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def lazy(name: str) -> Any:
    """Placeholder for the module with this dotted name, which is imported when an attribute is first used.

    >>> html = lazy("html.entities")
    >>> html.name2codepoint["eacute"]
    233
    """
    return _Lazy(name)
