"""Ready rules for rewards that can be verified; the configuration names them "tether_services.reward.rules:NAME".

A rule is any function (prompt: str, response: str, **arguments) -> float. One that raises gives the item an error,
never a score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

__all__ = ["exact_answer", "length_band", "valid_json"]


def length_band(prompt: str, response: str, *, low: int, high: int) -> float:
    """Return 1 if the response has `low` to `high` words, else less, falling to 0 at no words or at twice `high`."""
    if not 0 < low <= high:
        raise ValueError(f"low and high must satisfy 0 < low <= high, got {low}, {high}")
    words = len(response.split())
    if words < low:
        return words / low
    return max(0.0, 1.0 - max(0, words - high) / high)


def valid_json(prompt: str, response: str) -> float:
    """Return 1 if the response is one JSON document, else 0."""
    try:
        json.loads(response)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def exact_answer(prompt: str, response: str, *, answers: Mapping[str, str], marker: str = "") -> float:
    """Return 1 if the response gives the prompt's known answer, else 0; spaces at the ends do not count.

    Args:
        prompt: A key of `answers`, spaces at its ends aside.
        response: What is judged.
        answers: The right answer of each prompt.
        marker: Where it is not empty, only what follows its last occurrence counts, for example "####".

    Raises:
        KeyError: No answer is known for the prompt.
    """
    expected = answers[prompt.strip()]
    if marker and marker not in response:
        return 0.0
    given = response.rpartition(marker)[2] if marker else response
    return float(given.strip() == expected.strip())
