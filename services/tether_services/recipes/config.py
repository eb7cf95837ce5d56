"""Settings of the offline stages. Imports no torch, so that `--help` and `--dry-run` are quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tether_services.runtime.settings import Settings

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a Llama block."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share of a whole, in [0, 1)."""


class StageConfig(Settings):
    """What every stage has: where to write, how many threads, which seed."""

    output: Path
    """Folder to write; it is made, and files of an earlier run in it are replaced."""
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    """CPU threads for the tensor library, 1 to 256."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the weights and of the order of the data, 0 to 2^31 - 1."""


class PretrainConfig(StageConfig):
    """`tether train pretrain`: a byte-level BPE tokenizer and a small Llama trained from nothing on plain text."""

    text_files: Annotated[tuple[Path, ...], Field(min_length=1)]
    """UTF-8 text files. Where the separator occurs, it ends each document; elsewhere the whole file is one document."""
    separator: Annotated[str, Field(min_length=1)] = "<|endoftext|>"
    """The line that ends a document; text after the last one is unfinished and dropped."""
    held_out_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.05
    """Share of separated documents kept for validation, chosen by hash of the text, above 0 and at most 0.5."""
    tokenizer: Path | None = None
    """Folder of a tokenizer to use again; unset trains one."""
    vocab_size: Annotated[int, Field(ge=260, le=65536)] = 2048
    """Tokens in the vocabulary, 260 to 65,536: 256 bytes, 3 special tokens, merges."""
    hidden_size: Annotated[int, Field(ge=32, le=4096)] = 160
    """Width of the model, a multiple of `head_dim`, 32 to 4,096."""
    head_dim: Literal[32, 64, 128] = 32
    """Width of one attention head; serving engines take 32, 64 or 128."""
    num_layers: Annotated[int, Field(ge=1, le=64)] = 4
    """Decoder layers, 1 to 64."""
    intermediate_size: Annotated[int, Field(ge=32, le=16384)] = 432
    """Width of the feed-forward layers, 32 to 16,384."""
    context_tokens: Annotated[int, Field(ge=32, le=8192)] = 512
    """Longest sequence the model accepts, in tokens, 32 to 8,192."""
    block_tokens: Annotated[int, Field(ge=16, le=8192)] = 256
    """Length of a training block in tokens, 16 to `context_tokens`."""
    blocks_per_step: Annotated[int, Field(ge=1, le=4096)] = 16
    """Training blocks in one optimiser step, 1 to 4,096."""
    num_steps: Annotated[int, Field(ge=1, le=10_000_000)] = 2500
    """Optimiser steps, 1 to 10,000,000."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate rises, 0 to `num_steps`."""
    learning_rate: Annotated[float, Field(gt=0.0, le=0.1)] = 2e-3
    """Peak learning rate, above 0 and at most 0.1; it falls along a cosine to a tenth."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Decoupled weight decay of matrices, 0 to 1."""
    dropout: Fraction = 0.1
    """Share of the values in the residual stream that training sets to zero, in [0, 1); the written model has none."""
    eval_every: Annotated[int, Field(ge=1)] = 250
    """Steps between two measurements of the held-out loss; the weights with the lowest are kept."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the products in the forward and backward pass; bfloat16 is faster on processors that have it."""
    weights_dtype: Literal["float32", "float16"] = "float32"
    """Type the weights are stored in; they are trained and loaded in float32."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of head_dim {self.head_dim}")
        if self.block_tokens > self.context_tokens:
            raise ValueError(f"block_tokens {self.block_tokens} must not exceed context_tokens {self.context_tokens}")
        if self.warmup_steps > self.num_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must not exceed num_steps {self.num_steps}")
        return self


class RewardModelConfig(StageConfig):
    """`tether train reward`: a LoRA adapter and a score head on a base model, from labelled sentences."""

    base: Path
    """Folder of the causal language model whose body and tokenizer are used."""
    base_reference: str = ""
    """How `tether_reward.json` names the base, relative to the output folder; empty works it out from the two paths."""
    train_files: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Labelled sentences: CSV with columns label (0 or 1) and sentence, or text files `.pos` and `.neg`."""
    validation_files: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Labelled sentences to measure on; sentences that also occur here are taken out of the training data."""
    demonstration_files: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Text files of separated documents; the mean score of their held-out openings becomes 0."""
    separator: Annotated[str, Field(min_length=1)] = "<|endoftext|>"
    """The line that ends a document in the demonstration files."""
    held_out_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.05
    """Share of the demonstrations that is used, by hash of the text; equal to that of the pretraining."""
    demonstration_tokens: Annotated[int, Field(ge=1, le=8192)] = 80
    """How many first tokens of a demonstration are scored, 1 to 8,192."""
    max_length: Annotated[int, Field(ge=8, le=8192)] = 512
    """Longest text in tokens that the model scores, 8 to 8,192."""
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 16
    """Rank of the adapter, 1 to 256."""
    lora_alpha: Annotated[int, Field(ge=1, le=1024)] = 32
    """Scale of the adapter: its output is multiplied by `lora_alpha / lora_rank`; 1 to 1,024."""
    num_epochs: Annotated[int, Field(ge=1, le=1000)] = 4
    """Passes over the training sentences, 1 to 1,000."""
    group_size: Annotated[int, Field(ge=2, le=64)] = 8
    """Texts compared with each other in one ranked group, 2 to 64; half of them positive."""
    groups_per_step: Annotated[int, Field(ge=1, le=1024)] = 8
    """Ranked groups in one optimiser step, 1 to 1,024."""
    learning_rate: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-3
    """Peak learning rate, above 0 and at most 0.1; it falls along a cosine to a tenth."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps over which the learning rate rises, in [0, 1)."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Decoupled weight decay of matrices, 0 to 1."""
