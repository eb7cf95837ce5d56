from __future__ import annotations

import itertools
import math
import statistics
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64
from tests.unit.random_rows import normal
from tether_services.ppo.losses import DpoKind, dpo_loss, pairwise_loss, ranking_loss

DPO_INPUTS = tuple(normal(seed, 7) * 4.0 for seed in range(4))
LEADS = ((DPO_INPUTS[0] - DPO_INPUTS[1]) - (DPO_INPUTS[2] - DPO_INPUTS[3])).tolist()
TORCHTUNE = tuple(
    float64(x) for x in ([-0.5, -10.0, -1.0], [-0.1, -30.0, -21.0], [-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1])
)
"""Leads of 0, 10 and 20; tests/torchtune/rlhf/loss/test_dpo_loss.py."""


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def slow_ranking_loss(scores: list[float], ranks: list[float]) -> float:
    """The definition: the mean over explicit ordered pairs."""
    pairs = itertools.permutations(zip(scores, ranks, strict=True), 2)
    return statistics.fmean(-log_sigmoid(s - other) for (s, rank), (other, worse) in pairs if rank < worse)


def gradient_of(loss: Tensor, x: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(loss, x)
    values: list[float] = gradient.tolist()
    return values


def test_d33_the_pairwise_loss_is_the_mean_of_the_bradley_terry_losses() -> None:
    chosen, rejected = normal(0, 9), normal(1, 9)
    expected = statistics.fmean(-log_sigmoid(d) for d in (chosen - rejected).tolist())
    assert float(pairwise_loss(chosen, rejected)) == pytest.approx(expected, rel=1e-12)
    assert float(pairwise_loss(chosen.float(), rejected.float())) == pytest.approx(expected, rel=1e-5)


def test_d33_equal_scores_cost_the_logarithm_of_2_and_push_apart() -> None:
    chosen, rejected = float64([1.0]).requires_grad_(), float64([1.0]).requires_grad_()
    loss = pairwise_loss(chosen, rejected)
    assert loss.item() == pytest.approx(math.log(2.0))
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    assert [g.item() for g in gradients] == [-0.5, 0.5]


def test_d33_a_margin_is_taken_off_the_lead() -> None:
    chosen, rejected, margins = normal(0, 9), normal(1, 9), normal(2, 9).abs()
    leads = (chosen - rejected).tolist()
    per_pair = statistics.fmean(-log_sigmoid(d - m) for d, m in zip(leads, margins.tolist(), strict=True))
    assert float(pairwise_loss(chosen, rejected, margin=margins)) == pytest.approx(per_pair, rel=1e-12)
    constant = statistics.fmean(-log_sigmoid(d - 0.7) for d in leads)
    assert float(pairwise_loss(chosen, rejected, margin=0.7)) == pytest.approx(constant, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_d33_large_gaps_in_half_precision_stay_finite(dtype: torch.dtype) -> None:
    chosen, rejected = torch.tensor([-300.0], dtype=dtype), torch.tensor([300.0], dtype=dtype)
    loss = pairwise_loss(chosen, rejected)
    assert (loss.dtype, loss.item()) == (torch.float32, 600.0)
    assert pairwise_loss(rejected, chosen).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d33_scores_in_ranked_order_match_the_printed_number(dtype: torch.dtype) -> None:
    loss = ranking_loss(torch.tensor([2.0, 1.0, 0.0], dtype=dtype), torch.tensor([0, 1, 2]))
    assert loss.dtype == dtype
    assert float(loss) == pytest.approx(0.2511505, abs=1e-7)


@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_d33_the_ranking_loss_is_the_mean_over_explicit_pairs_without_ties(size: int) -> None:
    for seed in range(5):
        scores = normal(seed, size)
        for ranks in (normal(seed + 10, size).argsort(), torch.arange(size) % 3, torch.arange(size).gt(0).long() * -3):
            assert float(ranking_loss(scores, ranks)) == pytest.approx(
                slow_ranking_loss(scores.tolist(), ranks.tolist()), rel=1e-12
            )


def test_d33_the_margin_of_a_ranking_is_taken_off_the_lead_of_every_pair() -> None:
    scores, ranks = [0.3, 5.0, -0.9], [0, 1, 1]
    expected = (log_sigmoid(0.3 - 5.0 - 0.7) + log_sigmoid(0.3 + 0.9 - 0.7)) / -2
    assert float(ranking_loss(float64(scores), torch.tensor(ranks), margin=0.7)) == pytest.approx(expected, rel=1e-12)


def test_d33_without_ties_the_divisor_is_the_number_of_pairs() -> None:
    scores, ranks = normal(0, 4), torch.tensor([3, 0, 2, 1])
    order = ranks.argsort()
    pairs = list(itertools.combinations(scores[order].tolist(), 2))
    expected = sum(-log_sigmoid(better - worse) for better, worse in pairs) / math.comb(4, 2)
    assert float(ranking_loss(scores, ranks)) == pytest.approx(expected, rel=1e-12)


def test_d33_a_smaller_rank_is_better() -> None:
    scores = float64([0.0, 0.0]).requires_grad_()
    assert gradient_of(ranking_loss(scores, torch.tensor([1, 2])), scores) == [-0.5, 0.5]
    assert gradient_of(ranking_loss(scores, torch.tensor([2, 1])), scores) == [0.5, -0.5]


def test_d33_ties_are_dropped_and_only_ties_give_0_with_no_gradient() -> None:
    scores = float64([0.3, 5.0, -0.9]).requires_grad_()
    tied = ranking_loss(scores, torch.tensor([0, 1, 1]))
    expected = (log_sigmoid(0.3 - 5.0) + log_sigmoid(0.3 + 0.9)) / -2
    assert float(tied.detach()) == pytest.approx(expected)
    nothing = ranking_loss(scores, torch.tensor([4, 4, 4]))
    assert float(nothing.detach()) == 0.0
    assert gradient_of(nothing, scores) == [0.0, 0.0, 0.0]
    assert ranking_loss(float64([1.0]), torch.tensor([0])).item() == 0.0


def test_d33_two_answers_are_one_pair() -> None:
    scores = normal(3, 2)
    torch.testing.assert_close(ranking_loss(scores, torch.tensor([1, 0])), pairwise_loss(scores[1:], scores[:1]))


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_d36_the_sigmoid_loss_matches_its_formula(beta: float, smoothing: float) -> None:
    got = dpo_loss(*DPO_INPUTS, beta=beta, label_smoothing=smoothing)
    losses = [-(1 - smoothing) * log_sigmoid(beta * x) - smoothing * log_sigmoid(-beta * x) for x in LEADS]
    assert float(got) == pytest.approx(statistics.fmean(losses), rel=1e-12)


@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0])
def test_d36_the_other_kinds_match_their_formulas(beta: float) -> None:
    ipo = [(x - 1 / (2 * beta)) ** 2 for x in LEADS]
    hinge = [max(0.0, 1 - beta * x) for x in LEADS]
    assert float(dpo_loss(*DPO_INPUTS, beta=beta, kind="ipo")) == pytest.approx(statistics.fmean(ipo), rel=1e-12)
    assert float(dpo_loss(*DPO_INPUTS, beta=beta, kind="hinge")) == pytest.approx(statistics.fmean(hinge), rel=1e-12)
    assert 0 < sum(loss == 0.0 for loss in hinge) < len(hinge)


def test_d36_the_sigmoid_loss_matches_the_hand_calculation_of_torchtune() -> None:
    expected = [math.log(1.0 + math.exp(-x)) for x in (0.0, 1.0, 2.0)]
    for i in range(3):
        assert float(dpo_loss(*(x[i : i + 1] for x in TORCHTUNE), beta=0.1)) == pytest.approx(expected[i], abs=1e-9)
    assert float(dpo_loss(*TORCHTUNE, beta=0.1)) == pytest.approx(statistics.fmean(expected), abs=1e-9)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_d36_a_policy_equal_to_its_reference_costs_the_logarithm_of_2(beta: float) -> None:
    chosen, rejected = normal(0, 5), normal(1, 5)
    assert_within(dpo_loss(chosen, rejected, chosen, rejected, beta=beta), math.log(2.0), 1e-12)


def test_d36_the_gradient_raises_the_chosen_and_lowers_the_rejected_and_spares_the_reference() -> None:
    inputs = [x.clone().requires_grad_() for x in DPO_INPUTS]
    chosen, rejected, *reference = torch.autograd.grad(dpo_loss(*inputs, beta=0.3), inputs, allow_unused=True)
    expected = [-0.3 / len(LEADS) / (1.0 + math.exp(0.3 * x)) for x in LEADS]
    assert chosen.tolist() == pytest.approx(expected)
    assert rejected.tolist() == pytest.approx([-x for x in expected])
    assert reference == [None, None]


def test_d36_a_wrong_kind_or_a_smoothing_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="'kto'"):
        dpo_loss(*DPO_INPUTS, beta=0.1, kind=cast(DpoKind, "kto"))
    kinds: tuple[DpoKind, ...] = ("ipo", "hinge")
    for kind in kinds:
        with pytest.raises(ValueError, match=f"{kind} cannot have beta 0.1 and label_smoothing 0.1"):
            dpo_loss(*DPO_INPUTS, beta=0.1, label_smoothing=0.1, kind=kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_d36_sums_of_logprobs_in_half_precision_are_compared_in_float32(dtype: torch.dtype) -> None:
    half = [x.to(dtype) for x in DPO_INPUTS]
    got = dpo_loss(*half, beta=0.1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, dpo_loss(*(x.float() for x in half), beta=0.1))
