"""R8: the disk is full, has no inodes or is read-only: a clear error, the old version serves, and later all goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from safetensors.numpy import save

from tests.reliability.adapter_bench import RUN, Bench, open_bench
from tests.reliability.checker import read_history
from tests.reliability.disk import SmallDisk, small_disk
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios.killed_worker import KEEP_ALL, PARTS, judge, run_whole
from tests.reliability.world import World, WorldPlan, open_world, run_toml
from tests.rpc.adapter_files import AdapterBytes, begin_request, chunks, fake_adapter, fake_tensors
from tether.errors import TetherError
from tether.generator import GeneratorClient, SamplingParams
from tether.orchestrator import OrchestratorClient, Run

ADAPTER_BYTES: Final = 3 * 1024 * 1024
DISK_BYTES: Final = 16 * 1024 * 1024
INODES: Final = 100
REFUSALS: Final = ("RESOURCE_EXHAUSTED", "FAILED_PRECONDITION")
STATE_BYTES: Final = 64 * 1024 * 1024
WAIT_SECONDS: Final = 4.0
"""For room, before a run fails."""
STILL_SECONDS: Final = 1.2
"""Without a new step: it waits."""
Break = Callable[[SmallDisk], object]


def large_adapter(seed: int) -> AdapterBytes:
    """Return an adapter of several chunks: its header carries a long text."""
    weights = save(fake_tensors(seed), metadata={"padding": "x" * ADAPTER_BYTES})
    return fake_adapter(seed, weights=weights)


def repair(disk: SmallDisk) -> None:
    """Make the disk as it was."""
    disk.set_read_only(False)
    disk.free()


BREAKS: Final[dict[str, Break]] = {
    "full while bytes arrive": lambda disk: disk.fill(leave_bytes=ADAPTER_BYTES // 2),
    "full": lambda disk: disk.fill(),
    "no inodes": lambda disk: disk.take_inodes(),
    "read-only": lambda disk: disk.set_read_only(True),
}


async def run_uploads(trial: Trial) -> Outcome:
    """Push onto a disk that breaks before or within the push; the control writes in place of a staging folder."""
    folder = trial.folder / "disk"
    adapters = {"folder": str(folder / "adapters"), "free_bytes": 0, "keep_versions": 1}
    sabotage = {"generator": ["staging"]} if trial.control else {}
    plan = WorldPlan(services=("generator",), settings={"generator": {"adapters": adapters}}, sabotage=sabotage)
    answers: dict[str, str] = {}
    failures: list[str] = []
    with small_disk(folder, size_bytes=DISK_BYTES, inodes=INODES) as disk:
        async with open_bench(trial.folder, plan) as bench:
            before = await sample(bench)
            for number, (name, break_disk) in enumerate(BREAKS.items()):
                adapter = large_adapter(trial.random.randrange(2**31))
                bench.offer(adapter)
                answers[name] = await push_onto(bench, disk, break_disk, adapter, 2 + number, late=not number)
                failures += await check_still_serving(bench, name, before)
                repair(disk)
                if trial.control:
                    break
                await push_again(bench, adapter, 2 + number)
                before = await sample(bench)
                if bench.left_in_staging():
                    failures.append(f"{name}: staging is not empty")
    failures += [f"{name}: {answer}" for name, answer in answers.items() if not answer.startswith(REFUSALS)]
    return Outcome(bench.world.recorder.judge(), {name: text[:50] for name, text in answers.items()}, failures)


async def push_onto(
    bench: Bench, disk: SmallDisk, break_disk: Break, adapter: AdapterBytes, version: int, *, late: bool
) -> str:
    """Push while the disk breaks, before the announcement or after it (`late`), and return how that ended."""

    async def attempt() -> None:
        call = bench.world.recorder.call
        if not late:
            break_disk(disk)
        begun = await call(
            "BeginPush", 30.0, bench.straight.BeginPush(begin_request(adapter, RUN, version), timeout=30)
        )
        if late:
            break_disk(disk)
        await call("PushChunks", 30.0, bench.straight.PushChunks(chunks(begun, adapter.data), timeout=30))
        await bench.commit_and_activate(adapter, version, begun.upload_id)

    return await bench.refused(attempt()) or "accepted"


async def push_again(bench: Bench, adapter: AdapterBytes, version: int) -> None:
    """Push once more where there is room again, and activate."""
    await bench.push_and_activate(adapter, version)
    assert await bench.observe_active() == (RUN, version)


async def check_still_serving(bench: Bench, name: str, before: Any) -> list[str]:
    """Return what is wrong with the version that was active before."""
    await bench.observe_active()
    after = await sample(bench)
    return [] if after == before else [f"{name}: the active version answers {after} in place of {before}"]


async def sample(bench: Bench) -> Any:
    """Return a seeded completion of the active version, or why there is none."""
    async with GeneratorClient(bench.world.addresses["generator"]) as client:
        try:
            answer = await client.generate((1, 40, 50), sampling=SamplingParams(max_tokens=8, seed=3))
        except TetherError as error:
            return error.reason
    return answer.policy_version, tuple(answer.completions[0].token_ids)


async def run_checkpoints(trial: Trial) -> Outcome:
    """Fill the disk under a run, again and again; there is room again while the run waits, or once it has failed."""
    rounds, steps = trial.count(2, 10), trial.count(24, 100)
    folder = trial.folder / "disk"
    settings = {"orchestrator": {"state_dir": str(folder), "storage_wait_seconds": WAIT_SECONDS}}
    plan = WorldPlan(models="tiny", settings=settings)
    with small_disk(folder, size_bytes=STATE_BYTES) as disk:
        async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
            whole = await run_whole(world, client, steps)
            await client.start_run(PARTS, run_toml(world.folder, steps=steps, extra=KEEP_ALL))
            failures: list[str] = []
            for number in range(rounds):
                await reach(world, client, 3 + number * steps // (rounds + 1))
                await asyncio.sleep(trial.random.uniform(0.0, 0.4))
                disk.fill()
                failures += await (watch_failing if number % 2 else watch_waiting)(world, client)
                disk.free()
                if number % 2:
                    await client.resume_run(PARTS)
            parts = await world.wait_for_end(client, PARTS, seconds=90)
            attempts = 1 + rounds // 2
            if trials(world) != attempts:
                failures.append(f"{trials(world)} attempts in place of {attempts}")
            figures = {"went on by itself": rounds - rounds // 2, "failed and resumed": rounds // 2, "steps": steps}
            return judge(world, (whole, parts), figures, failures)


async def reach(world: World, client: OrchestratorClient, steps: int) -> Run:
    """Return the run once so many steps are committed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        run = await world.recorder.observe(client.get_run(PARTS))
        if run.committed_step_count >= steps or run.ended:
            return run
        await asyncio.sleep(0.02)
    raise AssertionError(f"the run stays at {run.committed_step_count} of {steps} steps: {run.state} {run.error}")


async def watch_waiting(world: World, client: OrchestratorClient) -> list[str]:
    """Return once a run makes no step any more, and what is wrong about that."""
    committed, since = -1, time.monotonic()
    while time.monotonic() - since < STILL_SECONDS:
        run = await look(world, client)
        if run.ended:
            return [f"the run did not wait: {run.state} {run.error!r}"]
        if run.committed_step_count != committed:
            committed, since = run.committed_step_count, time.monotonic()
        await asyncio.sleep(0.1)
    return []


async def watch_failing(world: World, client: OrchestratorClient) -> list[str]:
    """Return once a run has failed for want of room, and what is wrong about that."""
    deadline = time.monotonic() + WAIT_SECONDS + 20.0
    while time.monotonic() < deadline:
        run = await look(world, client)
        if run.ended:
            clear = run.state == "failed" and "STORAGE_FULL" in run.error and "free some space" in run.error
            return [] if clear else [f"the reason is not clear: {run.state} {run.error!r}"]
        await asyncio.sleep(0.1)
    return ["the run waits for ever"]


async def look(world: World, client: OrchestratorClient) -> Run:
    """Return the run, which a full disk must not hinder."""
    answer: Awaitable[Run] = world.recorder.call("GetRun", 5.0, client.get_run(PARTS, timeout_seconds=5.0))
    return await world.recorder.observe(answer)


def trials(world: World) -> int:
    """Return how many attempts of the run have begun."""
    lines = read_history(world.recorder.path)
    return sum(line["kind"] == "attempt" and line["run"] == PARTS for line in lines)


SCENARIOS = [
    Scenario(
        name="R8 uploads",
        title="the generator's disk full, without inodes, read-only",
        run=run_uploads,
        control="the staging folder",
        caught_as=frozenset({"I5"}),
        seconds=60,
        needs_mounts=True,
    ),
    Scenario(
        name="R8 checkpoints",
        title="the orchestrator's disk full in the middle of a run",
        run=run_checkpoints,
        seconds=180,
        usual_seconds=25,
        needs_mounts=True,
    ),
]
