"""What an engine of the reference service is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class EngineDescription:
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


@dataclass(frozen=True, slots=True)
class LogprobTask:
    """One item to evaluate, already checked."""

    prompt_token_ids: tuple[int, ...]
    """Not empty."""
    response_token_ids: tuple[int, ...]
    """Not empty."""
    temperature: float
    """Divides the logits."""
    include_entropies: bool
    """Whether entropies are wanted."""

    @property
    def num_tokens(self) -> int:
        """Prompt plus response tokens."""
        return len(self.prompt_token_ids) + len(self.response_token_ids)


@dataclass(frozen=True, slots=True)
class TaskLogprobs:
    """The evaluation of one task."""

    ref_logprobs: list[float]
    """Natural log, one per response token."""
    entropies: list[float]
    """Nats, one per response token; empty unless asked for."""


class ReferenceEngine(Protocol):
    """Evaluates responses under the reference policy. Nothing in it blocks the event loop."""

    @property
    def description(self) -> EngineDescription:
        """Return what the engine serves; only after `start`."""
        ...

    async def start(self) -> None:
        """Load the model.

        Raises:
            InvalidArgumentError: Names the setting that does not fit.
        """
        ...

    async def compute_logprobs(self, tasks: Sequence[LogprobTask]) -> list[TaskLogprobs]:
        """Return the evaluations in order. All tasks have the same temperature and the same `include_entropies`."""
        ...

    async def check(self) -> None:
        """Answer a tiny request; raise if that is not possible."""
        ...

    async def close(self) -> None:
        """Stop; also after a start that failed."""
        ...
