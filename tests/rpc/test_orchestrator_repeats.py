"""Calls of the orchestrator that are asked for again, with workers that follow a script."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.scripted_world import world
from tests.rpc.serving import run
from tether.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    TetherError,
)
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt


def test_a_resume_that_is_asked_for_again_returns_the_first_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, auto_resume="off") as w:
            await w.client.start_run("dies-1", w.toml)
            await w.end_of("dies-1")
            request_id = str(uuid.uuid4())
            first, again = await asyncio.gather(
                *(w.client.resume_run("dies-1", request_id=request_id) for _ in range(2))
            )
            assert first == again
            assert (first.state, first.committed_step_count) == ("pending", 1)
            await w.end_of("dies-1")
            assert await w.client.resume_run("dies-1", request_id=request_id) == first
            assert Ledger(tmp_path / "runs").get_run("dies-1").epoch == 2, "one attempt, however often it was asked for"
            with pytest.raises(FailedPreconditionError) as caught:
                await w.client.resume_run("dies-1")
            assert caught.value.reason == "RUN_NOT_RESUMABLE"

    run(scenario())


def test_a_resume_whose_caller_has_gone_is_applied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Ledger.begin_attempt

    def slow(self: Ledger, run_id: str, **given: Any) -> Attempt:
        time.sleep(0.3)
        return begin(self, run_id, **given)

    monkeypatch.setattr(Ledger, "begin_attempt", slow)

    async def scenario() -> None:
        async with world(tmp_path, auto_resume="off") as w:
            await w.client.start_run("dies-1", w.toml)
            await w.end_of("dies-1")
            request_id = str(uuid.uuid4())
            with pytest.raises(TetherError):
                await w.client.resume_run("dies-1", request_id=request_id, timeout_seconds=0.15)
            answer = await w.client.resume_run("dies-1", request_id=request_id)
            assert answer.state == "pending"
            assert Ledger(tmp_path / "runs").get_run("dies-1").epoch == 2

    run(scenario())


def test_a_cancellation_that_is_asked_for_again_returns_the_first_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=1000) as w:
            await w.started("slow-1")
            request_id = str(uuid.uuid4())
            first = await w.client.cancel_run("slow-1", request_id=request_id)
            await w.end_of("slow-1")
            resumed = await w.client.resume_run("slow-1")
            assert resumed.state == "pending"
            assert await w.client.cancel_run("slow-1", request_id=request_id) == first
            await asyncio.sleep(0.5)
            assert not (await w.client.get_run("slow-1")).ended, "the repeat must not cancel the resumed run"

    run(scenario())


def test_a_request_id_stands_for_one_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, steps=1000) as w:
            await w.started("slow-1")
            request_id = str(uuid.uuid4())
            await w.client.cancel_run("slow-1", request_id=request_id)
            await w.end_of("slow-1")
            with pytest.raises(InvalidArgumentError) as caught:
                await w.client.resume_run("slow-1", request_id=request_id)
            assert caught.value.reason == "REQUEST_ID_REUSED"
            for call in (w.client.resume_run, w.client.cancel_run):
                with pytest.raises(InvalidArgumentError) as caught:
                    await call("slow-1", request_id="not one")
                assert caught.value.violations[0].field == "request_id"

    run(scenario())
