"""Counts and latency histograms of a load. No clock and no network in here: times come in as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from hdrh.histogram import HdrHistogram

from tether_services.bench.report import Interval, LatencySummary, Rejection

MAX_MICROSECONDS: Final = 86_400 * 1_000_000
"""Largest latency that is told from larger ones: a day."""
SIGNIFICANT_DIGITS: Final = 3
"""Percentiles are exact within 0.1 %."""
MAX_INTERVALS: Final = 300
"""Of the course over time; an interval is a second at least."""


class Latencies:
    """An HDR histogram of latencies: bounded memory whatever the number of calls."""

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1, MAX_MICROSECONDS, SIGNIFICANT_DIGITS)
        self._sum_seconds = 0.0

    def record(self, seconds: float) -> None:
        """Count one latency; below a microsecond is one, above a day is a day."""
        self._sum_seconds += seconds
        self._histogram.record_value(min(max(round(seconds * 1e6), 1), MAX_MICROSECONDS))

    def merge(self, other: Latencies) -> None:
        """Count everything that another one has counted."""
        self._sum_seconds += other._sum_seconds
        self._histogram.add(other._histogram)

    def clear(self) -> None:
        """Forget everything."""
        self._sum_seconds = 0.0
        self._histogram.reset()

    def summary(self) -> LatencySummary | None:
        """Return count, mean and percentiles; None where nothing was counted."""
        count = int(self._histogram.get_total_count())
        if not count:
            return None
        p50, p90, p95, p99, p999 = (self._histogram.get_value_at_percentile(p) / 1e6 for p in (50, 90, 95, 99, 99.9))
        longest = self._histogram.get_max_value() / 1e6
        return LatencySummary(count, self._sum_seconds / count, p50, p90, p95, p99, p999, longest)


def merged(parts: Iterable[Latencies]) -> Latencies:
    """Return the latencies of several together."""
    whole = Latencies()
    for part in parts:
        whole.merge(part)
    return whole


@dataclass(frozen=True, slots=True)
class Times:
    """When a call was due, was sent and was over, in seconds of one clock."""

    due: float
    """The intended start; that of a closed loop is when it was sent."""
    sent: float
    """The actual start."""
    done: float
    """When its answer or its error had arrived."""


@dataclass(slots=True)
class Tally:
    """What became of the calls of one caller."""

    num_offered: int = 0
    """Calls that were due."""
    num_sent: int = 0
    """Of these, sent."""
    num_delayed: int = 0
    """Of these, sent late because `concurrency` calls were in flight already."""
    num_ok: int = 0
    """Answered with a score for every item, which nothing contradicts."""
    num_wrong: int = 0
    """Answered wrongly."""
    num_unfinished: int = 0
    """Sent, and cut off by an interruption before there was an answer."""
    num_items: int = 0
    """Items of the calls that were OK."""
    num_tokens: int = 0
    """Tokens that the model read of these."""
    rejections: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Calls that failed, by code and reason."""
    ok_latency: Latencies = field(default_factory=Latencies)
    """Of answered calls, from when they were due."""
    ok_service: Latencies = field(default_factory=Latencies)
    """Of answered calls, from when they were sent."""
    rejected_latency: Latencies = field(default_factory=Latencies)
    """Of failed calls, from when they were due."""
    rejected_service: Latencies = field(default_factory=Latencies)
    """Of failed calls, from when they were sent."""
    lag: Latencies = field(default_factory=Latencies)
    """How late calls were sent that no other call held up: the generator's own doing."""

    def count_answer(self, times: Times, *, num_items: int, num_tokens: int, wrong: bool) -> None:
        """Count a call that was answered with scores."""
        self.ok_latency.record(times.done - times.due)
        self.ok_service.record(times.done - times.sent)
        if wrong:
            self.num_wrong += 1
            return
        self.num_ok += 1
        self.num_items += num_items
        self.num_tokens += num_tokens

    def count_rejection(self, times: Times, *, code: str, reason: str) -> None:
        """Count a call that was refused or failed."""
        self.rejected_latency.record(times.done - times.due)
        self.rejected_service.record(times.done - times.sent)
        self.rejections[code, reason] += 1

    @property
    def num_rejected(self) -> int:
        """Calls that failed."""
        return self.rejections.total()

    def merge(self, other: Tally) -> None:
        """Count everything that another one has counted."""
        for name in Tally.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, Latencies):
                mine.merge(theirs)
            elif isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, name, mine + theirs)

    def rejection_list(self) -> tuple[Rejection, ...]:
        """Return the kinds of failure, the most frequent first."""
        ordered = sorted(self.rejections.items(), key=lambda entry: (-entry[1], entry[0]))
        return tuple(Rejection(code, reason, count) for (code, reason), count in ordered)


class Course:
    """How a load went over time: a row per interval, by when calls were over."""

    def __init__(self, duration_seconds: float) -> None:
        self.interval_seconds = max(1.0, duration_seconds / MAX_INTERVALS)
        """Length of an interval."""
        self._rows: list[Interval] = []
        self._index = 0
        self._num_ok = 0
        self._num_rejected = 0
        self._latencies = Latencies()

    def record(self, offset: float, *, latency: float | None) -> None:
        """Count a call that was over so many seconds after the start; latency is None where it was rejected."""
        index = int(offset / self.interval_seconds)
        if index > self._index:
            self._close()
            self._index = index
        if latency is None:
            self._num_rejected += 1
            return
        self._num_ok += 1
        self._latencies.record(latency)

    def rows(self) -> tuple[Interval, ...]:
        """Return all intervals in which a call was over."""
        self._close()
        return tuple(self._rows)

    def _close(self) -> None:
        if not self._num_ok and not self._num_rejected:
            return
        start = self._index * self.interval_seconds
        self._rows.append(Interval(start, self._num_ok, self._num_rejected, self._latencies.summary()))
        self._num_ok = self._num_rejected = 0
        self._latencies.clear()
