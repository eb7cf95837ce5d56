"""A bounded number of places in an engine that schedules by itself, given to callers in fair order."""

from __future__ import annotations

import asyncio

from tether_services.runtime.callers import current_caller
from tether_services.runtime.fair_queue import FairQueue


class FairGate:
    """As many may be inside as there are places; who waits is let in by `fair_queue`."""

    def __init__(self, num_places: int, *, training_share: float, credit_tokens: int = 0) -> None:
        """Build an empty gate.

        Args:
            num_places: How many may be inside.
            training_share: Part of the tokens let in that the training lane gets while both lanes wait.
            credit_tokens: As in `FairQueue`.
        """
        self._num_free = num_places
        self._queue = FairQueue[asyncio.Future[None]](training_share=training_share, credit_tokens=credit_tokens)

    async def enter(self, *, tokens: int) -> None:
        """Return when the current caller has a place, for work of so many tokens; `leave` gives it back.

        Whoever is cancelled before has none.
        """
        if self._num_free and not len(self._queue):
            self._num_free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        ticket = self._queue.push(turn, caller=current_caller(), tokens=tokens, key=None)
        try:
            await turn
        except asyncio.CancelledError:
            if not self._queue.discard(ticket) and not turn.cancelled():
                self.leave()  # the place came at the same moment
            raise

    def leave(self) -> None:
        """Give a place back, to whoever is next."""
        self._num_free += 1
        while self._num_free and (next_tickets := self._queue.take(max_items=1, max_tokens=1)):
            turn = next_tickets[0].value
            if not turn.done():
                self._num_free -= 1
                turn.set_result(None)
