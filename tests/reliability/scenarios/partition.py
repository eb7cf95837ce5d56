"""R6: the network between orchestrator and a service breaks; a worker that was replaced meanwhile changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from tests.reliability.checker import read_history
from tests.reliability.fork_server import OUT_OF_REACH
from tests.reliability.processes import is_stopped, poll_until
from tests.reliability.proxy import Fault
from tests.reliability.recording import dump_ledger
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import WORKERS, World, WorldPlan, open_world, run_toml
from tether.orchestrator import OrchestratorClient
from tether_services.runtime.fault_points import PLAN_VARIABLE

RUN: Final = "parted"
STALL: Final = Fault(stall=True)
DIRECTIONS: Final = {"both": (STALL, STALL), "answers lost": (Fault(), STALL), "requests lost": (STALL, Fault())}
"""What does not get through while the service is cut off: faults of the lanes up and down."""
HEALED_SECONDS: Final = 30.0
"""From the end of a partition to the next committed step."""
SHORT: Final = {
    "generate_timeout_seconds": 1.5,
    "score_timeout_seconds": 1.0,
    "adapter_timeout_seconds": 1.5,
    "lease_seconds": 1.0,
}
"""Orchestrator settings that scale with the partitions of the short form."""
KEPT_VERSIONS: Final = 16
KEEP_ALL: Final = "keep_checkpoints = 1000"
"""What a replaced worker was about to push is still there when it goes on: only its epoch tells that it is late."""
RETRIES: Final = {"retry_backoff_seconds": 0.1, "max_retries": 1000}


@dataclass(slots=True)
class Course:
    """A run that is cut off from its services."""

    world: World
    client: OrchestratorClient
    seconds: float
    """Of a partition."""
    healed: dict[str, float] = field(default_factory=dict)
    """Seconds from the end of each partition to the next committed step."""
    failures: list[str] = field(default_factory=list)

    async def committed(self) -> int:
        """Return how many steps are committed."""
        run = await self.world.recorder.observe(self.client.get_run(RUN))
        assert not run.ended, f"the run ended before all faults were met: {run.state} {run.error}"
        return run.committed_step_count

    async def reach(self, steps: int, *, seconds: float) -> float:
        """Wait until so many steps are committed, and return the seconds that took."""

        async def done() -> bool:
            return await self.committed() >= steps

        return await poll_until(done, seconds=seconds, what=f"{steps} steps are committed")

    def cut(self, name: str, direction: str) -> None:
        """Let nothing through to a service, or from it."""
        up, down = DIRECTIONS[direction]
        self.world.proxies[name].set(up=up, down=down)

    async def cut_off(self, name: str, direction: str) -> None:
        """Cut a service off, let it back, and wait for the next step."""
        self.cut(name, direction)
        before = await self.committed()
        await asyncio.sleep(self.seconds)
        after = await self.committed()
        self.world.proxies[name].clear()
        if after > before + 1:
            self.failures.append(f"{after - before} steps were committed without {name}")
        self.healed[f"{name} ({direction})"] = await self.reach(after + 1, seconds=HEALED_SECONDS)

    def workers(self) -> list[int]:
        """Return the processes that train."""
        services = {process.pid for process in self.world.processes.values() if process.alive}
        return [child for child in self.world.processes[WORKERS].children() if child not in services]


async def run_parted(trial: Trial) -> Outcome:
    """Cut every service off in turn; at last the worker is replaced while it waits for an answer to its push.

    In the control it is stopped right before a push, so that it has something to push when it goes on.
    """
    sabotage = {"orchestrator": [OUT_OF_REACH], "worker": [OUT_OF_REACH]}
    environment = {}
    if trial.control:
        sabotage["generator"] = ["epoch"]
        plan_file = trial.folder / "plan.json"
        plan_file.write_text(json.dumps({"worker": {"1": "push.begun@3=stop"}}))
        environment[PLAN_VARIABLE] = str(plan_file)
    settings: dict[str, dict[str, Any]] = {
        "orchestrator": {**RETRIES, **({} if trial.long else SHORT)},
        "generator": {"adapters": {"folder": str(trial.folder / "adapters"), "keep_versions": KEPT_VERSIONS}},
    }
    proxied = ("generator", "adapter", "reward", "reference")
    plan = WorldPlan(models="tiny", proxied=proxied, sabotage=sabotage, settings=settings, environment=environment)
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        course = Course(world, client, 60.0 if trial.long else 2.0)
        await client.start_run(RUN, run_toml(world.folder, steps=trial.count(40, 600), extra=KEEP_ALL))
        await course.reach(2, seconds=60)
        for name, direction in [] if trial.control else draw_partitions(trial.random, long=trial.long):
            await course.cut_off(name, direction)
        how = "stopped before its push" if trial.control else trial.random.choice(["both", "answers lost"])
        refusal = await replace_worker(course, how)
        if trial.control:
            return Outcome(world.recorder.judge(), {"replaced worker": refusal})
        run = await world.wait_for_end(client, RUN, seconds=120 if not trial.long else 1200)
        if run.state != "succeeded":
            course.failures.append(f"the run is {run.state}: {run.error}")
        world.recorder.add(dump_ledger(world.state_dir, run))
        verdict = world.recorder.judge()
    figures: dict[str, object] = {f"{name}: healed s": round(value, 1) for name, value in course.healed.items()}
    kinds = {"attempts": "attempt", "commits": "committed", "calls repeated": "repeat"}
    counts = {name: verdict.counts[kind] for name, kind in kinds.items()}
    return Outcome(verdict, {**figures, "replaced worker": refusal, **counts}, course.failures)


def draw_partitions(random: Random, *, long: bool) -> list[tuple[str, str]]:
    """Return which services are cut off and how: each once, and each way once; in the long form each in each way."""
    names, directions = ["generator", "reward", "reference"], list(DIRECTIONS)
    if long:
        return [(name, direction) for name in (*names, "adapter") for direction in directions]
    random.shuffle(names)
    return list(zip(names, directions, strict=True))


async def replace_worker(course: Course, how: str) -> str:
    """Stop a worker in a push until another one has taken over, and return how it ended then.

    Args:
        course: Of the run.
        how: A key of DIRECTIONS: the generator's adapters are cut off, and the worker is stopped while it waits for an
            answer; anything else: it stops by itself.
    """
    world = course.world
    if how in DIRECTIONS:
        course.cut("adapter", how)
        await poll_until(lambda: is_pushing(course), seconds=HEALED_SECONDS, what="a committed step waits for its push")
        [old] = course.workers()
        os.kill(old, signal.SIGSTOP)
    else:
        [old] = course.workers()

        async def stopped() -> bool:
            return is_stopped(old)

        await poll_until(stopped, seconds=HEALED_SECONDS, what="the worker stops before its push")
    attempts = count_attempts(world)

    async def replaced() -> bool:
        return count_attempts(world) > attempts

    await poll_until(replaced, seconds=4 * course.seconds + 60, what="another worker has taken over")
    before = await course.committed()
    world.proxies["adapter"].clear()
    course.healed[f"adapter ({how}, worker replaced)"] = await course.reach(before + 2, seconds=HEALED_SECONDS)
    os.kill(old, signal.SIGCONT)

    async def gone() -> bool:
        return old not in course.workers()

    await poll_until(gone, seconds=HEALED_SECONDS, what="the replaced worker has ended")
    refusal = find_refusal(world)
    if not refusal:
        course.failures.append("the replaced worker was not refused")
    return refusal


async def is_pushing(course: Course) -> bool:
    """Return whether the newest committed step is in use nowhere yet."""
    run = await course.world.recorder.observe(course.client.get_run(RUN))
    return run.committed_step_count > run.policy_version


def count_attempts(world: World) -> int:
    """Return how many workers have begun."""
    return sum(line["kind"] == "attempt" for line in read_history(world.recorder.path))


def find_refusal(world: World) -> str:
    """Return why a worker gave up as fenced off, by its log."""
    lines: list[dict[str, Any]] = []
    for text in (world.state_dir / RUN / "worker.log").read_text(encoding="utf-8").splitlines():
        if text.startswith("{") and '"fenced off"' in text:
            lines.append(json.loads(text))
    return str(lines[-1].get("error", "")) if lines else ""


SCENARIOS = [
    Scenario(
        name="R6",
        title="each service cut off in turn, and a worker replaced while it waits for its push",
        run=run_parted,
        control="the comparison of epochs in the generator",
        caught_as=frozenset({"I2"}),
        seconds=120,
        usual_seconds=22,
        long_seconds=3600,
    ),
]
