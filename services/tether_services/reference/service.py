"""The reference service on the wire: check, convert, call, convert."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import grpc
from prometheus_client import CollectorRegistry

from tether.errors import InternalError, InvalidArgumentError, UnavailableError
from tether.v1 import reference_pb2, reference_pb2_grpc
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engine import EngineDescription, LogprobTask, ReferenceEngine, TaskLogprobs
from tether_services.reference.engines import build_engine
from tether_services.reference.metrics import ReferenceMetrics
from tether_services.runtime.batching import Batcher
from tether_services.runtime.callers import charge_tokens
from tether_services.runtime.checks import check_temperature, check_token_ids
from tether_services.runtime.logging import log_event
from tether_services.runtime.server import Port

log = logging.getLogger(__name__)

SERVICE_NAME = "tether.v1.ReferenceService"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ReferenceService(reference_pb2_grpc.ReferenceServiceServicer):
    """Answers the RPCs of tether.v1.ReferenceService."""

    name = "reference"

    def __init__(self, settings: ReferenceSettings, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._metrics = ReferenceMetrics(registry, queue_limit=settings.batch.queue_limit)
        self._engine: ReferenceEngine | None = None
        self._batcher = Batcher[LogprobTask, TaskLogprobs](self._run_batch, settings.batch, self._metrics.queue)

    def ports(self) -> Sequence[Port]:
        """Return the data port."""
        return [
            Port("address", self._settings.address, [SERVICE_NAME], self._register, self._settings.max_message_bytes)
        ]

    def methods(self) -> Sequence[str]:
        """Return the names of the RPCs."""
        return ["ComputeLogprobs", "GetReference"]

    async def start(self) -> None:
        """Load the engine."""
        self._engine = await asyncio.to_thread(build_engine, self._settings)
        await self._engine.start()
        await self._engine.check()
        model = self._engine.description
        self._metrics.model.info({"base_model": model.base_model, "sha256": model.base_model_sha256})
        log_event(log, "model loaded", engine=model.engine, model=model.base_model, sha256=model.base_model_sha256)
        self._batcher.start()

    async def check(self) -> None:
        """Have the batcher take a turn and the engine evaluate one token."""
        await self._batcher.probe()
        await self._ready_engine().check()

    def on_failure(self, report: Callable[[BaseException], None]) -> None:
        """Report the death of the batcher."""
        self._batcher.on_death = report

    async def close(self) -> None:
        """Stop the batcher, then the engine."""
        await self._batcher.close()
        if self._engine is not None:
            await self._engine.close()

    async def ComputeLogprobs(
        self, request: reference_pb2.ComputeLogprobsRequest, context: Context
    ) -> reference_pb2.ComputeLogprobsResponse:
        """Return the log-probabilities of response tokens under the reference policy."""
        model = self._ready_engine().description
        tasks = read_tasks(request, model, max_items=self._settings.max_items)
        charge_tokens(sum(task.num_tokens for task in tasks))
        key = (tasks[0].temperature, tasks[0].include_entropies)
        answers = await self._batcher.submit_all(
            [(task, task.num_tokens) for task in tasks], key=key, timeout_seconds=context.time_remaining()
        )
        check_finite(answers)
        self._metrics.count_tokens(
            prompt=sum(len(task.prompt_token_ids) for task in tasks),
            response=sum(len(task.response_token_ids) for task in tasks),
        )
        return reference_pb2.ComputeLogprobsResponse(
            items=[
                reference_pb2.ItemLogprobs(ref_logprobs=answer.ref_logprobs, entropies=answer.entropies)
                for answer in answers
            ],
            base_model_sha256=model.base_model_sha256,
        )

    async def GetReference(
        self, request: reference_pb2.GetReferenceRequest, context: Context
    ) -> reference_pb2.GetReferenceResponse:
        """Return the reference model and its limits."""
        model = self._ready_engine().description
        return reference_pb2.GetReferenceResponse(
            engine=model.engine,
            base_model=model.base_model,
            base_model_sha256=model.base_model_sha256,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            max_items=self._settings.max_items,
        )

    def _register(self, server: grpc.aio.Server) -> None:
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(self, server)

    def _ready_engine(self) -> ReferenceEngine:
        if self._engine is None:
            raise UnavailableError("The engine is not loaded yet; call again shortly.", reason="STARTING")
        return self._engine

    async def _run_batch(self, tasks: Sequence[LogprobTask]) -> list[TaskLogprobs]:
        return await self._ready_engine().compute_logprobs(tasks)


def read_tasks(
    request: reference_pb2.ComputeLogprobsRequest, model: EngineDescription, *, max_items: int
) -> list[LogprobTask]:
    """Return the checked items of a request.

    Raises:
        InvalidArgumentError: Names the item and the field.
    """
    if not 1 <= len(request.items) <= max_items:
        raise InvalidArgumentError(f"{len(request.items)} items; 1 to {max_items} are accepted.", field="items")
    temperature = request.temperature if request.HasField("temperature") else 1.0
    check_temperature(temperature, field="temperature", allow_greedy=False)
    tasks = []
    for index, item in enumerate(request.items):
        check_length(item, index=index, max_model_len=model.max_model_len)
        check_token_ids(item.prompt_token_ids, field=f"items[{index}].prompt_token_ids", vocab_size=model.vocab_size)
        check_token_ids(
            item.response_token_ids, field=f"items[{index}].response_token_ids", vocab_size=model.vocab_size
        )
        task = LogprobTask(
            tuple(item.prompt_token_ids), tuple(item.response_token_ids), temperature, request.include_entropies
        )
        tasks.append(task)
    return tasks


def check_length(item: reference_pb2.LogprobItem, *, index: int, max_model_len: int) -> None:
    """Refuse an item that the model cannot read at once, before its ids are read; nothing is ever cut here."""
    prompt, response = len(item.prompt_token_ids), len(item.response_token_ids)
    if prompt + response > max_model_len:
        raise InvalidArgumentError(
            f"{prompt} prompt and {response} response tokens are {prompt + response} together; "
            f"the model reads at most {max_model_len}.",
            field=f"items[{index}]",
            reason="TOO_LONG",
        )


def check_finite(answers: Sequence[TaskLogprobs]) -> None:
    """Refuse to send a log-probability or an entropy that is not a finite number.

    Raises:
        InternalError: Names the item.
    """
    for index, answer in enumerate(answers):
        if not all(map(math.isfinite, [*answer.ref_logprobs, *answer.entropies])):
            raise InternalError(
                "The reference model gave a value that is not a finite number for this item.",
                field=f"items[{index}]",
                reason="NON_FINITE_LOGPROB",
            )
