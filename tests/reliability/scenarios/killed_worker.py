"""R2: the process that trains is killed again and again, and the run ends with the bits of one that never was."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Final

from tests.reliability.checker import read_history
from tests.reliability.recording import Recorder, dump_ledger
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import World, WorldPlan, open_world, run_toml
from tether.orchestrator import OrchestratorClient, Run
from tether_services.runtime.fault_points import PLAN_VARIABLE, POINTS

WHOLE, PARTS = "whole", "parts"
KEEP_ALL: Final = "keep_checkpoints = 1000"
FIGURES: Final = ("score_mean", "policy_loss", "value_loss", "kl_per_sequence")
"""Of a step: what any other sample, score or gradient would change."""
ONCE: Final = ("lease.acquired", "run.steps_done", "run.reported")
"""Points to which an attempt comes once; to all others once a step."""
ATTEMPT_SECONDS: Final = 90.0
GIVEN_UP_STEPS: Final = 5
"""An attempt that begins so many steps has not come to its point, which is in its second at the latest."""


async def run_random(trial: Trial) -> Outcome:
    """Kill worker or orchestrator at random moments; the control lets samples depend on the process."""
    kills = 2 if trial.control else 30
    steps = kills * trial.count(2, 7)
    sabotage = {"worker": ["seeds"]} if trial.control else {}
    plan = WorldPlan(models="tiny", sabotage=sabotage, settings={"orchestrator": {"auto_resume": "off"}})
    return await compare(trial, plan, steps=steps, kills=kills)


async def run_unattended(trial: Trial) -> Outcome:
    """Kill worker or orchestrator; nobody resumes the run: it goes on by itself, in workers that are started anew."""
    kills = trial.count(2, 30)
    plan = WorldPlan(models="tiny", fork_workers=False)
    return await compare(trial, plan, steps=kills * trial.count(3, 7), kills=kills)


async def compare(trial: Trial, plan: WorldPlan, *, steps: int, kills: int) -> Outcome:
    """Return the verdict on a run that was killed so many times and one that never was."""
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        whole = await run_whole(world, client, steps)
        killed, seconds = await run_in_parts(world, client, steps, kills, trial.random)
        parts = await client.get_run(PARTS)
        figures = {**killed, "steps": steps, "seconds an attempt": round(seconds / (kills + 1), 1)}
        met = sum(killed.values())
        return judge(world, (whole, parts), figures, [] if met == kills else [f"{met} of {kills} kills were possible"])


async def run_whole(world: World, client: OrchestratorClient, steps: int) -> Run:
    """Return the run that nothing interrupts."""
    await client.start_run(WHOLE, run_toml(world.folder, steps=steps, extra=KEEP_ALL))
    run = await world.wait_for_end(client, WHOLE, seconds=ATTEMPT_SECONDS)
    assert run.state == "succeeded", run.error
    return run


async def run_in_parts(
    world: World, client: OrchestratorClient, steps: int, kills: int, random: Random
) -> tuple[Counter[str], float]:
    """Bring the same run to its end through so many kills, and return how many of each kind and the seconds it took."""
    started, killed = time.monotonic(), Counter[str]()
    await client.start_run(PARTS, run_toml(world.folder, steps=steps, extra=KEEP_ALL))
    for _ in range(kills):
        at_start = random.random() < 0.2  # else some way into a step
        committed = (await client.get_run(PARTS)).committed_step_count
        if not await reach_step(world, client, committed + (not at_start)):
            break
        await asyncio.sleep(random.uniform(0.0, 1.0 if at_start else 0.3))
        if random.random() < 0.2:
            world.processes["orchestrator"].kill()
            killed["orchestrator killed"] += 1
            await world.processes["orchestrator"].start()
        elif world.kill_worker():
            killed["worker killed"] += 1
        await resume(world, client)
    await world.wait_for_end(client, PARTS, seconds=ATTEMPT_SECONDS)
    return killed, time.monotonic() - started


async def reach_step(world: World, client: OrchestratorClient, steps: int) -> bool:
    """Wait until a worker runs and so many steps are committed; False if the run ends before."""
    deadline = time.monotonic() + ATTEMPT_SECONDS
    while time.monotonic() < deadline:
        run = await world.recorder.observe(client.get_run(PARTS))
        if run.ended:
            return False
        if run.committed_step_count >= steps and world.worker() is not None:
            return True
        await asyncio.sleep(0.02)
    raise AssertionError(f"{steps} steps were not committed within {ATTEMPT_SECONDS:g} s")


async def resume(world: World, client: OrchestratorClient) -> None:
    """Resume the run once its killed attempt is known to have failed, unless it goes on by itself."""
    if world.plan.settings.get("orchestrator", {}).get("auto_resume") != "off":
        return
    run = await world.wait_for_end(client, PARTS, seconds=20)
    if run.state == "failed":
        await client.resume_run(PARTS)


def judge(world: World, runs: tuple[Run, Run], figures: Mapping[str, object], failures: list[str]) -> Outcome:
    """Return the verdict on two runs that must be alike."""
    for run in runs:
        world.recorder.add(dump_ledger(world.state_dir, run))
        world.recorder.observe_states(world.state_dir / run.run_id, run=run.run_id, like=WHOLE)
        record_figures(world.recorder, world.state_dir, run.run_id)
        if run.state != "succeeded":
            failures.append(f"run {run.run_id} is {run.state}: {run.error}")
    verdict = world.recorder.judge()
    counted = {"samples": "generated", "commits": "committed", "states compared": "state"}
    counts = {name: verdict.counts[kind] for name, kind in counted.items()}
    return Outcome(verdict, {**figures, **counts}, failures)


def record_figures(recorder: Recorder, state_dir: Path, run_id: str) -> None:
    """Record the figures of every step as states."""
    with closing(sqlite3.connect(f"file:{state_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT step, metrics FROM steps WHERE run_id = ?", (run_id,)).fetchall()
    for step, metrics in rows:
        values = {name: json.loads(metrics)[name] for name in FIGURES}
        digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
        recorder.record("state", like=WHOLE, run=run_id, policy_version=step + 1, part="figures", sha256=digest)


async def run_points(trial: Trial) -> Outcome:
    """Kill the worker at every named point of the step, one attempt each.

    An attempt that does not come to its point is killed after a few steps more, so that the others are tried as well.
    The control commits before the checkpoint is in its place, and is killed in between.
    """
    points = ["commit.done"] if trial.control else list(POINTS["worker"])
    steps = 2 * len(points) + (4 if trial.control else 8)
    plan_file = trial.folder / "plan.json"
    plan_file.write_text(json.dumps({"worker": {str(n + 1): plan_entry(point) for n, point in enumerate(points)}}))
    settings = {"orchestrator": {"auto_resume": "off"}}
    sabotage = {"worker": ["order"]} if trial.control else {}
    environment = {PLAN_VARIABLE: str(plan_file)}
    plan = WorldPlan(models="tiny", settings=settings, sabotage=sabotage, environment=environment)
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        await client.start_run(PARTS, run_toml(world.folder, steps=steps, extra=KEEP_ALL))
        parts = await bring_to_end(world, client)
        plan_file.write_text("{}")
        whole = await run_whole(world, client, steps)
        missed = find_missed(world.recorder, points)
        failures = [f"no worker came to {', '.join(missed)}"] if missed else []
        figures = {"points": f"{len(points) - len(missed)}/{len(points)}", "steps": steps}
        return judge(world, (whole, parts), figures, failures)


def plan_entry(point: str) -> str:
    """Return where the attempt of a point is killed: there, or else well after it should have been there."""
    if point.startswith("run."):
        return f"{point}@1=kill"
    return f"{point}@{1 if point in ONCE else 2}=kill step.begun@{GIVEN_UP_STEPS}=kill"


def find_missed(recorder: Recorder, points: list[str]) -> list[str]:
    """Return the points at which no worker was killed; attempts and points are in the same order."""
    faults = [line for line in read_history(recorder.path) if line["kind"] == "fault"]
    met = {(line["index"], line["point"]) for line in faults if line["role"] == "worker"}
    return [point for number, point in enumerate(points) if (number + 1, point) not in met]


async def bring_to_end(world: World, client: OrchestratorClient) -> Run:
    """Return the run once it has succeeded or failed for good, resumed by hand where it is not on its own."""
    deadline = time.monotonic() + 4 * ATTEMPT_SECONDS
    while time.monotonic() < deadline:
        run = await world.wait_for_end(client, PARTS, seconds=4 * ATTEMPT_SECONDS)
        if "killed by signal 9" not in run.error:
            return run
        await client.resume_run(PARTS)
    raise AssertionError(f"run {PARTS} does not come to its end")


SCENARIOS = [
    Scenario(
        name="R2 random",
        title="worker and orchestrator killed at random moments, against a run that never was",
        run=run_random,
        control="seeds that depend on step and prompt alone",
        caught_as=frozenset({"I7"}),
        seconds=240,
        usual_seconds=45,
    ),
    Scenario(
        name="R2 unattended",
        title="the same without anybody who resumes, workers started anew",
        run=run_unattended,
        seconds=240,
        usual_seconds=30,
    ),
    Scenario(
        name="R2 points",
        title="the worker killed at every named point of the step",
        run=run_points,
        control="the order of checkpoint and commit",
        caught_as=frozenset({"I7"}),
        seconds=240,
        usual_seconds=30,
    ),
]
