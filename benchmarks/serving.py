"""What serving costs: a reward service beside its bare engine, in the same run and on the same items.

    .venv/bin/python benchmarks/serving.py

The service is a process of its own with the packaged reward model and one thread; the callers and the bare engine are
in this process and take turns, so that what else the machine does meets both alike. Every table says what is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tether import ResourceExhaustedError, RewardClient, ScoreItem
from tether_services.local.ports import free_ports
from tether_services.reward.config import RewardSettings
from tether_services.reward.engine import ScoreTask
from tether_services.reward.engines.transformers import TransformersRewardEngine
from tether_services.runtime.padding import PaddedBatch, padded_batches, serving_padding
from tether_services.runtime.threads import keep_freed_memory

MODEL = Path(__file__).resolve().parents[1] / "services/tether_services/demo/models/reward"
NUM_CALLERS = 64
START_SECONDS = 120.0
CALL_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class RewardProcess:
    """A service that runs."""

    address: str
    """host:port."""
    pid: int
    """Of its process."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """One comparison of callers with an offline batch."""

    bare: float
    """Items per second of the bare engine, before and after."""
    served: float
    """Items per second of the callers."""

    @property
    def ratio(self) -> float:
        """Return served over bare."""
        return self.served / self.bare


@dataclass(frozen=True, slots=True)
class Latency:
    """One item, judged by both."""

    bare: float
    """Seconds of the bare engine."""
    called: float
    """Seconds of a call to the service."""


@dataclass(frozen=True, slots=True)
class LatencyRound:
    """One item, judged twice in a row by both."""

    unloaded: Latency
    """The second time: nobody else has computed since."""
    after_other: Latency
    """The first time: right after the other one has computed."""


@dataclass(frozen=True, slots=True)
class Rejections:
    """What refused calls took."""

    seconds: tuple[float, ...]
    """Latency of each, ascending."""
    cpu_seconds: float
    """CPU time per refused call of the service's threads but its engine."""
    engine_share: float
    """Part of the time in which the engine computed."""


@contextmanager
def reward_process(*settings: str) -> Iterator[RewardProcess]:
    """Serve the packaged reward model until the block ends.

    Args:
        settings: More settings, KEY=VALUE.
    """
    ports = free_ports(2)
    given = [f"model={MODEL}", "device=cpu", "dtype=float32", "threads=1", *settings]
    given += [f"address=127.0.0.1:{ports[0]}", f"metrics_address=127.0.0.1:{ports[1]}"]
    command = [sys.executable, "-m", "tether_services", "serve", "reward"]
    for setting in given:
        command += ["--set", setting]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield RewardProcess(f"127.0.0.1:{ports[0]}", process.pid)
        finally:
            process.kill()


@asynccontextmanager
async def connected(process: RewardProcess) -> AsyncIterator[RewardClient]:
    """Yield a client once the service serves."""
    deadline = time.monotonic() + START_SECONDS
    async with RewardClient(process.address, retries=False) as client:
        while not await client.is_serving():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the service at {process.address} did not begin to serve")
            await asyncio.sleep(0.1)
        yield client


@asynccontextmanager
async def bare_engine() -> AsyncIterator[TransformersRewardEngine]:
    """Yield the engine of the service without the service, in a process with the same budget."""
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = RewardSettings.model_validate({"model": str(MODEL), "device": "cpu"})
    engine = TransformersRewardEngine(str(MODEL), settings, field="model")
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def make_tasks(lengths: Sequence[int], *, seed: int = 0) -> list[ScoreTask]:
    """Return tasks of so many tokens each, half prompt and half response."""
    rng = random.Random(seed)
    rows = [tuple(rng.randrange(3, 300) for _ in range(length)) for length in lengths]
    return [ScoreTask(prompt_token_ids=row[: len(row) // 2], response_token_ids=row[len(row) // 2 :]) for row in rows]


def as_items(tasks: Sequence[ScoreTask]) -> list[ScoreItem]:
    """Return the tasks as a caller sends them."""
    return [
        ScoreItem(prompt_token_ids=task.prompt_token_ids, response_token_ids=task.response_token_ids) for task in tasks
    ]


def mixed_lengths(count: int, *, low: int = 100, high: int = 300, seed: int = 0) -> list[int]:
    """Return so many lengths between the two."""
    rng = random.Random(seed)
    return [rng.randint(low, high) for _ in range(count)]


async def seconds_of(work: Awaitable[object]) -> float:
    """Return how long it takes."""
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def compare_throughput(
    client: RewardClient, engine: TransformersRewardEngine, tasks: Sequence[ScoreTask], *, num_calls: int = 2
) -> Throughput:
    """Return the rates of one offline batch and of concurrent callers of one item each, who call so many times."""

    async def call(item: ScoreItem) -> None:
        for _ in range(num_calls):
            await client.score([item], timeout_seconds=CALL_SECONDS)

    before = await seconds_of(engine.score(tasks))
    served = await seconds_of(asyncio.gather(*map(call, as_items(tasks))))
    after = await seconds_of(engine.score(tasks))
    return Throughput(2 * len(tasks) / (before + after), num_calls * len(tasks) / served)


async def compare_latency(
    client: RewardClient, engine: TransformersRewardEngine, tasks: Sequence[ScoreTask]
) -> list[LatencyRound]:
    """Return what each item takes; engine, service and engine again are asked in turn, each twice in a row.

    What was asked first has its caches emptied by the other's forward pass, in the caller's own process: a load. The
    second time nobody else has computed since.
    """

    async def twice(ask: Callable[[], Awaitable[object]]) -> tuple[float, float]:
        return await seconds_of(ask()), await seconds_of(ask())

    rounds = []
    for task, item in zip(tasks, as_items(tasks), strict=True):
        before = await twice(partial(engine.score, [task]))
        called = await twice(partial(client.score, [item], timeout_seconds=CALL_SECONDS))
        after = await twice(partial(engine.score, [task]))
        bare = [(one + other) / 2 for one, other in zip(before, after, strict=True)]
        rounds.append(LatencyRound(unloaded=Latency(bare[1], called[1]), after_other=Latency(bare[0], called[0])))
    return rounds


def overheads(latencies: Iterable[Latency]) -> list[float]:
    """Return what each call took longer than the bare engine, ascending."""
    return sorted(latency.called - latency.bare for latency in latencies)


FULL_QUEUE = ("max_items=512", "batch.queue_limit=512", "batch.max_items=512", "batch.max_tokens=100000")
"""One call fills the queue while another one is a batch that takes seconds."""


async def measure_rejections(client: RewardClient, process: RewardProcess, *, num_calls: int) -> Rejections:
    """Return what so many refused calls take while the engine executes a batch; the service has FULL_QUEUE."""
    items = as_items(make_tasks([100] * 512))
    backlog = []
    for _ in range(2):
        backlog.append(asyncio.create_task(client.score(items, timeout_seconds=CALL_SECONDS)))
        await asyncio.sleep(0.3)  # it has become a batch when the second one comes
    seconds: list[float] = []

    async def insist() -> None:
        while len(seconds) < num_calls and not backlog[0].done():
            started = time.perf_counter()
            try:
                await client.score(items[:1], timeout_seconds=CALL_SECONDS)
            except ResourceExhaustedError:
                seconds.append(time.perf_counter() - started)

    begun, used = time.perf_counter(), thread_seconds(process.pid)
    await asyncio.gather(*(insist() for _ in range(4)))
    wall = time.perf_counter() - begun
    spent = {thread: now - used.get(thread, 0.0) for thread, now in thread_seconds(process.pid).items()}
    for call in backlog:
        call.cancel()
    await asyncio.gather(*backlog, return_exceptions=True)
    engine = max(spent.values())
    return Rejections(tuple(sorted(seconds)), (sum(spent.values()) - engine) / len(seconds), engine / wall)


def thread_seconds(pid: int) -> dict[str, float]:
    """Return the CPU time of each thread of a process."""
    found = {}
    for folder in Path(f"/proc/{pid}/task").iterdir():
        try:
            found[folder.name] = int((folder / "schedstat").read_text().split()[0]) / 1e9
        except FileNotFoundError:  # it has ended meanwhile
            continue
    return found


def percentile(ascending: Sequence[float], part: float) -> float:
    """Return the value below which that part of the values lies."""
    return ascending[min(len(ascending) - 1, int(part * len(ascending)))]


def milliseconds(seconds: float) -> str:
    """Return the time for a table."""
    return f"{1e3 * seconds:.2f} ms"


async def print_throughput(client: RewardClient, engine: TransformersRewardEngine, *, num_rounds: int) -> None:
    tasks = make_tasks(mixed_lengths(NUM_CALLERS))
    await compare_throughput(client, engine, tasks, num_calls=1)
    rounds = [await compare_throughput(client, engine, tasks) for _ in range(num_rounds)]
    print(f"\n{NUM_CALLERS} concurrent callers of one item each, beside one offline batch of the same items\n")
    print("| round | offline, items/s | callers, items/s | ratio |\n|---|---|---|---|")
    for number, found in enumerate(rounds, 1):
        print(f"| {number} | {found.bare:.1f} | {found.served:.1f} | {found.ratio:.3f} |")
    ratios = [found.ratio for found in rounds]
    print(f"| median, best | | | {statistics.median(ratios):.3f}, {max(ratios):.3f} |")


async def print_latency(client: RewardClient, engine: TransformersRewardEngine, *, num_items: int) -> None:
    rounds = await compare_latency(client, engine, make_tasks(mixed_lengths(num_items)))
    unloaded = [found.unloaded for found in rounds]
    print("\nOne item at a time, nobody else calls\n")
    print("| | p50 | p90 |\n|---|---|---|")
    for name, values in (
        ("bare engine", sorted(latency.bare for latency in unloaded)),
        ("call", sorted(latency.called for latency in unloaded)),
        ("call minus bare engine, item by item", overheads(unloaded)),
        ("the same right after the other one has computed", overheads(found.after_other for found in rounds)),
    ):
        print(f"| {name} | {milliseconds(percentile(values, 0.5))} | {milliseconds(percentile(values, 0.9))} |")


def print_rejections(found: Rejections) -> None:
    p50, p99 = (milliseconds(percentile(found.seconds, part)) for part in (0.5, 0.99))
    print("\nCalls refused because the queue is full, while the engine works\n")
    print(
        "| refused | p50 | p99 | longest | CPU of the service per call | engine computed |\n|---|---|---|---|---|---|"
    )
    print(
        f"| {len(found.seconds)} | {p50} | {p99} | {milliseconds(found.seconds[-1])} | "
        f"{milliseconds(found.cpu_seconds)} | {found.engine_share:.0%} of the time |"
    )


async def print_padding(engine: TransformersRewardEngine, *, num_rounds: int) -> None:
    rng = random.Random(0)
    mixes: dict[str, list[int]] = {
        "64 of 10 to 400": mixed_lengths(64, low=10, high=400),
        "64 of 100 to 300": mixed_lengths(64),
        "64 of 5 to 40": mixed_lengths(64, low=5, high=40),
        "32, half of 8 to 20, half of 380 to 500": [
            rng.randint(8, 20) if index % 2 else rng.randint(380, 500) for index in range(32)
        ],
    }
    print("\nForward passes of one batch, cut by tokens alone and with bounded padding\n")
    print("| tokens per item | passes | padding | time |\n|---|---|---|---|")
    for name, lengths in mixes.items():
        plans = {bound: plan_of(lengths, max_padding=bound) for bound in (None, serving_padding("cpu"))}
        times: dict[int | None, list[float]] = {bound: [] for bound in plans}
        for _ in range(num_rounds):
            for bound, plan in plans.items():
                started = time.perf_counter()
                for batch in plan:
                    engine._forward(batch)
                times[bound].append(time.perf_counter() - started)
        rows = [
            (len(plan), 1 - sum(lengths) / sum(batch.token_ids.numel() for batch in plan), min(times[bound]))
            for bound, plan in plans.items()
        ]
        passes, padding, seconds = (
            " -> ".join(parts)
            for parts in (
                [str(row[0]) for row in rows],
                [f"{row[1]:.0%}" for row in rows],
                [f"{1e3 * row[2]:.0f} ms" for row in rows],
            )
        )
        print(f"| {name} | {passes} | {padding} | {seconds} |")


def plan_of(lengths: Sequence[int], *, max_padding: int | None) -> list[PaddedBatch]:
    """Return the passes of rows of these lengths."""
    return padded_batches([[5] * length for length in lengths], max_tokens=8192, max_padding=max_padding)


async def main(*, num_rounds: int) -> None:
    async with bare_engine() as engine:
        with reward_process() as process:
            async with connected(process) as client:
                await print_throughput(client, engine, num_rounds=num_rounds)
                await print_latency(client, engine, num_items=60)
        with reward_process(*FULL_QUEUE) as process:
            async with connected(process) as client:
                print_rejections(await measure_rejections(client, process, num_calls=1000))
        await print_padding(engine, num_rounds=3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison of throughput")
    asyncio.run(main(num_rounds=parser.parse_args().rounds))
