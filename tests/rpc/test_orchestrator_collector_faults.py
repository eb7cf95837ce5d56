"""Rollouts over services that do not deliver: tried again, left out or failed as the run says, and always accounted."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.serving import LOCAL, run, serving
from tests.rpc.test_orchestrator_collector import PLAN, PROMPTS, SEEDS, World, world
from tether.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    TetherError,
    UnavailableError,
)
from tether.reference import ReferenceClient
from tether.reward import RewardClient
from tether_services.local.ports import free_ports
from tether_services.orchestrator.config import FailureConfig, OrchestratorSettings
from tether_services.orchestrator.fleet import Fleet
from tether_services.orchestrator.records import Attempt
from tether_services.orchestrator.remote import GeneratorPorts, Remote, open_services
from tether_services.orchestrator.retrying import RetryBudget, RetryPolicy
from tether_services.orchestrator.rollouts import Identities, Rollout, RolloutCollector
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256
from tether_services.runtime.fault_points import PLAN_VARIABLE, arm

AWAY = UnavailableError("away")
QUICK = RetryPolicy(1, 0.001)


@dataclass
class Faults:
    """What goes wrong in the calls of one client."""

    errors: dict[int, TetherError] = field(default_factory=dict)
    """By number of the call."""
    of_prompt: dict[int, list[TetherError]] = field(default_factory=dict)
    """By number of the prompt: errors of its first calls."""
    change: Callable[[int, Any], Any] = lambda number, answer: answer
    calls: int = 0

    def around(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if number in self.errors:
                raise self.errors[number]
            if left := self.of_prompt.get(number_of_prompt(args[0])):
                raise left.pop(0)
            return self.change(number, await method(*args, **kwargs))

        return call


def number_of_prompt(argument: Any) -> int:
    """Return which prompt a call is about, from its token ids or its first item."""
    token_ids = argument if isinstance(argument[0], int) else argument[0].prompt_token_ids
    return [prompt.token_ids for prompt in PROMPTS].index(tuple(token_ids))


@asynccontextmanager
async def faulty(
    monkeypatch: pytest.MonkeyPatch,
    failure: FailureConfig,
    *,
    generator: Faults | None = None,
    reward: Faults | None = None,
    reference: Faults | None = None,
) -> AsyncIterator[tuple[World, RolloutCollector]]:
    """Yield fake services that answer one prompt after the other, and a collector with repeats over them."""
    async with world(concurrency=1) as w:
        budget = RetryBudget(failure.retry_budget)
        generate = w.services.generators[0].generator.client
        for faults, client, name in (
            (generator, generate, "generate"),
            (reward, w.services.reward.client, "score"),
            (reference, w.services.reference.client, "compute_logprobs"),
        ):
            if faults:
                monkeypatch.setattr(client, name, faults.around(getattr(client, name)))

        def quick(remote: Remote[Any]) -> Remote[Any]:
            return replace(remote, retries=QUICK, budget=budget)

        ports = w.services.generators[0]
        services = replace(
            w.services,
            generators=(GeneratorPorts(quick(ports.generator), quick(ports.adapter)),),
            reward=quick(w.services.reward),
            reference=quick(w.services.reference),
            budget=budget,
            retries=QUICK,
        )
        async with Fleet(services, Attempt("demo", 1, Path("unused"))) as fleet:
            yield w, RolloutCollector(services, fleet, Identities(FAKE_BASE_SHA256), failure)


def collect(monkeypatch: pytest.MonkeyPatch, failure: FailureConfig, **faults: Faults) -> Rollout:
    """Return the rollout of 6 prompts with 3 completions each."""

    async def scenario() -> Rollout:
        async with faulty(monkeypatch, failure, **faults) as (_, collector):
            return await collector.collect(PROMPTS, SEEDS, PLAN)

    return run(scenario())


def balance(rollout: Rollout) -> tuple[int, int, int, dict[str, int]]:
    """Return (asked, not generated, kept, dropped), after checking that they add up."""
    counts = rollout.counts
    assert counts.asked == counts.generated + rollout.num_not_generated == 18
    assert counts.generated == counts.trained + sum(counts.dropped.values()) == len(rollout.rows)
    assert sum(not row.dropped for row in rollout.rows) == counts.trained
    return counts.asked, rollout.num_not_generated, counts.trained, dict(counts.dropped)


def one_short(number: int, answer: Any) -> Any:
    return replace(answer, completions=answer.completions[:-1]) if number == 2 else answer


def one_not_finite(number: int, answer: Any) -> Any:
    bad = replace(answer.items[0], ref_logprobs=(math.nan, *answer.items[0].ref_logprobs[1:]))
    return replace(answer, items=(bad, *answer.items[1:])) if number == 0 else answer


@pytest.mark.parametrize("service", ["generator", "reward", "reference"])
@pytest.mark.parametrize("error", [AWAY, DeadlineExceededError("late")])
def test_f1_one_lost_answer_changes_nothing(service: str, error: TetherError, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(monkeypatch, FailureConfig())
    disturbed = collect(monkeypatch, FailureConfig(), **{service: Faults({3: error})})
    assert disturbed.samples == whole.samples
    assert (disturbed.num_abandoned, balance(disturbed)) == (0, (18, 0, 18, {}))


@pytest.mark.parametrize("service", ["generator", "reward", "reference"])
def test_f5_a_rollout_that_fails_is_tried_again_with_the_same_seeds(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect(monkeypatch, FailureConfig())
    faults = Faults(of_prompt={4: [AWAY, AWAY]})
    again = collect(monkeypatch, FailureConfig(), **{service: faults})
    assert again.samples == whole.samples
    assert faults.calls > 6
    assert again.num_abandoned > 0, "what the failed try had generated is accounted for"
    assert balance(again) == (18, 0, 18, {})


def test_f5_without_further_tries_the_first_failure_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match=r"reward at 127.* after 2 attempts"):
        collect(monkeypatch, FailureConfig(step_retries=0), reward=Faults(of_prompt={4: [AWAY, AWAY]}))


def test_f5_what_cannot_change_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults({0: InvalidArgumentError("bad", field="items")})
    with pytest.raises(InvalidArgumentError, match="reward at 127"):
        collect(monkeypatch, FailureConfig(step_retries=5), reward=faults)
    assert faults.calls == 1


def test_f2_the_budget_is_for_all_tries_of_a_step_and_is_full_again_in_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failure = FailureConfig(step_retries=50, retry_budget=3)
    faults = Faults(dict.fromkeys(range(1000), AWAY))

    async def scenario() -> None:
        async with faulty(monkeypatch, failure, reference=faults) as (_, collector):
            with pytest.raises(ResourceExhaustedError, match="reference") as caught:
                await collector.collect(PROMPTS, SEEDS, PLAN)
            assert caught.value.reason == "RETRY_BUDGET_SPENT"
            made = faults.calls
            assert made <= 3 + 6 * 4, "repeats and first calls of the tries"
            faults.errors = {made: AWAY}
            assert len((await collector.collect(PROMPTS, SEEDS, PLAN)).samples) == 18

    run(scenario())


@pytest.mark.parametrize(
    ("service", "errors", "expected"),
    [
        ("generator", [AWAY, AWAY], (18, 3, 15, {})),
        ("reward", [AWAY, AWAY], (18, 0, 15, {"not_scored": 3})),
        ("reference", [DeadlineExceededError("late"), AWAY], (18, 0, 15, {"no_reference": 3})),
        ("reference", [InternalError("not finite")], (18, 0, 15, {"no_reference": 3})),
        ("reward", [ResourceExhaustedError("no room, no time")], (18, 0, 15, {"not_scored": 3})),
    ],
)
def test_f4_drop_leaves_out_what_a_call_without_an_answer_would_have_told(
    service: str,
    errors: list[TetherError],
    expected: tuple[int, int, int, dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollout = collect(monkeypatch, FailureConfig(on_missing="drop"), **{service: Faults(of_prompt={2: list(errors)})})
    assert balance(rollout) == expected
    assert all(math.isfinite(sample.score) and sample.ref_logprobs for sample in rollout.samples)


@pytest.mark.parametrize("on_missing", ["fail", None])
def test_f4_without_drop_a_call_without_an_answer_fails_the_rollout(
    on_missing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = FailureConfig(on_missing=on_missing, step_retries=0)
    with pytest.raises(DeadlineExceededError, match="reference at"):
        collect(monkeypatch, failure, reference=Faults(dict.fromkeys(range(9), DeadlineExceededError("late"))))


def test_f3_a_generator_that_answers_with_fewer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = collect(monkeypatch, FailureConfig(), generator=Faults(change=one_short))
    assert balance(rollout) == (18, 1, 17, {})


def test_f4_one_reference_row_that_is_no_number_drops_its_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = collect(monkeypatch, FailureConfig(), reference=Faults(change=one_not_finite))
    assert balance(rollout) == (18, 0, 17, {"no_reference": 1})


@pytest.mark.parametrize(
    ("service", "change"), [("generator", one_short), ("reference", one_not_finite)], ids=["generator", "reference"]
)
def test_f4_fail_leaves_nothing_out_and_the_next_try_has_all(
    service: str, change: Callable[[int, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = FailureConfig(on_missing="fail")
    whole = collect(monkeypatch, failure)
    rollout = collect(monkeypatch, failure, **{service: Faults(change=change)})
    assert rollout.samples == whole.samples and rollout.num_abandoned > 0
    with pytest.raises(FailedPreconditionError, match="1 of 18 samples cannot be used") as caught:
        collect(monkeypatch, failure.model_copy(update={"step_retries": 0}), **{service: Faults(change=change)})
    assert caught.value.reason == "SAMPLES_DROPPED"


def test_f4_more_than_max_dropped_fails(monkeypatch: pytest.MonkeyPatch) -> None:

    def two_away() -> Faults:
        return Faults(of_prompt={1: [AWAY, AWAY], 4: [AWAY, AWAY]})

    drop = FailureConfig(on_missing="drop", max_dropped=0.4, step_retries=0)
    assert balance(collect(monkeypatch, drop, reward=two_away()))[2] == 12
    with pytest.raises(FailedPreconditionError, match=r"6 of 18 .* \(not_scored 6\)"):
        collect(monkeypatch, drop.model_copy(update={"max_dropped": 0.3}), reward=two_away())


def test_the_rows_say_which_prompt_and_adapter_each_completion_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = collect(monkeypatch, FailureConfig(), generator=Faults(change=one_short))
    numbers: Sequence[int] = [row.sample for row in rollout.rows]
    assert numbers == [n for n in range(18) if n != 8], "the third completion of the third prompt never came"
    assert {row.prompt_sha256 for row in rollout.rows} == {prompt.sha256 for prompt in PROMPTS}
    assert all(row.prompt_sha256 == PROMPTS[row.sample // 3].sha256 for row in rollout.rows)
    assert {(row.policy_version, row.adapter_sha256) for row in rollout.rows} == {(0, "")}


def test_calls_of_a_failed_try_do_not_go_on_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Faults()
    ended: list[int] = []

    async def scenario() -> None:
        failing = Faults(of_prompt={0: [AWAY, AWAY]})
        async with faulty(monkeypatch, FailureConfig(step_retries=0), reward=failing, reference=slow) as (w, collector):
            inner = w.services.reference.client.compute_logprobs

            async def wait(*args: Any, **kwargs: Any) -> Any:
                try:
                    await asyncio.sleep(30)
                    return await inner(*args, **kwargs)
                finally:
                    ended.append(1)

            monkeypatch.setattr(w.services.reference.client, "compute_logprobs", wait)
            with pytest.raises(UnavailableError):
                await collector.collect(PROMPTS[:1], SEEDS[:1], PLAN)
            assert ended == [1]

    run(scenario())


def test_clients_of_a_run_leave_the_repeats_to_it() -> None:
    async def scenario() -> None:
        async with world() as w:
            for client in (w.services.reward.client, w.services.reference.client):
                assert isinstance(client, (RewardClient, ReferenceClient))
                assert client.breaker is not None and not client._retries

    run(scenario())


@pytest.mark.parametrize("protected", [True, False])
def test_r1_a_reward_service_that_is_away_for_a_while_costs_time_and_no_sample(protected: bool) -> None:
    """The control makes each call and each rollout once."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    rewarding = RewardSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake", "address": address, "drain_seconds": 0}
    )
    failure = FailureConfig(step_retries=2 if protected else 0)
    settings = OrchestratorSettings(reward_address=address, max_retries=10 if protected else 0)
    seen: list[bool] = []

    async def collect_through_an_outage() -> Rollout:
        async with (
            world(token_seconds=0.02) as w,
            open_services(settings, on_breaker=lambda states: seen.append(states["reward"])) as own,
        ):
            services = replace(w.services, reward=own.reward, budget=own.budget)
            collector = RolloutCollector(services, w.fleet, Identities(FAKE_BASE_SHA256), failure)
            collecting = asyncio.create_task(collector.collect(PROMPTS, SEEDS, PLAN))
            await asyncio.sleep(1.5)
            assert not collecting.done() or not protected, "nobody scores"
            async with serving(rewarding, lambda registry: RewardService(rewarding, registry)):
                started = time.monotonic()
                rollout = await collecting
                assert time.monotonic() - started < 5
                return rollout

    if not protected:
        with pytest.raises(UnavailableError, match="reward at"):
            run(collect_through_an_outage())
        return
    rollout = run(collect_through_an_outage())
    assert balance(rollout) == (18, 0, 18, {})
    assert rollout.num_abandoned == 0, "the calls were repeated, not the rollout"
    assert seen == [False, True, False], "one outage opens the breaker once"


def test_the_first_group_of_each_rollout_is_a_point_at_which_the_worker_can_be_made_to_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"worker": {"1": "rollout.first_group@2=enospc"}}')
    monkeypatch.setenv(PLAN_VARIABLE, str(plan))
    arm("worker", 1)

    async def scenario() -> None:
        async with world() as w:
            await w.collect()
            with pytest.raises(OSError, match="first_group"):
                await w.collect()
            await w.collect()

    try:
        run(scenario())
    finally:
        monkeypatch.delenv(PLAN_VARIABLE)
        arm("worker", 1)
