"""A deterministic engine with an exact oracle, for tests of programs that use the service.

It is the generator's fake engine at policy version 0: with both, the KL of a run is exactly 0 at its first step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engine import EngineDescription, LogprobTask, TaskLogprobs
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256, FAKE_MAX_MODEL_LEN, FakeContext
from tether_services.runtime.text import ByteCodec


def fake_ref_logprobs(prompt_token_ids: Sequence[int], response_token_ids: Sequence[int]) -> list[float]:
    """Return what the fake engine answers for the response tokens, whatever the temperature.

    Each is -(1 + u) with u in [0, 1) from the hash of the tokens before it and the token.
    """
    context = FakeContext(prompt_token_ids, 0)
    logprobs = []
    for token in response_token_ids:
        logprobs.append(context.logprob(token))
        context.append(token)
    return logprobs


def fake_entropies(prompt_token_ids: Sequence[int], response_token_ids: Sequence[int]) -> list[float]:
    """Return the entropies that the fake engine answers: the log-probabilities without their sign."""
    return [-logprob for logprob in fake_ref_logprobs(prompt_token_ids, response_token_ids)]


class FakeReferenceEngine:
    """Answers with `fake_ref_logprobs` and `fake_entropies`."""

    def __init__(self, settings: ReferenceSettings) -> None:
        self.description = EngineDescription(
            engine="fake",
            base_model="fake",
            base_model_sha256=FAKE_BASE_SHA256,
            vocab_size=ByteCodec.vocab_size,
            max_model_len=settings.max_model_len or FAKE_MAX_MODEL_LEN,
        )

    async def start(self) -> None:
        """Do nothing."""

    async def compute_logprobs(self, tasks: Sequence[LogprobTask]) -> list[TaskLogprobs]:
        """Return the oracle's answers."""
        await asyncio.sleep(0)  # real engines compute in a thread: between batches the event loop has a turn
        return [_answer(task) for task in tasks]

    async def check(self) -> None:
        """Do nothing: a fake is always alive."""

    async def close(self) -> None:
        """Do nothing."""


def _answer(task: LogprobTask) -> TaskLogprobs:
    tokens = task.prompt_token_ids, task.response_token_ids
    return TaskLogprobs(fake_ref_logprobs(*tokens), fake_entropies(*tokens) if task.include_entropies else [])
