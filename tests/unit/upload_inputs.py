"""Adapter folders, announcements and chunks for tests of the generator's storage."""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path
from typing import Any

from tether_services.generator.storage import AdapterStorage
from tether_services.generator.uploads import Chunk, Declaration, DeclaredFile, Upload, Uploads
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME


def opened(folder: Path | None, **options: int) -> AdapterStorage:
    storage = AdapterStorage(folder, **options)
    storage.open()
    return storage


def declare(
    version: int = 1, *, sha256: str = "a" * 64, request_id: str | None = None, size: int = 6, run_id: str = "run-a"
) -> Declaration:
    """An announcement of 4 bytes of configuration and `size` of weights."""
    return Declaration(
        request_id=request_id or f"request-{run_id}-{version}-{sha256[:1]}",
        run_id=run_id,
        policy_version=version,
        rank=2,
        target_modules=frozenset({"q_proj"}),
        files=(DeclaredFile(CONFIG_NAME, 4, "b" * 64), DeclaredFile(WEIGHTS_NAME, size, sha256)),
        probes=(),
        differs_from_base=True,
    )


def begin(storage: AdapterStorage, **changes: Any) -> Upload:
    """An upload whose first stream is open."""
    upload = asyncio.run(Uploads(storage, expire_seconds=60).begin(declare(**changes), epoch=1))
    upload.stream = 1
    return upload


def chunk(data: bytes, offset: int, **changes: Any) -> Chunk:
    """A correct chunk of the first stream, with changes."""
    fields: dict[str, Any] = {"offset": offset, "data": data, "crc32": zlib.crc32(data), "stream": 1}
    return Chunk(**(fields | changes))
