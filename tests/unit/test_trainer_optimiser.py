from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.orchestrator.trainer.optimiser import AdapterOptimiser


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": nn.Parameter(torch.randn(3, 2, generator=generator)),
        "b": nn.Parameter(torch.randn(2, generator=generator)),
    }


RATE = 0.1


def new_optimiser(of: dict[str, nn.Parameter]) -> AdapterOptimiser:
    return AdapterOptimiser(of, max_grad_norm=1.0)


def set_gradients(of: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in of.values():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def slow_adamw(start: Tensor, gradients: list[Tensor], learning_rates: list[float]) -> Tensor:
    """The published update with bias correction, eps 1e-5 and no weight decay."""
    x, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t, (g, lr) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        x = x - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)
    return x


@pytest.mark.parametrize("rates", [[0.1] * 4, [0.1, 0.075, 0.05, 0.025], [0.0, 0.3, 0.0, 0.1]])
def test_d27_steps_match_the_published_update(rates: list[float]) -> None:
    of = {"b": nn.Parameter(torch.tensor([1.0, -2.0]))}
    optimiser = new_optimiser(of)
    gradients = [torch.tensor([0.1 * (t + 1), -0.02]) for t in range(4)]
    for gradient, rate in zip(gradients, rates, strict=True):
        of["b"].grad = gradient.clone()
        optimiser.step(rate)
    expected = slow_adamw(torch.tensor([1.0, -2.0]), gradients, rates)
    torch.testing.assert_close(of["b"].detach().double(), expected, atol=1e-6, rtol=0.0)
    assert optimiser.num_steps == 4


def test_gradients_put_aside_are_added_again() -> None:
    of = parameters()
    optimiser = new_optimiser(of)
    set_gradients(of, 0)
    first, norm = optimiser.gradients(), optimiser.grad_norm()
    assert norm == pytest.approx(math.sqrt(sum(float((g.double() ** 2).sum()) for g in first.values())), rel=1e-6)
    optimiser.clear()
    assert optimiser.gradients() == {}
    set_gradients(of, 1)
    second = {name: g.clone() for name, g in optimiser.gradients().items()}
    optimiser.add_gradients(first)
    assert all(g.equal(first[name] + second[name]) for name, g in optimiser.gradients().items())
    optimiser.clear()
    optimiser.add_gradients(first)
    assert all(g.equal(first[name]) for name, g in optimiser.gradients().items())


@pytest.mark.parametrize("scale", [0.001, 10.0])
def test_d28_the_norm_is_reported_before_clipping_and_bounded_after(scale: float) -> None:
    of = parameters()
    optimiser = new_optimiser(of)
    set_gradients(of, 0, scale)
    before = [p.grad.clone() for p in of.values() if p.grad is not None]
    expected = math.sqrt(sum(float((g.double() ** 2).sum()) for g in before))
    assert optimiser.clip() == pytest.approx(expected, rel=1e-5)
    factor = min(1.0, 1.0 / expected)
    for parameter, gradient in zip(of.values(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_cleared(bad: float) -> None:
    of = parameters()
    optimiser = new_optimiser(of)
    set_gradients(of, 0)
    of["b"].grad = torch.tensor([0.0, bad])
    before = [p.detach().clone() for p in of.values()]
    with pytest.raises(FailedPreconditionError) as caught:
        optimiser.clip()
    assert caught.value.reason == "NON_FINITE"
    assert all(p.grad is None for p in of.values())
    assert all(p.detach().equal(b) for p, b in zip(of.values(), before, strict=True))


def test_a_step_clears_the_gradients() -> None:
    of = parameters()
    optimiser = new_optimiser(of)
    set_gradients(of, 0)
    optimiser.step(RATE)
    assert all(p.grad is None for p in of.values())


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_restored_optimiser_continues_bit_for_bit(steps_before: int) -> None:
    first = parameters()
    one = new_optimiser(first)
    for step in range(steps_before):
        set_gradients(first, step)
        one.step(RATE)
    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    two = new_optimiser(second)
    two.load_state(one.state_tensors(), num_steps=one.num_steps)
    for step in range(steps_before, steps_before + 3):
        for of, optimiser in ((first, one), (second, two)):
            set_gradients(of, step)
            optimiser.step(RATE)
    assert all(first[name].equal(second[name]) for name in first)
    assert two.num_steps == steps_before + 3


def test_a_restored_state_is_a_copy() -> None:
    of = parameters()
    one = new_optimiser(of)
    set_gradients(of, 0)
    one.step(RATE)
    tensors = one.state_tensors()
    two = new_optimiser(parameters())
    two.load_state(tensors, num_steps=1)
    for tensor in tensors.values():
        tensor.zero_()
    assert any(not t.eq(0).all() for t in two.state_tensors().values())


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    of = parameters()
    optimiser = new_optimiser(of)
    set_gradients(of, 0)
    optimiser.step(RATE)
    good = {name: t.clone() for name, t in optimiser.state_tensors().items()}
    missing = {name: t for name, t in good.items() if name != "exp_avg.b"}
    reshaped = good | {"exp_avg.b": torch.zeros(5)}
    for bad in (missing, reshaped, good | {"exp_avg.c": torch.zeros(1)}):
        with pytest.raises(InvalidArgumentError):
            optimiser.load_state(bad, num_steps=1)
    assert all(t.equal(good[name]) for name, t in optimiser.state_tensors().items())
