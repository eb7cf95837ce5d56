"""Ctrl-C at a chosen moment."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ctrl_c_when(is_time: Callable[[], bool]) -> Iterator[None]:
    """Send Ctrl-C to this thread once `is_time` says so."""

    def wait() -> None:
        while not is_time():
            time.sleep(0.002)
        _thread.interrupt_main()

    watcher = threading.Thread(target=wait, daemon=True)
    watcher.start()
    yield
    watcher.join(60)
