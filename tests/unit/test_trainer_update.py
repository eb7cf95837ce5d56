from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.unit.tiny_llama import VOCAB_SIZE, new_trainer, random_samples, score_samples, write_tiny_llama
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Sample, Trainer, UpdateReport
from tether_services.orchestrator.trainer.batch import build_micro_batches
from tether_services.orchestrator.trainer.experience import prepare_experience
from tether_services.orchestrator.trainer.model import AdapterName

TRAINED: tuple[AdapterName, ...] = ("policy", "critic")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base")


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in all_parameters(trainer)])


def all_parameters(trainer: Trainer) -> list[torch.nn.Parameter]:
    policy, critic = (trainer._model.trained_parameters(a) for a in TRAINED)
    return [*policy.values(), *critic.values()]


@pytest.mark.parametrize("micro_batch_tokens", [20, 64, 4096])
@pytest.mark.parametrize("minibatches", [1, 3])
def test_d24_ratio_is_exactly_1_in_the_first_minibatch(base: Path, micro_batch_tokens: int, minibatches: int) -> None:
    ppo = PpoConfig(epochs=2, minibatches=minibatches)
    trainer = new_trainer(base, ppo=ppo, micro_batch_tokens=micro_batch_tokens)
    for _ in range(3):
        report = trainer.update(score_samples(trainer, random_samples(11)))
        assert report.first_ratio_deviation == 0.0
        assert report.ratio_max > 1.0


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
    # Everything in it is a plain finite number.
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()


def gradients_of_one_step(trainer: Trainer, batch: RolloutBatch, max_tokens: int) -> tuple[Tensor, float, float]:
    """Both gradients of one optimiser step over the whole batch, and both losses, in micro-batches of `max_tokens`."""
    layout = build_micro_batches(batch.samples, range(len(batch.samples)), max_tokens=10_000)
    experience = prepare_experience(trainer._model, batch, layout, trainer._ppo)
    # Moved away from the first step, where ratio is 1 and the value error unclipped for every token.
    experience = replace(experience, old_logprobs=experience.old_logprobs + 0.3, old_values=experience.old_values - 0.3)
    minibatch = build_micro_batches(batch.samples, range(len(batch.samples)), max_tokens=max_tokens)
    assert (len(minibatch) == 1) == (max_tokens == 10_000)
    learner = trainer._learner
    policy_loss, _ = learner.accumulate_policy(experience, minibatch)
    value_loss = learner.accumulate_critic(experience, minibatch)
    gradient = torch.cat([p.grad.flatten().clone() for p in all_parameters(trainer) if p.grad is not None])
    learner.policy.clear()
    learner.critic.clear()
    return gradient, policy_loss, value_loss


@pytest.mark.parametrize("max_tokens", [1, 30, 50])
def test_d21_micro_batches_give_the_gradient_of_one_large_batch(base: Path, max_tokens: int) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(epochs=1))
    trainer.update(score_samples(trainer, random_samples(12, seed=1)))
    batch = score_samples(trainer, random_samples(12))
    whole, *whole_losses = gradients_of_one_step(trainer, batch, 10_000)
    split, *split_losses = gradients_of_one_step(trainer, batch, max_tokens)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-4)
    assert split_losses == pytest.approx(whole_losses, rel=1e-4)


def test_d21_the_policy_gradient_at_ratio_1_is_that_of_the_weighted_logprobs(base: Path) -> None:
    trainer = new_trainer(base)
    batch = score_samples(trainer, random_samples(6))
    layout = build_micro_batches(batch.samples, range(6), max_tokens=10_000)
    experience = prepare_experience(trainer._model, batch, layout, trainer._ppo)
    trainer._learner.accumulate_policy(experience, layout)
    policy = PeftModelOfTrainer(trainer)
    logprobs = torch.cat([policy.logprobs(sample) for sample in batch.samples])
    expected = torch.autograd.grad(-(experience.advantages * logprobs).mean(), policy.parameters())
    for parameter, gradient in zip(policy.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


class PeftModelOfTrainer:
    """The policy through the whole transformers model, one unpadded sample at a time."""

    def __init__(self, trainer: Trainer) -> None:
        self._model = trainer._model

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._model.adapter_parameters("policy").values())

    def logprobs(self, sample: Sample) -> Tensor:
        text = torch.tensor([[*sample.prompt_token_ids, *sample.response_token_ids]])
        first = len(sample.prompt_token_ids)
        with self._model.using("policy"):
            logits: Tensor = self._model._peft(input_ids=text).logits[0, first - 1 : -1]
        return torch.log_softmax(logits, -1).gather(-1, text[0, first:, None]).squeeze(-1)


def test_importance_weights_scale_the_policy_gradient_and_leave_the_critic_alone(base: Path) -> None:
    trainer = new_trainer(base)
    batch = score_samples(trainer, random_samples(6))
    layout = build_micro_batches(batch.samples, range(6), max_tokens=10_000)
    experience = prepare_experience(trainer._model, batch, layout, trainer._ppo)
    halved = replace(experience, weights=experience.weights / 2)
    gradients = []
    for current in (experience, halved):
        trainer._learner.accumulate_policy(current, layout)
        trainer._learner.accumulate_critic(current, layout)
        norms = [squared_norm(trainer, adapter) for adapter in TRAINED]
        gradients.append(norms)
        trainer._learner.policy.clear()
        trainer._learner.critic.clear()
    assert gradients[1][0] == pytest.approx(gradients[0][0] / 4, rel=1e-4)
    assert gradients[1][1] == pytest.approx(gradients[0][1], rel=1e-6)
    assert gradients[0][0] > 0.0


def squared_norm(trainer: Trainer, adapter: AdapterName) -> float:
    gradients = [p.grad for p in trainer._model.trained_parameters(adapter).values() if p.grad is not None]
    return float(torch.stack([(gradient**2).sum() for gradient in gradients]).sum())


def test_each_network_learns_from_its_own_loss_only(base: Path) -> None:
    trainer = new_trainer(base)
    batch = score_samples(trainer, random_samples(6))
    layout = build_micro_batches(batch.samples, range(6), max_tokens=10_000)
    experience = prepare_experience(trainer._model, batch, layout, trainer._ppo)
    trainer._learner.accumulate_policy(experience, layout)
    assert all(p.grad is None for p in trainer._model.trained_parameters("critic").values())
    trainer._learner.policy.clear()
    trainer._learner.accumulate_critic(experience, layout)
    assert all(p.grad is None for p in trainer._model.trained_parameters("policy").values())


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
    assert trainer._learner.policy.num_steps == trainer._learner.critic.num_steps == trainer.num_updates == 0
    # The failed step leaves nothing behind that the next one would pick up.
    trainer.update(score_samples(trainer, random_samples(4)))
    fresh = new_trainer(base)
    fresh._generator.set_state(torch.Generator().manual_seed(0).get_state())
    fresh.update(score_samples(fresh, random_samples(4)))
    assert weights(trainer).equal(weights(fresh))


def test_fewer_samples_than_minibatches_are_refused(base: Path) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(minibatches=5))
    with pytest.raises(InvalidArgumentError) as caught:
        trainer.update(score_samples(trainer, random_samples(4)))
    assert caught.value.violations[0].field == "ppo.minibatches"


def test_an_update_past_the_end_of_the_schedule_is_refused(base: Path) -> None:
    trainer = new_trainer(base, total_steps=1)
    trainer.update(score_samples(trainer, random_samples(4)))
    with pytest.raises(FailedPreconditionError) as caught:
        trainer.update(score_samples(trainer, random_samples(4)))
    assert caught.value.reason == "SCHEDULE_ENDED"


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
    """Twelve steps of sampling and PPO; the score counts the response tokens divisible by 4, of 8."""
    ppo = PpoConfig(epochs=4, minibatches=2, kl_coef=kl_coef)
    trainer = new_trainer(base, ppo=ppo, total_steps=12, learning_rate=3e-2, critic_learning_rate=1e-2)
    generator, reports = torch.Generator().manual_seed(0), []
    for step in range(12):
        exported = trainer.export_adapter(folder / str(step), policy_version=step + 1)
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported.directory).eval()
        samples = sample_responses(policy, [[1, 3 + i % 8] for i in range(96)], generator)
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
