"""Custom reward functions for verl, which name the reward scorer in `reward_kwargs`.

    reward.custom_reward_function.path=pkg://tether.integrations.verl
    reward.custom_reward_function.name=compute_score_async
    +reward.custom_reward_function.reward_kwargs.target=127.0.0.1:50052
    +reward.custom_reward_function.reward_kwargs.prompt_key=question

`compute_score_async` suits verl's reward loop, where hundreds of calls are in flight; `compute_score` suits managers
that call ordinary functions (`remote`, and `naive` of older versions); `compute_score_batch` suits the older `batch`.

verl gives a reward function the response as text but not the prompt: it must be in the data set's `extra_info`, as
text or as messages, under `prompt_key`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import InvalidArgumentError
from tether.generator import Message
from tether.integrations.scoring import AsyncScorer, Scorer, ScoringOptions, read_conversation, rewards_of
from tether.reward import ItemScore, ScoreItem

__all__ = ["compute_score", "compute_score_async", "compute_score_batch"]

VERLS_OWN = ("reward_router_address", "reward_model_tokenizer")
"""Arguments that verl adds where it serves a reward model of its own; they have no part in these scores."""


@dataclass(frozen=True, slots=True)
class _Scoring:
    """What one set of `reward_kwargs` asks for; opened once per process."""

    scorer: Scorer
    """For ordinary calls."""
    async_scorer: AsyncScorer
    """For calls on an event loop."""
    prompt_key: str
    """Where `extra_info` has the prompt."""

    def rewards(self, scores: Sequence[ItemScore], fields: Sequence[str]) -> list[float]:
        """Return the scores as rewards, all of them numbers."""
        rewards = rewards_of(scores, unscored=self.scorer.options.unscored, fields=fields)
        return [reward for reward in rewards if reward is not None]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **reward_kwargs: Any,
) -> float:
    """Return the score of one response.

    Args:
        data_source: Name of the data set; has no part in the score.
        solution_str: The response.
        ground_truth: Has no part in the score.
        extra_info: What the data set has beside; the prompt is in it.
        **reward_kwargs: `target` (required), `model`, `version`, `unscored` ("raise" or a number), `prompt_key`
            (default "prompt"), and further arguments of the client, such as `timeout_seconds`.

    Raises:
        InvalidArgumentError: The prompt is not where `prompt_key` says, or `target` is missing.
        TetherError: The response could not be scored and `unscored` is "raise", or the call failed as a whole.
    """
    scoring = _scoring(reward_kwargs)
    item = _item(solution_str, extra_info, prompt_key=scoring.prompt_key, field="extra_info")
    return scoring.rewards(scoring.scorer.score([item]), ["solution_str"])[0]


async def compute_score_async(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **reward_kwargs: Any,
) -> float:
    """Return the score of one response, as `compute_score` does, without blocking the event loop."""
    scoring = _scoring(reward_kwargs)
    item = _item(solution_str, extra_info, prompt_key=scoring.prompt_key, field="extra_info")
    return scoring.rewards(await scoring.async_scorer.score([item]), ["solution_str"])[0]


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any]],
    **reward_kwargs: Any,
) -> list[float]:
    """Return the scores of a batch of responses; arguments and errors as of `compute_score`, a list of each."""
    scoring = _scoring(reward_kwargs)
    if len(solution_strs) != len(extra_infos):
        raise InvalidArgumentError(
            f"There are {len(extra_infos)} extra_infos for {len(solution_strs)} responses; give one for each.",
            field="extra_infos",
        )
    items = [
        _item(solution, extra, prompt_key=scoring.prompt_key, field=f"extra_infos[{index}]")
        for index, (solution, extra) in enumerate(zip(solution_strs, extra_infos, strict=True))
    ]
    return scoring.rewards(scoring.scorer.score(items), [f"solution_strs[{index}]" for index in range(len(items))])


_open: dict[str, _Scoring] = {}
_opening = threading.Lock()


def _scoring(reward_kwargs: Mapping[str, Any]) -> _Scoring:
    """Return what the arguments ask for; the same arguments share their connections.

    Raises:
        InvalidArgumentError: `target` is missing, or `unscored` is None, for which verl has no reward.
    """
    asked = {name: value for name, value in reward_kwargs.items() if name not in VERLS_OWN}
    key = repr(sorted(asked.items()))
    with _opening:
        if key not in _open:
            _open[key] = _new_scoring(**asked)
        return _open[key]


def _new_scoring(
    *,
    target: str = "",
    model: str = "",
    version: str = "",
    unscored: Any = "raise",
    prompt_key: str = "prompt",
    **client_options: Any,
) -> _Scoring:
    if not target:
        raise InvalidArgumentError(
            "Say where the reward scorer is: +reward.custom_reward_function.reward_kwargs.target=host:port.",
            field="reward_kwargs.target",
        )
    options = ScoringOptions(target, model, version, unscored, client_options).need_a_number("verl")
    return _Scoring(Scorer(options), AsyncScorer(options), prompt_key)


def _item(response: str, extra_info: Mapping[str, Any] | None, *, prompt_key: str, field: str) -> ScoreItem:
    """Return the response and the prompt in `extra_info` as an item to score.

    Raises:
        InvalidArgumentError: There is no prompt, or it is neither a text nor messages.
    """
    prompt = (extra_info or {}).get(prompt_key)
    if prompt is None:
        raise InvalidArgumentError(
            f"There is no prompt under {prompt_key!r}; there are {sorted(extra_info or {})}. verl does not pass it to "
            "reward functions: put it into extra_info when the data set is made, and name it by prompt_key.",
            field=f"{field}.{prompt_key}",
            reason="NO_PROMPT",
        )
    if isinstance(prompt, str):
        return ScoreItem(prompt=prompt, response=response)
    said = read_conversation(list(prompt), field=f"{field}.{prompt_key}")  # an array, where it comes from parquet
    return ScoreItem(messages=(*said, Message("assistant", response)))
