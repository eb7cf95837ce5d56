"""What a load is: whom to call, how often, with what. Plain values, checked before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from tether.credentials import Tls, Token
from tether.errors import FieldViolation, InvalidArgumentError

MAX_CALLERS: Final = 64
MAX_RATE: Final = 100_000.0
"""Calls per second of one caller at most; one process sends far fewer."""
MAX_CONCURRENCY: Final = 10_000
MAX_DURATION_SECONDS: Final = 86_400.0
MAX_CALLS: Final = 100_000_000
MIN_TOKENS: Final = 8
"""Of a synthetic item: fewer cannot make every item unlike all others."""
MAX_TOKENS: Final = 1_000_000
MAX_ITEMS_PER_CALL: Final = 1024


@dataclass(frozen=True, slots=True)
class BenchItem:
    """One response to judge, as text or as token ids."""

    prompt: str = ""
    """Text form."""
    response: str = ""
    """Text form."""
    prompt_token_ids: tuple[int, ...] = ()
    """Token form."""
    response_token_ids: tuple[int, ...] = ()
    """Token form."""


@dataclass(frozen=True, slots=True)
class CallerPlan:
    """One caller of several at once, with its own connection, arrivals and items."""

    name: str
    """How the report names it."""
    rate: float
    """Calls per second that are due, whatever becomes of them; 0 calls again as soon as an answer is there."""
    token: Token = field(default=None, repr=False)
    """What it identifies itself with, or the file that holds it; None takes the environment's, "" sends none."""


@dataclass(frozen=True, slots=True)
class ItemPlan:
    """What the calls carry."""

    per_call: int = 1
    """Items of one call."""
    min_tokens: int = 32
    """Shortest synthetic item: prompt and response together, in tokens or, as text, in characters."""
    max_tokens: int = 128
    """Longest one; lengths are uniform between the two."""
    form: Literal["tokens", "text"] = "tokens"
    """Whether synthetic items are token ids or text."""
    repeat_share: float = 0.0
    """Share of items, in [0, 1), that repeat a recent one of the same caller; for a cache of scores."""
    given: Sequence[BenchItem] = ()
    """Items to send in turn, over and over, instead of synthetic ones."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A whole load.

    Two callers, one of them ten times as busy:

    LoadPlan("127.0.0.1:50052", callers=(CallerPlan("polite", 20), CallerPlan("busy", 200)), duration_seconds=30)
    """

    target: str
    """host:port of the reward service."""
    callers: tuple[CallerPlan, ...]
    """At least one; names differ."""
    duration_seconds: float
    """How long calls become due."""
    concurrency: int = 64
    """Calls of one caller in flight at most; an arrival beyond waits, and its wait counts."""
    arrivals: Literal["constant", "poisson"] = "constant"
    """Even gaps between arrivals, or exponential ones of the same mean."""
    seed: int = 0
    """Of items and random arrivals: the same plan sends the same."""
    deadline_seconds: float = 10.0
    """Deadline of a call; also how long calls that are due are still sent after the duration."""
    max_calls: int = 1_000_000
    """Calls of all callers together at most."""
    model: str = ""
    """Reward model; empty: the default one."""
    version: str = ""
    """Its version; empty: whichever is served."""
    items: ItemPlan = ItemPlan()
    """What the calls carry."""
    tls: Tls = None
    """Files of TLS of all callers; None takes the environment's, False is none."""
    allow_plaintext_token: bool = False
    """Whether tokens may go to another machine without TLS."""


def check_plan(plan: LoadPlan) -> None:
    """Refuse a plan that cannot be carried out, naming every bad field.

    Raises:
        InvalidArgumentError: INVALID_CONFIG, with one violation per field.
    """
    violations = [*_check_load(plan), *_check_callers(plan), *_check_items(plan.items)]
    if violations:
        raise InvalidArgumentError(
            f"The load has {len(violations)} invalid field(s).", reason="INVALID_CONFIG", violations=tuple(violations)
        )


def _check_load(plan: LoadPlan) -> list[FieldViolation]:
    found = [] if plan.target else [FieldViolation("target", "empty; name the service to load, host:port")]
    found += _check_range("duration_seconds", plan.duration_seconds, above=0, most=MAX_DURATION_SECONDS)
    found += _check_range("deadline_seconds", plan.deadline_seconds, above=0, most=3600)
    found += _check_range("concurrency", plan.concurrency, above=0, most=MAX_CONCURRENCY)
    found += _check_range("max_calls", plan.max_calls, above=0, most=MAX_CALLS)
    return found


def _check_callers(plan: LoadPlan) -> list[FieldViolation]:
    found = _check_range("callers", len(plan.callers), above=0, most=MAX_CALLERS)
    names: set[str] = set()
    for caller in plan.callers:
        if caller.name in names or not caller.name.isprintable() or not 1 <= len(caller.name) <= 64:
            found.append(FieldViolation("callers.name", f"{caller.name[:64]!r} is taken, empty or no short plain word"))
        names.add(caller.name)
        found += _check_range(f"callers.{caller.name}.rate", caller.rate, above=None, most=MAX_RATE)
    planned = sum(caller.rate for caller in plan.callers) * plan.duration_seconds
    if not found and planned > plan.max_calls:
        text = f"rates and duration make {planned:.0f} calls, more than {plan.max_calls}; raise it or send less"
        found.append(FieldViolation("max_calls", text))
    return found


def _check_items(items: ItemPlan) -> list[FieldViolation]:
    found = _check_range("items.per_call", items.per_call, above=0, most=MAX_ITEMS_PER_CALL)
    found += _check_range("items.min_tokens", items.min_tokens, above=MIN_TOKENS - 1, most=MAX_TOKENS)
    found += _check_range("items.max_tokens", items.max_tokens, above=items.min_tokens - 1, most=MAX_TOKENS)
    if not 0 <= items.repeat_share < 1:
        found.append(FieldViolation("items.repeat_share", f"{items.repeat_share!r} is not in [0, 1)"))
    return found


def _check_range(name: str, value: float, *, above: float | None, most: float) -> list[FieldViolation]:
    """Return the violation of a number outside (above, most], or of [0, most] where above is None."""
    is_inside = math.isfinite(value) and value <= most and (value >= 0 if above is None else value > above)
    limit = "at least 0" if above is None else f"above {above:g}"
    return [] if is_inside else [FieldViolation(name, f"{value!r} is not {limit} and at most {most:g}")]
