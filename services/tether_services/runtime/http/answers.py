"""Answers over HTTP: the error body of the Connect protocol, and errors that HTTP has a status of its own for."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc

from tether.errors import TetherError
from tether_services.documents.connect import connect_error
from tether_services.runtime.http.json_writing import write_json

Header: TypeAlias = tuple[bytes, bytes]
Send: TypeAlias = Callable[[Any], Awaitable[None]]
"""ASGI's send; its messages are dictionaries."""
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""ASGI's receive."""

JSON_TYPE: Final = (b"content-type", b"application/json")
CLOSE: Final = (b"connection", b"close")
FIXED_HEADERS: Final[tuple[Header, ...]] = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
"""Of every answer: no browser guesses at the type of a text that a caller chose, and no proxy keeps it."""


class Refused(Exception):
    """A request that is answered before it becomes a call, with a status that HTTP has for the case."""

    def __init__(self, status: int, error: TetherError, *, headers: Sequence[Header] = ()) -> None:
        """Take the status, what the body says, and more headers of the answer."""
        super().__init__(str(error))
        self.status = status
        self.error = error
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    """HTTP status."""
    body: bytes
    """What is sent; its length is declared."""
    headers: Sequence[Header] = (JSON_TYPE,)
    """Headers besides those of every answer."""

    def head(self) -> dict[str, Any]:
        """Return the ASGI message that begins the answer."""
        length = (b"content-length", str(len(self.body)).encode())
        return {
            "type": "http.response.start",
            "status": self.status,
            "headers": [*FIXED_HEADERS, *self.headers, length],
        }

    async def send(self, send: Send) -> None:
        """Send all of it."""
        await send(self.head())
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


def error_answer(status: int, error: TetherError, *, headers: Sequence[Header] = ()) -> Answer:
    """Return the answer that says an error, with its details as gRPC has them."""
    extra = list(headers)
    if error.retry_after_seconds is not None:  # whole seconds, by HTTP's rule; the exact time is in the details
        extra.append((b"retry-after", str(math.ceil(error.retry_after_seconds)).encode()))
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        extra.append((b"www-authenticate", b"Bearer"))
    return Answer(status, write_json(connect_error(error)), (JSON_TYPE, *extra))
