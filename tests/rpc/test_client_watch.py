"""Watching a run: every step once and in order, however often the stream ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from tests.rpc.scripted_server import serving, serving_in_thread
from tether import Client, NotFoundError, OrchestratorClient, Run, StepEvent, UnavailableError
from tether.v1 import orchestrator_pb2, orchestrator_pb2_grpc

RUNNING = orchestrator_pb2.Run(run_id="a", state=orchestrator_pb2.RUN_STATE_RUNNING, total_step_count=4)
SUCCEEDED = orchestrator_pb2.Run(run_id="a", state=orchestrator_pb2.RUN_STATE_SUCCEEDED, total_step_count=4)
Script = Callable[[int, int], AsyncIterator[orchestrator_pb2.WatchRunResponse]]


class Watched(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Plays a script: (number of the stream, first step) -> events."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.first_steps: list[int] = []
        self.remaining: list[float] = []

    def add(self, server: grpc.aio.Server) -> None:
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self, server)

    async def WatchRun(
        self, request: orchestrator_pb2.WatchRunRequest, context: Any
    ) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
        self.first_steps.append(request.first_step)
        self.remaining.append(context.time_remaining())
        async for event in self.script(len(self.first_steps), request.first_step):
            yield event


def step(number: int) -> orchestrator_pb2.WatchRunResponse:
    metrics = [orchestrator_pb2.StepMetric(name="reward_mean", value=number / 2)]
    return orchestrator_pb2.WatchRunResponse(
        step=orchestrator_pb2.StepEvent(step=number, policy_version=number, metrics=metrics)
    )


def run_event(run: orchestrator_pb2.Run) -> orchestrator_pb2.WatchRunResponse:
    return orchestrator_pb2.WatchRunResponse(run=run)


async def whole_run(stream: int, first_step: int) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
    yield run_event(RUNNING)
    for number in range(first_step, 4):
        yield step(number)
    yield run_event(SUCCEEDED)


def watch(script: Script, **options: Any) -> tuple[list[StepEvent | Run], Watched]:
    servicer = Watched(script)  # type: ignore[abstract]

    async def run() -> list[StepEvent | Run]:
        async with serving(servicer.add) as target, OrchestratorClient(target) as client:
            return [event async for event in client.watch_run("a", **options)]

    return asyncio.run(run()), servicer


def steps(events: list[StepEvent | Run]) -> list[int]:
    return [event.step for event in events if isinstance(event, StepEvent)]


def test_a_watch_yields_every_step_then_the_end() -> None:
    events, _servicer = watch(whole_run)
    assert steps(events) == [0, 1, 2, 3]
    assert isinstance(events[-1], Run) and events[-1].state == "succeeded" and events[-1].ended
    second = events[2]
    assert isinstance(second, StepEvent) and second.metrics == {"reward_mean": 0.5} and second.policy_version == 1


def test_a_watch_starts_at_the_step_asked_for() -> None:
    events, servicer = watch(whole_run, first_step=2)
    assert steps(events) == [2, 3]
    assert servicer.first_steps == [2]


def test_a_broken_stream_is_resumed_without_gap_or_repeat() -> None:
    async def script(stream: int, first_step: int) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
        async for event in whole_run(stream, first_step):
            yield event
            if stream < 3 and event.step.step == stream and event.WhichOneof("event") == "step":
                raise UnavailableError("draining")

    events, servicer = watch(script)
    assert steps(events) == [0, 1, 2, 3]
    assert servicer.first_steps == [0, 2, 3]
    assert [event.state for event in events if isinstance(event, Run)] == ["running", "succeeded"]


def test_a_stream_at_its_deadline_is_opened_again() -> None:
    async def script(stream: int, first_step: int) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
        yield step(first_step)
        if stream == 4:
            yield run_event(SUCCEEDED)
            return
        await asyncio.sleep(60)

    events, servicer = watch(script, stream_seconds=0.3)
    assert steps(events) == [0, 1, 2, 3]
    assert all(remaining < 1.3 for remaining in servicer.remaining)


@pytest.mark.parametrize("by_deadline", [False, True])
def test_a_stream_that_ends_right_after_a_rollback_is_opened_at_the_first_step_made_again(by_deadline: bool) -> None:
    rolled_back = orchestrator_pb2.Run()
    rolled_back.CopyFrom(RUNNING)
    rolled_back.rollbacks.add(from_step=4, to_step=1)

    async def script(stream: int, first_step: int) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
        if stream > 1:
            async for event in whole_run(stream, first_step):
                yield event
            return
        for number in range(4):
            yield step(number)
        yield run_event(RUNNING)
        yield run_event(rolled_back)
        if not by_deadline:
            raise UnavailableError("draining")
        await asyncio.sleep(60)

    events, servicer = watch(script, stream_seconds=0.5)
    assert steps(events) == [0, 1, 2, 3, 1, 2, 3]
    assert servicer.first_steps == [0, 1]


def test_a_watch_gives_up_when_nothing_arrives_any_more() -> None:
    async def script(stream: int, first_step: int) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
        if stream == 1:
            yield step(0)
        raise UnavailableError("gone")

    servicer = Watched(script)  # type: ignore[abstract]

    async def run() -> None:
        async with serving(servicer.add) as target, OrchestratorClient(target) as client:
            with pytest.raises(UnavailableError):
                async for _event in client.watch_run("a"):
                    pass

    asyncio.run(run())
    assert len(servicer.first_steps) == 5


def test_an_unknown_run_is_raised_at_once() -> None:
    async def script(stream: int, first_step: int) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
        raise NotFoundError("There is no run b.")
        yield  # pragma: no cover

    with pytest.raises(NotFoundError, match="no run b"):
        watch(script)


def test_leaving_a_watch_cancels_the_call() -> None:
    ended = asyncio.Event()

    async def script(stream: int, first_step: int) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
        try:
            yield step(0)
            await asyncio.sleep(60)
        finally:
            ended.set()

    servicer = Watched(script)  # type: ignore[abstract]

    async def run() -> None:
        async with serving(servicer.add) as target, OrchestratorClient(target) as client:
            watching = client.watch_run("a")
            assert isinstance(await anext(watching), StepEvent)
            await watching.aclose()
            await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(run())


def test_the_synchronous_client_watches_too() -> None:
    servicer = Watched(whole_run)  # type: ignore[abstract]
    with serving_in_thread(servicer.add) as target, Client(orchestrator=target) as client:
        events = list(client.watch_run("a", first_step=1))
    assert steps(events) == [1, 2, 3]
    assert isinstance(events[-1], Run) and events[-1].ended
