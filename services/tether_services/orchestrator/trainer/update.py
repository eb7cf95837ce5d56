"""One PPO update: epochs of minibatches of micro-batches over a fixed experience."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tether.errors import FailedPreconditionError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer.batch import MicroBatch
from tether_services.orchestrator.trainer.experience import Experience
from tether_services.orchestrator.trainer.forward import response_logprobs, response_values
from tether_services.orchestrator.trainer.model import SharedModel
from tether_services.orchestrator.trainer.optimiser import AdapterOptimiser
from tether_services.ppo.losses import (
    approx_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    policy_ratio,
    token_mean,
)

__all__ = ["Learner", "Minibatch", "StepFigures", "UpdateReport", "summarise"]

Minibatch = Sequence[MicroBatch]
"""The micro-batches whose gradients make one optimiser step."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Monitoring figures of one optimiser step."""

    policy_loss: float
    value_loss: float
    policy_grad_norm: float
    """Before clipping."""
    critic_grad_norm: float
    """Before clipping."""
    approx_kl: float
    clip_fraction: float
    ratio_max: float
    ratio_deviation: float
    """Largest |ratio - 1|."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Monitoring figures of one update; log-probabilities, KL and entropy in nats.

    Those of the batch are taken before the first optimiser step; those of the learning are means over the optimiser
    steps unless they say otherwise.
    """

    num_samples: int
    num_tokens: int
    """Response tokens trained on."""
    num_optimizer_steps: int
    policy_learning_rate: float
    """Of the last optimiser step."""
    critic_learning_rate: float
    """Of the last optimiser step."""
    policy_loss: float
    value_loss: float
    policy_grad_norm: float
    """Before clipping."""
    critic_grad_norm: float
    """Before clipping."""
    approx_kl: float
    """Between the policy before and during the update, per token."""
    clip_fraction: float
    """Share of tokens whose ratio left the clip range, 0 to 1."""
    ratio_max: float
    """Largest policy ratio over all optimiser steps."""
    first_ratio_deviation: float
    """Largest |ratio - 1| before the first optimiser step; 0 when the trainer is consistent with itself."""
    score_mean: float
    reward_per_sequence: float
    """Score minus weighted KL, mean over sequences."""
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


def summarise(steps: Sequence[StepFigures], batch_figures: dict[str, float | int]) -> UpdateReport:
    """Return the report of an update from its optimiser steps and the figures of its batch."""
    means = {
        name: sum(getattr(step, name) for step in steps) / len(steps)
        for name in ("policy_loss", "value_loss", "policy_grad_norm", "critic_grad_norm", "approx_kl", "clip_fraction")
    }
    extremes = {
        "ratio_max": max(step.ratio_max for step in steps),
        "first_ratio_deviation": steps[0].ratio_deviation,
        "num_optimizer_steps": len(steps),
    }
    return UpdateReport(**means, **extremes, **batch_figures)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Learner:
    """Policy and critic with their optimisers."""

    model: SharedModel
    policy: AdapterOptimiser
    critic: AdapterOptimiser
    config: PpoConfig

    def learn(self, experience: Experience, minibatch: Minibatch) -> StepFigures:
        """Take one optimiser step of policy and critic each, and return its figures.

        Raises:
            FailedPreconditionError: A loss or gradient is not finite; neither optimiser has stepped then.
        """
        self.policy.clear()
        self.critic.clear()
        policy_loss, logprobs = self.accumulate_policy(experience, minibatch)
        value_loss = self.accumulate_critic(experience, minibatch)
        _require_finite(policy_loss=policy_loss, value_loss=value_loss)
        norms = self.policy.clip(), self.critic.clip()
        self.policy.step()
        self.critic.step()
        old = experience.old_logprobs[torch.cat([micro.tokens for micro in minibatch])]
        ratio = policy_ratio(logprobs, old)
        return StepFigures(
            policy_loss=policy_loss,
            value_loss=value_loss,
            policy_grad_norm=norms[0],
            critic_grad_norm=norms[1],
            approx_kl=approx_kl(logprobs, old),
            clip_fraction=clip_fraction(logprobs, old, clip_range=self.config.clip_range),
            ratio_max=float(ratio.max()),
            ratio_deviation=float((ratio - 1.0).abs().max()),
        )

    def accumulate_policy(self, experience: Experience, minibatch: Minibatch) -> tuple[float, Tensor]:
        """Add the gradient of the policy loss; return the loss and the [n] log-probabilities, without gradient."""
        num_tokens, total, logprobs = _num_tokens(minibatch), 0.0, []
        with self.model.using("policy"):
            for micro in minibatch:
                new = response_logprobs(self.model, micro, temperature=self.config.temperature)
                old, advantages = experience.old_logprobs[micro.tokens], experience.advantages[micro.tokens]
                losses = clipped_policy_loss(new, old, advantages, clip_range=self.config.clip_range)
                loss = token_mean(losses * experience.weights[micro.tokens], num_tokens=num_tokens)
                torch.autograd.backward(loss)
                total += float(loss.detach())
                logprobs.append(new.detach())
        return total, torch.cat(logprobs)

    def accumulate_critic(self, experience: Experience, minibatch: Minibatch) -> float:
        """Add the gradient of the value loss; return the loss."""
        num_tokens, total = _num_tokens(minibatch), 0.0
        with self.model.using("critic"):
            for micro in minibatch:
                losses = clipped_value_loss(
                    response_values(self.model, micro),
                    experience.old_values[micro.tokens],
                    experience.returns[micro.tokens],
                    value_clip_range=self.config.value_clip_range,
                )
                loss = token_mean(losses, num_tokens=num_tokens)
                torch.autograd.backward(loss)
                total += float(loss.detach())
        return total


def _num_tokens(minibatch: Minibatch) -> int:
    """Return the response tokens of the whole optimiser step (D21)."""
    return sum(micro.tokens.numel() for micro in minibatch)


def _require_finite(**losses: float) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            message = f"{name} is {loss}; no step was taken: continue from an earlier checkpoint"
            raise FailedPreconditionError(message, field=name, reason="NON_FINITE")
