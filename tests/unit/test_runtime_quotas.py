"""Quotas: exact against a slow loop, shared by name, and given back whatever happens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from tether.errors import ResourceExhaustedError
from tether_services.runtime.callers import Caller
from tether_services.runtime.limits import CallInfo
from tether_services.runtime.quotas import Allowance, Place, Quotas
from tether_services.runtime.refusals import MAX_CALLERS, CallerLabels, Refusals

CALLER = Caller("team-a", frozenset({"score"}))
TICK = 1 / 1024
"""Seconds; a power of two, so that the slow loop below adds without rounding."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def quotas(clock: Clock, *, max_calls: int = 1000, reserved_calls: int = 0) -> Quotas:
    registry = CollectorRegistry()
    return Quotas("x", registry, CallerLabels(), max_calls=max_calls, reserved_calls=reserved_calls, clock=clock)


def refused(held: Quotas, caller: Caller) -> ResourceExhaustedError:
    with pytest.raises(ResourceExhaustedError) as caught:
        held.enter(caller)
    assert caught.value.retry_after_seconds is not None
    return caught.value


@pytest.mark.parametrize("seed", range(5))
def test_an_allowance_is_what_a_loop_over_every_tick_gives(seed: int) -> None:
    draw = random.Random(seed)
    rate = float(draw.choice([1, 2, 64, 512]))
    allowance, level, now = Allowance(rate, now=0.0), rate, 0.0
    for _ in range(200):
        for _ in range(draw.randrange(200)):
            level = min(rate, level + rate * TICK)
            now += TICK
        assert allowance.level(now) == pytest.approx(level, abs=1e-9)
        amount = draw.choice([0.0, 1.0, rate / 2, 3 * rate])
        assert allowance.wait_seconds(amount, now) == pytest.approx(max(0.0, (amount - level) / rate), abs=1e-7)
        allowance.take(amount, now)
        level -= amount


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    allowance = Allowance(10.0, now=5.0)
    allowance.take(10.0, 5.0)
    assert allowance.level(5.0) == allowance.level(1.0) == 0.0
    allowance.take(1.0, 1.0)
    assert allowance.level(6.0) == 9.0


def test_requests_are_refused_with_the_exact_time_after_which_one_fits() -> None:
    clock = Clock()
    held, caller = quotas(clock), replace(CALLER, requests_per_second=4.0)
    for _ in range(4):
        held.enter(caller)
    error = refused(held, caller)
    assert (error.reason, error.retry_after_seconds) == ("QUOTA_REQUESTS", 0.25)
    clock.now += 0.24
    assert refused(held, caller).retry_after_seconds == pytest.approx(0.01)
    clock.now += 0.01
    held.enter(caller)
    refused(held, caller)


def test_less_than_one_request_a_second_is_a_limit_too() -> None:
    clock = Clock()
    held, caller = quotas(clock), replace(CALLER, requests_per_second=0.1)
    held.enter(caller)
    assert refused(held, caller).retry_after_seconds == 10.0
    clock.now += 10
    held.enter(caller)


def test_over_a_long_time_the_rate_is_kept_whatever_the_caller_tries() -> None:
    clock = Clock()
    held, caller = quotas(clock, max_calls=10**6), replace(CALLER, requests_per_second=7.0)
    admitted = 0
    for _ in range(60 * 100):
        try:
            held.enter(caller).leave()
            admitted += 1
        except ResourceExhaustedError:
            pass
        clock.now += 0.01
    assert 7 * 60 <= admitted <= 7 * 61


def test_tokens_are_paid_afterwards_and_an_overdrawn_caller_waits_until_it_has_paid() -> None:
    clock = Clock()
    held, caller = quotas(clock), replace(CALLER, tokens_per_second=100.0)
    held.enter(caller).charge(600)
    error = refused(held, caller)
    assert (error.reason, error.retry_after_seconds) == ("QUOTA_TOKENS", 5.0)
    clock.now += 5.0
    held.enter(caller).charge(1)
    refused(held, caller)


def test_a_refused_call_costs_no_request() -> None:
    clock = Clock()
    held = quotas(clock)
    caller = replace(CALLER, requests_per_second=2.0, tokens_per_second=100.0)
    held.enter(caller).charge(150)
    for _ in range(10):
        assert refused(held, caller).reason == "QUOTA_TOKENS"
    clock.now += 0.5
    held.enter(caller)
    held.enter(caller)


def test_concurrency_counts_calls_in_flight_of_all_tokens_of_a_name() -> None:
    held, caller = quotas(Clock()), replace(CALLER, max_concurrency=2)
    first = held.enter(caller)
    held.enter(replace(caller, scopes=frozenset({"run.read"})))
    assert refused(held, caller).reason == "QUOTA_CONCURRENCY"
    held.enter(replace(caller, name="team-b"))
    first.leave()
    held.enter(caller)


def test_the_training_lane_finds_room_where_the_others_find_none() -> None:
    held, training = quotas(Clock(), max_calls=4, reserved_calls=2), replace(CALLER, name="run", lane="training")
    places: list[Place] = [held.enter(CALLER), held.enter(CALLER)]
    assert refused(held, CALLER).reason == "TOO_MANY_CALLS"
    places += [held.enter(training), held.enter(training)]
    assert refused(held, training).reason == "TOO_MANY_CALLS"
    for place in places:
        place.leave()
    assert held.in_flight == 0


def test_a_limit_that_was_changed_holds_from_the_next_call_and_forgives_no_debt() -> None:
    clock = Clock()
    held, caller = quotas(clock), replace(CALLER, tokens_per_second=100.0)
    held.enter(caller).charge(600)
    assert refused(held, replace(caller, tokens_per_second=1000.0)).retry_after_seconds == 0.5
    held.enter(replace(caller, tokens_per_second=None))


def test_only_so_many_callers_have_series_of_their_own() -> None:
    registry = CollectorRegistry()
    refusals = Refusals("x", registry, CallerLabels(), clock=Clock())
    for index in range(10_000):
        refusals.record(CallInfo("/m", (), None), f"caller-{index}", "SCOPE_MISSING")
    values = {
        sample.labels["caller"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "tether_x_refused_calls_total"
    }
    assert len(values) == MAX_CALLERS + 1
    assert values["other"] == 10_000 - MAX_CALLERS


def test_a_flood_of_refused_calls_writes_few_lines_and_says_how_many_are_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    refusals = Refusals("x", CollectorRegistry(), CallerLabels(), clock=clock)
    for _ in range(1000):
        refusals.record(CallInfo("/m", (("authorization", "canary"),), None, peer="ipv4:1"), "", "TOKEN_UNKNOWN")
    assert len(caplog.records) == 10
    clock.now += 1
    refusals.record(CallInfo("/m", (), None), "team-a", "SCOPE_MISSING")
    fields = caplog.records[-1].__dict__["fields"]
    assert fields == {"caller": "team-a", "method": "/m", "reason": "SCOPE_MISSING", "peer": "", "unwritten": 990}
    assert "canary" not in caplog.text + repr([record.__dict__ for record in caplog.records])
