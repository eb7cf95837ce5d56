from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_within, float64
from tests.unit.random_rows import MASK, logprob_rows, normal
from tether_services.ppo.kl import AdaptiveKl, FixedKl, KlKind, estimate_kl, kl_loss
from tether_services.ppo.losses import aggregate

P = float64([0.5, 0.3, 0.2])
Q = float64([0.4, 0.4, 0.2])
KINDS: tuple[KlKind, ...] = ("k1", "k2", "k3", "abs")


def expectation(kind: KlKind) -> float:
    """The mean of an estimator over tokens drawn from P."""
    return float((P * estimate_kl(P.log(), Q.log(), kind=kind)).sum())


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def test_d10_the_mean_of_k1_and_k3_under_the_policy_is_the_kl() -> None:
    exact = float((P * (P / Q).log()).sum())
    assert exact == pytest.approx(0.0252672, abs=1e-7)
    assert expectation("k1") == pytest.approx(exact, abs=1e-12)
    assert expectation("k3") == pytest.approx(exact, abs=1e-12)


def test_d10_the_mean_of_k2_is_biased_and_that_of_abs_is_the_mean_difference() -> None:
    assert expectation("k2") == pytest.approx(0.0248624, abs=1e-7)
    assert expectation("abs") == pytest.approx(0.5 * math.log(1.25) + 0.3 * math.log(4 / 3), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d10_every_estimator_matches_a_slow_loop(dtype: torch.dtype) -> None:
    new, ref = normal(0, dtype=dtype), normal(1, dtype=dtype)
    differences = [a - b for a, b in zip(new.flatten().tolist(), ref.flatten().tolist(), strict=True)]
    expected = {
        "k1": differences,
        "k2": [d * d / 2 for d in differences],
        "k3": [math.exp(-d) - 1 + d for d in differences],
        "abs": [abs(d) for d in differences],
    }
    for kind in KINDS:
        got = estimate_kl(new, ref, kind=kind)
        assert got.dtype == dtype
        assert got.shape == new.shape
        assert got.flatten().tolist() == pytest.approx(expected[kind], rel=1e-5, abs=1e-6)


def test_d10_the_gradient_of_k2_is_the_gradient_of_the_kl_on_policy() -> None:
    logits = P.log().requires_grad_()
    logp = torch.log_softmax(logits, dim=0)
    exact = gradient_of((logp.exp() * (logp - Q.log())).sum(), logits)
    logp = torch.log_softmax(logits, dim=0)
    torch.testing.assert_close(gradient_of((P * estimate_kl(logp, Q.log(), kind="k2")).sum(), logits), exact)


def test_d10_the_gradients_of_k1_and_k3_are_not_that_of_the_kl() -> None:
    # k1 has a mean gradient of 0 and k3 that of the reverse KL(reference || policy).
    logits = P.log().requires_grad_()
    of_k1 = gradient_of((P * estimate_kl(torch.log_softmax(logits, 0), Q.log(), kind="k1")).sum(), logits)
    assert_within(of_k1, [0.0, 0.0, 0.0], 1e-15)
    of_k3 = gradient_of((P * estimate_kl(torch.log_softmax(logits, 0), Q.log(), kind="k3")).sum(), logits)
    reverse = gradient_of((Q * (Q.log() - torch.log_softmax(logits, 0))).sum(), logits)
    torch.testing.assert_close(of_k3, reverse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d10_the_kl_loss_has_the_value_of_k3_and_the_gradient_of_k2(dtype: torch.dtype) -> None:
    logp, ref = normal(0, dtype=dtype).requires_grad_(), normal(1, dtype=dtype)
    loss = kl_loss(logp, ref)
    torch.testing.assert_close(loss.detach(), estimate_kl(logp.detach(), ref, kind="k3"))
    expected = gradient_of(estimate_kl(logp, ref, kind="k2").sum(), logp)
    torch.testing.assert_close(gradient_of(loss.sum(), logp), expected)
    torch.testing.assert_close(expected, logp.detach() - ref)


def test_d10_no_gradient_of_the_kl_loss_reaches_the_reference() -> None:
    ref = normal(1).requires_grad_()
    assert not kl_loss(normal(0), ref).requires_grad


def test_d10_the_kl_loss_is_clamped_so_that_it_stays_finite() -> None:
    logp = torch.tensor([-500.0, 500.0, -20.0, 3.0], requires_grad=True)
    loss = kl_loss(logp, torch.zeros(4))
    torch.testing.assert_close(loss.detach()[:2], torch.tensor([math.exp(20.0) - 21.0, math.exp(-20.0) + 19.0]))
    assert gradient_of(loss.sum(), logp).tolist() == [0.0, 0.0, -20.0, 3.0]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 999.0])
def test_d10_garbage_outside_the_mask_leaves_the_gradient_of_the_kl_loss_finite(garbage: float) -> None:
    logp = torch.where(MASK, normal(0), garbage).requires_grad_()
    loss = aggregate(kl_loss(logp, normal(1)), MASK, aggregation="token_mean")
    gradient = gradient_of(loss, logp)
    torch.testing.assert_close(gradient[MASK], (normal(0) - normal(1))[MASK] / int(MASK.sum()))
    assert gradient[~MASK].eq(0.0).all()


def test_d10_no_estimator_is_clamped() -> None:
    logp, ref = float64([0.0, -30.0]), float64([-100.0, 0.0])
    assert estimate_kl(logp, ref, kind="k1").tolist() == [100.0, -30.0]
    assert estimate_kl(logp, ref, kind="k2").tolist() == [5000.0, 450.0]
    assert estimate_kl(logp, ref, kind="abs").tolist() == [100.0, 30.0]
    assert estimate_kl(logp, ref, kind="k3").tolist() == pytest.approx([99.0, math.exp(30.0) - 31.0])


@pytest.mark.parametrize("kind", KINDS)
def test_d10_equal_distributions_give_exactly_0(kind: KlKind) -> None:
    logp = logprob_rows(0).float()
    assert estimate_kl(logp, logp, kind=kind).eq(0.0).all()
    assert kl_loss(logp, logp).eq(0.0).all()


def test_d10_only_k1_may_be_negative() -> None:
    logp, ref = normal(0, 1000), normal(1, 1000)
    assert estimate_kl(logp, ref, kind="k1").min() < -0.1
    for kind in KINDS[1:]:
        assert estimate_kl(logp, ref, kind=kind).min() >= 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_d10_half_precision_differences_are_taken_in_float32(dtype: torch.dtype) -> None:
    logp, ref = torch.tensor([-8.0], dtype=dtype), torch.tensor([-0.0078125], dtype=dtype)
    got = estimate_kl(logp, ref, kind="k1")
    assert got.dtype == torch.float32
    assert got.item() == -8.0 + 0.0078125
    assert kl_loss(logp, ref).dtype == torch.float32


def test_d10_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="'k4'"):
        estimate_kl(P, Q, kind=cast(KlKind, "k4"))


@pytest.mark.parametrize(("kl", "factor"), [(9.0, 1.01024), (3.0, 0.98976), (6.3, 1.00256), (6.0, 1.0)])
def test_d11_the_adaptive_weight_matches_the_hand_calculation(kl: float, factor: float) -> None:
    controller = AdaptiveKl(0.05, 6.0, 10000)
    assert controller.update(kl, 512) == pytest.approx(0.05 * factor, rel=1e-12)
    assert controller.kl_coef == pytest.approx(0.05 * factor, rel=1e-12)


def test_d11_the_adaptive_weight_matches_the_number_of_another_public_test() -> None:
    # OpenRLHF tests/test_kl_controller.py: 0.1, target 1, horizon 100, KL 1.2, 10 episodes.
    assert AdaptiveKl(0.1, 1.0, 100).update(1.2, 10) == pytest.approx(0.102)


def test_d11_the_adaptive_weight_compounds_over_batches() -> None:
    controller, expected = AdaptiveKl(0.2, 6.0, 1000), 0.2
    for kl, episodes in ((9.0, 64), (5.7, 32), (0.0, 8), (6.6, 100)):
        expected *= 1.0 + min(max(kl / 6.0 - 1.0, -0.2), 0.2) * episodes / 1000
        assert controller.update(kl, episodes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kl", [-5.0, 0.0, 1e9])
def test_d11_the_adaptive_weight_stays_above_0_so_that_it_can_rise_again(kl: float) -> None:
    controller = AdaptiveKl(0.05, 6.0, 10)
    for _ in range(5):
        assert controller.update(kl, 512) > 0.0


@pytest.mark.parametrize("arguments", [(0.0, 6.0, 100.0), (0.1, 0.0, 100.0), (0.1, 6.0, 0.0), (0.1, -1.0, 100.0)])
def test_d11_a_controller_that_could_not_move_is_refused(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="init, target and horizon must be above 0"):
        AdaptiveKl(*arguments)


def test_d11_the_fixed_weight_stays() -> None:
    controller = FixedKl(0.05)
    assert controller.update(100.0, 512) == 0.05
    assert controller.update(0.0, 512) == 0.05
    assert controller.kl_coef == 0.05
