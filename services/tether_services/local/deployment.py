"""The four services as supervised processes on one machine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import tomli_w

from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.local.ports import free_ports, is_free
from tether_services.local.supervision import HUNG_SECONDS, Child, ChildSpec, Report
from tether_services.runtime.threads import thread_environment

SERVICES: Final = ("generator", "reward", "reference", "orchestrator")
Engine = Literal["transformers", "vllm", "fake"]

DEMO_MODELS: Final = Path(__file__).parents[1] / "demo" / "models"
"""Folders `policy` and `reward`: small models that ship with the package."""
METRICS_PORTS: Final = (9101, 9102, 9103, 9104)
HTTP_PORTS: Final = (8051, 8052, 8053, 8054)
USUAL_PORTS: Final = (50051, 50061, 50052, 50062, 50053, 50054, *METRICS_PORTS, *HTTP_PORTS)
"""Defaults of services and clients: generator, adapter, reward, reward models, reference, orchestrator, then metrics
and HTTP."""
FOLDER: Final = "_services"
"""Folder of configurations, logs and pushed adapters in the state folder; no run can have this name."""
DRAIN_SECONDS: Final = 5.0
"""How long a service lets calls in flight finish; on one machine nobody waits for longer."""


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """What to start."""

    state_dir: Path = Path("runs")
    """Folder for runs, configurations and logs; made if missing."""
    engine: Engine = "transformers"
    """Engine of the generator. `fake` makes all of them fake: no models, deterministic answers."""
    model: str = str(DEMO_MODELS / "policy")
    """Folder or hub name of the policy and reference model."""
    reward_model: str = str(DEMO_MODELS / "reward")
    """Folder or hub name of the reward model."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """CPU threads to share out, 1 or more."""
    usual_ports: bool = False
    """Listen where the clients look by default, if all of those ports are free; else on any free ports."""
    deterministic: bool = False
    """No answer depends on what else is asked at the time, so that a run can be repeated bit by bit; slower."""
    start_seconds: float = 300.0
    """Longest start of a service."""
    stop_seconds: float = 15.0
    """From SIGTERM to SIGKILL."""
    hung_seconds: float = HUNG_SECONDS
    """A service that fails its liveness checks for this long is killed and started again."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further settings per service, stronger than those above."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the services listen, each as host:port."""

    generator: str
    adapter: str
    """The generator's admin port."""
    reward: str
    reward_models: str
    """The reward service's admin port."""
    reference: str
    orchestrator: str
    metrics: Mapping[str, str]
    """Prometheus endpoint of each service."""
    http: Mapping[str, str]
    """Where each service takes JSON over HTTP."""


class LocalDeployment:
    """Starts the four services, replaces one that dies or hangs, stops all at the end. An async context manager.

    The children do not outlive this process, whatever ends it.
    """

    def __init__(self, options: LocalOptions, *, report: Report) -> None:
        """Choose addresses and check the options.

        Args:
            options: What to start.
            report: Called with one line per event.

        Raises:
            InvalidArgumentError: An option is out of range.
        """
        _check_options(options)
        self.options = options
        self.addresses = _choose_addresses(usual=options.usual_ports)
        self._report = report
        self._children: dict[str, Child] = {}

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:  # also when interrupted: nothing may be left running
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    @property
    def pids(self) -> dict[str, int | None]:
        """Process id of each service; None while one is being restarted."""
        return {name: child.pid for name, child in self._children.items()}

    @property
    def log_folder(self) -> Path:
        """Folder with a log and a configuration per service."""
        return self.options.state_dir / FOLDER

    async def wait(self) -> None:
        """Wait until a service cannot be restarted.

        Raises:
            FailedPreconditionError: Always, in the end; names the service and holds its last log lines.
        """
        given_up = [child.given_up for child in self._children.values()]
        done, _others = await asyncio.wait(given_up, return_when=asyncio.FIRST_COMPLETED)
        raise FailedPreconditionError(done.pop().result(), reason="SERVICE_FAILED")

    async def _start(self) -> None:
        self.log_folder.mkdir(parents=True, exist_ok=True)
        for name, settings in service_settings(self.options, self.addresses).items():
            self._children[name] = Child(
                self._spec(name, settings), report=self._report, hung_seconds=self.options.hung_seconds
            )
        timeout = self.options.start_seconds
        starting = [asyncio.create_task(child.start(timeout_seconds=timeout)) for child in self._children.values()]
        try:
            await asyncio.gather(*starting)
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)

    async def _stop(self) -> None:
        """Stop the orchestrator first, so that no run sees the others disappear."""
        orchestrator = self._children.pop("orchestrator", None)
        others, self._children = self._children, {}
        grace = self.options.stop_seconds
        try:
            if orchestrator is not None:
                await orchestrator.stop(grace_seconds=grace)
        finally:
            await asyncio.gather(*(child.stop(grace_seconds=grace) for child in others.values()))

    def _spec(self, name: str, settings: Mapping[str, Any]) -> ChildSpec:
        config = self.log_folder / f"{name}.toml"
        config.write_text(tomli_w.dumps(settings), encoding="utf-8")
        return ChildSpec(
            name=name,
            module=f"tether_services.{name}",
            arguments=("--config", str(config)),
            environment=thread_environment(int(settings["threads"])),
            address=str(settings.get("health_address") or settings["address"]),
            log_file=self.log_folder / f"{name}.log",
        )


def service_settings(options: LocalOptions, addresses: Addresses) -> dict[str, dict[str, Any]]:
    """Return the settings of each service.

    The services work in turns with the trainer, so that the orchestrator gets all threads, and at the same time as each
    other, so that they share them.
    """
    share = max(1, options.threads // 4)
    # One numeric type for all that compute the policy, the trainer's default: log-probabilities must agree.
    model = {} if options.engine == "fake" else {"model": options.model, "dtype": "float32"}
    reward = {} if options.engine == "fake" else {"model": options.reward_model}
    engine = "fake" if options.engine == "fake" else "transformers"
    chosen: dict[str, dict[str, Any]] = {
        "generator": {
            "address": addresses.generator,
            "admin_address": addresses.adapter,
            "engine": options.engine,
            "threads": max(1, options.threads // 2),
            **model,
        },
        "reward": {
            "address": addresses.reward,
            "admin_address": addresses.reward_models,
            "state_dir": str(options.state_dir / FOLDER / "reward"),
            "engine": engine,
            "threads": share,
            **reward,
        },
        "reference": {"address": addresses.reference, "engine": engine, "threads": share, **model},
        "orchestrator": {
            "address": addresses.orchestrator,
            "state_dir": str(options.state_dir),
            "generator_address": addresses.generator,
            "adapter_address": addresses.adapter,
            "reward_address": addresses.reward,
            "reference_address": addresses.reference,
            "threads": options.threads,
        },
    }
    for name, settings in chosen.items():
        settings |= {"metrics_address": addresses.metrics[name], "http_address": addresses.http[name]}
        settings |= {"drain_seconds": DRAIN_SECONDS}
        settings |= options.settings.get(name, {})
    _watch_apart(chosen)
    if options.deterministic:
        _separate_calls(chosen)
    # Kept, so that a generator that is started again serves what it did. Below FOLDER: a run may be named "adapters".
    stored = {"folder": str(options.state_dir / FOLDER / "adapters")}
    chosen["generator"]["adapters"] = stored | chosen["generator"].get("adapters", {})
    if "models" in chosen["reward"]:  # stands in for engine and model, and is refused beside them
        chosen["reward"] = {key: value for key, value in chosen["reward"].items() if key not in ("engine", "model")}
    return chosen


def _watch_apart(chosen: Mapping[str, dict[str, Any]]) -> None:
    """Give services with transport security a port for health: whoever watches over them has no credentials."""
    secured = [settings for settings in chosen.values() if "tls" in settings and "health_address" not in settings]
    for settings, port in zip(secured, free_ports(len(secured)) if secured else (), strict=True):
        settings["health_address"] = f"127.0.0.1:{port}"


def _separate_calls(chosen: Mapping[str, dict[str, Any]]) -> None:
    """Have all engines that compute in batches make a batch of one call alone.

    Raises:
        InvalidArgumentError: A setting contradicts that, or the generator's engine cannot do it.
    """
    if chosen["generator"]["engine"] == "vllm":
        message = (
            "vLLM computes whatever is in flight together, so that the last bits of a call depend on the others; take"
            " the transformers engine, or do without it."
        )
        raise InvalidArgumentError(message, field="deterministic", reason="INVALID_CONFIG")
    for name in ("generator", "reward", "reference"):
        batch = chosen[name].get("batch", {})
        if batch.get("mix_calls"):
            message = "batch.mix_calls = true contradicts it: leave that out."
            raise InvalidArgumentError(f"{name}: {message}", field="deterministic", reason="INVALID_CONFIG")
        # The fake engine computes each call on its own in any case; models of the reward service have others.
        if "models" in chosen[name] or chosen[name].get("engine") != "fake":
            chosen[name]["batch"] = {**batch, "mix_calls": False}


def _check_options(options: LocalOptions) -> None:
    if options.threads < 1:
        raise InvalidArgumentError(
            f"threads is {options.threads}; at least 1 is needed.", field="threads", reason="INVALID_CONFIG"
        )
    unknown = sorted(set(options.settings) - set(SERVICES))
    if unknown:
        raise InvalidArgumentError(
            f"There is no service {unknown[0]!r}; there are {', '.join(SERVICES)}.",
            field=f"settings.{unknown[0]}",
            reason="INVALID_CONFIG",
        )
    for name in ("address", "admin_address", "metrics_address", "http_address", "state_dir"):
        for service, settings in options.settings.items():
            if name in settings:
                raise InvalidArgumentError(
                    f"{name} is chosen by the local deployment; start the service with `tether serve` to set it.",
                    field=f"{service}.{name}",
                    reason="INVALID_CONFIG",
                )


def _choose_addresses(*, usual: bool) -> Addresses:
    ports = USUAL_PORTS if usual and all(is_free(port) for port in USUAL_PORTS) else free_ports(len(USUAL_PORTS))
    addresses = [f"127.0.0.1:{port}" for port in ports]
    own, others = addresses[: -2 * len(SERVICES)], addresses[-2 * len(SERVICES) :]
    metrics = dict(zip(SERVICES, others[: len(SERVICES)], strict=True))
    http = dict(zip(SERVICES, others[len(SERVICES) :], strict=True))
    generator, adapter, reward, reward_models, reference, orchestrator = own
    return Addresses(generator, adapter, reward, reward_models, reference, orchestrator, metrics, http)
