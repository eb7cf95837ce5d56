"""From the scores of responses to one prompt to their ranking and preferences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tether_services.reward.models import Judgement, Refusal

MIN_RESPONSES, MAX_RESPONSES = 2, 16
"""Responses that Compare ranks."""


def expect_judgement(outcome: Judgement | Refusal, *, index: int) -> Judgement:
    """Return the judgement of response `index` of a comparison.

    Raises:
        TetherError: It was refused; names the field of the comparison.
    """
    if isinstance(outcome, Judgement):
        return outcome
    inner = outcome.error.violations[0].field if outcome.error.violations else "response"
    place = f"responses[{index}]" if inner == "response" else inner
    raise type(outcome.error)(outcome.error.message, reason=outcome.error.reason, field=place)


def rank(scores: Sequence[float]) -> list[int]:
    """Return the places of the scores, best first; equal ones keep their order."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def preference(first: float, second: float) -> float:
    """Return the Bradley-Terry probability that the first is preferred: sigmoid(first - second)."""
    difference = first - second
    if difference >= 0:
        return 1.0 / (1.0 + math.exp(-difference))
    odds = math.exp(difference)  # the other form would overflow for a large negative difference
    return odds / (1.0 + odds)
