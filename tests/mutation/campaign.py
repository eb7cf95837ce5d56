"""All trials, each in a process forked from a warm parent."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.mutation.table import Edit
from tests.mutation.trial import Outcome, try_edit

SECONDS_PER_TRIAL = 120.0
"""A trial takes about one; one that takes this long hangs."""
Progress = Callable[[Edit, Outcome], None]


class BrokenTrial(RuntimeError):
    """A trial said nothing about its edit, because the tests could not be run or did not end."""


def try_all(edits: Sequence[Edit], *, logs: Path, jobs: int, progress: Progress) -> list[Outcome]:
    """Return the outcome of every edit, in their order; `jobs` of them are tried at a time.

    Args:
        edits: The edits to try.
        logs: An existing folder for the output of the tests.
        jobs: Processes at a time, 1 or more.
        progress: Told of each edit when its outcome is known.

    Raises:
        BrokenTrial: A trial could not be run, died or hung.
    """
    outcomes: dict[str, Outcome] = {}
    waiting, running = list(reversed(edits)), dict[Connection, tuple[Edit, BaseProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                edit = waiting.pop()
                receiver, process = _start(edit, logs / f"{edit.id}.txt")
                running[receiver] = (edit, process)
            edit, outcomes_of_edit = _next_outcome(running)
            outcomes[edit.id] = outcomes_of_edit
            progress(edit, outcomes_of_edit)
    finally:
        for _, process in running.values():
            process.kill()
    return [outcomes[edit.id] for edit in edits]


def _start(edit: Edit, log: Path) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, edit, log))
    process.start()
    sender.close()
    return receiver, process


def _report(sender: Connection, edit: Edit, log: Path) -> None:
    sender.send(try_edit(edit, log))


def _next_outcome(running: dict[Connection, tuple[Edit, BaseProcess]]) -> tuple[Edit, Outcome]:
    """Wait for one of the running trials, take it out and return what it found."""
    ready = wait(list(running), timeout=SECONDS_PER_TRIAL)
    if not ready:
        raise BrokenTrial(f"no end after {SECONDS_PER_TRIAL:.0f} s: {[edit.id for edit, _ in running.values()]}")
    receiver = ready[0]
    assert isinstance(receiver, Connection)
    edit, process = running.pop(receiver)
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        raise BrokenTrial(f"{edit.id}: the process of the trial died") from None
    process.join()
    if outcome.broken:
        raise BrokenTrial(f"{edit.id}: {outcome.broken}")
    return edit, outcome
