"""Whole small runs with the real worker process: real generator and reference engines, a real trainer."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.rpc.run_services import RunServices, run_services, small_run_toml, write_tiny_policy, write_word_prompts
from tests.rpc.serving import serving
from tether.orchestrator import OrchestratorClient, Run, StepEvent
from tether_services.orchestrator.engines.process import WORKER_COMMAND, ProcessEngine
from tether_services.orchestrator.service import OrchestratorService

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class World:
    """A served orchestrator with everything it calls."""

    services: RunServices
    client: OrchestratorClient
    state_dir: Path

    async def watch(self, run_id: str) -> tuple[list[StepEvent], Run]:
        """Return all steps and the end of a run."""
        events = [event async for event in self.client.watch_run(run_id)]
        end = events[-1]
        assert isinstance(end, Run)
        return [event for event in events if isinstance(event, StepEvent)], end

    async def first_step(self, run_id: str) -> None:
        """Wait until the run has committed a step."""
        async for event in self.client.watch_run(run_id):
            if isinstance(event, StepEvent):
                return
            assert not event.ended, event.error

    def report(self, run_id: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.state_dir / run_id / "report.json").read_text())
        return content

    def weights(self, run_id: str, version: int) -> bytes:
        """Return the weights of an adapter that a run has made."""
        return (self.state_dir / run_id / "adapters" / f"{version:06d}" / "adapter_model.safetensors").read_bytes()

    def samples(self, run_id: str) -> list[tuple[int, int, str, int, str, int]]:
        """Return the samples that a run was trained on; the file refuses to have one of them twice."""
        query = (
            "SELECT step, sample, prompt_sha256, policy_version, adapter_sha256, tokens FROM samples"
            " WHERE run_id = ? AND state = 'trained' ORDER BY step, sample"
        )
        with sqlite3.connect(self.state_dir / "ledger.sqlite") as connection:
            return connection.execute(query, (run_id,)).fetchall()

    def log(self, run_id: str) -> str:
        return (self.state_dir / run_id / "worker.log").read_text()

    def worker(self) -> psutil.Process:
        """Return the worker that runs now."""
        (found,) = [child for child in psutil.Process().children() if "--run-id" in child.cmdline()]
        return found


@asynccontextmanager
async def world(
    model: Path,
    state_dir: Path,
    *,
    worker: Sequence[str] = WORKER_COMMAND,
    one_by_one: bool = False,
    quantization: str = "none",
    **changes: object,
) -> AsyncIterator[World]:
    """Serve an orchestrator and all it calls; `changes` are of its settings."""
    async with run_services(model, state_dir, one_by_one=one_by_one, quantization=quantization) as services:
        settings = services.settings.model_copy(update=changes)
        engine = ProcessEngine(settings, command=worker)
        async with (
            serving(settings, lambda registry: OrchestratorService(settings, registry, engine=engine)) as served,
            OrchestratorClient(served.target) as client,
        ):
            yield World(services, client, state_dir)


def tiny_run(folder: Path, extra: str = "", *, steps: int = 3) -> tuple[Path, str]:
    """Return a tiny policy and the configuration of a run on it."""
    model, prompts = write_tiny_policy(folder / "policy"), write_word_prompts(folder / "prompts.txt")
    text = small_run_toml(model, prompts, extra).replace("total_steps = 3", f"total_steps = {steps}")
    return model, text


FIGURES = ("score_mean", "policy_loss", "value_loss", "kl_per_sequence")


async def run_whole(w: World, text: str) -> list[StepEvent]:
    """Return the steps of a run that nothing disturbs."""
    await w.client.start_run("whole", text)
    whole, end = await w.watch("whole")
    assert end.state == "succeeded", end.error
    return whole


def assert_same(w: World, whole: list[StepEvent], parts: list[StepEvent]) -> None:
    """Compare figures, samples and final weights of the two runs, bit for bit."""
    for figure in FIGURES:
        assert [s.metrics[figure] for s in parts] == [s.metrics[figure] for s in whole]
    assert w.weights("parts", len(whole)) == w.weights("whole", len(whole))
    assert w.samples("parts") == w.samples("whole")
