from __future__ import annotations

import math
import statistics
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64
from tests.unit.random_rows import LENGTHS, MASK, kept, logprob_rows, normal
from tether_services.ppo.losses import policy_loss
from tether_services.ppo.mismatch import SamplerCorrection, mismatch_metrics, sampler_weights

KINDS: tuple[SamplerCorrection, ...] = ("none", "token_tis", "icepop", "token_mask", "sequence_mask_geometric")
OLD, MU = logprob_rows(0), logprob_rows(1)
LOW, HIGH = 0.6, 2.0
# NeMo-RL, algorithms/data/clipped_pg_loss_goldens.json; recorded in float64 with 1e-8 added to the number of tokens.
NEW_NEMO = float64([[-1.6, -0.8, -1.1, -1.4], [-0.7, -1.4, -0.9, -1.2]])
OLD_NEMO = float64([[-1.0, -1.1, -0.8, -1.3], [-0.9, -1.0, -1.2, -0.8]])
MU_NEMO = float64([[-1.2, -1.5, -0.7, -1.1], [-1.4, -0.7, -1.3, -1.0]])
ADVANTAGES_NEMO = float64([[1.2, -0.7, 0.4, 2.0], [-1.1, 0.6, 1.5, -0.3]])
MASK_NEMO = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def slow_weights(kind: SamplerCorrection, low: float, high: float) -> list[list[float]]:
    """The definitions, token by token, 0 outside the mask."""
    rows = []
    for deltas, length in zip((OLD - MU).tolist(), LENGTHS, strict=True):
        ratios = [math.exp(d) for d in deltas[:length]]
        geometric = math.prod(ratios) ** (1.0 / length)
        row = {
            "none": [1.0 for _ in ratios],
            "token_tis": [min(max(w, low), high) for w in ratios],
            "icepop": [w if low <= w <= high else 0.0 for w in ratios],
            "token_mask": [float(low <= w <= high) for w in ratios],
            "sequence_mask_geometric": [float(low <= geometric <= high) for _ in ratios],
        }[kind]
        rows.append(row + [0.0] * (len(deltas) - length))
    return rows


def one_weight(delta: float, kind: SamplerCorrection, low: float = 0.0, high: float = 2.0) -> float:
    ones = torch.ones(1, 1)
    return float(sampler_weights(float64([[delta - 1.0]]), float64([[-1.0]]), ones, kind=kind, low=low, high=high))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_s8_sampler_weights_match_a_slow_loop(kind: SamplerCorrection, dtype: torch.dtype) -> None:
    got = sampler_weights(OLD.to(dtype), MU.to(dtype), MASK, kind=kind, low=LOW, high=HIGH)
    expected = slow_weights(kind, LOW, HIGH)
    assert got.dtype == dtype
    assert_within(got, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    if kind != "none":
        assert 0.0 < float(got.sum()) != sum(LENGTHS)


@pytest.mark.parametrize(
    ("delta", "expected"), [(math.log(3.0), 2.0), (math.log(0.5), 0.5), (0.0, 1.0), (-50.0, math.exp(-20.0))]
)
def test_s8_token_tis_is_capped_at_2_above_and_free_below(delta: float, expected: float) -> None:
    assert one_weight(delta, "token_tis") == pytest.approx(expected, rel=1e-12)


def test_s8_token_tis_with_a_lower_bound_matches_another_public_test() -> None:
    # NeMo-RL test_clipped_pg_loss_tis_min_bound_defaults_to_zero: ratios 0.1, 1 and 3.
    got = [one_weight(math.log(w), "token_tis", low=low) for low in (0.0, 0.5) for w in (0.1, 1.0, 3.0)]
    assert got == pytest.approx([0.1, 1.0, 2.0, 0.5, 1.0, 2.0])


@pytest.mark.parametrize(("ratio", "icepop"), [(0.49, 0.0), (0.51, 0.51), (1.0, 1.0), (4.9, 4.9), (5.1, 0.0)])
def test_s8_icepop_keeps_the_ratio_inside_and_drops_the_token_outside(ratio: float, icepop: float) -> None:
    assert one_weight(math.log(ratio), "icepop", 0.5, 5.0) == pytest.approx(icepop)
    assert one_weight(math.log(ratio), "token_mask", 0.5, 5.0) == float(icepop > 0.0)


def test_s8_the_bounds_themselves_are_inside() -> None:
    for kind in KINDS[2:]:
        assert one_weight(0.0, kind, 1.0, 2.0) == 1.0
        assert one_weight(0.0, kind, 0.5, 1.0) == 1.0


def test_s8_the_geometric_mask_decides_per_response_and_does_not_grow_with_its_length() -> None:
    # Deltas of 0.01 per token: the mean stays at exp(0.01) however long, the product does not. One row in the other
    # direction, one whose deviations cancel, one that is only wrong outside the mask.
    old = torch.zeros(4, 500, dtype=torch.float64)
    old[0], old[1], old[2], old[3, 250:] = 0.01, -0.03, 0.5, 9.0
    old[2, ::2] = -0.5
    mask = torch.ones(4, 500, dtype=torch.bool)
    mask[3, 250:] = False
    got = sampler_weights(old, torch.zeros_like(old), mask, kind="sequence_mask_geometric", low=0.98, high=1.02)
    assert got[0].eq(1.0).all()
    assert got[1].eq(0.0).all()
    assert got[2].eq(1.0).all()
    assert got[3].equal(mask[3].double())


@pytest.mark.parametrize("kind", KINDS)
def test_s8_no_gradient_flows_through_the_weights(kind: SamplerCorrection) -> None:
    old, mu = OLD.clone().requires_grad_(), MU.clone().requires_grad_()
    assert not sampler_weights(old, mu, MASK, kind=kind, low=LOW, high=HIGH).requires_grad


def test_s8_the_weight_scales_the_gradient_of_its_token_as_a_constant() -> None:
    old, mu = float64([[-1.0, -1.0]]), float64([[-1.0 - math.log(3.0), -1.0 + math.log(2.0)]])
    mask = torch.ones(1, 2)
    weights = sampler_weights(old, mu, mask, kind="token_tis", low=0.0, high=2.0)
    logprobs = old.clone().requires_grad_()
    loss, _ = policy_loss(logprobs, logprobs, float64([[1.0, -3.0]]), mask, clip_range=0.2, weights=weights)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert_within(gradient, [[-2.0 * 1.0 / 2, 0.5 * 3.0 / 2]], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_s8_equal_logprobs_give_a_weight_of_1_on_the_mask(kind: SamplerCorrection) -> None:
    got = sampler_weights(OLD, OLD, MASK, kind=kind, low=0.98, high=1.02)
    assert got.equal(MASK.double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [999.0, math.nan, math.inf, -math.inf])
def test_s8_garbage_outside_the_mask_has_no_influence(kind: SamplerCorrection, garbage: float) -> None:
    expected = sampler_weights(OLD, MU, MASK, kind=kind, low=LOW, high=HIGH)
    for old, mu in ((torch.where(MASK, OLD, garbage), MU), (OLD, torch.where(MASK, MU, garbage))):
        assert sampler_weights(old, mu, MASK, kind=kind, low=LOW, high=HIGH).equal(expected)
        assert mismatch_metrics(old, mu, MASK) == mismatch_metrics(OLD, MU, MASK)


@pytest.mark.parametrize("kind", KINDS)
def test_s8_extreme_ratios_stay_finite_and_an_empty_row_is_0(kind: SamplerCorrection) -> None:
    mask = MASK.clone()
    mask[2] = False
    got = sampler_weights(OLD.float() + 300.0, MU.float(), mask.long(), kind=kind, low=0.0, high=1e30)
    assert got.isfinite().all()
    assert got[~mask].eq(0.0).all()
    assert sampler_weights(OLD.bfloat16(), MU.half(), MASK, kind=kind, low=LOW, high=HIGH).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_s8_a_bound_of_none_is_no_bound(kind: SamplerCorrection) -> None:
    for (low, high), (least, most) in (((None, HIGH), (0.0, HIGH)), ((LOW, None), (LOW, math.inf))):
        got = sampler_weights(OLD, MU, MASK, kind=kind, low=low, high=high)
        assert_within(got, slow_weights(kind, least, most), 1e-12)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 2.0), (2.0, 1.0), (math.nan, 2.0)])
def test_s8_bounds_that_exclude_each_other_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low and high must satisfy"):
        sampler_weights(OLD, MU, MASK, kind="token_tis", low=low, high=high)


def test_s8_an_unknown_correction_is_refused() -> None:
    with pytest.raises(ValueError, match="'bypass'"):
        sampler_weights(OLD, MU, MASK, kind=cast(SamplerCorrection, "bypass"), low=0.0, high=2.0)


@pytest.mark.parametrize(
    ("kind", "low", "high", "loss", "gradient"),
    [
        ("token_tis", 0.7, 1.3, 0.3209028399844618, [-0.1608768107267998, 0.24567430248748398, -0.05362560357559994,
                                                     0.0, 0.3493211881351662, -0.059590236335788666, 0.0, 0.0]),
        ("icepop", 0.75, 1.25, -0.21450241430239975, [-0.1608768107267998, 0.0, -0.05362560357559994,
                                                      0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)  # fmt: skip
def test_s8_corrected_loss_and_gradients_equal_those_of_another_implementation(
    kind: SamplerCorrection, low: float, high: float, loss: float, gradient: list[float]
) -> None:
    weights = sampler_weights(OLD_NEMO, MU_NEMO, MASK_NEMO, kind=kind, low=low, high=high)
    logprobs = NEW_NEMO.clone().requires_grad_()
    got, _ = policy_loss(logprobs, OLD_NEMO, ADVANTAGES_NEMO, MASK_NEMO, clip_range=0.2, weights=weights)
    (got_gradient,) = torch.autograd.grad(got, logprobs)
    assert_within(got.detach(), loss, 1e-8)
    assert_within(got_gradient.flatten(), gradient, 1e-8)


def test_s8_mismatch_metrics_equal_those_of_another_implementation() -> None:
    metrics = mismatch_metrics(OLD_NEMO, MU_NEMO, MASK_NEMO)
    assert metrics["mult_prob_error"] == pytest.approx(1.3633956877038524, abs=1e-8)
    assert metrics["gen_kl"] == pytest.approx(0.0615208729208074, abs=1e-8)
    assert metrics["mean_abs_dlogp"] == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_s8_mismatch_metrics_match_a_slow_loop(dtype: torch.dtype) -> None:
    deltas = kept(OLD - MU)
    got = mismatch_metrics(OLD.to(dtype), MU.to(dtype), MASK)
    assert got["mean_abs_dlogp"] == pytest.approx(statistics.fmean(abs(d) for d in deltas), rel=1e-5)
    assert got["mult_prob_error"] == pytest.approx(statistics.fmean(math.exp(abs(d)) for d in deltas), rel=1e-5)
    assert got["gen_kl"] == pytest.approx(statistics.fmean(math.exp(d) - 1 - d for d in deltas), rel=1e-5)


def test_s8_gen_kl_is_the_divergence_of_the_generator_from_the_trainer() -> None:
    # Tokens in the shares in which the generator draws them: the mean over them is its expectation.
    generator, trainer = float64([0.5, 0.3, 0.2]), float64([0.4, 0.4, 0.2])
    tokens = torch.tensor([[0] * 5 + [1] * 3 + [2] * 2])
    got = mismatch_metrics(trainer.log()[tokens], generator.log()[tokens], torch.ones(1, 10))
    assert got["gen_kl"] == pytest.approx(float((generator * (generator / trainer).log()).sum()), abs=1e-12)


def test_s8_mismatch_is_0_for_equal_logprobs() -> None:
    expected = {"mean_abs_dlogp": 0.0, "mult_prob_error": 1.0, "gen_kl": 0.0, "outlier_ratio": 0.0}
    assert mismatch_metrics(OLD, OLD, MASK) == expected


@pytest.mark.parametrize(("ratio", "share"), [(99.0, 0.0), (101.0, 0.25), (1.1e-4, 0.0), (0.9e-4, 0.25)])
def test_s8_the_outlier_ratio_is_the_share_of_responses_with_an_extreme_token(ratio: float, share: float) -> None:
    old = torch.zeros(4, 5, dtype=torch.float64)
    old[1, 3] = math.log(ratio)
    old[2, 4] = 50.0
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2, 4] = False
    assert mismatch_metrics(old, torch.zeros_like(old), mask)["outlier_ratio"] == share


def test_s8_metrics_of_nothing_are_refused() -> None:
    nothing: Tensor = torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="keeps no entry"):
        mismatch_metrics(normal(0, 2, 2), normal(1, 2, 2), nothing)
