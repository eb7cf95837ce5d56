from __future__ import annotations

import math

import pytest
import torch

from tests.unit.golden_vectors import assert_within, float64, load_vector
from tether_services.ppo.rewards import shape_rewards
from tether_services.ppo.statistics import response_mask

LENGTHS = torch.tensor([3, 1, 4, 2])
MASK = response_mask(LENGTHS, width=4)


def random_rows(seed: int) -> torch.Tensor:
    return -torch.rand(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ppo_reward_torchtune() -> None:
    vector = load_vector("ppo_reward_torchtune")
    names = ("scores", "logprobs", "ref_logprobs")
    scores, logprobs, ref_logprobs = (float64(vector.inputs[name]) for name in names)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    got = shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=vector.inputs["beta"])
    assert_within(got, vector.expected, vector.tol)


def test_d9_rewards_match_a_slow_loop_over_ragged_rows() -> None:
    scores, logprobs, ref = float64([1.0, -2.0, 0.5, 0.0]), random_rows(0), random_rows(1)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            expected[row, t] = -0.3 * (logprobs[row, t] - ref[row, t])
        expected[row, length - 1] += scores[row]
    torch.testing.assert_close(shape_rewards(scores, logprobs, ref, MASK, kl_coef=0.3), expected)


def test_d9_the_score_sits_on_the_last_response_token_and_nowhere_else() -> None:
    zeros = torch.zeros(4, 4)
    got = shape_rewards(torch.tensor([5.0, 6.0, 7.0, 8.0]), zeros, zeros, MASK, kl_coef=0.1)
    assert got.tolist() == [[0, 0, 5, 0], [6, 0, 0, 0], [0, 0, 0, 7], [0, 8, 0, 0]]


def test_d9_a_masked_gap_before_the_last_token_carries_no_reward() -> None:
    mask = torch.tensor([[True, False, True, False]])
    got = shape_rewards(torch.tensor([2.0]), torch.full((1, 4), -1.0), torch.full((1, 4), -2.0), mask, kl_coef=1.0)
    assert got.tolist() == [[-1.0, 0.0, 1.0, 0.0]]


def test_d10_the_sum_of_rewards_is_the_score_minus_the_weighted_kl_of_the_sequence() -> None:
    scores, logprobs, ref = float64([1.0, -2.0, 0.5, 0.0]), random_rows(0), random_rows(1)
    got = shape_rewards(scores, logprobs, ref, MASK, kl_coef=0.3).sum(dim=1)
    kl_per_sequence = torch.where(MASK, logprobs - ref, 0.0).sum(dim=1)
    torch.testing.assert_close(got, scores - 0.3 * kl_per_sequence)


def test_d9_garbage_in_the_padding_does_not_leak() -> None:
    logprobs, ref = random_rows(0), random_rows(1)
    dirty = torch.where(MASK, logprobs, math.nan)
    clean = shape_rewards(torch.ones(4), logprobs, ref, MASK, kl_coef=0.3)
    torch.testing.assert_close(shape_rewards(torch.ones(4), dirty, ref, MASK, kl_coef=0.3), clean)


def test_d10_no_gradient_flows_through_the_rewards() -> None:
    logprobs = random_rows(0).requires_grad_()
    got = shape_rewards(torch.ones(4).requires_grad_(), logprobs, random_rows(1), MASK, kl_coef=0.3)
    assert not got.requires_grad


def test_d9_a_response_without_a_token_is_refused() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="at least one response token"):
        shape_rewards(torch.ones(2), torch.zeros(2, 2), torch.zeros(2, 2), mask, kl_coef=0.1)


def test_half_precision_rewards_are_float32() -> None:
    half = torch.zeros(4, 4, dtype=torch.bfloat16)
    got = shape_rewards(torch.tensor([1.001] * 4), half, half, MASK, kl_coef=0.1)
    assert got.dtype == torch.float32
    assert got[1, 0].item() == pytest.approx(1.001, abs=1e-6)
