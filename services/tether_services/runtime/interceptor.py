"""The one server interceptor: guards, error mapping and request metrics around every method."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from tether_services.runtime.errors import abort, as_tether_error
from tether_services.runtime.limits import CallInfo, Guard
from tether_services.runtime.metrics import RequestMetrics

EXEMPT_PREFIXES = ("/grpc.health.", "/grpc.reflection.")
"""Health must answer under overload and before the engine is ready; reflection holds no data."""

Handler: TypeAlias = Any
"""A grpc.RpcMethodHandler; that class is generic for type checkers only."""
Context: TypeAlias = Any
"""A grpc.aio.ServicerContext, likewise."""


@dataclass(frozen=True, slots=True)
class Chain(grpc.aio.ServerInterceptor):
    """Runs the guards in order, then the method; every error leaves as a rich status and every call is counted."""

    guards: Sequence[Guard]
    metrics: RequestMetrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(EXEMPT_PREFIXES):
            return handler
        metadata = tuple(handler_call_details.invocation_metadata or ())
        return _replace_behaviour(handler, self, method, metadata)

    def admit(self, method: str, metadata: Any, context: Context) -> None:
        """Run the guards."""
        call = CallInfo(method, metadata, context.time_remaining())
        for guard in self.guards:
            guard(call)

    async def finish(self, method: str, started: float, error: BaseException | None, context: Context) -> None:
        """Count the call and, if it failed, end it with the rich status."""
        mapped = as_tether_error(error) if error is not None else None
        self.metrics.observe(method.rsplit("/", 1)[-1], mapped, time.monotonic() - started)
        if mapped is not None:
            await abort(context, mapped)


def _replace_behaviour(handler: Handler, chain: Chain, method: str, metadata: Any) -> Handler:
    coders = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.unary_unary:
        unary = _wrap_unary(handler.unary_unary, chain, method, metadata)
        return grpc.unary_unary_rpc_method_handler(unary, **coders)
    if handler.stream_unary:
        unary = _wrap_unary(handler.stream_unary, chain, method, metadata)
        return grpc.stream_unary_rpc_method_handler(unary, **coders)
    if handler.unary_stream:
        stream = _wrap_stream(handler.unary_stream, chain, method, metadata)
        return grpc.unary_stream_rpc_method_handler(stream, **coders)
    raise NotImplementedError(f"{method}: no method of the contract streams both ways")


def _wrap_unary(
    behaviour: Callable[[Any, Context], Awaitable[Any]], chain: Chain, method: str, metadata: Any
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        started = time.monotonic()
        try:
            chain.admit(method, metadata, context)
            response = await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except BaseException as error:  # every failure must leave as a status; cancellation is re-raised below
            await _fail(chain, method, started, error, context)
            raise
        await chain.finish(method, started, None, context)
        return response

    return call


def _wrap_stream(
    behaviour: Callable[[Any, Context], AsyncIterator[Any]], chain: Chain, method: str, metadata: Any
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        started = time.monotonic()
        try:
            chain.admit(method, metadata, context)
            async for response in behaviour(request, context):
                yield response
        except (grpc.aio.AbortError, GeneratorExit):
            raise
        except BaseException as error:  # as in _wrap_unary
            await _fail(chain, method, started, error, context)
            raise
        await chain.finish(method, started, None, context)

    return call


async def _fail(chain: Chain, method: str, started: float, error: BaseException, context: Context) -> None:
    """End a failed call; a cancelled one is only counted, because its context is gone."""
    if isinstance(error, Exception):
        await chain.finish(method, started, error, context)
    else:
        chain.metrics.observe(method.rsplit("/", 1)[-1], as_tether_error(error), time.monotonic() - started)
