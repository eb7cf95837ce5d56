"""The optimiser of a pretraining: Muon for the matrices of the layers, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonWithAdamW"]


class MuonWithAdamW(Optimizer):
    """One optimiser for a scheduler, a clipper and a checkpoint, which works by two of the library.

    Muon orthogonalises the update of a matrix; its steps are scaled to the size of AdamW's, so that one learning rate
    serves both. It reaches a given loss with fewer steps than AdamW alone, which matters where the text is small and
    the machine is slow. Embeddings, and with them a tied output layer, and vectors have AdamW; vectors do not decay.

    Source: Liu et al. 2025, Muon is Scalable for LLM Training, arXiv:2502.16982.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
    ) -> None:
        """Take the trainable parameters of a model.

        Args:
            model: With at least one matrix that is no embedding.
            learning_rate: Of both optimisers.
            weight_decay: Of matrices and embeddings, decoupled.
            betas: Of AdamW.
        """
        hidden, others, vectors = _divide(model)
        self._muon = Muon(hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": others, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimiser's groups and state; they know no others."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    @property
    def state_bytes(self) -> int:
        """Return the size of the state after the first step: a number per weight of Muon's, two per one of AdamW's."""
        sizes: list[int] = [sum(parameter.nbytes for parameter in group["params"]) for group in self.param_groups]
        return sizes[0] + 2 * sum(sizes[1:])

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of each and return what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()  # type: ignore[no-untyped-call]  # untyped in the library
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state that `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()


def _divide(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable parameters: matrices of the layers, embeddings and other tensors, vectors."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = [parameter for parameter in trained if parameter.ndim == 2 and id(parameter) not in embeddings]
    taken = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in trained if parameter.ndim >= 2 and id(parameter) not in taken]
    return hidden, others, [parameter for parameter in trained if parameter.ndim < 2]
