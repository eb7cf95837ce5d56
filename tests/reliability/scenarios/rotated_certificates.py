"""R14: the certificate of a service is replaced every few seconds under load; an invalid one shuts new callers out."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import grpc
import grpc.aio

from tests.reliability.recording import Recorder
from tests.reliability.replicas import read_metric, start_replicas
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.rpc.certificates import Pair, ServiceFiles, authority, service_files, trusting
from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.local.ports import free_ports
from tether_services.reward.engines.fake import fake_text_score

VALID, EXPIRED, FOREIGN = "valid", "expired", "of another authority"
PHASES: Final = (VALID, VALID, EXPIRED, VALID, FOREIGN, VALID, VALID)
ROTATION_SECONDS: Final = 5.0
SEEN_SECONDS: Final = 1.5
"""After a rotation the service may still show the one before: it looks at its files once a second."""
CALL_SECONDS: Final = 20.0
PAUSE_SECONDS: Final = 0.02
REFUSED_SECONDS: Final = 0.5
"""Between tries that are refused: gRPC writes a line to stderr for each."""
HANDSHAKERS, OLD_CALLERS = 3, 2


@dataclass(slots=True)
class Watch:
    """What happens when."""

    target: str
    recorder: Recorder
    phase: str = VALID
    settled_at: float = 0.0
    """Monotonic time from which only the certificate of the phase is shown."""
    over: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    shown: set[bytes] = field(default_factory=set)
    expiries: set[float] = field(default_factory=set)

    def judged_phase(self, sent: float) -> str:
        """Return the phase that a call belongs to that was sent then and has just ended; empty: to more than one."""
        return self.phase if sent >= self.settled_at else ""


def make_pair(kind: str) -> Pair:
    """Return a new certificate of a kind."""
    if kind == EXPIRED:
        return authority().sign(ends=-timedelta(hours=1))
    return authority("stranger").sign() if kind == FOREIGN else authority().sign()


async def run(trial: Trial) -> Outcome:
    """Rotate under load; the control never looks at its files again."""
    phases = (VALID, EXPIRED) if trial.control else PHASES * trial.count(1, 12)
    files = service_files(trial.folder, make_pair(VALID))
    [port] = free_ports(1)
    health = f"127.0.0.1:{port}"
    settings = {"engine": "fake", "tls": files.settings(), "health_address": health}
    sabotage = ["reload"] if trial.control else []
    [replica] = start_replicas(trial.folder, ["127.0.0.1"], settings, same_port=False, sabotage=sabotage)
    replica.process.address = health
    watch = Watch(replica.address, Recorder(trial.folder / "history.jsonl"))
    try:
        await replica.process.start()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(HANDSHAKERS):
                tasks.create_task(handshake_on(watch))
            for _ in range(OLD_CALLERS):
                tasks.create_task(call_on(watch))
            await rotate(watch, files, phases, replica.metrics_address)
            watch.over = True
    finally:
        replica.process.kill()
    invalid = [phase for phase in phases if phase != VALID]
    accepted = watch.counts["accepted while invalid"]
    watch.recorder.record(
        "bound", who="an invalid certificate", what="calls over new connections", got=accepted, most=0
    )
    failures = [] if len(watch.shown) >= len(phases) - len(invalid) else ["the rotation was not seen"]
    failures += [] if trial.control or watch.counts["refused while invalid"] else ["no call met an invalid certificate"]
    failures += [] if len(watch.expiries) > 1 else ["the metric of the expiry did not move"]
    figures = {"rotations": len(phases), **watch.counts, "certificates seen": len(watch.shown)}
    return Outcome(watch.recorder.judge(), figures, failures)


async def rotate(watch: Watch, files: ServiceFiles, phases: Sequence[str], metrics_address: str) -> None:
    """Put a new certificate in place every few seconds."""
    for phase in phases:
        watch.phase, watch.settled_at = phase, time.monotonic() + SEEN_SECONDS
        files.write(make_pair(phase))
        await asyncio.sleep(ROTATION_SECONDS)
        watch.shown.add(await asyncio.to_thread(show, watch.target))
        family = "tether_tls_certificate_expiry_timestamp_seconds"
        watch.expiries.add(await asyncio.to_thread(read_metric, metrics_address, family))


def show(target: str) -> bytes:
    """Return the certificate that a service shows, whoever signed it."""
    host, port = target.rsplit(":", 1)
    return ssl.get_server_certificate((host, int(port)), timeout=10).encode()


async def handshake_on(watch: Watch) -> None:
    """Call over a new connection each time."""
    while not watch.over:
        sent = time.monotonic()
        async with grpc.aio.secure_channel(watch.target, trusting()) as channel:
            code = await score(watch, channel)
        phase = watch.judged_phase(sent)
        if phase == VALID:
            confirm(watch, "over a new connection", code)
        elif phase:
            watch.counts["accepted while invalid" if code == "OK" else "refused while invalid"] += 1
        await asyncio.sleep(PAUSE_SECONDS if code == "OK" else REFUSED_SECONDS)


async def call_on(watch: Watch) -> None:
    """Call over one connection, which outlives every rotation."""
    async with grpc.aio.secure_channel(watch.target, trusting()) as channel:
        while not watch.over:
            confirm(watch, "over an old connection", await score(watch, channel))
            await asyncio.sleep(PAUSE_SECONDS)


def confirm(watch: Watch, how: str, code: str) -> None:
    """Record a call that had to be answered."""
    watch.counts[how] += 1
    intent = f"{how} {watch.counts[how]}"
    watch.recorder.record("wanted", intent=intent)
    watch.recorder.record(*(("acked",) if code == "OK" else ("refused",)), intent=intent)


async def score(watch: Watch, channel: grpc.aio.Channel) -> str:
    """Ask for a score and return the code; a wrong one is no OK."""
    item = reward_pb2.ScoreItem(prompt="Mia found a kitten.", response=" She smiled.")
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    try:
        call = stub.Score(reward_pb2.ScoreRequest(items=[item]), timeout=CALL_SECONDS)
        answer = await watch.recorder.call("Score", CALL_SECONDS, call)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK" if answer.scores[0].score == fake_text_score(item.prompt, item.response) else "WRONG"


SCENARIOS = [
    Scenario(
        name="R14 rotation",
        title="the certificate replaced every 5 s under calls over old and new connections; one expired, one foreign",
        run=run,
        control="the look at files that changed",
        caught_as=frozenset({"I8"}),
        seconds=120,
        usual_seconds=40,
    )
]
