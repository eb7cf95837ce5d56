"""Every method of the contract is called with a deadline, whatever the caller says or leaves out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio._channel
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from tether import (
    AdapterClient,
    AdapterProbe,
    AdapterPush,
    GeneratorClient,
    LogprobItem,
    OrchestratorClient,
    ReferenceClient,
    RewardClient,
    RewardModelClient,
    ScoreItem,
)
from tether.channel import ServiceClient, open_channel
from tether.errors import TetherError
from tether.health import is_serving
from tether.v1 import adapter_pb2, generator_pb2, orchestrator_pb2, reference_pb2, reward_model_pb2, reward_pb2

CONTRACT = (generator_pb2, adapter_pb2, reward_pb2, reward_model_pb2, reference_pb2, orchestrator_pb2)
TIMEOUT_SECONDS = 7.0
PUSH = AdapterPush(
    run_id="run-a",
    policy_version=1,
    base_model_sha256="ab" * 32,
    rank=8,
    target_modules=["q_proj"],
    probes=[AdapterProbe([1, 2], [-0.5], [-0.25])],
    differs_from_base=True,
)


def methods() -> Iterator[MethodDescriptor]:
    for module in CONTRACT:
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from service.methods


async def watch(client: OrchestratorClient) -> None:
    async for _ in client.watch_run("run-a", stream_seconds=TIMEOUT_SECONDS):
        pass


def calls(folder: Path) -> dict[tuple[type[ServiceClient], str], Callable[[Any], Awaitable[object]]]:
    """Return how each method is called, by the client and the names of the methods that the call makes."""
    items = [ScoreItem("a", "b")]
    return {
        (GeneratorClient, "Generate"): lambda c: c.generate((1, 2)),
        (GeneratorClient, "GetGenerator"): lambda c: c.get_generator(),
        (AdapterClient, "BeginPush PushChunks CommitPush"): lambda c: c.push(folder, PUSH, epoch=1),
        (AdapterClient, "ActivateAdapter"): lambda c: c.activate(
            "run-a", 1, expected_run_id="", expected_policy_version=0, epoch=1
        ),
        (AdapterClient, "RollbackAdapter"): lambda c: c.rollback("run-a", expected_policy_version=1, epoch=1),
        (AdapterClient, "ListAdapters"): lambda c: c.list_adapters(),
        (AdapterClient, "GetActiveAdapter"): lambda c: c.get_active_adapter(),
        (AdapterClient, "DeleteAdapter"): lambda c: c.delete("run-a", 1, epoch=1),
        (RewardClient, "Score"): lambda c: c.score(items),
        (RewardClient, "Compare"): lambda c: c.compare("a", ["b", "c"]),
        (RewardClient, "ListRewardModels"): lambda c: c.list_reward_models(),
        (RewardModelClient, "LoadRewardModel"): lambda c: c.load("a", "1"),
        (RewardModelClient, "UnloadRewardModel"): lambda c: c.unload("a", "1"),
        (RewardModelClient, "SetDefaultRewardModel"): lambda c: c.set_default("a", "2", expected_current="a@1"),
        (RewardModelClient, "SetShadow"): lambda c: c.set_shadow("a", "2"),
        (RewardModelClient, "ClearShadow"): lambda c: c.clear_shadow(),
        (RewardModelClient, "ListLoadedRewardModels"): lambda c: c.list_loaded(),
        (ReferenceClient, "ComputeLogprobs"): lambda c: c.compute_logprobs([LogprobItem((1,), (2,))], temperature=1.0),
        (ReferenceClient, "GetReference"): lambda c: c.get_reference(),
        (OrchestratorClient, "StartRun"): lambda c: c.start_run("run-a", ""),
        (OrchestratorClient, "GetRun"): lambda c: c.get_run("run-a"),
        (OrchestratorClient, "ListRuns"): lambda c: c.list_runs(),
        (OrchestratorClient, "CancelRun"): lambda c: c.cancel_run("run-a"),
        (OrchestratorClient, "ResumeRun"): lambda c: c.resume_run("run-a"),
        (OrchestratorClient, "RollbackRun"): lambda c: c.roll_back_run("run-a"),
        (OrchestratorClient, "ListSteps"): lambda c: c.list_steps("run-a"),
        (OrchestratorClient, "WatchRun"): watch,
    }


class Recording(grpc.GenericRpcHandler):
    """Answers everything with an empty message and keeps the time that each call had left; None: no deadline."""

    def __init__(self) -> None:
        self.remaining: dict[str, list[float | None]] = {}
        self._methods = {f"/{m.containing_service.full_name}/{m.name}": m for m in methods()}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        path: str = details.method
        method = self._methods.get(path)
        if method is None:
            return grpc.unary_unary_rpc_method_handler(self._note(path.rpartition("/")[2], b"\x08\x01"))
        request = GetMessageClass(method.input_type)
        if method.name == "PushChunks":
            return grpc.stream_unary_rpc_method_handler(self._take_all(method.name), request.FromString)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._end(method.name))
        return grpc.unary_unary_rpc_method_handler(self._note(method.name, b""))

    def record(self, name: str, context: Any) -> None:
        self.remaining.setdefault(name, []).append(context.time_remaining())

    def _note(self, name: str, answer: bytes) -> Any:
        async def handle(request: bytes, context: Any) -> bytes:
            self.record(name, context)
            return answer

        return handle

    def _take_all(self, name: str) -> Any:
        async def handle(chunks: AsyncIterator[adapter_pb2.PushChunksRequest], context: Any) -> bytes:
            self.record(name, context)
            size = sum([len(chunk.data) async for chunk in chunks])
            return adapter_pb2.PushChunksResponse(committed_offset=size).SerializeToString()

        return handle

    def _end(self, name: str) -> Any:
        async def handle(request: bytes, context: Any) -> AsyncIterator[bytes]:
            self.record(name, context)
            return
            yield b""

        return handle


async def record_all(folder: Path) -> dict[str, list[float | None]]:
    """Make every call once and return the time that each had left at the server, by method."""
    recording, server = Recording(), grpc.aio.server()
    server.add_generic_rpc_handlers((recording,))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        for (kind, _), call in calls(folder).items():
            async with kind(target, timeout_seconds=TIMEOUT_SECONDS) as client:
                with suppress(TetherError, LookupError, ValueError, TypeError):  # an empty answer is no good one
                    await call(client)
        async with open_channel(target) as channel:
            assert await is_serving(channel)
    finally:
        await server.stop(None)
    return recording.remaining


def write_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 1000)


def test_the_table_has_every_method_of_the_contract(tmp_path: Path) -> None:
    named = [name for _, names in calls(tmp_path) for name in names.split()]
    assert sorted(named) == sorted(method.name for method in methods())


def test_every_method_and_the_health_check_are_called_with_a_deadline(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    remaining = asyncio.run(record_all(tmp_path))
    assert sorted(remaining) == sorted([*(method.name for method in methods()), "Check"])
    for name, times in remaining.items():
        for seconds in times:
            assert seconds is not None, f"{name} has no deadline"
            assert 0 < seconds < TIMEOUT_SECONDS + 1, name  # clocks round up


def test_a_call_without_a_deadline_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    write_adapter(tmp_path)
    monkeypatch.setattr(grpc.aio._channel, "_timeout_to_deadline", lambda timeout: None)
    remaining = asyncio.run(record_all(tmp_path))
    endless = {name for name, times in remaining.items() if any(s is None or s > TIMEOUT_SECONDS + 1 for s in times)}
    assert {"StartRun", "ActivateAdapter", "PushChunks"} <= endless
