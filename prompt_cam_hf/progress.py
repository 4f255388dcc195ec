# SPDX-License-Identifier: MIT
"""How far a long computation has come: a bar in a terminal and in a notebook, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from tqdm.auto import tqdm

# Between two lines where there is no terminal, in seconds.
_PAUSE = 10

T = TypeVar("T")


class Progress(AbstractContextManager, Protocol):
    """What counts the work that is done."""

    def update(self, n: float = 1) -> Any:
        """Count work that has been done since the last call."""


def progress(total: int, desc: str, unit: str, *, initial: int = 0, show: bool = True) -> Progress:
    """Show on standard error how far a computation has come, and how long it will take.

    Where there is no terminal, such as in the log of a cluster, it is a line every ten seconds.

    Args:
        total: All the work, in units.
        desc: What is done, such as "Measuring".
        unit: What is counted, such as " images".
        initial: Work that an interrupted run has done.
        show: False shows nothing, such as for all processes but the first.

    Example:
        >>> with progress(len(images), "Looking", " images") as shown:
        ...     for image in images:
        ...         shown.update()
    """
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm(total=total, initial=initial, desc=desc, unit=unit, disable=not show)
    return _Lines(total, desc, unit, initial, show)


def follow(iterable: Iterable[T], total: int, desc: str, unit: str, *, show: bool = True) -> Iterator[T]:
    """Give the items of an iterable, and show how many of `total` there have been; see `progress`."""
    with progress(total, desc, unit, show=show) as shown:
        for item in iterable:
            yield item
            shown.update()


def in_words(seconds: float) -> str:
    """A length of time as one would say it, such as "40 s", "12 min" or "1 h 5 min"."""
    if seconds < 60:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _Lines:
    """Progress as lines of text."""

    def __init__(self, total: int, desc: str, unit: str, initial: int, show: bool):
        self._total, self._desc, self._unit, self._initial, self._show = total, desc, unit, initial, show
        self._done: float = initial
        self._start = self._said = time.monotonic()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None and self._said > self._start:
            self._say("done after " + in_words(time.monotonic() - self._start))

    def update(self, n: float = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._said >= _PAUSE:
            left = (self._total - self._done) / (self._done - self._initial) * (now - self._start)
            self._say(f"about {in_words(left)} left")
            self._said = now

    def _say(self, what: str) -> None:
        if self._show:
            counted = f"{self._done:,.0f} of {self._total:,}{self._unit}"
            print(f"{self._desc}: {counted}, {what}", file=sys.stderr, flush=True)
