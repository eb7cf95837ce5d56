"""The optimiser of one adapter: AdamW with its own gradient clip and learning rate schedule."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from tether.errors import FailedPreconditionError, InvalidArgumentError

__all__ = ["AdapterOptimiser"]

_EPS = 1e-5
"""Of Adam; as in openai/lm-human-preferences (D27)."""
_STATE = ("step", "exp_avg", "exp_avg_sq")


class AdapterOptimiser:
    """AdamW without weight decay over named parameters.

    One optimiser step is: gradients are accumulated, `clip` reports their norm, `step` applies and clears them.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        learning_rate: float,
        schedule: Literal["linear", "constant"],
        total_steps: int,
        max_grad_norm: float,
    ) -> None:
        """Build an optimiser.

        Args:
            parameters: What it changes, by a name that is stable across processes.
            learning_rate: Of the first step.
            schedule: `linear` decays to 0 at `total_steps`, `constant` does not decay.
            total_steps: Optimiser steps of the whole run, at least 1.
            max_grad_norm: Gradients are scaled down to this global norm.
        """
        self.num_steps = 0
        self._parameters = parameters
        self._base_learning_rate, self._schedule = learning_rate, schedule
        self._total_steps, self._max_grad_norm = total_steps, max_grad_norm
        self._adamw = torch.optim.AdamW(parameters.values(), lr=learning_rate, eps=_EPS, weight_decay=0.0, fused=True)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step.

        Raises:
            FailedPreconditionError: A linear schedule has ended; a further step would change nothing.
        """
        if self._schedule == "constant":
            return self._base_learning_rate
        if self.num_steps >= self._total_steps:
            message = f"the linear schedule ended after {self._total_steps} optimiser steps; raise the number of steps"
            raise FailedPreconditionError(message, field="trainer.schedule", reason="SCHEDULE_ENDED")
        return self._base_learning_rate * (1.0 - self.num_steps / self._total_steps)

    def clip(self) -> float:
        """Scale the gradients to at most the maximum norm and return their global norm before that.

        Raises:
            FailedPreconditionError: The norm is not finite; the gradients are cleared and nothing has changed.

        Source: D28.
        """
        norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm))
        if not math.isfinite(norm):
            self.clear()
            raise FailedPreconditionError("a gradient is not finite; no step was taken", reason="NON_FINITE")
        return norm

    def step(self) -> None:
        """Apply the accumulated gradients and clear them."""
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate()
        self._adamw.step()
        self.clear()
        self.num_steps += 1

    def clear(self) -> None:
        """Drop the accumulated gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the optimiser's state as tensors named `<state>.<parameter>`; empty before the first step."""
        return {
            f"{key}.{name}": self._adamw.state[parameter][key]
            for name, parameter in self._parameters.items()
            for key in _STATE
            if parameter in self._adamw.state
        }

    def load_state(self, tensors: dict[str, Tensor], *, num_steps: int) -> None:
        """Continue from what `state_tensors` and `num_steps` gave.

        Raises:
            InvalidArgumentError: A tensor is missing, unknown or has another shape; nothing has changed then.
        """
        names = [f"{key}.{name}" for name in self._parameters for key in _STATE] if num_steps else []
        if set(names) != set(tensors):
            message = f"the optimiser state does not fit: {sorted(set(names) ^ set(tensors))[0]}"
            raise InvalidArgumentError(message, field="checkpoint")
        for name in names:
            key, _, owner = name.partition(".")
            if key != "step" and tensors[name].shape != self._parameters[owner].shape:
                raise InvalidArgumentError(f"the optimiser state {name} has another shape", field="checkpoint")
        self._adamw.state.clear()
        for name, parameter in self._parameters.items():
            if num_steps:
                state = {key: tensors[f"{key}.{name}"].clone().to(parameter.device) for key in _STATE}
                self._adamw.state[parameter] = state
        self.num_steps = num_steps
