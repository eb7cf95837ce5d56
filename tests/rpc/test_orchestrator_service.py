"""The orchestrator over a loopback channel, with real worker processes that follow a script instead of training."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.serving import LOCAL, Served, failure, health, run, serving
from tests.unit.run_inputs import run_toml
from tether.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    TetherError,
)
from tether.orchestrator import OrchestratorClient, Run, SampleCounts, StepEvent
from tether.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tether_services.cli.main import main
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.engines.process import ProcessEngine
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt, RunState
from tether_services.orchestrator.service import SERVICE_NAME, OrchestratorService

WORKER = (sys.executable, str(Path(__file__).with_name("scripted_worker.py")))
SERVING = 1


@dataclass(frozen=True, slots=True)
class World:
    """A served orchestrator, a client of it, and a configuration that it accepts."""

    served: Served
    client: OrchestratorClient
    toml: str

    async def end_of(self, run_id: str) -> Run:
        """Return the run once it has ended."""
        while not (now := await self.client.get_run(run_id)).ended:
            await asyncio.sleep(0.02)
        return now

    async def started(self, run_id: str) -> None:
        """Start a run and wait until its worker has committed a step."""
        await self.client.start_run(run_id, self.toml)
        while (await self.client.get_run(run_id)).committed_step_count == 0:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def world(folder: Path, *, steps: int = 3, **changed: object) -> AsyncIterator[World]:
    settings = OrchestratorSettings.model_validate({**LOCAL, "state_dir": str(folder / "runs"), **changed})
    engine = ProcessEngine(settings, command=WORKER)
    toml = run_toml(folder).replace("total_steps = 3", f"total_steps = {steps}")
    async with (
        serving(settings, lambda registry: OrchestratorService(settings, registry, engine=engine)) as served,
        OrchestratorClient(served.target) as client,
    ):
        yield World(served, client, toml)


def test_a_run_is_accepted_at_once_and_ends_with_all_its_steps(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            accepted = await w.client.start_run("steps-1", w.toml)
            assert (accepted.state, accepted.committed_step_count, accepted.total_step_count) == ("pending", 0, 3)
            assert accepted.directory == str(tmp_path / "runs" / "steps-1")
            assert accepted.end_time is None
            ended = await w.end_of("steps-1")
            assert (ended.state, ended.committed_step_count, ended.policy_version) == ("succeeded", 3, 3)
            assert ended.end_time is not None and ended.end_time >= ended.create_time
            assert (ended.create_time, ended.error) == (accepted.create_time, "")

    run(scenario())


def test_starting_the_same_run_again_returns_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.client.start_run("steps-1", w.toml)
            ended = await w.end_of("steps-1")
            (tmp_path / "prompts.txt").unlink()
            assert await w.client.start_run("steps-1", w.toml) == ended
            with pytest.raises(InvalidArgumentError) as caught:
                await w.client.start_run("steps-1", w.toml + "# other")
            assert caught.value.reason == "RUN_EXISTS"

    run(scenario())


def test_the_same_run_started_by_many_callers_at_once_runs_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            accepted = await asyncio.gather(*(w.client.start_run("steps-1", w.toml) for _ in range(5)))
            assert {run.create_time for run in accepted} == {accepted[0].create_time}
            assert (await w.end_of("steps-1")).committed_step_count == 3
            assert len(await w.client.list_runs()) == 1

    run(scenario())


def test_a_caller_that_leaves_while_a_run_starts_leaves_no_run_without_a_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w, grpc.aio.insecure_channel(w.served.target) as channel:
            stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub = orchestrator_pb2_grpc.OrchestratorServiceStub(
                channel
            )
            for number in range(8):
                request = orchestrator_pb2.StartRunRequest(run_id=f"steps-{number}", config_toml=w.toml)
                call = stub.StartRun(request, timeout=5)
                await asyncio.sleep(0.002 * number)
                call.cancel()
                await asyncio.sleep(0.05)
                for started in await w.client.list_runs():
                    assert (await w.end_of(started.run_id)).state == "succeeded"
            assert await w.client.list_runs(), "no call got far enough to prove anything"

    run(scenario())


def test_an_invalid_configuration_names_every_field_and_records_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            broken = w.toml.replace("[ppo]", "colour = 1\n[ppo]\nclip_range = 7")
            for text, fields in {
                broken: {"colour", "ppo.clip_range"},
                w.toml.replace("prompts.txt", "absent.txt"): {"prompts"},
                "": {"config_toml"},
                "x" * 300_000: {"config_toml"},
            }.items():
                with pytest.raises(InvalidArgumentError) as caught:
                    await w.client.start_run("steps-1", text)
                assert {violation.field for violation in caught.value.violations} == fields
            assert await w.client.list_runs() == ()
            assert await health(w.served.target, SERVICE_NAME) == SERVING

    run(scenario())


@pytest.mark.parametrize("run_id", ["", "Upper", "../etc", "a" * 65, "a b", "-x", "a/b", "."])
def test_every_call_refuses_a_bad_run_id(tmp_path: Path, run_id: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            calls = [
                w.client.start_run(run_id, w.toml),
                w.client.get_run(run_id),
                w.client.cancel_run(run_id),
                w.client.resume_run(run_id),
                w.client.roll_back_run(run_id),
                w.client.list_steps(run_id),
                anext(w.client.watch_run(run_id)),
            ]
            for call in calls:
                with pytest.raises(InvalidArgumentError) as caught:
                    await call
                assert caught.value.violations[0].field == "run_id"
            assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == []

    run(scenario())


def test_every_call_says_that_a_run_is_unknown(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            calls = [
                w.client.get_run("nobody"),
                w.client.cancel_run("nobody"),
                w.client.resume_run("nobody"),
                w.client.roll_back_run("nobody"),
                w.client.list_steps("nobody"),
                anext(w.client.watch_run("nobody")),
            ]
            for call in calls:
                with pytest.raises(NotFoundError) as caught:
                    await call
                assert caught.value.reason == "RUN_NOT_FOUND"

    run(scenario())


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=50) as w:
            await w.started("slow-1")
            with pytest.raises(FailedPreconditionError) as caught:
                await w.client.start_run("steps-2", w.toml)
            assert caught.value.reason == "RUN_ACTIVE"
            with pytest.raises(NotFoundError):
                await w.client.get_run("steps-2")
            await w.client.cancel_run("slow-1")
            await w.end_of("slow-1")
            await w.client.start_run("steps-2", w.toml)
            assert (await w.end_of("steps-2")).state == "succeeded"

    run(scenario())


def test_cancelling_stops_after_the_current_step_and_can_be_repeated(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=1000) as w:
            await w.started("slow-1")
            await w.client.cancel_run("slow-1")
            await w.client.cancel_run("slow-1")
            ended = await w.end_of("slow-1")
            assert ended.state == "cancelled"
            assert 1 <= ended.committed_step_count < 1000
            assert (await w.client.cancel_run("slow-1")).state == "cancelled"

    run(scenario())


def test_a_worker_that_hangs_is_ended_some_time_after_the_cancellation(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=3, cancel_seconds=0.5, lease_seconds=1) as w:
            await w.started("hangs-1")
            await w.client.cancel_run("hangs-1")
            ended = await w.end_of("hangs-1")
            assert ended.state == "cancelled"
            assert "did not stop after CancelRun" in ended.error
            await w.client.start_run("steps-2", w.toml)
            assert (await w.end_of("steps-2")).state == "succeeded"

    run(scenario())


def test_a_run_that_has_ended_cannot_be_cancelled(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.client.start_run("steps-1", w.toml)
            await w.end_of("steps-1")
            for call in (w.client.cancel_run("steps-1"), w.client.resume_run("steps-1")):
                with pytest.raises(FailedPreconditionError):
                    await call

    run(scenario())


def test_a_worker_that_dies_fails_the_run_with_its_status_and_last_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, auto_resume="off") as w:
            await w.client.start_run("dies-1", w.toml)
            ended = await w.end_of("dies-1")
            assert ended.state == "failed"
            assert "exited with status 9" in ended.error
            assert "RuntimeError: out of cheese" in ended.error
            assert ended.committed_step_count == 1
            assert await health(w.served.target, SERVICE_NAME) == SERVING

    run(scenario())


def test_a_failed_run_is_resumed_from_its_last_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, auto_resume="off") as w:
            await w.client.start_run("dies-1", w.toml)
            await w.end_of("dies-1")
            resumed = await w.client.resume_run("dies-1")
            assert (resumed.error, resumed.committed_step_count, resumed.end_time) == ("", 1, None)
            ended = await w.end_of("dies-1")
            assert (ended.state, ended.committed_step_count) == ("succeeded", 3)

    run(scenario())


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


def test_runs_are_listed_in_pages_newest_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            for number in range(3):
                await w.client.start_run(f"steps-{number}", w.toml)
                await w.end_of(f"steps-{number}")
            async with grpc.aio.insecure_channel(w.served.target) as channel:
                stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub = (
                    orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
                )
                page = await stub.ListRuns(orchestrator_pb2.ListRunsRequest(page_size=2), timeout=5)
                assert [r.run_id for r in page.runs] == ["steps-2", "steps-1"]
                request = orchestrator_pb2.ListRunsRequest(page_size=2, page_token=page.next_page_token)
                last = await stub.ListRuns(request, timeout=5)
                assert ([r.run_id for r in last.runs], last.next_page_token) == (["steps-0"], "")
                for bad in ({"page_size": 201}, {"page_size": -1}, {"page_token": "x"}):
                    call = stub.ListRuns(orchestrator_pb2.ListRunsRequest(**bad), timeout=5)
                    code, violations = await failure(call)
                    assert (code, violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, next(iter(bad)))

    run(scenario())


def test_stopping_the_orchestrator_ends_the_worker_and_leaves_the_run_resumable(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.started("hangs-1")
            started = time.monotonic()
        assert time.monotonic() - started < 8
        left = Ledger(tmp_path / "runs").get_run("hangs-1")
        assert left.state is RunState.FAILED
        assert "the orchestrator was stopped" in left.error
        async with world(tmp_path) as w:
            assert (await w.client.get_run("hangs-1")).state == "failed"
            assert (await w.client.resume_run("hangs-1")).state == "pending"

    run(scenario())


def left_running(folder: Path, run_id: str = "steps-1") -> Attempt:
    """Record a run as an orchestrator that was killed leaves it."""
    ledger = Ledger(folder / "runs")
    attempt = ledger.create_run(run_id, config_toml=run_toml(folder), total_steps=3)
    ledger.mark_running(attempt)
    ledger.close()
    return attempt


def test_a_run_left_running_by_a_killed_orchestrator_goes_on_at_the_next_start(tmp_path: Path) -> None:
    left_running(tmp_path)

    async def scenario() -> None:
        async with world(tmp_path) as w:
            ended = await w.end_of("steps-1")
            assert (ended.state, ended.committed_step_count) == ("succeeded", 3)
            assert [step.epoch for step in await w.client.list_steps("steps-1")] == [2, 2, 2]
            assert w.served.value("tether_resume_total") == 1

    run(scenario())


def test_a_run_left_running_is_failed_where_runs_do_not_go_on_by_themselves(tmp_path: Path) -> None:
    left_running(tmp_path)

    async def scenario() -> None:
        async with world(tmp_path, auto_resume="off") as w:
            left = await w.client.get_run("steps-1")
            assert left.state == "failed"
            assert "the orchestrator process ended" in left.error
            await w.client.resume_run("steps-1")
            assert (await w.end_of("steps-1")).state == "succeeded"

    run(scenario())


def test_a_run_that_was_to_be_cancelled_is_not_taken_up_again(tmp_path: Path) -> None:
    left_running(tmp_path)
    Ledger(tmp_path / "runs").request_cancel("steps-1")

    async def scenario() -> None:
        async with world(tmp_path) as w:
            assert (await w.client.get_run("steps-1")).state == "cancelled"

    run(scenario())


def test_the_worker_of_a_killed_orchestrator_is_ended_before_another_one_starts(tmp_path: Path) -> None:
    attempt = left_running(tmp_path)
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom tether_services.orchestrator.ledger import Ledger\n"
        "from tether_services.orchestrator.records import Attempt\n"
        "Ledger(Path(sys.argv[1])).acquire_lease(Attempt('steps-1', 1, Path('x')), seconds=600)\n"
        "print('held', flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(attempt.directory.parent)], stdout=subprocess.PIPE, text=True
    ) as stale:
        assert stale.stdout is not None and stale.stdout.readline() == "held\n"
        stale.send_signal(signal.SIGSTOP)

        async def scenario() -> None:
            async with world(tmp_path) as w:
                assert (await w.end_of("steps-1")).state == "succeeded"

        run(scenario())
        assert stale.wait(timeout=10) == -signal.SIGKILL


def test_a_worker_that_dies_is_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.client.start_run("dies-1", w.toml)
            ended = await w.end_of("dies-1")
            assert (ended.state, ended.committed_step_count, ended.error) == ("succeeded", 3, "")
            assert [step.epoch for step in await w.client.list_steps("dies-1")] == [1, 2, 2]
            assert w.served.value("tether_resume_total") == 1

    run(scenario())


def test_a_worker_that_dies_without_a_new_step_is_replaced_only_so_often(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, max_restarts=2) as w:
            await w.client.start_run("crashes-1", w.toml)
            ended = await w.end_of("crashes-1")
            assert (ended.state, ended.committed_step_count) == ("failed", 1)
            assert "exited with status 9" in ended.error
            assert "2 restarts in a row brought no step" in ended.error
            assert Ledger(tmp_path / "runs").get_run("crashes-1").epoch == 3

    run(scenario())


def test_a_worker_that_gives_no_sign_of_life_is_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, lease_seconds=1) as w:
            await w.client.start_run("stops-1", w.toml)
            ended = await w.end_of("stops-1")
            assert (ended.state, ended.committed_step_count) == ("succeeded", 3)
            assert [step.epoch for step in await w.client.list_steps("stops-1")] == [1, 2, 2]

    run(scenario())


def test_a_run_that_a_stop_ended_goes_on_at_the_next_start_only_if_told_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=8) as w:
            await w.started("slow-1")
        async with world(tmp_path) as w:
            assert (await w.client.get_run("slow-1")).state == "failed"
        async with world(tmp_path, auto_resume="always") as w:
            ended = await w.end_of("slow-1")
            assert (ended.state, ended.committed_step_count) == ("succeeded", 8)
        async with world(tmp_path, auto_resume="always") as w:
            assert (await w.client.get_run("slow-1")).state == "succeeded"

    run(scenario())


def test_a_run_whose_end_cannot_be_written_ends_once_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[Attempt] = []
    finish = Ledger.finish

    def full(self: Ledger, attempt: Attempt, state: RunState, **given: Any) -> bool:
        if len(refused) < 3:
            refused.append(attempt)
            raise ResourceExhaustedError("no room", reason="STORAGE_FULL")
        return finish(self, attempt, state, **given)

    monkeypatch.setattr(Ledger, "finish", full)

    async def scenario() -> None:
        async with world(tmp_path, auto_resume="off") as w:
            await w.client.start_run("dies-1", w.toml)
            ended = await w.end_of("dies-1")
            assert ended.state == "failed"
            assert len(refused) == 3
            await w.client.resume_run("dies-1")
            assert (await w.end_of("dies-1")).state == "succeeded"

    run(scenario())


def test_a_resume_that_is_asked_for_again_returns_the_first_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, auto_resume="off") as w:
            await w.client.start_run("dies-1", w.toml)
            await w.end_of("dies-1")
            request_id = str(uuid.uuid4())
            first, again = await asyncio.gather(
                *(w.client.resume_run("dies-1", request_id=request_id) for _ in range(2))
            )
            assert first == again
            assert (first.state, first.committed_step_count) == ("pending", 1)
            await w.end_of("dies-1")
            assert await w.client.resume_run("dies-1", request_id=request_id) == first
            assert Ledger(tmp_path / "runs").get_run("dies-1").epoch == 2, "one attempt, however often it was asked for"
            with pytest.raises(FailedPreconditionError) as caught:
                await w.client.resume_run("dies-1")
            assert caught.value.reason == "RUN_NOT_RESUMABLE"

    run(scenario())


def test_a_resume_whose_caller_has_gone_is_applied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Ledger.begin_attempt

    def slow(self: Ledger, run_id: str, **given: Any) -> Attempt:
        time.sleep(0.3)
        return begin(self, run_id, **given)

    monkeypatch.setattr(Ledger, "begin_attempt", slow)

    async def scenario() -> None:
        async with world(tmp_path, auto_resume="off") as w:
            await w.client.start_run("dies-1", w.toml)
            await w.end_of("dies-1")
            request_id = str(uuid.uuid4())
            with pytest.raises(TetherError):
                await w.client.resume_run("dies-1", request_id=request_id, timeout_seconds=0.15)
            answer = await w.client.resume_run("dies-1", request_id=request_id)
            assert answer.state == "pending"
            assert Ledger(tmp_path / "runs").get_run("dies-1").epoch == 2

    run(scenario())


def test_a_cancellation_that_is_asked_for_again_returns_the_first_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=1000) as w:
            await w.started("slow-1")
            request_id = str(uuid.uuid4())
            first = await w.client.cancel_run("slow-1", request_id=request_id)
            await w.end_of("slow-1")
            resumed = await w.client.resume_run("slow-1")
            assert resumed.state == "pending"
            assert await w.client.cancel_run("slow-1", request_id=request_id) == first
            await asyncio.sleep(0.5)
            assert not (await w.client.get_run("slow-1")).ended, "the repeat must not cancel the resumed run"

    run(scenario())


def test_a_request_id_stands_for_one_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=1000) as w:
            await w.started("slow-1")
            request_id = str(uuid.uuid4())
            await w.client.cancel_run("slow-1", request_id=request_id)
            await w.end_of("slow-1")
            with pytest.raises(InvalidArgumentError) as caught:
                await w.client.resume_run("slow-1", request_id=request_id)
            assert caught.value.reason == "REQUEST_ID_REUSED"
            for call in (w.client.resume_run, w.client.cancel_run):
                with pytest.raises(InvalidArgumentError) as caught:
                    await call("slow-1", request_id="not one")
                assert caught.value.violations[0].field == "request_id"

    run(scenario())


def test_steps_are_listed_with_their_samples_and_hashes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.client.start_run("steps-1", w.toml)
            await w.end_of("steps-1")
            steps = await w.client.list_steps("steps-1")
            assert [(s.step, s.policy_version, s.epoch) for s in steps] == [(n, n, 1) for n in range(3)]
            assert steps[1].adapter_sha256 == f"{2:064x}"
            assert steps[1].samples == SampleCounts(4, 4, 4, {})
            assert (steps[1].checkpoint, steps[1].checkpoint_sha256) == ("", "")
            assert [s.step for s in await w.client.list_steps("steps-1", first_step=2)] == [2]
            assert await w.client.list_steps("steps-1", first_step=9) == ()

    run(scenario())


def test_a_run_is_shown_with_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.client.start_run("steps-1", w.toml)
            await w.end_of("steps-1")
            command = ["run", "show", "steps-1", "--address", w.served.target]
            assert await asyncio.to_thread(main, [*command, "--steps"]) == 0
            assert await asyncio.to_thread(main, [*command, "--steps", "--json"]) == 0
            assert await asyncio.to_thread(main, [*command, "--json"]) == 0

    run(scenario())
    text = capsys.readouterr().out
    table, _, rest = text.partition("{")
    assert "succeeded" in table and "not_scored" not in table
    assert [line.split()[0] for line in table.splitlines()[-4:]] == ["0", "1", "2", "sum"]
    decoder = json.JSONDecoder()
    with_steps, end = decoder.raw_decode("{" + rest)
    assert [step["samples"]["trained"] for step in with_steps["steps"]] == [4, 4, 4]
    assert "steps" not in json.loads(("{" + rest)[end:])


def test_steps_are_listed_in_pages(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=5) as w, grpc.aio.insecure_channel(w.served.target) as channel:
            await w.client.start_run("steps-1", w.toml)
            await w.end_of("steps-1")
            stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub = orchestrator_pb2_grpc.OrchestratorServiceStub(
                channel
            )
            request = orchestrator_pb2.ListStepsRequest
            page = await stub.ListSteps(request(run_id="steps-1", page_size=2), timeout=5)
            assert ([s.step for s in page.steps], page.next_step) == ([0, 1], 2)
            last = await stub.ListSteps(request(run_id="steps-1", first_step=3, page_size=2), timeout=5)
            assert ([s.step for s in last.steps], last.HasField("next_step")) == ([3, 4], False)
            for bad in ({"page_size": 1001}, {"page_size": -1}, {"first_step": -1}):
                code, violations = await failure(stub.ListSteps(request(run_id="steps-1", **bad), timeout=5))
                assert (code, violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, next(iter(bad)))

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


def test_a_second_orchestrator_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path):
            with pytest.raises(InvalidArgumentError) as caught:
                async with world(tmp_path):
                    pass
            assert caught.value.violations[0].field == "state_dir"

    run(scenario())


def test_committed_steps_appear_as_metrics(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=4) as w:
            await w.started("slow-1")
            while w.served.value("tether_run_active") == 0:
                await asyncio.sleep(0.02)
            await w.end_of("slow-1")
            while w.served.value("tether_run_active") == 1:
                await asyncio.sleep(0.02)
            assert w.served.value("tether_step_total", outcome="committed") == 4
            assert w.served.value("tether_policy_version", role="trainer") == 4
            assert w.served.value("tether_orchestrator_requests_total", method="StartRun", code="OK") == 1

    run(scenario())


def test_errors_never_leave_as_internal(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            for text in ("[[[[", "\x00", "model = 3", "[trainer]\nlearning_rate = nan", "[ppo]\nepochs = 1e400"):
                with pytest.raises(TetherError) as caught:
                    await w.client.start_run("steps-1", text)
                assert isinstance(caught.value, InvalidArgumentError), text

    run(scenario())
