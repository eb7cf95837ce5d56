"""`--dry-run`: what a stage would take, from a few measured micro-batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Trainer

from tether_services.recipes.config import StageConfig
from tether_services.recipes.training import count_steps, train_in_float32

__all__ = ["Estimate", "estimate", "show_estimate"]

MEASURED_BATCHES = 3
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2}
"""Bytes of optimiser state for each trained weight."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a stage would take; memory in bytes, beside what Python and its libraries use themselves."""

    num_rows: int
    num_tokens: int
    """Of one pass over the training data."""
    num_steps: int
    """Optimiser steps."""
    num_parameters: int
    num_trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Kept for the backward pass by the largest of the measured micro-batches."""
    seconds_per_step: float
    """Forward and backward passes of an optimiser step, without evaluation and checkpoints."""

    @property
    def memory_bytes(self) -> int:
        """Return the sum of the parts."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def seconds(self) -> float:
        """Return the time of all steps."""
        return self.num_steps * self.seconds_per_step


def estimate(trainer: Trainer, config: StageConfig, *, num_tokens: int) -> Estimate:
    """Return what the training would take, from forward and backward passes of its first micro-batches.

    Args:
        trainer: Not started; its gradients are cleared afterwards.
        config: The stage.
        num_tokens: Of one pass over the training data.
    """
    num_rows = len(trainer.train_dataset)
    train_in_float32(trainer.model)
    if trainer.args.gradient_checkpointing:  # the trainer turns it on when it starts
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    measured = [_measure(trainer, batch) for batch in islice(trainer.get_train_dataloader(), MEASURED_BATCHES)]
    trainer.model.zero_grad(set_to_none=True)
    parameters = list(trainer.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    num_trainable = sum(parameter.numel() for parameter in trained)
    micro_batches = config.training.rows_per_step // config.training.micro_batch_rows
    return Estimate(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_steps=count_steps(config, num_rows=num_rows),
        num_parameters=sum(_num_weights(parameter) for parameter in parameters),
        num_trainable=num_trainable,
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        gradient_bytes=4 * num_trainable,
        optimizer_bytes=STATE_BYTES[config.training.optimizer] * num_trainable,
        activation_bytes=max(size for size, _ in measured),
        seconds_per_step=micro_batches * sum(seconds for _, seconds in measured) / len(measured),
    )


def _num_weights(parameter: Tensor) -> int:
    """Return the weights of a parameter; bitsandbytes keeps two weights of four bits in one element."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def _measure(trainer: Trainer, batch: dict[str, Any]) -> tuple[int, float]:
    """Return the bytes that a micro-batch keeps for its backward pass and the seconds of both passes."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = trainer._prepare_inputs(batch)
    started = time.perf_counter()
    with trainer.compute_loss_context_manager(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = trainer.compute_loss(trainer.model, inputs)
    torch.autograd.backward(loss)
    if loss.is_cuda:
        torch.cuda.synchronize()
    return sum(kept.values()), time.perf_counter() - started


def show_estimate(found: Estimate, *, title: str) -> None:
    """Print an estimate as a table."""
    table = Table("", "", title=f"{title}: dry run", show_header=False)
    for name, text in _lines(found):
        table.add_row(name, text)
    Console().print(table)


def _lines(found: Estimate) -> Sequence[tuple[str, str]]:
    parts = (
        f"weights {_size(found.weight_bytes)}, gradients {_size(found.gradient_bytes)},"
        f" optimiser {_size(found.optimizer_bytes)}, activations {_size(found.activation_bytes)}"
    )
    return [
        ("rows", f"{found.num_rows:,}"),
        ("tokens", f"{found.num_tokens:,} in one pass"),
        ("parameters", f"{found.num_parameters:,}, of these trained {found.num_trainable:,}"),
        ("memory", f"{_size(found.memory_bytes)}: {parts}"),
        ("optimiser steps", f"{found.num_steps:,} of {found.seconds_per_step:.2f} s"),
        ("time", f"{found.seconds / 60:.1f} min without evaluation and checkpoints"),
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
