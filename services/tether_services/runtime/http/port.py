"""Puts the HTTP port of a service together."""

from __future__ import annotations

import importlib.resources
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tether_services.runtime.http.front import Front, FrontOptions
from tether_services.runtime.http.methods import ConnectMethods, collect_methods
from tether_services.runtime.http.serving import ConnectionLimits, HttpServer
from tether_services.runtime.pipeline import Pipeline
from tether_services.runtime.server import Port


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """What the HTTP port shares with the gRPC port that it stands beside."""

    pipeline: Pipeline
    """What every call runs through."""
    default_seconds: float
    """Deadline of a call that does not say one."""
    is_serving: Callable[[], bool]
    """Whether callers should come."""
    tls: ssl.SSLContext | None = None
    """Transport security; None is none."""
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    """Of connections."""


class HttpPort:
    """The unary methods of one gRPC port over HTTP."""

    def __init__(self, port: Port, options: HttpOptions) -> None:
        """Prepare to serve what the port serves."""
        methods, streaming = collect_methods(port)
        # One thread: large messages are converted one after the other, so that they never use more than one core.
        self._converters = ThreadPoolExecutor(1, thread_name_prefix="http-messages")
        front = Front(
            ConnectMethods(methods, options.pipeline, converters=self._converters),
            frozenset(methods),
            FrontOptions(
                max_bytes=port.max_message_bytes,
                default_seconds=options.default_seconds,
                is_serving=options.is_serving,
                max_head_bytes=options.limits.max_head_bytes,
                streaming=frozenset(streaming),
                document=read_document(port.service_names[0]),
            ),
            converters=self._converters,
        )
        self._server = HttpServer(front, limits=options.limits, tls=options.tls)

    async def start(self, address: str) -> int:
        """Listen and return the port in use.

        Raises:
            InvalidArgumentError: The address is taken or not one of this machine.
        """
        return await self._server.start(address, field="http_address")

    @property
    def open_connections(self) -> int:
        """Return how many callers are connected."""
        return self._server.open_connections

    async def stop(self, grace_seconds: float) -> None:
        """Drain: requests in flight finish within this time."""
        await self._server.stop(grace_seconds)
        self._converters.shutdown(wait=False, cancel_futures=True)


def read_document(service: str) -> bytes | None:
    """Return the OpenAPI document of a service, for example tether.v1.RewardService; None if there is none."""
    file = importlib.resources.files("tether_services.documents") / "openapi" / f"{service}.json"
    return file.read_bytes() if file.is_file() else None
