"""What the adapters share: batches cut to the service's limits, and scores turned into rewards without silent loss."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tether.client import Client
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether.generator import Message
from tether.reward import ItemScore, RewardClient, RewardModel, ScoreItem

__all__ = ["AsyncScorer", "Scorer", "ScoringOptions", "Unscored", "read_conversation", "rewards_of"]

log = logging.getLogger(__name__)

Unscored = float | Literal["raise"] | None
"""The reward of an item that the service could not score: an error, a number, or None where the trainer knows it."""
CALL_CHARS: Final = 1_000_000
"""Characters of one call at most: at four bytes each, half of what a message may hold."""


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """Where and how to score.

    Raises:
        InvalidArgumentError: `unscored` is none of its choices, or the client has no use for its options.
        TypeError: The client has no such option.
    """

    target: str
    """`host:port` of the reward scorer."""
    model: str = ""
    """Name of the reward model; empty: the default one."""
    version: str = ""
    """Version of the model; empty: whichever is loaded."""
    unscored: Unscored = "raise"
    """What an item that cannot be scored, such as an empty response, is worth: "raise", a finite number, or None."""
    client_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Further arguments of the client, such as `timeout_seconds`; never shown, as a token may be among them."""

    def __post_init__(self) -> None:
        RewardClient(self.target, **self.client_options)  # opens nothing; a bad option shows now, not after a rollout
        if self.unscored is None or self.unscored == "raise":
            return
        is_number = isinstance(self.unscored, int | float) and not isinstance(self.unscored, bool)
        if not is_number or not math.isfinite(self.unscored):
            raise InvalidArgumentError(
                f"{self.unscored!r} is neither 'raise' nor a finite number nor None.", field="unscored"
            )

    def need_a_number(self, trainer: str) -> ScoringOptions:
        """Return the options if every item gets a number or an error, which is all that some trainers know.

        Raises:
            InvalidArgumentError: `unscored` is None.
        """
        if self.unscored is None:
            raise InvalidArgumentError(
                f"{trainer} has no reward that means 'not scored': choose 'raise' or a number.", field="unscored"
            )
        return self


class _Opener:
    """Options that may be pickled and copied, without what was opened with them, and how to score by them."""

    _max_items = 0
    """Items that every call may have; 0 before the service was asked."""

    def __init__(self, options: ScoringOptions) -> None:
        """Remember how to score; nothing is opened before the first call."""
        self.options = options
        self._begin()

    def _begin(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> ScoringOptions:
        return self.options

    def __setstate__(self, options: ScoringOptions) -> None:
        self.options = options
        self._begin()

    async def _score(self, client: RewardClient, items: Sequence[ScoreItem]) -> list[ItemScore]:
        """Return one score per item, in order, from one call after the other; the limit of a call is asked for once."""
        options = self.options
        if len(items) > 1 and not self._max_items:
            self._max_items = _smallest_limit(await client.list_reward_models())
        scores: list[ItemScore] = []
        for part in _parts(items, max_items=self._max_items):
            scores += (await client.score(part, model=options.model, version=options.version)).scores
        return scores


class Scorer(_Opener):
    """Scores any number of items with ordinary calls; usable from any thread, opened by its first use.

    It may be pickled and copied: a copy opens its own connection.
    """

    def _begin(self) -> None:
        self._opening = threading.Lock()
        self._client: Client | None = None

    def score(self, items: Sequence[ScoreItem]) -> list[ItemScore]:
        """Return one score per item, in order; an item that cannot be scored carries its own error.

        Raises:
            TetherError: A call failed as a whole; the narrowest class says why.
        """
        if not items:
            return []
        client = self._open()
        return client._run(self._score(client._service(RewardClient), items))

    def close(self) -> None:
        """Close the connection; the next call opens another. Twice is once."""
        with self._opening:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _open(self) -> Client:
        with self._opening:
            if self._client is None:
                self._client = Client(reward=self.options.target, **self.options.client_options)
            return self._client


class AsyncScorer(_Opener):
    """Scores any number of items on the event loop of the caller; each loop has its own connection.

    It may be pickled and copied: a copy opens its own connections.
    """

    def _begin(self) -> None:
        self._clients: dict[asyncio.AbstractEventLoop, RewardClient] = {}

    async def score(self, items: Sequence[ScoreItem]) -> list[ItemScore]:
        """Return one score per item, in order; an item that cannot be scored carries its own error.

        Raises:
            TetherError: A call failed as a whole; the narrowest class says why.
        """
        return await self._score(self._open(), items) if items else []

    async def is_serving(self) -> bool:
        """Return whether the reward scorer says that it serves."""
        return await self._open().is_serving()

    async def close(self) -> None:
        """Close the connection of the running loop; the next call opens another. Twice is once."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def _open(self) -> RewardClient:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            for ended in [other for other in self._clients if other.is_closed()]:
                self._clients.pop(ended, None)
            client = self._clients[loop] = RewardClient(self.options.target, **self.options.client_options)
        return client


def rewards_of(scores: Sequence[ItemScore], *, unscored: Unscored, fields: Sequence[str]) -> list[float | None]:
    """Return one reward per score.

    Args:
        scores: What the service answered.
        unscored: The reward of an item without a score; "raise" for its error.
        fields: What the trainer calls each item, for example "completions[3]".

    Raises:
        TetherError: An item could not be scored and `unscored` is "raise"; the class of its own error.
    """
    failed = [(index, score.error) for index, score in enumerate(scores) if score.error is not None]
    if failed:
        index, error = failed[0]
        if unscored == "raise":
            raise type(error)(
                f"{len(failed)} of {len(scores)} items have no score; the first says: {error.message} "
                "Choose another value than 'raise' for `unscored` to train on without them.",
                field=fields[index],
                reason=error.reason,
                retry_after_seconds=error.retry_after_seconds,
            )
        log.warning("%d of %d items have no score; the first: %s", len(failed), len(scores), error.reason)
    return [score.score if score.error is None else _worth(unscored) for score in scores]


def read_conversation(messages: Sequence[Mapping[str, Any]], *, field: str) -> tuple[Message, ...]:
    """Return messages with the keys `role` and `content` as the contract has them.

    Raises:
        InvalidArgumentError: A message is no such mapping, its content is not text, or it calls tools.
    """
    return tuple(_message(message, f"{field}[{index}]") for index, message in enumerate(messages))


def _message(message: Mapping[str, Any], field: str) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise InvalidArgumentError("A message has a role and a content.", field=field)
    if not isinstance(message["content"], str):
        raise InvalidArgumentError(
            "The content is not a text. Reward models read text only: flatten it, or drop such rows.",
            field=f"{field}.content",
        )
    if message.get("tool_calls"):
        raise InvalidArgumentError(
            "A message that calls tools has no form that reward models read; drop such rows.",
            field=f"{field}.tool_calls",
        )
    return Message(str(message["role"]), message["content"])


def _parts(items: Sequence[ScoreItem], *, max_items: int) -> Iterator[list[ScoreItem]]:
    """Yield the items in calls of at most max_items and CALL_CHARS; a longer item goes alone."""
    part: list[ScoreItem] = []
    chars = 0
    for item in items:
        length = len(item.prompt) + len(item.response) + sum(len(message.content) for message in item.messages)
        if part and (len(part) == max_items or chars + length > CALL_CHARS):
            yield part
            part, chars = [], 0
        part.append(item)
        chars += length
    if part:
        yield part


def _smallest_limit(models: Sequence[RewardModel]) -> int:
    """Return the items per call that every model of the service takes."""
    limits = [model.max_items for model in models if model.max_items > 0]
    if not limits:
        raise FailedPreconditionError("The service offers no reward model.", reason="NO_REWARD_MODEL")
    return min(limits)


def _worth(unscored: Unscored) -> float | None:
    assert unscored != "raise", "an error has been raised"
    return None if unscored is None else float(unscored)
