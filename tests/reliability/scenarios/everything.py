"""Everything at once: a run of many steps, every few seconds a fault of another kind, and no sample is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from random import Random
from typing import Final

from tests.reliability.proxy import Fault, Proxy
from tests.reliability.recording import dump_ledger
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios.killed_worker import PARTS, judge, run_whole
from tests.reliability.world import SERVICES, World, WorldPlan, open_world, run_toml
from tether.errors import TetherError
from tether.orchestrator import OrchestratorClient, Run
from tether_services.runtime.fault_points import PLAN_VARIABLE

PROXIED: Final = ("generator", "adapter", "reward", "reference")
SETTINGS: Final = {
    "generate_timeout_seconds": 2.0,
    "score_timeout_seconds": 2.0,
    "adapter_timeout_seconds": 4.0,
    "max_retries": 100,
    "retry_backoff_seconds": 0.1,
    "max_restarts": 100,
}
"""Patient, and quick to notice: a step takes tenths of a second here."""
PAUSE_STEPS: Final = (3, 12)
"""Committed between two faults, so that a fast machine meets as many as a slow one."""
STEP_SECONDS: Final = 0.4
"""Longer than a step takes."""
MET_SECONDS: Final = 5.0
MOST_ATTEMPTS: Final = 1000
STAND_STILL_SECONDS: Final = 90.0
ANSWER_SECONDS: Final = 5.0
"""Deadline of a question to the orchestrator, which may be dead or frozen."""

Strike = Callable[[], Awaitable[bool]]


@dataclass(slots=True)
class Faults:
    """Makes faults on the services of a run, one after the other."""

    world: World
    random: Random
    met: Counter[str] = field(default_factory=Counter)
    """By kind; only those that really happened."""
    committed: int = 0
    """Steps of the run, as far as is known."""
    slowest: float = 0.0
    """Seconds from the end of a fault to the next commit that is known of, at most."""
    ended: bool = False
    """The run has ended."""

    @property
    def kinds(self) -> dict[str, Strike]:
        """Return what can be done, by name."""
        killed: dict[str, Strike] = {f"{name} killed": self._killing(name) for name in SERVICES}
        stopped: dict[str, Strike] = {f"{name} stopped": self._stopping(name) for name in SERVICES}
        return {
            **killed,
            **stopped,
            "worker killed": self._kill_worker,
            "worker stopped": self._stop_worker,
            "answers dropped": self._drop_answers,
            "half-open": self._half_open,
            "one-way": self._one_way,
            "reset": self._reset,
            "slow": self._slow,
        }

    async def strike(self) -> None:
        """Make faults until the run has ended: every kind once, in a new order each time."""
        deck: list[str] = []
        while not self.ended:
            if not deck:
                deck = sorted(self.kinds)
                self.random.shuffle(deck)
            kind = deck.pop()
            await asyncio.sleep(self.random.uniform(0.0, STEP_SECONDS))  # somewhere in a step, not right after a commit
            if await self.kinds[kind]():
                self.met[kind] += 1
            over, before = time.monotonic(), self.committed
            await self._wait_for(before + 1)
            self.slowest = max(self.slowest, time.monotonic() - over)
            await self._wait_for(before + self.random.randint(*PAUSE_STEPS))

    async def _wait_for(self, steps: int) -> None:
        while self.committed < steps and not self.ended:
            await asyncio.sleep(0.05)

    def _killing(self, name: str) -> Strike:
        async def kill() -> bool:
            self.world.processes[name].kill()
            await self.world.processes[name].start()
            return True

        return kill

    def _stopping(self, name: str) -> Strike:
        async def stop() -> bool:
            return await self._freeze(self.world.processes[name].pid)

        return stop

    async def _kill_worker(self) -> bool:
        return self.world.kill_worker()

    async def _stop_worker(self) -> bool:
        worker = self.world.worker()
        return worker is not None and await self._freeze(worker)

    async def _freeze(self, pid: int) -> bool:
        try:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(self.random.uniform(1.0, 4.0))
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:  # a worker that has just ended
            return False
        return True

    async def _drop_answers(self) -> bool:
        return await self._break("dropped", down=Fault(drop=True))

    async def _half_open(self) -> bool:
        return await self._break("dropped", up=Fault(drop=True), down=Fault(drop=True))

    async def _reset(self) -> bool:
        fault = Fault(reset_at=self.random.randrange(1, 4000))
        return await self._break("cut", **{self.random.choice(("up", "down")): fault})

    async def _one_way(self) -> bool:
        """Hold one direction back for a while; nobody can tell from outside what waits."""
        proxy = self._choose()
        held, free = Fault(stall=True), Fault()
        up, down = self.random.choice(((held, free), (free, held)))
        proxy.set(up=up, down=down)
        await asyncio.sleep(self.random.uniform(1.0, 3.0))
        proxy.clear()
        return True

    async def _slow(self) -> bool:
        """Have every byte arrive late for a while, of whatever passes."""
        proxy, fault = self._choose(), Fault(latency_seconds=self.random.uniform(0.02, 0.2))
        proxy.set(up=fault, down=fault)
        await asyncio.sleep(self.random.uniform(1.0, 2.0))
        passed = proxy.passed("up")
        proxy.clear()
        return passed > 0

    def _choose(self) -> Proxy:
        return self.world.proxies[self.random.choice(PROXIED)]

    async def _break(self, event: str, *, up: Fault = Fault(), down: Fault = Fault()) -> bool:  # noqa: B008  frozen
        """Set faults until the proxy has met something and for a moment more; False if nothing passes there."""
        proxy, deadline = self._choose(), time.monotonic() + MET_SECONDS
        before = proxy.count(event)
        proxy.set(up=up, down=down)
        while proxy.count(event) == before and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.sleep(self.random.uniform(0.0, 1.0))
        proxy.clear()
        return proxy.count(event) > before


async def run_everything(trial: Trial) -> Outcome:
    """Bring a run to its end through all faults, and compare it with one that met none."""
    steps = trial.count(200, 2000)
    plan_file = trial.folder / "plan.json"
    plan_file.write_text("{}")
    environment = {PLAN_VARIABLE: str(plan_file)}
    plan = WorldPlan(models="tiny", proxied=PROXIED, settings={"orchestrator": SETTINGS}, environment=environment)
    async with open_world(trial.folder, plan) as world, world.orchestrator(timeout_seconds=ANSWER_SECONDS) as client:
        whole = await run_whole(world, client, steps)
        plan_file.write_text(json.dumps({"worker": draw_full_disks(trial.random)}))
        started, faults = time.monotonic(), Faults(world, trial.random)
        await client.start_run(PARTS, run_toml(world.folder, steps=steps))
        striking = asyncio.create_task(faults.strike())
        try:
            parts = await watch(world, client, faults)
        finally:
            faults.ended = True
            await striking
        seconds = time.monotonic() - started
        faults.met["disk full"] = count_full_disks(world)
        count = faults.met.total()
        figures = {
            "steps": steps,
            "faults": count,
            "seconds a fault": round(seconds / max(1, count), 1),
            "seconds to the next step at most": round(faults.slowest, 1),
            **dict(sorted(faults.met.items())),
            **count_samples(world),
        }
        missing = sorted(kind for kind in (*faults.kinds, "disk full") if not faults.met[kind])
        outcome = judge(world, (whole, parts), figures, [f"never met: {', '.join(missing)}"] if missing else [])
        counts = outcome.verdict.counts
        return Outcome(
            outcome.verdict,
            {**outcome.figures, "attempts": counts["attempt"] - 1, "repeated calls": counts["repeat"]},
            outcome.failures,
        )


def draw_full_disks(random: Random) -> dict[str, str]:
    """Return the plan by which each worker once finds its disk full in the middle of a checkpoint."""
    return {str(epoch): f"checkpoint.staged@{random.randint(2, 10)}=enospc" for epoch in range(1, MOST_ATTEMPTS)}


def count_full_disks(world: World) -> int:
    """Return how often a worker has waited for room on its disk."""
    return (world.state_dir / PARTS / "worker.log").read_text(encoding="utf-8").count('"waiting for room"')


async def watch(world: World, client: OrchestratorClient, faults: Faults) -> Run:
    """Return the run once it has ended; its orchestrator may be away at any time."""
    moved = time.monotonic()
    while time.monotonic() - moved < STAND_STILL_SECONDS:
        await asyncio.sleep(0.05)
        try:
            run = await world.recorder.observe(world.recorder.call("GetRun", ANSWER_SECONDS, client.get_run(PARTS)))
        except TetherError:  # recorded with its code and its time
            continue
        if run.ended:
            return run
        if run.committed_step_count != faults.committed:
            faults.committed, moved = run.committed_step_count, time.monotonic()
    raise AssertionError(f"the run stands still at step {faults.committed} since {STAND_STILL_SECONDS:g} s")


def count_samples(world: World) -> dict[str, int]:
    """Return how many samples of the run the ledger has in each state."""
    with closing(sqlite3.connect(f"file:{world.state_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as connection:
        query = "SELECT state, COUNT(*) FROM samples WHERE run_id = ? GROUP BY state ORDER BY state"
        return {f"samples {state}": count for state, count in connection.execute(query, (PARTS,))}


async def run_lossy(trial: Trial) -> Outcome:
    """Train a few steps, each of which loses a sample that nobody asks for."""
    plan = WorldPlan(models="tiny", sabotage={"worker": ["account"]})
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        run = await run_whole(world, client, 3)
        world.recorder.add(dump_ledger(world.state_dir, run))
        return Outcome(world.recorder.judge())


async def run(trial: Trial) -> Outcome:
    """Run the experiment or its control."""
    return await (run_lossy(trial) if trial.control else run_everything(trial))


SCENARIOS = [
    Scenario(
        name="R0 everything",
        title="a long run with a fault of any kind every few seconds",
        run=run,
        control="the account of samples in rollout and ledger",
        caught_as=frozenset({"I1"}),
        seconds=600,
        usual_seconds=120,
        long_seconds=7200,
    )
]
