"""A TCP proxy on loopback that stands between a client and a server and breaks what passes.

Two lanes: `up` carries the client's bytes to the server, `down` the server's answers. A fault is set per lane at any
time and acts on open and new connections alike. Its positions count the bytes of the lane since the fault was set, over
all connections; a flip or a cut happens once.

TCP never delivers bytes with a hole in between. So `stall` holds bytes back until it is lifted, as a partition does,
while a connection that `drop` has taken bytes from is reset as soon as the fault is lifted.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

__all__ = ["Fault", "Flip", "Proxy", "ProxyEvent"]

LaneName = Literal["up", "down"]
READ_BYTES: Final = 64 * 1024
FLUSH_SECONDS: Final = 0.02
"""Between the last bytes before a reset and the reset: a reset discards what the peer has not read yet."""
MAX_QUEUED: Final = 64
"""Pieces that a lane of a connection holds back; then it stops reading."""
MAX_QUEUED_SLOW: Final = 4
"""The same of a connection that was opened in a slow lane: what is under way there is lost with it."""


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit to invert."""

    bit: int
    """Counted from the marker, or from where the fault was set."""
    marker: bytes = b""
    """Count from the first occurrence of these bytes; empty: from the first byte."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the bytes of one lane."""

    latency_seconds: float = 0.0
    """Every byte arrives this much later."""
    bytes_per_second: float = 0.0
    """Of each connection; 0 is unlimited."""
    slice_bytes: int = 0
    """Bytes are passed on in pieces of at most this; 0 leaves them as they came."""
    flip: Flip | None = None
    """Invert one bit, once."""
    reset_at: int | None = None
    """After this many bytes the connection that carried the last of them is reset, once."""
    close_at: int | None = None
    """After this many bytes the connection is closed in good order, once; what comes later is lost."""
    stall: bool = False
    """Hold everything back, closes too, until the fault is lifted: a partition of one direction."""
    drop: bool = False
    """Swallow everything, closes too; such a connection is reset when the fault is lifted."""


PASS: Final = Fault()
_Queue: TypeAlias = "asyncio.Queue[tuple[float, bytes | None]]"
"""When to pass on which bytes; the end is b"" (close the sink) or None (leave it)."""


@dataclass(frozen=True, slots=True)
class ProxyEvent:
    """Something that the proxy did."""

    time: float
    """Monotonic seconds."""
    kind: str
    """opened, closed, reset, refused, unreachable, cut, flipped, dropped or set."""
    connection: int
    """From 1; 0 for the proxy as a whole."""
    detail: str = ""
    """Lane and position."""


@dataclass(slots=True)
class _Lane:
    name: LaneName
    fault: Fault = PASS
    position: int = 0
    done: bool = False
    tail: bytes = b""
    start: int | None = None
    flowing: asyncio.Event = field(default_factory=asyncio.Event)

    def set(self, fault: Fault) -> None:
        self.fault, self.position, self.done, self.tail = fault, 0, False, b""
        self.start = 0 if fault.flip and not fault.flip.marker else None
        if fault.stall:
            self.flowing.clear()
        else:
            self.flowing.set()

    def damage(self, data: bytes) -> tuple[bytes, bool]:
        """Return the bytes with the flip in them, and whether it was in these."""
        flip = self.fault.flip
        if flip is None or self.done:
            return data, False
        if self.start is None:
            self._find(flip.marker, data)
        if self.start is None:
            return data, False
        byte = self.start + flip.bit // 8 - self.position
        if not 0 <= byte < len(data):
            return data, False
        self.done = True
        return data[:byte] + bytes([data[byte] ^ (1 << flip.bit % 8)]) + data[byte + 1 :], True

    def _find(self, marker: bytes, data: bytes) -> None:
        """Look for the marker, also across the border to the bytes before."""
        joined = self.tail + data
        found = joined.find(marker)
        if found >= 0:
            self.start = self.position - len(self.tail) + found
        self.tail = joined[-(len(marker) - 1) :] if len(marker) > 1 else b""

    def cut(self, data: bytes) -> tuple[bytes, Literal["", "reset", "close"]]:
        """Return what may still pass, and how the connection ends behind it; advances the position."""
        for at, how in ((self.fault.reset_at, "reset"), (self.fault.close_at, "close")):
            if at is not None and not self.done and self.position + len(data) >= at:
                self.done = True
                kept = data[: at - self.position]
                self.position = at
                return kept, "reset" if how == "reset" else "close"
        self.position += len(data)
        return data, ""


@dataclass(slots=True, eq=False)
class _Link:
    """One connection of a client and the one made for it to the server."""

    number: int
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    server: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    broken: bool = False
    """True once bytes of it are lost."""

    def ends(self, lane: LaneName) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        source, sink = (self.client, self.server) if lane == "up" else (self.server, self.client)
        return source[0], sink[1]

    def reset(self) -> None:
        for _, writer in (self.client, self.server):
            _reset(writer)

    def close(self) -> None:
        for _, writer in (self.client, self.server):
            writer.close()


class Proxy:
    """Listens on a free loopback port and connects each caller to the upstream. An async context manager."""

    def __init__(self, upstream: str) -> None:
        """Remember where to connect.

        Args:
            upstream: host:port; may be unreachable for a time, callers are reset then.
        """
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self._lanes: dict[LaneName, _Lane] = {"up": _Lane("up"), "down": _Lane("down")}
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refuse = False
        self._count = 0
        self.log: list[ProxyEvent] = []
        self.clear()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def set(self, *, up: Fault = PASS, down: Fault = PASS, refuse: bool = False) -> None:
        """Replace the faults of both lanes.

        Args:
            up: For bytes to the server.
            down: For bytes to the client.
            refuse: The server seems to be gone: open connections are reset, new ones at once.
        """
        self._lanes["up"].set(up)
        self._lanes["down"].set(down)
        self._refuse = refuse
        self._note("set", 0, f"up={up} down={down} refuse={refuse}")
        for link in list(self._links):
            if refuse or (link.broken and not (up.drop or down.drop)):
                self._end(link, "reset")

    def clear(self) -> None:
        """Lift all faults; connections that have lost bytes are reset."""
        self.set()

    def reset_all(self) -> None:
        """Reset every open connection, once."""
        for link in list(self._links):
            self._end(link, "reset")

    def passed(self, lane: LaneName) -> int:
        """Return the bytes that have passed in a lane since its fault was set."""
        return self._lanes[lane].position

    def count(self, kind: str) -> int:
        """Return how often something has happened."""
        return sum(event.kind == kind for event in self.log)

    def _note(self, kind: str, connection: int, detail: str = "") -> None:
        self.log.append(ProxyEvent(time.monotonic(), kind, connection, detail))

    def _end(self, link: _Link, kind: Literal["reset", "closed"]) -> None:
        if link in self._links:
            self._links.discard(link)
            self._note(kind, link.number)
        if kind == "reset":
            link.reset()
        else:
            link.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._count += 1
        number = self._count
        try:
            await self._serve(number, reader, writer)
        except asyncio.CancelledError:  # the proxy closes; asyncio would log a cancelled connection as a failure
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to its end."""
        if self._refuse:
            self._note("refused", number)
            return _reset(writer)
        try:
            upstream = await asyncio.open_connection(*self._upstream)
        except OSError:
            self._note("unreachable", number)
            return _reset(writer)
        link = _Link(number, (reader, writer), upstream)
        self._links.add(link)
        self._note("opened", number)
        try:
            async with asyncio.TaskGroup() as pumps:
                for lane in self._lanes.values():
                    pumps.create_task(self._pump(link, lane))
        except* OSError:
            self._end(link, "reset")
        finally:
            self._end(link, "closed")

    async def _pump(self, link: _Link, lane: _Lane) -> None:
        """Carry one lane of one connection: what is read waits in a queue until it is due."""
        queue: _Queue = asyncio.Queue(MAX_QUEUED_SLOW if lane.fault.bytes_per_second else MAX_QUEUED)
        sending = asyncio.create_task(self._send(link, lane, queue))
        try:
            end = await self._receive(link, lane, queue)
            await queue.put((0.0, None if end == "reset" else b""))
            await sending
            if end == "reset":
                await asyncio.sleep(FLUSH_SECONDS)
                self._end(link, "reset")
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _receive(self, link: _Link, lane: _Lane, queue: _Queue) -> str:
        """Read one lane until its end or a cut, and return how it ended."""
        reader, _ = link.ends(lane.name)
        while data := await reader.read(READ_BYTES):
            await lane.flowing.wait()
            if lane.fault.drop:
                self._lose(link, lane, len(data))
                continue
            data, flipped = lane.damage(data)
            if flipped:
                self._note("flipped", link.number, lane.name)
            data, end = lane.cut(data)
            await queue.put((asyncio.get_running_loop().time() + lane.fault.latency_seconds, data))
            if end:
                self._note("cut", link.number, f"{lane.name} {lane.position}")
                return end
        await lane.flowing.wait()
        if lane.fault.drop:  # half open: the other side never hears of the end
            self._lose(link, lane, 0)
            await asyncio.Event().wait()
        return "close"

    def _lose(self, link: _Link, lane: _Lane, count: int) -> None:
        link.broken = True
        self._note("dropped", link.number, f"{lane.name} {count}")

    async def _send(self, link: _Link, lane: _Lane, queue: _Queue) -> None:
        """Pass on what is due, at the speed of the lane, until an empty piece (then close) or None comes."""
        _, writer = link.ends(lane.name)
        while True:
            due, data = await queue.get()
            if not data:
                if data is not None and writer.can_write_eof() and not writer.is_closing():
                    writer.write_eof()
                return
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            for piece in _slices(data, lane.fault):
                writer.write(piece)
                await writer.drain()
                if lane.fault.bytes_per_second:
                    await asyncio.sleep(len(piece) / lane.fault.bytes_per_second)
                elif lane.fault.slice_bytes:
                    await asyncio.sleep(0.0005)  # else the kernel joins the pieces again


def _slices(data: bytes, fault: Fault) -> list[bytes]:
    """Return the bytes in the pieces in which a fault passes them on; a slow lane in about 20 a second."""
    size = fault.slice_bytes or len(data)
    if fault.bytes_per_second:
        size = min(size, max(1, int(fault.bytes_per_second / 20)))
    return [data[start : start + size] for start in range(0, len(data), size)]


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with RST in place of FIN."""
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
