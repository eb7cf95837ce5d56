"""Uploads: in order, once, undamaged, from one stream at a time; dropped when the disk is full."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.unit.upload_inputs import begin, chunk, declare, opened
from tether.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from tether_services.generator.storage import write_at
from tether_services.generator.uploads import LEFT_SECONDS, MAX_OPEN_UPLOADS, Upload, Uploads
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME


def write(upload: Upload, data: bytes, offset: int, **changes: Any) -> None:
    asyncio.run(upload.write(chunk(data, offset, **changes)))


def content(upload: Upload) -> bytes:
    return (upload.folder / CONFIG_NAME).read_bytes() + (upload.folder / WEIGHTS_NAME).read_bytes()


def test_space_that_open_uploads_will_still_take_counts(tmp_path: Path) -> None:
    storage = opened(tmp_path, free_bytes=0, quota_bytes=100)
    uploads = Uploads(storage, expire_seconds=60)

    async def scenario() -> None:
        first = await uploads.begin(declare(1, size=56), epoch=1)
        with pytest.raises(ResourceExhaustedError):
            await uploads.begin(declare(2, size=37), epoch=1)
        await uploads.begin(declare(2, size=36), epoch=1)
        await uploads.drop(first)
        await uploads.begin(declare(3, size=56), epoch=1)

    asyncio.run(scenario())
    storage.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("function", ["write_at", "sync_file"])
def test_upload_for_which_the_disk_has_no_room_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, function: str
) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=60)

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    async def scenario() -> None:
        upload = await uploads.begin(declare(), epoch=1)
        stream, _ = await upload.open_stream()
        monkeypatch.setattr(f"tether_services.generator.uploads.{function}", full)
        with pytest.raises(ResourceExhaustedError) as caught:
            await uploads.write(upload, chunk(b"1234", 0, stream=stream))
            await uploads.sync(upload)
        assert caught.value.reason == "STORAGE_FULL"
        assert not upload.folder.exists()
        with pytest.raises(NotFoundError):
            uploads.get(upload.upload_id)
        monkeypatch.undo()
        assert (await uploads.begin(declare(), epoch=1)).received_bytes == 0

    asyncio.run(scenario())
    storage.close()


def test_bytes_land_in_their_files(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    upload = begin(storage)
    write(upload, b"con", 0)
    write(upload, b"fwei", 3)
    write(upload, b"ght", 7)
    assert (upload.folder / CONFIG_NAME).read_bytes() == b"conf"
    assert (upload.folder / WEIGHTS_NAME).read_bytes() == b"weight"
    assert asyncio.run(upload.sync()) == 10
    storage.close()


def test_bytes_of_two_streams_are_never_mixed(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    upload = begin(storage)

    async def scenario() -> list[object]:
        writes = [upload.write(chunk(data, 0)) for data in (b"aaaa", b"bbbbb")]
        return list(await asyncio.gather(*writes, return_exceptions=True))

    results = asyncio.run(scenario())
    assert results[0] is None
    assert isinstance(results[1], FailedPreconditionError) and results[1].reason == "WRONG_OFFSET"
    assert (upload.folder / CONFIG_NAME).read_bytes() == b"aaaa"
    storage.close()


def test_every_flipped_bit_of_a_chunk_is_noticed_and_nothing_of_it_is_written(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    upload = begin(storage)
    good = chunk(b"config", 0)
    for bit in range(8 * len(good.data)):
        flipped = bytearray(good.data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FailedPreconditionError) as caught:
            write(upload, bytes(flipped), 0, crc32=good.crc32)
        assert caught.value.reason == "CHUNK_DAMAGED"
    assert (upload.received_bytes, content(upload)) == (0, b"")
    write(upload, b"config", 0)
    assert content(upload) == b"config"
    storage.close()


def test_chunk_that_is_there_already_is_skipped(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    upload = begin(storage)
    write(upload, b"confwe", 0)
    write(upload, b"onf", 1)
    write(upload, b"confwe", 0)
    with pytest.raises(FailedPreconditionError) as caught:
        write(upload, b"wei", 4)  # partly there
    assert caught.value.reason == "WRONG_OFFSET"
    write(upload, b"ight", 6)
    assert content(upload) == b"confweight"
    storage.close()


def test_bytes_beyond_the_declared_size_are_refused(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    upload = begin(storage)
    with pytest.raises(InvalidArgumentError):
        write(upload, b"confweights", 0)
    assert upload.received_bytes == 0
    storage.close()


def test_a_new_stream_ends_the_one_before_and_counts_what_that_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = opened(tmp_path)
    upload = asyncio.run(Uploads(storage, expire_seconds=60).begin(declare(), epoch=1))
    disk = threading.Event()

    def slow(*arguments: Any) -> None:
        assert disk.wait(10)
        write_at(*arguments)

    monkeypatch.setattr("tether_services.generator.uploads.write_at", slow)

    async def scenario() -> None:
        first, offset = await upload.open_stream()
        assert offset == 0
        writing = asyncio.create_task(upload.write(chunk(b"conf", 0, stream=first)))
        queued = asyncio.create_task(upload.write(chunk(b"we", 4, stream=first)))
        await asyncio.sleep(0.05)
        opening = asyncio.create_task(upload.open_stream())
        await asyncio.sleep(0.05)
        assert not opening.done(), "the offset is not known before the write is over"
        disk.set()
        second, offset = await opening
        assert offset == 4
        await writing
        for late in (queued, asyncio.create_task(upload.write(chunk(b"we", 4, stream=first)))):
            with pytest.raises(AbortedError) as caught:
                await late
            assert caught.value.reason == "STREAM_REPLACED"
        await upload.write(chunk(b"weight", offset, stream=second))
        assert content(upload) == b"confweight"

    asyncio.run(scenario())
    storage.close()


def test_upload_that_is_being_committed_takes_no_bytes_and_does_not_expire(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=1e-9)

    async def scenario() -> None:
        upload = await uploads.begin(declare(), epoch=1)
        upload.committing = True
        with pytest.raises(FailedPreconditionError) as caught:
            await upload.write(chunk(b"x", 0, stream=0))
        assert caught.value.reason == "COMMITTING"
        uploads.expire()
        assert uploads.get(upload.upload_id) is upload
        upload.committing = False
        with pytest.raises(NotFoundError):
            for _ in range(3):
                uploads.get(upload.upload_id)
        await uploads.settle()
        assert not upload.folder.exists()

    asyncio.run(scenario())
    storage.close()


def test_open_uploads_are_counted_and_forgotten_ones_make_room(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=60)

    async def scenario() -> None:
        kept = [await uploads.begin(declare(version), epoch=1) for version in range(1, MAX_OPEN_UPLOADS + 1)]
        with pytest.raises(ResourceExhaustedError):
            await uploads.begin(declare(99), epoch=1)
        await uploads.drop(kept[0])
        assert (await uploads.begin(declare(99), epoch=1)).folder.is_dir()

    asyncio.run(scenario())
    storage.close()


def test_same_content_is_the_same_upload_whatever_its_request_id(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=60)

    async def scenario() -> None:
        first = await uploads.begin(declare(1, request_id="one"), epoch=1)
        assert await uploads.begin(declare(1, request_id="two"), epoch=1) is first
        with pytest.raises(InvalidArgumentError):
            await uploads.begin(declare(2, request_id="one"), epoch=1)
        replaced = await uploads.begin(declare(1, sha256="c" * 64, request_id="three"), epoch=1)
        assert replaced is not first
        assert not first.folder.exists()

    asyncio.run(scenario())
    storage.close()


def test_writer_that_was_replaced_and_commits_does_not_stop_its_successor(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=60)

    async def scenario() -> None:
        stale = await uploads.begin(declare(1), epoch=1)
        stale.committing = True
        with pytest.raises(AbortedError):
            await uploads.begin(declare(1, sha256="c" * 64), epoch=1)
        assert await uploads.begin(declare(1, sha256="c" * 64), epoch=2) is not stale
        assert stale.folder.is_dir(), "its commit goes on until the fence refuses it"
        assert await uploads.begin(declare(1), epoch=3) is stale
        assert stale.epoch == 3

    asyncio.run(scenario())
    storage.close()


def test_what_a_replaced_writer_has_begun_makes_room_for_its_successor(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=60)

    async def scenario() -> None:
        old = [await uploads.begin(declare(version), epoch=1) for version in range(1, MAX_OPEN_UPLOADS)]
        other = await uploads.begin(declare(1, run_id="run-b"), epoch=1)
        new = await uploads.begin(declare(99), epoch=2)
        assert not any(upload.folder.exists() for upload in old)
        assert other.folder.is_dir() and new.folder.is_dir()
        assert await uploads.begin(declare(100), epoch=2) is not new
        assert new.folder.is_dir(), "one writer may push several"

    asyncio.run(scenario())
    storage.close()


async def fill(uploads: Uploads, *, run_id: str = "run-a", idle_seconds: float = 0.0) -> list[Upload]:
    """Begin as many uploads as may be open, each left for a second less than the one before."""
    begun = [await uploads.begin(declare(n, run_id=run_id), epoch=2) for n in range(1, MAX_OPEN_UPLOADS + 1)]
    for number, upload in enumerate(begun):
        upload.touched = time.monotonic() - idle_seconds + number
    return begun


def test_what_nobody_sends_any_more_gives_way_to_the_next_of_its_run(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=600)

    async def scenario() -> None:
        begun = await fill(uploads, idle_seconds=LEFT_SECONDS + 2.5)
        with begun[0].streamed():
            begun[1].committing = True
            await uploads.begin(declare(100), epoch=2)
        assert [upload.folder.exists() for upload in begun[:4]] == [True, True, False, True], "the longest idle goes"
        with pytest.raises(ResourceExhaustedError) as caught:
            await uploads.begin(declare(200), epoch=2)
        assert (caught.value.reason, caught.value.retry_after_seconds) == ("TOO_MANY_UPLOADS", LEFT_SECONDS)

    asyncio.run(scenario())
    storage.close()


@pytest.mark.parametrize(
    ("run_id", "epoch", "idle_seconds"),
    [("run-a", 2, LEFT_SECONDS - 1.0), ("run-b", 2, 60.0), ("run-a", 1, 60.0)],
    ids=["just now", "another run", "a newer writer"],
)
def test_what_may_still_be_sent_does_not_give_way(tmp_path: Path, run_id: str, epoch: int, idle_seconds: float) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=600)

    async def scenario() -> None:
        begun = await fill(uploads, idle_seconds=idle_seconds)
        with pytest.raises(ResourceExhaustedError):
            await uploads.begin(declare(100, run_id=run_id), epoch=epoch)
        assert all(upload.folder.exists() for upload in begun)

    asyncio.run(scenario())
    storage.close()


def test_leftovers_give_way_for_their_bytes_as_well(tmp_path: Path) -> None:
    storage = opened(tmp_path, free_bytes=0, quota_bytes=100)
    uploads = Uploads(storage, expire_seconds=600)

    async def scenario() -> None:
        left = await uploads.begin(declare(1, size=76), epoch=1)
        left.touched -= 2 * LEFT_SECONDS
        await uploads.begin(declare(2, size=76), epoch=1)
        assert not left.folder.exists()

    asyncio.run(scenario())
    storage.close()


@pytest.mark.alone
def test_the_loop_goes_on_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing and measuring large adapters takes seconds on some disks; calls and health must not wait for that."""
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=600)
    slow = []

    def slowed(name: str) -> None:
        original = getattr(storage, name)

        def later(*arguments: Any) -> Any:
            slow.append(name)
            time.sleep(0.2)
            return original(*arguments)

        monkeypatch.setattr(storage, name, later)

    for name in ("discard", "check_space", "missing_bytes", "stage"):
        slowed(name)

    async def longest_gap(work: Coroutine[Any, Any, object]) -> float:
        task, gaps = asyncio.ensure_future(work), [0.0]
        while not task.done():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - before)
        await task
        return max(gaps)

    async def use() -> None:
        upload = await uploads.begin(declare(1), epoch=1)
        await uploads.begin(declare(1, sha256="c" * 64), epoch=1)
        await uploads.missing_bytes(declare(1))
        await uploads.drop(upload)

    assert asyncio.run(longest_gap(use())) < 0.15
    assert set(slow) == {"discard", "check_space", "missing_bytes", "stage"}
    storage.close()
