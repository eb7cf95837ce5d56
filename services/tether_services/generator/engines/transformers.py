"""The embedded engine: a transformers model with PEFT adapters, in static batches, in one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import (
    EngineCompletion,
    EngineDescription,
    GenerateCall,
    LoadedAdapter,
    derive_seed,
)
from tether_services.generator.engines.decoding import DecodingModel, Row, decode_batch
from tether_services.generator.engines.model_files import (
    check_logprobs,
    describe_model,
    find_linear_shapes,
    read_model_files,
)
from tether_services.runtime.batching import Batcher
from tether_services.runtime.metrics import QueueMetrics
from tether_services.runtime.model_folder import pick_device
from tether_services.runtime.pretrained import load_pretrained
from tether_services.runtime.text import HfCodec
from tether_services.runtime.work_thread import WorkThread

CHECK_TOKEN_IDS = (0, 0)


class TransformersEngine:
    """Gathers completions of one policy into a batch, decodes it to the end, takes the next one.

    Everything that touches the model runs in one thread, so a batch never sees an adapter change.
    """

    codec: HfCodec
    description: EngineDescription

    def __init__(self, settings: GeneratorSettings, queue: QueueMetrics) -> None:
        self._settings = settings
        self._thread = WorkThread("transformers")
        self._batcher: Batcher[tuple[Row, LoadedAdapter | None], EngineCompletion] = Batcher(
            self._run_batch, settings.batch, queue
        )
        self._model: Any = None
        self._peft: Any = None
        self._current: str | None = None

    async def start(self) -> None:
        """Load tokenizer and weights."""
        await self._thread.run(self._load)
        self._batcher.start()

    async def generate(self, call: GenerateCall) -> list[EngineCompletion]:
        """Return the completions; rows of a cancelled call leave their batch at the next step."""
        rows = [
            Row(call.prompt_token_ids, call.sampling, derive_seed(call.sampling.seed, index)) for index in range(call.n)
        ]
        cost = len(call.prompt_token_ids) + call.sampling.max_tokens
        try:
            completions = await self._batcher.submit_all(
                [((row, call.adapter), cost) for row in rows],
                key=call.adapter.number if call.adapter else 0,
                timeout_seconds=call.timeout_seconds,
            )
        finally:
            for row in rows:
                row.abandoned = True
        for completion in completions:
            check_logprobs(completion.logprobs)
        return completions

    async def compute_logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: LoadedAdapter | None
    ) -> list[list[float]]:
        """Return the log-probabilities of tokens 1.. of each sequence, all in one turn between two batches."""
        return await self._thread.run(lambda: [self._score(list(ids), adapter) for ids in sequences])

    async def load_adapter(self, adapter: LoadedAdapter) -> None:
        """Read the adapter's weights."""
        await self._thread.run(self._load_adapter, adapter)

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Drop the adapter's weights."""
        await self._thread.run(self._unload_adapter, adapter)

    def on_failure(self, report: Callable[[BaseException], None]) -> None:
        """Report the death of the batcher."""
        self._batcher.on_death = report

    async def check(self) -> None:
        """Have the batcher take a turn, then run a tiny forward pass, or see that decoding moves on."""
        await self._batcher.probe()
        await self._thread.wait_for_life(self.compute_logprobs([CHECK_TOKEN_IDS], None))

    async def close(self) -> None:
        """Finish the running batch and drop the model."""
        await self._batcher.close()
        await self._thread.close()
        self._model = self._peft = None

    async def _run_batch(self, items: Sequence[tuple[Row, LoadedAdapter | None]]) -> list[EngineCompletion]:
        adapter = items[0][1]
        rows = [row for row, _ in items]
        return await self._thread.run(self._decode, rows, adapter)

    def _load(self) -> None:
        from transformers import AutoModelForCausalLM

        device = torch.device(pick_device(self._settings.device))
        files = read_model_files(self._settings, on_gpu=device.type == "cuda")
        torch.set_num_threads(self._settings.threads)
        self.codec = HfCodec(files.folder)
        self._model = load_pretrained(
            AutoModelForCausalLM,
            files.folder,
            dtype=files.dtype,
            field="model",
            quantization=self._settings.quantization,
            device=str(device),
        )
        self.description = describe_model(files, self._settings, find_linear_shapes(self._model))
        self._decoding = DecodingModel(
            forward=self._model,
            config=self._model.config,
            codec=self.codec,
            stop_token_ids=files.stop_token_ids,
            vocab_size=self.description.vocab_size,
            device=device,
        )

    def _decode(self, rows: Sequence[Row], adapter: LoadedAdapter | None) -> list[EngineCompletion]:
        self._switch_to(adapter)
        return decode_batch(self._decoding, rows, self._thread.tick)

    @torch.inference_mode()
    def _score(self, token_ids: list[int], adapter: LoadedAdapter | None) -> list[float]:
        self._switch_to(adapter)
        ids = torch.tensor([token_ids], device=self._decoding.device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        values = torch.log_softmax(logits, dim=-1).gather(-1, ids[0, 1:, None])[:, 0]
        return [float(value) for value in values.tolist()]

    def _load_adapter(self, adapter: LoadedAdapter) -> None:
        from peft import PeftModel

        folder, name = str(adapter.folder), _peft_name(adapter)
        self._current = None
        try:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._model, folder, adapter_name=name)
            else:
                self._peft.load_adapter(folder, adapter_name=name)
        except BaseException:  # an interruption too must leave nothing half-done
            self._remove_layers(name)
            raise
        finally:
            self._model.requires_grad_(False).eval()
            self._switch_to(None)

    def _remove_layers(self, name: str) -> None:
        """Take out of the model what PEFT leaves in it when a load fails half-way."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self._model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter([])
                module.delete_adapter(name)
        if self._peft is not None:
            self._peft.peft_config.pop(name, None)
        elif hasattr(self._model, "peft_config"):
            del self._model.peft_config

    def _unload_adapter(self, adapter: LoadedAdapter) -> None:
        self._peft.base_model.set_adapter([])  # PEFT would otherwise activate another one by itself
        self._peft.delete_adapter(_peft_name(adapter))
        self._current = None
        self._switch_to(None)

    def _switch_to(self, adapter: LoadedAdapter | None) -> None:
        """Have the next forward passes use one adapter, or none."""
        wanted = "" if adapter is None else _peft_name(adapter)
        if self._peft is None or wanted == self._current:
            return
        if adapter is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.base_model.set_adapter(wanted, inference_mode=True)
        self._current = wanted


def _peft_name(adapter: LoadedAdapter) -> str:
    """Return a name without dots, which torch does not allow in a module's name."""
    return f"adapter_{adapter.number}"
