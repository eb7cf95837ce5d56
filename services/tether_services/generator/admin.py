"""AdapterService: the calls that change what the generator serves."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether.v1 import adapter_pb2, adapter_pb2_grpc
from tether_services.generator.adapters import Active, AdapterRegistry, AdapterVersion
from tether_services.generator.engine import EngineDescription
from tether_services.generator.fence import Fence
from tether_services.generator.pointer import ActivePointer
from tether_services.generator.pushes import AdapterPushes
from tether_services.generator.uploads import (
    MAX_CHUNK_BYTES,
    Chunk,
    Declaration,
    DeclaredFile,
    Probe,
    Upload,
    Uploads,
)
from tether_services.generator.verification import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME, check_targets
from tether_services.runtime.checks import check_name, check_page, check_range, check_sha256, check_token_ids
from tether_services.runtime.requests import RequestLedger, check_request_id

MAX_ADMIN_MESSAGE_BYTES = MAX_CHUNK_BYTES + 64 * 1024
MAX_PROBES = 16
MAX_PROBE_TOKENS = 256
MAX_TARGET_MODULES = 64
MAX_VERSION = 2**53
MAX_EPOCH = 2**53

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
DescribeEngine = Callable[[], EngineDescription]


@dataclass(frozen=True, slots=True)
class AdapterParts:
    """What holds the adapters of a generator."""

    adapters: AdapterRegistry
    """The versions."""
    fence: Fence
    """Who may change them."""
    pointer: ActivePointer
    """Which one is active."""
    uploads: Uploads
    """Those that are arriving."""
    pushes: AdapterPushes
    """How they get in."""


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """Check, convert, call, convert."""

    full_name = adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name

    def __init__(self, parts: AdapterParts, describe: DescribeEngine, *, max_bytes: int) -> None:
        self._adapters = parts.adapters
        self._fence = parts.fence
        self._pointer = parts.pointer
        self._pushes = parts.pushes
        self._uploads = parts.uploads
        self._describe = describe
        self._max_bytes = max_bytes
        self._requests = RequestLedger()

    def methods(self) -> list[str]:
        """Return the names of the methods."""
        return [method.name for method in adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].methods]

    async def BeginPush(self, request: adapter_pb2.BeginPushRequest, context: Context) -> adapter_pb2.BeginPushResponse:
        """Announce an adapter."""
        check_epoch(request.epoch)
        declaration = read_declaration(request, self._describe(), max_bytes=self._max_bytes)
        upload_id, stream, offset = await self._pushes.begin(declaration, epoch=request.epoch)
        return adapter_pb2.BeginPushResponse(
            upload_id=upload_id, committed_offset=offset, max_chunk_bytes=MAX_CHUNK_BYTES, stream=stream
        )

    async def PushChunks(
        self, request_iterator: AsyncIterator[adapter_pb2.PushChunksRequest], context: Context
    ) -> adapter_pb2.PushChunksResponse:
        """Take bytes in."""
        first = await anext(request_iterator, None)
        if first is None:
            raise InvalidArgumentError("The stream holds no chunk.", field="upload_id")
        upload = self._uploads.get(first.upload_id)
        with upload.streamed():
            await self._write(upload, first)
            async for chunk in request_iterator:
                await self._write(upload, chunk)
            return adapter_pb2.PushChunksResponse(committed_offset=await self._uploads.sync(upload))

    async def _write(self, upload: Upload, chunk: adapter_pb2.PushChunksRequest) -> None:
        if chunk.upload_id != upload.upload_id:
            raise InvalidArgumentError("All chunks of a stream are of one upload.", field="upload_id")
        check_range(len(chunk.data), field="data", low=1, high=MAX_CHUNK_BYTES)
        check_range(chunk.offset, field="offset", low=0, high=self._max_bytes)
        await self._uploads.write(upload, Chunk(chunk.offset, chunk.data, chunk.crc32, chunk.stream))

    async def CommitPush(
        self, request: adapter_pb2.CommitPushRequest, context: Context
    ) -> adapter_pb2.CommitPushResponse:
        """Verify, store, load and prove."""
        check_epoch(request.epoch)
        return await self._requests.answer(request, lambda: self._commit(request))

    async def _commit(self, request: adapter_pb2.CommitPushRequest) -> adapter_pb2.CommitPushResponse:
        version = await self._pushes.commit(request.upload_id, epoch=request.epoch)
        stages = [adapter_pb2.CommitStage(name=name, duration_seconds=s) for name, s in version.result.stages]
        return adapter_pb2.CommitPushResponse(
            adapter=write_adapter(version, self._adapters), stages=stages, mean_abs_dlogp=version.result.mean_abs_dlogp
        )

    async def ActivateAdapter(
        self, request: adapter_pb2.ActivateAdapterRequest, context: Context
    ) -> adapter_pb2.ActivateAdapterResponse:
        """Switch new requests to a version."""
        check_name(request.run_id, field="run_id")
        check_range(request.policy_version, field="policy_version", low=0, high=MAX_VERSION)
        if request.expected_run_id:
            check_name(request.expected_run_id, field="expected_run_id")
        check_range(request.expected_policy_version, field="expected_policy_version", low=0, high=MAX_VERSION)
        check_epoch(request.epoch)
        return await self._requests.answer(request, lambda: self._activate(request))

    async def RollbackAdapter(
        self, request: adapter_pb2.RollbackAdapterRequest, context: Context
    ) -> adapter_pb2.RollbackAdapterResponse:
        """Switch new requests to the version before."""
        check_name(request.run_id, field="run_id")
        check_range(request.expected_policy_version, field="expected_policy_version", low=0, high=MAX_VERSION)
        check_epoch(request.epoch)
        return await self._requests.answer(request, lambda: self._roll_back(request))

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        """Return one page of the stored adapters."""
        size, start = check_page(request.page_size, request.page_token)
        versions = self._adapters.all()
        page = [write_adapter(version, self._adapters) for version in versions[start : start + size]]
        following = str(start + size) if start + size < len(versions) else ""
        return adapter_pb2.ListAdaptersResponse(adapters=page, next_page_token=following)

    async def GetActiveAdapter(
        self, request: adapter_pb2.GetActiveAdapterRequest, context: Context
    ) -> adapter_pb2.GetActiveAdapterResponse:
        """Return the active adapter."""
        active = self._adapters.active
        version = self._adapters.find(active.run_id, active.policy_version)
        return adapter_pb2.GetActiveAdapterResponse(
            run_id=active.run_id,
            policy_version=active.policy_version,
            adapter=write_adapter(version, self._adapters) if version else None,
        )

    async def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: Context
    ) -> adapter_pb2.DeleteAdapterResponse:
        """Retire a version."""
        check_name(request.run_id, field="run_id")
        check_range(request.policy_version, field="policy_version", low=1, high=MAX_VERSION)
        check_epoch(request.epoch)
        return await self._requests.answer(request, lambda: self._delete(request))

    async def _activate(self, request: adapter_pb2.ActivateAdapterRequest) -> adapter_pb2.ActivateAdapterResponse:
        previous = await self._pointer.activate(
            Active(request.run_id, request.policy_version),
            expected=Active(request.expected_run_id, request.expected_policy_version),
            epoch=request.epoch,
        )
        return adapter_pb2.ActivateAdapterResponse(
            policy_version=request.policy_version, previous_policy_version=previous
        )

    async def _roll_back(self, request: adapter_pb2.RollbackAdapterRequest) -> adapter_pb2.RollbackAdapterResponse:
        expected = Active(request.run_id, request.expected_policy_version)
        version = await self._pointer.roll_back(expected, epoch=request.epoch)
        return adapter_pb2.RollbackAdapterResponse(policy_version=version)

    async def _delete(self, request: adapter_pb2.DeleteAdapterRequest) -> adapter_pb2.DeleteAdapterResponse:
        await self._fence.admit(request.run_id, request.epoch)
        self._adapters.delete(request.run_id, request.policy_version)
        return adapter_pb2.DeleteAdapterResponse()


def check_epoch(epoch: int) -> None:
    """Refuse a call that does not say which writer of the run makes it."""
    check_range(epoch, field="epoch", low=1, high=MAX_EPOCH)


def read_declaration(
    request: adapter_pb2.BeginPushRequest, description: EngineDescription, *, max_bytes: int
) -> Declaration:
    """Return what is announced, after every check that needs no bytes.

    Raises:
        InvalidArgumentError: A field is out of range.
        FailedPreconditionError: The adapter does not fit this generator; the reason says why.
    """
    request_id = check_request_id(request.request_id)
    check_name(request.run_id, field="run_id")
    check_range(request.policy_version, field="policy_version", low=1, high=MAX_VERSION)
    check_sha256(request.base_model_sha256, field="base_model_sha256")
    check_range(request.rank, field="rank", low=1, high=math.inf)
    files = read_files(request.files, max_bytes=max_bytes)
    probes = read_probes(request.probes, description)
    check_range(len(request.target_modules), field="target_modules", low=1, high=MAX_TARGET_MODULES)
    check_fit(request, description)
    return Declaration(
        request_id=request_id,
        run_id=request.run_id,
        policy_version=request.policy_version,
        rank=request.rank,
        target_modules=frozenset(request.target_modules),
        files=files,
        probes=probes,
        differs_from_base=request.differs_from_base,
    )


def check_fit(request: adapter_pb2.BeginPushRequest, description: EngineDescription) -> None:
    """Refuse an adapter that was made for another base, is too large in rank or changes unknown layers."""
    if request.base_model_sha256 != description.base_model_sha256:
        raise FailedPreconditionError(
            f"The adapter was made for another base model; this one is {description.base_model_sha256}.",
            field="base_model_sha256",
            reason="WRONG_BASE_MODEL",
        )
    if request.rank > description.max_lora_rank:
        raise FailedPreconditionError(
            f"Rank {request.rank} is above adapters.max_rank {description.max_lora_rank}.",
            field="rank",
            reason="RANK_TOO_LARGE",
        )
    check_targets(description.linear_shapes, request.target_modules)


def read_files(files: Sequence[adapter_pb2.AdapterFile], *, max_bytes: int) -> tuple[DeclaredFile, ...]:
    """Return the manifest: exactly the two known files, each with a size and a hash."""
    if sorted(file.name for file in files) != [CONFIG_NAME, WEIGHTS_NAME]:
        raise InvalidArgumentError(f"Exactly {CONFIG_NAME} and {WEIGHTS_NAME} are accepted.", field="files")
    for index, file in enumerate(files):
        limit = MAX_CONFIG_BYTES if file.name == CONFIG_NAME else max_bytes
        check_range(file.size_bytes, field=f"files[{index}].size_bytes", low=1, high=limit)
        check_sha256(file.sha256, field=f"files[{index}].sha256")
    check_range(sum(file.size_bytes for file in files), field="files", low=1, high=max_bytes)
    return tuple(DeclaredFile(file.name, file.size_bytes, file.sha256) for file in files)


def read_probes(probes: Sequence[adapter_pb2.AdapterProbe], description: EngineDescription) -> tuple[Probe, ...]:
    """Return the proofs."""
    check_range(len(probes), field="probes", low=1, high=MAX_PROBES)
    longest = min(MAX_PROBE_TOKENS, description.max_model_len - 1)  # engines may need room for one more token
    for index, probe in enumerate(probes):
        field = f"probes[{index}]"
        check_range(len(probe.token_ids), field=f"{field}.token_ids", low=2, high=longest)
        check_token_ids(probe.token_ids, field=f"{field}.token_ids", vocab_size=description.vocab_size)
        check_logprobs(probe.logprobs, len(probe.token_ids) - 1, field=f"{field}.logprobs")
        if probe.base_logprobs:
            check_logprobs(probe.base_logprobs, len(probe.token_ids) - 1, field=f"{field}.base_logprobs")
    return tuple(Probe(tuple(p.token_ids), tuple(p.logprobs), tuple(p.base_logprobs)) for p in probes)


def check_logprobs(values: Sequence[float], count: int, *, field: str) -> None:
    """Refuse log-probabilities that are too many, too few, not finite or above 0."""
    if len(values) != count:
        raise InvalidArgumentError("One fewer log-probability than tokens is needed.", field=field)
    if not all(math.isfinite(value) and value <= 1e-3 for value in values):
        raise InvalidArgumentError("A log-probability is finite and at most 0.", field=field)


def write_adapter(version: AdapterVersion, adapters: AdapterRegistry) -> adapter_pb2.Adapter:
    """Return the message of one version."""
    state = adapter_pb2.ADAPTER_STATE_LOADED
    if version.retiring:
        state = adapter_pb2.ADAPTER_STATE_RETIRING
    elif adapters.is_active(version):
        state = adapter_pb2.ADAPTER_STATE_ACTIVE
    created = Timestamp()
    created.FromNanoseconds(int(version.created * 1e9))
    return adapter_pb2.Adapter(
        run_id=version.adapter.run_id,
        policy_version=version.adapter.policy_version,
        sha256=version.adapter.sha256,
        state=state,
        rank=version.declaration.rank,
        size_bytes=version.declaration.size_bytes,
        create_time=created,
        active_request_count=version.request_count,
    )
