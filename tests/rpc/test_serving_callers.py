"""Callers with tokens of a real server: a flood neither takes the places of others nor their turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.rpc import reward_rules
from tests.rpc.generator_serving import refusal
from tests.rpc.serving import LOCAL, run, serving
from tests.rpc.token_inputs import add_token, bearing
from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.reward import scoring
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.metrics import new_registry


def score_request(num_items: int) -> reward_pb2.ScoreRequest:
    return reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(prompt="p", response="r")] * num_items)


async def until(is_so: Callable[[], bool], calls: Sequence[Any]) -> None:
    """Wait for something that comes before any answer; a call that has ended says why it will not come."""
    while not is_so():
        for call in calls:
            if call.done():
                await call
                raise AssertionError("a call was answered too early")
        await asyncio.sleep(0.002)


def test_a_flood_is_refused_while_others_and_the_trainer_find_places_and_turns(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    flood, polite = add_token(path, name="flood"), add_token(path, name="polite")
    trainer = add_token(path, name="trainer", lane="training")
    values = {"models": [reward_rules.GATED_MODEL], "batch": {"max_items": 8, "queue_limit": 64}}
    given = RewardSettings.model_validate(LOCAL | values | {"tokens_file": str(path)})
    reward_rules.GATE.clear()

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            served = await stack.enter_async_context(serving(given, lambda registry: RewardService(given, registry)))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(served.target))
            stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
            stack.callback(reward_rules.GATE.set)
            finished: list[str] = []
            calls: list[asyncio.Task[None]] = []

            def score(token: str, num_items: int) -> Any:
                return stub.Score(score_request(num_items), timeout=30, metadata=bearing(token))

            async def finish(name: str, token: str, num_items: int) -> None:
                answer = await score(token, num_items)
                assert [item.score for item in answer.scores] == [1.0] * num_items
                finished.append(name)

            def begin(name: str, token: str, num_items: int) -> None:
                calls.append(asyncio.create_task(finish(name, token, num_items)))

            async def until_waiting(count: int, lane: str) -> None:
                await until(lambda: served.value("tether_reward_queue_lane_depth", lane=lane) == count, calls)

            begin("flood", flood, 8)
            # Its places are free again once the engine has it; before, the last of the next four would be refused.
            await until(lambda: served.value("tether_reward_batch_size_count") == 1, calls)
            for _ in range(4):
                begin("flood", flood, 8)
            await until_waiting(32, "shared")
            refused = await refusal(score(flood, 1))
            assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert refused.retry_after_seconds
            begin("polite", polite, 2)
            await until_waiting(34, "shared")
            begin("trainer", trainer, 4)
            await until_waiting(4, "training")
            reward_rules.GATE.set()
            await asyncio.gather(*calls)
            # Answers of one batch come in any order, those of later ones after it.
            assert {"polite", "trainer"} <= set(finished[:4])
            for caller, executed in (("flood", 40), ("polite", 2), ("trainer", 4)):
                labels = {"caller": caller, "outcome": "executed"}
                assert served.value("tether_reward_caller_items_total", **labels) == executed
            assert served.value("tether_reward_rejected_total", reason="caller_full") == 1

    run(scenario())


def test_the_items_of_a_polite_caller_and_of_the_trainer_are_read_before_those_that_a_flood_has_sent_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens.toml"
    flood, polite = add_token(path, name="flood"), add_token(path, name="polite")
    trainer = add_token(path, name="trainer", lane="training")
    given = RewardSettings.model_validate(LOCAL | {"engine": "fake", "tokens_file": str(path)})
    first_may_end, sizes = threading.Event(), []
    read_and_prepare = scoring.read_and_prepare

    def slow_read(reader: Any, read: Any, identity: bytes) -> Any:
        inputs, prepared = read_and_prepare(reader, read, identity)
        assert first_may_end.wait(20)
        sizes.append(len(inputs))
        return inputs, prepared

    monkeypatch.setattr(scoring, "read_and_prepare", slow_read)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            service = RewardService(given, new_registry())
            served = await stack.enter_async_context(serving(given, lambda registry: service))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(served.target))
            stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
            stack.callback(first_may_end.set)

            def score(token: str, num_items: int) -> Any:
                return stub.Score(score_request(num_items), timeout=30, metadata=bearing(token))

            calls = [score(flood, 64) for _ in range(6)]
            room = service._scorer.batcher._room
            await until(lambda: room.held("shared") == 6 * 64, calls)
            calls += [score(polite, 1), score(trainer, 2)]
            await until(lambda: (room.held("shared"), room.held("training")) == (6 * 64 + 1, 2), calls)
            first_may_end.set()
            await asyncio.gather(*calls)

    run(scenario())
    assert sizes[0] == 64 and sorted(sizes) == [1, 2, *[64] * 6]
    assert {1, 2} <= set(sizes[1:4])  # by arrival they would be the last two
