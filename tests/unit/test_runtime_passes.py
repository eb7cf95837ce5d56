"""Forward passes in the thread of an engine: results in order, and room between two passes for other work."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tether_services.runtime.padding import PaddedBatch
from tether_services.runtime.passes import run_passes
from tether_services.runtime.work_thread import WorkThread

ROWS = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9], [4]]


def add_up(batch: PaddedBatch) -> list[int]:
    """Return the sum of each row's real tokens, which tells rows and padding apart."""
    rows = zip(batch.token_ids.tolist(), batch.lengths.tolist(), strict=True)
    return [sum(ids[:length]) for ids, length in rows]


@pytest.mark.parametrize("max_tokens", [1, 4, 9, 1000])
def test_each_row_gets_its_own_result_however_the_rows_are_batched(max_tokens: int) -> None:
    async def main() -> list[int]:
        thread = WorkThread("test")
        try:
            return await run_passes(thread, add_up, ROWS, max_tokens=max_tokens, device="cpu")
        finally:
            await thread.close()

    assert asyncio.run(main()) == [sum(row) for row in ROWS]


def test_other_work_of_the_thread_fits_between_two_passes() -> None:
    async def main() -> list[str]:
        thread, done = WorkThread("test"), list[str]()

        def forward(batch: PaddedBatch) -> list[int]:
            done.append("pass")
            return add_up(batch)

        passes = asyncio.create_task(run_passes(thread, forward, ROWS, max_tokens=1, device="cpu"))
        await asyncio.sleep(0)  # the first pass is given to the thread
        await asyncio.gather(passes, thread.run(done.append, "other"))
        await thread.close()
        return done

    done = asyncio.run(main())
    assert done.count("pass") == len(ROWS)
    assert 0 < done.index("other") < len(ROWS)


def test_closing_waits_for_what_runs_and_forgets_the_rest() -> None:
    async def main() -> tuple[bool, list[object]]:
        thread, ended = WorkThread("test"), threading.Event()

        def work() -> None:
            time.sleep(0.1)
            ended.set()

        jobs = [asyncio.create_task(thread.run(work)), asyncio.create_task(thread.run(time.sleep, 60))]
        await asyncio.sleep(0.02)
        await thread.close()
        return ended.is_set(), list(await asyncio.gather(*jobs, return_exceptions=True))

    waited, results = asyncio.run(main())
    assert waited
    assert results[0] is None
    assert isinstance(results[1], asyncio.CancelledError)
