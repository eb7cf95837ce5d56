"""Whatever fails beside a run, somebody looks after it: it goes on or ends, and never blocks the next one."""

from __future__ import annotations

import asyncio
import fcntl
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.rpc.scripted_world import left_running, world
from tests.rpc.serving import run
from tests.unit.run_inputs import sample_rows, step_outcome, step_record
from tests.unit.test_ledger_schema import version_of, write_version_1
from tether.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    TetherError,
    UnavailableError,
)
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.engines.process import ProcessEngine
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.ledger_schema import SCHEMA_VERSION
from tether_services.orchestrator.metrics import OrchestratorMetrics
from tether_services.orchestrator.records import RunState
from tether_services.orchestrator.remote import BREAKERS_FILE, LAGGING_FILE
from tether_services.orchestrator.service import open_state
from tether_services.orchestrator.supervisor import Supervisor, _Course, _Watch

UNWRITABLE = FailedPreconditionError("no disk", reason="LEDGER_UNWRITABLE")


def fail_first(monkeypatch: pytest.MonkeyPatch, name: str, times: int, error: Exception) -> list[str]:
    """Have a method of the ledger fail a few times; return the list of its failures so far."""
    real, failures = getattr(Ledger, name), list[str]()

    def method(self: Ledger, *given: Any, **named: Any) -> Any:
        if len(failures) < times:
            failures.append(name)
            raise error
        return real(self, *given, **named)

    monkeypatch.setattr(Ledger, name, method)
    return failures


@pytest.mark.parametrize("error", [UNWRITABLE, OSError(5, "Input/output error")])
@pytest.mark.parametrize("name", ["restart_attempt", "get_lease", "list_steps"])
def test_a_ledger_that_fails_for_a_while_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    failures = fail_first(monkeypatch, name, 3, error)

    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.client.start_run("dies-1", w.toml)
            assert (await w.end_of("dies-1")).state == "succeeded"
            assert failures

    run(scenario())


def report_failure_once(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Have a method of the ledger report a full disk once although it has written; return what it had written."""
    real, written = getattr(Ledger, name), list[Any]()

    def method(self: Ledger, *given: Any, **named: Any) -> Any:
        result = real(self, *given, **named)
        if not written:
            written.append(result)
            raise ResourceExhaustedError("no room", reason="STORAGE_FULL")
        return result

    monkeypatch.setattr(Ledger, name, method)
    return written


def count_workers(folder: Path, run_id: str) -> int:
    return (folder / "runs" / run_id / "started.log").read_text().count("x")


@pytest.mark.parametrize(("name", "run_id"), [("restart_attempt", "dies-1"), ("create_run", "steps-1")])
def test_an_attempt_that_was_written_although_an_error_was_reported_gets_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, run_id: str
) -> None:
    written = report_failure_once(monkeypatch, name)

    async def scenario() -> None:
        async with world(tmp_path) as w:
            with suppress(ResourceExhaustedError):
                await w.client.start_run(run_id, w.toml)
            assert (await w.end_of(run_id)).state == "succeeded"
            epochs = [step.epoch for step in await w.client.list_steps(run_id)]
            assert epochs == ([1, 2, 2] if name == "restart_attempt" else [1, 1, 1])

    run(scenario())
    assert len(written) == 1
    assert count_workers(tmp_path, run_id) == written[0].epoch


@pytest.mark.parametrize("auto_resume", ["always", "off"])
def test_a_resume_that_was_written_although_an_error_was_reported_gets_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto_resume: str
) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=6) as w:
            await w.started("slow-1")
        written = report_failure_once(monkeypatch, "begin_attempt")
        async with world(tmp_path, auto_resume=auto_resume, steps=6) as w:
            if auto_resume == "off":
                with pytest.raises(ResourceExhaustedError):
                    await w.client.resume_run("slow-1")
            assert (await w.end_of("slow-1")).state == "succeeded"
            assert {step.epoch for step in await w.client.list_steps("slow-1")} == {1, 2}
        assert [attempt.epoch for attempt in written] == [2]

    run(scenario())
    assert count_workers(tmp_path, "slow-1") == 2


def test_a_run_that_cannot_be_read_once_it_is_recorded_has_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Ledger.create_run

    def create_run(self: Ledger, run_id: str, **given: Any) -> Any:
        attempt = create(self, run_id, **given)
        fail_first(monkeypatch, "get_run", 2, UNWRITABLE)
        return attempt

    monkeypatch.setattr(Ledger, "create_run", create_run)

    async def scenario() -> None:
        async with world(tmp_path) as w:
            with pytest.raises(TetherError):
                await w.client.start_run("steps-1", w.toml)
            assert (await w.end_of("steps-1")).state == "succeeded"

    run(scenario())


def test_breakers_that_cannot_be_read_end_no_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            folder = tmp_path / "runs" / "dies-1"
            folder.mkdir()
            (folder / BREAKERS_FILE).write_text("")
            await w.client.start_run("dies-1", w.toml)
            assert (await w.end_of("dies-1")).state == "succeeded"

    run(scenario())


def test_breakers_and_lagging_generators_are_exported_until_the_worker_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=200) as w:

            def exported() -> tuple[float, float]:
                breaker = w.served.value("tether_breaker_open", service="generator")
                return breaker, w.served.value("tether_lagging_generators")

            await w.started("slow-1")
            folder = tmp_path / "runs" / "slow-1"
            (folder / BREAKERS_FILE).write_text('{"generator": true}')
            (folder / LAGGING_FILE).write_text('{"generators": ["a:1", "b:1"]}')
            while exported() != (1, 2):
                await asyncio.sleep(0.02)
            await w.client.cancel_run("slow-1")
            assert (await w.end_of("slow-1")).state == "cancelled"
            while exported() != (0, 0):
                await asyncio.sleep(0.02)

    run(scenario())


def test_a_defect_ends_the_run_and_its_worker_and_blocks_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            with monkeypatch.context() as patched:
                patched.setattr(OrchestratorMetrics, "observe_step", lambda *given: 1 / 0)
                await w.client.start_run("hangs-1", w.toml)
                ended = await w.end_of("hangs-1")
            assert ended.state == "failed"
            assert "[INTERNAL] ZeroDivisionError" in ended.error
            await w.client.start_run("steps-2", w.toml)
            assert (await w.end_of("steps-2")).state == "succeeded"

    run(scenario())


def test_a_recovery_that_was_postponed_leaves_a_run_alone_that_was_started_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether_services.orchestrator.supervisor._pause", lambda number: 1.0)

    async def scenario() -> None:
        async with world(tmp_path, steps=8) as w:
            await w.started("slow-1")
        fail_first(monkeypatch, "begin_attempt", 2, UnavailableError("held", reason="LEDGER_BUSY"))
        async with world(tmp_path, auto_resume="always", steps=30) as w:
            await w.started("slow-2")
            assert (await w.end_of("slow-2")).state == "succeeded"
            assert {step.epoch for step in await w.client.list_steps("slow-2")} == {1}
            assert (await w.client.get_run("slow-1")).state == "failed"

    run(scenario())


def test_a_recovery_that_was_postponed_takes_the_run_up_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_running(tmp_path)
    fail_first(monkeypatch, "restart_attempt", 2, UnavailableError("held", reason="LEDGER_BUSY"))

    async def scenario() -> None:
        async with world(tmp_path) as w:
            assert (await w.end_of("steps-1")).state == "succeeded"
            assert {step.epoch for step in await w.client.list_steps("steps-1")} == {2}

    run(scenario())


@pytest.mark.parametrize(("seconds_ago", "ends"), [(60.0, False), (0.5, True)])
def test_time_in_which_nobody_looked_does_not_count_as_silence(tmp_path: Path, seconds_ago: float, ends: bool) -> None:
    settings, ledger = OrchestratorSettings(lease_seconds=1), Ledger(tmp_path)
    attempt = ledger.create_run("demo", config_toml="x = 1", total_steps=3)
    lease = ledger.acquire_lease(attempt, seconds=1)
    supervisor = Supervisor(settings, ProcessEngine(settings), OrchestratorMetrics(CollectorRegistry()), ledger)

    async def scenario() -> bool:
        worker: asyncio.Task[Any] = asyncio.create_task(asyncio.sleep(60))
        now = time.monotonic()
        watch = _Watch(lease_ns=lease.expires_ns, renewed_at=now - 100, looked_at=now - seconds_ago)
        end = await supervisor._end_if_hung(attempt, worker, watch)
        worker.cancel()
        return end is not None

    assert asyncio.run(scenario()) is ends


def test_samples_that_the_ledger_has_lost_are_exported_as_unaccounted(tmp_path: Path) -> None:
    settings, ledger, registry = OrchestratorSettings(), Ledger(tmp_path), CollectorRegistry()
    supervisor = Supervisor(settings, ProcessEngine(settings), OrchestratorMetrics(registry), ledger)
    attempt = ledger.create_run("demo", config_toml="x = 1", total_steps=3)
    course = _Course(attempt)

    def show(step: int) -> float | None:
        asyncio.run(supervisor._show_steps(course, pushed_only=False))
        assert course.next_step == step + 1
        return registry.get_sample_value("tether_samples_unaccounted")

    for step, lost in enumerate((0, 1, 0)):
        ledger.record_samples(attempt, step, sample_rows(4))
        ledger.commit_step(attempt, step_record(step), step_outcome(step))
        with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
            connection.execute("DELETE FROM samples WHERE step = ? AND sample < ?", (step, lost))
        connection.close()
        assert show(step) == (0 if step == 0 else 1)


def test_a_ledger_that_another_orchestrator_uses_is_not_upgraded(tmp_path: Path) -> None:
    write_version_1(tmp_path)
    with (tmp_path / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InvalidArgumentError, match="Another orchestrator"):
            open_state(tmp_path)
        assert version_of(tmp_path) == 0
    ledger, own = open_state(tmp_path)
    assert version_of(tmp_path) == SCHEMA_VERSION
    ledger.close()
    own.close()


def test_a_ledger_that_cannot_be_used_is_let_go_of(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"this is no database" * 1000)
    with pytest.raises(FailedPreconditionError):
        open_state(tmp_path)
    (tmp_path / "ledger.sqlite").unlink()
    ledger, lock = open_state(tmp_path)
    ledger.close()
    lock.close()


def test_a_wrong_count_of_committed_steps_is_corrected_at_the_start(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    attempt = first.create_run("demo", config_toml="x = 1", total_steps=3)
    for step in range(2):
        first.commit_step(attempt, step_record(step))
    first.finish(attempt, RunState.FAILED)
    first.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("UPDATE runs SET committed_steps = 1")
    connection.close()
    ledger, lock = open_state(tmp_path)
    assert ledger.get_run("demo").num_committed_steps == 2
    ledger.close()
    lock.close()


@pytest.mark.parametrize("changed", [{"auto_resume": "off"}, {"max_restarts": 0}])
def test_a_run_that_a_start_ends_is_counted_as_failed_and_has_its_report(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder = left_running(tmp_path).directory
    folder.mkdir(exist_ok=True)

    async def scenario() -> None:
        async with world(tmp_path, **changed) as w:
            assert (await w.client.get_run("steps-1")).state == "failed"
            while w.served.value("tether_step_total", outcome="failed") == 0 or not (folder / "report.json").exists():
                await asyncio.sleep(0.02)
            assert w.served.value("tether_step_total", outcome="failed") == 1
            assert w.served.value("tether_run_active") == 0

    run(scenario())
