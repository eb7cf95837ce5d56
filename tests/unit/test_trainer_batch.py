from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.unit.tiny_llama import VOCAB_SIZE, random_samples
from tether.errors import InvalidArgumentError
from tether_services.orchestrator.trainer import RolloutBatch, Sample
from tether_services.orchestrator.trainer.batch import (
    build_micro_batches,
    check_samples,
    response_lengths,
    value_samples,
)

PAIR = [Sample([1, 5], [7, 2]), Sample([3], [9])]


def test_the_worked_example_of_a_micro_batch_holds() -> None:
    (micro,) = build_micro_batches(PAIR, [0, 1], max_tokens=100)
    assert micro.token_ids.tolist() == [[3, 0, 0], [1, 5, 7]]
    assert micro.states.tolist() == [0, 4, 5]
    assert micro.targets.tolist() == [9, 7, 2]
    assert micro.tokens.tolist() == [2, 0, 1]
    assert micro.mask.tolist() == [[True, False], [True, True]]
    assert micro.pad(torch.tensor([0.9, 0.7, 0.2])).tolist() == torch.tensor([[0.9, 0.0], [0.7, 0.2]]).tolist()


@pytest.mark.parametrize("max_tokens", [1, 13, 40, 10_000])
def test_every_response_token_is_in_exactly_one_micro_batch(max_tokens: int) -> None:
    samples = random_samples(20)
    micro_batches = build_micro_batches(samples, range(20), max_tokens=max_tokens)
    tokens = torch.cat([micro.tokens for micro in micro_batches])
    assert sorted(tokens.tolist()) == list(range(sum(response_lengths(samples))))
    flat = [t for sample in samples for t in sample.response_token_ids]
    for micro in micro_batches:
        assert micro.targets.tolist() == [flat[i] for i in micro.tokens.tolist()]


def test_d2_each_state_is_the_token_just_before_the_response_token() -> None:
    samples = random_samples(20)
    for micro in build_micro_batches(samples, range(20), max_tokens=40):
        before = micro.token_ids.flatten()[micro.states]
        for place, token_id in zip(micro.tokens.tolist(), before.tolist(), strict=True):
            sample, t = locate(samples, place)
            text = [*sample.prompt_token_ids, *sample.response_token_ids]
            assert token_id == text[len(sample.prompt_token_ids) + t - 1]


def locate(samples: list[Sample], place: int) -> tuple[Sample, int]:
    for sample in samples:
        if place < len(sample.response_token_ids):
            return sample, place
        place -= len(sample.response_token_ids)
    raise AssertionError("no such token")


def test_micro_batches_stay_within_the_token_budget_and_a_long_sample_goes_alone() -> None:
    samples = [*random_samples(20), Sample([1] * 30, [2] * 20)]
    micro_batches = build_micro_batches(samples, range(21), max_tokens=32)
    sizes = [micro.token_ids.numel() for micro in micro_batches]
    assert sizes[-1] == 49
    assert max(sizes[:-1]) <= 32
    assert len(sizes) < 21


def test_the_layout_does_not_depend_on_the_order_of_the_rows() -> None:
    samples = random_samples(9)
    forward = build_micro_batches(samples, range(9), max_tokens=40)
    backward = build_micro_batches(samples, reversed(range(9)), max_tokens=40)
    assert [m.tokens.tolist() for m in forward] == [m.tokens.tolist() for m in backward]


@pytest.mark.parametrize(
    ("sample", "field"),
    [
        (Sample([], [1]), "samples[1].prompt_token_ids"),
        (Sample([1], []), "samples[1].response_token_ids"),
        (Sample([1], [VOCAB_SIZE]), "samples[1].response_token_ids"),
        (Sample([-1], [1]), "samples[1].prompt_token_ids"),
        (Sample([1] * 60, [1] * 5), "samples[1]"),
    ],
)
def test_a_sample_the_model_cannot_read_is_named(sample: Sample, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_samples([PAIR[0], sample], vocab_size=VOCAB_SIZE, max_length=64)
    assert caught.value.violations[0].field == field


def test_no_samples_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one sample"):
        check_samples([], vocab_size=VOCAB_SIZE, max_length=64)


def test_samples_up_to_the_limits_are_accepted() -> None:
    check_samples([Sample([0] * 63, [VOCAB_SIZE - 1])], vocab_size=VOCAB_SIZE, max_length=64)


GOOD: dict[str, Any] = {
    "samples": PAIR,
    "logprobs": [[-1.0, -2.0], [-3.0]],
    "ref_logprobs": [[-1.0, -2.0], [-3.0]],
    "scores": [0.5, -0.5],
}


@pytest.mark.parametrize(
    ("changed", "value", "field"),
    [
        ("logprobs", [[-1.0, -2.0]], "batch.logprobs"),
        ("logprobs", [[-1.0], [-3.0]], "batch.logprobs[0]"),
        ("ref_logprobs", [[-1.0, -2.0], [-3.0, -1.0]], "batch.ref_logprobs[1]"),
        ("ref_logprobs", [[-1.0, -math.inf], [-3.0]], "batch.ref_logprobs[0]"),
        ("logprobs", [[-1.0, math.nan], [-3.0]], "batch.logprobs[0]"),
        ("scores", [0.5], "batch.scores"),
        ("scores", [0.5, math.nan], "batch.scores"),
        ("groups", [1], "batch.groups"),
        ("stopped", [True, True, False], "batch.stopped"),
    ],
)
def test_a_rollout_batch_that_does_not_fit_together_names_the_field(changed: str, value: object, field: str) -> None:
    RolloutBatch(**GOOD)
    with pytest.raises(InvalidArgumentError) as caught:
        RolloutBatch(**(GOOD | {changed: value}))
    assert caught.value.violations[0].field == field


def test_without_groups_each_sample_is_its_own_and_all_have_ended() -> None:
    batch = RolloutBatch(**GOOD)
    assert (batch.group_ids(), batch.has_eos(), batch.response_limit) == ([0, 1], [True, True], 2)
    told = RolloutBatch(**GOOD, groups=[7, 7], stopped=[False, True], max_response_tokens=9)
    assert (told.group_ids(), told.has_eos(), told.response_limit) == ([7, 7], [False, True], 9)


@pytest.mark.parametrize(("limit", "extra"), [(2, [0, 1]), (3, [1, 1]), (0, [0, 1])])
def test_d6_n_plus_has_one_more_value_where_the_response_is_below_the_limit(limit: int, extra: list[int]) -> None:
    batch = RolloutBatch(**GOOD, max_response_tokens=limit)
    counts = response_lengths(value_samples(batch, "n_plus"))
    assert counts == [2 + extra[0], 1 + extra[1]]
    assert value_samples(batch, "last") is batch.samples


def test_d6_the_extra_value_is_of_the_state_after_the_last_token() -> None:
    batch = RolloutBatch(**GOOD, max_response_tokens=3)
    (micro,) = build_micro_batches(value_samples(batch, "n_plus"), range(2), max_tokens=100)
    assert micro.token_ids.tolist() == [[3, 9, 0, 0], [1, 5, 7, 2]]
    assert micro.token_ids.flatten()[micro.states].tolist() == [3, 9, 5, 7, 2]
