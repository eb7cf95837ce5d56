"""How long several overlapping calls took together."""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["Span"]


@dataclass(slots=True)
class Span:
    """From the start of the first of several overlapping calls to the end of the last, on the monotonic clock."""

    first_start: float | None = None
    last_end: float | None = None

    def start(self) -> None:
        """A call begins."""
        if self.first_start is None:
            self.first_start = time.monotonic()

    def end(self) -> None:
        """A call has ended."""
        self.last_end = time.monotonic()

    @property
    def seconds(self) -> float:
        """Length of the span; 0 if no call has ended."""
        if self.first_start is None or self.last_end is None:
            return 0.0
        return self.last_end - self.first_start
