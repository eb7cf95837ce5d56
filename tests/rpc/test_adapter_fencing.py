"""Writers of a run that have been replaced: they change nothing any more, also after a restart of the generator."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.adapter_files import (
    activate,
    begin_request,
    commit_request,
    delete_request,
    fake_adapter,
    list_adapters,
    push,
    push_fakes,
    rollback_request,
    upload,
)
from tests.rpc.generator_serving import Serving, refusal, serve_generator, settings
from tests.rpc.serving import run
from tether.errors import InvalidArgumentError
from tether_services.generator import fence as fence_module

ABORTED, FULL = grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED
OLD, NEW = 4, 5
Call = Callable[[Serving, int], Awaitable[object]]


async def begin(serving: Serving, epoch: int) -> object:
    return await serving.adapters.BeginPush(begin_request(fake_adapter(3), "run-a", 3, epoch=epoch), timeout=5)


async def commit_uploaded(serving: Serving, epoch: int) -> object:
    """Commit what the newest writer has uploaded."""
    request = begin_request(fake_adapter(9), "run-a", 9, epoch=NEW)
    upload_id = await upload(serving.adapters, request, fake_adapter(9).data)
    return await serving.adapters.CommitPush(commit_request(upload_id, epoch=epoch), timeout=5)


async def switch(serving: Serving, epoch: int) -> object:
    return await activate(serving.adapters, "run-a", 1, epoch=epoch)


async def roll_back(serving: Serving, epoch: int) -> object:
    return await serving.adapters.RollbackAdapter(rollback_request("run-a", 2, epoch=epoch), timeout=5)


async def delete(serving: Serving, epoch: int) -> object:
    return await serving.adapters.DeleteAdapter(delete_request("run-a", 1, epoch=epoch), timeout=5)


CALLS: list[Call] = [begin, commit_uploaded, switch, roll_back, delete]


@asynccontextmanager
async def two_versions(folder: Path | None = None) -> AsyncIterator[Serving]:
    """Version 1 loaded, version 2 active; the newest writer has not called yet."""
    adapters = {"folder": folder} if folder else {}
    async with serve_generator(settings(adapters=adapters)) as serving:
        await push_fakes(serving.adapters, "run-a", [1, 2])
        await activate(serving.adapters, "run-a", 2, epoch=OLD)
        yield serving


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("newer", CALLS, ids=lambda call: call.__name__)
def test_every_call_of_a_newer_writer_refuses_every_call_of_the_older_one(call: Call, newer: Call) -> None:
    async def scenario() -> None:
        async with two_versions() as serving:
            await newer(serving, NEW)
            await serving.service.adapters.settle()
            before = await list_adapters(serving.adapters)
            stale = await refusal(call(serving, OLD))
            assert (stale.code, stale.reason, stale.fields) == (ABORTED, "STALE_EPOCH", ("epoch",))
            assert await list_adapters(serving.adapters) == before

    run(scenario())


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_without_the_fence_the_older_writer_would_get_through(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence_module.Fence, "check", lambda *_: None)

    async def scenario() -> None:
        async with two_versions() as serving:
            await begin(serving, NEW)
            await call(serving, OLD)

    run(scenario())


def test_runs_count_their_own_epochs() -> None:
    async def scenario() -> None:
        async with two_versions() as serving:
            await activate(serving.adapters, "run-a", 1, epoch=100)
            await activate(serving.adapters, "run-b", 0, epoch=1)
            await activate(serving.adapters, "run-a", 0, epoch=100)

    run(scenario())


@pytest.mark.parametrize("newer", CALLS, ids=lambda call: call.__name__)
def test_the_epoch_is_on_the_disk_before_the_answer(newer: Call, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_versions(tmp_path) as serving:
            await newer(serving, NEW)
            assert json.loads((tmp_path / "fence.json").read_text()) == {"run-a": NEW}

    run(scenario())


def stale_after_restart(folder: Path, between: Callable[[], object]) -> Any:
    """What the older writer gets from a generator that was restarted after the newer one had called."""

    async def scenario() -> Any:
        async with two_versions(folder) as serving:
            await switch(serving, NEW)
        between()
        async with serve_generator(settings(adapters={"folder": folder})) as serving:
            return await refusal(activate(serving.adapters, "run-a", 0, epoch=OLD))

    return run(scenario())


def test_a_restart_keeps_the_fence(tmp_path: Path) -> None:
    assert stale_after_restart(tmp_path, lambda: None).reason == "STALE_EPOCH"


def test_a_restart_that_lost_the_fence_would_let_the_older_writer_in(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        stale_after_restart(tmp_path, (tmp_path / "fence.json").unlink)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run-a": "5"}', '{"run-a": 0}', '{"run-a": true}'])
def test_a_damaged_fence_is_not_replaced_by_an_empty_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "fence.json").write_text(content)

    async def scenario() -> None:
        async with serve_generator(settings(adapters={"folder": tmp_path})):
            raise AssertionError("it must not start")

    with pytest.raises(InvalidArgumentError, match="damaged"):
        run(scenario())
    assert (tmp_path / "fence.json").read_text() == content


def test_a_fence_that_cannot_be_written_refuses_the_call_and_the_older_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def scenario() -> None:
        async with two_versions(tmp_path) as serving:
            with monkeypatch.context() as patch:
                patch.setattr(fence_module, "write_text", full)
                refused = await refusal(switch(serving, NEW))
                assert (refused.code, refused.reason) == (FULL, "STORAGE_FULL")
                assert (await list_adapters(serving.adapters))[("run-a", 2)] == "ACTIVE"
                assert (await refusal(switch(serving, OLD))).reason == "STALE_EPOCH"
            await switch(serving, NEW)
            assert json.loads((tmp_path / "fence.json").read_text()) == {"run-a": NEW}

    run(scenario())


class Proving:
    """Holds the proof of every adapter until `go` is set."""

    def __init__(self, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self._compute = serving.service.engine.compute_logprobs
        monkeypatch.setattr(serving.service.engine, "compute_logprobs", self._wait)

    async def _wait(self, *arguments: Any) -> Any:
        self.begun.set()
        await self.go.wait()
        return await self._compute(*arguments)


def test_a_commit_in_progress_is_refused_when_a_newer_writer_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            proving = Proving(serving, monkeypatch)
            old, new = fake_adapter(1), fake_adapter(2)
            late = asyncio.create_task(refusal(push(serving.adapters, begin_request(old, "run-a", 1, epoch=OLD), old)))
            await proving.begun.wait()
            await activate(serving.adapters, "run-a", 0, epoch=NEW)
            # Its successor need not wait for it.
            upload_id = await upload(serving.adapters, begin_request(new, "run-a", 1, epoch=NEW), new.data)
            proving.go.set()
            stale = await late
            assert (stale.code, stale.reason) == (ABORTED, "STALE_EPOCH")
            request = commit_request(upload_id, epoch=NEW)
            assert (await serving.adapters.CommitPush(request, timeout=5)).adapter.sha256 == new.sha256
            assert await list_adapters(serving.adapters) == {("run-a", 1): "LOADED"}
            assert len(serving.stored_files()) == 2

    run(scenario())


def test_a_newer_writer_of_the_same_content_takes_the_commit_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            proving, adapter = Proving(serving, monkeypatch), fake_adapter(1)
            begun = asyncio.create_task(push(serving.adapters, begin_request(adapter, "run-a", 1, epoch=OLD), adapter))
            await proving.begun.wait()
            taken = asyncio.create_task(push(serving.adapters, begin_request(adapter, "run-a", 1, epoch=NEW), adapter))
            while serving.served.value("tether_generator_requests_total", method="BeginPush", code="OK") < 2:
                await asyncio.sleep(0.01)
            proving.go.set()
            assert (await taken).adapter.sha256 == adapter.sha256
            assert await begun == await taken
            assert serving.served.value("tether_adapter_push_total", result="ok") == 1

    run(scenario())


def test_epochs_that_are_written_at_the_same_time_never_go_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        fence = fence_module.Fence()
        fence.open(tmp_path / "fence.json")
        admitted = [fence.admit(f"run-{number % 5}", number) for number in range(1, 101)]
        await asyncio.gather(*admitted, return_exceptions=True)
        assert json.loads((tmp_path / "fence.json").read_text()) == {f"run-{n % 5}": n for n in range(96, 101)}

    run(scenario())


def test_the_number_of_remembered_runs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence_module, "MAX_RUNS", 3)

    async def scenario() -> None:
        fence = fence_module.Fence()
        fence.open(tmp_path / "fence.json")
        for run_id in ("a", "b", "c", "a", "d"):
            await fence.admit(run_id, 2)
        assert set(json.loads((tmp_path / "fence.json").read_text())) == {"c", "a", "d"}

    run(scenario())
