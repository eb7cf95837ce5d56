"""Keeps the generator on the run's policy: takes ownership, pushes and activates versions, restores them when lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from tether.adapter import ActiveAdapter, Adapter, AdapterClient, AdapterPush, PushResult
from tether.errors import AbortedError, FailedPreconditionError, NotFoundError
from tether_services.orchestrator.progress import note_work
from tether_services.orchestrator.records import Attempt
from tether_services.orchestrator.remote import Remote
from tether_services.runtime.fault_points import reach

__all__ = ["LocalAdapter", "PolicyPublisher", "PushFigures"]

_ATTEMPTS = 5
"""Rounds of reading the generator's state and acting on it; each can lose a race against a restart."""
_PAUSE_SECONDS = 0.2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """An exported adapter and what the generator is told about it."""

    directory: Path
    sha256: str
    """Of its weights file."""
    size_bytes: int
    push: AdapterPush


@dataclass(frozen=True, slots=True)
class PushFigures:
    """What bringing an adapter into use took. Nothing was sent, checked or loaded if it was there already."""

    activate_seconds: float
    transfer_seconds: float | None = None
    verify_seconds: float | None = None
    load_seconds: float | None = None
    probe_mean_abs_dlogp: float | None = None
    """Trainer against generator on the probes, nats."""

    @property
    def seconds(self) -> float:
        """Everything together."""
        stages = (self.transfer_seconds, self.verify_seconds, self.load_seconds, self.activate_seconds)
        return sum(seconds for seconds in stages if seconds is not None)

    def then(self, activated: PushFigures) -> PushFigures:
        """Return the figures of this push and of the activation after it."""
        return replace(self, activate_seconds=activated.activate_seconds)


class PolicyPublisher:
    """The policy version that this run has a generator serve. One writer per run, fenced by the attempt's epoch."""

    def __init__(self, adapter: Remote[AdapterClient], attempt: Attempt) -> None:
        self._remote = adapter
        self._attempt = attempt
        self._current: LocalAdapter | None = None
        self._lock = asyncio.Lock()
        self._owned = False

    async def take_over(self, committed: LocalAdapter | None) -> None:
        """Make the generator serve the committed version of this run, whoever used it before.

        Earlier attempts of this run are locked out first; then the versions are deleted that were pushed and never
        committed.

        Args:
            committed: The adapter of the last committed step; None for version 0.

        Raises:
            TetherError: The generator refused or could not be reached; the message names it.
        """
        self._current = committed
        async with self._lock:
            await self._repeat(self._own)
            await self._delete_uncommitted()
            await self._repeat(self._settle)
            await self._delete_uncommitted()  # the one that was active until now

    async def prepare(self, adapter: LocalAdapter) -> PushFigures:
        """Push the next version, which then is proven and not yet in use, and return what that took.

        Raises:
            TetherError: The generator refused or could not be reached; the message names it.
        """
        async with self._lock:
            self._current = adapter
            started = time.monotonic()
            result = await self._repeat(lambda: self._push_if_missing(adapter))
            return _figures(result, time.monotonic() - started, 0.0)

    async def publish(self, adapter: LocalAdapter | None) -> PushFigures:
        """Push a version unless it is there, switch the generator to it and return what that took; None: version 0.

        Raises:
            TetherError: The generator refused or could not be reached; the message names it.
        """
        async with self._lock:
            self._current = adapter
            return await self._repeat(self._settle)

    async def restore(self) -> None:
        """Bring the generator back to the current version, for example after its restart.

        Raises:
            FailedPreconditionError: Another run has taken the generator (GENERATOR_TAKEN).
            TetherError: The generator refused or could not be reached; the message names it.
        """
        async with self._lock:
            await self._repeat(self._settle)

    @property
    def _version(self) -> int:
        return self._current.push.policy_version if self._current else 0

    @property
    def _sha256(self) -> str:
        return self._current.sha256 if self._current else ""

    async def _repeat(self, act: Callable[[], Awaitable[T]]) -> T:
        """Read the state and act on it, again where the state changed in between."""
        for attempt in range(1, _ATTEMPTS):
            try:
                return await act()
            except (AbortedError, NotFoundError, FailedPreconditionError) as error:
                if isinstance(error, FailedPreconditionError) and error.reason != "VERSION_EXISTS":
                    raise
                if error.reason == "STALE_EPOCH":
                    raise
                await asyncio.sleep(_PAUSE_SECONDS * attempt)
        return await act()

    async def _own(self) -> None:
        """Make this run the owner and lock its earlier attempts out, before anything is read that they could change.

        What the run has active stays so until its successor is there, unless that has the same number.
        """
        active = await self._remote.call(lambda client: client.get_active_adapter())
        own, version = active.run_id == self._attempt.run_id, active.policy_version
        taken = version == self._version and _sha256(active) != self._sha256
        await self._activate(version if own and not taken else 0, active)
        self._owned = True

    async def _settle(self) -> PushFigures:
        """Push the current version if it is missing and activate it."""
        active = await self._remote.call(lambda client: client.get_active_adapter())
        if self._owned and active.run_id not in ("", self._attempt.run_id):
            message = (
                f"run {active.run_id!r} has taken the generator at {self._remote.client.target}; run one at a time"
            )
            raise FailedPreconditionError(message, reason="GENERATOR_TAKEN")
        if active.run_id != self._attempt.run_id:
            active = await self._activate(0, active)
        started = time.monotonic()
        result = await self._push_if_missing(self._current) if self._current else None
        pushed = time.monotonic()
        await self._activate(self._version, active)
        return _figures(result, pushed - started, time.monotonic() - pushed)

    async def _push_if_missing(self, adapter: LocalAdapter) -> PushResult | None:
        stored = {(a.policy_version, a.sha256) for a in await self._stored()}
        if (adapter.push.policy_version, adapter.sha256) in stored:
            return None
        epoch, request_id = self._attempt.epoch, str(uuid4())
        result = await self._remote.call(
            lambda client: client.push(
                adapter.directory, adapter.push, epoch=epoch, request_id=request_id, on_progress=_reach_progress
            )
        )
        reach("push.proven")
        return result

    async def _activate(self, version: int, active: ActiveAdapter) -> ActiveAdapter:
        """Switch from what is active to a version of this run; nothing to do if that is active."""
        run_id, epoch, request_id = self._attempt.run_id, self._attempt.epoch, str(uuid4())
        await self._remote.call(
            lambda client: client.activate(
                run_id,
                version,
                expected_run_id=active.run_id,
                expected_policy_version=active.policy_version,
                epoch=epoch,
                request_id=request_id,  # one for all repeats: what was undone since is not done again
            )
        )
        return ActiveAdapter(run_id, version, None)

    async def _delete_uncommitted(self) -> None:
        """Delete the versions of this run that no committed step stands for, except an active one."""
        for adapter in await self._stored():
            committed = (adapter.policy_version, adapter.sha256) == (self._version, self._sha256)
            if adapter.policy_version >= self._version and not committed and adapter.state != "active":
                await self._delete(adapter.policy_version)

    async def _delete(self, version: int) -> None:
        run_id, epoch, request_id = self._attempt.run_id, self._attempt.epoch, str(uuid4())
        with suppress(NotFoundError):  # gone already
            await self._remote.call(lambda client: client.delete(run_id, version, epoch=epoch, request_id=request_id))

    async def _stored(self) -> list[Adapter]:
        """Return the usable versions of this run that the generator has."""
        adapters = await self._remote.call(lambda client: client.list_adapters())
        return [a for a in adapters if a.run_id == self._attempt.run_id and a.state != "retiring"]


def _reach_progress(sent: int, total: int) -> None:
    note_work()
    reach("push.sent" if sent == total else "push.half")


def _sha256(active: ActiveAdapter) -> str:
    return active.adapter.sha256 if active.adapter else ""


def _figures(result: PushResult | None, push_seconds: float, activate_seconds: float) -> PushFigures:
    """Return the figures of a push; what the generator did not spend on its stages is the transfer."""
    if result is None:
        return PushFigures(activate_seconds)
    stages = {stage.name: stage.duration_seconds for stage in result.stages}
    load = stages.pop("load", 0.0)
    verify = sum(stages.values())
    return PushFigures(
        transfer_seconds=max(0.0, push_seconds - load - verify),
        verify_seconds=verify,
        load_seconds=load,
        activate_seconds=activate_seconds,
        probe_mean_abs_dlogp=result.mean_abs_dlogp,
    )
