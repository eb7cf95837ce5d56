"""A reward service on the running loop whose behaviour the tests write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from tests.rpc.scripted_server import serving
from tether import InvalidArgumentError, RewardClient, ScoreItem, TetherError
from tether.v1 import reward_pb2, reward_pb2_grpc

ITEM = ScoreItem("Once upon a time", " all was well.")


class ScriptedReward(reward_pb2_grpc.RewardServiceServicer):
    """Scores with the response's length after a scripted behaviour."""

    def __init__(self, behaviour: Callable[[int], Awaitable[None]]) -> None:
        self.behaviour = behaviour
        self.calls = 0
        self.remaining: list[float] = []

    def add(self, server: grpc.aio.Server) -> None:
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, server)

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        self.calls += 1
        self.remaining.append(context.time_remaining())
        await self.behaviour(self.calls)
        return reward_pb2.ScoreResponse(
            scores=[reward_pb2.ItemScore(score=len(item.response)) for item in request.items], model="length"
        )

    async def Compare(self, request: reward_pb2.CompareRequest, context: Any) -> reward_pb2.CompareResponse:
        raise InvalidArgumentError("Two responses are needed.", field="responses")

    async def ListRewardModels(
        self, request: reward_pb2.ListRewardModelsRequest, context: Any
    ) -> reward_pb2.ListRewardModelsResponse:
        """Two pages of one model each."""
        second = request.page_token == "2"
        return reward_pb2.ListRewardModelsResponse(
            models=[reward_pb2.RewardModel(name="second" if second else "first")],
            next_page_token="" if second else "2",
        )


async def answer(call: int) -> None:
    """Behave well."""


def fail_first(count: int, error: TetherError) -> Callable[[int], Awaitable[None]]:
    async def behaviour(call: int) -> None:
        if call <= count:
            raise error

    return behaviour


def with_reward(servicer: ScriptedReward, use: Callable[[RewardClient], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with serving(servicer.add) as target, RewardClient(target, **options) as client:
            await use(client)

    asyncio.run(run())
