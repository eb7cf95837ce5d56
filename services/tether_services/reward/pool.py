"""The versions of reward models that are held, who uses them, and which are the defaults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tether.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from tether_services.reward.models import RewardModel
from tether_services.reward.names import MAX_SHOWN_CHARS, ModelId, read_selector

__all__ = ["HeldModel", "ModelPool"]

LOAD_RETRY_SECONDS = 5.0
"""When to ask again while another model is being loaded."""


class HeldModel:
    """A version that is ready, and its users: it is closed only when the last one has left."""

    def __init__(self, model: RewardModel, *, cacheable: bool) -> None:
        self.model = model
        self.id = ModelId(model.name, model.version)
        self.cacheable = cacheable
        """Whether its scores may be cached."""
        self.created = time.time()
        """When it was ready, in seconds since 1970."""
        self.draining = False
        """Whether no new call may select it."""
        self.num_users = 0
        """Calls and batches that use it now."""
        self.num_hits = 0
        """Items answered from the cache."""
        self.num_misses = 0
        """Items looked up and not there."""
        self._left = asyncio.Event()

    @contextmanager
    def used(self) -> Iterator[RewardModel]:
        """Yield the model and keep it from being closed meanwhile."""
        self.num_users += 1
        try:
            yield self.model
        finally:
            self.num_users -= 1
            self._left.set()

    async def wait_until_unused(self) -> None:
        """Return when nobody uses it; at once, without giving way, if that is so already."""
        while self.num_users:
            self._left.clear()
            await self._left.wait()


class ModelPool:
    """What calls can select. Nothing in it waits, so that no call sees half of a switch."""

    def __init__(self, *, max_models: int) -> None:
        self._max_models = max_models
        self._held: dict[ModelId, HeldModel] = {}
        self._default_versions: dict[str, str] = {}
        self._default_name = ""
        self.loading: ModelId | None = None
        """What is being loaded."""

    @property
    def default(self) -> ModelId:
        """Return what a call without a name selects."""
        return ModelId(self._default_name, self._default_versions[self._default_name])

    def default_of(self, name: str) -> ModelId | None:
        """Return what a call with a name and no version selects; None if there is no such name."""
        version = self._default_versions.get(name)
        return None if version is None else ModelId(name, version)

    def all(self) -> list[HeldModel]:
        """Return everything that is held, those that drain included, the default one first."""
        first = self._held.get(self.default) if self._default_name else None
        return ([first] if first else []) + [held for held in self._held.values() if held is not first]

    def selectable(self) -> list[HeldModel]:
        """Return what calls can select, the default one first."""
        return [held for held in self.all() if not held.draining]

    def holds(self, held: HeldModel) -> bool:
        """Return whether it has not been removed."""
        return self._held.get(held.id) is held

    def get(self, wanted: ModelId) -> HeldModel | None:
        """Return a version that calls can select, if there is one."""
        held = self._held.get(wanted)
        return None if held is None or held.draining else held

    def need(self, wanted: ModelId, *, field: str = "version") -> HeldModel:
        """Return a version that calls can select.

        Raises:
            NotFoundError: There is none.
        """
        held = self.get(wanted)
        if held is None:
            raise NotFoundError(
                f"{str(wanted)[:MAX_SHOWN_CHARS]!r} is not loaded; ListLoadedRewardModels names what is.",
                field=field,
                reason="VERSION_NOT_FOUND",
            )
        return held

    @contextmanager
    def selected(self, model: str, version: str) -> Iterator[HeldModel]:
        """Yield what a call selects, kept for as long as the call lasts.

        Raises:
            InvalidArgumentError: Model and version contradict each other.
            NotFoundError: There is no such model or version.
        """
        held = self._find(*read_selector(model, version))
        with held.used():
            yield held

    def _find(self, name: str, version: str) -> HeldModel:
        name = name or self._default_name
        default = self.default_of(name)
        if default is None:
            raise NotFoundError(
                f"There is no reward model {name[:MAX_SHOWN_CHARS]!r}; ListRewardModels names them.",
                field="model",
                reason="MODEL_NOT_FOUND",
            )
        held = self.get(ModelId(name, version) if version else default)
        if held is None:
            loaded = ", ".join(repr(one.id.version) for one in self.selectable() if one.id.name == name)
            raise NotFoundError(
                f"Model {name} is loaded in version {loaded}, not {version[:MAX_SHOWN_CHARS]!r}.",
                field="version",
                reason="VERSION_NOT_FOUND",
            )
        return held

    @contextmanager
    def place(self, wanted: ModelId) -> Iterator[None]:
        """Keep a place for a version that is being loaded.

        Raises:
            FailedPreconditionError: UNLOADING: it is still being unloaded.
            ResourceExhaustedError: Another one is being loaded, or there are too many.
        """
        if wanted in self._held:
            raise FailedPreconditionError(
                f"{wanted} is still being unloaded; load it again when it is gone.", field="version", reason="UNLOADING"
            )
        if self.loading is not None:
            raise ResourceExhaustedError(
                f"{self.loading} is being loaded; one is loaded at a time.",
                reason="LOAD_IN_PROGRESS",
                retry_after_seconds=LOAD_RETRY_SECONDS,
            )
        self._check_room()
        self.loading = wanted
        try:
            yield
        finally:
            self.loading = None

    def _check_room(self) -> None:
        if len(self._held) >= self._max_models:
            raise ResourceExhaustedError(
                f"{len(self._held)} versions are held and max_models is {self._max_models}; unload one first.",
                reason="TOO_MANY_MODELS",
            )

    def add(self, held: HeldModel, *, field: str = "version") -> HeldModel:
        """Let calls select a version from now on, and return it.

        Raises:
            InvalidArgumentError: The same one is held already.
        """
        if held.id in self._held:
            raise InvalidArgumentError(f"{held.id} is there twice.", field=field)
        self._held[held.id] = held
        self._default_versions.setdefault(held.id.name, held.id.version)
        self._default_name = self._default_name or held.id.name
        return held

    def switch(self, wanted: ModelId, *, name_only: bool) -> None:
        """Make a version that is held the default of its name, and its name that of the service unless `name_only`."""
        self._default_versions[wanted.name] = wanted.version
        if not name_only:
            self._default_name = wanted.name

    def check_retirement(self, wanted: ModelId) -> HeldModel:
        """Return a version that calls can do without.

        Raises:
            NotFoundError: It is not there.
            FailedPreconditionError: It is a default that calls need, or the only model.
        """
        held = self.need(wanted)
        if len(self.selectable()) == 1:
            raise FailedPreconditionError("It is the only model that is loaded.", field="version", reason="LAST_MODEL")
        if wanted == self.default:
            raise FailedPreconditionError(
                f"{wanted} is what calls without a name use; make another one the default first.",
                field="version",
                reason="DEFAULT_MODEL",
            )
        others = self._others(held)
        if others and self.default_of(wanted.name) == wanted:
            raise FailedPreconditionError(
                f"{wanted} is what calls without a version use; make {others[0].id} the default of its name first.",
                field="version",
                reason="DEFAULT_VERSION",
            )
        return held

    def retire(self, wanted: ModelId) -> HeldModel:
        """Let no new call select a version, and return it.

        Raises:
            TetherError: As `check_retirement`.
        """
        held = self.check_retirement(wanted)
        if not self._others(held):
            del self._default_versions[wanted.name]
        held.draining = True
        return held

    def _others(self, held: HeldModel) -> list[HeldModel]:
        """Return the other versions of a name that calls can select."""
        return [one for one in self.selectable() if one.id.name == held.id.name and one is not held]

    def forget(self, held: HeldModel) -> None:
        """Free the place of a version that nobody uses."""
        del self._held[held.id]
