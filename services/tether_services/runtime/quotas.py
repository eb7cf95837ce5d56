"""How much each caller may use, and how many calls may be in flight: refused before any work, with the time to wait.

Limits are of this process: a service of three replicas allows three times as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter

from tether.errors import ResourceExhaustedError
from tether_services.runtime.callers import ANONYMOUS, Caller
from tether_services.runtime.refusals import CallerLabels

CONCURRENCY_RETRY_SECONDS: Final = 0.25
"""When to call again where only the end of another call makes room, which nobody can foretell."""
SLACK_SECONDS: Final = 1e-8
"""For rounding: whoever waits as long as it was told is let in."""


class Allowance:
    """An amount that grows by `rate` a second up to one second's worth. Pure: the caller says what time it is."""

    def __init__(self, rate: float, *, now: float, least_burst: float = 0.0) -> None:
        """Start full.

        Args:
            rate: Amount a second, above 0.
            now: Seconds on a monotonic clock.
            least_burst: It grows up to this even where one second's worth is less.
        """
        self.rate = rate
        self._least_burst = least_burst
        self._level = self._full
        self._at = now

    @property
    def _full(self) -> float:
        return max(self.rate, self._least_burst)

    def level(self, now: float) -> float:
        """Return what is there; below 0 if more was taken than was there."""
        return min(self._full, self._level + self.rate * max(0.0, now - self._at))

    def wait_seconds(self, amount: float, now: float) -> float:
        """Return how long to wait until so much is there; 0 if it is."""
        seconds = (amount - self.level(now)) / self.rate
        return seconds if seconds > SLACK_SECONDS else 0.0

    def take(self, amount: float, now: float) -> None:
        """Take so much, there or not."""
        self._level = self.level(now) - amount
        self._at = max(now, self._at)


@dataclass(slots=True)
class _Usage:
    """What a caller uses."""

    charged: Counter
    """Its tokens, in the metrics."""
    in_flight: int = 0
    allowances: dict[str, Allowance] = field(default_factory=dict)

    def allowance(self, kind: str, rate: float | None, *, now: float, least_burst: float) -> Allowance | None:
        """Return the allowance of that kind at that rate, which may have been changed; None if there is no limit."""
        if rate is None:
            self.allowances.pop(kind, None)
            return None
        held = self.allowances.get(kind)
        if held is None:
            held = self.allowances[kind] = Allowance(rate, now=now, least_burst=least_burst)
        elif held.rate != rate:
            held.take(0.0, now)  # what has grown so far grew at the old rate
            held.rate = rate
        return held


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a call in flight."""

    charge: Callable[[int], None]
    """Takes tokens from the allowance of its caller."""
    leave: Callable[[], None]
    """Gives the place up; to be called once."""


class Quotas:
    """Holds the places of calls in flight, and the allowances of callers by name."""

    def __init__(
        self,
        service: str,
        registry: CollectorRegistry,
        labels: CallerLabels,
        *,
        max_calls: int,
        reserved_calls: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing in flight.

        Args:
            service: Name of the service, for metrics.
            registry: Where they are.
            labels: Names of callers for them.
            max_calls: Calls in flight at most.
            reserved_calls: Those of them that only the training lane may take.
            clock: Monotonic seconds.
        """
        self._tokens = Counter(
            f"tether_{service}_caller_tokens_total", "Tokens charged, by caller.", ["caller"], registry=registry
        )
        self._tokens.labels(labels.of(ANONYMOUS.name))  # there from the start, like every series of a known name
        self._labels = labels
        self._max_calls = max_calls
        self._reserved_calls = reserved_calls
        self._clock = clock
        self._usages: dict[str, _Usage] = {}
        self.in_flight = 0
        """Calls of all callers."""

    def enter(self, caller: Caller) -> Place:
        """Return the place of a call that begins; leave it when the call ends.

        Tokens are paid afterwards, once they are known: a caller whose allowance is overdrawn is refused before its
        next request is even read.

        Raises:
            ResourceExhaustedError: TOO_MANY_CALLS, QUOTA_CONCURRENCY, QUOTA_REQUESTS or QUOTA_TOKENS, with the time
                after which to call again.
        """
        now = self._clock()
        usage = self._usage_of(caller)
        requests = usage.allowance("requests", caller.requests_per_second, now=now, least_burst=1.0)
        tokens = usage.allowance("tokens", caller.tokens_per_second, now=now, least_burst=0.0)
        self._check_places(caller, usage)
        if requests is not None:
            _check(requests.wait_seconds(1.0, now), f"{requests.rate:g} requests a second", "QUOTA_REQUESTS")
        if tokens is not None:
            _check(tokens.wait_seconds(0.0, now), f"{tokens.rate:g} tokens a second", "QUOTA_TOKENS")
        if requests is not None:
            requests.take(1.0, now)
        self._move(usage, 1)

        def charge(count: int) -> None:
            usage.charged.inc(count)
            if tokens is not None:
                tokens.take(count, self._clock())

        return Place(charge, lambda: self._move(usage, -1))

    def _usage_of(self, caller: Caller) -> _Usage:
        usage = self._usages.get(caller.name)
        if usage is None:
            charged = self._tokens.labels(self._labels.of(caller.name))
            usage = self._usages[caller.name] = _Usage(charged)
        return usage

    def _move(self, usage: _Usage, calls: int) -> None:
        self.in_flight += calls
        usage.in_flight += calls

    def _check_places(self, caller: Caller, usage: _Usage) -> None:
        most = self._max_calls - (0 if caller.lane == "training" else self._reserved_calls)
        if self.in_flight >= most:
            raise ResourceExhaustedError(
                f"{self.in_flight} calls are in flight; no more fit. Call again shortly.",
                reason="TOO_MANY_CALLS",
                retry_after_seconds=CONCURRENCY_RETRY_SECONDS,
            )
        if caller.max_concurrency is not None and usage.in_flight >= caller.max_concurrency:
            raise ResourceExhaustedError(
                f"{caller.name} may have {caller.max_concurrency} calls in flight and has. Wait for one of them.",
                reason="QUOTA_CONCURRENCY",
                retry_after_seconds=CONCURRENCY_RETRY_SECONDS,
            )


def _check(wait_seconds: float, limit: str, reason: str) -> None:
    if wait_seconds > 0:
        raise ResourceExhaustedError(
            f"The quota of {limit} is used up; call again in {wait_seconds:.3g} s.",
            reason=reason,
            retry_after_seconds=wait_seconds,
        )
