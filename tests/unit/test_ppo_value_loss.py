from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import float64
from tests.unit.random_rows import LENGTHS, MASK, kept, normal
from tether_services.ppo.losses import value_loss

VALUES, OLD, RETURNS = normal(0), normal(1), normal(2)


def one_value(value: float, old: float, target: float, *, clip_range: float = 0.2) -> tuple[float, float, float]:
    """The loss of a single value, its gradient and its clip fraction."""
    values = float64([[value]]).requires_grad_()
    loss, metrics = value_loss(values, float64([[old]]), float64([[target]]), torch.ones(1, 1), clip_range=clip_range)
    (gradient,) = torch.autograd.grad(loss, values)
    return float(loss.detach()), float(gradient), float(metrics["clip_fraction"])


def mean_over(losses: list[float]) -> float:
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize(
    ("value", "target", "expected"), [(1.0, 0.5, 0.125), (0.5, 1.0, 0.32), (0.1, 0.1, 0.0), (-0.5, -1.0, 0.32)]
)
def test_d23_the_value_loss_matches_hand_calculation(value: float, target: float, expected: float) -> None:
    assert one_value(value, 0.0, target)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "target", "loss", "fraction"),
    [([1.5, 0.0], [2.0, 1.0], 0.41, 0.5), ([1.5, 0.5], [0.0, 0.0], 0.7225, 0.5)],
)
def test_d23_the_mean_over_two_values_matches_hand_calculation(
    values: list[float], target: list[float], loss: float, fraction: float
) -> None:
    # Clipped to 0.8 and 1.2: (0.64 + 1) / 4 and (2.25 + 0.64) / 4.
    got, metrics = value_loss(
        float64([values]), float64([[1.0, 1.0]]), float64([target]), torch.ones(1, 2), clip_range=0.2
    )
    assert float(got) == pytest.approx(loss)
    assert float(metrics["clip_fraction"]) == fraction


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clip_range", [0.1, 0.2, 1.0])
def test_d23_the_value_loss_matches_a_slow_loop(clip_range: float, dtype: torch.dtype) -> None:
    losses, clipped = [], 0
    for value, old, target in zip(kept(VALUES), kept(OLD), kept(RETURNS), strict=True):
        bounded = min(max(value, old - clip_range), old + clip_range)
        losses.append(max((value - target) ** 2, (bounded - target) ** 2) / 2)
        clipped += (bounded - target) ** 2 > (value - target) ** 2
    got, metrics = value_loss(VALUES.to(dtype), OLD.to(dtype), RETURNS.to(dtype), MASK, clip_range=clip_range)
    assert got.dtype == dtype
    assert float(got) == pytest.approx(mean_over(losses), rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert 0 < clipped < len(losses)
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped / len(losses))


def test_d23_the_clipped_loss_is_never_below_the_unclipped_one() -> None:
    strictly = 0
    for value, old, target in zip(kept(VALUES), kept(OLD), kept(RETURNS), strict=True):
        unclipped = 0.5 * (value - target) ** 2
        got, _, fraction = one_value(value, old, target)
        assert got >= unclipped - 1e-12
        assert fraction == float(got > unclipped + 1e-12)
        strictly += fraction == 1.0
    assert strictly > 3


def test_d23_a_wide_clip_range_is_half_the_mean_squared_error() -> None:
    got, metrics = value_loss(VALUES, OLD, RETURNS, MASK, clip_range=1e9)
    assert float(got) == pytest.approx(0.5 * mean_over([d * d for d in kept(VALUES - RETURNS)]))
    assert metrics["clip_fraction"] == 0.0


def test_d23_a_value_inside_the_range_does_not_count_as_clipped_for_a_rounding_error() -> None:
    # 0.1 + (0.7 - 0.1) is not 0.7.
    returns = RETURNS.float() * 1e3
    _, metrics = value_loss(returns + 0.1, returns + 0.7, RETURNS.float(), MASK, clip_range=1.0)
    assert metrics["clip_fraction"] == 0.0


def test_d23_the_loss_is_0_where_values_equal_returns_and_were_near_before() -> None:
    assert value_loss(RETURNS, RETURNS + 0.1, RETURNS, MASK, clip_range=0.2)[0] == 0.0


@pytest.mark.parametrize(
    ("value", "old", "target", "gradient"),
    [(0.1, 0.0, 1.0, -0.9), (1.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.0), (-0.5, 0.0, 1.0, -1.5)],
)
def test_d23_the_gradient_stops_only_where_the_value_has_moved_far_towards_its_target(
    value: float, old: float, target: float, gradient: float
) -> None:
    assert one_value(value, old, target)[1] == pytest.approx(gradient, abs=1e-12)


def test_d23_no_gradient_reaches_old_values_or_returns() -> None:
    inputs = [x.clone().requires_grad_() for x in (VALUES, OLD, RETURNS)]
    loss, metrics = value_loss(inputs[0], inputs[1], inputs[2], MASK, clip_range=0.2)
    gradient, *others = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert gradient.count_nonzero() > 0
    assert others == [None, None]
    assert not metrics["clip_fraction"].requires_grad


@pytest.mark.parametrize("garbage", [999.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(3))
def test_d23_garbage_outside_the_mask_changes_neither_loss_nor_gradient(position: int, garbage: float) -> None:
    def run(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        values = rows[0].clone().requires_grad_()
        loss, metrics = value_loss(values, rows[1], rows[2], MASK, clip_range=0.2)
        return loss.detach(), torch.autograd.grad(loss, values)[0], metrics["clip_fraction"]

    clean = [VALUES, OLD, RETURNS]
    dirty = [torch.where(MASK, x, garbage) if i == position else x for i, x in enumerate(clean)]
    for got, expected in zip(run(dirty), run(clean), strict=True):
        assert got.equal(expected)
    assert run(dirty)[1][~MASK].eq(0.0).all()


@pytest.mark.parametrize("split", [[1] * 6, [2, 4], [5, 1]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_d23_loss_and_gradient_do_not_depend_on_the_micro_batch_split(
    split: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    values = VALUES.to(dtype).requires_grad_()
    old, returns = OLD.to(dtype), RETURNS.to(dtype)
    whole, _ = value_loss(values, old, returns, MASK, clip_range=0.2)
    (expected,) = torch.autograd.grad(whole, values)
    total = torch.zeros((), dtype=dtype)
    for v, o, r, m in zip(*(torch.split(x, split) for x in (values, old, returns, MASK)), strict=True):
        total = total + value_loss(v, o, r, m, clip_range=0.2, denominator=sum(LENGTHS))[0]
    (gradient,) = torch.autograd.grad(total, values)
    torch.testing.assert_close(total.detach(), whole.detach(), rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance)


def test_d23_an_empty_micro_batch_adds_nothing_and_an_empty_batch_is_refused() -> None:
    nothing = torch.zeros_like(MASK)
    loss, metrics = value_loss(VALUES, OLD, RETURNS, nothing, clip_range=0.2, denominator=27.0)
    assert loss == 0.0
    assert metrics["clip_fraction"] == 0.0
    with pytest.raises(ValueError, match="is the mask empty"):
        value_loss(VALUES, OLD, RETURNS, nothing, clip_range=0.2)


def test_half_precision_values_are_computed_in_float32_and_integer_masks_are_masks() -> None:
    half = [x.bfloat16() for x in (VALUES, OLD, RETURNS)]
    got, _ = value_loss(*[*half, MASK.long()], clip_range=0.2)
    expected, _ = value_loss(*[*(x.float() for x in half), MASK], clip_range=0.2)
    assert got.dtype == torch.float32
    assert got.equal(expected)
