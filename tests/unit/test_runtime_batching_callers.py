"""The batcher between callers: order, places, refusals, and what is told of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tether.errors import ResourceExhaustedError
from tether_services.runtime.batching import Batcher, BatchSettings, Place
from tether_services.runtime.callers import Caller, CurrentCall, enter_call
from tether_services.runtime.metrics import QueueMetrics
from tether_services.runtime.pass_tally import count_pass


def caller(name: str, **fields: Any) -> Caller:
    return Caller(name=name, scopes=frozenset(), **fields)


FLOOD, POLITE, TRAINER = caller("flood"), caller("polite"), caller("trainer", lane="training")


@dataclass
class Toy:
    """A batcher whose engine executes one batch whenever it is told to."""

    batches: list[list[str]] = field(default_factory=list)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    steps: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    batcher: Batcher[str, int] = field(init=False)
    calls: set[asyncio.Task[list[int]]] = field(default_factory=set)

    async def run(self, items: Sequence[str]) -> list[int]:
        self.batches.append(list(items))
        await self.steps.acquire()
        count_pass(real_tokens=len(items), padding_tokens=1)
        return [0] * len(items)

    def call(self, who: Caller, count: int, *, tokens: int = 1) -> asyncio.Task[list[int]]:
        """Begin a call of some items."""

        async def submit() -> list[int]:
            enter_call(CurrentCall(who, lambda count: None))
            return await self.batcher.submit_all([(who.name, tokens)] * count, timeout_seconds=30)

        task = asyncio.create_task(submit())
        self.calls.add(task)
        return task

    async def occupy(self) -> None:
        """Have the engine work on something, so that what comes now has to wait."""
        self.call(POLITE, 1)
        while not self.batches:
            await asyncio.sleep(0)

    async def execute(self, count: int) -> None:
        """Let the engine finish so many batches, and have it begin the next one if there is one."""
        begun = len(self.batches)
        for _ in range(count):
            self.steps.release()
        while len(self.batches) < begun + count and len(self.batcher._queue):
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"tether_toy_{name}", labels)


def run(scenario: Callable[[Toy], Awaitable[None]], **settings: object) -> Toy:
    async def main() -> Toy:
        toy = Toy()
        limits = BatchSettings.model_validate(settings)
        metrics = QueueMetrics("toy", toy.registry, queue_limit=limits.queue_limit, counts_padding=True)
        toy.batcher = Batcher[str, int](toy.run, limits, metrics)
        toy.batcher.start()
        try:
            await asyncio.wait_for(scenario(toy), 20)
        finally:
            await toy.batcher.close()
            await asyncio.gather(*toy.calls, return_exceptions=True)
        return toy

    return asyncio.run(main())


def test_a_flood_that_came_first_delays_a_polite_call_by_one_batch() -> None:
    async def scenario(toy: Toy) -> None:
        await toy.occupy()
        toy.call(FLOOD, 100)
        polite = toy.call(POLITE, 2)
        await asyncio.sleep(0)
        await toy.execute(2)
        assert await polite == [0, 0]
        assert toy.batches[1] == ["flood", "polite", "flood", "polite", "flood", "flood", "flood", "flood"]

    run(scenario, max_items=8)


def test_without_fair_order_the_polite_call_waits_for_the_whole_flood() -> None:
    """The control: if everybody is the same caller, the flood is served first."""

    async def scenario(toy: Toy) -> None:
        await toy.occupy()
        toy.call(FLOOD, 50)
        late = toy.call(FLOOD, 2)
        await asyncio.sleep(0)
        await toy.execute(5)
        assert not late.done()
        await toy.execute(3)
        assert await late == [0, 0]

    run(scenario, max_items=8)


def test_weights_divide_a_batch() -> None:
    async def scenario(toy: Toy) -> None:
        await toy.occupy()
        toy.call(caller("heavy", weight=3.0), 40)
        toy.call(FLOOD, 40)
        await asyncio.sleep(0)
        await toy.execute(1)
        assert Counter(toy.batches[1]) == {"heavy": 12, "flood": 4}

    run(scenario, max_items=16)


@pytest.mark.parametrize(("share", "expected"), [(0.25, 4), (0.5, 8), (0.75, 12)])
def test_the_training_lane_has_its_share_of_every_batch_and_more_where_others_want_less(
    share: float, expected: int
) -> None:
    async def scenario(toy: Toy) -> None:
        await toy.occupy()
        for number in range(5):
            toy.call(caller(f"flood-{number}"), 30)
        toy.call(TRAINER, 100)
        await asyncio.sleep(0)
        await toy.execute(4)
        served = [Counter(batch)["trainer"] for batch in toy.batches[1:5]]
        assert sum(served) == pytest.approx(4 * expected, abs=2)
        assert all(abs(number - expected) <= 1 for number in served)

    run(scenario, max_items=16, training_share=share)


def test_shared_callers_cannot_take_the_places_of_a_training_run() -> None:
    async def scenario(toy: Toy) -> None:
        await toy.occupy()
        for number in range(8):
            toy.call(caller(f"flood-{number}"), 8)
            await asyncio.sleep(0)
        refused = toy.call(POLITE, 2)
        training = toy.call(TRAINER, 16)
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhaustedError):
            await refused
        assert (toy.value("queue_lane_depth", lane="training"), toy.value("queue_lane_depth", lane="shared")) == (
            16,
            16,
        )
        await toy.execute(3)
        assert await training == [0] * 16

    run(scenario, max_items=16, queue_limit=16, training_share=0.5)


def test_a_flooder_is_refused_for_its_own_share_and_others_are_not() -> None:
    async def scenario(toy: Toy) -> None:
        await toy.occupy()
        calls = [toy.call(FLOOD, 1) for _ in range(200)]
        polite = [toy.call(POLITE, 1) for _ in range(10)]
        await asyncio.sleep(0)
        refused = [call for call in calls if call.done()]
        assert len(refused) == 150
        error = refused[0].exception()
        assert isinstance(error, ResourceExhaustedError)
        assert (error.reason, error.message[:28]) == ("QUEUE_FULL", "50 items of this caller wait")
        assert not any(call.done() for call in polite)
        await toy.execute(10)
        assert await asyncio.gather(*polite) == [[0]] * 10
        assert toy.value("rejected_total", reason="caller_full") == 150
        assert toy.value("rejected_total", reason="queue_full") == 0
        assert toy.value("caller_items_total", caller="flood", outcome="rejected") == 150
        assert toy.value("caller_items_total", caller="polite", outcome="rejected") == 0
        assert toy.value("caller_items_total", caller="polite", outcome="executed") == 11

    run(scenario, max_items=16, queue_limit=100)


def test_a_call_that_is_cancelled_frees_its_places_at_once() -> None:
    async def scenario(toy: Toy) -> None:
        await toy.occupy()
        waiting = toy.call(FLOOD, 10)
        await asyncio.sleep(0)
        assert toy.value("queue_depth") == 10
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert toy.value("queue_depth") == 0
        assert toy.value("rejected_total", reason="cancelled") == 10
        assert toy.value("caller_items_total", caller="flood", outcome="dropped") == 10
        toy.call(FLOOD, 10)
        await asyncio.sleep(0)
        assert toy.value("queue_depth") == 10

    run(scenario, queue_limit=10)


def test_places_are_held_while_a_call_is_read_and_the_rest_is_given_back() -> None:
    async def scenario(toy: Toy) -> None:
        batcher = toy.batcher
        with batcher.reserve(10) as place:
            assert place.count == 10
            with pytest.raises(ResourceExhaustedError), batcher.reserve(1):
                pass
            toy.steps.release()
            assert await batcher.submit_all([("x", 1)] * 4, timeout_seconds=5, place=place) == [0] * 4
            with batcher.reserve(4), pytest.raises(ResourceExhaustedError), batcher.reserve(1):
                pass  # six are still held for what was not submitted
        with batcher.reserve(10):
            pass
        with pytest.raises(RuntimeError), batcher.reserve(10):
            raise RuntimeError("while reading")
        with batcher.reserve(10):
            pass

    run(scenario, queue_limit=10)


def test_more_items_than_places_are_a_mistake() -> None:
    async def scenario(toy: Toy) -> None:
        with pytest.raises(AssertionError):
            await toy.batcher.submit_all([("x", 1)] * 2, timeout_seconds=5, place=Place(POLITE, 1))

    run(scenario)


def test_a_refusal_tells_when_the_queue_will_have_drained() -> None:
    async def scenario(toy: Toy) -> None:
        async def run_slowly(items: Sequence[str]) -> list[int]:
            await asyncio.sleep(0.02)
            return [0] * len(items)

        toy.batcher._run = run_slowly
        for _ in range(10):
            await toy.call(FLOOD, 4)
        toy.call(FLOOD, 40)
        await asyncio.sleep(0)
        for count, low, high in ((10, 0.05, 0.3), (40, 0.15, 1.0)):
            with pytest.raises(ResourceExhaustedError) as caught:
                await toy.call(FLOOD, count)
            assert caught.value.retry_after_seconds is not None
            assert low <= caught.value.retry_after_seconds <= high, "4 items take 20 ms or a little more"

    run(scenario, queue_limit=40, max_items=4)


def test_many_callers_share_a_series_in_the_end() -> None:
    async def scenario(toy: Toy) -> None:
        for number in range(300):
            call = toy.call(caller(f"team-{number}"), 1)
            toy.steps.release()
            await call

    toy = run(scenario)
    assert toy.value("caller_items_total", caller="team-0", outcome="executed") == 1
    assert toy.value("caller_items_total", caller="other", outcome="executed") == 250
    assert generate_latest(toy.registry).decode().count("tether_toy_caller_items_total{") <= 3 * 52


def test_the_series_are_there_from_the_start() -> None:
    registry = CollectorRegistry()
    QueueMetrics("toy", registry, queue_limit=5)
    for reason in ("queue_full", "caller_full", "deadline", "cancelled"):
        assert registry.get_sample_value("tether_toy_rejected_total", {"reason": reason}) == 0
    for lane in ("shared", "training"):
        assert registry.get_sample_value("tether_toy_queue_lane_depth", {"lane": lane}) == 0
    for outcome in ("executed", "rejected", "dropped"):
        labels = {"caller": "anonymous", "outcome": outcome}
        assert registry.get_sample_value("tether_toy_caller_items_total", labels) == 0
    assert "forward_tokens" not in generate_latest(registry).decode(), "for an engine that does not count padding"


def test_tokens_and_padding_of_the_passes_of_a_batch_are_counted() -> None:
    async def scenario(toy: Toy) -> None:
        for count in (3, 4):
            toy.steps.release()
            await toy.call(POLITE, count)

    toy = run(scenario)
    assert toy.value("forward_tokens_total", kind="real") == 7
    assert toy.value("forward_tokens_total", kind="padding") == 2


def test_an_idle_engine_begins_at_once() -> None:
    """Without this, every unloaded call would wait for company that does not come."""

    async def scenario(toy: Toy) -> None:
        turns = 0
        toy.call(POLITE, 1)
        while not toy.batches:
            await asyncio.sleep(0)
            turns += 1
        assert turns < 10

    run(scenario)
