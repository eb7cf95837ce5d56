"""Several addresses behind one target: calls go to those that say that they serve."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from tests.rpc.serving import LOCAL, Served, run, serving
from tether.channel_options import channel_options, has_replicas
from tether.reward import RewardClient, ScoreItem
from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService

SETTINGS = RewardSettings.model_validate(LOCAL | {"engine": "fake"})
ITEM = ScoreItem("a prompt", "a response")


@pytest.mark.parametrize(
    ("target", "expected"),
    [("dns:///reward:50052", True), ("ipv4:10.0.0.1:1,10.0.0.2:1", True), ("127.0.0.1:1", False), ("unix:/x", False)],
)
def test_a_target_of_several_addresses_is_told_by_its_form(target: str, expected: bool) -> None:
    assert has_replicas(target) is expected


def calls_of(served: Served) -> float:
    return served.value("tether_reward_request_seconds_count", method="Score")


def test_a_replica_that_says_it_does_not_serve_gets_no_call_and_one_that_serves_again_does() -> None:
    async def scenario() -> None:
        async with (
            serving(SETTINGS, lambda registry: RewardService(SETTINGS, registry)) as ill,
            serving(SETTINGS, lambda registry: RewardService(SETTINGS, registry)) as well,
            RewardClient(f"ipv4:{ill.target},{well.target}", retries=False) as client,
        ):
            while not (calls_of(ill) and calls_of(well)):
                await client.score([ITEM])
            await ill.runner.health.engine_failed()
            await until_left(client, ill, well)
            before = calls_of(ill)
            for _ in range(20):
                await client.score([ITEM])
            assert calls_of(ill) == before
            await ill.runner.health.ready()
            while calls_of(ill) == before:
                await client.score([ITEM])

    run(scenario())


async def until_left(client: RewardClient, ill: Served, well: Served) -> None:
    """Wait until two calls in a row went to the one that serves; the first may have been on their way before."""
    streak = 0
    while streak < 2:
        before = calls_of(well)
        await asyncio.gather(client.score([ITEM]), return_exceptions=True)
        streak = streak + 1 if calls_of(well) > before else 0


def test_without_a_look_at_health_half_of_the_calls_fail() -> None:
    """The control."""

    async def scenario() -> None:
        async with (
            serving(SETTINGS, lambda registry: RewardService(SETTINGS, registry)) as ill,
            serving(SETTINGS, lambda registry: RewardService(SETTINGS, registry)) as well,
            grpc.aio.insecure_channel(
                f"ipv4:{ill.target},{well.target}", options=channel_options(retries=False)
            ) as channel,
        ):
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(response="x")])
            while not (calls_of(ill) and calls_of(well)):
                await stub.Score(request, timeout=5)
            await ill.runner.health.engine_failed()
            calls = [stub.Score(request, timeout=5) for _ in range(20)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert 5 <= sum(isinstance(result, grpc.aio.AioRpcError) for result in results) <= 15

    run(scenario())
