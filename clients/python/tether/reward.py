"""Client of the reward scorer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tether.channel import ServiceClient
from tether.score_stream import CONCURRENCY, OnScored, ScoreStream, StreamOptions, each
from tether.scores import ItemScore, ScoreComponent, ScoredItem, ScoreItem, ScoreResult, item_message, item_score
from tether.status import request_field
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
    "ScoredItem",
]


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
        messages = [item_message(item, index) for index, item in enumerate(items)]
        request = reward_pb2.ScoreRequest(items=messages, model=model, version=version)
        return await self._score_request(request, timeout_seconds)

    async def _score_request(self, request: reward_pb2.ScoreRequest, timeout_seconds: float | None) -> ScoreResult:
        """Return the answer to a request of the contract."""
        response = await self._read(self._stub.Score, request, timeout_seconds)
        return ScoreResult(
            scores=tuple(item_score(score) for score in response.scores),
            model=response.model,
            version=response.version,
            model_sha256=response.model_sha256,
        )

    async def score_many(
        self,
        items: Iterable[ScoreItem] | AsyncIterable[ScoreItem],
        *,
        model: str = "",
        version: str = "",
        one_version: bool = True,
        concurrency: int = CONCURRENCY,
        on_progress: OnScored | None = None,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[ScoredItem, None]:
        """Yield the scores of any number of items, in their order; an item that cannot be scored carries its own error.

        In memory are the items of `concurrency` + 2 calls at most: the source is read as fast as results are taken.
        Items are gathered to calls as large as the service takes, so a source that waits for results never ends; it
        should not block the event loop either. A full service is waited for as in every call.

        Args:
            items: What to score.
            model: Name of the model; empty: the default one.
            version: Its version; empty: whichever is loaded.
            one_version: Have all answers from the version that gave the first one.
            concurrency: Calls in flight at most.
            on_progress: Called with the number of items done whenever a call's results are there.
            timeout_seconds: Deadline of each call.

        Raises:
            FailedPreconditionError: MODEL_CHANGED: `one_version`, and the version is no longer served.
            TetherError: A call failed; the message ends with how many items were delivered before.
        """
        options = StreamOptions(model, version, one_version, concurrency, timeout_seconds)
        async with ScoreStream(self, options) as stream:
            async for item in each(items):
                stream.add(item)
                while stream.is_due:
                    for scored in await stream.advance(on_progress):
                        yield scored
            stream.end()
            while stream.is_due:
                for scored in await stream.advance(on_progress):
                    yield scored

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
            scores=tuple(item_score(score) for score in response.scores),
            ranking=tuple(response.ranking),
            preferences=tuple(PairPreference(p.first, p.second, p.probability) for p in response.preferences),
            model=response.model,
            version=response.version,
        )

    async def list_reward_models(self, *, timeout_seconds: float | None = None) -> tuple[RewardModel, ...]:
        """Return all reward models of the service."""
        pages = self._pages(self._stub.ListRewardModels, reward_pb2.ListRewardModelsRequest(), timeout_seconds)
        return tuple([_model(model) async for page in pages for model in page.models])


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
