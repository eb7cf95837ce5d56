"""R17: a blocked event loop, a deadlocked executor, a dead engine: liveness says so, though the port is fine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.reliability.breaking import BREAK_VARIABLE
from tests.reliability.processes import poll_until
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import SERVICES, World, WorldPlan, open_world
from tether.errors import TetherError
from tether.generator import GeneratorClient, SamplingParams
from tether.orchestrator import OrchestratorClient
from tether.reference import LogprobItem, ReferenceClient
from tether.reward import RewardClient, ScoreItem
from tether_services.runtime.health import LIVENESS
from tether_services.runtime.settings import ServerSettings

LIMIT_SECONDS: Final = 15.0
"""At the default `liveness_seconds`; the short form shortens both alike."""
SHORT_PERIOD_SECONDS: Final = 1.5
CALL_SECONDS: Final = 1.0
PROBE_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 1.0
"""A call that is sent so long after a signal meets what it has broken."""
FAULTS: Final = ("executor", "loop", "engine")
"""The last one cannot be healed."""
HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""With empty settings."""
PING: Final = b"\x00\x00\x08\x06\x00" + bytes(4) + b"liveness"
PING_ANSWER: Final = b"\x00\x00\x08\x06\x01" + bytes(4) + b"liveness"


@dataclass(slots=True)
class Watch:
    """Light traffic to all services, and what is said of them meanwhile."""

    world: World
    bound: float
    """Seconds within which a service that answers no call must be said to be ill."""
    port_only: bool
    """The control: healthy is who accepts a connection."""
    muted: float = 0.0
    """From when on no call can be answered; 0: the services are well."""
    answered: Counter[str] = field(default_factory=Counter)
    """Calls sent since then that were answered, by service."""
    silent: Counter[str] = field(default_factory=Counter)
    """And those that were not."""
    over: bool = False
    """No further call is to be sent."""
    ports: Counter[bool] = field(default_factory=Counter)
    """Whether the port took a connection, each time that was tried."""
    pings: Counter[bool] = field(default_factory=Counter)
    """Whether an HTTP/2 ping was answered."""

    @property
    def names(self) -> Sequence[str]:
        """Return the services."""
        return self.world.plan.services

    async def traffic(self, name: str, call: Callable[[], Awaitable[object]]) -> None:
        """Call a service on and on."""
        while not self.over:
            sent = time.monotonic()
            try:
                await self.world.recorder.call(name, CALL_SECONDS, call())
            except TetherError:
                if 0 < self.muted <= sent:
                    self.silent[name] += 1
            else:
                if 0 < self.muted <= sent:
                    self.answered[name] += 1
                    self.world.recorder.record("heard", service=name)
            await asyncio.sleep(0.1)

    async def probe(self, name: str) -> bool:
        """Return what a liveness check says now, and record it."""
        address = self.world.addresses[name]
        healthy = await accepts(address) if self.port_only else await is_alive(address)
        self.world.recorder.record("liveness", service=name, healthy=healthy)
        return healthy

    async def probe_until_ill(self, name: str, *, since: float) -> float:
        """Return the seconds until a service is said to be ill; infinity if it is not for more than the bound."""
        while time.monotonic() - since < self.bound + 1:
            if not await self.probe(name):
                return time.monotonic() - since
            await asyncio.sleep(0.1)
        return float("inf")

    async def look_at_port(self, name: str) -> None:
        """Try the port of a service, and an HTTP/2 ping."""
        self.ports[await accepts(self.world.addresses[name])] += 1
        self.pings[await answers_ping(self.world.addresses[name])] += 1


async def run_broken(trial: Trial) -> Outcome:
    """Break all services in each way, one after the other, and see when liveness says so."""
    default = ServerSettings().liveness_seconds
    period = default if trial.long else SHORT_PERIOD_SECONDS
    word = trial.folder / "break"
    word.write_text("heal")
    settings = {name: {"liveness_seconds": period} for name in SERVICES}
    environment = {BREAK_VARIABLE: str(word)}
    plan = WorldPlan("tiny", settings=settings, environment=environment)
    if trial.control:
        plan = WorldPlan(services=("reward",), settings=settings, environment=environment)
    figures: dict[str, object] = {"liveness_seconds": period, "bound s": LIMIT_SECONDS / default * period}
    failures: list[str] = []
    async with open_world(trial.folder, plan) as world:
        watch = Watch(world, LIMIT_SECONDS / default * period, trial.control)
        async with traffic(watch):
            for fault in FAULTS[:1] if trial.control else FAULTS:
                figures[f"{fault} s"] = await break_all(watch, fault, failures)
                if fault != FAULTS[-1]:
                    await heal_all(watch)
    figures |= {"ports open": f"{watch.ports[True]} of {watch.ports.total()}"}
    figures |= {"pings answered": f"{watch.pings[True]} of {watch.pings.total()}"}
    if watch.ports[False] and not trial.control:
        failures.append(f"{watch.ports[False]} times a port was closed: a check of the port would have noticed")
    return Outcome(world.recorder.judge(), figures, failures)


@asynccontextmanager
async def traffic(watch: Watch) -> AsyncIterator[None]:
    """Keep a call in flight to each service."""
    addresses = watch.world.addresses
    async with AsyncExitStack() as stack:
        generator = await stack.enter_async_context(GeneratorClient(addresses["generator"], retries=False))
        reward = await stack.enter_async_context(RewardClient(addresses["reward"], retries=False))
        reference = await stack.enter_async_context(ReferenceClient(addresses["reference"], retries=False))
        orchestrator = await stack.enter_async_context(OrchestratorClient(addresses["orchestrator"], retries=False))
        sampling, item = SamplingParams(max_tokens=2), LogprobItem([1, 4], [5])
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "generator": lambda: generator.generate([1, 4], sampling=sampling, timeout_seconds=CALL_SECONDS),
            "reward": lambda: reward.score([ScoreItem("a", "b")], timeout_seconds=CALL_SECONDS),
            "reference": lambda: reference.compute_logprobs([item], timeout_seconds=CALL_SECONDS),
            "orchestrator": lambda: orchestrator.list_runs(timeout_seconds=CALL_SECONDS),
        }
        tasks = [asyncio.create_task(watch.traffic(name, calls[name])) for name in watch.names]
        try:
            yield
        finally:
            watch.over = True
            await asyncio.gather(*tasks)


async def break_all(watch: Watch, fault: str, failures: list[str]) -> str:
    """Break all services in one way, and return after which times liveness said so."""
    broken = time.monotonic()
    for name in watch.names:
        watch.world.recorder.record("mute", service=name, bound_seconds=watch.bound)
    send(watch.world, fault)
    watch.answered.clear()
    watch.silent.clear()
    watch.muted = broken + SETTLE_SECONDS
    async with asyncio.TaskGroup() as tasks:
        probes = {name: tasks.create_task(watch.probe_until_ill(name, since=broken)) for name in watch.names}
        await asyncio.sleep(SETTLE_SECONDS)
        for name in watch.names:
            tasks.create_task(watch.look_at_port(name))
    await poll_until(lambda: met(watch), seconds=3 * CALL_SECONDS, what=f"every service is silent ({fault})")
    failures += [f"{fault}: {name} still answered {count} calls" for name, count in watch.answered.items()]
    seconds = {name: probe.result() for name, probe in probes.items()}
    return ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())


async def met(watch: Watch) -> bool:
    """Return whether a call to every service has met its fault."""
    return all(watch.silent[name] + watch.answered[name] for name in watch.names)


async def heal_all(watch: Watch) -> None:
    """Let all services go on, and wait until they answer and say that they are well."""
    send(watch.world, "heal")

    async def well() -> bool:
        return all([await is_alive(watch.world.addresses[name]) for name in watch.names])

    await poll_until(well, seconds=10 * SHORT_PERIOD_SECONDS + 10, what="all services are well again")
    watch.muted = 0.0
    for name in watch.names:
        watch.world.recorder.record("heard", service=name)


def send(world: World, word: str) -> None:
    """Tell all services what to do."""
    (world.folder / "break").write_text(word)
    for name in world.plan.services:
        os.kill(world.processes[name].pid, signal.SIGUSR1)


async def is_alive(address: str) -> bool:
    """Return whether the liveness check of a service is passed in time."""
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        try:
            answer = await check(health_pb2.HealthCheckRequest(service=LIVENESS), timeout=PROBE_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def accepts(address: str) -> bool:
    """Return whether somebody accepts connections at an address: what a plain check of the port finds out."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), PROBE_SECONDS)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def answers_ping(address: str) -> bool:
    """Return whether the HTTP/2 connection is alive: what keepalive finds out."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(HTTP2_PREFACE + PING)
        await asyncio.wait_for(reader.readuntil(PING_ANSWER), PROBE_SECONDS)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False
    finally:
        writer.close()
    return True


SCENARIOS = [
    Scenario(
        name="R17",
        title="blocked event loops, deadlocked executors and dead engines in all four services",
        run=run_broken,
        control="the check of the engine: a connection to the port is enough",
        caught_as=frozenset({"I6"}),
        seconds=90,
        long_seconds=300,
    ),
]
