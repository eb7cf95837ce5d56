from __future__ import annotations

import pytest
import torch

from tests.unit.golden_vectors import assert_within, float64, load_vector
from tether_services.ppo.kl import k1, k2, k3

P = float64([0.5, 0.3, 0.2])
Q = float64([0.4, 0.4, 0.2])


def test_kl_estimators_nemo_rl() -> None:
    vector = load_vector("kl_estimators_nemo_rl")
    logp, ref = float64(vector.inputs["logp"]), float64(vector.inputs["ref_logp"])
    for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
        assert_within(estimator(logp, ref), vector.expected[name], vector.tol)


def test_d10_the_mean_of_k1_and_k3_under_the_policy_is_the_kl() -> None:
    exact = float((P * (P / Q).log()).sum())
    assert exact == pytest.approx(0.0252672, abs=1e-7)
    assert float((P * k1(P.log(), Q.log())).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((P * k3(P.log(), Q.log())).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((P * k2(P.log(), Q.log())).sum()) == pytest.approx(0.0248624, abs=1e-7)


def test_d10_the_gradient_of_k2_is_the_gradient_of_the_kl() -> None:
    logits = P.log().requires_grad_()
    logp = torch.log_softmax(logits, dim=0)
    (from_k2,) = torch.autograd.grad((P * k2(logp, Q.log())).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - Q.log())).sum(), logits)
    torch.testing.assert_close(from_k2, exact)


def test_d10_no_estimator_is_clamped() -> None:
    logp, ref = float64([0.0]), float64([-100.0])
    assert k1(logp, ref).item() == 100.0
    assert k2(logp, ref).item() == 5000.0
    assert k3(logp, ref).item() == pytest.approx(99.0)


def test_d10_equal_distributions_give_exactly_0() -> None:
    logp = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for estimator in (k1, k2, k3):
        assert estimator(logp, logp).eq(0.0).all()


def test_d10_k2_and_k3_are_never_negative_while_k1_may_be() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, ref = (torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(2))
    assert k2(logp, ref).min() >= 0.0
    assert k3(logp, ref).min() >= 0.0
    assert k1(logp, ref).min() < 0.0


def test_half_precision_differences_are_taken_in_float32() -> None:
    logp = torch.tensor([-8.0], dtype=torch.bfloat16)
    ref = torch.tensor([-0.0078125], dtype=torch.bfloat16)
    assert k1(logp, ref).dtype == torch.float32
    assert k1(logp, ref).item() == -8.0 + 0.0078125
