"""How many tokens the forward passes of a batch read, for the batcher that wants to know. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class PassTally:
    """Tokens of the forward passes so far."""

    real_tokens: int = 0
    """Of the rows."""
    padding_tokens: int = 0
    """What fills the shorter rows of each pass."""


_current: ContextVar[PassTally | None] = ContextVar("pass_tally", default=None)


@contextmanager
def tallied_passes() -> Iterator[PassTally]:
    """Count the passes that are made inside the block, by this task and those that it starts."""
    tally = PassTally()
    token = _current.set(tally)
    try:
        yield tally
    finally:
        _current.reset(token)


def count_pass(*, real_tokens: int, padding_tokens: int) -> None:
    """Count one forward pass for whoever wants to know."""
    tally = _current.get()
    if tally is not None:
        tally.real_tokens += real_tokens
        tally.padding_tokens += padding_tokens
