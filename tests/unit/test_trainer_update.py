from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.unit.tiny_llama import (
    VOCAB_SIZE,
    new_trainer,
    random_samples,
    randomise_adapters,
    score_samples,
    weights_of,
    write_tiny_llama,
)
from tests.unit.trainer_by_hand import logprobs_of
from tether.errors import FailedPreconditionError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import Sample, Trainer, UpdateReport


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base")


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in weights_of(trainer).values()])


@pytest.mark.parametrize("micro_batch_tokens", [20, 4096])
@pytest.mark.parametrize("minibatches", [1, 3])
def test_d24_ratio_is_exactly_1_in_the_first_minibatch(base: Path, micro_batch_tokens: int, minibatches: int) -> None:
    ppo = PpoConfig(epochs=2, minibatches=minibatches)
    trainer = new_trainer(base, ppo=ppo, micro_batch_tokens=micro_batch_tokens)
    for _ in range(2):
        report = trainer.update(score_samples(trainer, random_samples(11)))
        assert report.first_ratio_deviation == 0.0
        assert report.ratio_max > 1.0


@pytest.mark.parametrize(
    ("advantage", "aggregation"),
    [
        ("gae", "sequence_mean"),
        ("gae", "token_sum"),
        ("grpo", "token_mean"),
        ("dr_grpo", "token_sum"),
        ("rloo", "sequence_mean"),
        ("reinforce_baseline", "token_mean"),
    ],
)
def test_d24_ratio_is_exactly_1_for_every_estimator_and_aggregation(
    base: Path, advantage: str, aggregation: str
) -> None:
    settings = {"advantage": advantage, "aggregation": aggregation, "epochs": 1, "minibatches": 2}
    trainer = randomise_adapters(new_trainer(base, ppo=PpoConfig.model_validate(settings), micro_batch_tokens=20))
    batch = replace(score_samples(trainer, random_samples(8)), groups=[0, 1, 2, 3] * 2)
    report = trainer.update(batch)
    assert report.first_ratio_deviation == 0.0
    assert report.ratio_max > 1.0


@pytest.mark.parametrize("settings", [{"entropy_coef": 0.1}, {"kl_in": "loss"}, {"score_placement": "n_plus"}])
def test_d24_no_other_loss_disturbs_the_first_ratio(base: Path, settings: dict[str, object]) -> None:
    ppo = PpoConfig.model_validate({"epochs": 2} | settings)
    trainer = randomise_adapters(new_trainer(base, ppo=ppo, micro_batch_tokens=20))
    assert trainer.update(score_samples(trainer, random_samples(8))).first_ratio_deviation == 0.0


def test_d24_one_epoch_of_one_minibatch_has_nothing_to_clip(base: Path) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(epochs=1))
    report = trainer.update(score_samples(trainer, random_samples(11)))
    assert (report.approx_kl, report.clip_fraction, report.ratio_max) == (0.0, 0.0, 1.0)


def test_the_report_says_what_the_update_did(base: Path) -> None:
    ppo = PpoConfig(epochs=3, minibatches=2)
    trainer, samples = new_trainer(base, ppo=ppo, critic_learning_rate=2e-2), random_samples(10)
    report = trainer.update(score_samples(trainer, samples))
    assert report.num_samples == 10
    assert report.num_tokens == sum(len(s.response_token_ids) for s in samples)
    assert report.num_optimizer_steps == 6
    # Ten updates of six steps: the sixth step has a rate of 55 sixtieths.
    assert report.policy_learning_rate == pytest.approx(1e-2 * 55 / 60)
    assert report.critic_learning_rate == pytest.approx(2e-2 * 55 / 60)
    assert report.kl_per_token == report.kl_per_sequence == 0.0
    assert 0.0 < report.entropy <= math.log(VOCAB_SIZE)
    assert report.policy_grad_norm > 0.0
    assert report.critic_grad_norm > 0.0
    assert report.explained_variance < 1.0
    assert trainer.num_updates == 1
    # Parts that are off have no figures; everything else is a finite number.
    absent = {name for name, value in report.as_dict().items() if math.isnan(value)}
    assert absent == {"kl_loss", "entropy_bonus", "ptx_loss", "ptx_grad_norm", "ppo_grad_norm"}
    assert all(math.isfinite(value) for name, value in report.as_dict().items() if name not in absent)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_d26_the_entropy_is_reported_in_nats_as_a_mean_over_tokens(base: Path, entropy_coef: float) -> None:
    ppo = PpoConfig(epochs=1, temperature=0.7, entropy_coef=entropy_coef)
    trainer = randomise_adapters(new_trainer(base, ppo=ppo))
    samples = random_samples(4)
    with torch.no_grad():
        expected = torch.cat([logprobs_of(trainer._model, sample, ppo)[1] for sample in samples]).mean()
    report = trainer.update(score_samples(trainer, samples, temperature=0.7))
    assert report.entropy == pytest.approx(float(expected), abs=1e-5)
    if entropy_coef:
        assert report.entropy_bonus == pytest.approx(float(expected), abs=1e-5)


def test_the_same_seed_and_batches_give_the_same_weights_bit_for_bit(base: Path) -> None:
    results = []
    for _ in range(2):
        trainer = new_trainer(base, ppo=PpoConfig(epochs=2, minibatches=2), seed=5)
        for step in range(2):
            trainer.update(score_samples(trainer, random_samples(8, seed=step)))
        results.append(weights(trainer))
    assert results[0].equal(results[1])


def test_a_loss_that_is_not_finite_takes_no_step_at_all(base: Path) -> None:
    trainer = new_trainer(base)
    before = weights(trainer)
    batch = score_samples(trainer, random_samples(4), scores=[1e30, -1e30, 1e30, 0.0])
    with pytest.raises(FailedPreconditionError) as caught:
        trainer.update(batch)
    assert caught.value.reason == "NON_FINITE"
    assert caught.value.violations[0].field == "value_loss"
    assert weights(trainer).equal(before)
    assert {o.num_steps for o in trainer._optimisers.values()} == {trainer.num_updates} == {0}
    # The failed step leaves nothing behind that the next one would pick up.
    trainer.update(score_samples(trainer, random_samples(4)))
    fresh = new_trainer(base)
    fresh.update(score_samples(fresh, random_samples(4)))
    assert weights(trainer).equal(weights(fresh))


def test_fewer_samples_than_minibatches_make_as_many_steps_as_samples(base: Path) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(epochs=2, minibatches=5))
    report = trainer.update(score_samples(trainer, random_samples(4)))
    assert report.num_optimizer_steps == 8


def test_the_critic_learns_to_explain_the_returns(base: Path) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(kl_coef=0.0, value_clip_range=10.0), schedule="constant")
    samples = random_samples(24)
    batch = score_samples(trainer, samples, scores=[float(s.prompt_token_ids[-1] % 2) for s in samples])
    explained = []
    for _ in range(12):
        # The same rollouts again: the generator's logprobs follow the policy, which is not under test here.
        batch = score_samples(trainer, samples, scores=batch.scores)
        explained.append(trainer.update(batch).explained_variance)
    assert explained[0] < 0.2
    assert explained[-1] > 0.8


def sample_responses(policy: PeftModel, prompts: Sequence[Sequence[int]], generator: torch.Generator) -> list[Sample]:
    """Eight tokens after each prompt, drawn from the policy by a full forward pass each."""
    text = torch.tensor(prompts)
    for _ in range(8):
        with torch.no_grad():
            probabilities = policy(input_ids=text, use_cache=False).logits[:, -1].softmax(-1)
        text = torch.cat([text, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    width = len(prompts[0])
    return [Sample(row[:width], row[width:]) for row in text.tolist()]


def train_to_count_tokens(base: Path, folder: Path, *, kl_coef: float) -> list[UpdateReport]:
    """Eight steps of sampling and PPO; the score counts the response tokens divisible by 4, of 8."""
    ppo = PpoConfig(epochs=4, minibatches=2, kl_coef=kl_coef)
    trainer = new_trainer(
        base, ppo=ppo, total_steps=8, learning_rate=3e-2, critic_learning_rate=1e-2, schedule="constant"
    )
    generator, reports = torch.Generator().manual_seed(0), []
    for step in range(8):
        exported = trainer.export_adapter(folder / str(step), policy_version=step + 1)
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported.directory).eval()
        samples = sample_responses(policy, [[1, 3 + i % 8] for i in range(64)], generator)
        scores = [float(sum(t % 4 == 0 for t in s.response_token_ids)) for s in samples]
        batch = score_samples(trainer, samples, scores=scores)
        reports.append(trainer.update(batch))
    return reports


def test_ppo_raises_the_score_and_the_leash_holds_the_kl(base: Path, tmp_path: Path) -> None:
    free, leashed = (train_to_count_tokens(base, tmp_path / str(k), kl_coef=k) for k in (0.0, 0.1))
    for reports in (free, leashed):
        # Chance is a quarter of eight tokens.
        assert reports[0].score_mean == pytest.approx(2.0, abs=0.5)
        assert reports[-1].score_mean > 5.0
        assert reports[0].kl_per_sequence == 0.0
    assert 0.0 < leashed[-1].kl_per_sequence < 0.9 * free[-1].kl_per_sequence
