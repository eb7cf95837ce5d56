"""Whole updates in float64 against the same written out by hand, one for each setting of the algorithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_llama import (
    in_float64,
    new_trainer,
    random_samples,
    randomise_adapters,
    trained_parameters,
    weights_of,
    write_tiny_llama,
)
from tests.unit.trainer_by_hand import Recipe, train_by_hand
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Trainer, UpdateReport

BASIC: dict[str, Any] = {
    "epochs": 2,
    "minibatches": 2,
    "temperature": 0.7,
    "kl_coef": 0.3,
    "gamma": 0.97,
    "lam": 0.9,
    "clip_range": 0.1,
    "value_clip_range": 0.05,
    "sampler_high": 1.5,
    "mismatch_limit": 5.0,
}
RATES = {"policy": 5e-3, "critic": 2e-3}
MAX_NORM, TOTAL_STEPS, SEED, TOLERANCE = 0.05, 5, 3, 1e-7
LINEAR = [1.0 - k / 20 for k in range(4)]
SAMPLES = random_samples(5)
LIMIT = max(len(s.response_token_ids) for s in SAMPLES)
TEXT = [[(7 * i + 3 * k) % 48 for k in range(3 + i % 5)] for i in range(9)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base", seed=1, num_hidden_layers=1)


def prepared_trainer(base: Path, ppo: PpoConfig, **config: Any) -> Trainer:
    rates = {"learning_rate": RATES["policy"], "critic_learning_rate": RATES["critic"]}
    shape = {"micro_batch_tokens": 24, "max_grad_norm": MAX_NORM, "seed": SEED}
    return randomise_adapters(
        in_float64(new_trainer(base, total_steps=TOTAL_STEPS, ppo=ppo, **(rates | shape | config)))
    )


def new_batch(trainer: Trainer, ppo: PpoConfig, noise: float) -> RolloutBatch:
    """Return a batch whose trainer and reference differ by a lot, and whose generator differs by `noise` nats."""
    generator = torch.Generator().manual_seed(2)
    policy = trainer.compute_logprobs(SAMPLES, adapter="policy", temperature=ppo.temperature)
    reference = trainer.compute_logprobs(SAMPLES, adapter="reference", temperature=ppo.temperature)
    noisy = [(row.float() + noise * torch.randn(row.shape, generator=generator)).tolist() for row in policy]
    return RolloutBatch(
        SAMPLES,
        noisy,
        [row.float().tolist() for row in reference],
        scores=[0.5, -1.0, 2.0, 0.0, 1.5],
        groups=[4, 9, 4, 9, 9],
        stopped=[True, False, True, True, False],
        max_response_tokens=LIMIT,
    )


@dataclass(frozen=True, slots=True)
class Case:
    """What an update is given beside the settings of the algorithm."""

    factors: Sequence[float] = tuple(LINEAR)
    """Expected factor of the learning rates at each optimiser step."""
    sampler: tuple[float, float] = (0.0, 1.5)
    """Expected range of the sampler correction."""
    noise: float = 0.3
    """Nats between generator and trainer."""
    text: Sequence[Sequence[int]] = ()
    config: dict[str, Any] = field(default_factory=dict)


def check_update(base: Path, case: Case | None = None, **settings: Any) -> UpdateReport:
    """Compare an update under `settings` with the one by hand, and return its report."""
    case, ppo = case or Case(), PpoConfig.model_validate(BASIC | settings)
    trainer, by_hand = (prepared_trainer(base, ppo, **case.config) for _ in range(2))
    batch, recipe = new_batch(trainer, ppo, case.noise), Recipe(ppo, RATES, case.factors, MAX_NORM, SEED, case.text)
    start = weights_of(trainer)
    report = trainer.update(batch, case.text)
    train_by_hand(by_hand._model, batch, recipe, sampler=case.sampler)
    assert recipe.adapters == trainer._trained
    got = trained_parameters(trainer)
    for name, expected in trained_parameters(by_hand).items():
        assert (expected - start[name]).abs().max() > 1e-4
        torch.testing.assert_close(got[name], expected, atol=TOLERANCE, rtol=0)
    return report


def test_an_update_is_the_one_that_the_formulas_give(base: Path) -> None:
    report = check_update(base)
    assert 0.1 < report.clip_fraction < 0.9, "both sides of the clip take part"
    assert report.value_clip_fraction > 0.0
    assert report.dual_clip_fraction == 0.0


def test_d21_the_upper_clip_range_is_its_own(base: Path) -> None:
    check_update(base, clip_range_high=0.4)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_sum"])
def test_d21_losses_are_aggregated_over_the_whole_optimiser_step(base: Path, aggregation: str) -> None:
    check_update(base, aggregation=aggregation)


def test_d22_the_dual_clip_bounds_the_loss_of_negative_advantages(base: Path) -> None:
    assert check_update(base, dual_clip=1.01).dual_clip_fraction > 0.0


def test_d26_the_entropy_bonus_is_added_to_the_loss(base: Path) -> None:
    report = check_update(base, entropy_coef=0.5)
    assert 0.0 < report.entropy_bonus < math.log(48)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_d10_the_kl_as_a_loss_has_the_gradient_of_the_kl(base: Path, aggregation: str) -> None:
    report = check_update(base, kl_in="loss", aggregation=aggregation)
    assert report.kl_loss > 0.0


def test_d9_n_plus_places_the_score_after_the_response(base: Path) -> None:
    lengths = [len(s.response_token_ids) for s in SAMPLES]
    assert min(lengths) < LIMIT == max(lengths), "with and without room for one more state"
    check_update(base, score_placement="n_plus")


@pytest.mark.parametrize("mode", ["subtract", "replace"])
def test_d12_a_cut_response_is_penalised(base: Path, mode: str) -> None:
    check_update(base, missing_eos=mode, missing_eos_value=2.5)


def test_d13_scores_are_normalised_by_the_scores_of_the_run(base: Path) -> None:
    check_update(base, normalise_scores=True)


def test_d14_scores_are_clipped_before_the_penalty(base: Path) -> None:
    check_update(base, score_clip=1.0, missing_eos="subtract")


@pytest.mark.parametrize("placement", ["last", "n_plus"])
def test_d15_rewards_are_whitened_over_the_batch_and_keep_their_mean(base: Path, placement: str) -> None:
    check_update(base, whiten_rewards=True, score_placement=placement)


def test_d19_advantages_that_are_not_whitened_stay_as_they_are(base: Path) -> None:
    check_update(base, whiten_advantages=False)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "reinforce_baseline"])
def test_d37_group_estimators_have_no_critic(base: Path, kind: str) -> None:
    aggregation = "token_sum" if kind == "dr_grpo" else "token_mean"
    report = check_update(base, advantage=kind, kl_in="loss", aggregation=aggregation)
    assert math.isnan(report.value_loss)
    assert math.isnan(report.critic_learning_rate)


def test_d38_rloo_compares_with_the_others_and_has_the_kl_in_the_reward(base: Path) -> None:
    assert math.isnan(check_update(base, advantage="rloo").value_mean)


def test_d38_group_advantages_may_be_whitened_too(base: Path) -> None:
    check_update(base, advantage="rloo", whiten_advantages=True)


SAMPLER_DEFAULTS = {
    "none": (0.0, math.inf),
    "token_tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "token_mask": (0.5, 2.0),
    "sequence_mask_geometric": (0.98, 1.02),
}


@pytest.mark.parametrize("kind", SAMPLER_DEFAULTS)
def test_the_sampler_correction_has_its_default_range(base: Path, kind: str) -> None:
    noise = 0.03 if kind == "sequence_mask_geometric" else 0.6
    case = Case(sampler=SAMPLER_DEFAULTS[kind], noise=noise)
    check_update(base, case, sampler_correction=kind, sampler_high=None)


@pytest.mark.parametrize("kind", ["token_tis", "icepop", "token_mask", "sequence_mask_geometric"])
def test_the_sampler_correction_takes_a_range(base: Path, kind: str) -> None:
    check_update(base, Case(sampler=(0.9, 1.2)), sampler_correction=kind, sampler_low=0.9, sampler_high=1.2)


def test_d29_the_pretraining_loss_is_part_of_the_same_optimiser_step(base: Path) -> None:
    report = check_update(base, Case(text=TEXT), ptx_coef=0.7)
    assert report.ptx_grad_norm > 0.0
    assert report.ppo_grad_norm > 0.0


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "factors"),
    [
        ("constant", 0, [1.0] * 4),
        ("constant", 2, [0.0, 1 / 8, 2 / 8, 3 / 8]),
        ("linear", 1, [0.0, 0.25, 0.5, 0.75]),
        ("cosine", 0, [0.5 * (1.0 + math.cos(math.pi * k / 20)) for k in range(4)]),
    ],
)
def test_d27_the_schedule_scales_both_learning_rates(
    base: Path, schedule: str, warmup_steps: int, factors: list[float]
) -> None:
    report = check_update(base, Case(factors, config={"schedule": schedule, "warmup_steps": warmup_steps}))
    assert report.policy_learning_rate == pytest.approx(RATES["policy"] * factors[-1])
    assert report.critic_learning_rate == pytest.approx(RATES["critic"] * factors[-1])
