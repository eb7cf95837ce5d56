"""Client of the reference-logprob server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tether.channel import ServiceClient
from tether.status import request_field
from tether.v1 import reference_pb2, reference_pb2_grpc

if TYPE_CHECKING:
    from tether.v1.reference_pb2_grpc import ReferenceServiceAsyncStub

__all__ = ["ItemLogprobs", "LogprobItem", "LogprobResult", "ReferenceClient", "ReferenceState"]


@dataclass(frozen=True, slots=True)
class LogprobItem:
    """One prompt and the response to evaluate, without padding."""

    prompt_token_ids: Sequence[int]
    """Not empty."""
    response_token_ids: Sequence[int]
    """Not empty."""


@dataclass(frozen=True, slots=True)
class ItemLogprobs:
    """The evaluation of one item."""

    ref_logprobs: tuple[float, ...]
    """Natural-log probability of each response token under the reference."""
    entropies: tuple[float, ...]
    """Entropy in nats of each next-token distribution; empty unless asked for."""


@dataclass(frozen=True, slots=True)
class LogprobResult:
    """Log-probabilities in the order of the items."""

    items: tuple[ItemLogprobs, ...]
    """One per item."""
    base_model_sha256: str
    """Content hash of the reference model."""


@dataclass(frozen=True, slots=True)
class ReferenceState:
    """The reference model and its limits."""

    engine: str
    """"fake" or "transformers"."""
    base_model: str
    """Name of the model."""
    base_model_sha256: str
    """Content hash of its config and weights."""
    vocab_size: int
    """Number of token ids."""
    max_model_len: int
    """Prompt plus response tokens at most."""
    max_items: int
    """Items per call at most."""


class ReferenceClient(ServiceClient):
    """Evaluates responses under the frozen reference policy."""

    @cached_property
    def _stub(self) -> ReferenceServiceAsyncStub:
        return reference_pb2_grpc.ReferenceServiceStub(self._channel)

    async def compute_logprobs(
        self,
        items: Sequence[LogprobItem],
        *,
        temperature: float = 1.0,
        include_entropies: bool = False,
        timeout_seconds: float | None = None,
    ) -> LogprobResult:
        """Return the log-probabilities of response tokens at the temperature they were sampled at.

        Raises:
            InvalidArgumentError: A field is out of range; the error names the item.
            ResourceExhaustedError: The queue is full.
        """
        with request_field("temperature"):
            request = reference_pb2.ComputeLogprobsRequest(temperature=temperature, include_entropies=include_entropies)
        request.items.extend(_item(item, index) for index, item in enumerate(items))
        response = await self._read(self._stub.ComputeLogprobs, request, timeout_seconds)
        return LogprobResult(
            items=tuple(ItemLogprobs(tuple(i.ref_logprobs), tuple(i.entropies)) for i in response.items),
            base_model_sha256=response.base_model_sha256,
        )

    async def get_reference(self, *, timeout_seconds: float | None = None) -> ReferenceState:
        """Return the reference model and its limits."""
        request = reference_pb2.GetReferenceRequest()
        response = await self._read(self._stub.GetReference, request, timeout_seconds)
        return ReferenceState(
            engine=response.engine,
            base_model=response.base_model,
            base_model_sha256=response.base_model_sha256,
            vocab_size=response.vocab_size,
            max_model_len=response.max_model_len,
            max_items=response.max_items,
        )


def _item(item: LogprobItem, index: int) -> reference_pb2.LogprobItem:
    with request_field(f"items[{index}]"):
        return reference_pb2.LogprobItem(
            prompt_token_ids=item.prompt_token_ids, response_token_ids=item.response_token_ids
        )
