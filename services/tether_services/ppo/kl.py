"""Estimators of KL(policy || reference) from the log-probabilities of sampled tokens, and the coefficient's control.

With d = logprob - ref_logprob and tokens drawn from the policy, the mean of k1 and of k3 is the KL; k2 is biased with a
low variance. None is clamped: a clamped k1 under-reports a large KL. All in nats per token.

Source: D10, D11; Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from tether_services.ppo.statistics import at_least_float32

__all__ = ["AdaptiveKl", "FixedKl", "KlController", "KlKind", "estimate_kl", "kl_loss"]

KlKind = Literal["k1", "k2", "k3", "abs"]
_MAX_DIFFERENCE = 20.0
"""Clamp of d in the KL loss, whose exponential must stay finite; the KL in the reward has none."""
_MAX_ERROR = 0.2
"""Relative error of the KL that one update of the controller reacts to."""
_MIN_FACTOR = 0.1
"""Of one update, where a batch is larger than the horizon: a weight of 0 or less could never rise again."""


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, *, kind: KlKind) -> Tensor:
    """Return the estimate of the KL, element by element.

    `k1` is d, unbiased and of either sign: the KL that goes into the reward. `k2` is d^2 / 2, never negative and
    biased, with the gradient of the KL. `k3` is exp(-d) - 1 + d, never negative and unbiased. `abs` is |d|.

    Raises:
        ValueError: `kind` is none of these.

    Source: D10.
    """
    difference = at_least_float32(logprobs) - at_least_float32(ref_logprobs)
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference**2
    if kind == "k3":
        return torch.expm1(-difference) + difference  # exp - 1 would round the whole of a small KL away
    if kind == "abs":
        return difference.abs()
    raise ValueError(f"kind must be k1, k2, k3 or abs, got {kind!r}")


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the KL as a loss per token: the value of k3 with the gradient of k2, which is that of the KL.

    k2 - stop_gradient(k2) + stop_gradient(k3), with d clamped to +-20.

    Source: D10; verl `kl_penalty`, where it is called k3+.
    """
    difference = at_least_float32(logprobs) - at_least_float32(ref_logprobs.detach())
    difference = difference.clamp(-_MAX_DIFFERENCE, _MAX_DIFFERENCE)
    zero = torch.zeros_like(difference)
    k2 = estimate_kl(difference, zero, kind="k2")
    return k2 - k2.detach() + estimate_kl(difference, zero, kind="k3").detach()


class KlController(Protocol):
    """Decides the weight of the KL for the next batch."""

    kl_coef: float
    """Weight now, 0 or more."""

    def update(self, mean_sequence_kl: float, num_episodes: int) -> float:
        """Learn of a batch whose rewards are final, and return the weight for the next one."""
        ...


class FixedKl:
    """Keeps the weight."""

    def __init__(self, kl_coef: float) -> None:
        self.kl_coef = kl_coef

    def update(self, mean_sequence_kl: float, num_episodes: int) -> float:
        """Return the weight, whatever the batch was."""
        return self.kl_coef


class AdaptiveKl:
    """Raises the weight while the KL is above its target and lowers it while it is below.

    error = clip(KL / target - 1, -0.2, 0.2); kl_coef <- kl_coef * (1 + error * episodes / horizon).

    Source: D11; Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        """Start a controller.

        Args:
            init: First weight, above 0: 0 could never rise.
            target: Wanted KL in nats, summed over a response, mean over responses; above 0.
            horizon: Episodes over which an error of 1 would double the weight, above 0.

        Raises:
            ValueError: An argument is outside its range.
        """
        if min(init, target, horizon) <= 0.0:
            raise ValueError(f"init, target and horizon must be above 0, got {init}, {target} and {horizon}")
        self.kl_coef = init
        self._target, self._horizon = target, horizon

    def update(self, mean_sequence_kl: float, num_episodes: int) -> float:
        """Learn of a batch and return the weight for the next one.

        Args:
            mean_sequence_kl: k1 in nats, summed over the tokens of a response, mean over the responses of the batch.
            num_episodes: Responses of the batch.

        Raises:
            ValueError: The KL is not finite; the weight stays.
        """
        mean_sequence_kl = float(mean_sequence_kl)
        if not math.isfinite(mean_sequence_kl):
            raise ValueError(f"mean_sequence_kl must be finite, got {mean_sequence_kl}")
        error = min(max(mean_sequence_kl / self._target - 1.0, -_MAX_ERROR), _MAX_ERROR)
        self.kl_coef *= max(_MIN_FACTOR, 1.0 + error * num_episodes / self._horizon)
        return self.kl_coef
