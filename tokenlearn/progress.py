"""Signs of life of long work: a bar on a terminal, elsewhere a line about every thirty seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TextIO, TypeVar

T = TypeVar("T")

INTERVAL = 30.0
"""Seconds between two lines."""
_REFRESH = 0.5
_MINUTE, _HOUR = 60.0, 3600.0


class Meter:
    """How far some work is, and how long the rest will take.

    On a terminal it is a bar of tqdm. Elsewhere, as in the log of a batch job, a bar would be drawn once, at the end:
    there it is a line about every thirty seconds.

    Args:
        description: what is done.
        total: number of units; None if it is not known.
        unit: name of a unit.
        done: units that were done before, of which the pace is not known.
        shown: whether to show anything.
        stream: where to; None for the error stream.
        clock: seconds since any time.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        unit: str = "step",
        done: int = 0,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self._stream, self._clock, self._shown = stream or sys.stderr, clock, shown
        self._first, self._parts = done, 0
        self._start = self._last = clock()
        self._bar: Any = None
        if shown and self._stream.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=total, desc=description, unit=unit, initial=done, leave=False, file=self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, count: int = 1, figures: str = "") -> None:
        """Count finished units.

        Args:
            count: how many.
            figures: figures to show, such as ``loss 0.12``.
        """
        self.done += count
        self._parts = 0
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(count)
        elif self._is_due(INTERVAL):
            self._print(figures)

    def beat(self, part: str) -> None:
        """Count a part of the unit that is under way, such as a network evaluation, of which no total is known."""
        self._parts += 1
        if not self._is_due(INTERVAL if self._bar is None else _REFRESH):
            return
        if self._bar is None:
            self._print(f"{_count(self._parts, part)} into the next")
        else:
            self._bar.set_postfix_str(f"{_count(self._parts, part)} into the next")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _is_due(self, interval: float) -> bool:
        now = self._clock()
        if not self._shown or now - self._last < interval:
            return False
        self._last = now
        return True

    def _print(self, figures: str) -> None:
        line = progress_line(
            self.description, self.done, self.total, self.unit, self._clock() - self._start, self.done - self._first
        )
        print(f"{line}, {figures}" if figures else line, file=self._stream, flush=True)


def progress(
    items: Iterable[T], description: str, *, total: int | None = None, unit: str = "step", shown: bool = True
) -> Iterator[T]:
    """Go through items and show how far it is.

    Args:
        items: the items.
        description: what is done.
        total: number of items; None for the length of ``items``, where it has one.
        unit: name of an item.
        shown: whether to show anything.
    """
    if total is None and isinstance(items, Sequence | range):
        total = len(items)
    with Meter(description, total, unit=unit, shown=shown) as meter:
        for item in items:
            yield item
            meter.update()


def progress_line(description: str, done: int, total: int | None, unit: str, seconds: float, measured: int) -> str:
    """A line such as ``Training: 20 of 60 steps, 10 min, about 20 min left``.

    Args:
        description: what is done.
        done: finished units.
        total: number of units; None if it is not known.
        unit: name of a unit.
        seconds: time since the start.
        measured: units that were finished in this time.
    """
    line = (
        f"{description}: {_count(done, unit)}" if total is None else f"{description}: {done} of {_count(total, unit)}"
    )
    line += f", {duration(seconds)}"
    if total is not None and measured:
        line += f", about {duration(seconds / measured * (total - done))} left"
    return line


def _count(number: int, unit: str) -> str:
    if number == 1:
        return f"1 {unit}"
    return f"{number} {unit}es" if unit.endswith("ch") else f"{number} {unit}s"


def duration(seconds: float) -> str:
    """A duration in the unit that suits it: ``45 s``, ``12 min``, ``2.5 h``."""
    if seconds < 1.5 * _MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / _MINUTE:.0f} min" if seconds < 1.5 * _HOUR else f"{seconds / _HOUR:.1f} h"
