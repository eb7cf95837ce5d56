"""R1: reward and reference are killed under load: every call is answered in the end, and rightly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from statistics import quantiles
from typing import Final

import grpc
import grpc.aio

from tests.reliability.proxy import Fault
from tests.reliability.questions import Questions
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios.killed_worker import KEEP_ALL, PARTS, reach_step, run_whole
from tests.reliability.scenarios.killed_worker import judge as judge_runs
from tests.reliability.world import World, WorldPlan, open_world, run_toml
from tether.channel_options import channel_options
from tether.reference import ReferenceClient
from tether.reward import RewardClient
from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.local.supervision import FIRST_BACKOFF_SECONDS

SCORERS, REFERENCE_CALLERS = 32, 8
CALL_SECONDS: Final = 60.0
PAUSE_SECONDS: Final = (0.02, 0.2)
"""Between the calls of a caller."""
KILLED: Final = ("reward", "reference")
BUFFER: Final = "grpc.per_rpc_retry_buffer_size"
LARGE_CHARS: Final = 400_000
"""Of a request: above the 256 KiB that gRPC keeps for a repeat unless it is told otherwise."""


async def run_killed(trial: Trial) -> Outcome:
    """Kill both again and again, each on its own, and start them as a supervisor does; the control repeats nothing."""
    kills = 1 if trial.control else trial.count(3, 30)
    pause = (15.0, 25.0) if trial.long else (1.0, 2.0)
    async with open_world(trial.folder, WorldPlan(services=KILLED)) as world:
        questions = Questions(world.recorder, Random(trial.random.random()))
        began = time.monotonic()
        async with load(world, questions, retries=not trial.control):
            killers = (
                kill_again_and_again(world, name, Random(trial.random.random()), kills, pause) for name in KILLED
            )
            seconds = await asyncio.gather(*killers)
        return judge(questions, [second for each in seconds for second in each], time.monotonic() - began)


@asynccontextmanager
async def load(world: World, questions: Questions, *, retries: bool) -> AsyncIterator[None]:
    """Have all callers ask on and on; each asks its last question to the end."""
    over = asyncio.Event()
    async with (
        RewardClient(world.target("reward"), retries=retries) as reward,
        ReferenceClient(world.target("reference"), retries=retries) as reference,
        asyncio.TaskGroup() as callers,
    ):

        async def ask_scores() -> None:
            while not over.is_set():
                await questions.score(reward, deadline_seconds=CALL_SECONDS)
                await asyncio.sleep(questions.random.uniform(*PAUSE_SECONDS))

        async def ask_logprobs() -> None:
            while not over.is_set():
                await questions.logprobs(reference, deadline_seconds=CALL_SECONDS)
                await asyncio.sleep(questions.random.uniform(*PAUSE_SECONDS))

        for ask in (ask_scores,) * SCORERS + (ask_logprobs,) * REFERENCE_CALLERS:
            callers.create_task(ask())
        try:
            yield
        finally:
            over.set()


async def kill_again_and_again(
    world: World, name: str, random: Random, kills: int, pause: tuple[float, float]
) -> list[float]:
    """Kill a service so many times and return the seconds from each kill until it said that it serves again."""
    seconds = []
    for _ in range(kills):
        await asyncio.sleep(random.uniform(*pause))
        began = time.monotonic()
        world.processes[name].kill()
        await asyncio.sleep(FIRST_BACKOFF_SECONDS)
        await world.processes[name].start()
        seconds.append(time.monotonic() - began)
    await asyncio.sleep(min(pause))
    return seconds


def judge(questions: Questions, restarts: list[float], seconds: float) -> Outcome:
    """Return the verdict; every kill must have been noticed by some caller."""
    calls, restart = questions.answered, max(restarts)  # more than one in a hundred calls met the slowest one
    p99 = quantiles((call.seconds for call in calls), n=100)[98]
    waited = sum(call.seconds > 0.5 * min(restarts) for call in calls)
    failures = [] if waited >= len(restarts) else [f"only {waited} calls met a kill"]
    if p99 > 2 * restart:
        failures.append(f"p99 is {p99:.2f} s, twice the slowest restart is {2 * restart:.2f} s")
    figures = {
        "kills": len(restarts),
        "seconds of load": round(seconds, 1),
        "calls": len(calls),
        "codes": questions.codes(),
        "met a kill": waited,
        "restart s": f"{min(restarts):.2f} to {max(restarts):.2f}",
        "p99 s": round(p99, 2),
        "longest s": round(max(call.seconds for call in calls), 2),
    }
    return Outcome(questions.judge(), figures, failures)


async def run_large(trial: Trial) -> Outcome:
    """Reset the connection in the middle of large requests; gRPC repeats them, unless its buffer is too small."""
    calls = 2 if trial.control else trial.count(6, 60)
    settings = {"reward": {"max_text_chars": LARGE_CHARS}}
    plan = WorldPlan(services=("reward",), proxied=("reward",), settings=settings)
    options = [(name, value) for name, value in channel_options() if not (trial.control and name == BUFFER)]
    async with (
        open_world(trial.folder, plan) as world,
        grpc.aio.insecure_channel(world.target("reward"), options=options) as channel,
    ):
        await asyncio.wait_for(channel.channel_ready(), 10)
        for number in range(calls):
            world.proxies["reward"].set(up=Fault(reset_at=trial.random.randrange(1_000, LARGE_CHARS)))
            await score_large(world, channel, f"Score {number}")
        cut = world.proxies["reward"].count("cut")
    failures = [] if cut == calls else [f"{cut} of {calls} requests were cut"]
    return Outcome(world.recorder.judge(), {"requests cut": cut, "bytes of each": LARGE_CHARS}, failures)


async def score_large(world: World, channel: grpc.aio.Channel, intent: str) -> None:
    """Ask for the score of a long prompt, by gRPC alone."""
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(prompt="x" * LARGE_CHARS, response="y")])
    world.recorder.record("wanted", intent=intent)
    try:
        await world.recorder.call("Score", CALL_SECONDS, stub.Score(request, timeout=CALL_SECONDS))
    except grpc.aio.AioRpcError as error:
        world.recorder.record("refused", intent=intent, code=error.code().name, text=str(error.details())[:200])
    else:
        world.recorder.record("acked", intent=intent)


async def run_training(trial: Trial) -> Outcome:
    """Kill both in turn under a training run, which must end as one that met no kill."""
    kills = trial.count(2, 20)
    steps = kills * trial.count(5, 10)
    plan = WorldPlan(models="tiny", settings={"orchestrator": {"retry_backoff_seconds": 0.1, "max_retries": 100}})
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        whole = await run_whole(world, client, steps)
        await client.start_run(PARTS, run_toml(world.folder, steps=steps, extra=KEEP_ALL))
        met = 0
        for number in range(kills):
            committed = (await client.get_run(PARTS)).committed_step_count
            if not await reach_step(world, client, committed + 1):
                break
            await asyncio.sleep(trial.random.uniform(0.0, 0.2))
            world.processes[KILLED[number % 2]].kill()
            await asyncio.sleep(FIRST_BACKOFF_SECONDS)
            await world.processes[KILLED[number % 2]].start()
            met += 1
        parts = await world.wait_for_end(client, PARTS, seconds=120)
        failures = [] if met == kills else [f"{met} of {kills} kills were possible"]
        outcome = judge_runs(world, (whole, parts), {"kills": met, "steps": steps}, failures)
    repeats = outcome.verdict.counts["repeat"]
    if repeats < kills:
        outcome.failures.append(f"only {repeats} calls were repeated")
    return Outcome(outcome.verdict, {**outcome.figures, "calls repeated": repeats}, outcome.failures)


SCENARIOS = [
    Scenario(
        name="R1",
        title="reward and reference killed at random under 40 callers, started again at once",
        run=run_killed,
        control="the repeats of the client",
        caught_as=frozenset({"I2"}),
        seconds=120,
        long_seconds=1200,
    ),
    Scenario(
        name="R1 large",
        title="the connection reset in the middle of requests of 400 kB",
        run=run_large,
        control="the buffer in which gRPC keeps a request for a repeat",
        caught_as=frozenset({"I2"}),
        seconds=60,
    ),
    Scenario(
        name="R1 training",
        title="reward and reference killed under a training run, against one that met no kill",
        run=run_training,
        seconds=120,
    ),
]
