"""The monitoring figures of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

__all__ = ["UpdateReport", "summarise"]

_EXTREMES = ("ratio_max",)
"""Figures of optimiser steps of which the largest is reported, and not the mean."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Monitoring figures of one update; log-probabilities, KL and entropy in nats.

    Those of the batch are taken before the first optimiser step; those of the learning are means over the optimiser
    steps unless they say otherwise. NaN where a figure does not exist: of the critic without one, of the policy while
    only the critic learns, of the pretraining text without one.
    """

    num_samples: int
    num_tokens: int
    """Response tokens trained on."""
    num_optimizer_steps: int
    """Taken; fewer than planned where `target_kl` ended the update."""
    policy_learning_rate: float
    """Of the last optimiser step; NaN while only the critic learns."""
    critic_learning_rate: float
    """Of the last optimiser step."""
    policy_loss: float
    value_loss: float
    kl_loss: float
    """Unweighted; NaN where the KL is in the reward."""
    entropy_bonus: float
    """Entropy during the update, unweighted, reduced as the loss is; NaN without `entropy_coef`."""
    ptx_loss: float
    """Language-model loss on the pretraining text, nats per token."""
    policy_grad_norm: float
    """Before clipping, pretraining text included."""
    ptx_grad_norm: float
    """Of the weighted loss on the pretraining text alone."""
    ppo_grad_norm: float
    """Of all but the pretraining text; NaN without one."""
    critic_grad_norm: float
    """Before clipping."""
    approx_kl: float
    """Between the policy before and during the update, per token."""
    clip_fraction: float
    """Share of tokens whose clipped side counts, 0 to 1."""
    dual_clip_fraction: float
    """Share of tokens at the bound of the dual clip, 0 to 1."""
    value_clip_fraction: float
    """Share of values whose clipped side counts, 0 to 1."""
    ratio_max: float
    """Largest policy ratio over all optimiser steps."""
    first_ratio_deviation: float
    """Largest |ratio - 1| before the first optimiser step; 0 when the trainer is consistent with itself."""
    score_mean: float
    reward_per_sequence: float
    """Shaped score minus weighted KL where that is in the reward, mean over sequences."""
    kl_coef: float
    """Weight of the KL for this batch."""
    entropy: float
    """Mean over tokens."""
    kl_per_token: float
    """To the reference, by k1; may be negative on a batch."""
    kl_k3_per_token: float
    """To the reference, by k3; never negative."""
    kl_per_sequence: float
    """To the reference, by k1, summed over the tokens of a sequence."""
    mean_abs_dlogp: float
    """Between generator and trainer, per token."""
    mult_prob_error: float
    """Mean exp |difference| between generator and trainer; 1 is perfect."""
    gen_kl: float
    """KL of the generator to the trainer, per token, by k3."""
    outlier_ratio: float
    """Share of samples with a token on which generator and trainer differ by a factor above 100 or below 1e-4."""
    sampler_corrected_ratio: float
    """Share of tokens that the sampler correction truncated or left out, 0 to 1."""
    value_mean: float
    explained_variance: float
    """Of the returns by the values, at most 1; NaN where all returns are equal."""
    advantage_mean: float
    """Before whitening."""
    advantage_std: float
    """Before whitening."""

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


_OF_STEPS = (
    "policy_loss",
    "value_loss",
    "kl_loss",
    "entropy_bonus",
    "ptx_loss",
    "policy_grad_norm",
    "ptx_grad_norm",
    "ppo_grad_norm",
    "critic_grad_norm",
    "approx_kl",
    "clip_fraction",
    "dual_clip_fraction",
    "value_clip_fraction",
    "ratio_max",
)


def summarise(steps: Sequence[Mapping[str, float]], batch_figures: Mapping[str, float]) -> UpdateReport:
    """Return the report of an update from the figures of its optimiser steps, at least one, and those of its batch."""
    figures: dict[str, float] = {}
    for name in _OF_STEPS:
        found = [step[name] for step in steps if name in step]
        combine = max if name in _EXTREMES else _mean
        figures[name] = combine(found) if found else math.nan
    deviation = steps[0].get("ratio_deviation", math.nan)
    return UpdateReport(
        **figures,  # type: ignore[arg-type]
        **batch_figures,  # type: ignore[arg-type]
        first_ratio_deviation=deviation,
        num_optimizer_steps=len(steps),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
