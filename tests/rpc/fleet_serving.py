"""Two fake generators behind proxies, at addresses that stay, and a fleet over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.proxy import Fault, Proxy
from tests.rpc.adapter_files import fake_adapter, fake_probe
from tests.rpc.generator_serving import Serving, serve_generator, settings
from tether.adapter import AdapterProbe, AdapterPush
from tether.generator import Generation, GeneratorClient, SamplingParams
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME
from tether_services.local.ports import free_ports
from tether_services.orchestrator.config import GeneratorAddress, OrchestratorSettings
from tether_services.orchestrator.fleet import Fleet
from tether_services.orchestrator.publishing import LocalAdapter
from tether_services.orchestrator.records import Attempt
from tether_services.orchestrator.remote import Services, open_services
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256

PROMPT = (1, 40, 50)
ATTEMPT = Attempt("demo", 1, Path("unused"))


@dataclass(slots=True)
class Generator:
    """A generator that can be ended, started again at the same addresses, and frozen."""

    addresses: tuple[str, str]
    proxies: tuple[Proxy, Proxy]
    options: dict[str, Any]
    running: AsyncExitStack = field(default_factory=AsyncExitStack)
    now: Serving | None = None

    @property
    def serving(self) -> Serving:
        assert self.now is not None, "it does not run"
        return self.now

    @property
    def target(self) -> str:
        return self.proxies[0].target

    async def start(self) -> None:
        """Begin with nothing loaded."""
        address, admin = self.addresses
        given = settings(address=address, admin_address=admin, drain_seconds=0, **self.options)
        self.now = await self.running.enter_async_context(serve_generator(given))

    async def end(self) -> None:
        """Stop without waiting for calls; connections break."""
        self.now = None
        await self.running.aclose()
        for proxy in self.proxies:
            proxy.reset_all()

    def freeze(self) -> None:
        """Hold everything back, as a stopped process does."""
        for proxy in self.proxies:
            proxy.set(up=Fault(stall=True), down=Fault(stall=True))

    def thaw(self) -> None:
        """Let everything go on."""
        for proxy in self.proxies:
            proxy.clear()

    async def active(self) -> tuple[str, int]:
        """What it serves."""
        now = self.serving.service.adapters.active
        return now.run_id, now.policy_version

    def stored(self) -> list[int]:
        """The versions that it has proven."""
        return sorted(each.declaration.policy_version for each in self.serving.service.adapters.all())

    def count(self) -> float:
        """Completions that it has made."""
        return self.serving.served.value("tether_generator_completions_total", finish_reason="stop") + (
            self.serving.served.value("tether_generator_completions_total", finish_reason="length")
        )


@dataclass(slots=True)
class World:
    """Generators and what calls them."""

    generators: tuple[Generator, Generator]
    services: Services
    folder: Path
    lagging: list[list[str]] = field(default_factory=list)
    """Each change of what the fleet says about laggards."""

    def fleet(self, attempt: Attempt = ATTEMPT, **options: Any) -> Fleet:
        return Fleet(self.services, attempt, on_lagging=lambda targets: self.lagging.append(list(targets)), **options)

    def adapter(self, version: int, *, run_id: str = "demo", wrong_by: float = 0.0) -> LocalAdapter:
        """An exported adapter, whose probes may be wrong by some nats."""
        made, probe = fake_adapter(version), fake_probe(version)
        directory = self.folder / str(version)
        directory.mkdir(exist_ok=True)
        (directory / CONFIG_NAME).write_bytes(made.config)
        (directory / WEIGHTS_NAME).write_bytes(made.weights)
        claimed = AdapterProbe(probe.token_ids, [x - wrong_by for x in probe.logprobs])
        push = AdapterPush(run_id, version, FAKE_BASE_SHA256, made.rank, made.targets, [claimed], True)
        return LocalAdapter(directory, made.sha256, len(made.data), push)


@asynccontextmanager
async def fleet_world(folder: Path, **options: Any) -> AsyncIterator[World]:
    """Yield two running generators.

    Args:
        folder: For adapters.
        options: Settings of the generators.
    """
    ports = free_ports(4)
    async with AsyncExitStack() as stack:
        generators = []
        for number in range(2):
            addresses = tuple(f"127.0.0.1:{port}" for port in ports[2 * number : 2 * number + 2])
            proxies = [await stack.enter_async_context(Proxy(address)) for address in addresses]
            generators.append(Generator((addresses[0], addresses[1]), (proxies[0], proxies[1]), options))
            stack.push_async_callback(generators[-1].running.aclose)
            await generators[-1].start()
        targets = [GeneratorAddress(address=g.target, adapter_address=g.proxies[1].target) for g in generators]
        given = OrchestratorSettings(generators=tuple(targets), retry_backoff_seconds=0.05)
        services = await stack.enter_async_context(open_services(given))
        yield World((generators[0], generators[1]), services, folder)


def ask(fleet: Fleet, *, seed: int = 7, max_tokens: int = 8) -> Callable[[GeneratorClient], Any]:
    """A Generate call that pins what the fleet serves now."""
    version, sampling = fleet.policy_version, SamplingParams(max_tokens=max_tokens, seed=seed)

    async def operation(client: GeneratorClient) -> Generation:
        return await client.generate(PROMPT, sampling=sampling, policy_version=version, run_id="demo")

    return operation


async def wait_until(done: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Poll until something is so."""
    async with asyncio.timeout(seconds):
        while not done():
            await asyncio.sleep(0.01)
