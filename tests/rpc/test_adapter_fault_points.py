"""The named points of the generator: each is come to, and a disk that is full there leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from tests.rpc.adapter_files import (
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
from tether_services.runtime.fault_points import PLAN_VARIABLE, POINTS, arm

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Arms this process with a plan of the generator's."""

    def write(entries: str) -> None:
        (tmp_path / "plan.json").write_text(json.dumps({"generator": {"1": entries}}))
        monkeypatch.setenv(PLAN_VARIABLE, str(tmp_path / "plan.json"))
        arm("generator", 1)

    monkeypatch.setattr("tether_services.runtime.fault_points._armed", None)  # as it was, in the end
    return write


def test_a_push_an_activation_and_a_deletion_come_to_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for module in ("uploads", "pushes", "proof", "pointer", "adapters"):
        monkeypatch.setattr(f"tether_services.generator.{module}.reach", seen.append)

    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            await activate(serving.adapters, "run-a", 0)
            await serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5)
            await serving.service.adapters.settle()

    run(scenario())
    assert list(dict.fromkeys(seen)) == list(POINTS["generator"])


async def push_two(serving: Serving) -> object:
    adapter = fake_adapter(2)
    return await push(serving.adapters, begin_request(adapter, "run-a", 2), adapter)


async def switch(serving: Serving) -> object:
    return await activate(serving.adapters, "run-a", 0)


@pytest.mark.parametrize(
    ("point", "call"),
    [
        ("upload.chunk", push_two),
        ("push.verified", push_two),
        ("push.stored", push_two),
        ("push.proven", push_two),
        ("activate.persisted", switch),
    ],
)
def test_a_disk_that_is_full_at_a_point_changes_nothing_and_the_next_try_passes(
    tmp_path: Path, plan: Callable[[str], None], point: str, call: Callable[[Serving], Awaitable[object]]
) -> None:
    async def scenario() -> None:
        async with serve_generator(settings(adapters={"folder": tmp_path / "store"})) as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            files = serving.stored_files()
            plan(f"{point}@1=enospc")
            refused = await refusal(call(serving))
            assert (refused.code, refused.reason) == (FULL, "STORAGE_FULL")
            assert await list_adapters(serving.adapters) == {("run-a", 1): "ACTIVE"}
            assert serving.stored_files() == files
            assert json.loads((tmp_path / "store/active.json").read_text())["policy_version"] == 1
            assert (await serving.generate()).policy_version == 1
            await call(serving)

    run(scenario())
