from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64
from tests.unit.random_rows import LENGTHS, MASK, WIDTH, kept, logprob_rows, normal
from tether_services.ppo.losses import entropy, policy_loss

GARBAGE = [999.0, math.nan, math.inf, -math.inf]
ADVANTAGES = normal(2)
WEIGHTS = normal(3).abs()


def slow_token_loss(log_ratio: float, advantage: float, *, low: float, high: float, dual: float | None = None) -> float:
    """The definition of the clipped loss of one token."""
    ratio = math.exp(log_ratio)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1.0 - low), 1.0 + high))
    return min(loss, -advantage * dual) if dual is not None and advantage < 0.0 else loss


def slow_losses(low: float = 0.2, high: float = 0.2, dual: float | None = None) -> list[list[float]]:
    """Rows of token losses on the mask."""
    log_ratios = (logprob_rows(0) - logprob_rows(1)).tolist()
    return [
        [slow_token_loss(log_ratios[i][t], float(ADVANTAGES[i, t]), low=low, high=high, dual=dual) for t in range(n)]
        for i, n in enumerate(LENGTHS)
    ]


def loss_and_metrics(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    rows = [x.to(dtype) for x in (logprob_rows(0), logprob_rows(1), ADVANTAGES)]
    return policy_loss(rows[0], rows[1], rows[2], MASK, **{"clip_range": 0.2, **options})


def one_token(log_ratio: float, advantage: float, **options: Any) -> tuple[Tensor, dict[str, Tensor], float]:
    """The loss of a single token, its metrics and its gradient with respect to the log-probability."""
    logprob = float64([[log_ratio - 1.0]]).requires_grad_()
    loss, metrics = policy_loss(
        logprob, float64([[-1.0]]), float64([[advantage]]), torch.ones(1, 1), **{"clip_range": 0.2, **options}
    )
    (gradient,) = torch.autograd.grad(loss, logprob)
    return loss.detach(), metrics, float(gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.4, 0.1)])
def test_d21_the_policy_loss_matches_a_slow_loop(low: float, high: float, dtype: torch.dtype) -> None:
    loss, _ = loss_and_metrics(dtype, clip_range=low, clip_range_high=high)
    expected = sum(map(sum, slow_losses(low, high))) / sum(LENGTHS)
    assert loss.dtype == dtype
    assert float(loss) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)


def test_d21_the_upper_range_is_the_lower_one_unless_it_is_set() -> None:
    assert loss_and_metrics(clip_range=0.3)[0].equal(loss_and_metrics(clip_range=0.3, clip_range_high=0.3)[0])
    assert not loss_and_metrics(clip_range=0.3)[0].equal(loss_and_metrics(clip_range=0.3, clip_range_high=0.2)[0])


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "flows"),
    [(0.5, 1.0, 0), (-0.5, 1.0, 1), (0.5, -1.0, 1), (-0.5, -1.0, 0), (0.1, 1.0, 1), (-0.1, -1.0, 1)],
)
def test_d21_the_gradient_stops_only_where_moving_on_would_be_rewarded(
    log_ratio: float, advantage: float, flows: int
) -> None:
    _, metrics, gradient = one_token(log_ratio, advantage)
    assert gradient == pytest.approx(-advantage * math.exp(log_ratio) * flows)
    assert metrics["clip_fraction"] == 1 - flows


def test_d21_loss_and_gradients_equal_those_of_another_implementation() -> None:
    # NeMo-RL, algorithms/data/clipped_pg_loss_goldens.json, "ppo_token": recorded in float64, with 1e-8 added to the
    # number of tokens.
    logprobs = float64([[-1.6, -0.8, -1.1, -1.4], [-0.7, -1.4, -0.9, -1.2]]).requires_grad_()
    old = float64([[-1.0, -1.1, -0.8, -1.3], [-0.9, -1.0, -1.2, -0.8]])
    advantages = float64([[1.2, -0.7, 0.4, 2.0], [-1.1, 0.6, 1.5, -0.3]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    loss, metrics = policy_loss(logprobs, old, advantages, mask, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected = [
        [-0.13171479239913675, 0.18898023268267997, -0.05926545753600652, 0.0],
        [0.26870860625782017, -0.08043840536339991, 0.0, 0.0],
    ]
    assert_within(loss.detach(), 0.18627018364195694, 1e-8)
    assert_within(gradient, expected, 1e-8)
    assert_within(metrics["ratio_mean"], 0.9062422918970267, 1e-8)
    assert_within(metrics["ratio_max"], 1.3498588075760032, 1e-12)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, -0.17117467), (-1.0, 0.19333333)])
def test_d21_the_clipped_loss_equals_that_of_rlax(sign: float, expected: float) -> None:
    # rlax policy_gradients_test, ClippedSurrogatePGLossTest.
    actions = torch.tensor([[0], [1], [2]])
    new, old = (
        torch.log_softmax(float64([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], last]), -1).gather(1, actions).T
        for last in ([-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0])
    )
    loss, _ = policy_loss(new, old, sign * float64([[0.3, 0.2, 0.1]]), torch.ones(1, 3), clip_range=0.2)
    assert_within(loss, expected, 1e-5)


def test_d21_the_log_ratio_is_clamped_at_20_so_that_the_ratio_stays_finite() -> None:
    for log_ratio, bound in ((500.0, 20.0), (-500.0, -20.0), (19.5, 19.5), (-19.5, -19.5)):
        _, metrics, _ = one_token(log_ratio, 1.0)
        assert float(metrics["ratio_max"]) == pytest.approx(math.exp(bound))
    loss, _, gradient = one_token(500.0, -1.0)
    assert float(loss) == pytest.approx(math.exp(20.0))
    assert gradient == 0.0


def test_d21_the_weights_multiply_the_token_losses_after_the_clip() -> None:
    losses = slow_losses()
    weighted = [w * x for row, ws in zip(losses, WEIGHTS.tolist(), strict=True) for x, w in zip(row, ws, strict=False)]
    assert float(loss_and_metrics(weights=WEIGHTS)[0]) == pytest.approx(sum(weighted) / sum(LENGTHS), rel=1e-12)
    assert loss_and_metrics(weights=torch.ones_like(MASK))[0].equal(loss_and_metrics()[0])


def test_d21_no_gradient_reaches_anything_but_the_new_logprobs() -> None:
    inputs = [x.clone().requires_grad_() for x in (logprob_rows(0), logprob_rows(1), ADVANTAGES, WEIGHTS)]
    loss, metrics = policy_loss(*[*inputs[:3], MASK], clip_range=0.2, dual_clip=3.0, weights=inputs[3])
    gradient, *others = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert gradient.count_nonzero() > 0
    assert others == [None, None, None]
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("position", range(4))
def test_d21_garbage_outside_the_mask_changes_neither_loss_nor_gradient_nor_metrics(
    position: int, garbage: float
) -> None:
    clean = [logprob_rows(0).requires_grad_(), logprob_rows(1), ADVANTAGES, WEIGHTS]
    dirty = [x.detach().clone() for x in clean]
    dirty[position] = torch.where(MASK, dirty[position], garbage)
    dirty[0].requires_grad_()
    loss, metrics = policy_loss(*[*clean[:3], MASK], clip_range=0.2, dual_clip=3.0, weights=clean[3])
    got, got_metrics = policy_loss(*[*dirty[:3], MASK], clip_range=0.2, dual_clip=3.0, weights=dirty[3])
    (expected,), (gradient,) = torch.autograd.grad(loss, clean[0]), torch.autograd.grad(got, dirty[0])
    assert got.equal(loss)
    assert got_metrics == metrics
    assert gradient.equal(expected)
    assert gradient[~MASK].eq(0.0).all()


def test_d21_neither_order_nor_padding_changes_loss_or_gradient() -> None:
    def gradient_of(order: list[int], padding: int) -> tuple[Tensor, Tensor]:
        new, old, advantages = (
            torch.nn.functional.pad(x[order].float(), (0, padding), value=7.0)
            for x in (logprob_rows(0), logprob_rows(1), ADVANTAGES)
        )
        mask = torch.nn.functional.pad(MASK[order], (0, padding))
        loss, _ = policy_loss(new.requires_grad_(), old, advantages, mask, clip_range=0.2)
        return loss.detach(), torch.autograd.grad(loss, new)[0][:, :WIDTH]

    order = [4, 2, 5, 0, 3, 1]
    loss, gradient = gradient_of(list(range(6)), 0)
    got, got_gradient = gradient_of(order, 5)
    torch.testing.assert_close(got, loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(got_gradient, gradient[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dual", [1.5, 3.0])
def test_d22_the_dual_clip_matches_a_slow_loop(dual: float, dtype: torch.dtype) -> None:
    loss, metrics = loss_and_metrics(dtype, dual_clip=dual)
    expected = sum(map(sum, slow_losses(dual=dual))) / sum(LENGTHS)
    assert float(loss) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert expected != pytest.approx(sum(map(sum, slow_losses())) / sum(LENGTHS))
    log_ratios, advantages = kept(logprob_rows(0) - logprob_rows(1)), kept(ADVANTAGES)
    bounded = sum(math.exp(d) > dual and a < 0.0 for d, a in zip(log_ratios, advantages, strict=True))
    assert float(metrics["dual_clip_fraction"]) == pytest.approx(bounded / sum(LENGTHS))


def test_d22_the_dual_clip_bounds_negative_advantages_only() -> None:
    # verl test_standard_ppo_on_cpu: ratio 10, advantage -1, c = 3.
    assert one_token(math.log(10.0), -1.0)[0].item() == pytest.approx(10.0)
    loss, metrics, gradient = one_token(math.log(10.0), -1.0, dual_clip=3.0)
    assert (loss.item(), gradient, float(metrics["dual_clip_fraction"])) == (3.0, 0.0, 1.0)
    for log_ratio, advantage in ((math.log(10.0), 1.0), (math.log(2.9), -1.0), (math.log(0.1), -1.0)):
        with_bound, without = one_token(log_ratio, advantage, dual_clip=3.0), one_token(log_ratio, advantage)
        assert with_bound[0].equal(without[0])
        assert with_bound[2] == without[2]
        assert with_bound[1]["dual_clip_fraction"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_d24_identical_logprobs_give_a_ratio_of_1_and_nothing_to_report(dtype: torch.dtype) -> None:
    logp = logprob_rows(0).to(dtype)
    loss, metrics = policy_loss(logp, logp, ADVANTAGES.to(dtype), MASK, clip_range=0.2, dual_clip=3.0)
    assert {name: float(value) for name, value in metrics.items()} == {
        "approx_kl": 0.0,
        "ratio_mean": 1.0,
        "ratio_max": 1.0,
        "ratio_deviation": 0.0,
        "clip_fraction": 0.0,
        "dual_clip_fraction": 0.0,
    }
    assert float(loss) == pytest.approx(-sum(kept(ADVANTAGES.to(dtype))) / sum(LENGTHS), rel=1e-5)


def test_d24_the_gradient_of_the_first_minibatch_is_the_policy_gradient() -> None:
    logp = logprob_rows(0).requires_grad_()
    loss, _ = policy_loss(logp, logp.detach(), ADVANTAGES, MASK, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, torch.where(MASK, -ADVANTAGES, 0.0) / sum(LENGTHS))


def test_d25_the_metrics_are_taken_over_the_mask_only() -> None:
    _, metrics = loss_and_metrics()
    log_ratios, advantages = kept(logprob_rows(0) - logprob_rows(1)), kept(ADVANTAGES)
    ratios, count = [math.exp(d) for d in log_ratios], sum(LENGTHS)
    clipped = sum((r > 1.2 and a > 0.0) or (r < 0.8 and a < 0.0) for r, a in zip(ratios, advantages, strict=True))
    assert 0 < clipped < count
    assert float(metrics["approx_kl"]) == pytest.approx(0.5 * sum(d * d for d in log_ratios) / count)
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped / count)
    assert float(metrics["ratio_mean"]) == pytest.approx(sum(ratios) / count)
    assert float(metrics["ratio_max"]) == pytest.approx(max(ratios))
    assert float(metrics["ratio_deviation"]) == pytest.approx(max(abs(r - 1.0) for r in ratios))


def test_d25_the_largest_ratio_of_a_policy_that_only_fell_is_below_1() -> None:
    _, metrics = policy_loss(logprob_rows(0) - 1.0, logprob_rows(0), ADVANTAGES, MASK, clip_range=0.2)
    assert float(metrics["ratio_max"]) == pytest.approx(math.exp(-1.0))
    assert float(metrics["ratio_deviation"]) == pytest.approx(1.0 - math.exp(-1.0))


def test_d25_an_empty_micro_batch_reports_the_identity() -> None:
    nothing = torch.zeros_like(MASK)
    loss, metrics = policy_loss(logprob_rows(0), logprob_rows(1), ADVANTAGES, nothing, clip_range=0.2, denominator=27.0)
    assert loss == 0.0
    names = ("approx_kl", "clip_fraction", "ratio_mean", "ratio_max", "ratio_deviation")
    assert [float(metrics[name]) for name in names] == [0.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d26_entropy_matches_a_slow_loop(dtype: torch.dtype) -> None:
    logits = normal(0, 5, 7, dtype=dtype) * 3.0
    expected = []
    for row in logits.tolist():
        total = math.fsum(math.exp(x) for x in row)
        expected.append(-sum(math.exp(x) / total * (x - math.log(total)) for x in row))
    got = entropy(logits)
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_d26_entropy_is_0_where_one_token_is_certain_and_the_log_of_the_size_where_all_are_equal() -> None:
    assert float(entropy(torch.zeros(2, 3, 5, dtype=torch.float64))[1, 2]) == pytest.approx(math.log(5))
    assert float(entropy(float64([1000.0, 0.0, 0.0]))) == 0.0


def test_d26_an_impossible_token_contributes_nothing_to_the_entropy_or_its_gradient() -> None:
    logits = float64([0.0, math.log(3.0), -math.inf]).requires_grad_()
    value = entropy(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    short = float64([0.0, math.log(3.0)]).requires_grad_()
    (expected,) = torch.autograd.grad(entropy(short), short)
    assert float(value.detach()) == pytest.approx(math.log(4.0) - 0.75 * math.log(3.0))
    assert gradient.tolist() == pytest.approx([*expected.tolist(), 0.0])


def test_d26_half_precision_logits_are_computed_in_float32() -> None:
    assert entropy(torch.zeros(50_000, dtype=torch.bfloat16)).item() == pytest.approx(math.log(50_000), rel=1e-6)
    half = torch.ones(2, 2, dtype=torch.float16)
    assert policy_loss(half, half, half, half.long(), clip_range=0.2)[0].dtype == torch.float32
