"""Channels to the services: every option in one place, a deadline on every call, typed errors."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc
import grpc.aio

from tether.breaker import CircuitBreaker
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether.status import from_rpc_error

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

DEFAULT_TIMEOUT_SECONDS: Final = 120.0
"""Deadline of a call unless the client or the call says otherwise."""
MESSAGE_BYTES: Final = 8 * 1024 * 1024
"""Largest message sent or accepted; also the retry buffer, as gRPC silently does not retry what exceeds that buffer."""
EFFECT_FREE_METHODS: Final = {
    "tether.v1.GeneratorService": ("Generate", "GetGenerator"),
    "tether.v1.AdapterService": ("ListAdapters", "GetActiveAdapter"),
    "tether.v1.RewardService": ("Score", "Compare", "ListRewardModels"),
    "tether.v1.ReferenceService": ("ComputeLogprobs", "GetReference"),
    "tether.v1.OrchestratorService": ("GetRun", "ListRuns", "ListSteps"),
}
"""The methods that gRPC may repeat on its own. Everything else has an effect or, as WatchRun, resumes by itself."""


HEALTH_METHOD: Final = "/grpc.health.v1.Health/Check"
PROBE_TIMEOUT_SECONDS: Final = 1.0
"""Deadline of a health check while a breaker is open."""


def service_config(*, retries: bool = True) -> dict[str, Any]:
    """Return the gRPC service config: spread over all addresses, repeat UNAVAILABLE where a call has no effect.

    Args:
        retries: False for callers that repeat calls themselves: nested repeats multiply.
    """
    balancing: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if not retries:
        return balancing
    names = [{"service": service, "method": name} for service, names in EFFECT_FREE_METHODS.items() for name in names]
    return {
        **balancing,
        "methodConfig": [
            {
                "name": names,
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }


def channel_options(*, retries: bool = True) -> list[tuple[str, int | str]]:
    """Return the channel arguments of a client. gRPC ignores unknown keys, so the tests assert the effect of these."""
    return [
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # the one that detects a dead peer
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # how long a peer that accepts and then is silent holds an attempt
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.per_rpc_retry_buffer_size", MESSAGE_BYTES),
        ("grpc.service_config", json.dumps(service_config(retries=retries))),
    ]


def open_channel(target: str, *, retries: bool = True) -> grpc.aio.Channel:
    """Return a channel to `host:port`, `dns:///name:port` or `unix:path`, bound to the running event loop."""
    return grpc.aio.insecure_channel(target, options=channel_options(retries=retries))


async def is_serving(channel: grpc.aio.Channel) -> bool:
    """Return whether the service behind a channel says that it serves; one without health checks does if it answers."""
    # An empty request asks for the whole process; read as bytes, it needs no further library.
    check: Callable[..., Awaitable[bytes]] = channel.unary_unary(HEALTH_METHOD)
    try:
        answer = await check(b"", timeout=PROBE_TIMEOUT_SECONDS)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNIMPLEMENTED
    return answer == b"\x08\x01"  # field 1, status: SERVING


def check_timeout(seconds: float) -> float:
    """Return the timeout if it is a positive, finite number of seconds.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not math.isfinite(seconds) or seconds <= 0:
        raise InvalidArgumentError(f"{seconds!r} is not a positive, finite number of seconds.", field="timeout_seconds")
    return seconds


class ServiceClient:
    """A channel to one service and how to call it; the base of the clients.

    An async context manager. The channel opens with the first call, on the event loop of that call.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        retries: bool = True,
        breaker: bool = False,
    ) -> None:
        """Remember where to call.

        Args:
            target: `host:port`, `dns:///name:port` (all its addresses are used) or `unix:path`.
            timeout_seconds: Deadline of each call that does not set its own.
            retries: Let gRPC repeat calls without effect that find the service unavailable; False if the caller does.
            breaker: Fail at once, with BREAKER_OPEN, while the service does not answer.
        """
        if not target:
            raise InvalidArgumentError("A target such as 127.0.0.1:50051 is needed.", field="target")
        self.target = target
        self.timeout_seconds = check_timeout(timeout_seconds)
        self.breaker = CircuitBreaker(self._probe, target=target) if breaker else None
        """Opens when the service does not answer; None without one."""
        self._retries = retries
        self._opened: grpc.aio.Channel | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled. A repeat does nothing."""
        self._closed = True
        if self.breaker is not None:
            await self.breaker.close()
        if self._opened is not None:
            await self._opened.close()

    @property
    def _channel(self) -> grpc.aio.Channel:
        if self._closed:
            raise FailedPreconditionError(f"The client of {self.target} is closed.", reason="CLIENT_CLOSED")
        if self._opened is None:
            self._opened = open_channel(self.target, retries=self._retries)
        return self._opened

    def _timeout(self, timeout_seconds: float | None) -> float:
        return self.timeout_seconds if timeout_seconds is None else check_timeout(timeout_seconds)

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float | None,
    ) -> ResponseT:
        """Return the response of a unary call; every failure is a TetherError."""
        timeout = self._timeout(timeout_seconds)
        return await self._guarded(lambda: method(request, timeout=timeout), timeout)

    async def _upload(
        self,
        method: grpc.aio.StreamUnaryMultiCallable[RequestT, ResponseT],
        requests: AsyncIterator[RequestT],
        timeout_seconds: float | None,
    ) -> ResponseT:
        """Return the response to a stream of requests; every failure is a TetherError."""
        timeout = self._timeout(timeout_seconds)
        return await self._guarded(lambda: method(requests, timeout=timeout), timeout)

    async def _guarded(self, begin: Callable[[], Awaitable[ResponseT]], timeout_seconds: float) -> ResponseT:
        """Return the response of a call, begun only if the breaker lets it; every failure is a TetherError."""

        async def call() -> ResponseT:
            try:
                return await begin()
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, target=self.target, timeout_seconds=timeout_seconds) from None

        return await (call() if self.breaker is None else self.breaker.call(call))

    async def _probe(self) -> bool:
        return await is_serving(self._channel)

    async def _stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float,
    ) -> AsyncIterator[ResponseT]:
        """Yield the responses of a server stream; every failure is a TetherError. Leaving it cancels the call."""
        call = method(request, timeout=timeout_seconds)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, target=self.target, timeout_seconds=timeout_seconds) from None
        finally:
            call.cancel()
