"""A whole run whose reward service stops for a while and is then killed: it waits, and ends with the same bits."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.small_runs import World, assert_same, run_whole, tiny_run
from tests.rpc.run_services import run_services
from tests.rpc.serving import Served, run, serving
from tether.orchestrator import OrchestratorClient, StepEvent
from tether_services.local.ports import free_ports
from tether_services.local.supervision import Child, ChildSpec
from tether_services.orchestrator.engines.process import ProcessEngine
from tether_services.orchestrator.service import OrchestratorService

pytestmark = pytest.mark.slow

STOPPED_SECONDS = 6.0
SCORE_SECONDS = 1.0
"""Deadline of a call: three of them pass before the breaker opens."""


def reward_child(folder: Path, events: list[str]) -> Child:
    """Return a supervised fake reward service, not started."""
    address, metrics = (f"127.0.0.1:{port}" for port in free_ports(2))
    arguments = ("--set", "engine=fake", "--set", f"address={address}", "--set", f"metrics_address={metrics}")
    spec = ChildSpec("reward", "tether_services.reward", arguments, {}, address, folder / "reward.log")
    return Child(spec, report=events.append)


async def open_for(served: Served, *, is_open: bool) -> float:
    """Wait until the service shows the breaker of the reward service in a state, and return how long that took."""
    started = time.monotonic()
    while bool(served.value("tether_breaker_open", service="reward")) is not is_open:
        assert time.monotonic() - started < 30
        await asyncio.sleep(0.1)
    return time.monotonic() - started


def test_r5_a_run_whose_reward_service_is_stopped_and_killed_ends_with_the_same_bits(
    tmp_path: Path, forked_worker: tuple[str, ...]
) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=6)
    text = text.replace("[ppo]", '[failure]\non_missing = "fail"\n[ppo]', 1)
    events: list[str] = []

    async def scenario() -> None:
        child = reward_child(tmp_path, events)
        await child.start(timeout_seconds=60)
        try:
            async with run_services(model, tmp_path / "runs", one_by_one=True) as services:
                changes = {"reward_address": child.spec.address, "score_timeout_seconds": SCORE_SECONDS}
                settings = services.settings.model_copy(
                    update=changes | {"max_retries": 10, "retry_backoff_seconds": 0.2}
                )
                engine = ProcessEngine(settings, command=forked_worker)
                async with (
                    serving(
                        settings, lambda registry: OrchestratorService(settings, registry, engine=engine)
                    ) as served,
                    OrchestratorClient(served.target) as client,
                ):
                    w = World(services, client, tmp_path / "runs")
                    whole = await run_whole(w, text)
                    await client.start_run("parts", text)
                    await w.first_step("parts")
                    assert child.pid is not None
                    os.kill(child.pid, signal.SIGSTOP)
                    opened = await open_for(served, is_open=True)
                    assert opened < 10, "R5: at a deadline of 1 s instead of 5"
                    await asyncio.sleep(STOPPED_SECONDS - opened)
                    os.kill(child.pid, signal.SIGCONT)
                    assert await open_for(served, is_open=False) < 5
                    os.kill(child.pid, signal.SIGKILL)  # and once more, so that it has to be started again
                    parts, end = await w.watch("parts")
                    assert end.state == "succeeded", end.error
                    assert all(isinstance(step, StepEvent) for step in parts)
                    assert_same(w, whole, parts)
                    assert served.value("tether_samples_unaccounted") == 0
                    assert served.value("tether_breaker_open", service="reward") == 0
        finally:
            await child.stop(grace_seconds=2)
        assert child.num_restarts == 1

    run(scenario(), timeout_seconds=240)
