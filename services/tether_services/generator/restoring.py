"""After a restart: what an earlier process has stored is checked, loaded and proven again before anything is served."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
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

Stored = tuple[Manifest, Path]
"""A stored version that is not damaged, and its folder."""


async def restore_versions(storage: AdapterStorage, pushes: AdapterPushes, metrics: GeneratorMetrics) -> None:
    """Take the stored versions in, oldest first.

    What is damaged is set aside. What is refused stays and is tried at the next start: a wrong setting may be why.
    """
    found: list[Stored] = []
    for folder in await asyncio.to_thread(storage.find_stored):
        try:
            found.append((await asyncio.to_thread(read_stored, folder), folder))
        except FailedPreconditionError as error:
            _count_refused(folder, error, metrics)
            await _set_aside(storage, folder)
        except OSError as error:
            _count_refused(folder, error, metrics)
    for same in _group(found):
        await _take_back(same, storage, pushes, metrics)


def _group(found: Sequence[Stored]) -> list[list[Stored]]:
    """Return the stored versions, oldest first, each with those of its number that it replaced, newest first."""
    newest_first = sorted(found, key=lambda stored: -stored[0].created)
    by_key = sorted(newest_first, key=lambda stored: stored[0].declaration.key)
    groups = [list(same) for _, same in itertools.groupby(by_key, key=lambda stored: stored[0].declaration.key)]
    return sorted(groups, key=lambda same: same[0][0].created)


async def _take_back(
    same: Sequence[Stored], storage: AdapterStorage, pushes: AdapterPushes, metrics: GeneratorMetrics
) -> None:
    """Load the newest that passes of those with one number; the older ones have been replaced, so they go."""
    for index, (manifest, folder) in enumerate(same):
        try:
            await pushes.take_back(manifest, folder)
        except Exception as error:  # whatever an engine raises: the service starts, the version can be pushed again
            _count_refused(folder, error, metrics)
            continue
        metrics.restores.labels("ok").inc()
        for _, replaced in same[index + 1 :]:
            await asyncio.to_thread(storage.remove, replaced)
        return


def _count_refused(folder: Path, error: Exception, metrics: GeneratorMetrics) -> None:
    metrics.restores.labels("refused").inc()
    log_event(log, "stored adapter refused", level=logging.ERROR, folder=str(folder), error=str(error))


async def _set_aside(storage: AdapterStorage, folder: Path) -> None:
    try:
        place = await asyncio.to_thread(storage.set_aside, folder)
    except OSError as error:  # it stays where it is, unloaded: no reason not to serve the others
        log_event(log, "damaged adapter not moved", level=logging.ERROR, folder=str(folder), error=str(error))
    else:
        log_event(log, "damaged adapter set aside", level=logging.ERROR, folder=str(place))


def read_stored(folder: Path) -> Manifest:
    """Return the manifest of a stored version whose files are what they were when it was proven.

    Raises:
        FailedPreconditionError: Something is damaged or missing; the reason says what.
        OSError: A file is there and cannot be read.
    """
    try:
        manifest = read_manifest((folder / MANIFEST_NAME).read_bytes())
        declared = manifest.declaration
        if folder.parent.name != declared.run_id or not folder.name.startswith(f"{declared.policy_version}-"):
            raise ValueError("the manifest belongs to another version")
        check_hash(folder / CONFIG_NAME, manifest.config_sha256)
        check_hash(folder / WEIGHTS_NAME, declared.weights_sha256)
    except (FileNotFoundError, ValueError, StopIteration, NotFoundError) as error:
        raise refuse(f"{error}.", reason="MANIFEST_DAMAGED") from error
    return manifest
