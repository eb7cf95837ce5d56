"""One optimiser made of two."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from tether_services.recipes.muon import MuonWithAdamW


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


@pytest.fixture
def model() -> Iterator[Small]:
    torch.manual_seed(0)
    yield Small()


def optimiser(model: nn.Module, *, weight_decay: float = 0.1) -> MuonWithAdamW:
    return MuonWithAdamW(model, learning_rate=0.01, weight_decay=weight_decay, betas=(0.9, 0.95))


def step(model: Small, *optimisers: torch.optim.Optimizer) -> None:
    model.zero_grad()
    torch.autograd.backward(model.loss())
    for each in optimisers:
        each.step()


def weights(model: nn.Module) -> list[list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in model.parameters()]


def test_muon_takes_the_hidden_matrices_and_only_vectors_do_not_decay(model: Small) -> None:
    hidden, others, vectors = optimiser(model, weight_decay=0.5).param_groups
    assert [id(p) for p in hidden["params"]] == [id(model.linear.weight)]
    assert [id(p) for p in others["params"]] == [id(model.embedding.weight)]
    assert {id(p) for p in vectors["params"]} == {id(model.norm.weight), id(model.norm.bias)}
    assert [group["weight_decay"] for group in (hidden, others, vectors)] == [0.5, 0.5, 0.0]


def test_steps_are_those_of_the_two_optimisers_apart(model: Small) -> None:
    twin = copy.deepcopy(model)
    muon = Muon([twin.linear.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups: list[dict[str, Any]] = [
        {"params": [twin.embedding.weight], "weight_decay": 0.1},
        {"params": list(twin.norm.parameters())},
    ]
    adamw = AdamW(groups, lr=0.01, weight_decay=0.0, betas=(0.9, 0.95))
    one = optimiser(model)
    for _ in range(3):
        step(model, one)
        step(twin, muon, adamw)
    assert weights(model) == weights(twin)


def test_every_trainable_weight_changes_and_no_frozen_one(model: Small) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, optimiser(model))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"embedding.weight", "linear.weight", "norm.weight", "norm.bias"}


def test_a_scheduler_sets_the_rate_of_both(model: Small) -> None:
    one = optimiser(model, weight_decay=0.0)
    schedule = LambdaLR(one, lambda done: 0.0 if done else 1.0)
    step(model, one)
    schedule.step()
    after = weights(model)
    step(model, one)
    assert weights(model) == after
    assert {group["lr"] for group in one.param_groups} == {0.0}


def test_a_restored_optimiser_goes_on_exactly(model: Small) -> None:
    one = optimiser(model)
    for _ in range(2):
        step(model, one)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    twin = copy.deepcopy(model)
    restored = optimiser(twin)
    buffer.seek(0)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(2):
        step(model, one)
        step(twin, restored)
    assert weights(twin) == weights(model)
    saved, again = one.state_dict(), restored.state_dict()
    assert saved["param_groups"] == again["param_groups"]
    assert [state.keys() for state in saved["state"].values()] == [state.keys() for state in again["state"].values()]


def test_the_state_names_every_trained_parameter_once(model: Small) -> None:
    one = optimiser(model)
    step(model, one)
    state = one.state_dict()["state"]
    assert sorted(state) == [0, 1, 2, 3]
    assert set(state[0]) == {"momentum_buffer"} and set(state[1]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_closure_is_called_once_with_gradients_and_its_loss_returned(model: Small) -> None:
    calls = []

    def closure() -> float:
        model.zero_grad()
        loss = model.loss()
        torch.autograd.backward(loss)
        calls.append(loss.item())
        return calls[-1]

    assert optimiser(model).step(closure) == calls[0]
    assert len(calls) == 1


def test_a_model_without_vectors_has_no_empty_group() -> None:
    both = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    assert [len(group["params"]) for group in optimiser(both).param_groups] == [1, 1]


def test_the_size_of_the_state_is_known_before_the_first_step(model: Small) -> None:
    one = optimiser(model)
    step(model, one)
    tensors = [tensor for state in one.state.values() for name, tensor in state.items() if name != "step"]
    assert one.state_bytes == sum(tensor.nbytes for tensor in tensors) > 0
