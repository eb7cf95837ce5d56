from __future__ import annotations

import math
import statistics
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64
from tests.unit.random_rows import LENGTHS, MASK, WIDTH, logprob_rows, normal
from tether_services.ppo.kl import KlKind, estimate_kl
from tether_services.ppo.rewards import (
    MissingEosMode,
    Normaliser,
    Placement,
    clip_scores,
    penalise_missing_eos,
    shape_rewards,
)

SCORES = normal(9, len(LENGTHS))
PLACEMENTS: tuple[Placement, ...] = ("last", "n_plus")
TWO_OF_FOUR = torch.tensor([[True, True, False, False]])


def shaped(placement: Placement = "last", kind: KlKind = "k1") -> Tensor:
    return shape_rewards(SCORES, logprob_rows(0), logprob_rows(1), MASK, kl_coef=0.3, kind=kind, placement=placement)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_d9_rewards_match_a_slow_loop_over_ragged_rows(placement: Placement, kind: KlKind) -> None:
    kl = estimate_kl(logprob_rows(0), logprob_rows(1), kind=kind).tolist()
    expected = [[0.0] * WIDTH for _ in LENGTHS]
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            expected[row][t] = -0.3 * kl[row][t]
        place = length if placement == "n_plus" and length < WIDTH else length - 1
        expected[row][place] += float(SCORES[row])
    assert_within(shaped(placement, kind), expected, 1e-12)


def test_d9_the_score_sits_on_the_last_response_token_and_nowhere_else() -> None:
    got = shape_rewards(SCORES, logprob_rows(0), logprob_rows(0), MASK, kl_coef=0.1)
    assert [row.nonzero().flatten().tolist() for row in got] == [[length - 1] for length in LENGTHS]
    assert got.sum(dim=1).equal(SCORES)


def test_d9_n_plus_puts_the_score_one_further_where_the_row_goes_on() -> None:
    got = shape_rewards(SCORES, logprob_rows(0), logprob_rows(0), MASK, kl_coef=0.1, placement="n_plus")
    assert [row.nonzero().flatten().tolist() for row in got] == [[min(length, WIDTH - 1)] for length in LENGTHS]
    assert got.sum(dim=1).equal(SCORES)


@pytest.mark.parametrize(("placement", "expected"), [("last", [-0.5, 6.0, 0.0, 0.0]), ("n_plus", [-0.5, -1.0, 7.0, 0])])
def test_d9_both_placements_match_the_hand_calculation(placement: Placement, expected: list[float]) -> None:
    logprobs, ref = float64([[-1.0, -1.0, -9.0, -9.0]]), float64([[-2.0, -3.0, -1.0, -1.0]])
    got = shape_rewards(float64([7.0]), logprobs, ref, TWO_OF_FOUR, kl_coef=0.5, placement=placement)
    assert got[0].tolist() == expected


def test_d9_a_masked_gap_before_the_last_token_carries_no_reward() -> None:
    mask = torch.tensor([[True, False, True, False]])
    got = shape_rewards(torch.tensor([2.0]), torch.full((1, 4), -1.0), torch.full((1, 4), -2.0), mask, kl_coef=1.0)
    assert got.tolist() == [[-1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_d9_a_response_of_one_token_in_a_row_of_one_carries_everything(placement: Placement) -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    got = shape_rewards(float64([3.0]), float64([[-1.0]]), float64([[-2.0]]), one, kl_coef=0.5, placement=placement)
    assert got.tolist() == [[2.5]]


def test_d9_the_sum_of_rewards_is_the_score_minus_the_weighted_kl_of_the_sequence() -> None:
    kl_per_sequence = torch.where(MASK, logprob_rows(0) - logprob_rows(1), 0.0).sum(dim=1)
    for placement in PLACEMENTS:
        torch.testing.assert_close(shaped(placement).sum(dim=1), SCORES - 0.3 * kl_per_sequence)


@pytest.mark.parametrize("garbage", [999.0, math.nan, math.inf])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_d9_garbage_outside_the_mask_has_no_influence(placement: Placement, garbage: float) -> None:
    dirty, other = torch.where(MASK, logprob_rows(0), garbage), torch.where(MASK, logprob_rows(1), -garbage)
    got = shape_rewards(SCORES, dirty, other, MASK, kl_coef=0.3, placement=placement)
    assert got.equal(shaped(placement))


def test_d10_no_gradient_flows_through_the_rewards() -> None:
    logprobs, ref = logprob_rows(0).requires_grad_(), logprob_rows(1).requires_grad_()
    got = shape_rewards(SCORES.clone().requires_grad_(), logprobs, ref, MASK, kl_coef=0.3)
    assert not got.requires_grad


def test_d9_without_a_weight_of_the_kl_only_the_scores_remain() -> None:
    got = shape_rewards(SCORES, logprob_rows(0), logprob_rows(1), MASK, kl_coef=0.0)
    assert got.sum(dim=1).equal(SCORES)
    assert got.count_nonzero() == len(LENGTHS)


def test_d9_a_response_without_a_token_is_refused() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="at least one response token"):
        shape_rewards(torch.ones(2), torch.zeros(2, 2), torch.zeros(2, 2), mask, kl_coef=0.1)


def test_d9_an_unknown_placement_or_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="'first'"):
        shaped(cast(Placement, "first"))
    with pytest.raises(ValueError, match="'k4'"):
        shaped(kind=cast(KlKind, "k4"))


def test_half_precision_rewards_are_float32_and_integer_masks_are_masks() -> None:
    half = torch.zeros(6, 8, dtype=torch.bfloat16)
    got = shape_rewards(torch.tensor([1.001] * 6), half, half, MASK.long(), kl_coef=0.1)
    assert got.dtype == torch.float32
    assert got[2, 0].item() == pytest.approx(1.001, abs=1e-6)


@pytest.mark.parametrize(("mode", "value", "expected"), [("subtract", 1.0, -4.0), ("replace", -1.0, -1.0)])
def test_d12_a_score_of_minus_3_without_a_stop_matches_the_hand_calculation(
    mode: MissingEosMode, value: float, expected: float
) -> None:
    got = penalise_missing_eos(float64([-3.0, -3.0]), torch.tensor([False, True]), mode=mode, value=value)
    assert got.tolist() == [expected, -3.0]


def test_d12_the_penalty_is_off_when_told_so() -> None:
    scores = float64([-3.0, 2.0])
    assert penalise_missing_eos(scores, torch.tensor([0, 1]), mode="none", value=5.0).equal(scores)


def test_d12_an_integer_flag_is_a_flag_and_half_precision_becomes_float32() -> None:
    got = penalise_missing_eos(torch.ones(2, dtype=torch.float16), torch.tensor([0, 1]), mode="subtract", value=0.25)
    assert (got.dtype, got.tolist()) == (torch.float32, [0.75, 1.0])


def test_d12_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'zero'"):
        penalise_missing_eos(SCORES, torch.ones(6), mode=cast(MissingEosMode, "zero"), value=1.0)


def test_d14_scores_are_clipped_on_both_sides_and_inside_unchanged() -> None:
    assert clip_scores(float64([-9.0, -5.0, -4.9, 0.0, 5.1]), 5.0).tolist() == [-5.0, -5.0, -4.9, 0.0, 5.0]
    assert clip_scores(torch.tensor([9.0], dtype=torch.bfloat16), 5.0).dtype == torch.float32


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_d14_a_limit_that_leaves_nothing_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="limit must be above 0"):
        clip_scores(SCORES, limit)


def test_d14_a_penalty_after_the_clip_stays_visible() -> None:
    clipped = clip_scores(float64([-50.0]), 5.0)
    got = penalise_missing_eos(clipped, torch.tensor([False]), mode="subtract", value=1.0)
    assert got.tolist() == [-6.0]


def test_d14_the_kl_is_not_clipped_with_the_score() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    got = shape_rewards(clip_scores(float64([50.0]), 5.0), float64([[0.0]]), float64([[-300.0]]), mask, kl_coef=1.0)
    assert got.tolist() == [[-295.0]]


@pytest.mark.parametrize("splits", [[60], [1, 59], [20, 20, 20], [7, 1, 30, 22], [1] * 60])
def test_d13_running_moments_equal_those_of_the_concatenation(splits: list[int]) -> None:
    scores, normaliser = normal(0, 60) * 3.0 + 100.0, Normaliser()
    for batch in torch.split(scores, splits):
        normaliser.update(batch)
    assert normaliser.count == 60
    assert normaliser.mean == pytest.approx(statistics.fmean(scores.tolist()), abs=1e-10)
    assert normaliser.var == pytest.approx(statistics.pvariance(scores.tolist()), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d13_normalised_reference_scores_have_mean_0_and_deviation_1(dtype: torch.dtype) -> None:
    scores, normaliser = normal(0, 50, dtype=dtype) * 3.0 + 5.0, Normaliser()
    normaliser.update(scores)
    got = normaliser(scores)
    assert got.dtype == dtype
    assert statistics.fmean(got.tolist()) == pytest.approx(0.0, abs=1e-5)
    assert statistics.pstdev(got.tolist()) == pytest.approx(1.0, abs=1e-5)


def test_d13_gain_and_bias_are_one_constant_pair_for_all_scores() -> None:
    # g = 1 / sigma and b = -g * mu, whatever batch the score comes in.
    normaliser = Normaliser(count=4, mean=2.0, var=9.0)
    assert normaliser(float64([2.0, 5.0, -7.0])).tolist() == pytest.approx([0.0, 1.0, -3.0], abs=1e-8)
    assert normaliser(float64([5.0])).tolist() == pytest.approx([1.0], abs=1e-8)


def test_d13_normalising_does_not_change_the_moments() -> None:
    normaliser = Normaliser(count=4, mean=2.0, var=9.0)
    normaliser(SCORES)
    assert (normaliser.count, normaliser.mean, normaliser.var) == (4, 2.0, 9.0)


def test_d13_a_normaliser_that_knows_nothing_changes_nothing() -> None:
    normaliser = Normaliser()
    normaliser.update(torch.empty(0))
    assert normaliser(SCORES).equal(SCORES)


def test_d13_equal_scores_normalise_to_0_and_not_to_nan() -> None:
    normaliser = Normaliser()
    normaliser.update(float64([3.0, 3.0]))
    assert normaliser(float64([3.0])).tolist() == [0.0]


def test_d13_moments_can_be_taken_up_again() -> None:
    whole, first = Normaliser(), Normaliser()
    whole.update(SCORES)
    first.update(SCORES[:4])
    second = Normaliser(count=first.count, mean=first.mean, var=first.var)
    second.update(SCORES[4:])
    assert (second.mean, second.var) == pytest.approx((whole.mean, whole.var))
