"""Two generators, one of them killed or stopped in a push: no batch mixes versions, the next step comes soon."""

from __future__ import annotations

import asyncio
import json
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

import tomli_w

from tests.reliability.checker import read_history
from tests.reliability.processes import Process, is_stopped
from tests.reliability.recording import dump_ledger
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios.killed_worker import ATTEMPT_SECONDS, KEEP_ALL, PARTS, judge, run_whole
from tests.reliability.world import SECOND, SERVICES, World, WorldPlan, open_world, run_toml
from tether.orchestrator import OrchestratorClient
from tether_services.runtime.fault_points import PLAN_VARIABLE

GENERATORS: Final = ("generator", SECOND)
POINTS: Final = ("upload.chunk", "push.verified", "push.stored", "push.proven", "activate.persisted")
"""Each is reached once in a push, but `upload.chunk`: once for each of the two files."""
RETURN_SECONDS: Final = 30.0
"""Longest time from the return of a generator to the next step."""
POLL_SECONDS: Final = 0.02


async def run_faulty(trial: Trial) -> Outcome:
    """Kill and stop both generators in pushes of one run; the same run over one generator has the same bits."""
    faults, steps = trial.count(4, 40), trial.count(12, 120)
    plan_file = trial.folder / "plan.json"
    lives = draw_lives(trial.random, faults)
    plan_file.write_text(json.dumps({name: {"1": " ".join(lives[name].pop(0))} for name in GENERATORS}))
    plan = WorldPlan("tiny", (*SERVICES, SECOND), environment={PLAN_VARIABLE: str(plan_file)})
    async with open_world(trial.folder, plan) as world:
        keeper = Keeper(world, plan_file, lives, trial.random, trial.count(2, 40))
        async with world.orchestrator() as client:
            await client.start_run(PARTS, run_toml(world.folder, steps=steps, extra=KEEP_ALL))
            keeping = [asyncio.create_task(keeper.keep(client, name)) for name in GENERATORS]
            parts = await world.wait_for_end(client, PARTS, seconds=keeper.longest * faults + 2 * ATTEMPT_SECONDS)
            await asyncio.gather(*keeping)
        await use_one_generator(world)
        async with world.orchestrator() as client:
            whole = await run_whole(world, client, steps)
        slowest = round(max(keeper.seconds, default=0.0), 1)
        figures = {**keeper.met, "steps": steps, "slowest return to next step": f"{slowest} s"}
        return judge(world, (whole, parts), figures, keeper.find_failures(faults))


def draw_lives(random: Random, faults: int) -> dict[str, list[list[str]]]:
    """Return for each generator what happens in each of its processes: stops, at last a kill; then nothing more."""
    lives: dict[str, list[list[str]]] = {name: [[]] for name in GENERATORS}
    for number in range(faults):
        own = lives[random.choice(GENERATORS)]
        kill = number % 2 == 0
        own[-1].append(f"{draw_point(random, len(own[-1]) + 2)}={'kill' if kill else 'stop'}")
        if kill:
            own.append([])
    return lives


def draw_point(random: Random, push: int) -> str:
    """Return a point and the occurrence that falls into this push of the process; of an upload its first file."""
    point = random.choice(POINTS)
    return f"{point}@{2 * push - 1 if point == 'upload.chunk' else push}"


@dataclass(slots=True)
class Keeper:
    """Brings generators back that were killed or stopped, after a while."""

    world: World
    plan_file: Path
    lives: dict[str, list[list[str]]]
    """What is to happen in the processes that have not begun yet."""
    random: Random
    longest: float
    """Seconds for which a generator stays away at most."""
    away: set[str] = field(default_factory=set)
    met: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """From each return to the next committed step."""

    async def keep(self, client: OrchestratorClient, name: str) -> None:
        """Look after a generator until the run has ended."""
        process = self.world.processes[name]
        while not (run := await client.get_run(PARTS)).ended:
            if not is_away(process):
                await asyncio.sleep(POLL_SECONDS)
                continue
            killed = not process.alive
            self.met["kills" if killed else "stops"] += 1
            self.away.add(name)
            await asyncio.sleep(self.random.uniform(0.1, self.longest))
            if killed:
                await self._replace(name, process)
            else:
                process.resume()
            self.away.remove(name)
            await self._time_next_step(client, process, run.committed_step_count)

    async def _replace(self, name: str, process: Process) -> None:
        life = self.lives[name].pop(0)
        plan = json.loads(self.plan_file.read_text())
        self.plan_file.write_text(json.dumps({**plan, name: {str(process.starts + 1): " ".join(life)}}))
        await process.start()

    async def _time_next_step(self, client: OrchestratorClient, process: Process, committed: int) -> None:
        """Wait for a step that was not there when the generator was gone, from when no other one is away either.

        A generator that goes away again before is waited for by whoever brings it back, and not timed.
        """
        returned = time.monotonic()
        while not (run := await client.get_run(PARTS)).ended and run.committed_step_count <= committed:
            if is_away(process):
                return
            await asyncio.sleep(POLL_SECONDS)
            if self.away:
                returned = time.monotonic()
        self.seconds.append(time.monotonic() - returned)

    def find_failures(self, faults: int) -> list[str]:
        """Return what was expected and is not so."""
        met = self.met.total()
        failures = [] if met == faults else [f"{met} of {faults} faults were met"]
        late = [f"{seconds:.1f} s" for seconds in self.seconds if seconds > RETURN_SECONDS]
        if late:
            failures.append(f"the next step came {', '.join(late)} after the return of a generator")
        lines = [line for line in read_history(self.world.recorder.path) if line.get("run") == PARTS]
        attempts = sum(line["kind"] == "attempt" for line in lines)
        if attempts != 1:
            failures.append(f"the run took {attempts} attempts")
        active = Counter(line["generator"] for line in lines if line["kind"] == "activated" and line["policy_version"])
        if len(active) != len(GENERATORS):
            failures.append(f"adapters became active on {len(active)} generators")
        return failures


def is_away(process: Process) -> bool:
    """Return whether a process has ended or was stopped by a signal."""
    try:
        return is_stopped(process.pid)
    except AssertionError:  # it has ended
        return True


async def use_one_generator(world: World) -> None:
    """Start the orchestrator anew, with the first generator alone."""
    config = world.folder / "orchestrator.toml"
    settings = tomllib.loads(config.read_text(encoding="utf-8"))
    first = settings.pop("generators")[0]
    settings |= {"generator_address": first["address"], "adapter_address": first["adapter_address"]}
    config.write_text(tomli_w.dumps(settings), encoding="utf-8")
    world.processes["orchestrator"].kill()
    await world.processes["orchestrator"].start()


async def run_unprotected(trial: Trial) -> Outcome:
    """Let the second generator have each version a step late, and take its samples all the same."""
    plan = WorldPlan("tiny", (*SERVICES, SECOND), sabotage={"worker": ["versions", "barrier"]})
    # A batch of mixed versions does not fit the trainer: this is another protection, and not the one that is out.
    text = run_toml(trial.folder, steps=4, extra=KEEP_ALL).replace("[ppo]\n", "[ppo]\nmismatch_limit = 1e9\n")
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        await client.start_run(PARTS, text)
        run = await world.wait_for_end(client, PARTS, seconds=ATTEMPT_SECONDS)
        world.recorder.add(dump_ledger(world.state_dir, run))
        failures = [] if run.state == "succeeded" else [f"the run is {run.state}: {run.error}"]
        return Outcome(world.recorder.judge(), failures=failures)


async def run(trial: Trial) -> Outcome:
    """Run the experiment or its control."""
    return await (run_unprotected(trial) if trial.control else run_faulty(trial))


SCENARIOS = [
    Scenario(
        name="two generators",
        title="one of two generators killed or stopped in a push, against a run over one",
        run=run,
        control="the wait for all generators and the check of the version",
        caught_as=frozenset({"I4"}),
        seconds=180,
        usual_seconds=20,
        long_seconds=3600,
    )
]
