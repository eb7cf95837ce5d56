"""Real servers on a loopback port, in the process of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry, generate_latest

from tether.errors import FieldViolation
from tether_services.runtime.metrics import new_registry
from tether_services.runtime.server import Service, ServiceRunner
from tether_services.runtime.settings import ServerSettings

ResultT = TypeVar("ResultT")
LOCAL = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", "drain_seconds": 2.0}
"""Settings for a test: free ports, quick end."""


@dataclass(frozen=True, slots=True)
class Served:
    """A running service."""

    target: str
    """host:port of its data port."""
    runner: ServiceRunner
    """What runs it."""
    service: Service
    """The service itself."""
    registry: CollectorRegistry
    """Its metrics."""

    def metrics(self) -> str:
        """Return what Prometheus would read."""
        return generate_latest(self.registry).decode()

    def value(self, name: str, **labels: str) -> float:
        """Return one sample; an absent one fails the test."""
        value = self.registry.get_sample_value(name, labels)
        assert value is not None, f"no sample {name} {labels}"
        return value


@asynccontextmanager
async def serving(settings: ServerSettings, build: Callable[[CollectorRegistry], Service]) -> AsyncIterator[Served]:
    """Serve until the block ends."""
    registry = new_registry()
    service = build(registry)
    runner = ServiceRunner(settings, service, registry)
    try:
        await runner.start()
        yield Served(f"127.0.0.1:{runner.bound_ports[0]}", runner, service, registry)
    finally:
        await runner.close()


def run(scenario: Awaitable[ResultT], *, timeout_seconds: float = 60.0) -> ResultT:
    """Run a coroutine and return its result."""

    async def main() -> ResultT:
        return await asyncio.wait_for(scenario, timeout_seconds)

    return asyncio.run(main())


async def health(target: str, name: str) -> int:
    """Return the health status of a service name."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=name)
        return int((await stub.Check(request, timeout=5)).status)  # type: ignore[attr-defined]


async def failure(call: Awaitable[object]) -> tuple[grpc.StatusCode, list[FieldViolation]]:
    """Return code and offending fields of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, caught.value
    violations = []
    for packed in status.details:
        request = error_details_pb2.BadRequest()
        if packed.Unpack(request):
            violations += [FieldViolation(v.field, v.description) for v in request.field_violations]
    return caught.value.code(), violations
