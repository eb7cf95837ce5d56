"""`tether adapter list | push | activate | rollback` on a real generator, with and without an orchestrator to ask."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.rpc.adapter_files import activate, fake_adapter, fake_probe, list_adapters, push_fakes
from tests.rpc.generator_serving import Serving, serve_generator
from tests.rpc.serving import run
from tether.adapter import ActiveAdapter, AdapterProbe, AdapterPush
from tether.errors import AbortedError, FailedPreconditionError, NotFoundError
from tether.v1 import adapter_pb2, orchestrator_pb2
from tether_services.cli.adapter_lifecycle import check_owner, describe_active
from tether_services.cli.connection import Endpoint
from tether_services.cli.main import build_parser
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256

NOBODY = "127.0.0.1:1"


@asynccontextmanager
async def orchestrating(**states: str) -> AsyncIterator[str]:
    """Serve an orchestrator that knows some runs and their states, and yield its address."""

    async def get_run(request: orchestrator_pb2.GetRunRequest, context: Any) -> orchestrator_pb2.GetRunResponse:
        if request.run_id not in states:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such run")
        run = orchestrator_pb2.Run(run_id=request.run_id, state=f"RUN_STATE_{states[request.run_id]}")
        return orchestrator_pb2.GetRunResponse(run=run)

    handler = grpc.unary_unary_rpc_method_handler(
        get_run, orchestrator_pb2.GetRunRequest.FromString, orchestrator_pb2.GetRunResponse.SerializeToString
    )
    server = grpc.aio.server()
    service = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"GetRun": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def command(serving: Serving, *words: str, orchestrator: str = NOBODY) -> int:
    """Carry out a command in a thread, as it has an event loop of its own."""
    options = ["--address", serving.admin_target]
    options += ["--orchestrator", orchestrator] if words[0] != "list" else []
    known: argparse.Namespace = build_parser().parse_args(["adapter", *words, *options])
    status: int = await asyncio.to_thread(known.run, known)
    return status


async def active(serving: Serving) -> tuple[str, int]:
    found = await serving.adapters.GetActiveAdapter(adapter_pb2.GetActiveAdapterRequest(), timeout=5)
    return found.run_id, found.policy_version


def with_two_versions(scenario: Callable[[Serving], Awaitable[None]], run_id: str = "pushed") -> None:
    """Run a scenario on a generator that has two versions of a run, the second one active."""

    async def main() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, run_id, [1, 2])
            await activate(serving.adapters, run_id, 2)
            await scenario(serving)

    run(main())


def test_list_shows_what_is_stored_and_marks_what_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(serving: Serving) -> None:
        assert await command(serving, "list") == 0

    with_two_versions(scenario)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "active: version 2 of run pushed"
    assert lines[1].split() == ["run", "version", "state", "rank", "bytes", "requests", "sha256", "stored", "(UTC)"]
    size = str(len(fake_adapter(1).data))
    assert lines[2].split()[:7] == ["pushed", "1", "loaded", "2", size, "0", fake_adapter(1).sha256[:12]]
    assert len(lines) == 4
    assert lines[3].split()[:8] == ["*", "pushed", "2", "active", "2", size, "0", fake_adapter(2).sha256[:12]]


def test_list_as_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(serving: Serving) -> None:
        assert await command(serving, "list", "--json") == 0

    with_two_versions(scenario)
    shown = json.loads(capsys.readouterr().out)
    assert shown["active"] == {"run_id": "pushed", "policy_version": 2}
    assert [(a["policy_version"], a["state"], a["sha256"]) for a in shown["adapters"]] == [
        (1, "loaded", fake_adapter(1).sha256),
        (2, "active", fake_adapter(2).sha256),
    ]


def test_a_generator_without_adapters_lists_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with serve_generator() as serving:
            assert await command(serving, "list") == 0

    run(main())
    assert capsys.readouterr().out == "active: the base model\n"


def test_activate_switches_and_says_what_was_served_before(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(serving: Serving) -> None:
        assert await command(serving, "activate", "pushed", "1") == 0
        assert await active(serving) == ("pushed", 1)
        assert (await serving.generate()).policy_version == 1
        with pytest.raises(NotFoundError, match="Version 7"):
            await command(serving, "activate", "pushed", "7")
        assert await command(serving, "activate", "pushed", "0") == 0
        assert await active(serving) == ("pushed", 0)

    with_two_versions(scenario)
    assert capsys.readouterr().err.splitlines() == [
        "active; version 2 of run pushed was served before",
        "active; version 1 of run pushed was served before",
    ]


def test_rollback_goes_one_version_down_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(serving: Serving) -> None:
        for version in (1, 0):
            assert await command(serving, "rollback", "pushed") == 0
            assert await active(serving) == ("pushed", version)
        with pytest.raises(FailedPreconditionError) as caught:
            await command(serving, "rollback", "pushed")
        assert caught.value.reason == "NOTHING_BELOW"
        with pytest.raises(FailedPreconditionError, match="version 0 of run pushed, the base model is") as caught:
            await command(serving, "rollback", "demo")
        assert caught.value.reason == "RUN_NOT_ACTIVE"

    with_two_versions(scenario)
    assert capsys.readouterr().out.splitlines() == ["1", "0"]


@pytest.mark.parametrize("words", [("activate", "demo", "1"), ("activate", "pushed", "0"), ("rollback", "demo")])
def test_under_a_run_that_is_being_trained_nothing_is_switched_unless_told_to(words: tuple[str, ...]) -> None:
    async def scenario(serving: Serving) -> None:
        async with orchestrating(demo="RUNNING") as orchestrator:
            with pytest.raises(FailedPreconditionError, match="is being trained") as caught:
                await command(serving, *words, orchestrator=orchestrator)
            assert caught.value.reason == "IN_TRAINING"
            assert await active(serving) == ("demo", 2)
            assert await command(serving, *words, "--take", orchestrator=orchestrator) == 0
            assert await active(serving) != ("demo", 2)

    with_two_versions(scenario, "demo")


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of an adapter that the fake engine takes as any version, without a base to compute its proof with."""
    made = fake_adapter(9)
    (tmp_path / CONFIG_NAME).write_bytes(made.config)
    (tmp_path / WEIGHTS_NAME).write_bytes(made.weights)

    def declare(known: argparse.Namespace, config: object, version: int) -> AdapterPush:
        proof = fake_probe(version)
        probe = AdapterProbe(proof.token_ids, list(proof.logprobs))
        return AdapterPush(known.run_id, version, FAKE_BASE_SHA256, made.rank, made.targets, [probe], True)

    monkeypatch.setattr("tether_services.cli.adapter_commands._declare", declare)
    return str(tmp_path)


def test_under_a_run_that_is_being_trained_nothing_is_pushed_either(adapter: str) -> None:
    async def scenario(serving: Serving) -> None:
        async with orchestrating(demo="PENDING") as orchestrator:
            with pytest.raises(FailedPreconditionError, match="fails then") as caught:
                await command(serving, "push", adapter, orchestrator=orchestrator)
            assert caught.value.reason == "IN_TRAINING"
            assert set(await list_adapters(serving.adapters)) == {("demo", 1), ("demo", 2)}
            assert await command(serving, "push", adapter, "--no-activate", orchestrator=orchestrator) == 0
            assert await active(serving) == ("demo", 2)

    with_two_versions(scenario, "demo")


@pytest.mark.parametrize("options", [(), ("--no-activate",)])
@pytest.mark.parametrize("owner", ["demo", "pushed"])
def test_the_next_version_of_a_run_that_is_being_trained_is_left_to_it(
    adapter: str, owner: str, options: tuple[str, ...]
) -> None:
    async def scenario(serving: Serving) -> None:
        words = ("push", adapter, "--run-id", "demo", *options)
        async with orchestrating(demo="RUNNING") as orchestrator:
            with pytest.raises(FailedPreconditionError, match=r"demo is being trained.*--take") as caught:
                await command(serving, *words, orchestrator=orchestrator)
            assert caught.value.reason == "IN_TRAINING"
            assert set(await list_adapters(serving.adapters)) == {(owner, 1), (owner, 2)}
            assert await command(serving, *words, "--take", orchestrator=orchestrator) == 0

    with_two_versions(scenario, owner)


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "CANCELLED", None])
def test_a_run_that_has_ended_or_is_not_known_can_be_pushed_to(
    adapter: str, state: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(serving: Serving) -> None:
        async with orchestrating(**({"demo": state} if state else {})) as orchestrator:
            assert await command(serving, "push", adapter, "--run-id", "demo", orchestrator=orchestrator) == 0
        assert await active(serving) == ("demo", 3)

    with_two_versions(scenario, "demo")
    assert "warning" not in capsys.readouterr().err


def test_without_an_orchestrator_to_ask_a_run_is_pushed_to_with_a_warning(
    adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(serving: Serving) -> None:
        assert await command(serving, "push", adapter, "--run-id", "demo") == 0
        assert await active(serving) == ("demo", 3)
        assert await command(serving, "push", adapter, "--no-activate") == 0

    with_two_versions(scenario, "demo")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "whether run demo is being trained" in warnings[0] and "--orchestrator" in warnings[0]


def test_a_push_beside_a_later_attempt_of_the_run_needs_its_epoch(adapter: str) -> None:
    async def scenario(serving: Serving) -> None:
        await serving.service._parts.fence.admit("demo", 3)
        words = ("push", adapter, "--run-id", "demo", "--take")
        with pytest.raises(AbortedError, match=r"older than 3.*--epoch") as caught:
            await command(serving, *words, "--no-activate")
        assert caught.value.reason == "STALE_EPOCH"
        assert await command(serving, *words, "--epoch", "3") == 0
        assert await active(serving) == ("demo", 3)

    with_two_versions(scenario, "demo")


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "CANCELLED", None])
def test_a_run_that_has_ended_or_is_not_known_is_switched(state: str | None) -> None:
    async def scenario(serving: Serving) -> None:
        async with orchestrating(**({"demo": state} if state else {})) as orchestrator:
            assert await command(serving, "activate", "demo", "1", orchestrator=orchestrator) == 0
            assert await active(serving) == ("demo", 1)

    with_two_versions(scenario, "demo")


def test_an_orchestrator_that_does_not_know_the_owner_says_nothing_about_it() -> None:
    async def scenario(serving: Serving) -> None:
        await push_fakes(serving.adapters, "pushed", [1])
        async with orchestrating(other="RUNNING") as orchestrator:
            with pytest.raises(FailedPreconditionError, match=r"does not know it.*--orchestrator") as caught:
                await command(serving, "activate", "pushed", "1", orchestrator=orchestrator)
            assert caught.value.reason == "OWNER_UNKNOWN"
            assert await active(serving) == ("demo", 2)
            assert await command(serving, "activate", "pushed", "1", "--take", orchestrator=orchestrator) == 0

    with_two_versions(scenario, "demo")


def test_without_an_orchestrator_to_ask_no_other_run_takes_the_place_unless_told_to() -> None:
    async def scenario(serving: Serving) -> None:
        await push_fakes(serving.adapters, "pushed", [1])
        with pytest.raises(FailedPreconditionError, match="--orchestrator") as caught:
            await command(serving, "activate", "pushed", "1")
        assert caught.value.reason == "OWNER_UNKNOWN"
        assert await active(serving) == ("demo", 2)
        assert await command(serving, "activate", "pushed", "1", "--take") == 0

    with_two_versions(scenario, "demo")


@pytest.mark.parametrize("words", [("activate", "demo", "1"), ("rollback", "demo")])
def test_without_an_orchestrator_to_ask_the_run_itself_is_switched_with_a_warning(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(serving: Serving) -> None:
        assert await command(serving, *words) == 0
        assert await active(serving) == ("demo", 1)

    with_two_versions(scenario, "demo")
    warning, switched = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: run demo owns the generator") and "takes its own version back" in warning
    assert switched == "active; version 2 of run demo was served before"


def test_beside_a_later_attempt_of_the_run_its_epoch_is_needed() -> None:
    async def scenario(serving: Serving) -> None:
        await activate(serving.adapters, "demo", 2, epoch=3)
        await serving.service._parts.fence.admit("demo", 3)
        for words in (("activate", "demo", "1"), ("rollback", "demo")):
            with pytest.raises(AbortedError, match=r"older than 3.*--epoch") as caught:
                await command(serving, *words, "--take")
            assert caught.value.reason == "STALE_EPOCH"
        assert await command(serving, "rollback", "demo", "--take", "--epoch", "3") == 0
        assert await active(serving) == ("demo", 1)

    with_two_versions(scenario, "demo")


def test_adapters_that_nobody_trains_are_switched_without_asking() -> None:
    run(check_owner(ActiveAdapter("pushed", 1, None), "demo", take=False, orchestrator=Endpoint(NOBODY, {})))
    run(check_owner(ActiveAdapter("", 0, None), "demo", take=False, orchestrator=Endpoint(NOBODY, {})))


def test_what_is_missing_since_a_restart_is_named_so() -> None:
    assert describe_active(ActiveAdapter("demo", 4, None)) == "version 4 of run demo, which is missing since a restart"
