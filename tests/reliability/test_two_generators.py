"""How the experiment of the two generators draws its faults: each one can be met, in its turn and before the end."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Final

import pytest

from tests.reliability.scenarios.two_generators import draw_lives

LAST: Final = ("activate.persisted",)
PUSH: Final[tuple[str, ...]] = ("upload.chunk", "upload.chunk", "push.verified", "push.stored", "push.proven", *LAST)
"""What a push of two files reaches."""
LEFT: Final[dict[str, tuple[str, ...]]] = {"push.stored": LAST, "push.proven": LAST, "activate.persisted": ()}
"""What is still reached after a kill there: what is stored is not sent again."""


def meet(lives: list[list[str]], steps: int) -> list[str]:
    """Return the faults of a generator that are met in a run of so many steps, one push after the other."""
    met: list[str] = []
    pushes, left = PUSH, steps
    for life in lives:
        reached = Counter[str]()
        killed = False
        while left and not killed:
            for point in pushes:
                reached[point] += 1
                entry = [fault for fault in life if fault.startswith(f"{point}@{reached[point]}=")]
                met += entry
                if killed := any(fault.endswith("=kill") for fault in entry):
                    pushes = LEFT.get(point, PUSH)
                    break
            else:
                pushes, left = PUSH, left - 1
    return met


@pytest.mark.parametrize(("faults", "steps"), [(4, 12), (40, 120)], ids=["short", "long"])
def test_every_fault_of_a_generator_is_met_whatever_the_seed(faults: int, steps: int) -> None:
    for seed in range(2000):
        for lives in draw_lives(Random(seed), faults).values():
            assert meet(lives, steps) == [fault for life in lives for fault in life], seed


def test_a_kill_in_the_push_of_the_stop_that_was_to_come_first_is_seen() -> None:
    assert meet([["push.proven@2=stop", "upload.chunk@3=kill"], []], 12) == ["upload.chunk@3=kill"]
