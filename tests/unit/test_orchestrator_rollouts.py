"""What is checked on every sample, and the account of what is left out."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest

from tests.unit.run_inputs import scored_sample
from tether.errors import FailedPreconditionError, InternalError
from tether.generator import Completion, Generation
from tether.reference import LogprobResult
from tether.reward import ScoreResult
from tether_services.orchestrator.loop import to_batch
from tether_services.orchestrator.records import SampleCounts
from tether_services.orchestrator.rollouts import Identities, Policy, Rollout, Span, find_faults
from tether_services.orchestrator.step_metrics import DROP_REASONS


def check(made: Generation) -> list[str]:
    return find_faults(made, Policy("demo", 3, "ab"))


def completion(
    token_ids: tuple[int, ...] = (5, 6),
    logprobs: tuple[float, ...] = (-1.0, -2.0),
    reason: Literal["stop", "length"] = "stop",
) -> Completion:
    return Completion(token_ids, logprobs, "text", reason)


def generation(*completions: Completion, run_id: str = "demo", version: int = 3, sha256: str = "ab") -> Generation:
    return Generation(completions or (completion(), completion()), version, sha256, run_id, (1, 2))


def test_what_the_expected_policy_made_is_kept() -> None:
    assert check(generation()) == ["", ""]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (generation(version=2), "wrong_version"),
        (generation(version=4), "wrong_version"),
        (generation(run_id="other"), "wrong_run"),
        (generation(run_id=""), "wrong_run"),
        (generation(sha256="cd"), "wrong_adapter"),
        (generation(sha256=""), "wrong_adapter"),
    ],
)
def test_what_another_policy_made_is_dropped_whole(made: Generation, reason: str) -> None:
    assert check(made) == [reason, reason]
    assert reason in DROP_REASONS


@pytest.mark.parametrize(
    "bad",
    [
        completion(logprobs=(-1.0,)),
        completion(logprobs=(-1.0, -1.0, -1.0)),
        completion(token_ids=(), logprobs=()),
        completion(logprobs=(-1.0, math.nan)),
        completion(logprobs=(-math.inf, -1.0)),
    ],
)
def test_a_completion_without_a_finite_logprob_for_each_token_is_dropped_alone(bad: Completion) -> None:
    assert check(generation(bad, completion(token_ids=(9, 9)))) == ["invalid_logprobs", ""]


def test_i1_asked_is_generated_or_not_and_generated_is_trained_or_dropped() -> None:
    dropped = Counter(wrong_version=1, not_scored=1)
    rollout = Rollout([scored_sample()] * 3, dropped, num_asked=6, num_generated=5, num_not_generated=1)
    rollout.check(max_dropped=0.5)
    assert rollout.counts == SampleCounts(6, 5, 3, {"wrong_version": 1, "not_scored": 1})
    rollout.num_generated = 6
    with pytest.raises(InternalError, match="6 generated, 3 kept and 2 dropped"):
        rollout.check(max_dropped=0.5)
    rollout.num_generated, rollout.num_not_generated = 5, 0
    with pytest.raises(InternalError, match="6 samples asked for, 5 generated and 0 not generated"):
        rollout.check(max_dropped=0.5)


@pytest.mark.parametrize(("limit", "passes"), [(0.8, True), (0.75, True), (0.74, False), (0.0, False)])
def test_a_rollout_that_lost_more_than_is_allowed_says_why(limit: float, passes: bool) -> None:
    dropped = Counter(wrong_version=1, not_scored=1)
    rollout = Rollout([scored_sample()], dropped, num_asked=4, num_generated=3, num_not_generated=1)
    if passes:
        rollout.check(max_dropped=limit)
        return
    with pytest.raises(FailedPreconditionError, match="not_generated 1, not_scored 1, wrong_version 1") as caught:
        rollout.check(max_dropped=limit)
    assert caught.value.reason == "SAMPLES_DROPPED"


def test_nothing_is_lost_when_nothing_may_be() -> None:
    Rollout([scored_sample()], num_asked=1, num_generated=1).check(max_dropped=0.0)


def test_a_reference_that_changes_its_model_ends_the_run() -> None:
    identities = Identities("base")
    identities.check_reference(LogprobResult((), "base"))
    with pytest.raises(FailedPreconditionError) as caught:
        identities.check_reference(LogprobResult((), "other"))
    assert caught.value.reason == "REFERENCE_CHANGED"


def test_a_reward_service_that_changes_its_model_ends_the_run() -> None:
    identities = Identities("base")
    identities.check_reward(ScoreResult((), "m", "1", "first"))
    identities.check_reward(ScoreResult((), "m", "1", "first"))
    with pytest.raises(FailedPreconditionError) as caught:
        identities.check_reward(ScoreResult((), "m", "2", "second"))
    assert caught.value.reason == "REWARD_MODEL_CHANGED"


def test_a_span_reaches_from_the_first_start_to_the_last_end() -> None:
    span = Span()
    assert span.seconds == 0.0
    before = time.monotonic()
    span.start()
    assert span.seconds == 0.0, "nothing has ended"
    span.start()
    span.end()
    first = span.seconds
    span.end()
    assert 0.0 <= first <= span.seconds <= time.monotonic() - before


def test_the_batch_holds_the_samples_in_their_order() -> None:
    samples = [
        replace(scored_sample(token_ids=(5, 6), score=1.0), group=3),
        replace(scored_sample(token_ids=(7,), logprobs=(-0.5,), ref_logprobs=(-0.25,), score=-2.0), group=4),
    ]
    ended = replace(samples[1].completion, finish_reason="stop")
    samples[1] = replace(samples[1], completion=ended)
    batch = to_batch(Rollout(samples, num_generated=2), max_response_tokens=2)
    assert (batch.group_ids(), batch.has_eos(), batch.response_limit) == ([3, 4], [False, True], 2)
    assert [tuple(s.response_token_ids) for s in batch.samples] == [(5, 6), (7,)]
    assert [tuple(s.prompt_token_ids) for s in batch.samples] == [(1, 2), (1, 2)]
    assert list(map(tuple, batch.logprobs)) == [(-1.0, -2.0), (-0.5,)]
    assert list(map(tuple, batch.ref_logprobs)) == [(-1.5, -1.0), (-0.25,)]
    assert list(batch.scores) == [1.0, -2.0]
