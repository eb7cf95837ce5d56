"""A generator that is started again on its adapter folder: what was served is proven and served, or nothing is."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.adapter_files import (
    activate,
    begin_request,
    chunk,
    delete_request,
    fake_adapter,
    fake_probe,
    list_adapters,
    push,
    push_fakes,
    rollback_request,
)
from tests.rpc.generator_serving import Serving, generate_request, refusal, serve_generator, settings
from tests.rpc.serving import run
from tether.errors import InvalidArgumentError
from tether.v1 import adapter_pb2
from tether_services.generator import pointer as pointer_module
from tether_services.generator.engines.fake import FakeEngine
from tether_services.generator.verification import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME
from tether_services.runtime.durable import write_text

FULL, UNAVAILABLE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE


@asynccontextmanager
async def serve_on(folder: Path, **adapters: Any) -> AsyncIterator[Serving]:
    async with serve_generator(settings(adapters={"folder": folder, **adapters})) as serving:
        yield serving


async def active(serving: Serving) -> tuple[str, int, str]:
    response = await serving.adapters.GetActiveAdapter(adapter_pb2.GetActiveAdapterRequest(), timeout=5)
    return response.run_id, response.policy_version, response.adapter.sha256


def restored(serving: Serving) -> tuple[float, float]:
    value = serving.served.value
    return tuple(value("tether_adapter_restore_total", result=result) for result in ("ok", "refused"))  # type: ignore[return-value]


async def store_three(folder: Path) -> None:
    """Versions 1 to 3 of a run, 2 active, and a request that has begun to push 4."""
    async with serve_on(folder) as serving:
        await push_fakes(serving.adapters, "run-a", [1, 2, 3])
        await activate(serving.adapters, "run-a", 2)
        adapter = fake_adapter(4)
        begun = await serving.adapters.BeginPush(begin_request(adapter, "run-a", 4), timeout=5)

        async def half() -> Any:
            yield chunk(begun, adapter.data[:100])

        await serving.adapters.PushChunks(half(), timeout=5)


def stored(folder: Path, version: int, sha256: str = "") -> Path:
    (found,) = (folder / "versions/run-a").glob(f"{version}-{sha256[:12]}*")
    return found


def test_versions_and_the_active_one_come_back_proven(tmp_path: Path) -> None:
    async def scenario() -> None:
        await store_three(tmp_path)
        async with serve_on(tmp_path, keep_versions=4) as serving:
            assert restored(serving) == (3, 0)
            assert await active(serving) == ("run-a", 2, fake_adapter(2).sha256)
            assert await list_adapters(serving.adapters) == {
                ("run-a", 1): "LOADED",
                ("run-a", 2): "ACTIVE",
                ("run-a", 3): "LOADED",
            }
            assert len(serving.stored_files()) == 6, "the unfinished upload is gone"
            assert serving.served.value("tether_policy_version", role="generator") == 2
            for version in (0, 1, 2, 3):
                assert (await serving.generate(seed=7, policy_version=version)).policy_version == version
            assert (await serving.generate(seed=7)).adapter_sha256 == fake_adapter(2).sha256
            # The same push is a repeat, other content for the number is not.
            same = await serving.adapters.BeginPush(begin_request(fake_adapter(3), "run-a", 3), timeout=5)
            assert same.committed_offset == len(fake_adapter(3).data)
            other = await refusal(serving.adapters.BeginPush(begin_request(fake_adapter(9), "run-a", 3), timeout=5))
            assert other.reason == "VERSION_EXISTS"
            await push_fakes(serving.adapters, "run-a", [4])
            await serving.adapters.RollbackAdapter(rollback_request("run-a", 2), timeout=5)
        async with serve_on(tmp_path) as serving:
            assert await active(serving) == ("run-a", 1, fake_adapter(1).sha256)
            assert (await list_adapters(serving.adapters))[("run-a", 4)] == "LOADED"

    run(scenario())


def test_the_order_and_time_of_commits_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        request = adapter_pb2.ListAdaptersRequest()
        async with serve_on(tmp_path) as serving:
            await push_fakes(serving.adapters, "run-a", [3, 1, 2])
            before = await serving.adapters.ListAdapters(request, timeout=5)
        async with serve_on(tmp_path) as serving:
            assert await serving.adapters.ListAdapters(request, timeout=5) == before
        async with serve_on(tmp_path, keep_versions=1) as serving:
            await serving.service.adapters.settle()
            assert set(await list_adapters(serving.adapters)) == {("run-a", 2)}

    run(scenario())


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME])
def test_every_flipped_bit_on_the_disk_is_noticed(tmp_path: Path, name: str) -> None:
    """34 flips in each of three files."""

    async def scenario() -> None:
        await store_three(tmp_path)
        good = (stored(tmp_path, 2) / name).read_bytes()
        for number in range(34):
            path = stored(tmp_path, 2) / name
            flip(path, 1 + number * (8 * len(good) // 34))
            async with serve_on(tmp_path) as serving:
                assert restored(serving) == (2, 1), number
                assert set(await list_adapters(serving.adapters)) == {("run-a", 1), ("run-a", 3)}
                (aside,) = (tmp_path / "damaged").iterdir()
                assert aside.name == f"run-a-{path.parent.name}"
                refused = await refusal(serving.generator.Generate(generate_request(), timeout=5))
                assert (refused.code, refused.reason) == (UNAVAILABLE, "ADAPTER_MISSING")
                aside.rename(path.parent)
            path.write_bytes(good)

    run(scenario(), timeout_seconds=120)


def test_an_active_version_that_did_not_come_back_is_never_replaced_by_the_base(tmp_path: Path) -> None:
    async def scenario() -> None:
        await store_three(tmp_path)
        (stored(tmp_path, 2) / WEIGHTS_NAME).unlink()
        async with serve_on(tmp_path) as serving:
            assert await active(serving) == ("run-a", 2, "")
            unpinned = await refusal(serving.generator.Generate(generate_request(), timeout=5))
            assert (unpinned.code, unpinned.reason) == (UNAVAILABLE, "ADAPTER_MISSING")
            pinned = await refusal(serving.generator.Generate(generate_request(policy_version=2), timeout=5))
            assert pinned.reason == "VERSION_NOT_LOADED"
            assert (await serving.generate(policy_version=3)).policy_version == 3
            # Pushed again, it serves at once: it was active all the time.
            await push_fakes(serving.adapters, "run-a", [2])
            assert (await serving.generate()).adapter_sha256 == fake_adapter(2).sha256

    run(scenario())


def test_a_version_that_no_longer_computes_what_it_did_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        await store_three(tmp_path)
        logprob = "tether_services.generator.engines.fake.fake_logprob"
        monkeypatch.setattr(logprob, lambda ids, position, version: -1.0 - version / 2)
        async with serve_on(tmp_path) as serving:
            assert restored(serving) == (0, 3)
            assert await list_adapters(serving.adapters) == {}
            assert serving.service.engine._loaded == set()  # type: ignore[attr-defined]

    run(scenario())


@pytest.mark.parametrize("change", ["base", "rank", "load"])
def test_versions_that_a_wrong_setting_refuses_come_back_with_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    async def scenario() -> None:
        await store_three(tmp_path)
        with monkeypatch.context() as patch:
            if change == "base":
                patch.setattr("tether_services.generator.engines.fake.FAKE_BASE_SHA256", "c" * 64)
            if change == "load":
                patch.setattr(FakeEngine, "load_adapter", refuse_to_load)
            for _ in range(2):
                async with serve_on(tmp_path, **({"max_rank": 1} if change == "rank" else {})) as serving:
                    assert restored(serving) == (0, 3)
                    assert await list_adapters(serving.adapters) == {}
        assert not (tmp_path / "damaged").exists()
        async with serve_on(tmp_path) as serving:
            assert restored(serving) == (3, 0)
            assert await active(serving) == ("run-a", 2, fake_adapter(2).sha256)

    run(scenario())


async def refuse_to_load(*_: Any) -> None:
    raise RuntimeError("no memory left")


@pytest.mark.parametrize("passes", [True, False])
def test_a_refused_version_that_was_pushed_again_stands_back_for_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    """Also where its successor has the same number and other content; if that fails, the older one is what there is."""

    async def scenario() -> None:
        async with serve_on(tmp_path) as serving:
            await push_fakes(serving.adapters, "run-a", [1])
        with monkeypatch.context() as patch:
            patch.setattr(FakeEngine, "load_adapter", refuse_to_load)
            async with serve_on(tmp_path) as serving:
                assert restored(serving) == (0, 1)
                patch.undo()
                other = fake_adapter(5)
                await push(serving.adapters, begin_request(other, "run-a", 1, probes=[fake_probe(1)]), other)
        old, new = stored(tmp_path, 1, fake_adapter(1).sha256), stored(tmp_path, 1, other.sha256)
        if not passes:
            flip(new / WEIGHTS_NAME, 1)
        async with serve_on(tmp_path) as serving:
            assert restored(serving) == ((1, 0) if passes else (1, 1))
            (version,) = serving.service.adapters.all()
            assert version.declaration.weights_sha256 == (other if passes else fake_adapter(1)).sha256
        assert old.exists() is not passes

    run(scenario())


def test_a_damaged_version_that_cannot_be_moved_does_not_keep_the_others_from_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        await store_three(tmp_path)
        (stored(tmp_path, 3) / WEIGHTS_NAME).unlink()
        (tmp_path / "damaged").write_text("in the way")
        async with serve_on(tmp_path) as serving:
            assert restored(serving) == (2, 1)
            assert set(await list_adapters(serving.adapters)) == {("run-a", 1), ("run-a", 2)}

    run(scenario())


def test_versions_that_were_deleted_do_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serve_on(tmp_path) as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])

            async def never(*_: Any) -> None:
                raise RuntimeError("the engine does not let go")

            monkeypatch.setattr(serving.service.engine, "unload_adapter", never)
            monkeypatch.setattr("tether_services.generator.adapters.UNLOAD_PAUSES", (0.01,))
            await serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5)
            await serving.service.adapters.settle()
            assert len(serving.stored_files()) == 4
        async with serve_on(tmp_path) as serving:
            assert set(await list_adapters(serving.adapters)) == {("run-a", 2)}
            assert len(serving.stored_files()) == 2

    run(scenario())


def test_a_version_that_was_stored_and_not_yet_proven_is_proven_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between storing and proving; what was false then is false again."""

    async def killed(*_: Any) -> None:
        await asyncio.sleep(60)

    async def scenario() -> None:
        for version, probe in ((1, 1), (2, 7)):
            async with serve_on(tmp_path) as serving:
                monkeypatch.setattr(serving.service.engine, "compute_logprobs", killed)
                monkeypatch.setattr(serving.service.storage, "remove", lambda folder: None)
                adapter = fake_adapter(version)
                request = begin_request(adapter, "run-a", version, probes=[fake_probe(probe)])
                pushing = asyncio.ensure_future(push(serving.adapters, request, adapter))
                while not list((tmp_path / "versions").glob(f"*/{version}-*")):
                    await asyncio.sleep(0.01)
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                await pushing
            monkeypatch.undo()
        async with serve_on(tmp_path) as serving:
            assert await list_adapters(serving.adapters) == {("run-a", 1): "LOADED"}
            assert restored(serving) == (1, 1)

    run(scenario())


@pytest.mark.parametrize("content", ["", "[]", '{"run_id": "run-a"}', '{"run_id": 1, "policy_version": 2}'])
def test_a_damaged_pointer_is_not_taken_for_none(tmp_path: Path, content: str) -> None:
    async def scenario() -> None:
        await store_three(tmp_path)
        (tmp_path / "active.json").write_text(content)
        with pytest.raises(InvalidArgumentError, match=r"active\.json is damaged"):
            async with serve_on(tmp_path):
                raise AssertionError("it must not start")
        (tmp_path / "active.json").unlink()
        async with serve_on(tmp_path) as serving:
            assert await active(serving) == ("", 0, "")
            assert restored(serving) == (3, 0)

    run(scenario())


@pytest.mark.parametrize("act", ["activate", "rollback"])
def test_a_pointer_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def switch(serving: Serving) -> object:
        if act == "activate":
            return await activate(serving.adapters, "run-a", 3)
        return await serving.adapters.RollbackAdapter(rollback_request("run-a", 2), timeout=5)

    async def scenario() -> None:
        await store_three(tmp_path)
        async with serve_on(tmp_path) as serving:
            with monkeypatch.context() as patch:
                patch.setattr(pointer_module, "write_text", full)
                refused = await refusal(switch(serving))
            assert (refused.code, refused.reason) == (FULL, "STORAGE_FULL")
            assert (await active(serving))[1] == 2
            assert json.loads((tmp_path / "active.json").read_text())["policy_version"] == 2
            await switch(serving)
            now = 3 if act == "activate" else 1
            assert (await active(serving))[1] == now
            assert json.loads((tmp_path / "active.json").read_text()) == {"run_id": "run-a", "policy_version": now}

    run(scenario())


def newer_writer(serving: Serving) -> Callable[[], None]:
    """A newer writer of the run calls; runs in the thread that writes the pointer."""
    loop = asyncio.get_running_loop()

    def call() -> None:
        begin = begin_request(fake_adapter(8), "run-a", 8, epoch=9)

        async def announce() -> None:
            await serving.adapters.BeginPush(begin, timeout=5)

        asyncio.run_coroutine_threadsafe(announce(), loop).result(10)

    return call


def test_a_switch_that_a_newer_writer_overtakes_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        await store_three(tmp_path)
        async with serve_on(tmp_path) as serving:
            overtake, written = newer_writer(serving), []

            def slow(path: Path, text: str) -> None:
                written.append(json.loads(text)["policy_version"])
                if len(written) == 1:
                    overtake()
                write_text(path, text)

            monkeypatch.setattr(pointer_module, "write_text", slow)
            stale = await refusal(activate(serving.adapters, "run-a", 3))
            assert stale.reason == "STALE_EPOCH"
            assert written == [3, 2]
            assert (await active(serving))[1] == 2
            assert json.loads((tmp_path / "active.json").read_text())["policy_version"] == 2

    run(scenario())
