"""The trainer in a thread of its own, so that the event loop lives while tensors are worked on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from tether_services.orchestrator.progress import note_work

__all__ = ["TrainerThread"]

P = ParamSpec("P")
T = TypeVar("T")


class TrainerThread:
    """Runs functions one after another in one thread: tensor libraries keep a thread pool per calling thread."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trainer")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the function returns, without blocking the event loop."""
        result = await asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))
        note_work()
        return result

    def close(self) -> None:
        """Forget what has not begun; what has, ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
