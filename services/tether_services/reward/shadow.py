"""A candidate scores what a base has scored, after the answer, and the differences are counted."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from tether.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from tether_services.reward.comparison import MAX_RESPONSES
from tether_services.reward.config import ShadowSettings
from tether_services.reward.items import ScoreInput
from tether_services.reward.metrics import ShadowMetrics
from tether_services.reward.models import Judgement
from tether_services.reward.names import ModelId
from tether_services.reward.pool import HeldModel
from tether_services.reward.scoring import Judged, Scorer
from tether_services.runtime.callers import Caller, CurrentCall, enter_call
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)

SHADOW_CALLER: Final = Caller("shadow", frozenset(), weight=0.05)
"""Who asks for the candidate's scores: its items come after those of callers."""
CHUNK_ITEMS: Final = 8
"""Items that are queued together: the most that a caller ever finds before its own."""
BUSY = (ResourceExhaustedError, DeadlineExceededError, UnavailableError)
"""What says that there was no room or time, which is not the candidate's failure."""


@dataclass(slots=True)
class Figures:
    """How candidate and base differ so far."""

    num_scored: int = 0
    """Items that both have scored."""
    num_dropped: int = 0
    """Items left out because the service was busy."""
    num_failed: int = 0
    """Items that the candidate could not score."""
    sum_difference: float = 0.0
    """Of candidate minus base."""
    sum_abs_difference: float = 0.0
    """Of its absolute value."""
    num_pairs: int = 0
    """Pairs of responses to one prompt that both have scored."""
    num_agreeing_pairs: int = 0
    """Those that both put in the same order."""

    @property
    def mean_difference(self) -> float:
        """Return the mean of candidate minus base; 0 if there is none."""
        return self.sum_difference / self.num_scored if self.num_scored else 0.0

    @property
    def mean_abs_difference(self) -> float:
        """Return the mean of the absolute difference; 0 if there is none."""
        return self.sum_abs_difference / self.num_scored if self.num_scored else 0.0


@dataclass(frozen=True, slots=True)
class Shadow:
    """Who scores whose calls again, and what came of it."""

    base: HeldModel
    """Answers the calls."""
    candidate: HeldModel
    """Scores them again."""
    fraction: float
    """Share of the calls, in (0, 1]."""
    figures: Figures
    """What came of it."""


@dataclass(frozen=True, slots=True)
class Pending:
    """The scored items of one call that wait for the candidate."""

    shadow: Shadow
    """Who compares."""
    inputs: Sequence[ScoreInput]
    """As the caller sent them."""
    scores: Sequence[float]
    """Of the base, one for each."""


class ShadowScorer:
    """Scores along. One task does it, a few items at a time, so that callers hardly notice."""

    def __init__(
        self, scorer: Scorer, settings: ShadowSettings, metrics: ShadowMetrics, *, chooser: random.Random | None = None
    ) -> None:
        """Prepare; `start` begins the work.

        Args:
            scorer: Where the candidate's scores come from.
            settings: Limits.
            metrics: Where differences are reported.
            chooser: Picks the calls; a fresh one otherwise.
        """
        self._scorer = scorer
        self._settings = settings
        self._metrics = metrics
        self._chooser = chooser or random.Random()
        self._waiting: deque[Pending] = deque()
        self._num_waiting = 0
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.current: Shadow | None = None
        """What is compared; None while nothing is."""

    def start(self) -> None:
        """Begin to score along."""
        self._task = asyncio.create_task(self._work(), name="reward shadow")

    async def close(self) -> None:
        """Stop; what waits is not scored."""
        self.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def set(self, base: HeldModel, candidate: HeldModel, *, fraction: float) -> Shadow:
        """Compare from now on, in place of what was compared before, and return it with figures at zero."""
        self.clear()
        self.current = Shadow(base, candidate, fraction, Figures())
        self._metrics.which.labels(str(base.id), str(candidate.id)).set(fraction)
        return self.current

    def clear(self) -> Shadow | None:
        """Compare no longer, and return what was compared."""
        last, self.current = self.current, None
        self._waiting.clear()
        self._num_waiting = 0
        self._metrics.which.clear()
        self._metrics.mean_difference.set(0.0)
        return last

    def needs(self, model: ModelId) -> bool:
        """Return whether a version is base or candidate."""
        return self.current is not None and model in (self.current.base.id, self.current.candidate.id)

    def offer(self, held: HeldModel, judged: Judged) -> None:
        """Take the items of an answered call, if it is one to compare and there is room; never waits."""
        shadow = self.current
        if shadow is None or held is not shadow.base or self._chooser.random() >= shadow.fraction:
            return
        pairs = [
            (item, outcome.score)
            for item, outcome in zip(judged.inputs, judged.outcomes, strict=True)
            if isinstance(item, ScoreInput) and isinstance(outcome, Judgement)
        ]
        if not pairs:
            return
        if self._num_waiting + len(pairs) > self._settings.queue_limit:
            self._drop(shadow, len(pairs))
            return
        self._num_waiting += len(pairs)
        self._waiting.append(Pending(shadow, [item for item, _ in pairs], [score for _, score in pairs]))
        self._arrived.set()

    async def _work(self) -> None:
        enter_call(CurrentCall(SHADOW_CALLER, lambda count: None))
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            pending = self._waiting.popleft()
            self._num_waiting -= len(pending.inputs)
            with pending.shadow.candidate.used():
                await self._compare(pending)

    async def _compare(self, pending: Pending) -> None:
        """Score the items of one call in chunks, then compare the order of those that both have scored."""
        end = time.monotonic() + self._settings.timeout_seconds
        found: list[float | None] = []
        for start in range(0, len(pending.inputs), CHUNK_ITEMS):
            found += await self._score(pending, slice(start, start + CHUNK_ITEMS), end=end)
            if pending.shadow is not self.current:
                return
        pairs = list(count_pairs(pending.inputs, pending.scores, found))
        same = sum(pairs)
        figures = pending.shadow.figures
        figures.num_pairs += len(pairs)
        figures.num_agreeing_pairs += same
        self._metrics.pairs.labels("same").inc(same)
        self._metrics.pairs.labels("different").inc(len(pairs) - same)

    async def _score(self, pending: Pending, part: slice, *, end: float) -> list[float | None]:
        """Return the candidate's score of each item of a part, None where there is none; all are counted."""
        inputs, scores = pending.inputs[part], pending.scores[part]
        left = end - time.monotonic()
        if self._scorer.batcher.is_half_full or left <= 0:
            return self._drop(pending.shadow, len(inputs))
        try:
            outcomes = await self._scorer.judge_aside(pending.shadow.candidate, inputs, timeout_seconds=left)
        except BUSY:
            return self._drop(pending.shadow, len(inputs))
        except Exception as error:  # whatever a candidate does, the next items are scored
            log_event(log, "shadow failed", level=logging.WARNING, error=type(error).__name__)
            return self._fail(pending.shadow, len(inputs))
        return [
            self._note(pending.shadow, base, outcome.score)
            if isinstance(outcome, Judgement)
            else self._fail(pending.shadow, 1)[0]
            for base, outcome in zip(scores, outcomes, strict=True)
        ]

    def _note(self, shadow: Shadow, base: float, candidate: float) -> float:
        difference = candidate - base
        shadow.figures.num_scored += 1
        shadow.figures.sum_difference += difference
        shadow.figures.sum_abs_difference += abs(difference)
        self._metrics.items.labels("scored").inc()
        self._metrics.difference.observe(abs(difference))
        if shadow is self.current:
            self._metrics.mean_difference.set(shadow.figures.mean_difference)
        return candidate

    def _drop(self, shadow: Shadow, count: int) -> list[float | None]:
        shadow.figures.num_dropped += count
        self._metrics.items.labels("dropped").inc(count)
        return [None] * count

    def _fail(self, shadow: Shadow, count: int) -> list[float | None]:
        shadow.figures.num_failed += count
        self._metrics.items.labels("failed").inc(count)
        return [None] * count


def count_pairs(
    inputs: Sequence[ScoreInput], base: Sequence[float], candidate: Sequence[float | None]
) -> Iterable[bool]:
    """Yield for each pair of responses to one prompt whether both put them in the same order; equal is an order too.

    Of each prompt the first 16 scored responses count, so that a large call costs no more than its size.
    """
    groups: dict[object, list[tuple[float, float]]] = {}
    for item, first, second in zip(inputs, base, candidate, strict=True):
        group = groups.setdefault((item.prompt, item.messages[:-1], item.prompt_token_ids), [])
        if second is not None and len(group) < MAX_RESPONSES:
            group.append((first, second))
    for group in groups.values():
        for one, other in combinations(group, 2):
            yield _order(one[0], other[0]) == _order(one[1], other[1])


def _order(first: float, second: float) -> int:
    return (first > second) - (first < second)
