"""What a step does on a full disk: it waits for room for a while before it fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from tether.errors import ResourceExhaustedError, TetherError
from tether_services.orchestrator.progress import note_try
from tether_services.runtime.durable import as_storage_error
from tether_services.runtime.logging import log_event

__all__ = ["STORAGE_FULL", "wait_for_room"]

log = logging.getLogger(__name__)

STORAGE_FULL = "STORAGE_FULL"
"""Reason of the error of a full disk, here or at a service."""
_POLL_SECONDS = 1.0

T = TypeVar("T")


async def wait_for_room(act: Callable[[], Awaitable[T]], *, seconds: float) -> T:
    """Return what `act` returns, tried again each second while a disk is full.

    Args:
        act: Leaves nothing half-done when it fails.
        seconds: How long to wait at most; 0: not at all.

    Raises:
        TetherError: Of the last try; STORAGE_FULL names the disk and the way out.
    """
    until: float | None = None
    while True:
        try:
            return await act()
        except (ResourceExhaustedError, OSError) as error:
            full = _as_full(error)
            if full is None:
                raise
            if until is None:
                until = time.monotonic() + seconds
                log_event(log, "waiting for room", level=logging.WARNING, seconds=seconds, error=full.message)
            if time.monotonic() >= until:
                raise
        note_try()
        await asyncio.sleep(_POLL_SECONDS)


def _as_full(error: ResourceExhaustedError | OSError) -> TetherError | None:
    """Return the error if a full disk is its cause; None for any other."""
    if isinstance(error, OSError):
        named = as_storage_error(error, Path(error.filename or "the run's folder"))
        return named if named is not None and named.reason == STORAGE_FULL else None
    return error if error.reason == STORAGE_FULL else None
