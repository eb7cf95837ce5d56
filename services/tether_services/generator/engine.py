"""What the generator asks of an engine, and the plain values that travel."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tether_services.runtime.text import TextCodec


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample a completion; already validated."""

    max_tokens: int
    """New tokens at most, 1 or more."""
    temperature: float = 1.0
    """0 is greedy; else in [0.01, 2]."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1 is off."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 is off."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion besides the model's own."""
    seed: int | None = None
    """Completion i draws from the stream `derive_seed(seed, i)`; None is not reproducible."""
    ignore_eos: bool = False
    """True: the model's own end tokens do not end a completion."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter version as an engine sees it."""

    number: int
    """Unique in the life of the process, 1 or more; never reused."""
    name: str
    """Unique in the life of the process."""
    run_id: str
    """The run that owns it."""
    policy_version: int
    """Its version in that run, 1 or more."""
    sha256: str
    """Hash of its weights file."""
    folder: Path
    """Holds adapter_config.json and adapter_model.safetensors; immutable until the engine has unloaded it."""


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One prompt and how to continue it."""

    prompt_token_ids: tuple[int, ...]
    """Not empty; every id is in the vocabulary."""
    n: int
    """Completions wanted."""
    sampling: Sampling
    """How to sample."""
    adapter: LoadedAdapter | None
    """The policy; None is the base model."""
    timeout_seconds: float
    """Time the caller still has."""


@dataclass(frozen=True, slots=True)
class EngineCompletion:
    """One sampled continuation."""

    token_ids: list[int]
    """Stop token included; never empty."""
    logprobs: list[float]
    """Natural log, under the distribution sampled from; those of temperature 1 when greedy."""
    finish_reason: Literal["stop", "length"]
    """Why it ended."""


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What the service must know of a started engine."""

    engine: str
    """"fake", "transformers" or "vllm"."""
    base_model: str
    """Name of the base model."""
    base_model_sha256: str
    """Content hash of the base model."""
    vocab_size: int
    """Number of token ids."""
    max_model_len: int
    """Prompt plus completion tokens at most."""
    max_lora_rank: int
    """Largest adapter rank."""
    stop_token_ids: tuple[int, ...]
    """The model's own end tokens."""
    dtype: str
    """Precision of the weights: float32, bfloat16, float16, int8 or nf4."""
    linear_shapes: Mapping[str, tuple[int, int]]
    """(inputs, outputs) of every linear layer that an adapter may change, by full module path."""


class Engine(Protocol):
    """Samples from a base model with or without one of its loaded adapters."""

    @property
    def codec(self) -> TextCodec:
        """Return the tokenizer; only after `start`."""
        ...

    @property
    def description(self) -> EngineDescription:
        """Return what the engine serves; only after `start`."""
        ...

    async def start(self) -> None:
        """Load the base model."""
        ...

    async def generate(self, call: GenerateCall) -> list[EngineCompletion]:
        """Return `call.n` completions. Cancelling the call frees what it holds."""
        ...

    async def compute_logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: LoadedAdapter | None
    ) -> list[list[float]]:
        """Return the log-probabilities of tokens 1.. of each sequence, given those before, at temperature 1."""
        ...

    async def load_adapter(self, adapter: LoadedAdapter) -> None:
        """Make an adapter usable. Raises whatever the library raises; then nothing of it stays loaded."""
        ...

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Forget an adapter that no request uses."""
        ...

    async def check(self) -> None:
        """Answer a tiny request or show progress since the last check; raise if the engine is dead."""
        ...

    async def close(self) -> None:
        """Stop."""
        ...


def derive_seed(seed: int | None, index: int) -> int:
    """Return the seed of completion `index`, in [0, 2^63).

    It is the upper 63 of the first 64 bits (big endian) of SHA-256 of the text "<seed>:<index>", so that the streams of
    neighbouring seeds never meet, as those of seed + index would. Without a seed it is random.
    """
    if seed is None:
        return secrets.randbits(63)
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
