"""The front of the HTTP port: what a request must look like before it becomes a call.

A browser is no client of this port. There are no CORS headers, and a request with an Origin header, which browsers send
with every POST, is refused: otherwise a page from anywhere could have its visitor's machine call a service on loopback.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final

from tether.errors import (
    InternalError,
    InvalidArgumentError,
    PermissionDeniedError,
    TetherError,
    UnavailableError,
    UnimplementedError,
)
from tether_services.documents.connect import HTTP_STATUSES
from tether_services.runtime.http.answers import CLOSE, Answer, Receive, Refused, Send, error_answer
from tether_services.runtime.http.bodies import (
    BodyLimits,
    Budget,
    Gone,
    Incoming,
    Share,
    read_body,
    too_large,
    unpack_gzip,
)
from tether_services.runtime.http.json_writing import write_json
from tether_services.runtime.http.methods import EXCHANGE, ConnectMethods, Exchange, Form
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)

MAX_HEADERS: Final = 64
"""Of a request."""
HTTP_VERSIONS: Final = ("1.0", "1.1")
TIMEOUT_DIGITS: Final = 10
TIMEOUT_PATTERN: Final = re.compile(r"0*[1-9][0-9]*")
LENGTH_PATTERN: Final = re.compile(r"[0-9]{1,18}")
FORMS: Final[Mapping[str, Form]] = {
    "application/json": "json",
    # What curl says of -d '{...}' unless it is told otherwise. No browser form can send it: those have an Origin.
    "application/x-www-form-urlencoded": "json",
    "application/proto": "proto",
}
CLIENT_LEFT: Final = 499
"""Status of the Connect protocol for a call that its caller has given up."""
ENCODINGS: Final = ("", "identity", "gzip")
SMALL_BODY_BYTES: Final = 64 * 1024
"""A body up to this size is taken off the connection before a refusal, so that the connection can go on."""
LINGER_BYTES: Final = 64 * 1024 * 1024
"""Of a refused body, taken and dropped at most."""


@dataclass(frozen=True, slots=True)
class FrontOptions:
    """What the front needs to know of the service."""

    max_bytes: int
    """Size of a body, as sent and unpacked."""
    default_seconds: float
    """Deadline of a call that does not say one."""
    is_serving: Callable[[], bool]
    """Whether callers should come; not before the engine is ready, and not while the service drains."""
    max_head_bytes: int = 16 * 1024
    """Path and headers of a request, as for the metadata of gRPC."""
    streaming: frozenset[str] = frozenset()
    """Paths of methods that are there, but not over HTTP."""
    document: bytes | None = None
    """The OpenAPI document, where there is one."""
    body_seconds: float = 30.0
    """For a whole body to arrive."""
    body_idle_seconds: float = 10.0
    """For the next piece of a body to arrive."""
    linger_seconds: float = 1.0
    """For a caller to stop sending a body that was refused, before the connection is cut."""
    bodies: int = 8
    """The bodies in flight hold as much memory as this many of the largest, together."""


class Front:
    """The ASGI application of the port."""

    def __init__(
        self, methods: ConnectMethods, paths: frozenset[str], options: FrontOptions, *, converters: Executor
    ) -> None:
        """Take the parts.

        Args:
            methods: The library's application.
            paths: Its paths.
            options: Limits and the state of the service.
            converters: Threads in which bodies are unpacked.
        """
        self._methods = methods
        self._paths = paths
        self._options = options
        self._converters = converters
        self._budget = Budget(options.bodies * options.max_bytes)
        self.draining = False
        """Calls in flight have little time left."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        out, body = _Outgoing(send, lambda: self._keeps(scope)), Incoming(receive)
        try:
            with self._budget.share() as share:
                await self._answer(scope, body, out, share)
        except Gone:
            pass
        except Refused as refused:
            await self._refuse(refused, scope, body, out)
        except asyncio.CancelledError:
            if not self.draining:
                raise
            message = "The service is draining, and had no more time for this call; call again."
            if not out.begun:
                await error_answer(503, UnavailableError(message, reason="DRAINING")).send(out)

    def _keeps(self, scope: MutableMapping[str, Any]) -> bool:
        """Return whether the connection may be used again: not if the service or the connection is near its end."""
        return self._options.is_serving() and time.monotonic() < scope["state"]["ends"]

    async def _answer(self, scope: MutableMapping[str, Any], body: Incoming, send: Send, share: Share) -> None:
        arrived = time.monotonic()
        _check_head(scope, max_bytes=self._options.max_head_bytes)
        if scope["method"] in ("GET", "HEAD"):
            await self._read_only(scope["path"]).send(send)
            return
        exchange = self._open(scope, arrived)
        share.caller = self._recognise(scope["path"], exchange)
        limits = self._limit_body(exchange)
        raw = await read_body(body, limits, share)
        if _header(exchange, "content-encoding") == "gzip":
            loop = asyncio.get_running_loop()
            raw = await loop.run_in_executor(self._converters, unpack_gzip, raw, limits.max_bytes)
            share.take(len(raw))
        EXCHANGE.set(exchange)
        await self._methods(_inner_scope(scope, exchange), _replay(raw, body), _translate(exchange, send))

    def _read_only(self, path: str) -> Answer:
        if path == "/healthz":
            serving = self._options.is_serving()
            return Answer(200 if serving else 503, write_json({"status": "SERVING" if serving else "NOT_SERVING"}))
        if path == "/openapi.json" and self._options.document is not None:
            return Answer(200, self._options.document)
        if path in self._paths:
            message = "Methods are called with POST."
            raise Refused(405, _unimplemented(message, "METHOD_NOT_ALLOWED"), headers=[(b"allow", b"POST")])
        raise self._unknown(path)

    def _open(self, scope: MutableMapping[str, Any], arrived: float) -> Exchange:
        """Return the exchange of a request whose head is in order.

        Raises:
            Refused: It is not.
        """
        path = scope["path"]
        if path not in self._paths:
            raise self._unknown(path)
        if scope["method"] != "POST":
            message = "Methods are called with POST."
            raise Refused(405, _unimplemented(message, "METHOD_NOT_ALLOWED"), headers=[(b"allow", b"POST")])
        metadata = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
        headers = dict(metadata)
        _check_headers(headers)
        form = _choose_form(headers)
        seconds = _read_timeout(headers, self._options.default_seconds)
        state = scope["state"]
        return Exchange(form, metadata, state["identities"], state["peer"], arrived + seconds)

    def _recognise(self, path: str, exchange: Exchange) -> str:
        """Return who calls, and refuse strangers before they take a part of the memory for bodies."""
        try:
            return self._methods.recognise(path, exchange).name
        except TetherError as error:
            raise Refused(HTTP_STATUSES[error.code], error) from error

    def _limit_body(self, exchange: Exchange) -> BodyLimits:
        options = self._options
        declared = _header(exchange, "content-length")
        if LENGTH_PATTERN.fullmatch(declared) and int(declared) > options.max_bytes:
            raise too_large(options.max_bytes)
        return BodyLimits(options.max_bytes, options.body_seconds, options.body_idle_seconds)

    def _unknown(self, path: str) -> Refused:
        if path in self._options.streaming:
            return Refused(501, _unimplemented("This method streams: call it over gRPC.", "STREAMING_METHOD"))
        message = "There is no such path. Methods are at /tether.v1.<Service>/<Method>."
        return Refused(404, _unimplemented(message, "UNKNOWN_METHOD"))

    async def _refuse(self, refused: Refused, scope: MutableMapping[str, Any], body: Incoming, send: Send) -> None:
        """Answer, and let a caller that still sends a large body see the answer before the connection is cut."""
        answer = error_answer(refused.status, refused.error, headers=refused.headers)
        seconds = self._options.linger_seconds
        if _is_small(dict(scope["headers"])):
            await body.discard(seconds=seconds, max_bytes=SMALL_BODY_BYTES)
        if body.ended:
            await answer.send(send)
            return
        head = answer.head()
        head["headers"].append(CLOSE)
        await send(head)
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        await body.discard(seconds=seconds, max_bytes=LINGER_BYTES)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _is_small(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether the body is declared to be small, or there is none."""
    declared = headers.get(b"content-length", b"0").decode("latin-1")
    small = LENGTH_PATTERN.fullmatch(declared) is not None and int(declared) <= SMALL_BODY_BYTES
    return small and b"transfer-encoding" not in headers


class _Outgoing:
    """ASGI's send, and whether the answer has begun. Says that the connection ends where it does."""

    def __init__(self, send: Send, keeps: Callable[[], bool]) -> None:
        self._send = send
        self._keeps = keeps
        self.begun = False

    async def __call__(self, message: Any) -> None:
        """Send one message."""
        if message["type"] == "http.response.start":
            self.begun = True
            if not self._keeps() and CLOSE not in message["headers"]:
                message = {**message, "headers": [*message["headers"], CLOSE]}
        await self._send(message)


def _check_head(scope: MutableMapping[str, Any], *, max_bytes: int) -> None:
    """Refuse a head that the HTTP server lets pass: it bounds only one that comes in several pieces."""
    count = len(scope["headers"])
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if count > MAX_HEADERS or size > max_bytes:
        message = f"{count} headers, {size} bytes; at most {MAX_HEADERS} of {max_bytes} are accepted."
        error = InvalidArgumentError(message, field="headers", reason="HEADERS_TOO_LARGE")
        raise Refused(431, error, headers=[CLOSE])
    if scope["http_version"] not in HTTP_VERSIONS:
        raise _malformed("The version of HTTP must be 1.1 or 1.0.")
    if {b"content-length", b"transfer-encoding"} <= {name for name, _value in scope["headers"]}:
        # A proxy in front that goes by the other one would see two requests where the server sees one.
        raise _malformed("Give content-length or transfer-encoding, not both.")


def _malformed(message: str) -> Refused:
    return Refused(400, InvalidArgumentError(message, reason="MALFORMED_REQUEST"), headers=[CLOSE])


def _check_headers(headers: Mapping[str, str]) -> None:
    if "origin" in headers:
        message = "Requests from browsers are refused: call from a program of your own, or from your page's server."
        raise Refused(403, PermissionDeniedError(message, reason="BROWSER_REFUSED"))
    if headers.get("content-encoding", "").strip().lower() not in ENCODINGS:
        raise _unsupported("content-encoding", "gzip or identity")
    version = headers.get("connect-protocol-version", "1")
    if version != "1":
        message = 'connect-protocol-version must be "1" or left out.'
        raise Refused(400, InvalidArgumentError(message, field="connect-protocol-version"))


def _choose_form(headers: Mapping[str, str]) -> Form:
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    form = FORMS.get(media_type)
    if form is None:
        raise _unsupported("content-type", "application/json or application/proto")
    return form


def _read_timeout(headers: Mapping[str, str], default_seconds: float) -> float:
    text = headers.get("connect-timeout-ms")
    if text is None:
        return default_seconds
    if len(text) > TIMEOUT_DIGITS or not TIMEOUT_PATTERN.fullmatch(text):
        message = "connect-timeout-ms must be a positive number of milliseconds of at most 10 digits."
        raise Refused(400, InvalidArgumentError(message, field="connect-timeout-ms"))
    return int(text) / 1000


def _unsupported(header: str, accepted: str) -> Refused:
    message = f"{header} must be {accepted}."
    error = InvalidArgumentError(message, field=header, reason="UNSUPPORTED_MEDIA_TYPE")
    return Refused(415, error, headers=[(b"accept-post", b"application/json, application/proto")])


def _unimplemented(message: str, reason: str) -> TetherError:
    return UnimplementedError(message, reason=reason)


def _header(exchange: Exchange, name: str) -> str:
    found = next((value for key, value in exchange.metadata if key == name), "")
    return found.strip().lower() if isinstance(found, str) else ""


def _inner_scope(scope: MutableMapping[str, Any], exchange: Exchange) -> dict[str, Any]:
    """Return the scope that the library sees: without the headers that the front has dealt with."""
    return {**scope, "headers": [(b"content-type", b"application/" + exchange.form.encode())]}


def _replay(raw: bytes, receive: Receive) -> Receive:
    """Return a receive that gives the body in one piece and then, as before, that the caller has left."""
    pending = [{"type": "http.request", "body": raw, "more_body": False}]

    async def give() -> MutableMapping[str, Any]:
        return pending.pop() if pending else await receive()

    return give


def _translate(exchange: Exchange, send: Send) -> Send:
    """Return a send for the library that declares lengths, and writes errors with the details of gRPC."""
    head: dict[str, Any] = {}

    async def deliver(message: Any) -> None:
        if message["type"] == "http.response.start":
            head.update(message)
            return
        if head["status"] < 400:
            await Answer(head["status"], message["body"], head["headers"]).send(send)
            return
        error = exchange.error
        if error is None and head["status"] == CLIENT_LEFT:
            return
        if error is None:
            log_event(log, "answer without an error", level=logging.ERROR, status=head["status"])
            error = InternalError("Internal error; the service's log has the details.")
        await error_answer(head["status"], error).send(send)

    return deliver
