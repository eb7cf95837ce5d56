"""Calls with an effect: tried several times under one request id, so that nothing is done twice."""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import UUID, uuid4

from tether.errors import InvalidArgumentError

__all__ = ["ATTEMPTS", "pause_after", "read_request_id"]

ATTEMPTS: Final = 5
"""Times something is tried, in all, before it is given up."""


async def pause_after(failures: int) -> None:
    """Wait before the next attempt, longer with each failure."""
    await asyncio.sleep(0.1 * 2**failures)


def read_request_id(given: str) -> str:
    """Return the caller's UUID in its canonical form, or a new one.

    Raises:
        InvalidArgumentError: It is none.
    """
    try:
        return str(UUID(given) if given else uuid4())
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidArgumentError(f"{given!r} is not a UUID.", field="request_id") from error
