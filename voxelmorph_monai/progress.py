"""Show the progress of long work: a bar in a terminal or a notebook, plain lines in a log file."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from voxelmorph_monai.lazy import lazy

__all__ = ["Progress"]

tqdm = lazy("tqdm.auto")

_EVERY = 30.0  # seconds between two lines of a log


def _draws_bars() -> bool:
    """Whether standard error is a terminal, or this process runs in a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or (shell is not None and "IPKernelApp" in shell.config)


def _duration(seconds: float) -> str:
    text: str = tqdm.tqdm.format_interval(seconds)
    return text


class Progress:
    """Progress of long work: its title, the steps done, their results so far, and the remaining time.

    In a terminal or a notebook a bar is drawn, which stays visible at the end if the number of steps is known.
    Elsewhere, for example in a log file, a plain line is printed to standard error, at most every 30 seconds and at
    the end. Use it in a ``with`` statement.

    Args:
        title: name of the work, such as "register".
        total: number of steps; None if it is not known.
        unit: name of a step, such as "pair"; "" shows only the title.
        shown: False shows nothing.

    >>> import contextlib
    >>> with contextlib.redirect_stderr(sys.stdout), Progress("register", 2, "pair") as progress:
    ...     progress.advance(means={"Dice": 0.75})
    ...     progress.advance(failed=True)
    register: 2 of 2 pairs in 00:00, 1 failed, mean Dice 0.750
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "", *, shown: bool = True) -> None:
        self._title, self._total, self._unit, self._shown = title, total, unit, shown
        self._done = self._failed = 0
        self._values: dict[str, list[float]] = {}
        self._notes = ""
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._start = self._told = time.monotonic()
        if self._shown and self._total != 0 and _draws_bars():
            plain = {} if self._unit else {"bar_format": "{desc} ..."}
            self._bar = tqdm.tqdm(
                desc=self._title, total=self._total, unit=self._unit, leave=self._total is not None, **plain
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._shown and self._total:
            self._print(ended=True)

    def advance(self, *, failed: bool = False, means: Mapping[str, float] | None = None, notes: str = "") -> None:
        """Count a step.

        Args:
            failed: whether the step failed.
            means: values measured in the step, by name; the mean over all steps so far is shown.
            notes: text to show until the next step.
        """
        self._done += 1
        self._failed += failed
        for name, value in (means or {}).items():
            self._values.setdefault(name, []).append(value)
        self._notes = notes
        if self._bar is not None:
            self._bar.set_postfix_str(self._outcome(), refresh=False)
            self._bar.update()
        elif self._shown and time.monotonic() - self._told >= _EVERY and self._done != self._total:
            self._print()

    def _outcome(self) -> str:
        failed = [f"{self._failed} failed"] if self._failed else []
        means = [f"mean {name} {sum(values) / len(values):.3f}" for name, values in self._values.items()]
        return ", ".join([*failed, *means, *filter(None, [self._notes])])

    def _print(self, *, ended: bool = False) -> None:
        self._told = time.monotonic()
        seconds = self._told - self._start
        of = "" if self._total is None else f" of {self._total}"
        line = f"{self._title}: {self._done}{of} {self._unit}s in {_duration(seconds)}"
        line = ", ".join(filter(None, [line, self._outcome()]))
        if self._total is not None and not ended:
            line += f", about {_duration(seconds / self._done * (self._total - self._done))} left"
        print(line, file=sys.stderr, flush=True)
