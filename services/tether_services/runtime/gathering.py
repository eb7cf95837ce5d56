"""Waiting for several results."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

ResultT = TypeVar("ResultT")


async def gather_in_order(work: Sequence[Awaitable[ResultT]]) -> list[ResultT]:
    """Return all results in order, as `asyncio.gather`; a single one is awaited without a task and a turn of the loop.

    Raises:
        Exception: The first that one of them raised; the others go on.
    """
    if len(work) == 1:
        return [await work[0]]
    return list(await asyncio.gather(*work))
