"""After a restart: what an earlier process has stored is checked, loaded and proven again before anything is served."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from tether.errors import FailedPreconditionError, NotFoundError
from tether_services.generator.manifest import Manifest, read_manifest
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.generator.pushes import AdapterPushes
from tether_services.generator.storage import AdapterStorage
from tether_services.generator.verification import (
    CONFIG_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    check_hash,
    refuse,
)
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)


async def restore_versions(storage: AdapterStorage, pushes: AdapterPushes, metrics: GeneratorMetrics) -> None:
    """Take the stored versions in, oldest first; what fails a check or the proof is set aside and counted."""
    found: list[tuple[Manifest, Path]] = []
    for folder in await asyncio.to_thread(storage.find_stored):
        try:
            found.append((await asyncio.to_thread(read_stored, folder), folder))
        except FailedPreconditionError as error:
            await _set_aside(storage, folder, error, metrics)
    for manifest, folder in sorted(found, key=lambda pair: pair[0].created):
        try:
            await pushes.take_back(manifest, folder)
        except Exception as error:  # whatever an engine raises: the service starts, the version can be pushed again
            await _set_aside(storage, folder, error, metrics)
        else:
            metrics.restores.labels("ok").inc()


async def _set_aside(storage: AdapterStorage, folder: Path, error: Exception, metrics: GeneratorMetrics) -> None:
    place = await asyncio.to_thread(storage.set_aside, folder)
    metrics.restores.labels("refused").inc()
    log_event(log, "stored adapter set aside", level=logging.ERROR, folder=str(place), error=str(error))


def read_stored(folder: Path) -> Manifest:
    """Return the manifest of a stored version whose files are what they were when it was proven.

    Raises:
        FailedPreconditionError: Something is damaged or missing; the reason says what.
    """
    try:
        manifest = read_manifest((folder / MANIFEST_NAME).read_bytes())
        declared = manifest.declaration
        if folder.parent.name != declared.run_id or not folder.name.startswith(f"{declared.policy_version}-"):
            raise ValueError("the manifest belongs to another version")
        check_hash(folder / CONFIG_NAME, manifest.config_sha256)
        check_hash(folder / WEIGHTS_NAME, declared.weights_sha256)
    except (OSError, ValueError, StopIteration, NotFoundError) as error:
        raise refuse(f"{error}.", reason="MANIFEST_DAMAGED") from error
    return manifest
