"""The lease of a run: one writer at a time, whatever the clock on the wall says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.run_inputs import step_record
from tether.errors import AbortedError, ResourceExhaustedError
from tether_services.orchestrator import lease as lease_module
from tether_services.orchestrator import ledger_runs
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.heartbeat import Heartbeat
from tether_services.orchestrator.lease import Lease, boot_clock_ns, boot_id, end_holder, is_alive, own_holder
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt, RunState

HOLD = """
import sys, time
from pathlib import Path
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt

folder = Path(sys.argv[1])
Ledger(folder).acquire_lease(Attempt("demo", 1, folder / "demo"), seconds=float(sys.argv[2]))
print("held", flush=True)
time.sleep(600)
"""

QUICK = OrchestratorSettings().model_copy(update={"lease_seconds": 0.4})


class Clock:
    """Nanoseconds that pass when told to."""

    def __init__(self) -> None:
        self.now = boot_clock_ns()

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


def new_run(ledger: Ledger) -> Attempt:
    return ledger.create_run("demo", config_toml="x = 1", total_steps=5)


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[Callable[[float], subprocess.Popen[str]]]:
    """Start another process that holds the lease of the run."""
    processes = []

    def start(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def test_the_holder_is_this_process_and_lives() -> None:
    lease = Lease("demo", 1, own_holder(), boot_id(), 0)
    assert own_holder().startswith(f"{os.getpid()}:")
    assert is_alive(lease)
    assert not is_alive(replace(lease, holder=f"{os.getpid()}:1")), "the number is used again by another process"
    assert not is_alive(replace(lease, boot_id="another start of the machine"))
    assert not is_alive(replace(lease, holder="4194303:123"))


def test_a_process_that_has_ended_and_was_not_waited_for_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    mark = lease_module._start_mark(process.pid)
    time.sleep(0.5)
    assert not is_alive(Lease("demo", 1, f"{process.pid}:{mark}", boot_id(), 0))
    process.wait()


def test_a_worker_with_the_lease_writes_and_its_end_gives_it_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    lease = ledger.acquire_lease(attempt, seconds=20)
    assert ledger.get_lease("demo") == lease
    ledger.mark_running(attempt)
    ledger.commit_step(attempt, step_record(0))
    assert ledger.finish(attempt, RunState.SUCCEEDED)
    assert ledger.get_lease("demo") is None


def test_a_lease_needs_the_latest_attempt(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    old = new_run(ledger)
    ledger.finish(old, RunState.FAILED)
    ledger.begin_attempt("demo")
    with pytest.raises(AbortedError) as caught:
        ledger.acquire_lease(old, seconds=20)
    assert caught.value.reason == "STALE_EPOCH"


def test_a_lease_that_a_living_process_holds_is_not_given_away(
    tmp_path: Path, holding: Callable[[float], subprocess.Popen[str]]
) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    holding(600)
    with pytest.raises(AbortedError) as caught:
        ledger.acquire_lease(attempt, seconds=20)
    assert caught.value.reason == "LEASE_HELD"
    with pytest.raises(AbortedError) as caught:
        ledger.commit_step(attempt, step_record(0))
    assert caught.value.reason == "LEASE_LOST"


def test_the_lease_of_a_dead_process_is_free_at_once(
    tmp_path: Path, holding: Callable[[float], subprocess.Popen[str]]
) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    holder = holding(600)
    holder.kill()
    holder.wait()
    ledger.acquire_lease(attempt, seconds=20)
    ledger.commit_step(attempt, step_record(0))


def test_a_stopped_process_loses_its_lease_when_it_expires(
    tmp_path: Path, holding: Callable[[float], subprocess.Popen[str]]
) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path, clock_ns=clock)
    attempt = new_run(ledger)
    holding(30).send_signal(signal.SIGSTOP)
    clock.now = boot_clock_ns()  # the other process has taken its time to start
    with pytest.raises(AbortedError):
        ledger.acquire_lease(attempt, seconds=20)
    clock.advance(31)
    ledger.acquire_lease(attempt, seconds=20)


def test_a_holder_that_is_stopped_is_ended(tmp_path: Path, holding: Callable[[float], subprocess.Popen[str]]) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    holder = holding(600)
    holder.send_signal(signal.SIGSTOP)
    lease = ledger.get_lease("demo")
    assert lease is not None
    assert end_holder(lease)
    assert holder.wait(timeout=10) == -signal.SIGKILL
    assert not end_holder(lease)
    ledger.acquire_lease(attempt, seconds=20)


def test_a_stranger_that_has_the_number_of_a_holder_is_not_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        assert not end_holder(Lease("demo", 1, f"{stranger.pid}:1", boot_id(), 0))
        assert stranger.poll() is None
        stranger.kill()


def test_a_writer_whose_lease_was_taken_writes_nothing(tmp_path: Path) -> None:
    clock = Clock()
    first, second = Ledger(tmp_path, clock_ns=clock), Ledger(tmp_path, clock_ns=clock)
    attempt = new_run(first)
    lease = first.acquire_lease(attempt, seconds=20)
    clock.advance(21)
    taken = replace(lease, holder="4194303:1", expires_ns=clock() + 10**10)
    with second._file.write() as connection:
        ledger_runs.put_lease(connection, replace(taken, holder=own_holder(), epoch=1), now_ns=clock())
        connection.execute("UPDATE leases SET holder = '4194303:1'")
    acts: tuple[Callable[[], object], ...] = (
        lambda: first.commit_step(attempt, step_record(0)),
        lambda: first.mark_running(attempt),
        lambda: first.finish(attempt, RunState.SUCCEEDED),
        lambda: first.renew_lease(lease, seconds=20),
    )
    for act in acts:
        with pytest.raises(AbortedError) as caught:
            act()
        assert caught.value.reason == "LEASE_LOST"
    assert first.get_run("demo").num_committed_steps == 0


def test_an_expired_lease_that_nobody_took_is_as_good_as_before(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path, clock_ns=clock)
    attempt = new_run(ledger)
    lease = ledger.acquire_lease(attempt, seconds=20)
    clock.advance(3600)
    ledger.commit_step(attempt, step_record(0))
    renewed = ledger.renew_lease(lease, seconds=20)
    assert renewed.expires_ns == clock() + 20 * 10**9


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_jump_of_the_time_of_day_neither_ends_nor_prolongs_a_lease(
    tmp_path: Path, jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    before = ledger.acquire_lease(attempt, seconds=20)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    after = ledger.renew_lease(before, seconds=20)
    assert 0 <= after.expires_ns - before.expires_ns < 5 * 10**9
    ledger.commit_step(attempt, step_record(0))


def test_on_the_clock_of_the_wall_a_jump_would_end_a_lease_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holding: Callable[[float], subprocess.Popen[str]]
) -> None:
    """The control of the test above: the same lease, judged by the time of day, is given away beside its holder."""
    right = Ledger(tmp_path)
    attempt = new_run(right)
    holding(600)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600 * 24 * 365 * 60)
    with pytest.raises(AbortedError):
        right.acquire_lease(attempt, seconds=20)
    Ledger(tmp_path, clock_ns=lambda: int(time.time() * 1e9)).acquire_lease(attempt, seconds=20)


def test_without_the_check_of_the_lease_two_writers_would_be_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holding: Callable[[float], subprocess.Popen[str]]
) -> None:
    """The control of the lease."""
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    holding(600)
    with pytest.raises(AbortedError):
        ledger.commit_step(attempt, step_record(0))
    monkeypatch.setattr(ledger_runs, "check_lease", lambda *_: None)
    ledger.commit_step(attempt, step_record(0))


def test_the_service_ends_an_attempt_without_a_lease_of_its_own(
    tmp_path: Path, holding: Callable[[float], subprocess.Popen[str]]
) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    holding(600)
    assert ledger.finish(attempt, RunState.FAILED, error="seen dead")
    assert ledger.get_lease("demo") is None


def test_a_heartbeat_renews_the_lease(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    lease = ledger.acquire_lease(new_run(ledger), seconds=0.4)
    with Heartbeat(ledger, lease, QUICK) as heartbeat:
        time.sleep(1.0)
        heartbeat.check()
        renewed = ledger.get_lease("demo")
        assert renewed is not None and renewed.expires_ns > boot_clock_ns() > lease.expires_ns


def test_a_heartbeat_whose_lease_was_taken_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    lease = ledger.acquire_lease(new_run(ledger), seconds=0.4)
    with Heartbeat(ledger, lease, QUICK) as heartbeat:
        heartbeat.check()
        with ledger._file.write() as connection:
            connection.execute("UPDATE leases SET holder = '4194303:1'")
        time.sleep(0.5)
        with pytest.raises(AbortedError) as caught:
            heartbeat.check()
        assert caught.value.reason == "LEASE_LOST"


def test_a_heartbeat_that_cannot_write_says_why_once_the_lease_has_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    lease = ledger.acquire_lease(new_run(ledger), seconds=0.4)

    def full(*_: object, **__: object) -> Lease:
        raise ResourceExhaustedError("no room", reason="STORAGE_FULL")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "renew_lease", full)
        with Heartbeat(ledger, lease, QUICK) as heartbeat:
            heartbeat.check()
            time.sleep(0.6)
            with pytest.raises(ResourceExhaustedError):
                heartbeat.check()
            patch.undo()
            heartbeat.check()
