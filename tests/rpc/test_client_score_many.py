"""Scoring any number of items: order, bounded memory, pushback, bad items, failed calls, one version."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import grpc
import psutil
import pytest

from tests.rpc.scripted_server import in_thread, serving_in_thread
from tests.rpc.scripted_server import serving as serving_scripted
from tests.rpc.serving import LOCAL, Served, serving
from tests.rpc.test_client_calls import ScriptedReward, answer, fail_first
from tether import (
    Client,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    RewardClient,
    ScoredItem,
    ScoreItem,
    TetherError,
)
from tether.score_stream import CALL_BYTES, CONCURRENCY
from tether.v1 import reward_pb2
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import fake_text_score
from tether_services.reward.service import RewardService


def fake_service(**values: object) -> AbstractAsyncContextManager[Served]:
    settings = RewardSettings.model_validate(LOCAL | {"engine": "fake"} | values)
    return serving(settings, lambda registry: RewardService(settings, registry))


def numbered(count: int) -> Iterator[ScoreItem]:
    """Yield items whose responses have 1, 2, 3... characters, from the beginning after 50."""
    return (ScoreItem("p", "x" * (1 + index % 50)) for index in range(count))


def run(scenario: Awaitable[Any], *, timeout_seconds: float = 120) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(scenario, timeout_seconds)

    return asyncio.run(main())


class Rewards(ScriptedReward):
    """Scores with the response's length; states its limit and notes the calls."""

    def __init__(self, behaviour: Callable[[int], Awaitable[None]] = answer, *, max_items: int = 10) -> None:
        super().__init__(behaviour)
        self.max_items = max_items
        self.sizes: list[tuple[int, int]] = []
        self.pins: list[tuple[str, str]] = []
        self.version = "1"
        self.in_flight = self.most_in_flight = 0

    async def ListRewardModels(self, request: Any, context: Any) -> reward_pb2.ListRewardModelsResponse:
        other = reward_pb2.RewardModel(name="small", max_items=2)
        model = reward_pb2.RewardModel(name="length", max_items=self.max_items, default_model=True)
        return reward_pb2.ListRewardModelsResponse(models=[other, model])

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        self.sizes.append((len(request.items), request.ByteSize()))
        self.pins.append((request.model, request.version))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        version = self.version
        try:
            response = await super().Score(request, context)
        finally:
            self.in_flight -= 1
        response.version, response.model_sha256 = version, f"sha of {version}"
        return response


def collect(servicer: ScriptedReward, items: Any, **options: Any) -> tuple[list[ScoredItem], TetherError | None]:
    """Return what was delivered, and the error that ended it."""

    async def scenario() -> tuple[list[ScoredItem], TetherError | None]:
        delivered: list[ScoredItem] = []
        async with serving_scripted(servicer.add) as target, RewardClient(target, timeout_seconds=60) as client:
            try:
                async for scored in client.score_many(items, **options):
                    delivered.append(scored)
            except TetherError as error:
                return delivered, error
        return delivered, None

    found: tuple[list[ScoredItem], TetherError | None] = run(scenario())
    return found


def test_scores_come_in_the_order_of_the_items_with_the_model_that_gave_them() -> None:
    async def scenario() -> None:
        async with fake_service() as served, RewardClient(served.target) as client:
            (model,) = await client.list_reward_models()
            items = list(numbered(333))
            scored = [each async for each in client.score_many(items)]
            assert [each.index for each in scored] == list(range(333))
            assert [each.score.score for each in scored] == [fake_text_score("p", item.response) for item in items]
            assert {(s.model, s.version, s.model_sha256) for s in scored} == {
                (model.name, model.version, model.model_sha256)
            }

    run(scenario())


def test_answers_that_come_in_another_order_are_put_in_order() -> None:
    async def slow_for_some(call: int) -> None:
        await asyncio.sleep(0.2 if call % 3 == 2 else 0.0)

    delivered, error = collect(Rewards(slow_for_some), numbered(105))
    assert error is None
    assert [each.score.score for each in delivered] == [float(1 + index % 50) for index in range(105)]


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11])
def test_any_number_of_items_is_scored_none_of_them_twice(count: int) -> None:
    servicer = Rewards()
    delivered, error = collect(servicer, numbered(count))
    assert error is None and len(delivered) == count
    assert sum(size for size, _ in servicer.sizes) == count
    assert servicer.calls == -(-count // 10)


def test_an_asynchronous_source_is_read_as_well() -> None:
    async def source() -> AsyncIterator[ScoreItem]:
        for item in numbered(25):
            await asyncio.sleep(0)
            yield item

    delivered, error = collect(Rewards(), source())
    assert error is None and len(delivered) == 25


def test_a_source_that_fails_ends_it_with_its_own_error() -> None:
    def source() -> Iterator[ScoreItem]:
        yield from numbered(25)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect(Rewards(), source())


def test_calls_have_as_many_items_as_the_model_takes_and_few_bytes() -> None:
    short, long = Rewards(), Rewards(max_items=64)
    collect(short, numbered(35))
    assert [count for count, _ in short.sizes] == [10, 10, 10, 5]
    small = Rewards()
    collect(small, numbered(5), model="small")
    assert max(count for count, _ in small.sizes) == 2
    delivered, error = collect(long, (ScoreItem("p", "x" * 100_000) for _ in range(30)))
    assert error is None and len(delivered) == 30
    assert 4 * 100_000 < max(size for _, size in long.sizes) < CALL_BYTES + 1000


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_calls_are_in_flight_than_wanted(concurrency: int) -> None:
    async def slow(call: int) -> None:
        await asyncio.sleep(0.02)

    servicer = Rewards(slow)
    collect(servicer, numbered(200), concurrency=concurrency)
    assert servicer.most_in_flight == concurrency
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        run(anext(RewardClient("127.0.0.1:1").score_many([], concurrency=0)))


class Tracked:
    """Counts the items that were handed out and whose score has not come yet, and the items that are in memory."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken = self.delivered = self.most_waiting = 0
        self.living = self.most_living = 0

    def items(self) -> Iterator[ScoreItem]:
        tracked = self

        class Counted(ScoreItem):
            __slots__ = ()

            def __del__(self) -> None:
                tracked.living -= 1

        for index in range(self.count):
            self.taken += 1
            self.living += 1
            self.most_waiting = max(self.most_waiting, self.taken - self.delivered)
            self.most_living = max(self.most_living, self.living)
            yield Counted("p" * 200, f"{index}")


@pytest.mark.slow
def test_two_hundred_thousand_items_need_the_memory_of_a_few_calls() -> None:
    max_items, tracked, memory = 500, Tracked(200_000), []

    async def scenario() -> None:
        servicer = Rewards(max_items=max_items)
        async with serving_scripted(servicer.add) as target, RewardClient(target, timeout_seconds=60) as client:
            async for scored in client.score_many(tracked.items()):
                assert scored.index == tracked.delivered
                tracked.delivered += 1
                if tracked.delivered % 50_000 == 0:
                    gc.collect()
                    memory.append(psutil.Process().memory_info().rss)

    run(scenario(), timeout_seconds=250)
    assert tracked.delivered == 200_000
    assert max_items < tracked.most_waiting <= (CONCURRENCY + 2) * max_items
    assert tracked.most_living <= (CONCURRENCY + 2) * max_items
    assert memory[-1] - memory[0] < 20_000_000, "150,000 items more, of 200 bytes and their scores"


def test_a_slow_reader_holds_the_source_back() -> None:
    tracked = Tracked(1000)

    async def scenario() -> None:
        async with (
            serving_scripted(Rewards().add) as target,
            RewardClient(target) as client,
            aclosing(client.score_many(tracked.items())) as scores,
        ):
            for _ in range(15):
                await anext(scores)
            await asyncio.sleep(0.2)
            assert tracked.taken <= (CONCURRENCY + 3) * 10

    run(scenario())


def test_leaving_early_cancels_the_calls_in_flight() -> None:
    cancelled = asyncio.Event()

    async def behaviour(call: int) -> None:
        if call > 1:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise

    async def scenario() -> None:
        servicer = Rewards(behaviour)
        async with serving_scripted(servicer.add) as target, RewardClient(target) as client:
            async with aclosing(client.score_many(numbered(1000))) as scores:
                for _ in range(10):
                    await anext(scores)
                while servicer.calls < 1:
                    await asyncio.sleep(0.01)
                reading = asyncio.create_task(anext(scores))
                while servicer.calls < 2:
                    await asyncio.sleep(0.01)
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            await asyncio.wait_for(cancelled.wait(), 10)

    run(scenario())


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


def test_progress_is_told_after_every_call() -> None:
    done: list[int] = []
    collect(Rewards(), numbered(35), on_progress=done.append)
    assert done == [10, 20, 30, 35]


def test_the_synchronous_client_reads_and_reports_in_the_thread_of_its_caller() -> None:
    threads: set[int] = set()
    done: list[int] = []

    def source() -> Iterator[ScoreItem]:
        for item in numbered(250):
            threads.add(threading.get_ident())
            yield item

    def report(count: int) -> None:
        threads.add(threading.get_ident())
        done.append(count)

    serve = serving_in_thread(Rewards().add)
    with serve as target, Client(reward=target) as client:
        scored = list(client.score_many(source(), on_progress=report))
        assert [each.score.score for each in scored] == [float(1 + index % 50) for index in range(250)]
        assert list(client.score_many([])) == []
    assert threads == {threading.get_ident()} and done[-1] == 250


def test_the_synchronous_client_may_leave_early_or_be_closed_under_it() -> None:
    with serving_in_thread(Rewards().add) as target:
        client = Client(reward=target)
        first = next(scores := client.score_many(numbered(500)))
        assert first.index == 0
        scores.close()
        scores = client.score_many(numbered(500))
        next(scores)
        client.close()
        with pytest.raises(FailedPreconditionError, match="CLIENT_CLOSED"):
            list(scores)


def test_the_synchronous_client_raises_the_same_errors() -> None:
    async def behaviour(call: int) -> None:
        if call == 2:
            raise InternalError("Broken.")

    serve = in_thread(lambda: serving_scripted(Rewards(behaviour).add))
    with serve as target, Client(reward=target) as client, pytest.raises(InternalError, match="10 items were scored"):
        list(client.score_many(numbered(500)))
