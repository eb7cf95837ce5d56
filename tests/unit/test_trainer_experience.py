"""What a batch teaches, from given log-probabilities and values: rewards, advantages, returns, weights, figures."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, write_tiny_llama
from tether.errors import FailedPreconditionError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Sample
from tether_services.orchestrator.trainer.experience import Experience, estimate_experience, prepare_experience
from tether_services.orchestrator.trainer.plan import plan_epoch
from tether_services.ppo.rewards import Normaliser

LENGTHS = (3, 1, 2)
SAMPLES = [Sample([1], list(range(1, n + 1))) for n in LENGTHS]
OLD = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.2, -3.0])
MU = torch.tensor([-1.01, -2.0, -0.5, -1.49, -0.2, -3.02])
REF = torch.tensor([-1.2, -1.9, -0.7, -1.0, -0.2, -2.5])
VALUES = torch.tensor([0.1, 0.3, -0.2, 0.5, 0.0, 0.4])
SCORES = [1.0, -0.5, 2.0]


def per_sample(flat: torch.Tensor) -> list[list[float]]:
    return [part.tolist() for part in torch.split(flat, list(LENGTHS))]


def new_batch(**changes: Any) -> RolloutBatch:
    facts: dict[str, Any] = {"logprobs": per_sample(MU), "ref_logprobs": per_sample(REF), "scores": SCORES}
    return RolloutBatch(samples=SAMPLES, **(facts | changes))


def experience(batch: RolloutBatch | None = None, **settings: object) -> Experience:
    return estimate_experience(batch or new_batch(), OLD, VALUES, PpoConfig.model_validate(settings))


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


ADVANTAGES_LAST = [0.43675, 0.565, 0.7]
ADVANTAGES_N_PLUS = [0.40065, 0.527, 0.66, 0.8]


@pytest.mark.parametrize(
    ("placement", "limit", "expected"),
    [("last", 4, ADVANTAGES_LAST), ("n_plus", 4, ADVANTAGES_N_PLUS), ("n_plus", 3, ADVANTAGES_LAST)],
)
def test_d16_the_numbers_worked_out_for_both_placements(placement: str, limit: int, expected: list[float]) -> None:
    """A response at the limit has no room for the extra state, and then both placements agree."""
    ppo = PpoConfig.model_validate({"score_placement": placement, "kl_coef": 0.0, "whiten_advantages": False})
    values = torch.tensor([0.5, 0.4, 0.3, 0.2][: len(expected)], dtype=torch.float64)
    old = torch.full((3,), -1.0, dtype=torch.float64)
    facts = [[-1.0] * 3]
    batch = RolloutBatch([Sample([1], [2, 3, 4])], facts, facts, [1.0], max_response_tokens=limit)
    got = estimate_experience(batch, old, values, ppo)
    assert got.advantages.tolist() == pytest.approx(expected[:3], abs=1e-12)
    returns = [a + v for a, v in zip(expected, values.tolist(), strict=True)]
    assert got.returns.tolist() == pytest.approx(returns, abs=1e-12)
    assert got.figures["reward_per_sequence"] == 1.0


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


@pytest.mark.parametrize("placement", ["last", "n_plus"])
def test_the_reward_of_a_sequence_is_its_score_minus_its_weighted_kl(placement: str) -> None:
    values = VALUES if placement == "last" else torch.zeros(6 + 2)
    ppo = PpoConfig.model_validate({"kl_coef": 0.3, "score_placement": placement})
    figures = estimate_experience(new_batch(), OLD, values, ppo).figures
    assert figures["reward_per_sequence"] == pytest.approx(sum(SCORES) / 3 - 0.3 * figures["kl_per_sequence"], abs=1e-6)


def test_d10_a_kl_in_the_loss_is_not_in_the_reward_as_well() -> None:
    figures = experience(kl_coef=0.3, kl_in="loss").figures
    assert figures["reward_per_sequence"] == pytest.approx(sum(SCORES) / 3, abs=1e-6)
    assert figures["kl_coef"] == pytest.approx(0.3)


def mean_score(batch: RolloutBatch, **settings: object) -> float:
    return experience(batch, kl_coef=0.0, **settings).figures["reward_per_sequence"]


@pytest.mark.parametrize(
    ("mode", "value", "changed"), [("none", 1.0, -3.0), ("subtract", 1.0, -4.0), ("replace", -1.0, -1.0)]
)
def test_d12_only_responses_that_were_cut_are_penalised(mode: str, value: float, changed: float) -> None:
    batch = new_batch(scores=[1.0, -3.0, 2.0], stopped=[True, False, True])
    got = mean_score(batch, missing_eos=mode, missing_eos_value=value)
    assert got == pytest.approx((1.0 + changed + 2.0) / 3)


def test_d14_scores_are_clipped_and_the_penalty_comes_after() -> None:
    batch = new_batch(scores=[9.0, -9.0, 0.5], stopped=[True, False, True])
    assert mean_score(batch, score_clip=2.0) == pytest.approx((2.0 - 2.0 + 0.5) / 3)
    penalised = mean_score(batch, score_clip=2.0, missing_eos="subtract", missing_eos_value=3.0)
    assert penalised == pytest.approx((2.0 - 5.0 + 0.5) / 3)


def test_d14_the_kl_is_not_clipped() -> None:
    clipped, free = (experience(kl_coef=50.0, score_clip=limit).figures for limit in (2.0, None))
    assert clipped["reward_per_sequence"] == free["reward_per_sequence"]


def test_d13_the_normaliser_learns_of_every_batch_and_of_raw_scores() -> None:
    normaliser, ppo = Normaliser(), PpoConfig(kl_coef=0.0, score_clip=0.5, normalise_scores=True)
    seen: list[float] = []
    for scores in ([1.0, 5.0, -3.0], [10.0, 10.0, 40.0]):
        seen += scores
        batch = new_batch(scores=scores)
        figures = estimate_experience(batch, OLD, VALUES, ppo, normaliser=normaliser).figures
        mean, deviation = statistics.fmean(seen), math.sqrt(statistics.pvariance(seen) + 1e-8)
        expected = [min(max((s - mean) / deviation, -0.5), 0.5) for s in scores]
        assert figures["reward_per_sequence"] == pytest.approx(sum(expected) / 3, abs=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_baseline"])
def test_d37_a_response_without_siblings_teaches_nothing(kind: str) -> None:
    batch, ppo = new_batch(groups=[5, 5, 6]), PpoConfig.model_validate({"advantage": kind, "whiten_advantages": False})
    got = estimate_experience(batch, OLD, torch.zeros(0), ppo)
    assert got.advantages[4:].tolist() == [0.0, 0.0]
    assert got.advantages[:4].abs().min() > 0.1
    assert got.returns.numel() == got.old_values.numel() == 0


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "reinforce_baseline", "rloo"])
def test_d37_the_tokens_of_a_response_share_its_advantage(kind: str) -> None:
    batch, ppo = new_batch(groups=[5, 5, 5]), PpoConfig.model_validate({"advantage": kind})
    got = per_sample(estimate_experience(batch, OLD, torch.zeros(0), ppo).advantages)
    assert all(len(set(row)) == 1 for row in got)
    assert got[2][0] > got[0][0] > got[1][0]


def test_the_generators_logprobs_weight_the_tokens_and_are_watched() -> None:
    got = experience()
    deltas = [float(o - m) for o, m in zip(OLD, MU, strict=True)]
    assert got.weights.tolist() == pytest.approx([math.exp(d) for d in deltas], abs=1e-6)
    assert got.figures["mean_abs_dlogp"] == pytest.approx(sum(map(abs, deltas)) / 6, abs=1e-6)


def test_the_importance_weights_are_capped() -> None:
    batch = new_batch(logprobs=per_sample(OLD - 1.5))
    assert experience(batch, mismatch_limit=2.0, sampler_high=1.25).weights.tolist() == [1.25] * 6


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
    layouts = plan_epoch(batch, torch.arange(8), config, max_tokens=4096)
    figures = prepare_experience(trainer._model, batch, layouts, config).figures
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
    assert all(optimiser.num_steps == 0 for optimiser in trainer._optimisers.values())
