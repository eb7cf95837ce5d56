"""A progress line on the terminal for long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, str], None]
"""Called with the number of steps done and a short text of figures."""
ItemT = TypeVar("ItemT")
MIN_TRACKED = 2000
"""Fewer items take a moment, and no line of their own."""
ITEMS_PER_REPORT = 100


@contextmanager
def progress_line(title: str, *, total: int) -> Iterator[Report]:
    """Yield a function that moves the bar; the line goes to stderr, so that stdout stays for results."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, figures="")

        def report(done: int, figures: str) -> None:
            progress.update(task, completed=done, figures=figures)

        yield report


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
