"""When calls are due. Fixed before the first one is sent: no answer, however late, moves an arrival."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal


def arrival_offsets(
    rate: float, *, duration_seconds: float, arrivals: Literal["constant", "poisson"], seed: str, phase: float = 0.0
) -> Iterator[float]:
    """Yield the seconds from the start at which calls are due, ascending and below the duration.

    constant: (k + phase) / rate for k = 0, 1, ...; computed from k, so that no error adds up.
    poisson: sums of exponential gaps of mean 1 / rate.

    Args:
        rate: Calls per second, above 0.
        duration_seconds: No call is due at or after it.
        arrivals: Which of the two.
        seed: Of the gaps of poisson.
        phase: Of constant, in [0, 1): keeps callers of the same rate from calling at the same instant.
    """
    if arrivals == "constant":
        yield from _constant(rate, duration_seconds, phase)
        return
    gaps = random.Random(seed)
    offset = gaps.expovariate(rate)
    while offset < duration_seconds:
        yield offset
        offset += gaps.expovariate(rate)


def _constant(rate: float, duration_seconds: float, phase: float) -> Iterator[float]:
    index = 0
    while (offset := (index + phase) / rate) < duration_seconds:
        yield offset
        index += 1
