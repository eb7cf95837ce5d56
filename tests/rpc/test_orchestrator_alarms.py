"""Alarms and rollbacks of a real run: a policy that goes wrong is taken back, and the run goes on from before it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rpc.run_world import World, world
from tests.rpc.serving import run
from tether.errors import FailedPreconditionError
from tether_services.orchestrator import worker
from tether_services.orchestrator.alarms import RollbackDueError
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.loop import run_step, run_training
from tether_services.orchestrator.records import Attempt, RunState
from tether_services.orchestrator.report import build_report
from tether_services.orchestrator.report_page import render_page
from tether_services.orchestrator.report_writing import try_to_report
from tether_services.orchestrator.session import Session
from tether_services.orchestrator.worker import ROLLED_BACK_EXIT_CODE, run_attempt

ALARMS = "[alarms]\nkl_max = 5.0\n"
ROLLBACK = ALARMS + 'action = "rollback"\n'


def spoil(session: Session) -> None:
    """Make the policy of a session a bad one, as an update gone wrong would."""
    with torch.no_grad():
        for name, parameter in session.trainer._model.adapter_parameters("policy").items():
            if "lora_B" in name:
                parameter.mul_(60.0)


def spoil_after(session: Session, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the update of a step end with a bad policy."""
    update = session.trainer.update

    def update_badly(*given: Any) -> Any:
        report = update(*given)
        if session.trainer.num_updates == step + 1:
            spoil(session)
        return report

    monkeypatch.setattr(session.trainer, "update", update_badly)


async def fail_at_alarm(w: World, ppo: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Attempt, Exception]:
    """Return the first attempt of a run whose second step makes a bad policy, and what ended it."""
    attempt = w.new_run(extra="evaluation = false", ppo=ppo)
    async with w.session(attempt) as session:
        spoil_after(session, 1, monkeypatch)
        with pytest.raises((FailedPreconditionError, RollbackDueError)) as caught:
            await run_training(session)
    return attempt, caught.value


def test_an_alarm_stops_the_run_before_its_step_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt, error = await fail_at_alarm(w, ALARMS, monkeypatch)
            assert isinstance(error, FailedPreconditionError) and error.reason == "ALARM"
            assert "step 2, alarm kl_max: kl_per_sequence is" in error.message
            assert "--from-step" in error.message
            assert w.ledger.get_run("demo").num_committed_steps == 2, (
                "the bad version is committed, what it led to is not"
            )
            w.ledger.finish(attempt, RunState.FAILED, error=error.message)
            again = w.ledger.begin_attempt("demo", from_step=1)
            async with w.session(again) as session:
                await run_training(session)
            assert w.ledger.get_run("demo").num_committed_steps == 3

    run(scenario(), timeout_seconds=120)


def test_a_bad_policy_is_rolled_back_within_a_step_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt, error = await fail_at_alarm(w, ROLLBACK, monkeypatch)
            assert isinstance(error, RollbackDueError)
            following = w.ledger.restart_attempt(attempt, reason=str(error), max_restarts=0)
            assert following is not None
            (rollback,) = w.ledger.list_rollbacks("demo")
            assert (rollback.from_step, rollback.to_step) == (2, 1)
            assert rollback.reason.startswith("step 2, alarm kl_max")
            async with w.adapter_client() as adapters:
                assert (await adapters.get_active_adapter()).policy_version == 2, "the bad one, until somebody is there"
                async with w.session(following) as session:
                    assert session.trainer.num_updates == 1
                    assert (await adapters.get_active_adapter()).policy_version == 1
                    usable = [a for a in await adapters.list_adapters() if a.state != "retiring"]
                    assert [a.policy_version for a in usable] == [1], "the bad one is dropped"
                    assert w.ledger.get_run("demo").policy_version == 1
                    await run_training(session)
                assert (await adapters.get_active_adapter()).policy_version == 4
            states = w.ledger.list_states("demo")
            assert [(s.step, s.policy_version, s.new_version) for s in states] == [(0, 0, 1), (1, 1, 3), (2, 3, 4)]
            assert all(step.metrics["kl_per_sequence"] < 5.0 for step in w.ledger.list_steps("demo"))
            assert w.ledger.count_samples("demo") == {"trained": 24, "abandoned": 16}
            w.ledger.finish(following, RunState.SUCCEEDED)
            report = build_report(w.ledger, "demo", state=RunState.SUCCEEDED, error="")
            assert [entry["to_step"] for entry in report["rollbacks"]] == [1]
            assert "rolled back from 2 to 1 steps: step 2, alarm kl_max" in render_page(report)

    run(scenario(), timeout_seconds=120)


def test_after_a_rollback_the_same_prompts_get_other_samples(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, one_by_one=True) as w:
            attempt = w.new_run(extra="evaluation = false\nkeep_checkpoints = 3")
            seen: list[list[str]] = []
            for epoch in range(3):
                async with w.session(attempt) as session:
                    first = await run_step(session, 0)
                seen.append([str(first.distributions), str(first.metrics["kl_per_sequence"])])
                w.ledger.finish(attempt, RunState.FAILED, error="killed")
                if epoch < 2:
                    attempt = w.ledger.begin_attempt("demo", from_step=0)
            assert len({tuple(figures) for figures in seen}) == 3
            assert [s.new_version for s in w.ledger.list_states("demo")] == [3]

    run(scenario(), timeout_seconds=120)


def test_a_run_goes_on_from_an_earlier_checkpoint_when_the_newest_is_damaged(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            first = w.new_run(extra="evaluation = false")
            async with w.session(first) as session:
                await run_step(session, 0)
                await run_step(session, 1)
            w.ledger.finish(first, RunState.FAILED, error="killed")
            (first.directory / "checkpoints" / "000002-e1" / "weights.safetensors").write_bytes(b"damaged")
            with pytest.raises(FailedPreconditionError, match="--from-step N, N of 0, 1") as caught:
                async with w.session(w.ledger.begin_attempt("demo")):
                    pass
            assert caught.value.reason == "CHECKPOINT_DAMAGED"
            w.ledger.finish(Attempt("demo", 2, first.directory), RunState.FAILED, error=caught.value.message)
            async with w.session(w.ledger.begin_attempt("demo", from_step=1)) as session:
                await run_training(session)
            assert w.ledger.get_run("demo").num_committed_steps == 3

    run(scenario(), timeout_seconds=120)


def test_no_step_is_taken_back_for_an_earlier_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            first = w.new_run(extra="evaluation = false")
            async with w.session(first) as session:
                await run_step(session, 0)
                await run_step(session, 1)
            w.ledger.finish(first, RunState.FAILED, error="killed")
            damaged = first.directory / "checkpoints" / "000001-e1" / "weights.safetensors"
            content = bytearray(damaged.read_bytes())
            content[len(content) // 2] ^= 1
            damaged.write_bytes(content)
            for act in (
                lambda: w.ledger.begin_attempt("demo", from_step=1),
                lambda: w.ledger.request_rollback("demo"),
            ):
                with pytest.raises(FailedPreconditionError, match=r"It can go back to 0, 2 \(0") as caught:
                    act()
                assert caught.value.reason == "CHECKPOINT_DAMAGED"
            async with w.session(w.ledger.begin_attempt("demo", from_step=2)) as session:
                await run_training(session)
            assert w.ledger.get_run("demo").num_committed_steps == 3

    run(scenario(), timeout_seconds=120)


def test_a_run_that_begins_anew_serves_the_base_before_its_first_prompt(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            first = w.new_run(extra="evaluation = false")
            async with w.session(first) as session:
                await run_step(session, 0)
            w.ledger.finish(first, RunState.FAILED, error="killed")
            async with w.session(w.ledger.begin_attempt("demo", from_step=0)), w.adapter_client() as adapters:
                active = await adapters.get_active_adapter()
                assert (active.run_id, active.policy_version) == ("demo", 0)
                assert all(adapter.state == "retiring" for adapter in await adapters.list_adapters())
                assert w.ledger.get_run("demo").policy_version == 0

    run(scenario(), timeout_seconds=120)


def test_the_worker_makes_way_for_a_rollback_that_was_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            working = asyncio.create_task(run_attempt(w.services.settings, w.ledger, attempt))
            while w.ledger.get_run("demo").num_committed_steps < 1:
                await asyncio.sleep(0.01)
            w.ledger.request_rollback("demo", to_step=0)
            assert await working == ROLLED_BACK_EXIT_CODE
            run_ = w.ledger.get_run("demo")
            assert (run_.state, run_.rollback_to) == (RunState.RUNNING, 0), "the supervisor begins the next attempt"
            assert run_.num_committed_steps < 3

    run(scenario(), timeout_seconds=120)


def test_a_rollback_that_comes_while_the_report_is_written_is_made_by_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            first = w.new_run(extra="evaluation = false")

            def report_late(ledger: Ledger, run_id: str, *, state: RunState, error: str) -> None:
                try_to_report(ledger, run_id, state=state, error=error)
                if ledger.get_run(run_id).epoch == 1:
                    ledger.request_rollback(run_id, to_step=2)

            monkeypatch.setattr(worker, "try_to_report", report_late)
            assert await run_attempt(w.services.settings, w.ledger, first) == ROLLED_BACK_EXIT_CODE
            assert w.ledger.get_run("demo").state is RunState.RUNNING
            second = w.ledger.restart_attempt(first, reason="RollbackRun", max_restarts=0)
            assert second is not None
            assert await run_attempt(w.services.settings, w.ledger, second) == 0
            ended = w.ledger.get_run("demo")
            assert (ended.state, ended.num_committed_steps, ended.branch) == (RunState.SUCCEEDED, 3, 1)
            written = json.loads((first.directory / "report.json").read_text())
            assert (written["state"], written["attempts"], len(written["rollbacks"])) == ("SUCCEEDED", 2, 1)

    run(scenario(), timeout_seconds=120)
