"""What the liveness scenario breaks is really broken."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import pytest

from tests.reliability import breaking
from tests.reliability.breaking import BREAK_VARIABLE, block_executors, heal, install, kill_batcher, kill_engine_thread
from tests.rpc.serving import run
from tether.errors import UnavailableError
from tether_services.runtime.batching import Batcher, BatchSettings
from tether_services.runtime.metrics import QueueMetrics, new_registry


async def echo(items: Sequence[int]) -> list[int]:
    """Answer each item with itself."""
    return list(items)


@pytest.fixture
def word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "break"
    path.write_text("heal")
    monkeypatch.setenv(BREAK_VARIABLE, str(path))
    before = signal.getsignal(signal.SIGUSR1)
    yield path
    signal.signal(signal.SIGUSR1, before)


def test_a_blocked_loop_blocks_its_thread_until_it_is_healed(word: Path) -> None:
    install("reward")
    word.write_text("loop")
    threading.Timer(0.5, word.write_text, ["heal"]).start()
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert 0.4 < time.monotonic() - began < 5


def test_a_deadlocked_executor_takes_no_job_until_it_is_healed_and_others_do() -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="reward-text") as text, ThreadPoolExecutor(1) as other:
        try:
            block_executors("reward")
            waiting = text.submit(int)
            with pytest.raises(FutureTimeoutError):
                waiting.result(0.3)
            assert other.submit(int).result(5) == 0
        finally:
            heal("reward")
        assert waiting.result(5) == 0


def test_what_has_ended_and_is_still_in_memory_is_passed_over() -> None:
    ended = ThreadPoolExecutor(1, thread_name_prefix="reward-text")
    ended.shutdown()
    loop = asyncio.new_event_loop()

    async def begin() -> Batcher[int, int]:
        metrics = QueueMetrics("breaking", new_registry(), queue_limit=8)
        batcher = Batcher[int, int](echo, BatchSettings(), metrics)
        batcher.start()
        return batcher

    batcher = loop.run_until_complete(begin())
    loop.run_until_complete(batcher.close())
    loop.close()
    try:
        block_executors("reward")
        kill_batcher()
    finally:
        heal("reward")


def test_a_dead_engine_thread_is_never_replaced() -> None:
    engine = ThreadPoolExecutor(1, thread_name_prefix="transformers")
    assert engine.submit(int).result(5) == 0
    kill_engine_thread()
    with pytest.raises(FutureTimeoutError):
        engine.submit(int).result(0.3)
    engine.shutdown(wait=False)


def test_a_killed_batcher_answers_nobody() -> None:
    async def main() -> None:
        metrics = QueueMetrics("breaking", new_registry(), queue_limit=8)
        batcher = Batcher[int, int](echo, BatchSettings(max_delay_seconds=0), metrics)
        batcher.start()
        assert await batcher.submit_all([(1, 1)], timeout_seconds=5) == [1]
        kill_batcher()
        await asyncio.sleep(0.1)
        with pytest.raises(UnavailableError):
            await batcher.submit_all([(1, 1)], timeout_seconds=5)

    run(main())


def test_every_service_can_be_broken_in_every_way() -> None:
    services = {"generator", "reward", "reference", "orchestrator"}
    assert breaking.EXECUTORS.keys() == breaking.BREAKERS.keys() == services
