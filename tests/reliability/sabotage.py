"""Takes one protection out of a service before it starts: what a negative control runs against."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

__all__ = ["take_out"]


def take_out(name: str) -> None:
    """Take a protection, a key of SABOTAGES, out of this process and of those that it forks."""
    SABOTAGES[name]()


def _replace(module: str, name: str, replacement: Callable[..., Any], *, loaded_by: str) -> None:
    """Put a function in the place of another one, wherever it has been imported.

    Args:
        module: Where the function is defined.
        name: The function.
        replacement: Takes its place.
        loaded_by: A module that imports everything which may use it.
    """
    original = getattr(importlib.import_module(module), name)
    importlib.import_module(loaded_by)
    for loaded in list(sys.modules.values()):
        if getattr(loaded, "__name__", "").startswith("tether_services") and getattr(loaded, name, None) is original:
            setattr(loaded, name, replacement)


def _set(owner: object, name: str, replacement: Callable[..., Any]) -> None:
    """Replace an attribute that exists."""
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    setattr(owner, name, replacement)


def _replace_in_generator(module: str, name: str, replacement: Callable[..., Any]) -> None:
    service = "tether_services.generator.service"
    _replace(f"tether_services.generator.{module}", name, replacement, loaded_by=service)


def _take_out_hash() -> None:
    """Bytes are not compared with the hash that was declared for them."""
    _replace_in_generator("verification", "check_hash", lambda path, sha256: None)


def _take_out_checks() -> None:
    """The values of an adapter and its effect are not looked at."""
    _replace_in_generator("verification", "check_finite", lambda path, entries: None)
    _replace_in_generator("proof", "check_claim", lambda served, claimed, tolerance: 0.0)
    _replace_in_generator("proof", "check_effect", lambda *served, **declared: None)


def _take_out_seeds() -> None:
    """Samples depend on the process that asks for them, not on step and prompt alone."""
    from tether_services.orchestrator.prompts import derive_seed

    _replace(
        "tether_services.orchestrator.prompts",
        "derive_seed",
        lambda *parts: derive_seed(*parts, os.getpid()),
        loaded_by="tether_services.orchestrator.loop",
    )


def _take_out_staging() -> None:
    """Bytes are written over the newest stored version in place of a folder of their own."""
    from tether_services.generator.storage import AdapterStorage

    beside = AdapterStorage.stage

    def stage(self: AdapterStorage, upload_id: str) -> Path:
        newest = max(self.folder.glob("versions/*/*"), key=lambda path: path.stat().st_mtime_ns, default=None)
        return beside(self, upload_id) if newest is None else newest

    _set(AdapterStorage, "stage", stage)


def _take_out_order() -> None:
    """A checkpoint reaches its place only after the step that needs it is committed."""
    from tether_services.orchestrator import loop
    from tether_services.orchestrator.records import CheckpointRow
    from tether_services.orchestrator.session import Session

    save, publish = Session.save_checkpoint, loop.publish
    late: list[tuple[Path, Path]] = []

    async def save_late(self: Session, policy_version: int) -> CheckpointRow:
        row = await save(self, policy_version)
        late.append((self.files.directory / "late", self.files.directory / row.path))
        late[-1][1].rename(late[-1][0])
        return row

    async def publish_after(*arguments: Any) -> None:
        while late:
            hidden, place = late.pop()
            hidden.rename(place)
        await publish(*arguments)

    _set(Session, "save_checkpoint", save_late)
    _set(loop, "publish", publish_after)


SABOTAGES: Final[dict[str, Callable[[], None]]] = {
    "hash": _take_out_hash,
    "checks": _take_out_checks,
    "seeds": _take_out_seeds,
    "staging": _take_out_staging,
    "order": _take_out_order,
}
