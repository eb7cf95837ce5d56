"""PPO-ptx: the language-model loss on pretraining text inside the optimiser step of the policy (D29)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.tiny_llama import (
    in_float64,
    new_trainer,
    random_samples,
    randomise_adapters,
    score_samples,
    weights_of,
    write_tiny_llama,
)
from tests.unit.trainer_by_hand import pretraining_loss
from tether.errors import InvalidArgumentError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Sample, Trainer
from tether_services.orchestrator.trainer.plan import plan_pretraining

TEXT = [[(7 * i + 3 * k) % 48 for k in range(3 + i % 7)] for i in range(9)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base")


def state_after(updates: int, base: Path, text: Sequence[Sequence[int]], *, ptx_coef: float) -> dict[str, Tensor]:
    """Weights, optimiser state and random state."""
    trainer = new_trainer(base, ppo=PpoConfig(epochs=2, minibatches=2, ptx_coef=ptx_coef))
    for seed in range(updates):
        trainer.update(score_samples(trainer, random_samples(8, seed=seed)), text)
    found = weights_of(trainer) | {"rng": trainer._generator.get_state(), "global": torch.get_rng_state()}
    for name, optimiser in trainer._optimisers.items():
        found |= {f"{name}/{key}": tensor.clone() for key, tensor in optimiser.state_tensors().items()}
    return found


def test_d29_a_coefficient_of_0_is_bit_identical_to_plain_ppo(base: Path) -> None:
    plain, with_text = (state_after(2, base, text, ptx_coef=0.0) for text in ([], TEXT))
    assert plain.keys() == with_text.keys()
    assert len([name for name in plain if "exp_avg" in name]) > 50
    assert [name for name in plain if not plain[name].equal(with_text[name])] == []


def test_d29_pretraining_text_changes_the_policy_and_neither_critic_nor_random_state(base: Path) -> None:
    """Within one update, whose rollouts and advantages are those of plain PPO."""
    plain, ptx = state_after(1, base, [], ptx_coef=0.0), state_after(1, base, TEXT, ptx_coef=0.5)
    changed = {name for name in plain if not plain[name].equal(ptx[name])}
    moving = {name for name in plain if name.startswith("policy/") and not name.startswith("policy/step.")}
    assert changed == moving


def prepared(base: Path, *, ptx_coef: float, micro_batch_tokens: int = 4096) -> tuple[Trainer, RolloutBatch]:
    """A trainer in float64 that takes one optimiser step, and its batch."""
    ppo = PpoConfig(epochs=1, temperature=0.7, ptx_coef=ptx_coef)
    shape: dict[str, Any] = {"micro_batch_tokens": micro_batch_tokens, "max_grad_norm": 1e9}
    trainer = randomise_adapters(in_float64(new_trainer(base, ppo=ppo, **shape)))
    return trainer, score_samples(trainer, random_samples(8), temperature=0.7)


def gradients_before_the_step(trainer: Trainer, batch: RolloutBatch, text: Sequence[Sequence[int]]) -> Tensor:
    """What the optimiser of the policy is given in one update."""
    found: list[Tensor] = []
    parameters = trainer._model.trained_parameters("policy").values()

    def keep(*_: object) -> None:
        found.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))

    hook = trainer._optimisers["policy"]._adamw.register_step_pre_hook(keep)
    trainer.update(batch, text)
    hook.remove()
    (gradient,) = found
    return gradient


@pytest.mark.parametrize("micro_batch_tokens", [10, 4096])
def test_d29_the_gradient_is_that_of_ppo_plus_the_weighted_language_model_loss(
    base: Path, micro_batch_tokens: int
) -> None:
    plain = gradients_before_the_step(*prepared(base, ptx_coef=0.0), [])
    trainer, batch = prepared(base, ptx_coef=2.5, micro_batch_tokens=micro_batch_tokens)
    parameters = list(trainer._model.trained_parameters("policy").values())
    loss = pretraining_loss(trainer._model, TEXT)
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    got = gradients_before_the_step(trainer, batch, TEXT)
    largest = float(by_hand.abs().max())
    assert largest > 1e-2
    torch.testing.assert_close(got - plain, 2.5 * by_hand, atol=1e-6 * largest, rtol=1e-6)


def test_d29_both_gradient_norms_and_the_loss_are_reported(base: Path) -> None:
    plain, batch = prepared(base, ptx_coef=0.0)
    expected = plain.update(batch)
    trainer, batch = prepared(base, ptx_coef=2.5)
    parameters = list(trainer._model.trained_parameters("policy").values())
    loss = pretraining_loss(trainer._model, TEXT)
    norm = math.sqrt(sum(float((g**2).sum()) for g in torch.autograd.grad(loss, parameters)))
    report = trainer.update(batch, TEXT)
    assert report.ptx_loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert report.ptx_grad_norm == pytest.approx(2.5 * norm, rel=1e-6)
    assert report.ppo_grad_norm == pytest.approx(expected.policy_grad_norm, rel=1e-6)
    assert report.policy_grad_norm < report.ptx_grad_norm + report.ppo_grad_norm
    assert report.policy_loss == pytest.approx(expected.policy_loss, abs=1e-9)
    assert math.isnan(expected.ptx_loss)


def test_rows_are_spread_evenly_over_the_steps_in_their_order() -> None:
    steps = plan_pretraining([Sample(row[:1], row[1:]) for row in TEXT], num_steps=4, max_tokens=12)
    counts = [[int(micro.mask.sum(dim=1).numel()) for micro in step] for step in steps]
    assert [sum(step) for step in counts] == [2, 2, 2, 3]
    learned = [sorted(t for micro in step for t in micro.targets.tolist()) for step in steps]
    rows = [TEXT[0:2], TEXT[2:4], TEXT[4:6], TEXT[6:9]]
    assert learned == [sorted(t for row in part for t in row[1:]) for part in rows]


@pytest.mark.parametrize("text", [TEXT[:3], [*TEXT, [4]], []])
def test_too_little_pretraining_text_is_refused_before_anything_changes(base: Path, text: list[list[int]]) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(epochs=2, minibatches=2, ptx_coef=0.1))
    before = weights_of(trainer)
    with pytest.raises(InvalidArgumentError) as caught:
        trainer.update(score_samples(trainer, random_samples(8)), text)
    assert caught.value.violations[0].field.startswith("pretraining")
    assert all(tensor.equal(before[name]) for name, tensor in weights_of(trainer).items())
