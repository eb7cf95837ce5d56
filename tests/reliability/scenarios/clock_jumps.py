"""R15: the time of day jumps by an hour and differs by a day between services, and no lease or deadline minds."""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.reliability.checker import read_history
from tests.reliability.clocks import Clock, compile_shim, find_obstacle, see_ahead
from tests.reliability.processes import Process, poll_until
from tests.reliability.recording import dump_ledger
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios.killed_worker import PARTS, judge, reach_step, run_whole
from tests.reliability.world import SOCKET, WORKERS, World, WorldPlan, open_world, run_toml
from tether.orchestrator import OrchestratorClient
from tether_services.orchestrator.config import OrchestratorSettings

HOUR: Final = 3600
SKEWS: Final = {"generator": 24 * HOUR, "reward": -24 * HOUR, "reference": 12 * HOUR, "rival": 24 * HOUR}
"""Against the machine's own clock, for good."""
JUMPS: Final = (HOUR, -HOUR, 0, HOUR)
"""Of orchestrator and worker, one after the other; the last one is not 0, so that both can be seen to have moved."""
FENCED: Final = 3
"""Exit status of a worker that somebody else's lease keeps out."""
SETTINGS: Final = {"lease_seconds": 5.0, "keep_checkpoint_hours": 0.5}


@dataclass(slots=True)
class Rivals:
    """Second workers of the attempt that runs: no clock may make them think that its lease is over."""

    world: World
    clock: Clock
    sabotage: tuple[str, ...]
    ended: Counter[str] = field(default_factory=Counter)

    async def send(self) -> bool:
        """Start one and return whether it took the lease; such a one is killed."""
        number = self.ended.total() + 1
        settings = OrchestratorSettings.model_validate(tomllib.loads(self._config.read_text(encoding="utf-8")))
        rival = Process(
            name="rival",
            module="tether_services.orchestrator.worker",
            arguments=(
                *("--settings", settings.model_dump_json(), "--run-id", PARTS, "--epoch", "1"),
                *("--parent-pid", str(self.world.processes[WORKERS].pid)),
            ),
            log_file=self.world.folder / f"rival-{number}.log",
            address="",
            environment={**self.world.processes["orchestrator"].environment, **self.clock.environment},
            launch_options=[word for name in self.sabotage for word in ("--sabotage", name)],
            fork_socket=str(self.world.folder / SOCKET),
        )
        before = count_attempts(self.world)
        rival.launch()

        async def decided() -> bool:
            return not rival.alive or count_attempts(self.world) > before

        await poll_until(decided, seconds=60, what="the second worker is refused or at work")
        took = count_attempts(self.world) > before
        if not took:
            await see_ahead(rival.log_file, SKEWS["rival"])
        refused = not took and rival.exit_code == FENCED
        rival.kill()
        self.ended["took the lease" if took else "refused" if refused else rival.log_tail()] += 1
        return took

    @property
    def _config(self) -> Path:
        return self.world.folder / "orchestrator.toml"


def count_attempts(world: World) -> int:
    """Return how many workers have got the lease of the run."""
    lines = read_history(world.recorder.path)
    return sum(line["kind"] == "attempt" and line["run"] == PARTS for line in lines)


async def run_jumps(trial: Trial) -> Outcome:
    """Move the clocks of orchestrator and worker under a run; at last kill the worker, which leaves a lease behind."""
    steps = trial.count(14, 200)
    clocks = {name: Clock(trial.folder / f"{name}.clock", compile_shim(trial.folder)) for name in (*SKEWS, "moved")}
    for name, clock in clocks.items():
        clock.set(SKEWS.get(name, 0))
    of_process = {name: clocks.get(name, clocks["moved"]).environment for name in (*SKEWS, WORKERS, "orchestrator")}
    sabotage = ("clock",) if trial.control else ()
    plan = WorldPlan(
        models="tiny",
        settings={"orchestrator": SETTINGS},
        environments=of_process,
        sabotage={"worker": sabotage},
    )
    async with open_world(trial.folder, plan) as world, world.orchestrator(timeout_seconds=5.0) as client:
        rivals = Rivals(world, clocks["rival"], sabotage)
        if trial.control:
            await client.start_run(PARTS, run_toml(world.folder, steps=steps))
            await jump(world, client, rivals, clocks["moved"], 0)
            run = await client.get_run(PARTS)
            world.recorder.add(dump_ledger(world.state_dir, run))
            return Outcome(world.recorder.judge())
        for name in ("generator", "reward", "reference"):
            await see_ahead(world.processes[name].log_file, SKEWS[name])
        whole = await run_whole(world, client, steps)
        await client.start_run(PARTS, run_toml(world.folder, steps=steps))
        for seconds in JUMPS:
            await jump(world, client, rivals, clocks["moved"], seconds)
        world.kill_worker()
        parts = await world.wait_for_end(client, PARTS, seconds=90)
        await see_ahead(world.processes["orchestrator"].log_file, JUMPS[-1])  # it has logged the end of the worker
        figures = {"steps": steps, "jumps": len(JUMPS), **{f"second workers {k}": n for k, n in rivals.ended.items()}}
        outcome = judge(world, (whole, parts), figures, [])
        return Outcome(outcome.verdict, outcome.figures, [*outcome.failures, *find_failures(world, rivals, outcome)])


async def jump(world: World, client: OrchestratorClient, rivals: Rivals, clock: Clock, seconds: int) -> None:
    """Move the clock while a step is under way, see that it moved, and let a second worker try."""
    run = await client.get_run(PARTS)
    assert await reach_step(world, client, run.committed_step_count + 1), "the run ended before its clock had jumped"
    clock.set(seconds)
    await rivals.send()
    await see_ahead(world.state_dir / PARTS / "worker.log", seconds)


def find_failures(world: World, rivals: Rivals, outcome: Outcome) -> list[str]:
    """Return what a clock may have done that no invariant names."""
    failures = []
    if rivals.ended["refused"] != len(JUMPS):
        failures.append(f"second workers: {dict(rivals.ended)}")
    if count_attempts(world) != 2:
        failures.append(f"{count_attempts(world)} attempts, one worker was killed")
    if outcome.verdict.counts["repeat"]:
        failures.append(f"{outcome.verdict.counts['repeat']} calls had to be repeated")
    return failures


SCENARIOS = [
    Scenario(
        name="R15 clocks",
        title="the time of day jumps by an hour under a run, and services are a day apart",
        run=run_jumps,
        control="the lease's own clock",
        caught_as=frozenset({"I2"}),
        seconds=180,
        usual_seconds=15,
        find_obstacle=find_obstacle,
    )
]
