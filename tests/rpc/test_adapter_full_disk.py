"""Pushes onto a disk that is really full, out of inodes or read-only: a small tmpfs in a mount namespace of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.adapter_files import (
    activate,
    begin_request,
    chunks,
    fake_adapter,
    list_adapters,
    push,
)
from tests.rpc.generator_serving import Refusal, Serving, refusal, serve_generator, settings
from tests.rpc.serving import run

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
RANK = 512
SIZE = len(fake_adapter(1, rank=RANK).data)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def in_namespace(name: str, folder: Path) -> None:
    """Run a scenario of this module in a process whose mounts nobody else sees; skip where that is not allowed."""
    unshare = ["unshare", "--mount", "--propagation", "private"]
    try:
        probe = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare here to mount a small disk with")
    if probe.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {probe.stderr.decode().strip()}")
    command = [sys.executable, "-W", "error", "-m", __name__, name, str(folder)]
    done = subprocess.run([*unshare, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


async def old_serves_and_nothing_is_staged(serving: Serving) -> None:
    assert await list_adapters(serving.adapters) == {("run-a", 1): "ACTIVE"}
    assert (await serving.generate(seed=7)).policy_version == 1
    assert list((serving.service.storage.folder / "staging").iterdir()) == []


async def check(
    folder: Path, *, options: str, break_disk: Callable[[Serving], Awaitable[Refusal]], repair: Any
) -> None:
    """Push version 2 onto a broken disk, then onto the repaired one."""
    mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    small = settings(adapters={"folder": folder, "free_bytes": 0, "max_rank": RANK})
    async with serve_generator(small) as serving:
        first, second = fake_adapter(1, rank=RANK), fake_adapter(2, rank=RANK)
        await push(serving.adapters, begin_request(first, "run-a", 1), first)
        await activate(serving.adapters, "run-a", 1)
        refused = await break_disk(serving)
        assert (refused.code, refused.reason) == (FULL, "STORAGE_FULL"), refused
        assert str(folder) not in refused.message
        await old_serves_and_nothing_is_staged(serving)
        repair()
        await push(serving.adapters, begin_request(second, "run-a", 2), second)
        await activate(serving.adapters, "run-a", 2)
        assert (await serving.generate(seed=7)).policy_version == 2


def fill(path: Path) -> None:
    """Take all the space there is."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


async def full_during_the_upload(folder: Path) -> None:
    filler = folder / "filler"

    async def push_while_it_fills(serving: Serving) -> Refusal:
        adapter = fake_adapter(2, rank=RANK)
        begun = await serving.adapters.BeginPush(begin_request(adapter, "run-a", 2), timeout=5)
        half = chunks(begun, adapter.data[: SIZE // 2], size=4096)
        await serving.adapters.PushChunks(half, timeout=5)
        fill(filler)
        rest = chunks(begun, adapter.data, offset=SIZE // 2, size=4096)
        return await refusal(serving.adapters.PushChunks(rest, timeout=5))

    size = f"size={int(2.5 * SIZE)}"
    await check(folder, options=size, break_disk=push_while_it_fills, repair=filler.unlink)


async def no_inodes(folder: Path) -> None:
    made: list[Path] = []

    async def push_without_inodes(serving: Serving) -> Refusal:
        try:
            for number in range(1000):
                (folder / f"file-{number}").touch()
                made.append(folder / f"file-{number}")
        except OSError:
            pass
        made.pop().unlink()  # the staging folder finds a place, its files do not
        return await refusal(serving.adapters.BeginPush(begin_request(fake_adapter(2), "run-a", 2), timeout=5))

    def repair() -> None:
        for path in made:
            path.unlink()

    await check(folder, options="nr_inodes=40", break_disk=push_without_inodes, repair=repair)


async def read_only(folder: Path) -> None:
    async def push_read_only(serving: Serving) -> Refusal:
        mount("-o", "remount,ro", str(folder))
        return await refusal(serving.adapters.BeginPush(begin_request(fake_adapter(2), "run-a", 2), timeout=5))

    await check(
        folder,
        options="size=10m",
        break_disk=push_read_only,
        repair=lambda: mount("-o", "remount,rw", str(folder)),
    )


SCENARIOS = {scenario.__name__: scenario for scenario in (full_during_the_upload, no_inodes, read_only)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_push_onto_a_broken_disk_is_refused_and_passes_once_it_is_repaired(name: str, tmp_path: Path) -> None:
    in_namespace(name, tmp_path)


if __name__ == "__main__":
    run(SCENARIOS[sys.argv[1]](Path(sys.argv[2])))
