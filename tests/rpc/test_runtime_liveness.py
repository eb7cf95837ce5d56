"""Liveness proves that calls are answered: a dead batcher, a stuck engine and a caller that is gone are all noticed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2

import tether_services.runtime.server as server_module
from tests.rpc.generator_serving import PACKAGED_POLICY
from tests.rpc.serving import LOCAL, Served, health, run, serving
from tests.unit.test_runtime_batching import kill_worker
from tests.unit.tiny_llama import write_tiny_llama
from tether import LogprobItem, ReferenceClient, RewardClient, ScoreItem, TetherError, UnavailableError
from tether.v1 import reference_pb2, reference_pb2_grpc
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.service import GeneratorService
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.service import ReferenceService
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.metrics import new_registry
from tether_services.runtime.server import Port, ServiceRunner
from tether_services.runtime.settings import ServerSettings

SERVING = health_pb2.HealthCheckResponse.SERVING
LIMIT_SECONDS = 15.0
"""R17, at the default `liveness_seconds`; tests shorten both alike."""
PERIOD = 1.0
SHORT_LIMIT = LIMIT_SECONDS / ServerSettings().liveness_seconds * PERIOD


async def seconds_to_not_serving(target: str, *, patience: float = SHORT_LIMIT) -> float | None:
    """Return how long the liveness stays SERVING from now; None if longer than the patience."""
    started = time.monotonic()
    while time.monotonic() - started < patience:
        if await health(target, "liveness") != SERVING:
            return time.monotonic() - started
        await asyncio.sleep(0.02)
    return None


def reference(**settings: object) -> ReferenceSettings:
    return ReferenceSettings.model_validate({**LOCAL, "engine": "fake", **settings})


def with_reference(scenario: Callable[[Served], Coroutine[Any, Any, None]], **settings: object) -> None:
    chosen = reference(**settings)

    async def main() -> None:
        async with serving(chosen, lambda registry: ReferenceService(chosen, registry)) as served:
            await scenario(served)

    run(main())


async def ask(target: str) -> None:
    async with ReferenceClient(target, retries=False) as client:
        await client.compute_logprobs([LogprobItem([1], [2])], timeout_seconds=2)


def test_r17_a_batcher_that_dies_ends_the_service_at_once_and_for_good() -> None:
    async def scenario(served: Served) -> None:
        assert isinstance(served.service, ReferenceService)
        await ask(served.target)
        kill_worker(served.service._batcher)
        with pytest.raises(UnavailableError):
            await ask(served.target)
        # `liveness_seconds` is an hour: nobody has asked the engine.
        assert await seconds_to_not_serving(served.target, patience=1.0) is not None
        with pytest.raises(UnavailableError) as caught:
            await ask(served.target)
        assert caught.value.reason == "ENGINE_FAILED"

    with_reference(scenario, liveness_seconds=3600)


def test_a_service_without_batcher_does_not_come_back_although_its_engine_answers() -> None:
    async def scenario(served: Served) -> None:
        assert isinstance(served.service, ReferenceService)
        kill_worker(served.service._batcher)
        with pytest.raises(UnavailableError):
            await ask(served.target)
        await served.service._ready_engine().check()
        for _ in range(20):
            assert await health(served.target, "liveness") != SERVING
            await asyncio.sleep(0.02)

    with_reference(scenario, liveness_seconds=0.05)


def test_r17_without_the_probe_through_the_batcher_a_dead_one_stays_green(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the service as it would be if it asked its engine alone."""

    async def check_engine(self: ReferenceService) -> None:
        await self._ready_engine().check()

    monkeypatch.setattr(ReferenceService, "check", check_engine)
    monkeypatch.setattr(ReferenceService, "on_failure", lambda self, report: None)

    async def scenario(served: Served) -> None:
        assert isinstance(served.service, ReferenceService)
        kill_worker(served.service._batcher)
        with pytest.raises(TetherError):
            await ask(served.target)
        assert await seconds_to_not_serving(served.target) is None

    with_reference(scenario, liveness_seconds=PERIOD)


def test_r17_the_probe_alone_notices_a_dead_batcher_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RewardService, "on_failure", lambda self, report: None)
    settings = RewardSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake", "liveness_seconds": PERIOD}
    )

    async def main() -> None:
        async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
            assert isinstance(served.service, RewardService)
            kill_worker(served.service._scorer.batcher)
            async with RewardClient(served.target, retries=False) as client:
                with pytest.raises(UnavailableError):
                    await client.score([ScoreItem("a", "b")])
            assert await seconds_to_not_serving(served.target) is not None

    run(main())


@asynccontextmanager
async def real_generator(folder: Path) -> AsyncIterator[tuple[Served, Any]]:
    settings = GeneratorSettings.model_validate(
        {
            **LOCAL,
            "admin_address": "127.0.0.1:0",
            "model": str(PACKAGED_POLICY),
            "dtype": "float32",
            "liveness_seconds": PERIOD,
        }
    )
    async with serving(settings, lambda registry: GeneratorService(settings, registry)) as served:
        assert isinstance(served.service, GeneratorService)
        engine: Any = served.service.engine
        yield served, engine._thread._executor


@asynccontextmanager
async def real_reference(folder: Path) -> AsyncIterator[tuple[Served, Any]]:
    model = str(write_tiny_llama(folder / "model"))
    settings = ReferenceSettings.model_validate({**LOCAL, "model": model, "liveness_seconds": PERIOD})
    async with serving(settings, lambda registry: ReferenceService(settings, registry)) as served:
        assert isinstance(served.service, ReferenceService)
        engine: Any = served.service._ready_engine()
        yield served, engine._thread._executor


@pytest.mark.parametrize("real", [real_generator, real_reference])
def test_r17_a_thread_of_the_engine_that_is_stuck_is_noticed_in_time_and_its_return_too(
    real: Callable[[Path], Any], tmp_path: Path
) -> None:
    assert 2 * ServerSettings().liveness_seconds < LIMIT_SECONDS

    async def main() -> None:
        free = threading.Event()
        async with real(tmp_path) as (served, thread):
            await asyncio.sleep(2 * PERIOD)
            assert await health(served.target, "liveness") == SERVING
            stuck = thread.submit(free.wait)
            try:
                assert await seconds_to_not_serving(served.target) is not None
            finally:
                free.set()
            await asyncio.wrap_future(stuck)
            for _ in range(200):
                if await health(served.target, "liveness") == SERVING:
                    return
                await asyncio.sleep(0.02)
            pytest.fail("the engine answers again, and nobody says so")

    run(main())


@pytest.mark.alone  # a thread that gets no core for a while looks as one that is stuck
@pytest.mark.parametrize("real", [real_generator, real_reference])
def test_a_forward_pass_that_takes_long_is_no_failure(real: Callable[[Path], Any], tmp_path: Path) -> None:
    ended = threading.Event()

    def compute() -> None:
        numbers = torch.rand(256, 256)
        while not ended.is_set():
            torch.mm(numbers, numbers)

    async def main() -> None:
        async with real(tmp_path) as (served, thread):
            long_pass = thread.submit(compute)
            try:
                assert await seconds_to_not_serving(served.target) is None
            finally:
                ended.set()
            await asyncio.wrap_future(long_pass)

    run(main())


@asynccontextmanager
async def fake_reward() -> AsyncIterator[tuple[Served, list[ThreadPoolExecutor]]]:
    """Yield a service and the executor that reads its texts."""
    settings = RewardSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake", "liveness_seconds": PERIOD}
    )
    async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
        assert isinstance(served.service, RewardService)
        yield served, [served.service._scorer._text_thread._executor]


@asynccontextmanager
async def fake_generator() -> AsyncIterator[tuple[Served, list[ThreadPoolExecutor]]]:
    """Yield a service and the executor that the event loop gives short jobs to, as `ServiceRunner.run` sets it."""
    settings = GeneratorSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake", "liveness_seconds": PERIOD}
    )
    async with serving(settings, lambda registry: GeneratorService(settings, registry)) as served:
        yield served, [served.runner.share_threads()]


@pytest.mark.alone
@pytest.mark.parametrize("service", [fake_reward, fake_generator])
@pytest.mark.parametrize("at_work", [False, True])
def test_r17_an_executor_that_calls_need_is_noticed_when_it_is_stuck_and_not_when_it_is_busy(
    service: Callable[[], Any], at_work: bool
) -> None:
    """Text is read in a thread: without it no call is answered, however well the engine is."""
    free = threading.Event()

    def compute() -> None:
        while not free.is_set():
            sum(range(1000))

    async def main() -> None:
        async with service() as (served, executors):
            await asyncio.sleep(2 * PERIOD)
            assert await health(served.target, "liveness") == SERVING
            jobs = [e.submit(compute if at_work else free.wait) for e in executors for _ in range(e._max_workers)]
            try:
                ill = await seconds_to_not_serving(served.target)
            finally:
                free.set()
            assert (ill is None) is at_work
            await asyncio.gather(*map(asyncio.wrap_future, jobs))

    run(main())


class Endless(reference_pb2_grpc.ReferenceServiceServicer):
    """Never answers."""

    name = "endless"

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.given_up = asyncio.Event()

    def ports(self) -> list[Port]:
        def register(server: grpc.aio.Server) -> None:
            reference_pb2_grpc.add_ReferenceServiceServicer_to_server(self, server)

        return [Port("address", "127.0.0.1:0", ["tether.v1.ReferenceService"], register)]

    def methods(self) -> list[str]:
        return ["ComputeLogprobs", "GetReference"]

    async def start(self) -> None: ...

    async def check(self) -> None: ...

    async def close(self) -> None: ...

    async def ComputeLogprobs(self, request: Any, context: Any) -> reference_pb2.ComputeLogprobsResponse:
        self.begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            self.given_up.set()
        return reference_pb2.ComputeLogprobsResponse()


class Wire:
    """A proxy that can stop passing bytes on, in both directions, with all connections open."""

    def __init__(self, target: str) -> None:
        self._host, port = target.split(":")
        self._port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self.passes = asyncio.Event()
        self.passes.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0)  # the transports close

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection(self._host, self._port)
        for source, sink in ((reader, forth), (back, writer)):
            self._tasks.add(asyncio.create_task(self._pass(source, sink)))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self.passes.wait()
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()


@pytest.mark.parametrize("pings", [True, False])
def test_b9_the_call_of_a_caller_that_is_gone_without_a_word_is_given_up(
    pings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(server_module.server_options(1024))
    quick = {"grpc.keepalive_time_ms": 1000, "grpc.http2.ping_timeout_ms": 1000, "grpc.keepalive_timeout_ms": 1000}
    assert quick.keys() <= options.keys()
    assert options["grpc.keepalive_time_ms"] + options["grpc.http2.ping_timeout_ms"] <= 30_000
    options |= quick
    if not pings:  # the control
        options = {name: value for name, value in options.items() if name not in quick}
    monkeypatch.setattr(server_module, "server_options", lambda *sizes: list(options.items()))

    async def main() -> bool:
        service = Endless()  # type: ignore[abstract]
        runner = ServiceRunner(ServerSettings(drain_seconds=0), service, new_registry())
        await runner.start()
        wire = Wire(f"127.0.0.1:{runner.bound_ports[0]}")
        try:
            async with wire.open() as target, ReferenceClient(target, timeout_seconds=50) as client:
                call = asyncio.create_task(client.compute_logprobs([LogprobItem([1], [2])]))
                await asyncio.wait_for(service.begun.wait(), 5)
                wire.passes.clear()
                try:
                    await asyncio.wait_for(service.given_up.wait(), 6)
                    return True
                except TimeoutError:
                    return False
                finally:
                    call.cancel()
                    await asyncio.gather(call, return_exceptions=True)
        finally:
            await runner.close()

    assert run(main()) is pings
