"""Whether the threads of an executor get on, however long their jobs take."""

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
    """Steps and CPU time of the threads of an executor. Where the platform tells no time, that stands still."""

    def __init__(self) -> None:
        self._clocks: list[int] = []
        self._ticks = 0

    def attach(self) -> None:
        """Follow the calling thread: the initializer of the executor."""
        if hasattr(time, "pthread_getcpuclockid"):
            self._clocks.append(time.pthread_getcpuclockid(threading.get_ident()))

    def tick(self) -> None:
        """A thread has taken a step."""
        self._ticks += 1

    def seconds(self) -> float:
        """Return the CPU time of the threads so far; 0 if it is not known.

        Raises:
            OSError: A thread has ended.
        """
        return sum(map(time.clock_gettime, self._clocks))

    async def wait_for_life(self, request: Coroutine[Any, Any, object]) -> None:
        """Return when a request to the threads is answered, or earlier if they are seen to get on meanwhile.

        A thread that waits for a lock, for ever, does neither; a long forward pass does the second.

        Raises:
            Exception: Whatever the request raised.
            OSError: A thread has ended.
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
