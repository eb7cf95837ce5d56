"""Estimators of KL(policy || reference) from the log-probabilities of sampled tokens.

With d = logprob - ref_logprob and tokens drawn from the policy, the mean of k1 and of k3 is the KL; k2 is biased
with a low variance. None is clamped: a clamped k1 under-reports a large KL. All in nats per token.

Source: D10; Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

from torch import Tensor

from tether_services.ppo.statistics import at_least_float32

__all__ = ["k1", "k2", "k3"]


def _difference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return at_least_float32(logprobs) - at_least_float32(ref_logprobs)


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d, element by element: unbiased, of either sign. This is the KL that goes into the reward."""
    return _difference(logprobs, ref_logprobs)


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d^2 / 2, element by element: never negative, biased, and the one whose gradient is that of the KL."""
    return 0.5 * _difference(logprobs, ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return exp(-d) - 1 + d, element by element: never negative and unbiased."""
    difference = _difference(logprobs, ref_logprobs)
    return (-difference).exp() - 1.0 + difference
