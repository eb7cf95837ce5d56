"""The ranking loss against slow loops, closed forms and a public vector (rule D33)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64, load_vector
from tether_services.recipes.pairwise import pair_accuracy, ranked_group_loss


def slow_group_loss(scores: list[float], levels: list[float]) -> float | None:
    """Return the mean of log(1 + exp(-(s_i - s_j))) over explicit pairs; None where there is no pair."""
    losses = [
        math.log1p(math.exp(-(s_i - s_j)))
        for (s_i, l_i), (s_j, l_j) in itertools.permutations(zip(scores, levels, strict=True), 2)
        if l_i > l_j
    ]
    return sum(losses) / len(losses) if losses else None


def test_d33_scores_two_one_zero_in_ranked_order_give_the_published_loss() -> None:
    loss, counted = ranked_group_loss(float64([[2.0, 1.0, 0.0]]), float64([[2, 1, 0]]))
    assert_within(loss, 0.2511505, 1e-7)
    assert counted == 1


def test_d33_each_list_equals_the_public_pairwise_vector() -> None:
    vector = load_vector("pairwise_logistic_tfr")
    for scores, levels, expected in zip(vector.inputs["scores"], vector.inputs["labels"], vector.expected, strict=True):
        loss, _ = ranked_group_loss(float64([scores]), float64([levels]))
        assert_within(loss, expected, vector.tol)


def test_d33_the_batch_is_the_mean_over_lists_of_the_public_vector() -> None:
    vector = load_vector("pairwise_logistic_tfr")
    loss, counted = ranked_group_loss(float64(vector.inputs["scores"]), float64(vector.inputs["labels"]))
    assert_within(loss, sum(vector.expected) / len(vector.expected), vector.tol)
    assert counted == len(vector.expected)


@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_d33_random_groups_with_ties_equal_a_slow_loop_over_pairs(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(7, size, dtype=torch.float64, generator=generator)
    levels = torch.randint(0, 3, (7, size), generator=generator)
    slow = [slow_group_loss(row.tolist(), lev.tolist()) for row, lev in zip(scores, levels, strict=True)]
    present = [value for value in slow if value is not None]
    loss, counted = ranked_group_loss(scores, levels)
    assert counted == len(present)
    assert_within(loss, sum(present) / len(present), 1e-12)


def test_a_pair_is_the_bradley_terry_loss() -> None:
    loss, _ = ranked_group_loss(float64([[0.3, -0.9]]), float64([[1, 0]]))
    assert_within(loss, -math.log(1 / (1 + math.exp(-1.2))), 1e-12)


def test_the_order_of_answers_in_a_group_does_not_matter() -> None:
    scores, levels = float64([[0.1, 2.0, -1.0, 0.7]]), float64([[0, 3, 1, 2]])
    order = torch.tensor([2, 0, 3, 1])
    assert_within(
        ranked_group_loss(scores[:, order], levels[:, order])[0], ranked_group_loss(scores, levels)[0].item(), 1e-12
    )


def test_adding_a_constant_to_all_scores_changes_nothing() -> None:
    scores, levels = float64([[0.1, 2.0, -1.0]]), float64([[0, 2, 1]])
    assert_within(ranked_group_loss(scores + 5.0, levels)[0], ranked_group_loss(scores, levels)[0].item(), 1e-12)


def test_a_group_of_only_ties_is_skipped_and_not_counted() -> None:
    scores, levels = float64([[0.5, 0.1], [1.0, 0.0]]), float64([[1, 1], [1, 0]])
    loss, counted = ranked_group_loss(scores, levels)
    assert counted == 1
    assert_within(loss, ranked_group_loss(scores[1:], levels[1:])[0].item(), 1e-12)


def test_only_ties_give_no_loss_and_no_gradient() -> None:
    scores = float64([[0.5, 0.1, 3.0]]).requires_grad_()
    loss, counted = ranked_group_loss(scores, float64([[1, 1, 1]]))
    torch.autograd.backward(loss)
    assert (counted, loss.item()) == (0, 0.0)
    assert scores.grad is not None
    assert scores.grad.eq(0).all()


def test_the_gradient_raises_the_better_and_lowers_the_worse() -> None:
    scores = float64([[0.0, 0.0]]).requires_grad_()
    torch.autograd.backward(ranked_group_loss(scores, float64([[1, 0]]))[0])
    assert scores.grad is not None
    assert_within(scores.grad, [[-0.5, 0.5]], 1e-12)


def test_large_gaps_in_half_precision_stay_finite() -> None:
    scores = torch.tensor([[-300.0, 300.0]], dtype=torch.float16)
    loss, _ = ranked_group_loss(scores, torch.tensor([[1, 0]]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(600.0)


@pytest.mark.parametrize(
    ("scores", "levels", "expected"),
    [
        ([3.0, 2.0, 1.0], [2, 1, 0], 1.0),
        ([1.0, 2.0, 3.0], [2, 1, 0], 0.0),
        ([1.0, 1.0], [1, 0], 0.5),
        ([2.0, 0.0, 1.0], [1, 1, 0], 0.5),
    ],
)
def test_pair_accuracy_counts_won_pairs_and_half_of_the_equal_ones(
    scores: list[float], levels: list[int], expected: float
) -> None:
    assert pair_accuracy(torch.tensor(scores), torch.tensor(levels)) == pytest.approx(expected)


def test_pair_accuracy_equals_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    scores: Tensor = torch.randn(40, generator=generator)
    levels = torch.randint(0, 2, (40,), generator=generator)
    answers = list(zip(scores.tolist(), levels.tolist(), strict=True))
    won = [float(score > other) for score, level in answers for other, other_level in answers if level > other_level]
    assert pair_accuracy(scores, levels) == pytest.approx(sum(won) / len(won))


def test_pair_accuracy_without_a_pair_is_an_error_not_a_number() -> None:
    with pytest.raises(ValueError, match="two different levels"):
        pair_accuracy(torch.tensor([1.0, 2.0]), torch.tensor([1, 1]))
