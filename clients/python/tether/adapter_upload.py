"""Sends the files of an adapter: read in a thread, in pieces with a deadline each, resumed where the generator is."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol
from uuid import UUID, uuid5

from tether.attempts import ATTEMPTS, pause_after
from tether.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    TetherError,
    UnavailableError,
)
from tether.v1 import adapter_pb2

__all__ = ["ADAPTER_FILES", "AdapterUpload", "LocalFiles", "PushCalls", "read_files"]

ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
"""What an adapter folder must hold, in the order in which the bytes are sent. Other files stay at home."""
MAX_CHUNK_BYTES: Final = 1024 * 1024
"""Largest chunk that the contract allows."""
PIECE_BYTES: Final = 8 * 1024 * 1024
"""What is sent under one deadline, and held in memory."""
RESUMED: Final = ("WRONG_OFFSET", "STREAM_REPLACED", "CHUNK_DAMAGED", "COMMITTING")
"""Reasons for which the bytes go on from where the generator is."""
_LOST: Final = (UnavailableError, DeadlineExceededError, CancelledError)
"""A call had no answer."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One file of an adapter on this machine."""

    path: Path
    """Where it is."""
    size_bytes: int
    """Its size."""
    sha256: str
    """Its content."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of an adapter as one run of bytes."""

    files: tuple[LocalFile, ...]
    """In the order in which they are sent."""

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    def declare(self) -> list[adapter_pb2.AdapterFile]:
        """Return the manifest."""
        return [
            adapter_pb2.AdapterFile(name=file.path.name, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in self.files
        ]

    def read(self, offset: int, size: int) -> bytes:
        """Return at most `size` bytes from `offset` on; of a file that has shrunk since, what there is.

        Raises:
            InvalidArgumentError: A file cannot be read.
        """
        pieces = []
        for file in self.files:
            if 0 <= offset < file.size_bytes and size > 0:
                pieces.append(_read_at(file.path, offset, min(size, file.size_bytes - offset)))
                size -= len(pieces[-1])
            offset = max(0, offset - file.size_bytes)
        return b"".join(pieces)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise _unreadable(error) from error


def read_files(folder: Path) -> LocalFiles:
    """Return sizes and hashes of the files in an adapter folder; in memory is one piece at a time.

    Raises:
        InvalidArgumentError: One cannot be read.
    """
    try:
        return LocalFiles(tuple(_measure(folder / name) for name in ADAPTER_FILES))
    except OSError as error:
        raise _unreadable(error) from error


def _measure(path: Path) -> LocalFile:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(MAX_CHUNK_BYTES):
            digest.update(piece)
            size += len(piece)
    return LocalFile(path, size, digest.hexdigest())


def _unreadable(error: OSError) -> InvalidArgumentError:
    return InvalidArgumentError(f"Cannot read {error.filename}: {error.strerror}.", field="folder")


OnProgress = Callable[[int, int], None]
"""Called with the bytes that the generator has safely on disk and the bytes in all."""


class PushCalls(Protocol):
    """The calls of a push, each with a deadline of its own; failures are TetherErrors."""

    async def begin(self, request: adapter_pb2.BeginPushRequest) -> adapter_pb2.BeginPushResponse:
        """Announce."""
        ...

    async def send(
        self, chunks: Callable[[], AsyncIterator[adapter_pb2.PushChunksRequest]]
    ) -> adapter_pb2.PushChunksResponse:
        """Send one piece; its chunks are asked for anew where it must be sent again."""
        ...

    async def commit(self, request: adapter_pb2.CommitPushRequest) -> adapter_pb2.CommitPushResponse:
        """Have it verified, loaded and proven."""
        ...


class AdapterUpload:
    """One push: announce, send, commit, with one request id over all its attempts."""

    def __init__(
        self,
        calls: PushCalls,
        begin: adapter_pb2.BeginPushRequest,
        on_progress: OnProgress | None = None,
        *,
        attempts: int = ATTEMPTS,
    ) -> None:
        """Remember what to push.

        Args:
            calls: Makes the calls.
            begin: Its request_id, a UUID, names this push.
            on_progress: Called as bytes arrive.
            attempts: Times that announcing or committing is tried while there is no answer and no byte more arrives; 1
                for a caller that repeats the push itself. Even then it is announced once more after a piece without an
                answer, to see how far that came.
        """
        self._attempts = attempts
        self._sending = False
        self._calls = calls
        self._on_progress = on_progress
        self._begin = begin
        self._failures = 0
        self._uploads: dict[str, int] = {}
        """Largest offset seen of each upload."""
        self._damaged = False

    async def push(self, files: LocalFiles) -> adapter_pb2.CommitPushResponse:
        """Return the generator's answer to the commit.

        Raises:
            TetherError: What the generator refused, or what went wrong ATTEMPTS times without a byte more arriving;
                fewer times if there was no answer, see `attempts`.
        """
        while True:
            try:
                return await self._commit(await self._send(files))
            except TetherError as error:
                await self._recover(error)

    async def _send(self, files: LocalFiles) -> str:
        """Have all bytes arrive and return the upload's name."""
        self._sending = False
        begun = await self._calls.begin(self._begin)
        self._sending = True
        self._note(begun.upload_id, begun.committed_offset)
        offset, total = begun.committed_offset, files.size_bytes
        self._report(offset, total)
        while offset < total:
            piece = await asyncio.to_thread(files.read, offset, PIECE_BYTES)
            if not piece:
                raise InvalidArgumentError("A file has become shorter while it was sent.", field="folder")
            sent = await self._calls.send(partial(_chunks, begun, piece, offset))
            if sent.committed_offset <= offset:
                raise UnavailableError("The generator has taken none of the bytes.")
            offset = sent.committed_offset
            self._note(begun.upload_id, offset)
            self._report(offset, total)
        return begun.upload_id

    def _report(self, offset: int, total: int) -> None:
        if self._on_progress:
            self._on_progress(offset, total)

    async def _commit(self, upload_id: str) -> adapter_pb2.CommitPushResponse:
        """Return the answer to the commit, asking again while it is lost or takes longer than a deadline."""
        request = adapter_pb2.CommitPushRequest(
            request_id=str(uuid5(UUID(self._begin.request_id), upload_id)), upload_id=upload_id, epoch=self._begin.epoch
        )
        self._sending = False
        while True:
            try:
                return await self._calls.commit(request)
            except _LOST as error:
                await self._wait(error)

    async def _recover(self, error: TetherError) -> None:
        """Return where beginning again may help; raise the error where it does not."""
        if error.reason == "HASH_MISMATCH" and not self._damaged:
            self._damaged = True  # the generator has dropped the upload: the next one begins at 0
        elif not _may_pass(error):
            raise error
        await self._wait(error)

    async def _wait(self, error: TetherError) -> None:
        self._failures += 1
        if self._failures >= self._allowed(error) or len(self._uploads) > ATTEMPTS:
            raise error
        await pause_after(self._failures)

    def _allowed(self, error: TetherError) -> int:
        """Return the failures in a row after which the push is given up."""
        if not isinstance(error, _LOST):
            return ATTEMPTS  # the generator answers, so that the caller would not repeat the push
        return max(self._attempts, 2) if self._sending else self._attempts

    def _note(self, upload_id: str, offset: int) -> None:
        """Begin the count of failures anew if more has arrived than ever before in this upload."""
        if offset > self._uploads.setdefault(upload_id, offset):
            self._uploads[upload_id] = offset
            self._failures = 0


def _may_pass(error: TetherError) -> bool:
    """Return whether beginning again may help: the call was lost, its stream was, or the upload (by a restart)."""
    return isinstance(error, (*_LOST, NotFoundError)) or error.reason in RESUMED


async def _chunks(
    begun: adapter_pb2.BeginPushResponse, piece: bytes, offset: int
) -> AsyncIterator[adapter_pb2.PushChunksRequest]:
    """Yield a piece in chunks."""
    size = min(begun.max_chunk_bytes or MAX_CHUNK_BYTES, MAX_CHUNK_BYTES)
    for start in range(0, len(piece), size):
        data = piece[start : start + size]
        yield adapter_pb2.PushChunksRequest(
            upload_id=begun.upload_id, offset=offset + start, data=data, crc32=zlib.crc32(data), stream=begun.stream
        )
