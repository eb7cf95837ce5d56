"""R3: the generator is killed in the middle of rollouts and of pushes: no batch mixes versions, no push is given up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import tomli_w

from tests.reliability.checker import read_history
from tests.reliability.processes import is_stopped, poll_until
from tests.reliability.recording import dump_ledger
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios.killed_worker import ATTEMPT_SECONDS, KEEP_ALL, PARTS, judge, run_whole
from tests.reliability.world import World, WorldPlan, open_world, run_toml
from tether.orchestrator import OrchestratorClient, Run
from tether_services.runtime.fault_points import PLAN_VARIABLE, POINTS

KILLS: Final = 30
TEMPORARY: Final = 5
"""Of these, the last ones meet a generator that keeps nothing over a restart."""
MOST_TRIES: Final = 3
RETRIES: Final = {"auto_resume": "off", "retry_backoff_seconds": 0.1, "max_retries": 60}
OCCURRENCES: Final = {"push.loaded": 4}
"""A restart loads up to three versions again before it serves; all others come first with the first push."""


async def run_killed(trial: Trial) -> Outcome:
    """Kill the generator at named points and at random moments of one run."""
    plan_file = trial.folder / "plan.json"
    plan_file.write_text("{}")
    steps = trial.count(50, 200)
    plan = WorldPlan(models="tiny", settings={"orchestrator": RETRIES}, environment={PLAN_VARIABLE: str(plan_file)})
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        whole = await run_whole(world, client, steps)
        killer = Killer(world, client, plan_file, trial.random)
        await client.start_run(PARTS, run_toml(world.folder, steps=steps, extra=KEEP_ALL))
        await killer.kill_all(draw_points(trial.random))
        parts = await world.wait_for_end(client, PARTS, seconds=2 * ATTEMPT_SECONDS)
        figures = {**killer.killed, "steps": steps, "most tries of a push": killer.tries.most}
        return judge(world, (whole, parts), figures, killer.find_failures())


def draw_points(random: Random) -> list[str]:
    """Return where each kill happens, in order: a point and its occurrence, or empty for a random moment."""
    points = [*POINTS["generator"], *POINTS["generator"], random.choice(POINTS["generator"])]
    entries = [f"{point}@{random.randint(1, OCCURRENCES.get(point, 2))}=kill" for point in points]
    drawn = entries + [""] * (KILLS - len(entries) - 1)
    random.shuffle(drawn)
    return ["", *drawn]  # the first one meets a generator that was started without a plan


@dataclass(slots=True)
class Killer:
    """Kills the generator of a run and starts it again at once."""

    world: World
    client: OrchestratorClient
    plan_file: Path
    random: Random
    killed: Counter[str] = field(default_factory=Counter)

    @property
    def tries(self) -> Tries:
        """Return the tries of every push of the run until now, as the generators counted them."""
        return count_tries(line for line in read_history(self.world.recorder.path) if line.get("run") == PARTS)

    async def kill_all(self, entries: list[str]) -> None:
        """Let one generator after the other be killed, until the run ends."""
        left = list(entries)
        entry = left.pop(0)
        while await (self._await_point() if entry else self._kill_at_random()):
            await self._note(entry)
            stored = len(left) > TEMPORARY
            if not left:
                self._start("", stored=stored)
                return
            entry = draw_next(left, self.tries.current)
            self._start(entry, stored=stored)

    def _start(self, entry: str, *, stored: bool) -> None:
        """Start the generator that the entry kills, with a folder of adapters that stays or one that does not."""
        generator = self.world.processes["generator"]
        self.plan_file.write_text(json.dumps({"generator": {str(generator.starts + 1): entry}}))
        set_stored(self.world, stored)
        generator.launch()

    async def _await_point(self) -> bool:
        """Wait until the generator has killed itself; False if the run ends before."""
        return await self._await(lambda run: not self.world.processes["generator"].alive)

    async def _kill_at_random(self) -> bool:
        """Kill some way into the next step; False if the run ends before."""
        before = (await self.client.get_run(PARTS)).committed_step_count
        pushed = self.random.random() < 0.6  # then the next thing is a rollout
        if not await self._await(lambda run: run.committed_step_count > before and is_pushed(run) >= pushed):
            return False
        await asyncio.sleep(self.random.uniform(0.0, 0.06 if pushed else 0.25))
        self.world.processes["generator"].kill()
        return True

    async def _await(self, is_so: Callable[[Run], bool]) -> bool:
        deadline = time.monotonic() + ATTEMPT_SECONDS
        while time.monotonic() < deadline:
            run = await self.world.recorder.observe(self.client.get_run(PARTS))
            if run.ended or is_so(run):
                return not run.ended
            await asyncio.sleep(0.02)
        raise AssertionError(f"the run stands still: {run}\n{self.world.processes['generator'].log_tail()}")

    async def _note(self, entry: str) -> None:
        """Count a kill and what it met: with a new store also a version that was pushed before is pushed again."""
        run = await self.client.get_run(PARTS)
        met_push = self.tries.current > 0 or not is_pushed(run)
        self.killed["killed at a point" if entry else "killed at random"] += 1
        self.killed["met by a push" if met_push else "met by a rollout"] += 1

    def find_failures(self) -> list[str]:
        """Return what was expected and is not so."""
        met = self.killed["killed at a point"] + self.killed["killed at random"]
        failures = [] if met == KILLS else [f"{met} of {KILLS} kills were possible"]
        if not 0 < self.tries.most <= MOST_TRIES:
            failures.append(f"a push took {self.tries.most} tries")
        lines = list(read_history(self.world.recorder.path))
        met = sum(line["kind"] == "fault" and line["role"] == "generator" for line in lines)
        if met != self.killed["killed at a point"]:
            failures.append(f"{met} generators killed themselves, {self.killed['killed at a point']} were counted")
        attempts = sum(line["kind"] == "attempt" and line["run"] == PARTS for line in lines)
        return failures if attempts == 1 else [*failures, f"the run took {attempts} attempts"]


@dataclass(frozen=True, slots=True)
class Tries:
    """How often a generator was begun to be sent a version."""

    most: int
    """Until it was active, of any version."""
    current: int
    """Of a version that is not active yet; 0 if there is none."""


def count_tries(lines: Iterable[Mapping[str, Any]]) -> Tries:
    """Return the tries in the history of one run.

    A version whose store is gone with its generator is sent again later: that is another push.
    """
    begun, most, active = Counter[int](), 0, 0
    for line in sorted(lines, key=lambda line: line.get("t", 0.0)):
        if line["kind"] == "pushing":
            begun[line["policy_version"]] += 1
            most = max(most, begun[line["policy_version"]])
        elif line["kind"] == "activated":
            active = line["policy_version"]
            begun[active] = 0
    return Tries(most, max((count for version, count in begun.items() if version >= active), default=0))


def draw_next(left: list[str], tries: int) -> str:
    """Take the next entry; after two kills in one push an entry that lets this push come to its end."""
    if tries < MOST_TRIES - 1:
        return left.pop(0)
    if "" in left:
        left.remove("")  # a random moment is waited for until another step is committed
        return ""
    point, _, occurrence = left.pop(0).partition("@")
    later = int(occurrence.removesuffix("=kill")) + OCCURRENCES.get(point, 2)
    return f"{point}@{later}=kill"


def is_pushed(run: Run) -> bool:
    """Return whether the generator serves what was committed last."""
    return run.policy_version == run.committed_step_count


def set_stored(world: World, stored: bool) -> None:
    """Have the next generator keep its adapters in the folder of the world, or in one that vanishes with it."""
    config = world.folder / "generator.toml"
    settings = tomllib.loads(config.read_text(encoding="utf-8"))
    settings["adapters"] = {"folder": str(world.folder / "adapters")} if stored else {}
    config.write_text(tomli_w.dumps(settings), encoding="utf-8")


async def run_unchecked(trial: Trial) -> Outcome:
    """Kill the generator between the prompts of a rollout that takes samples of whatever version answers."""
    plan_file = trial.folder / "plan.json"
    plan_file.write_text(json.dumps({"worker": {"1": "rollout.first_group@3=stop"}}))
    plan = WorldPlan(
        models="tiny",
        sabotage={"worker": ["versions"]},
        settings={"orchestrator": {**RETRIES, "concurrency": 1}},
        environment={PLAN_VARIABLE: str(plan_file)},
    )
    # A batch of mixed versions does not fit the trainer: this is another protection, and not the one that is out.
    text = run_toml(trial.folder, steps=4, extra=KEEP_ALL).replace("[ppo]\n", "[ppo]\nmismatch_limit = 1e9\n")
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        await client.start_run(PARTS, text)

        async def stopped() -> bool:
            worker = world.worker()
            return worker is not None and is_stopped(worker)

        await poll_until(stopped, seconds=ATTEMPT_SECONDS, what="the worker has its first group of the third step")
        worker = world.worker()
        assert worker is not None
        world.processes["generator"].kill()
        set_stored(world, False)
        await world.processes["generator"].start()
        os.kill(worker, signal.SIGCONT)
        run = await world.wait_for_end(client, PARTS, seconds=ATTEMPT_SECONDS)
        world.recorder.add(dump_ledger(world.state_dir, run))
        return Outcome(world.recorder.judge())


async def run(trial: Trial) -> Outcome:
    """Run the experiment or its control."""
    return await (run_unchecked(trial) if trial.control else run_killed(trial))


SCENARIOS = [
    Scenario(
        name="R3 generator",
        title="the generator killed in rollouts and pushes, with and without its stored adapters",
        run=run,
        control="the check of the version that made a sample",
        caught_as=frozenset({"I4"}),
        seconds=300,
        usual_seconds=50,
    )
]
