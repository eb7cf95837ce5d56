"""Versions that go: by run, by number, by quota, while requests use them, and when the engine does not let go."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tests.rpc.adapter_files import (
    AdapterBytes,
    activate,
    begin_request,
    delete_request,
    fake_adapter,
    list_adapters,
    push,
    push_fakes,
)
from tests.rpc.generator_serving import Serving, refusal, serve_generator, settings
from tests.rpc.serving import run
from tether.v1 import adapter_pb2
from tether_services.generator import adapters as adapters_module

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
SIZE = len(fake_adapter(1, rank=512).data)


async def listed(serving: Serving) -> list[tuple[int, str, str]]:
    """Version, hash and state of everything stored, oldest first."""
    response = await serving.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(), timeout=5)
    return [
        (a.policy_version, a.sha256, adapter_pb2.AdapterState.Name(a.state).removeprefix("ADAPTER_STATE_"))
        for a in response.adapters
    ]


async def slow_request(serving: Serving) -> asyncio.Future[Any]:
    """A request on the active version that takes most of a second."""
    running = asyncio.ensure_future(serving.generate(max_tokens=40, ignore_eos=True, seed=7))
    while serving.served.value("tether_generator_completions_in_flight") < 1:
        await asyncio.sleep(0.005)
    return running


@pytest.mark.parametrize("content", [fake_adapter(99), fake_adapter(1)], ids=["other content", "same content"])
def test_a_version_that_a_request_still_uses_does_not_block_its_number(content: AdapterBytes) -> None:
    async def scenario() -> None:
        async with serve_generator(settings(fake_token_seconds=0.02)) as serving:
            (old,) = await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            running = await slow_request(serving)
            await activate(serving.adapters, "run-a", 0)
            await serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5)
            await push(serving.adapters, begin_request(content, "run-a", 1), content)
            await activate(serving.adapters, "run-a", 1)
            assert await listed(serving) == [(1, old.sha256, "RETIRING"), (1, content.sha256, "ACTIVE")]
            assert len(serving.stored_files()) == 4
            new = await serving.generate(seed=7)
            assert (new.policy_version, new.adapter_sha256) == (1, content.sha256)
            assert not running.done()
            assert (await running).adapter_sha256 == old.sha256
            await serving.service.adapters.settle()
            assert await listed(serving) == [(1, content.sha256, "ACTIVE")]
            assert len(serving.stored_files()) == 2
            assert (await serving.generate(seed=7)).completions == new.completions

    run(scenario())


def test_the_newest_versions_of_each_run_stay() -> None:
    async def scenario() -> None:
        async with serve_generator(settings(adapters={"keep_versions": 2})) as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])
            await activate(serving.adapters, "run-a", 2)
            await push_fakes(serving.adapters, "pushed", [1, 2, 3, 4])
            await serving.service.adapters.settle()
            assert set(await list_adapters(serving.adapters)) == {
                ("run-a", 1),
                ("run-a", 2),
                ("pushed", 3),
                ("pushed", 4),
            }

    run(scenario())


def test_of_many_runs_the_last_and_the_active_one_stay() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "owner", [1])
            await activate(serving.adapters, "owner", 1)
            for number in range(7):
                await push_fakes(serving.adapters, f"run-{number}", [1])
            await push_fakes(serving.adapters, "run-3", [2])
            await serving.service.adapters.settle()
            left = {run_id for run_id, _ in await list_adapters(serving.adapters)}
            assert left == {"owner", "run-3", "run-6"}
            await activate(serving.adapters, "run-6", 1)
            await serving.service.adapters.settle()
            assert {run_id for run_id, _ in await list_adapters(serving.adapters)} == {*left} - {"owner"}

    run(scenario())


class Stubborn:
    """An engine that refuses to unload a number of times."""

    def __init__(self, serving: Serving, monkeypatch: pytest.MonkeyPatch, *, refusals: int) -> None:
        self.left = refusals
        self._unload = serving.service.engine.unload_adapter
        monkeypatch.setattr(serving.service.engine, "unload_adapter", self.unload)

    async def unload(self, adapter: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            raise RuntimeError("not now")
        await self._unload(adapter)


@pytest.mark.parametrize("refusals", [1, 2])
def test_an_unload_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, refusals: int) -> None:
    monkeypatch.setattr(adapters_module, "UNLOAD_PAUSES", (0.01, 0.01))

    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            Stubborn(serving, monkeypatch, refusals=refusals)
            await serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5)
            await serving.service.adapters.settle()
            assert await list_adapters(serving.adapters) == {}
            assert serving.stored_files() == []

    run(scenario())


def test_a_version_goes_also_if_the_one_leaves_who_waits_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters_module, "UNLOAD_PAUSES", (0.3,))

    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            Stubborn(serving, monkeypatch, refusals=1)
            await serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5)
            leaving = asyncio.create_task(serving.service.adapters.settle())
            await asyncio.sleep(0.05)
            assert not leaving.done()
            leaving.cancel()
            await asyncio.wait([leaving])
            await serving.service.adapters.settle()
            assert await list_adapters(serving.adapters) == {}
            assert serving.stored_files() == []

    run(scenario())


def test_a_version_that_the_engine_keeps_blocks_nothing_and_goes_at_the_next_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapters_module, "UNLOAD_PAUSES", (0.01, 0.01))

    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            Stubborn(serving, monkeypatch, refusals=3)
            await serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5)
            await serving.service.adapters.settle()
            assert await list_adapters(serving.adapters) == {("run-a", 1): "RETIRING"}
            assert len(serving.stored_files()) == 2, "the engine may read it again"
            other = fake_adapter(99)
            await push(serving.adapters, begin_request(other, "run-a", 1), other)
            await serving.service.adapters.settle()
            assert await listed(serving) == [(1, other.sha256, "LOADED")]
            assert len(serving.stored_files()) == 2

    run(scenario())


async def push_large(serving: Serving, run_id: str, version: int) -> None:
    adapter = fake_adapter(version, rank=512)
    await push(serving.adapters, begin_request(adapter, run_id, version), adapter)


def test_a_full_quota_costs_the_oldest_version_of_an_idle_run() -> None:
    async def scenario() -> None:
        room = settings(adapters={"quota_bytes": int(3.5 * SIZE), "max_rank": 512, "keep_runs": 3})
        async with serve_generator(room) as serving:
            await push_large(serving, "old", 1)
            await push_large(serving, "old", 2)
            await push_large(serving, "run-a", 1)
            await activate(serving.adapters, "run-a", 1)
            await push_large(serving, "run-b", 1)
            assert set(await list_adapters(serving.adapters)) == {("old", 2), ("run-a", 1), ("run-b", 1)}
            await push_large(serving, "run-b", 2)
            assert set(await list_adapters(serving.adapters)) == {("run-a", 1), ("run-b", 1), ("run-b", 2)}
            # What is active, and what pushes, is never given up for it.
            request = begin_request(fake_adapter(3, rank=512), "run-b", 3)
            refused = await refusal(serving.adapters.BeginPush(request, timeout=5))
            assert (refused.code, refused.reason) == (FULL, "STORAGE_FULL")
            assert "quota_bytes" in refused.message
            assert len(await list_adapters(serving.adapters)) == 3
            assert (await serving.generate()).policy_version == 1
            await serving.adapters.DeleteAdapter(delete_request("run-b", 1), timeout=5)
            await serving.service.adapters.settle()
            await push_large(serving, "run-b", 3)

    run(scenario())


def test_what_will_not_fit_all_the_same_costs_nothing() -> None:
    async def scenario() -> None:
        room = settings(adapters={"quota_bytes": int(2.2 * SIZE), "max_rank": 512})
        async with serve_generator(room) as serving:
            await push_fakes(serving.adapters, "old", [1])
            await push_large(serving, "run-a", 1)
            await activate(serving.adapters, "run-a", 1)
            await push_large(serving, "run-a", 2)
            request = begin_request(fake_adapter(3, rank=512), "run-a", 3)
            assert (await refusal(serving.adapters.BeginPush(request, timeout=5))).reason == "STORAGE_FULL"
            assert ("old", 1) in await list_adapters(serving.adapters)

    run(scenario())
