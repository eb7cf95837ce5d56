"""Calls over HTTP for tests: with the standard library, and with bytes that no library would send."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.rpc import error_details_pb2

from tests.rpc.serving import LOCAL

LOCAL_HTTP: dict[str, Any] = {**LOCAL, "http_address": "127.0.0.1:0"}
"""Settings for a test, with HTTP."""
JSON = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    content: bytes

    @property
    def body(self) -> Any:
        """The body as JSON."""
        return json.loads(self.content)

    def detail(self, kind: str) -> Any:
        """Return the detail of a kind, from its bytes; they must say the same as the readable form beside them."""
        (found,) = [detail for detail in self.body["details"] if detail["type"] == f"google.rpc.{kind}"]
        message = getattr(error_details_pb2, kind).FromString(base64.b64decode(found["value"] + "=="))
        assert isinstance(found["debug"], dict)
        return message

    @property
    def reason(self) -> str:
        """The stable word of an error."""
        reason: str = self.detail("ErrorInfo").reason
        return reason

    @property
    def fields(self) -> list[str]:
        """The fields that an error names."""
        if not any(detail["type"] == "google.rpc.BadRequest" for detail in self.body["details"]):
            return []
        return [violation.field for violation in self.detail("BadRequest").field_violations]


def send(
    port: int, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON, *, method: str = "POST"
) -> Reply:
    """Send one request on a connection of its own and return the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, dict(headers))
        return take(connection.getresponse())
    finally:
        connection.close()


def take(response: http.client.HTTPResponse) -> Reply:
    """Return an answer that has begun."""
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, headers, response.read())


async def post(port: int | None, path: str, message: Any, **headers: str) -> Reply:
    """Call a method with a message, which is written as JSON unless it is bytes already; `_` in header names is `-`."""
    assert port is not None
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    given = {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return await asyncio.to_thread(send, port, path, body, given)


async def get(port: int | None, path: str) -> Reply:
    """Read a page."""
    assert port is not None
    return await asyncio.to_thread(send, port, path, None, {}, method="GET")


async def talk(port: int | None, data: bytes, *, seconds: float = 10.0) -> bytes:
    """Send bytes as they are and return all that comes until the other end closes; fails if it does not in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), seconds)
    finally:
        writer.close()
