"""The folder of a run: configuration, checkpoints, adapters, evaluations, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tether_services.runtime.durable import write_text

__all__ = ["RunFiles"]


class RunFiles:
    """Names and housekeeping of a run's folder. Versions number checkpoints and adapters: version k follows k steps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, policy_version: int) -> Path:
        """Return the folder of the checkpoint taken when a version was made."""
        return self.directory / "checkpoints" / f"{policy_version:06d}"

    def adapter(self, policy_version: int) -> Path:
        """Return the folder of an exported adapter."""
        return self.directory / "adapters" / f"{policy_version:06d}"

    def new_adapter_directory(self, policy_version: int) -> Path:
        """Return the folder of an adapter that is about to be exported; an older export of it is removed."""
        shutil.rmtree(self.adapter(policy_version), ignore_errors=True)
        return self.adapter(policy_version)

    def new_average_directory(self) -> Path:
        """Return the folder of the averaged adapter; an older one is removed."""
        directory = self.directory / "adapters" / "average"
        shutil.rmtree(directory, ignore_errors=True)
        return directory

    def drop_uncommitted(self, committed: int) -> None:
        """Remove checkpoints and adapters of steps that were never committed."""
        self._remove(lambda version: version > committed)

    def keep_newest(self, policy_version: int, count: int) -> None:
        """Remove checkpoints and adapters that are `count` or more versions old."""
        self._remove(lambda version: version <= policy_version - count)

    def _remove(self, unwanted: Callable[[int], bool]) -> None:
        for kind in ("checkpoints", "adapters"):
            for folder in (self.directory / kind).glob("[0-9]*"):
                if folder.name.isdigit() and unwanted(int(folder.name)):
                    shutil.rmtree(folder, ignore_errors=True)

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
