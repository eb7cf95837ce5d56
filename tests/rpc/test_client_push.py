"""Pushing an adapter: chunks, resumption, request ids, refusals."""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
import zlib
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
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PushResult,
    ResourceExhaustedError,
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
    probes=[AdapterProbe([1, 2, 3], [-0.5, -1.5], [-0.25, -1.0])],
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
        self.rollbacks: list[adapter_pb2.RollbackAdapterRequest] = []
        self.deletions: list[adapter_pb2.DeleteAdapterRequest] = []
        self.chunk_sizes: list[int] = []
        self.stream_starts: list[int] = []
        self.data = bytearray()
        self.uploads = 1
        self.commit_failures: list[Exception] = []
        self.fail_begin: Exception | None = None
        self.chunk_failures: list[Exception | None] = []
        """What becomes of each chunk: None is taken."""
        self.stalls: list[str] = []
        """Calls that take longer than any deadline here, by name."""
        self.unavailable = 0
        """Activations, rollbacks and deletions that get no answer."""
        self.answers_as: dict[str, Any] = {}

    def add(self, server: grpc.aio.Server) -> None:
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self, server)

    async def BeginPush(self, request: adapter_pb2.BeginPushRequest, context: Any) -> adapter_pb2.BeginPushResponse:
        self.begins.append(request)
        if self.fail_begin is not None:
            raise self.fail_begin
        return adapter_pb2.BeginPushResponse(
            upload_id=f"upload-{self.uploads}",
            committed_offset=len(self.data),
            max_chunk_bytes=self.max_chunk_bytes,
            stream=len(self.begins),
        )

    def lose_upload(self) -> None:
        """As a restart does."""
        self.data.clear()
        self.uploads += 1

    async def stall(self, name: str) -> None:
        if name in self.stalls:
            self.stalls.remove(name)
            await asyncio.sleep(30)

    async def PushChunks(
        self, request_iterator: AsyncIterator[adapter_pb2.PushChunksRequest], context: Any
    ) -> adapter_pb2.PushChunksResponse:
        self.stream_starts.append(len(self.data))
        limit = self.breaks.pop(0) if self.breaks else None
        async for chunk in request_iterator:
            await self.stall("PushChunks")
            failure = self.chunk_failures.pop(0) if self.chunk_failures else None
            if failure is not None:
                if isinstance(failure, NotFoundError):
                    self.lose_upload()
                raise failure
            assert chunk.stream == len(self.begins), "chunks name the stream of the last announcement"
            assert chunk.crc32 == zlib.crc32(chunk.data)
            if chunk.offset != len(self.data) or chunk.upload_id != f"upload-{self.uploads}":
                raise FailedPreconditionError("wrong place", reason="WRONG_OFFSET")
            self.chunk_sizes.append(len(chunk.data))
            self.data += chunk.data
            if limit is not None and len(self.data) >= limit:
                raise UnavailableError("connection lost")
        return adapter_pb2.PushChunksResponse(committed_offset=len(self.data))

    async def CommitPush(self, request: adapter_pb2.CommitPushRequest, context: Any) -> adapter_pb2.CommitPushResponse:
        self.commits.append(request)
        await self.stall("CommitPush")
        if self.commit_failures:
            failure = self.commit_failures.pop(0)
            if not isinstance(failure, UnavailableError):
                self.lose_upload()
            raise failure
        sent = self.begins[-1]
        fields: dict[str, Any] = {
            "run_id": sent.run_id,
            "policy_version": sent.policy_version,
            "sha256": sent.files[1].sha256,
            "state": adapter_pb2.ADAPTER_STATE_LOADED,
            "rank": sent.rank,
            "size_bytes": len(self.data),
        }
        return adapter_pb2.CommitPushResponse(
            adapter=adapter_pb2.Adapter(**(fields | self.answers_as)),
            stages=[adapter_pb2.CommitStage(name="hash", duration_seconds=0.5)],
            mean_abs_dlogp=1e-6,
        )

    async def ActivateAdapter(
        self, request: adapter_pb2.ActivateAdapterRequest, context: Any
    ) -> adapter_pb2.ActivateAdapterResponse:
        self.activations.append(request)
        self.answer_or_not()
        if request.expected_policy_version != 2:
            raise AbortedError("Version 2 is active.")
        return adapter_pb2.ActivateAdapterResponse(policy_version=request.policy_version, previous_policy_version=2)

    async def RollbackAdapter(
        self, request: adapter_pb2.RollbackAdapterRequest, context: Any
    ) -> adapter_pb2.RollbackAdapterResponse:
        self.rollbacks.append(request)
        self.answer_or_not()
        return adapter_pb2.RollbackAdapterResponse(policy_version=request.expected_policy_version - 1)

    def answer_or_not(self) -> None:
        if self.unavailable:
            self.unavailable -= 1
            raise UnavailableError("restarting")

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
        self.answer_or_not()
        return adapter_pb2.DeleteAdapterResponse()


def write_adapter(folder: Path, size: int = 2 * MEBIBYTE + 17) -> bytes:
    """Write the two files and return their bytes in manifest order; a third file must not be sent."""
    config, weights = b'{"r": 8}', os.urandom(size)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("not part of an adapter")
    return config + weights


def with_store(store: Store, use: Callable[[AdapterClient], Awaitable[Any]], *, retries: bool = True) -> Any:
    async def run() -> Any:
        async with serving(store.add) as target, AdapterClient(target, retries=retries) as client:
            return await use(client)

    return asyncio.run(run())


def push(store: Store, folder: Path, *, retries: bool = True, **options: Any) -> PushResult:
    result = with_store(store, lambda client: client.push(folder, PUSH, **({"epoch": 4} | options)), retries=retries)
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
    assert list(begin.probes[0].logprobs) == [-0.5, -1.5]
    assert list(begin.probes[0].base_logprobs) == [-0.25, -1.0]
    assert begin.differs_from_base
    assert (begin.epoch, store.commits[0].epoch) == (4, 4)


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


def test_a_stream_that_goes_on_a_little_each_time_gets_through(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path, size=72)
    store = Store(breaks_after_bytes=tuple(range(10, 80, 10)), max_chunk_bytes=10)
    push(store, tmp_path)
    assert bytes(store.data) == expected
    assert len(store.stream_starts) == 8


def test_a_stream_that_never_gets_through_gives_up(tmp_path: Path) -> None:
    write_adapter(tmp_path, size=1000)
    store = Store()
    store.chunk_failures = [UnavailableError("connection lost")] * 50
    with pytest.raises(UnavailableError):
        push(store, tmp_path)
    assert len(store.stream_starts) == 5
    assert not store.commits


@pytest.mark.parametrize(("retries", "calls"), [(True, 5), (False, 1)])
@pytest.mark.parametrize("where", ["begin", "commit"])
def test_a_caller_that_repeats_the_push_gets_one_failure_of_one_call(
    tmp_path: Path, where: str, retries: bool, calls: int
) -> None:
    write_adapter(tmp_path)
    store = Store()
    lost = UnavailableError("no answer")
    if where == "begin":
        store.fail_begin = lost
    store.commit_failures = [lost] * 50
    with pytest.raises(UnavailableError):
        push(store, tmp_path, retries=retries)
    assert len(store.begins if where == "begin" else store.commits) == calls


def test_without_retries_pieces_go_on_while_bytes_arrive_and_a_lost_upload_begins_again(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path, size=72)
    store = Store(breaks_after_bytes=tuple(range(10, 80, 10)), max_chunk_bytes=10)
    store.commit_failures = [NotFoundError("No such upload.")]
    push(store, tmp_path, retries=False)
    assert bytes(store.data) == expected
    assert len(store.stream_starts) == 9


def test_without_retries_a_generator_that_takes_no_bytes_costs_four_calls(tmp_path: Path) -> None:
    write_adapter(tmp_path, size=1000)
    store = Store()
    store.chunk_failures = [UnavailableError("connection lost")] * 50
    with pytest.raises(UnavailableError):
        push(store, tmp_path, retries=False)
    assert (len(store.begins), len(store.stream_starts)) == (2, 2)


@pytest.mark.parametrize("reason", ["WRONG_OFFSET", "STREAM_REPLACED", "CHUNK_DAMAGED", "COMMITTING"])
def test_a_chunk_that_does_not_fit_or_is_damaged_is_sent_again(tmp_path: Path, reason: str) -> None:
    expected = write_adapter(tmp_path)
    store = Store()
    error = AbortedError if reason == "STREAM_REPLACED" else FailedPreconditionError
    store.chunk_failures = [None, error("Not this one.", reason=reason)]
    push(store, tmp_path)
    assert bytes(store.data) == expected
    assert store.stream_starts == [0, MEBIBYTE]


def test_other_refusals_of_a_chunk_end_the_push(tmp_path: Path) -> None:
    write_adapter(tmp_path, size=100)
    for error in (ResourceExhaustedError("Full.", reason="STORAGE_FULL"), AbortedError("Stale.", reason="STALE_EPOCH")):
        store = Store()
        store.chunk_failures = [error]
        with pytest.raises(type(error)) as caught:
            push(store, tmp_path)
        assert caught.value.reason == error.reason
        assert len(store.begins) == 1


def test_a_large_adapter_goes_in_pieces_with_a_deadline_each(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path, size=17 * MEBIBYTE)
    store = Store()
    progress: list[tuple[int, int]] = []
    push(store, tmp_path, on_progress=lambda sent, total: progress.append((sent, total)))
    assert bytes(store.data) == expected
    assert store.stream_starts == [0, 8 * MEBIBYTE, 16 * MEBIBYTE]
    assert progress == [(sent, len(expected)) for sent in (*store.stream_starts, len(expected))]
    assert len(store.begins) == 1


def test_a_piece_that_is_late_is_sent_again_from_where_the_server_is(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path)
    store = Store()
    store.stalls = ["PushChunks"]
    push(store, tmp_path, timeout_seconds=0.5)
    assert bytes(store.data) == expected
    assert len(store.begins) == 2


def test_an_upload_that_a_restart_has_lost_begins_again(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path)
    store = Store()
    store.chunk_failures = [None, NotFoundError("No such upload.")]
    store.commit_failures = [NotFoundError("No such upload.")]
    push(store, tmp_path)
    assert bytes(store.data) == expected
    assert store.stream_starts == [0, 0, 0]
    assert len({commit.request_id for commit in store.commits}) == 2, "another upload is another commit"


def test_a_damaged_upload_is_sent_once_more_from_the_beginning(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path)
    store = Store()
    store.commit_failures = [FailedPreconditionError("Other bytes.", reason="HASH_MISMATCH")]
    push(store, tmp_path)
    assert bytes(store.data) == expected
    assert store.stream_starts == [0, 0]
    store = Store()
    store.commit_failures = [FailedPreconditionError("Other bytes.", reason="HASH_MISMATCH")] * 3
    with pytest.raises(FailedPreconditionError) as caught:
        push(store, tmp_path)
    assert (caught.value.reason, len(store.commits)) == ("HASH_MISMATCH", 2)


def test_a_commit_is_repeated_with_its_own_request_id(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    store = Store()
    store.commit_failures = [UnavailableError("restarting")] * 2
    push(store, tmp_path)
    assert len(store.commits) == 3
    assert len({commit.request_id for commit in store.commits}) == 1
    assert store.commits[0].request_id != store.begins[0].request_id


def test_a_commit_that_takes_longer_than_a_deadline_is_asked_for_again(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    store = Store()
    store.stalls = ["CommitPush"] * 2
    push(store, tmp_path, timeout_seconds=0.5)
    assert len(store.commits) == 3 and len(store.begins) == 1
    assert len({commit.request_id for commit in store.commits}) == 1
    store.stalls = ["CommitPush"] * 9
    with pytest.raises(DeadlineExceededError):
        push(store, tmp_path, timeout_seconds=0.2)


def test_the_callers_request_id_names_the_push_and_its_commit(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    store, name = Store(), str(uuid.uuid4())
    first = push(store, tmp_path, request_id=name)
    assert push(store, tmp_path, request_id=name) == first
    assert {begin.request_id for begin in store.begins} == {name}
    assert len({commit.request_id for commit in store.commits}) == 1
    with pytest.raises(InvalidArgumentError) as caught:
        push(store, tmp_path, request_id="seven")
    assert caught.value.violations[0].field == "request_id"


def test_an_answer_about_another_adapter_is_no_success(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    wrong: list[dict[str, Any]] = [{"policy_version": 7}, {"run_id": "run-b"}, {"sha256": "ab" * 32}]
    for changes in wrong:
        store = Store()
        store.answers_as = changes
        with pytest.raises(InternalError, match="in its place"):
            push(store, tmp_path)


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
    store.commit_failures = [FailedPreconditionError("Probes differ by 2 nats.", reason="PROBE_MISMATCH")]
    with pytest.raises(FailedPreconditionError, match="2 nats"):
        push(store, tmp_path)
    assert len(store.commits) == 1


def test_an_activation_is_repeated_with_its_request_id_and_returns_the_version_before() -> None:
    store = Store()
    store.unavailable = 1

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


def test_a_rollback_is_repeated_with_its_request_id_and_returns_the_version_in_use() -> None:
    store = Store()
    store.unavailable = 2
    assert with_store(store, lambda client: client.rollback("run-a", expected_policy_version=3, epoch=6)) == 2
    assert len(store.rollbacks) == 3
    assert len({request.request_id for request in store.rollbacks}) == 1
    assert store.rollbacks[0].epoch == 6


def test_a_deletion_is_repeated_with_its_request_id() -> None:
    store = Store()
    store.unavailable = 2
    with_store(store, lambda client: client.delete("run-a", 1, epoch=6))
    assert len(store.deletions) == 3
    assert len({request.request_id for request in store.deletions}) == 1
    assert store.deletions[0].epoch == 6


def test_the_callers_request_id_names_activations_rollbacks_and_deletions() -> None:
    store, name = Store(), str(uuid.uuid4())

    async def use(client: AdapterClient) -> None:
        await client.activate(
            "run-a", 3, expected_run_id="run-a", expected_policy_version=2, epoch=1, request_id=name.upper()
        )
        await client.rollback("run-a", expected_policy_version=3, epoch=1, request_id=name)
        await client.delete("run-a", 1, epoch=1, request_id=name)
        with pytest.raises(InvalidArgumentError):
            await client.delete("run-a", 1, epoch=1, request_id="x")

    with_store(store, use)
    sent = (store.activations[0].request_id, store.rollbacks[0].request_id, store.deletions[0].request_id)
    assert sent == (name, name, name)
