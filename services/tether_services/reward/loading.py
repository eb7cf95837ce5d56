"""Brings reward models into the pool: from the configuration at the start, from the store while the others serve."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from tether.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from tether_services.reward.config import ModelSettings, RewardSettings
from tether_services.reward.engine import ScoreTask
from tether_services.reward.metrics import RewardMetrics
from tether_services.reward.models import SAMPLE_TEXT, RewardModel, load_model
from tether_services.reward.names import ModelId
from tether_services.reward.pool import HeldModel, ModelPool
from tether_services.reward.store import ModelStore, allowed_modules
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)


class ModelLoader:
    """Loads, warms up, and only then lets calls select."""

    def __init__(self, settings: RewardSettings, pool: ModelPool, metrics: RewardMetrics) -> None:
        self._settings = settings
        self._pool = pool
        self._metrics = metrics
        self._store = ModelStore(settings.model_store, rule_modules=allowed_modules(settings))
        self._is_closed = False

    def close(self) -> None:
        """Let nothing that is being loaded come into the pool any more."""
        self._is_closed = True

    async def load_configured(self) -> None:
        """Load the models of the configuration, one after the other.

        Raises:
            InvalidArgumentError: Names the setting that does not fit.
        """
        for index, settings in enumerate(self._settings.reward_models()):
            await self._bring(settings, field=f"models[{index}]", check=lambda model: None)

    async def load(self, wanted: ModelId, *, check: Callable[[RewardModel], None]) -> HeldModel:
        """Load a version of the store and return it; one that calls can select already is returned as it is.

        Args:
            wanted: What to load.
            check: Raises to refuse what was found; called before calls can select it.

        Raises:
            NotFoundError: The store has no such version.
            FailedPreconditionError: It cannot serve; the reason says why. Nothing has changed.
            ResourceExhaustedError: Another one is being loaded, or there are too many.
            UnavailableError: The service is stopping.
        """
        there = self._pool.get(wanted)
        if there is not None:
            check(there.model)
            return there
        with self._pool.place(wanted):
            try:
                held = await self._load_from_store(wanted, check)
            except BaseException:
                self._metrics.loads.labels("failed").inc()
                raise
        self._metrics.loads.labels("ok").inc()
        return held

    async def _load_from_store(self, wanted: ModelId, check: Callable[[RewardModel], None]) -> HeldModel:
        settings = await asyncio.to_thread(_as_precondition, self._store.find, wanted)
        try:
            return await self._bring(settings, field="version", check=check)
        except InvalidArgumentError as error:  # it is the store that does not fit, not the request
            raise _cannot_serve(error) from error

    async def _bring(self, settings: ModelSettings, *, field: str, check: Callable[[RewardModel], None]) -> HeldModel:
        """Load a model, have it checked and warm, and put it into the pool."""
        started = time.monotonic()
        model = await load_model(self._settings, settings, field=field)
        try:
            check(model)
            await warm_up(model, field=field)
            if self._is_closed:
                raise UnavailableError("The service is stopping.", reason="DRAINING")
            held = self._pool.add(HeldModel(model, cacheable=settings.cacheable), field=field)
        except BaseException:  # also on cancellation: threads and weights must not outlive a load that failed
            await model.close()
            raise
        self._metrics.model.labels(model.name, model.version).info({"sha256": model.sha256})
        log_event(
            log,
            "model loaded",
            engine=model.engine,
            model=model.name,
            version=model.version,
            sha256=model.sha256,
            seconds=round(time.monotonic() - started, 3),
        )
        return held


async def warm_up(model: RewardModel, *, field: str) -> None:
    """Have every engine answer, and every one that reads tokens score a short text.

    Rules are not called: many know only their own prompts.

    Raises:
        InvalidArgumentError: A score is not a finite number.
    """
    await model.check()
    task = await asyncio.to_thread(short_task, model)
    for component in model.components:
        if component.engine.description.reads_tokens:
            (raw,) = await component.engine.score([task])
            if isinstance(raw, Exception):
                raise raw
            if not math.isfinite(component.gain * (raw - component.bias)):
                raise InvalidArgumentError(
                    f"{component.name} of {model.name} gives a value that is not a finite number.",
                    field=field,
                )


def short_task(model: RewardModel) -> ScoreTask:
    """Return a short text as the model's tokenizer reads it, cut to fit; no token where the model reads text alone."""
    reader = model.reader
    if reader.codec is None or not reader.reads_tokens:
        return ScoreTask()
    ids = [i for i in reader.codec.encode(SAMPLE_TEXT, add_special_tokens=True) if 0 <= i < reader.vocab_size]
    return ScoreTask(response_token_ids=tuple(ids[: reader.max_model_len]) or (0,))


def _as_precondition(find: Callable[[ModelId], ModelSettings], wanted: ModelId) -> ModelSettings:
    try:
        return find(wanted)
    except InvalidArgumentError as error:
        raise _cannot_serve(error) from error


def _cannot_serve(error: InvalidArgumentError) -> FailedPreconditionError:
    described = "; ".join(dict.fromkeys([error.message, *(v.description for v in error.violations)]))
    return FailedPreconditionError(
        f"The version cannot serve: {described}", field="version", reason="MODEL_LOAD_FAILED"
    )
