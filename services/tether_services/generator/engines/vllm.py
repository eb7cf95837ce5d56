"""The fast engine: vLLM's AsyncLLM in this process, with runtime LoRA. No HTTP server, no in-place reload.

Several kinds of bad input would kill vLLM or make it sample from the base model without a word; so adapters and
requests are verified before they come here.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from tether.errors import DeadlineExceededError, UnavailableError
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import (
    EngineCompletion,
    EngineDescription,
    GenerateCall,
    LoadedAdapter,
    Sampling,
    derive_seed,
)
from tether_services.generator.engines.model_files import (
    ModelFiles,
    check_logprobs,
    describe_model,
    read_linear_shapes,
    read_model_files,
)
from tether_services.generator.engines.orphans import OrphanGuard
from tether_services.generator.engines.zero_adapter import write_zero_adapter
from tether_services.runtime.callers import current_caller
from tether_services.runtime.fair_gate import FairGate
from tether_services.runtime.metrics import QueueMetrics
from tether_services.runtime.text import HfCodec
from tether_services.runtime.work_thread import WorkThread

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for max_lora_rank."""
MAX_LORAS = 4
"""Adapters per batch: the old version, the new one, one being proven, and the zero adapter."""
SPARE_SEQUENCES = 4
"""Places beyond batch.max_items, so that checks and proofs never wait behind a full house."""
CPU_MEMORY_SHARE, GPU_MEMORY_SHARE = 0.2, 0.9
SHUTDOWN_SECONDS = 1.0
"""The engine process gets this long before it is killed; it has nothing to save."""
CHECK_TOKEN_IDS = (0, 0)

# Set before vLLM is imported, unless the user has set them.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CONFIGURE_LOGGING": "0",  # our own log format; warnings of the engine process still reach stderr
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding takes cores from the other services and ignores OMP_NUM_THREADS
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # gRPC servers must not be forked
}


class VllmEngine:
    """Feeds at most `batch.max_items` completions to vLLM at once; the rest wait here, where they can be dropped."""

    codec: HfCodec
    description: EngineDescription

    def __init__(self, settings: GeneratorSettings, queue: QueueMetrics) -> None:
        self._settings = settings
        self._queue = queue
        batch = settings.batch
        self._gate = FairGate(batch.max_items, training_share=batch.training_share, credit_tokens=batch.credit_tokens)
        # One thread for the life of the engine: the child process is told to die with the thread that started it.
        self._thread = WorkThread("vllm")
        self._numbers = itertools.count()
        self._num_open = 0
        """Requests that the engine has not answered yet."""
        self._llm: Any = None
        self._guard: OrphanGuard | None = None
        self._base: LoadedAdapter | None = None
        """What stands for no adapter; None where vLLM tells the two apart."""

    async def start(self) -> None:
        """Start the engine process; takes 20 to 45 seconds on a small CPU."""
        await self._thread.run(self._load)
        if self._base is not None:
            await self.load_adapter(self._base)

    async def generate(self, call: GenerateCall) -> list[EngineCompletion]:
        """Return the completions, one vLLM request each; cancelling aborts them in the engine.

        One request with n completions would give completion i the seed + i: neighbouring seeds would share streams.
        """
        tasks = [
            asyncio.create_task(self._generate_one(call, derive_seed(call.sampling.seed, index)))
            for index in range(call.n)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def compute_logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: LoadedAdapter | None
    ) -> list[list[float]]:
        """Return the log-probabilities of tokens 1.. of each sequence.

        They are prompt log-probabilities, which vLLM computes at temperature 1 in all modes.
        """
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        scored = []
        for ids in sequences:  # one after the other: the spare places are few
            output = await self._ask(ids, params, adapter)
            pairs = zip(output.prompt_logprobs[1:], ids[1:], strict=True)  # the first entry is None
            scored.append([float(entry[token].logprob) for entry, token in pairs])
        return scored

    async def load_adapter(self, adapter: LoadedAdapter) -> None:
        """Load an adapter under its own name and number.

        Raises:
            RuntimeError: vLLM did not take it.
        """
        # add_lora answers True for a number that is in use and keeps the old weights.
        if adapter.number in await self._llm.list_loras():
            raise RuntimeError(f"adapter number {adapter.number} is in use")
        await self._llm.add_lora(_lora_request(adapter))
        if adapter.number not in await self._llm.list_loras():
            raise RuntimeError(f"vLLM does not list adapter {adapter.name} after loading it")

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Drop an adapter; its folder must still exist."""
        await self._llm.remove_lora(adapter.number)

    async def check(self) -> None:
        """Have the engine process compute one token, or where it has work take a turn.

        A token may wait behind many prompts, or for memory that only the end of a completion frees; a call is answered
        between two steps of the engine.
        """
        await self._llm.check_health()
        if self._num_open:
            await self._llm.list_loras()
            return
        await self.compute_logprobs([CHECK_TOKEN_IDS], None)

    async def close(self) -> None:
        """Stop the engine process."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            stop = functools.partial(llm.shutdown, timeout=SHUTDOWN_SECONDS)
            await self._thread.run(stop)
            resources = getattr(llm.engine_core, "resources", None)
            if resources is not None:  # vLLM leaves its sockets' context to the garbage collector, which complains
                resources.ctx.destroy(linger=0)
        if self._guard is not None:
            guard, self._guard = self._guard, None
            await asyncio.to_thread(guard.stop)
        if self._base is not None:
            await asyncio.to_thread(shutil.rmtree, self._base.folder, ignore_errors=True)
        await self._thread.close()

    def _load(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu = bool(current_platform.is_cpu())
        files = read_model_files(self._settings, on_gpu=not on_cpu)
        self.codec = HfCodec(files.folder)
        self.description = describe_model(files, self._settings, read_linear_shapes(files))
        self._base = write_zero_adapter(self.description.linear_shapes) if on_cpu else None
        targets = sorted({path.rpartition(".")[2] for path in self.description.linear_shapes})
        arguments = engine_arguments(self._settings, files, targets, on_cpu=on_cpu)
        self._guard = OrphanGuard()
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._guard.started()

    async def _generate_one(self, call: GenerateCall, seed: int) -> EngineCompletion:
        tokens = len(call.prompt_token_ids) + call.sampling.max_tokens
        async with self._place(call.timeout_seconds, tokens=tokens):
            params = sampling_params(call.sampling, seed=seed)
            output = (await self._ask(call.prompt_token_ids, params, call.adapter)).outputs[0]
        token_ids = list(output.token_ids)
        logprobs = [float(entry[token].logprob) for entry, token in zip(output.logprobs, token_ids, strict=True)]
        reason: Literal["stop", "length"] = "stop" if output.finish_reason == "stop" else "length"
        return EngineCompletion(token_ids, check_logprobs(logprobs), reason)

    @asynccontextmanager
    async def _place(self, timeout_seconds: float, *, tokens: int) -> AsyncIterator[None]:
        """Hold one of the places in the engine, waiting for it until the caller's deadline."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._queue.depth.inc()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._gate.enter(tokens=tokens)
        except TimeoutError as error:
            self._queue.rejected.labels("deadline").inc()
            self._queue.count_items(current_caller().name, "dropped")
            raise DeadlineExceededError("The deadline passed while the completion waited in the queue.") from error
        finally:
            self._queue.depth.dec()
        self._queue.wait.observe(loop.time() - started)
        self._queue.count_items(current_caller().name, "executed")
        try:
            yield
        finally:
            self._gate.leave()

    async def _ask(self, token_ids: Sequence[int], params: Any, adapter: LoadedAdapter | None) -> Any:
        """Return the final output of one vLLM request."""
        from vllm.v1.engine.exceptions import EngineDeadError

        request_id = f"{next(self._numbers)}"
        adapter = adapter or self._base
        lora = None if adapter is None else _lora_request(adapter)
        prompt = {"prompt_token_ids": list(token_ids)}
        final = None
        self._num_open += 1
        try:
            async for output in self._llm.generate(prompt, params, request_id, lora_request=lora):
                final = output
        except EngineDeadError as error:
            raise UnavailableError(
                "The engine has died; the service must be restarted.", reason="ENGINE_DEAD"
            ) from error
        finally:
            self._num_open -= 1
        if final is None:
            raise RuntimeError("vLLM ended a request without an answer")
        return final


def engine_arguments(
    settings: GeneratorSettings, files: ModelFiles, targets: list[str], *, on_cpu: bool
) -> dict[str, Any]:
    """Return the arguments of AsyncEngineArgs; `targets` are the names of the layers that adapters may change."""
    return {
        "model": str(files.folder),
        "dtype": files.dtype,
        "quantization": "bitsandbytes" if settings.quantization == "nf4" else None,
        "max_model_len": files.max_model_len,
        "max_num_seqs": settings.batch.max_items + SPARE_SEQUENCES,
        "gpu_memory_utilization": settings.gpu_memory_utilization or (CPU_MEMORY_SHARE if on_cpu else GPU_MEMORY_SHARE),
        "enforce_eager": on_cpu,
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_loras": MAX_LORAS,
        # Kept versions of one run, the active one, the one being proven, the zero adapter, and retiring ones that
        # requests still use. Those of other kept runs may be evicted: an adapter that is used again is read from its
        # folder, which exists as long as it can be named.
        "max_cpu_loras": settings.adapters.keep_versions + 5,
        # Leaves the output layer alone. With it wrapped for LoRA, prompt log-probabilities in a batch of several
        # requests kill the engine of vLLM 0.32 on CPU (add_lora_logits has an index per request, not per row).
        "lora_target_modules": targets,
        "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= settings.adapters.max_rank),
        "logprobs_mode": "processed_logprobs",  # the default is before temperature and filters
        "max_logprobs": 1,
        "disable_log_stats": True,
        "trust_remote_code": False,
        "seed": 0,
    }


def sampling_params(sampling: Sampling, *, seed: int) -> Any:
    """Return vLLM's parameters for one completion."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        ignore_eos=sampling.ignore_eos,
        seed=seed,
        logprobs=0,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _lora_request(adapter: LoadedAdapter) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=adapter.name, lora_int_id=adapter.number, lora_path=str(adapter.folder))
