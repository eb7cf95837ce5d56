"""What may be done to the reward models while they serve: load, unload, switch, compare."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial

from tether.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, TetherError
from tether_services.reward.defaults import DefaultsFile
from tether_services.reward.loading import ModelLoader
from tether_services.reward.metrics import RewardMetrics
from tether_services.reward.models import RewardModel
from tether_services.reward.names import MAX_SHOWN_CHARS, ModelId
from tether_services.reward.pool import HeldModel, ModelPool
from tether_services.reward.shadow import Shadow, ShadowScorer
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What holds and compares the reward models of a service."""

    pool: ModelPool
    """The versions."""
    loader: ModelLoader
    """How they get in."""
    shadow: ShadowScorer
    """What is compared."""
    defaults: DefaultsFile
    """What a restart goes on with."""


class ModelControl:
    """Changes what is served, one change at a time; loading and draining do not keep the others."""

    def __init__(self, parts: ModelParts, metrics: RewardMetrics) -> None:
        self._pool = parts.pool
        self._loader = parts.loader
        self._shadow = parts.shadow
        self._file = parts.defaults
        self._metrics = metrics
        self._turn = asyncio.Lock()

    async def restore(self) -> None:
        """Make the versions the default again that an earlier process had switched to, loading them where needed.

        Raises:
            InvalidArgumentError: One of them is not there or has another content; nothing else is served in silence.
        """
        kept = await self._file.open()
        for name, (version, sha256) in kept.versions.items():
            wanted = ModelId(name, version)
            try:
                await self._loader.load(wanted, check=partial(check_content, sha256=sha256))
            except TetherError as error:
                message = f"{wanted} was made the default and cannot be served: {error.message} {self._file.hint}"
                raise InvalidArgumentError(message, field="state_dir") from error
            self._pool.switch(wanted, name_only=name != kept.default_name)

    async def load(self, wanted: ModelId, *, expected_sha256: str) -> HeldModel:
        """Load a version of the store and return it.

        Args:
            wanted: What to load.
            expected_sha256: Its content hash; empty: any.

        Raises:
            TetherError: As `ModelLoader.load`; WRONG_SHA256 if the content is another one.
        """
        return await self._loader.load(wanted, check=partial(check_content, sha256=expected_sha256))

    async def unload(self, wanted: ModelId) -> None:
        """Let no further call select a version, wait until nobody uses it, and free it.

        Raises:
            NotFoundError: It is not there.
            FailedPreconditionError: It is needed; the reason says what for.
        """
        async with self._turn:
            if self._shadow.needs(wanted):
                raise FailedPreconditionError(
                    f"{wanted} is base or candidate of the shadow; clear that first.",
                    field="version",
                    reason="SHADOWED",
                )
            self._pool.check_retirement(wanted)
            kept = self._file.defaults
            await self._file.write(kept.without(wanted))
            try:
                held = self._pool.retire(wanted)
            except TetherError:  # another version of the name has been loaded meanwhile
                await self._file.write(kept)
                raise
        await held.wait_until_unused()
        self._pool.forget(held)
        self._metrics.model.remove(wanted.name, wanted.version)
        await held.model.close()
        log_event(log, "model unloaded", model=wanted.name, version=wanted.version)

    async def set_default(self, wanted: ModelId, *, name_only: bool, expected: ModelId) -> ModelId:
        """Make a version the default and return the one that was.

        Args:
            wanted: The version.
            name_only: For calls that give its name alone; else also for those without a name.
            expected: What must be the default now.

        Raises:
            NotFoundError: The version is not loaded.
            AbortedError: Another one is the default.
            ResourceExhaustedError: STORAGE_FULL: it cannot be written; nothing has changed.
        """
        async with self._turn:
            held = self._pool.need(wanted)
            previous = self._pool.default_of(wanted.name) if name_only else self._pool.default
            assert previous is not None, "a name with a version has a default one"
            if previous == wanted:
                return previous
            if previous != expected:
                raise AbortedError(
                    f"{previous} is the default, not {str(expected)[:MAX_SHOWN_CHARS]!r}; look again, then switch.",
                    field="expected_current",
                    reason="UNEXPECTED_DEFAULT",
                )
            kept = self._file.defaults.with_switch(wanted, held.model.sha256, name_only=name_only)
            await self._file.write(kept)
            self._pool.switch(wanted, name_only=name_only)
        log_event(log, "default switched", model=wanted.name, version=wanted.version, previous=str(previous))
        return previous

    async def set_shadow(self, candidate: ModelId, *, base: ModelId | None, fraction: float) -> Shadow:
        """Have a candidate score a share of the calls to a base, the default one if None, and return the shadow.

        Raises:
            NotFoundError: One of the two is not loaded.
            InvalidArgumentError: They are the same.
        """
        async with self._turn:
            second = self._pool.need(candidate)
            first = self._pool.need(base or self._pool.default, field="base")
            if first is second:
                raise InvalidArgumentError(f"{candidate} cannot be compared with itself.", field="base")
            shadow = self._shadow.set(first, second, fraction=fraction)
        log_event(log, "shadow set", base=str(first.id), candidate=str(second.id), fraction=fraction)
        return shadow

    async def clear_shadow(self) -> Shadow | None:
        """Compare no longer, and return what was compared."""
        async with self._turn:
            return self._shadow.clear()


def check_content(model: RewardModel, *, sha256: str) -> None:
    """Refuse a model of another content than expected; empty expects nothing.

    Raises:
        FailedPreconditionError: WRONG_SHA256.
    """
    if sha256 and model.sha256 != sha256:
        raise FailedPreconditionError(
            f"{model.name}@{model.version} has the content hash {model.sha256}, not the expected one.",
            field="expected_sha256",
            reason="WRONG_SHA256",
        )
