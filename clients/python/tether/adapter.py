"""Client of the generator's adapter port: pushes LoRA adapters and switches between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tether.adapter_upload import ADAPTER_FILES, AdapterUpload, LocalFiles, OnProgress, read_files
from tether.attempts import ATTEMPTS, read_request_id
from tether.channel import ServiceClient
from tether.errors import InternalError
from tether.status import request_field
from tether.v1 import adapter_pb2, adapter_pb2_grpc

if TYPE_CHECKING:
    from tether.v1.adapter_pb2_grpc import AdapterServiceAsyncStub

__all__ = [
    "ADAPTER_FILES",
    "ActiveAdapter",
    "Adapter",
    "AdapterClient",
    "AdapterProbe",
    "AdapterPush",
    "CommitStage",
    "PushResult",
]

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
    base_logprobs: Sequence[float] = ()
    """The same without the adapter, from which the loaded one must then differ as much; empty: not known."""


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

    async def push(
        self,
        folder: Path,
        push: AdapterPush,
        *,
        epoch: int,
        request_id: str = "",
        on_progress: OnProgress | None = None,
        timeout_seconds: float | None = None,
    ) -> PushResult:
        """Send an adapter, have it verified, loaded and proven, and return it. It is not active yet.

        The bytes go in pieces of 8 MiB. What is lost, late or damaged on the way is sent again from where the generator
        is, also after its restart; only several failures in a row without a byte more arriving end the push: ATTEMPTS
        (5), so that a generator that does not answer costs 5 calls of `timeout_seconds` and pauses of 3 s in all.

        With `retries=False`, where the caller repeats the push with its request_id, one announcement or commit without
        an answer ends it, and so does a second piece in a row of which nothing arrived. A caller with N attempts thus
        makes at most N calls to a generator that is dead, and 4 N to one that takes announcements and no bytes, each of
        at most `timeout_seconds`, besides its own pauses.

        Args:
            folder: Holds adapter_config.json and adapter_model.safetensors.
            push: What is declared about it.
            epoch: Of the run's writer, 1 or more; the generator refuses writers with a lower one from now on.
            request_id: UUID of this push, to repeat it later without a second effect; a new one else.
            on_progress: Called at the start and after each piece with the bytes that have arrived and all bytes.
            timeout_seconds: Deadline of each of the calls, of which every piece is one.

        Raises:
            InvalidArgumentError: A file is missing or a field is out of range.
            AbortedError: STALE_EPOCH: a newer writer of the run has called.
            FailedPreconditionError: The generator refused the adapter; the reason names the check. Nothing was kept.
            ResourceExhaustedError: STORAGE_FULL: the generator's disk is full. Nothing was kept.
            UnavailableError: The generator could not be reached several times in a row.
        """
        files = await asyncio.to_thread(read_files, folder)
        begin = _begin_request(push, files, epoch=epoch, request_id=read_request_id(request_id))
        attempts = ATTEMPTS if self._retries else 1
        upload = AdapterUpload(_Calls(self, timeout_seconds), begin, on_progress, attempts=attempts)
        answer = await upload.push(files)
        return _push_result(answer, begin)

    async def activate(
        self,
        run_id: str,
        policy_version: int,
        *,
        expected_run_id: str,
        expected_policy_version: int,
        epoch: int,
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> int:
        """Make a loaded version the one that new requests use, and return the version used before.

        A compare-and-set: the expected run and version must be the active ones. Repeated with its request id while the
        generator cannot be reached; a repeat gets the first answer, even if something else was activated since.

        Args:
            run_id: The run that owns the version.
            policy_version: The version; 0 is the base model.
            expected_run_id: The run that must be active now; empty if none ever was.
            expected_policy_version: The version that must be active now.
            epoch: Of the run's writer.
            request_id: UUID of this activation, to repeat it later without a second effect; a new one else.
            timeout_seconds: Deadline of each of the calls.

        Raises:
            AbortedError: The expected state is not the actual one, or the epoch is stale.
            NotFoundError: The version is not loaded.
        """
        with request_field("policy_version"):
            request = adapter_pb2.ActivateAdapterRequest(
                request_id=read_request_id(request_id),
                run_id=run_id,
                policy_version=policy_version,
                expected_run_id=expected_run_id,
                expected_policy_version=expected_policy_version,
                epoch=epoch,
            )
        response = await self._repeat(self._stub.ActivateAdapter, request, timeout_seconds)
        return response.previous_policy_version

    async def rollback(
        self,
        run_id: str,
        *,
        expected_policy_version: int,
        epoch: int,
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> int:
        """Make the newest loaded version below the active one active again, and return it. Repeated as `activate`.

        Raises:
            AbortedError: Another version is active, or the epoch is stale.
            FailedPreconditionError: There is no version below.
        """
        with request_field("expected_policy_version"):
            request = adapter_pb2.RollbackAdapterRequest(
                request_id=read_request_id(request_id),
                run_id=run_id,
                expected_policy_version=expected_policy_version,
                epoch=epoch,
            )
        response = await self._repeat(self._stub.RollbackAdapter, request, timeout_seconds)
        return response.policy_version

    async def list_adapters(self, *, timeout_seconds: float | None = None) -> tuple[Adapter, ...]:
        """Return the stored adapters of all runs, oldest first."""
        pages = self._pages(self._stub.ListAdapters, adapter_pb2.ListAdaptersRequest(), timeout_seconds)
        return tuple([_adapter(adapter) async for page in pages for adapter in page.adapters])

    async def get_active_adapter(self, *, timeout_seconds: float | None = None) -> ActiveAdapter:
        """Return what the generator serves now."""
        request = adapter_pb2.GetActiveAdapterRequest()
        response = await self._read(self._stub.GetActiveAdapter, request, timeout_seconds)
        adapter = _adapter(response.adapter) if response.HasField("adapter") else None
        return ActiveAdapter(response.run_id, response.policy_version, adapter)

    async def delete(
        self,
        run_id: str,
        policy_version: int,
        *,
        epoch: int,
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> None:
        """Unload and delete a version once no request uses it. Repeated as `activate`.

        Raises:
            AbortedError: The epoch is stale.
            FailedPreconditionError: The version is active.
            NotFoundError: There is none, perhaps because the generator was restarted in between.
        """
        with request_field("policy_version"):
            request = adapter_pb2.DeleteAdapterRequest(
                request_id=read_request_id(request_id), run_id=run_id, policy_version=policy_version, epoch=epoch
            )
        await self._repeat(self._stub.DeleteAdapter, request, timeout_seconds)


@dataclass(frozen=True, slots=True)
class _Calls:
    """The calls of a push on a client's channel."""

    client: AdapterClient
    timeout_seconds: float | None

    async def begin(self, request: adapter_pb2.BeginPushRequest) -> adapter_pb2.BeginPushResponse:
        return await self.client._call(self.client._stub.BeginPush, request, self.timeout_seconds)

    async def send(
        self, chunks: Callable[[], AsyncIterator[adapter_pb2.PushChunksRequest]]
    ) -> adapter_pb2.PushChunksResponse:
        return await self.client._upload(self.client._stub.PushChunks, chunks, self.timeout_seconds)

    async def commit(self, request: adapter_pb2.CommitPushRequest) -> adapter_pb2.CommitPushResponse:
        return await self.client._call(self.client._stub.CommitPush, request, self.timeout_seconds)


def _begin_request(
    push: AdapterPush, files: LocalFiles, *, epoch: int, request_id: str
) -> adapter_pb2.BeginPushRequest:
    probes = [(probe.token_ids, probe.logprobs, probe.base_logprobs) for probe in push.probes]
    with request_field("push"):
        return adapter_pb2.BeginPushRequest(
            request_id=request_id,
            run_id=push.run_id,
            policy_version=push.policy_version,
            base_model_sha256=push.base_model_sha256,
            rank=push.rank,
            target_modules=push.target_modules,
            files=files.declare(),
            probes=[adapter_pb2.AdapterProbe(token_ids=t, logprobs=p, base_logprobs=b) for t, p, b in probes],
            differs_from_base=push.differs_from_base,
            epoch=epoch,
        )


def _push_result(response: adapter_pb2.CommitPushResponse, begin: adapter_pb2.BeginPushRequest) -> PushResult:
    """Return the result if it is about what was pushed.

    Raises:
        InternalError: The generator took something else in: the declaration was damaged on the way.
    """
    adapter = _adapter(response.adapter)
    pushed = (begin.run_id, begin.policy_version, begin.files[-1].sha256)
    if (adapter.run_id, adapter.policy_version, adapter.sha256) != pushed:
        message = f"the generator has taken in version {adapter.policy_version} of run {adapter.run_id} in its place"
        raise InternalError(f"Version {begin.policy_version} of run {begin.run_id}: {message}; delete that one.")
    return PushResult(
        adapter=adapter,
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
