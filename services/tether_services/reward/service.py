"""The reward service on the wire: RewardService, and RewardModelService on the admin port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import grpc
from prometheus_client import CollectorRegistry

from tether.errors import InvalidArgumentError
from tether.v1 import reward_model_pb2_grpc, reward_pb2, reward_pb2_grpc
from tether_services.reward.admin import MAX_ADMIN_MESSAGE_BYTES, RewardModelService
from tether_services.reward.comparison import MAX_RESPONSES, MIN_RESPONSES, expect_judgement, preference, rank
from tether_services.reward.config import RewardSettings
from tether_services.reward.control import ModelControl, ModelParts
from tether_services.reward.defaults import DefaultsFile
from tether_services.reward.loading import ModelLoader
from tether_services.reward.metrics import RewardMetrics
from tether_services.reward.pool import HeldModel, ModelPool
from tether_services.reward.scoring import Scorer
from tether_services.reward.shadow import ShadowScorer
from tether_services.reward.wire import count_ids, cut_page, read_items, write_score
from tether_services.runtime.server import Port

SERVICE_NAME = "tether.v1.RewardService"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """Wires the parts, and answers the RPCs of tether.v1.RewardService."""

    name = "reward"

    def __init__(self, settings: RewardSettings, registry: CollectorRegistry) -> None:
        self._settings = settings
        metrics = RewardMetrics(registry, queue_limit=settings.batch.queue_limit)
        self._pool = ModelPool(max_models=settings.max_models)
        self._scorer = Scorer(settings, metrics)
        self._shadow = ShadowScorer(self._scorer, settings.shadow, metrics.shadow)
        self._loader = ModelLoader(settings, self._pool, metrics)
        parts = ModelParts(self._pool, self._loader, self._shadow, DefaultsFile(settings.state_dir))
        self._control = ModelControl(parts, metrics)
        self._admin = RewardModelService(parts, self._control, self._scorer.cache, settings.cache)

    def ports(self) -> Sequence[Port]:
        """Return the data port, and the admin port if there is to be one."""
        data = Port(
            "address",
            self._settings.address,
            [SERVICE_NAME],
            lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(self, server),
            self._settings.max_message_bytes,
        )
        admin = Port(
            "admin_address",
            self._settings.admin_address,
            [self._admin.full_name],
            lambda server: reward_model_pb2_grpc.add_RewardModelServiceServicer_to_server(self._admin, server),
            max_message_bytes=MAX_ADMIN_MESSAGE_BYTES,
        )
        return (data, admin) if self._settings.admin_address else (data,)

    def methods(self) -> Sequence[str]:
        """Return the names of the RPCs of both services."""
        return ["Score", "Compare", "ListRewardModels", *self._admin.methods()]

    async def start(self) -> None:
        """Load the models, then take back what was switched before."""
        await self._loader.load_configured()
        await self._control.restore()
        self._scorer.start()
        self._shadow.start()
        await self.check()

    async def check(self) -> None:
        """Have the thread that reads text and the batcher take a turn, and every engine answer a tiny request."""
        await self._scorer.check()
        for held in self._pool.all():
            if self._pool.holds(held):  # it may have been unloaded while the one before was asked
                with held.used() as model:
                    await model.check()

    def on_failure(self, report: Callable[[BaseException], None]) -> None:
        """Report the death of the batcher."""
        self._scorer.batcher.on_death = report

    async def close(self) -> None:
        """Stop the batcher, then the engines."""
        self._loader.close()
        await self._shadow.close()
        await self._scorer.stop()
        await asyncio.gather(*(held.model.close() for held in self._pool.all()))
        self._scorer.close()

    async def Score(self, request: reward_pb2.ScoreRequest, context: Context) -> reward_pb2.ScoreResponse:
        """Return one score or one error per item."""
        with self._pool.selected(request.model, request.version) as held:
            limit = self._settings.max_items
            if not 1 <= len(request.items) <= limit:
                raise InvalidArgumentError(f"{len(request.items)} items; 1 to {limit} are accepted.", field="items")
            read = partial(read_items, request.items)
            left = context.time_remaining()
            judged = await self._scorer.judge(
                held, read, num_items=len(request.items), num_ids=count_ids(request.items), timeout_seconds=left
            )
            self._shadow.offer(held, judged)
            return reward_pb2.ScoreResponse(
                scores=[write_score(outcome, field=f"items[{i}]") for i, outcome in enumerate(judged.outcomes)],
                model=held.id.name,
                version=held.id.version,
                model_sha256=held.model.sha256,
            )

    async def Compare(self, request: reward_pb2.CompareRequest, context: Context) -> reward_pb2.CompareResponse:
        """Return scores, ranking and pairwise preferences; one bad response fails the call."""
        with self._pool.selected(request.model, request.version) as held:
            count = len(request.responses)
            if not MIN_RESPONSES <= count <= MAX_RESPONSES:
                raise InvalidArgumentError(
                    f"{count} responses; {MIN_RESPONSES} to {MAX_RESPONSES} are accepted.", field="responses"
                )
            items = [reward_pb2.ScoreItem(prompt=request.prompt, response=response) for response in request.responses]
            read = partial(read_items, items)
            left = context.time_remaining()
            judged = await self._scorer.judge(held, read, num_items=count, num_ids=None, timeout_seconds=left)
            judgements = [expect_judgement(outcome, index=index) for index, outcome in enumerate(judged.outcomes)]
            self._shadow.offer(held, judged)
            scores = [judgement.score for judgement in judgements]
            gain, _ = held.model.scale()
            return reward_pb2.CompareResponse(
                scores=[write_score(judgement, field="") for judgement in judgements],
                ranking=rank(scores),
                preferences=[
                    reward_pb2.PairPreference(
                        first=i, second=j, probability=preference(scores[i] / gain, scores[j] / gain)
                    )
                    for i in range(count)
                    for j in range(i + 1, count)
                ],
                model=held.id.name,
                version=held.id.version,
            )

    async def ListRewardModels(
        self, request: reward_pb2.ListRewardModelsRequest, context: Context
    ) -> reward_pb2.ListRewardModelsResponse:
        """Return one page of the models that calls can select, the default one first."""
        models = self._pool.selectable()
        page, following = cut_page(len(models), page_size=request.page_size, page_token=request.page_token)
        return reward_pb2.ListRewardModelsResponse(
            models=[self._describe(held) for held in models[page]], next_page_token=following
        )

    def _describe(self, held: HeldModel) -> reward_pb2.RewardModel:
        model = held.model
        gain, bias = model.scale()
        return reward_pb2.RewardModel(
            name=model.name,
            version=model.version,
            model_sha256=model.sha256,
            engine=model.engine,
            gain=gain,
            bias=bias,
            max_model_len=model.reader.max_model_len,
            max_items=self._settings.max_items,
            default_model=held.id == self._pool.default,
            vocab_size=model.reader.vocab_size,
            default_version=held.id == self._pool.default_of(held.id.name),
        )
