"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["Schedule", "learning_rate_factor"]

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate_factor(
    step: int, *, kind: Schedule, total_steps: int, warmup_steps: int = 0, minimum: float = 0.0
) -> float:
    """Return what the learning rate is multiplied with at a step: a rise from 0, then constant or a fall to `minimum`.

    Below `warmup_steps` it is step / warmup_steps. From there to `total_steps`, with p going from 0 to 1: `linear` is
    1 - (1 - minimum) * p, `cosine` minimum + (1 - minimum) * (1 + cos(pi * p)) / 2; `constant` is 1.

    Args:
        step: Optimiser steps taken so far, 0 or more.
        kind: The shape.
        total_steps: Where the fall ends; at least 1.
        warmup_steps: Length of the rise, 0 or more, below `total_steps`.
        minimum: Factor at the end and after, 0 to 1.

    Raises:
        ValueError: `kind` is unknown.

    Source: D27; Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5 for the cosine.
    """
    if kind not in ("linear", "cosine", "constant"):
        raise ValueError(f"kind must be linear, cosine or constant, got {kind!r}")
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "linear":
        return 1.0 - (1.0 - minimum) * progress
    if kind == "cosine":
        return minimum + (1.0 - minimum) * (1.0 + math.cos(math.pi * progress)) / 2.0
    return 1.0
