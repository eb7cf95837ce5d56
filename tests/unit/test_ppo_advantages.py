from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import Vector, assert_within, float64, load_vector
from tether_services.ppo.advantages import compute_returns, estimate_advantages
from tether_services.ppo.statistics import response_mask


def all_kept(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def slow_gae(rewards: Sequence[float], values: Sequence[float], *, gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum_k (gamma lam)^k delta_(t+k), one explicit sum per token."""
    padded = [*values, 0.0]
    deltas = [r + gamma * padded[t + 1] - padded[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def episodes(vector: Vector, row: int) -> Tensor:
    """Advantages of a row of a vector with T+1 values and a discount per step, in tether's convention.

    Tether has one discount and a terminal end, so the row is cut where the discount is 0 and the last reward of the row
    takes up the discounted bootstrap value.
    """
    rewards, values = list(vector.inputs["rewards"][row]), vector.inputs["values"][row]
    discounts, lam = vector.inputs["discounts"][row], vector.inputs["lam"]
    rewards[-1] += discounts[-1] * values[-1]
    cuts = [0, *(t + 1 for t, d in enumerate(discounts[:-1]) if d == 0.0), len(rewards)]
    parts = []
    for begin, end in pairwise(cuts):
        gamma = max(discounts[begin:end])
        part_rewards, part_values = float64([rewards[begin:end]]), float64([values[begin:end]])
        mask = all_kept(part_rewards)
        parts.append(estimate_advantages(part_rewards, part_values, mask, gamma=gamma, lam=lam)[0])
    return torch.cat(parts)


@pytest.mark.parametrize("vector_id", ["gae_rlax_lambda0.7", "gae_tfagents", "gae_nemo_rl_lambda0"])
def test_gae_public_vectors_with_t_plus_1_values(vector_id: str) -> None:
    vector = load_vector(vector_id)
    got = torch.stack([episodes(vector, row) for row in range(len(vector.inputs["rewards"]))])
    assert_within(got, vector.expected, vector.tol)


def test_gae_tianshou_terminated() -> None:
    # Three terminated episodes of four steps; the current values are the next values shifted right by one.
    vector = load_vector("gae_tianshou_terminated")
    next_values = float64(vector.inputs["next_values"]) * (1 - float64(vector.inputs["terminated"]))
    values = next_values.roll(1).reshape(3, 4)
    rewards = float64(vector.inputs["rewards"]).reshape(3, 4)
    mask = all_kept(rewards)
    advantages = estimate_advantages(rewards, values, mask, gamma=vector.inputs["gamma"], lam=vector.inputs["lam"])
    assert_within(compute_returns(advantages, values, mask).flatten(), vector.expected, vector.tol)


def test_returns_torchtune() -> None:
    vector = load_vector("returns_torchtune")
    rewards, values = float64(vector.inputs["rewards"]), float64(vector.inputs["values"])[:, :-1]
    mask = all_kept(rewards)
    advantages = estimate_advantages(rewards, values, mask, gamma=0.9, lam=vector.inputs["lam"])
    assert_within(compute_returns(advantages, values, mask), vector.expected, vector.tol)


def test_discounted_return_rlax() -> None:
    # A discount per step becomes gamma 1 on rewards scaled by the product of the discounts before them.
    vector = load_vector("discounted_return_rlax")
    discounts = float64(vector.inputs["discounts"])
    before = torch.cat([torch.ones(2, 1, dtype=torch.float64), discounts[:, :-1].cumprod(dim=1)], dim=1)
    rewards = before * float64(vector.inputs["rewards"])
    rewards[:, -1] += discounts.prod(dim=1) * float64(vector.inputs["bootstrap"])
    got = estimate_advantages(rewards, torch.zeros_like(rewards), all_kept(rewards), gamma=1.0, lam=1.0)
    assert_within(got / before, vector.expected, vector.tol)


def test_d16_gae_hand_calc() -> None:
    values, rewards = float64([[0.5, 0.4, 0.3]]), float64([[0.0, 0.0, 1.0]])
    mask = all_kept(values)
    advantages = estimate_advantages(rewards, values, mask, gamma=1.0, lam=0.95)
    assert_within(advantages, [[0.43675, 0.565, 0.7]], 1e-12)
    assert_within(compute_returns(advantages, values, mask), [[0.93675, 0.965, 1.0]], 1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_d16_gae_matches_a_slow_sum_over_ragged_rows(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([40, 1, 17, 33])
    rewards, values = (torch.randn(4, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    got = estimate_advantages(rewards, values, response_mask(lengths, width=40), gamma=gamma, lam=lam)
    for row, length in enumerate(lengths.tolist()):
        expected = slow_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma=gamma, lam=lam)
        assert_within(got[row, :length], expected, 1e-10)
        assert got[row, length:].eq(0.0).all()


def test_d16_with_lambda_1_the_advantage_is_the_rest_of_the_rewards_minus_the_value() -> None:
    generator = torch.Generator().manual_seed(4)
    rewards, values = (torch.randn(3, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = all_kept(rewards)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages = estimate_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, to_go - values)
    torch.testing.assert_close(compute_returns(advantages, values, mask), to_go)


def test_d16_a_response_of_one_token_has_the_advantage_score_minus_value() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    got = estimate_advantages(float64([[2.0]]), float64([[0.5]]), one, gamma=1.0, lam=0.95)
    assert got.item() == 1.5


@pytest.mark.parametrize("garbage", [999.0, math.nan, math.inf])
def test_d17_a_masked_gap_is_skipped_whatever_it_holds(garbage: float) -> None:
    mask = torch.tensor([[True, True, False, True, True]])
    rewards, values = float64([[0.1, 0.2, garbage, 0.3, 1.0]]), float64([[0.5, 0.4, garbage, 0.3, 0.2]])
    got = estimate_advantages(rewards, values, mask, gamma=0.99, lam=0.95)
    kept = torch.tensor([0, 1, 3, 4])
    expected = slow_gae(rewards[0, kept].tolist(), values[0, kept].tolist(), gamma=0.99, lam=0.95)
    assert_within(got[0, kept], expected, 1e-12)
    assert got[0, 2] == 0.0


@pytest.mark.parametrize("garbage", [0.0, 999.0, math.nan])
def test_d18_extra_right_padding_changes_nothing(garbage: float) -> None:
    rewards, values = float64([[0.0, 0.0, 1.0]]), float64([[0.5, 0.4, 0.3]])
    plain = estimate_advantages(rewards, values, all_kept(rewards), gamma=1.0, lam=0.95)
    tail = torch.full((1, 4), garbage, dtype=torch.float64)
    mask = response_mask(torch.tensor([3]), width=7)
    padded_values = torch.cat([values, tail], 1)
    padded = estimate_advantages(torch.cat([rewards, tail], 1), padded_values, mask, gamma=1.0, lam=0.95)
    assert padded[:, :3].equal(plain)
    returns = compute_returns(padded, padded_values, mask)
    assert returns[:, 3:].eq(0.0).all()


def test_d20_no_gradient_flows_through_advantages_or_returns() -> None:
    values = torch.zeros(1, 3, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages = estimate_advantages(torch.ones(1, 3), values, mask, gamma=1.0, lam=0.95)
    assert not advantages.requires_grad
    assert not compute_returns(advantages, values, mask).requires_grad


def test_half_precision_is_accumulated_in_float32() -> None:
    rewards = torch.full((1, 512), 0.01, dtype=torch.bfloat16)
    zeros = torch.zeros_like(rewards)
    got = estimate_advantages(rewards, zeros, all_kept(rewards), gamma=1.0, lam=1.0)
    assert got.dtype == torch.float32
    assert got[0, 0].item() == pytest.approx(512 * float(rewards[0, 0]), rel=1e-5)
