"""The exponential moving average of an adapter's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AdapterAverage"]


class AdapterAverage:
    """average <- decay * average + (1 - decay) * weights, after each optimiser step; it starts as the weights.

    Source: D30.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, decay: float) -> None:
        """Start an average.

        Args:
            parameters: What is averaged, by name; read again at every update.
            decay: Above 0, below 1; close to 1 averages over many steps.
        """
        self._parameters, self._decay = parameters, decay
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}
        """The averaged weights by name."""

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter.detach(), 1.0 - self._decay)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from tensors of the same names and shapes."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
