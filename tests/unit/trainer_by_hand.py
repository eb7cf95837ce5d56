"""A PPO update written out by hand: one sample at a time, full logits, no padding, loops and closed forms.

Nothing of `tether_services.ppo` is used here. Every setting of the algorithm has its own few lines.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Sample
from tether_services.orchestrator.trainer.model import AdapterName, SharedModel


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one sample, before the first step: [n] over its response tokens, [m] over its values."""

    old: Tensor
    ref: Tensor
    advantages: Tensor
    weights: Tensor
    values: Tensor
    returns: Tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an update needs beside the model and the batch."""

    ppo: PpoConfig
    rates: dict[str, float]
    """Learning rate of each adapter."""
    factors: Sequence[float]
    """What the rates are multiplied with, one factor for each optimiser step."""
    max_norm: float
    seed: int
    pretraining: Sequence[Sequence[int]] = ()

    @property
    def adapters(self) -> tuple[AdapterName, ...]:
        """The adapters that learn."""
        return ("policy", "critic") if self.ppo.advantage == "gae" else ("policy",)


def read(model: SharedModel, adapter: AdapterName, token_ids: Sequence[int]) -> Tensor:
    """Return [L, V] logits or, of the critic, [L, h] last hidden states of one unpadded sequence."""
    is_critic = adapter == "critic"
    with model.using(adapter):
        output = model._peft(input_ids=torch.tensor([list(token_ids)]), output_hidden_states=is_critic)
    found: Tensor = output.hidden_states[-1][0] if is_critic else output.logits[0]
    return found


def tokens_of(sample: Sample) -> tuple[list[int], int]:
    """Return all token ids of a sample and the length of its prompt."""
    return [*sample.prompt_token_ids, *sample.response_token_ids], len(sample.prompt_token_ids)


def logprobs_of(model: SharedModel, sample: Sample, ppo: PpoConfig) -> tuple[Tensor, Tensor]:
    """Return [n] log-probabilities of the response under the policy, and [n] entropies."""
    ids, ctx = tokens_of(sample)
    logits = read(model, "policy", ids) / ppo.temperature
    rows = [torch.log_softmax(logits[t - 1], -1) for t in range(ctx, len(ids))]
    logprobs = [row[ids[ctx + t]] for t, row in enumerate(rows)]
    return torch.stack(logprobs), torch.stack([-(row.exp() * row).sum() for row in rows])


def values_of(model: SharedModel, sample: Sample, num_values: int) -> Tensor:
    """Return the values of the state before each response token, and of the one after the last where asked for."""
    ids, ctx = tokens_of(sample)
    hidden = read(model, "critic", ids)
    return torch.stack([model.value_head(hidden[ctx - 1 + k])[0] for k in range(num_values)])


def num_values(sample: Sample, batch: RolloutBatch, ppo: PpoConfig) -> int:
    """Return how many values a response has."""
    length, limit = len(sample.response_token_ids), batch.response_limit
    return length + 1 if ppo.score_placement == "n_plus" and length < limit else length


def scores_of(batch: RolloutBatch, ppo: PpoConfig) -> list[float]:
    """Return the scores, normalised by the batch's own moments, clipped and penalised."""
    scores = list(batch.scores)
    if ppo.normalise_scores:
        mean, deviation = statistics.fmean(scores), math.sqrt(statistics.pvariance(scores) + 1e-8)
        scores = [(s - mean) / deviation for s in scores]
    if ppo.score_clip is not None:
        scores = [min(max(s, -ppo.score_clip), ppo.score_clip) for s in scores]
    for i, ended in enumerate(batch.has_eos()):
        if not ended and ppo.missing_eos == "subtract":
            scores[i] -= ppo.missing_eos_value
        if not ended and ppo.missing_eos == "replace":
            scores[i] = ppo.missing_eos_value
    return scores


def discounted(rewards: Sequence[float], values: Sequence[float], ppo: PpoConfig) -> list[float]:
    """Return the generalised advantages, each as its own sum over the rest of the response."""
    following = [*values[1:], 0.0]
    deltas = [r + ppo.gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((ppo.gamma * ppo.lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def compared(totals: Sequence[float], groups: Sequence[int], ppo: PpoConfig) -> list[float]:
    """Return the advantage of each response over the others to its prompt."""
    result = []
    for i, total in enumerate(totals):
        others = [r for j, r in enumerate(totals) if groups[j] == groups[i] and j != i]
        if not others:
            result.append(0.0)
        elif ppo.advantage == "rloo":
            result.append(total - statistics.fmean(others))
        else:
            centred = total - statistics.fmean([total, *others])
            scale = statistics.stdev([total, *others]) + 1e-6 if ppo.advantage == "grpo" else 1.0
            result.append(centred / scale)
    return result


def weights_of(deltas: Sequence[float], ppo: PpoConfig, low: float, high: float) -> list[float]:
    """Return the weights of the sampler correction for the tokens of one response."""
    ratios = [math.exp(d) for d in deltas]
    if ppo.sampler_correction == "none":
        return [1.0] * len(ratios)
    if ppo.sampler_correction == "token_tis":
        return [min(max(r, low), high) for r in ratios]
    if ppo.sampler_correction == "icepop":
        return [r if low <= r <= high else 0.0 for r in ratios]
    if ppo.sampler_correction == "token_mask":
        return [1.0 if low <= r <= high else 0.0 for r in ratios]
    mean = math.prod(ratios) ** (1.0 / len(ratios))
    return [1.0 if low <= mean <= high else 0.0] * len(ratios)


def whiten(rows: Sequence[Sequence[float]], *, keep_mean: bool) -> list[list[float]]:
    """Return the rows scaled to variance 1 by the moments of all of them together."""
    every = [x for row in rows for x in row]
    mean, deviation = statistics.fmean(every), math.sqrt(statistics.pvariance(every) + 1e-8)
    return [[(x - mean) / deviation + (mean if keep_mean else 0.0) for x in row] for row in rows]


@torch.no_grad()
def facts_of(model: SharedModel, batch: RolloutBatch, ppo: PpoConfig, sampler: tuple[float, float]) -> list[Facts]:
    """Return what is known of each sample before the first step; `sampler` is the range of the correction."""
    samples, refs = batch.samples, batch.ref_logprobs
    old = [logprobs_of(model, sample, ppo)[0].tolist() for sample in samples]
    counts = [num_values(sample, batch, ppo) for sample in samples]
    in_reward = ppo.first_kl_coef if ppo.kl_in == "reward" else 0.0
    rewards = []
    for row, ref, score, count in zip(old, refs, scores_of(batch, ppo), counts, strict=True):
        penalties = [-in_reward * (o - r) for o, r in zip(row, ref, strict=True)] + [0.0] * (count - len(row))
        rewards.append([*penalties[:-1], penalties[-1] + score])
    values: list[list[float]] = [[] for _ in samples]
    if ppo.advantage == "gae":
        values = [values_of(model, s, n).tolist() for s, n in zip(samples, counts, strict=True)]
        rewards = whiten(rewards, keep_mean=True) if ppo.whiten_rewards else rewards
        advantages = [discounted(r, v, ppo) for r, v in zip(rewards, values, strict=True)]
    else:
        totals = compared([sum(row) for row in rewards], batch.group_ids(), ppo)
        advantages = [[a] * len(row) for a, row in zip(totals, old, strict=True)]
    returns = [[a + v for a, v in zip(*pair, strict=False)] for pair in zip(advantages, values, strict=True)]
    learned = [a[: len(row)] for a, row in zip(advantages, old, strict=True)]
    if ppo.whiten_advantages or (ppo.whiten_advantages is None and ppo.advantage in ("gae", "reinforce_baseline")):
        learned = whiten(learned, keep_mean=False)
    deltas = [[o - m for o, m in zip(*pair, strict=True)] for pair in zip(old, batch.logprobs, strict=True)]
    weights = [weights_of(row, ppo, *sampler) for row in deltas]
    columns = (old, refs, learned, weights, values, returns)
    return [Facts(*(torch.tensor(row, dtype=torch.float64) for row in rows)) for rows in zip(*columns, strict=True)]


def policy_losses(model: SharedModel, sample: Sample, known: Facts, ppo: PpoConfig) -> Tensor:
    """Return [n] losses of the tokens, the entropy bonus and the KL loss included."""
    new, entropies = logprobs_of(model, sample, ppo)
    ratio, high = (new - known.old).exp(), ppo.clip_range_high or ppo.clip_range
    gain = torch.where(
        known.advantages >= 0.0,
        ratio.clamp(max=1.0 + high),
        ratio.clamp(min=1.0 - ppo.clip_range, max=ppo.dual_clip),
    )
    losses = -known.weights * known.advantages * gain - ppo.entropy_coef * entropies
    if ppo.kl_in == "loss":
        # The gradient of the KL to the reference: d times that of the log-probability.
        losses = losses + ppo.first_kl_coef * (new - known.ref).detach() * new
    return losses


def critic_losses(model: SharedModel, sample: Sample, known: Facts, ppo: PpoConfig) -> Tensor:
    """Return [m] losses of the values."""
    values = values_of(model, sample, len(known.values))
    low, high = known.values - ppo.value_clip_range, known.values + ppo.value_clip_range
    clipped = torch.minimum(torch.maximum(values, low), high)
    return 0.5 * torch.maximum((values - known.returns) ** 2, (clipped - known.returns) ** 2)


def combine(rows: Sequence[Tensor], ppo: PpoConfig, *, limit: int) -> Tensor:
    """Return the losses of all tokens of an optimiser step as one number."""
    if ppo.aggregation == "sequence_mean":
        return torch.stack([row.mean() for row in rows]).mean()
    total = torch.stack([row.sum() for row in rows]).sum()
    return total / (len(rows) * limit if ppo.aggregation == "token_sum" else sum(len(row) for row in rows))


def pretraining_loss(model: SharedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean loss of the next token over the tokens of all rows, at temperature 1."""
    losses = [cross_entropy(read(model, "policy", row)[:-1], torch.tensor(row[1:]), reduction="none") for row in rows]
    return torch.cat(losses).mean()


def loss_of(model: SharedModel, adapter: AdapterName, batch: RolloutBatch, rows: Sequence[int], step: Step) -> Tensor:
    """Return the whole loss of one adapter in one optimiser step over the samples `rows`."""
    ppo = step.ppo
    if adapter == "critic":
        losses = [critic_losses(model, batch.samples[i], step.facts[i], ppo) for i in rows]
        return torch.cat(losses).mean()
    losses = [policy_losses(model, batch.samples[i], step.facts[i], ppo) for i in rows]
    loss = combine(losses, ppo, limit=batch.response_limit)
    return loss + ppo.ptx_coef * pretraining_loss(model, step.text) if step.text else loss


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimiser step is made of."""

    ppo: PpoConfig
    facts: Sequence[Facts]
    text: Sequence[Sequence[int]]


def texts_of(recipe: Recipe, num_steps: int) -> list[Sequence[Sequence[int]]]:
    """Return the pretraining rows of each optimiser step."""
    if not recipe.ppo.ptx_coef:
        return [()] * num_steps
    bounds = [len(recipe.pretraining) * k // num_steps for k in range(num_steps + 1)]
    return [recipe.pretraining[a:b] for a, b in pairwise(bounds)]


def train_by_hand(model: SharedModel, batch: RolloutBatch, recipe: Recipe, *, sampler: tuple[float, float]) -> None:
    """Take all optimiser steps of one update; a model in float64 gives them in float64."""
    ppo, facts = recipe.ppo, facts_of(model, batch, recipe.ppo, sampler)
    generator = torch.Generator().manual_seed(recipe.seed)
    orders = [torch.randperm(len(facts), generator=generator) for _ in range(ppo.epochs)]
    parts = [part.tolist() for order in orders for part in order.tensor_split(ppo.minibatches)]
    parameters = {name: list(model.trained_parameters(name).values()) for name in recipe.adapters}
    optimisers = {
        name: torch.optim.AdamW(p, lr=1.0, eps=1e-5, weight_decay=0.0, foreach=False) for name, p in parameters.items()
    }
    for rows, text, factor in zip(parts, texts_of(recipe, len(parts)), recipe.factors, strict=True):
        step = Step(ppo, facts, text)
        for name in recipe.adapters:
            gradients = torch.autograd.grad(loss_of(model, name, batch, rows, step), parameters[name])
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
            for parameter, gradient in zip(parameters[name], gradients, strict=True):
                parameter.grad = gradient * (recipe.max_norm / norm if norm > recipe.max_norm else 1.0)
            optimisers[name].param_groups[0]["lr"] = recipe.rates[name] * factor
            optimisers[name].step()
