"""Uploads and commits of adapters over a loopback channel: repeats, resumption, bounds and what is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tests.rpc.adapter_files import (
    activate,
    begin_request,
    chunk,
    chunks,
    commit,
    commit_request,
    fake_adapter,
    push,
    push_fakes,
    upload,
)
from tests.rpc.generator_serving import refusal, serve_generator, settings
from tests.rpc.serving import run
from tether.v1 import adapter_pb2

ABORTED, NOT_FOUND = grpc.StatusCode.ABORTED, grpc.StatusCode.NOT_FOUND
FAILED, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT


def test_repeated_begin_returns_the_same_upload_and_its_offset() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            adapter = fake_adapter(1)
            request = begin_request(adapter, "run-a", 1)
            first = await serving.adapters.BeginPush(request, timeout=5)
            assert (first.committed_offset, first.max_chunk_bytes) == (0, 1024 * 1024)
            await serving.adapters.PushChunks(chunks(first, adapter.data[:100]), timeout=5)
            second = await serving.adapters.BeginPush(request, timeout=5)
            assert (second.upload_id, second.committed_offset) == (first.upload_id, 100)
            other = begin_request(adapter, "run-a", 1)
            assert (await serving.adapters.BeginPush(other, timeout=5)).upload_id == first.upload_id
            request.policy_version = 2
            reused = await refusal(serving.adapters.BeginPush(request, timeout=5))
            assert (reused.code, reused.fields) == (INVALID, ("request_id",))

    run(scenario())


def test_upload_resumes_in_small_chunks_across_the_file_boundary() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            adapter = fake_adapter(1)
            begun = await serving.adapters.BeginPush(begin_request(adapter, "run-a", 1), timeout=5)
            half = len(adapter.data) // 2
            sent = await serving.adapters.PushChunks(chunks(begun, adapter.data[:half], size=97), timeout=5)
            assert sent.committed_offset == half
            rest = chunks(begun, adapter.data, offset=half, size=131)
            assert (await serving.adapters.PushChunks(rest, timeout=5)).committed_offset == len(adapter.data)
            assert (await commit(serving.adapters, begun.upload_id)).adapter.sha256 == adapter.sha256

    run(scenario())


def test_chunk_at_another_offset_or_beyond_the_end_is_refused_and_the_upload_survives() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            adapter = fake_adapter(1)
            begun = await serving.adapters.BeginPush(begin_request(adapter, "run-a", 1), timeout=5)
            ahead = await refusal(serving.adapters.PushChunks(chunks(begun, adapter.data, offset=10), timeout=5))
            assert (ahead.code, ahead.reason) == (FAILED, "WRONG_OFFSET")
            longer = await refusal(serving.adapters.PushChunks(chunks(begun, adapter.data + b"x"), timeout=5))
            assert (longer.code, longer.fields) == (INVALID, ("data",))
            early = await refusal(commit(serving.adapters, begun.upload_id))
            assert (early.code, early.reason) == (FAILED, "UPLOAD_INCOMPLETE")
            await serving.adapters.PushChunks(chunks(begun, adapter.data), timeout=5)
            assert (await commit(serving.adapters, begun.upload_id)).adapter.policy_version == 1

    run(scenario())


def test_stream_whose_upload_was_replaced_is_told_so_when_it_ends() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            adapter = fake_adapter(1)
            begun = await serving.adapters.BeginPush(begin_request(adapter, "run-a", 1), timeout=5)
            replaced = asyncio.Event()

            async def stream() -> Any:
                yield chunk(begun, adapter.data[:10])
                await replaced.wait()

            pushing = asyncio.create_task(refusal(serving.adapters.PushChunks(stream(), timeout=10)))
            while not any(path.stat().st_size for path in serving.stored_files()):
                await asyncio.sleep(0.01)
            await serving.adapters.BeginPush(begin_request(fake_adapter(2), "run-a", 1), timeout=5)
            replaced.set()
            ended = await pushing
            assert (ended.code, ended.fields) == (NOT_FOUND, ("upload_id",))

    run(scenario())


def test_malformed_streams_name_the_field() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            begun = await serving.adapters.BeginPush(begin_request(fake_adapter(1), "run-a", 1), timeout=5)

            async def stream(*requests: adapter_pb2.PushChunksRequest) -> Any:
                for request in requests:
                    yield request

            empty = await refusal(serving.adapters.PushChunks(stream(), timeout=5))
            no_data = await refusal(serving.adapters.PushChunks(stream(chunk(begun, b"")), timeout=5))
            unknown = await refusal(
                serving.adapters.PushChunks(stream(chunk(begun, b"x", upload_id="../../x")), timeout=5)
            )
            mixed = await refusal(
                serving.adapters.PushChunks(
                    stream(chunk(begun, b"x"), chunk(begun, b"x", upload_id="y", offset=1)), timeout=5
                )
            )
            big = chunk(begun, b"x" * (1024 * 1024 + 1), offset=1)
            oversize = await refusal(serving.adapters.PushChunks(stream(big), timeout=5))
            assert [(r.code, r.fields) for r in (empty, no_data, unknown, mixed, oversize)] == [
                (INVALID, ("upload_id",)),
                (INVALID, ("data",)),
                (NOT_FOUND, ("upload_id",)),
                (INVALID, ("upload_id",)),
                (INVALID, ("data",)),
            ]

    run(scenario())


def test_repeated_commit_returns_the_first_result_also_at_the_same_time() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            adapter = fake_adapter(1)
            upload_id = await upload(serving.adapters, begin_request(adapter, "run-a", 1), adapter.data)
            first, second = await asyncio.gather(
                commit(serving.adapters, upload_id), commit(serving.adapters, upload_id)
            )
            assert first == second == await commit(serving.adapters, upload_id)
            assert serving.served.value("tether_adapter_push_total", result="ok") == 1
            again = await serving.adapters.BeginPush(begin_request(adapter, "run-a", 1), timeout=5)
            assert (again.upload_id, again.committed_offset) == (upload_id, len(adapter.data))

    run(scenario())


def test_other_content_for_a_stored_version_is_refused() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            refused = await refusal(serving.adapters.BeginPush(begin_request(fake_adapter(2), "run-a", 1), timeout=5))
            assert (refused.code, refused.reason) == (FAILED, "VERSION_EXISTS")
            other_run = await serving.adapters.BeginPush(begin_request(fake_adapter(2), "run-b", 1), timeout=5)
            assert other_run.upload_id

    run(scenario())


def test_newer_upload_of_a_version_replaces_an_unfinished_one() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            old, new = fake_adapter(1), fake_adapter(2)
            begun = await serving.adapters.BeginPush(begin_request(old, "run-a", 1), timeout=5)
            await push(serving.adapters, begin_request(new, "run-a", 1), new)
            late = await refusal(serving.adapters.PushChunks(chunks(begun, old.data), timeout=5))
            assert late.code == NOT_FOUND
            assert len(serving.stored_files()) == 2

    run(scenario())


def test_abandoned_upload_expires_and_leaves_nothing() -> None:
    async def scenario() -> None:
        async with serve_generator(settings(adapters={"upload_seconds": 0.05})) as serving:
            adapter = fake_adapter(1)
            begun = await serving.adapters.BeginPush(begin_request(adapter, "run-a", 1), timeout=5)
            await asyncio.sleep(0.1)
            late = await refusal(serving.adapters.PushChunks(chunks(begun, adapter.data), timeout=5))
            assert late.code == NOT_FOUND
            await serving.service._parts.uploads.settle()
            assert serving.stored_files() == []

    run(scenario())


def test_number_of_open_uploads_is_bounded() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            for version in range(1, 9):
                await serving.adapters.BeginPush(begin_request(fake_adapter(version), "run-a", version), timeout=5)
            refused = await refusal(serving.adapters.BeginPush(begin_request(fake_adapter(9), "run-a", 9), timeout=5))
            assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_UPLOADS")
            assert refused.retry_after_seconds

    run(scenario())


def test_commit_goes_on_when_its_caller_leaves() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            adapter = fake_adapter(1)
            upload_id = await upload(serving.adapters, begin_request(adapter, "run-a", 1), adapter.data)
            call = serving.adapters.CommitPush(commit_request(upload_id), timeout=30)
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert (await commit(serving.adapters, upload_id)).adapter.policy_version == 1

    run(scenario())


def test_temporary_store_is_removed_at_exit() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            temporary = serving.service.storage.folder
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
        assert not temporary.exists()

    run(scenario())
