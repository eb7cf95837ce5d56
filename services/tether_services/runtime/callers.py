"""Who makes the call in progress, and what that caller may use."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Literal

from tether_services.runtime.scopes import SCOPES

Lane = Literal["shared", "training"]
OWN_NAMES: Final = ("anonymous", "shadow")
"""Callers that are not the operator's: everybody where a service is open, and a candidate that scores along. They have
other places and turns than named callers, which somebody of the same name would share."""


@dataclass(frozen=True, slots=True)
class Caller:
    """An identity that was proven, and what it may use."""

    name: str
    """From the operator's own configuration, never from the call: safe in metrics and logs."""
    scopes: frozenset[str]
    """Which groups of methods it may call; see `scopes.METHOD_SCOPES`."""
    weight: float = 1.0
    """Its share of the engine beside other callers that wait, relative to theirs."""
    lane: Lane = "shared"
    """Training runs have a reserved share of the engine and room in the queue."""
    requests_per_second: float | None = None
    """Calls it may begin, averaged over a second; None is no limit."""
    tokens_per_second: float | None = None
    """Tokens it may have computed, averaged; None is no limit."""
    max_concurrency: int | None = None
    """Calls it may have in flight; None is no limit."""


ANONYMOUS: Final = Caller("anonymous", frozenset(SCOPES))
"""Everybody, where a service runs without authentication."""


@dataclass(frozen=True, slots=True)
class CurrentCall:
    """What code below the pipeline may know of the call that it works for."""

    caller: Caller
    charge: Callable[[int], None]
    """Takes tokens from the caller's quota."""


def _charge_nobody(count: int) -> None:
    """Work outside a call, such as a warm-up, has no quota."""


OUTSIDE: Final = CurrentCall(ANONYMOUS, _charge_nobody)
_CURRENT: ContextVar[CurrentCall] = ContextVar("tether_call")


def enter_call(call: CurrentCall) -> None:
    """Make a call the current one of this task; a task serves one call and ends with it."""
    _CURRENT.set(call)


def current_caller() -> Caller:
    """Return who makes the call in progress; ANONYMOUS outside one."""
    return _CURRENT.get(OUTSIDE).caller


def charge_tokens(count: int) -> None:
    """Take tokens from the quota of the current caller; the next call is refused if that overdraws it."""
    _CURRENT.get(OUTSIDE).charge(count)
