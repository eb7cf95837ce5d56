"""R13: hours of ordinary traffic, with callers that give up and deadlines that pass, and nothing grows."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Final

from tests.reliability.checker import read_history
from tests.reliability.processes import Process, poll_until
from tests.reliability.questions import Questions
from tests.reliability.replicas import read_metric
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import World, WorldPlan, open_world
from tether.errors import TetherError
from tether.reference import ReferenceClient
from tether.reward import RewardClient, ScoreItem

SERVICES: Final = ("reward", "reference")
SECONDS: Final = (180.0, 3600.0)
"""Of the short and the long form."""
CONTROL_SECONDS: Final = 45.0
PER_SECOND: Final = 60.0
CALL_SECONDS: Final = 10.0
ABORTED, EXPIRED = 0.1, 0.1
"""Shares of the calls whose callers leave, and whose deadline passes at once."""
ABORT_SECONDS: Final = (0.0, 0.004)
EXPIRED_SECONDS: Final = 0.0005
SAMPLE_SECONDS: Final = 1.0
BOUNDS: Final = {"bytes": 3e6, "descriptors": 6, "threads": 2, "tasks": 12}
"""How far each may be above its earlier level; the load itself moves the last three a little."""
LONG_BYTES: Final = 20e6
PAGE_BYTES: Final = 4096


async def run(trial: Trial) -> Outcome:
    """Send traffic and watch the processes; in the control each call leaves something behind."""
    seconds = CONTROL_SECONDS if trial.control else SECONDS[trial.long]
    plan = WorldPlan(services=SERVICES, sabotage={"reward": ["leak"]} if trial.control else {})
    bounds = BOUNDS | ({"bytes": LONG_BYTES} if trial.long else {})
    async with open_world(trial.folder, plan) as world:
        questions, ends = Questions(world.recorder, Random(trial.random.random())), Counter[str]()
        watching = asyncio.create_task(watch(world, bounds))
        try:
            await send(world, questions, ends, Random(trial.random.random()), seconds)
        finally:
            watching.cancel()
        await settle(world)
    failures = [f"{what} happened {ends[what]} times" for what in ("aborted", "expired") if ends[what] < seconds]
    figures = {
        "seconds": round(seconds),
        "calls": sum(ends.values()),
        "ends": ", ".join(f"{name} {count}" for name, count in ends.most_common()),
        **growth(world),
    }
    return Outcome(questions.judge(), figures, failures)


async def send(world: World, questions: Questions, ends: Counter[str], random: Random, seconds: float) -> None:
    """Send calls of all kinds at a fixed rate."""
    running: set[asyncio.Task[None]] = set()
    began = time.monotonic()
    async with RewardClient(world.target("reward")) as reward, ReferenceClient(world.target("reference")) as reference:

        async def ask() -> None:
            kind = random.random()
            if kind < ABORTED:
                ends[await abort(reward, random)] += 1
            elif kind < ABORTED + EXPIRED:
                ends[await expire(reward)] += 1
            else:
                asked: Callable[[], Awaitable[object]] = random.choice(
                    (
                        lambda: questions.score(reward, deadline_seconds=CALL_SECONDS),
                        lambda: questions.logprobs(reference, deadline_seconds=CALL_SECONDS),
                        lambda: world.recorder.call("Compare", CALL_SECONDS, compare(reward)),
                        lambda: world.recorder.call("ListRewardModels", CALL_SECONDS, reward.list_reward_models()),
                    )
                )
                await asked()
                ends["answered"] += 1

        for number in itertools.count(1):
            if time.monotonic() - began > seconds:
                break
            task = asyncio.create_task(ask())
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(max(0.0, began + number / PER_SECOND - time.monotonic()))
        await asyncio.gather(*running)


async def compare(client: RewardClient) -> None:
    """Ask for a ranking."""
    await client.compare("Which one?", ["the first", "the second", "the third"], timeout_seconds=CALL_SECONDS)


async def abort(client: RewardClient, random: Random) -> str:
    """Begin a call of many items and leave it."""
    items = [ScoreItem("prompt", f"response {number}") for number in range(32)]
    call = asyncio.create_task(client.score(items, timeout_seconds=CALL_SECONDS))
    await asyncio.sleep(random.uniform(*ABORT_SECONDS))
    left = call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    return "aborted" if left else "answered before it was left"


async def expire(client: RewardClient) -> str:
    """Make a call whose deadline passes."""
    try:
        await client.score([ScoreItem("prompt", "response")], timeout_seconds=EXPIRED_SECONDS)
    except TetherError as error:
        return "expired" if error.code.name == "DEADLINE_EXCEEDED" else error.code.name
    return "answered in spite of its deadline"


async def watch(world: World, bounds: dict[str, float]) -> None:
    """Record what each process holds, again and again."""
    while True:
        for name in SERVICES:
            held = await asyncio.to_thread(measure, world, name)
            for resource, value in held.items():
                bound = bounds[resource]
                world.recorder.record("resource", process=name, name=resource, value=value, bound=bound)
        await asyncio.sleep(SAMPLE_SECONDS)


def measure(world: World, name: str) -> dict[str, float]:
    """Return what a process holds now, as the kernel and its own metrics say."""
    process: Process = world.processes[name]
    folder = Path(f"/proc/{process.pid}")
    resident = int((folder / "statm").read_text().split()[1]) * PAGE_BYTES
    threads = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("Threads:"))
    return {
        "bytes": float(resident),
        "descriptors": float(len(list((folder / "fd").iterdir()))),
        "threads": float(threads.split()[1]),
        "tasks": read_metric(world.addresses[f"metrics of {name}"], f"tether_{name}_tasks"),
    }


async def settle(world: World) -> None:
    """Wait until no call is in flight and nothing waits in a queue: what was left or expired is gone."""
    for name in SERVICES:
        for family in ("calls_in_flight", "queue_depth"):
            address = world.addresses[f"metrics of {name}"]

            async def is_empty(address: str = address, family: str = f"tether_{name}_{family}") -> bool:
                return await asyncio.to_thread(read_metric, address, family) == 0

            await poll_until(is_empty, seconds=10, what=f"{family} of {name} is 0")


def growth(world: World) -> dict[str, str]:
    """Return the first, the largest and the last amount of memory of each process."""
    lines = [line for line in read_history(world.recorder.path) if line["kind"] == "resource"]
    found = {}
    for name in SERVICES:
        values = [line["value"] / 1e6 for line in lines if (line["process"], line["name"]) == (name, "bytes")]
        found[f"{name} MB"] = f"{values[0]:.1f} to {values[-1]:.1f}, at most {max(values):.1f}"
    return found


SCENARIOS = [
    Scenario(
        name="R13 soak",
        title="ordinary traffic with a tenth of the calls left and a tenth expired; nothing grows",
        run=run,
        control="the end of what a call needs: each leaks 20 kB",
        caught_as=frozenset({"I9"}),
        seconds=400,
        usual_seconds=185,
        light=True,
        long_seconds=4000,
    )
]
