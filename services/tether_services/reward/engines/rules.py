"""Python functions as reward components, for rewards that can be verified."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import logging
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tether.errors import InternalError, InvalidArgumentError, TetherError
from tether_services.reward.engine import EngineDescription, ScoreTask
from tether_services.runtime.logging import log_event
from tether_services.runtime.work_thread import WorkThread

log = logging.getLogger(__name__)

Rule = Callable[..., float]


class RulesEngine:
    """Calls one function per item, in a thread of its own."""

    def __init__(self, function: str, arguments: Mapping[str, Any], *, rule_seconds: float, field: str) -> None:
        """Find the function.

        Args:
            function: "module:function".
            arguments: Keyword arguments of every call.
            rule_seconds: A call that takes longer is taken to hang.
            field: Path of the component in the settings, for errors.

        Raises:
            InvalidArgumentError: There is no such function, or it does not take these arguments.
        """
        self._name = function
        rule = import_rule(function, field=f"{field}.function")
        check_signature(rule, arguments, field=f"{field}.arguments")
        self._rule = partial(rule, **arguments)
        self._rule_seconds = rule_seconds
        self._call_started: float | None = None
        """When the call in progress began; None while there is none."""
        self._thread = WorkThread("reward-rules")
        self.description = EngineDescription(
            engine="rules",
            sha256=hash_rule(rule, arguments, field=field),
            gain=1.0,
            bias=0.0,
            max_model_len=0,
            vocab_size=0,
            codec=None,
        )

    async def start(self) -> None:
        """Do nothing: the function was found already."""

    async def score(self, tasks: Sequence[ScoreTask]) -> list[float | TetherError]:
        """Return what the function gives, or an error; each call is one job, so that `check` fits between."""
        return [await self._score_one(task) for task in tasks]

    async def _score_one(self, task: ScoreTask) -> float | TetherError:
        self._call_started = time.monotonic()
        try:
            return await self._thread.run(self._call, task)
        finally:
            self._call_started = None

    async def check(self) -> None:
        """Return when the thread is free, at once in a call that may still be merely slow; else wait for its end."""
        started = self._call_started
        if started is not None and time.monotonic() - started < self._rule_seconds:
            return
        await self._thread.run(int)

    async def close(self) -> None:
        """Let no further call begin."""
        self._thread.abandon()

    def _call(self, task: ScoreTask) -> float | TetherError:
        try:
            value = self._rule(task.prompt, task.response)
        except Exception as error:  # a rule is the user's code: whatever it raises concerns this one item
            return self._failure(f"raised {type(error).__name__}")
        if not isinstance(value, numbers.Real):
            return self._failure(f"returned {type(value).__name__} instead of a number")
        return float(value)

    def _failure(self, what: str) -> InternalError:
        """Return the error of one item. It names types only: the text of an exception may hold the prompt."""
        log_event(log, "rule failed", level=logging.WARNING, function=self._name, error=what)
        return InternalError(f"The rule {self._name} {what}.", reason="RULE_FAILED")


def import_rule(function: str, *, field: str) -> Rule:
    """Return the function named "module:function".

    Raises:
        InvalidArgumentError: The name is malformed, the module cannot be imported, or it has no such function.
    """
    module_name, separator, name = function.partition(":")
    if not separator or not module_name or not name:
        raise InvalidArgumentError(f"{function!r} is not module:function.", field=field)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise InvalidArgumentError(
            f"The module {module_name} cannot be imported: {type(error).__name__}: {error}", field=field
        ) from error
    rule = getattr(module, name, None)
    if not callable(rule) or inspect.iscoroutinefunction(rule):
        raise InvalidArgumentError(f"{module_name} has no plain function {name}.", field=field)
    return rule  # type: ignore[no-any-return]


def check_signature(rule: Rule, arguments: Mapping[str, Any], *, field: str) -> None:
    """Refuse a rule that cannot be called as rule(prompt, response, **arguments)."""
    try:
        inspect.signature(rule).bind("", "", **arguments)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"The rule cannot be called as (prompt, response, **arguments): {error}.", field=field
        ) from error


def hash_rule(rule: Rule, arguments: Mapping[str, Any], *, field: str) -> str:
    """Return the SHA-256 of the function's source and its arguments.

    Raises:
        InvalidArgumentError: The function has no Python source, or an argument is not plain data.
    """
    try:
        text = inspect.getsource(rule) + json.dumps(arguments, sort_keys=True)
    except (OSError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"The rule cannot be hashed: {error}.", field=field) from error
    return hashlib.sha256(text.encode()).hexdigest()
