"""What a load shows in the end: plain values, also as a document for machines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

REPORT_VERSION: Final = 1
"""Of the document; a field that goes or changes its meaning raises it."""


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Latencies in seconds, exact within 0.1 %."""

    count: int
    """Calls."""
    mean_seconds: float
    """Arithmetic mean."""
    p50_seconds: float
    """Half of the calls took at most this."""
    p90_seconds: float
    """90 % of them."""
    p95_seconds: float
    """95 % of them."""
    p99_seconds: float
    """99 % of them."""
    p999_seconds: float
    """99.9 % of them."""
    max_seconds: float
    """All of them."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Calls that failed in the same way."""

    code: str
    """gRPC status code."""
    reason: str
    """Reason of the error, or the code again where it has none."""
    count: int
    """Calls."""


@dataclass(frozen=True, slots=True)
class CallerReport:
    """What became of the calls of one caller, or of all together."""

    name: str
    """Of the caller; "total" for all."""
    loop: str
    """"open": calls were due at fixed times. "closed": each waited for the one before: hides queueing. "mixed"."""
    rate: float
    """Calls per second that were due; 0 in a closed loop."""
    num_offered: int
    """Calls that were due = sent + unsent."""
    num_sent: int
    """Sent = ok + wrong + rejected + unfinished."""
    num_delayed: int
    """Sent late, as `concurrency` calls of the caller were in flight when they were due."""
    num_unsent: int
    """Due and never sent: still waiting when the run ended. No latency counts them."""
    num_unfinished: int
    """Cut off by an interruption. No latency counts them."""
    num_ok: int
    """Answered with a score for every item."""
    num_wrong: int
    """Answered with a score that is wrong."""
    num_rejected: int
    """Refused or failed, as a whole or in one item."""
    rejections: tuple[Rejection, ...]
    """The same by code and reason, the most frequent first."""
    goodput: float
    """OK calls per second of the whole run."""
    item_goodput: float
    """Items of OK calls per second."""
    token_goodput: float
    """Tokens that the model read for OK calls per second."""
    share: float
    """Part of all OK calls, in [0, 1]."""
    ok_latency: LatencySummary | None
    """Of answered calls from when they were due; None without any."""
    ok_service_time: LatencySummary | None
    """Of answered calls from when they were sent: hides how long they waited to be."""
    rejected_latency: LatencySummary | None
    """Of rejected calls from when they were due."""
    rejected_service_time: LatencySummary | None
    """Of rejected calls from when they were sent."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A stretch of the run."""

    start_seconds: float
    """Where it begins, from the start of the run."""
    num_ok: int
    """Calls answered in it, wrong ones with them."""
    num_rejected: int
    """Calls rejected in it."""
    ok_latency: LatencySummary | None
    """Of the answered ones from when they were due."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """How answers were checked."""

    num_by_oracle: int
    """Scores compared with the oracle of the fake engine."""
    num_by_repeat: int
    """Scores compared with an earlier one of the same item."""
    num_unforeseen: int
    """Scores that could only be seen to be finite: no oracle, and the item was new."""
    examples: tuple[str, ...]
    """What was wrong with the first wrong answers."""


@dataclass(frozen=True, slots=True)
class GeneratorReport:
    """Whether the generator itself kept up."""

    lag: LatencySummary | None
    """How late calls were sent that no other call of the caller held up; None in a closed loop."""
    cpu_share: float
    """Processor seconds of this process per second; near 1 it cannot send or read faster."""
    num_repeated_items: int
    """Items sent that had been sent before."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load showed."""

    target: str
    """The service that was loaded."""
    model: str
    """Reward model that scored; empty if no call was answered."""
    engine: str
    """Its engine as the service lists it; empty if that is not known."""
    arrivals: str
    """"constant" or "poisson"."""
    seed: int
    """Of the plan."""
    concurrency: int
    """Calls of one caller in flight at most."""
    duration_seconds: float
    """How long calls were due, as planned."""
    elapsed_seconds: float
    """From the first arrival to the end of the last call; unless ended early, the planned duration at least."""
    interrupted: bool
    """Whether it was ended early by the user."""
    capped: bool
    """Whether it was ended early by `max_calls`."""
    total: CallerReport
    """All callers together."""
    callers: tuple[CallerReport, ...]
    """Each one."""
    course: tuple[Interval, ...]
    """How it went over time, by when calls were over."""
    checks: CheckReport
    """How answers were checked."""
    generator: GeneratorReport
    """Whether the generator kept up."""
    warnings: tuple[str, ...]
    """What to know before the figures are believed."""

    @property
    def passed(self) -> bool:
        """Whether there were answers and none was wrong."""
        return self.total.num_ok > 0 and self.total.num_wrong == 0

    def document(self) -> dict[str, Any]:
        """Return the report for a JSON document."""
        return {"report_version": REPORT_VERSION, "passed": self.passed, **dataclasses.asdict(self)}
