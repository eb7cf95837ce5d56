"""How an attempt ends that is refused as too old, and how long the worker waits for the ledger."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.unit.run_inputs import run_toml
from tether.errors import AbortedError, NotFoundError
from tether_services.orchestrator import progress, supervisor, worker
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.lease import boot_clock_ns
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.progress import note_try, note_while, note_work, read_signs, unnoticed
from tether_services.orchestrator.records import RunState
from tether_services.orchestrator.trainer_thread import TrainerThread

HANG_SECONDS = 0.3


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


async def wait_for_ever(done: threading.Event) -> None:
    await asyncio.wait_for(asyncio.to_thread(done.wait), 30)


async def block_the_loop(done: threading.Event) -> None:
    done.wait(30)


async def deadlock_the_trainer(done: threading.Event) -> None:
    await TrainerThread().run(done.wait, 30)


async def get_on(done: threading.Event) -> None:
    while not done.is_set():
        await asyncio.sleep(0.05)
        note_work()


async def wait_beside_work(done: threading.Event) -> None:
    with unnoticed():
        beside = asyncio.create_task(get_on(done))
    await wait_for_ever(done)
    await beside


async def keep_trying(done: threading.Event) -> None:
    while not done.is_set():
        await asyncio.sleep(0.05)
        note_try()


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize(
    ("work", "expires", "expires_after_cancel"),
    [
        (wait_for_ever, True, True),
        (block_the_loop, True, True),
        (wait_beside_work, True, True),
        (deadlock_the_trainer, True, True),
        (keep_trying, False, True),
        (get_on, False, False),
    ],
)
def test_the_lease_of_a_worker_runs_out_when_it_hangs_and_only_then(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[threading.Event], Awaitable[None]],
    expires: bool,
    expires_after_cancel: bool,
    cancelled: bool,
) -> None:
    done, watched = threading.Event(), Ledger(tmp_path)
    changed = {"lease_seconds": 0.2, "hang_seconds": HANG_SECONDS, "cancel_seconds": HANG_SECONDS}
    settings = OrchestratorSettings().model_copy(update=changed)
    attempt = watched.create_run("demo", config_toml=run_toml(tmp_path), total_steps=3)
    monkeypatch.setattr(worker, "_train", lambda *given: work(done))
    thread = threading.Thread(target=lambda: asyncio.run(worker.run_attempt(settings, Ledger(tmp_path), attempt)))
    thread.start()
    while watched.get_lease("demo") is None:
        time.sleep(0.01)
    if cancelled:
        watched.request_cancel("demo")
    time.sleep(HANG_SECONDS + 1.0)
    expected, deadline = expires_after_cancel if cancelled else expires, time.monotonic() + 3.0
    while has_expired(watched) is not expected and time.monotonic() < deadline:
        time.sleep(0.05)  # a busy machine can renew a short lease late; one that hangs never does
    has_run_out = has_expired(watched)
    done.set()
    thread.join()
    assert has_run_out is expected


def has_expired(ledger: Ledger) -> bool:
    lease = ledger.get_lease("demo")
    assert lease is not None
    return lease.expires_ns < boot_clock_ns()


@pytest.mark.parametrize("name", ["generate_timeout_seconds", "score_timeout_seconds", "adapter_timeout_seconds"])
def test_a_bound_on_hangs_that_a_call_could_reach_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"hang_seconds must be above {name} = 599"):
        OrchestratorSettings.model_validate({name: 599, "hang_seconds": 599})
    assert OrchestratorSettings.model_validate({name: 600, "hang_seconds": 0}).hang_seconds == 0


def test_signs_are_given_for_work_that_gives_none_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SIGN_SECONDS", 0.02)

    async def main() -> tuple[int, int, int]:
        begun = read_signs()
        assert await note_while(asyncio.sleep(0.3, "done"), seconds=10.0) == "done"
        signs = read_signs()
        await note_while(asyncio.sleep(0.3), seconds=0.1)
        return signs.work - begun.work, signs.tries - begun.tries, read_signs().tries - signs.tries

    work, tries, tries_cut = asyncio.run(main())
    assert work == 0 and tries > tries_cut > 0


def test_an_error_of_work_that_gives_no_signs_is_raised() -> None:
    async def fail() -> None:
        raise NotFoundError("nothing there")

    with pytest.raises(NotFoundError):
        asyncio.run(note_while(fail(), seconds=1.0))
