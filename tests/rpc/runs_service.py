"""A small service with a unary method and a stream, under the real chassis, to see who gets through."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from tests.rpc.serving import LOCAL, Served, serving
from tether.v1 import orchestrator_pb2 as pb
from tether.v1 import orchestrator_pb2_grpc
from tether_services.runtime.callers import current_caller
from tether_services.runtime.server import Port
from tether_services.runtime.settings import ServerSettings

NUM_EVENTS = 3


class RunsService(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Tells callers who they are: GetRun once, WatchRun three times."""

    name = "runs"

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings

    def ports(self) -> Sequence[Port]:
        return [Port("address", self._settings.address, ["tether.v1.OrchestratorService"], self._register)]

    def _register(self, server: grpc.aio.Server) -> None:
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self, server)

    def methods(self) -> Sequence[str]:
        return ["GetRun", "WatchRun"]

    async def start(self) -> None: ...

    async def check(self) -> None: ...

    async def close(self) -> None: ...

    async def GetRun(self, request: pb.GetRunRequest, context: object) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=pb.Run(run_id=current_caller().name))

    async def WatchRun(self, request: pb.WatchRunRequest, context: object) -> AsyncIterator[pb.WatchRunResponse]:
        for _ in range(NUM_EVENTS):
            yield pb.WatchRunResponse()


@asynccontextmanager
async def serving_runs(**settings: Any) -> AsyncIterator[Served]:
    """Serve it until the block ends."""
    given = ServerSettings.model_validate({**LOCAL, **settings})
    service: Any = RunsService  # it does not answer the other methods
    async with serving(given, lambda registry: service(given)) as served:
        yield served


async def who_am_i(channel: grpc.aio.Channel, *, metadata: Any = (), timeout: float = 20.0) -> str:
    """Return the name under which the service knows the caller."""
    stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
    return str((await stub.GetRun(pb.GetRunRequest(), timeout=timeout, metadata=metadata)).run.run_id)


async def watch(channel: grpc.aio.Channel, *, metadata: Any = (), timeout: float = 20.0) -> int:
    """Return how many events a stream brings."""
    stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
    return len([event async for event in stub.WatchRun(pb.WatchRunRequest(), timeout=timeout, metadata=metadata)])
