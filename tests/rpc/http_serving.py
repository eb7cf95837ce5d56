"""A real HTTP server in a thread of the test, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn


@dataclass(frozen=True, slots=True)
class Answer:
    """What an HTTP server answered."""

    status: int
    """HTTP status."""
    headers: dict[str, str]
    """By name, in lower case."""
    body: Any
    """Parsed JSON."""


@contextmanager
def http_in_thread(application: Any) -> Iterator[str]:
    """Serve an ASGI application until the block ends; yield host:port."""
    config = uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning", access_log=False)
    listening = config.bind_socket()
    listening.listen()  # connections wait until the server takes them
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


def ask(
    address: str, method: str, path: str, *, body: Any = None, content_type: str | None = "application/json"
) -> Answer:
    """Return the answer to a request; bytes are sent as they are, an iterator of bytes in chunks, the rest as JSON."""
    is_raw = body is None or isinstance(body, bytes) or hasattr(body, "__next__")
    content = body if is_raw else json.dumps(body).encode()
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(method, path, body=content, headers={"Content-Type": content_type} if content_type else {})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, json.loads(response.read()))
    finally:
        connection.close()
