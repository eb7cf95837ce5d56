"""Whole runs whose worker or orchestrator is killed: they end with the same bits, or by name."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.small_runs import ROOT, SECONDS, World, assert_same, run_whole, tiny_run, world
from tests.rpc.run_services import run_services
from tests.rpc.serving import LOCAL, run
from tether.orchestrator import OrchestratorClient
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.runtime.fault_points import PLAN_VARIABLE

pytestmark = pytest.mark.slow


def test_a_killed_worker_is_reported_and_the_resumed_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, forked_worker: tuple[str, ...]
) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=12)

    async def scenario() -> None:
        async with world(model, tmp_path / "runs", one_by_one=True, worker=forked_worker, auto_resume="off") as w:
            whole = await run_whole(w, text)
            await w.client.start_run("parts", text)
            await w.first_step("parts")
            w.worker().kill()
            failed = (await w.watch("parts"))[1]
            assert failed.state == "failed"
            assert "killed by signal 9" in failed.error
            assert 1 <= failed.committed_step_count < 12
            await w.client.resume_run("parts")
            parts, end = await w.watch("parts")
            assert end.state == "succeeded", end.error
            assert w.report("parts")["attempts"] == 2
            assert_same(w, whole, parts)

    run(scenario(), timeout_seconds=SECONDS)


FAULTS = (
    "rollout.recorded@2=kill",
    "checkpoint.staged@2=kill",
    "checkpoint.renamed@2=kill",
    "commit.open@2=kill",
    "commit.done@2=kill",
    "push.recorded@2=kill",
    "retention.half@2=kill",
)
"""Of the attempts in turn. Each commits one step at least, so that the run comes to its end."""


def test_a_run_whose_workers_are_killed_at_every_side_of_a_commit_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_worker: tuple[str, ...]
) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=14)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"worker": {}}))
    monkeypatch.setenv(PLAN_VARIABLE, str(plan))

    async def scenario() -> None:
        async with world(model, tmp_path / "runs", one_by_one=True, worker=forked_worker) as w:
            whole = await run_whole(w, text)
            plan.write_text(json.dumps({"worker": {str(n): fault for n, fault in enumerate(FAULTS, start=1)}}))
            await w.client.start_run("parts", text)
            parts, end = await w.watch("parts")
            assert end.state == "succeeded", end.error
            assert w.report("parts")["attempts"] == len(FAULTS) + 1
            assert_same(w, whole, parts)
            left = [path.name for path in (tmp_path / "runs" / "parts" / "checkpoints").iterdir()]
            assert len(left) == 2 and not any(name.startswith(".") for name in left), left

    run(scenario(), timeout_seconds=SECONDS)


def test_a_worker_dies_with_a_killed_orchestrator(tmp_path: Path) -> None:
    _, text = tiny_run(tmp_path)
    settings = {**LOCAL, "state_dir": str(tmp_path / "runs"), "generator_address": "127.0.0.1:9"}
    (tmp_path / "orchestrator.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
    command = [sys.executable, "-m", "tether_services.orchestrator", "--config", str(tmp_path / "orchestrator.toml")]
    with (tmp_path / "log").open("wb") as log:
        service = subprocess.Popen(command, stderr=log, cwd=ROOT)

    async def scenario() -> None:
        address = await _address_in(tmp_path / "log")
        async with OrchestratorClient(address) as client:
            await client.start_run("demo", text)
            children: list[psutil.Process] = []
            while not children:
                children = psutil.Process(service.pid).children()
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)
            os.kill(service.pid, signal.SIGKILL)
            service.wait()
            gone, alive = psutil.wait_procs(children, timeout=10)
            assert len(gone) == 1 and not alive

    try:
        run(scenario(), timeout_seconds=60)
    finally:
        service.kill()
        service.wait()


@contextmanager
def orchestrator(
    settings: OrchestratorSettings, folder: Path, number: int
) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Yield the log and the process of an orchestrator of its own."""
    values = {k: v for k, v in settings.model_dump(mode="json", exclude_unset=True).items() if v is not None}
    config, log = folder / f"orchestrator-{number}.toml", folder / f"log-{number}"
    config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
    command = [sys.executable, "-m", "tether_services.orchestrator", "--config", str(config)]
    with log.open("wb") as output, subprocess.Popen(command, stderr=output, cwd=ROOT) as process:
        try:
            yield log, process
        finally:
            process.kill()


def test_a_run_goes_on_by_itself_after_its_orchestrator_was_killed_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=8)

    async def scenario() -> None:
        async with run_services(model, tmp_path / "runs", one_by_one=True) as services:
            with orchestrator(services.settings, tmp_path, 1) as (log, process):
                async with OrchestratorClient(await _address_in(log)) as client:
                    w = World(services, client, tmp_path / "runs")
                    whole = await run_whole(w, text)
                    await client.start_run("parts", text)
                    await w.first_step("parts")
                process.kill()
                process.wait()
            with orchestrator(services.settings, tmp_path, 2) as (log, process):
                async with OrchestratorClient(await _address_in(log)) as client:
                    w = World(services, client, tmp_path / "runs")
                    parts, end = await w.watch("parts")
                    assert end.state == "succeeded", end.error
                    assert {step.epoch for step in await client.list_steps("parts")} == {1, 2}
                    assert_same(w, whole, parts)

    run(scenario(), timeout_seconds=SECONDS)


async def _address_in(log: Path) -> str:
    """Return the address that a service's log names once it serves."""
    while '"serving"' not in log.read_text():
        await asyncio.sleep(0.05)
    lines = (json.loads(line) for line in log.read_text().splitlines())
    return next(f"127.0.0.1:{line['ports'][0]}" for line in lines if line["event"] == "listening")
