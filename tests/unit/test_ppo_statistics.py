from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64
from tests.unit.random_rows import LENGTHS, MASK, WIDTH, kept, normal
from tether_services.ppo.statistics import (
    explained_variance,
    last_kept,
    masked_mean,
    masked_var,
    masked_whiten,
    response_mask,
)

X = float64([1.0, 2.0, 3.0, 4.0])
MIDDLE = torch.tensor([False, True, True, False])
REDUCTIONS: list[Callable[[Tensor, Tensor], Tensor]] = [masked_mean, masked_var, masked_whiten]


def test_d6_response_mask_is_true_on_the_first_length_columns() -> None:
    mask = response_mask(torch.tensor([1, 3, 2]), width=3)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]


@pytest.mark.parametrize("lengths", [[0, 2], [2, 4], [-1, 1]])
def test_d6_a_length_outside_the_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"every length must be in \[1, 3\]"):
        response_mask(torch.tensor(lengths), width=3)


def test_d6_the_last_kept_column_is_that_of_the_last_response_token() -> None:
    assert last_kept(MASK).tolist() == [length - 1 for length in LENGTHS]
    assert last_kept(torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])).tolist() == [3, 0]


def test_d6_a_row_that_keeps_nothing_has_no_last_column() -> None:
    with pytest.raises(ValueError, match="at least one response token"):
        last_kept(torch.tensor([[True, True], [False, False]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_mean_matches_a_slow_loop_in_all_and_along_a_dimension(dtype: torch.dtype) -> None:
    x = normal(0, dtype=dtype)
    got = masked_mean(x, MASK)
    assert (got.dtype, got.shape) == (dtype, ())
    assert float(got) == pytest.approx(statistics.fmean(kept(x)), abs=1e-6)
    rows = [statistics.fmean(row[:length]) for row, length in zip(x.tolist(), LENGTHS, strict=True)]
    assert masked_mean(x, MASK, dim=1).tolist() == pytest.approx(rows, abs=1e-6)
    columns = [
        statistics.fmean(row[t] for row, length in zip(x.tolist(), LENGTHS, strict=True) if t < length)
        for t in range(WIDTH)
    ]
    assert masked_mean(x, MASK, dim=0).tolist() == pytest.approx(columns, abs=1e-6)


def test_masked_mean_without_a_mask_is_the_mean_of_all() -> None:
    assert masked_mean(X).item() == 2.5
    assert masked_mean(X.reshape(2, 2), dim=0).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_a_mean_over_nothing_is_refused(dim: int | None) -> None:
    mask = torch.zeros(2, 2, dtype=torch.bool)
    mask[0, 0] = dim is not None
    with pytest.raises(ValueError, match="keeps no entry"):
        masked_mean(X.reshape(2, 2), mask, dim=dim)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d19_both_variances_match_the_library_of_statistics(dtype: torch.dtype) -> None:
    x = normal(0, dtype=dtype)
    assert float(masked_var(x, MASK)) == pytest.approx(statistics.pvariance(kept(x)), rel=1e-6)
    assert float(masked_var(x, MASK, unbiased=True)) == pytest.approx(statistics.variance(kept(x)), rel=1e-6)
    assert float(masked_var(x)) == pytest.approx(statistics.pvariance(x.flatten().tolist()), rel=1e-6)
    assert masked_var(x, MASK).dtype == dtype


def test_d19_whitening_is_biased_by_default_and_matches_the_hand_calculation() -> None:
    assert_within(masked_var(X, MIDDLE), 0.25, 1e-12)
    assert_within(masked_whiten(X, MIDDLE), [0.0, -1.0, 1.0, 0.0], 1e-7)


def test_d19_unbiased_whitening_matches_the_hand_calculation() -> None:
    assert_within(masked_var(X, MIDDLE, unbiased=True), 0.5, 1e-12)
    assert_within(masked_whiten(X, MIDDLE, unbiased=True), [0.0, -0.70710677, 0.70710677, 0.0], 1e-7)


def test_d19_the_variance_has_a_floor_of_1e_8_under_the_root() -> None:
    small = float64([0.0, 2e-4])
    assert_within(masked_whiten(small), [-(0.5**0.5), 0.5**0.5], 1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_d19_whitened_values_have_mean_0_and_variance_1_over_the_mask_and_are_0_outside(unbiased: bool) -> None:
    whitened = masked_whiten(normal(0) * 3.0 + 5.0, MASK, unbiased=unbiased)
    variance = statistics.variance if unbiased else statistics.pvariance
    assert statistics.fmean(kept(whitened)) == pytest.approx(0.0, abs=1e-12)
    assert variance(kept(whitened)) == pytest.approx(1.0, abs=1e-7)
    assert whitened[~MASK].eq(0.0).all()


def test_d19_whitening_over_shards_with_global_statistics_equals_the_whole_and_local_statistics_do_not() -> None:
    x = normal(0)
    mean, scale = masked_mean(x, MASK), (masked_var(x, MASK) + 1e-8).rsqrt()
    pairs = list(zip(torch.split(x, 2), torch.split(MASK, 2), strict=True))
    shards = [torch.where(m, (part - mean) * scale, 0.0) for part, m in pairs]
    torch.testing.assert_close(torch.cat(shards), masked_whiten(x, MASK))
    local = torch.cat([masked_whiten(part, m) for part, m in pairs])
    assert not torch.allclose(local, masked_whiten(x, MASK), atol=1e-3)


def test_d19_whitening_does_not_depend_on_the_order_of_rows_or_on_padding() -> None:
    x, order = normal(0), torch.tensor([3, 0, 5, 1, 4, 2])
    whole = masked_whiten(x, MASK)
    torch.testing.assert_close(masked_whiten(x[order], MASK[order]), whole[order])
    wide, wide_mask = (torch.nn.functional.pad(t, (0, 3)) for t in (x, MASK))
    torch.testing.assert_close(masked_whiten(wide, wide_mask)[:, :WIDTH], whole)


def test_d15_rewards_are_scaled_and_keep_their_mean() -> None:
    x = normal(0) * 3.0 + 5.0
    whitened = masked_whiten(x, MASK, shift_mean=False)
    assert statistics.fmean(kept(whitened)) == pytest.approx(statistics.fmean(kept(x)), abs=1e-12)
    assert statistics.pvariance(kept(whitened)) == pytest.approx(1.0, abs=1e-7)
    assert whitened[~MASK].eq(0.0).all()
    assert_within(masked_whiten(X, MIDDLE, shift_mean=False), [0.0, 1.5, 3.5, 0.0], 1e-7)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("garbage", [999.0, math.nan, math.inf, -math.inf])
def test_d19_garbage_outside_the_mask_has_no_influence(
    reduce: Callable[[Tensor, Tensor], Tensor], garbage: float
) -> None:
    dirty = torch.where(MASK, normal(0), garbage)
    assert reduce(dirty, MASK).equal(reduce(normal(0), MASK))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_mask_of_zeros_and_ones_is_a_mask(reduce: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    assert reduce(normal(0), MASK.to(dtype)).equal(reduce(normal(0), MASK))


def test_d19_one_kept_entry_whitens_to_0_and_not_to_nan() -> None:
    mask = torch.tensor([False, False, True, False])
    assert masked_whiten(X, mask).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert masked_whiten(X, mask, shift_mean=False).tolist() == [0.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_d19_equal_values_whiten_to_0(shape: tuple[int, int]) -> None:
    assert masked_whiten(torch.full(shape, 7.0)).eq(0.0).all()


def test_d19_the_unbiased_variance_of_one_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="unbiased"):
        masked_var(X, torch.tensor([True, False, False, False]), unbiased=True)
    with pytest.raises(ValueError, match="unbiased"):
        masked_whiten(X, torch.tensor([1, 0, 0, 0]), unbiased=True)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_d19_an_empty_mask_is_refused(reduce: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="keeps no entry"):
        reduce(X, torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_reduced_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((4096,), 1.001, dtype=dtype)
    assert masked_mean(x).dtype == masked_var(x).dtype == masked_whiten(x).dtype == torch.float32
    # Summed in half precision the mean of 4096 equal numbers would be far off.
    assert float(masked_mean(x)) == float(x[0])


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_the_mean() -> None:
    returns = normal(0)
    assert explained_variance(returns, returns, MASK) == 1.0
    mean = torch.full_like(returns, float(masked_mean(returns, MASK)))
    assert explained_variance(mean, returns, MASK) == pytest.approx(0.0, abs=1e-12)


def test_explained_variance_matches_its_formula_and_is_negative_for_a_bad_critic() -> None:
    values, returns = normal(1), normal(0)
    residuals = [r - v for r, v in zip(kept(returns), kept(values), strict=True)]
    expected = 1.0 - statistics.pvariance(residuals) / statistics.pvariance(kept(returns))
    assert explained_variance(values, returns, MASK) == pytest.approx(expected, abs=1e-12)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3.0)


def test_explained_variance_of_equal_returns_is_undefined() -> None:
    assert math.isnan(explained_variance(X, torch.ones(4)))


def test_a_mask_of_one_row_counts_for_every_row() -> None:
    x, mask = float64([[1.0, 2.0, 9.0], [3.0, 6.0, 9.0]]), torch.tensor([True, True, False])
    assert_within(masked_mean(x, mask), 3.0, 1e-12)
    assert_within(masked_var(x, mask, unbiased=True), (4.0 + 1.0 + 0.0 + 9.0) / 3.0, 1e-12)
