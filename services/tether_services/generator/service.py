"""The generator as a service: GeneratorService, and AdapterService on the admin port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import grpc
from prometheus_client import CollectorRegistry

from tether.errors import InvalidArgumentError
from tether.v1 import adapter_pb2_grpc, generator_pb2, generator_pb2_grpc
from tether_services.generator.adapters import AdapterRegistry, Policy
from tether_services.generator.admin import MAX_ADMIN_MESSAGE_BYTES, AdapterParts, AdapterService
from tether_services.generator.admission import Admission
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import EngineCompletion, EngineDescription, GenerateCall, Sampling
from tether_services.generator.engines import build_engine
from tether_services.generator.fence import Fence
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.generator.pointer import ActivePointer
from tether_services.generator.proof import Prover
from tether_services.generator.pushes import AdapterPushes
from tether_services.generator.restoring import restore_versions
from tether_services.generator.storage import AdapterStorage
from tether_services.generator.uploads import Uploads
from tether_services.runtime.callers import charge_tokens
from tether_services.runtime.checks import check_name, check_range, check_temperature, check_text, check_token_ids
from tether_services.runtime.history import record
from tether_services.runtime.server import Fallible, Port
from tether_services.runtime.text import Message, check_message_count, check_messages

GENERATOR_NAME = generator_pb2.DESCRIPTOR.services_by_name["GeneratorService"].full_name
ADAPTER_HEALTH = f"{GENERATOR_NAME}/adapter"
"""Health name: NOT_SERVING while the version that was active before a restart is not loaded and proven again."""
MAX_STOPS = 8
MAX_STOP_CHARS = 64
MAX_STOP_TOKEN_IDS = 64
MAX_CHARS_PER_TOKEN = 64
"""Text longer than this times the context cannot fit, so it is refused before it is tokenised."""
MAX_SEED = 2**63 - 1
FINISH_REASONS = {"stop": generator_pb2.FINISH_REASON_STOP, "length": generator_pb2.FINISH_REASON_LENGTH}

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class GeneratorService(generator_pb2_grpc.GeneratorServiceServicer):
    """Wires the parts, and answers GeneratorService."""

    name = "generator"

    def __init__(self, settings: GeneratorSettings, registry: CollectorRegistry) -> None:
        self._settings = settings
        self.metrics = GeneratorMetrics(registry, queue_limit=settings.batch.queue_limit)
        self.engine = build_engine(settings, self.metrics.queue)
        self.storage = AdapterStorage(
            settings.adapters.folder,
            free_bytes=settings.adapters.free_bytes,
            quota_bytes=settings.adapters.quota_bytes,
        )
        self.adapters = AdapterRegistry(
            self.engine,
            self.storage,
            self.metrics,
            name=settings.admin_address,
            keep_versions=settings.adapters.keep_versions,
            keep_runs=settings.adapters.keep_runs,
        )
        fence, uploads = Fence(), Uploads(self.storage, expire_seconds=settings.adapters.upload_seconds)
        self._prover = Prover(self.engine, tolerance=settings.adapters.prove_tolerance)
        self._parts = AdapterParts(
            self.adapters,
            fence,
            ActivePointer(self.adapters, fence, self.metrics),
            uploads,
            AdapterPushes(self._prover, self.adapters, uploads, fence, self.metrics),
        )
        self._admission = Admission(self.metrics, limit=settings.batch.queue_limit)
        self._admin = AdapterService(
            self._parts, lambda: self.engine.description, max_bytes=settings.adapters.max_bytes
        )

    def ports(self) -> Sequence[Port]:
        """Return the data port and the admin port."""
        return (
            Port(
                "address",
                self._settings.address,
                [GENERATOR_NAME],
                lambda server: generator_pb2_grpc.add_GeneratorServiceServicer_to_server(self, server),
                self._settings.max_message_bytes,
            ),
            Port(
                "admin_address",
                self._settings.admin_address,
                [self._admin.full_name],
                lambda server: adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self._admin, server),
                max_message_bytes=MAX_ADMIN_MESSAGE_BYTES,
            ),
        )

    def methods(self) -> Sequence[str]:
        """Return the methods of both services."""
        own = generator_pb2.DESCRIPTOR.services_by_name["GeneratorService"].methods
        return [method.name for method in own] + self._admin.methods()

    async def start(self) -> None:
        """Take the adapter folder, load the base model and have it answer; then take back what was stored before."""
        await asyncio.to_thread(self.storage.open)
        await asyncio.to_thread(self._parts.fence.open, self.storage.folder / "fence.json")
        record("started", generator=self._settings.admin_address)
        await self.engine.start()
        await self.engine.check()
        await self._prover.start()
        self.metrics.describe(self.engine.description)
        if self.storage.is_lasting:
            self._parts.pointer.open(self.storage.folder / "active.json")
            await restore_versions(self.storage, self._parts.pushes, self.metrics)

    async def check(self) -> None:
        """Have the engine answer or show progress."""
        await self.engine.check()

    def parts(self) -> Sequence[str]:
        """Return the health name of the active adapter."""
        return [ADAPTER_HEALTH]

    def on_part(self, report: Callable[[str, bool], None]) -> None:
        """Report whether the active version can be used whenever that may have changed."""
        self.adapters.on_change = lambda: report(ADAPTER_HEALTH, self.adapters.holds_active)

    def on_failure(self, report: Callable[[BaseException], None]) -> None:
        """Report the death of the engine, where it has parts that can die."""
        if isinstance(self.engine, Fallible):
            self.engine.on_failure(report)

    async def close(self) -> None:
        """Stop pushes, then the engine, then give the adapter folder up."""
        await self._parts.pushes.close()
        await self.adapters.settle()
        await self.engine.close()
        await asyncio.to_thread(self.storage.close)

    async def Generate(
        self, request: generator_pb2.GenerateRequest, context: Context
    ) -> generator_pb2.GenerateResponse:
        """Sample n completions with one policy version."""
        description = self.engine.description
        form = check_request(request, description, max_n=self._settings.max_n)
        sampling = read_sampling(request.sampling, description)
        with self._admission.admit(request.n):
            prompt = await self._read_prompt(request, description)
            check_length(len(prompt), sampling.max_tokens, description.max_model_len, field=form)
            charge_tokens(len(prompt))
            version = request.policy_version if request.HasField("policy_version") else None
            with self.adapters.lease(run_id=request.run_id, policy_version=version) as policy:
                remaining = context.time_remaining() or 0.0
                call = GenerateCall(tuple(prompt), request.n, sampling, policy.adapter, remaining)
                completions = await self.engine.generate(call)
            charge_tokens(sum(len(completion.token_ids) for completion in completions))
            self.metrics.observe(prompt_tokens=len(prompt), completions=completions)
            texts = await asyncio.to_thread(self._decode_all, completions)
        return write_response(policy, prompt, completions, texts)

    async def GetGenerator(
        self, request: generator_pb2.GetGeneratorRequest, context: Context
    ) -> generator_pb2.GetGeneratorResponse:
        """Return what is served."""
        description = self.engine.description
        active = self.adapters.active
        version = self.adapters.find(active.run_id, active.policy_version)
        return generator_pb2.GetGeneratorResponse(
            engine=description.engine,
            base_model=description.base_model,
            base_model_sha256=description.base_model_sha256,
            vocab_size=description.vocab_size,
            max_model_len=description.max_model_len,
            max_n=self._settings.max_n,
            max_lora_rank=description.max_lora_rank,
            stop_token_ids=description.stop_token_ids,
            active_policy_version=active.policy_version,
            active_run_id=active.run_id,
            active_adapter_sha256=version.adapter.sha256 if version else "",
            loaded_policy_versions=self.adapters.pinnable_versions(),
        )

    async def _read_prompt(self, request: generator_pb2.GenerateRequest, description: EngineDescription) -> list[int]:
        """Return the prompt's token ids; text is tokenised off the event loop."""
        max_chars = MAX_CHARS_PER_TOKEN * description.max_model_len
        if request.prompt_token_ids:
            return list(request.prompt_token_ids)
        if request.prompt:
            check_text(request.prompt, field="prompt", max_chars=max_chars)
            prompt = await asyncio.to_thread(self.engine.codec.encode, request.prompt, add_special_tokens=True)
            check_token_ids(prompt, field="prompt", vocab_size=description.vocab_size)
            return prompt
        messages = [Message(message.role, message.content) for message in request.messages]
        check_messages(messages, field="messages", max_chars=max_chars)
        prompt = await asyncio.to_thread(self.engine.codec.encode_chat, messages, add_generation_prompt=True)
        check_token_ids(prompt, field="messages", vocab_size=description.vocab_size)
        return prompt

    def _decode_all(self, completions: Sequence[EngineCompletion]) -> list[str]:
        return [self.engine.codec.decode(completion.token_ids) for completion in completions]


def check_request(request: generator_pb2.GenerateRequest, description: EngineDescription, *, max_n: int) -> str:
    """Return the name of the field that holds the prompt.

    Raises:
        InvalidArgumentError: A field is out of range; sizes are checked before what they bound is read.
    """
    given = [name for name in ("prompt", "messages", "prompt_token_ids") if getattr(request, name)]
    if len(given) != 1:
        what = "none of them is" if not given else " and ".join(given) + " are"
        raise InvalidArgumentError(
            f"Exactly one of prompt, messages and prompt_token_ids must be set; {what}.",
            field=given[1] if given else "prompt",
        )
    check_message_count(len(request.messages), field="messages")
    if request.prompt_token_ids:
        check_length(len(request.prompt_token_ids), 1, description.max_model_len, field="prompt_token_ids")
        check_token_ids(request.prompt_token_ids, field="prompt_token_ids", vocab_size=description.vocab_size)
    check_range(request.n, field="n", low=1, high=max_n)
    if request.run_id:
        check_name(request.run_id, field="run_id")
    if request.policy_version < 0:
        raise InvalidArgumentError(f"{request.policy_version} is negative.", field="policy_version")
    return given[0]


def read_sampling(message: generator_pb2.SamplingParams, description: EngineDescription) -> Sampling:
    """Return the sampling parameters.

    Raises:
        InvalidArgumentError: Names the field that is out of range.
    """
    temperature = message.temperature if message.HasField("temperature") else 1.0
    top_p = message.top_p if message.HasField("top_p") else 1.0
    check_temperature(temperature, field="sampling.temperature", allow_greedy=True)
    if not 0 < top_p <= 1:
        raise InvalidArgumentError(f"{top_p:g} is outside (0, 1].", field="sampling.top_p")
    check_range(message.top_k, field="sampling.top_k", low=0, high=description.vocab_size)
    check_range(message.max_tokens, field="sampling.max_tokens", low=1, high=description.max_model_len - 1)
    if message.HasField("seed"):
        check_range(message.seed, field="sampling.seed", low=0, high=MAX_SEED)
    check_stops(message, description)
    return Sampling(
        max_tokens=message.max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=message.top_k,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        seed=message.seed if message.HasField("seed") else None,
        ignore_eos=message.ignore_eos,
    )


def check_stops(message: generator_pb2.SamplingParams, description: EngineDescription) -> None:
    """Refuse too many, empty or too long stop texts, unknown stop ids, and stops together with ignore_eos."""
    if len(message.stop) > MAX_STOPS:
        raise InvalidArgumentError(f"{len(message.stop)} stop texts; at most {MAX_STOPS}.", field="sampling.stop")
    for index, text in enumerate(message.stop):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidArgumentError(
                f"A stop text has 1 to {MAX_STOP_CHARS} characters, not {len(text)}.", field=f"sampling.stop[{index}]"
            )
    if len(message.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidArgumentError(f"At most {MAX_STOP_TOKEN_IDS} stop ids.", field="sampling.stop_token_ids")
    if message.stop_token_ids:
        check_token_ids(message.stop_token_ids, field="sampling.stop_token_ids", vocab_size=description.vocab_size)
    if message.ignore_eos and (message.stop or message.stop_token_ids):
        raise InvalidArgumentError(
            "ignore_eos promises max_tokens tokens, so it cannot be combined with stop or stop_token_ids.",
            field="sampling.ignore_eos",
        )


def check_length(prompt_tokens: int, max_tokens: int, max_model_len: int, *, field: str) -> None:
    """Refuse a request that does not fit the context; `field` holds the prompt."""
    if prompt_tokens + max_tokens > max_model_len:
        field = field if prompt_tokens >= max_model_len else "sampling.max_tokens"
        raise InvalidArgumentError(
            f"{prompt_tokens} prompt tokens and {max_tokens} new ones exceed the context of {max_model_len}.",
            field=field,
        )


def write_response(
    policy: Policy, prompt: Sequence[int], completions: Sequence[EngineCompletion], texts: Sequence[str]
) -> generator_pb2.GenerateResponse:
    """Return the response message."""
    return generator_pb2.GenerateResponse(
        completions=[
            generator_pb2.Completion(
                token_ids=completion.token_ids,
                logprobs=completion.logprobs,
                text=text,
                finish_reason=FINISH_REASONS[completion.finish_reason],
            )
            for completion, text in zip(completions, texts, strict=True)
        ],
        policy_version=policy.policy_version,
        adapter_sha256=policy.adapter.sha256 if policy.adapter else "",
        run_id=policy.run_id,
        prompt_token_ids=prompt,
    )
