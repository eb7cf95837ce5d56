"""`tether train pretrain`: a tokenizer and a small Llama trained from nothing on plain text."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tether.errors import InvalidArgumentError
from tether_services.recipes.config import PretrainConfig
from tether_services.recipes.documents import DocumentSplit, read_documents
from tether_services.recipes.manifest import write_manifest
from tether_services.recipes.optimiser import apply_step, pretraining_optimisers, schedule_factor
from tether_services.recipes.progress import progress_line
from tether_services.recipes.tokenizer import encode_document, load_tokenizer, train_tokenizer

log = logging.getLogger(__name__)

IGNORED = -100
"""Target id that adds nothing to a cross entropy."""
EVAL_BATCH = 32
"""Held-out documents in one forward pass."""


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Loss on documents that were not trained on."""

    nats_per_token: float
    """Mean negative log-likelihood of a token, the end token included."""
    nats_per_byte: float
    """The same sum divided by the UTF-8 bytes of the documents; comparable between tokenizers."""


def run_pretrain(config: PretrainConfig) -> Path:
    """Train a tokenizer and a model, write both with a manifest, and return the output folder.

    Raises:
        InvalidArgumentError: A data file or a setting does not fit.
    """
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    documents = read_documents(
        config.text_files, separator=config.separator, held_out_fraction=config.held_out_fraction
    )
    tokenizer = _tokenizer(config, documents)
    model = LlamaForCausalLM(llama_config(config, tokenizer))
    losses = _train(model, config, tokenizer=tokenizer, documents=documents)
    _write_model(model, config, tokenizer=tokenizer)
    stored = LlamaForCausalLM.from_pretrained(config.output, dtype=torch.float32)
    final = held_out_loss(stored, documents.held_out, tokenizer=tokenizer, max_tokens=config.context_tokens)
    metrics = _metrics(model, config, documents=documents, final=final, losses=losses)
    metrics["train_token_count"] = config.num_steps * config.blocks_per_step * config.block_tokens
    write_manifest(
        "pretrain", config, inputs=config.text_files, metrics=metrics, wall_seconds=time.monotonic() - started
    )
    return config.output


def llama_config(config: PretrainConfig, tokenizer: Any) -> LlamaConfig:
    """Return the architecture: tied embeddings, no dropout, one key-value head for each query head."""
    heads = config.hidden_size // config.head_dim
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_tokens,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


@contextmanager
def residual_dropout(model: LlamaForCausalLM, *, share: float) -> Iterator[None]:
    """Zero a share of what embeddings, attention and feed-forward add to the residual stream, in training mode only.

    The architecture has no such dropout, so it is hooked in and taken out again: a small text is read many times.
    """

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return functional.dropout(output, share, training=module.training)

    body = model.model
    sources = [
        body.embed_tokens,
        *(part for layer in body.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)),
    ]
    hooks = [source.register_forward_hook(drop) for source in sources] if share > 0.0 else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def block_stream(
    encoded: Sequence[Sequence[int]], *, block_tokens: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield blocks of `block_tokens + 1` ids without end, the first ids being inputs and the last ones targets.

    Each pass joins the documents in a new order, cuts them without gaps, and yields the blocks in a new order too: a
    book among stories would otherwise fill many steps in a row. Less than one block is left out at the end of a pass.

    Raises:
        InvalidArgumentError: All documents together are shorter than a block.
    """
    documents = [torch.tensor(ids) for ids in encoded]
    if sum(map(len, documents)) <= block_tokens:
        raise InvalidArgumentError("the text is shorter than one block; give more text", field="block_tokens")
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        joined = torch.cat([documents[index] for index in order])
        starts = torch.randperm((len(joined) - 1) // block_tokens, generator=generator) * block_tokens
        for start in starts.tolist():
            yield joined[start : start + block_tokens + 1]


def held_out_loss(model: nn.Module, documents: Sequence[str], *, tokenizer: Any, max_tokens: int) -> HeldOutLoss:
    """Return the loss on whole documents, each alone in its context and cut to `max_tokens`.

    Bytes are counted over the text of the tokens that were kept.
    """
    encoded = sorted((encode_document(tokenizer, text)[:max_tokens] for text in documents), key=len)
    total = 0.0
    token_count = sum(len(ids) - 1 for ids in encoded)
    byte_count = sum(len(text.encode("utf-8")) for text in tokenizer.batch_decode(encoded, skip_special_tokens=True))
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(encoded), EVAL_BATCH):
            inputs, targets = _right_pad(encoded[start : start + EVAL_BATCH], pad=tokenizer.pad_token_id)
            total += float(_cross_entropy(model, inputs, targets, reduction="sum"))
    model.train()
    return HeldOutLoss(total / token_count, total / byte_count)


def _right_pad(rows: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets [B, T - 1]; padded targets are ignored, and causality hides padding on the right."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width), IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = targets[index, : len(row)] = torch.tensor(row)
    return ids[:, :-1], targets[:, 1:]


def _cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor, *, reduction: str) -> Tensor:
    logits: Tensor = model(input_ids=inputs, use_cache=False).logits
    flat = logits.flatten(0, 1).float()
    return functional.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def _tokenizer(config: PretrainConfig, documents: DocumentSplit) -> Any:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, field="tokenizer")
    return train_tokenizer(documents.train, vocab_size=config.vocab_size, max_length=config.context_tokens)


def _train(
    model: LlamaForCausalLM, config: PretrainConfig, *, tokenizer: Any, documents: DocumentSplit
) -> dict[int, float]:
    """Train in place, end with the weights of the lowest held-out loss, and return the losses by step."""
    encoded = [encode_document(tokenizer, text) for text in documents.train]
    order = torch.Generator().manual_seed(config.seed)
    blocks = block_stream(encoded, block_tokens=config.block_tokens, generator=order)
    optimisers = pretraining_optimisers(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    losses: dict[int, float] = {}
    best: dict[str, Tensor] = {}
    with progress_line("pretrain", total=config.num_steps) as report, residual_dropout(model, share=config.dropout):
        for step in range(config.num_steps):
            batch = torch.stack([next(blocks) for _ in range(config.blocks_per_step)])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.compute_dtype == "bfloat16"):
                loss = _cross_entropy(model, batch[:, :-1], batch[:, 1:], reduction="mean")
            torch.autograd.backward(loss)
            factor = schedule_factor(step, num_steps=config.num_steps, warmup_steps=config.warmup_steps)
            apply_step(optimisers, learning_rate=factor * config.learning_rate)
            if (step + 1) % config.eval_every == 0 or step + 1 == config.num_steps:
                measured = held_out_loss(
                    model, documents.held_out, tokenizer=tokenizer, max_tokens=config.context_tokens
                )
                if measured.nats_per_token < min(losses.values(), default=float("inf")):
                    best = {name: value.detach().clone() for name, value in model.state_dict().items()}
                losses[step + 1] = measured.nats_per_token
                log.info("pretrain step %d held-out loss %.4f", step + 1, measured.nats_per_token)
            report(step + 1, f"loss {loss.item():.3f}  held out {min(losses.values(), default=float('nan')):.3f}")
    model.load_state_dict(best)
    return losses


def _write_model(model: LlamaForCausalLM, config: PretrainConfig, *, tokenizer: Any) -> None:
    """Write weights, architecture, tokenizer and the generation defaults with the end token.

    The stored type changes only the file: the architecture still says float32, and loaders cast up.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(getattr(torch, config.weights_dtype)).save_pretrained(config.output)
    model.to(torch.float32)
    model.config.dtype = "float32"
    model.config.save_pretrained(config.output)
    tokenizer.save_pretrained(config.output)


def _metrics(
    model: nn.Module,
    config: PretrainConfig,
    *,
    documents: DocumentSplit,
    final: HeldOutLoss,
    losses: dict[int, float],
) -> dict[str, Any]:
    return {
        "parameter_count": sum(parameter.numel() for parameter in model.parameters()),
        "train_document_count": len(documents.train),
        "held_out_document_count": len(documents.held_out),
        "dropped_document_count": documents.dropped_count,
        "held_out_nats_per_token": round(final.nats_per_token, 4),
        "held_out_nats_per_byte": round(final.nats_per_byte, 4),
        "held_out_nats_per_token_by_step": {str(step): round(loss, 4) for step, loss in losses.items()},
    }
