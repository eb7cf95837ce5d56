"""Reward functions for TRL: GRPOTrainer, RLOOTrainer and all that call `reward_funcs` the same way.

    from tether.integrations.trl import RewardFunction

    trainer = GRPOTrainer(model, reward_funcs=RewardFunction("127.0.0.1:50052"), train_dataset=prompts)

TRL adds the rewards of several functions up; each is logged as `rewards/<name>/mean`. An async function is run
beside the other async ones. Both may be pickled, copied and used from any thread; a copy opens its own connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from tether.errors import InvalidArgumentError
from tether.integrations.scoring import (
    AsyncScorer,
    Scorer,
    ScoringOptions,
    Unscored,
    read_conversation,
    rewards_of,
)
from tether.reward import ItemScore, ScoreItem

__all__ = ["AsyncRewardFunction", "RewardFunction"]

ScorerT = TypeVar("ScorerT", Scorer, AsyncScorer)

TrlText = str | Sequence[Mapping[str, Any]]
"""A prompt or completion: plain text, or messages with the keys `role` and `content`."""


class _Function(Generic[ScorerT]):
    """What both reward functions share."""

    def __init__(
        self,
        target: str,
        *,
        model: str = "",
        version: str = "",
        unscored: Unscored = "raise",
        name: str = "tether",
        applies_column: str = "",
        **client_options: Any,
    ) -> None:
        """Remember how to score; nothing is opened before the first call.

        Args:
            target: `host:port` of the reward scorer.
            model: Name of the reward model; empty: the default one.
            version: Version of the model; empty: whichever is loaded.
            unscored: What a completion that cannot be scored, such as an empty one, is worth: "raise" its error,
                None (TRL leaves it out of the group), or a number. Calls that fail as a whole always raise.
            name: What TRL logs the rewards under.
            applies_column: Column of the data set whose rows are True where this reward applies; the others get None.
                Empty: it applies to all.
            **client_options: Further arguments of the client, such as `timeout_seconds`.
        """
        self.options = ScoringOptions(target, model, version, unscored, client_options)
        self.applies_column = applies_column
        self.__name__ = name
        self._scorer: ScorerT = self._new_scorer()

    def _new_scorer(self) -> ScorerT:
        raise NotImplementedError

    def _read(
        self, prompts: Sequence[TrlText], completions: Sequence[TrlText], columns: Mapping[str, Any]
    ) -> tuple[list[int], list[ScoreItem]]:
        """Return the places that this reward applies to, and their items."""
        if len(prompts) != len(completions):
            raise InvalidArgumentError(
                f"There are {len(prompts)} prompts for {len(completions)} completions; give one for each.",
                field="prompts",
            )
        places = [place for place, applies in enumerate(self._applies(len(prompts), columns)) if applies]
        return places, [_item(prompts[place], completions[place], place) for place in places]

    def _applies(self, count: int, columns: Mapping[str, Any]) -> Sequence[bool]:
        if not self.applies_column:
            return [True] * count
        if self.applies_column not in columns:
            raise InvalidArgumentError(
                f"The data set has no column {self.applies_column!r}; it has {sorted(columns)}.", field="applies_column"
            )
        return [bool(value) for value in columns[self.applies_column]]

    def _rewards(
        self, count: int, places: Sequence[int], scores: Sequence[ItemScore], columns: Mapping[str, Any]
    ) -> list[float | None]:
        """Return one reward per completion, and log how many prompts were cut and how many items had no score."""
        fields = [f"completions[{place}]" for place in places]
        rewards: list[float | None] = [None] * count
        for place, reward in zip(
            places, rewards_of(scores, unscored=self.options.unscored, fields=fields), strict=True
        ):
            rewards[place] = reward
        log_metric: Callable[[str, float], None] | None = columns.get("log_metric")
        if log_metric is not None and scores:
            log_metric(f"{self.__name__}/truncated", sum(score.truncated for score in scores) / len(scores))
            log_metric(f"{self.__name__}/unscored", sum(score.error is not None for score in scores) / len(scores))
        return rewards


class RewardFunction(_Function[Scorer]):
    """A `reward_funcs` callable that asks the reward scorer."""

    def _new_scorer(self) -> Scorer:
        return Scorer(self.options)

    def __call__(
        self, prompts: Sequence[TrlText], completions: Sequence[TrlText], **columns: Any
    ) -> list[float | None]:
        """Return one reward per completion, None where this reward does not apply.

        Raises:
            InvalidArgumentError: The texts have no form that reward models read.
            TetherError: A completion could not be scored and `unscored` is "raise", or a call failed as a whole.
        """
        places, items = self._read(prompts, completions, columns)
        return self._rewards(len(prompts), places, self._scorer.score(items), columns)

    def close(self) -> None:
        """Close the connection; the next call opens another. Twice is once."""
        self._scorer.close()


class AsyncRewardFunction(_Function[AsyncScorer]):
    """A `reward_funcs` callable that asks the reward scorer while other async functions run."""

    def _new_scorer(self) -> AsyncScorer:
        return AsyncScorer(self.options)

    async def __call__(
        self, prompts: Sequence[TrlText], completions: Sequence[TrlText], **columns: Any
    ) -> list[float | None]:
        """Return one reward per completion, None where this reward does not apply; errors as of `RewardFunction`."""
        places, items = self._read(prompts, completions, columns)
        return self._rewards(len(prompts), places, await self._scorer.score(items), columns)

    async def close(self) -> None:
        """Close the connection of the running loop; the next call opens another. Twice is once."""
        await self._scorer.close()


def _item(prompt: TrlText, completion: TrlText, place: int) -> ScoreItem:
    """Return a prompt and its completion, both text or both messages, as an item to score."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return ScoreItem(prompt=prompt, response=completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise InvalidArgumentError(
            "One of prompt and completion is text and the other messages; both must be the same.",
            field=f"completions[{place}]",
        )
    said = read_conversation(prompt, field=f"prompts[{place}]")
    return ScoreItem(messages=said + read_conversation(completion, field=f"completions[{place}]"))
