"""What an engine of the reward service is, and the plain values that travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tether.errors import TetherError
from tether_services.runtime.text import TextCodec


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What the service must know of a started engine."""

    engine: str
    """"fake", "transformers" or "rules"."""
    sha256: str
    """Content hash of what it computes with."""
    gain: float
    """value = gain * (raw - bias), unless the configuration says otherwise; 1 where it has no scale of its own."""
    bias: float
    """See gain; 0 where it has no scale of its own."""
    max_model_len: int
    """Tokens per item at most; 0 if it reads text."""
    vocab_size: int
    """Number of token ids; 0 if it reads text."""
    codec: TextCodec | None
    """Its tokenizer; None if it reads text."""
    ends_text: bool = False
    """Whether it was trained on texts with their end token, which is then put behind a text to score."""

    @property
    def reads_tokens(self) -> bool:
        """Whether it judges token ids; else it judges text."""
        return self.max_model_len > 0


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """One item to judge, in the forms that the components of its model read; a form that none reads is empty."""

    prompt: str = ""
    """The prompt as text."""
    response: str = ""
    """The response as text."""
    prompt_token_ids: tuple[int, ...] = ()
    """The prompt as token ids, cut from the left where the item was too long."""
    response_token_ids: tuple[int, ...] = ()
    """The response as token ids, never cut."""

    @property
    def num_tokens(self) -> int:
        """Prompt plus response tokens."""
        return len(self.prompt_token_ids) + len(self.response_token_ids)


class RewardEngine(Protocol):
    """Computes one component of a score. Nothing in it blocks the event loop."""

    @property
    def description(self) -> EngineDescription:
        """Return what the engine computes with; only after `start`."""
        ...

    async def start(self) -> None:
        """Load what is needed.

        Raises:
            InvalidArgumentError: Names the setting that does not fit.
        """
        ...

    async def score(self, tasks: Sequence[ScoreTask]) -> list[float | TetherError]:
        """Return the raw values in order, or why there is none. A value need not be finite: the caller checks."""
        ...

    async def check(self) -> None:
        """Answer a tiny request; raise if that is not possible."""
        ...

    async def close(self) -> None:
        """Stop; also after a start that failed."""
        ...
