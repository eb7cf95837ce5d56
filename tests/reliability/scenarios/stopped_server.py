"""R5: the reward server is stopped: calls end in time, the breaker opens, and all is well soon after it goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Final

import grpc
import grpc.aio

from tests.reliability.questions import Answered, Questions
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import World, WorldPlan, open_world
from tether.breaker import BREAKER_OPEN
from tether.reward import RewardClient
from tether.v1 import reward_pb2, reward_pb2_grpc

CALLERS: Final = 8
RECOVERY_SECONDS: Final = 5.0
ENDLESS_SECONDS: Final = 600.0
"""Deadline of the control: the longest that a service accepts."""


@dataclass(slots=True)
class Watched:
    """When what happened, in monotonic seconds."""

    stopped: float = 0.0
    resumed: float = 0.0
    opened: list[float] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)

    def change(self, is_open: bool) -> None:
        """Note that the breaker has opened or closed."""
        (self.opened if is_open else self.closed).append(time.monotonic())


async def run_stopped(trial: Trial) -> Outcome:
    """Stop the server under calls with a short deadline, and let it go on."""
    deadline, stop = (5.0, 30.0) if trial.long else (2.0, 8.0)
    async with open_world(trial.folder, WorldPlan(services=("reward",))) as world:
        if trial.control:
            return await call_without_deadline(world, deadline)
        questions, watched = Questions(world.recorder, Random(trial.random.random())), Watched()
        async with load(world, questions, watched, deadline):
            await asyncio.sleep(trial.random.uniform(0.5, 1.0))
            watched.stopped = time.monotonic()
            world.processes["reward"].stop()
            await asyncio.sleep(stop)
            watched.resumed = time.monotonic()
            world.processes["reward"].resume()
            await asyncio.sleep(RECOVERY_SECONDS if trial.long else 2.0)
        return judge(questions, watched, deadline)


@asynccontextmanager
async def load(world: World, questions: Questions, watched: Watched, deadline: float) -> AsyncIterator[None]:
    """Have callers ask on and on through one client with a breaker, as a run does."""
    over = asyncio.Event()
    async with (
        RewardClient(world.target("reward"), retries=False, breaker=True) as client,
        asyncio.TaskGroup() as callers,
    ):
        assert client.breaker is not None
        client.breaker.on_change = watched.change

        async def ask() -> None:
            while not over.is_set():
                await questions.score(client, deadline_seconds=deadline, must=False)
                await asyncio.sleep(questions.random.uniform(0.05, 0.15))

        for _ in range(CALLERS):
            callers.create_task(ask())
        try:
            yield
        finally:
            over.set()


def judge(questions: Questions, watched: Watched, deadline: float) -> Outcome:
    """Return the verdict; the stop must have been met."""
    met = [call for call in questions.answered if watched.stopped <= call.sent < watched.resumed]
    after = [call for call in questions.answered if call.sent >= watched.resumed]
    opened = min((t for t in watched.opened if t > watched.stopped), default=float("inf")) - watched.stopped
    recovered = min((call.sent + call.seconds for call in after if call.code == "OK"), default=float("inf"))
    recovery = recovered - watched.resumed
    late, refused = count(met, "DEADLINE_EXCEEDED"), sum(call.reason == BREAKER_OPEN for call in met)
    failures = [] if late >= 3 and refused else [f"{late} calls ran into the deadline, {refused} were refused"]
    if opened > 2 * deadline:
        failures.append(f"the breaker opened after {opened:.1f} s, allowed are {2 * deadline:g} s")
    if recovery > RECOVERY_SECONDS:
        failures.append(f"the first answer came {recovery:.1f} s after it went on, allowed are {RECOVERY_SECONDS:g} s")
    if ill := [call for call in questions.answered if call.sent > recovered + deadline and call.code != "OK"]:
        failures.append(f"{len(ill)} calls failed after the recovery, the first with {ill[0].code} {ill[0].reason}")
    figures = {
        "calls": questions.codes(),
        "while stopped": f"{late} late, {refused} refused at once",
        "longest s": f"{max(call.seconds for call in questions.answered):.2f} of {deadline:g}",
        "breaker open after s": round(opened, 2),
        "recovered after s": round(recovery, 2),
    }
    return Outcome(questions.judge(), figures, failures)


def count(calls: list[Answered], code: str) -> int:
    """Return how many calls ended in a way."""
    return sum(call.code == code for call in calls)


async def call_without_deadline(world: World, deadline: float) -> Outcome:
    """Call the stopped server on a channel without pings, with a deadline far above the one that is needed."""
    async with grpc.aio.insecure_channel(world.target("reward")) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        await asyncio.wait_for(channel.channel_ready(), 10)
        world.processes["reward"].stop()
        request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(prompt="a", response="b")])
        answer = world.recorder.call("Score", deadline, stub.Score(request, timeout=ENDLESS_SECONDS))
        call = asyncio.create_task(answer)
        await asyncio.sleep(deadline + 1.5)
        world.processes["reward"].resume()
        await asyncio.gather(call, return_exceptions=True)
    return Outcome(world.recorder.judge())


SCENARIOS = [
    Scenario(
        name="R5",
        title="the reward server stopped under calls with a deadline",
        run=run_stopped,
        control="deadline and pings",
        caught_as=frozenset({"I6"}),
        seconds=60,
        long_seconds=180,
    ),
]
