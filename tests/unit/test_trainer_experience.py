from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, write_tiny_llama
from tether.errors import FailedPreconditionError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Sample
from tether_services.orchestrator.trainer.batch import build_micro_batches
from tether_services.orchestrator.trainer.experience import Experience, estimate_experience, prepare_experience

LENGTHS = (3, 1, 2)
SAMPLES = [Sample([1], list(range(1, n + 1))) for n in LENGTHS]
OLD = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.2, -3.0])
MU = torch.tensor([-1.01, -2.0, -0.5, -1.49, -0.2, -3.02])
REF = torch.tensor([-1.2, -1.9, -0.7, -1.0, -0.2, -2.5])
VALUES = torch.tensor([0.1, 0.3, -0.2, 0.5, 0.0, 0.4])
SCORES = [1.0, -0.5, 2.0]


def per_sample(flat: torch.Tensor) -> list[list[float]]:
    return [part.tolist() for part in torch.split(flat, list(LENGTHS))]


def experience(**settings: object) -> Experience:
    batch = RolloutBatch(SAMPLES, per_sample(MU), per_sample(REF), SCORES)
    return estimate_experience(batch, OLD, VALUES, PpoConfig.model_validate(settings))


def slow_advantages(kl_coef: float, gamma: float, lam: float) -> list[float]:
    """Rewards and advantages of each response from their definitions, response by response."""
    result: list[float] = []
    parts = zip(*(per_sample(x) for x in (OLD, REF, VALUES)), SCORES, strict=True)
    for old, ref, values, score in parts:
        rewards = [-kl_coef * (o - r) for o, r in zip(old, ref, strict=True)]
        rewards[-1] += score
        following = [*values[1:], 0.0]
        deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
        result += [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]
    return result


def test_d16_advantages_and_returns_match_a_slow_loop_over_responses() -> None:
    got = experience(whiten_advantages=False, kl_coef=0.3, gamma=0.9, lam=0.8)
    expected = slow_advantages(0.3, 0.9, 0.8)
    assert got.advantages.tolist() == pytest.approx(expected, abs=1e-5)
    returns = [a + v for a, v in zip(expected, VALUES.tolist(), strict=True)]
    assert got.returns.tolist() == pytest.approx(returns, abs=1e-5)


def test_d19_whitening_is_over_the_batch_and_leaves_the_returns_alone() -> None:
    plain, whitened = experience(whiten_advantages=False), experience()
    a = torch.tensor(slow_advantages(0.05, 1.0, 0.95))
    expected = (a - a.mean()) / (a.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(whitened.advantages, expected, atol=1e-5, rtol=0.0)
    assert whitened.returns.equal(plain.returns)
    assert whitened.figures["advantage_std"] == pytest.approx(float(a.std(unbiased=False)), abs=1e-5)
    assert whitened.figures["advantage_mean"] == pytest.approx(float(a.mean()), abs=1e-5)


def test_the_kl_figures_state_their_scale() -> None:
    figures, d = experience().figures, [float(o - r) for o, r in zip(OLD, REF, strict=True)]
    assert figures["kl_per_token"] == pytest.approx(sum(d) / 6, abs=1e-6)
    assert figures["kl_per_sequence"] == pytest.approx(sum(d) / 3, abs=1e-6)
    assert figures["kl_k3_per_token"] == pytest.approx(sum(math.exp(-x) - 1 + x for x in d) / 6, abs=1e-6)


def test_the_reward_of_a_sequence_is_its_score_minus_its_weighted_kl() -> None:
    figures = experience(kl_coef=0.3).figures
    assert figures["reward_per_sequence"] == pytest.approx(sum(SCORES) / 3 - 0.3 * figures["kl_per_sequence"], abs=1e-6)


def test_the_generators_logprobs_weight_the_tokens_and_are_watched() -> None:
    got = experience()
    deltas = [float(o - m) for o, m in zip(OLD, MU, strict=True)]
    assert got.weights.tolist() == pytest.approx([math.exp(d) for d in deltas], abs=1e-6)
    assert got.figures["mean_abs_dlogp"] == pytest.approx(sum(map(abs, deltas)) / 6, abs=1e-6)


def test_the_importance_weights_are_capped() -> None:
    batch = RolloutBatch(SAMPLES, per_sample(OLD - 1.5), per_sample(REF), SCORES)
    config = PpoConfig(mismatch_limit=2.0, tis_cap=1.25)
    assert estimate_experience(batch, OLD, VALUES, config).weights.tolist() == [1.25] * 6


def test_samples_of_another_policy_are_refused_before_any_update() -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        experience(mismatch_limit=1e-3)
    assert caught.value.reason == "LOGPROB_MISMATCH"
    assert caught.value.violations[0].field == "logprobs"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_d1_policy_equal_to_reference_has_a_kl_of_exactly_0_at_step_0(tmp_path: Path, temperature: float) -> None:
    config = PpoConfig(temperature=temperature)
    trainer = new_trainer(write_tiny_llama(tmp_path / "base"), ppo=config)
    batch = score_samples(trainer, random_samples(8), temperature=temperature)
    layout = build_micro_batches(batch.samples, range(8), max_tokens=4096)
    figures = prepare_experience(trainer._model, batch, layout, config).figures
    assert figures["kl_per_token"] == figures["kl_k3_per_token"] == figures["kl_per_sequence"] == 0.0
    assert figures["mean_abs_dlogp"] == 0.0


@pytest.mark.parametrize("adapter", ["policy", "critic"])
def test_weights_that_are_not_finite_stop_the_update_before_the_first_step(tmp_path: Path, adapter: str) -> None:
    trainer = new_trainer(write_tiny_llama(tmp_path / "base"))
    batch = score_samples(trainer, random_samples(4))
    broken = trainer._model.trained_parameters("policy" if adapter == "policy" else "critic")
    with torch.no_grad():
        next(iter(broken.values()))[0, 0] = math.nan
    with pytest.raises(FailedPreconditionError) as caught:
        trainer.update(batch)
    assert caught.value.reason == "NON_FINITE"
    assert trainer._learner.policy.num_steps == trainer._learner.critic.num_steps == 0
