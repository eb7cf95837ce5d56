"""The trainer in a thread of its own, so that the event loop lives while tensors are worked on."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tether_services.orchestrator.progress import note_work
from tether_services.runtime.work_thread import WorkThread

__all__ = ["TrainerThread"]

P = ParamSpec("P")
T = TypeVar("T")


class TrainerThread:
    """Runs functions one after another in one thread: tensor libraries keep a thread pool per calling thread."""

    def __init__(self) -> None:
        self._thread = WorkThread("trainer")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the function returns, without blocking the event loop."""
        result = await self._thread.run(lambda: function(*args, **kwargs))
        note_work()
        return result

    def close(self) -> None:
        """Forget what has not begun; what has, ends by itself."""
        self._thread.abandon()
