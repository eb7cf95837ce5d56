"""Client of the reward service's admin port: loads reward models, switches between versions and compares them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from tether.attempts import read_request_id
from tether.channel import ServiceClient
from tether.status import request_field
from tether.v1 import reward_model_pb2, reward_model_pb2_grpc

if TYPE_CHECKING:
    from tether.v1.reward_model_pb2_grpc import RewardModelServiceAsyncStub

__all__ = ["LoadedRewardModel", "LoadedRewardModels", "RewardModelClient", "RewardModelShadow", "ScoreCacheState"]

RewardModelState = Literal["loading", "warm", "serving", "draining"]
_STATES: dict[int, RewardModelState] = {
    reward_model_pb2.REWARD_MODEL_STATE_LOADING: "loading",
    reward_model_pb2.REWARD_MODEL_STATE_WARM: "warm",
    reward_model_pb2.REWARD_MODEL_STATE_SERVING: "serving",
    reward_model_pb2.REWARD_MODEL_STATE_DRAINING: "draining",
}


@dataclass(frozen=True, slots=True)
class LoadedRewardModel:
    """A version of a reward model that the service holds."""

    name: str
    """Its name."""
    version: str
    """Its version."""
    model_sha256: str
    """Content hash, as answers carry it; empty while it is loading."""
    engine: str
    """Engine that runs it; empty while it is loading."""
    state: RewardModelState
    """Its state: `warm` can be pinned, `serving` is also a default."""
    default_model: bool
    """True for the version that an empty name selects."""
    default_version: bool
    """True for the version that its name without a version selects."""
    active_request_count: int
    """Calls and batches that use it now."""
    cache_hit_count: int
    """Items that were answered from the cache."""
    cache_miss_count: int
    """Items that were looked up in the cache and not there."""
    create_time: datetime | None
    """When it was ready, in UTC; None while it is loading."""


@dataclass(frozen=True, slots=True)
class ScoreCacheState:
    """The score cache, which all models share."""

    item_count: int
    """Scores in it now."""
    max_item_count: int
    """Scores that it may hold; 0: there is no cache."""
    size_bytes: int
    """Memory that they take, estimated."""
    max_size_bytes: int
    """Memory that they may take."""


@dataclass(frozen=True, slots=True)
class RewardModelShadow:
    """A candidate that scores what a base scores, and how they differ since it was set."""

    base: str
    """Whose calls are scored again: "name@version"."""
    candidate: str
    """Who scores them again: "name@version"."""
    fraction: float
    """Share of the calls, above 0 and at most 1."""
    scored_count: int
    """Items that both have scored."""
    dropped_count: int
    """Items that were left out because the service was busy."""
    failed_count: int
    """Items that the candidate could not score."""
    mean_difference: float
    """Mean of candidate minus base over the scored items."""
    mean_abs_difference: float
    """Mean of the absolute difference."""
    pair_count: int
    """Pairs of responses to one prompt in one call that both have scored."""
    agreeing_pair_count: int
    """Those of the pairs that both put in the same order."""


@dataclass(frozen=True, slots=True)
class LoadedRewardModels:
    """What a reward service holds."""

    models: tuple[LoadedRewardModel, ...]
    """All versions, the default one first."""
    cache: ScoreCacheState
    """The cache."""
    shadow: RewardModelShadow | None
    """What is compared; None if nothing is."""


class RewardModelClient(ServiceClient):
    """Changes what a reward service holds. Calls with an effect are repeated with their request id on UNAVAILABLE."""

    @cached_property
    def _stub(self) -> RewardModelServiceAsyncStub:
        return reward_model_pb2_grpc.RewardModelServiceStub(self._channel)

    async def load(
        self,
        name: str,
        version: str,
        *,
        expected_sha256: str = "",
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> LoadedRewardModel:
        """Load a version from the service's store, have it warmed up, and return it.

        The service goes on loading if this call ends early; the same request id then waits for the same load.

        Args:
            name: Of the model in the store.
            version: Its version in the store.
            expected_sha256: Content hash that it must have; empty: any.
            request_id: UUID of this load, to repeat it later without a second effect; a new one else.
            timeout_seconds: Deadline of each of the calls; weights of a large model take minutes to read.

        Raises:
            NotFoundError: The store has no such version.
            FailedPreconditionError: It cannot serve; the reason says why.
            ResourceExhaustedError: LOAD_IN_PROGRESS, TOO_MANY_MODELS.
        """
        with request_field("name"):
            request = reward_model_pb2.LoadRewardModelRequest(
                request_id=read_request_id(request_id), name=name, version=version, expected_sha256=expected_sha256
            )
        response = await self._repeat(self._stub.LoadRewardModel, request, timeout_seconds)
        return _model(response.model)

    async def unload(
        self, name: str, version: str, *, request_id: str = "", timeout_seconds: float | None = None
    ) -> None:
        """Unload a version; returns when its last call has ended and its memory is free.

        Raises:
            NotFoundError: It is not loaded, perhaps because the service was restarted in between.
            FailedPreconditionError: DEFAULT_MODEL, DEFAULT_VERSION, SHADOWED, LAST_MODEL: it is needed.
        """
        with request_field("name"):
            request = reward_model_pb2.UnloadRewardModelRequest(
                request_id=read_request_id(request_id), name=name, version=version
            )
        await self._repeat(self._stub.UnloadRewardModel, request, timeout_seconds)

    async def set_default(
        self,
        name: str,
        version: str,
        *,
        expected_current: str,
        name_only: bool = False,
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> str:
        """Make a version the default, and return the "name@version" that was: a compare-and-set.

        Args:
            name: Of the model.
            version: What its name selects from now on.
            expected_current: "name@version" that must be the default now.
            name_only: Leave it to calls that give the name; else calls without a name are switched, too.
            request_id: UUID of this call, to repeat it later without a second effect; a new one else.
            timeout_seconds: Deadline of each of the calls.

        Raises:
            NotFoundError: The version is not loaded.
            AbortedError: UNEXPECTED_DEFAULT: another one is the default.
        """
        with request_field("name"):
            request = reward_model_pb2.SetDefaultRewardModelRequest(
                request_id=read_request_id(request_id),
                name=name,
                version=version,
                name_only=name_only,
                expected_current=expected_current,
            )
        response = await self._repeat(self._stub.SetDefaultRewardModel, request, timeout_seconds)
        return response.previous

    async def set_shadow(
        self,
        name: str,
        version: str,
        *,
        fraction: float = 1.0,
        base: str = "",
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> RewardModelShadow:
        """Have a candidate score a share of the calls to a base, after their answers, and return the shadow.

        Args:
            name: Of the candidate.
            version: Of the candidate.
            fraction: Share of the calls, above 0 and at most 1.
            base: "name@version" whose calls it scores; empty: the default one at this moment.
            request_id: UUID of this call, to repeat it later without a second effect; a new one else.
            timeout_seconds: Deadline of each of the calls.

        Raises:
            NotFoundError: One of the two is not loaded.
            InvalidArgumentError: They are the same, or the fraction is out of range.
        """
        with request_field("fraction"):
            request = reward_model_pb2.SetShadowRequest(
                request_id=read_request_id(request_id), name=name, version=version, base=base, fraction=fraction
            )
        response = await self._repeat(self._stub.SetShadow, request, timeout_seconds)
        return _shadow(response.shadow)

    async def clear_shadow(
        self, *, request_id: str = "", timeout_seconds: float | None = None
    ) -> RewardModelShadow | None:
        """End the shadow and return its last figures; None if there was none."""
        request = reward_model_pb2.ClearShadowRequest(request_id=read_request_id(request_id))
        response = await self._repeat(self._stub.ClearShadow, request, timeout_seconds)
        return _shadow(response.shadow) if response.HasField("shadow") else None

    async def list_loaded(self, *, timeout_seconds: float | None = None) -> LoadedRewardModels:
        """Return everything that the service holds, with cache and shadow."""
        request = reward_model_pb2.ListLoadedRewardModelsRequest()
        pages = [page async for page in self._pages(self._stub.ListLoadedRewardModels, request, timeout_seconds)]
        models = tuple(_model(model) for page in pages for model in page.models)
        last = pages[-1]
        return LoadedRewardModels(models, _cache(last.cache), _shadow(last.shadow) if last.HasField("shadow") else None)


def _model(model: reward_model_pb2.LoadedRewardModel) -> LoadedRewardModel:
    return LoadedRewardModel(
        name=model.name,
        version=model.version,
        model_sha256=model.model_sha256,
        engine=model.engine,
        state=_STATES[model.state],
        default_model=model.default_model,
        default_version=model.default_version,
        active_request_count=model.active_request_count,
        cache_hit_count=model.cache_hit_count,
        cache_miss_count=model.cache_miss_count,
        create_time=model.create_time.ToDatetime(tzinfo=UTC) if model.HasField("create_time") else None,
    )


def _cache(cache: reward_model_pb2.ScoreCacheState) -> ScoreCacheState:
    return ScoreCacheState(cache.item_count, cache.max_item_count, cache.size_bytes, cache.max_size_bytes)


def _shadow(shadow: reward_model_pb2.RewardModelShadow) -> RewardModelShadow:
    return RewardModelShadow(
        base=shadow.base,
        candidate=shadow.candidate,
        fraction=shadow.fraction,
        scored_count=shadow.scored_count,
        dropped_count=shadow.dropped_count,
        failed_count=shadow.failed_count,
        mean_difference=shadow.mean_difference,
        mean_abs_difference=shadow.mean_abs_difference,
        pair_count=shadow.pair_count,
        agreeing_pair_count=shadow.agreeing_pair_count,
    )
