"""RewardModelService: the calls that change what the reward service holds."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from tether.errors import InvalidArgumentError
from tether.v1 import reward_model_pb2, reward_model_pb2_grpc
from tether_services.reward.cache import ScoreCache
from tether_services.reward.config import CacheSettings
from tether_services.reward.control import ModelControl, ModelParts
from tether_services.reward.names import ModelId, check_stored_name, read_label
from tether_services.reward.pool import HeldModel, ModelPool
from tether_services.reward.shadow import Shadow
from tether_services.reward.wire import cut_page
from tether_services.runtime.checks import check_sha256
from tether_services.runtime.requests import RequestLedger

MAX_ADMIN_MESSAGE_BYTES = 64 * 1024
MAX_VERSION_CHARS = 64
"""As in the configuration; a version from there need not match NAME_PATTERN."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RewardModelService(reward_model_pb2_grpc.RewardModelServiceServicer):
    """Check, convert, call, convert."""

    full_name = reward_model_pb2.DESCRIPTOR.services_by_name["RewardModelService"].full_name

    def __init__(self, parts: ModelParts, control: ModelControl, cache: ScoreCache, limits: CacheSettings) -> None:
        self._pool = parts.pool
        self._shadow = parts.shadow
        self._control = control
        self._cache = cache
        self._limits = limits
        self._requests = RequestLedger()

    def methods(self) -> list[str]:
        """Return the names of the methods."""
        return [method.name for method in reward_model_pb2.DESCRIPTOR.services_by_name["RewardModelService"].methods]

    async def LoadRewardModel(
        self, request: reward_model_pb2.LoadRewardModelRequest, context: Context
    ) -> reward_model_pb2.LoadRewardModelResponse:
        """Load a version of the store."""
        wanted = ModelId(request.name, request.version)
        check_stored_name(wanted)
        if request.expected_sha256:
            check_sha256(request.expected_sha256, field="expected_sha256")
        return await self._requests.answer(request, lambda: self._load(wanted, request.expected_sha256))

    async def UnloadRewardModel(
        self, request: reward_model_pb2.UnloadRewardModelRequest, context: Context
    ) -> reward_model_pb2.UnloadRewardModelResponse:
        """Unload a version once nobody uses it."""
        wanted = read_id(request.name, request.version)
        return await self._requests.answer(request, lambda: self._unload(wanted))

    async def SetDefaultRewardModel(
        self, request: reward_model_pb2.SetDefaultRewardModelRequest, context: Context
    ) -> reward_model_pb2.SetDefaultRewardModelResponse:
        """Switch what calls select that leave it open."""
        wanted = read_id(request.name, request.version)
        expected = read_label(request.expected_current, field="expected_current")
        return await self._requests.answer(
            request, lambda: self._set_default(wanted, expected, name_only=request.name_only)
        )

    async def SetShadow(
        self, request: reward_model_pb2.SetShadowRequest, context: Context
    ) -> reward_model_pb2.SetShadowResponse:
        """Have a candidate score along."""
        candidate = read_id(request.name, request.version)
        base = read_label(request.base, field="base") if request.base else None
        if not 0 < request.fraction <= 1:
            raise InvalidArgumentError(f"{request.fraction:g} is not above 0 and at most 1.", field="fraction")
        return await self._requests.answer(request, lambda: self._set_shadow(candidate, base, request.fraction))

    async def ClearShadow(
        self, request: reward_model_pb2.ClearShadowRequest, context: Context
    ) -> reward_model_pb2.ClearShadowResponse:
        """Compare no longer."""
        return await self._requests.answer(request, self._clear_shadow)

    async def ListLoadedRewardModels(
        self, request: reward_model_pb2.ListLoadedRewardModelsRequest, context: Context
    ) -> reward_model_pb2.ListLoadedRewardModelsResponse:
        """Return one page of what is held, and all figures."""
        models = [write_model(held, self._pool) for held in self._pool.all()]
        if self._pool.loading is not None:
            loading = self._pool.loading
            models.append(
                reward_model_pb2.LoadedRewardModel(
                    name=loading.name, version=loading.version, state=reward_model_pb2.REWARD_MODEL_STATE_LOADING
                )
            )
        page, following = cut_page(len(models), page_size=request.page_size, page_token=request.page_token)
        return reward_model_pb2.ListLoadedRewardModelsResponse(
            models=models[page],
            next_page_token=following,
            cache=reward_model_pb2.ScoreCacheState(
                item_count=len(self._cache),
                max_item_count=self._limits.max_items,
                size_bytes=self._cache.num_bytes,
                max_size_bytes=self._limits.max_bytes,
            ),
            shadow=write_shadow(self._shadow.current),
        )

    async def _load(self, wanted: ModelId, sha256: str) -> reward_model_pb2.LoadRewardModelResponse:
        held = await self._control.load(wanted, expected_sha256=sha256)
        return reward_model_pb2.LoadRewardModelResponse(model=write_model(held, self._pool))

    async def _unload(self, wanted: ModelId) -> reward_model_pb2.UnloadRewardModelResponse:
        await self._control.unload(wanted)
        return reward_model_pb2.UnloadRewardModelResponse()

    async def _set_default(
        self, wanted: ModelId, expected: ModelId, *, name_only: bool
    ) -> reward_model_pb2.SetDefaultRewardModelResponse:
        previous = await self._control.set_default(wanted, name_only=name_only, expected=expected)
        return reward_model_pb2.SetDefaultRewardModelResponse(current=str(wanted), previous=str(previous))

    async def _set_shadow(
        self, candidate: ModelId, base: ModelId | None, fraction: float
    ) -> reward_model_pb2.SetShadowResponse:
        shadow = await self._control.set_shadow(candidate, base=base, fraction=fraction)
        return reward_model_pb2.SetShadowResponse(shadow=write_shadow(shadow))

    async def _clear_shadow(self) -> reward_model_pb2.ClearShadowResponse:
        return reward_model_pb2.ClearShadowResponse(shadow=write_shadow(await self._control.clear_shadow()))


def read_id(name: str, version: str) -> ModelId:
    """Return a version that may be loaded.

    Raises:
        InvalidArgumentError: A part is empty or too long.
    """
    for field, value in (("name", name), ("version", version)):
        if not 1 <= len(value) <= MAX_VERSION_CHARS:
            raise InvalidArgumentError(f"{len(value)} characters; 1 to {MAX_VERSION_CHARS} are accepted.", field=field)
    return ModelId(name, version)


def write_model(held: HeldModel, pool: ModelPool) -> reward_model_pb2.LoadedRewardModel:
    """Return the message of a version that is held."""
    is_default = pool.default_of(held.id.name) == held.id
    state = reward_model_pb2.REWARD_MODEL_STATE_WARM
    if held.draining:
        state = reward_model_pb2.REWARD_MODEL_STATE_DRAINING
    elif is_default:
        state = reward_model_pb2.REWARD_MODEL_STATE_SERVING
    created = Timestamp()
    created.FromNanoseconds(int(held.created * 1e9))
    return reward_model_pb2.LoadedRewardModel(
        name=held.id.name,
        version=held.id.version,
        model_sha256=held.model.sha256,
        engine=held.model.engine,
        state=state,
        default_model=pool.default == held.id,
        default_version=is_default,
        active_request_count=held.num_users,
        cache_hit_count=held.num_hits,
        cache_miss_count=held.num_misses,
        create_time=created,
    )


def write_shadow(shadow: Shadow | None) -> reward_model_pb2.RewardModelShadow | None:
    """Return the message of a shadow; None if there is none."""
    if shadow is None:
        return None
    figures = shadow.figures
    return reward_model_pb2.RewardModelShadow(
        base=str(shadow.base.id),
        candidate=str(shadow.candidate.id),
        fraction=shadow.fraction,
        scored_count=figures.num_scored,
        dropped_count=figures.num_dropped,
        failed_count=figures.num_failed,
        mean_difference=figures.mean_difference,
        mean_abs_difference=figures.mean_abs_difference,
        pair_count=figures.num_pairs,
        agreeing_pair_count=figures.num_agreeing_pairs,
    )
