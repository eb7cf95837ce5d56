"""Channels to the services: every option in one place, a deadline on every call, typed errors."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc
import grpc.aio

from tether.breaker import BREAKER_OPEN, CircuitBreaker
from tether.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
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
AWAY_SECONDS: Final = 60.0
"""How long a call without effect waits for a service that has answered before: longer than a restart takes."""
UNKNOWN_SECONDS: Final = 3.0
"""The same for one that has not: it may be the wrong address."""
PAUSE_SECONDS: Final = 0.2
"""Between the repeats of gRPC and the next ones at least."""


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
                    "maxAttempts": 3,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "1s",
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
        ("grpc.max_reconnect_backoff_ms", 1_000),  # so that a service which is back is used again soon
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
            retries: Repeat calls without effect that find the service unavailable; False if the caller does.
            breaker: Fail at once, with BREAKER_OPEN, while the service does not answer.
        """
        if not target:
            raise InvalidArgumentError("A target such as 127.0.0.1:50051 is needed.", field="target")
        self.target = target
        self.timeout_seconds = check_timeout(timeout_seconds)
        self.breaker = CircuitBreaker(self.is_serving, target=target) if breaker else None
        """Opens when the service does not answer; None without one."""
        self._retries = retries
        self._has_answered = False
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

    async def _read(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float | None,
    ) -> ResponseT:
        """Return the response of a unary call without effect; every failure is a TetherError.

        A service that has answered before is taken to be back soon, so that its restart costs no call.
        """
        timeout = self._timeout(timeout_seconds)
        end, give_up = time.monotonic() + timeout, math.inf
        while True:
            left = max(end - time.monotonic(), 0.0)
            try:
                response = await self._guarded(functools.partial(method, request, timeout=left), timeout)
            except UnavailableError as error:
                patience = AWAY_SECONDS if self._has_answered else UNKNOWN_SECONDS
                give_up = min(give_up, end, time.monotonic() + patience)
                waits = self._retries and error.reason != BREAKER_OPEN
                if not (waits and await self._comes_back(give_up)):
                    self._has_answered = False
                    raise
            else:
                self._has_answered = True
                return response

    async def _comes_back(self, give_up: float) -> bool:
        """Wait until there is a connection, for a moment at least; return whether there is one before a time."""
        left = give_up - time.monotonic() - PAUSE_SECONDS
        if left <= 0:
            return False
        await asyncio.sleep(PAUSE_SECONDS)
        try:
            await asyncio.wait_for(self._channel.channel_ready(), left)
        except TimeoutError:
            return False
        return True

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

    async def is_serving(self) -> bool:
        """Return whether the service says that it serves; one that does not answer in a second does not."""
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
