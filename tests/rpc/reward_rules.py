"""Rules that misbehave, for the configuration of a test's reward service."""

from __future__ import annotations

import math
import threading
from typing import Final

GATE = threading.Event()
"""Set: `wait_for_gate` returns."""
GATED_MODEL: Final = {
    "name": "gate",
    "components": [{"name": "gate", "engine": "rules", "function": "tests.rpc.reward_rules:wait_for_gate"}],
}
"""Settings of a model that judges nothing before the gate is open."""


def number(prompt: str, response: str) -> float:
    """Return the response read as a number; "nan" and "inf" are numbers too."""
    return float(response)


def wait_for_gate(prompt: str, response: str) -> float:
    """Return 1 once the gate is open."""
    GATE.wait(30)
    return 1.0


def overflow(prompt: str, response: str) -> float:
    """Raise OverflowError."""
    return math.exp(1e6)
