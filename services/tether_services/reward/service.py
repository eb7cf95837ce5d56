"""The reward service on the wire: check, convert, call, convert."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import grpc
from prometheus_client import CollectorRegistry

from tether.errors import FieldViolation, InternalError, InvalidArgumentError, NotFoundError, TetherError
from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.reward.config import RewardSettings
from tether_services.reward.items import PreparedItem, ScoreInput
from tether_services.reward.metrics import RewardMetrics
from tether_services.reward.models import Judgement, Refusal, RewardModel, load_model
from tether_services.runtime.batching import Batcher
from tether_services.runtime.callers import charge_tokens
from tether_services.runtime.checks import check_page
from tether_services.runtime.logging import log_event
from tether_services.runtime.server import Port
from tether_services.runtime.text import Message, check_message_count
from tether_services.runtime.thread_clock import ThreadClock

log = logging.getLogger(__name__)

SERVICE_NAME = "tether.v1.RewardService"
MIN_RESPONSES, MAX_RESPONSES = 2, 16
"""Responses that Compare ranks."""

ResultT = TypeVar("ResultT")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Outcome = Judgement | Refusal
Queued = tuple[str, PreparedItem]
"""Name of the model and the item."""


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """Answers the RPCs of tether.v1.RewardService."""

    name = "reward"

    def __init__(self, settings: RewardSettings, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._metrics = RewardMetrics(registry, queue_limit=settings.batch.queue_limit)
        self._models: dict[str, RewardModel] = {}
        self._batcher = Batcher[Queued, Outcome](self._run_batch, settings.batch, self._metrics.queue)
        # One thread: the tokenizers of some models must not be used by two at a time.
        self._text_clock = ThreadClock()
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="reward-text", initializer=self._text_clock.attach)

    def ports(self) -> Sequence[Port]:
        """Return the data port."""
        return [
            Port("address", self._settings.address, [SERVICE_NAME], self._register, self._settings.max_message_bytes)
        ]

    def methods(self) -> Sequence[str]:
        """Return the names of the RPCs."""
        return ["Score", "Compare", "ListRewardModels"]

    async def start(self) -> None:
        """Load the models."""
        for index, settings in enumerate(self._settings.reward_models()):
            model = await load_model(self._settings, settings, field=f"models[{index}]")
            self._models[model.name] = model
            self._metrics.model.labels(model.name).info({"version": model.version, "sha256": model.sha256})
            log_event(log, "model loaded", engine=model.engine, model=model.name, sha256=model.sha256)
        self._batcher.start()
        await self.check()

    async def check(self) -> None:
        """Have the thread that reads text and the batcher take a turn, and every engine answer a tiny request."""
        await self._text_clock.wait_for_life(self._in_text_thread(int))
        await self._batcher.probe()
        for model in self._models.values():
            await model.check()

    def on_failure(self, report: Callable[[BaseException], None]) -> None:
        """Report the death of the batcher."""
        self._batcher.on_death = report

    async def close(self) -> None:
        """Stop the batcher, then the engines."""
        await self._batcher.close()
        await asyncio.gather(*(model.close() for model in self._models.values()))
        self._text_thread.shutdown(wait=False, cancel_futures=True)

    async def Score(self, request: reward_pb2.ScoreRequest, context: Context) -> reward_pb2.ScoreResponse:
        """Return one score or one error per item."""
        model = self._find_model(request.model, request.version)
        limit = self._settings.max_items
        if not 1 <= len(request.items) <= limit:
            raise InvalidArgumentError(f"{len(request.items)} items; 1 to {limit} are accepted.", field="items")
        outcomes = await self._judge(model, request.items, timeout_seconds=context.time_remaining())
        return reward_pb2.ScoreResponse(
            scores=[write_score(outcome, field=f"items[{index}]") for index, outcome in enumerate(outcomes)],
            model=model.name,
            version=model.version,
            model_sha256=model.sha256,
        )

    async def Compare(self, request: reward_pb2.CompareRequest, context: Context) -> reward_pb2.CompareResponse:
        """Return scores, ranking and pairwise preferences; one bad response fails the call."""
        model = self._find_model(request.model, request.version)
        count = len(request.responses)
        if not MIN_RESPONSES <= count <= MAX_RESPONSES:
            raise InvalidArgumentError(
                f"{count} responses; {MIN_RESPONSES} to {MAX_RESPONSES} are accepted.", field="responses"
            )
        items = [reward_pb2.ScoreItem(prompt=request.prompt, response=response) for response in request.responses]
        outcomes = await self._judge(model, items, timeout_seconds=context.time_remaining())
        judgements = [expect_judgement(outcome, index=index) for index, outcome in enumerate(outcomes)]
        scores = [judgement.score for judgement in judgements]
        gain, _ = model.scale()
        return reward_pb2.CompareResponse(
            scores=[write_score(judgement, field="") for judgement in judgements],
            ranking=rank(scores),
            preferences=[
                reward_pb2.PairPreference(first=i, second=j, probability=preference(scores[i] / gain, scores[j] / gain))
                for i in range(count)
                for j in range(i + 1, count)
            ],
            model=model.name,
            version=model.version,
        )

    async def ListRewardModels(
        self, request: reward_pb2.ListRewardModelsRequest, context: Context
    ) -> reward_pb2.ListRewardModelsResponse:
        """Return one page of the models, the default one first."""
        size, start = check_page(request.page_size, request.page_token)
        models = list(self._models.values())
        page = models[start : start + size]
        more = start + size < len(models)
        return reward_pb2.ListRewardModelsResponse(
            models=[self._describe(model, default_model=model is models[0]) for model in page],
            next_page_token=str(start + size) if more else "",
        )

    def _register(self, server: grpc.aio.Server) -> None:
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, server)

    def _find_model(self, name: str, version: str) -> RewardModel:
        """Return the model of a request; an empty name selects the first one."""
        model = self._models.get(name) if name else next(iter(self._models.values()))
        if model is None:
            raise NotFoundError(
                f"There is no reward model {name[:80]!r}; ListRewardModels names them.",
                field="model",
                reason="MODEL_NOT_FOUND",
            )
        if version and version != model.version:
            raise NotFoundError(
                f"Model {model.name} is loaded in version {model.version!r}, not {version[:80]!r}.",
                field="version",
                reason="VERSION_NOT_FOUND",
            )
        return model

    async def _judge(
        self, model: RewardModel, items: Sequence[reward_pb2.ScoreItem], *, timeout_seconds: float
    ) -> list[Outcome]:
        """Return a judgement or a refusal per item, in order."""
        with self._batcher.reserve(len(items)) as place:  # before any reading: a call without room costs nothing
            prepared = await self._in_text_thread(prepare_all, model, items)
            ready = [item for item in prepared if isinstance(item, PreparedItem)]
            queued = [((model.name, item), max(1, item.task.num_tokens)) for item in ready]
            charge_tokens(sum(tokens for _, tokens in queued))
            answers = self._batcher.submit_all(queued, key=model.name, timeout_seconds=timeout_seconds, place=place)
            judged = iter(await answers)
        outcomes = [next(judged) if isinstance(item, PreparedItem) else item for item in prepared]
        self._count(outcomes)
        return outcomes

    async def _in_text_thread(self, function: Callable[..., ResultT], *arguments: object) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, function, *arguments)

    async def _run_batch(self, batch: Sequence[Queued]) -> list[Outcome]:
        return await self._models[batch[0][0]].score([item for _, item in batch])

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Judgement):
                self._metrics.items.labels("scored").inc()
                self._metrics.tokens.inc(outcome.token_count)
            else:
                ours = isinstance(outcome.error, InternalError)
                self._metrics.items.labels("failed" if ours else "refused").inc()

    def _describe(self, model: RewardModel, *, default_model: bool) -> reward_pb2.RewardModel:
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
            default_model=default_model,
            vocab_size=model.reader.vocab_size,
        )


def prepare_all(model: RewardModel, items: Sequence[reward_pb2.ScoreItem]) -> list[PreparedItem | Refusal]:
    """Return every item prepared, or why it cannot be. Reads and tokenises all of it: call it in a thread."""
    prepared: list[PreparedItem | Refusal] = []
    for item in items:
        try:
            prepared.append(model.reader.prepare(read_item(item)))
        except TetherError as error:
            prepared.append(Refusal(error))
    return prepared


def read_item(item: reward_pb2.ScoreItem) -> ScoreInput:
    """Return the item as plain values, not checked.

    Raises:
        InvalidArgumentError: A conversation of too many turns.
    """
    check_message_count(len(item.messages), field="messages")
    return ScoreInput(
        prompt=item.prompt,
        response=item.response,
        messages=tuple(Message(message.role, message.content) for message in item.messages),
        prompt_token_ids=tuple(item.prompt_token_ids),
        response_token_ids=tuple(item.response_token_ids),
    )


def write_score(outcome: Outcome, *, field: str) -> reward_pb2.ItemScore:
    """Return the message for an outcome; `field` is the path of the item."""
    if isinstance(outcome, Refusal):
        error = relocate(outcome.error, field=field)
        number: int = error.code.value[0]
        place = error.violations[0].field
        return reward_pb2.ItemScore(
            error=reward_pb2.ItemError(code=number, reason=error.reason, message=error.message, field=place)
        )
    return reward_pb2.ItemScore(
        score=outcome.score,
        raw_score=outcome.raw_score,
        components=[
            reward_pb2.ScoreComponent(name=part.name, value=part.value, weight=part.weight)
            for part in outcome.components
        ],
        token_count=outcome.token_count,
        truncated=outcome.truncated,
    )


def relocate(error: TetherError, *, field: str) -> TetherError:
    """Return the same error with its field, which is relative to an item, under the path of the item."""
    inner = error.violations[0].field if error.violations else ""
    place = ".".join(part for part in (field, inner) if part)
    violations = (FieldViolation(place, error.message),) if place else ()
    return type(error)(error.message, reason=error.reason, violations=violations)


def expect_judgement(outcome: Outcome, *, index: int) -> Judgement:
    """Return the judgement of response `index` of a comparison.

    Raises:
        TetherError: It was refused; names the field of the comparison.
    """
    if isinstance(outcome, Judgement):
        return outcome
    inner = outcome.error.violations[0].field if outcome.error.violations else "response"
    place = f"responses[{index}]" if inner == "response" else inner
    raise type(outcome.error)(outcome.error.message, reason=outcome.error.reason, field=place)


def rank(scores: Sequence[float]) -> list[int]:
    """Return the places of the scores, best first; equal ones keep their order."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def preference(first: float, second: float) -> float:
    """Return the Bradley-Terry probability that the first is preferred: sigmoid(first - second)."""
    difference = first - second
    if difference >= 0:
        return 1.0 / (1.0 + math.exp(-difference))
    odds = math.exp(difference)  # the other form would overflow for a large negative difference
    return odds / (1.0 + odds)
