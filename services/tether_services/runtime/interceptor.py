"""The one gRPC server interceptor: every method runs through the pipeline, every error leaves as a rich status.

Requests are read and parsed here, after the call was admitted. To gRPC every method takes a stream of requests, because
of a single one it would hold the bytes before it asks whether the call is wanted: strangers could fill the memory with
messages that they never finish. A message that cannot be parsed is the caller's mistake (INVALID_ARGUMENT), where gRPC
alone would report a defect of the service.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from tether.errors import InvalidArgumentError, TetherError
from tether_services.runtime.errors import abort
from tether_services.runtime.limits import CallInfo, name_identities
from tether_services.runtime.pipeline import Pipeline

EXEMPT_PREFIXES = ("/grpc.health.", "/grpc.reflection.")
"""Health must answer under overload and before the engine is ready; reflection holds no data."""

Handler: TypeAlias = Any
"""A grpc.RpcMethodHandler; that class is generic for type checkers only."""
Context: TypeAlias = Any
"""A grpc.aio.ServicerContext, likewise."""
Parse: TypeAlias = Callable[[bytes], Any]
Behaviour: TypeAlias = Callable[[Any, Context], Any]
"""What a handler calls: a coroutine function, or one that gives an asynchronous iterator."""


@dataclass(frozen=True, slots=True)
class Chain(grpc.aio.ServerInterceptor):
    """Sends the calls of a server through the pipeline."""

    pipeline: Pipeline
    _wrapped: dict[str, Handler] = field(default_factory=dict, init=False)
    """By method, once it was called."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the handler of one call."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(EXEMPT_PREFIXES):
            return handler
        return self._wrapped.setdefault(method, _replace_behaviour(handler, self.pipeline, method))


def _replace_behaviour(handler: Handler, pipeline: Pipeline, method: str) -> Handler:
    parse, serialize = handler.request_deserializer, {"response_serializer": handler.response_serializer}

    def describe(context: Context) -> CallInfo:
        metadata = tuple(context.invocation_metadata() or ())
        return CallInfo(method, metadata, context.time_remaining(), read_identities(context), context.peer())

    if handler.unary_unary:
        unary = _wrap_unary(_after_request(handler.unary_unary, parse), pipeline, describe)
        return grpc.stream_unary_rpc_method_handler(unary, **serialize)
    if handler.stream_unary:
        unary = _wrap_unary(_with_requests(handler.stream_unary, parse), pipeline, describe)
        return grpc.stream_unary_rpc_method_handler(unary, **serialize)
    if handler.unary_stream:
        stream = _wrap_stream(_stream_after_request(handler.unary_stream, parse), pipeline, describe)
        return grpc.stream_stream_rpc_method_handler(stream, **serialize)
    raise NotImplementedError(f"{method}: no method of the contract streams both ways")


def _after_request(behaviour: Behaviour, parse: Parse) -> Behaviour:
    async def call(requests: AsyncIterator[bytes], context: Context) -> Any:
        return await behaviour(await _parse_one(parse, context), context)

    return call


def _with_requests(behaviour: Behaviour, parse: Parse) -> Behaviour:
    async def call(requests: AsyncIterator[bytes], context: Context) -> Any:
        return await behaviour(_parse_all(parse, requests), context)

    return call


def _stream_after_request(behaviour: Behaviour, parse: Parse) -> Behaviour:
    async def call(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        async for response in behaviour(await _parse_one(parse, context), context):
            yield response

    return call


def _wrap_unary(behaviour: Behaviour, pipeline: Pipeline, describe: Callable[[Context], CallInfo]) -> Behaviour:
    async def call(requests: AsyncIterator[bytes], context: Context) -> Any:
        try:
            return await pipeline.answer(describe(context), lambda: behaviour(requests, context))
        except TetherError as error:
            await abort(context, error)

    return call


def _wrap_stream(behaviour: Behaviour, pipeline: Pipeline, describe: Callable[[Context], CallInfo]) -> Behaviour:
    async def call(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        try:
            async for response in pipeline.stream(describe(context), lambda: behaviour(requests, context)):
                yield response
        except TetherError as error:
            await abort(context, error)

    return call


def parse_message(parse: Parse, raw: bytes) -> Any:
    """Return the request message of its bytes.

    Raises:
        InvalidArgumentError: They are not one.
    """
    try:
        return parse(raw)
    except DecodeError:
        raise InvalidArgumentError(
            "The request is not a message of this method: its bytes cannot be parsed.", reason="MALFORMED_MESSAGE"
        ) from None


async def _parse_one(parse: Parse, context: Context) -> Any:
    raw = await context.read()
    if raw is grpc.aio.EOF:
        raise InvalidArgumentError("The call ended before its request.", reason="MALFORMED_MESSAGE")
    return parse_message(parse, raw)


async def _parse_all(parse: Parse, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for raw in requests:
        yield parse_message(parse, raw)


def read_identities(context: Context) -> tuple[str, ...]:
    """Return the verified name in the caller's certificate, see `CallInfo.identities`; empty without one."""
    proven = context.auth_context() or {}
    return name_identities(
        [uri.decode("utf-8", "replace") for uri in proven.get("peer_uri", ())],
        [name.decode("utf-8", "replace") for name in proven.get("x509_common_name", ())],
    )
