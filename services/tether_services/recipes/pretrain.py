"""`tether train pretrain`: a tokenizer and a small Llama trained from nothing on plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainerControl, TrainingArguments

from tether_services.recipes.blocks import Blocks
from tether_services.recipes.config import PretrainConfig
from tether_services.recipes.data.reading import read_documents
from tether_services.recipes.data.records import Document
from tether_services.recipes.dropout import residual_dropout
from tether_services.recipes.estimate import estimate, show_estimate
from tether_services.recipes.muon import MuonWithAdamW
from tether_services.recipes.progress import tracked
from tether_services.recipes.stage import Mode, Stage, open_stage
from tether_services.recipes.tokenizer import load_tokenizer, train_tokenizer
from tether_services.runtime.model_folder import pick_device
from tether_services.runtime.text import encode_document

__all__ = ["HeldOutLoss", "held_out_loss", "llama_config", "run_pretrain"]

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


class Measure(Protocol):
    """Returns the held-out loss of a model."""

    def __call__(self, model: nn.Module) -> HeldOutLoss:
        """Measure."""


def run_pretrain(config: PretrainConfig, mode: Mode | None = None) -> Path:
    """Train a tokenizer and a model, and return the output folder: weights, tokenizer, manifest, history and plot.

    Raises:
        InvalidArgumentError: A data file or a setting does not fit.
        FailedPreconditionError: The output folder belongs to other settings, or the loss is no longer finite.
    """
    with open_stage("pretrain", config, mode or Mode()) as stage:
        return config.output if stage.is_finished else _run(stage, config)


def _run(stage: Stage, config: PretrainConfig) -> Path:
    data = read_documents(config.data, field="data")
    tokenizer = _tokenizer(config, data.train)
    encoded = [
        encode_document(tokenizer, document.text) for document in tracked(data.train, title="pretrain: token ids")
    ]
    blocks = Blocks(encoded, block_tokens=config.block_tokens, seed=config.seed)
    held_out = [document.text for document in data.validation]
    measure = partial(held_out_loss, documents=held_out, tokenizer=tokenizer, max_tokens=config.context_tokens)
    model = LlamaForCausalLM(llama_config(config, tokenizer)).to(pick_device(config.device))
    trainer = _trainer(model, stage, config, blocks=blocks, measure=measure)
    with residual_dropout(model, share=config.dropout):
        if stage.mode.dry_run:
            _show_estimate(trainer, config, num_tokens=len(blocks) * config.block_tokens)
            return config.output
        stage.train(trainer)
    _write_model(model, config, tokenizer=tokenizer)
    final = measure(LlamaForCausalLM.from_pretrained(config.output, dtype=torch.float32))
    metrics = {
        "parameter_count": sum(parameter.numel() for parameter in model.parameters()),
        "train_document_count": len(data.train),
        "train_token_count": sum(map(len, encoded)),
        "held_out_document_count": len(held_out),
        **{f"held_out_{name}": round(value, 4) for name, value in asdict(final).items()},
    }
    return stage.finish(metrics=metrics, data=data.report.as_dict())


def _tokenizer(config: PretrainConfig, documents: Sequence[Document]) -> Any:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, field="tokenizer")
    texts = (document.text for document in documents)
    return train_tokenizer(
        texts, vocab_size=config.vocab_size, max_length=config.context_tokens, lowercase=config.lowercase
    )


def _show_estimate(trainer: Trainer, config: PretrainConfig, *, num_tokens: int) -> None:
    found = estimate(trainer, config, num_tokens=num_tokens)
    if isinstance(trainer.optimizer, MuonWithAdamW):
        found = replace(found, optimizer_bytes=trainer.optimizer.state_bytes)
    show_estimate(found, title="pretrain")


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


def _next_token_loss(output: Any, targets: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Return the summed loss of the targets over the number of targets of the optimiser step, or their mean.

    The model's own loss would make the trainer convert all logits to float32 a second time.
    """
    total = functional.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total / (targets.numel() if num_items_in_batch is None else num_items_in_batch)


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Learns from blocks, and measures whole documents, every token of them with the same weight."""

    control: TrainerControl

    def __init__(self, *, measure: Measure, **options: Any) -> None:
        super().__init__(**options)
        self._measure = measure

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Log and return the held-out loss; `eval_loss` is per token."""
        measured = self._measure(self.model)
        figures = {"eval_loss": measured.nats_per_token, "eval_nats_per_byte": measured.nats_per_byte}
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures


def _trainer(model: nn.Module, stage: Stage, config: PretrainConfig, *, blocks: Blocks, measure: Measure) -> _Trainer:
    # The blocks have an order of their own, and columns that the model does not know.
    arguments = TrainingArguments(
        **stage.arguments(num_rows=len(blocks)), train_sampling_strategy="sequential", remove_unused_columns=False
    )
    optimizer = None
    if config.matrix_optimizer == "muon":
        optimizer = MuonWithAdamW(
            model,
            learning_rate=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
        )
    return _Trainer(
        model=model,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=blocks,  # asked for by the library, and not read: see evaluate
        compute_loss_func=_next_token_loss,
        optimizers=(optimizer, None),
        measure=measure,
    )


def held_out_loss(model: nn.Module, documents: Sequence[str], *, tokenizer: Any, max_tokens: int) -> HeldOutLoss:
    """Return the loss on whole documents, each alone in its context and cut to `max_tokens`.

    Bytes are counted over the text of the tokens that were kept.
    """
    encoded = sorted((encode_document(tokenizer, text)[:max_tokens] for text in documents), key=len)
    total = 0.0
    token_count = sum(len(ids) - 1 for ids in encoded)
    byte_count = sum(len(text.encode("utf-8")) for text in tokenizer.batch_decode(encoded, skip_special_tokens=True))
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(encoded), EVAL_BATCH):
            inputs, targets = _right_pad(encoded[start : start + EVAL_BATCH], pad=tokenizer.pad_token_id)
            logits = model(input_ids=inputs.to(device), use_cache=False).logits.flatten(0, 1).float()
            flat = targets.flatten().to(device)
            total += float(functional.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum"))
    model.train()
    return HeldOutLoss(total / token_count, total / byte_count)


def _right_pad(rows: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets [B, T - 1]; padded targets are ignored, and causality hides padding on the right."""
    tensors = [torch.tensor(row) for row in rows]
    ids, targets = (pad_sequence(tensors, batch_first=True, padding_value=value) for value in (pad, IGNORED))
    return ids[:, :-1], targets[:, 1:]


def _write_model(model: LlamaForCausalLM, config: PretrainConfig, *, tokenizer: Any) -> None:
    """Write weights, architecture, tokenizer and the generation defaults with the end token.

    The stored type changes only the file: the architecture still says float32, and loaders cast up.
    """
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(getattr(torch, config.weights_dtype)).save_pretrained(config.output)
    model.to(torch.float32)
    model.config.dtype = "float32"
    model.config.save_pretrained(config.output)
    tokenizer.save_pretrained(config.output)
