"""Who calls: set once per call by the chassis, read by whatever divides the service between callers."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who may call, and what of the service is theirs."""

    name: str
    """As the operator knows them."""
    scopes: frozenset[str]
    """What they may call."""
    weight: float = 1.0
    """Share of the service beside other callers of the same lane, relative to theirs."""
    lane: Literal["shared", "training"] = "shared"
    """Whether they stand in the common queue or have the part that is reserved for training runs."""
    requests_per_second: float | None = None
    """Calls per second at most; None is no limit."""
    tokens_per_second: float | None = None
    """Tokens per second at most; None is no limit."""
    max_concurrency: int | None = None
    """Calls in flight at most; None is no limit."""


ANONYMOUS = Caller(name="anonymous", scopes=frozenset({"*"}))
"""Everybody, where the service is open."""

_current: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


def current_caller() -> Caller:
    """Return who makes the call that is being answered; ANONYMOUS outside a call."""
    return _current.get()


def charge_tokens(count: int) -> None:
    """Charge the current caller's token quota; nothing outside a call."""
