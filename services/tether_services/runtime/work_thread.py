"""A thread beside the event loop, for work that would hold it: tensors, tokenizers, functions of users."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tether_services.runtime.thread_clock import ThreadClock

__all__ = ["WorkThread"]

ResultT = TypeVar("ResultT")


class WorkThread:
    """Runs functions one after another, always in the same thread, and tells whether that gets on."""

    def __init__(self, name: str) -> None:
        self._clock = ThreadClock()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=self._clock.attach)

    async def run(self, function: Callable[..., ResultT], *arguments: object) -> ResultT:
        """Return what the function gives, once those before it have ended."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def tick(self) -> None:
        """A function that runs has taken a step."""
        self._clock.tick()

    async def wait_for_life(self, request: Coroutine[Any, Any, object]) -> None:
        """Return when a request to the thread is answered or the thread gets on; see `ThreadClock.wait_for_life`."""
        await self._clock.wait_for_life(request)

    async def close(self) -> None:
        """Let what has begun end, and forget the rest."""
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)

    def abandon(self) -> None:
        """Forget what has not begun, and wait for nothing: what runs may hang."""
        self._executor.shutdown(wait=False, cancel_futures=True)
