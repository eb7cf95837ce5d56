"""Adapter uploads before they are committed: declared, filled in order, resumable, forgotten when abandoned."""

from __future__ import annotations

import asyncio
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tether.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from tether_services.generator.storage import AdapterStorage, reporting_full_disk, sync_file, write_at
from tether_services.generator.verification import WEIGHTS_NAME
from tether_services.runtime.fault_points import reach

MAX_CHUNK_BYTES = 1024 * 1024
MAX_OPEN_UPLOADS = 8
LEFT_SECONDS = 5.0
"""An upload that nobody sends and nothing has arrived of for so long gives way to the next one of its run."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Tokens whose log-probabilities under the adapter are known."""

    token_ids: tuple[int, ...]
    """At least 2."""
    logprobs: tuple[float, ...]
    """Of token_ids[1:], natural log, temperature 1."""
    base_logprobs: tuple[float, ...] = ()
    """The same without the adapter; empty if the pusher did not say."""


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
    def weights_sha256(self) -> str:
        """Return the hash that names the adapter."""
        return next(file.sha256 for file in self.files if file.name == WEIGHTS_NAME)

    @property
    def key(self) -> tuple[str, int]:
        """Return (run_id, policy_version)."""
        return self.run_id, self.policy_version

    def same_content(self, other: Declaration) -> bool:
        """Return whether both announce the same adapter; request_id and proofs may differ."""
        neutral = replace(other, request_id=self.request_id, probes=self.probes)
        return self == neutral


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of an upload."""

    offset: int
    """Position of the first byte in the upload."""
    data: bytes
    """At least 1."""
    crc32: int
    """Of data, with the polynomial of zlib."""
    stream: int
    """Which stream of the upload it belongs to."""


@dataclass(slots=True)
class Upload:
    """One upload in progress or committed."""

    upload_id: str
    """Names it in the calls that follow."""
    declaration: Declaration
    """What was announced."""
    folder: Path
    """Its staging folder."""
    epoch: int
    """Highest epoch of the writers that have begun or committed it."""
    received_bytes: int = 0
    """Bytes written so far."""
    stream: int = 0
    """The one that may send; those before it may not."""
    touched: float = field(default_factory=time.monotonic)
    """When something last happened to it."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while bytes are written."""
    committing: bool = False
    """True from the first CommitPush on: no more bytes."""
    num_streams: int = 0
    """Calls that are sending it now."""

    @contextmanager
    def streamed(self) -> Iterator[None]:
        """Count a call that sends it, until the block ends."""
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1
            self.touched = time.monotonic()

    async def open_stream(self) -> tuple[int, int]:
        """Return (stream, committed offset) of a new stream; no earlier one writes a byte after this."""
        self.stream += 1
        stream = self.stream
        async with self.lock:  # a chunk that is being written counts
            return stream, self.received_bytes

    async def write(self, chunk: Chunk) -> None:
        """Append bytes; a chunk that is there already is skipped.

        Raises:
            AbortedError: STREAM_REPLACED: a later BeginPush has opened another stream.
            FailedPreconditionError: CHUNK_DAMAGED, WRONG_OFFSET, or COMMITTING: the upload is being committed.
            InvalidArgumentError: More bytes than declared.
            ResourceExhaustedError: STORAGE_FULL.
        """
        async with self.lock:
            self._check(chunk)
            if chunk.offset + len(chunk.data) > self.received_bytes:
                await self._write_pieces(chunk.data)

    def _check(self, chunk: Chunk) -> None:
        if chunk.stream != self.stream:
            raise AbortedError(
                "A later BeginPush has opened another stream of this upload.", field="stream", reason="STREAM_REPLACED"
            )
        check_chunk(chunk)
        if self.committing:
            raise FailedPreconditionError("The upload is being committed.", field="upload_id", reason="COMMITTING")
        end = chunk.offset + len(chunk.data)
        if chunk.offset != self.received_bytes and end > self.received_bytes:
            raise FailedPreconditionError(
                f"Offset {chunk.offset} is not the committed offset {self.received_bytes}; send from there.",
                field="offset",
                reason="WRONG_OFFSET",
            )
        if end > self.declaration.size_bytes:
            raise InvalidArgumentError(
                f"{end} bytes are more than the declared {self.declaration.size_bytes}.", field="data"
            )

    async def _write_pieces(self, data: bytes) -> None:
        """Split at file boundaries and write each piece at its place."""
        for name, start, piece in split_at_files(self.declaration.files, self.received_bytes, data):
            with reporting_full_disk(), _reporting_abandoned():
                reach("upload.chunk")
                await asyncio.to_thread(write_at, self.folder / name, piece, start)
            self.received_bytes += len(piece)
            self.touched = time.monotonic()

    async def sync(self) -> int:
        """Have all received bytes reach the disk and return their number.

        Raises:
            NotFoundError: The upload was dropped in the meantime.
            ResourceExhaustedError: STORAGE_FULL.
        """
        async with self.lock:
            received = self.received_bytes
            if not self.committing:
                with reporting_full_disk(), _reporting_abandoned():
                    for file in self.declaration.files:
                        await asyncio.to_thread(sync_file, self.folder / file.name)
            return received


def check_chunk(chunk: Chunk) -> None:
    """Refuse bytes that were damaged on their way."""
    if zlib.crc32(chunk.data) != chunk.crc32:
        raise FailedPreconditionError(
            "The bytes do not have the CRC-32 that was sent with them; send them again.",
            field="data",
            reason="CHUNK_DAMAGED",
        )


@contextmanager
def _reporting_abandoned() -> Iterator[None]:
    try:
        yield
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
    """The open uploads, few and short-lived. The disk is touched in threads, so that calls and health go on."""

    def __init__(self, storage: AdapterStorage, *, expire_seconds: float) -> None:
        self.storage = storage
        self._expire_seconds = expire_seconds
        self._open: dict[str, Upload] = {}
        self._turn = asyncio.Lock()
        self._removals: set[asyncio.Task[None]] = set()

    async def begin(self, declaration: Declaration, *, epoch: int) -> Upload:
        """Return the upload of this declaration: the open one of the same content, or a new one in place of another.

        For want of room, what the run has begun before and nobody sends any more is dropped, the longest idle first.

        Raises:
            AbortedError: Another content for this version is being committed.
            InvalidArgumentError: request_id was used for another content.
            ResourceExhaustedError: Too many open uploads, or STORAGE_FULL.
        """
        async with self._turn:
            return self._find_open(declaration, epoch) or await self._open_new(declaration, epoch)

    def _find_open(self, declaration: Declaration, epoch: int) -> Upload | None:
        """Return the open upload of the same content; drop what it replaces where there is none."""
        self.expire()
        for upload in list(self._open.values()):
            if upload.declaration.same_content(declaration):
                upload.touched = time.monotonic()
                upload.epoch = max(upload.epoch, epoch)
                return upload
            if upload.declaration.request_id == declaration.request_id:
                raise InvalidArgumentError("This request_id was used for another adapter.", field="request_id")
            abandoned = upload.declaration.run_id == declaration.run_id and upload.epoch < epoch
            if abandoned or upload.declaration.key == declaration.key:
                self._replace(upload, epoch)
        return None

    async def _open_new(self, declaration: Declaration, epoch: int) -> Upload:
        while True:
            try:
                await self._check_room(declaration)
            except ResourceExhaustedError:
                left = self._find_left(declaration.run_id, epoch)
                if left is None:
                    raise
                self.forget(left)
            else:
                break
        upload_id = uuid.uuid4().hex
        folder = await asyncio.to_thread(self.storage.stage, upload_id)
        self._open[upload_id] = upload = Upload(upload_id, declaration, folder, epoch)
        return upload

    async def _check_room(self, declaration: Declaration) -> None:
        if len(self._open) >= MAX_OPEN_UPLOADS:
            raise ResourceExhaustedError(
                f"{MAX_OPEN_UPLOADS} uploads are open.", reason="TOO_MANY_UPLOADS", retry_after_seconds=LEFT_SECONDS
            )
        await self.settle()
        await asyncio.to_thread(self.storage.check_space, self._outstanding() + declaration.size_bytes)

    def _find_left(self, run_id: str, epoch: int) -> Upload | None:
        """Return the upload of a run, of this writer or one before it, that has been left for longest."""
        horizon = time.monotonic() - LEFT_SECONDS
        left = [
            upload
            for upload in self._open.values()
            if upload.declaration.run_id == run_id
            and upload.epoch <= epoch
            and upload.touched < horizon
            and not (upload.committing or upload.num_streams)
        ]
        return min(left, key=lambda upload: upload.touched, default=None)

    async def missing_bytes(self, declaration: Declaration) -> int:
        """Return how much would have to go for this upload to fit; 0 or less if it does."""
        return await asyncio.to_thread(self.storage.missing_bytes, self._outstanding() + declaration.size_bytes)

    def _outstanding(self) -> int:
        """Return what the open uploads will still take."""
        return sum(upload.declaration.size_bytes - upload.received_bytes for upload in self._open.values())

    def _replace(self, upload: Upload, epoch: int) -> None:
        """Make way for other content of the same version, or drop what a writer has begun that was replaced since."""
        if not upload.committing:
            self.forget(upload)
        elif upload.epoch >= epoch:
            raise AbortedError("Another upload of this version is being committed.")
        # Else a writer that has been replaced is committing it: the fence refuses it before it can be used.

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

    async def write(self, upload: Upload, chunk: Chunk) -> None:
        """Append bytes; an upload that the disk has no room for is dropped, which frees what it took.

        Raises:
            TetherError: What `Upload.write` raises.
        """
        try:
            await upload.write(chunk)
        except ResourceExhaustedError:
            await self.drop(upload)
            raise

    async def sync(self, upload: Upload) -> int:
        """Have all received bytes reach the disk and return their number, with the same care."""
        try:
            return await upload.sync()
        except ResourceExhaustedError:
            await self.drop(upload)
            raise

    async def drop(self, upload: Upload) -> None:
        """Drop an upload; its staged bytes are gone then."""
        self.forget(upload)
        await self.settle()

    def forget(self, upload: Upload) -> None:
        """Drop an upload now, and its staged bytes soon."""
        if self._open.pop(upload.upload_id, None) is not None:
            removal = asyncio.create_task(asyncio.to_thread(self.storage.discard, upload.upload_id))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)

    async def settle(self) -> None:
        """Wait until the staged bytes of everything that was dropped are gone. They go also if the caller leaves."""
        while self._removals:
            await asyncio.wait(set(self._removals))  # gather would cancel them, and who else waits for them, with it

    def expire(self) -> None:
        """Drop what has received nothing for long."""
        horizon = time.monotonic() - self._expire_seconds
        for upload in list(self._open.values()):
            if upload.touched < horizon and not upload.committing:
                self.forget(upload)
