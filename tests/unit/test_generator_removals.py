"""Callers that leave while they wait for removed bytes: the removal goes on, and so do the others that wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.upload_inputs import declare, opened
from tether_services.generator.storage import AdapterStorage
from tether_services.generator.uploads import Upload, Uploads


def hold_removals(storage: AdapterStorage, patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let no removal begin on the disk until the returned function is called."""
    disk, discard = threading.Event(), storage.discard

    def held(upload_id: str) -> None:
        assert disk.wait(10)
        discard(upload_id)

    patch.setattr(storage, "discard", held)
    return disk.set


async def leave(task: asyncio.Task[Any]) -> None:
    """Have a caller begin to wait, then cancel it."""
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("others", [False, True], ids=["alone", "with another removal"])
def test_one_who_waits_for_a_removal_is_not_cancelled_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=600)
    release = hold_removals(storage, monkeypatch)

    async def commit(upload: Upload) -> str:
        try:
            return "committed"
        finally:
            await uploads.drop(upload)

    async def scenario() -> None:
        upload = await uploads.begin(declare(1), epoch=1)
        more = await uploads.begin(declare(2), epoch=1)
        committing = asyncio.create_task(commit(upload))
        await asyncio.sleep(0.05)
        if others:
            uploads.forget(more)
        await leave(asyncio.create_task(uploads.begin(declare(1, run_id="run-b"), epoch=1)))
        assert not committing.done()
        release()
        assert await committing == "committed"
        assert [upload.folder.exists(), more.folder.exists()] == [False, not others]

    asyncio.run(scenario())
    storage.close()


def test_a_removal_that_no_thread_has_taken_up_yet_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=600)

    async def scenario() -> None:
        old = await uploads.begin(declare(1), epoch=1)
        waiting = asyncio.Event()

        async def thread_of_a_busy_pool(work: Callable[..., Any], *arguments: Any) -> Any:
            await waiting.wait()
            return work(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("tether_services.generator.uploads.asyncio.to_thread", thread_of_a_busy_pool)
            await leave(asyncio.create_task(uploads.begin(declare(1, sha256="c" * 64), epoch=1)))
            waiting.set()
            await uploads.settle()
        assert not old.folder.exists()

    asyncio.run(scenario())
    storage.close()
