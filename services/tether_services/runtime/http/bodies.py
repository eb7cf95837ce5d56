"""Reads the body of a request with an end to everything: its size, its time, what it unpacks to, what all hold."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from tether.errors import DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError
from tether_services.runtime.callers import ANONYMOUS
from tether_services.runtime.http.answers import Receive, Refused

GZIP_BITS: Final = 31
"""zlib's word for a gzip header around the data."""


class Gone(Exception):
    """The caller has left: there is nobody to answer."""


@dataclass(slots=True)
class Budget:
    """Bytes of the bodies of all requests in flight, together."""

    limit: int
    """At most this many."""
    held: int = field(default=0, init=False)
    """Now in memory."""
    held_by: Counter[str] = field(default_factory=Counter, init=False)
    """The same by caller."""

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Yield what one request takes from it; given back when the block ends."""
        share = Share(self)
        try:
            yield share
        finally:
            self.held -= share.taken
            self.held_by[share.caller] -= share.taken
            self.held_by += Counter()  # forgets those that hold nothing

    def room_of(self, caller: str, *, beside: int) -> int:
        """Return how many bytes a caller may hold: half of what the others leave, so that these always find some.

        Args:
            caller: Its name. ANONYMOUS is everybody, and may hold all.
            beside: Bytes that other requests of it hold; without any, the one request is bounded by its own size.
        """
        if caller == ANONYMOUS.name or not beside:
            return self.limit
        return (self.limit - (self.held - self.held_by[caller])) // 2


@dataclass(slots=True)
class Share:
    """What one request holds of a budget."""

    budget: Budget
    """Whose."""
    caller: str = ANONYMOUS.name
    """Whose request it is; to be set before anything is taken."""
    taken: int = field(default=0, init=False)
    """Bytes."""

    def take(self, count: int) -> None:
        """Take more bytes.

        Raises:
            Refused: There are none left, for anybody or for this caller.
        """
        own = self.budget.held_by[self.caller]
        room = self.budget.room_of(self.caller, beside=own - self.taken)
        if self.budget.held + count > self.budget.limit or own + count > room:
            message = "The bodies of the requests in flight hold as much memory as they may; call again shortly."
            error = ResourceExhaustedError(message, reason="BODIES_FULL", retry_after_seconds=1.0)
            raise Refused(429, error)
        self.budget.held += count
        self.budget.held_by[self.caller] += count
        self.taken += count


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Ends of the reading of one body."""

    max_bytes: int
    """Size, as sent and unpacked."""
    seconds: float
    """From the head of the request to the end of its body."""
    idle_seconds: float
    """Between two pieces."""


def too_large(limit: int) -> Refused:
    """Return the refusal of a body that is larger than the limit."""
    message = f"The body is larger than {limit} bytes; send fewer items per call."
    return Refused(413, ResourceExhaustedError(message, reason="MESSAGE_TOO_LARGE"))


class Incoming:
    """ASGI's receive, and whether the body has been received to its end."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.ended = False

    async def __call__(self) -> MutableMapping[str, Any]:
        """Return the next message."""
        message = await self._receive()
        self.ended = self.ended or message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def discard(self, *, seconds: float, max_bytes: int) -> None:
        """Take what still comes of the body, for a while."""
        taken = 0
        try:
            async with asyncio.timeout(seconds):
                while not self.ended and taken < max_bytes:
                    taken += len((await self()).get("body", b""))
        except TimeoutError:
            return


async def read_body(receive: Receive, limits: BodyLimits, share: Share) -> bytes:
    """Return the whole body as it was sent.

    Raises:
        Refused: It is too large or came too slowly, or memory for bodies is used up.
        Gone: The caller left before its end.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + limits.seconds
    pieces: list[bytes] = []
    try:
        async with asyncio.timeout_at(end) as patience:
            while True:
                patience.reschedule(min(end, loop.time() + limits.idle_seconds))
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                piece = message.get("body", b"")
                if share.taken + len(piece) > limits.max_bytes:
                    raise too_large(limits.max_bytes)
                share.take(len(piece))
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        slow = f"The body did not arrive within {limits.seconds:g} s, or paused for {limits.idle_seconds:g} s."
        raise Refused(408, DeadlineExceededError(slow, reason="BODY_TOO_SLOW")) from None


def unpack_gzip(packed: bytes, max_bytes: int) -> bytes:
    """Return the content of a gzip stream; never builds more than `max_bytes` and one. Call it in a thread.

    Raises:
        Refused: It is more than that, or not one whole stream.
    """
    unpacker = zlib.decompressobj(wbits=GZIP_BITS)
    try:
        content = unpacker.decompress(packed, max_bytes + 1)
    except zlib.error:
        raise _malformed() from None
    if len(content) > max_bytes:
        raise too_large(max_bytes)
    if not unpacker.eof or unpacker.unused_data:
        raise _malformed()
    return content


def _malformed() -> Refused:
    message = "The body is not one whole gzip stream, as its content-encoding says."
    return Refused(400, InvalidArgumentError(message, field="content-encoding", reason="MALFORMED_BODY"))
