from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64, load_vector
from tether_services.ppo.losses import (
    approx_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    policy_ratio,
    tis_weights,
    token_mean,
)
from tether_services.ppo.statistics import response_mask


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (6, 8)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = response_mask(torch.tensor([8, 3, 1, 5, 8, 2]), width=8)


def test_ppo_clip_nemo_rl() -> None:
    vector = load_vector("ppo_clip_nemo_rl")
    logp, old, adv = (float64(vector.inputs[name]) for name in ("logp", "old_logp", "adv"))
    per_token = clipped_policy_loss(logp, old, adv, clip_range=vector.inputs["eps"])
    assert_within(policy_ratio(logp, old), vector.expected["ratio"], vector.tol)
    assert_within(per_token, vector.expected["per_token"], vector.tol)
    assert_within(token_mean(per_token, num_tokens=3), vector.expected["loss"], vector.tol)


def test_reinforce_nemo_rl() -> None:
    # At ratio 1 the gradient of the clipped loss is that of -A * logp, which is what this vector lists.
    vector = load_vector("reinforce_nemo_rl")
    adv, logp = float64(vector.inputs["adv"]), float64(vector.inputs["logp"]).requires_grad_()
    loss = token_mean(clipped_policy_loss(logp, logp.detach(), adv, clip_range=0.2), num_tokens=3)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert_within(3 * gradient * logp.detach(), vector.expected["per_token"], vector.tol)
    assert_within((gradient * logp.detach()).sum(), vector.expected["loss"], vector.tol)


def test_loss_agg_verl() -> None:
    # "token-sum" is a token mean with a divisor of 1.
    vector = load_vector("loss_agg_verl")
    losses, mask = float64(vector.inputs["loss"]), torch.tensor(vector.inputs["mask"]).bool()
    assert_within(token_mean(losses, mask, num_tokens=1), vector.expected, vector.tol)


def test_d21_the_policy_loss_matches_a_slow_loop() -> None:
    logp, old, adv = rows(0), rows(1), rows(2)
    got = clipped_policy_loss(logp, old, adv, clip_range=0.2)
    for i in range(6):
        for t in range(8):
            ratio = math.exp(float(logp[i, t] - old[i, t]))
            a = float(adv[i, t])
            expected = max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
            assert float(got[i, t]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "flows"), [(0.5, 1.0, 0), (-0.5, 1.0, 1), (0.5, -1.0, 1), (-0.5, -1.0, 0)]
)
def test_d21_the_gradient_stops_only_where_moving_on_would_be_rewarded(
    log_ratio: float, advantage: float, flows: int
) -> None:
    logp = float64([log_ratio]).requires_grad_()
    loss = clipped_policy_loss(logp, float64([0.0]), float64([advantage]), clip_range=0.2).sum()
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.item() == pytest.approx(-advantage * math.exp(log_ratio) * flows)


def test_d21_the_log_ratio_is_clamped_so_that_the_ratio_stays_finite() -> None:
    ratio = policy_ratio(torch.tensor([500.0, -500.0]), torch.zeros(2))
    assert ratio.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


@pytest.mark.parametrize("split", [[6], [1] * 6, [2, 4], [5, 1]])
def test_d21_the_gradient_does_not_depend_on_the_micro_batch_split(split: list[int]) -> None:
    logp, old, adv = rows(0).requires_grad_(), rows(1), rows(2)
    num_tokens = int(MASK.sum())
    parts = zip(*(torch.split(x, split) for x in (logp, old, adv, MASK)), strict=True)
    loss = sum(
        token_mean(clipped_policy_loss(p, o, a, clip_range=0.2), m, num_tokens=num_tokens) for p, o, a, m in parts
    )
    assert isinstance(loss, Tensor)
    torch.autograd.backward(loss)
    assert logp.grad is not None
    whole = rows(0).requires_grad_()
    losses = clipped_policy_loss(whole, old, adv, clip_range=0.2)
    (expected,) = torch.autograd.grad(losses[MASK].mean(), whole)
    torch.testing.assert_close(logp.grad, expected)


def test_d21_fully_masked_rows_contribute_nothing() -> None:
    losses, mask = rows(0), MASK.clone()
    mask[2] = False
    without = torch.cat([losses[:2], losses[3:]])
    without_mask = torch.cat([mask[:2], mask[3:]])
    assert token_mean(losses, mask, num_tokens=9).equal(token_mean(without, without_mask, num_tokens=9))


def test_d21_masked_entries_receive_exactly_no_gradient() -> None:
    logp = rows(0).requires_grad_()
    loss = token_mean(clipped_policy_loss(logp, rows(1), rows(2), clip_range=0.2), MASK, num_tokens=27)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient[~MASK].eq(0.0).all()


def test_d21_without_a_token_the_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens must be at least 1"):
        token_mean(torch.ones(2), num_tokens=0)


@pytest.mark.parametrize(("value", "target", "expected"), [(1.0, 0.5, 0.125), (0.5, 1.0, 0.32), (0.1, 0.1, 0.0)])
def test_d23_value_loss_hand_calc(value: float, target: float, expected: float) -> None:
    got = clipped_value_loss(float64([value]), float64([0.0]), float64([target]), value_clip_range=0.2)
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_d23_the_clipped_loss_is_never_below_the_unclipped_one() -> None:
    values, old, returns = rows(0), rows(1), rows(2)
    clipped = clipped_value_loss(values, old, returns, value_clip_range=0.2)
    assert (clipped >= 0.5 * (values - returns) ** 2).all()
    assert (clipped > 0.5 * (values - returns) ** 2).any()


def test_d23_a_wide_clip_range_is_half_the_squared_error() -> None:
    values, returns = rows(0), rows(2)
    got = clipped_value_loss(values, rows(1), returns, value_clip_range=1e9)
    torch.testing.assert_close(got, 0.5 * (values - returns) ** 2)


def test_d23_the_value_loss_does_not_depend_on_the_micro_batch_split() -> None:
    losses = clipped_value_loss(rows(0), rows(1), rows(2), value_clip_range=0.2)
    num_tokens = int(MASK.sum())
    parts = [
        token_mean(x, m, num_tokens=num_tokens)
        for x, m in zip(torch.split(losses, 2), torch.split(MASK, 2), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), losses[MASK].mean())


@pytest.mark.parametrize(("delta", "expected"), [(math.log(3), 2.0), (math.log(0.5), 0.5), (0.0, 1.0)])
def test_tis_weights_are_capped_above_and_not_below(delta: float, expected: float) -> None:
    got = tis_weights(float64([-1.0 + delta]), float64([-1.0]), cap=2.0)
    assert got.item() == pytest.approx(expected)


def test_no_gradient_flows_through_the_tis_weights() -> None:
    old, mu = rows(0).requires_grad_(), rows(1).requires_grad_()
    assert not tis_weights(old, mu.detach(), cap=2.0).requires_grad
    assert not tis_weights(old, mu, cap=2.0).requires_grad


def test_d24_identical_logprobs_give_ratio_1_and_nothing_to_report() -> None:
    logp = rows(0)
    assert policy_ratio(logp, logp).eq(1.0).all()
    assert approx_kl(logp, logp, MASK) == 0.0
    assert clip_fraction(logp, logp, MASK, clip_range=0.2) == 0.0


def test_d25_approx_kl_and_clip_fraction_are_taken_over_the_mask_only() -> None:
    new, old = rows(0), rows(1)
    kept = [float(n - o) for n, o, m in zip(new.flatten(), old.flatten(), MASK.flatten(), strict=True) if m]
    assert approx_kl(new, old, MASK) == pytest.approx(0.5 * sum(d * d for d in kept) / len(kept))
    outside = sum(not 0.8 <= math.exp(d) <= 1.2 for d in kept) / len(kept)
    assert clip_fraction(new, old, MASK, clip_range=0.2) == pytest.approx(outside)


def test_half_precision_losses_are_float32() -> None:
    half = torch.ones(3, dtype=torch.bfloat16)
    assert clipped_policy_loss(half, half, half, clip_range=0.2).dtype == torch.float32
    assert clipped_value_loss(half, half, half, value_clip_range=0.2).dtype == torch.float32
    assert tis_weights(half, half, cap=2.0).dtype == torch.float32
    assert token_mean(torch.full((4096,), 1.0, dtype=torch.bfloat16), num_tokens=4096).item() == 1.0
