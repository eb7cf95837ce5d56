"""Bounds how many completions are in the service at once, and how many of them are one caller's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tether.errors import ResourceExhaustedError
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.runtime.callers import Caller, current_caller
from tether_services.runtime.room import DrainRate, Room, Shortage


class Admission:
    """Counts completions from admission to answer; what does not fit is refused before any work."""

    def __init__(self, metrics: GeneratorMetrics, *, limit: int, caller_share: float) -> None:
        self._metrics = metrics
        self._room = Room(limit=limit, caller_share=caller_share)
        self._drain = DrainRate()
        self._in_flight = 0
        self._drained = 0.0
        """When a completion has last gone, or the first one has come."""

    @contextmanager
    def admit(self, n: int) -> Iterator[None]:
        """Hold the places of n completions of the current caller.

        Raises:
            ResourceExhaustedError: They do not fit; with the time after which to call again.
        """
        caller = current_caller()
        shortage = self._room.shortage(caller, n)
        if shortage is not None:
            raise self._refuse(caller, n, shortage)
        if not self._in_flight:
            self._drained = time.monotonic()
        self._room.take(caller, n)
        self._change(n)
        try:
            yield
        finally:
            now = time.monotonic()
            self._drain.observe(num_items=n, seconds=now - self._drained)
            self._drained = now
            self._room.give_back(caller, n)
            self._change(-n)

    def _refuse(self, caller: Caller, n: int, shortage: Shortage) -> ResourceExhaustedError:
        self._metrics.queue.rejected.labels(shortage.reason).inc(n)
        self._metrics.queue.count_items(caller.name, "rejected", n)
        whose = "of this caller " if shortage.reason == "caller_full" else ""
        return ResourceExhaustedError(
            f"{shortage.held} completions {whose}are in flight and {shortage.limit} may be; {n} more do not fit. "
            "Call again after the time given.",
            retry_after_seconds=self._drain.seconds_until(shortage.excess, share=1.0),
        )

    def _change(self, difference: int) -> None:
        self._in_flight += difference
        self._metrics.in_flight.set(self._in_flight)
