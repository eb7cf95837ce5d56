"""A full disk is waited for, as long as the settings say and no longer, and nothing else is."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tether.errors import ResourceExhaustedError, UnavailableError
from tether_services.orchestrator import storage_wait
from tether_services.orchestrator.progress import read_signs
from tether_services.orchestrator.storage_wait import wait_for_room

FULL = ResourceExhaustedError("The disk of /x is full; free some space.", reason="STORAGE_FULL")
NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/file")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_wait, "_POLL_SECONDS", 0.02)


def failing(errors: Iterator[Exception]) -> Callable[[], Awaitable[str]]:
    async def act() -> str:
        for error in errors:
            raise error
        return "written"

    return act


@pytest.mark.parametrize("error", [FULL, NO_ROOM])
def test_what_failed_for_want_of_room_is_tried_again_until_there_is_some(error: Exception) -> None:
    before = read_signs()
    assert asyncio.run(wait_for_room(failing(iter([error, error])), seconds=30)) == "written"
    assert read_signs().tries == before.tries + 2, "who waits does not hang"


@pytest.mark.parametrize("error", [FULL, NO_ROOM])
def test_the_wait_ends(error: Exception) -> None:
    started = time.monotonic()
    with pytest.raises(type(error)):
        asyncio.run(wait_for_room(failing(iter([error] * 1000)), seconds=0.2))
    assert 0.2 <= time.monotonic() - started < 5


def test_without_a_wait_the_first_error_is_the_last() -> None:
    errors = iter([FULL, FULL])
    with pytest.raises(ResourceExhaustedError):
        asyncio.run(wait_for_room(failing(errors), seconds=0))
    assert next(errors) is FULL


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("away"),
        ResourceExhaustedError("queue full", reason="QUEUE_FULL"),
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        ValueError("defect"),
    ],
)
def test_no_other_error_is_waited_for(error: Exception) -> None:
    errors = iter([error, error])
    with pytest.raises(type(error)):
        asyncio.run(wait_for_room(failing(errors), seconds=30))
    assert next(errors) is error
