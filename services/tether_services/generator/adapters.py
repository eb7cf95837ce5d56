"""The adapter versions of a serving generator: which exist, which is active, who uses them, when they go.

All state is touched on the event loop only, so every change is atomic between two awaits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tether.errors import AbortedError, FailedPreconditionError, NotFoundError
from tether_services.generator.engine import Engine, LoadedAdapter
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.generator.storage import AdapterStorage
from tether_services.generator.uploads import Declaration
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)

MAX_EPOCHS = 4096
"""Runs whose epochs are remembered."""


@dataclass(frozen=True, slots=True)
class Active:
    """What requests without a pin use."""

    run_id: str = ""
    """The run that owns the generator; empty before the first activation."""
    policy_version: int = 0
    """Its active version; 0 is the base model."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What one request was admitted to."""

    run_id: str
    """Owner; empty before the first activation."""
    policy_version: int
    """0 is the base model."""
    adapter: LoadedAdapter | None
    """None for version 0."""


@dataclass(frozen=True, slots=True)
class PushResult:
    """What a commit found."""

    stages: tuple[tuple[str, float], ...]
    """(stage, seconds) in order."""
    mean_abs_dlogp: float
    """Mean |delta logprob| of the probes in nats."""


@dataclass(slots=True)
class AdapterVersion:
    """A proven adapter in the engine."""

    adapter: LoadedAdapter
    """As the engine sees it."""
    declaration: Declaration
    """As it was announced."""
    upload_id: str
    """The upload that brought it."""
    result: PushResult
    """What its commit found."""
    created: float = field(default_factory=time.time)
    """Unix time of the commit."""
    request_count: int = 0
    """Requests in flight that use it."""
    retiring: bool = False
    """True once new requests are refused."""


class AdapterRegistry:
    """The versions that can serve. Version 0, the base model, always can."""

    def __init__(
        self, engine: Engine, storage: AdapterStorage, metrics: GeneratorMetrics, *, keep_versions: int
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._metrics = metrics
        self._keep_versions = keep_versions
        self._versions: dict[tuple[str, int], AdapterVersion] = {}
        self._epochs: dict[str, int] = {}
        self._disposals: set[asyncio.Task[None]] = set()
        self.active = Active()

    def find(self, run_id: str, policy_version: int) -> AdapterVersion | None:
        """Return a version, retiring or not; None if there is none."""
        return self._versions.get((run_id, policy_version))

    def all(self) -> list[AdapterVersion]:
        """Return every version, oldest first."""
        return list(self._versions.values())

    def is_active(self, version: AdapterVersion) -> bool:
        """Return whether requests without a pin use it."""
        return version.declaration.key == (self.active.run_id, self.active.policy_version)

    def pinnable_versions(self) -> list[int]:
        """Return the versions of the active run that a request may name, ascending, 0 included."""
        own = (v.declaration for v in self._versions.values() if not v.retiring)
        return sorted({0, *(d.policy_version for d in own if d.run_id == self.active.run_id)})

    @contextmanager
    def lease(self, *, run_id: str, policy_version: int | None) -> Iterator[Policy]:
        """Give one request its policy and keep that policy loaded until the request ends.

        Args:
            run_id: The run that must be active; empty for any.
            policy_version: The version wanted; None for the active one.

        Raises:
            FailedPreconditionError: Another run is active, or the version is not loaded.
        """
        if run_id and run_id != self.active.run_id:
            raise FailedPreconditionError(
                f"Run {run_id} does not own the generator. Activate one of its versions first.",
                field="run_id",
                reason="RUN_NOT_ACTIVE",
            )
        wanted = self.active.policy_version if policy_version is None else policy_version
        if wanted == 0:
            yield Policy(self.active.run_id, 0, None)
            return
        version = self._loaded(self.active.run_id, wanted)
        if version is None:
            raise FailedPreconditionError(
                f"Version {wanted} is not loaded; {self.pinnable_versions()} are. Push it, then call again.",
                field="policy_version",
                reason="VERSION_NOT_LOADED",
            )
        version.request_count += 1
        try:
            yield Policy(version.adapter.run_id, wanted, version.adapter)
        finally:
            version.request_count -= 1
            self._dispose_if_idle(version)

    def add(self, version: AdapterVersion) -> None:
        """Take a proven version in; the oldest ones may have to go."""
        self._versions[version.declaration.key] = version
        self._retire_old()

    def activate(self, wanted: Active, *, expected: Active, epoch: int) -> int:
        """Make a version the active one and return the version that was active before.

        Raises:
            AbortedError: The epoch is stale, or the active version is not the expected one.
            NotFoundError: The version is not loaded.
        """
        if epoch < self._epochs.get(wanted.run_id, 0):
            raise AbortedError(
                f"Epoch {epoch} of run {wanted.run_id} is older than {self._epochs[wanted.run_id]}: fenced off.",
                field="epoch",
                reason="STALE_EPOCH",
            )
        previous = self.active
        if wanted != previous:
            if expected != previous:
                raise AbortedError(
                    f"Run {previous.run_id!r} version {previous.policy_version} is active, "
                    f"not run {expected.run_id!r} version {expected.policy_version}.",
                    field="expected_policy_version",
                )
            if wanted.policy_version and self._loaded(wanted.run_id, wanted.policy_version) is None:
                raise NotFoundError(
                    f"Version {wanted.policy_version} of run {wanted.run_id} is not loaded.", field="policy_version"
                )
            self._switch(wanted)
        self._remember_epoch(wanted.run_id, epoch)
        return previous.policy_version

    def roll_back(self, expected: Active) -> int:
        """Activate the newest loaded version below the active one and return it.

        Raises:
            AbortedError: The active version is not the expected one.
            FailedPreconditionError: The base model is active, so there is nothing below.
        """
        if expected != self.active:
            raise AbortedError(
                f"Run {self.active.run_id!r} version {self.active.policy_version} is active.",
                field="expected_policy_version",
            )
        below = [number for number in self.pinnable_versions() if number < self.active.policy_version]
        if not below:
            raise FailedPreconditionError(
                "The base model is active: there is no version below.", reason="NOTHING_BELOW"
            )
        self._switch(Active(self.active.run_id, below[-1]))
        self._metrics.rollbacks.inc()
        return below[-1]

    def delete(self, run_id: str, policy_version: int) -> None:
        """Retire a version.

        Raises:
            NotFoundError: It is not loaded, or is being retired already.
            FailedPreconditionError: It is active.
        """
        version = self._loaded(run_id, policy_version)
        if version is None:
            raise NotFoundError(f"Version {policy_version} of run {run_id} is not loaded.", field="policy_version")
        if self.is_active(version):
            raise FailedPreconditionError(
                "The version is active. Activate another one first.", field="policy_version", reason="VERSION_ACTIVE"
            )
        self._retire(version)

    async def settle(self) -> None:
        """Wait until every retired version without requests is gone."""
        while self._disposals:
            await asyncio.gather(*self._disposals, return_exceptions=True)

    def _loaded(self, run_id: str, policy_version: int) -> AdapterVersion | None:
        version = self._versions.get((run_id, policy_version))
        return None if version is None or version.retiring else version

    def _switch(self, wanted: Active) -> None:
        self.active = wanted
        self._metrics.policy_version.set(wanted.policy_version)
        log_event(log, "adapter activated", run_id=wanted.run_id, policy_version=wanted.policy_version)
        self._retire_old()

    def _remember_epoch(self, run_id: str, epoch: int) -> None:
        self._epochs.pop(run_id, None)
        self._epochs[run_id] = epoch
        if len(self._epochs) > MAX_EPOCHS:
            del self._epochs[next(iter(self._epochs))]

    def _retire_old(self) -> None:
        """Retire all but the newest ones (in the order of their commits) and the active one."""
        loaded = [version for version in self._versions.values() if not version.retiring]
        for version in loaded[: -self._keep_versions]:
            if not self.is_active(version):
                self._retire(version)

    def _retire(self, version: AdapterVersion) -> None:
        version.retiring = True
        self._dispose_if_idle(version)

    def _dispose_if_idle(self, version: AdapterVersion) -> None:
        if version.retiring and version.request_count == 0:
            task = asyncio.create_task(self._dispose(version))
            self._disposals.add(task)
            task.add_done_callback(self._disposals.discard)

    async def _dispose(self, version: AdapterVersion) -> None:
        """Unload, then delete: an engine may read the folder of a loaded adapter again at any time."""
        fields: dict[str, Any] = {"run_id": version.adapter.run_id, "policy_version": version.adapter.policy_version}
        try:
            await self._engine.unload_adapter(version.adapter)
        except Exception as error:  # whatever an engine raises: the version stays unusable and its folder stays
            log_event(log, "unload failed", level=logging.ERROR, error=str(error), **fields)
            return
        await asyncio.to_thread(self._storage.remove, version.adapter.folder)
        self._versions.pop(version.declaration.key, None)
        log_event(log, "adapter retired", **fields)
