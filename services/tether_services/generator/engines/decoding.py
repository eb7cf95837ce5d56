"""The decoding loop of the transformers engine: one batch of prompts, left-padded, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tether_services.generator.engine import EngineCompletion, Sampling
from tether_services.generator.engines.sampling import SamplingRows, draw_uniforms, sample_tokens, stack_sampling
from tether_services.runtime.text import TextCodec


@dataclass(slots=True)
class Row:
    """One completion to sample."""

    prompt_token_ids: tuple[int, ...]
    """Not empty."""
    sampling: Sampling
    """How to sample."""
    seed: int
    """Of its own random stream."""
    abandoned: bool = False
    """Set when nobody waits for it any more; it then leaves the batch at the next step."""


@dataclass(frozen=True, slots=True)
class DecodingModel:
    """What the loop needs of a model."""

    forward: Callable[..., Any]
    """A transformers causal language model."""
    config: Any
    """Its configuration, for the kind of cache it needs."""
    codec: TextCodec
    """For stop texts."""
    stop_token_ids: tuple[int, ...]
    """The model's own end tokens."""
    vocab_size: int
    """Number of token ids."""
    device: torch.device
    """Where the model is."""


@dataclass(slots=True)
class _Batch:
    """The rows still being decoded; every tensor has one entry per such row."""

    index: Tensor
    """Position in the original batch."""
    params: SamplingRows
    uniforms: Tensor
    """[b, longest max_tokens]."""
    stops: Tensor
    """[b, s] token ids that end the row, padded with -1."""
    limits: Tensor
    """[b] max_tokens."""
    mask: Tensor | None
    """[b, tokens so far] True on real tokens; None if there is no padding."""
    positions: Tensor
    """[b] position of the next token."""
    cache: Any
    """Keys and values of the tokens so far."""

    def select(self, keep: Tensor) -> None:
        """Keep the rows at [b] indices."""
        self.index, self.params, self.uniforms = self.index[keep], self.params.select(keep), self.uniforms[keep]
        self.stops, self.limits, self.positions = self.stops[keep], self.limits[keep], self.positions[keep]
        self.mask = None if self.mask is None else self.mask[keep]
        self.cache.batch_select_indices(keep)


@torch.inference_mode()
def decode_batch(model: DecodingModel, rows: Sequence[Row], on_step: Callable[[], None]) -> list[EngineCompletion]:
    """Return one completion per row.

    Args:
        model: With the right adapter switched on.
        rows: At least one.
        on_step: Called after every forward pass.
    """
    batch, logits = _prefill(model, rows)
    longest = batch.uniforms.shape[1]
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64, device=model.device)
    logprobs = torch.zeros(len(rows), longest, dtype=torch.float32, device=model.device)
    ends = _Ends(model.codec, rows, tokens)
    for step in range(longest):
        on_step()
        drawn, values = sample_tokens(logits, batch.params, batch.uniforms[:, step])
        tokens[batch.index, step] = drawn
        logprobs[batch.index, step] = values
        keep = ends.find_unfinished(batch, drawn, step)
        if len(keep) == 0:
            break
        if len(keep) < len(drawn):
            batch.select(keep)
        logits = _forward_next(model, batch, drawn[keep])
    return ends.collect(logprobs)


def _prefill(model: DecodingModel, rows: Sequence[Row]) -> tuple[_Batch, Tensor]:
    from transformers import DynamicCache

    lengths = torch.tensor([len(row.prompt_token_ids) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([(0,) * (width - len(row.prompt_token_ids)) + row.prompt_token_ids for row in rows])
    mask = torch.arange(width)[None, :] >= (width - lengths)[:, None]
    positions = (mask.long().cumsum(dim=-1) - 1).clamp_(min=0)
    samplings = [row.sampling for row in rows]
    limits = torch.tensor([sampling.max_tokens for sampling in samplings])
    batch = _Batch(
        index=torch.arange(len(rows), device=model.device),
        params=stack_sampling(samplings, vocab_size=model.vocab_size, device=model.device),
        uniforms=draw_uniforms([row.seed for row in rows], length=int(limits.max())).to(model.device),
        stops=_stack_stops(samplings, model.stop_token_ids).to(model.device),
        limits=limits.to(model.device),
        mask=None if bool(mask.all()) else mask.to(model.device),
        positions=lengths.to(model.device),
        cache=DynamicCache(config=model.config),
    )
    output = model.forward(
        input_ids=ids.to(model.device),
        attention_mask=batch.mask,
        position_ids=positions.to(model.device),
        past_key_values=batch.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return batch, output.logits[:, -1]


def _forward_next(model: DecodingModel, batch: _Batch, drawn: Tensor) -> Tensor:
    """Return [b, V] logits after one more token per row."""
    if batch.mask is not None:
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(drawn), 1)], dim=1)
    output = model.forward(
        input_ids=drawn[:, None],
        attention_mask=batch.mask,
        position_ids=batch.positions[:, None],
        past_key_values=batch.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    batch.positions = batch.positions + 1
    logits: Tensor = output.logits[:, -1]
    return logits


def _stack_stops(samplings: Sequence[Sampling], own: tuple[int, ...]) -> Tensor:
    """Return [B, S] stop ids, padded with -1, which no token has."""
    stops = [(*sampling.stop_token_ids, *(() if sampling.ignore_eos else own)) for sampling in samplings]
    width = max(1, *(len(ids) for ids in stops)) if len(stops) > 1 else max(1, len(stops[0]))
    return torch.tensor([[*ids, *[-1] * (width - len(ids))] for ids in stops])


class _Ends:
    """Knows which rows have ended, where and why."""

    def __init__(self, codec: TextCodec, rows: Sequence[Row], tokens: Tensor) -> None:
        self._codec = codec
        self._rows = rows
        self._tokens = tokens
        self._lengths = [0] * len(rows)
        self._reasons: list[Literal["stop", "length"]] = ["length"] * len(rows)
        self._watched = any(row.sampling.stop for row in rows)

    def find_unfinished(self, batch: _Batch, drawn: Tensor, step: int) -> Tensor:
        """Return [b'] indices of the batch's rows that go on after this step."""
        stopped = (drawn[:, None] == batch.stops).any(dim=1)
        if self._watched:
            stopped |= torch.tensor([self._says_stop(i, step) for i in batch.index.tolist()], device=stopped.device)
        ended = stopped | (batch.limits <= step + 1)
        if any(row.abandoned for row in self._rows):
            ended |= torch.tensor([self._rows[i].abandoned for i in batch.index.tolist()], device=ended.device)
        if bool(ended.any()):
            for row, was_stopped in zip(batch.index[ended].tolist(), stopped[ended].tolist(), strict=True):
                self._lengths[row] = step + 1
                self._reasons[row] = "stop" if was_stopped else "length"
        return (~ended).nonzero()[:, 0]

    def collect(self, logprobs: Tensor) -> list[EngineCompletion]:
        """Return the completions of all rows in their original order."""
        token_lists, logprob_lists = self._tokens.tolist(), logprobs.tolist()
        return [
            EngineCompletion(token_lists[row][:length], logprob_lists[row][:length], reason)
            for row, (length, reason) in enumerate(zip(self._lengths, self._reasons, strict=True))
        ]

    def _says_stop(self, row: int, step: int) -> bool:
        """Return whether the text of a row so far holds one of its stop texts."""
        stop = self._rows[row].sampling.stop
        if not stop:
            return False
        text = self._codec.decode(self._tokens[row, : step + 1].tolist())
        return any(word in text for word in stop)
