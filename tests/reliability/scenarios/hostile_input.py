"""R16: a hundred thousand hostile requests: each ends with a documented code, nothing breaks, leaks or is forged."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Final

import grpc
import grpc.aio

from tests.reliability.fuzz import CANARY, MOVED, UNKNOWN, HostileRequest, draw_request
from tests.reliability.http_fuzz import HttpConnection, draw_http_request
from tests.reliability.questions import Questions
from tests.reliability.recording import Recorder
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import World, WorldPlan, open_world
from tether.reward import RewardClient
from tether_services.local.ports import free_ports

REQUESTS: Final = (60_000, 1_000_000)
"""Of the short and the long form, over gRPC."""
HTTP_REQUESTS: Final = (40_000, 500_000)
"""The same over HTTP."""
STATUSES: Final = frozenset({200, 400, 401, 403, 404, 405, 408, 411, 413, 415, 417, 429, 431, 501, 503, 504, 505})
"""Of answers over HTTP; 500 stands for a defect. 501 and 505: a verb, an encoding or a version that HTTP has not."""
CONTROL_REQUESTS: Final = 2_000
CALLERS, HTTP_CALLERS = 32, 16
CALL_SECONDS: Final = 20.0
MOST_BYTES: Final = 512e6
"""That a service may ever hold."""
HTTP_MOVED: Final = ("changed", "any value")
"""Kinds in which what was a prompt may be a name, which an error tells its sender."""
FORGED: Final = "forged"
"""Part of what the injections try to put into logs and metrics."""
CONTROL_FLOOD_BYTES: Final = 40_000_000
OPTIONS: Final = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)]
"""Of the attacker's channels."""


async def run(trial: Trial) -> Outcome:
    """Send hostile requests beside an honest caller; the control has no limits on sizes and counts."""
    count = CONTROL_REQUESTS if trial.control else trial.count(*REQUESTS)
    [port] = free_ports(1)
    http = f"127.0.0.1:{port}"
    taken = {"reward": ["sizes"]} if trial.control else {}
    plan = WorldPlan(services=("reward",), sabotage=taken, settings={"reward": {"http_address": http}})
    async with open_world(trial.folder, plan) as world:
        series = await asyncio.to_thread(read_series, world)
        questions, seen = Questions(world.recorder, Random(trial.random.random())), Seen()
        async with honest_caller(world, questions):
            attacks = [attack(world, seen, Random(trial.random.random()), count // CALLERS) for _ in range(CALLERS)]
            if not trial.control:
                each = trial.count(*HTTP_REQUESTS) // HTTP_CALLERS
                attacks += [attack_http(http, seen, Random(trial.random.random()), each) for _ in range(HTTP_CALLERS)]
            await asyncio.gather(*attacks)
            if trial.control:
                await flood(world)
        held = read_peak_bytes(world.processes["reward"].pid)
        added = await asyncio.to_thread(read_series, world) - series
        log = world.processes["reward"].log_file
        leaks = find_leaks(log, "\n".join(sorted(await asyncio.to_thread(read_series, world))), seen.errors)
        world.recorder.record("bound", who="reward", what="memory in bytes", got=held, most=MOST_BYTES)
        failures = [*leaks, *seen.failures, *([f"new series: {sorted(added)[:3]}"] if added else [])]
        failures += [] if world.processes["reward"].alive else ["the service has ended"]
    figures = {
        "requests": sum(seen.codes.values()) + sum(seen.statuses.values()),
        "codes": ", ".join(f"{code} {number}" for code, number in seen.codes.most_common()),
        "kinds": ", ".join(f"{kind} {number}" for kind, number in seen.kinds.most_common()),
        "statuses": ", ".join(f"{status} {number}" for status, number in seen.statuses.most_common()),
        "honest calls": f"{len(questions.answered)} ({questions.codes()})",
        "most memory MB": round(held / 1e6),
    }
    return Outcome(questions.judge(), figures, failures)


class Seen:
    """What the attackers got."""

    def __init__(self) -> None:
        self.codes = Counter[str]()
        self.kinds = Counter[str]()
        self.statuses = Counter[int]()
        """Of answers over HTTP; 0 where the connection was closed instead."""
        self.errors: set[str] = set()
        self.failures: list[str] = []


async def attack(world: World, seen: Seen, random: Random, count: int) -> None:
    """Send so many requests, one after the other, over a connection of its own."""
    async with grpc.aio.insecure_channel(world.addresses["reward"], options=OPTIONS) as channel:
        for _ in range(count):
            await send(world.recorder, channel, draw_request(random), seen)


async def send(recorder: Recorder, channel: grpc.aio.Channel, request: HostileRequest, seen: Seen) -> None:
    """Send one and keep what came of it."""
    method: Callable[..., Awaitable[bytes]] = channel.unary_unary(request.method)
    call = method(request.body, timeout=CALL_SECONDS, metadata=request.metadata)
    seen.kinds[request.kind] += 1
    answer = call if request.kind == UNKNOWN else recorder.call(request.method, CALL_SECONDS, call)
    code = "OK"
    try:
        await answer
    except grpc.aio.AioRpcError as error:
        code = error.code().name
        if request.kind != MOVED:  # what was a prompt may be a model's name there, which an error tells its sender
            seen.errors.add(f"{error.details()} {error.trailing_metadata()}")
    seen.codes[code] += 1
    if request.kind == UNKNOWN and code not in ("UNIMPLEMENTED", "RESOURCE_EXHAUSTED"):  # the second: its metadata
        seen.failures.append(f"{request.method} ended with {code}")


async def attack_http(address: str, seen: Seen, random: Random, count: int) -> None:
    """Send so many HTTP requests, one after the other."""
    connection = HttpConnection(address)
    for _ in range(count):
        kind, request = draw_http_request(random)
        answer = await connection.send(request, seconds=CALL_SECONDS)
        seen.statuses[answer.status] += 1
        text = answer.body.decode("utf-8", "replace")
        if answer.status and answer.status not in STATUSES:
            seen.failures.append(f"{kind} over HTTP got {answer.status}: {text[:200]!r} for {request[:300]!r}")
        if answer.status not in (0, 200) and '"code":' not in text.replace('"code": ', '"code":'):
            seen.failures.append(f"{kind} over HTTP got {answer.status} without a code: {text[:200]!r}")
        if kind not in HTTP_MOVED:
            seen.errors.add(text if answer.status != 200 else "")
    connection.close()


async def flood(world: World) -> None:
    """Send empty elements without number; they cost the parser many times their size."""
    async with grpc.aio.insecure_channel(world.addresses["reward"], options=OPTIONS) as channel:
        method: Callable[..., Awaitable[bytes]] = channel.unary_unary("/tether.v1.RewardService/Score")
        body = b"\x0a\x00" * (CONTROL_FLOOD_BYTES // 2)
        try:
            await world.recorder.call("Score", 60.0, method(body, timeout=60.0))
        except grpc.aio.AioRpcError:
            return


@asynccontextmanager
async def honest_caller(world: World, questions: Questions) -> AsyncIterator[None]:
    """Have somebody ask meanwhile, whose answers must all come and be right."""
    over = asyncio.Event()

    async def ask_on() -> None:
        async with RewardClient(world.addresses["reward"], retries=False) as client:
            while not over.is_set():
                await questions.score(client, deadline_seconds=CALL_SECONDS)
                await asyncio.sleep(0.02)

    asking = asyncio.create_task(ask_on())
    try:
        yield
    finally:
        over.set()
        await asking


def read_series(world: World) -> set[str]:
    """Return the names and labels of all series that Prometheus would see."""
    url = f"http://{world.addresses['metrics of reward']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


def read_peak_bytes(pid: int) -> float:
    """Return the most memory that a process has ever held."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [peak] = [line for line in lines if line.startswith("VmHWM:")]
    return 1024.0 * float(peak.split()[1])


def find_leaks(log: Path, metrics: str, errors: set[str]) -> list[str]:
    """Return where a canary was found, and what was forged."""
    text = log.read_text(encoding="utf-8", errors="replace")
    places = {"log": text, "metrics": metrics, "errors": "\n".join(errors)}
    found = [
        f"the canary is in the {name}: {line[:200]!r}"
        for name, content in places.items()
        for line in content.splitlines()
        if CANARY in line
    ]
    for line in text.splitlines():
        try:
            event = json.loads(line).get("event", "")
        except ValueError:
            found.append(f"a line of the log is not JSON: {line[:100]!r}")
        else:
            found += [f"a forged event is in the log: {event!r}"] if event == FORGED else []
    found += ["a forged series is in the metrics"] if FORGED in metrics else []
    found += ["an escape character is in the log"] if "\x1b" in text else []
    return found[:10]


SCENARIOS = [
    Scenario(
        name="R16 hostile",
        title="raw bytes, broken messages, floods, odd metadata and injections, over gRPC and as JSON over HTTP",
        run=run,
        control="the limits of sizes and counts",
        caught_as=frozenset({"I8"}),
        seconds=300,
        usual_seconds=90,
        long_seconds=3600,
    )
]
