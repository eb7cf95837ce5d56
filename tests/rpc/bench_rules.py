"""Reward functions of tests of the load generator."""

from __future__ import annotations

import itertools

_calls = itertools.count()


def length(prompt: str, response: str) -> float:
    """Return the same for the same item."""
    return float(len(response))


def drift(prompt: str, response: str) -> float:
    """Return something else every time."""
    return float(next(_calls))
