"""The adapter versions of a serving generator: which exist, which is active, who uses them, when they go.

All state is touched on the event loop only, so every change is atomic between two awaits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tether.errors import AbortedError, FailedPreconditionError, NotFoundError, TetherError, UnavailableError
from tether_services.generator.engine import Engine, LoadedAdapter
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.generator.storage import AdapterStorage
from tether_services.generator.uploads import Declaration
from tether_services.runtime.fault_points import reach
from tether_services.runtime.history import record
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)

UNLOAD_PAUSES = (0.5, 2.0)
"""Seconds before a failed unload is tried again; after the last one, at the next change of versions."""


@dataclass(frozen=True, slots=True)
class Active:
    """What requests without a pin use."""

    run_id: str = ""
    """The run that owns the generator; empty before the first activation."""
    policy_version: int = 0
    """Its active version; 0 is the base model."""

    @property
    def key(self) -> tuple[str, int]:
        """Return (run_id, policy_version)."""
        return self.run_id, self.policy_version


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
    """Requests in flight that use it, and a proof that compares with it."""
    retiring: bool = False
    """True once new requests are refused."""
    unloading: bool = False
    """True while it is taken out of the engine."""


class AdapterRegistry:
    """The versions that can serve. Version 0, the base model, always can."""

    def __init__(
        self,
        engine: Engine,
        storage: AdapterStorage,
        metrics: GeneratorMetrics,
        *,
        name: str,
        keep_versions: int,
        keep_runs: int,
    ) -> None:
        self._name = name
        self._engine = engine
        self._storage = storage
        self._metrics = metrics
        self._keep_versions = keep_versions
        self._keep_runs = keep_runs
        self._versions: dict[int, AdapterVersion] = {}
        self._disposals: set[asyncio.Task[None]] = set()
        self.active = Active()
        self.on_change: Callable[[], None] = lambda: None
        """Called after a version was added or the active one has changed."""

    def find(self, run_id: str, policy_version: int) -> AdapterVersion | None:
        """Return a version that requests may use; None if there is none. One that is being retired does not count."""
        key = (run_id, policy_version)
        return next((v for v in self._versions.values() if v.declaration.key == key and not v.retiring), None)

    def all(self) -> list[AdapterVersion]:
        """Return every version, oldest first, also those being retired: of these, some may share a number."""
        return list(self._versions.values())

    def is_active(self, version: AdapterVersion) -> bool:
        """Return whether requests without a pin use it."""
        return version is self.find(*self.active.key)

    @property
    def holds_active(self) -> bool:
        """Return whether the active version is there, as it always is but after some restarts."""
        return self.active.policy_version == 0 or self.find(*self.active.key) is not None

    def pinnable_versions(self) -> list[int]:
        """Return the versions of the active run that a request may name, ascending, 0 included."""
        own = (v.declaration for v in self._versions.values() if not v.retiring)
        return sorted({0, *(d.policy_version for d in own if d.run_id == self.active.run_id)})

    @contextmanager
    def hold_before(self, run_id: str, policy_version: int) -> Iterator[AdapterVersion | None]:
        """Keep the newest version of a run below a number loaded until the block ends; None if there is none."""
        own = [v for v in self._versions.values() if v.declaration.run_id == run_id and not v.retiring]
        below = [version for version in own if version.declaration.policy_version < policy_version]
        version = max(below, key=lambda version: version.declaration.policy_version, default=None)
        if version is None:
            yield None
            return
        with self._used(version):
            yield version

    @contextmanager
    def _used(self, version: AdapterVersion) -> Iterator[None]:
        version.request_count += 1
        try:
            yield
        finally:
            version.request_count -= 1
            self._dispose_if_idle(version)

    @contextmanager
    def lease(self, *, run_id: str, policy_version: int | None) -> Iterator[Policy]:
        """Give one request its policy and keep that policy loaded until the request ends.

        Args:
            run_id: The run that must be active; empty for any.
            policy_version: The version wanted; None for the active one.

        Raises:
            FailedPreconditionError: Another run is active, or the pinned version is not loaded.
            UnavailableError: ADAPTER_MISSING: what was active before a restart is not there yet.
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
        version = self.find(self.active.run_id, wanted)
        if version is None:
            raise self._missing(wanted, pinned=policy_version is not None)
        with self._used(version):
            yield Policy(version.adapter.run_id, wanted, version.adapter)

    def _missing(self, version: int, *, pinned: bool) -> TetherError:
        if pinned:
            return FailedPreconditionError(
                f"Version {version} is not loaded; {self.pinnable_versions()} are. Push it, then call again.",
                field="policy_version",
                reason="VERSION_NOT_LOADED",
            )
        return UnavailableError(
            f"Version {version} of run {self.active.run_id} was active before a restart and could not be loaded again."
            " Push it, or activate another one.",
            reason="ADAPTER_MISSING",
        )

    def add(self, version: AdapterVersion, *, epoch: int | None = None) -> None:
        """Take a proven version in; the oldest ones may have to go.

        Args:
            version: Serves at once if it is what was active before a restart.
            epoch: Of the writer that pushed it; None for one that was stored.
        """
        self._versions[version.adapter.number] = version
        self._record("proven", version.declaration.key, version.adapter.sha256)
        if self.is_active(version):
            self._record_active(epoch)
        self.on_change()
        self._retire_old()

    def check_activation(self, wanted: Active, expected: Active) -> None:
        """Refuse to make a version the active one; nothing to refuse where it is.

        Raises:
            AbortedError: The active version is not the expected one.
            NotFoundError: The version is not loaded.
        """
        if wanted == self.active:
            return
        if expected != self.active:
            raise AbortedError(
                f"Run {self.active.run_id!r} version {self.active.policy_version} is active, "
                f"not run {expected.run_id!r} version {expected.policy_version}.",
                field="expected_policy_version",
            )
        if wanted.policy_version and self.find(wanted.run_id, wanted.policy_version) is None:
            raise NotFoundError(
                f"Version {wanted.policy_version} of run {wanted.run_id} is not loaded.", field="policy_version"
            )

    def find_below(self, expected: Active) -> Active:
        """Return the newest loaded version below the active one.

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
        return Active(self.active.run_id, below[-1])

    def switch(self, wanted: Active, *, epoch: int | None = None) -> None:
        """Have requests without a pin use a version from now on.

        Args:
            wanted: What to use; not loaded yet only where `epoch` is None.
            epoch: Of the writer that wants it; None for what was active before a restart.
        """
        self.active = wanted
        if epoch is not None:
            self._record_active(epoch)
        self.on_change()
        self._metrics.policy_version.set(wanted.policy_version)
        log_event(log, "adapter activated", run_id=wanted.run_id, policy_version=wanted.policy_version)
        self._retire_old()

    def _record_active(self, epoch: int | None) -> None:
        version = self.find(*self.active.key)
        writer = {} if epoch is None else {"epoch": epoch}
        sha256 = version.adapter.sha256 if version else ""
        self._record("activated", self.active.key, sha256, **writer)

    def _record(self, kind: str, key: tuple[str, int], sha256: str, **more: int) -> None:
        record(kind, generator=self._name, run=key[0], policy_version=key[1], sha256=sha256, **more)

    def delete(self, run_id: str, policy_version: int) -> None:
        """Retire a version.

        Raises:
            NotFoundError: It is not loaded, or is being retired already.
            FailedPreconditionError: It is active.
        """
        version = self.find(run_id, policy_version)
        if version is None:
            raise NotFoundError(f"Version {policy_version} of run {run_id} is not loaded.", field="policy_version")
        if self.is_active(version):
            raise FailedPreconditionError(
                "The version is active. Activate another one first.", field="policy_version", reason="VERSION_ACTIVE"
            )
        self._retire(version)

    async def make_room(self, size_bytes: int, *, run_id: str) -> bool:
        """Let the oldest version go that is of a run which neither is active nor `run_id`.

        Returns:
            Whether there was one. If all of them together are less than `size_bytes`, they stay.
        """
        kept = (self.active.run_id, run_id)
        idle = [v for v in self._versions.values() if not v.retiring and v.declaration.run_id not in kept]
        if not idle or sum(version.declaration.size_bytes for version in idle) < size_bytes:
            return False
        self._retire(idle[0])
        await self.settle()
        return True

    async def settle(self) -> None:
        """Wait until every retired version without requests is gone, or the engine has refused a few times."""
        while self._disposals:
            await asyncio.wait(set(self._disposals))  # gather would cancel them with a caller that leaves

    def _retire_old(self) -> None:
        """Retire what is neither active nor among the newest versions (in order of commit) of the newest runs."""
        loaded: dict[str, list[AdapterVersion]] = {}
        for version in self._versions.values():
            if not version.retiring:
                run_id = version.declaration.run_id
                loaded[run_id] = [*loaded.pop(run_id, []), version]  # to the end: the run that pushed last
        kept_runs = {*list(loaded)[-self._keep_runs :], self.active.run_id}
        for run_id, versions in loaded.items():
            for version in versions[: -self._keep_versions] if run_id in kept_runs else versions:
                if not self.is_active(version):
                    self._retire(version)
        for version in self.all():  # what an engine has refused to unload
            self._dispose_if_idle(version)

    def _retire(self, version: AdapterVersion) -> None:
        version.retiring = True
        self._storage.disown(version.adapter.folder)
        self._dispose_if_idle(version)

    def _dispose_if_idle(self, version: AdapterVersion) -> None:
        if version.retiring and version.request_count == 0 and not version.unloading:
            version.unloading = True
            task = asyncio.create_task(self._dispose(version))
            self._disposals.add(task)
            task.add_done_callback(self._disposals.discard)

    async def _dispose(self, version: AdapterVersion) -> None:
        """Unload, then delete: an engine may read the folder of a loaded adapter again at any time."""
        if not await self._unload(version.adapter):
            version.unloading = False
            return
        with suppress(OSError):
            reach("retire.unloaded")
        await asyncio.to_thread(self._storage.remove, version.adapter.folder)
        self._versions.pop(version.adapter.number, None)
        log_event(log, "adapter retired", run_id=version.adapter.run_id, policy_version=version.adapter.policy_version)

    async def _unload(self, adapter: LoadedAdapter) -> bool:
        """Take an adapter out of the engine and return whether it is out, after a few tries."""
        for pause in (*UNLOAD_PAUSES, None):
            try:
                await self._engine.unload_adapter(adapter)
                return True
            except Exception as error:  # whatever an engine raises: the version stays unusable and its folder stays
                fields: dict[str, Any] = {"run_id": adapter.run_id, "policy_version": adapter.policy_version}
                log_event(log, "unload failed", level=logging.ERROR, error=str(error), **fields)
            if pause is not None:
                await asyncio.sleep(pause)
        return False
