"""A served orchestrator whose workers are real processes that follow a script instead of training."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.rpc.serving import LOCAL, Served, serving
from tests.unit.run_inputs import run_toml
from tether.orchestrator import OrchestratorClient, Run
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.engines.process import ProcessEngine
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt
from tether_services.orchestrator.service import OrchestratorService

WORKER = (sys.executable, str(Path(__file__).with_name("scripted_worker.py")))


@dataclass(frozen=True, slots=True)
class World:
    """A served orchestrator, a client of it, and a configuration that it accepts."""

    served: Served
    client: OrchestratorClient
    toml: str

    async def end_of(self, run_id: str) -> Run:
        """Return the run once it has ended."""
        while not (now := await self.client.get_run(run_id)).ended:
            await asyncio.sleep(0.02)
        return now

    async def started(self, run_id: str) -> None:
        """Start a run and wait until its worker has committed a step."""
        await self.client.start_run(run_id, self.toml)
        while (await self.client.get_run(run_id)).committed_step_count == 0:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def world(folder: Path, *, steps: int = 3, **changed: object) -> AsyncIterator[World]:
    settings = OrchestratorSettings.model_validate({**LOCAL, "state_dir": str(folder / "runs"), **changed})
    engine = ProcessEngine(settings, command=WORKER)
    toml = run_toml(folder).replace("total_steps = 3", f"total_steps = {steps}")
    async with (
        serving(settings, lambda registry: OrchestratorService(settings, registry, engine=engine)) as served,
        OrchestratorClient(served.target) as client,
    ):
        yield World(served, client, toml)


def left_running(folder: Path, run_id: str = "steps-1") -> Attempt:
    """Record a run as an orchestrator that was killed leaves it."""
    ledger = Ledger(folder / "runs")
    attempt = ledger.create_run(run_id, config_toml=run_toml(folder), total_steps=3)
    ledger.mark_running(attempt)
    ledger.close()
    return attempt
