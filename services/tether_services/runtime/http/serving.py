"""Serves the front over HTTP/1.1 inside the event loop of the service, with an end to every wait for a caller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tether.errors import InvalidArgumentError, TetherError, UnavailableError
from tether_services.runtime.auth import split_address
from tether_services.runtime.http.answers import error_answer
from tether_services.runtime.http.front import Front
from tether_services.runtime.tls import identities_of

SWEEP_SECONDS: Final = 0.25
"""Between two looks at all connections."""
BACKLOG: Final = 128
"""Connections that the kernel holds before they are accepted."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Ends of the waits for a caller."""

    max_connections: int = 512
    """Open at a time; more are refused."""
    head_seconds: float = 10.0
    """For the headers of a request to arrive, from the first byte on; also from the opening of a connection."""
    keep_alive_seconds: float = 60.0
    """A connection without a request is closed after this time."""
    max_age_seconds: float = 1800.0
    """A connection ends with the first answer after this time, so that callers find new replicas."""
    write_seconds: float = 30.0
    """A caller that takes nothing of its answer for this time is cut off."""
    max_head_bytes: int = 16 * 1024
    """Request line and headers."""


class _Config(uvicorn.Config):
    """uvicorn's configuration with what our protocol needs."""

    limits: ConnectionLimits


class Connection(H11Protocol):
    """uvicorn's connection, which has no limits of its own on connections and slow callers."""

    config: _Config

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it if there are too many."""
        super().connection_made(transport)
        self.waiting_since: float | None = time.monotonic()
        """Since when the head of a request is expected; None while there is none, or one is being answered."""
        self._unsent, self._unsent_since = 0, 0.0
        secure = transport.get_extra_info("ssl_object")
        identities = () if secure is None else identities_of(secure.getpeercert())
        ends = time.monotonic() + self.config.limits.max_age_seconds
        self.app_state = {"identities": identities, "peer": _name_peer(self.client), "ends": ends}
        if len(self.connections) > self.config.limits.max_connections:
            message = "The service has as many connections as it takes; call again shortly."
            self._refuse(503, UnavailableError(message, reason="TOO_MANY_CONNECTIONS", retry_after_seconds=1.0))

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        if self.transport.is_closing():
            return
        if self.waiting_since is None and self.conn.their_state is h11.IDLE:
            self.waiting_since = time.monotonic()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self.waiting_since = None

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no request."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            message = f"The head of the request is larger than {self.config.limits.max_head_bytes} bytes."
            self._refuse(431, InvalidArgumentError(message, field="headers", reason="HEADERS_TOO_LARGE"))
        else:
            self._refuse(400, InvalidArgumentError("The bytes are not an HTTP request.", reason="MALFORMED_REQUEST"))

    def _refuse(self, status: int, error: TetherError) -> None:
        """Answer outside a request, and close."""
        answer = error_answer(status, error)
        headers = [*answer.head()["headers"], (b"connection", b"close")]
        with contextlib.suppress(
            h11.LocalProtocolError
        ):  # an answer is under way already: there is no place for another
            head = self.conn.send(h11.Response(status_code=status, headers=headers, reason=b""))
            rest = self.conn.send(h11.Data(data=answer.body)), self.conn.send(h11.EndOfMessage())
            self.transport.write(b"".join(part or b"" for part in (head, *rest)))
        self.transport.close()

    def sweep(self, now: float) -> None:
        """Close if the caller has let the connection wait for too long."""
        limits = self.config.limits
        if self.waiting_since is not None and now - self.waiting_since > limits.head_seconds:
            self.transport.abort()
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        elif now - self._unsent_since > limits.write_seconds:
            self.transport.abort()


class _Server(uvicorn.Server):
    """uvicorn's server as a part of a process that handles signals itself."""

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.listening.set()


class HttpServer:
    """The HTTP port of a service."""

    def __init__(self, front: Front, *, limits: ConnectionLimits, tls: ssl.SSLContext | None = None) -> None:
        """Prepare to serve.

        Args:
            front: The application.
            limits: Of connections.
            tls: What callers are met with; None is no transport security. A certificate that is loaded into it later is
                shown to those that come after.
        """
        self._front = front
        config = _Config(
            front,
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            loop="none",
            log_config=None,
            log_level="error",  # it warns of every malformed request, so that a caller could fill the log
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=limits.keep_alive_seconds,  # type: ignore[arg-type]  # any number does
            h11_max_incomplete_event_size=limits.max_head_bytes,
            reset_contextvars=True,  # a request must not begin with the caller of the one before on its connection
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        )
        config.limits = limits
        self._server = _Server(config)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, address: str, *, field: str) -> int:
        """Listen on host:port and return the port in use.

        Raises:
            InvalidArgumentError: The address is taken or not one of this machine; names the field.
        """
        listener = _listen(address, field=field)
        serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            listening.cancel()
            await serving
        self._tasks = [serving, asyncio.create_task(self._sweep())]
        return int(listener.getsockname()[1])

    @property
    def open_connections(self) -> int:
        """Return how many callers are connected."""
        return len(self._server.server_state.connections)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            for connection in list(self._server.server_state.connections):
                assert isinstance(connection, Connection)
                connection.sweep(now)

    async def stop(self, grace_seconds: float) -> None:
        """Take no more connections, close idle ones, and give requests in flight this long."""
        if not self._tasks:
            return
        self._front.draining = True
        serving, sweeping = self._tasks
        self._server.config.timeout_graceful_shutdown = grace_seconds  # type: ignore[assignment]  # any number does
        self._server.should_exit = True
        await serving
        sweeping.cancel()


def _listen(address: str, *, field: str) -> socket.socket:
    host, port = split_address(address, field=field)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(address, field) from error
    try:
        if os.name == "posix":  # elsewhere it would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_listen(address, field) from error
    listener.setblocking(False)
    return listener


def _cannot_listen(address: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"Cannot listen on {address}: it is taken or not an address of this machine.", field=field
    )


def _name_peer(client: tuple[str, int] | None) -> str:
    if client is None:
        return "unknown"
    host, port = client
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
