"""What becomes of a run after faults and at a resume, against real services: the same bits, or a clear refusal."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.run_services import (
    run_services,
    write_tiny_policy,
)
from tests.rpc.run_world import World, in_world, names, world
from tests.rpc.serving import LOCAL, run, serving
from tether.errors import (
    AbortedError,
    FailedPreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.loop import run_step, run_training
from tether_services.orchestrator.publishing import LocalAdapter, PushFigures
from tether_services.orchestrator.records import Attempt, RunState, StepOutcome, StepRecord
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.orchestrator.session import Session, open_session
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.fault_points import PLAN_VARIABLE, arm


@in_world(one_by_one=True)
async def test_a_resumed_run_ends_with_the_weights_of_one_that_was_never_interrupted(w: World) -> None:
    whole = await w.run_whole()
    first = w.new_run("parts", "evaluation = false")
    async with w.session(first) as session:
        await run_step(session, 0)
        await run_step(session, 1)
    w.ledger.finish(first, RunState.FAILED, error="killed")
    second = w.ledger.begin_attempt("parts")
    async with w.session(second) as session:
        assert session.trainer.num_updates == 2
        await run_training(session)
    assert w.weights(second, 3) == w.weights(whole, 3)
    assert [s.metrics["score_mean"] for s in w.ledger.list_steps("parts")] == [
        s.metrics["score_mean"] for s in w.ledger.list_steps("whole")
    ]


@in_world()
async def test_a_step_that_is_not_committed_never_reaches_the_generator(w: World) -> None:
    first = w.new_run(extra="evaluation = false")
    async with w.session(first) as session:
        await run_step(session, 0)
        refuse_commits(session.ledger)
        with pytest.raises(AbortedError, match="step 1, commit: over"):
            await run_step(session, 1)
    del session.ledger.commit_step
    w.ledger.finish(first, RunState.FAILED, error="killed between checkpoint and commit")
    assert (first.directory / "checkpoints" / "000002-e1").is_dir()
    async with w.adapter_client() as adapters:
        assert [a.policy_version for a in await adapters.list_adapters()] == [1]
        second = w.ledger.begin_attempt("demo")
        async with w.session(second) as session:
            assert (await adapters.get_active_adapter()).policy_version == 1
            assert names(second, "checkpoints") == ["000001-e1"], "what was not committed is gone"
            assert names(second, "adapters") == ["000001"]
            await run_training(session)
        assert (await adapters.get_active_adapter()).policy_version == 3
    assert w.ledger.count_samples("demo") == {"trained": 24, "abandoned": 8}


def refuse_commits(ledger: Ledger) -> None:
    def refuse(attempt: Attempt, record: StepRecord, outcome: StepOutcome | None = None) -> None:
        raise AbortedError("over", reason="STALE_EPOCH")

    ledger.commit_step = refuse  # type: ignore[method-assign]


def refuse_pushes(session: Session) -> None:
    async def refuse(adapter: LocalAdapter) -> PushFigures:
        raise UnavailableError("adapter at x: UNAVAILABLE")

    session.publisher.publish = refuse  # type: ignore[method-assign]


@in_world(one_by_one=True)
async def test_a_step_whose_push_failed_is_committed_and_pushed_before_the_next_prompt(w: World) -> None:
    whole = await w.run_whole()
    first = w.new_run(extra="evaluation = false")
    async with w.session(first) as session:
        await run_step(session, 0)
        refuse_pushes(session)
        with pytest.raises(UnavailableError, match="step 1, push: adapter at x"):
            await run_step(session, 1)
    w.ledger.finish(first, RunState.FAILED, error="generator away")
    left = w.ledger.get_run("demo")
    assert (left.num_committed_steps, left.policy_version) == (2, 1)
    async with w.adapter_client() as adapters, w.session(w.ledger.begin_attempt("demo")) as session:
        assert (await adapters.get_active_adapter()).policy_version == 2
        assert w.ledger.get_run("demo").policy_version == 2
        assert not w.ledger.has_open_push("demo")
        assert session.trainer.num_updates == 2, "the step is not computed again"
        await run_training(session)
    assert w.weights(first, 3) == w.weights(whole, 3)


@in_world()
async def test_a_resume_leaves_the_committed_adapter_as_it_is_and_restores_a_damaged_one(w: World) -> None:
    attempt = w.new_run(extra="evaluation = false")
    async with w.session(attempt) as session:
        await run_step(session, 0)
    weights = attempt.directory / "adapters" / "000001" / "adapter_model.safetensors"
    content, before = weights.read_bytes(), weights.stat()
    for damage in (False, True):
        w.ledger.finish(attempt, RunState.FAILED)
        if damage:
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        attempt = w.ledger.begin_attempt("demo")
        async with w.session(attempt):
            assert weights.read_bytes() == content
            assert damage or weights.stat().st_mtime_ns == before.st_mtime_ns


@in_world()
async def test_a_damaged_checkpoint_is_never_loaded(w: World) -> None:
    attempt = w.new_run(extra="evaluation = false")
    async with w.session(attempt) as session:
        await run_step(session, 0)
    w.ledger.finish(attempt, RunState.FAILED)
    second = w.ledger.begin_attempt("demo")
    folder = attempt.directory / "checkpoints" / "000001-e1"
    for name in ("state.json", "weights.safetensors", "optimiser.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
        with pytest.raises(FailedPreconditionError) as caught:
            async with w.session(second):
                pass
        assert caught.value.reason == "CHECKPOINT_DAMAGED", name
        (folder / name).write_bytes(content)
    async with w.session(second):
        pass


@pytest.fixture
def disarmed() -> Iterator[None]:
    """Take the fault points of this process away at the end."""
    yield
    os.environ.pop(PLAN_VARIABLE, None)
    arm("worker", 0)


def fill_the_disk_at(folder: Path, point: str) -> None:
    """Have there be no room when this process comes to a point for the second time."""
    (folder / "plan.json").write_text(json.dumps({"worker": {"1": f"{point}@2=enospc"}}))
    os.environ[PLAN_VARIABLE] = str(folder / "plan.json")
    arm("worker", 1)


@pytest.mark.parametrize("point", ["checkpoint.staged", "checkpoint.renamed", "checkpoint.durable", "commit.open"])
@in_world(one_by_one=True)
async def test_a_run_goes_on_by_itself_once_there_is_room_again_and_ends_with_the_same_bits(
    w: World, tmp_path: Path, point: str, disarmed: None
) -> None:
    whole = await w.run_whole()
    fill_the_disk_at(tmp_path, point)
    attempt = w.new_run(extra="evaluation = false")
    async with w.session(attempt, storage_wait_seconds=30.0) as session:
        await run_training(session)
    assert names(attempt, "checkpoints") == ["000002-e1", "000003-e1"], "nothing half-done is left"
    assert w.weights(attempt, 3) == w.weights(whole, 3)


def fail_tries(session: Session, times: int) -> None:
    """Have the next tries of a rollout fail at their end."""
    fill, failures = session.collector._try, [UnavailableError("reward at x: away")] * times

    async def fail_first(*given: Any) -> None:
        await fill(*given)
        if failures:
            raise failures.pop()

    session.collector._try = fail_first  # type: ignore[method-assign, assignment]


@in_world()
async def test_i1_what_failed_tries_of_a_rollout_had_generated_is_in_the_ledger_as_abandoned(w: World) -> None:
    first = w.new_run(extra="evaluation = false\n[failure]\nstep_retries = 1\n")
    async with w.session(first) as session:
        fail_tries(session, 1)
        assert (await run_step(session, 0)).metrics["samples_abandoned"] == 8
        fail_tries(session, 2)
        with pytest.raises(UnavailableError):
            await run_step(session, 1)
    assert w.ledger.count_samples("demo") == {"trained": 8, "abandoned": 24}
    w.ledger.finish(first, RunState.FAILED)
    async with w.session(w.ledger.begin_attempt("demo")) as session:
        assert (await run_step(session, 1)).metrics["samples_abandoned"] == 16
    assert w.ledger.count_samples("demo") == {"trained": 16, "abandoned": 24}
    assert w.ledger.count_unaccounted("demo", first_step=0, end_step=2) == 0


@in_world()
async def test_a_push_waits_for_room_at_the_generator(w: World) -> None:
    async with w.begin(extra="evaluation = false") as session:
        waiting, publish = dataclasses.replace(session, storage_wait_seconds=30.0), session.publisher.publish
        refusals = [ResourceExhaustedError("adapter at x: its disk is full", reason="STORAGE_FULL") for _ in range(2)]

        async def refuse_first(adapter: LocalAdapter) -> PushFigures:
            if refusals:
                raise refusals.pop()
            return await publish(adapter)

        session.publisher.publish = refuse_first  # type: ignore[method-assign]
        record = await run_step(waiting, 0)
        assert not refusals
        assert record.metrics["push_seconds"] > 1, "the wait is part of the push"
        assert not w.ledger.has_open_push("demo")


@pytest.mark.parametrize("point", ["checkpoint.staged", "checkpoint.renamed", "commit.open"])
@in_world(one_by_one=True)
async def test_a_disk_that_fills_up_in_a_step_is_named_and_the_run_ends_with_the_same_bits(
    w: World, tmp_path: Path, point: str, disarmed: None
) -> None:
    whole = await w.run_whole()
    fill_the_disk_at(tmp_path, point)
    first = w.new_run(extra="evaluation = false")
    phase = point.partition(".")[0]
    async with w.session(first) as session:
        await run_step(session, 0)
        with pytest.raises(ResourceExhaustedError, match=rf"step 1, {phase}: .*free some space") as caught:
            await run_step(session, 1)
        assert caught.value.reason == "STORAGE_FULL"
    assert w.ledger.get_run("demo").num_committed_steps == 1
    async with w.adapter_client() as adapters:
        assert (await adapters.get_active_adapter()).policy_version == 1, "the old version serves"
    w.ledger.finish(first, RunState.FAILED, error="STORAGE_FULL")
    second = w.ledger.begin_attempt("demo")
    async with w.session(second) as session:
        assert names(second, "checkpoints") == ["000001-e1"]
        await run_training(session)
    assert w.weights(second, 3) == w.weights(whole, 3)


@in_world()
async def test_other_prompts_at_a_resume_are_refused_until_the_old_ones_are_back(w: World) -> None:
    attempt = w.new_run(extra="evaluation = false")
    async with w.session(attempt) as session:
        await run_step(session, 0)
    w.ledger.finish(attempt, RunState.FAILED)
    second, old = w.ledger.begin_attempt("demo"), w.prompts.read_text()
    w.prompts.write_text(old.replace("w4 w5", "w5 w4"))
    with pytest.raises(FailedPreconditionError, match="put the old files back") as caught:
        async with w.session(second):
            pass
    assert caught.value.reason == "PROMPTS_CHANGED"
    w.prompts.write_text(old)
    async with w.session(second) as session:
        await run_training(session)


def test_another_reward_model_at_a_resume_is_refused(tmp_path: Path) -> None:
    model = {"name": "other", "components": [{"name": "fake", "engine": "fake", "gain": 2.0}]}
    rewarding = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "models": [model]})

    async def scenario() -> None:
        async with world(tmp_path) as w, serving(rewarding, lambda r: RewardService(rewarding, r)) as other:
            attempt = w.new_run(extra="evaluation = false")
            async with w.session(attempt) as session:
                await run_step(session, 0)
            w.ledger.finish(attempt, RunState.FAILED)
            second = w.ledger.begin_attempt("demo")
            settings = w.services.settings.model_copy(update={"reward_address": other.target})
            config = parse_run_config(w.ledger.get_run("demo").config_toml)
            with pytest.raises(FailedPreconditionError, match="the run began with") as caught:
                async with open_session(settings, config, w.ledger, second):
                    pass
            assert caught.value.reason == "REWARD_MODEL_CHANGED"

    run(scenario(), timeout_seconds=120)


def test_another_base_model_at_a_resume_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            async with w.session(attempt) as session:
                await run_step(session, 0)
            w.ledger.finish(attempt, RunState.FAILED)
        write_tiny_policy(tmp_path / "policy", seed=1)  # and every service is started again on it
        async with run_services(w.model, tmp_path / "runs") as services:
            again = World(services, w.ledger, w.model, w.prompts)
            with pytest.raises(FailedPreconditionError) as caught:
                async with again.session(w.ledger.begin_attempt("demo")):
                    pass
            assert caught.value.reason == "BASE_CHANGED"

    run(scenario(), timeout_seconds=120)
