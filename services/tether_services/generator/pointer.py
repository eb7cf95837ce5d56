"""Which version is active: changed by compare-and-set, on the disk before the answer, read again after a restart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from tether.errors import AbortedError, InvalidArgumentError
from tether_services.generator.adapters import Active, AdapterRegistry
from tether_services.generator.fence import Fence
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.generator.storage import reporting_full_disk
from tether_services.runtime.durable import write_text
from tether_services.runtime.fault_points import reach


class ActivePointer:
    """Switches the active version, one switch at a time."""

    def __init__(self, registry: AdapterRegistry, fence: Fence, metrics: GeneratorMetrics) -> None:
        self._registry = registry
        self._metrics = metrics
        self._fence = fence
        self._turn = asyncio.Lock()
        self._path: Path | None = None

    def open(self, path: Path) -> None:
        """Make what an earlier process had active the active version again, loaded or not, and keep it there.

        Without this it is kept in memory only.

        Raises:
            InvalidArgumentError: The file is damaged.
        """
        self._path = path
        if path.exists():
            self._registry.switch(read_pointer(path))

    async def activate(self, wanted: Active, *, expected: Active, epoch: int) -> int:
        """Make a version the active one and return the version that was active before.

        Raises:
            AbortedError: The epoch is stale, or the active version is not the expected one.
            NotFoundError: The version is not loaded.
            ResourceExhaustedError: STORAGE_FULL: it cannot be written; nothing has changed.
        """

        def choose() -> Active:
            self._registry.check_activation(wanted, expected)
            return wanted

        return await self._switch(choose, run_id=wanted.run_id, epoch=epoch)

    async def roll_back(self, expected: Active, *, epoch: int) -> int:
        """Activate the newest loaded version below the active one and return it.

        Raises:
            TetherError: As `activate`; NOTHING_BELOW if the base model is active.
        """
        await self._switch(lambda: self._registry.find_below(expected), run_id=expected.run_id, epoch=epoch)
        self._metrics.rollbacks.inc()
        return self._registry.active.policy_version

    async def _switch(self, choose: Callable[[], Active], *, run_id: str, epoch: int) -> int:
        """Write, then switch; `choose` raises where the switch is not allowed."""
        await self._fence.admit(run_id, epoch)
        async with self._turn:
            previous, wanted = self._registry.active, choose()
            if wanted == previous:
                return previous.policy_version
            await self._write(wanted)
            try:
                with reporting_full_disk():
                    reach("activate.persisted")
                self._fence.check(run_id, epoch)
                if choose() != wanted:
                    raise AbortedError("The stored versions have changed in between; call again.")
            except BaseException:  # what was written must not outlive the refusal
                await self._write(previous)
                raise
            self._registry.switch(wanted, epoch=epoch)
            return previous.policy_version

    async def _write(self, active: Active) -> None:
        if self._path is not None:
            text = json.dumps({"run_id": active.run_id, "policy_version": active.policy_version})
            with reporting_full_disk():
                await asyncio.to_thread(write_text, self._path, text)


def read_pointer(path: Path) -> Active:
    """Return what was active.

    Raises:
        InvalidArgumentError: The file is damaged. To take it for no file would serve the base model in silence.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        run_id, version = content["run_id"], content["policy_version"]
    except (OSError, ValueError, KeyError, TypeError):
        run_id = version = None
    if isinstance(run_id, str) and type(version) is int and version >= 0:
        return Active(run_id, version)
    raise InvalidArgumentError(
        f"{path} is damaged. Delete it: then no version is active until one is activated.", field="adapters.folder"
    )
