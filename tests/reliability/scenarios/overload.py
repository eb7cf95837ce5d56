"""R9: twice what the reward service can do, most of it from one caller; the others and the trainer notice little."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio

from tests.reliability.processes import Process
from tests.reliability.replicas import read_metric
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios.soak import PAGE_BYTES
from tests.reliability.world import World, WorldPlan, open_world
from tests.rpc.token_inputs import add_token
from tether.health import is_serving
from tether_services.bench.plan import CallerPlan, ItemPlan, LoadPlan
from tether_services.bench.report import CallerReport, LoadReport
from tether_services.bench.run import run_load

POLITE: Final = ("polite-a", "polite-b", "polite-c")
FLOODER, TRAINER = "flooder", "trainer"
ITEMS_PER_CALL: Final = 8
QUEUE_LIMIT: Final = 256
TRAINING_SHARE: Final = 0.5
POLITE_LOAD, TRAINER_LOAD, FLOOD = 0.8, 0.95, 10.0
"""What each caller asks for, as a part of its own fair share."""
SECONDS: Final = {False: 60.0, True: 300.0}
UNLOADED_SECONDS, CALIBRATION_SECONDS, CONTROL_SECONDS = 20.0, 4.0, 15.0
LEAST_OF_SHARE, LEAST_OF_RESERVED, MOST_SLOWER, MOST_REJECTION_SECONDS = 0.95, 0.9, 1.5, 0.05
MOST_GROWTH_BYTES: Final = 8e6
LOOK_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Crowd:
    """The callers and their tokens."""

    tokens: dict[str, str]

    def plan(self, world: World, rates: dict[str, float], seconds: float, *, seed: int) -> LoadPlan:
        """Return a load of some of them, in calls per second."""
        return LoadPlan(
            world.addresses["reward"],
            callers=tuple(CallerPlan(name, rate, self.tokens[name]) for name, rate in rates.items()),
            duration_seconds=seconds,
            concurrency=64 if any(rates.values()) else 8,
            seed=seed,
            items=ItemPlan(per_call=ITEMS_PER_CALL, min_tokens=32, max_tokens=32),
        )


def give_tokens(path: Path) -> Crowd:
    """Write the tokens file of the service."""
    tokens = {name: add_token(path, name=name) for name in (*POLITE, FLOODER)}
    return Crowd(tokens | {TRAINER: add_token(path, name=TRAINER, lane="training")})


async def run(trial: Trial) -> Outcome:
    """Measure what the service can do, then the callers without the flooder, then with it."""
    path = trial.folder / "tokens.toml"
    crowd = give_tokens(path)
    batch = {"max_items": 2, "queue_limit": QUEUE_LIMIT, "training_share": TRAINING_SHARE}
    settings = {"reward": {"tokens_file": str(path), "batch": batch}}
    taken = ["slow", *(["fairness"] if trial.control else [])]
    plan = WorldPlan(services=("reward",), settings=settings, sabotage={"reward": taken})
    seconds = CONTROL_SECONDS if trial.control else SECONDS[trial.long]
    async with open_world(trial.folder, plan) as world:
        seed = trial.random.randrange(10**6)
        alone = await run_load(crowd.plan(world, {TRAINER: 0.0}, CALIBRATION_SECONDS, seed=seed))
        capacity = alone.total.goodput  # calls per second
        rates = share_out(capacity)
        quiet = {name: rate for name, rate in rates.items() if name != FLOODER}
        unloaded = await run_load(crowd.plan(world, quiet, min(UNLOADED_SECONDS, seconds), seed=seed))
        async with watching(world) as failed_looks:
            loaded = await run_load(crowd.plan(world, rates, seconds, seed=seed + 1))
        record(world, rates, unloaded, loaded)
        verdict = world.recorder.judge()
    failures = [f"{len(failed_looks)} health checks failed"] if failed_looks else []
    failures += [f"{report.total.num_wrong} wrong answers" for report in (unloaded, loaded) if report.total.num_wrong]
    if loaded.total.rate < 1.8 * capacity:
        failures.append(f"{loaded.total.rate:.0f} calls a second are no overload of {capacity:.0f}")
    return Outcome(verdict, describe(capacity, unloaded, loaded), failures)


def share_out(capacity: float) -> dict[str, float]:
    """Return the calls per second of each caller for a service that can do so many."""
    fair = capacity * (1.0 - TRAINING_SHARE) / (len(POLITE) + 1)
    polite = dict.fromkeys(POLITE, POLITE_LOAD * fair)
    return polite | {FLOODER: FLOOD * fair, TRAINER: TRAINER_LOAD * TRAINING_SHARE * capacity}


@asynccontextmanager
async def watching(world: World) -> AsyncIterator[list[int]]:
    """Look at health, queue and memory all the while; yield the looks at which health failed."""
    failed: list[int] = []

    async def look() -> None:
        number, metrics, process = 0, world.addresses["metrics of reward"], world.processes["reward"]
        async with grpc.aio.insecure_channel(world.addresses["reward"]) as channel:
            while True:
                number += 1
                if not await is_serving(channel):
                    failed.append(number)
                depth = await asyncio.to_thread(read_metric, metrics, "tether_reward_queue_lane_depth", "shared")
                world.recorder.record("bound", who="reward", what="the queue", got=depth, most=QUEUE_LIMIT)
                held = {"value": resident_bytes(process), "bound": MOST_GROWTH_BYTES}
                world.recorder.record("resource", process="reward", name="bytes", **held)
                await asyncio.sleep(LOOK_SECONDS)

    looking = asyncio.create_task(look())
    try:
        yield failed
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def resident_bytes(process: Process) -> float:
    """Return the memory that a process holds."""
    return float(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE_BYTES


def record(world: World, rates: dict[str, float], unloaded: LoadReport, loaded: LoadReport) -> None:
    """Record what each caller got beside what it was promised.

    How late this process was itself in sending calls is allowed on top: it was kept from its processor for as long.
    """
    noise = loaded.generator.lag.p99_seconds if loaded.generator.lag else 0.0
    before = {caller.name: caller for caller in unloaded.callers}
    for caller in loaded.callers:
        if caller.name == FLOODER:
            continue
        reserved = caller.name == TRAINER
        least = LEAST_OF_RESERVED / TRAINER_LOAD if reserved else LEAST_OF_SHARE
        due = caller.num_offered
        line = {"got": caller.num_ok / due, "least": least, "what": "the calls that were due"}
        world.recorder.record("share", who=caller.name, **line)
        if not reserved:
            most = MOST_SLOWER * p95(before[caller.name]) + noise
            world.recorder.record("bound", who=caller.name, what="p95 in seconds", got=p95(caller), most=most)
    rejected = loaded.total.rejected_service_time
    if rejected is not None:
        line = {"got": rejected.p99_seconds, "most": MOST_REJECTION_SECONDS + noise}
        world.recorder.record("bound", who="rejections", what="p99 in seconds", **line)


def p95(caller: CallerReport) -> float:
    """Return the latency of a caller's answered calls, from when they were due; endless if none was."""
    return caller.ok_latency.p95_seconds if caller.ok_latency else float("inf")


def describe(capacity: float, unloaded: LoadReport, loaded: LoadReport) -> dict[str, object]:
    """Return the figures."""
    before = {caller.name: caller for caller in unloaded.callers}
    rejected = loaded.total.rejected_service_time
    figures: dict[str, object] = {
        "capacity": f"{capacity:.1f} calls/s",
        "offered": f"{loaded.total.rate / capacity:.2f} times that for {loaded.duration_seconds:.0f} s",
        "answered": f"{loaded.total.goodput:.1f} calls/s",
        "rejected": loaded.total.num_rejected,
        "rejections ms": f"p50 {1000 * rejected.p50_seconds:.1f}, p99 {1000 * rejected.p99_seconds:.1f}"
        if rejected
        else "",
        "late ms": round(1000 * loaded.generator.lag.p99_seconds, 1) if loaded.generator.lag else None,
    }
    for caller in loaded.callers:
        text = f"{caller.num_ok}/{caller.num_offered} answered"
        if caller.name in before:
            text += f", p95 {1000 * p95(caller):.0f} ms ({1000 * p95(before[caller.name]):.0f} without the flooder)"
        figures[caller.name] = text
    return figures


SCENARIOS = [
    Scenario(
        name="R9 overload",
        title="twice what the reward service can do: four callers, one at ten times its share, and a training run",
        run=run,
        control="the difference between callers",
        caught_as=frozenset({"I8"}),
        alone=True,
        seconds=240,
        usual_seconds=95,
        long_seconds=900,
    )
]
