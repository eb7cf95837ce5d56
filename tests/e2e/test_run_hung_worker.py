"""A whole run whose worker hangs again and again, each time elsewhere: it is replaced, and the bits are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.small_runs import World, assert_same, run_whole, tiny_run
from tests.rpc.run_services import run_services
from tests.rpc.serving import run, serving
from tether.orchestrator import OrchestratorClient
from tether_services.orchestrator.engines.process import ProcessEngine
from tether_services.orchestrator.service import OrchestratorService
from tether_services.runtime.fault_points import PLAN_VARIABLE

pytestmark = pytest.mark.slow

HANGS = {
    "1": "rollout.first_group@3=hang",  # the event loop
    "2": "update.first_optimiser_step@2=hang",  # the trainer's thread, which the loop waits for
    "3": "lease.acquired@1=hang",  # at its start
}
QUICK = {
    "lease_seconds": 1.0,
    "hang_seconds": 10.0,
    "generate_timeout_seconds": 5.0,
    "score_timeout_seconds": 5.0,
    "adapter_timeout_seconds": 5.0,
}


def test_a_run_whose_worker_hangs_three_times_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_worker: tuple[str, ...]
) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=6)
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    monkeypatch.setenv(PLAN_VARIABLE, str(plan))

    async def scenario() -> None:
        async with run_services(model, tmp_path / "runs", one_by_one=True) as services:
            settings = services.settings.model_copy(update=QUICK)
            engine = ProcessEngine(settings, command=forked_worker)
            async with (
                serving(settings, lambda registry: OrchestratorService(settings, registry, engine=engine)) as served,
                OrchestratorClient(served.target) as client,
            ):
                w = World(services, client, tmp_path / "runs")
                whole = await run_whole(w, text)
                plan.write_text(json.dumps({"worker": HANGS}))
                await client.start_run("parts", text)
                parts, end = await w.watch("parts")
                assert end.state == "succeeded", end.error
                assert_same(w, whole, parts)
                assert w.report("parts")["attempts"] == 4
                assert w.log("parts").count("worker is stuck") == 2, "one hung before there was a heartbeat"
                assert served.value("tether_samples_unaccounted") == 0

    run(scenario(), timeout_seconds=300)
