"""Live progress of a run: a table that grows in a terminal, one line per step elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tether import OrchestratorClient, Run, StepEvent

COLUMNS: Final[Mapping[str, tuple[str, str]]] = {
    "score": ("score_mean", "{:+.3f}"),
    "reward": ("reward_per_sequence", "{:+.3f}"),
    "KL": ("kl_per_sequence", "{:.2f}"),
    "entropy": ("entropy", "{:.3f}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "seconds": ("step_seconds", "{:.1f}"),
}
"""Heading of a column -> name and format of the metric. KL is in nats per response, entropy in nats per token."""
VISIBLE_STEPS: Final = 12
"""Rows of the table; older steps scroll out."""


class RunView:
    """Shows the events of one run. A context manager."""

    def __init__(self, console: Console, run: Run) -> None:
        """Prepare the view.

        Args:
            console: Where to show it; rows are redrawn in a terminal and appended elsewhere.
            run: The run as it is now.
        """
        self._console = console
        self._steps: list[StepEvent] = []
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task(escape(_describe(run)), total=run.total_step_count)
        self._live = Live(self._progress, console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, event: StepEvent | Run) -> None:
        """Show an event."""
        if isinstance(event, Run):
            self._progress.update(self._task, description=escape(_describe(event)), total=event.total_step_count)
        else:
            self._steps = [step for step in self._steps if step.step < event.step]  # others were rolled back
            self._steps.append(event)
            self._progress.update(self._task, completed=event.step + 1)
        if self._live is None:
            self._console.print(_line(event), highlight=False, markup=False, soft_wrap=True)
        else:
            self._live.update(Group(_table(self._steps[-VISIBLE_STEPS:]), self._progress))


async def follow_run(client: OrchestratorClient, run_id: str, *, first_step: int = 0, console: Console) -> Run:
    """Show the progress of a run until it has ended, and return it.

    Raises:
        NotFoundError: There is no such run.
    """
    run = await client.get_run(run_id)
    with RunView(console, run) as view:
        async for event in client.watch_run(run_id, first_step=first_step):
            view.show(event)
    return await client.get_run(run_id)


def _table(steps: list[StepEvent]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("step", *COLUMNS, "policy version"):
        table.add_column(heading, justify="right")
    for event in steps:
        table.add_row(str(event.step), *_cells(event), str(event.policy_version))
    return table


def _line(event: StepEvent | Run) -> str:
    if isinstance(event, Run):
        return _describe(event)
    figures = zip(COLUMNS, _cells(event), strict=True)
    text = "  ".join(f"{heading} {cell}" for heading, cell in figures)
    return f"step {event.step}  {text}  policy version {event.policy_version}"


def _cells(event: StepEvent) -> list[str]:
    """Return the figures in the order of COLUMNS; one that the step lacks is a dash."""
    return [form.format(event.metrics[name]) if name in event.metrics else "-" for name, form in COLUMNS.values()]


def _describe(run: Run) -> str:
    text = f"run {run.run_id} {run.state}" + (f": {run.error}" if run.error else "")
    return text + (f"; rolled back {len(run.rollbacks)} times" if run.rollbacks else "")
