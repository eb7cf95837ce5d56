"""The chassis, over a real loopback channel, with a small real service on it."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry

from tether.errors import InvalidArgumentError, ResourceExhaustedError
from tether.v1 import reference_pb2, reference_pb2_grpc
from tether_services.runtime import probe
from tether_services.runtime.metrics import new_registry
from tether_services.runtime.server import Port, ServiceRunner
from tether_services.runtime.settings import ServerSettings


class EchoService(reference_pb2_grpc.ReferenceServiceServicer):
    """Answers with the temperature it was sent; the temperature also selects a failure."""

    name = "echo"

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.engine_alive = True
        self.closed = False

    def ports(self) -> Sequence[Port]:
        return [Port("address", "127.0.0.1:0", ["tether.v1.ReferenceService"], self._register, 1024)]

    def _register(self, server: grpc.aio.Server) -> None:
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(self, server)

    def methods(self) -> Sequence[str]:
        return ["ComputeLogprobs", "GetReference"]

    async def start(self) -> None:
        await self.release.wait()

    async def check(self) -> None:
        if not self.engine_alive:
            raise RuntimeError("engine died")

    async def close(self) -> None:
        self.closed = True

    async def GetReference(
        self, request: reference_pb2.GetReferenceRequest, context: object
    ) -> reference_pb2.GetReferenceResponse:
        return reference_pb2.GetReferenceResponse(engine="echo")

    async def ComputeLogprobs(
        self, request: reference_pb2.ComputeLogprobsRequest, context: object
    ) -> reference_pb2.ComputeLogprobsResponse:
        self.started.set()
        if request.temperature == 3:
            raise InvalidArgumentError("3 is outside [0.01, 2].", field="temperature")
        if request.temperature == 4:
            raise ResourceExhaustedError("full", retry_after_seconds=1.5)
        if request.temperature == 5:
            raise ZeroDivisionError("secret path /etc/shadow")
        if request.temperature == 6:
            await asyncio.sleep(0.4)
        return reference_pb2.ComputeLogprobsResponse(base_model_sha256=f"{request.temperature:g}")


Scenario = Callable[[ServiceRunner, EchoService, grpc.aio.Channel], Awaitable[None]]


def run(scenario: Scenario, *, ready: bool = True, **settings: object) -> EchoService:
    """Serve, run the scenario, stop."""

    async def main() -> EchoService:
        service = EchoService()
        registry = new_registry()
        runner = ServiceRunner(ServerSettings.model_validate({"drain_seconds": 2, **settings}), service, registry)
        starting = asyncio.create_task(runner.start())
        if ready:
            service.release.set()
            await starting
        else:
            await _until(lambda: bool(runner.bound_ports))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{runner.bound_ports[0]}") as channel:
            try:
                await asyncio.wait_for(scenario(runner, service, channel), 20)
            finally:
                starting.cancel()
                await runner.close()
        return service

    return asyncio.run(main())


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition never came true")


async def compute(channel: grpc.aio.Channel, temperature: float, timeout: float | None = 5.0) -> str:
    stub = reference_pb2_grpc.ReferenceServiceStub(channel)
    request = reference_pb2.ComputeLogprobsRequest(temperature=temperature)
    response = await stub.ComputeLogprobs(request, timeout=timeout)
    return str(response.base_model_sha256)


async def failure(call: Awaitable[str]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def health(channel: grpc.aio.Channel, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    response = await stub.Check(  # type: ignore[attr-defined]
        health_pb2.HealthCheckRequest(service=name), timeout=2
    )
    return int(response.status)


def details(error: grpc.aio.AioRpcError, kind: type) -> list:  # type: ignore[type-arg]
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    found = []
    for packed in status.details:
        message = kind()
        if packed.Unpack(message):
            found.append(message)
    return found


def test_a_ready_service_answers() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        assert await compute(channel, 0.5) == "0.5"

    assert run(scenario).closed


def test_health_is_not_serving_until_the_engine_has_started() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        for name in ("", "tether.v1.ReferenceService", "liveness"):
            assert await health(channel, name) == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await failure(compute(channel, 0.5))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error, error_details_pb2.ErrorInfo)[0].reason == "STARTING"
        service.release.set()
        await _until(lambda: runner.health.not_ready_reason is None)
        for name in ("", "tether.v1.ReferenceService", "liveness"):
            assert await health(channel, name) == health_pb2.HealthCheckResponse.SERVING
        assert await compute(channel, 0.5) == "0.5"

    run(scenario, ready=False)


def test_an_invalid_field_is_named_in_a_bad_request() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        error = await failure(compute(channel, 3))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        violation = details(error, error_details_pb2.BadRequest)[0].field_violations[0]
        assert (violation.field, violation.description) == ("temperature", "3 is outside [0.01, 2].")
        assert details(error, error_details_pb2.ErrorInfo)[0].domain == "tether"

    run(scenario)


def test_overload_tells_when_to_call_again() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        error = await failure(compute(channel, 4))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        delay = details(error, error_details_pb2.RetryInfo)[0].retry_delay
        assert delay.seconds + delay.nanos / 1e9 == 1.5

    run(scenario)


def test_an_unforeseen_error_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        error = await failure(compute(channel, 5))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "shadow" not in (error.details() or "") + str(error.trailing_metadata())

    run(scenario)
    assert "shadow" in caplog.text


def test_a_call_without_a_deadline_is_refused() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        error = await failure(compute(channel, 0.5, timeout=None))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(error, error_details_pb2.ErrorInfo)[0].reason == "DEADLINE_MISSING"

    run(scenario)


def test_a_deadline_beyond_the_maximum_is_refused() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        error = await failure(compute(channel, 0.5, timeout=60))
        assert details(error, error_details_pb2.ErrorInfo)[0].reason == "DEADLINE_TOO_LONG"
        assert await compute(channel, 0.5, timeout=5) == "0.5"

    run(scenario, max_deadline_seconds=10)


def test_a_message_above_the_ports_limit_is_refused_and_the_service_lives() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        stub = reference_pb2_grpc.ReferenceServiceStub(channel)
        item = reference_pb2.LogprobItem(prompt_token_ids=[1] * 2000)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ComputeLogprobs(reference_pb2.ComputeLogprobsRequest(items=[item]), timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await compute(channel, 0.5) == "0.5"

    run(scenario)


def test_draining_refuses_new_calls_and_finishes_those_in_flight() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        in_flight = asyncio.create_task(compute(channel, 6))
        await service.started.wait()
        closing = asyncio.create_task(runner.close())
        await asyncio.sleep(0.05)
        error = await failure(compute(channel, 0.5))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert await in_flight == "6"
        await closing

    run(scenario)


def test_a_service_that_drains_says_so_and_serves_until_the_notice_has_passed() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        closing = asyncio.create_task(runner.close())
        await _until(lambda: runner.health.is_draining)
        assert await health(channel, "") == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await health(channel, "liveness") == health_pb2.HealthCheckResponse.SERVING
        assert await compute(channel, 0.5) == "0.5"
        await closing
        assert (await failure(compute(channel, 0.5))).code() is grpc.StatusCode.UNAVAILABLE

    run(scenario, drain_notice_seconds=0.5)


def test_calls_in_flight_are_counted_until_they_have_an_answer() -> None:
    port = _free_port()

    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        in_flight = asyncio.create_task(compute(channel, 6))
        await service.started.wait()
        assert "tether_echo_calls_in_flight 1.0" in await asyncio.to_thread(_scrape, port)
        await in_flight
        assert "tether_echo_calls_in_flight 0.0" in await asyncio.to_thread(_scrape, port)

    run(scenario, metrics_address=f"127.0.0.1:{port}")


def test_a_dead_engine_turns_liveness_and_a_recovered_one_turns_it_back() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        service.engine_alive = False
        await _until(lambda: runner.health.not_ready_reason == "engine failed")
        assert await health(channel, "liveness") == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await failure(compute(channel, 0.5))
        assert details(error, error_details_pb2.ErrorInfo)[0].reason == "ENGINE_FAILED"
        service.engine_alive = True
        await _until(lambda: runner.health.not_ready_reason is None)
        assert await compute(channel, 0.5) == "0.5"

    run(scenario, liveness_seconds=0.05)


def test_requests_are_counted_by_method_and_code_on_the_metrics_port() -> None:
    port = _free_port()

    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        await compute(channel, 0.5)
        await failure(compute(channel, 3))
        text = await asyncio.to_thread(_scrape, port)
        assert 'tether_echo_requests_total{code="OK",method="ComputeLogprobs"} 1.0' in text
        assert 'tether_echo_requests_total{code="INVALID_ARGUMENT",method="ComputeLogprobs"} 1.0' in text
        assert 'tether_echo_requests_total{code="UNAVAILABLE",method="GetReference"} 0.0' in text
        assert re.search(r'tether_echo_request_seconds_count\{method="ComputeLogprobs"\} 2.0', text)
        assert "process_resident_memory_bytes" in text

    run(scenario, metrics_address=f"127.0.0.1:{port}")


def test_a_taken_port_is_an_error_that_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        class Elsewhere(EchoService):
            def ports(self) -> Sequence[Port]:
                return [Port("address", address, ["tether.v1.ReferenceService"], self._register)]

        async def main() -> None:
            runner = ServiceRunner(ServerSettings(), Elsewhere(), CollectorRegistry())
            with pytest.raises(InvalidArgumentError) as caught:
                await runner.start()
            assert caught.value.violations[0].field == "address"
            await runner.close()

        asyncio.run(main())


def test_a_taken_metrics_port_is_an_error_that_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = ServerSettings(metrics_address=f"127.0.0.1:{taken.getsockname()[1]}")

        async def main() -> None:
            runner = ServiceRunner(given, EchoService(), CollectorRegistry())
            try:
                with pytest.raises(InvalidArgumentError) as caught:
                    await runner.start()
                assert caught.value.violations[0].field == "metrics_address"
            finally:
                await runner.close()

        asyncio.run(main())


def test_two_servers_never_share_a_port() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        address = f"127.0.0.1:{runner.bound_ports[0]}"
        other = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        with pytest.raises(RuntimeError):
            other.add_insecure_port(address)
        await other.stop(None)

    run(scenario)


def test_reflection_lists_the_services() -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]

        async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        names = []
        async for answer in stub.ServerReflectionInfo(ask(), timeout=5):
            names += [entry.name for entry in answer.list_services_response.service]
        assert "tether.v1.ReferenceService" in names

    run(scenario)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return str(response.read().decode())


def test_the_probe_command_tells_serving_from_everything_else() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        address = f"127.0.0.1:{runner.bound_ports[0]}"
        assert await asyncio.to_thread(probe.main, [address, "tether.v1.ReferenceService"]) == 1
        service.release.set()
        await _until(lambda: runner.health.not_ready_reason is None)
        assert await asyncio.to_thread(probe.main, [address, "tether.v1.ReferenceService"]) == 0
        assert await asyncio.to_thread(probe.probe, address, "no.such.Service") == "NOT_FOUND"
        assert await asyncio.to_thread(probe.probe, f"127.0.0.1:{_free_port()}") == "UNAVAILABLE"

    run(scenario, ready=False)
    assert probe.main([]) == 2


def test_bytes_that_are_no_message_are_the_callers_mistake_and_are_not_parsed_before_the_call_is_admitted() -> None:
    async def scenario(runner: ServiceRunner, service: EchoService, channel: grpc.aio.Channel) -> None:
        send: Callable[..., Awaitable[str]] = channel.unary_unary("/tether.v1.ReferenceService/ComputeLogprobs")
        error = await failure(send(b"\x0a\xff\xff", timeout=5))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(error, error_details_pb2.ErrorInfo)[0].reason == "MALFORMED_MESSAGE"
        error = await failure(send(b"\x0a\xff\xff", timeout=None))
        assert details(error, error_details_pb2.ErrorInfo)[0].reason == "DEADLINE_MISSING"

    run(scenario)
