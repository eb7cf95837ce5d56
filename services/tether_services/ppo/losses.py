"""The losses of PPO and of preference learning, with the figures that watch them.

`policy_loss` and `value_loss` take a micro-batch and the size of the whole optimiser step:

    loss, metrics = policy_loss(new, old, advantages, mask, clip_range=0.2, denominator=tokens_of_the_optimiser_step)
    loss.backward()

With that denominator the gradients of the micro-batches add up to that of one large batch, and every token weighs the
same however the rows were split.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tether_services.ppo.statistics import at_least_float32, check_same_shape

__all__ = [
    "Aggregation",
    "DpoKind",
    "aggregate",
    "dpo_loss",
    "entropy",
    "pairwise_loss",
    "policy_loss",
    "ranking_loss",
    "value_loss",
]

Aggregation = Literal["token_mean", "sequence_mean", "token_sum"]
DpoKind = Literal["sigmoid", "ipo", "hinge"]
Metrics = dict[str, Tensor]
_MAX_LOG_RATIO = 20.0
"""Clamp of new - old before the exponential: exp(20) is far outside any trust region and still finite in float32."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    aggregation: Aggregation = "token_mean",
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Return the clipped policy loss, to be minimised, and its metrics.

    Per token max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range_high)) with ratio = exp(new - old); where
    A < 0 at most -A * dual_clip; times the weight. The metrics are scalars without gradient, over the mask: `approx_kl`
    mean (new - old)^2 / 2, `clip_fraction` share of tokens whose clipped side counts, `dual_clip_fraction`,
    `ratio_mean`, `ratio_max` and `ratio_deviation`, the largest |ratio - 1|.

    Args:
        logprobs: [B, T], of the policy now; the gradient flows through these.
        old_logprobs: [B, T], of the policy that generated, recomputed by the trainer.
        advantages: [B, T], fixed for all epochs; or [B, 1], the same for all tokens of a response.
        mask: [B, T], True on response tokens. What is outside has no influence, NaN included.
        clip_range: Above 0, below 1.
        clip_range_high: Upper range where it differs, above 0.
        dual_clip: Bound for negative advantages, above 1; None: off.
        weights: [B, T], of the sampler correction; None: 1.
        aggregation: How tokens become one number, see `aggregate`.
        denominator: Of the whole optimiser step, see `aggregate`.

    Source: D21, D22, D25; Schulman et al. 2017, arXiv:1707.06347, equation 7; arXiv:1912.09729 for the dual clip.
    """
    if advantages.shape == (len(logprobs), 1):
        advantages = advantages.expand_as(logprobs)
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    kept, old = mask.bool(), at_least_float32(old_logprobs.detach())
    log_ratio = torch.where(kept, at_least_float32(logprobs) - old, 0.0)
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    weight = torch.where(kept, -at_least_float32(advantages.detach()), 0.0)
    high = clip_range if clip_range_high is None else clip_range_high
    free, clipped = weight * ratio, weight * ratio.clamp(1.0 - clip_range, 1.0 + high)
    losses, dual_clipped = torch.maximum(free, clipped), torch.zeros_like(kept)
    if dual_clip is not None:
        dual_clipped = (weight > 0.0) & (losses > weight * dual_clip)
        losses = torch.where(dual_clipped, weight * dual_clip, losses)
    if weights is not None:
        losses = losses * torch.where(kept, weights.detach(), 0.0)
    metrics = _ratio_metrics(log_ratio.detach(), ratio.detach(), kept)
    metrics["clip_fraction"] = _share((clipped > free).detach(), kept)
    metrics["dual_clip_fraction"] = _share(dual_clipped, kept)
    return aggregate(losses, mask, aggregation=aggregation, denominator=denominator), metrics


def _ratio_metrics(log_ratio: Tensor, ratio: Tensor, kept: Tensor) -> Metrics:
    """Return the metrics of the ratio, which is 1 outside the mask; those of an empty mask are of a ratio of 1."""
    count = kept.sum().clamp(min=1)
    deviation = ratio - 1.0
    return {
        "approx_kl": 0.5 * (log_ratio**2).sum() / count,
        "ratio_mean": 1.0 + deviation.sum() / count,
        "ratio_max": torch.where(kept, ratio, 1.0 if not kept.any() else -torch.inf).max(),
        "ratio_deviation": deviation.abs().max(),
    }


def _share(condition: Tensor, kept: Tensor) -> Tensor:
    """Return the share of the kept entries for which the condition holds, 0 of none."""
    return (condition & kept).sum() / kept.sum().clamp(min=1)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Return the clipped value loss and its metrics.

    Per token max((V - R)^2, (V_clip - R)^2) / 2 with V_clip = clamp(V, V_old - clip_range, V_old + clip_range); the sum
    over the mask divided by `denominator`. Metric: `clip_fraction`, the share of tokens whose clipped side counts.

    Args:
        values: [B, T], of the critic now; the gradient flows through these.
        old_values: [B, T], of the critic at rollout time.
        returns: [B, T], targets, fixed for all epochs.
        mask: [B, T], True where there is a value to learn.
        clip_range: Above 0, in units of the return.
        denominator: Values of the whole optimiser step; None: those of the mask.

    Source: D23.
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    kept = mask.bool()
    new = torch.where(kept, at_least_float32(values), 0.0)
    old, targets = (torch.where(kept, at_least_float32(x.detach()), 0.0) for x in (old_values, returns))
    free = (new - targets) ** 2
    clipped = (new.clamp(old - clip_range, old + clip_range) - targets) ** 2
    fraction = _share(clipped > free, kept)
    loss = aggregate(0.5 * torch.maximum(free, clipped), mask, aggregation="token_mean", denominator=denominator)
    return loss, {"clip_fraction": fraction}


def aggregate(losses: Tensor, mask: Tensor, *, aggregation: Aggregation, denominator: float | None = None) -> Tensor:
    """Return the losses of tokens as one number.

    `token_mean`: their sum over `denominator` tokens. `sequence_mean`: the sum over rows of the mean of each row, over
    `denominator` rows; rows without a token count nowhere. `token_sum`: their sum, over `denominator` if there is one.

    Args:
        losses: [B, T].
        mask: [B, T], True on the tokens that count.
        aggregation: Which of the three.
        denominator: Of the whole optimiser step, over all its micro-batches; None: of this batch (1 for `token_sum`).

    Raises:
        ValueError: `denominator` is not above 0, nothing is kept and there is no denominator, or `aggregation` is
            unknown.

    Source: D21; arXiv:2503.20783 for `token_sum` with a constant.
    """
    check_same_shape(losses=losses, mask=mask)
    kept = mask.bool()
    sums, own = torch.where(kept, at_least_float32(losses), 0.0), float(kept.sum())
    if aggregation == "sequence_mean":
        lengths = kept.sum(dim=1)
        sums, own = sums.sum(dim=1) / lengths.clamp(min=1), float((lengths > 0).sum())
    elif aggregation == "token_sum":
        own = 1.0
    elif aggregation != "token_mean":
        raise ValueError(f"aggregation must be token_mean, sequence_mean or token_sum, got {aggregation!r}")
    divisor = own if denominator is None else denominator
    if not divisor > 0.0:
        raise ValueError(f"the denominator must be above 0, got {divisor}; is the mask empty?")
    return sums.sum() / divisor


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits) over the last dimension.

    Args:
        logits: [..., V], already divided by the temperature; -inf is a probability of 0.

    Source: D26.
    """
    log_probabilities = torch.log_softmax(at_least_float32(logits), dim=-1)
    # A probability of 0 contributes 0, although its logarithm is -inf.
    finite = torch.where(log_probabilities.isneginf(), 0.0, log_probabilities)
    return -(log_probabilities.exp() * finite).sum(dim=-1)


def pairwise_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | float | None = None) -> Tensor:
    """Return the Bradley-Terry loss of preference pairs: mean of -log sigmoid(chosen - rejected - margin).

    Args:
        chosen: [P] scores of the preferred answers.
        rejected: [P] scores of the others.
        margin: [P] or one number, by which the preferred one shall lead; None: 0.

    Raises:
        ValueError: There are no pairs, or not as many rejected as chosen.

    Source: D33.
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    if not chosen.numel():
        raise ValueError("a loss over no pairs is undefined")
    lead = at_least_float32(chosen) - at_least_float32(rejected)
    return -logsigmoid(lead if margin is None else lead - margin).mean()


def ranking_loss(scores: Tensor, ranks: Tensor, *, margin: Tensor | float | None = None) -> Tensor:
    """Return the K-wise Bradley-Terry loss of one prompt: mean of -log sigmoid(s_i - s_j) over pairs with i before j.

    Ties give no pair; where there are only ties the loss is 0, with a gradient of 0. Scores (2, 1, 0) in ranked order
    give 0.2511505.

    Args:
        scores: [K].
        ranks: [K], smaller is better.
        margin: One number, by which every better answer shall lead; None: 0.

    Source: D33; Ouyang et al. 2022, arXiv:2203.02155, equation 1.
    """
    better, worse = torch.nonzero(ranks[:, None] < ranks[None, :], as_tuple=True)
    scores = at_least_float32(scores)
    if not len(better):
        return scores.sum() * 0.0
    return pairwise_loss(scores[better], scores[worse], margin=margin)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    kind: DpoKind = "sigmoid",
) -> Tensor:
    """Return the direct preference loss, mean over pairs.

    With x = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected): `sigmoid` is
    -(1 - e) * log sigmoid(beta x) - e * log sigmoid(-beta x), `ipo` (x - 1 / (2 beta))^2, `hinge` max(0, 1 - beta x).

    Args:
        policy_chosen: [P] log-probabilities, summed over the tokens of the preferred completions only.
        policy_rejected: [P], of the others.
        ref_chosen: [P], of the reference.
        ref_rejected: [P], of the reference.
        beta: Strength of the tie to the reference, above 0.
        label_smoothing: e, the share of pairs believed to be labelled the wrong way, 0 to 0.5; `sigmoid` only.
        kind: Which loss.

    Raises:
        ValueError: There are no pairs, an argument is outside its range, `kind` is unknown, or does not use the label
            smoothing that is set.

    Source: D36; arXiv:2305.18290, 2310.12036 (`ipo`), 2309.06657 (`hinge`).
    """
    if beta <= 0.0 or not 0.0 <= label_smoothing <= 0.5 or (label_smoothing and kind != "sigmoid"):
        raise ValueError(f"{kind} cannot have beta {beta} and label_smoothing {label_smoothing}")
    if not policy_chosen.numel():
        raise ValueError("a loss over no pairs is undefined")
    policy = at_least_float32(policy_chosen) - at_least_float32(policy_rejected)
    lead = policy - (at_least_float32(ref_chosen) - at_least_float32(ref_rejected)).detach()
    if kind == "sigmoid":
        losses = -(1.0 - label_smoothing) * logsigmoid(beta * lead) - label_smoothing * logsigmoid(-beta * lead)
    elif kind == "ipo":
        losses = (lead - 1.0 / (2.0 * beta)) ** 2
    elif kind == "hinge":
        losses = (1.0 - beta * lead).clamp(min=0.0)
    else:
        raise ValueError(f"kind must be sigmoid, ipo or hinge, got {kind!r}")
    return losses.mean()
