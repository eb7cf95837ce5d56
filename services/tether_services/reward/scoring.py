"""The way of items to their scores: read in a thread, looked up in the cache, else judged in a batch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from tether.errors import InternalError, TetherError
from tether_services.reward.cache import ScoreCache, digest_item, identify_model
from tether_services.reward.config import RewardSettings
from tether_services.reward.items import ItemReader, PreparedItem, ScoreInput
from tether_services.reward.metrics import RewardMetrics
from tether_services.reward.models import Judgement, Refusal
from tether_services.reward.pool import HeldModel
from tether_services.runtime.batching import Batcher, Place
from tether_services.runtime.callers import charge_tokens
from tether_services.runtime.fair_gate import FairGate
from tether_services.runtime.work_thread import WorkThread

__all__ = ["Judged", "Scorer"]

ResultT = TypeVar("ResultT")
TURN_CREDIT_ITEMS: Final = 64
"""Items, times its weight, that are read ahead for a caller that has used less than its fair share lately."""
MAX_IDS_AT_ONCE: Final = 2048
"""Token ids of a call that are read right away, which takes no longer than a turn of the thread."""
MAX_ITEMS_AT_ONCE: Final = 16
"""Items of such a call."""
Inputs = Sequence[ScoreInput | Refusal]
Outcome = Judgement | Refusal
Prepared = PreparedItem | Refusal
Queued = tuple[HeldModel, PreparedItem]


@dataclass(frozen=True, slots=True)
class Judged:
    """The items of a call and what became of them, in order."""

    inputs: Inputs
    """As the caller sent them."""
    outcomes: Sequence[Outcome]
    """One for each."""


class Scorer:
    """Judges items with whatever model it is given."""

    def __init__(self, settings: RewardSettings, metrics: RewardMetrics) -> None:
        self._metrics = metrics
        self.cache = ScoreCache(settings.cache, metrics.cache)
        self.batcher = Batcher[Queued, Outcome](self._run_batch, settings.batch, metrics.queue)
        # One thread: the tokenizers of some models must not be used by two at a time.
        self._text_turns = FairGate(1, training_share=settings.batch.training_share, credit_tokens=TURN_CREDIT_ITEMS)
        self._text_thread = WorkThread("reward-text")

    def start(self) -> None:
        """Begin to execute batches."""
        self.batcher.start()

    async def check(self) -> None:
        """Have the thread that reads text and the batcher take a turn."""
        await self._text_thread.wait_for_life(self.in_text_thread(int))
        await self.batcher.probe()

    async def stop(self) -> None:
        """Execute no further batch."""
        await self.batcher.close()

    def close(self) -> None:
        """Let the thread end."""
        self._text_thread.abandon()

    async def in_text_thread(self, function: Callable[..., ResultT], *arguments: object) -> ResultT:
        """Return what a function gives that reads text, called in the thread for that."""
        return await self._text_thread.run(function, *arguments)

    async def judge(
        self,
        held: HeldModel,
        read: Callable[[], Inputs],
        *,
        num_items: int,
        num_ids: int | None,
        timeout_seconds: float,
    ) -> Judged:
        """Return the items of a call with a judgement or a refusal for each; they are counted.

        Args:
            held: The model; the caller keeps it from being closed.
            read: Gives the items; called in the thread for text unless they are few token ids.
            num_items: How many.
            num_ids: Token ids of all of them; None if one came as text.
            timeout_seconds: For their turn in the queue.

        Raises:
            TetherError: The queue is full, the deadline has passed or nothing is executed any more.
        """
        caches = self.cache.is_on and held.cacheable
        identity = identify_model(held.model) if caches else b""
        reader = held.model.reader
        with self.batcher.reserve(num_items) as place:  # a call without room is not read
            if reads_at_once(reader, num_items, num_ids):
                inputs, prepared = read_and_prepare(reader, read, identity)
            else:
                async with self._text_turn(num_items):
                    inputs, prepared = await self.in_text_thread(read_and_prepare, reader, read, identity)
            known = self._look_up(held, prepared) if caches else {}
            missing = [item for index, item in enumerate(prepared) if index not in known]
            judged = iter(await self._batch(held, missing, timeout_seconds=timeout_seconds, place=place))
        outcomes = [
            item if isinstance(item, Refusal) else known.get(index) or next(judged)
            for index, item in enumerate(prepared)
        ]
        if caches:
            self._keep(prepared, outcomes, known)
        self._count(outcomes, known)
        return Judged(inputs, outcomes)

    async def judge_aside(
        self, held: HeldModel, inputs: Sequence[ScoreInput], *, timeout_seconds: float
    ) -> Sequence[Outcome]:
        """Return the outcomes of items that no caller waits for: not counted, not cached, and each read on its own.

        Raises:
            TetherError: As `judge`.
        """
        prepared = []
        for item in inputs:
            async with self._text_turn(1):
                prepared.append(await self.in_text_thread(prepare_one, held.model.reader, item, b""))
        judged = iter(await self._batch(held, prepared, timeout_seconds=timeout_seconds))
        return [item if isinstance(item, Refusal) else next(judged) for item in prepared]

    @asynccontextmanager
    async def _text_turn(self, num_items: int) -> AsyncIterator[None]:
        """Hold the turn of a call whose items are to be read: the thread itself would serve by arrival."""
        await self._text_turns.enter(tokens=num_items)
        try:
            yield
        finally:
            self._text_turns.leave()

    def _look_up(self, held: HeldModel, prepared: Sequence[Prepared]) -> dict[int, Judgement]:
        """Return the scores that are in the cache, by the place of their item."""
        known = {}
        for index, item in enumerate(prepared):
            if isinstance(item, PreparedItem):
                judgement = self.cache.get(item.digest)
                if judgement is not None:
                    known[index] = judgement
        num_items = sum(isinstance(item, PreparedItem) for item in prepared)
        held.num_hits += len(known)
        held.num_misses += num_items - len(known)
        return known

    def _keep(self, prepared: Sequence[Prepared], outcomes: Sequence[Outcome], known: dict[int, Judgement]) -> None:
        for index, (item, outcome) in enumerate(zip(prepared, outcomes, strict=True)):
            if index not in known and isinstance(item, PreparedItem) and isinstance(outcome, Judgement):
                self.cache.put(item.digest, outcome)

    async def _batch(
        self, held: HeldModel, items: Sequence[Prepared], *, timeout_seconds: float, place: Place | None = None
    ) -> Sequence[Outcome]:
        """Return the outcomes of the items that are not refused, in order."""
        queued = [((held, item), max(1, item.task.num_tokens)) for item in items if isinstance(item, PreparedItem)]
        charge_tokens(sum(tokens for _, tokens in queued))
        # The version is part of the key: what shares a batch is judged by the model of its first item.
        key = (held.id.name, held.id.version)
        return await self.batcher.submit_all(queued, key=key, timeout_seconds=timeout_seconds, place=place)

    async def _run_batch(self, batch: Sequence[Queued]) -> list[Outcome]:
        with batch[0][0].used() as model:  # whoever asked may have left
            return await model.score([item for _, item in batch])

    def _count(self, outcomes: Sequence[Outcome], known: dict[int, Judgement]) -> None:
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Judgement):
                self._metrics.scored.inc()
                if index not in known:
                    self._metrics.tokens.inc(outcome.token_count)
            else:
                ours = isinstance(outcome.error, InternalError)
                (self._metrics.failed if ours else self._metrics.refused).inc()


def reads_at_once(reader: ItemReader, num_items: int, num_ids: int | None) -> bool:
    """Return whether items are so few token ids that the event loop may read them; text is tokenised in a thread."""
    few = num_ids is not None and num_ids <= MAX_IDS_AT_ONCE and num_items <= MAX_ITEMS_AT_ONCE
    return few and not reader.reads_text


def read_and_prepare(reader: ItemReader, read: Callable[[], Inputs], identity: bytes) -> tuple[Inputs, list[Prepared]]:
    """Return the items as sent and as the engines read them. Tokenises all of it: call it in a thread.

    Args:
        reader: Of the model.
        read: Gives the items.
        identity: Of the model, for the keys of the cache; empty if it is not asked.
    """
    inputs = read()
    return inputs, [item if isinstance(item, Refusal) else prepare_one(reader, item, identity) for item in inputs]


def prepare_one(reader: ItemReader, item: ScoreInput, identity: bytes) -> Prepared:
    """Return an item as the engines read it, with its key if there is an identity, or why it cannot be scored."""
    try:
        prepared = reader.prepare(item)
    except TetherError as error:
        return Refusal(error)
    return replace(prepared, digest=digest_item(identity, prepared)) if identity else prepared
