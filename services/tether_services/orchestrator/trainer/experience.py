"""What a rollout batch teaches: old log-probabilities, values, rewards, advantages and returns, computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tether.errors import FailedPreconditionError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer.batch import MicroBatch, RolloutBatch, Sample, response_lengths, value_samples
from tether_services.orchestrator.trainer.forward import gather_flat, response_logprobs_and_entropies, response_values
from tether_services.orchestrator.trainer.model import SharedModel
from tether_services.ppo.advantages import compute_returns, estimate_advantages, group_advantages
from tether_services.ppo.kl import estimate_kl
from tether_services.ppo.mismatch import mismatch_metrics, sampler_weights
from tether_services.ppo.rewards import Normaliser, clip_scores, penalise_missing_eos, shape_rewards
from tether_services.ppo.statistics import (
    explained_variance,
    masked_mean,
    masked_var,
    masked_whiten,
    response_mask,
)

__all__ = ["Experience", "Layout", "estimate_experience", "prepare_experience"]


_ROUNDING = 1e-4
"""Relative difference of two weights that is no more than rounding."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Samples in micro-batches, as policy and critic read them."""

    policy: Sequence[MicroBatch]
    critic: Sequence[MicroBatch]
    """Empty without a critic; the very same as those of the policy unless scores are placed by `n_plus`."""


@dataclass(frozen=True, slots=True)
class Experience:
    """What a rollout batch teaches, fixed over all epochs.

    Tensors of the policy are [N] over the response tokens of the batch, those of the critic [M] over its values; M = N
    unless scores are placed by `n_plus`, and 0 without a critic.

    Example: two responses of 2 and 1 tokens give tensors of 3 entries, the first response's first.
    """

    old_logprobs: Tensor
    """[N] of the policy before the first optimiser step."""
    ref_logprobs: Tensor
    """[N] of the reference."""
    advantages: Tensor
    """[N], whitened over the batch where the configuration says so."""
    weights: Tensor
    """[N] weights of the sampler correction."""
    old_values: Tensor
    """[M] of the critic before the first optimiser step."""
    returns: Tensor
    """[M] targets of the critic, from the advantages before whitening."""
    figures: dict[str, float]
    """Monitoring figures of the batch, by their name in the update report."""

    def to(self, device: str) -> Experience:
        """Return the same experience with its tensors on `device`."""
        names = ("old_logprobs", "ref_logprobs", "advantages", "weights", "old_values", "returns")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def prepare_experience(
    model: SharedModel,
    batch: RolloutBatch,
    layouts: Sequence[Layout],
    config: PpoConfig,
    *,
    kl_coef: float | None = None,
    normaliser: Normaliser | None = None,
) -> Experience:
    """Return the experience of a batch, on the model's device.

    Args:
        model: Policy and critic before the first optimiser step.
        batch: The scored samples.
        layouts: All of them in the micro-batches of the first epoch, so that the first ratio is exactly 1 (D24).
        config: The algorithm's settings.
        kl_coef: Weight of the KL for this batch; None: that of the configuration.
        normaliser: Learns of the scores and scales them; None: they stay.

    Raises:
        FailedPreconditionError: A log-probability or value is not finite, or the generator's log-probabilities differ
            from the trainer's by more than `mismatch_limit`.
    """
    num_tokens = sum(response_lengths(batch.samples))
    with model.using("policy"):
        forward = partial(response_logprobs_and_entropies, model, temperature=config.temperature)
        policy_layout = [micro for layout in layouts for micro in layout.policy]
        old_logprobs, entropies = gather_flat(policy_layout, forward, num_tokens=num_tokens)
    values = _compute_values(model, batch, layouts, config)
    for name, tensor in (("logprobs", old_logprobs), ("values", values)):
        if not bool(tensor.isfinite().all()):
            message = f"the trainer's {name} are not finite; continue from an earlier checkpoint"
            raise FailedPreconditionError(message, field=name, reason="NON_FINITE")
    experience = estimate_experience(batch, old_logprobs, values, config, kl_coef=kl_coef, normaliser=normaliser)
    figures = experience.figures | {"entropy": float(entropies.mean())}
    return replace(experience.to(model.device), figures=figures)


def _compute_values(model: SharedModel, batch: RolloutBatch, layouts: Sequence[Layout], config: PpoConfig) -> Tensor:
    """Return the [M] values of the critic, in the order of the samples."""
    if not config.has_critic:
        return torch.zeros(0)
    num_values = sum(response_lengths(value_samples(batch, config.score_placement)))
    with model.using("critic"):
        layout = [micro for part in layouts for micro in part.critic]
        return gather_flat(layout, partial(response_values, model), num_tokens=num_values)


def estimate_experience(
    batch: RolloutBatch,
    old_logprobs: Tensor,
    values: Tensor,
    config: PpoConfig,
    *,
    kl_coef: float | None = None,
    normaliser: Normaliser | None = None,
) -> Experience:
    """Return the experience of a batch whose [N] log-probabilities and [M] values are known.

    Args:
        batch: The scored samples.
        old_logprobs: [N] of the policy.
        values: [M] of the critic; empty without one.
        config: The algorithm's settings.
        kl_coef: Weight of the KL for this batch; None: that of the configuration.
        normaliser: Learns of the scores and scales them; None: they stay.

    Raises:
        FailedPreconditionError: Generator and trainer disagree by more than `mismatch_limit`.
    """
    weight = config.first_kl_coef if kl_coef is None else kl_coef
    value_mask = _mask(value_samples(batch, config.score_placement))
    mask = _mask(batch.samples, width=value_mask.shape[1])
    mu, ref = (_pad(_flatten(rows), mask) for rows in (batch.logprobs, batch.ref_logprobs))
    old = _pad(old_logprobs, mask)
    drift = mismatch_metrics(old, mu, mask)
    _check_mismatch(drift["mean_abs_dlogp"], config.mismatch_limit)
    scores = _prepare_scores(batch, config, normaliser)
    in_reward = weight if config.kl_in == "reward" else 0.0
    rewards = shape_rewards(scores, old, ref, mask, kl_coef=in_reward, placement=config.score_placement)
    if config.has_critic:
        lessons = _learn_from_values(rewards, _pad(values, value_mask), value_mask, config)
    else:
        lessons = _compare_groups(rewards, batch, config)
    low, high = config.sampler_range
    weights = sampler_weights(old, mu, mask, kind=config.sampler_correction, low=low, high=high)
    return Experience(
        old_logprobs=old_logprobs,
        ref_logprobs=ref[mask],
        advantages=_whiten_taught(lessons, mask, config)[mask],
        weights=weights[mask],
        old_values=values,
        returns=lessons.returns[value_mask] if config.has_critic else values,
        figures=drift
        | _kl_figures(old, ref, mask)
        | {
            "kl_coef": weight,
            "sampler_corrected_ratio": _corrected_ratio(weights, old - mu, mask, config),
            "reward_per_sequence": float(rewards.sum(dim=1).mean()),
            "advantage_mean": float(masked_mean(lessons.advantages, mask)),
            "advantage_std": float(masked_var(lessons.advantages, mask).sqrt()),
            "value_mean": float(values.mean()),
            "explained_variance": explained_variance(values, lessons.returns[value_mask]) if len(values) else math.nan,
        },
    )


@dataclass(frozen=True, slots=True)
class _Lessons:
    """[B, T] advantages before whitening and, with a critic, its targets."""

    advantages: Tensor
    returns: Tensor
    rows: Tensor
    """[B] False where a response teaches nothing."""


def _prepare_scores(batch: RolloutBatch, config: PpoConfig, normaliser: Normaliser | None) -> Tensor:
    """Return the [B] scores, normalised, clipped and penalised, in this order."""
    scores = torch.tensor(batch.scores, dtype=torch.float32)
    if normaliser is not None:
        normaliser.update(scores)
        scores = normaliser(scores)
    if config.score_clip is not None:
        scores = clip_scores(scores, config.score_clip)
    ended = torch.tensor(batch.has_eos())
    return penalise_missing_eos(scores, ended, mode=config.missing_eos, value=config.missing_eos_value)


def _learn_from_values(rewards: Tensor, values: Tensor, value_mask: Tensor, config: PpoConfig) -> _Lessons:
    """Return the generalised advantages and returns; the mask is that of the values, D6."""
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, value_mask, shift_mean=False)
    advantages = estimate_advantages(rewards, values, value_mask, gamma=config.gamma, lam=config.lam)
    returns = compute_returns(advantages, values, value_mask)
    return _Lessons(advantages, returns, torch.ones(len(rewards), dtype=torch.bool))


def _compare_groups(rewards: Tensor, batch: RolloutBatch, config: PpoConfig) -> _Lessons:
    """Return the advantage of each response over the others to its prompt, the same for all of its tokens."""
    if config.advantage == "gae":
        raise AssertionError("gae has a critic")
    totals, groups = rewards.sum(dim=1), torch.tensor(batch.group_ids())
    _, group, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    # A response whose siblings were all dropped has nobody to be compared with, and teaches nothing.
    compared = sizes[group] > 1
    advantages = group_advantages(totals, groups, kind=config.advantage, mask=compared)
    return _Lessons(advantages[:, None].expand_as(rewards), rewards, compared)


def _whiten_taught(lessons: _Lessons, mask: Tensor, config: PpoConfig) -> Tensor:
    """Return the [B, T] advantages, whitened over the responses that teach something if the configuration says so."""
    taught = mask & lessons.rows[:, None]
    whitens = config.whitens_advantages and bool(taught.any())
    return masked_whiten(lessons.advantages, taught) if whitens else lessons.advantages


def _kl_figures(old: Tensor, ref: Tensor, mask: Tensor) -> dict[str, float]:
    """Return the KL of the policy to the reference in nats, by k1 and k3 per token and by k1 per sequence."""
    per_token = estimate_kl(old, ref, kind="k1")
    return {
        "kl_per_token": float(masked_mean(per_token, mask)),
        "kl_k3_per_token": float(masked_mean(estimate_kl(old, ref, kind="k3"), mask)),
        "kl_per_sequence": float(torch.where(mask, per_token, 0.0).sum(dim=1).mean()),
    }


def _corrected_ratio(weights: Tensor, delta: Tensor, mask: Tensor, config: PpoConfig) -> float:
    """Return the share of tokens whose weight is not what it would be without bounds."""
    plain = delta.exp() if config.sampler_correction in ("token_tis", "icepop") else torch.ones_like(delta)
    corrected = (weights - plain).abs() > _ROUNDING * plain
    return 0.0 if config.sampler_correction == "none" else float(masked_mean(corrected.float(), mask))


def _check_mismatch(mean_abs_dlogp: float, limit: float) -> None:
    if mean_abs_dlogp > limit:
        message = (
            f"generator and trainer log-probabilities differ by {mean_abs_dlogp:.4f} nats on average, limit {limit}: "
            "the samples do not come from this policy; check adapter version, temperature and base of the generator"
        )
        raise FailedPreconditionError(message, field="logprobs", reason="LOGPROB_MISMATCH")


def _flatten(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float32)


def _mask(samples: Sequence[Sample], *, width: int | None = None) -> Tensor:
    """Return the [B, width] mask of the response tokens."""
    lengths = torch.tensor(response_lengths(samples))
    return response_mask(lengths, width=width or int(lengths.max()))


def _pad(flat: Tensor, mask: Tensor) -> Tensor:
    """Return [N] figures of response tokens as [B, T], 0 outside the mask."""
    padded = flat.new_zeros(mask.shape)
    padded[mask] = flat
    return padded
