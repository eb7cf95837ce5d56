from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64
from tests.unit.random_rows import LENGTHS, MASK, normal
from tether_services.ppo.advantages import compute_returns, estimate_advantages
from tether_services.ppo.statistics import masked_whiten, response_mask


def all_kept(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def slow_gae(rewards: Sequence[float], values: Sequence[float], *, gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum_k (gamma lam)^k delta_(t+k), one explicit sum per token."""
    padded = [*values, 0.0]
    deltas = [r + gamma * padded[t + 1] - padded[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def test_d16_gae_matches_hand_calculation() -> None:
    values, rewards = float64([[0.5, 0.4, 0.3]]), float64([[0.0, 0.0, 1.0]])
    mask = all_kept(values)
    advantages = estimate_advantages(rewards, values, mask, gamma=1.0, lam=0.95)
    assert_within(advantages, [[0.43675, 0.565, 0.7]], 1e-12)
    assert_within(compute_returns(advantages, values, mask), [[0.93675, 0.965, 1.0]], 1e-12)


def test_d16_gae_with_n_plus_placement_matches_hand_calculation() -> None:
    # Three response tokens; the state after the last one is kept and carries the score.
    values, rewards = float64([[0.5, 0.4, 0.3, 0.2, 7.0]]), float64([[0.0, 0.0, 0.0, 1.0, 7.0]])
    mask = response_mask(torch.tensor([4]), width=5)
    advantages = estimate_advantages(rewards, values, mask, gamma=1.0, lam=0.95)
    assert_within(advantages, [[0.40065, 0.527, 0.66, 0.8, 0.0]], 1e-12)
    assert_within(compute_returns(advantages, values, mask), [[0.90065, 0.927, 0.96, 1.0, 0.0]], 1e-12)


def test_d16_the_two_placements_differ_by_gamma_lambda_and_one_value() -> None:
    gamma, lam, score, value, after = 0.97, 0.9, 2.0, 0.3, 0.2
    last = estimate_advantages(float64([[score]]), float64([[value]]), torch.ones(1, 1), gamma=gamma, lam=lam)
    assert last.item() == pytest.approx(score - value)
    mask = torch.ones(1, 2)
    n_plus = estimate_advantages(float64([[0.0, score]]), float64([[value, after]]), mask, gamma=gamma, lam=lam)
    assert n_plus[0, 0].item() == pytest.approx(gamma * after - value + gamma * lam * (score - after))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_d16_gae_matches_a_slow_sum_over_ragged_rows(gamma: float, lam: float, dtype: torch.dtype) -> None:
    lengths = torch.tensor([40, 1, 17, 33])
    rewards, values = normal(3, 4, 40, dtype=dtype), normal(4, 4, 40, dtype=dtype)
    got = estimate_advantages(rewards, values, response_mask(lengths, width=40), gamma=gamma, lam=lam)
    assert got.dtype == dtype
    for row, length in enumerate(lengths.tolist()):
        expected = slow_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma=gamma, lam=lam)
        assert_within(got[row, :length], expected, 1e-10 if dtype == torch.float64 else 1e-4)
        assert got[row, length:].eq(0.0).all()


def test_d16_with_lambda_1_the_advantage_is_the_rest_of_the_rewards_minus_the_value() -> None:
    rewards, values = normal(4, 3, 9), normal(5, 3, 9)
    mask = all_kept(rewards)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages = estimate_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, to_go - values)
    torch.testing.assert_close(compute_returns(advantages, values, mask), to_go)


def test_d16_with_lambda_0_the_advantage_is_the_one_step_error() -> None:
    rewards, values = normal(4, 3, 9), normal(5, 3, 9)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    got = estimate_advantages(rewards, values, all_kept(rewards), gamma=0.9, lam=0.0)
    torch.testing.assert_close(got, rewards + 0.9 * following - values)


def test_d16_constant_values_with_one_reward_at_the_end_follow_the_closed_form() -> None:
    # V = 1 everywhere, r = 3 at the end, gamma = 1: only the last delta is not 0.
    rewards, values = torch.zeros(1, 6, dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64)
    rewards[0, -1] = 3.0
    got = estimate_advantages(rewards, values, all_kept(rewards), gamma=1.0, lam=0.5)
    assert_within(got, [[2.0 * 0.5**k for k in range(5, -1, -1)]], 1e-12)


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "lam", "expected"),
    [
        ([0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], 0.5, 0.0, [0.5, 1.0, 2.5, 0.0]),  # NeMo-Aligner test_ppo_utils
        ([1.0, 2.0, 3.0], [0.5, 1.0, 1.5], 0.5, 1.0, [2.75, 3.5, 3.0]),  # SkyRL test_ppo_utils
        ([1.0, 2.0, 3.0], [0.5, 1.0, 1.5], 1.0, 0.5, [3.625, 4.25, 3.0]),
        ([1.0, 2.0, 3.0], [0.5, 1.0, 1.5], 1.0, 1.0, [6.0, 5.0, 3.0]),
    ],
)
def test_d16_returns_match_the_numbers_of_other_public_tests(
    rewards: list[float], values: list[float], gamma: float, lam: float, expected: list[float]
) -> None:
    mask = torch.ones(1, len(rewards))
    advantages = estimate_advantages(float64([rewards]), float64([values]), mask, gamma=gamma, lam=lam)
    assert_within(compute_returns(advantages, float64([values]), mask), [expected], 1e-12)


def test_d16_a_response_of_one_token_has_the_advantage_score_minus_value() -> None:
    got = estimate_advantages(float64([[2.0]]), float64([[0.5]]), torch.ones(1, 1), gamma=1.0, lam=0.95)
    assert got.item() == 1.5


def test_d16_nothing_is_bootstrapped_at_the_maximum_length() -> None:
    # A row that fills its width ends like one that stopped before.
    rewards, values = normal(4, 1, 3), normal(5, 1, 3)
    full = estimate_advantages(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.95)
    wide = [torch.nn.functional.pad(x, (0, 2), value=5.0) for x in (rewards, values)]
    stopped = estimate_advantages(wide[0], wide[1], response_mask(torch.tensor([3]), width=5), gamma=1.0, lam=0.95)
    assert stopped[:, :3].equal(full)


def test_d16_rows_do_not_influence_each_other() -> None:
    rewards, values = normal(0), normal(1)
    together = estimate_advantages(rewards, values, MASK, gamma=0.99, lam=0.95)
    for row in range(len(LENGTHS)):
        one = slice(row, row + 1)
        assert estimate_advantages(rewards[one], values[one], MASK[one], gamma=0.99, lam=0.95).equal(together[one])


@pytest.mark.parametrize("garbage", [999.0, math.nan, math.inf])
def test_d17_a_masked_gap_is_skipped_whatever_it_holds(garbage: float) -> None:
    mask = torch.tensor([[True, True, False, True, True]])
    rewards, values = float64([[0.1, 0.2, garbage, 0.3, 1.0]]), float64([[0.5, 0.4, garbage, 0.3, 0.2]])
    got = estimate_advantages(rewards, values, mask, gamma=0.99, lam=0.95)
    kept = torch.tensor([0, 1, 3, 4])
    expected = slow_gae(rewards[0, kept].tolist(), values[0, kept].tolist(), gamma=0.99, lam=0.95)
    assert_within(got[0, kept], expected, 1e-12)
    assert got[0, 2] == 0.0


def test_d17_gaps_of_any_shape_equal_the_row_without_them() -> None:
    mask = normal(7, 5, 12) > 0.0
    mask[3] = False
    rewards, values = (torch.where(mask, normal(seed, 5, 12), 999.0) for seed in (0, 1))
    got = estimate_advantages(rewards, values, mask, gamma=0.99, lam=0.9)
    for row in range(5):
        own = mask[row]
        assert_within(
            got[row, own], slow_gae(rewards[row, own].tolist(), values[row, own].tolist(), gamma=0.99, lam=0.9), 1e-10
        )
    assert got[~mask].eq(0.0).all()


@pytest.mark.parametrize("garbage", [0.0, 999.0, math.nan])
def test_d18_extra_right_padding_changes_nothing(garbage: float) -> None:
    rewards, values = float64([[0.0, 0.0, 1.0]]), float64([[0.5, 0.4, 0.3]])
    plain = estimate_advantages(rewards, values, all_kept(rewards), gamma=1.0, lam=0.95)
    tail = torch.full((1, 4), garbage, dtype=torch.float64)
    mask = response_mask(torch.tensor([3]), width=7)
    padded_values = torch.cat([values, tail], 1)
    padded = estimate_advantages(torch.cat([rewards, tail], 1), padded_values, mask, gamma=1.0, lam=0.95)
    assert padded[:, :3].equal(plain)
    assert padded[:, 3:].eq(0.0).all()
    assert compute_returns(padded, padded_values, mask)[:, 3:].eq(0.0).all()


def test_d18_a_value_after_the_end_does_not_enter_the_last_error() -> None:
    # ROLL tests/utils/test_functionals.py: the value of 100 after the end would make the last advantage 101.
    got = estimate_advantages(
        float64([[0.0, 1.0, 0.0]]), float64([[0.0, 0.0, 100.0]]), torch.tensor([[1, 1, 0]]), gamma=1.0, lam=0.95
    )
    assert_within(got, [[0.95, 1.0, 0.0]], 1e-12)


def test_d20_no_gradient_flows_through_advantages_or_returns() -> None:
    values, rewards = torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages = estimate_advantages(rewards, values, mask, gamma=1.0, lam=0.95)
    assert not advantages.requires_grad
    assert not compute_returns(advantages, values, mask).requires_grad
    assert not compute_returns(values, rewards, mask).requires_grad


def test_d20_returns_are_advantages_plus_values_before_whitening() -> None:
    rewards, values = normal(0), normal(1)
    advantages = estimate_advantages(rewards, values, MASK, gamma=1.0, lam=0.95)
    returns = compute_returns(advantages, values, MASK)
    torch.testing.assert_close(returns[MASK], (advantages + values)[MASK])
    whitened = compute_returns(masked_whiten(advantages, MASK), values, MASK)
    assert not torch.allclose(returns, whitened, atol=1e-2)


def test_d20_the_inputs_are_left_as_they_were() -> None:
    rewards, values = normal(0), normal(1)
    estimate_advantages(rewards, values, MASK, gamma=1.0, lam=0.95)
    assert rewards.equal(normal(0))
    assert values.equal(normal(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    rewards = torch.full((1, 512), 0.01, dtype=dtype)
    zeros = torch.zeros_like(rewards)
    got = estimate_advantages(rewards, zeros, all_kept(rewards), gamma=1.0, lam=1.0)
    assert got.dtype == compute_returns(got, zeros, all_kept(rewards)).dtype == torch.float32
    assert got[0, 0].item() == pytest.approx(512 * float(rewards[0, 0]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_mask_of_zeros_and_ones_is_a_mask(dtype: torch.dtype) -> None:
    rewards, values = normal(0), normal(1)
    expected = estimate_advantages(rewards, values, MASK, gamma=0.99, lam=0.95)
    got = estimate_advantages(rewards, values, MASK.to(dtype), gamma=0.99, lam=0.95)
    assert got.equal(expected)
    assert compute_returns(got, values, MASK.to(dtype)).equal(compute_returns(expected, values, MASK))


def test_integer_rewards_and_values_are_numbers() -> None:
    ones = torch.tensor([[0, 0, 0, 1]])
    got = estimate_advantages(ones, ones, torch.ones(1, 4), gamma=0.9, lam=0.95)
    assert got.dtype == torch.float32
    assert got[0].tolist() == pytest.approx([0.6579225, 0.7695, 0.9, 0.0])
