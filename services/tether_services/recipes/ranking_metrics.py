"""How well scores agree with rankings, beside the baseline that knows only lengths: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Agreement",
    "Bin",
    "Evaluation",
    "Judged",
    "Pairs",
    "Quartile",
    "calibration_error",
    "evaluate_rankings",
    "measure_agreement",
    "measure_by_size",
    "measure_quartiles",
    "pairs_of",
    "reliability_bins",
    "top_share",
    "win_share",
]

Numbers = npt.NDArray[np.float64]
NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Judged:
    """One ranking and the scores that a model gave to its answers."""

    scores: Numbers
    """[K]."""
    levels: Numbers
    """[K], higher is better; equal levels are a tie."""
    lengths: Numbers
    """[K] characters."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """All pairs without a tie, the better answer first.

    Example: scores (2, 1, 1), levels (1, 0, 0), lengths (5, 9, 2) become leads (1, 1), length_leads (-4, 3) and
    num_tied 1.
    """

    leads: Numbers
    """[P] score of the better answer minus that of the worse one."""
    length_leads: Numbers
    """[P] characters of the better answer minus those of the worse one."""
    num_tied: int
    """Pairs left out because their levels are equal."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares in [0, 1] over some rankings; equal scores and equal lengths count half."""

    num_rankings: int
    num_pairs: int
    """Without ties."""
    accuracy: float
    """Share of pairs whose better answer has the higher score."""
    longer_wins: float
    """Share of pairs whose better answer is the longer one."""
    length_baseline: float
    """What always taking the longer, or always the shorter, would reach."""
    top1: float
    """Share of rankings whose highest score is on a best answer."""
    longest_top1: float
    """Share of rankings whose longest answer is a best one."""


@dataclass(frozen=True, slots=True)
class Quartile:
    """Pairs whose lengths differ by a like amount."""

    low: float
    """Smallest difference in characters."""
    high: float
    """Largest one."""
    num_pairs: int
    accuracy: float
    longer_wins: float
    length_baseline: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions of a like probability."""

    low: float
    high: float
    num_predictions: int
    probability: float
    """Mean of what was predicted; 0 in an empty bin."""
    preferred: float
    """Share that people preferred; 0 in an empty bin."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores against rankings that were not trained on."""

    overall: Agreement
    prompt_accuracy: float
    """Mean over rankings of the accuracy within each: every prompt counts once."""
    num_tied: int
    """Pairs left out because their levels are equal."""
    by_size: dict[int, Agreement]
    """By K, the number of answers."""
    quartiles: tuple[Quartile, ...]
    """By difference in length, the smallest first."""
    bins: tuple[Bin, ...]
    """Reliability of sigmoid(score difference)."""
    calibration_error: float
    """Expected calibration error over the bins."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON spells them, rounded to six digits."""
        content: dict[str, Any] = _rounded(asdict(self))
        return content


def evaluate_rankings(judged: Sequence[Judged]) -> Evaluation:
    """Return all figures of some rankings.

    Raises:
        ValueError: A ranking has only ties, or there is none.
    """
    pairs = pairs_of(judged)
    bins = reliability_bins(pairs.leads)
    return Evaluation(
        overall=measure_agreement(judged),
        prompt_accuracy=float(np.mean([win_share(pairs_of([item]).leads) for item in judged])),
        num_tied=pairs.num_tied,
        by_size=measure_by_size(judged),
        quartiles=measure_quartiles(pairs),
        bins=bins,
        calibration_error=calibration_error(bins),
    )


def pairs_of(judged: Sequence[Judged]) -> Pairs:
    """Return the non-tied pairs of all rankings; pairs are formed within a ranking only."""
    leads, length_leads, num_tied = [np.empty(0)], [np.empty(0)], 0
    for item in judged:
        better, worse = np.nonzero(item.levels[:, None] > item.levels[None, :])
        leads.append(item.scores[better] - item.scores[worse])
        length_leads.append(item.lengths[better] - item.lengths[worse])
        num_tied += len(item.levels) * (len(item.levels) - 1) // 2 - len(better)
    return Pairs(np.concatenate(leads), np.concatenate(length_leads), num_tied)


def win_share(leads: Numbers) -> float:
    """Return the share of leads above 0; a lead of 0 counts half.

    Raises:
        ValueError: There is no lead.
    """
    if not len(leads):
        raise ValueError("a share of no pairs is undefined")
    return float(np.mean((leads > 0) + 0.5 * (leads == 0)))


def top_share(judged: Sequence[Judged], values: Sequence[Numbers]) -> float:
    """Return the share of rankings whose highest value is on a best answer; equal highest values share.

    Args:
        judged: The rankings.
        values: [K] of each ranking, for example the scores or the lengths.
    """
    shares = []
    for item, value in zip(judged, values, strict=True):
        is_best = item.levels == item.levels.max()
        shares.append(is_best[value == value.max()].mean())
    return float(np.mean(shares))


def measure_agreement(judged: Sequence[Judged]) -> Agreement:
    """Return accuracy and baselines of some rankings.

    Raises:
        ValueError: They have no pair without a tie.
    """
    pairs = pairs_of(judged)
    longer = win_share(pairs.length_leads)
    return Agreement(
        num_rankings=len(judged),
        num_pairs=len(pairs.leads),
        accuracy=win_share(pairs.leads),
        longer_wins=longer,
        length_baseline=max(longer, 1.0 - longer),
        top1=top_share(judged, [item.scores for item in judged]),
        longest_top1=top_share(judged, [item.lengths for item in judged]),
    )


def measure_by_size(judged: Sequence[Judged]) -> dict[int, Agreement]:
    """Return accuracy and baselines by the number of answers, the smallest first."""
    sizes = sorted({len(item.levels) for item in judged})
    return {size: measure_agreement([item for item in judged if len(item.levels) == size]) for size in sizes}


def measure_quartiles(pairs: Pairs) -> tuple[Quartile, ...]:
    """Return accuracy and baselines by absolute difference in length.

    The bounds are quartiles of the differences; pairs of an equal difference stay together, so that parts differ in
    size, and a part may be missing.
    """
    differences = np.abs(pairs.length_leads)
    bounds = np.quantile(differences, (0.25, 0.5, 0.75))
    places = np.searchsorted(bounds, differences, side="left")
    parts = []
    for place in range(4):
        kept = places == place
        if kept.any():
            longer = win_share(pairs.length_leads[kept])
            parts.append(
                Quartile(
                    low=float(differences[kept].min()),
                    high=float(differences[kept].max()),
                    num_pairs=int(kept.sum()),
                    accuracy=win_share(pairs.leads[kept]),
                    longer_wins=longer,
                    length_baseline=max(longer, 1.0 - longer),
                )
            )
    return tuple(parts)


def reliability_bins(leads: Numbers, *, num_bins: int = NUM_BINS) -> tuple[Bin, ...]:
    """Return predicted against observed preference in bins of equal width over [0, 1].

    Each pair is two predictions: sigmoid(lead) for the answer that people preferred and 1 - sigmoid(lead) for the
    other one, so that the figures do not depend on which answer is named first.

    Args:
        leads: [P] score of the better answer minus that of the worse one, on the scale of the training loss.
        num_bins: At least 1.
    """
    probability = 0.5 * (1.0 + np.tanh(0.5 * leads))  # the sigmoid, without overflow
    predicted = np.concatenate([probability, 1.0 - probability])
    preferred = np.concatenate([np.ones(len(leads)), np.zeros(len(leads))])
    places = np.minimum((predicted * num_bins).astype(np.int64), num_bins - 1)
    bins = []
    for place in range(num_bins):
        kept = places == place
        means = (float(predicted[kept].mean()), float(preferred[kept].mean())) if kept.any() else (0.0, 0.0)
        bins.append(Bin(place / num_bins, (place + 1) / num_bins, int(kept.sum()), *means))
    return tuple(bins)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error: the mean over predictions of |preferred - probability| of their bin."""
    total = sum(item.num_predictions for item in bins)
    return sum(item.num_predictions * abs(item.preferred - item.probability) for item in bins) / total


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value
