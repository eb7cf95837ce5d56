"""Whether the thread of an engine gets on, however long its job takes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, Final

__all__ = ["ThreadClock"]

POLL_SECONDS: Final = 0.05
BUSY_SECONDS: Final = 0.2
"""A thread that has computed for this long since somebody began to wait is at work, not stuck."""


class ThreadClock:
    """Steps and CPU time of the one thread of an executor. Where the platform tells no time, that stands still."""

    def __init__(self) -> None:
        self._clock: int | None = None
        self._ticks = 0

    def attach(self) -> None:
        """Follow the calling thread: the initializer of the executor."""
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def tick(self) -> None:
        """The thread has taken a step."""
        self._ticks += 1

    def seconds(self) -> float:
        """Return the CPU time of the thread so far; 0 if it is not known.

        Raises:
            OSError: The thread has ended.
        """
        return 0.0 if self._clock is None else time.clock_gettime(self._clock)

    async def wait_for_life(self, request: Coroutine[Any, Any, object]) -> None:
        """Return when a request to the thread is answered, or earlier if the thread is seen to get on meanwhile.

        A thread that waits for a lock, for ever, does neither; a long forward pass does the second.

        Raises:
            Exception: Whatever the request raised.
            OSError: The thread has ended.
        """
        answer = asyncio.ensure_future(request)
        try:
            started, ticks = self.seconds(), self._ticks
            while not answer.done() and self._ticks == ticks and self.seconds() - started < BUSY_SECONDS:
                await asyncio.wait({answer}, timeout=POLL_SECONDS)
            if answer.done():
                answer.result()
        finally:
            answer.cancel()
