from __future__ import annotations

import math

import pytest
import torch

from tests.unit.golden_vectors import assert_within, float64, load_vector
from tether_services.ppo.statistics import (
    entropy,
    explained_variance,
    masked_mean,
    masked_var,
    mismatch,
    response_mask,
    whiten,
)

X = float64([1.0, 2.0, 3.0, 4.0])
MIDDLE = torch.tensor([False, True, True, False])


def ragged(rows: int = 5, width: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), response_mask(lengths, width=width)


def test_d6_response_mask_is_true_on_the_first_length_columns() -> None:
    mask = response_mask(torch.tensor([1, 3, 2]), width=3)
    assert mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]


@pytest.mark.parametrize("lengths", [[0, 2], [2, 4], [-1, 1]])
def test_d6_a_length_outside_the_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"every length must be in \[1, 3\]"):
        response_mask(torch.tensor(lengths), width=3)


def test_masked_mean_torchtune() -> None:
    vector = load_vector("masked_mean_torchtune")
    x, mask = float64(vector.inputs["x"]), torch.tensor(vector.inputs["mask"]).bool()
    rows = torch.stack([masked_mean(row, keep) for row, keep in zip(x, mask, strict=True)])
    assert_within(rows, vector.expected, vector.tol)


def test_masked_whiten_trl() -> None:
    vector = load_vector("masked_whiten_trl")
    x, mask = float64(vector.inputs["x"]), torch.tensor(vector.inputs["mask"]).bool()
    assert_within(masked_mean(x, mask), vector.expected["mean"], vector.tol)
    assert_within(masked_var(x, mask, unbiased=True), vector.expected["var"], vector.tol)
    assert_within(whiten(x, mask, unbiased=True)[mask], vector.expected["whitened_at_mask"], vector.tol)


def test_d19_the_biased_variance_is_the_default() -> None:
    assert_within(masked_var(X, MIDDLE), 0.25, 1e-12)
    assert_within(whiten(X, MIDDLE), [0.0, -1.0, 1.0, 0.0], 1e-7)


def test_d19_whitened_values_have_mean_0_and_variance_1_over_the_mask_and_are_0_outside() -> None:
    x, mask = ragged()
    whitened = whiten(x, mask)
    kept = [float(v) for v, keep in zip(whitened.flatten(), mask.flatten(), strict=True) if keep]
    mean = sum(kept) / len(kept)
    assert mean == pytest.approx(0.0, abs=1e-12)
    assert sum((v - mean) ** 2 for v in kept) / len(kept) == pytest.approx(1.0, abs=1e-7)
    assert whitened[~mask].eq(0.0).all()


def test_d19_whitening_uses_the_whole_batch_and_not_its_parts() -> None:
    x, mask = ragged()
    parts = torch.cat([whiten(x[:2], mask[:2]), whiten(x[2:], mask[2:])])
    assert not torch.allclose(parts, whiten(x, mask), atol=1e-3)


def test_d19_garbage_outside_the_mask_does_not_leak_into_whitening() -> None:
    x, mask = ragged()
    torch.testing.assert_close(whiten(torch.where(mask, x, 999.0), mask), whiten(x, mask))


def test_d19_one_kept_entry_whitens_to_0_and_not_to_nan() -> None:
    mask = torch.tensor([False, False, True, False])
    assert whiten(X, mask).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_d19_equal_values_whiten_to_0() -> None:
    assert whiten(torch.full((2, 3), 7.0)).tolist() == [[0.0] * 3] * 2


def test_the_unbiased_variance_of_one_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="unbiased"):
        masked_var(X, torch.tensor([True, False, False, False]), unbiased=True)


def test_a_mean_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps no entry"):
        masked_mean(X, torch.zeros(4, dtype=torch.bool))


def test_half_precision_is_reduced_in_float32() -> None:
    x = torch.full((4096,), 1.001, dtype=torch.bfloat16)
    assert masked_mean(x).dtype == torch.float32
    assert whiten(x).dtype == torch.float32
    # Summed in bfloat16 the mean of 4096 equal numbers would be far off.
    assert float(masked_mean(x)) == float(x[0])


def test_entropy_loss_rlax() -> None:
    vector = load_vector("entropy_loss_rlax")
    per_step = entropy(float64(vector.inputs["logits"]))
    losses = [float((-per_step * float64(row)).mean()) for row in vector.inputs["weights"]]
    assert_within(float64(losses), vector.expected, vector.tol)


def test_d26_entropy_of_a_uniform_distribution_is_the_log_of_its_size() -> None:
    assert float(entropy(torch.zeros(5, dtype=torch.float64))) == pytest.approx(math.log(5))


def test_d26_an_impossible_token_contributes_nothing_to_the_entropy() -> None:
    assert float(entropy(float64([0.0, 0.0, -math.inf]))) == pytest.approx(math.log(2))


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_the_mean() -> None:
    returns, mask = ragged()
    assert explained_variance(returns, returns, mask) == 1.0
    mean = torch.full_like(returns, float(masked_mean(returns, mask)))
    assert explained_variance(mean, returns, mask) == pytest.approx(0.0, abs=1e-12)


def test_explained_variance_matches_its_formula_and_is_negative_for_a_bad_critic() -> None:
    returns, mask = ragged()
    kept = returns[mask]
    got = explained_variance(-returns, returns, mask)
    assert got == pytest.approx(1.0 - float((2 * kept).var() / kept.var()))
    assert got == pytest.approx(-3.0)


def test_explained_variance_of_equal_returns_is_undefined() -> None:
    assert math.isnan(explained_variance(X, torch.ones(4)))


def test_mismatch_is_0_for_equal_logprobs() -> None:
    x, mask = ragged()
    assert mismatch(x, x, mask) == {"mean_abs_dlogp": 0.0, "mult_prob_error": 1.0, "gen_kl": 0.0}


def test_mismatch_matches_a_slow_loop_and_ignores_padding() -> None:
    old, mask = ragged(seed=1)
    mu, _ = ragged(seed=2)
    deltas = [float(o - m) for o, m, keep in zip(old.flatten(), mu.flatten(), mask.flatten(), strict=True) if keep]
    got = mismatch(torch.where(mask, old, math.nan), mu, mask)
    count = len(deltas)
    assert got["mean_abs_dlogp"] == pytest.approx(sum(abs(d) for d in deltas) / count)
    assert got["mult_prob_error"] == pytest.approx(sum(math.exp(abs(d)) for d in deltas) / count)
    assert got["gen_kl"] == pytest.approx(sum(math.exp(d) - 1 - d for d in deltas) / count)
