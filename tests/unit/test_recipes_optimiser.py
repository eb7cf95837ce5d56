"""Schedule, parameter groups and the step of the offline stages."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from tether_services.recipes.optimiser import (
    FINAL_SHARE,
    MAX_GRAD_NORM,
    apply_step,
    fine_tuning_optimisers,
    pretraining_optimisers,
    schedule_factor,
)


class Small(nn.Module):
    """An embedding, a matrix, a norm and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)

    def loss(self) -> torch.Tensor:
        output: torch.Tensor = self.norm(self.frozen(self.linear(self.embedding.weight)))
        return output.pow(3).sum()


def test_the_schedule_rises_to_the_peak_and_falls_to_a_tenth() -> None:
    factors = [schedule_factor(step, num_steps=100, warmup_steps=10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(FINAL_SHARE + (1 - FINAL_SHARE) / 2)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))
    assert schedule_factor(100, num_steps=100, warmup_steps=10) == pytest.approx(FINAL_SHARE)


def test_without_warmup_the_schedule_starts_at_the_peak() -> None:
    assert schedule_factor(0, num_steps=1, warmup_steps=0) == 1.0


def test_only_matrices_decay_and_frozen_weights_are_left_out() -> None:
    model = Small()
    (adamw,) = fine_tuning_optimisers(model, learning_rate=0.1, weight_decay=0.5)
    by_decay = {group["weight_decay"]: group["params"] for group in adamw.param_groups}
    assert {id(p) for p in by_decay[0.5]} == {id(model.embedding.weight), id(model.linear.weight)}
    assert {id(p) for p in by_decay[0.0]} == {id(model.norm.weight), id(model.norm.bias)}


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = Small()
    muon, adamw = pretraining_optimisers(model, learning_rate=0.1, weight_decay=0.0)
    taken = [[id(p) for group in optimiser.param_groups for p in group["params"]] for optimiser in (muon, adamw)]
    assert taken[0] == [id(model.linear.weight)]
    assert set(taken[1]) == {id(model.embedding.weight), id(model.norm.weight), id(model.norm.bias)}


def test_a_step_changes_every_trainable_weight_and_clears_the_gradients() -> None:
    torch.manual_seed(0)
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.autograd.backward(model.loss())
    apply_step(pretraining_optimisers(model, learning_rate=0.01, weight_decay=0.0), learning_rate=0.01)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"embedding.weight", "linear.weight", "norm.weight", "norm.bias"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_norm_before_the_clip_is_returned_and_large_gradients_are_scaled() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.SGD([parameter], lr=0.0)
    parameter.grad = torch.tensor([30.0, 40.0])
    assert apply_step([optimiser], learning_rate=1.0) == pytest.approx(50.0)
    assert math.isclose(float(parameter.detach().norm()), MAX_GRAD_NORM, rel_tol=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.tensor([float("nan"), 1.0])
    with pytest.raises(RuntimeError, match="non-finite"):
        apply_step([optimiser], learning_rate=1.0)
    assert parameter.detach().tolist() == [1.0, 1.0]
