"""Bounds how many completions are in the service at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tether.errors import ResourceExhaustedError
from tether_services.generator.metrics import GeneratorMetrics


class Admission:
    """Counts completions from admission to answer; what does not fit is refused before any work."""

    def __init__(self, metrics: GeneratorMetrics, *, limit: int) -> None:
        self._metrics = metrics
        self._limit = limit
        self._in_flight = 0

    @contextmanager
    def admit(self, n: int) -> Iterator[None]:
        """Hold the places of n completions.

        Raises:
            ResourceExhaustedError: They do not fit; with the time after which to call again.
        """
        if self._in_flight + n > self._limit:
            self._metrics.queue.rejected.labels("queue_full").inc(n)
            raise ResourceExhaustedError(
                f"{self._in_flight} of {self._limit} completions are in flight; {n} more do not fit.",
                retry_after_seconds=1.0,
            )
        self._in_flight += n
        self._metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= n
            self._metrics.in_flight.set(self._in_flight)
