"""Whole runs with the real worker process: real generator and reference engines, a real trainer, a few small steps."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.rpc.run_services import RunServices, run_services, small_run_toml, write_tiny_policy, write_word_prompts
from tests.rpc.serving import LOCAL, run, serving
from tether.orchestrator import OrchestratorClient, Run, StepEvent
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.service import OrchestratorService
from tether_services.orchestrator.step_metrics import OPTIONAL_METRICS, STEP_METRICS
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.fault_points import PLAN_VARIABLE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
DEMO = ROOT / "services" / "tether_services" / "demo"
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
        (found,) = [
            child for child in psutil.Process().children() if "orchestrator.worker" in " ".join(child.cmdline())
        ]
        return found


@asynccontextmanager
async def world(
    model: Path,
    state_dir: Path,
    *,
    reward_address: str = "",
    one_by_one: bool = False,
    quantization: str = "none",
    auto_resume: str = "after_crash",
) -> AsyncIterator[World]:
    async with run_services(model, state_dir, one_by_one=one_by_one, quantization=quantization) as services:
        changes = {"auto_resume": auto_resume} | ({"reward_address": reward_address} if reward_address else {})
        settings = services.settings.model_copy(update=changes)
        async with (
            serving(settings, lambda registry: OrchestratorService(settings, registry)) as served,
            OrchestratorClient(served.target) as client,
        ):
            yield World(services, client, state_dir)


def tiny_run(folder: Path, extra: str = "", *, steps: int = 3) -> tuple[Path, str]:
    """Return a tiny policy and the configuration of a run on it."""
    model, prompts = write_tiny_policy(folder / "policy"), write_word_prompts(folder / "prompts.txt")
    text = small_run_toml(model, prompts, extra).replace("total_steps = 3", f"total_steps = {steps}")
    return model, text


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


def test_a_killed_worker_is_reported_and_the_resumed_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=12)

    async def scenario() -> None:
        async with world(model, tmp_path / "runs", one_by_one=True, auto_resume="off") as w:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=14)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"worker": {}}))
    monkeypatch.setenv(PLAN_VARIABLE, str(plan))

    async def scenario() -> None:
        async with world(model, tmp_path / "runs", one_by_one=True) as w:
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


def test_a_service_that_dies_in_a_run_fails_it_by_name(tmp_path: Path) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=1000)

    async def scenario() -> None:
        async with world(model, tmp_path / "runs") as w:
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


def test_cancelling_stops_the_real_worker_after_its_step(tmp_path: Path) -> None:
    model, text = tiny_run(tmp_path, "evaluation = false", steps=1000)

    async def scenario() -> None:
        async with world(model, tmp_path / "runs") as w:
            await w.client.start_run("demo", text)
            await w.first_step("demo")
            await w.client.cancel_run("demo")
            _, end = await w.watch("demo")
            assert end.state == "cancelled"
            assert 1 <= end.committed_step_count < 1000
            assert w.report("demo")["state"] == "CANCELLED"

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


@pytest.mark.skipif(not STORIES.exists(), reason="../shared/models/stories260k is not there")
def test_a_run_on_a_real_story_model_that_ends_stories_with_token_one(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "".join(f"Once upon a time, there was a {w}\n" for w in ("cat", "dog", "boy", "girl", "bird", "fish"))
    )
    text = (
        f'model = "{STORIES}"\nprompts = "{prompts}"\nevaluation_count = 2\ntotal_steps = 2\nprompts_per_step = 4\n'
        "responses_per_prompt = 2\nmax_response_tokens = 24\n[ppo]\nepochs = 1\ntemperature = 0.7\n"
        "[trainer]\nlearning_rate = 1e-3\n"
    )

    async def scenario() -> None:
        settings = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "models": STORY_RULE})
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as reward,
            world(STORIES, tmp_path / "runs", reward_address=reward.target) as w,
        ):
            await w.client.start_run("stories", text)
            steps, end = await w.watch("stories")
            assert end.state == "succeeded", end.error
            assert abs(steps[0].metrics["kl_per_token"]) < 1e-4
            assert max(step.metrics["mean_abs_dlogp"] for step in steps) < 1e-3
            stops = json.loads((tmp_path / "runs" / "stories" / "services.json").read_text())["generator"]
            assert sorted(stops["stop_token_ids"]) == [1, 2]

    run(scenario(), timeout_seconds=SECONDS)


STORY_RULE = [
    {
        "name": "length",
        "tokenizer": str(STORIES),
        "components": [
            {
                "name": "length",
                "engine": "rules",
                "function": "tether_services.reward.rules:length_band",
                "arguments": {"low": 20, "high": 60},
            }
        ],
    }
]


@pytest.mark.parametrize("ends_text", [False, True])
def test_a_run_on_the_packaged_models_starts_its_critic_from_the_reward_model(ends_text: bool, tmp_path: Path) -> None:
    shutil.copytree(DEMO / "models", tmp_path / "models")
    policy, reward_model = tmp_path / "models" / "policy", tmp_path / "models" / "reward"
    scale = json.loads((reward_model / "tether_reward.json").read_text())
    (reward_model / "tether_reward.json").write_text(json.dumps(scale | {"ends_text": ends_text, "max_length": 40}))
    text = (
        f'model = "{policy}"\nreward_model = "{reward_model}"\nprompts = "{DEMO / "prompts.txt"}"\n'
        "evaluation_count = 8\ntotal_steps = 2\nprompts_per_step = 8\nresponses_per_prompt = 1\n"
        "max_response_tokens = 24\n[ppo]\nepochs = 1\n[trainer]\nlearning_rate = 1e-3\n"
    )

    async def scenario() -> None:
        settings = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "model": str(reward_model)})
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as reward,
            world(policy, tmp_path / "runs", reward_address=reward.target) as w,
        ):
            await w.client.start_run("demo", text)
            steps, end = await w.watch("demo")
            assert end.state == "succeeded", end.error
            assert max(step.metrics["mean_abs_dlogp"] for step in steps) < 1e-3
            assert abs(steps[0].metrics["value_mean"] - steps[0].metrics["score_mean"]) < 3.0
            assert len(w.report("demo")["after"]["samples"]) == 8

    run(scenario(), timeout_seconds=SECONDS)


def test_a_reward_model_that_reads_other_token_ids_than_the_policy_is_refused(tmp_path: Path) -> None:
    model, text = tiny_run(tmp_path)

    async def scenario() -> None:
        settings = RewardSettings.model_validate(
            {**LOCAL, "admin_address": "127.0.0.1:0", "model": str(DEMO / "models" / "reward")}
        )
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as reward,
            world(model, tmp_path / "runs", reward_address=reward.target) as w,
        ):
            await w.client.start_run("demo", text)
            steps, end = await w.watch("demo")
            assert (end.state, steps) == ("failed", [])
            assert "[TOKENIZER_MISMATCH]" in end.error and f"reward at {reward.target}" in end.error

    run(scenario(), timeout_seconds=SECONDS)


def test_the_settings_reach_the_worker_as_they_are(tmp_path: Path) -> None:
    settings = OrchestratorSettings(state_dir=str(tmp_path), concurrency=3, log_level="WARNING")
    assert OrchestratorSettings.model_validate_json(settings.model_dump_json()) == settings
