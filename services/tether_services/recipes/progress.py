"""Where long work stands: a line that moves on a terminal, and now and then a plain one where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, str], None]
"""Called with the number of steps done and a short text of figures."""
ItemT = TypeVar("ItemT")
MIN_TRACKED = 2000
"""Fewer items take a moment, and no line of their own."""
ITEMS_PER_REPORT = 100
SECONDS_PER_LINE = 30.0
"""Between two plain lines."""


@contextmanager
def progress_line(title: str, *, total: int | None) -> Iterator[Report]:
    """Yield a function that moves the bar; all goes to stderr, so that stdout stays for results.

    A total of None is not known.

    Where that is no terminal, plain lines are printed, the last one at the end; see `PlainLines`.
    """
    console = Console(stderr=True)
    if not console.is_interactive:
        lines = PlainLines(title, total=total)
        try:
            yield lines.report
        finally:
            lines.flush()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, figures="")

        def report(done: int, figures: str) -> None:
            progress.update(task, completed=done, figures=figures)

        yield report


class PlainLines:
    """Prints how far the work is, what it measures, the time it took and the time left; for log files.

    Example: `sft 120/400  loss 2.1034  validation 2.2190  0:03:10 elapsed, 0:07:23 left`.
    """

    def __init__(self, title: str, *, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin now.

        Args:
            title: Of the work.
            total: Its steps; None if they are not known.
            clock: Returns seconds.
        """
        self._title, self._total, self._clock = title, total, clock
        self._began = self._printed = clock()
        self._first: tuple[int, float] | None = None  # a resumed run begins at its checkpoint's step
        self._waiting = ""

    def report(self, done: int, figures: str) -> None:
        """Print a line if the last one is `SECONDS_PER_LINE` ago, and keep it for `flush` otherwise."""
        now = self._clock()
        self._first = self._first or (done, now)
        times, of = f"{_shown(now - self._began)} elapsed", ""
        if self._total is not None:
            times, of = f"{times}, {self._left(done, self._total, now)} left", f"/{self._total}"
        self._waiting = "  ".join(filter(None, (f"{self._title} {done}{of}", figures, times)))
        if now - self._printed >= SECONDS_PER_LINE:
            self.flush()

    def flush(self) -> None:
        """Print the newest line if it was not."""
        if self._waiting:
            print(self._waiting, file=sys.stderr, flush=True)
        self._waiting, self._printed = "", self._clock()

    def _left(self, done: int, total: int, now: float) -> str:
        first_done, first_time = self._first or (done, now)
        if done >= total:
            return _shown(0.0)
        if done == first_done:
            return "unknown time"
        return _shown((now - first_time) / (done - first_done) * (total - done))


def _shown(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def tracked(items: Sequence[ItemT], *, title: str) -> Iterator[ItemT]:
    """Yield the items, with a progress line where there are many."""
    if len(items) < MIN_TRACKED:
        yield from items
        return
    with progress_line(title, total=len(items)) as report:
        for done, item in enumerate(items, start=1):
            yield item
            if done % ITEMS_PER_REPORT == 0 or done == len(items):
                report(done, "")
