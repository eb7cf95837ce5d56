"""The optimiser of one adapter: AdamW with its own gradient clip."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tether.errors import FailedPreconditionError, InvalidArgumentError

__all__ = ["AdapterOptimiser", "OptimizerKind"]

OptimizerKind = Literal["adamw", "adamw_8bit"]
_EPS = 1e-5
"""Of Adam; as in openai/lm-human-preferences (D27)."""


class AdapterOptimiser:
    """AdamW without weight decay over named parameters.

    One optimiser step is: gradients are accumulated, `clip` reports their norm, `step` applies and clears them.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], *, max_grad_norm: float, kind: OptimizerKind = "adamw"
    ) -> None:
        """Build an optimiser.

        Args:
            parameters: What it changes, by a name that is stable across processes.
            max_grad_norm: Gradients are scaled down to this global norm.
            kind: `adamw_8bit` keeps the moments of parameters of 4,096 or more elements in 8 bits.

        Raises:
            InvalidArgumentError: `adamw_8bit` without the library that has it.
        """
        self.num_steps = 0
        self._parameters, self._max_grad_norm = parameters, max_grad_norm
        self._adamw = _new_adamw(list(parameters.values()), kind)

    def gradients(self) -> dict[str, Tensor]:
        """Return the accumulated gradients by name, without those that are absent."""
        return {name: p.grad for name, p in self._parameters.items() if p.grad is not None}

    def add_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Add to the accumulated gradients."""
        for name, gradient in gradients.items():
            parameter = self._parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def grad_norm(self) -> float:
        """Return the global norm of the accumulated gradients."""
        return float(nn.utils.get_total_norm(list(self.gradients().values())))

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

    def step(self, learning_rate: float) -> None:
        """Apply the accumulated gradients and clear them."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.clear()
        self.num_steps += 1

    def clear(self) -> None:
        """Drop the accumulated gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the optimiser's state as tensors named `<state>.<parameter>`; empty before the first step."""
        return {
            # The tables of the 8-bit numbers (qmap) are shared by all parameters, which a tensor file refuses.
            f"{key}.{name}": value.clone() if key.startswith("qmap") else torch.as_tensor(value)
            for name, parameter in self._parameters.items()
            for key, value in self._adamw.state.get(parameter, {}).items()
        }

    def load_state(self, tensors: dict[str, Tensor], *, num_steps: int) -> None:
        """Continue from what `state_tensors` and `num_steps` gave.

        Raises:
            InvalidArgumentError: A tensor is missing, unknown or has another shape; nothing has changed then.
        """
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self._parameters}
        for full_name, tensor in tensors.items():
            key, _, owner = full_name.partition(".")
            if owner not in states:
                raise InvalidArgumentError(f"the optimiser state does not fit: {full_name}", field="checkpoint")
            states[owner][key] = tensor
        for name, state in states.items():
            _check_state(name, state, self._parameters[name], expected=bool(num_steps))
        self._adamw.state.clear()
        if num_steps:
            for name, parameter in self._parameters.items():
                self._adamw.state[parameter] = {k: _restore(k, t, parameter) for k, t in states[name].items()}
        self.num_steps = num_steps


def _new_adamw(parameters: list[nn.Parameter], kind: OptimizerKind) -> Any:
    """Return an optimiser of torch, or of bitsandbytes where moments shall have 8 bits."""
    if kind == "adamw":
        return torch.optim.AdamW(parameters, eps=_EPS, weight_decay=0.0, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        message = "adamw_8bit needs bitsandbytes: pip install 'tether[quant]', or set it to adamw"
        raise InvalidArgumentError(message, field="trainer.optimizer") from error
    return AdamW8bit(parameters, eps=_EPS, weight_decay=0.0)


_MOMENTS = ({"exp_avg", "exp_avg_sq"}, {"state1", "state2"})
"""First and second moment in torch and in bitsandbytes; they have the shape of the parameter."""


def _check_state(name: str, state: dict[str, Tensor], parameter: nn.Parameter, *, expected: bool) -> None:
    moments = next((names for names in _MOMENTS if names <= state.keys()), None)
    if bool(state) != expected or (expected and (moments is None or "step" not in state)):
        message = f"the optimiser state of {name} is missing or incomplete"
        raise InvalidArgumentError(message, field="checkpoint")
    if any(state[key].shape != parameter.shape for key in moments or ()):
        raise InvalidArgumentError(f"the optimiser state of {name} has another shape", field="checkpoint")


def _restore(key: str, tensor: Tensor, parameter: nn.Parameter) -> Tensor | int:
    """Return one entry of a parameter's state; bitsandbytes counts its steps in a plain integer."""
    if key == "step" and not tensor.is_floating_point():
        return int(tensor)
    return tensor.clone().to(parameter.device)
