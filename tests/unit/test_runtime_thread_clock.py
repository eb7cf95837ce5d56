"""A thread at work is told from one that is stuck."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tether_services.runtime.thread_clock import BUSY_SECONDS, ThreadClock


def is_alive(job: Callable[[threading.Event, ThreadClock], None], *, attached: bool = True) -> bool:
    """Return whether a thread that does a job, until it is told to stop, is taken to live within two seconds."""
    clock, stop = ThreadClock(), threading.Event()
    executor = ThreadPoolExecutor(1, initializer=clock.attach if attached else lambda: None)

    async def answer() -> None:
        await asyncio.get_running_loop().run_in_executor(executor, lambda: None)

    async def main() -> bool:
        busy = executor.submit(job, stop, clock)
        try:
            await asyncio.wait_for(clock.wait_for_life(answer()), 2.0)
            return True
        except TimeoutError:
            return False
        finally:
            stop.set()
            await asyncio.wrap_future(busy)

    try:
        return asyncio.run(main())
    finally:
        executor.shutdown()


def compute(stop: threading.Event, clock: ThreadClock) -> None:
    while not stop.is_set():
        sum(range(1000))


def wait(stop: threading.Event, clock: ThreadClock) -> None:
    stop.wait()


def step(stop: threading.Event, clock: ThreadClock) -> None:
    while not stop.wait(0.1):
        clock.tick()


def be_free(stop: threading.Event, clock: ThreadClock) -> None:
    """Do nothing: the thread answers."""


def test_a_long_job_that_computes_is_life_and_one_that_waits_is_not() -> None:
    assert is_alive(compute)
    assert not is_alive(wait)


def test_without_the_cpu_time_only_steps_and_answers_are_life() -> None:
    """The first line is the control: a thread at work would be taken for a stuck one."""
    assert not is_alive(compute, attached=False)
    assert is_alive(step, attached=False)
    assert is_alive(be_free, attached=False)


def test_what_the_request_raises_is_raised() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(ThreadClock().wait_for_life(fail()))


def test_the_time_is_that_of_the_attached_thread_alone() -> None:
    clock = ThreadClock()
    with ThreadPoolExecutor(1, initializer=clock.attach) as executor:
        executor.submit(lambda: None).result()
        before = clock.seconds()
        end = time.thread_time() + BUSY_SECONDS
        while time.thread_time() < end:
            sum(range(1000))
        assert clock.seconds() - before < BUSY_SECONDS / 2


@pytest.mark.parametrize("at_work", [True, False])
def test_of_several_threads_one_at_work_is_life_though_no_request_is_answered(at_work: bool) -> None:
    clock, stop = ThreadClock(), threading.Event()
    executor = ThreadPoolExecutor(2, initializer=clock.attach)

    async def main() -> bool:
        jobs = [executor.submit(job, stop, clock) for job in (wait, compute if at_work else wait)]
        asyncio.get_running_loop().set_default_executor(executor)
        try:
            await asyncio.wait_for(clock.wait_for_life(asyncio.to_thread(int)), 2.0)
            return True
        except TimeoutError:
            return False
        finally:
            stop.set()
            await asyncio.gather(*(asyncio.wrap_future(job) for job in jobs))

    assert asyncio.run(main()) is at_work
