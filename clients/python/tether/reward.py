"""Client of the reward scorer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tether.channel import ServiceClient
from tether.errors import TetherError
from tether.generator import Message, chat_messages
from tether.status import from_code, request_field
from tether.v1 import reward_pb2, reward_pb2_grpc

if TYPE_CHECKING:
    from tether.v1.reward_pb2_grpc import RewardServiceAsyncStub

__all__ = [
    "CompareResult",
    "ItemScore",
    "PairPreference",
    "RewardClient",
    "RewardModel",
    "ScoreComponent",
    "ScoreItem",
    "ScoreResult",
]


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One response to judge, in exactly one form: text, a conversation, or token ids."""

    prompt: str = ""
    """Text form: the prompt."""
    response: str = ""
    """Text form: the response."""
    messages: Sequence[Message] = ()
    """Chat form: a conversation whose last message is the response."""
    prompt_token_ids: Sequence[int] = ()
    """Token form: the prompt."""
    response_token_ids: Sequence[int] = ()
    """Token form: the response, stop token included."""


@dataclass(frozen=True, slots=True)
class ScoreComponent:
    """One part of a score."""

    name: str
    """From the service's configuration."""
    value: float
    """Before weighting."""
    weight: float
    """In the sum."""


@dataclass(frozen=True, slots=True)
class ItemScore:
    """The judgement of one item, or why there is none."""

    score: float
    """What training uses; NaN if and only if `error` is set, so that it cannot pass for a judgement."""
    raw_score: float
    """Before the models' gain and bias; NaN like `score`."""
    components: tuple[ScoreComponent, ...]
    """The parts of the sum."""
    token_count: int
    """Tokens that the model read."""
    truncated: bool
    """True if prompt tokens were cut from the left."""
    error: TetherError | None = None
    """Why this item could not be scored."""


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Scores in the order of the items, and the model that gave them."""

    scores: tuple[ItemScore, ...]
    """One per item."""
    model: str
    """Name of the model."""
    version: str
    """Its version."""
    model_sha256: str
    """Its content hash."""


@dataclass(frozen=True, slots=True)
class PairPreference:
    """How likely response `first` is preferred to response `second`."""

    first: int
    """Index of the first response."""
    second: int
    """Index of the second response, above first."""
    probability: float
    """Bradley-Terry probability that the first is preferred."""


@dataclass(frozen=True, slots=True)
class CompareResult:
    """The ranking of responses to one prompt."""

    scores: tuple[ItemScore, ...]
    """In the order of the responses."""
    ranking: tuple[int, ...]
    """Indices of the responses, best first."""
    preferences: tuple[PairPreference, ...]
    """All pairs."""
    model: str
    """Name of the model."""
    version: str
    """Its version."""


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model that the service offers."""

    name: str
    """Name to score with."""
    version: str
    """Version label."""
    model_sha256: str
    """Content hash of its files."""
    engine: str
    """"fake", "transformers" or "rules"."""
    gain: float
    """score = gain * (raw_score - bias)."""
    bias: float
    """See gain."""
    max_model_len: int
    """Tokens per item at most; 0 if the model reads no tokens."""
    max_items: int
    """Items per call at most."""
    default_model: bool
    """True for the model that an empty name selects."""
    vocab_size: int
    """Number of token ids; 0 if the model reads no tokens."""
    default_version: bool
    """True for the version that its name without a version selects."""


class RewardClient(ServiceClient):
    """Scores responses."""

    @cached_property
    def _stub(self) -> RewardServiceAsyncStub:
        return reward_pb2_grpc.RewardServiceStub(self._channel)

    async def score(
        self,
        items: Sequence[ScoreItem],
        *,
        model: str = "",
        version: str = "",
        timeout_seconds: float | None = None,
    ) -> ScoreResult:
        """Return the scores of a batch; an item that cannot be scored carries its own error.

        Raises:
            InvalidArgumentError: No items or too many.
            NotFoundError: Unknown model or version.
            ResourceExhaustedError: The queue is full.
        """
        request = reward_pb2.ScoreRequest(
            items=[_item(item, index) for index, item in enumerate(items)], model=model, version=version
        )
        response = await self._read(self._stub.Score, request, timeout_seconds)
        return ScoreResult(
            scores=tuple(_score(score) for score in response.scores),
            model=response.model,
            version=response.version,
            model_sha256=response.model_sha256,
        )

    async def compare(
        self,
        prompt: str,
        responses: Sequence[str],
        *,
        model: str = "",
        version: str = "",
        timeout_seconds: float | None = None,
    ) -> CompareResult:
        """Return scores, ranking and pairwise preference probabilities of responses to one prompt."""
        with request_field("responses"):
            request = reward_pb2.CompareRequest(prompt=prompt, responses=responses, model=model, version=version)
        response = await self._read(self._stub.Compare, request, timeout_seconds)
        return CompareResult(
            scores=tuple(_score(score) for score in response.scores),
            ranking=tuple(response.ranking),
            preferences=tuple(PairPreference(p.first, p.second, p.probability) for p in response.preferences),
            model=response.model,
            version=response.version,
        )

    async def list_reward_models(self, *, timeout_seconds: float | None = None) -> tuple[RewardModel, ...]:
        """Return all reward models of the service."""
        models: list[RewardModel] = []
        token = ""
        while True:
            request = reward_pb2.ListRewardModelsRequest(page_token=token)
            page = await self._read(self._stub.ListRewardModels, request, timeout_seconds)
            models += [_model(model) for model in page.models]
            token = page.next_page_token
            if not token:
                return tuple(models)


def _item(item: ScoreItem, index: int) -> reward_pb2.ScoreItem:
    with request_field(f"items[{index}]"):
        return reward_pb2.ScoreItem(
            prompt=item.prompt,
            response=item.response,
            messages=chat_messages(item.messages, field=f"items[{index}].messages"),
            prompt_token_ids=item.prompt_token_ids,
            response_token_ids=item.response_token_ids,
        )


def _score(score: reward_pb2.ItemScore) -> ItemScore:
    if score.HasField("error"):
        failed = score.error
        error = from_code(failed.code, failed.message, reason=failed.reason, field=failed.field)
        return ItemScore(math.nan, math.nan, (), 0, False, error)
    return ItemScore(
        score=score.score,
        raw_score=score.raw_score,
        components=tuple(ScoreComponent(part.name, part.value, part.weight) for part in score.components),
        token_count=score.token_count,
        truncated=score.truncated,
    )


def _model(model: reward_pb2.RewardModel) -> RewardModel:
    return RewardModel(
        name=model.name,
        version=model.version,
        model_sha256=model.model_sha256,
        engine=model.engine,
        gain=model.gain,
        bias=model.bias,
        max_model_len=model.max_model_len,
        max_items=model.max_items,
        default_model=model.default_model,
        vocab_size=model.vocab_size,
        default_version=model.default_version,
    )
