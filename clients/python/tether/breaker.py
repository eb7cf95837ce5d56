"""A circuit breaker: a service that does not answer is not called again before its health says that it serves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tether.errors import DeadlineExceededError, TetherError, UnavailableError

__all__ = ["BREAKER_OPEN", "CircuitBreaker"]

T = TypeVar("T")

BREAKER_OPEN: Final = "BREAKER_OPEN"
"""Reason of the error of a call that was not made because the breaker was open."""


class CircuitBreaker:
    """Closed: calls pass. Open, after several failures in a row: they fail at once, until a probe finds the service.

    A failure is UNAVAILABLE or DEADLINE_EXCEEDED; any other answer, also an error, shows that the service works.
    """

    def __init__(
        self, probe: Callable[[], Awaitable[bool]], *, failures: int = 3, probe_seconds: float = 0.5, target: str = ""
    ) -> None:
        """Build a closed breaker.

        Args:
            probe: Tells whether the service serves again; bounded in time, raises nothing.
            failures: Failures in a row that open it.
            probe_seconds: Pause before each probe while it is open.
            target: Address of the service, for errors.
        """
        self._probe = probe
        self._failures = failures
        self._probe_seconds = probe_seconds
        self._target = target
        self._count = 0
        self._turn = 0
        self._closed = asyncio.Event()
        self._closed.set()
        self._probing: asyncio.Task[None] | None = None
        self.on_change: Callable[[bool], None] = lambda is_open: None
        """Called with whether it is open, each time that changes."""

    @property
    def is_open(self) -> bool:
        """Whether calls fail at once."""
        return not self._closed.is_set()

    async def call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a call, made only while the breaker is closed.

        Raises:
            UnavailableError: BREAKER_OPEN; the call was not made.
            TetherError: Whatever the call raised.
        """
        if self.is_open:
            message = (
                f"{self._target}: not called, as the last {self._failures} calls had no answer; its health is probed"
            )
            raise UnavailableError(message, reason=BREAKER_OPEN)
        turn = self._turn
        try:
            result = await operation()
        except (UnavailableError, DeadlineExceededError):
            self._count_failure(turn)
            raise
        except TetherError:
            self._count = 0
            raise
        self._count = 0
        return result

    async def wait_until_closed(self, timeout_seconds: float) -> bool:
        """Return whether the breaker is closed, at the latest after a time."""
        try:
            await asyncio.wait_for(self._closed.wait(), timeout_seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop probing. The breaker stays as it is."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    def _count_failure(self, turn: int) -> None:
        """Count a failure, unless it is of a call from before the last opening: that one is known already."""
        if turn != self._turn:
            return
        self._count += 1
        if self._count >= self._failures:
            self._count = 0
            self._turn += 1
            self._closed.clear()
            self.on_change(True)
            self._probing = asyncio.create_task(self._probe_until_serving())

    async def _probe_until_serving(self) -> None:
        while True:
            await asyncio.sleep(self._probe_seconds)
            if await self._probe():
                self._closed.set()
                self.on_change(False)
                return
