"""Questions to the fake engines, whose answers are known exactly, asked by the clients of the product and recorded."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.reliability.checker import Verdict, check, read_history
from tests.reliability.recording import Recorder
from tether.errors import TetherError
from tether.reference import LogprobItem, ReferenceClient
from tether.reward import RewardClient, ScoreItem
from tether_services.reference.engines.fake import fake_ref_logprobs
from tether_services.reward.engines.fake import fake_text_score

__all__ = ["Answered", "Questions"]

LETTERS = "abcdefghijklmnopqrstuvwxyz "
WORD_IDS = (35, 129)
"""Token ids of printable characters: from, below."""


@dataclass(frozen=True, slots=True)
class Answered:
    """How a call ended, seen by its caller."""

    method: str
    sent: float
    """Monotonic seconds."""
    seconds: float
    code: str
    """OK or that of the error."""
    reason: str = ""
    """Of the error."""


@dataclass(slots=True)
class Questions:
    """Asks, records what was asked and answered, and knows what must be answered."""

    recorder: Recorder
    random: Random
    oracle: dict[str, float] = field(default_factory=dict)
    """What belongs to each key, for the checker."""
    answered: list[Answered] = field(default_factory=list)
    _numbers: Callable[[], int] = field(default_factory=lambda: itertools.count(1).__next__)

    async def score(self, client: RewardClient, *, deadline_seconds: float, must: bool = True) -> Answered:
        """Ask for one score.

        Args:
            client: Whose retries and breaker are on trial.
            deadline_seconds: Of the call.
            must: The call counts as lost if it is not answered.
        """
        prompt, response = self._text(24), self._text(12)

        async def ask() -> Mapping[str, float]:
            result = await client.score([ScoreItem(prompt, response)], timeout_seconds=deadline_seconds)
            return {f"{prompt}|{response}": result.scores[0].score}

        truth = {f"{prompt}|{response}": fake_text_score(prompt, response)}
        return await self._ask("Score", truth, ask, deadline_seconds, must)

    async def logprobs(self, client: ReferenceClient, *, deadline_seconds: float, must: bool = True) -> Answered:
        """Ask for the log-probabilities of a response; arguments as `score`."""
        prompt, response = ([self.random.randrange(*WORD_IDS) for _ in range(count)] for count in (8, 4))

        async def ask() -> Mapping[str, float]:
            item = LogprobItem(prompt, response)
            result = await client.compute_logprobs([item], timeout_seconds=deadline_seconds)
            return _by_place(prompt, response, result.items[0].ref_logprobs)

        truth = _by_place(prompt, response, fake_ref_logprobs(prompt, response))
        return await self._ask("ComputeLogprobs", truth, ask, deadline_seconds, must)

    def judge(self) -> Verdict:
        """Return the checker's verdict, every answer compared with what it must be."""
        return check(read_history(self.recorder.path), oracle=self.oracle)

    def codes(self) -> str:
        """Return how often calls ended in which way."""
        return ", ".join(
            f"{code} {count}" for code, count in Counter(call.code for call in self.answered).most_common()
        )

    async def _ask(
        self,
        method: str,
        truth: Mapping[str, float],
        ask: Callable[[], Awaitable[Mapping[str, float]]],
        deadline_seconds: float,
        must: bool,
    ) -> Answered:
        intent, began = f"{method} {self._numbers()}", time.monotonic()
        self.oracle.update(truth)
        if must:
            self.recorder.record("wanted", intent=intent)
        try:
            given = await self.recorder.call(method, deadline_seconds, ask())
        except TetherError as error:
            call = Answered(method, began, time.monotonic() - began, error.code.name, error.reason)
        else:
            call = Answered(method, began, time.monotonic() - began, "OK")
            for key in truth:
                self.recorder.record("served", policy_version=0, key=key, logprob=given.get(key, math.nan))
            if must:
                self.recorder.record("acked", intent=intent)
        self.answered.append(call)
        return call

    def _text(self, length: int) -> str:
        return "".join(self.random.choices(LETTERS, k=length))


def _by_place(prompt: list[int], response: list[int], logprobs: Sequence[float]) -> dict[str, float]:
    """Return the log-probability of each place of a response by its key."""
    return {f"{prompt}|{response}|{place}": value for place, value in enumerate(logprobs)}
