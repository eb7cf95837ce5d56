"""A deterministic engine with an exact oracle: every token and log-probability is a published pure function.

Programs can be tested against it without a model: `fake_completion` says what the service must answer.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import (
    EngineCompletion,
    EngineDescription,
    GenerateCall,
    LoadedAdapter,
    Sampling,
    derive_seed,
)
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256, FAKE_MAX_MODEL_LEN, FakeContext
from tether_services.runtime.text import ByteCodec

FAKE_LINEAR_SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": (8, 8) for layer in range(2) for name in ("q_proj", "v_proj")
}
"""The linear layers that the fake base model claims to have."""
_FIRST_LETTER, _NUM_LETTERS = 3 + 32, 95  # ByteCodec ids of printable ASCII
_ENDS_ONE_IN = 32


def fake_logprob(token_ids: Sequence[int], position: int, version: int) -> float:
    """Return the log-probability of token_ids[position] after token_ids[:position] under a policy version.

    It is -(1 + u) with u in [0, 1) from the hash of the context, the version and the token.
    """
    return FakeContext(token_ids[:position], version).logprob(token_ids[position])


def fake_next_token(token_ids: Sequence[int], version: int, stream: int) -> int:
    """Return the token that follows token_ids under a policy version, in one random stream.

    Args:
        token_ids: Prompt and response so far.
        version: The policy version; 0 is the base model.
        stream: `derive_seed(seed, i)` of completion i; 0 when greedy.
    """
    return _next_token(FakeContext(token_ids, version), stream, allow_end=True)


def fake_completion(
    prompt_token_ids: Sequence[int], sampling: Sampling, version: int, *, stream: int
) -> EngineCompletion:
    """Return exactly what the fake engine answers for one completion. top_p and top_k do not change it."""
    codec = ByteCodec()
    context = FakeContext(prompt_token_ids, version)
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {codec.eos_id})
    token_ids: list[int] = []
    logprobs: list[float] = []
    while len(token_ids) < sampling.max_tokens:
        token = _next_token(context, stream, allow_end=not sampling.ignore_eos)
        token_ids.append(token)
        logprobs.append(context.logprob(token))
        context.append(token)
        if token in ends or any(text in codec.decode(token_ids) for text in sampling.stop):
            return EngineCompletion(token_ids, logprobs, "stop")
    return EngineCompletion(token_ids, logprobs, "length")


def _next_token(context: FakeContext, stream: int, *, allow_end: bool) -> int:
    draw = context.draw(b"token" + struct.pack("<Q", stream))
    if allow_end and draw % _ENDS_ONE_IN == 0:
        return ByteCodec.eos_id
    return _FIRST_LETTER + (draw >> 8) % _NUM_LETTERS


class FakeEngine:
    """Answers by hashing. Adapters are known by version only; their weights are never read."""

    def __init__(self, settings: GeneratorSettings) -> None:
        self._token_seconds = settings.fake_token_seconds
        self._loaded: set[int] = set()
        self.codec = ByteCodec()
        self.description = EngineDescription(
            engine="fake",
            base_model="fake",
            base_model_sha256=FAKE_BASE_SHA256,
            vocab_size=ByteCodec.vocab_size,
            max_model_len=settings.max_model_len or FAKE_MAX_MODEL_LEN,
            max_lora_rank=settings.adapters.max_rank,
            stop_token_ids=(ByteCodec.eos_id,),
            dtype="float32",
            linear_shapes=FAKE_LINEAR_SHAPES,
        )

    async def start(self) -> None:
        """Do nothing."""

    async def generate(self, call: GenerateCall) -> list[EngineCompletion]:
        """Return the oracle's completions after the configured delay."""
        version = self._version(call.adapter)
        greedy = call.sampling.temperature == 0
        completions = [
            fake_completion(
                call.prompt_token_ids,
                call.sampling,
                version,
                stream=0 if greedy else derive_seed(call.sampling.seed, index),
            )
            for index in range(call.n)
        ]
        await asyncio.sleep(self._token_seconds * max(len(completion.token_ids) for completion in completions))
        self._version(call.adapter)  # an adapter unloaded under a running request is a defect that tests must see
        return completions

    async def compute_logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: LoadedAdapter | None
    ) -> list[list[float]]:
        """Return the oracle's log-probabilities of tokens 1.. of each sequence."""
        version = self._version(adapter)
        return [[fake_logprob(ids, position, version) for position in range(1, len(ids))] for ids in sequences]

    async def load_adapter(self, adapter: LoadedAdapter) -> None:
        """Remember the adapter."""
        self._loaded.add(adapter.number)

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Forget the adapter."""
        self._loaded.remove(adapter.number)

    async def check(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    def _version(self, adapter: LoadedAdapter | None) -> int:
        if adapter is None:
            return 0
        if adapter.number not in self._loaded or not adapter.folder.is_dir():
            raise RuntimeError(f"adapter {adapter.name} is used but not loaded")
        return adapter.policy_version
