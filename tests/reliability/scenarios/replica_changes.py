"""R18: replicas come and go behind a name; new ones get their share soon, and no call is lost by those that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from random import Random
from typing import Final

from tests.reliability.dns_stub import DnsStub
from tests.reliability.questions import Questions
from tests.reliability.recording import Recorder
from tests.reliability.replicas import Replica, load, start_replicas
from tests.reliability.scenario import Outcome, Scenario, Trial
from tether.reward import RewardClient

PER_SECOND: Final = 50.0
AGE_SECONDS: Final = (3.0, 20.0)
"""max_connection_age_seconds of the short and the long form."""
JITTER: Final = 1.1
"""gRPC closes a connection up to a tenth later than at its age."""
SETTLED_SECONDS: Final = 2.5
"""Beyond that: a question to the name server follows another one after two seconds at the earliest."""
MEASURED_SECONDS: Final = 3.0
LEAST_SHARE: Final = 0.15
"""Of all calls, for each of four replicas."""
HOSTS: Final = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")


async def run(trial: Trial) -> Outcome:
    """Go from one replica to four and back to another one; the control never closes a connection by age."""
    age = AGE_SECONDS[trial.long]
    recorder = Recorder(trial.folder / "history.jsonl")
    questions = Questions(recorder, Random(trial.random.random()))
    settings = {"engine": "fake", "drain_seconds": 5.0, "drain_notice_seconds": 0.2}
    settings["max_connection_age_seconds"] = 3600.0 if trial.control else age
    replicas = start_replicas(trial.folder, HOSTS, settings, same_port=True)
    port = replicas[0].address.rpartition(":")[2]
    try:
        async with DnsStub() as names:
            names.addresses = HOSTS[:1]
            await replicas[0].process.start()
            target = f"dns://127.0.0.1:{names.port}/reward.tether.test:{port}"
            async with RewardClient(target, retries=False) as client, load(client, questions, per_second=PER_SECOND):
                shares = await add_replicas(recorder, names, replicas, settle_seconds=JITTER * age + SETTLED_SECONDS)
                if not trial.control:
                    await remove_replicas(names, replicas, settle_seconds=JITTER * age + SETTLED_SECONDS)
            asked = names.num_answers
    finally:
        for replica in replicas:
            replica.process.kill()
    figures = {
        "calls": len(questions.answered),
        "codes": questions.codes(),
        "shares of four": ", ".join(f"{share:.2f}" for share in shares),
        "questions to the name server": asked,
        "longest s": round(max(call.seconds for call in questions.answered), 2),
    }
    return Outcome(questions.judge(), figures)


async def add_replicas(
    recorder: Recorder, names: DnsStub, replicas: Sequence[Replica], *, settle_seconds: float
) -> list[float]:
    """Start the others, name them, and return each one's share of the calls once the connections have aged."""
    await asyncio.gather(*(replica.process.start() for replica in replicas[1:]))
    names.addresses = HOSTS
    await asyncio.sleep(settle_seconds)
    before = [await replica.calls() for replica in replicas]
    began = time.monotonic()
    await asyncio.sleep(MEASURED_SECONDS)
    got = [await replica.calls() - count for replica, count in zip(replicas, before, strict=True)]
    assert sum(got) > PER_SECOND * (time.monotonic() - began) / 2, f"too few calls to judge shares by: {got}"
    shares = [count / sum(got) for count in got]
    for replica, share in zip(replicas[1:], shares[1:], strict=True):
        recorder.record("share", who=replica.process.name, what="the calls", got=share, least=LEAST_SHARE)
    return shares


async def remove_replicas(names: DnsStub, replicas: Sequence[Replica], *, settle_seconds: float) -> None:
    """Take the first three out of the name one after the other, then end them, as Kubernetes does."""
    for number, replica in enumerate(replicas[:-1]):
        names.addresses = HOSTS[number + 1 :]
        await replica.drain()
        await asyncio.sleep(0.3)
    await asyncio.sleep(min(settle_seconds, SETTLED_SECONDS))


SCENARIOS = [
    Scenario(
        name="R18 replicas",
        title="the reward service goes from one replica to four and to another one, behind a name",
        run=run,
        control="the age at which connections are closed",
        caught_as=frozenset({"I8"}),
        seconds=120,
        usual_seconds=30,
    )
]
