"""The step ledger: exactly once, without gaps, fenced by epochs, readable while written."""

from __future__ import annotations

import math
import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from tether.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt, RunState, StepRecord


def new_run(ledger: Ledger, run_id: str = "demo", *, total_steps: int = 5) -> Attempt:
    return ledger.create_run(run_id, config_toml="x = 1", total_steps=total_steps)


def record(step: int) -> StepRecord:
    return StepRecord(step, step, {"score_mean": step * 0.5}, {"score": [float(step)]})


def test_a_new_run_is_pending_in_its_first_attempt(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    run = ledger.get_run("demo")
    assert attempt == Attempt("demo", 1, tmp_path.resolve() / "demo")
    assert (run.state, run.epoch, run.num_committed_steps, run.num_total_steps) == (RunState.PENDING, 1, 0, 5)
    assert (run.policy_version, run.error, run.cancel_requested, run.end_time) == (0, "", False, None)
    assert run.config_toml == "x = 1"
    assert abs(run.create_time - time.time()) < 5


def test_a_run_goes_from_pending_over_running_to_its_end(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    ledger.mark_running(attempt)
    assert ledger.get_run("demo").state is RunState.RUNNING
    assert ledger.finish(attempt, RunState.SUCCEEDED)
    run = ledger.get_run("demo")
    assert run.state is RunState.SUCCEEDED
    assert run.end_time is not None


def test_a_committed_step_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.commit_step(new_run(ledger), record(0))
    (step,) = Ledger(tmp_path).list_steps("demo")
    assert (step.step, step.policy_version, step.metrics, step.distributions) == (
        0,
        0,
        {"score_mean": 0.0},
        {"score": [0.0]},
    )
    assert abs(step.commit_time - time.time()) < 5


def test_a_version_is_in_use_once_its_push_is_recorded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    for step in range(3):
        ledger.commit_step(attempt, record(step))
        run = ledger.get_run("demo")
        assert (run.num_committed_steps, run.policy_version) == (step + 1, step)
        assert ledger.has_open_push("demo")
        ledger.record_push(attempt, step + 1, {})
        assert ledger.get_run("demo").policy_version == step + 1
        assert not ledger.has_open_push("demo")


@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_step_that_is_not_the_next_one_is_refused(tmp_path: Path, step: int) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    ledger.commit_step(attempt, record(0))
    with pytest.raises(AbortedError) as caught:
        ledger.commit_step(attempt, record(step))
    assert caught.value.reason == "STEP_OUT_OF_ORDER"
    assert len(ledger.list_steps("demo")) == 1


def test_a_metric_that_is_not_finite_is_refused_and_commits_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    with pytest.raises(ValueError, match="JSON"):
        ledger.commit_step(attempt, StepRecord(0, 0, {"score_mean": math.nan}))
    assert ledger.list_steps("demo") == []


def test_the_writer_of_an_earlier_attempt_is_fenced_off(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    old = new_run(ledger)
    ledger.commit_step(old, record(0))
    ledger.finish(old, RunState.FAILED, error="killed")
    new = ledger.begin_attempt("demo")
    assert new.epoch == 2
    with pytest.raises(AbortedError) as caught:
        ledger.commit_step(old, record(1))
    assert caught.value.reason == "STALE_EPOCH"
    with pytest.raises(AbortedError):
        ledger.mark_running(old)
    assert not ledger.finish(old, RunState.SUCCEEDED)
    assert ledger.get_run("demo").state is RunState.PENDING
    ledger.commit_step(new, record(1))
    assert ledger.get_run("demo").num_committed_steps == 2


def test_nothing_can_be_written_after_the_end(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    ledger.finish(attempt, RunState.FAILED, error="first")
    assert not ledger.finish(attempt, RunState.SUCCEEDED, error="second")
    with pytest.raises(AbortedError):
        ledger.commit_step(attempt, record(0))
    assert ledger.get_run("demo").error == "first"


def test_only_one_run_is_active_at_a_time(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger, "one")
    with pytest.raises(FailedPreconditionError) as caught:
        new_run(ledger, "two")
    assert caught.value.reason == "RUN_ACTIVE"
    assert "one" in caught.value.message
    active = ledger.active_run()
    assert active is not None and active.run_id == "one"
    ledger.finish(attempt, RunState.CANCELLED)
    assert ledger.active_run() is None
    new_run(ledger, "two")


def test_a_run_id_is_used_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.finish(new_run(ledger), RunState.SUCCEEDED)
    with pytest.raises(InvalidArgumentError) as caught:
        new_run(ledger)
    assert caught.value.violations[0].field == "run_id"


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.CANCELLED])
def test_an_unsuccessful_run_can_begin_again(tmp_path: Path, state: RunState) -> None:
    ledger = Ledger(tmp_path)
    ledger.request_cancel(new_run(ledger).run_id)
    ledger.finish(Attempt("demo", 1, tmp_path), state, error="why")
    ledger.begin_attempt("demo")
    run = ledger.get_run("demo")
    assert (run.state, run.error, run.cancel_requested, run.end_time) == (RunState.PENDING, "", False, None)


def test_a_running_or_successful_run_cannot_be_resumed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    with pytest.raises(FailedPreconditionError, match="PENDING"):
        ledger.begin_attempt("demo")
    ledger.finish(attempt, RunState.SUCCEEDED)
    with pytest.raises(FailedPreconditionError) as caught:
        ledger.begin_attempt("demo")
    assert caught.value.reason == "RUN_NOT_RESUMABLE"


def test_a_run_cannot_be_resumed_beside_an_active_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.finish(new_run(ledger, "one"), RunState.FAILED)
    new_run(ledger, "two")
    with pytest.raises(FailedPreconditionError) as caught:
        ledger.begin_attempt("one")
    assert caught.value.reason == "RUN_ACTIVE"
    assert ledger.get_run("one").state is RunState.FAILED


def test_cancelling_is_a_request_that_can_be_repeated(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    assert ledger.request_cancel("demo").cancel_requested
    assert ledger.request_cancel("demo").cancel_requested
    ledger.finish(attempt, RunState.CANCELLED)
    assert ledger.request_cancel("demo").state is RunState.CANCELLED


def test_a_repeated_cancellation_returns_the_first_answer_and_leaves_a_resumed_run_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    first = ledger.request_cancel("demo", request_id="one")
    ledger.finish(attempt, RunState.CANCELLED)
    ledger.begin_attempt("demo", request_id="two")
    assert ledger.request_cancel("demo", request_id="one") == first
    assert not ledger.get_run("demo").cancel_requested
    assert ledger.find_answer("two", method="ResumeRun", run_id="demo") == ledger.get_run("demo")
    assert ledger.find_answer("", method="ResumeRun", run_id="demo") is None
    assert ledger.find_answer("three", method="ResumeRun", run_id="demo") is None
    with pytest.raises(InvalidArgumentError) as caught:
        ledger.request_cancel("demo", request_id="two")
    assert caught.value.reason == "REQUEST_ID_REUSED"


def test_a_request_that_failed_is_not_remembered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    with pytest.raises(FailedPreconditionError):
        ledger.begin_attempt("demo", request_id="one")
    ledger.finish(attempt, RunState.FAILED)
    assert ledger.begin_attempt("demo", request_id="one").epoch == 2


def test_old_answers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    new_run(ledger)
    ledger.request_cancel("demo", request_id="one")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 8 * 86400)
    ledger.request_cancel("demo", request_id="two")
    assert ledger.find_answer("one", method="CancelRun", run_id="demo") is None
    assert ledger.find_answer("two", method="CancelRun", run_id="demo") is not None


def test_an_attempt_that_died_is_followed_by_another_one_a_few_times(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt: Attempt | None = new_run(ledger)
    for epoch in (2, 3):
        assert attempt is not None
        attempt = ledger.restart_attempt(attempt, reason="killed", max_restarts=2)
        assert attempt is not None and attempt.epoch == epoch
        assert ledger.get_run("demo").state is RunState.PENDING
    assert attempt is not None
    assert ledger.restart_attempt(attempt, reason="killed", max_restarts=2) is None
    run = ledger.get_run("demo")
    assert (run.state, run.error) == (RunState.FAILED, "killed (2 restarts in a row brought no step)")


def test_a_committed_step_renews_the_number_of_restarts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt: Attempt | None = new_run(ledger)
    for step in range(4):
        assert attempt is not None
        ledger.commit_step(attempt, record(step))
        attempt = ledger.restart_attempt(attempt, reason="killed", max_restarts=1)
    assert attempt is not None and attempt.epoch == 5


def test_an_attempt_that_is_over_or_was_to_be_cancelled_is_not_followed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    ledger.request_cancel("demo")
    assert ledger.restart_attempt(attempt, reason="killed", max_restarts=5) is None
    assert (ledger.get_run("demo").state, ledger.get_run("demo").error) == (RunState.CANCELLED, "")
    second = ledger.begin_attempt("demo")
    assert ledger.restart_attempt(attempt, reason="killed", max_restarts=5) is None
    ledger.finish(second, RunState.SUCCEEDED)
    assert ledger.restart_attempt(second, reason="killed", max_restarts=5) is None
    assert ledger.get_run("demo").state is RunState.SUCCEEDED


def test_the_newest_run_that_a_stop_interrupted_is_known_until_it_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for run_id in ("one", "two"):
        ledger.finish(new_run(ledger, run_id), RunState.FAILED, error="stopped", interrupted=True)
    ledger.finish(new_run(ledger, "three"), RunState.FAILED, error="a defect")
    interrupted = ledger.interrupted_run()
    assert interrupted is not None and interrupted.run_id == "two"
    ledger.finish(ledger.begin_attempt("two"), RunState.SUCCEEDED)
    interrupted = ledger.interrupted_run()
    assert interrupted is not None and interrupted.run_id == "one"


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED])
def test_a_run_that_has_ended_cannot_be_cancelled(tmp_path: Path, state: RunState) -> None:
    ledger = Ledger(tmp_path)
    ledger.finish(new_run(ledger), state)
    with pytest.raises(FailedPreconditionError) as caught:
        ledger.request_cancel("demo")
    assert caught.value.reason == "RUN_ENDED"


def test_an_unknown_run_is_not_found(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for act in (ledger.get_run, ledger.request_cancel, ledger.begin_attempt):
        with pytest.raises(NotFoundError):
            act("nobody")
    assert ledger.list_steps("nobody") == []


def test_runs_are_listed_newest_first_in_pages(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number in range(5):
        ledger.finish(new_run(ledger, f"run{number}"), RunState.SUCCEEDED)
    assert [run.run_id for run in ledger.list_runs()] == ["run4", "run3", "run2", "run1", "run0"]
    assert [run.run_id for run in ledger.list_runs(start=1, limit=2)] == ["run3", "run2"]


def test_steps_are_listed_from_any_step_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    for step in range(5):
        ledger.commit_step(attempt, record(step))
    assert [r.step for r in ledger.list_steps("demo", first_step=2)] == [2, 3, 4]
    assert [r.step for r in ledger.list_steps("demo", first_step=1, limit=2)] == [1, 2]
    assert ledger.list_steps("demo", first_step=9) == []


def test_a_reader_never_sees_half_a_commit(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger, total_steps=100)
    seen: list[tuple[int, int]] = []
    done = threading.Event()

    def read() -> None:
        reader = Ledger(tmp_path)
        while not done.is_set():
            run = reader.get_run("demo")
            seen.append((run.num_committed_steps, run.policy_version))

    thread = threading.Thread(target=read)
    thread.start()
    for step in range(40):
        ledger.commit_step(attempt, record(step))
        ledger.record_push(attempt, step + 1, {})
    done.set()
    thread.join()
    assert seen == sorted(seen)
    assert all(committed - version in (0, 1) for committed, version in seen)


def _commit_all(state_dir: str, barrier: object, results: object) -> None:
    """Commit steps 0 to 19 as a process that believes to own the run; count the commits that went through."""
    ledger, attempt = Ledger(Path(state_dir)), Attempt("demo", 1, Path(state_dir))
    barrier.wait()  # type: ignore[attr-defined]
    committed = 0
    for step in range(20):
        try:
            ledger.commit_step(attempt, record(step))
            committed += 1
        except AbortedError:
            continue
    results.put(committed)  # type: ignore[attr-defined]


def test_two_processes_that_commit_the_same_steps_commit_each_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    new_run(ledger, total_steps=20)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_commit_all, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    counts = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    steps = [r.step for r in ledger.list_steps("demo")]
    assert steps == sorted(set(steps)), "a step was committed twice"
    assert sum(counts) == len(steps)
    assert steps == list(range(len(steps))), "a step is missing"
