"""Which versions were made the default, on the disk, so that a restart serves what was served."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import Field, ValidationError

from tether.errors import InvalidArgumentError
from tether_services.reward.names import ModelId
from tether_services.runtime.checks import SHA256_PATTERN
from tether_services.runtime.durable import as_storage_error, make_folder, write_text
from tether_services.runtime.settings import Settings

__all__ = ["Defaults", "DefaultsFile"]

FILE_NAME = "default_models.json"


@dataclass(frozen=True, slots=True)
class Defaults:
    """What was switched since the configuration."""

    default_name: str = ""
    """Name that a call without one selects; empty: never switched."""
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Version and content hash that a name selects, for each name that was switched."""

    def with_switch(self, wanted: ModelId, sha256: str, *, name_only: bool) -> Defaults:
        """Return these after one more switch."""
        versions = {**self.versions, wanted.name: (wanted.version, sha256)}
        return Defaults(self.default_name if name_only else wanted.name, versions)

    def without(self, gone: ModelId) -> Defaults:
        """Return these without a version that is no longer held."""
        kept = {name: entry for name, entry in self.versions.items() if ModelId(name, entry[0]) != gone}
        return Defaults(self.default_name, kept)


class _Content(Settings):
    """What the file may hold."""

    default_name: str
    versions: dict[str, tuple[str, str]] = Field(max_length=64)


class DefaultsFile:
    """Keeps the defaults; without a folder in memory only."""

    def __init__(self, state_dir: str) -> None:
        self._path = Path(state_dir).expanduser() / FILE_NAME if state_dir else None
        self.defaults = Defaults()
        """As they are written."""

    @property
    def hint(self) -> str:
        """Return the way out when what is kept cannot be served."""
        return f"Bring it back, or delete {self._path}: then the configuration decides."

    async def open(self) -> Defaults:
        """Return what an earlier process kept.

        Raises:
            InvalidArgumentError: The folder cannot be used, or the file is damaged.
        """
        if self._path is not None:
            self.defaults = await asyncio.to_thread(_read, self._path)
        return self.defaults

    async def write(self, defaults: Defaults) -> None:
        """Keep these; the old ones stay where that fails.

        Raises:
            ResourceExhaustedError: STORAGE_FULL.
            FailedPreconditionError: STORAGE_READ_ONLY.
        """
        if self._path is not None and defaults != self.defaults:
            try:
                await asyncio.to_thread(write_text, self._path, json.dumps(asdict(defaults), indent=2))
            except OSError as error:
                named = as_storage_error(error, self._path)
                if named is None:
                    raise
                raise named from error
        self.defaults = defaults


def _read(path: Path) -> Defaults:
    """Return what the file holds, nothing if there is none; its folder is made.

    Raises:
        InvalidArgumentError: It is damaged. To take it for no file would serve another model in silence.
    """
    try:
        make_folder(path.parent)
        if not path.exists():
            return Defaults()
        content = _Content.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"{path} cannot be read ({type(error).__name__}). Delete it: then the configuration decides.",
            field="state_dir",
        ) from error
    known = not content.default_name or content.default_name in content.versions
    if not known or not all(version and SHA256_PATTERN.fullmatch(sha) for version, sha in content.versions.values()):
        raise InvalidArgumentError(f"{path} is damaged. Delete it: then the configuration decides.", field="state_dir")
    return Defaults(content.default_name, content.versions)
