"""Steps of a run that are taken back: by command, by an alarm, while it runs and after it has ended."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path

import pytest

from tests.rpc.scripted_world import World, world
from tests.rpc.serving import Served, run
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether.orchestrator import Run, StepEvent
from tether_services.cli.main import main


async def reach(w: World, run_id: str, steps: int) -> Run:
    """Return a run once it has so many committed steps."""
    while (now := await w.client.get_run(run_id)).committed_step_count < steps:
        await asyncio.sleep(0.02)
    return now


async def cancelled(w: World, run_id: str, *, steps: int) -> Run:
    """Return a run that was cancelled after so many steps or a few more."""
    await w.client.start_run(run_id, w.toml)
    await reach(w, run_id, steps)
    await w.client.cancel_run(run_id)
    return await w.end_of(run_id)


def reported_steps(ended: Run) -> int | None:
    """Return how many steps the report of a run tells of; None before there is one."""
    report = Path(ended.directory, "report.json")
    return len(json.loads(report.read_text())["steps"]) if report.exists() else None


def figure(served: Served, name: str, **labels: str) -> float:
    value = served.registry.get_sample_value(name, labels)
    assert value is not None
    return value


def test_a_run_that_has_ended_goes_on_from_where_it_was_rolled_back_to(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=6) as w:
            ended = await cancelled(w, "keeps-1", steps=3)
            steps = ended.committed_step_count
            rolled_back = await w.client.roll_back_run("keeps-1", to_step=1)
            assert (rolled_back.state, rolled_back.committed_step_count) == ("cancelled", 1)
            (rollback,) = rolled_back.rollbacks
            assert (rollback.from_step, rollback.to_step, rollback.reason) == (steps, 1, "RollbackRun")
            while reported_steps(ended) != 1:
                await asyncio.sleep(0.02)
            await w.client.resume_run("keeps-1")
            done = await w.end_of("keeps-1")
            assert (done.state, done.committed_step_count) == ("succeeded", 6)
            made = [(step.step, step.new_version) for step in await w.client.list_steps("keeps-1")]
            assert made == [(0, 1), *((step, steps + step) for step in range(1, 6))]
            assert figure(w.served, "tether_rollbacks_total") == 1

    run(scenario())


def test_a_resume_from_an_earlier_step_rolls_back_and_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=5) as w:
            await cancelled(w, "keeps-1", steps=3)
            resumed = await w.client.resume_run("keeps-1", from_step=0)
            assert (resumed.state, resumed.committed_step_count) == ("pending", 0)
            done = await w.end_of("keeps-1")
            assert (done.state, len(done.rollbacks)) == ("succeeded", 1)
            assert [step.epoch for step in await w.client.list_steps("keeps-1")] == [2] * 5

    run(scenario())


@pytest.mark.parametrize("auto_resume", ["off", "after_crash"])
def test_an_active_run_is_rolled_back_after_its_step_and_goes_on_by_itself(tmp_path: Path, auto_resume: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=8, auto_resume=auto_resume, max_restarts=0) as w:
            await w.client.start_run("keeps-1", w.toml)
            await reach(w, "keeps-1", 3)
            asked = await w.client.roll_back_run("keeps-1", to_step=1)
            assert (asked.state, asked.rollbacks) == ("running", ()), "it is made once the step is done"
            done = await w.end_of("keeps-1")
            assert (done.state, done.committed_step_count, len(done.rollbacks)) == ("succeeded", 8, 1)
            assert [step.epoch for step in await w.client.list_steps("keeps-1")] == [1, *[2] * 7]
            assert figure(w.served, "tether_rollbacks_total") == 1
            assert figure(w.served, "tether_resume_total") == 0, "a rollback is no crash"
            while figure(w.served, "tether_step_total", outcome="committed") < 10:  # those made again count again
                await asyncio.sleep(0.02)

    run(scenario())


def test_an_alarm_is_counted_with_its_rollback(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=5) as w:
            await w.client.start_run("alarms-1", w.toml)
            done = await w.end_of("alarms-1")
            assert (done.state, done.committed_step_count) == ("succeeded", 5)
            assert [rollback.reason for rollback in done.rollbacks] == ["step 3, alarm kl_max: too far"]
            assert figure(w.served, "tether_alarms_total", alarm="kl_max") == 1
            assert figure(w.served, "tether_rollbacks_total") == 1
            while figure(w.served, "tether_policy_version", role="trainer") != 7:  # 3 versions, then 4 more
                await asyncio.sleep(0.02)

    run(scenario())


def test_a_watcher_gets_the_steps_that_are_made_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=5) as w:
            await w.client.start_run("alarms-1", w.toml)
            events = [event async for event in w.client.watch_run("alarms-1")]
            steps = [(event.step, event.new_version) for event in events if isinstance(event, StepEvent)]
            live = [(step.step, step.new_version) for step in await w.client.list_steps("alarms-1")]
            assert steps[-4:] == live[1:] == [(1, 4), (2, 5), (3, 6), (4, 7)]
            assert steps[: len(steps) - 4] == [(0, 1), (1, 2), (2, 3)][: len(steps) - 4]
            assert max(len(event.rollbacks) for event in events if isinstance(event, Run)) == 1

    run(scenario())


def test_a_watcher_that_comes_back_after_a_rollback_gets_what_it_has_not_seen(tmp_path: Path) -> None:
    """Its stream broke after step 2; meanwhile the steps from 1 on were made again."""

    async def scenario() -> None:
        async with world(tmp_path, steps=5) as w:
            await w.client.start_run("alarms-1", w.toml)
            await w.end_of("alarms-1")
            from tether.v1 import orchestrator_pb2 as pb

            async def steps(**known: int) -> list[int]:
                request = pb.WatchRunRequest(run_id="alarms-1", first_step=3, **known)
                stream = w.client._stub.WatchRun(request, timeout=5)
                return [event.step.step async for event in stream if event.WhichOneof("event") == "step"]

            assert await steps(known_rollback_count=0) == [1, 2, 3, 4]
            assert await steps(known_rollback_count=1) == [3, 4]
            assert await steps() == [3, 4], "a new watcher knows of all of them"

    run(scenario())


def test_a_repeated_rollback_takes_back_no_second_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=9) as w:
            ended = await cancelled(w, "keeps-1", steps=3)
            request_id = str(uuid.uuid4())
            answers = [await w.client.roll_back_run("keeps-1", request_id=request_id) for _ in range(3)]
            assert len(set(answers)) == 1
            now = await w.client.get_run("keeps-1")
            assert (now.committed_step_count, len(now.rollbacks)) == (ended.committed_step_count - 1, 1)
            assert figure(w.served, "tether_rollbacks_total") == 1

    run(scenario())


def test_a_rollback_that_cannot_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=9) as w:
            await w.client.start_run("steps-1", w.toml)
            await w.end_of("steps-1")
            with pytest.raises(FailedPreconditionError) as caught:
                await w.client.roll_back_run("steps-1")
            assert caught.value.reason == "RUN_ENDED"
            ended = await cancelled(w, "slow-1", steps=2)
            for call in (w.client.roll_back_run("slow-1", to_step=1), w.client.resume_run("slow-1", from_step=1)):
                with pytest.raises(FailedPreconditionError, match="it can go back to 0") as caught:
                    await call
                assert caught.value.reason == "CHECKPOINT_REMOVED"
            for call, field in (
                (w.client.roll_back_run("slow-1", to_step=ended.committed_step_count), "to_step"),
                (w.client.resume_run("slow-1", from_step=99), "from_step"),
            ):
                with pytest.raises(InvalidArgumentError) as refused:
                    await call
                assert [violation.field for violation in refused.value.violations] == [field]

    run(scenario())


def test_steps_are_rolled_back_and_shown_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=4) as w:
            await cancelled(w, "keeps-1", steps=2)

            async def command(*words: str) -> str:
                line = ["run", *words, "--address", w.served.target]
                assert await asyncio.to_thread(main, line) == 0
                return " ".join(capsys.readouterr().out.split())

            shown = await command("rollback", "keeps-1", "--to-step", "1")
            assert "committed_step_count 1" in shown and "to 1 steps (RollbackRun)" in shown
            assert "cancelled" in shown
            await command("resume", "keeps-1", "--from-step", "0")
            await w.end_of("keeps-1")
            shown = await command("show", "keeps-1", "--steps")
            assert "from 1 to 0 steps (ResumeRun)" in shown

    run(scenario())
