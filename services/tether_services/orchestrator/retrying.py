"""How often a failed call or step is tried again, and how long in between."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tether.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    TetherError,
    UnavailableError,
)

__all__ = [
    "BUDGET_SPENT",
    "MAX_BACKOFF_SECONDS",
    "RetryBudget",
    "RetryPolicy",
    "as_unavailable",
    "is_missing",
    "may_repeat",
]

MAX_BACKOFF_SECONDS = 8.0
BUDGET_SPENT = "RETRY_BUDGET_SPENT"
"""Reason of the error of a call that could not be repeated."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to call a service again that did not answer or is full."""

    max_retries: int
    """Repeats after the first call."""
    backoff_seconds: float
    """Wait before the first repeat; doubles up to MAX_BACKOFF_SECONDS."""

    def delay(self, attempt: int, error: TetherError) -> float:
        """Return the seconds to wait after an attempt, counted from 0: what the service asked for, else the backoff."""
        if error.retry_after_seconds is not None:
            return min(error.retry_after_seconds, MAX_BACKOFF_SECONDS)
        # Spread over [0.5, 1]: many calls fail together and should not come back together.
        return float(min(self.backoff_seconds * 2**attempt, MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.0))


class RetryBudget:
    """The repeats that all calls of a step may make together."""

    def __init__(self, calls: int) -> None:
        self._calls = calls
        self._left = calls

    def refill(self) -> None:
        """A step begins."""
        self._left = self._calls

    def spend(self, service: str) -> None:
        """Take one repeat.

        Raises:
            ResourceExhaustedError: RETRY_BUDGET_SPENT; names the service whose call wanted it.
        """
        if self._left == 0:
            message = f"the {self._calls} repeats of a step are spent, and a call to {service} needs another one"
            raise ResourceExhaustedError(message, reason=BUDGET_SPENT)
        self._left -= 1


def may_repeat(error: TetherError) -> bool:
    """Return whether the same call may succeed later: no answer, or full with word of when there is room."""
    if isinstance(error, ResourceExhaustedError):
        return error.retry_after_seconds is not None
    return isinstance(error, (UnavailableError, DeadlineExceededError))


def is_missing(error: TetherError) -> bool:
    """Return whether what a call asked for cannot be had now, though the request was right."""
    return isinstance(error, (UnavailableError, DeadlineExceededError, ResourceExhaustedError, InternalError))


def as_unavailable(error: TetherError) -> TetherError:
    """Return the error; in place of CANCELLED, that the service is unavailable.

    Nobody here cancels a call and still waits for its answer: a service that stops ends its calls in this way. Left as
    it is, the run would seem to have been cancelled.
    """
    if not isinstance(error, CancelledError):
        return error
    return UnavailableError(f"the service ended the call: {error.message}")
