"""Health of a service: NOT_SERVING until the engine has answered; liveness proves the engine, not the socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)

LIVENESS = "liveness"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Health:
    """The standard health service over a fixed set of names; every name starts NOT_SERVING."""

    def __init__(self, names: Iterable[str], *, parts: Iterable[str] = ()) -> None:
        """Take the names.

        Args:
            names: Of the services.
            parts: Of what can be missing while the rest serves; there unless `set_part` says otherwise.
        """
        self._parts = dict.fromkeys(parts, True)
        self.names = ("", *names, *self._parts)
        self.not_ready_reason: str | None = "starting"
        """Why calls are refused now; None while the service is ready."""
        self._gone = False
        self.is_draining = False
        """Whether balancers are told to send no more calls."""
        self._servicer = _Servicer()

    async def attach(self, server: grpc.aio.Server) -> None:
        """Register on a server, with everything NOT_SERVING."""
        self._set((*self.names, LIVENESS), NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def ready(self) -> None:
        """The engine has answered: serve."""
        self.not_ready_reason = None
        missing = [name for name, there in self._parts.items() if not there]
        if self.is_draining:
            missing = list(self.names)
        self._set(missing, NOT_SERVING)
        self._set([name for name in (*self.names, LIVENESS) if name not in missing], SERVING)

    async def set_part(self, name: str, there: bool) -> None:
        """Say whether a part can be used, at once and whenever the service is ready."""
        self._parts[name] = there
        if self.not_ready_reason is None and not self.is_draining:
            self._set([name], SERVING if there else NOT_SERVING)

    async def draining(self) -> None:
        """Tell balancers to send no more calls; those that still come are served, and liveness stays as it is."""
        self.is_draining = True
        self._set(self.names, NOT_SERVING)

    async def engine_failed(self, *, for_good: bool = False) -> None:
        """The engine no longer answers: nothing is served and the process should be replaced.

        Args:
            for_good: No later answer of the engine turns the service back.
        """
        self._gone = self._gone or for_good
        self.not_ready_reason = "engine failed"
        self._set((*self.names, LIVENESS), NOT_SERVING)

    async def watch_engine(self, check: Callable[[], Awaitable[None]], *, every_seconds: float) -> None:
        """Call `check` for ever; a failure or a late answer turns the service unhealthy, an answer turns it back.

        From the last moment in which the engine could have answered it takes at most twice `every_seconds`: the pause,
        then the wait for the answer.
        """
        while True:
            await asyncio.sleep(every_seconds)
            try:
                await asyncio.wait_for(check(), timeout=every_seconds)
            except Exception as error:  # whatever an engine raises, the verdict is the same
                log_event(log, "engine check failed", level=logging.ERROR, error=f"{type(error).__name__}: {error}")
                await self.engine_failed()
            else:
                if self.not_ready_reason == "engine failed" and not self._gone:
                    await self.ready()

    def _set(self, names: Iterable[str], status: int) -> None:
        self._servicer.set(dict.fromkeys(names, status))

    def end_watches(self) -> None:
        """End the streams of those who watch: a server does not stop before its last call has ended."""
        self._servicer.end()


class _Servicer(health_pb2_grpc.HealthServicer):
    """Answers by name.

    Not the library's, whose streams end only when their readers leave, and whose changes wait for each of them.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._has_ended = False

    def set(self, statuses: Mapping[str, int]) -> None:
        """Change the statuses of some names."""
        self._statuses |= statuses
        self._tell()

    def end(self) -> None:
        """End all streams, those that begin later too."""
        self._has_ended = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Return the status of a name."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no service of that name here.")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Send the status of a name, and each later one; a reader that is slow misses what was in between."""
        sent: int | None = None
        while not self._has_ended:
            changed = self._changed  # before the status is read: no change after that is missed
            status = self._statuses.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != sent:
                sent = status
                yield health_pb2.HealthCheckResponse(status=status)
            else:
                await changed.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "The service is stopping.")
