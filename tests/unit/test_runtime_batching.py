from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from tether.errors import DeadlineExceededError, InternalError, ResourceExhaustedError, UnavailableError
from tether_services.runtime.batching import Batcher, BatchSettings
from tether_services.runtime.metrics import QueueMetrics


class Engine:
    """Squares numbers and remembers the batches it was given; waits at the gate if there is one."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate: asyncio.Event | None = None

    async def run(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        if self.gate is not None:
            await self.gate.wait()
        if -1 in items:
            raise ArithmeticError("the whole batch failed")
        return [ValueError(f"no {item}") if item == 13 else item * item for item in items]


def run(
    scenario: Callable[[Batcher[int, int], Engine], Awaitable[None]],
    registry: CollectorRegistry | None = None,
    **settings: float,
) -> Engine:
    async def main() -> Engine:
        engine = Engine()
        delay = {"max_delay_seconds": 0.02} if settings.get("mix_calls", True) else {}
        limits = BatchSettings.model_validate({**delay, **settings})
        metrics = QueueMetrics("toy", registry or CollectorRegistry(), queue_limit=limits.queue_limit)
        batcher = Batcher[int, int](engine.run, limits, metrics)
        batcher.start()
        try:
            await asyncio.wait_for(scenario(batcher, engine), 10)
        finally:
            if engine.gate:
                engine.gate.set()
            await batcher.close()
        return engine

    return asyncio.run(main())


async def one(batcher: Batcher[int, int], item: int, *, tokens: int = 1, key: str = "", timeout: float = 5.0) -> int:
    (result,) = await batcher.submit_all([(item, tokens)], key=key, timeout_seconds=timeout)
    return result


def test_concurrent_items_share_a_batch_and_keep_their_results() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        assert await asyncio.gather(*(one(batcher, i) for i in range(6))) == [0, 1, 4, 9, 16, 25]

    assert run(scenario).batches == [[0, 1, 2, 3, 4, 5]]


def test_a_lone_item_does_not_wait_longer_than_the_delay() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        started = time.monotonic()
        assert await one(batcher, 3) == 9
        assert time.monotonic() - started < 1

    run(scenario)


def test_batches_respect_the_item_limit() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        await asyncio.gather(*(one(batcher, i) for i in range(10)))

    assert [len(batch) for batch in run(scenario, max_items=4).batches] == [4, 4, 2]


def test_batches_respect_the_token_budget_and_a_giant_runs_alone() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        sizes = {1: 40, 2: 40, 3: 40, 4: 500}
        await asyncio.gather(*(one(batcher, item, tokens=tokens) for item, tokens in sizes.items()))

    assert run(scenario, max_tokens=100).batches == [[1, 2], [3], [4]]


def test_items_with_different_keys_never_share_a_batch() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        await asyncio.gather(*(one(batcher, i, key="even" if i % 2 == 0 else "odd") for i in range(6)))

    assert run(scenario).batches == [[0, 2, 4], [1, 3, 5]]


def test_a_failed_item_fails_alone_and_a_failed_batch_does_not_stop_the_next() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        results = await asyncio.gather(one(batcher, 13), one(batcher, 2), return_exceptions=True)
        assert isinstance(results[0], ValueError)
        assert results[1] == 4
        with pytest.raises(ArithmeticError):
            await one(batcher, -1)
        assert await one(batcher, 5) == 25

    run(scenario)


def test_a_full_queue_refuses_at_once_and_says_when_to_call_again() -> None:
    registry = CollectorRegistry()

    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        engine.gate = asyncio.Event()
        busy = asyncio.create_task(one(batcher, 1))
        while not engine.batches:
            await asyncio.sleep(0.001)
        waiting = [asyncio.create_task(one(batcher, i)) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhaustedError) as caught:
            await batcher.submit_all([(7, 1), (8, 1)], timeout_seconds=1)
        assert caught.value.retry_after_seconds is not None
        engine.gate.set()
        await asyncio.gather(busy, *waiting)

    assert [7] not in run(scenario, registry, queue_limit=4).batches
    assert registry.get_sample_value("tether_toy_rejected_total", {"reason": "queue_full"}) == 2


def test_expired_and_cancelled_items_never_reach_the_engine() -> None:
    registry = CollectorRegistry()

    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        engine.gate = asyncio.Event()
        busy = asyncio.create_task(one(batcher, 1))
        while not engine.batches:
            await asyncio.sleep(0.001)
        expired = asyncio.create_task(one(batcher, 2, timeout=0.01))
        cancelled = asyncio.create_task(one(batcher, 3))
        await asyncio.sleep(0.03)
        cancelled.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        await busy
        with pytest.raises(DeadlineExceededError):
            await expired
        assert await one(batcher, 4) == 16

    assert [item for batch in run(scenario, registry).batches for item in batch] == [1, 4]
    for reason in ("deadline", "cancelled"):
        assert registry.get_sample_value("tether_toy_rejected_total", {"reason": reason}) == 1


def test_closing_fails_waiting_items_as_unavailable() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        engine.gate = asyncio.Event()
        busy = asyncio.create_task(one(batcher, 1))
        while not engine.batches:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(one(batcher, 2))
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(UnavailableError):
            await waiting
        with pytest.raises(UnavailableError):
            await busy

    run(scenario)


def test_queue_depth_and_batch_sizes_are_exact() -> None:
    registry = CollectorRegistry()

    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        await asyncio.gather(*(one(batcher, i, tokens=10) for i in range(5)))

    run(scenario, registry)
    assert registry.get_sample_value("tether_toy_queue_depth") == 0
    assert registry.get_sample_value("tether_toy_batch_size_sum") == 5
    assert registry.get_sample_value("tether_toy_batch_tokens_sum") == 50
    assert registry.get_sample_value("tether_toy_queue_wait_seconds_count") == 5


def test_an_engine_that_answers_for_another_number_of_items_fails_the_batch_and_not_the_worker() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        async def short(items: Sequence[int]) -> list[int]:
            return [0] * (len(items) - 1) if 7 in items else [0] * len(items)

        batcher._run = short
        with pytest.raises(InternalError, match="0 results for 1 items"):
            await asyncio.wait_for(one(batcher, 7), 2)
        assert await one(batcher, 8) == 0

    run(scenario)


def kill_worker(batcher: Batcher[Any, Any]) -> None:
    """Have the worker meet a defect at its next batch."""

    def broken() -> list[object]:
        raise ZeroDivisionError("a defect of the batcher")

    batcher._take = broken  # type: ignore[method-assign, assignment]


def test_a_worker_that_dies_fails_what_waits_is_told_at_once_and_refuses_what_comes() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        deaths: list[BaseException] = []
        batcher.on_death = deaths.append
        kill_worker(batcher)
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(one(batcher, 1), 2)
        assert caught.value.reason == "ENGINE_FAILED"
        assert [type(death) for death in deaths] == [ZeroDivisionError]
        for call in (one(batcher, 2), batcher.probe()):
            with pytest.raises(UnavailableError, match="must be restarted"):
                await asyncio.wait_for(call, 2)

    run(scenario)


def test_a_worker_that_is_cancelled_from_within_is_dead_too() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        deaths: list[BaseException] = []
        batcher.on_death = deaths.append

        async def cancelled(items: Sequence[int]) -> list[int]:
            raise asyncio.CancelledError  # what an executor that was shut down answers

        batcher._run = cancelled
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(one(batcher, 1), 2)
        assert len(deaths) == 1

    run(scenario)


def test_an_orderly_end_is_no_death() -> None:
    deaths: list[BaseException] = []

    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        batcher.on_death = deaths.append
        assert await one(batcher, 2) == 4
        await batcher.close()

    run(scenario)
    assert deaths == []


def test_a_probe_skips_the_queue() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        await asyncio.wait_for(batcher.probe(), 1)
        engine.gate = asyncio.Event()
        calls = [asyncio.create_task(one(batcher, i)) for i in range(100, 300)]
        while not engine.batches:
            await asyncio.sleep(0.001)
        await asyncio.wait_for(batcher.probe(), 1)
        engine.gate.set()
        await asyncio.gather(*calls)
        probes = [batcher.probe() for _ in range(3)]
        await asyncio.wait_for(asyncio.gather(*probes), 1)

    run(scenario, max_items=4, max_delay_seconds=0.0)


def test_a_probe_does_not_shorten_the_wait_for_company() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        first = asyncio.create_task(one(batcher, 1))
        await asyncio.sleep(0.05)
        await batcher.probe()
        second = asyncio.create_task(one(batcher, 2))
        await asyncio.gather(first, second)

    assert run(scenario, max_delay_seconds=0.3).batches == [[1, 2]]


def test_b5_without_mixing_a_batch_is_of_one_call_and_waits_for_nobody() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        async def call(*items: int) -> list[int]:
            return await batcher.submit_all([(item, 1) for item in items], key="same", timeout_seconds=5)

        started = time.monotonic()
        answers = await asyncio.gather(call(1, 2), call(3), call(4, 5, 6))
        assert list(answers) == [[1, 4], [9], [16, 25, 36]]
        assert time.monotonic() - started < 1

    assert run(scenario, mix_calls=False).batches == [[1, 2], [3], [4, 5, 6]]


def test_b5_without_mixing_a_large_call_is_split_the_same_way_every_time() -> None:
    async def scenario(batcher: Batcher[int, int], engine: Engine) -> None:
        for company in range(3):
            others = [asyncio.create_task(one(batcher, 50)) for _ in range(company)]
            await batcher.submit_all([(i, 1) for i in range(10)], timeout_seconds=5)
            await asyncio.gather(*others)

    batches = [batch for batch in run(scenario, mix_calls=False, max_items=4).batches if 50 not in batch]
    assert batches == 3 * [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_delay_that_no_batch_would_wait_is_refused() -> None:
    with pytest.raises(ValidationError, match="would be ignored"):
        BatchSettings(mix_calls=False, max_delay_seconds=0.1)
    assert BatchSettings(mix_calls=True, max_delay_seconds=0.1).max_delay_seconds == 0.1
