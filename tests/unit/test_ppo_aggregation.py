from __future__ import annotations

import math
import statistics
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64
from tests.unit.random_rows import LENGTHS, MASK, kept, logprob_rows, normal
from tether_services.ppo.losses import Aggregation, aggregate, policy_loss

KINDS: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "token_sum")
DENOMINATORS: dict[Aggregation, float] = {"token_mean": sum(LENGTHS), "sequence_mean": len(LENGTHS), "token_sum": 480.0}


def gradient_over(split: list[int], aggregation: Aggregation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss and the accumulated gradient of micro-batches of these sizes, under one denominator."""
    logp = logprob_rows(0).to(dtype).requires_grad_()
    total = torch.zeros((), dtype=dtype)
    old, advantages = logprob_rows(1).to(dtype), normal(2, dtype=dtype)
    for new, *rest in zip(*(torch.split(x, split) for x in (logp, old, advantages, MASK)), strict=True):
        loss, _ = policy_loss(
            new, *rest, clip_range=0.2, aggregation=aggregation, denominator=DENOMINATORS[aggregation]
        )
        total = total + loss.detach()
        torch.autograd.backward(loss, retain_graph=True)
    assert logp.grad is not None
    return total, logp.grad


def test_d21_the_token_mean_is_the_mean_over_all_tokens() -> None:
    losses = normal(0)
    assert float(aggregate(losses, MASK, aggregation="token_mean")) == pytest.approx(statistics.fmean(kept(losses)))


def test_d21_the_sequence_mean_is_the_mean_of_the_means_of_rows() -> None:
    losses = normal(0)
    means = [statistics.fmean(row[:length]) for row, length in zip(losses.tolist(), LENGTHS, strict=True)]
    assert float(aggregate(losses, MASK, aggregation="sequence_mean")) == pytest.approx(statistics.fmean(means))


def test_d21_the_token_sum_is_the_sum_over_all_tokens() -> None:
    losses = normal(0)
    assert float(aggregate(losses, MASK, aggregation="token_sum")) == pytest.approx(math.fsum(kept(losses)))


def test_d21_the_aggregations_match_the_numbers_of_other_public_tests() -> None:
    # OpenRLHF tests/test_loss_aggregation.py (token and sequence mean), verl test_loss_aggregation_on_cpu.py
    # (sequence sums over rows times a constant), ROLL tests/utils/test_functionals.py (sequence mean).
    token = aggregate(
        float64([[1, 2, 0], [3, 4, 5], [7, 0, 0]]),
        torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]),
        aggregation="token_mean",
    )
    assert_within(token, 22 / 6, 1e-12)
    sequence = aggregate(
        float64([[1, 3, 9], [2, 4, 0], [8, 0, 0]]),
        torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0]]),
        aggregation="sequence_mean",
    )
    assert_within(sequence, 13 / 3, 1e-12)
    rows, mask = float64([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]), [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert_within(aggregate(rows, torch.tensor(mask), aggregation="token_sum", denominator=12.0), 2.5, 1e-12)
    uneven = aggregate(
        float64([[2, 2, 0, 0], [4, 4, 4, 4]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), aggregation="sequence_mean"
    )
    assert_within(uneven, 3.0, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_d21_the_denominator_is_what_the_sum_is_divided_by(kind: Aggregation) -> None:
    own = aggregate(normal(0), MASK, aggregation=kind)
    divided = aggregate(normal(0), MASK, aggregation=kind, denominator=100.0)
    factor = {"token_mean": sum(LENGTHS), "sequence_mean": len(LENGTHS), "token_sum": 1.0}[kind]
    assert float(divided) == pytest.approx(float(own) * factor / 100.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [[1] * 6, [2, 4], [5, 1], [3, 1, 2]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_d21_loss_and_gradient_do_not_depend_on_the_micro_batch_split(
    split: list[int], kind: Aggregation, dtype: torch.dtype, tolerance: float
) -> None:
    loss, gradient = gradient_over([6], kind, dtype)
    got, got_gradient = gradient_over(split, kind, dtype)
    torch.testing.assert_close(got, loss, rtol=0, atol=tolerance)
    torch.testing.assert_close(got_gradient, gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean"])
def test_d21_the_denominator_of_the_whole_batch_is_the_default_of_an_undivided_one(kind: Aggregation) -> None:
    whole = aggregate(normal(0), MASK, aggregation=kind)
    assert whole.equal(aggregate(normal(0), MASK, aggregation=kind, denominator=DENOMINATORS[kind]))


def test_d21_a_mean_per_micro_batch_would_weigh_rows_unequally() -> None:
    parts = [
        float(aggregate(x, m, aggregation="token_mean"))
        for x, m in zip(torch.split(normal(0), 2), torch.split(MASK, 2), strict=True)
    ]
    assert statistics.fmean(parts) != pytest.approx(float(aggregate(normal(0), MASK, aggregation="token_mean")))


@pytest.mark.parametrize("kind", KINDS)
def test_d21_fully_masked_rows_contribute_nothing(kind: Aggregation) -> None:
    mask = MASK.clone()
    mask[2] = False
    rest = [0, 1, 3, 4, 5]
    got = aggregate(normal(0), mask, aggregation=kind)
    torch.testing.assert_close(got, aggregate(normal(0)[rest], MASK[rest], aggregation=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [999.0, math.nan, math.inf])
def test_d21_garbage_outside_the_mask_changes_neither_value_nor_gradient(kind: Aggregation, garbage: float) -> None:
    dirty = torch.where(MASK, normal(0), garbage).requires_grad_()
    loss = aggregate(dirty, MASK, aggregation=kind)
    (gradient,) = torch.autograd.grad(loss, dirty)
    assert loss.detach().equal(aggregate(normal(0), MASK, aggregation=kind))
    assert gradient[~MASK].eq(0.0).all()
    assert gradient[MASK].gt(0.0).all()


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean"])
def test_d21_without_a_token_and_a_denominator_the_mean_is_refused(kind: Aggregation) -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="is the mask empty"):
        aggregate(torch.ones(2, 3), nothing, aggregation=kind)
    assert aggregate(torch.ones(2, 3), nothing, aggregation=kind, denominator=5.0) == 0.0


@pytest.mark.parametrize("denominator", [0.0, -1.0, math.nan])
def test_d21_a_denominator_that_is_not_above_0_is_refused(denominator: float) -> None:
    with pytest.raises(ValueError, match="denominator must be above 0"):
        aggregate(normal(0), MASK, aggregation="token_mean", denominator=denominator)


def test_d21_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="'sum'"):
        aggregate(normal(0), MASK, aggregation=cast(Aggregation, "sum"))


@pytest.mark.parametrize("kind", KINDS)
def test_d21_one_token_of_one_row_is_itself(kind: Aggregation) -> None:
    assert aggregate(float64([[3.5]]), torch.ones(1, 1), aggregation=kind).item() == 3.5


def test_d21_half_precision_losses_are_summed_in_float32() -> None:
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    got = aggregate(ones, ones.long(), aggregation="token_mean")
    assert (got.dtype, got.item()) == (torch.float32, 1.0)
    assert aggregate(ones, ones.long(), aggregation="token_sum").item() == 4096.0
