"""A worker that does not get on is ended and started again, wherever it hangs; a slow one is left alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.scripted_world import world
from tests.rpc.serving import run

QUICK: dict[str, Any] = {
    "lease_seconds": 1,
    "hang_seconds": 3.0,  # longer than a worker takes to start
    "generate_timeout_seconds": 0.5,
    "score_timeout_seconds": 0.5,
    "adapter_timeout_seconds": 0.5,
}


def test_a_worker_that_hangs_in_a_step_is_replaced_and_the_run_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, **QUICK) as w:
            await w.started("sticks-1")
            ended = await w.end_of("sticks-1")
            assert (ended.state, ended.committed_step_count) == ("succeeded", 3)
            assert [step.epoch for step in await w.client.list_steps("sticks-1")] == [1, 2, 2]
            log = (tmp_path / "runs" / "sticks-1" / "worker.log").read_text()
            assert "worker is stuck" in log
            assert "after_step" in log, "where it hung is not said"

    run(scenario(), timeout_seconds=60)


def test_a_worker_that_hangs_before_it_takes_its_lease_is_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, **QUICK) as w:
            await w.client.start_run("unborn-1", w.toml)
            assert (await w.end_of("unborn-1")).state == "succeeded"
            assert [step.epoch for step in await w.client.list_steps("unborn-1")] == [2, 2, 2]

    run(scenario(), timeout_seconds=60)


def test_a_worker_that_does_not_exit_after_its_run_is_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, **QUICK) as w:
            await w.client.start_run("lingers-1", w.toml)
            assert (await w.end_of("lingers-1")).state == "succeeded"
            while w.served.value("tether_run_active") == 1:
                await asyncio.sleep(0.05)
            assert (await w.client.get_run("lingers-1")).state == "succeeded"

    run(scenario(), timeout_seconds=60)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_step_that_is_slow_and_gets_on_is_left_alone_also_after_a_cancellation(
    tmp_path: Path, cancelled: bool
) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=2, cancel_seconds=3.0, **QUICK) as w:
            await w.started("works-1")
            if cancelled:
                await w.client.cancel_run("works-1")
            ended = await w.end_of("works-1")
            assert (ended.state, ended.error) == ("cancelled" if cancelled else "succeeded", "")
            assert {step.epoch for step in await w.client.list_steps("works-1")} == {1}

    run(scenario(), timeout_seconds=60)
