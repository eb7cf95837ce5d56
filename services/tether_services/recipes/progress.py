"""A progress line on the terminal for long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, str], None]
"""Called with the number of steps done and a short text of figures."""


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
