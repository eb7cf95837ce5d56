"""The time that a call has, on a clock that does not jump.

gRPC for Python sets deadlines by the time of day and reads them by the same a moment later. If that jumps in between,
the call ends at once, or has so much time that the service refuses it, although nothing is late.
"""

from __future__ import annotations

import time
from typing import Final

import grpc
import grpc.aio

from tether.status import reason_of

__all__ = ["Deadline"]

JUMP_SECONDS: Final = 0.1
"""A clock that is merely set right moves by less."""


class Deadline:
    """When a call is late."""

    def __init__(self, seconds: float) -> None:
        """Begin to count.

        Args:
            seconds: Time that the call has.
        """
        self._end = time.monotonic() + seconds
        self._ahead = _time_of_day_ahead()

    @property
    def left(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(self._end - time.monotonic(), 0.0)

    def was_misread(self, error: grpc.aio.AioRpcError) -> bool:
        """Return whether an error is due to a jump of the time of day since the beginning, and there is time left."""
        jump, left = _time_of_day_ahead() - self._ahead, self.left
        if left == 0 or -JUMP_SECONDS <= jump < left:
            return False
        if jump < 0:
            return reason_of(error) == "DEADLINE_TOO_LONG"
        return reason_of(error) is None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def _time_of_day_ahead() -> float:
    return time.time() - time.monotonic()
