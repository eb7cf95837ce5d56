"""R4: the answer to a call with an effect is lost after the server has applied it: its repeat applies nothing."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from tests.reliability.adapter_bench import RUN, Bench, open_bench
from tests.reliability.processes import poll_until
from tests.reliability.proxy import Fault
from tests.reliability.recording import dump_ledger
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import World, WorldPlan, open_world, run_toml
from tests.rpc.adapter_files import activate, begin_request, commit_request, fake_adapter, push, upload
from tether.orchestrator import Run
from tether.v1 import adapter_pb2, adapter_pb2_grpc, orchestrator_pb2, orchestrator_pb2_grpc

CALL_SECONDS: Final = 10.0
BACK: Final = "r4-back"
"""Run that is cancelled and rolled back."""
Applied: TypeAlias = Callable[[], Awaitable[bool]]
Between: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[Any]]


@dataclass(slots=True)
class Loss:
    """Sends requests through a proxy that swallows the answers."""

    world: World
    proxy: str
    channel: grpc.aio.Channel
    fresh_ids: bool
    """The control: a repeat carries another request_id."""
    numbers: int = 0

    async def lose_and_repeat(self, request: Any, send: Send, *, applied: Applied, between: Between) -> str:
        """Send a request, lose its answer, let something happen in between, repeat it, and return the intent.

        Args:
            request: Has a request_id.
            send: Sends it through the proxy.
            applied: Whether its effect is there.
            between: What somebody else does before the repeat.
        """
        self.numbers += 1
        method = type(request).__name__.removesuffix("Request")
        intent, record = f"{method} {self.numbers}", self.world.recorder.record
        record("wanted", intent=intent)
        await self._lose(method, request, send, applied)
        await between()
        if self.fresh_ids:
            request.request_id = str(uuid.uuid4())
        try:
            await self._repeat(method, request, send)
        except grpc.aio.AioRpcError as error:
            record("refused", intent=intent, code=error.code().name, text=str(error.details())[:200])
        else:
            record("acked", intent=intent)
        return intent

    async def _lose(self, method: str, request: Any, send: Send, applied: Applied) -> None:
        proxy = self.world.proxies[self.proxy]
        await self.channel.channel_ready()  # a lost greeting of the server would keep the request from being sent
        proxy.set(down=Fault(drop=True))
        call = asyncio.create_task(self._call(method, request, send))
        try:
            await poll_until(applied, seconds=CALL_SECONDS, what=f"{method} is applied")
        finally:
            proxy.clear()  # the connection that has lost an answer is reset
            with suppress(grpc.aio.AioRpcError):
                await call
                raise AssertionError(f"the answer of {method} was not lost")

    async def _repeat(self, method: str, request: Any, send: Send) -> None:
        """Send again; while the channel is being built anew the call is not sent at all."""
        for _ in range(20):
            try:
                await self._call(method, request, send)
                return
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.1)
        raise AssertionError(f"{method} was unavailable for 2 s after the fault was lifted")

    async def _call(self, method: str, request: Any, send: Send) -> Any:
        return await self.world.recorder.call(method, CALL_SECONDS, send(request))


async def run_adapters(trial: Trial) -> Outcome:
    """Lose answers of the calls that change what a generator serves."""
    rounds = 3 if trial.control else trial.count(5, 100)
    settings = {"generator": {"adapters": {"folder": str(trial.folder / "adapters"), "keep_versions": 16}}}
    plan = WorldPlan(services=("generator",), proxied=("adapter",), settings=settings)
    async with open_bench(trial.folder, plan) as bench, through("adapter", bench.world) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        loss = Loss(bench.world, "adapter", channel, trial.control)
        second = fake_adapter(2)
        await push(bench.straight, begin_request(second, RUN, 2), second)
        for number in range(rounds):
            await lose_activation(bench, loss, stub)
            await lose_rollback(bench, loss, stub)
            await lose_deletion(bench, loss, stub, version=10 + number)
            await lose_commit(bench, loss, stub, version=1000 + number)
        figures = {"answers lost": loss.numbers, "rounds": rounds}
    return Outcome(bench.world.recorder.judge(), figures)


async def lose_activation(bench: Bench, loss: Loss, stub: adapter_pb2_grpc.AdapterServiceAsyncStub) -> None:
    """Activate 2 with its answer lost; somebody goes back to 1; the repeat must leave that alone."""
    await activate(bench.straight, RUN, 1)
    request = adapter_pb2.ActivateAdapterRequest(
        request_id=str(uuid.uuid4()),
        run_id=RUN,
        policy_version=2,
        expected_run_id=RUN,
        expected_policy_version=1,
        epoch=1,
    )
    before = count_log(bench, "adapter activated", 2)
    intent = await loss.lose_and_repeat(
        request,
        lambda r: stub.ActivateAdapter(r, timeout=CALL_SECONDS),
        applied=lambda: is_active(bench, 2),
        between=lambda: activate(bench.straight, RUN, 1),
    )
    record_applied(bench, intent, count_log(bench, "adapter activated", 2) - before)


async def lose_rollback(bench: Bench, loss: Loss, stub: adapter_pb2_grpc.AdapterServiceAsyncStub) -> None:
    """Roll back from 2 with its answer lost; somebody activates 2 again; the repeat must leave that alone."""
    await activate(bench.straight, RUN, 2)
    request = with_epoch(
        adapter_pb2.RollbackAdapterRequest(request_id=str(uuid.uuid4()), run_id=RUN, expected_policy_version=2)
    )
    before = count_log(bench, "adapter activated", 1)
    intent = await loss.lose_and_repeat(
        request,
        lambda r: stub.RollbackAdapter(r, timeout=CALL_SECONDS),
        applied=lambda: is_active(bench, 1),
        between=lambda: activate(bench.straight, RUN, 2),
    )
    record_applied(bench, intent, count_log(bench, "adapter activated", 1) - before)


async def lose_deletion(
    bench: Bench, loss: Loss, stub: adapter_pb2_grpc.AdapterServiceAsyncStub, *, version: int
) -> None:
    """Delete a version with its answer lost; somebody pushes it again; the repeat must not delete that one."""
    adapter = fake_adapter(version)
    await push(bench.straight, begin_request(adapter, RUN, version), adapter)
    request = with_epoch(
        adapter_pb2.DeleteAdapterRequest(request_id=str(uuid.uuid4()), run_id=RUN, policy_version=version)
    )

    async def deleted() -> bool:
        return count_log(bench, "adapter retired", version) == 1

    intent = await loss.lose_and_repeat(
        request,
        lambda r: stub.DeleteAdapter(r, timeout=CALL_SECONDS),
        applied=deleted,
        between=lambda: push(bench.straight, begin_request(adapter, RUN, version), adapter),
    )
    await asyncio.sleep(0.1)  # a second retirement would be logged soon after the answer
    record_applied(bench, intent, count_log(bench, "adapter retired", version))
    with suppress(grpc.aio.AioRpcError):  # gone already if the repeat was applied
        await delete(bench, version)


async def lose_commit(
    bench: Bench, loss: Loss, stub: adapter_pb2_grpc.AdapterServiceAsyncStub, *, version: int
) -> None:
    """Commit an upload with its answer lost: the repeat gets the first result."""
    adapter = fake_adapter(version)
    bench.offer(adapter)
    upload_id = await upload(bench.straight, begin_request(adapter, RUN, version), adapter.data)

    async def committed() -> bool:
        return count_log(bench, "adapter push", version) == 1

    intent = await loss.lose_and_repeat(
        commit_request(upload_id),
        lambda r: stub.CommitPush(r, timeout=CALL_SECONDS),
        applied=committed,
        between=lambda: asyncio.sleep(0),
    )
    record_applied(bench, intent, count_log(bench, "adapter push", version))
    await delete(bench, version)


async def delete(bench: Bench, version: int) -> None:
    """Delete a version, so that the ones which the next round needs stay loaded."""
    request = adapter_pb2.DeleteAdapterRequest(request_id=str(uuid.uuid4()), run_id=RUN, policy_version=version)
    await bench.straight.DeleteAdapter(with_epoch(request), timeout=10)


def with_epoch(request: Any) -> Any:
    """Return the request under the epoch of the run."""
    request.epoch = 1
    return request


def count_log(bench: Bench, event: str, version: int) -> int:
    """Return how often the generator's log says that something happened to a version."""
    text = bench.world.processes["generator"].log_file.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
    return sum(line.get("event") == event and line.get("policy_version") == version for line in lines)


def record_applied(bench: Bench, intent: str, count: int) -> None:
    """Record that the generator did something so many times."""
    for _ in range(count):
        bench.world.recorder.record("applied", intent=intent)


async def is_active(bench: Bench, version: int) -> bool:
    """Return whether a version is active."""
    active = await bench.straight.GetActiveAdapter(adapter_pb2.GetActiveAdapterRequest(), timeout=10)
    return bool(active.policy_version == version)


@asynccontextmanager
async def through(name: str, world: World) -> AsyncIterator[grpc.aio.Channel]:
    """Yield a channel through a proxy that comes back soon after a reset."""
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]
    async with grpc.aio.insecure_channel(world.target(name), options=options) as channel:
        yield channel


async def run_runs(trial: Trial) -> Outcome:
    """Lose answers of the calls that start, resume, cancel and roll back runs; the first run fails at once, without a
    generator."""
    settings = {"orchestrator": {"max_retries": 0}}
    plan = WorldPlan(models="tiny", proxied=("orchestrator",), settings=settings)
    async with open_world(trial.folder, plan) as world, through("orchestrator", world) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        loss = Loss(world, "orchestrator", channel, trial.control)
        world.processes["generator"].kill()
        await lose_start(world, loss, stub)
        async with world.orchestrator() as client:
            await world.wait_for_end(client, "r4", seconds=60)
            await lose_resume(world, loss, stub)
            run = await world.wait_for_end(client, "r4", seconds=60)
            await world.processes["generator"].start()
            await client.start_run(BACK, run_toml(world.folder, steps=1000))
            await lose_cancel(world, loss, stub)
            back = await lose_run_rollback(world, loss, stub)
        for ended in (run, back):
            world.recorder.add(dump_ledger(world.state_dir, ended))
    return Outcome(world.recorder.judge(), {"answers lost": loss.numbers, "attempts": count_attempts(world)})


async def lose_start(world: World, loss: Loss, stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub) -> None:
    """Start a run with its answer lost; run_id is its key."""
    request = orchestrator_pb2.StartRunRequest(run_id="r4", config_toml=run_toml(world.folder, steps=1))
    fresh, loss.fresh_ids = loss.fresh_ids, False  # the call has no request_id of its own

    async def started() -> bool:
        return count_attempts(world) == 1

    intent = await loss.lose_and_repeat(
        request, lambda r: stub.StartRun(r, timeout=CALL_SECONDS), applied=started, between=lambda: asyncio.sleep(0)
    )
    loss.fresh_ids = fresh
    world.recorder.record("applied", intent=intent)
    assert count_attempts(world) == 1, "the run was started twice"


async def lose_resume(world: World, loss: Loss, stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub) -> None:
    """Resume a run with its answer lost, and repeat after that attempt has failed too: there is no third one."""
    request = orchestrator_pb2.ResumeRunRequest(run_id="r4", request_id=str(uuid.uuid4()))

    async def resumed() -> bool:
        return count_attempts(world) == 2

    async def failed_again() -> None:
        async with world.orchestrator() as client:
            await world.wait_for_end(client, "r4", seconds=60)

    intent = await loss.lose_and_repeat(
        request, lambda r: stub.ResumeRun(r, timeout=CALL_SECONDS), applied=resumed, between=failed_again
    )
    for _ in range(count_attempts(world) - 1):
        world.recorder.record("applied", intent=intent)


async def lose_cancel(world: World, loss: Loss, stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub) -> None:
    """Cancel a run with its answer lost; somebody resumes it; the repeat must leave that attempt alone."""
    request = orchestrator_pb2.CancelRunRequest(run_id=BACK, request_id=str(uuid.uuid4()))
    query = "SELECT cancel_requested OR state = 'cancelled' FROM runs WHERE run_id = ?"

    async def cancelled() -> bool:
        return read_number(world, query) == 1

    async def resume() -> None:
        async with world.orchestrator() as client:
            await world.wait_for_end(client, BACK, seconds=60)
            await client.resume_run(BACK)

    await reach_commits(world, 2)
    intent = await loss.lose_and_repeat(
        request, lambda r: stub.CancelRun(r, timeout=CALL_SECONDS), applied=cancelled, between=resume
    )
    for _ in range(1 + read_number(world, query)):
        world.recorder.record("applied", intent=intent)


async def lose_run_rollback(world: World, loss: Loss, stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub) -> Run:
    """Take back the last step of a run that has ended, with the answer lost: the repeat takes back no other."""
    request = orchestrator_pb2.RollbackRunRequest(run_id=BACK, request_id=str(uuid.uuid4()))
    query = "SELECT COUNT(*) FROM rollbacks WHERE run_id = ?"

    async def rolled_back() -> bool:
        return read_number(world, query) == 1

    async with world.orchestrator() as client:
        await client.cancel_run(BACK)
        await world.wait_for_end(client, BACK, seconds=60)
        intent = await loss.lose_and_repeat(
            request,
            lambda r: stub.RollbackRun(r, timeout=CALL_SECONDS),
            applied=rolled_back,
            between=lambda: asyncio.sleep(0),
        )
        for _ in range(read_number(world, query)):
            world.recorder.record("applied", intent=intent)
        return await client.get_run(BACK)


async def reach_commits(world: World, steps: int) -> None:
    """Wait until the run that is taken back has committed so many steps."""

    async def committed() -> bool:
        return read_number(world, "SELECT committed_steps FROM runs WHERE run_id = ?") >= steps

    await poll_until(committed, seconds=30, what=f"{steps} steps are committed")


def read_number(world: World, query: str) -> int:
    """Return a number that the ledger has of the run that is taken back."""
    with closing(sqlite3.connect(f"file:{world.state_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as connection:
        return int(connection.execute(query, (BACK,)).fetchone()[0])


def count_attempts(world: World) -> int:
    """Return the number of attempts that the ledger has of the run."""
    with closing(sqlite3.connect(f"file:{world.state_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as connection:
        row = connection.execute("SELECT epoch FROM runs WHERE run_id = 'r4'").fetchone()
    return int(row[0]) if row else 0


SCENARIOS = [
    Scenario(
        name="R4 adapters",
        title="answers to Activate, Rollback, Delete and CommitPush lost after they were applied",
        run=run_adapters,
        control="the request_id of a repeat",
        caught_as=frozenset({"I2"}),
        seconds=60,
    ),
    Scenario(
        name="R4 runs",
        title="answers to StartRun, ResumeRun, CancelRun and RollbackRun lost after they were applied",
        run=run_runs,
        control="the request_id of a repeat",
        caught_as=frozenset({"I2"}),
        seconds=90,
        usual_seconds=15,
    ),
]
