"""The reference policy as a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tether.errors import InvalidArgumentError
from tether_services.ppo.logprobs import token_logprobs, token_logprobs_and_entropies
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engine import EngineDescription, LogprobTask, TaskLogprobs
from tether_services.runtime.content_hash import hash_model_folder
from tether_services.runtime.model_folder import find_model_folder, pick_device
from tether_services.runtime.padding import PaddedBatch, padded_batches
from tether_services.runtime.passes import run_passes
from tether_services.runtime.pretrained import load_pretrained
from tether_services.runtime.work_thread import WorkThread

HEAD_TOLERANCE = 1e-3
"""Relative; far above rounding and far below any change that a model makes to its logits on purpose."""
COARSE_TOLERANCE = 0.05
"""The same in bfloat16, and in 8 bits, where a batch decides together which columns are outliers."""


class TransformersReferenceEngine:
    """Runs the model's body over padded rows and its output layer over the response tokens only."""

    def __init__(self, settings: ReferenceSettings) -> None:
        self._settings = settings
        self._thread = WorkThread("reference-engine")
        self._model: Any = None
        self._device = "cpu"
        self._description: EngineDescription | None = None

    @property
    def description(self) -> EngineDescription:
        """Return what the engine serves; only after `start`."""
        assert self._description is not None, "start the engine first"
        return self._description

    async def start(self) -> None:
        """Load the model in the engine's thread and compare its two ways to a logit."""
        self._description = await self._thread.run(self._load)

    async def compute_logprobs(self, tasks: Sequence[LogprobTask]) -> list[TaskLogprobs]:
        """Return the evaluations in order; each forward pass is one job of the thread, so that `check` fits between."""
        rows = [[*task.prompt_token_ids, *task.response_token_ids[:-1]] for task in tasks]
        limit = self._settings.forward_tokens
        evaluate = partial(self._evaluate, tasks)
        return await run_passes(self._thread, evaluate, rows, max_tokens=limit, device=self._device)

    async def check(self) -> None:
        """Evaluate one token, or see the thread compute."""
        await self._thread.wait_for_life(self.compute_logprobs([LogprobTask((0,), (0,), 1.0, False)]))

    async def close(self) -> None:
        """Let the pass in progress end and drop the model."""
        await self._thread.close()
        self._model = None

    def _load(self) -> EngineDescription:
        settings = self._settings
        folder = find_model_folder(settings.model, field="model")
        sha256 = hash_model_folder(folder)
        self._device = pick_device(settings.device)
        self._model = model = load_pretrained(
            AutoModelForCausalLM,
            folder,
            dtype=settings.dtype,
            field="model",
            quantization=settings.quantization,
            device=self._device,
        )
        coarse = settings.dtype != "float32" or settings.quantization == "int8"
        _check_output_layer(model, self._device, tolerance=COARSE_TOLERANCE if coarse else HEAD_TOLERANCE)
        return EngineDescription(
            engine="transformers",
            base_model=folder.name if Path(settings.model).is_dir() else settings.model,
            base_model_sha256=sha256,
            vocab_size=int(model.config.get_text_config().vocab_size),
            max_model_len=_max_model_len(settings, int(model.config.get_text_config().max_position_embeddings)),
        )

    @torch.inference_mode()
    def _evaluate(self, given: Sequence[LogprobTask], batch: PaddedBatch) -> list[TaskLogprobs]:
        tasks = [given[index] for index in batch.indices]
        lengths = [len(task.response_token_ids) for task in tasks]
        targets = torch.tensor([t for task in tasks for t in task.response_token_ids], device=self._device)
        states = _body(self._model, batch).flatten(0, 1)[_response_states(batch, tasks).to(self._device)]
        arguments = {
            "head": self._model.get_output_embeddings(),
            "vocab_size": self._model.config.get_text_config().vocab_size,
            "temperature": tasks[0].temperature,
        }
        if not tasks[0].include_entropies:
            logprobs = token_logprobs(states, targets, **arguments)
            return [TaskLogprobs(part.tolist(), []) for part in torch.split(logprobs.cpu(), lengths)]
        logprobs, entropies = (x.cpu() for x in token_logprobs_and_entropies(states, targets, **arguments))
        parts = zip(torch.split(logprobs, lengths), torch.split(entropies, lengths), strict=True)
        return [TaskLogprobs(part.tolist(), entropy.tolist()) for part, entropy in parts]


def _max_model_len(settings: ReferenceSettings, limit: int) -> int:
    if settings.max_model_len is not None and settings.max_model_len > limit:
        raise InvalidArgumentError(f"{settings.max_model_len} is more than the model's {limit}.", field="max_model_len")
    return settings.max_model_len or limit


def _body(model: Any, batch: PaddedBatch) -> Tensor:
    """Return the [B, L, h] last hidden states."""
    # No attention mask: a causal model never looks to the right, where the padding is.
    output = model.get_decoder()(input_ids=batch.token_ids, position_ids=batch.position_ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _response_states(batch: PaddedBatch, tasks: Sequence[LogprobTask]) -> Tensor:
    """Return the [n] places, in the flattened [B * L] hidden states, of those that emit the response tokens.

    The state of the last prompt token emits the first response token.

    Source: D2.
    """
    width = batch.token_ids.shape[1]
    starts = [i * width + len(task.prompt_token_ids) - 1 for i, task in enumerate(tasks)]
    return torch.cat(
        [torch.arange(start, start + len(task.response_token_ids)) for start, task in zip(starts, tasks, strict=True)]
    )


@torch.inference_mode()
def _check_output_layer(model: Any, device: str, *, tolerance: float) -> None:
    """Refuse a model whose logits are not those of its output layer, or that looks to the right.

    Some models scale or cap their logits after the output layer, and that would be left out here.

    Raises:
        InvalidArgumentError: The two ways to the logits of the first row differ.
    """
    long, short = (
        padded_batches([[0, 1, 2, 3, 4], [5, 6]], max_tokens=64)[0],
        padded_batches([[5, 6]], max_tokens=64)[0],
    )
    moved = PaddedBatch(long.indices, long.token_ids.to(device), long.position_ids.to(device), long.lengths)
    ours = model.get_output_embeddings()(_body(model, moved)[0, :2]).float()
    theirs = model(input_ids=short.token_ids.to(device), use_cache=False).logits[0].float()
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
    if not bool(difference < tolerance):
        raise InvalidArgumentError(
            f"The model's logits differ from those of its output layer by {float(difference):.2g} (relative): "
            "it scales or caps them afterwards, or is not causal, and cannot be used here.",
            field="model",
        )
