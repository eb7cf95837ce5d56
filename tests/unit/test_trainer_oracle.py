"""A whole update against one written out by hand: one sample at a time, full logits, no padding, loops over tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.unit.tiny_llama import new_trainer, random_samples, write_tiny_llama
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Sample, Trainer
from tether_services.orchestrator.trainer.model import AdapterName, SharedModel

PPO = PpoConfig(
    epochs=2,
    minibatches=2,
    temperature=0.7,
    kl_coef=0.3,
    gamma=0.97,
    lam=0.9,
    clip_range=0.1,
    value_clip_range=0.05,
    tis_cap=1.5,
    mismatch_limit=5.0,
)
ADAPTERS: tuple[AdapterName, AdapterName] = ("policy", "critic")
RATES = {"policy": 5e-3, "critic": 2e-3}
MAX_NORM, TOTAL_STEPS, SEED = 0.05, 5, 3


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one sample, before the first step; each [n]."""

    old: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor


def logprobs_of(model: SharedModel, sample: Sample, adapter: AdapterName) -> Tensor:
    ids, ctx = [*sample.prompt_token_ids, *sample.response_token_ids], len(sample.prompt_token_ids)
    with model.using(adapter):
        logits = model._peft(input_ids=torch.tensor([ids])).logits[0] / PPO.temperature
    return torch.stack([torch.log_softmax(logits[t - 1], -1)[ids[t]] for t in range(ctx, len(ids))])


def values_of(model: SharedModel, sample: Sample) -> Tensor:
    ids, ctx = [*sample.prompt_token_ids, *sample.response_token_ids], len(sample.prompt_token_ids)
    with model.using("critic"):
        hidden = model._peft(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    return torch.stack([model.value_head(hidden[t - 1])[0] for t in range(ctx, len(ids))])


@torch.no_grad()
def facts_of(model: SharedModel, batch: RolloutBatch) -> list[Facts]:
    found = []
    for sample, mu, ref, score in zip(batch.samples, batch.logprobs, batch.ref_logprobs, batch.scores, strict=True):
        old, values = logprobs_of(model, sample, "policy"), values_of(model, sample)
        rewards = [-PPO.kl_coef * float(old[t] - ref[t]) for t in range(len(old))]
        rewards[-1] += score
        advantages, running, following = [0.0] * len(old), 0.0, 0.0
        for t in reversed(range(len(old))):
            running = rewards[t] + PPO.gamma * following - float(values[t]) + PPO.gamma * PPO.lam * running
            advantages[t], following = running, float(values[t])
        raw = torch.tensor(advantages)
        weights = (old - torch.tensor(mu)).exp().clamp(max=PPO.tis_cap)
        found.append(Facts(old, values, raw, raw + values, weights))
    return found


def policy_loss(model: SharedModel, sample: Sample, known: Facts, advantages: Tensor) -> Tensor:
    ratio = (logprobs_of(model, sample, "policy") - known.old).exp()
    bounded = ratio.clamp(1.0 - PPO.clip_range, 1.0 + PPO.clip_range)
    return -(known.weights * torch.minimum(advantages * ratio, advantages * bounded)).sum()


def critic_loss(model: SharedModel, sample: Sample, known: Facts, _: Tensor) -> Tensor:
    values = values_of(model, sample)
    clipped = known.values + (values - known.values).clamp(-PPO.value_clip_range, PPO.value_clip_range)
    return 0.5 * torch.maximum((values - known.returns) ** 2, (clipped - known.returns) ** 2).sum()


def train_by_hand(model: SharedModel, batch: RolloutBatch) -> None:
    facts = facts_of(model, batch)
    every = torch.cat([f.advantages for f in facts])
    mean, scale = every.mean(), 1.0 / math.sqrt(float(((every - every.mean()) ** 2).mean()) + 1e-8)
    generator = torch.Generator().manual_seed(SEED)
    orders = [torch.randperm(len(facts), generator=generator) for _ in range(PPO.epochs)]
    parameters = {name: list(model.trained_parameters(name).values()) for name in ADAPTERS}
    optimisers = {name: torch.optim.AdamW(parameters[name], lr=1.0, eps=1e-5, weight_decay=0.0) for name in ADAPTERS}
    for step, rows in enumerate(part.tolist() for order in orders for part in order.tensor_split(PPO.minibatches)):
        count = sum(len(facts[i].old) for i in rows)
        for name, loss_of in ((ADAPTERS[0], policy_loss), (ADAPTERS[1], critic_loss)):
            losses = [loss_of(model, batch.samples[i], facts[i], (facts[i].advantages - mean) * scale) for i in rows]
            gradients = torch.autograd.grad(torch.stack(losses).sum() / count, parameters[name])
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
            for parameter, gradient in zip(parameters[name], gradients, strict=True):
                parameter.grad = gradient * min(1.0, MAX_NORM / norm)
            decay = 1.0 - step / (TOTAL_STEPS * PPO.epochs * PPO.minibatches)
            optimisers[name].param_groups[0]["lr"] = RATES[name] * decay
            optimisers[name].step()


@torch.no_grad()
def prepared_trainer(base: Path) -> Trainer:
    """Return a trainer whose adapters are no identity, so that policy, critic and reference all differ."""
    rates = {"learning_rate": RATES["policy"], "critic_learning_rate": RATES["critic"]}
    shape = {"micro_batch_tokens": 24, "max_grad_norm": MAX_NORM, "seed": SEED}
    trainer = new_trainer(base, total_steps=TOTAL_STEPS, ppo=PPO, **rates, **shape)
    generator = torch.Generator().manual_seed(9)
    for name in ADAPTERS:
        for parameter in trainer._model.adapter_parameters(name).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer


def test_an_update_is_the_one_that_the_formulas_give(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", seed=1)
    trainer, by_hand = prepared_trainer(base), prepared_trainer(base)
    samples, generator = random_samples(7), torch.Generator().manual_seed(2)
    policy = trainer.compute_logprobs(samples, adapter="policy", temperature=PPO.temperature)
    reference = trainer.compute_logprobs(samples, adapter="reference", temperature=PPO.temperature)
    noisy = [(row + 0.3 * torch.randn(row.shape, generator=generator)).tolist() for row in policy]
    batch = RolloutBatch(samples, noisy, [row.tolist() for row in reference], [0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 3.0])
    report = trainer.update(batch)
    train_by_hand(by_hand._model, batch)
    assert 0.1 < report.clip_fraction < 0.9, "both sides of the clip take part"
    for name in ADAPTERS:
        got, start = trainer._model.trained_parameters(name), prepared_trainer(base)._model.trained_parameters(name)
        for key, expected in by_hand._model.trained_parameters(name).items():
            assert (expected - start[key]).abs().max() > 1e-4
            torch.testing.assert_close(got[key], expected, atol=2e-6, rtol=0)
