"""A small random Llama on disk and samples for it: real parts, built in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tether_services.orchestrator.config import PpoConfig, TrainerConfig
from tether_services.orchestrator.trainer import RolloutBatch, Sample, Trainer

VOCAB_SIZE = 48


def write_tiny_llama(folder: Path, *, seed: int = 0, **overrides: object) -> Path:
    """Write a Llama of two layers with random weights, and return its folder."""
    shape: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**(shape | overrides))).save_pretrained(folder)
    return folder


def random_samples(count: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[Sample]:
    """Return samples of 1 to 6 prompt and 1 to 9 response tokens."""
    rng = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))]

    return [Sample(ids(6), ids(9)) for _ in range(count)]


def new_trainer(folder: Path, *, total_steps: int = 10, ppo: PpoConfig | None = None, **config: object) -> Trainer:
    """Return a trainer with a high learning rate, one thread and small adapters."""
    defaults = {"learning_rate": 1e-2, "lora_rank": 4, "lora_alpha": 8, "threads": 1, "device": "cpu"}
    settings = TrainerConfig.model_validate(defaults | config)
    return Trainer(folder, settings, ppo or PpoConfig(), total_steps=total_steps)


@torch.no_grad()
def randomise_adapters(trainer: Trainer, *, seed: int = 9) -> Trainer:
    """Return the trainer with adapters that are no identity, so that policy, critic and reference all differ."""
    generator = torch.Generator().manual_seed(seed)
    for name in trainer._trained:
        for parameter in trainer._model.adapter_parameters(name).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer


def in_float64(trainer: Trainer) -> Trainer:
    """Return the trainer with model and head in float64; to be called before the first update."""
    trainer._model._peft.double()
    trainer._model.value_head.double()
    return trainer


def trained_parameters(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    """Return all that the trainer changes, named `<adapter>/<parameter>`."""
    return {f"{a}/{n}": p for a in trainer._trained for n, p in trainer._model.trained_parameters(a).items()}


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a copy of all that the trainer changes, named `<adapter>/<parameter>`."""
    return {name: p.detach().clone() for name, p in trained_parameters(trainer).items()}


def score_samples(
    trainer: Trainer, samples: Sequence[Sample], *, scores: Sequence[float] | None = None, temperature: float = 1.0
) -> RolloutBatch:
    """Return the rollout batch that a generator and a reference which agree with the trainer would have given."""
    logprobs = trainer.compute_logprobs(samples, adapter="policy", temperature=temperature)
    ref_logprobs = trainer.compute_logprobs(samples, adapter="reference", temperature=temperature)
    return RolloutBatch(
        samples=samples,
        logprobs=[row.tolist() for row in logprobs],
        ref_logprobs=[row.tolist() for row in ref_logprobs],
        scores=scores or [float(sum(s.response_token_ids) % 7) - 3.0 for s in samples],
    )
