"""Settings of the offline stages. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from tether_services.runtime.model_folder import Dtype
from tether_services.runtime.settings import Settings

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a Llama block."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share of a whole, in [0, 1)."""
TokenLimit = Annotated[int, Field(ge=8, le=131072)]
"""A length in tokens, 8 to 131,072."""
Shape = Literal["auto", "hh", "pairs", "ranked", "oasst", "instruction", "messages", "text", "labelled"]
Template = Literal["auto", "chat", "dialogue", "plain"]
Overlong = Literal["drop", "truncate"]


class DataConfig(Settings):
    """Where a stage's data comes from and how it is divided."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files (.jsonl .json .csv .txt .pos .neg .parquet, text also .gz) or hub data sets (org/name, org/name:split)."""
    shape: Shape = "auto"
    """What the rows look like; `tether data inspect --help` shows one of each. auto goes by the keys of the rows."""
    validation_sources: tuple[str, ...] = ()
    """Data to measure on; training rows with a prompt of these are left out. Empty: a share of the sources is kept."""
    validation_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.05
    """Share of the prompts kept for validation, chosen by hash of the prompt, above 0 and at most 0.5."""
    separator: Annotated[str, Field(min_length=1)] = "<|endoftext|>"
    """The line that ends a document in a text file; a file without it is one document."""
    max_malformed_share: Fraction = 0.01
    """Share of malformed rows above which the data is refused, in [0, 1)."""
    max_row_bytes: Annotated[int, Field(ge=1024, le=1_000_000_000)] = 1_000_000
    """Longest line of a file in bytes; longer ones are malformed."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Read no more rows of each source than this; unset reads all."""

    @field_validator("sources", "validation_sources")
    @classmethod
    def _expand_home(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(os.path.expanduser, sources))


class LoraSettings(Settings):
    """The adapter that is trained."""

    rank: Annotated[int, Field(ge=0, le=256)] = 16
    """Inner dimension, 1 to 256; 0 trains every weight of the base and writes a whole model."""
    alpha: Annotated[int, Field(ge=1, le=1024)] = 32
    """The adapter's output is multiplied by alpha / rank; 1 to 1,024."""
    dropout: Fraction = 0.0
    """Share of the adapter's inputs that training sets to zero, in [0, 1)."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = LORA_TARGETS
    """Names of the linear layers that get an adapter; of a reward model also of the embeddings."""


class TrainingSettings(Settings):
    """Optimiser, batch, evaluation and checkpoints."""

    learning_rate: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-4
    """Peak learning rate, above 0 and at most 0.1."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """After the rise: linear to 0, along a cosine to a tenth, or constant."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps over which the learning rate rises, in [0, 1)."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Decoupled weight decay of matrices, 0 to 1."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients above this norm are scaled down."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps its state in 8 bits (bitsandbytes)."""
    num_epochs: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """Passes over the data, above 0 and at most 1,000."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps; in place of `num_epochs` where it is set."""
    rows_per_step: Annotated[int, Field(ge=1, le=65536)] = 32
    """Rows in one optimiser step, a multiple of `micro_batch_rows`."""
    micro_batch_rows: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rows in one forward and backward pass."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between two rows of figures."""
    eval_every: Annotated[int, Field(ge=1)] = 100
    """Steps between two measurements on the validation data; there is one at the end in any case."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    """Steps between two checkpoints, from which `--resume` goes on."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=100)] = 1
    """Checkpoints kept during the run; a finished run keeps none."""
    keep_best: bool = False
    """End with the weights of the lowest validation loss among the checkpoints, and not with the last ones."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where the figures also go; wandb and mlflow take their address and key from their own environment variables."""

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.rows_per_step % self.micro_batch_rows:
            raise ValueError(
                f"rows_per_step {self.rows_per_step} must be a multiple of micro_batch_rows {self.micro_batch_rows}"
            )
        if self.keep_best and self.checkpoint_every != self.eval_every:
            raise ValueError(
                f"with keep_best, checkpoint_every {self.checkpoint_every} must equal eval_every {self.eval_every}"
            )
        return self


class PretrainTraining(TrainingSettings):
    """The defaults of a pretraining: everything is learned, from nothing."""

    learning_rate: Annotated[float, Field(gt=0.0, le=0.1)] = 2e-3
    """Peak learning rate, above 0 and at most 0.1."""
    warmup_fraction: Fraction = 0.04
    """Share of the steps over which the learning rate rises, in [0, 1)."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Decoupled weight decay of matrices, 0 to 1."""
    rows_per_step: Annotated[int, Field(ge=1, le=65536)] = 16
    """Rows in one optimiser step, a multiple of `micro_batch_rows`."""
    micro_batch_rows: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rows in one forward and backward pass."""
    num_epochs: Annotated[float, Field(gt=0.0, le=1000.0)] = 12.0
    """Passes over the data, above 0 and at most 1,000."""
    eval_every: Annotated[int, Field(ge=1)] = 250
    """Steps between two measurements on the validation data; there is one at the end in any case."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 250
    """Steps between two checkpoints, from which `--resume` goes on."""
    keep_best: bool = True
    """End with the weights of the lowest validation loss among the checkpoints, and not with the last ones."""


class StageConfig(Settings):
    """What every stage has."""

    output: Path
    """Folder to write: weights, tokenizer, manifest.json, history.jsonl, plots."""
    data: DataConfig
    training: TrainingSettings = TrainingSettings()
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    """CPU threads for the tensor library, 1 to 256."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """auto takes the GPU where there is one; else cpu, cuda."""
    dtype: Dtype = "float32"
    """Type of the frozen weights and of the products; trained weights are float32."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of new weights, dropout and the order of the data, 0 to 2^31 - 1."""


class FineTuneConfig(StageConfig):
    """What every stage after the pretraining has."""

    base: str
    """Folder of the model to start from (the output of an earlier stage, or any causal model), or a hub name."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Precision of the frozen base: as it is, 8 bits or 4 bits (bitsandbytes). Only an adapter can be trained on it."""
    lora: LoraSettings = LoraSettings()
    template: Template = "auto"
    """How prompts become text: the tokenizer's chat template, `Human:`/`Assistant:` dialogue, or plain, as they stand.
    auto takes the chat template where there is one, but leaves texts that are transcripts as they stand; without one,
    conversations are dialogue, and a text is continued as it stands, after a space where the seam has none."""
    max_tokens: TokenLimit = 512
    """Longest prompt and answer together, in tokens, 8 to 131,072."""
    overlong: Overlong = "drop"
    """What becomes of longer rows; both are counted. truncate cuts the front of the prompt first."""

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if self.quantization != "none" and self.lora.rank == 0:
            raise ValueError(f"a base in {self.quantization} cannot be trained whole: set lora.rank above 0")
        return self


class PretrainConfig(StageConfig):
    """`tether train pretrain`: a byte-level BPE tokenizer and a small Llama trained from nothing on plain text."""

    training: PretrainTraining = PretrainTraining()
    tokenizer: Path | None = None
    """Folder of a tokenizer to use again; unset trains one."""
    vocab_size: Annotated[int, Field(ge=260, le=65536)] = 2048
    """Tokens in the vocabulary, 260 to 65,536: 256 bytes, 3 special tokens, merges."""
    lowercase: bool = False
    """Make the new vocabulary blind to letter case: better for the base of a small reward model, which only reads; such
    a model writes lower case."""
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
    """Length of a training row in tokens, 16 to `context_tokens`."""
    dropout: Fraction = 0.1
    """Share of the values in the residual stream that training sets to zero, in [0, 1); the written model has none."""
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """Optimiser of the layers' matrices; embeddings and norms have AdamW."""
    weights_dtype: Literal["float32", "float16"] = "float32"
    """Type the weights are stored in; they are trained and loaded in float32."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of head_dim {self.head_dim}")
        if self.block_tokens > self.context_tokens:
            raise ValueError(f"block_tokens {self.block_tokens} must not exceed context_tokens {self.context_tokens}")
        if self.matrix_optimizer == "muon" and self.training.optimizer != "adamw":
            raise ValueError(f"{self.training.optimizer} does not go with muon: set matrix_optimizer to adamw")
        return self


class SftConfig(FineTuneConfig):
    """`tether train sft`: supervised fine-tuning on demonstrations; the prompt is not learned."""

    packing: bool = False
    """Put several rows into one sequence of `max_tokens`, without attention between them; `rows_per_step` and
    `micro_batch_rows` then count sequences. The validation loss is taken row by row in any case."""


class RewardModelConfig(FineTuneConfig):
    """`tether train reward`: a score head, and an adapter or the whole model, from rankings of K answers."""

    objective: Literal["ranking", "regression"] = "ranking"
    """ranking: Bradley-Terry over all pairs of a prompt; regression: squared error against the levels as scores."""
    demonstrations: DataConfig | None = None
    """Data whose scores get mean 0 and standard deviation 1; unset: the best answers of the training rankings."""
    demonstration_tokens: TokenLimit | None = None
    """Score only this many first tokens of a demonstration; unset scores all."""
    base_reference: str = ""
    """How the written files name the base, relative to the output folder; empty works it out from the two paths."""
    group_size: Annotated[int, Field(ge=2, le=64)] = 8
    """Labelled sentences only: how many texts are put into one ranking, half of them positive, 2 to 64."""
    max_sentences: Annotated[int, Field(ge=1, le=16)] = 1
    """Labelled sentences only: a training text joins 1 to this many of one label, 1 to 16; to score longer texts."""
    token_dropout: Fraction = 0.0
    """Labelled sentences only: share of the tokens that a training text leaves out, others in every pass, in [0, 1)."""
    dropout: Fraction = 0.0
    """Share of the values in the residual stream that training sets to zero, in [0, 1); for small models."""


class DpoConfig(FineTuneConfig):
    """`tether train dpo`: direct preference optimisation, without a reward model."""

    beta: Annotated[float, Field(gt=0.0, le=100.0)] = 0.1
    """Weight of the implicit KL to the base, above 0."""
    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss on a pair with lead x = log ratio of the better answer - that of the other one, ratios to the reference:
    sigmoid: -log sigmoid(beta x); ipo: (x - 1 / (2 beta))^2 with both log ratios per token, as TRL has it."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs taken to be the wrong way round, in [0, 0.5); sigmoid only."""
    pairs: Literal["all", "best_worst"] = "all"
    """Which pairs of a ranking of more than two answers are learned from."""
    reference: str = ""
    """Address of a reference service that holds the base (host:port); its log-probabilities are asked for before the
    training. Empty computes them here."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.kind != "sigmoid":
            raise ValueError(f"label_smoothing has no meaning with kind {self.kind}: set it to 0")
        return self
