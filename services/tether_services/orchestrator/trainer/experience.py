"""What a rollout batch teaches: old log-probabilities, values, rewards, advantages and returns, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tether.errors import FailedPreconditionError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer.batch import MicroBatch, RolloutBatch, response_lengths
from tether_services.orchestrator.trainer.forward import gather_flat, response_logprobs_and_entropies, response_values
from tether_services.orchestrator.trainer.model import SharedModel
from tether_services.ppo.advantages import compute_returns, estimate_advantages
from tether_services.ppo.kl import k1, k3
from tether_services.ppo.losses import tis_weights
from tether_services.ppo.rewards import shape_rewards
from tether_services.ppo.statistics import (
    explained_variance,
    masked_mean,
    masked_var,
    mismatch,
    response_mask,
    whiten,
)

__all__ = ["Experience", "estimate_experience", "prepare_experience"]


@dataclass(frozen=True, slots=True)
class Experience:
    """What a rollout batch teaches, fixed over all epochs; every tensor is [N] over its response tokens.

    Example: two responses of 2 and 1 tokens give tensors of 3 entries, the first response's first.
    """

    old_logprobs: Tensor
    """Of the policy before the first optimiser step."""
    old_values: Tensor
    """Of the critic before the first optimiser step."""
    advantages: Tensor
    """Whitened over the batch where the configuration says so."""
    returns: Tensor
    """Targets of the critic, from the advantages before whitening."""
    weights: Tensor
    """Truncated importance weights, trainer over generator."""
    figures: dict[str, float]
    """Monitoring figures of the batch, by their name in the update report."""

    def to(self, device: str) -> Experience:
        """Return the same experience with its tensors on `device`."""
        names = ("old_logprobs", "old_values", "advantages", "returns", "weights")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def prepare_experience(
    model: SharedModel, batch: RolloutBatch, layout: Sequence[MicroBatch], config: PpoConfig
) -> Experience:
    """Return the experience of a batch, on the model's device.

    Args:
        model: Policy and critic before the first optimiser step.
        batch: The scored samples.
        layout: All of them in the micro-batches of the first epoch, so that the first ratio is exactly 1 (D24).
        config: The algorithm's settings.

    Raises:
        FailedPreconditionError: A log-probability or value is not finite, or the generator's log-probabilities differ
            from the trainer's by more than `mismatch_limit`.
    """
    num_tokens = sum(response_lengths(batch.samples))
    with model.using("policy"):
        forward = partial(response_logprobs_and_entropies, model, temperature=config.temperature)
        old_logprobs, entropies = gather_flat(layout, forward, num_tokens=num_tokens)
    with model.using("critic"):
        values = gather_flat(layout, partial(response_values, model), num_tokens=num_tokens)
    for name, tensor in (("logprobs", old_logprobs), ("values", values)):
        if not bool(tensor.isfinite().all()):
            message = f"the trainer's {name} are not finite; continue from an earlier checkpoint"
            raise FailedPreconditionError(message, field=name, reason="NON_FINITE")
    experience = estimate_experience(batch, old_logprobs, values, config)
    figures = experience.figures | {"entropy": float(entropies.mean())}
    return replace(experience.to(model.device), figures=figures)


def estimate_experience(batch: RolloutBatch, old_logprobs: Tensor, values: Tensor, config: PpoConfig) -> Experience:
    """Return the experience of a batch whose [N] log-probabilities and values are known.

    Raises:
        FailedPreconditionError: Generator and trainer disagree by more than `mismatch_limit`.
    """
    lengths = torch.tensor(response_lengths(batch.samples))
    mask = response_mask(lengths, width=int(lengths.max()))
    mu, ref_logprobs = _flatten(batch.logprobs), _flatten(batch.ref_logprobs)
    drift = mismatch(old_logprobs, mu)
    _check_mismatch(drift["mean_abs_dlogp"], config.mismatch_limit)
    old, ref, padded_values = (_pad(x, mask) for x in (old_logprobs, ref_logprobs, values))
    rewards = shape_rewards(torch.tensor(batch.scores), old, ref, mask, kl_coef=config.kl_coef)
    advantages = estimate_advantages(rewards, padded_values, mask, gamma=config.gamma, lam=config.lam)
    returns = compute_returns(advantages, padded_values, mask)[mask]
    return Experience(
        old_logprobs=old_logprobs,
        old_values=values,
        advantages=(whiten(advantages, mask) if config.whiten_advantages else advantages)[mask],
        returns=returns,
        weights=tis_weights(old_logprobs, mu, cap=config.tis_cap),
        figures=drift
        | _kl_figures(old, ref, mask)
        | {
            "reward_per_sequence": float(rewards.sum(dim=1).mean()),
            "value_mean": float(values.mean()),
            "explained_variance": explained_variance(values, returns),
            "advantage_mean": float(masked_mean(advantages, mask)),
            "advantage_std": float(masked_var(advantages, mask).sqrt()),
        },
    )


def _kl_figures(old: Tensor, ref: Tensor, mask: Tensor) -> dict[str, float]:
    """Return the KL of the policy to the reference in nats, by k1 and k3 per token and by k1 per sequence."""
    per_token = k1(old, ref)
    return {
        "kl_per_token": float(masked_mean(per_token, mask)),
        "kl_k3_per_token": float(masked_mean(k3(old, ref), mask)),
        "kl_per_sequence": float(torch.where(mask, per_token, 0.0).sum(dim=1).mean()),
    }


def _check_mismatch(mean_abs_dlogp: float, limit: float) -> None:
    if mean_abs_dlogp > limit:
        message = (
            f"generator and trainer log-probabilities differ by {mean_abs_dlogp:.4f} nats on average, limit {limit}: "
            "the samples do not come from this policy; check adapter version, temperature and base of the generator"
        )
        raise FailedPreconditionError(message, field="logprobs", reason="LOGPROB_MISMATCH")


def _flatten(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float32)


def _pad(flat: Tensor, mask: Tensor) -> Tensor:
    """Return [N] values of response tokens as [B, T], 0 outside the mask."""
    padded = flat.new_zeros(mask.shape)
    padded[mask] = flat
    return padded
