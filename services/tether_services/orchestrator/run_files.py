"""The folder of a run: configuration, checkpoints, adapters, evaluations, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tether.errors import FailedPreconditionError, NotFoundError
from tether_services.orchestrator.records import CheckpointRow
from tether_services.runtime.durable import remove_directory, sweep_leftovers, write_text

__all__ = ["RunFiles"]

_KINDS = ("checkpoints", "adapters")
_STATE_FILE = "state.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"


class RunFiles:
    """Names and housekeeping of a run's folder. Checkpoints and adapters have the number of the version that they hold.

    The folder of a checkpoint also carries the epoch of the attempt that wrote it, so that no attempt ever writes into
    a folder of another; which one counts is said by the ledger.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def new_checkpoint(self, policy_version: int, epoch: int) -> Path:
        """Return the folder for the checkpoint of a version that an attempt makes."""
        return self.directory / "checkpoints" / f"{policy_version:06d}-e{epoch}"

    def describe_checkpoint(self, folder: Path, policy_version: int) -> CheckpointRow:
        """Return what the ledger keeps of a checkpoint that is on the disk."""
        return CheckpointRow(
            version=policy_version,
            path=folder.relative_to(self.directory).as_posix(),
            sha256=_hash(folder / _STATE_FILE),
            size_bytes=sum(file.stat().st_size for file in folder.iterdir()),
        )

    def find_checkpoint(self, row: CheckpointRow) -> Path:
        """Return the folder of a checkpoint of the ledger, after comparing its hash.

        Raises:
            NotFoundError: It is not there.
            FailedPreconditionError: CHECKPOINT_DAMAGED.
        """
        folder = self.directory / row.path
        try:
            found = _hash(folder / _STATE_FILE)
        except FileNotFoundError as error:
            message = f"The committed checkpoint {folder} is gone; put it back from a copy, or start a new run."
            raise NotFoundError(message, field="checkpoint", reason="CHECKPOINT_NOT_FOUND") from error
        if row.sha256 and found != row.sha256:
            message = f"{folder} is not what was committed; put it back from a copy, or start a new run."
            raise FailedPreconditionError(message, field="checkpoint", reason="CHECKPOINT_DAMAGED")
        return folder

    def adapter(self, policy_version: int) -> Path:
        """Return the folder of an exported adapter."""
        return self.directory / "adapters" / f"{policy_version:06d}"

    def make_way(self, policy_version: int, *, config: bytes, committed_sha256: str = "") -> Path:
        """Return the folder of an adapter that is about to be exported.

        An older export of it is removed, unless it is the committed one and whole: that stays as it is.

        Args:
            policy_version: Of the adapter.
            config: Content of its configuration file.
            committed_sha256: Hash of its weights by the ledger; empty: it is not committed.
        """
        folder = self.adapter(policy_version)
        if not (committed_sha256 and _holds(folder, committed_sha256, config)):
            remove_directory(folder)
        return folder

    def new_average_directory(self) -> Path:
        """Return the folder of the averaged adapter; an older one is removed."""
        directory = self.directory / "adapters" / "average"
        remove_directory(directory)
        return directory

    def sweep(self, kept: Collection[CheckpointRow], *, committed: int) -> None:
        """Remove what earlier attempts left and nobody needs: halves, and what was never committed or is out of date.

        Args:
            kept: The checkpoints of the ledger.
            committed: Version of the last committed step.
        """
        for kind in _KINDS:
            sweep_leftovers(self.directory / kind)
        self.retain(kept, committed=committed)

    def retain(self, kept: Collection[CheckpointRow], *, committed: int) -> None:
        """Remove all checkpoints but these, and the adapters of other versions; the committed one always stays."""
        paths = {self.directory / row.path for row in kept}
        versions = {committed, *(row.version for row in kept)}
        for folder in (self.directory / "checkpoints").glob("[0-9]*"):
            version, _, epoch = folder.name.partition("-e")
            if version.isdigit() and (not epoch or epoch.isdigit()) and folder not in paths:
                remove_directory(folder)
        for folder in (self.directory / "adapters").glob("[0-9]*"):
            if folder.name.isdigit() and int(folder.name) not in versions:
                remove_directory(folder)

    def write_services(self, services: Mapping[str, object]) -> None:
        """Keep what the services served when the latest attempt began."""
        self.write_json("services.json", services)

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Write a JSON file whole or not at all."""
        write_text(self.directory / name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the content of a JSON file; None if it was never written."""
        path = self.directory / name
        if not path.exists():
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _holds(folder: Path, weights_sha256: str, config: bytes) -> bool:
    """Return whether both files of an adapter are there and whole."""
    try:
        return _hash(folder / _WEIGHTS_FILE) == weights_sha256 and (folder / _CONFIG_FILE).read_bytes() == config
    except OSError:
        return False
