from __future__ import annotations

import asyncio
import socket
import struct

from tests.reliability.dns_stub import DnsStub

NAME = b"\x06reward\x06tether\x04test\x00"


def ask(port: int, kind: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(5)
        asking.sendto(
            struct.pack(">HHHHHH", 77, 0x100, 1, 0, 0, 0) + NAME + struct.pack(">HH", kind, 1), ("127.0.0.1", port)
        )
        return asking.recv(512)


def test_the_addresses_of_the_moment_are_told_and_other_kinds_have_none() -> None:
    async def main() -> None:
        async with DnsStub() as names:
            names.addresses = ("127.0.0.1", "127.0.0.9")
            answer = await asyncio.to_thread(ask, names.port, 1)
            number, flags, questions, answers, _, _ = struct.unpack_from(">HHHHHH", answer)
            assert (number, flags & 0x800F, questions, answers) == (77, 0x8000, 1, 2)
            assert answer.endswith(socket.inet_aton("127.0.0.9"))
            names.addresses = ()
            assert struct.unpack_from(">HHHH", await asyncio.to_thread(ask, names.port, 1))[3] == 0
            assert struct.unpack_from(">HHHH", await asyncio.to_thread(ask, names.port, 28))[3] == 0
            assert names.num_answers == 2, "the question for an IPv6 address does not count"

    asyncio.run(main())
