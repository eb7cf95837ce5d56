"""Watching runs over a loopback channel, with real worker processes that follow a script instead of training."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc.aio
import pytest

from tests.rpc.scripted_world import world
from tests.rpc.serving import run
from tether.errors import InvalidArgumentError
from tether.orchestrator import Run, StepEvent
from tether.v1 import orchestrator_pb2, orchestrator_pb2_grpc


def test_watching_brings_each_step_once_and_ends_with_the_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=5) as w:
            await w.client.start_run("slow-1", w.toml)
            events = [event async for event in w.client.watch_run("slow-1")]
            steps = [event for event in events if isinstance(event, StepEvent)]
            states = [event.state for event in events if isinstance(event, Run)]
            assert [(step.step, step.policy_version) for step in steps] == [(n, n) for n in range(5)]
            assert steps[2].metrics["kl_per_sequence"] == 2.5
            assert states[-1] == "succeeded"
            assert isinstance(events[-1], Run)
            assert set(states) <= {"pending", "running", "succeeded"}

    run(scenario())


def test_watching_can_begin_at_any_step_also_after_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=5) as w:
            await w.client.start_run("steps-1", w.toml)
            await w.end_of("steps-1")
            for first, expected in {0: [0, 1, 2, 3, 4], 3: [3, 4], 9: []}.items():
                events = [event async for event in w.client.watch_run("steps-1", first_step=first)]
                assert [event.step for event in events if isinstance(event, StepEvent)] == expected
                assert [event.state for event in events if isinstance(event, Run)] == ["succeeded"]

    run(scenario())


def test_a_watcher_whose_streams_end_early_misses_and_repeats_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=12) as w:
            await w.client.start_run("slow-1", w.toml)
            events = [event async for event in w.client.watch_run("slow-1", stream_seconds=0.3)]
            assert [event.step for event in events if isinstance(event, StepEvent)] == list(range(12))

    run(scenario())


def test_two_watchers_see_the_same(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def watch() -> list[int]:
            return [e.step async for e in w.client.watch_run("slow-1") if isinstance(e, StepEvent)]

        async with world(tmp_path, steps=5) as w:
            await w.client.start_run("slow-1", w.toml)
            first, second = await asyncio.gather(watch(), watch())
            assert first == second == list(range(5))

    run(scenario())


def test_watching_from_a_negative_step_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.client.start_run("steps-1", w.toml)
            with pytest.raises(InvalidArgumentError) as caught:
                await anext(w.client.watch_run("steps-1", first_step=-1))
            assert caught.value.violations[0].field == "first_step"

    run(scenario())


def test_a_step_is_shown_to_watchers_once_its_push_is_recorded_or_the_run_has_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, cancel_seconds=0.5, lease_seconds=1) as w:
            await w.started("unpushed-1")
            seen: list[StepEvent | Run] = []

            async def watch() -> None:
                async for event in w.client.watch_run("unpushed-1"):
                    seen.append(event)

            watching = asyncio.create_task(watch())
            await asyncio.sleep(0.6)
            assert not [event for event in seen if isinstance(event, StepEvent)]
            assert (await w.client.get_run("unpushed-1")).policy_version == 0
            await w.client.cancel_run("unpushed-1")
            await watching
            assert [event.step for event in seen if isinstance(event, StepEvent)] == [0]

    run(scenario())


def test_a_watcher_does_not_keep_the_orchestrator_from_stopping_and_is_told_to_watch_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, drain_seconds=30, cancel_seconds=0.5, lease_seconds=1) as w:
            await w.started("unpushed-1")
            channel = grpc.aio.insecure_channel(w.served.target)
            stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            watch = stub.WatchRun(orchestrator_pb2.WatchRunRequest(run_id="unpushed-1"), timeout=60)
            await watch.read()
            started = time.monotonic()
            await w.served.runner.close()
            assert time.monotonic() - started < 15
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                while await watch.read() is not grpc.aio.EOF:
                    pass
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE and "watch again" in str(ended.value.details())
            await channel.close()

    run(scenario())
