"""A client waits for a service that has answered before, so that its restart costs no call."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio

import tether.channel
from tests.rpc.scripted_reward import ITEM, ScriptedReward, answer, fail_first
from tests.rpc.scripted_server import serving
from tether import DeadlineExceededError, FailedPreconditionError, RewardClient, UnavailableError
from tether.breaker import BREAKER_OPEN
from tether_services.local.ports import free_ports


@pytest.mark.parametrize("retries", [True, False])
def test_a_service_that_has_answered_before_is_waited_for(retries: bool) -> None:
    """The control, without retries, loses the call."""
    before, after = ScriptedReward(answer), ScriptedReward(answer)

    async def run() -> bool:
        async with serving(before.add) as target:
            client = RewardClient(target, retries=retries)
            await client.score([ITEM])
        began = time.monotonic()
        call = asyncio.create_task(client.score([ITEM], timeout_seconds=30))
        await asyncio.sleep(tether.channel.UNKNOWN_SECONDS + 1.5)
        async with serving(after.add, port=int(target.rpartition(":")[2])), client:
            try:
                assert (await call).scores[0].score == 14.0
            except UnavailableError:
                return False
            assert time.monotonic() - began < 12
            return True

    assert asyncio.run(run()) is retries
    assert after.calls == retries


def test_a_service_that_stays_away_is_given_up_and_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tether.channel, "AWAY_SECONDS", 3.0)
    monkeypatch.setattr(tether.channel, "UNKNOWN_SECONDS", 0.5)

    async def run() -> None:
        async with serving(ScriptedReward(answer).add) as target:
            client = RewardClient(target)
            await client.score([ITEM])
        seconds = []
        async with client:
            for _ in range(2):
                began = time.monotonic()
                with pytest.raises(UnavailableError, match=target):
                    await client.score([ITEM], timeout_seconds=60)
                seconds.append(time.monotonic() - began)
        assert seconds[1] + 1 < seconds[0] < 15

    asyncio.run(run())


def test_waiting_for_a_service_ends_with_the_deadline_of_the_call() -> None:
    async def run() -> None:
        async with serving(ScriptedReward(answer).add) as target:
            client = RewardClient(target)
            await client.score([ITEM])
        async with client:
            began = time.monotonic()
            with pytest.raises((UnavailableError, DeadlineExceededError), match=target):
                await client.score([ITEM], timeout_seconds=4)
            assert time.monotonic() - began < 5

    asyncio.run(run())


@pytest.mark.parametrize("refusals", [2, 5])
def test_a_service_that_answers_that_it_is_starting_is_asked_again(refusals: int) -> None:
    """More often than gRPC asks by itself, which is three times."""
    servicer = ScriptedReward(fail_first(refusals, UnavailableError("starting", reason="STARTING")))

    async def run() -> None:
        async with serving(servicer.add) as target, RewardClient(target) as client:
            assert (await client.score([ITEM])).scores[0].score == 14.0

    asyncio.run(run())
    assert servicer.calls == refusals + 1


def test_an_open_breaker_is_not_waited_for() -> None:
    servicer = ScriptedReward(fail_first(1000, UnavailableError("away")))
    health = aio.HealthServicer()

    def add_health(server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(health, server)

    async def run() -> None:
        await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        async with serving(servicer.add, add_health) as target, RewardClient(target, breaker=True) as client:
            client._has_answered = True
            began = time.monotonic()
            with pytest.raises(UnavailableError) as caught:
                await client.score([ITEM], timeout_seconds=30)
            assert caught.value.reason == BREAKER_OPEN
            assert time.monotonic() - began < 10

    asyncio.run(run())


def test_a_short_deadline_that_ran_out_leaves_the_waiting_on_for_other_calls() -> None:
    async def run() -> None:
        (port,) = free_ports(1)
        async with serving(ScriptedReward(answer).add, port=port) as target:
            client = RewardClient(target)
            await client.score([ITEM])
        with pytest.raises((UnavailableError, DeadlineExceededError)):
            await client.score([ITEM], timeout_seconds=0.7)
        call = asyncio.create_task(client.score([ITEM], timeout_seconds=30))
        await asyncio.sleep(tether.channel.UNKNOWN_SECONDS + 1.5)
        async with serving(ScriptedReward(answer).add, port=port), client:
            assert (await call).scores[0].score == 14.0

    asyncio.run(run())


@pytest.mark.parametrize("reason", ["ENGINE_FAILED", "ADAPTER_MISSING"])
def test_a_service_that_states_that_it_is_not_there_is_asked_ever_more_rarely(reason: str) -> None:
    """And not again where only a push helps. Each try is three calls, as gRPC repeats it."""
    servicer = ScriptedReward(fail_first(1000, UnavailableError("not now", reason=reason)))

    async def run() -> None:
        async with serving(servicer.add) as target, RewardClient(target) as client:
            client._has_answered = True
            began = time.monotonic()
            with pytest.raises(UnavailableError, match=reason):
                await client.score([ITEM], timeout_seconds=12)
            assert (time.monotonic() - began < 3) is (reason == "ADAPTER_MISSING")
            assert client._has_answered

    asyncio.run(run())
    assert servicer.calls == 3 if reason == "ADAPTER_MISSING" else 9 <= servicer.calls <= 18


@pytest.mark.parametrize("stated", [True, False])
def test_closing_a_client_ends_the_calls_that_wait_for_the_service(stated: bool) -> None:
    """Whether the service says that it is not there or is gone."""
    servicer = ScriptedReward(fail_first(1000, UnavailableError("not now")))

    async def run() -> None:
        async with serving(servicer.add) as target:
            address = target if stated else "127.0.0.1:1"
            client = RewardClient(address)
            client._has_answered = True
            waiting = asyncio.Event()
            comes_back = client._comes_back

            async def note(give_up: float, pause: float) -> bool:
                waiting.set()
                return await comes_back(give_up, max(pause, 3.0))

            client._comes_back = note  # type: ignore[method-assign]
            calls = [asyncio.create_task(client.score([ITEM])) for _ in range(3)]
            await waiting.wait()
            await asyncio.sleep(1.5)
            began = time.monotonic()
            await client.close()
            for call in calls:
                with pytest.raises(FailedPreconditionError, match="CLIENT_CLOSED"):
                    await asyncio.wait_for(call, 5)
            assert time.monotonic() - began < 1

    asyncio.run(run())
