"""The unary methods of a port as endpoints of the Connect library: the same servicer, through the same pipeline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from connectrpc.code import Code
from connectrpc.codec import Codec
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.server import ConnectASGIApplication, Endpoint
from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tether.errors import DeadlineExceededError, TetherError
from tether_services.documents.connect import connect_code
from tether_services.runtime.callers import Caller
from tether_services.runtime.http.json_reading import check_readable, read_message
from tether_services.runtime.http.json_writing import write_message
from tether_services.runtime.interceptor import parse_message
from tether_services.runtime.limits import CallInfo
from tether_services.runtime.pipeline import Pipeline
from tether_services.runtime.server import Port

Form = Literal["json", "proto"]
"""How messages are written; also what the Connect library calls its codecs."""
ResultT = TypeVar("ResultT")

INLINE_BYTES: Final = 64 * 1024
"""Messages up to this size are converted on the event loop, in 2 ms at most; larger ones in a thread."""


@dataclass(slots=True)
class Exchange:
    """One request on its way through the library. Servicers get it as their context."""

    form: Form
    """Of the request and of the answer."""
    metadata: tuple[tuple[str, str | bytes], ...]
    """Headers, names in lower case."""
    identities: tuple[str, ...]
    """Verified names in the caller's certificate."""
    peer: str
    """Address of the other end, as gRPC writes it."""
    deadline: float
    """When the caller stops waiting, on the monotonic clock."""
    error: TetherError | None = field(default=None, init=False)
    """What the method raised. The library carries a code and a text only."""

    def describe(self, path: str) -> CallInfo:
        """Return what the pipeline knows of the call."""
        return CallInfo(path, self.metadata, self.time_remaining(), self.identities, self.peer)

    def time_remaining(self) -> float:
        """Return the seconds to the deadline, as a gRPC context does."""
        return max(0.0, self.deadline - time.monotonic())


EXCHANGE: Final[ContextVar[Exchange]] = ContextVar("tether_http_exchange")
"""Of this task: the library calls an endpoint in the task that called the library."""


@dataclass(frozen=True, slots=True)
class Method:
    """A unary method."""

    path: str
    """/package.Service/Method, of the URL and of gRPC."""
    behaviour: Callable[[Any, Any], Awaitable[Message]]
    """The servicer's method."""
    request: type[Message]
    """Class of its request."""


class _Collector:
    """Stands in for a gRPC server where a service registers its handlers."""

    def __init__(self) -> None:
        self.unary: dict[str, Method] = {}
        self.streaming: set[str] = set()

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Take nothing: the same handlers come by name as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Take the handlers of one service."""
        methods = descriptor_pool.Default().FindServiceByName(service).methods_by_name
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            if handler.unary_unary is None:
                self.streaming.add(path)
                continue
            check_readable(methods[name].input_type)
            self.unary[path] = Method(path, handler.unary_unary, GetMessageClass(methods[name].input_type))


def collect_methods(port: Port) -> tuple[dict[str, Method], set[str]]:
    """Return the unary methods of a port by path, and the paths of those that stream."""
    collector = _Collector()
    port.register(collector)  # type: ignore[arg-type]
    return collector.unary, collector.streaming


class _Raw(Codec[Any, Any]):
    """Leaves messages as the bytes they are: they are converted inside the pipeline, after admission."""

    def __init__(self, form: Form) -> None:
        self._form = form

    def name(self) -> str:
        return self._form

    def encode(self, message: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes | bytearray, message_class: type[Any]) -> Any:
        return bytes(data)


class ConnectMethods(ConnectASGIApplication[None]):
    """The library's application over the methods of a port. Needs EXCHANGE to be set."""

    def __init__(self, methods: Mapping[str, Method], pipeline: Pipeline, *, converters: Executor) -> None:
        """Make the endpoints.

        Args:
            methods: By path.
            pipeline: What every call runs through.
            converters: Threads in which large messages are converted.
        """
        self._pipeline = pipeline
        self._converters = converters
        endpoints = {path: self._endpoint(method) for path, method in methods.items()}
        # The front has read and bounded the body; the library's own limit would count it again.
        super().__init__(
            service=None,
            endpoints=lambda _service: endpoints,
            read_max_bytes=None,
            compressions=(),
            codecs=[_Raw("json"), _Raw("proto")],
        )

    @property
    def path(self) -> str:
        """Return where it is mounted; the paths of the endpoints are whole."""
        return ""

    def recognise(self, path: str, exchange: Exchange) -> Caller:
        """Return who makes a call, before its body is read; refuse whoever may not make it.

        Raises:
            TetherError: As `Pipeline.recognise`.
        """
        return self._pipeline.recognise(exchange.describe(path))

    def _endpoint(self, method: Method) -> Any:
        service, _, name = method.path[1:].partition("/")
        info: MethodInfo[Any, Any] = MethodInfo(
            name=name,
            service_name=service,
            input=bytes,
            output=bytes,
            idempotency_level=IdempotencyLevel.UNKNOWN,  # POST only
            stream_type=StreamType.UNARY,
        )

        async def call(raw: bytes, _context: Any) -> bytes:
            exchange = EXCHANGE.get()
            try:
                return await self._pipeline.answer(
                    exchange.describe(method.path), lambda: self._work(method, raw, exchange)
                )
            except TetherError as error:
                exchange.error = error
                raise ConnectError(Code(connect_code(error.code)), error.message) from error

        return Endpoint.unary(method=info, function=call)

    async def _work(self, method: Method, raw: bytes, exchange: Exchange) -> bytes:
        try:
            async with asyncio.timeout(exchange.time_remaining()) as patience:
                request = await self._convert(_read, method, raw, exchange.form, size=len(raw))
                response = await method.behaviour(request, exchange)
                return await self._convert(_write, response, exchange.form, size=response.ByteSize())
        except TimeoutError as error:
            if not patience.expired():
                raise
            raise DeadlineExceededError("The deadline passed before the answer was there.") from error

    async def _convert(self, function: Callable[..., ResultT], *arguments: Any, size: int) -> ResultT:
        if size <= INLINE_BYTES:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._converters, function, *arguments)


def _read(method: Method, raw: bytes, form: Form) -> Message:
    if form == "proto":
        parsed: Message = parse_message(method.request.FromString, raw)
        return parsed
    message = method.request()
    read_message(raw, message)
    return message


def _write(message: Message, form: Form) -> bytes:
    return message.SerializeToString() if form == "proto" else write_message(message)
