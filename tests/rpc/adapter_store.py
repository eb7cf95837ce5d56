"""A scripted adapter service that loses streams, answers and uploads as a test asks it to."""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from tests.rpc.scripted_server import serving
from tether import (
    AbortedError,
    AdapterClient,
    AdapterProbe,
    AdapterPush,
    FailedPreconditionError,
    NotFoundError,
    PushResult,
    UnavailableError,
)
from tether.v1 import adapter_pb2, adapter_pb2_grpc

MEBIBYTE = 1024 * 1024
PUSH = AdapterPush(
    run_id="run-a",
    policy_version=3,
    base_model_sha256="ab" * 32,
    rank=8,
    target_modules=["q_proj", "v_proj"],
    probes=[AdapterProbe([1, 2, 3], [-0.5, -1.5], [-0.25, -1.0])],
    differs_from_base=True,
)


class Store(adapter_pb2_grpc.AdapterServiceServicer):
    """Keeps one upload in memory; streams break as scripted."""

    def __init__(self, *, breaks_after_bytes: tuple[int, ...] = (), max_chunk_bytes: int = MEBIBYTE) -> None:
        self.breaks = list(breaks_after_bytes)
        self.max_chunk_bytes = max_chunk_bytes
        self.begins: list[adapter_pb2.BeginPushRequest] = []
        self.commits: list[adapter_pb2.CommitPushRequest] = []
        self.activations: list[adapter_pb2.ActivateAdapterRequest] = []
        self.rollbacks: list[adapter_pb2.RollbackAdapterRequest] = []
        self.deletions: list[adapter_pb2.DeleteAdapterRequest] = []
        self.chunk_sizes: list[int] = []
        self.stream_starts: list[int] = []
        self.data = bytearray()
        self.uploads = 1
        self.commit_failures: list[Exception] = []
        self.fail_begin: Exception | None = None
        self.chunk_failures: list[Exception | None] = []
        """What becomes of each chunk: None is taken."""
        self.stalls: list[str] = []
        """Calls that take longer than any deadline here, by name."""
        self.unavailable = 0
        """Activations, rollbacks and deletions that get no answer."""
        self.answers_as: dict[str, Any] = {}

    def add(self, server: grpc.aio.Server) -> None:
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self, server)

    async def BeginPush(self, request: adapter_pb2.BeginPushRequest, context: Any) -> adapter_pb2.BeginPushResponse:
        self.begins.append(request)
        if self.fail_begin is not None:
            raise self.fail_begin
        return adapter_pb2.BeginPushResponse(
            upload_id=f"upload-{self.uploads}",
            committed_offset=len(self.data),
            max_chunk_bytes=self.max_chunk_bytes,
            stream=len(self.begins),
        )

    def lose_upload(self) -> None:
        """As a restart does."""
        self.data.clear()
        self.uploads += 1

    async def stall(self, name: str) -> None:
        if name in self.stalls:
            self.stalls.remove(name)
            await asyncio.sleep(30)

    async def PushChunks(
        self, request_iterator: AsyncIterator[adapter_pb2.PushChunksRequest], context: Any
    ) -> adapter_pb2.PushChunksResponse:
        self.stream_starts.append(len(self.data))
        limit = self.breaks.pop(0) if self.breaks else None
        async for chunk in request_iterator:
            await self.stall("PushChunks")
            failure = self.chunk_failures.pop(0) if self.chunk_failures else None
            if failure is not None:
                if isinstance(failure, NotFoundError):
                    self.lose_upload()
                raise failure
            assert chunk.stream == len(self.begins), "chunks name the stream of the last announcement"
            assert chunk.crc32 == zlib.crc32(chunk.data)
            if chunk.offset != len(self.data) or chunk.upload_id != f"upload-{self.uploads}":
                raise FailedPreconditionError("wrong place", reason="WRONG_OFFSET")
            self.chunk_sizes.append(len(chunk.data))
            self.data += chunk.data
            if limit is not None and len(self.data) >= limit:
                raise UnavailableError("connection lost")
        return adapter_pb2.PushChunksResponse(committed_offset=len(self.data))

    async def CommitPush(self, request: adapter_pb2.CommitPushRequest, context: Any) -> adapter_pb2.CommitPushResponse:
        self.commits.append(request)
        await self.stall("CommitPush")
        if self.commit_failures:
            failure = self.commit_failures.pop(0)
            if not isinstance(failure, UnavailableError):
                self.lose_upload()
            raise failure
        sent = self.begins[-1]
        fields: dict[str, Any] = {
            "run_id": sent.run_id,
            "policy_version": sent.policy_version,
            "sha256": sent.files[1].sha256,
            "state": adapter_pb2.ADAPTER_STATE_LOADED,
            "rank": sent.rank,
            "size_bytes": len(self.data),
        }
        return adapter_pb2.CommitPushResponse(
            adapter=adapter_pb2.Adapter(**(fields | self.answers_as)),
            stages=[adapter_pb2.CommitStage(name="hash", duration_seconds=0.5)],
            mean_abs_dlogp=1e-6,
        )

    async def ActivateAdapter(
        self, request: adapter_pb2.ActivateAdapterRequest, context: Any
    ) -> adapter_pb2.ActivateAdapterResponse:
        self.activations.append(request)
        self.answer_or_not()
        if request.expected_policy_version != 2:
            raise AbortedError("Version 2 is active.")
        return adapter_pb2.ActivateAdapterResponse(policy_version=request.policy_version, previous_policy_version=2)

    async def RollbackAdapter(
        self, request: adapter_pb2.RollbackAdapterRequest, context: Any
    ) -> adapter_pb2.RollbackAdapterResponse:
        self.rollbacks.append(request)
        self.answer_or_not()
        return adapter_pb2.RollbackAdapterResponse(policy_version=request.expected_policy_version - 1)

    def answer_or_not(self) -> None:
        if self.unavailable:
            self.unavailable -= 1
            raise UnavailableError("restarting")

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Any
    ) -> adapter_pb2.ListAdaptersResponse:
        """Three pages of one adapter each."""
        version = int(request.page_token or "1")
        adapter = adapter_pb2.Adapter(run_id="run-a", policy_version=version, state=adapter_pb2.ADAPTER_STATE_RETIRING)
        return adapter_pb2.ListAdaptersResponse(
            adapters=[adapter], next_page_token=str(version + 1) if version < 3 else ""
        )

    async def GetActiveAdapter(
        self, request: adapter_pb2.GetActiveAdapterRequest, context: Any
    ) -> adapter_pb2.GetActiveAdapterResponse:
        return adapter_pb2.GetActiveAdapterResponse(run_id="run-a", policy_version=0)

    async def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: Any
    ) -> adapter_pb2.DeleteAdapterResponse:
        self.deletions.append(request)
        self.answer_or_not()
        return adapter_pb2.DeleteAdapterResponse()


def write_adapter(folder: Path, size: int = 2 * MEBIBYTE + 17) -> bytes:
    """Write the two files and return their bytes in manifest order; a third file must not be sent."""
    config, weights = b'{"r": 8}', os.urandom(size)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("not part of an adapter")
    return config + weights


def with_store(store: Store, use: Callable[[AdapterClient], Awaitable[Any]], *, retries: bool = True) -> Any:
    async def run() -> Any:
        async with serving(store.add) as target, AdapterClient(target, retries=retries) as client:
            return await use(client)

    return asyncio.run(run())


def push(store: Store, folder: Path, *, retries: bool = True, **options: Any) -> PushResult:
    result = with_store(store, lambda client: client.push(folder, PUSH, **({"epoch": 4} | options)), retries=retries)
    assert isinstance(result, PushResult)
    return result
