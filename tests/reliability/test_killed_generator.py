"""How the experiment R3 counts the tries of a push and spares a push that was killed twice."""

from __future__ import annotations

from tests.reliability.scenarios.killed_generator import Tries, count_tries, draw_next


def lines(*events: tuple[str, int]) -> list[dict[str, object]]:
    """Return a history of (kind, version), a second apart."""
    return [{"kind": kind, "policy_version": version, "t": float(t)} for t, (kind, version) in enumerate(events)]


def test_tries_are_counted_until_a_version_is_active() -> None:
    history = lines(("pushing", 1), ("pushing", 1), ("activated", 1), ("pushing", 2))
    assert count_tries(history) == Tries(most=2, current=1)


def test_a_version_that_is_sent_again_to_a_generator_with_a_new_store_is_another_push_with_tries_of_its_own() -> None:
    history = lines(("pushing", 1), ("pushing", 1), ("activated", 1), ("pushing", 1), ("pushing", 1))
    assert count_tries(history) == Tries(most=2, current=2)


def test_a_push_that_a_newer_version_overtook_is_current_no_more() -> None:
    assert count_tries(lines(("pushing", 1), ("pushing", 2), ("activated", 2))) == Tries(most=1, current=0)


def test_lines_of_several_processes_count_in_the_order_of_their_times() -> None:
    history = lines(("pushing", 1), ("pushing", 1), ("activated", 1), ("pushing", 1))
    assert count_tries(reversed(history)) == Tries(most=2, current=1)


def test_a_push_that_was_begun_twice_is_spared_by_a_random_moment_or_by_a_later_occurrence() -> None:
    left = ["push.stored@1=kill", "", "upload.chunk@2=kill"]
    assert draw_next(left, 1) == "push.stored@1=kill"
    assert draw_next(left, 2) == ""
    assert draw_next(left, 2) == "upload.chunk@4=kill"
    assert left == []
