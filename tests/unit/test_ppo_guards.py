"""What the formulas refuse, and what must not get into a result."""

from __future__ import annotations

import math

import pytest
import torch

from tether_services.ppo.advantages import estimate_advantages
from tether_services.ppo.kl import AdaptiveKl, estimate_kl
from tether_services.ppo.losses import dpo_loss, pairwise_loss, policy_loss, value_loss
from tether_services.ppo.mismatch import mismatch_metrics
from tether_services.ppo.rewards import shape_rewards
from tether_services.ppo.statistics import masked_var, masked_whiten


def test_d10_k3_of_a_small_difference_is_exact_and_never_negative_in_float32() -> None:
    difference = torch.tensor([1e-4, 3e-4, -2e-4, 1e-5, 0.0])
    got = estimate_kl(difference, torch.zeros(5), kind="k3")
    exact = [math.expm1(-d) + d for d in difference.double().tolist()]
    assert float(got.min()) >= 0.0
    assert got.tolist() == pytest.approx(exact, rel=1e-2, abs=1e-11)


def test_the_mismatch_of_a_trainer_that_agrees_to_float32_is_measured_and_not_rounding() -> None:
    mask = torch.ones(4, 8)
    figures = mismatch_metrics(torch.full((4, 8), 1e-4), torch.zeros(4, 8), mask)
    assert figures["gen_kl"] == pytest.approx(math.expm1(1e-4) - 1e-4, rel=1e-2)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_d19_what_is_outside_the_mask_has_no_influence_on_the_gradient_of_the_moments(garbage: float) -> None:
    x = torch.tensor([1.0, 2.0, 4.0, garbage], dtype=torch.float64, requires_grad=True)
    mask, weights = torch.tensor([1, 1, 1, 0]), torch.tensor([1.0, -2.0, 3.0, 1.0], dtype=torch.float64)
    for result in (masked_var(x, mask, unbiased=False), (masked_whiten(x, mask) * weights).sum()):
        (gradient,) = torch.autograd.grad(result, x)
        assert bool(gradient.isfinite().all())
        assert float(gradient[3]) == 0.0


def test_d11_a_kl_that_is_not_a_number_is_refused_and_does_not_move_the_weight() -> None:
    controller = AdaptiveKl(0.1, 6.0, 10_000)
    with pytest.raises(ValueError):
        controller.update(math.nan, 512)
    assert controller.kl_coef == 0.1


def test_d11_the_weight_stays_a_plain_number_when_the_kl_is_a_tensor() -> None:
    assert type(AdaptiveKl(0.1, 6.0, 10_000).update(torch.tensor(6.3), 512)) is float  # type: ignore[arg-type]


def test_d21_a_mask_or_advantage_of_another_shape_is_refused_and_not_spread_over_the_batch() -> None:
    x = torch.zeros(3, 3, dtype=torch.float64)
    for mask, advantages in ((torch.ones(3), x), (torch.ones(3, 1), x), (torch.ones(3, 3), torch.arange(3.0))):
        with pytest.raises(ValueError):
            policy_loss(x, x, advantages, mask, clip_range=0.2)
    with pytest.raises(ValueError):
        value_loss(x, x, x + 1.0, torch.ones(3), clip_range=0.2)


def test_d16_values_with_a_column_more_than_the_rewards_are_refused_and_not_cut() -> None:
    with pytest.raises(ValueError):
        estimate_advantages(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3), gamma=1.0, lam=1.0)


def test_d9_scores_that_are_not_one_per_row_are_refused_and_not_cut() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError):
        shape_rewards(torch.tensor([1.0, 2.0, 3.0]), x, x, torch.ones(2, 4), kl_coef=0.1)


def test_d36_and_d33_a_loss_over_no_pairs_is_refused_and_not_nan() -> None:
    none = torch.zeros(0)
    with pytest.raises(ValueError):
        pairwise_loss(none, none)
    with pytest.raises(ValueError):
        dpo_loss(none, none, none, none, beta=0.1)


@pytest.mark.parametrize(("beta", "label_smoothing"), [(-0.1, 0.0), (0.0, 0.0), (0.1, 1.5)])
def test_d36_settings_outside_their_range_are_refused(beta: float, label_smoothing: float) -> None:
    pairs = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError):
        dpo_loss(pairs, -pairs, 0 * pairs, 0 * pairs, beta=beta, label_smoothing=label_smoothing)


def test_d21_one_advantage_per_response_counts_for_all_of_its_tokens() -> None:
    x, mask = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3)
    one, each = torch.tensor([[1.0], [-2.0]]).double(), torch.tensor([[1.0] * 3, [-2.0] * 3]).double()
    got, _ = policy_loss(x, x, one, mask, clip_range=0.2)
    expected, _ = policy_loss(x, x, each, mask, clip_range=0.2)
    assert float(got) == float(expected) == 0.5
