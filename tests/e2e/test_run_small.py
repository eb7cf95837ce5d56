"""Whole runs with the real worker process: real generator and reference engines, a real trainer, a few small steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.e2e.small_runs import SECONDS, tiny_run, world
from tests.rpc.serving import run
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.step_metrics import OPTIONAL_METRICS, STEP_METRICS

pytestmark = pytest.mark.slow


def test_a_run_from_start_to_report(tmp_path: Path) -> None:
    model, text = tiny_run(tmp_path)

    async def scenario() -> None:
        async with world(model, tmp_path / "runs") as w:
            await w.client.start_run("demo", text)
            steps, end = await w.watch("demo")
            assert end.state == "succeeded", end.error
            assert [(s.step, s.policy_version) for s in steps] == [(0, 0), (1, 1), (2, 2)]
            assert (end.policy_version, end.committed_step_count) == (3, 3)
            assert abs(steps[0].metrics["kl_per_token"]) < 1e-5
            for step in steps:
                assert set(STEP_METRICS) - set(step.metrics) <= OPTIONAL_METRICS
                assert step.metrics["mean_abs_dlogp"] < 1e-3
                assert step.metrics["first_ratio_deviation"] == 0.0
                assert step.metrics["samples_generated"] == step.metrics["samples_trained"] == 8.0
            report = w.report("demo")
            assert report["versions_as_expected"] is True
            assert report["samples"] == report["samples"] | {"generated": 24, "trained": 24, "dropped": 0}
            assert report["mean_abs_dlogp_max"] < 1e-3
            assert abs(report["before"]["kl_per_response"]) < 1e-3
            assert report["after"]["policy_version"] == 3
            assert report["gain_in_sd"] is not None
            page = (tmp_path / "runs" / "demo" / "report.html").read_text()
            assert "<svg" in page and "held-out prompts" in page
            prompts = [sample["prompt"] for sample in report["before"]["samples"]]
            assert not any(prompt in w.log("demo") for prompt in prompts), "logs never hold prompts"

    run(scenario(), timeout_seconds=SECONDS)


def test_a_service_that_dies_in_a_run_fails_it_by_name(tmp_path: Path, forked_worker: tuple[str, ...]) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=1000)

    async def scenario() -> None:
        async with world(model, tmp_path / "runs", worker=forked_worker) as w:
            await w.client.start_run("demo", text)
            await w.first_step("demo")
            started = time.monotonic()
            await w.services.reward.runner.close()
            _, end = await w.watch("demo")
            assert end.state == "failed"
            assert f"reward at {w.services.reward.target}: UNAVAILABLE" in end.error
            assert time.monotonic() - started < 60
            assert w.report("demo")["error"] == end.error
            assert "run failed" in w.log("demo").splitlines()[-1]

    run(scenario(), timeout_seconds=SECONDS)


def test_cancelling_stops_the_real_worker_after_its_step(tmp_path: Path, forked_worker: tuple[str, ...]) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=1000)

    async def scenario() -> None:
        async with world(model, tmp_path / "runs", worker=forked_worker) as w:
            await w.client.start_run("demo", text)
            await w.first_step("demo")
            await w.client.cancel_run("demo")
            _, end = await w.watch("demo")
            assert end.state == "cancelled"
            assert 1 <= end.committed_step_count < 1000
            assert w.report("demo")["state"] == "CANCELLED"

    run(scenario(), timeout_seconds=SECONDS)


def test_the_settings_reach_the_worker_as_they_are(tmp_path: Path) -> None:
    settings = OrchestratorSettings(state_dir=str(tmp_path), concurrency=3, log_level="WARNING")
    assert OrchestratorSettings.model_validate_json(settings.model_dump_json()) == settings
