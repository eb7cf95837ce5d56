"""Alarms that follow each other: each takes back one more step, until there were enough of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.unit.test_ledger_rollback import begin, commit
from tether.errors import FailedPreconditionError
from tether_services.orchestrator import loop
from tether_services.orchestrator.alarms import RollbackDueError
from tether_services.orchestrator.config import AlarmConfig
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.metrics import OrchestratorMetrics
from tether_services.orchestrator.records import Attempt, RunState
from tether_services.orchestrator.session import Session

ALARM = "alarm kl_max: kl_per_sequence is 9, above 1"


def session_of(ledger: Ledger, attempt: Attempt, **alarms: Any) -> Any:
    """Return what an alarm needs of a session, with default settings but those of the alarms."""
    config = SimpleNamespace(
        alarms=AlarmConfig.model_validate({"kl_max": 1.0, "action": "rollback"} | alarms), keep_checkpoints=2
    )

    async def write(act: Callable[[], Any]) -> Any:
        return act()

    return SimpleNamespace(ledger=ledger, attempt=attempt, config=config, keep_checkpoint_hours=None, write=write)


def retain(session: Any) -> list[int]:
    """Return the versions of the checkpoints that a session keeps."""
    return [row.version for row in Session.retained_checkpoints(session)]


def raise_alarm(session: Any, monkeypatch: pytest.MonkeyPatch) -> Exception:
    """Return what a step with an alarm ends with."""
    monkeypatch.setattr(loop, "summarise_samples", lambda rollout: {"score_mean": 0.0, "score_std": 0.0})
    update: Any = SimpleNamespace(as_dict=lambda: {"kl_per_sequence": 9.0})
    step = session.ledger.next_step("demo").step
    with pytest.raises((FailedPreconditionError, RollbackDueError)) as caught:
        asyncio.run(loop.stop_at_alarm(session, step, None, update))  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(("alarms", "back"), [({}, [5, 4, 3]), ({"rollback_steps": 2, "max_rollbacks": 2}, [4, 2])])
def test_as_many_alarms_in_a_row_as_are_allowed_take_steps_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alarms: dict[str, int], back: list[int]
) -> None:
    ledger, attempt = begin(tmp_path, steps=0)
    session = session_of(ledger, attempt, **alarms)
    for _ in range(6):
        commit(ledger, attempt)
        retain(session)
    for to_step in back:
        assert isinstance(raise_alarm(session, monkeypatch), RollbackDueError)
        following = ledger.restart_attempt(session.attempt, reason="", max_restarts=0)
        assert following is not None
        session.attempt = following
        assert retain(session)[0] == to_step
        assert ledger.next_step("demo").step == to_step
    error = raise_alarm(session, monkeypatch)
    assert isinstance(error, FailedPreconditionError) and error.reason == "ALARM"
    assert error.message.startswith(f"step {back[-1]}, {ALARM}; not rolled back: alarms have rolled the run back")


@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_without_alarms_that_roll_back_no_more_checkpoints_are_kept_than_was_said(tmp_path: Path, action: str) -> None:
    ledger, attempt = begin(tmp_path, steps=6)
    limit = {"kl_max": None} if action == "rollback" else {}
    assert retain(session_of(ledger, attempt, action=action, **limit)) == [6, 5]


def test_an_alarm_of_the_first_step_fails_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, attempt = begin(tmp_path, steps=0)
    error = raise_alarm(session_of(ledger, attempt), monkeypatch)
    assert isinstance(error, FailedPreconditionError) and error.reason == "ALARM"
    assert error.message.startswith(f"step 0, {ALARM}; not rolled back: no committed step could be taken back; ")
    assert (ledger.get_run("demo").rollback_to, ledger.list_rollbacks("demo")) == (None, [])


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_an_alarm_without_a_way_back_is_an_alarm_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    if damage == "gone":
        ledger.retain_checkpoints(attempt, count=1)
    else:
        (attempt.directory / "checkpoints" / "000002-e1" / "weights.safetensors").write_bytes(b"damaged")
    error = raise_alarm(session_of(ledger, attempt), monkeypatch)
    assert isinstance(error, FailedPreconditionError) and error.reason == "ALARM"
    why = "is not kept any more" if damage == "gone" else "cannot be loaded"
    assert error.message.startswith(f"step 3, {ALARM}; not rolled back: ") and why in error.message
    assert ledger.list_ways_back("demo")[-1] == 3, "the newest one stays"
    ledger.finish(attempt, RunState.FAILED, error=f"[{error.reason}] {error.message}")
    registry = CollectorRegistry()
    OrchestratorMetrics(registry).observe_state(ledger.get_run("demo"))
    assert registry.get_sample_value("tether_alarms_total", {"alarm": "kl_max"}) == 1
