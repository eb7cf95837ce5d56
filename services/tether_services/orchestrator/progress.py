"""Signs that a worker gets on. The heartbeat keeps the lease of a worker only while there are some."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

__all__ = ["Signs", "note_try", "note_while", "note_work", "read_signs", "unnoticed"]

T = TypeVar("T")

_SIGN_SECONDS = 5.0
"""Between the signs that are given for somebody else."""


class Signs(NamedTuple):
    """How many signs this process has given so far."""

    work: int
    """Pieces of work done: a call answered, a micro-batch computed, a file written."""
    tries: int
    """Times that something failed and is seen to: a call that is made again, a wait for room on a disk."""


_signs = Signs(0, 0)
_counts = ContextVar("counts", default=True)


def note_work() -> None:
    """Say that a piece of work is done; from any thread. Of two at the same time one may get lost."""
    global _signs
    if _counts.get():
        _signs = Signs(_signs.work + 1, _signs.tries)


def note_try() -> None:
    """Say that nothing is done yet and that somebody sees to it."""
    global _signs
    if _counts.get():
        _signs = Signs(_signs.work, _signs.tries + 1)


async def note_while(work: Awaitable[T], *, seconds: float) -> T:
    """Return the result of something that gives no signs itself; tries are noted for it, for `seconds` at most."""
    task, end = asyncio.ensure_future(work), time.monotonic() + seconds
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_SIGN_SECONDS)
            if time.monotonic() < end:
                note_try()
        return task.result()
    finally:
        task.cancel()


def read_signs() -> Signs:
    """Return the signs that this process has given so far."""
    return _signs


@contextmanager
def unnoticed() -> Iterator[None]:
    """Let the tasks that are made in this block give no signs: they work beside the step, which may hang meanwhile."""
    token = _counts.set(False)
    try:
        yield
    finally:
        _counts.reset(token)
