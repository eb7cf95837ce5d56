"""R12: an update makes a bad policy; alarms take it back within a step, and the run goes on. Also by command."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from random import Random
from typing import Final

from tests.reliability.checker import read_history
from tests.reliability.recording import dump_ledger
from tests.reliability.sabotage import SPOILED_STEPS
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import World, WorldPlan, open_world, run_toml
from tether.orchestrator import OrchestratorClient, Run

RUN: Final = "spoiled"
BETWEEN_STEPS: Final = 4
"""Steps of which each has a chance to be spoiled, in turn."""
LAST_STEPS: Final = 6
"""After the last spoiled one; some of them are taken back by command."""
KL_MAX: Final = 5.0
"""Nats a response: far above what this run learns, far below what a spoiled policy says."""
SECONDS: Final = 90.0


async def run(trial: Trial) -> Outcome:
    """Spoil the update of a few steps, then take back two more by command; the control has no alarms."""
    faults = 1 if trial.control else trial.count(2, 30)
    spoiled = draw_steps(trial.random, faults)
    steps = faults * BETWEEN_STEPS + LAST_STEPS
    sabotage = {"worker": ["spoil", "alarms"] if trial.control else ["spoil"]}
    plan = WorldPlan(models="tiny", sabotage=sabotage, environment={SPOILED_STEPS: json.dumps(spoiled)})
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        alarms = f'{{ kl_max = {KL_MAX}, action = "rollback", max_rollbacks = {faults} }}'
        text = run_toml(world.folder, steps=steps, extra=f"keep_checkpoints = 6\nalarms = {alarms}").replace(
            "learning_rate = 0.01", "learning_rate = 0.001"
        )
        await client.start_run(RUN, text)
        seconds = SECONDS + 10.0 * faults
        if not trial.control:
            await take_back_by_command(world, client, after=steps - LAST_STEPS + 3, seconds=seconds)
        ended = await world.wait_for_end(client, RUN, seconds=seconds)
        world.recorder.add(dump_ledger(world.state_dir, ended))
        figures = count(world, ended)
        failures = [] if trial.control else find_failures(ended, figures, faults)
        return Outcome(world.recorder.judge(), figures, failures)


def draw_steps(random: Random, faults: int) -> list[int]:
    """Return the steps to spoil, one in each attempt: never the first, of which nothing could be taken back."""
    return [random.randrange(number * BETWEEN_STEPS + 1, (number + 1) * BETWEEN_STEPS) for number in range(faults)]


async def take_back_by_command(world: World, client: OrchestratorClient, *, after: int, seconds: float) -> None:
    """Take the last two steps back of a run that is under way."""
    deadline = time.monotonic() + seconds
    while (run := await world.recorder.observe(client.get_run(RUN))).committed_step_count < after and not run.ended:
        assert time.monotonic() < deadline, f"{after} steps were not committed within {seconds:g} s"
        await asyncio.sleep(0.02)
    await client.roll_back_run(RUN, to_step=run.committed_step_count - 2)


def count(world: World, run: Run) -> dict[str, object]:
    """Return what happened, as the history has it."""
    lines = list(read_history(world.recorder.path))
    kinds = Counter(line["kind"] for line in lines)
    by_alarm = [rollback for rollback in run.rollbacks if "alarm kl_max" in rollback.reason]
    return {
        "bad policies": kinds["spoiled"],
        "taken back by alarm": len(by_alarm),
        "most steps until then": max((back.from_step - back.to_step for back in by_alarm), default=0),
        "by command": len(run.rollbacks) - len(by_alarm),
        "commits": kinds["committed"],
        "steps": run.committed_step_count,
        "samples": kinds["generated"],
    }


def find_failures(run: Run, figures: dict[str, object], faults: int) -> list[str]:
    """Return what should have happened and did not."""
    wanted = {"bad policies": faults, "taken back by alarm": faults, "most steps until then": 1, "by command": 1}
    failures = [
        f"{name}: {figures[name]} instead of {number}" for name, number in wanted.items() if figures[name] != number
    ]
    return failures + ([] if run.state == "succeeded" else [f"run {RUN} is {run.state}: {run.error}"])


SCENARIOS = [
    Scenario(
        name="R12 rollback",
        title="updates that make a bad policy, and two good steps taken back by command",
        run=run,
        control="the alarms",
        caught_as=frozenset({"I5"}),
        seconds=90,
        usual_seconds=20,
    )
]
