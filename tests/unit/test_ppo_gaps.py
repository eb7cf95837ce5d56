"""Properties of the PPO mathematics that only a wrong edit brought to light (`python -m tests.mutation`)."""

from __future__ import annotations

import pytest
import torch

from tests.unit.golden_vectors import assert_within, float64
from tether_services.ppo.advantages import group_advantages
from tether_services.ppo.losses import Aggregation, policy_loss
from tether_services.ppo.mismatch import mismatch_metrics
from tether_services.ppo.rewards import Normaliser


def test_d13_a_single_score_has_moments_too() -> None:
    normaliser = Normaliser()
    normaliser.update(float64([3.0]))
    assert (normaliser.count, normaliser.mean, normaliser.var) == (1, 3.0, 0.0)
    assert_within(normaliser(float64([3.0])), [0.0], 0.0)


def test_d21_the_ratio_of_half_precision_logprobs_is_taken_in_float32() -> None:
    # -8 and -0.0078125 are numbers of bfloat16, their difference is not.
    old, new = torch.tensor([[-0.0078125]]).bfloat16(), torch.tensor([[-8.0]]).bfloat16()
    one, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    _, metrics = policy_loss(new, old, one, mask, clip_range=0.2)
    assert float(metrics["approx_kl"]) == pytest.approx(0.5 * (8.0 - 0.0078125) ** 2, rel=1e-6)


def test_d21_policy_loss_aggregates_as_it_is_told() -> None:
    # Old and new are equal, so that a token's loss is minus its advantage: the rows have the sums -3 and -5.
    zeros, advantages = torch.zeros(2, 2, dtype=torch.float64), float64([[1.0, 2.0], [5.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    expected: dict[Aggregation, float] = {
        "token_mean": -8.0 / 3.0,
        "sequence_mean": (-3.0 / 2.0 - 5.0) / 2.0,
        "token_sum": -8.0,
    }
    for aggregation, loss in expected.items():
        got, _ = policy_loss(zeros, zeros, advantages, mask, clip_range=0.2, aggregation=aggregation)
        assert_within(got, loss, 1e-12)


def test_d38_two_responses_are_each_others_baseline() -> None:
    got = group_advantages(float64([1.0, 4.0]), torch.tensor([7, 7]), kind="rloo")
    assert_within(got, [-3.0, 3.0], 1e-12)


def test_s8_half_precision_differences_are_taken_in_float32() -> None:
    old, sampler = torch.tensor([[-8.0]]).bfloat16(), torch.tensor([[-0.0078125]]).bfloat16()
    got = mismatch_metrics(old, sampler, torch.ones(1, 1, dtype=torch.bool))
    assert got["mean_abs_dlogp"] == pytest.approx(8.0 - 0.0078125, rel=1e-6)
