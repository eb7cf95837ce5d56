from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from tether_services.runtime.callers import Caller, CurrentCall, enter_call
from tether_services.runtime.fair_gate import FairGate

FLOOD, POLITE = Caller("flood", frozenset()), Caller("polite", frozenset())
TRAINER = Caller("trainer", frozenset(), lane="training")


class Visitors:
    """Tasks that wish to enter, and the order in which they could."""

    def __init__(self, gate: FairGate) -> None:
        self.gate = gate
        self.entered: list[str] = []

    def come(self, who: Caller, *, tokens: int = 10) -> asyncio.Task[None]:
        async def enter() -> None:
            enter_call(CurrentCall(who, lambda count: None))
            await self.gate.enter(tokens=tokens)
            self.entered.append(who.name)

        return asyncio.create_task(enter())


def run(scenario: Awaitable[None]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scenario, 10)

    asyncio.run(main())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_as_many_are_inside_as_there_are_places_and_the_rest_enters_in_fair_order() -> None:
    async def scenario() -> None:
        visitors = Visitors(FairGate(2, training_share=0.5))
        tasks = [visitors.come(FLOOD) for _ in range(8)] + [visitors.come(POLITE), visitors.come(TRAINER)]
        await settle()
        assert visitors.entered == ["flood", "flood"]
        for _ in range(4):
            visitors.gate.leave()
            await settle()
        assert sorted(visitors.entered[2:5]) == ["flood", "polite", "trainer"], "not eight of the flood first"
        for _ in range(10):
            visitors.gate.leave()
        await asyncio.gather(*tasks)

    run(scenario())


def test_whoever_gives_up_waiting_takes_no_place() -> None:
    async def scenario() -> None:
        visitors = Visitors(FairGate(1, training_share=0.5))
        await visitors.come(FLOOD)
        impatient, patient = visitors.come(POLITE), visitors.come(FLOOD)
        await settle()
        impatient.cancel()
        await settle()
        visitors.gate.leave()
        await patient
        visitors.gate.leave()
        await visitors.come(POLITE)
        assert visitors.entered == ["flood", "flood", "polite"]

    run(scenario())


def test_a_place_that_comes_as_its_taker_is_cancelled_goes_to_the_next() -> None:
    async def scenario() -> None:
        visitors = Visitors(FairGate(1, training_share=0.5))
        await visitors.come(FLOOD)
        leaving, waiting = visitors.come(POLITE), visitors.come(FLOOD)
        await settle()
        visitors.gate.leave()  # the place is given to the first one ...
        leaving.cancel()  # ... which is cancelled before it can go on
        await settle()
        assert leaving.cancelled()
        await waiting
        assert visitors.entered == ["flood", "flood"]

    run(scenario())
