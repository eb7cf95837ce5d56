"""What every client does on every call: deadlines, retries, balancing, large messages, cancellation."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

import tether.channel
from tests.rpc.scripted_reward import ITEM, ScriptedReward, answer, fail_first, with_reward
from tests.rpc.scripted_server import serving
from tether import (
    FailedPreconditionError,
    OrchestratorClient,
    ResourceExhaustedError,
    RewardClient,
    ScoreItem,
    TetherError,
    UnavailableError,
)
from tether.channel_options import channel_options
from tether.v1 import orchestrator_pb2, orchestrator_pb2_grpc, reward_pb2


def test_scores_come_back_in_order_with_the_model() -> None:
    async def use(client: RewardClient) -> None:
        result = await client.score([ITEM, ScoreItem("a", "bb")])
        assert [score.score for score in result.scores] == [14.0, 2.0]
        assert all(score.error is None for score in result.scores)
        assert result.model == "length"

    with_reward(ScriptedReward(answer), use)


def test_lists_follow_their_pages_to_the_end() -> None:
    async def use(client: RewardClient) -> None:
        assert [model.name for model in await client.list_reward_models()] == ["first", "second"]

    with_reward(ScriptedReward(answer), use)


def test_unavailable_is_retried_where_the_call_has_no_effect() -> None:
    servicer = ScriptedReward(fail_first(2, UnavailableError("starting")))

    async def use(client: RewardClient) -> None:
        assert (await client.score([ITEM])).scores[0].score == 14.0

    with_reward(servicer, use)
    assert servicer.calls == 3


def test_a_request_of_a_megabyte_is_retried_too() -> None:
    # gRPC's own retry buffer holds 256 KiB; above it a retry is silently off.
    servicer = ScriptedReward(fail_first(1, UnavailableError("starting")))

    async def use(client: RewardClient) -> None:
        assert (await client.score([ScoreItem("", "x" * 1_000_000)])).scores[0].score == 1_000_000

    with_reward(servicer, use)
    assert servicer.calls == 2


@pytest.mark.parametrize(
    "error", [ResourceExhaustedError("full"), FailedPreconditionError("no", retry_after_seconds=0.01)]
)
def test_no_other_code_is_retried(error: TetherError) -> None:
    servicer = ScriptedReward(fail_first(1, error))

    async def use(client: RewardClient) -> None:
        with pytest.raises(type(error)):
            await client.score([ITEM])

    with_reward(servicer, use)
    assert servicer.calls == 1


def test_every_call_carries_the_deadline_of_the_client_or_its_own() -> None:
    servicer = ScriptedReward(answer)

    async def use(client: RewardClient) -> None:
        await client.score([ITEM])
        await client.score([ITEM], timeout_seconds=7)

    with_reward(servicer, use, timeout_seconds=50)
    assert 45 < servicer.remaining[0] < 51  # gRPC rounds up
    assert 5 < servicer.remaining[1] < 8


def test_calls_are_spread_over_all_addresses_of_a_target() -> None:
    first, second = ScriptedReward(answer), ScriptedReward(answer)

    async def run() -> None:
        async with (
            serving(first.add) as one,
            serving(second.add) as two,
            RewardClient(f"ipv4:{one},{two}") as client,
        ):
            await client.score([ITEM])
            await asyncio.sleep(0.3)  # both connections are up
            first.calls = second.calls = 0
            for _ in range(20):
                await client.score([ITEM])

    asyncio.run(run())
    assert (first.calls, second.calls) == (10, 10)


def test_a_response_above_grpcs_own_four_mebibytes_is_accepted() -> None:
    class Large(ScriptedReward):
        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
            return reward_pb2.ScoreResponse(model="x" * (6 * 1024 * 1024))

    async def use(client: RewardClient) -> None:
        assert len((await client.score([ITEM])).model) == 6 * 1024 * 1024

    with_reward(Large(answer), use)


class Starting(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Starts runs after a scripted behaviour."""

    def __init__(self, behaviour: Callable[[int], Awaitable[None]]) -> None:
        self.behaviour = behaviour
        self.calls = 0

    def add(self, server: grpc.aio.Server) -> None:
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self, server)

    async def StartRun(self, request: Any, context: Any) -> orchestrator_pb2.StartRunResponse:
        self.calls += 1
        await self.behaviour(self.calls)
        return orchestrator_pb2.StartRunResponse()


def test_a_call_with_an_effect_is_not_retried() -> None:
    servicer = Starting(fail_first(1, UnavailableError("draining", reason="DRAINING")))  # type: ignore[abstract]

    async def run() -> None:
        async with serving(servicer.add) as target, OrchestratorClient(target) as client:
            with pytest.raises(UnavailableError, match="draining"):
                await client.start_run("a", "")

    asyncio.run(run())
    assert servicer.calls == 1


FROZEN_SERVER = """
import asyncio
from tests.rpc.test_client_calls import Starting, serving
async def sleep(call): await asyncio.sleep(120)
async def main():
    async with serving(Starting(sleep).add) as target:
        print(target, flush=True)
        await asyncio.sleep(120)
asyncio.run(main())
"""


def test_a_frozen_peer_is_noticed_by_pings_long_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(channel_options())
    quick: dict[str, int | str] = {"grpc.keepalive_time_ms": 1000, "grpc.http2.ping_timeout_ms": 1000}
    assert quick.keys() <= options.keys()
    monkeypatch.setattr(tether.channel, "channel_options", lambda retries, replicas: list((options | quick).items()))
    server = subprocess.Popen([sys.executable, "-c", FROZEN_SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None

    async def run(target: str) -> float:
        async with OrchestratorClient(target) as client:
            starting = asyncio.create_task(client.start_run("a", "", timeout_seconds=60))
            await asyncio.sleep(1)
            os.kill(server.pid, signal.SIGSTOP)
            frozen = time.monotonic()
            with pytest.raises(UnavailableError):
                await starting
            return time.monotonic() - frozen

    try:
        assert asyncio.run(run(server.stdout.readline().strip())) < 15
    finally:
        server.kill()
        server.communicate()


def test_cancelling_the_task_cancels_the_call_on_the_server() -> None:
    cancelled = asyncio.Event()

    async def sleep(call: int) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def use(client: RewardClient) -> None:
        call = asyncio.create_task(client.score([ITEM]))
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(cancelled.wait(), 5)

    with_reward(ScriptedReward(sleep), use)
