"""Any number of items, services that score them, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

from tests.rpc.scripted_reward import ScriptedReward, answer
from tests.rpc.scripted_server import serving as serving_scripted
from tests.rpc.serving import LOCAL, Served, serving
from tether import RewardClient, ScoredItem, ScoreItem, TetherError
from tether.v1 import reward_pb2
from tether_services.reward.config import RewardSettings
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
