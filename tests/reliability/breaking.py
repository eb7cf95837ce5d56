"""Breaks a part of a living service when it gets a signal, as a defect of it would. No code of the product takes part.

launch.py installs this where BREAK_VARIABLE names a file. With SIGUSR1 a service reads one word from that file:
"loop", "executor" or "engine" is what breaks, "heal" lets what has only been blocked go on.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import asyncio

__all__ = ["BREAK_VARIABLE", "install"]

BREAK_VARIABLE: Final = "TETHER_RELIABILITY_BREAK"
SHARED: Final = ("shared", "uvloop", "asyncio")
"""Names of the threads that an event loop gives short jobs to."""
EXECUTORS: Final = {
    "generator": SHARED,  # not the engine's
    "reward": ("reward-text",),
    "reference": ("reference-engine",),
    "orchestrator": SHARED,
}
"""Names of the threads without which the service answers no call, by service."""
_healed = threading.Event()


class ThreadEnd(BaseException):
    """Ends a thread."""


def install(role: str) -> None:
    """Be ready to break."""
    path = Path(os.environ[BREAK_VARIABLE])

    def act(number: int, frame: object) -> None:
        word = path.read_text()
        if word == "loop":
            while path.read_text() == word:  # this is the thread of the event loop
                time.sleep(0.05)
        else:
            # Not in the handler: what it has interrupted may hold the locks that are needed.
            threading.Thread(target=ACTIONS[word], args=(role,), daemon=True).start()

    signal.signal(signal.SIGUSR1, act)


def heal(role: str) -> None:
    """Let blocked threads go on."""
    _healed.set()


def block_executors(role: str) -> None:
    """Give every thread of the executors a job that waits, as a deadlock would."""
    _healed.clear()
    for executor in find_executors():
        if executor._thread_name_prefix.startswith(EXECUTORS[role]):
            for _ in range(executor._max_workers):
                executor.submit(_healed.wait)


def break_engine(role: str) -> None:
    """End what every call needs, without a word to those who wait for it."""
    BREAKERS[role]()


def kill_batcher() -> None:
    """Cancel the task that gathers batches."""
    from tether_services.runtime.batching import Batcher

    for batcher in find(Batcher):
        task: asyncio.Task[None] | None = batcher._task
        if task is not None and not task.get_loop().is_closed():
            task.get_loop().call_soon_threadsafe(task.cancel)


def kill_engine_thread() -> None:
    """End the thread that decodes; its executor takes it for alive."""
    for executor in find_executors():
        if executor._thread_name_prefix == "transformers":
            for thread in executor._threads:
                while thread.is_alive():  # a job takes the exception for its own
                    number = ctypes.c_ulong(thread.ident)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(ThreadEnd))
                    executor.submit(int)  # wakes it
                    thread.join(0.05)


def lose_ledger_lock() -> None:
    """End a thread that holds the lock of the ledger."""
    from tether_services.orchestrator.ledger_file import LedgerFile

    for file in find(LedgerFile):
        file._read_lock.acquire()


def find_executors() -> list[Any]:
    """Return the executors that take jobs."""
    return [executor for executor in find(ThreadPoolExecutor) if not executor._shutdown]


def find(kind: type[Any]) -> list[Any]:
    """Return the living objects of a class."""
    return [found for found in gc.get_objects() if type(found) is kind]


ACTIONS: Final[dict[str, Callable[[str], None]]] = {
    "heal": heal,
    "executor": block_executors,
    "engine": break_engine,
}
BREAKERS: Final[dict[str, Callable[[], None]]] = {
    "generator": kill_engine_thread,
    "reward": kill_batcher,
    "reference": kill_batcher,
    "orchestrator": lose_ledger_lock,
}
