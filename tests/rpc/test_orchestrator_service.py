"""The orchestrator over a loopback channel, with real worker processes that follow a script instead of training."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import pytest

from tests.rpc.scripted_world import world
from tests.rpc.serving import failure, health, run
from tether.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    TetherError,
)
from tether.orchestrator import SampleCounts
from tether.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tether_services.cli.main import main
from tether_services.orchestrator.service import SERVICE_NAME

SERVING = 1


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
