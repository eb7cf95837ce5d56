"""Adapter uploads before they are committed: declared, filled in order, resumable, forgotten when abandoned."""

from __future__ import annotations

import asyncio
import errno
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tether.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from tether_services.generator.storage import AdapterStorage, sync_file, write_at

MAX_CHUNK_BYTES = 1024 * 1024
MAX_OPEN_UPLOADS = 8


@dataclass(frozen=True, slots=True)
class Probe:
    """Tokens whose log-probabilities under the adapter are known."""

    token_ids: tuple[int, ...]
    """At least 2."""
    logprobs: tuple[float, ...]
    """Of token_ids[1:], natural log, temperature 1."""


@dataclass(frozen=True, slots=True)
class DeclaredFile:
    """One file of the manifest."""

    name: str
    """adapter_config.json or adapter_model.safetensors."""
    size_bytes: int
    """Above 0."""
    sha256: str
    """64 hex digits."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What BeginPush announces; already validated."""

    request_id: str
    """UUID of the push."""
    run_id: str
    """Owner."""
    policy_version: int
    """1 or more."""
    rank: int
    """Of the matrices."""
    target_modules: frozenset[str]
    """Last path components of the changed layers."""
    files: tuple[DeclaredFile, ...]
    """In the order in which their bytes come."""
    probes: tuple[Probe, ...]
    """The proofs."""
    differs_from_base: bool
    """True if some B is not zero."""

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def key(self) -> tuple[str, int]:
        """Return (run_id, policy_version)."""
        return self.run_id, self.policy_version

    def same_content(self, other: Declaration) -> bool:
        """Return whether both announce the same adapter; request_id and proofs may differ."""
        neutral = replace(other, request_id=self.request_id, probes=self.probes)
        return self == neutral


@dataclass(slots=True)
class Upload:
    """One upload in progress or committed."""

    upload_id: str
    """Names it in the calls that follow."""
    declaration: Declaration
    """What was announced."""
    folder: Path
    """Its staging folder."""
    received_bytes: int = 0
    """Bytes written so far."""
    touched: float = field(default_factory=time.monotonic)
    """When something last happened to it."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while bytes are written."""
    committing: bool = False
    """True from the first CommitPush on: no more bytes."""

    async def write(self, data: bytes, *, offset: int) -> None:
        """Append bytes.

        Raises:
            FailedPreconditionError: The offset is not the next one, or the upload is being committed.
            InvalidArgumentError: More bytes than declared.
            ResourceExhaustedError: The disk is full.
        """
        async with self.lock:
            if self.committing:
                raise FailedPreconditionError("The upload is being committed.", field="upload_id", reason="COMMITTING")
            if offset != self.received_bytes:
                raise FailedPreconditionError(
                    f"Offset {offset} is not the committed offset {self.received_bytes}; send from there.",
                    field="offset",
                    reason="WRONG_OFFSET",
                )
            if offset + len(data) > self.declaration.size_bytes:
                raise InvalidArgumentError(
                    f"{offset + len(data)} bytes are more than the declared {self.declaration.size_bytes}.",
                    field="data",
                )
            await self._write_pieces(data)

    async def _write_pieces(self, data: bytes) -> None:
        """Split at file boundaries and write each piece at its place."""
        for name, start, piece in split_at_files(self.declaration.files, self.received_bytes, data):
            try:
                await asyncio.to_thread(write_at, self.folder / name, piece, start)
            except FileNotFoundError as error:
                raise NotFoundError("The upload was abandoned.", field="upload_id") from error
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise ResourceExhaustedError("The generator's disk is full.", reason="STORAGE_FULL") from error
                raise
            self.received_bytes += len(piece)
            self.touched = time.monotonic()

    async def sync(self) -> int:
        """Have all received bytes reach the disk and return their number.

        Raises:
            NotFoundError: The upload was dropped in the meantime.
        """
        async with self.lock:
            received = self.received_bytes
            if not self.committing:
                await self._sync_files()
            return received

    async def _sync_files(self) -> None:
        try:
            for file in self.declaration.files:
                await asyncio.to_thread(sync_file, self.folder / file.name)
        except FileNotFoundError as error:
            raise NotFoundError("The upload was abandoned.", field="upload_id") from error


def split_at_files(files: Sequence[DeclaredFile], offset: int, data: bytes) -> list[tuple[str, int, bytes]]:
    """Return (file name, position in the file, bytes) of a run of bytes at `offset` of all files in order."""
    pieces = []
    begin = 0
    for file in files:
        low, high = max(offset, begin), min(offset + len(data), begin + file.size_bytes)
        if low < high:
            pieces.append((file.name, low - begin, data[low - offset : high - offset]))
        begin += file.size_bytes
    return pieces


class Uploads:
    """The open uploads, few and short-lived."""

    def __init__(self, storage: AdapterStorage, *, expire_seconds: float) -> None:
        self.storage = storage
        self._expire_seconds = expire_seconds
        self._open: dict[str, Upload] = {}

    def begin(self, declaration: Declaration) -> Upload:
        """Return the upload of this declaration: the open one of the same content, or a new one in place of another.

        Raises:
            AbortedError: Another content for this version is being committed.
            InvalidArgumentError: request_id was used for another content.
            ResourceExhaustedError: Too many open uploads, or the disk is full.
        """
        self.expire()
        for upload in list(self._open.values()):
            if upload.declaration.same_content(declaration):
                upload.touched = time.monotonic()
                return upload
            if upload.declaration.request_id == declaration.request_id:
                raise InvalidArgumentError("This request_id was used for another adapter.", field="request_id")
            if upload.declaration.key == declaration.key:
                if upload.committing:
                    raise AbortedError("Another upload of this version is being committed.")
                self.forget(upload)
        if len(self._open) >= MAX_OPEN_UPLOADS:
            raise ResourceExhaustedError(
                f"{MAX_OPEN_UPLOADS} uploads are open.", reason="TOO_MANY_UPLOADS", retry_after_seconds=5.0
            )
        outstanding = sum(upload.declaration.size_bytes - upload.received_bytes for upload in self._open.values())
        self.storage.check_space(outstanding + declaration.size_bytes)
        upload_id = uuid.uuid4().hex
        upload = Upload(upload_id, declaration, self.storage.stage(upload_id))
        self._open[upload_id] = upload
        return upload

    def get(self, upload_id: str) -> Upload:
        """Return an open upload.

        Raises:
            NotFoundError: There is none of that name.
        """
        self.expire()
        upload = self._open.get(upload_id)
        if upload is None:
            raise NotFoundError("There is no such upload; it may have expired. Begin again.", field="upload_id")
        upload.touched = time.monotonic()
        return upload

    def forget(self, upload: Upload) -> None:
        """Drop an upload and its staged bytes."""
        self._open.pop(upload.upload_id, None)
        self.storage.discard(upload.upload_id)

    def expire(self) -> None:
        """Drop what has received nothing for long."""
        horizon = time.monotonic() - self._expire_seconds
        for upload in list(self._open.values()):
            if upload.touched < horizon and not upload.committing:
                self.forget(upload)
