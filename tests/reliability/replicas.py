"""Replicas of the reward service as processes, and a steady load on them that nobody repeats."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tomli_w

from tests.reliability.processes import Process, poll_until
from tests.reliability.questions import Questions
from tether.reward import RewardClient
from tether_services.local.ports import free_ports
from tether_services.runtime.threads import thread_environment

__all__ = ["Replica", "load", "read_metric", "start_replicas"]

CALL_SECONDS: Final = 20.0


@dataclass(slots=True)
class Replica:
    """One process of the reward service."""

    process: Process
    address: str
    """host:port of its service."""
    metrics_address: str

    async def drain(self, *, seconds: float = 30.0) -> None:
        """Send SIGTERM and wait until it has ended by itself, with status 0."""
        os.kill(self.process.pid, signal.SIGTERM)

        async def ended() -> bool:
            return not self.process.alive

        await poll_until(ended, seconds=seconds, what=f"{self.process.name} has drained")

    async def calls(self) -> float:
        """Return how many calls of Score it has answered."""
        return await asyncio.to_thread(
            read_metric, self.metrics_address, "tether_reward_request_seconds_count", "Score"
        )


def read_metric(address: str, name: str, label: str = "") -> float:
    """Return the sum of the samples of a family whose labels hold a word."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{")) and label in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def start_replicas(
    folder: Path, hosts: Sequence[str], settings: dict[str, Any], *, same_port: bool, sabotage: Sequence[str] = ()
) -> list[Replica]:
    """Return replicas, not started, one on each host; all at one port or each at its own."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(3 * len(hosts))
    replicas = []
    for number, host in enumerate(hosts):
        address = f"{host}:{ports[0] if same_port else ports[number]}"
        metrics, admin = (f"127.0.0.1:{ports[row * len(hosts) + number]}" for row in (1, 2))
        config, name = folder / f"reward{number}.toml", f"reward{number}"
        chosen = {**settings, "address": address, "metrics_address": metrics, "admin_address": admin, "threads": 1}
        config.write_text(tomli_w.dumps(chosen), encoding="utf-8")
        options = [word for protection in sabotage for word in ("--sabotage", protection)]
        process = Process(
            name,
            "tether_services.reward",
            ("--config", str(config)),
            folder / f"{name}.log",
            address,
            thread_environment(1),
            options,
        )
        replicas.append(Replica(process, address, metrics))
    return replicas


@dataclass(slots=True)
class Load:
    """A steady load."""

    running: set[asyncio.Task[Any]] = field(default_factory=set)
    in_flight_at: list[int] = field(default_factory=list)
    """Calls in flight at each moment that was noted."""

    def note(self) -> None:
        """Note how many calls are in flight now."""
        self.in_flight_at.append(len(self.running))


@asynccontextmanager
async def load(client: RewardClient, questions: Questions, *, per_second: float) -> AsyncIterator[Load]:
    """Ask on and on at a fixed rate whatever the answers are; the last calls are awaited at the end."""
    state, over = Load(), asyncio.Event()

    async def ask_on() -> None:
        began = time.monotonic()
        for number in itertools.count(1):
            if over.is_set():
                return
            task = asyncio.create_task(questions.score(client, deadline_seconds=CALL_SECONDS))
            state.running.add(task)
            task.add_done_callback(state.running.discard)
            await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))

    asking = asyncio.create_task(ask_on())
    try:
        yield state
    finally:
        over.set()
        await asking
        await asyncio.gather(*state.running)
