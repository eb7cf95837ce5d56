"""Scoring any number of items where not all goes well: pushback, bad items, failed calls, one version."""

from __future__ import annotations

import itertools
from typing import Any

import grpc
import pytest

from tests.rpc.many_items import Rewards, collect, fake_service, numbered, run
from tests.rpc.scripted_reward import fail_first
from tether import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    RewardClient,
    ScoreItem,
)
from tether.v1 import reward_pb2


def test_a_full_service_is_waited_for() -> None:
    full = ResourceExhaustedError("The queue is full.", retry_after_seconds=0.05)
    servicer = Rewards(fail_first(3, full))
    delivered, error = collect(servicer, numbered(100))
    assert error is None and len(delivered) == 100 and servicer.calls == 13


def test_an_item_that_cannot_be_scored_ends_nothing() -> None:
    """Neither one that the service refuses nor one that cannot even be sent; both are named by their place."""
    bad = {70: ScoreItem("p", ""), 75: ScoreItem("p", "r", prompt_token_ids=[2**40])}

    async def scenario() -> None:
        async with fake_service() as served, RewardClient(served.target) as client:
            items = [bad.get(index, ScoreItem("p", "r")) for index in range(200)]
            scored = [each async for each in client.score_many(items)]
            assert [each.index for each in scored if each.score.error] == sorted(bad)
            assert scored[70].version == scored[0].version, "the service has judged it"
            assert scored[75].model == scored[75].version == "", "nobody has"
            for index in bad:
                error = scored[index].score.error
                assert isinstance(error, InvalidArgumentError)
                assert error.violations[0].field.startswith(f"items[{index}]")

    run(scenario())


def test_an_item_that_is_too_large_for_the_service_is_refused_alone() -> None:
    async def scenario() -> None:
        async with fake_service(max_text_chars=50_000_000) as served, RewardClient(served.target) as client:
            items = [ScoreItem("p", "x" * 9_000_000 if index == 3 else "r") for index in range(6)]
            scored = [each async for each in client.score_many(items)]
            assert [each.index for each in scored if each.score.error] == [3]
            assert isinstance(scored[3].score.error, ResourceExhaustedError)

    run(scenario())


def test_a_call_that_fails_for_one_of_its_items_is_divided_until_it_is_known_which() -> None:
    class Picky(Rewards):
        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
            if any(item.response == "bad" for item in request.items):
                self.calls += 1
                raise InvalidArgumentError("One of them is bad.", field="items", reason="ODD")
            return await super().Score(request, context)

    servicer = Picky()
    items = [ScoreItem("p", "bad" if index == 13 else "good") for index in range(30)]
    delivered, error = collect(servicer, items)
    assert error is None and [each.index for each in delivered if each.score.error] == [13]
    refused = delivered[13].score.error
    assert refused is not None and refused.reason == "ODD" and refused.violations[0].field == "items[13]"
    assert servicer.calls <= 3 + 2 * 4


def test_a_call_that_fails_for_another_reason_says_how_many_items_were_delivered() -> None:
    async def behaviour(call: int) -> None:
        if call == 4:
            raise InternalError("Broken.", reason="ODD")

    delivered, error = collect(Rewards(behaviour), numbered(100))
    assert [each.index for each in delivered] == list(range(30))
    assert isinstance(error, InternalError) and error.reason == "ODD"
    assert "30 items were scored and delivered before" in error.message


def test_an_overload_that_a_proxy_tells_is_no_fault_of_the_items() -> None:
    """Envoy answers 429 with this code and no details."""

    class Proxied(Rewards):
        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> Any:
            self.calls += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too Many Requests")

    servicer = Proxied()
    delivered, error = collect(servicer, numbered(100))
    assert not delivered and isinstance(error, ResourceExhaustedError) and servicer.calls == 1


def test_an_answer_about_another_number_of_items_is_not_used() -> None:
    class Short(Rewards):
        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
            response = await super().Score(request, context)
            del response.scores[-1]
            return response

    delivered, error = collect(Short(), numbered(30))
    assert not delivered and isinstance(error, InternalError) and "10 items with 9 scores" in error.message


def test_refused_deadlines_are_no_fault_of_the_items() -> None:
    wrong = InvalidArgumentError("The deadline is too far away.", field="deadline", reason="DEADLINE_TOO_LONG")
    servicer = Rewards(fail_first(1000, wrong))
    delivered, error = collect(servicer, numbered(100))
    assert not delivered and isinstance(error, InvalidArgumentError) and servicer.calls == 1
    assert "0 items were" in error.message


def test_all_calls_go_to_the_version_that_answered_first() -> None:
    servicer = Rewards()
    delivered, error = collect(servicer, numbered(55))
    assert error is None and {each.version for each in delivered} == {"1"}
    assert servicer.pins == [("", "")] + [("length", "1")] * 5
    free = Rewards()
    collect(free, numbered(55), one_version=False)
    assert set(free.pins) == {("", "")}
    named = Rewards()
    collect(named, numbered(5), model="length", version="1")
    assert named.pins == [("length", "1")]


@pytest.mark.parametrize("one_version", [True, False])
def test_another_version_in_between_is_an_error_where_one_is_wanted(one_version: bool) -> None:
    """This service ignores the pin; the control takes what comes."""
    servicer = Rewards()

    async def behaviour(call: int) -> None:
        if call == 3:
            servicer.version = "2"

    servicer.behaviour = behaviour
    delivered, error = collect(servicer, numbered(100), one_version=one_version, concurrency=1)
    if one_version:
        assert isinstance(error, FailedPreconditionError) and error.reason == "MODEL_CHANGED"
        assert "version 1" in error.message and "version 2" in error.message
        assert f"{len(delivered)} items" in error.message and len(delivered) == 30
    else:
        assert error is None and [len(list(group)) for _, group in itertools.groupby(d.version for d in delivered)] == [
            30,
            70,
        ]


def test_a_version_that_is_unloaded_meanwhile_is_the_same_error() -> None:
    async def behaviour(call: int) -> None:
        if call > 2:
            raise NotFoundError("Model length is loaded in version '2', not '1'.", reason="VERSION_NOT_FOUND")

    delivered, error = collect(Rewards(behaviour), numbered(100))
    assert isinstance(error, FailedPreconditionError) and error.reason == "MODEL_CHANGED" and len(delivered) == 20
    assert "not '1'. Score the rest" in error.message, "one sentence ends before the next begins"
    never, error = collect(Rewards(fail_first(9, NotFoundError("No such."))), numbered(100), model="nothing")
    assert not never and isinstance(error, NotFoundError)
