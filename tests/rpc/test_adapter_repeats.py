"""Calls made again because their answer was lost: the first answer comes back, and nothing happens twice."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest

from tests.rpc.adapter_files import (
    activate,
    begin_request,
    commit_request,
    delete_request,
    fake_adapter,
    fake_probe,
    list_adapters,
    push,
    push_fakes,
    rollback_request,
    upload,
)
from tests.rpc.generator_serving import Serving, refusal, serve_generator
from tests.rpc.serving import run
from tether.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError, UnavailableError
from tether.v1 import adapter_pb2
from tether_services.runtime import requests as requests_module
from tether_services.runtime.requests import RequestLedger

NOT_FOUND = grpc.StatusCode.NOT_FOUND


def activate_request(version: int, **changes: Any) -> adapter_pb2.ActivateAdapterRequest:
    fields: dict[str, Any] = {
        "request_id": str(uuid.uuid4()),
        "run_id": "run-a",
        "policy_version": version,
        "expected_run_id": "run-a",
        "epoch": 1,
    }
    return adapter_pb2.ActivateAdapterRequest(**(fields | changes))


async def active(serving: Serving) -> int:
    return (await serving.adapters.GetActiveAdapter(adapter_pb2.GetActiveAdapterRequest(), timeout=5)).policy_version


def test_an_announcement_that_had_to_wait_finds_what_was_committed_meanwhile() -> None:
    async def main() -> None:
        async with serve_generator() as serving:
            made, other = fake_adapter(1), fake_adapter(2)
            name = await upload(serving.adapters, begin_request(made, "run-a", 1), made.data)
            uploads = serving.service._parts.uploads
            async with uploads._turn:  # as while the bytes of an earlier upload are removed
                again = asyncio.ensure_future(serving.adapters.BeginPush(begin_request(made, "run-a", 1), timeout=10))
                third = asyncio.ensure_future(serving.adapters.BeginPush(begin_request(other, "run-a", 1), timeout=10))
                await asyncio.sleep(0.2)
                await serving.adapters.CommitPush(commit_request(name), timeout=10)
            begun = await again
            assert (begun.upload_id, begun.committed_offset) == (name, len(made.data))
            assert (await refusal(third)).reason == "VERSION_EXISTS"
            assert not uploads._open, "nothing is begun for them"

    run(main())


async def activate_roll_back_repeat(serving: Serving) -> int:
    """An activation whose answer is lost, an operator's rollback, and the repeat: what is active then."""
    await push_fakes(serving.adapters, "run-a", [1, 2])
    await activate(serving.adapters, "run-a", 1)
    request = activate_request(2, expected_policy_version=1)
    await serving.adapters.ActivateAdapter(request, timeout=5)
    await serving.adapters.RollbackAdapter(rollback_request("run-a", 2), timeout=5)
    await serving.adapters.ActivateAdapter(request, timeout=5)
    return await active(serving)


def outcome(scenario: Callable[[Serving], Coroutine[Any, Any, Any]]) -> Any:
    async def serve() -> Any:
        async with serve_generator() as serving:
            return await scenario(serving)

    return run(serve())


def test_a_repeated_activation_does_not_undo_a_rollback() -> None:
    assert outcome(activate_roll_back_repeat) == 1


def test_without_the_kept_answers_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act_again(self: RequestLedger, request: Any, act: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return await act()

    monkeypatch.setattr(RequestLedger, "answer", act_again)
    assert outcome(activate_roll_back_repeat) == 2


def test_a_refused_commit_is_refused_again_for_the_same_reason() -> None:
    async def scenario(serving: Serving) -> None:
        adapter = fake_adapter(2)
        announced = begin_request(adapter, "run-a", 2, probes=[fake_probe(3)])
        request = commit_request(await upload(serving.adapters, announced, adapter.data))
        first = await refusal(serving.adapters.CommitPush(request, timeout=5))
        assert first.reason == "PROOF_FAILED"
        assert await refusal(serving.adapters.CommitPush(request, timeout=5)) == first
        other = await refusal(serving.adapters.CommitPush(commit_request(request.upload_id), timeout=5))
        assert other.code == NOT_FOUND, "nothing of the upload was kept"
        assert serving.served.value("tether_adapter_push_total", result="refused") == 1
        # The version itself can still be pushed.
        await push(serving.adapters, begin_request(adapter, "run-a", 2), adapter)

    outcome(scenario)


def test_a_repeated_commit_gets_the_first_answer_also_when_the_version_is_gone() -> None:
    async def scenario(serving: Serving) -> None:
        adapter = fake_adapter(1)
        request = commit_request(await upload(serving.adapters, begin_request(adapter, "run-a", 1), adapter.data))
        first = await serving.adapters.CommitPush(request, timeout=5)
        await serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5)
        await serving.service.adapters.settle()
        assert await serving.adapters.CommitPush(request, timeout=5) == first
        assert await list_adapters(serving.adapters) == {}
        request.upload_id = "another"
        reused = await refusal(serving.adapters.CommitPush(request, timeout=5))
        assert reused.fields == ("request_id",)

    outcome(scenario)


def test_a_commit_whose_caller_left_answers_the_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(serving: Serving) -> None:
        adapter, loading, go = fake_adapter(1), asyncio.Event(), asyncio.Event()
        load = serving.service.engine.load_adapter

        async def slow(*arguments: Any) -> None:
            loading.set()
            await go.wait()
            await load(*arguments)

        monkeypatch.setattr(serving.service.engine, "load_adapter", slow)
        request = commit_request(await upload(serving.adapters, begin_request(adapter, "run-a", 1), adapter.data))
        left = asyncio.ensure_future(serving.adapters.CommitPush(request, timeout=30))
        await loading.wait()
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        repeats = [asyncio.ensure_future(serving.adapters.CommitPush(request, timeout=5)) for _ in range(3)]
        await asyncio.sleep(0.05)
        go.set()
        answers = await asyncio.gather(*repeats)
        assert answers[0] == answers[1] == answers[2]
        assert serving.served.value("tether_adapter_push_total", result="ok") == 1

    outcome(scenario)


def test_a_repeated_deletion_deletes_nothing_that_came_since() -> None:
    async def scenario(serving: Serving) -> None:
        await push_fakes(serving.adapters, "run-a", [1])
        request = delete_request("run-a", 1)
        await serving.adapters.DeleteAdapter(request, timeout=5)
        await serving.service.adapters.settle()
        await push_fakes(serving.adapters, "run-a", [1])
        await serving.adapters.DeleteAdapter(request, timeout=5)
        assert await list_adapters(serving.adapters) == {("run-a", 1): "LOADED"}
        missing = delete_request("run-a", 7)
        refused = await refusal(serving.adapters.DeleteAdapter(missing, timeout=5))
        assert refused.code == NOT_FOUND
        adapter = fake_adapter(7)
        await push(serving.adapters, begin_request(adapter, "run-a", 7), adapter)
        assert await refusal(serving.adapters.DeleteAdapter(missing, timeout=5)) == refused
        assert ("run-a", 7) in await list_adapters(serving.adapters)

    outcome(scenario)


def test_a_refused_activation_stays_refused() -> None:
    async def scenario(serving: Serving) -> None:
        await push_fakes(serving.adapters, "run-a", [1, 2])
        await activate(serving.adapters, "run-a", 1)
        request = activate_request(2, expected_policy_version=0)
        refused = await refusal(serving.adapters.ActivateAdapter(request, timeout=5))
        assert refused.code == grpc.StatusCode.ABORTED
        await activate(serving.adapters, "run-a", 0)  # now it would be as expected
        assert await refusal(serving.adapters.ActivateAdapter(request, timeout=5)) == refused
        assert await active(serving) == 0

    outcome(scenario)


def request_of(number: int) -> adapter_pb2.DeleteAdapterRequest:
    return delete_request("run-a", number, request_id=str(uuid.UUID(int=number)))


async def answered(ledger: RequestLedger, request: Any, *results: Any) -> Any:
    """What the ledger answers where acting would give these results in turn; the next result if it raised."""
    waiting = list(results)

    async def act() -> Any:
        result = waiting.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    return await ledger.answer(request, act)


def test_refusals_are_kept_and_failures_that_may_pass_are_not() -> None:
    async def scenario() -> None:
        ledger, done = RequestLedger(), adapter_pb2.DeleteAdapterResponse()
        for number, error in enumerate((ResourceExhaustedError("x"), UnavailableError("x"), RuntimeError("x"))):
            with pytest.raises(type(error)):
                await answered(ledger, request_of(number), error)
            assert await answered(ledger, request_of(number), done) is done
        with pytest.raises(FailedPreconditionError, match="first"):
            await answered(ledger, request_of(9), FailedPreconditionError("first"))
        with pytest.raises(FailedPreconditionError, match="first"):
            await answered(ledger, request_of(9), done)

    run(scenario())


def test_one_id_for_two_methods_is_two_calls_and_for_two_requests_an_error() -> None:
    async def scenario() -> None:
        ledger, done = RequestLedger(), adapter_pb2.DeleteAdapterResponse()
        deletion = request_of(1)
        await answered(ledger, deletion, done)
        other = rollback_request("run-a", 1, request_id=deletion.request_id)
        assert await answered(ledger, other, "acted") == "acted"
        for changed in (
            delete_request("run-a", 2, request_id=deletion.request_id),
            delete_request("a", 1, request_id=""),
        ):
            with pytest.raises(InvalidArgumentError) as caught:
                await answered(ledger, changed, done)
            assert caught.value.violations[0].field == "request_id"

    run(scenario())


def test_kept_answers_are_bounded_and_calls_in_progress_are_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "MAX_ANSWERS", 4)

    async def scenario() -> None:
        ledger, go = RequestLedger(), asyncio.Event()

        async def slow() -> Any:
            await go.wait()
            return "slow"

        first = asyncio.create_task(ledger.answer(request_of(0), slow))
        await asyncio.sleep(0)
        for number in range(1, 20):
            assert await answered(ledger, request_of(number), number) == number
        joined = asyncio.create_task(answered(ledger, request_of(0), "twice"))
        await asyncio.sleep(0)
        go.set()
        assert await first == await joined == "slow"
        assert await answered(ledger, request_of(19), "again") == 19
        assert await answered(ledger, request_of(1), "again") == "again", "forgotten"

    run(scenario())
