"""Optimisers and the learning-rate schedule of the offline stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from tether_services.ppo.schedules import learning_rate_factor

FINAL_SHARE = 0.1
"""The schedule ends at this share of the peak learning rate."""
MAX_GRAD_NORM = 1.0
"""Gradients above this norm are scaled down; small models spike early in training."""
BETAS = (0.9, 0.95)
"""A shorter memory of squared gradients than the library's default: runs of a few thousand steps."""


def schedule_factor(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """Return the share of the peak learning rate at a step: a linear rise, then a cosine to a tenth.

    Args:
        step: 0 to `num_steps - 1`.
        num_steps: Steps in all.
        warmup_steps: Steps of the rise; its last one is at the peak.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return learning_rate_factor(
        step, kind="cosine", total_steps=num_steps, warmup_steps=warmup_steps, minimum=FINAL_SHARE
    )


def fine_tuning_optimisers(model: nn.Module, *, learning_rate: float, weight_decay: float) -> list[Optimizer]:
    """Return AdamW over the trainable parameters; only matrices decay, norms and biases do not."""
    return [_adamw(model.parameters(), learning_rate=learning_rate, weight_decay=weight_decay)]


def pretraining_optimisers(model: nn.Module, *, learning_rate: float, weight_decay: float) -> list[Optimizer]:
    """Return Muon over the matrices of the layers and AdamW over embeddings and norms.

    Muon steps have the size of AdamW's, so one learning rate serves both. It reaches a given loss with fewer steps than
    AdamW alone, which matters where the text is small and the machine is slow.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = [p for p in trainable if p.ndim == 2 and id(p) not in embeddings]
    hidden_ids = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in trainable if id(parameter) not in hidden_ids]
    muon = Muon(hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, _adamw(others, learning_rate=learning_rate, weight_decay=weight_decay)]


def _adamw(parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float) -> AdamW:
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=BETAS)


def apply_step(optimisers: Sequence[Optimizer], *, learning_rate: float) -> float:
    """Clip the gradients together, take one step of each optimiser, clear them, and return their norm before the clip.

    Raises:
        RuntimeError: A gradient is not finite; nothing was changed.
    """
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM, error_if_nonfinite=True)
    for group in groups:
        group["lr"] = learning_rate
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return float(norm)
