"""Pushing an adapter: chunks, resumption, request ids, refusals."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.scripted_server import serving
from tether import (
    AbortedError,
    AdapterClient,
    AdapterProbe,
    AdapterPush,
    FailedPreconditionError,
    InvalidArgumentError,
    PushResult,
    UnavailableError,
)
from tether.v1 import adapter_pb2, adapter_pb2_grpc

MEBIBYTE = 1024 * 1024
PUSH = AdapterPush(
    run_id="run-a",
    policy_version=3,
    base_model_sha256="ab" * 32,
    rank=8,
    target_modules=["q_proj", "v_proj"],
    probes=[AdapterProbe([1, 2, 3], [-0.5, -1.5])],
    differs_from_base=True,
)


class Store(adapter_pb2_grpc.AdapterServiceServicer):
    """Keeps one upload in memory; streams break as scripted."""

    def __init__(self, *, breaks_after_bytes: tuple[int, ...] = (), max_chunk_bytes: int = MEBIBYTE) -> None:
        self.breaks = list(breaks_after_bytes)
        self.max_chunk_bytes = max_chunk_bytes
        self.begins: list[adapter_pb2.BeginPushRequest] = []
        self.commits: list[adapter_pb2.CommitPushRequest] = []
        self.activations: list[adapter_pb2.ActivateAdapterRequest] = []
        self.deletions: list[adapter_pb2.DeleteAdapterRequest] = []
        self.chunk_sizes: list[int] = []
        self.stream_starts: list[int] = []
        self.data = bytearray()
        self.fail_commit: Exception | None = None
        self.fail_begin: Exception | None = None
        self.unavailable_commits = 0
        self.unavailable_activations = 0

    def add(self, server: grpc.aio.Server) -> None:
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self, server)

    async def BeginPush(self, request: adapter_pb2.BeginPushRequest, context: Any) -> adapter_pb2.BeginPushResponse:
        self.begins.append(request)
        if self.fail_begin is not None:
            raise self.fail_begin
        return adapter_pb2.BeginPushResponse(
            upload_id="upload-1", committed_offset=len(self.data), max_chunk_bytes=self.max_chunk_bytes
        )

    async def PushChunks(
        self, request_iterator: AsyncIterator[adapter_pb2.PushChunksRequest], context: Any
    ) -> adapter_pb2.PushChunksResponse:
        self.stream_starts.append(len(self.data))
        limit = self.breaks.pop(0) if self.breaks else None
        async for chunk in request_iterator:
            if chunk.offset != len(self.data) or chunk.upload_id != "upload-1":
                raise FailedPreconditionError("wrong place", reason="WRONG_OFFSET")
            self.chunk_sizes.append(len(chunk.data))
            self.data += chunk.data
            if limit is not None and len(self.data) >= limit:
                raise UnavailableError("connection lost")
        return adapter_pb2.PushChunksResponse(committed_offset=len(self.data))

    async def CommitPush(self, request: adapter_pb2.CommitPushRequest, context: Any) -> adapter_pb2.CommitPushResponse:
        self.commits.append(request)
        if self.unavailable_commits:
            self.unavailable_commits -= 1
            raise UnavailableError("restarting")
        if self.fail_commit is not None:
            raise self.fail_commit
        sent = self.begins[-1]
        return adapter_pb2.CommitPushResponse(
            adapter=adapter_pb2.Adapter(
                run_id=sent.run_id,
                policy_version=sent.policy_version,
                sha256=sent.files[1].sha256,
                state=adapter_pb2.ADAPTER_STATE_LOADED,
                rank=sent.rank,
                size_bytes=len(self.data),
            ),
            stages=[adapter_pb2.CommitStage(name="hash", duration_seconds=0.5)],
            mean_abs_dlogp=1e-6,
        )

    async def ActivateAdapter(
        self, request: adapter_pb2.ActivateAdapterRequest, context: Any
    ) -> adapter_pb2.ActivateAdapterResponse:
        self.activations.append(request)
        if self.unavailable_activations:
            self.unavailable_activations -= 1
            raise UnavailableError("restarting")
        if request.expected_policy_version != 2:
            raise AbortedError("Version 2 is active.")
        return adapter_pb2.ActivateAdapterResponse(policy_version=request.policy_version, previous_policy_version=2)

    async def RollbackAdapter(
        self, request: adapter_pb2.RollbackAdapterRequest, context: Any
    ) -> adapter_pb2.RollbackAdapterResponse:
        return adapter_pb2.RollbackAdapterResponse(policy_version=request.expected_policy_version - 1)

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Any
    ) -> adapter_pb2.ListAdaptersResponse:
        """Three pages of one adapter each."""
        version = int(request.page_token or "1")
        adapter = adapter_pb2.Adapter(run_id="run-a", policy_version=version, state=adapter_pb2.ADAPTER_STATE_RETIRING)
        return adapter_pb2.ListAdaptersResponse(
            adapters=[adapter], next_page_token=str(version + 1) if version < 3 else ""
        )

    async def GetActiveAdapter(
        self, request: adapter_pb2.GetActiveAdapterRequest, context: Any
    ) -> adapter_pb2.GetActiveAdapterResponse:
        return adapter_pb2.GetActiveAdapterResponse(run_id="run-a", policy_version=0)

    async def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: Any
    ) -> adapter_pb2.DeleteAdapterResponse:
        self.deletions.append(request)
        raise UnavailableError("restarting")


def write_adapter(folder: Path, size: int = 2 * MEBIBYTE + 17) -> bytes:
    """Write the two files and return their bytes in manifest order; a third file must not be sent."""
    config, weights = b'{"r": 8}', os.urandom(size)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("not part of an adapter")
    return config + weights


def with_store(store: Store, use: Callable[[AdapterClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with serving(store.add) as target, AdapterClient(target) as client:
            return await use(client)

    return asyncio.run(run())


def push(store: Store, folder: Path) -> PushResult:
    result = with_store(store, lambda client: client.push(folder, PUSH))
    assert isinstance(result, PushResult)
    return result


def test_all_bytes_arrive_in_manifest_order_in_chunks_of_at_most_a_mebibyte(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path)
    store = Store()
    result = push(store, tmp_path)
    assert bytes(store.data) == expected
    assert max(store.chunk_sizes) <= MEBIBYTE and len(store.chunk_sizes) == 3
    assert result.adapter.state == "loaded"
    assert result.adapter.policy_version == 3
    assert result.stages[0].name == "hash"
    assert result.mean_abs_dlogp == 1e-6


def test_the_declaration_holds_sizes_and_hashes_of_exactly_the_two_files(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    store = Store()
    push(store, tmp_path)
    (begin,) = store.begins
    assert [file.name for file in begin.files] == ["adapter_config.json", "adapter_model.safetensors"]
    for file in begin.files:
        content = (tmp_path / file.name).read_bytes()
        assert file.size_bytes == len(content)
        assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert list(begin.target_modules) == ["q_proj", "v_proj"]
    assert list(begin.probes[0].token_ids) == [1, 2, 3]
    assert begin.differs_from_base


def test_smaller_chunks_are_sent_where_the_server_asks_for_them(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path, size=1000)
    store = Store(max_chunk_bytes=300)
    push(store, tmp_path)
    assert bytes(store.data) == expected
    assert max(store.chunk_sizes) == 300


def test_a_broken_stream_goes_on_from_where_the_server_is(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path)
    store = Store(breaks_after_bytes=(MEBIBYTE, 2 * MEBIBYTE))
    push(store, tmp_path)
    assert bytes(store.data) == expected
    assert store.stream_starts == [0, MEBIBYTE, 2 * MEBIBYTE]
    assert len({begin.request_id for begin in store.begins}) == 1
    assert len(store.begins) == 3


def test_a_stream_that_breaks_after_its_last_byte_is_not_sent_again(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path)
    store = Store(breaks_after_bytes=(len(expected),))
    push(store, tmp_path)
    assert bytes(store.data) == expected
    assert store.stream_starts == [0]


def test_a_stream_that_never_gets_through_gives_up(tmp_path: Path) -> None:
    write_adapter(tmp_path, size=1000)
    store = Store(breaks_after_bytes=(1,) * 50, max_chunk_bytes=10)
    with pytest.raises(UnavailableError):
        push(store, tmp_path)
    assert len(store.stream_starts) == 5
    assert not store.commits


def test_a_commit_is_repeated_with_its_own_request_id(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    store = Store()
    store.unavailable_commits = 2
    push(store, tmp_path)
    assert len(store.commits) == 3
    assert len({commit.request_id for commit in store.commits}) == 1
    assert store.commits[0].request_id != store.begins[0].request_id


def test_two_pushes_have_two_request_ids(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    first, second = Store(), Store()
    push(first, tmp_path)
    push(second, tmp_path)
    assert first.begins[0].request_id != second.begins[0].request_id


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named_before_anything_is_sent(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / name).unlink()
    store = Store()
    with pytest.raises(InvalidArgumentError, match=name):
        push(store, tmp_path)
    assert not store.begins


def test_a_refused_declaration_sends_no_bytes(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    store = Store()
    store.fail_begin = FailedPreconditionError("The base differs.", reason="WRONG_BASE_MODEL")
    with pytest.raises(FailedPreconditionError) as caught:
        push(store, tmp_path)
    assert caught.value.reason == "WRONG_BASE_MODEL"
    assert not store.chunk_sizes and not store.commits


def test_a_refused_commit_is_not_repeated(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    store = Store()
    store.fail_commit = FailedPreconditionError("Probes differ by 2 nats.", reason="PROBE_MISMATCH")
    with pytest.raises(FailedPreconditionError, match="2 nats"):
        push(store, tmp_path)
    assert len(store.commits) == 1


def test_an_activation_is_repeated_with_its_request_id_and_returns_the_version_before() -> None:
    store = Store()
    store.unavailable_activations = 1

    async def use(client: AdapterClient) -> int:
        return await client.activate("run-a", 3, expected_run_id="run-a", expected_policy_version=2, epoch=1)

    assert with_store(store, use) == 2
    assert len(store.activations) == 2
    assert len({request.request_id for request in store.activations}) == 1
    assert store.activations[0].epoch == 1


def test_a_lost_compare_and_set_is_raised_at_once() -> None:
    store = Store()

    async def use(client: AdapterClient) -> None:
        with pytest.raises(AbortedError):
            await client.activate("run-a", 3, expected_run_id="run-a", expected_policy_version=1, epoch=1)

    with_store(store, use)
    assert len(store.activations) == 1


def test_lists_follow_their_pages_to_the_end() -> None:
    adapters = with_store(Store(), lambda client: client.list_adapters())
    assert [adapter.policy_version for adapter in adapters] == [1, 2, 3]
    assert adapters[0].state == "retiring"


def test_the_base_model_is_an_active_version_without_adapter() -> None:
    active = with_store(Store(), lambda client: client.get_active_adapter())
    assert (active.run_id, active.policy_version, active.adapter) == ("run-a", 0, None)


def test_a_rollback_returns_the_version_in_use() -> None:
    assert with_store(Store(), lambda client: client.rollback("run-a", expected_policy_version=3)) == 2


def test_a_deletion_is_not_repeated_because_its_repeat_would_be_not_found() -> None:
    store = Store()
    with pytest.raises(UnavailableError):
        with_store(store, lambda client: client.delete("run-a", 1))
    assert len(store.deletions) == 1
