from __future__ import annotations

import random
from typing import Literal

import pytest

from tether_services.runtime.callers import ANONYMOUS, Caller
from tether_services.runtime.room import DrainRate, Room, Shortage


def caller(name: str, *, lane: Literal["shared", "training"] = "shared") -> Caller:
    return Caller(name=name, scopes=frozenset(), lane=lane)


A, B = caller("a"), caller("b")
TRAINER = caller("trainer", lane="training")


def fill(room: Room, who: Caller, *, step: int = 1) -> int:
    """Take places until there are no more for a caller, and return how many it got."""
    taken = 0
    while room.shortage(who, step) is None:
        room.take(who, step)
        taken += step
    return taken


def test_a_lone_named_caller_has_its_share_and_a_newcomer_finds_room() -> None:
    room = Room(limit=100, caller_share=0.5)
    assert fill(room, A) == 50
    assert room.shortage(A, 1) == Shortage("caller_full", held=50, limit=50, excess=1)
    assert fill(room, B) == 25, "half of what the first leaves"


@pytest.mark.parametrize("num_flooders", [1, 2, 3, 5])
def test_those_that_flood_first_leave_a_part_of_the_rest_each(num_flooders: int) -> None:
    room = Room(limit=2048, caller_share=0.5)
    for number in range(num_flooders):
        fill(room, caller(f"flood-{number}"))
    assert 2048 - sum(room._totals.values()) == 2048 // 2**num_flooders
    assert room.shortage(B, 64) is None


@pytest.mark.parametrize("num_flooders", [1, 2, 3, 5, 10])
def test_those_that_go_on_flooding_leave_room_whenever_somebody_else_comes(num_flooders: int) -> None:
    room = Room(limit=2048, caller_share=0.5)
    flooders = [caller(f"flood-{number}") for number in range(num_flooders)]
    rng = random.Random(num_flooders)
    for number in range(2000):
        served = rng.choice(flooders)
        room.give_back(served, min(room._held["shared"][served.name], 64))  # a batch of theirs is executed
        for who in rng.sample(flooders, num_flooders):
            fill(room, who)  # and all of them ask for more than there is
        if number > 200:
            assert room.shortage(B, 16) is None


def test_without_the_share_a_flooder_takes_everything() -> None:
    """The control."""
    room = Room(limit=100, caller_share=1.0)
    assert fill(room, A) == 100
    assert room.shortage(B, 1) == Shortage("queue_full", held=100, limit=100, excess=1)


def test_where_everybody_is_the_same_caller_all_places_are_theirs() -> None:
    room = Room(limit=100, caller_share=0.5)
    assert fill(room, ANONYMOUS) == 100
    assert room.shortage(ANONYMOUS, 3) == Shortage("queue_full", held=100, limit=100, excess=3)


def test_a_single_call_may_be_larger_than_the_share() -> None:
    room = Room(limit=100, caller_share=0.5)
    assert room.shortage(A, 100) is None
    assert room.shortage(A, 101) == Shortage("queue_full", held=0, limit=100, excess=1)


def test_the_places_of_the_training_lane_are_nobody_elses() -> None:
    room = Room(limit=100, caller_share=1.0)
    assert fill(room, A) == 100
    assert room.shortage(TRAINER, 100) is None
    assert fill(room, TRAINER) == 100
    assert room.shortage(A, 1) is not None


def test_places_that_are_given_back_can_be_taken_again_and_leave_no_trace() -> None:
    room = Room(limit=10, caller_share=0.5)
    for number in range(1000):
        who = caller(f"c{number}")
        room.take(who, 10)
        assert room.shortage(B, 1) is not None
        room.give_back(who, 10)
    assert not room._held["shared"]
    assert room.shortage(B, 10) is None


def test_a_retry_is_told_from_the_measured_rate_within_bounds() -> None:
    rate = DrainRate()
    assert rate.seconds_until(5, share=0.1) == 1.0, "nothing measured yet"
    rate.observe(num_items=100, seconds=1.0)
    assert rate.seconds_until(50, share=1.0) == pytest.approx(0.5)
    assert rate.seconds_until(50, share=0.25) == pytest.approx(2.0)
    assert rate.seconds_until(1, share=1.0) == 0.05
    assert rate.seconds_until(10_000, share=1.0) == 5.0


def test_the_rate_follows_a_change() -> None:
    rate = DrainRate()
    for _ in range(50):
        rate.observe(num_items=10, seconds=0.1)
    assert rate.seconds_until(100, share=1.0) == pytest.approx(1.0)
    for _ in range(30):
        rate.observe(num_items=10, seconds=0.2)
    assert rate.seconds_until(100, share=1.0) == pytest.approx(2.0, rel=0.01)
    instant = DrainRate()
    instant.observe(num_items=10, seconds=0.0)
    assert instant.seconds_until(100, share=1.0) == 0.05
