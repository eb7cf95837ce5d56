"""The fence: the highest epoch seen of each run, so that a writer that has been replaced changes nothing any more."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

from tether.errors import AbortedError, InvalidArgumentError
from tether_services.generator.storage import reporting_full_disk
from tether_services.runtime.durable import write_text

MAX_RUNS = 4096
"""Runs whose epochs are remembered; those that have not called for longest are forgotten first."""


class Fence:
    """Highest epochs by run, in a file: on the disk before the call that raised one is answered."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._saved: dict[str, int] = {}
        self._writing = threading.Lock()

    def open(self, path: Path) -> None:
        """Read the epochs that earlier processes have seen, and keep them there from now on.

        Raises:
            InvalidArgumentError: The file is damaged.
        """
        self._path = path
        self._seen = read_epochs(path) if path.exists() else {}
        self._saved = dict(self._seen)

    def check(self, run_id: str, epoch: int) -> None:
        """Refuse a writer that a newer one has replaced.

        Raises:
            AbortedError: STALE_EPOCH.
        """
        if epoch < self._seen.get(run_id, 0):
            raise AbortedError(
                f"Epoch {epoch} of run {run_id} is older than {self._seen[run_id]}: fenced off.",
                field="epoch",
                reason="STALE_EPOCH",
            )

    async def admit(self, run_id: str, epoch: int) -> None:
        """Let a writer pass and refuse all older ones from now on, also after a restart.

        What the caller does before it awaits again cannot be overtaken by a newer writer.

        Raises:
            AbortedError: STALE_EPOCH: a newer writer was here, or came while the epoch was written.
            ResourceExhaustedError: STORAGE_FULL: the epoch cannot be written.
        """
        self.check(run_id, epoch)
        self._seen.pop(run_id, None)
        self._seen[run_id] = epoch
        if len(self._seen) > MAX_RUNS:
            del self._seen[next(iter(self._seen))]
        if self._saved.get(run_id, 0) < epoch:
            await asyncio.to_thread(self._save, run_id, epoch)
            self.check(run_id, epoch)

    def _save(self, run_id: str, epoch: int) -> None:
        with self._writing:  # what is written is read under the lock: an older state never replaces a newer one
            if self._saved.get(run_id, 0) >= epoch:
                return
            epochs = dict(self._seen)
            with reporting_full_disk():
                write_text(self._path, json.dumps(epochs))
            self._saved = epochs


def read_epochs(path: Path) -> dict[str, int]:
    """Return the epochs in a fence file.

    Raises:
        InvalidArgumentError: It is damaged. An empty fence in its place would let replaced writers in.
    """
    try:
        epochs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        epochs = None
    if isinstance(epochs, dict) and all(type(epoch) is int and epoch >= 1 for epoch in epochs.values()):
        return epochs
    raise InvalidArgumentError(
        f"{path} is damaged. Make sure that no training run uses this generator, then delete it.",
        field="adapters.folder",
    )
