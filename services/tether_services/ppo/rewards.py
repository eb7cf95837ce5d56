"""From scores to token rewards: normalise, clip, penalise, place.

The order is score -> Normaliser -> clip_scores -> penalise_missing_eos -> shape_rewards, so that a penalty stays
visible after clipping.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tether_services.ppo.kl import KlKind, estimate_kl
from tether_services.ppo.statistics import at_least_float32, check_same_shape, last_kept

__all__ = ["MissingEosMode", "Normaliser", "Placement", "clip_scores", "penalise_missing_eos", "shape_rewards"]

MissingEosMode = Literal["none", "subtract", "replace"]
Placement = Literal["last", "n_plus"]
_VARIANCE_FLOOR = 1e-8


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kind: KlKind = "k1",
    placement: Placement = "last",
) -> Tensor:
    """Return the [B, T] token rewards: -kl_coef * KL on response tokens, plus the score on one of them, 0 elsewhere.

    No gradient flows through the result.

    Args:
        scores: [B], one score per response.
        logprobs: [B, T], the policy's, recomputed by the trainer (not the generator's).
        ref_logprobs: [B, T], the reference's for the same tokens at the same temperature.
        mask: [B, T], True on response tokens.
        kl_coef: Weight of the KL, at least 0.
        kind: Estimator of the KL.
        placement: `last` puts the score on the last response token e; `n_plus` on e + 1 where the row has that column
            and on e otherwise. `n_plus` goes with values that keep the state e + 1.

    Raises:
        ValueError: A row of the mask keeps nothing, so its score has no place; shapes differ; `placement` is unknown.

    Source: D9, D10.
    """
    if placement not in ("last", "n_plus"):
        raise ValueError(f"placement must be last or n_plus, got {placement!r}")
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores has the shape {list(scores.shape)}, expected one for each of {len(mask)} rows")
    place = last_kept(mask)
    if placement == "n_plus":
        place = (place + 1).clamp(max=mask.shape[1] - 1)
    penalty = -kl_coef * estimate_kl(logprobs.detach(), ref_logprobs.detach(), kind=kind)
    rewards = torch.where(mask.bool(), penalty, 0.0)
    return rewards.scatter_add(1, place[:, None], at_least_float32(scores.detach()).to(rewards.dtype)[:, None])


def penalise_missing_eos(scores: Tensor, has_eos: Tensor, *, mode: MissingEosMode, value: float) -> Tensor:
    """Return the scores with those of responses that never stopped changed.

    Args:
        scores: [B].
        has_eos: [B], True where the response ended by itself and was not cut.
        mode: `none` changes nothing, `subtract` takes `value` off, `replace` puts `value` in the place of the score,
            which raises a score that was lower.
        value: Of the same unit as the scores.

    Raises:
        ValueError: `mode` is none of these.

    Source: D12.
    """
    scores, ended = at_least_float32(scores), has_eos.bool()
    if mode == "none":
        return scores
    if mode == "subtract":
        return torch.where(ended, scores, scores - value)
    if mode == "replace":
        return torch.where(ended, scores, value)
    raise ValueError(f"mode must be none, subtract or replace, got {mode!r}")


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """Return the scores clipped to [-limit, limit]; the KL is never clipped.

    Raises:
        ValueError: `limit` is not above 0.

    Source: D14.
    """
    if limit <= 0.0:
        raise ValueError(f"limit must be above 0, got {limit}")
    return at_least_float32(scores).clamp(-limit, limit)


class Normaliser:
    """Scales scores to mean 0 and standard deviation 1 by the moments of all scores it was told of.

    Told once of the scores of reference responses it is the constant gain and bias of a reward model; told of every
    batch it follows the run. Until it has been told of any score it changes nothing.

        normaliser = Normaliser()
        normaliser.update(torch.tensor([1.0, 3.0]))
        normaliser(torch.tensor([3.0]))         # (3 - 2) / 1 = 1

    Source: D13; Chan et al. 1979 for the update of the moments.
    """

    def __init__(self, count: int = 0, mean: float = 0.0, var: float = 0.0) -> None:
        """Start from known moments.

        Args:
            count: Scores that the moments are of, at least 0.
            mean: Their mean.
            var: Their variance, divided by n.
        """
        self.count, self.mean, self.var = count, mean, var

    def update(self, scores: Tensor) -> None:
        """Tell of further scores, [B]; the moments become those of all scores together."""
        batch = at_least_float32(scores.detach()).double()
        if not batch.numel():
            return
        total = self.count + batch.numel()
        shift = float(batch.mean()) - self.mean
        squares = self.var * self.count + float(batch.var(unbiased=False)) * batch.numel()
        self.var = (squares + shift**2 * self.count * batch.numel() / total) / total
        self.mean += shift * batch.numel() / total
        self.count = total

    def __call__(self, scores: Tensor) -> Tensor:
        """Return (scores - mean) / sqrt(var + 1e-8), [B]."""
        if not self.count:
            return at_least_float32(scores)
        return (at_least_float32(scores) - self.mean) / math.sqrt(self.var + _VARIANCE_FLOOR)
