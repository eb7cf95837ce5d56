"""Asks a service for its health, by the protocol that all gRPC services share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import grpc
import grpc.aio

__all__ = ["answers", "is_serving"]

HEALTH_METHOD: Final = "/grpc.health.v1.Health/Check"
PROBE_TIMEOUT_SECONDS: Final = 1.0
"""Deadline of a health check while a breaker is open."""


async def is_serving(channel: grpc.aio.Channel) -> bool:
    """Return whether the service behind a channel says that it serves; one without health checks does if it answers."""
    return await _check_health(channel) in (b"\x08\x01", grpc.StatusCode.UNIMPLEMENTED)  # field 1, status: SERVING


async def answers(channel: grpc.aio.Channel) -> bool:
    """Return whether a health check has any answer, also a refused connection; only a service that hangs has none.

    What refuses connections is gone, so that the calls to it have ended, or drains, and they go on.
    """
    return await _check_health(channel) is not grpc.StatusCode.DEADLINE_EXCEEDED


async def _check_health(channel: grpc.aio.Channel) -> bytes | grpc.StatusCode:
    # An empty request asks for the whole process; read as bytes, it needs no further library.
    check: Callable[..., Awaitable[bytes]] = channel.unary_unary(HEALTH_METHOD)
    try:
        return await check(b"", timeout=PROBE_TIMEOUT_SECONDS)
    except grpc.aio.AioRpcError as error:
        return error.code()
