"""A deployment for one scenario: real service processes on loopback, proxies in between where asked, and a history."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import tomli_w

from tests.reliability.processes import LOADED_VARIABLE, Process, poll_until, wait_for_socket
from tests.reliability.proxy import Proxy
from tests.reliability.recording import Recorder
from tether.adapter import AdapterClient
from tether.orchestrator import OrchestratorClient, Run
from tether_services.local.ports import free_ports
from tether_services.runtime.history import HISTORY_VARIABLE
from tether_services.runtime.threads import thread_environment

__all__ = ["World", "WorldPlan", "open_world", "run_toml"]

SERVICES: Final = ("generator", "reward", "reference", "orchestrator")
SECOND: Final = "generator2"
"""May be among the services of a plan: then a run has two generators."""
WORKERS: Final = "workers"
"""The process that workers are forked from."""
SOCKET: Final = "fork.socket"
Models = Literal["fake", "tiny"]


@dataclass(frozen=True, slots=True)
class WorldPlan:
    """What a scenario needs."""

    models: Models = "fake"
    """`tiny`: real engines on a Llama of two layers; `fake`: the deterministic engines with an oracle."""
    services: Sequence[str] = SERVICES
    """Those to start."""
    proxied: Sequence[str] = ()
    """Of generator, adapter, generator2, adapter2, reward, reference, orchestrator: reached through a proxy."""
    sabotage: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By service, or of "worker": protections to take out, by their names in sabotage.py."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By service: further settings."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Further variables of all services."""
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By service, or of the "workers": further variables."""
    fork_workers: bool = True
    """Workers of real models are forked from a process that has loaded the libraries, as services are; else started
    anew."""

    @property
    def forks(self) -> bool:
        """Whether there is a process that others are forked from."""
        return self.models == "tiny"

    @property
    def processes(self) -> tuple[str, ...]:
        """Return the names of all processes to start."""
        return (*((WORKERS,) if self.forks else ()), *self.services)


@dataclass(slots=True)
class World:
    """What is running."""

    folder: Path
    plan: WorldPlan
    recorder: Recorder
    addresses: Mapping[str, str]
    """Real addresses: generator, adapter, generator2, adapter2, reward, reward models, reference, orchestrator."""
    processes: Mapping[str, Process]
    proxies: Mapping[str, Proxy]

    @property
    def state_dir(self) -> Path:
        """Return the orchestrator's state folder."""
        return Path(str(self.plan.settings.get("orchestrator", {}).get("state_dir", self.folder / "runs")))

    def target(self, name: str) -> str:
        """Return where a caller reaches a service: its proxy where it has one."""
        return self.proxies[name].target if name in self.proxies else self.addresses[name]

    def orchestrator(self, *, timeout_seconds: float = 20.0) -> OrchestratorClient:
        """Return a client of the orchestrator."""
        return OrchestratorClient(self.target("orchestrator"), timeout_seconds=timeout_seconds)

    def adapters(self, *, timeout_seconds: float = 20.0) -> AdapterClient:
        """Return a client of the generator's adapter port."""
        return AdapterClient(self.target("adapter"), timeout_seconds=timeout_seconds)

    def worker(self) -> int | None:
        """Return the process id of the worker that runs now; None if there is none."""
        children = self.processes[WORKERS if self.plan.fork_workers else "orchestrator"].children()
        services = {process.pid for process in self.processes.values() if process.alive}
        return next((child for child in children if child not in services), None)

    def kill_worker(self) -> bool:
        """Kill -9 the worker and return whether there was one."""
        pid = self.worker()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    async def wait_for_end(self, client: OrchestratorClient, run_id: str, *, seconds: float) -> Run:
        """Return a run once it has ended, recording what is seen of it meanwhile."""
        latest: list[Run] = []

        async def ended() -> bool:
            latest[:] = [await self.recorder.observe(client.get_run(run_id))]
            return latest[0].ended

        await poll_until(ended, seconds=seconds, what=f"the end of run {run_id}")
        return latest[0]


@asynccontextmanager
async def open_world(folder: Path, plan: WorldPlan) -> AsyncIterator[World]:
    """Yield the services of a plan, serving; all of them are killed at the end, whatever it is."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = ("generator", "adapter", "reward", "reward models", "reference", "orchestrator", SECOND, "adapter2")
    names = (*ports, *(f"metrics of {name}" for name in plan.services))
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(len(names)), strict=True)}
    model = folder / "policy" if plan.models == "tiny" else None
    recorder = Recorder(folder / "history.jsonl")
    async with AsyncExitStack() as stack:
        proxies = {name: await stack.enter_async_context(Proxy(addresses[name])) for name in plan.proxied}
        reached = {name: proxies[name].target if name in proxies else addresses[name] for name in names}
        settings = _settings(folder, plan, addresses, reached, model)
        processes = {name: _process(folder, plan, name, settings.get(name, {}), recorder) for name in plan.processes}
        for process in processes.values():
            stack.callback(process.kill)
        if WORKERS in processes:
            await wait_for_socket(processes[WORKERS].fork_socket)
            await processes[WORKERS].start()  # the others are forked from it
            await _write_model(folder)
        services = [process for name, process in processes.items() if name != WORKERS]
        for process in services:
            process.launch()
        await asyncio.gather(*(process.wait_until_serving() for process in services))
        yield World(folder, plan, recorder, addresses, processes, proxies)


async def _write_model(folder: Path) -> None:
    """Have the tiny policy with its prompts written by a process that has the libraries already."""
    module, log_file = "tests.reliability.tiny_model", folder / "model.log"
    writer = Process("model", module, (str(folder),), log_file, address="", fork_socket=str(folder / SOCKET))
    assert await writer.run(seconds=60) == 0, writer.log_tail()


def _settings(
    folder: Path, plan: WorldPlan, addresses: Mapping[str, str], reached: Mapping[str, str], model: Path | None
) -> dict[str, dict[str, Any]]:
    """Return the settings of each service: one thread and no shared batches, so that bits do not depend on company."""
    engine: dict[str, Any] = {"engine": "fake"}
    if model is not None:
        engine = {"engine": "transformers", "model": str(model), "dtype": "float32", "device": "cpu"}
        engine["batch"] = {"mix_calls": False}
    generators = {
        name: {**engine, "admin_address": addresses[adapter], "adapters": {"folder": str(folder / f"{adapter}s")}}
        for name, adapter in (("generator", "adapter"), (SECOND, "adapter2"))
    }
    called: dict[str, Any] = {f"{name}_address": reached[name] for name in ("generator", "adapter")}
    if SECOND in plan.services:
        pairs = [(reached["generator"], reached["adapter"]), (reached[SECOND], reached["adapter2"])]
        called = {"generators": [{"address": address, "adapter_address": adapter} for address, adapter in pairs]}
    called |= {f"{name}_address": reached[name] for name in ("reward", "reference")}
    chosen: dict[str, dict[str, Any]] = {
        **generators,
        "reward": {"engine": "fake", "admin_address": addresses["reward models"]},
        "reference": engine,
        "orchestrator": {"state_dir": str(folder / "runs"), **called},
    }
    for name in plan.services:
        common = {"address": addresses[name], "metrics_address": addresses[f"metrics of {name}"], "drain_seconds": 1.0}
        chosen[name] = {**chosen[name], **common, "threads": 1, **plan.settings.get(name, {})}
    return chosen


def _process(folder: Path, plan: WorldPlan, name: str, settings: Mapping[str, Any], recorder: Recorder) -> Process:
    """Return the process of a service, or the one that workers are forked from."""
    environment = thread_environment(1) | {"PYTHONFAULTHANDLER": "1", HISTORY_VARIABLE: str(recorder.path)}
    environment |= {**plan.environment, **plan.environments.get(name, {})}
    taken = plan.sabotage.get("worker" if name == WORKERS else name, ())
    options = [word for protection in taken for word in ("--sabotage", protection)]
    log_file, socket = folder / f"{name}.log", str(folder / SOCKET)
    if name == WORKERS:
        # Variables of its own may be such as count when a program starts: LD_PRELOAD does.
        loaded = "" if name in plan.environments else os.environ.get(LOADED_VARIABLE, "")
        module = "tests.reliability.fork_server"
        return Process(name, module, (socket, *taken), log_file, socket, environment, fork_socket=loaded)
    if name == "orchestrator" and plan.forks and plan.fork_workers:
        options += ["--fork-socket", socket]
    config = folder / f"{name}.toml"
    config.write_text(tomli_w.dumps(dict(settings)), encoding="utf-8")
    arguments, address = ("--config", str(config)), str(settings["address"])
    fork_socket = socket if plan.forks else ""
    module = f"tether_services.{'generator' if name == SECOND else name}"
    return Process(name, module, arguments, log_file, address, environment, options, fork_socket)


def run_toml(folder: Path, *, steps: int, extra: str = "") -> str:
    """Return the configuration of a run of 4 x 2 samples a step on the tiny model of a world."""
    return (
        f'model = "{folder / "policy"}"\nprompts = "{folder / "prompts.txt"}"\nevaluation = false\n'
        f"total_steps = {steps}\nprompts_per_step = 4\nresponses_per_prompt = 2\nmax_prompt_tokens = 8\n"
        f"max_response_tokens = 8\nseed = 5\n{extra}\n[ppo]\nepochs = 1\nminibatches = 2\n"
        "[trainer]\nlearning_rate = 0.01\nlora_rank = 4\n"
    )
