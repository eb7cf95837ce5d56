"""What becomes of a run when its orchestrator or its worker ends, with workers that follow a script."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.scripted_world import left_running, world
from tests.rpc.serving import health, run
from tether.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
)
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt, RunState
from tether_services.orchestrator.service import SERVICE_NAME

SERVING = 1


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


def test_a_second_orchestrator_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path):
            with pytest.raises(InvalidArgumentError) as caught:
                async with world(tmp_path):
                    pass
            assert caught.value.violations[0].field == "state_dir"

    run(scenario())
