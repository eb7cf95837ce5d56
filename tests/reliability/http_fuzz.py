"""Hostile HTTP requests drawn from a seed, and a connection that sends them as they are."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from tests.reliability.fuzz import METHODS, NUMBERS, hostile_name, hostile_text

__all__ = ["HttpAnswer", "HttpConnection", "draw_http_request"]

ODD_NUMBERS: Final = ("1e999999999", "-0", "9" * 400, "0x10", "NaN", "Infinity", "1.5", "1E400", "00")
BOMB: Final = gzip.compress(b"[" + b"0," * 4_000_000 + b"0]")
"""Eight megabytes of nothing in a few kilobytes."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What came back."""

    status: int
    """0: the connection was closed without an answer."""
    body: bytes


def _value(random: Random, depth: int = 0) -> Any:
    """Return any JSON value."""
    kind = random.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return hostile_text(random)
    if kind == 1:
        return random.choice((*NUMBERS, 2**63, 1.5, -1e308))
    if kind in (2, 3, 4):
        return random.choice((None, True, False))
    if kind == 5:
        return {hostile_name(random): _value(random, depth + 1) for _ in range(random.randrange(3))}
    return [_value(random, depth + 1) for _ in range(random.randrange(4))]


def _document(random: Random, method: str) -> dict[str, Any]:
    """Return a request that is well-formed, with hostile values and now and then one of another type."""

    def text() -> Any:
        return hostile_text(random) if random.random() < 0.9 else _value(random)

    found: dict[str, Any] = {"model": random.choice(("", "", "default", hostile_name(random)))}
    if method == "Compare":
        return found | {"prompt": text(), "responses": [text() for _ in range(random.choice((1, 2, 3, 17)))]}
    if method == "ListRewardModels":
        return {"page_size": random.choice((*NUMBERS, "7", 1.5)), "page_token": hostile_name(random)}
    items: list[Any] = [{"prompt": text(), "response": text()} for _ in range(random.choice((0, 1, 1, 2, 65)))]
    if random.random() < 0.2:
        items.append({"promptTokenIds": random.choices(NUMBERS, k=3), "response_token_ids": _value(random)})
    if random.random() < 0.2:
        items.append({"messages": [{"role": hostile_name(random), "content": text()}], hostile_name(random): 1})
    return found | {"items": items}


def _well_formed(random: Random, method: str) -> bytes:
    return json.dumps(_document(random, method)).encode()


def _raw_unicode(random: Random, method: str) -> bytes:
    return json.dumps(_document(random, method), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _cut(random: Random, method: str) -> bytes:
    body = _well_formed(random, method)
    return body[: random.randrange(len(body))]


def _changed(random: Random, method: str) -> bytes:
    body = bytearray(_well_formed(random, method))
    for _ in range(random.randrange(1, 5)):
        body[random.randrange(len(body))] = random.randrange(256)
    return bytes(body)


def _odd_number(random: Random, method: str) -> bytes:
    return b'{"items": [{"prompt_token_ids": [%s], "response": "x"}]}' % random.choice(ODD_NUMBERS).encode()


def _deep(random: Random, method: str) -> bytes:
    depth = random.choice((60, 1_000, 100_000))
    left, right = random.choice(((b"[", b"]"), (b'{"items":', b"}")))
    return left * depth + right * (depth if random.random() < 0.5 else 0)


def _twice(random: Random, method: str) -> bytes:
    return b'{"items": [], "items": [{"prompt": "a", "response": "b", "response": "c"}]}'


def _surrogate(random: Random, method: str) -> bytes:
    return b'{"items": [{"prompt": "\\ud800", "response": "x\\udfff"}]}'


def _any_bytes(random: Random, method: str) -> bytes:
    return random.randbytes(random.randrange(120))


def _any_value(random: Random, method: str) -> bytes:
    return json.dumps(_value(random)).encode()


BODIES: Final[dict[str, Callable[[Random, str], bytes]]] = {
    "well-formed": _well_formed,
    "raw unicode": _raw_unicode,
    "cut": _cut,
    "changed": _changed,
    "odd number": _odd_number,
    "deep": _deep,
    "twice": _twice,
    "surrogate": _surrogate,
    "any bytes": _any_bytes,
    "any value": _any_value,
}
WEIGHTS: Final = (30, 10, 12, 20, 4, 2, 3, 3, 8, 8)


def draw_http_request(random: Random) -> tuple[str, bytes]:
    """Return the kind of a hostile request and its bytes, head and body."""
    [kind] = random.choices(list(BODIES), WEIGHTS)
    method = random.choice(METHODS)
    body = BODIES[kind](random, method)
    path, verb = f"/tether.v1.RewardService/{method}", "POST"
    headers = ["host: x", "content-type: application/json", *_odd_headers(random)]
    odd = random.random()
    if odd < 0.01:
        path = random.choice(("/", "/../../etc/passwd", "/tether.v1.RewardModelService/LoadRewardModel", path + "/x"))
        kind = "unknown path"
    elif odd < 0.02:
        verb, kind = random.choice(("GET", "PUT", "TRACE", "OPTIONS", "\x00")), "odd verb"
    elif odd < 0.022:
        body, kind = BOMB, "bomb"
        headers.append("content-encoding: gzip")
    elif odd < 0.03:
        kind = "odd head"
        headers.append(
            random.choice(("x: " + "v" * 60_000, "bad header", "content-length: -1", "expect: 100-continue"))
        )
    head = [f"{verb} {path} HTTP/1.1", *headers, f"content-length: {len(body)}"]
    return kind, "\r\n".join(head).encode("latin-1", "replace") + b"\r\n\r\n" + body


def _odd_headers(random: Random) -> list[str]:
    choice = random.random()
    if choice < 0.9:
        return []
    return [
        random.choice(
            (
                "authorization: Bearer nonsense",
                "connect-timeout-ms: -5",
                "connect-timeout-ms: 99999999999999999999",
                "connect-protocol-version: 9",
                "content-encoding: br",
                "content-type: text/plain",
                "origin: https://evil.test",
                "accept-encoding: \x1b[31m",
                "x-forwarded-for: {{7*7}}",
            )
        )
    ]


class HttpConnection:
    """Sends requests over a connection, and over a new one when the server has closed it."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes, *, seconds: float) -> HttpAnswer:
        """Return the answer to a request; the server may close the connection instead."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, int(self._port))
        reader, writer = self._streams
        try:
            writer.write(request)
            async with asyncio.timeout(seconds):
                await writer.drain()
                return await self._read(reader)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.close()
            return HttpAnswer(0, b"")

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _read(self, reader: asyncio.StreamReader) -> HttpAnswer:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status = int(head.split()[1])
            if status != 100:
                break
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection") == "close":
            self.close()
        return HttpAnswer(status, body)
