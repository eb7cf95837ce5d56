"""A name server on loopback that tells the addresses of one name, as a headless Kubernetes Service does."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

__all__ = ["DnsStub"]

TYPE_A: Final = 1
RESPONSE_FLAGS: Final = 0x8580
"""An authoritative answer without an error, recursion available."""
POINTER_TO_QUESTION: Final = 0xC00C
HEADER: Final = struct.Struct(">HHHHHH")


class DnsStub(asyncio.DatagramProtocol):
    """Answers questions for A records with `addresses`, and every other question with nothing."""

    def __init__(self) -> None:
        self.addresses: Sequence[str] = ()
        """IPv4 addresses of the name; may be changed at any time."""
        self.num_answers = 0
        """Questions for A records answered so far."""
        self.port = 0
        self._transport: asyncio.DatagramTransport | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, ("127.0.0.1", 0), family=socket.AF_INET)
        self._transport = transport
        self.port = int(transport.get_extra_info("sockname")[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._transport is not None
        self._transport.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer one question."""
        number, _flags, questions, *_others = HEADER.unpack_from(data)
        end = HEADER.size
        while data[end]:
            end += data[end] + 1
        (kind,) = struct.unpack_from(">H", data, end + 1)
        found = self.addresses if kind == TYPE_A else ()
        self.num_answers += kind == TYPE_A
        answer = HEADER.pack(number, RESPONSE_FLAGS, questions, len(found), 0, 0) + data[HEADER.size : end + 5]
        for address in found:
            # name, type A, class IN, seconds to live, bytes of the address
            answer += struct.pack(">HHHIH", POINTER_TO_QUESTION, TYPE_A, 1, 0, 4) + socket.inet_aton(address)
        assert self._transport is not None
        self._transport.sendto(answer, addr)
