"""Client of the policy generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

from tether.channel import ServiceClient
from tether.status import request_field
from tether.v1 import generator_pb2, generator_pb2_grpc

if TYPE_CHECKING:
    from tether.v1.generator_pb2_grpc import GeneratorServiceAsyncStub

__all__ = ["Completion", "Generation", "GeneratorClient", "GeneratorState", "Message", "Prompt", "SamplingParams"]

_FINISH_REASONS: dict[int, Literal["stop", "length"]] = {
    generator_pb2.FINISH_REASON_STOP: "stop",
    generator_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str
    """What is said."""


Prompt = str | Sequence[Message] | Sequence[int]
"""Plain text, a conversation, or token ids that are used as they are."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling distribution; the service states and checks the ranges."""

    max_tokens: int = 64
    """New tokens at most."""
    temperature: float = 1.0
    """Softmax temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass; 1 is off."""
    top_k: int = 0
    """Keeps the k most likely tokens; 0 is off."""
    stop: Sequence[str] = ()
    """Texts that end a completion."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end a completion besides the model's own."""
    seed: int | None = None
    """Makes a repeat return the same tokens; None is not reproducible."""
    ignore_eos: bool = False
    """True: only max_tokens ends a completion."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation."""

    token_ids: tuple[int, ...]
    """Sampled ids, stop token included."""
    logprobs: tuple[float, ...]
    """Natural-log probabilities of token_ids under the distribution sampled from; same length."""
    text: str
    """token_ids as text without special tokens."""
    finish_reason: Literal["stop", "length"]
    """Why it ended."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The completions of one prompt, all made by one policy version."""

    completions: tuple[Completion, ...]
    """As many as asked for."""
    policy_version: int
    """The version that made them; 0 is the base model."""
    adapter_sha256: str
    """Hash of that version's adapter weights; empty for version 0."""
    run_id: str
    """The run that owns the version; empty before the first activation."""
    prompt_token_ids: tuple[int, ...]
    """The prompt as the engine saw it."""


@dataclass(frozen=True, slots=True)
class GeneratorState:
    """Engine, base model, limits, active and loaded versions of a generator."""

    engine: str
    """"fake", "transformers" or "vllm"."""
    base_model: str
    """Name of the base model."""
    base_model_sha256: str
    """Content hash of its config and weights."""
    vocab_size: int
    """Number of token ids."""
    max_model_len: int
    """Prompt plus completion tokens at most."""
    max_n: int
    """Largest n of a request."""
    max_lora_rank: int
    """Largest adapter rank accepted."""
    stop_token_ids: tuple[int, ...]
    """Token ids that end a completion."""
    active_policy_version: int
    """The version that requests without a pin use; 0 is the base model."""
    active_run_id: str
    """The run that owns it."""
    active_adapter_sha256: str
    """Hash of its adapter weights; empty for version 0."""
    loaded_policy_versions: tuple[int, ...]
    """Versions of the active run that a request may pin."""


class GeneratorClient(ServiceClient):
    """Samples completions from the policy."""

    @cached_property
    def _stub(self) -> GeneratorServiceAsyncStub:
        return generator_pb2_grpc.GeneratorServiceStub(self._channel)

    async def generate(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        sampling: SamplingParams | None = None,
        policy_version: int | None = None,
        run_id: str = "",
        timeout_seconds: float | None = None,
    ) -> Generation:
        """Return n completions of one prompt and the version that made them.

        Args:
            prompt: Text, a conversation, or token ids.
            n: Completions wanted.
            sampling: How to sample; None for the defaults of SamplingParams.
            policy_version: Pins a version; None takes the active one.
            run_id: Pins the run that owns the adapters; empty takes any.
            timeout_seconds: Deadline of this call.

        Raises:
            InvalidArgumentError: A field is out of range.
            FailedPreconditionError: The pinned run or version is not loaded.
            ResourceExhaustedError: The queue is full.
        """
        request = _generate_request(prompt, sampling or SamplingParams())
        with request_field("n"):
            request.n = n
        with request_field("policy_version"):
            if policy_version is not None:
                request.policy_version = policy_version
        with request_field("run_id"):
            request.run_id = run_id
        return _generation(await self._read(self._stub.Generate, request, timeout_seconds))

    async def get_generator(self, *, timeout_seconds: float | None = None) -> GeneratorState:
        """Return the state of the generator."""
        request = generator_pb2.GetGeneratorRequest()
        return _state(await self._read(self._stub.GetGenerator, request, timeout_seconds))


def chat_messages(messages: Sequence[Message], *, field: str) -> list[generator_pb2.ChatMessage]:
    """Return the messages as the contract spells them."""
    with request_field(field):
        return [generator_pb2.ChatMessage(role=message.role, content=message.content) for message in messages]


def _generate_request(prompt: Prompt, sampling: SamplingParams) -> generator_pb2.GenerateRequest:
    request = generator_pb2.GenerateRequest(sampling=_sampling(sampling))
    if isinstance(prompt, str):
        with request_field("prompt"):
            request.prompt = prompt
    elif prompt and isinstance(prompt[0], Message):
        request.messages.extend(chat_messages(cast("Sequence[Message]", prompt), field="messages"))
    else:
        with request_field("prompt_token_ids"):
            request.prompt_token_ids.extend(cast("Sequence[int]", prompt))
    return request


def _sampling(sampling: SamplingParams) -> generator_pb2.SamplingParams:
    with request_field("sampling"):
        return generator_pb2.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop=sampling.stop,
            stop_token_ids=sampling.stop_token_ids,
            seed=sampling.seed,
            ignore_eos=sampling.ignore_eos,
        )


def _generation(response: generator_pb2.GenerateResponse) -> Generation:
    completions = tuple(
        Completion(tuple(c.token_ids), tuple(c.logprobs), c.text, _FINISH_REASONS[c.finish_reason])
        for c in response.completions
    )
    return Generation(
        completions=completions,
        policy_version=response.policy_version,
        adapter_sha256=response.adapter_sha256,
        run_id=response.run_id,
        prompt_token_ids=tuple(response.prompt_token_ids),
    )


def _state(response: generator_pb2.GetGeneratorResponse) -> GeneratorState:
    return GeneratorState(
        engine=response.engine,
        base_model=response.base_model,
        base_model_sha256=response.base_model_sha256,
        vocab_size=response.vocab_size,
        max_model_len=response.max_model_len,
        max_n=response.max_n,
        max_lora_rank=response.max_lora_rank,
        stop_token_ids=tuple(response.stop_token_ids),
        active_policy_version=response.active_policy_version,
        active_run_id=response.active_run_id,
        active_adapter_sha256=response.active_adapter_sha256,
        loaded_policy_versions=tuple(response.loaded_policy_versions),
    )
