"""Client of the generator's adapter port: pushes LoRA adapters and switches between them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar
from uuid import uuid4

from tether.channel import ServiceClient
from tether.errors import InvalidArgumentError, UnavailableError
from tether.status import request_field
from tether.v1 import adapter_pb2, adapter_pb2_grpc

if TYPE_CHECKING:
    from tether.v1.adapter_pb2_grpc import AdapterServiceAsyncStub

__all__ = [
    "ActiveAdapter",
    "Adapter",
    "AdapterClient",
    "AdapterProbe",
    "AdapterPush",
    "CommitStage",
    "PushResult",
]

ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
"""What an adapter folder must hold, in the order in which the bytes are sent. Other files stay at home."""
MAX_CHUNK_BYTES: Final = 1024 * 1024
"""Largest chunk that the contract allows."""
ATTEMPTS: Final = 5
"""Times a call with a request id is made, in all, while the generator cannot be reached."""

ResultT = TypeVar("ResultT")
AdapterState = Literal["loaded", "active", "retiring"]
_STATES: dict[int, AdapterState] = {
    adapter_pb2.ADAPTER_STATE_LOADED: "loaded",
    adapter_pb2.ADAPTER_STATE_ACTIVE: "active",
    adapter_pb2.ADAPTER_STATE_RETIRING: "retiring",
}


@dataclass(frozen=True, slots=True)
class AdapterProbe:
    """A token sequence and its log-probabilities under the new adapter, to prove the loaded one."""

    token_ids: Sequence[int]
    """At least 2 ids."""
    logprobs: Sequence[float]
    """Of token_ids[1:] at temperature 1; one fewer than token_ids."""


@dataclass(frozen=True, slots=True)
class AdapterPush:
    """What is declared about an adapter before its bytes are sent."""

    run_id: str
    """The run that owns it."""
    policy_version: int
    """Its version in that run, 1 or more."""
    base_model_sha256: str
    """Content hash of the base model it was trained on."""
    rank: int
    """Rank of the LoRA matrices."""
    target_modules: Sequence[str]
    """Module names it changes."""
    probes: Sequence[AdapterProbe]
    """1 to 16 proofs."""
    differs_from_base: bool
    """True if some lora_B is not zero."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as the generator knows it."""

    run_id: str
    """The run that owns it."""
    policy_version: int
    """Its version in that run."""
    sha256: str
    """Hash of its weights file."""
    state: AdapterState
    """Its state."""
    rank: int
    """Rank of the LoRA matrices."""
    size_bytes: int
    """Bytes of all files."""
    create_time: datetime
    """When it was committed, in UTC."""
    active_request_count: int
    """Requests in flight that use it."""


@dataclass(frozen=True, slots=True)
class CommitStage:
    """One stage of a commit."""

    name: str
    """"hash", "header", "tensors", "store", "load" or "prove"."""
    duration_seconds: float
    """Time it took."""


@dataclass(frozen=True, slots=True)
class PushResult:
    """A pushed, proven adapter, not yet active."""

    adapter: Adapter
    """The adapter."""
    stages: tuple[CommitStage, ...]
    """The stages passed, in order."""
    mean_abs_dlogp: float
    """Mean absolute difference in nats between the probes and the loaded adapter."""


@dataclass(frozen=True, slots=True)
class ActiveAdapter:
    """What a generator serves now."""

    run_id: str
    """The run that owns the generator; empty before the first activation."""
    policy_version: int
    """The active version; 0 is the base model."""
    adapter: Adapter | None
    """The adapter; None for version 0."""


class AdapterClient(ServiceClient):
    """Brings adapters into a serving generator."""

    @cached_property
    def _stub(self) -> AdapterServiceAsyncStub:
        return adapter_pb2_grpc.AdapterServiceStub(self._channel)

    async def push(self, folder: Path, push: AdapterPush, *, timeout_seconds: float | None = None) -> PushResult:
        """Send an adapter, have it verified, loaded and proven, and return it. It is not active yet.

        While the generator cannot be reached, each stage is repeated with its request id a few times, and the bytes go
        on from where the generator has them.

        Args:
            folder: Holds adapter_config.json and adapter_model.safetensors.
            push: What is declared about it.
            timeout_seconds: Deadline of each of the calls.

        Raises:
            InvalidArgumentError: A file is missing or a field is out of range.
            FailedPreconditionError: The generator refused the adapter; the reason names the check. Nothing was kept.
            UnavailableError: The generator could not be reached several times in a row.
        """
        files = await asyncio.to_thread(_read_files, folder)
        data = b"".join(files.values())
        begin = _begin_request(push, files)

        async def begin_and_send() -> str:
            upload = await self._call(self._stub.BeginPush, begin, timeout_seconds)
            if upload.committed_offset < len(data):
                await self._upload(self._stub.PushChunks, _chunks(upload, data), timeout_seconds)
            return upload.upload_id

        upload_id = await _repeat_while_unavailable(begin_and_send)
        commit = adapter_pb2.CommitPushRequest(request_id=str(uuid4()), upload_id=upload_id)
        return _push_result(
            await _repeat_while_unavailable(lambda: self._call(self._stub.CommitPush, commit, timeout_seconds))
        )

    async def activate(
        self,
        run_id: str,
        policy_version: int,
        *,
        expected_run_id: str,
        expected_policy_version: int,
        epoch: int,
        timeout_seconds: float | None = None,
    ) -> int:
        """Make a loaded version the one that new requests use, and return the version used before.

        A compare-and-set: the expected run and version must be the active ones. Repeated with its request id while the
        generator cannot be reached.

        Raises:
            AbortedError: The expected state is not the actual one, or the epoch is stale.
            NotFoundError: The version is not loaded.
        """
        with request_field("policy_version"):
            request = adapter_pb2.ActivateAdapterRequest(
                request_id=str(uuid4()),
                run_id=run_id,
                policy_version=policy_version,
                expected_run_id=expected_run_id,
                expected_policy_version=expected_policy_version,
                epoch=epoch,
            )
        response = await _repeat_while_unavailable(
            lambda: self._call(self._stub.ActivateAdapter, request, timeout_seconds)
        )
        return response.previous_policy_version

    async def rollback(self, run_id: str, *, expected_policy_version: int, timeout_seconds: float | None = None) -> int:
        """Make the newest loaded version below the active one active again, and return it. Not repeated."""
        with request_field("expected_policy_version"):
            request = adapter_pb2.RollbackAdapterRequest(
                request_id=str(uuid4()), run_id=run_id, expected_policy_version=expected_policy_version
            )
        return (await self._call(self._stub.RollbackAdapter, request, timeout_seconds)).policy_version

    async def list_adapters(self, *, timeout_seconds: float | None = None) -> tuple[Adapter, ...]:
        """Return the stored adapters of all runs, oldest first."""
        adapters: list[Adapter] = []
        token = ""
        while True:
            request = adapter_pb2.ListAdaptersRequest(page_token=token)
            page = await self._call(self._stub.ListAdapters, request, timeout_seconds)
            adapters += [_adapter(adapter) for adapter in page.adapters]
            token = page.next_page_token
            if not token:
                return tuple(adapters)

    async def get_active_adapter(self, *, timeout_seconds: float | None = None) -> ActiveAdapter:
        """Return what the generator serves now."""
        request = adapter_pb2.GetActiveAdapterRequest()
        response = await self._call(self._stub.GetActiveAdapter, request, timeout_seconds)
        adapter = _adapter(response.adapter) if response.HasField("adapter") else None
        return ActiveAdapter(response.run_id, response.policy_version, adapter)

    async def delete(self, run_id: str, policy_version: int, *, timeout_seconds: float | None = None) -> None:
        """Unload and delete a version once no request uses it. Not repeated: the second answer would be NOT_FOUND."""
        with request_field("policy_version"):
            request = adapter_pb2.DeleteAdapterRequest(
                request_id=str(uuid4()), run_id=run_id, policy_version=policy_version
            )
        await self._call(self._stub.DeleteAdapter, request, timeout_seconds)


async def _repeat_while_unavailable(call: Callable[[], Awaitable[ResultT]]) -> ResultT:
    """Return the call's result, making it again a bounded number of times after UNAVAILABLE.

    Only for calls that carry a request id, or start with one: their repeat has no second effect.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return await call()
        except UnavailableError:
            await asyncio.sleep(0.1 * 2**attempt)
    return await call()


def _read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each adapter file.

    Raises:
        InvalidArgumentError: One cannot be read.
    """
    try:
        return {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
    except OSError as error:
        raise InvalidArgumentError(f"Cannot read {error.filename}: {error.strerror}.", field="folder") from error


def _begin_request(push: AdapterPush, files: dict[str, bytes]) -> adapter_pb2.BeginPushRequest:
    declared = [
        adapter_pb2.AdapterFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]
    with request_field("push"):
        return adapter_pb2.BeginPushRequest(
            request_id=str(uuid4()),
            run_id=push.run_id,
            policy_version=push.policy_version,
            base_model_sha256=push.base_model_sha256,
            rank=push.rank,
            target_modules=push.target_modules,
            files=declared,
            probes=[adapter_pb2.AdapterProbe(token_ids=p.token_ids, logprobs=p.logprobs) for p in push.probes],
            differs_from_base=push.differs_from_base,
        )


async def _chunks(upload: adapter_pb2.BeginPushResponse, data: bytes) -> AsyncIterator[adapter_pb2.PushChunksRequest]:
    """Yield what the generator does not have yet."""
    size = min(upload.max_chunk_bytes or MAX_CHUNK_BYTES, MAX_CHUNK_BYTES)
    for offset in range(upload.committed_offset, len(data), size):
        yield adapter_pb2.PushChunksRequest(
            upload_id=upload.upload_id, offset=offset, data=data[offset : offset + size]
        )


def _push_result(response: adapter_pb2.CommitPushResponse) -> PushResult:
    return PushResult(
        adapter=_adapter(response.adapter),
        stages=tuple(CommitStage(stage.name, stage.duration_seconds) for stage in response.stages),
        mean_abs_dlogp=response.mean_abs_dlogp,
    )


def _adapter(adapter: adapter_pb2.Adapter) -> Adapter:
    return Adapter(
        run_id=adapter.run_id,
        policy_version=adapter.policy_version,
        sha256=adapter.sha256,
        state=_STATES[adapter.state],
        rank=adapter.rank,
        size_bytes=adapter.size_bytes,
        create_time=adapter.create_time.ToDatetime(tzinfo=UTC),
        active_request_count=adapter.active_request_count,
    )
