"""Pushing an adapter: chunks, resumption, request ids, refusals."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.adapter_store import MEBIBYTE, Store, push, write_adapter
from tether import (
    AbortedError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)


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
