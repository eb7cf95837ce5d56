"""One optimiser step of policy and critic over micro-batches of a fixed experience."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tether.errors import FailedPreconditionError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer.batch import MicroBatch
from tether_services.orchestrator.trainer.experience import Experience, Layout
from tether_services.orchestrator.trainer.forward import (
    response_logprobs,
    response_logprobs_and_entropies,
    response_values,
)
from tether_services.orchestrator.trainer.model import SharedModel
from tether_services.orchestrator.trainer.optimiser import AdapterOptimiser
from tether_services.ppo.kl import kl_loss
from tether_services.ppo.losses import aggregate, policy_loss, value_loss

__all__ = ["Learner", "PolicyStep"]

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class PolicyStep:
    """What one optimiser step of the policy is made of, besides the experience."""

    kl_coef: float
    """Weight of the KL loss; 0: none."""
    denominator: float
    """Of every loss over response tokens, for the whole step."""
    pretraining: Sequence[MicroBatch] = field(default_factory=list)
    """Pretraining text of the step; empty: none."""


@dataclass(frozen=True, slots=True)
class Learner:
    """Policy and, where there is one, critic with their optimisers."""

    model: SharedModel
    policy: AdapterOptimiser
    critic: AdapterOptimiser | None
    config: PpoConfig

    def accumulate(self, experience: Experience, layout: Layout, step: PolicyStep | None) -> Figures:
        """Add the gradients of one optimiser step, of the policy only with `step`; return the step's figures.

        Raises:
            FailedPreconditionError: A loss is not finite.
        """
        figures: Figures = {}
        if step is not None:
            figures |= self.accumulate_policy(experience, layout, step)
        if self.critic is not None:
            figures |= self.accumulate_critic(experience, layout)
        for name in (name for name in figures if name.endswith("_loss")):
            if not math.isfinite(figures[name]):
                message = f"{name} is {figures[name]}; no step was taken: continue from an earlier checkpoint"
                raise FailedPreconditionError(message, field=name, reason="NON_FINITE")
        return figures

    def accumulate_policy(self, experience: Experience, layout: Layout, step: PolicyStep) -> Figures:
        """Add the gradient of everything that the policy learns from; return its figures."""
        if not step.pretraining:
            return self._accumulate_ppo(experience, layout, step)
        figures = self._accumulate_pretraining(step.pretraining)
        figures["ptx_grad_norm"] = self.policy.grad_norm()
        pretraining = self.policy.gradients()
        self.policy.clear()
        figures |= self._accumulate_ppo(experience, layout, step)
        figures["ppo_grad_norm"] = self.policy.grad_norm()
        self.policy.add_gradients(pretraining)
        return figures

    def _accumulate_ppo(self, experience: Experience, layout: Layout, step: PolicyStep) -> Figures:
        total = _Total()
        with self.model.using("policy"):
            for micro in layout.policy:
                loss, figures = self._policy_loss(experience, micro, step)
                torch.autograd.backward(loss)
                total.add(figures, micro.tokens.numel())
        return total.figures()

    def _policy_loss(self, experience: Experience, micro: MicroBatch, step: PolicyStep) -> tuple[Tensor, Figures]:
        """Return the loss of a micro-batch, the entropy bonus and the KL loss included, and its figures."""
        config, mask = self.config, micro.mask.to(self.model.device)

        def padded(flat: Tensor) -> Tensor:
            return micro.pad(flat[micro.tokens])

        entropies = None
        if config.entropy_coef:
            new, entropies = response_logprobs_and_entropies(self.model, micro, temperature=config.temperature)
        else:
            new = response_logprobs(self.model, micro, temperature=config.temperature)
        new = micro.pad(new)
        loss, metrics = policy_loss(
            new,
            padded(experience.old_logprobs),
            padded(experience.advantages),
            mask,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
            weights=padded(experience.weights),
            aggregation=config.aggregation,
            denominator=step.denominator,
        )
        figures = {name: float(value) for name, value in metrics.items()} | {"policy_loss": float(loss.detach())}

        def reduce(losses: Tensor, name: str) -> Tensor:
            reduced = aggregate(losses, mask, aggregation=config.aggregation, denominator=step.denominator)
            figures[name] = float(reduced.detach())
            return reduced

        if entropies is not None:
            loss = loss - config.entropy_coef * reduce(micro.pad(entropies), "entropy_bonus")
        if config.kl_in == "loss" and step.kl_coef:
            loss = loss + step.kl_coef * reduce(kl_loss(new, padded(experience.ref_logprobs)), "kl_loss")
        return loss, figures

    def _accumulate_pretraining(self, micro_batches: Sequence[MicroBatch]) -> Figures:
        """Add the gradient of the weighted language-model loss, a mean over the tokens of the step.

        Source: D29; Ouyang et al. 2022, arXiv:2203.02155, equation 2.
        """
        num_tokens, total = sum(micro.tokens.numel() for micro in micro_batches), 0.0
        with self.model.using("policy"):
            for micro in micro_batches:
                losses = -micro.pad(response_logprobs(self.model, micro, temperature=1.0))
                mask = micro.mask.to(losses.device)
                loss = aggregate(losses, mask, aggregation="token_mean", denominator=num_tokens)
                torch.autograd.backward(self.config.ptx_coef * loss)
                total += float(loss.detach())
        return {"ptx_loss": total}

    def accumulate_critic(self, experience: Experience, layout: Layout) -> Figures:
        """Add the gradient of the value loss; return its figures."""
        num_values, total = sum(micro.tokens.numel() for micro in layout.critic), _Total()
        with self.model.using("critic"):
            for micro in layout.critic:
                loss, metrics = value_loss(
                    micro.pad(response_values(self.model, micro)),
                    micro.pad(experience.old_values[micro.tokens]),
                    micro.pad(experience.returns[micro.tokens]),
                    micro.mask.to(self.model.device),
                    clip_range=self.config.value_clip_range,
                    denominator=num_values,
                )
                torch.autograd.backward(loss)
                figures = {"value_loss": float(loss.detach()), "value_clip_fraction": float(metrics["clip_fraction"])}
                total.add(figures, micro.tokens.numel())
        return total.figures()


_SUMS = ("policy_loss", "value_loss", "kl_loss", "entropy_bonus")
"""Figures of a micro-batch that are shares of the whole step already."""
_LARGEST = ("ratio_max", "ratio_deviation")


class _Total:
    """Figures of an optimiser step from those of its micro-batches."""

    def __init__(self) -> None:
        self._figures: Figures = {}
        self._num_tokens = 0

    def add(self, figures: Figures, num_tokens: int) -> None:
        """Take in a micro-batch."""
        self._num_tokens += num_tokens
        for name, value in figures.items():
            if name in _LARGEST:
                self._figures[name] = max(value, self._figures.get(name, -math.inf))
            else:
                weight = 1 if name in _SUMS else num_tokens
                self._figures[name] = self._figures.get(name, 0.0) + weight * value

    def figures(self) -> Figures:
        """Return the figures of the step: sums, largest values, and means over tokens."""
        whole = (*_SUMS, *_LARGEST)
        return {n: value if n in whole else value / self._num_tokens for n, value in self._figures.items()}
