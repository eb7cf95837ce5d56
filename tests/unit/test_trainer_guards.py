"""Runs that lose samples, resume with other settings, or learn of bad text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, write_tiny_llama
from tether.errors import InvalidArgumentError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Sample
from tether_services.orchestrator.trainer.experience import estimate_experience


@pytest.mark.parametrize("advantage", ["reinforce_baseline", "grpo", "rloo", "dr_grpo"])
def test_d37_a_response_without_siblings_teaches_nothing_after_whitening_either(advantage: str) -> None:
    samples = [Sample([1], [1, 2, 3]), Sample([1], [1]), Sample([2], [1, 2])]
    rows = [[-1.0] * len(sample.response_token_ids) for sample in samples]
    batch = RolloutBatch(samples, rows, rows, scores=[1.0, -1.0, 5.0], groups=[0, 0, 1])
    config = PpoConfig.model_validate({"advantage": advantage, "whiten_advantages": True})
    got = estimate_experience(batch, torch.full((6,), -1.0), torch.zeros(0), config).advantages
    assert got[4:].tolist() == [0.0, 0.0], "nobody to be compared with"
    assert float(got[:4].mean()) == pytest.approx(0.0, abs=1e-6), "the others are whitened among themselves"


def test_a_dropped_sample_does_not_end_a_run_with_as_many_minibatches_as_samples(tmp_path: Path) -> None:
    trainer = new_trainer(write_tiny_llama(tmp_path / "base"), ppo=PpoConfig(epochs=1, minibatches=4))
    kept = score_samples(trainer, random_samples(3))  # three of four: one was dropped
    assert trainer.update(kept).num_samples == 3


def test_d11_a_fixed_weight_is_that_of_the_configuration_after_a_resume(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    new_trainer(base, ppo=PpoConfig(kl_coef=0.05)).save_checkpoint(tmp_path / "checkpoint")
    trainer = new_trainer(base, ppo=PpoConfig(kl_coef=0.2))
    trainer.load_checkpoint(tmp_path / "checkpoint")
    assert trainer._kl.kl_coef == 0.2


def test_d11_the_weight_does_not_fall_while_the_policy_is_not_allowed_to_move(tmp_path: Path) -> None:
    ppo = PpoConfig(kl_coef=0.1, kl_target=6.0, kl_horizon=100, critic_warmup_steps=2, epochs=1, minibatches=2)
    trainer = new_trainer(write_tiny_llama(tmp_path / "base"), ppo=ppo)
    batch = score_samples(trainer, random_samples(8))
    for _ in range(2):
        trainer.update(batch)
    assert trainer._kl.kl_coef == 0.1


def test_d29_pretraining_ids_outside_the_vocabulary_are_refused_before_anything_is_learned(tmp_path: Path) -> None:
    trainer = new_trainer(write_tiny_llama(tmp_path / "base"), ppo=PpoConfig(epochs=1, minibatches=2, ptx_coef=0.5))
    batch = score_samples(trainer, random_samples(4))
    with pytest.raises(InvalidArgumentError):
        trainer.update(batch, [[1, 2, 3], [4, 5, 10**6]])
    assert trainer.num_updates == 0
