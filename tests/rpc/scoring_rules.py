"""Rules for the reward service of a test."""

from __future__ import annotations


def refuse_some(prompt: str, response: str) -> float:
    """Return 1, or fail where the response begins with a digit or a capital letter."""
    if response[:1].isdigit() or response[:1].isupper():
        raise ValueError("this one cannot be scored")
    return 1.0
