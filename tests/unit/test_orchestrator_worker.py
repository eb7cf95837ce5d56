"""How an attempt ends that is refused as too old, and how long the worker waits for the ledger."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_inputs import run_toml
from tether.errors import AbortedError
from tether_services.orchestrator import supervisor, worker
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import RunState


def refuse(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    async def train(*given: Any, **named: Any) -> None:
        raise AbortedError("Epoch 1 is older than 7.", reason=reason)

    monkeypatch.setattr(worker, "_train", train)


def test_an_attempt_that_only_the_generator_calls_over_fails_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "STALE_EPOCH")
    ledger = Ledger(tmp_path)
    attempt = ledger.create_run("demo", config_toml=run_toml(tmp_path), total_steps=3)
    assert asyncio.run(worker.run_attempt(OrchestratorSettings(), ledger, attempt)) == 0
    run = ledger.get_run("demo")
    assert run.state is RunState.FAILED
    for part in ("STALE_EPOCH", "older than 7", "choose another run_id", "adapters.folder"):
        assert part in run.error


@pytest.mark.parametrize("reason", ["STALE_EPOCH", "LEASE_LOST"])
def test_an_attempt_that_another_one_follows_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    refuse(monkeypatch, reason)
    ledger, other = Ledger(tmp_path), Ledger(tmp_path)
    attempt = ledger.create_run("demo", config_toml=run_toml(tmp_path), total_steps=3)
    mark_running = ledger.mark_running

    def overtaken(*given: Any) -> None:
        mark_running(*given)
        if reason == "STALE_EPOCH":
            other.restart_attempt(attempt, reason="hung", max_restarts=3)

    monkeypatch.setattr(ledger, "mark_running", overtaken)
    with pytest.raises(AbortedError):
        asyncio.run(worker.run_attempt(OrchestratorSettings(), ledger, attempt))
    run = ledger.get_run("demo")
    expected = (RunState.PENDING, 2) if reason == "STALE_EPOCH" else (RunState.RUNNING, 1)
    assert (run.state, run.epoch, run.error) == (*expected, "")


def test_a_worker_waits_for_the_ledger_for_less_than_the_silence_that_ends_it() -> None:
    assert 0 < worker.LEDGER_LEASES < supervisor._MISSED_LEASES
