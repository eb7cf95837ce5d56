"""What files hold, read again whenever they change; the last good content stays while they are broken."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from prometheus_client import Gauge

from tether.errors import InvalidArgumentError
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")
Signature = tuple[tuple[int, int, int, int] | None, ...]
SETTLED_NS: Final = 100_000_000
"""A file that changed less than this ago may change again without a trace: clocks of file systems tick slowly."""


class Reloaded(Generic[ValueT]):
    """The value that some files hold together. May be refreshed from any thread; `value` never blocks."""

    def __init__(
        self, name: str, paths: Sequence[Path], load: Callable[[], ValueT], *, stale: Gauge | None = None
    ) -> None:
        """Read the files for the first time.

        Args:
            name: What they are called in logs and metrics.
            paths: The files.
            load: Reads them; raises InvalidArgumentError if they are broken.
            stale: Set to 1 while a change could not be read.

        Raises:
            InvalidArgumentError: They are broken from the start.
        """
        self._name = name
        self._paths = tuple(paths)
        self._load = load
        self._stale = stale.labels(name) if stale is not None else None
        self._lock = threading.Lock()
        self._seen: Signature | None = self._sign()
        self._complaint = ""
        self.value: ValueT = load()
        """The last good one."""

    def refresh(self) -> ValueT:
        """Return the value, after reading the files again if they have changed."""
        with self._lock:
            signature = self._sign()
            if signature is None or signature != self._seen:
                self._reload()
                self._seen = signature  # as it was before reading: what changed meanwhile is read next time
            return self.value

    def _reload(self) -> None:
        try:
            value = self._load()
        except InvalidArgumentError as error:
            self._complain(error.message)
            return
        except Exception as error:  # whatever is wrong with the files, the last good content stays
            self._complain(type(error).__name__)
            return
        if value != self.value:  # else the same object stays, for those who ask whether it changed
            self.value = value
            log_event(log, "credentials reloaded", file=self._name)
        self._complain("")

    def _complain(self, complaint: str) -> None:
        if complaint and complaint != self._complaint:
            log_event(
                log,
                "credentials not reloaded",
                level=logging.ERROR,
                file=self._name,
                error=complaint,
                kept="the last good",
            )
        self._complaint = complaint
        if self._stale is not None:
            self._stale.set(1 if complaint else 0)

    def _sign(self) -> Signature | None:
        """Return what changes when a file does; None while that cannot be told yet."""
        states = [_stat(path) for path in self._paths]
        newest = max((state.st_mtime_ns for state in states if state is not None), default=0)
        if abs(time.time_ns() - newest) < SETTLED_NS:
            return None
        return tuple(state and (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
