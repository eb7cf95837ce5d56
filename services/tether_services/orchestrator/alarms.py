"""Alarms: figures of a step that say that the policy went wrong."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tether_services.orchestrator.config import AlarmConfig

__all__ = ["ALARMS", "RECENT_STEPS", "Alarm", "RollbackDueError", "find_alarm"]

ALARMS = ("kl_max", "entropy_min", "score_drop", "mismatch_max")
"""By their settings."""
RECENT_STEPS = 10
"""Steps that a score is compared with, at most."""
_FEWEST_STEPS = 3
"""Of these, at least: the scores of one or two steps say nothing of what is usual."""


class RollbackDueError(Exception):
    """The run is to be rolled back as the ledger says, and this worker must stop."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """What was found."""

    name: str
    """Of ALARMS."""
    text: str
    """The figure and its limit, in words."""

    def __str__(self) -> str:
        return f"alarm {self.name}: {self.text}"


def find_alarm(limits: AlarmConfig, recent: Sequence[Mapping[str, float]], now: Mapping[str, float]) -> Alarm | None:
    """Return the first alarm that a step raises; None if it raises none.

    A figure that is not a number, or absent, is beyond every limit.

    Args:
        limits: The alarms that are set.
        recent: Figures of the committed steps before it, oldest first; only the last ones are looked at.
        now: Figures of the step, by the names of `step_metrics.STEP_METRICS`.
    """
    found = (
        _find_above(limits, "kl_max", now, "kl_per_sequence"),
        _find_low_entropy(limits, now),
        _find_score_drop(limits, recent[-RECENT_STEPS:], now),
        _find_above(limits, "mismatch_max", now, "mean_abs_dlogp"),
    )
    return next((alarm for alarm in found if alarm is not None), None)


def _find_above(limits: AlarmConfig, name: str, now: Mapping[str, float], figure: str) -> Alarm | None:
    limit: float | None = getattr(limits, name)
    value = now.get(figure, float("nan"))
    if limit is None or value <= limit:
        return None
    return Alarm(name, f"{figure} is {value:.4g}, above {limit:g}")


def _find_low_entropy(limits: AlarmConfig, now: Mapping[str, float]) -> Alarm | None:
    limit, value = limits.entropy_min, now.get("entropy", float("nan"))
    if limit is None or value >= limit:
        return None
    return Alarm("entropy_min", f"entropy is {value:.4g}, below {limit:g}")


def _find_score_drop(
    limits: AlarmConfig, recent: Sequence[Mapping[str, float]], now: Mapping[str, float]
) -> Alarm | None:
    """Compare the mean score with that of recent steps, in standard deviations of the scores within a step.

    These are the usual ones, or that of the step itself where it is larger: where scores hardly vary, as of a reward at
    its maximum, every other score would raise an alarm.
    """
    if limits.score_drop is None or len(recent) < _FEWEST_STEPS:
        return None
    usual = statistics.fmean(step["score_mean"] for step in recent)
    deviation = max(statistics.fmean(step["score_std"] for step in recent), now.get("score_std", 0.0))
    value = now.get("score_mean", float("nan"))
    if value >= usual - limits.score_drop * deviation:
        return None
    text = f"score_mean is {value:.4g}, more than {limits.score_drop:g} standard deviations ({deviation:.4g} each)"
    return Alarm("score_drop", f"{text} below {usual:.4g}, the mean of the last {len(recent)} steps")
