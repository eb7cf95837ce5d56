"""A rule that takes its time and gives what the fake engine would: for scenarios that need calls in flight."""

from __future__ import annotations

import time

from tether_services.reward.engines.fake import fake_text_score


def judge(prompt: str, response: str, seconds: float) -> float:
    """Return the fake engine's score, after a while."""
    time.sleep(seconds)
    return fake_text_score(prompt, response)
