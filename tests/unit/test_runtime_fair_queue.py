from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

import pytest

from tether_services.runtime.callers import Caller
from tether_services.runtime.fair_queue import FairQueue, Ticket

BIG = 10**9


def caller(name: str, *, weight: float = 1.0, lane: Literal["shared", "training"] = "shared") -> Caller:
    return Caller(name=name, scopes=frozenset(), weight=weight, lane=lane)


A, B, C = caller("a"), caller("b"), caller("c")
TRAINER = caller("trainer", lane="training")


def push(queue: FairQueue[str], who: Caller, count: int, *, tokens: int = 1, key: str = "") -> list[Ticket[str]]:
    return [queue.push(who.name, caller=who, tokens=tokens, key=key) for _ in range(count)]


def take(queue: FairQueue[str], max_items: int, *, max_tokens: int = BIG) -> list[str]:
    return [ticket.value for ticket in queue.take(max_items=max_items, max_tokens=max_tokens)]


def served_tokens(queue: FairQueue[str], *, until: int) -> Counter[str]:
    """Return the tokens by caller of the items taken one by one until so many tokens were served."""
    served: Counter[str] = Counter()
    while served.total() < until:
        (ticket,) = queue.take(max_items=1, max_tokens=BIG)
        served[ticket.value] += ticket.tokens
    return served


def test_one_caller_is_served_in_order() -> None:
    queue = FairQueue[int](training_share=0.5)
    for number in range(5):
        queue.push(number, caller=A, tokens=1 + number, key=None)
    assert [ticket.value for ticket in queue.take(max_items=9, max_tokens=BIG)] == [0, 1, 2, 3, 4]
    assert (len(queue), queue.tokens) == (0, 0)


def test_callers_take_turns_however_much_one_has_queued() -> None:
    queue = FairQueue[str](training_share=0.5)
    push(queue, A, 100)
    push(queue, B, 2)
    assert take(queue, 5) == ["a", "b", "a", "b", "a"]


def test_a_newcomer_is_next_although_another_was_served_for_long() -> None:
    queue = FairQueue[str](training_share=0.5)
    push(queue, A, 100)
    assert take(queue, 50) == ["a"] * 50
    push(queue, B, 60)
    assert Counter(take(queue, 20)) == {"a": 10, "b": 10}, "and is owed nothing for the time before"


def test_being_away_earns_no_credit_and_coming_back_forgives_no_debt() -> None:
    queue = FairQueue[str](training_share=0.5)
    push(queue, A, 200)
    push(queue, B, 10)
    take(queue, 20)
    take(queue, 30)
    push(queue, B, 100)
    assert Counter(take(queue, 40)) == {"a": 20, "b": 20}
    queue = FairQueue[str](training_share=0.5)
    push(queue, A, 2, tokens=1)
    push(queue, B, 1, tokens=100)
    assert take(queue, 2) == ["a", "b"]
    push(queue, B, 1, tokens=100)  # b has just had 100 tokens, a 1
    push(queue, A, 50)
    assert take(queue, 20) == ["a"] * 20


def test_by_its_credit_a_call_of_somebody_who_uses_little_is_served_whole() -> None:
    def order(credit_tokens: int) -> list[str]:
        queue = FairQueue[str](training_share=0.5, credit_tokens=credit_tokens)
        push(queue, A, 100)
        take(queue, 30)
        push(queue, B, 8)
        return take(queue, 16)

    assert order(20) == ["b"] * 8 + ["a"] * 8
    assert Counter(order(0)[:8]) == {"a": 4, "b": 4}, "the control: without credit they take turns"


def test_a_credit_is_earned_once_and_bounded() -> None:
    queue = FairQueue[str](training_share=0.5, credit_tokens=20)
    push(queue, A, 2000)
    take(queue, 500)
    push(queue, B, 300)
    assert 20 <= take(queue, 100).count("b") - 40 <= 22, "20 of credit, and half of the others"
    assert Counter(take(queue, 100)) == {"a": 50, "b": 50}, "then it is used up"
    queue = FairQueue[str](training_share=0.5, credit_tokens=20)
    push(queue, A, 50)
    push(queue, B, 50)
    assert Counter(take(queue, 40)) == {"a": 20, "b": 20}, "nobody begins with one"


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_credit_of_callers_never_takes_the_share_of_the_other_lane_for_long(share: float) -> None:
    queue = FairQueue[str](training_share=share, credit_tokens=50)
    push(queue, TRAINER, 5000)
    push(queue, A, 5000)
    served: Counter[str] = Counter()
    for _ in range(100):
        push(queue, B, 10)  # always less than a fair share, so always with credit
        served.update(take(queue, 50))
    assert served["trainer"] == pytest.approx(5000 * share, abs=50 / (1 - share) + 50)
    assert served["b"] == 1000, "all that it asked for"


def test_shares_are_of_tokens_and_follow_the_weights() -> None:
    queue = FairQueue[str](training_share=0.5)
    heavy = caller("heavy", weight=3.0)
    push(queue, A, 3000, tokens=50)
    push(queue, B, 3000, tokens=10)
    push(queue, heavy, 3000, tokens=20)
    served = served_tokens(queue, until=50_000)
    assert served["a"] == pytest.approx(10_000, abs=100)
    assert served["b"] == pytest.approx(10_000, abs=100)
    assert served["heavy"] == pytest.approx(30_000, abs=100)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_training_lane_has_its_share_beside_any_number_of_others(share: float) -> None:
    queue = FairQueue[str](training_share=share)
    for number in range(20):
        push(queue, caller(f"shared-{number}"), 500, tokens=10)
    push(queue, TRAINER, 500, tokens=30)
    assert served_tokens(queue, until=10_000)["trainer"] == pytest.approx(10_000 * share, abs=60)


def test_what_one_lane_does_not_use_goes_to_the_other() -> None:
    queue = FairQueue[str](training_share=0.9)
    push(queue, A, 10)
    assert take(queue, 10) == ["a"] * 10
    push(queue, TRAINER, 10)
    assert take(queue, 10) == ["trainer"] * 10


def test_an_item_that_comes_to_an_idle_lane_is_in_the_next_batch() -> None:
    queue = FairQueue[str](training_share=0.05)
    push(queue, A, 1000, tokens=100)
    take(queue, 64)
    push(queue, TRAINER, 3)
    assert take(queue, 64)[:1] == ["trainer"] or "trainer" in take(queue, 1)


def test_nobody_waits_longer_than_the_bound_of_the_method() -> None:
    """SFQ: an item begins within the largest items of the others after its fair time, here one turn of everybody."""
    queue = FairQueue[str](training_share=0.5)
    names = [caller(f"c{number}") for number in range(10)]
    for who in names:
        push(queue, who, 1000, tokens=random.Random(who.name).randint(1, 20))
    polite = caller("polite")
    for _ in range(200):
        take(queue, 7)
        push(queue, polite, 1)
        assert "polite" in take(queue, len(names) + 1)


def test_a_batch_has_one_key_and_those_passed_over_lead_the_next() -> None:
    queue = FairQueue[str](training_share=0.5)
    push(queue, A, 4, key="x")
    push(queue, B, 4, key="y")
    push(queue, C, 4, key="x")
    batches = [queue.take(max_items=8, max_tokens=BIG) for _ in range(2)]
    assert [Counter(ticket.value for ticket in batch) for batch in batches] == [{"a": 4, "c": 4}, {"b": 4}]
    assert len(queue) == 0


def test_keys_of_one_caller_are_led_by_the_oldest_item() -> None:
    queue = FairQueue[str](training_share=0.5)
    for key in "xyxyz":
        push(queue, A, 1, key=key)
    taken = [[ticket.key for ticket in queue.take(max_items=9, max_tokens=BIG)] for _ in range(3)]
    assert taken == [["x", "x"], ["y", "y"], ["z"]]


def test_the_token_budget_holds_and_a_giant_goes_alone() -> None:
    queue = FairQueue[str](training_share=0.5)
    push(queue, A, 1, tokens=500)
    push(queue, B, 3, tokens=40)
    assert take(queue, 9, max_tokens=100) == ["a"]
    assert take(queue, 9, max_tokens=100) == ["b", "b"]
    assert take(queue, 9, max_tokens=100) == ["b"]
    assert take(queue, 9, max_tokens=100) == []


def test_a_large_item_is_not_passed_over_for_ever() -> None:
    queue = FairQueue[str](training_share=0.5)
    push(queue, A, 1, tokens=90)
    for _ in range(10):
        push(queue, B, 20, tokens=20)
        if "a" in take(queue, 9, max_tokens=100):
            return
    raise AssertionError("the large item was never taken")


def test_discarded_and_dropped_items_cost_nothing() -> None:
    queue = FairQueue[str](training_share=0.5)
    tickets = push(queue, A, 50, tokens=100)
    push(queue, A, 3, tokens=100)
    push(queue, B, 5, tokens=100)
    assert all(queue.discard(ticket) for ticket in tickets[:40])
    assert not queue.discard(tickets[0]), "it is out already"
    dead = {ticket.number for ticket in tickets}
    batch = queue.take(max_items=4, max_tokens=BIG, drop=lambda ticket: ticket.number in dead)
    assert [ticket.value for ticket in batch] == ["a", "b", "a", "b"]
    assert (len(queue), queue.tokens, queue.lane_size("shared")) == (4, 400, 4)


def test_a_caller_whose_items_were_all_discarded_can_come_again() -> None:
    queue = FairQueue[str](training_share=0.5)
    for ticket in push(queue, A, 3):
        queue.discard(ticket)
    assert take(queue, 4) == []
    push(queue, B, 2)
    push(queue, A, 2)
    assert sorted(take(queue, 9)) == ["a", "a", "b", "b"]


def test_clearing_leaves_nothing_to_discard() -> None:
    queue = FairQueue[str](training_share=0.5)
    tickets = push(queue, A, 3) + push(queue, TRAINER, 2)
    queue.clear()
    assert (len(queue), take(queue, 9)) == (0, [])
    assert not any(queue.discard(ticket) for ticket in tickets)
    push(queue, B, 1)
    assert take(queue, 9) == ["b"]


def test_share_of_counts_those_that_wait() -> None:
    queue = FairQueue[str](training_share=0.25)
    assert queue.share_of(A) == queue.share_of(TRAINER) == 1.0
    push(queue, A, 5)
    assert queue.share_of(A) == 1.0
    assert queue.share_of(B) == 0.5
    assert queue.share_of(TRAINER) == 0.25
    push(queue, TRAINER, 5)
    assert queue.share_of(B) == 0.375


@pytest.mark.parametrize(("weight", "tokens"), [(0.0, 1), (-1.0, 1), (1.0, 0), (float("nan"), 1)])
def test_weights_and_costs_that_would_give_unlimited_service_are_refused(weight: float, tokens: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        FairQueue[str](training_share=0.5).push("x", caller=caller("x", weight=weight), tokens=tokens, key=None)


def test_callers_that_are_gone_are_forgotten() -> None:
    queue = FairQueue[str](training_share=0.5)
    push(queue, A, 3000)
    for number in range(2000):
        push(queue, caller(f"passing-{number}"), 1)
        take(queue, 2)
    assert len(queue._lanes["shared"].flows) < 200


def test_random_traffic_keeps_the_counts_and_loses_nothing() -> None:
    rng = random.Random(5)
    queue = FairQueue[int](training_share=0.3)
    callers = [
        caller(f"c{n}", weight=rng.choice([0.5, 1, 4]), lane=rng.choice(["shared", "training"])) for n in range(9)
    ]
    waiting: dict[int, Ticket[int]] = {}
    gone: set[int] = set()
    for number in range(6000):
        if rng.random() < 0.6:
            waiting[number] = queue.push(
                number, caller=rng.choice(callers), tokens=rng.randint(1, 99), key=rng.choice("xyz")
            )
        elif rng.random() < 0.3 and waiting:
            chosen = rng.choice(list(waiting))
            assert queue.discard(waiting.pop(chosen))
            gone.add(chosen)
        else:
            for ticket in queue.take(max_items=rng.randint(1, 9), max_tokens=rng.randint(1, 400)):
                assert waiting.pop(ticket.value) is ticket
                gone.add(ticket.value)
        assert len(queue) == len(waiting)
        assert queue.tokens == sum(ticket.tokens for ticket in waiting.values())
    while waiting:
        for ticket in queue.take(max_items=50, max_tokens=BIG):
            del waiting[ticket.value]


def test_the_effort_of_a_batch_does_not_grow_with_the_backlog() -> None:
    def seconds(backlog: int) -> float:
        queue = FairQueue[str](training_share=0.5)
        for who in (A, B, C, TRAINER):
            push(queue, who, backlog)
        started = time.perf_counter()
        for _ in range(20):
            take(queue, 32)
        return time.perf_counter() - started

    def least(measure: Callable[[int], float], backlog: int) -> float:
        return min(measure(backlog) for _ in range(5))

    assert least(seconds, 20_000) < 10 * least(seconds, 200)


def seconds_to_drop(count: int) -> float:
    """Return how long it takes to drop so many items of one caller, each with a key of its own, at best."""
    times = []
    for _ in range(3):
        queue: FairQueue[int] = FairQueue(training_share=0.5)
        for index in range(count):
            queue.push(index, caller=A, tokens=1, key=index)
        started = time.perf_counter()
        assert queue.take(max_items=1, max_tokens=BIG, drop=lambda ticket: True) == []
        times.append(time.perf_counter() - started)
    return min(times)


def test_dropping_the_items_of_many_calls_takes_a_time_that_grows_with_their_number_alone() -> None:
    assert seconds_to_drop(4000) < 40 * seconds_to_drop(400)  # with their square it was 100 times as long
