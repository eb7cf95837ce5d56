"""OpenRLHF's `reward_func`: a function in a Python file that its rollout workers load."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tether.errors import InvalidArgumentError, TetherError
from tether.integrations.openrlhf.queries import PLAIN, QueryForm, split_queries
from tether.integrations.scoring import Scorer, ScoringOptions, Unscored, rewards_of

__all__ = ["ENVIRONMENT_PREFIX", "RewardFunc", "make_reward_func", "options_from_environment", "reward_func"]

log = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "TETHER_OPENRLHF_"
"""Before the names of the environment variables."""
_reading_environment = threading.Lock()
RewardFunc = Callable[..., dict[str, Any]]
"""(queries, prompts, labels, **kwargs) -> {"rewards": tensor, "scores": tensor, "extra_logs": {}}."""


def make_reward_func(
    target: str,
    *,
    model: str = "",
    version: str = "",
    unscored: Unscored = "raise",
    form: QueryForm = PLAIN,
    **client_options: Any,
) -> RewardFunc:
    """Return a function for a file of your own, which OpenRLHF wants to be named `reward_func`.

    Args:
        target: `host:port` of the reward scorer.
        model: Name of the reward model; empty: the default one.
        version: Version of the model; empty: whichever is loaded.
        unscored: What a response that cannot be scored, such as an empty one, is worth: "raise" its error or a number.
        form: What stands around the texts in prompts and queries.
        **client_options: Further arguments of the client, such as `timeout_seconds`.
    """
    options = ScoringOptions(target, model, version, unscored, client_options).need_a_number("OpenRLHF")
    scorer = Scorer(options)

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] = (), **kwargs: Any
    ) -> dict[str, Any]:
        """Return the rewards of the responses in the form that OpenRLHF reads; labels have no part in them.

        Raises:
            InvalidArgumentError: A query does not begin with its prompt.
            TetherError: A response could not be scored, or a call failed as a whole.
        """
        try:
            rewards = _rewards(scorer, split_queries(queries, prompts, form=form))
        except TetherError as error:
            log.error("no rewards: %s", error)  # OpenRLHF notes it at INFO and fails later, where the reward is used
            raise
        return _answer(rewards)

    return reward_func


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] = (), **kwargs: Any
) -> dict[str, Any]:
    """Return what the function that the environment describes returns; see `make_reward_func`.

    The variables are TETHER_OPENRLHF_TARGET (required), TETHER_OPENRLHF_MODEL and TETHER_OPENRLHF_VERSION.
    """
    with _reading_environment:  # so that calls of many threads share one connection
        described = _function_of_environment()
    return described(queries, prompts, labels, **kwargs)


def options_from_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return target, model and version as the environment gives them.

    Raises:
        InvalidArgumentError: TETHER_OPENRLHF_TARGET is missing.
    """
    environ = os.environ if environ is None else environ
    options = {name: environ.get(ENVIRONMENT_PREFIX + name.upper(), "") for name in ("target", "model", "version")}
    if not options["target"]:
        raise InvalidArgumentError(
            "Say where the reward scorer is, for example TETHER_OPENRLHF_TARGET=127.0.0.1:50052.",
            field=ENVIRONMENT_PREFIX + "TARGET",
        )
    return options


@functools.cache
def _function_of_environment() -> RewardFunc:
    options: dict[str, Any] = options_from_environment()
    return make_reward_func(**options)


def _rewards(scorer: Scorer, items: Sequence[Any]) -> list[float | None]:
    fields = [f"query[{index}]" for index in range(len(items))]
    return rewards_of(scorer.score(items), unscored=scorer.options.unscored, fields=fields)


def _answer(rewards: Sequence[float | None]) -> dict[str, Any]:
    """Return the rewards as tensors, which is what OpenRLHF documents."""
    import torch  # where OpenRLHF runs, torch is; the client itself needs none

    values = torch.tensor(rewards, dtype=torch.float32)
    return {"rewards": values, "scores": values.clone(), "extra_logs": {}}
