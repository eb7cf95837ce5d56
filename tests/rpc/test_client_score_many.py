"""Scoring any number of items: order, sources, calls in flight, bounded memory, progress."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import psutil
import pytest

from tests.rpc.many_items import Rewards, collect, fake_service, numbered, run
from tests.rpc.scripted_server import in_thread, serving_in_thread
from tests.rpc.scripted_server import serving as serving_scripted
from tether import Client, FailedPreconditionError, InternalError, InvalidArgumentError, RewardClient, ScoreItem
from tether.score_stream import CALL_BYTES, CONCURRENCY
from tether_services.reward.engines.fake import fake_text_score


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
