"""The trainer's thread: one function after another, always the same thread, and an event loop that goes on."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tether_services.orchestrator.trainer_thread import TrainerThread


def test_the_event_loop_goes_on_while_a_function_works() -> None:
    async def main() -> int:
        thread, ticks = TrainerThread(), 0
        working = asyncio.create_task(thread.run(time.sleep, 0.3))
        while not working.done():
            await asyncio.sleep(0.01)
            ticks += 1
        thread.close()
        return ticks

    assert asyncio.run(main()) >= 10


def test_functions_run_one_after_another_in_one_thread() -> None:
    running = threading.Lock()

    def work(number: int, *, factor: int) -> tuple[int, int]:
        assert running.acquire(blocking=False), "two functions at once"
        time.sleep(0.01)
        running.release()
        return number * factor, threading.get_ident()

    async def main() -> list[tuple[int, int]]:
        thread = TrainerThread()
        results = await asyncio.gather(*(thread.run(work, n, factor=2) for n in range(5)))
        thread.close()
        return results

    results = asyncio.run(main())
    assert [value for value, _ in results] == [0, 2, 4, 6, 8]
    assert len({ident for _, ident in results}) == 1
    assert results[0][1] != threading.get_ident()


def test_an_error_of_the_function_reaches_the_caller() -> None:
    async def main() -> None:
        thread = TrainerThread()
        try:
            await thread.run(int, "no number")
        finally:
            thread.close()

    with pytest.raises(ValueError, match="no number"):
        asyncio.run(main())


def test_closing_forgets_what_has_not_begun() -> None:
    async def main() -> list[object]:
        thread = TrainerThread()
        first = asyncio.create_task(thread.run(time.sleep, 0.1))
        second = asyncio.create_task(thread.run(time.sleep, 60))
        await asyncio.sleep(0.02)
        thread.close()
        return list(await asyncio.gather(first, second, return_exceptions=True))

    started = time.monotonic()
    ended = asyncio.run(main())
    assert ended[0] is None
    assert isinstance(ended[1], asyncio.CancelledError)
    assert time.monotonic() - started < 10
