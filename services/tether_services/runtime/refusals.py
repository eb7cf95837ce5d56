"""Calls that were refused before any work: counted by caller and reason, and written to the log for audits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter

from tether_services.runtime.limits import CallInfo
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)

MAX_CALLERS: Final = 50
"""Callers with series of their own; all others share one."""
UNKNOWN, OTHER = "unknown", "other"
"""Whoever could not be told who it is, and whoever came after MAX_CALLERS others."""
LINES_PER_SECOND: Final = 10
"""Lines in the log; a flood of refused calls must not fill the disk."""


class CallerLabels:
    """Names of callers that are safe as a label: they come from the operator, and only so many are taken."""

    def __init__(self, limit: int = MAX_CALLERS) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def of(self, name: str) -> str:
        """Return the name, or OTHER if there are too many."""
        if name in self._known or len(self._known) < self._limit:
            self._known.add(name)
            return name
        return OTHER


class Refusals:
    """Counts and writes down refused calls. Never anything that a caller sent but the method, which exists."""

    def __init__(
        self,
        service: str,
        registry: CollectorRegistry,
        labels: CallerLabels,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counter = Counter(
            f"tether_{service}_refused_calls_total",
            "Calls refused before any work, by caller and reason.",
            ["caller", "reason"],
            registry=registry,
        )
        self._labels = labels
        self._clock = clock
        self._second = float("-inf")
        self._lines = 0
        self._unwritten = 0

    def record(self, call: CallInfo, caller: str, reason: str) -> None:
        """Count a refused call.

        Args:
            call: The call.
            caller: Its caller's name; empty if it is not known who calls.
            reason: UPPER_SNAKE, of a fixed set.
        """
        self._counter.labels(self._labels.of(caller) if caller else UNKNOWN, reason).inc()
        now = self._clock()
        if now - self._second >= 1.0:
            self._second, self._lines = now, 0
        if self._lines >= LINES_PER_SECOND:
            self._unwritten += 1
            return
        self._lines += 1
        unwritten, self._unwritten = self._unwritten, 0
        fields = {"caller": caller or UNKNOWN, "method": call.method, "reason": reason, "peer": call.peer}
        log_event(log, "call refused", level=logging.WARNING, **fields, unwritten=unwritten)
