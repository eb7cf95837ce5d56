"""A full service says when to come back: calls without effect do, as long as their deadline allows."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

import pytest

import tether.channel
from tests.rpc.scripted_reward import ITEM, ScriptedReward, answer, fail_first
from tests.rpc.scripted_server import serving
from tether import FailedPreconditionError, OrchestratorClient, ResourceExhaustedError, RewardClient, TetherError
from tether.v1 import orchestrator_pb2_grpc


def full(retry_after_seconds: float | None) -> ResourceExhaustedError:
    return ResourceExhaustedError("The queue is full.", retry_after_seconds=retry_after_seconds)


def score(
    servicer: ScriptedReward, *, timeout_seconds: float = 20.0, retries: bool = True
) -> tuple[TetherError | None, float]:
    """Return the error of one call and the seconds that it took."""

    async def run() -> tuple[TetherError | None, float]:
        async with serving(servicer.add) as target, RewardClient(target, retries=retries) as client:
            began = time.monotonic()
            try:
                await client.score([ITEM], timeout_seconds=timeout_seconds)
            except TetherError as error:
                return error, time.monotonic() - began
            return None, time.monotonic() - began

    return asyncio.run(run())


def test_a_full_service_is_called_again_when_it_says_and_not_before() -> None:
    servicer = ScriptedReward(fail_first(2, full(0.5)))
    error, seconds = score(servicer)
    assert error is None and servicer.calls == 3
    assert seconds >= 1.0


@pytest.mark.parametrize(("retry_after_seconds", "retries"), [(None, True), (0.1, False)])
def test_one_that_does_not_say_when_or_a_caller_that_repeats_itself_gets_the_error_at_once(
    retry_after_seconds: float | None, retries: bool
) -> None:
    servicer = ScriptedReward(fail_first(5, full(retry_after_seconds)))
    error, _ = score(servicer, retries=retries)
    assert isinstance(error, ResourceExhaustedError) and error.retry_after_seconds == retry_after_seconds
    assert servicer.calls == 1


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    servicer = ScriptedReward(fail_first(5, full(30.0)))
    error, seconds = score(servicer, timeout_seconds=10)
    assert isinstance(error, ResourceExhaustedError) and servicer.calls == 1
    assert seconds < 5


def test_waits_become_longer_than_the_service_says_and_end_with_the_deadline() -> None:
    """It would be called a thousand times otherwise."""
    servicer = ScriptedReward(fail_first(10_000, full(0.001)))
    error, seconds = score(servicer, timeout_seconds=3)
    assert isinstance(error, ResourceExhaustedError)
    assert 2 <= servicer.calls <= 5 and seconds < 4


def test_the_number_of_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tether.channel, "MAX_PUSHBACKS", 2)
    servicer = ScriptedReward(fail_first(10_000, full(0.0)))
    error, _ = score(servicer)
    assert isinstance(error, ResourceExhaustedError) and servicer.calls == 3


def test_callers_who_are_told_the_same_time_come_back_at_different_ones() -> None:
    times: list[float] = []

    async def behaviour(call: int) -> None:
        times.append(time.monotonic())
        if call <= 40:
            raise full(1.0)

    async def run() -> None:
        async with serving(ScriptedReward(behaviour).add) as target, RewardClient(target) as client:
            await asyncio.gather(*(client.score([ITEM], timeout_seconds=30) for _ in range(40)))

    asyncio.run(run())
    first, last = times[40], times[-1]
    assert first - times[0] >= 1.0 and last - first > 0.2


def test_closing_the_client_ends_the_wait() -> None:
    async def run() -> None:
        servicer = ScriptedReward(fail_first(5, full(20.0)))
        async with serving(servicer.add) as target:
            client = RewardClient(target)
            call = asyncio.create_task(client.score([ITEM], timeout_seconds=60))
            while not servicer.calls:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            await client.close()
            with pytest.raises(FailedPreconditionError, match="CLIENT_CLOSED"):
                await asyncio.wait_for(call, 5)

    asyncio.run(run())


def test_a_call_with_an_effect_is_not_repeated() -> None:
    calls: list[str] = []

    class Full(orchestrator_pb2_grpc.OrchestratorServiceServicer):
        async def CancelRun(self, request: Any, context: Any) -> Any:
            calls.append("CancelRun")
            raise full(0.1)

    full_service = Full()  # type: ignore[abstract]

    async def run() -> None:
        add = functools.partial(orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server, full_service)
        async with serving(add) as target, OrchestratorClient(target) as client:
            with pytest.raises(ResourceExhaustedError):
                await client.cancel_run("a")

    asyncio.run(run())
    assert calls == ["CancelRun"]


def test_a_service_with_room_is_called_once() -> None:
    servicer = ScriptedReward(answer)
    assert score(servicer)[0] is None and servicer.calls == 1
