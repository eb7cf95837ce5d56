"""Health of a service: NOT_SERVING until the engine has answered; liveness proves the engine, not the socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)

LIVENESS = "liveness"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


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
        self._servicer = health.aio.HealthServicer()

    async def attach(self, server: grpc.aio.Server) -> None:
        """Register on a server, with everything NOT_SERVING."""
        await self._set((*self.names, LIVENESS), NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def ready(self) -> None:
        """The engine has answered: serve."""
        self.not_ready_reason = None
        missing = [name for name, there in self._parts.items() if not there]
        if self.is_draining:
            missing = list(self.names)
        await self._set(missing, NOT_SERVING)
        await self._set([name for name in (*self.names, LIVENESS) if name not in missing], SERVING)

    async def set_part(self, name: str, there: bool) -> None:
        """Say whether a part can be used, at once and whenever the service is ready."""
        self._parts[name] = there
        if self.not_ready_reason is None and not self.is_draining:
            await self._set([name], SERVING if there else NOT_SERVING)

    async def draining(self) -> None:
        """Tell balancers to send no more calls; those that still come are served, and liveness stays as it is."""
        self.is_draining = True
        await self._set(self.names, NOT_SERVING)

    async def engine_failed(self, *, for_good: bool = False) -> None:
        """The engine no longer answers: nothing is served and the process should be replaced.

        Args:
            for_good: No later answer of the engine turns the service back.
        """
        self._gone = self._gone or for_good
        self.not_ready_reason = "engine failed"
        await self._set((*self.names, LIVENESS), NOT_SERVING)

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

    async def _set(self, names: Iterable[str], status: int) -> None:
        for name in names:
            await self._servicer.set(name, status)
