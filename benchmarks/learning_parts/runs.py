"""PPO runs through the four real services, each kept as one JSON file: a finished run is not run again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import tomllib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.learning_parts.evaluation import Evaluation, Judge
from tether import OrchestratorClient, Run
from tether.errors import FailedPreconditionError, TetherError
from tether_services.demo.demo import CONFIG, PROMPTS
from tether_services.local.deployment import DEMO_MODELS, LocalDeployment, LocalOptions
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.run_config import lay_over_defaults, parse_run_config
from tether_services.orchestrator.run_files import RunFiles
from tether_services.runtime.durable import write_text
from tether_services.runtime.settings import merge_overrides

__all__ = ["BASE_RESPONSES", "Job", "Options", "RunResult", "base_config", "job_config", "run_jobs"]

RUN_RESPONSES = 4
"""Responses per held-out prompt that a trained policy is judged by."""
BASE_RESPONSES = 32
"""Responses per held-out prompt of the starting policy, from which best-of-n is estimated."""


@dataclass(frozen=True, slots=True)
class Options:
    """What all studies have in common."""

    output: Path
    """Folder of results, tables and the services' state."""
    seeds: tuple[int, ...]
    steps: int
    """PPO steps of each run."""
    threads: int
    """CPU threads of each deployment."""
    parallel: int
    """Deployments at the same time, each with a run of its own."""
    overrides: tuple[str, ...] = ()
    """Further settings of every run, as key=value; weaker than those of a study."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run to be made."""

    label: str
    """Of the settings, in tables and plots."""
    seed: int
    settings: tuple[str, ...] = ()
    """Over demo.toml, as key=value."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run."""

    label: str
    seed: int
    config: Mapping[str, Any]
    steps: Sequence[Mapping[str, float]]
    """Metrics of each step, as in report.json."""
    evaluation: Evaluation
    """Of the last policy."""
    adapter: Path
    """Folder of the last policy's adapter."""
    wall_seconds: float

    def curve(self, metric: str) -> list[float]:
        """Return a metric over the steps.

        Raises:
            KeyError: A step lacks it.
        """
        return [step[metric] for step in self.steps]


def job_config(job: Job, options: Options) -> dict[str, Any]:
    """Return the configuration of a run: demo.toml, the options, the job.

    Raises:
        InvalidArgumentError: A setting is invalid, or not of the form key=value.
    """
    values = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    values |= {"model": str(DEMO_MODELS / "policy"), "reward_model": str(DEMO_MODELS / "reward")}
    values |= {"prompts": str(PROMPTS), "total_steps": options.steps, "seed": job.seed}
    values["trainer"]["threads"] = options.threads
    chosen: dict[str, Any] = {}
    merge_overrides(chosen, [*options.overrides, *job.settings])
    return lay_over_defaults(chosen, values)


def base_config(options: Options) -> RunConfig:
    """Return the configuration that says how the starting policy is sampled."""
    return parse_run_config(tomli_w.dumps(job_config(Job("base", 0), options)))


def result_name(label: str, config: Mapping[str, Any]) -> str:
    """Return the name of a result: equal for equal configurations; threads and the place of the files do not count."""
    told = {key: value for key, value in config.items() if key not in ("model", "reward_model", "prompts")}
    told["trainer"] = {key: value for key, value in config["trainer"].items() if key != "threads"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return f"{label}-seed-{config['seed']}-{digest}"


async def run_jobs(jobs: Sequence[Job], options: Options) -> tuple[Evaluation, list[RunResult]]:
    """Return the evaluation of the starting policy and the results of the jobs, after running those without one.

    Raises:
        FailedPreconditionError: Some runs failed; the others are kept.
    """
    laboratory = _Laboratory(jobs, options)
    await laboratory.work()
    base = Evaluation.from_json(json.loads(laboratory.base_file.read_text(encoding="utf-8")))
    return base, [read_result(file) for file in laboratory.files.values()]


class _Laboratory:
    """Brings jobs to their results on a few deployments."""

    def __init__(self, jobs: Sequence[Job], options: Options) -> None:
        self.options = options
        folder = options.output / "results"
        folder.mkdir(parents=True, exist_ok=True)
        self._configs = {job: job_config(job, options) for job in jobs}
        self.files = {job: folder / f"{result_name(job.label, config)}.json" for job, config in self._configs.items()}
        base = base_config(options)
        told = (base.ppo.temperature, base.max_response_tokens, base.evaluation_count)
        self.base_file = folder / f"base-{'-'.join(map(str, told))}.json"
        self._waiting = deque(job for job in jobs if not self.files[job].exists())
        self._total = len(self._waiting)
        self._failures: list[str] = []

    async def work(self) -> None:
        """Make every missing result."""
        num_deployments = min(self.options.parallel, len(self._waiting) + (not self.base_file.exists()))
        tasks = [asyncio.create_task(self._work_at(index)) for index in range(num_deployments)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._failures:
            raise FailedPreconditionError("; ".join(self._failures), reason="RUN_FAILED")

    async def _work_at(self, index: int) -> None:
        state_dir = self.options.output / f"services-{index}"
        services = LocalOptions(state_dir=state_dir, threads=self.options.threads)
        async with LocalDeployment(services, report=lambda _: None) as deployment:
            if index == 0 and not self.base_file.exists():
                await self._judge_base(deployment)
            while self._waiting:
                job = self._waiting.popleft()
                number = self._total - len(self._waiting)
                say(f"{number}/{self._total} {job.label} seed {job.seed}: started")
                await self._make(deployment, job, f"{number}/{self._total}")

    async def _judge_base(self, deployment: LocalDeployment) -> None:
        async with Judge(deployment.addresses, base_config(self.options)) as judge:
            evaluation = await judge.evaluate(num_responses=BASE_RESPONSES, policy_version=0)
        write_text(self.base_file, json.dumps(evaluation.to_json()))
        say(f"starting policy: score {evaluation.score_mean:+.2f}, {len(evaluation.responses)} responses")

    async def _make(self, deployment: LocalDeployment, job: Job, number: str) -> None:
        try:
            result = await run_job(deployment, job, self._configs[job])
        except TetherError as error:
            reasons = [
                error.message,
                *(f"{violation.field}: {violation.description}" for violation in error.violations),
            ]
            self._failures.append(f"{job.label} seed {job.seed}: {'; '.join(reasons)}")
            say(f"{number} {self._failures[-1]} (FAILED)")
            return
        write_result(self.files[job], result)
        judged = result.evaluation
        say(
            f"{number} {job.label} seed {job.seed}: score {judged.score_mean:+.2f},"
            f" KL {judged.kl_per_64_tokens:.2f} nats per 64 tokens, {result.wall_seconds:.0f} s"
        )


async def run_job(deployment: LocalDeployment, job: Job, config: Mapping[str, Any]) -> RunResult:
    """Return the result of a run that is made now.

    Raises:
        FailedPreconditionError: The run failed, or a service could not be kept running.
    """
    document = tomli_w.dumps(config)
    run_id = f"{result_name(job.label, config)}-{time.time_ns() // 1_000_000}"
    run = await _train(deployment, run_id, document)
    if run.state != "succeeded":
        raise FailedPreconditionError(f"{run_id} {run.state}: {run.error}", reason="RUN_FAILED")
    async with Judge(deployment.addresses, parse_run_config(document)) as judge:
        version = run.policy_version
        evaluation = await judge.evaluate(num_responses=RUN_RESPONSES, policy_version=version, run_id=run_id)
    files = RunFiles(Path(run.directory))
    report = json.loads((files.directory / "report.json").read_text(encoding="utf-8"))
    return RunResult(
        label=job.label,
        seed=job.seed,
        config=report["config"],
        steps=[step["metrics"] for step in report["steps"]],
        evaluation=evaluation,
        adapter=files.adapter(version).resolve(),
        wall_seconds=report["wall_seconds"],
    )


async def _train(deployment: LocalDeployment, run_id: str, document: str) -> Run:
    """Return the run once it has ended.

    Raises:
        FailedPreconditionError: A service could not be kept running.
    """
    async with OrchestratorClient(deployment.addresses.orchestrator) as client:
        await client.start_run(run_id, document)
        following = asyncio.create_task(_follow(client, run_id))
        failing = asyncio.create_task(deployment.wait())
        try:
            await asyncio.wait({following, failing}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                await failing
            return await following
        finally:
            for task in (following, failing):
                task.cancel()
            await asyncio.gather(following, failing, return_exceptions=True)


async def _follow(client: OrchestratorClient, run_id: str) -> Run:
    async for _ in client.watch_run(run_id):
        pass
    return await client.get_run(run_id)


def write_result(path: Path, result: RunResult) -> None:
    """Write a result whole or not at all."""
    content = {
        "label": result.label,
        "seed": result.seed,
        "wall_seconds": result.wall_seconds,
        "adapter": str(result.adapter),
        "config": dict(result.config),
        "steps": [dict(step) for step in result.steps],
        "evaluation": result.evaluation.to_json(),
    }
    write_text(path, json.dumps(content))


def read_result(path: Path) -> RunResult:
    """Return the result that `write_result` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"evaluation": Evaluation.from_json(content["evaluation"]), "adapter": Path(content["adapter"])}
    return RunResult(**content)


def say(text: str) -> None:
    """Print a line of progress with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
