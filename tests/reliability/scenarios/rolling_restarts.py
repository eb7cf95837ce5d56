"""R10: replicas are restarted in turn under a steady load, and no caller notices, though none repeats a call."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any, Final

from tests.reliability.questions import Questions
from tests.reliability.recording import Recorder
from tests.reliability.replicas import load, start_replicas
from tests.reliability.scenario import Outcome, Scenario, Trial
from tether.reward import RewardClient

PER_SECOND: Final = 50.0
RULE_SECONDS: Final = 0.015
"""Of each score, so that calls are in flight whenever a replica is told to end."""
SETTLED_SECONDS: Final = 1.5
"""From a replica that serves again to the next one: it is used again by then. A client tries to connect again after
1.2 s at the latest, its longest pause and a fifth."""
HOSTS: Final = ("127.0.0.1", "127.0.0.1")


def slow_model(seconds: float) -> list[dict[str, Any]]:
    """Return the `models` of a service whose scores are the fake engine's and take a while."""
    rule = {"engine": "rules", "function": "tests.reliability.slow_rule:judge", "arguments": {"seconds": seconds}}
    return [{"name": "slow", "components": [{"name": "rule", **rule}]}]


async def run(trial: Trial) -> Outcome:
    """Restart each of two replicas in turn; the control ends them without a drain."""
    restarts = 2 if trial.control else trial.count(10, 60)
    recorder = Recorder(trial.folder / "history.jsonl")
    questions = Questions(recorder, Random(trial.random.random()))
    settings = {"models": slow_model(RULE_SECONDS), "drain_seconds": 5.0, "drain_notice_seconds": 0.2}
    sabotage = ["drain"] if trial.control else []
    replicas = start_replicas(trial.folder, HOSTS, settings, same_port=False, sabotage=sabotage)
    statuses = []
    try:
        await asyncio.gather(*(replica.process.start() for replica in replicas))
        target = "ipv4:" + ",".join(replica.address for replica in replicas)
        async with (
            RewardClient(target, retries=False) as client,
            load(client, questions, per_second=PER_SECOND) as state,
        ):
            for number in range(restarts):
                await asyncio.sleep(SETTLED_SECONDS + trial.random.uniform(0.0, 0.1))
                replica = replicas[number % len(replicas)]
                state.note()
                await replica.drain()
                statuses.append(replica.process.exit_code)
                await replica.process.start()
            await asyncio.sleep(SETTLED_SECONDS)
    finally:
        for replica in replicas:
            replica.process.kill()
    met = sum(count > 0 for count in state.in_flight_at)
    failures = [] if 2 * met >= restarts else [f"only {met} of {restarts} restarts met a call in flight"]
    failures += [f"a replica ended with {status}" for status in statuses if status]
    figures = {
        "restarts": restarts,
        "calls": len(questions.answered),
        "codes": questions.codes(),
        "restarts that met calls in flight": met,
        "longest s": round(max(call.seconds for call in questions.answered), 2),
    }
    return Outcome(questions.judge(), figures, failures)


SCENARIOS = [
    Scenario(
        name="R10 rolling",
        title="two replicas of the reward service restarted in turn under 50 calls a second without repeats",
        run=run,
        control="the drain",
        caught_as=frozenset({"I2"}),
        seconds=120,
        usual_seconds=45,
    )
]
