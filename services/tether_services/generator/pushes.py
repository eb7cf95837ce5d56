"""From an announced adapter to a proven one: verify, store, load, prove. A failed check leaves nothing behind."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import time
from pathlib import Path
from typing import Any

from tether.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    TetherError,
)
from tether_services.generator.adapters import AdapterRegistry, AdapterVersion, PushResult
from tether_services.generator.engine import EngineDescription, LoadedAdapter
from tether_services.generator.fence import Fence
from tether_services.generator.manifest import Manifest, write_manifest
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.generator.proof import Candidate, Prover, Stopwatch
from tether_services.generator.storage import reporting_full_disk
from tether_services.generator.uploads import Declaration, Upload, Uploads
from tether_services.generator.verification import (
    CONFIG_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    AdapterShape,
    TensorEntry,
    check_finite,
    check_hash,
    check_tensors,
    expected_tensors,
    normalise_adapter_config,
    read_safetensors_header,
    refuse,
)
from tether_services.runtime.fault_points import reach
from tether_services.runtime.history import record
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)


class AdapterPushes:
    """Takes adapters in, one commit at a time."""

    def __init__(
        self, prover: Prover, registry: AdapterRegistry, uploads: Uploads, fence: Fence, metrics: GeneratorMetrics
    ) -> None:
        self._prover = prover
        self._registry = registry
        self._uploads = uploads
        self._fence = fence
        self._metrics = metrics
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._commits: dict[str, asyncio.Task[AdapterVersion]] = {}

    async def begin(self, declaration: Declaration, *, epoch: int) -> tuple[str, int, int]:
        """Return (upload id, stream, bytes already there) for an announced adapter.

        Raises:
            FailedPreconditionError: The version exists with other content.
            TetherError: Whatever `Fence.admit` and `Uploads.begin` refuse.
        """
        await self._fence.admit(declaration.run_id, epoch)
        stored = self._find_stored(declaration)
        if stored is None:
            upload = await self._begin_upload(declaration, epoch)
            stored = self._find_stored_since(upload, declaration)
            if stored is None:
                record("pushing", run=declaration.run_id, policy_version=declaration.policy_version)
                return upload.upload_id, *await upload.open_stream()
        return stored.upload_id, 0, declaration.size_bytes

    def _find_stored(self, declaration: Declaration) -> AdapterVersion | None:
        """Return the version of the same content; refuse what contradicts a stored one."""
        for version in self._registry.all():
            if version.retiring:
                continue
            if version.declaration.same_content(declaration):
                return version
            if version.declaration.request_id == declaration.request_id:
                raise InvalidArgumentError("This request_id was used for another adapter.", field="request_id")
            if version.declaration.key == declaration.key:
                raise _version_exists(declaration)
        return None

    def _find_stored_since(self, upload: Upload, declaration: Declaration) -> AdapterVersion | None:
        """Look again after the wait for room; where the version was committed meanwhile, the upload is dropped."""
        needed = False
        try:
            stored = self._find_stored(declaration)
            needed = stored is None
        finally:
            if not (needed or upload.committing):
                self._uploads.forget(upload)
        return stored

    async def _begin_upload(self, declaration: Declaration, epoch: int) -> Upload:
        """Begin, at the cost of versions of runs that neither are active nor push now."""
        while True:
            try:
                upload = await self._uploads.begin(declaration, epoch=epoch)
            except ResourceExhaustedError as error:
                missing = await self._uploads.missing_bytes(declaration) if error.reason == "STORAGE_FULL" else 0
                if missing <= 0 or not await self._registry.make_room(missing, run_id=declaration.run_id):
                    raise
                self._fence.check(declaration.run_id, epoch)
            else:
                return self._still_wanted(upload, epoch)

    def _still_wanted(self, upload: Upload, epoch: int) -> Upload:
        """Return an upload; drop it if a newer writer came meanwhile and does not want it."""
        try:
            self._fence.check(upload.declaration.run_id, epoch)
        except AbortedError:
            if upload.epoch == epoch and not upload.committing:
                self._uploads.forget(upload)
            raise
        return upload

    async def commit(self, upload_id: str, *, epoch: int) -> AdapterVersion:
        """Return the proven adapter of an upload, doing the work at most once. Goes on if the caller leaves.

        Raises:
            AbortedError: STALE_EPOCH: a newer writer was here, or came while the adapter was verified.
            NotFoundError: There is no such upload.
            FailedPreconditionError: Bytes are missing, or a check failed; its reason names the check.
        """
        stored = self._find_committed(upload_id)
        declared = stored.declaration if stored else self._uploads.get(upload_id).declaration
        await self._fence.admit(declared.run_id, epoch)
        stored = self._find_committed(upload_id)
        if stored is not None:
            return stored
        upload = self._uploads.get(upload_id)
        upload.epoch = max(upload.epoch, epoch)
        return await asyncio.shield(self._commits.get(upload_id) or self._start_commit(upload))

    def _find_committed(self, upload_id: str) -> AdapterVersion | None:
        return next((v for v in self._registry.all() if v.upload_id == upload_id), None)

    def _start_commit(self, upload: Upload) -> asyncio.Task[AdapterVersion]:
        if upload.received_bytes < upload.declaration.size_bytes:
            raise FailedPreconditionError(
                f"{upload.received_bytes} of {upload.declaration.size_bytes} bytes have arrived; send the rest.",
                field="upload_id",
                reason="UPLOAD_INCOMPLETE",
            )
        upload.committing = True
        task = asyncio.create_task(self._commit(upload))
        self._commits[upload.upload_id] = task
        task.add_done_callback(lambda done: self._finish(upload, done))
        return task

    async def close(self) -> None:
        """Cancel what is in progress."""
        tasks = list(self._commits.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._uploads.settle()

    def _finish(self, upload: Upload, task: asyncio.Task[AdapterVersion]) -> None:
        self._commits.pop(upload.upload_id, None)
        error = None if task.cancelled() else task.exception()
        refused = isinstance(error, FailedPreconditionError | AbortedError)
        result = "ok" if error is None else "refused" if refused else "failed"
        self._metrics.pushes.labels(result).inc()
        fields: dict[str, Any] = {
            "run_id": upload.declaration.run_id,
            "policy_version": upload.declaration.policy_version,
        }
        if isinstance(error, TetherError):
            fields["reason"] = error.reason
        log_event(log, "adapter push", result=result, **fields)

    async def _commit(self, upload: Upload) -> AdapterVersion:
        try:
            async with self._turn:
                return await self._take_in(upload)
        finally:
            await self._uploads.drop(upload)

    async def _take_in(self, upload: Upload) -> AdapterVersion:
        watch = Stopwatch(lambda stage, seconds: self._metrics.push_seconds.labels(stage).observe(seconds))
        declaration = upload.declaration
        config = await asyncio.to_thread(verify_files, upload, self._prover.description, watch)
        _reach("push.verified")
        created = time.time()
        with watch.stage("store"):
            folder = await asyncio.to_thread(self._store, upload, config, created)
        adapter = self._name(declaration, folder)
        try:
            _reach("push.stored")
            with self._registry.hold_before(*declaration.key) as before:
                candidate = Candidate(adapter, declaration, before)
                mean = await self._prover.load(candidate, watch, lambda: self._check_still(upload))
        except BaseException:  # cancellation too must leave nothing behind
            await asyncio.to_thread(self._uploads.storage.remove, folder)
            raise
        result = PushResult(tuple(watch.seconds), mean)
        version = AdapterVersion(adapter, declaration, upload.upload_id, result, created)
        self._registry.add(version, epoch=upload.epoch)
        self._metrics.adapter_bytes.set(declaration.size_bytes)
        return version

    def _check_still(self, upload: Upload) -> None:
        """Refuse what became wrong while it was verified."""
        _reach("push.proven")
        declaration = upload.declaration
        self._fence.check(declaration.run_id, upload.epoch)
        if self._registry.find(*declaration.key) is not None:
            raise _version_exists(declaration)

    def _store(self, upload: Upload, config: dict[str, Any], created: float) -> Path:
        declaration, stored = upload.declaration, json.dumps(config, indent=2).encode()
        manifest = Manifest(
            upload_id=upload.upload_id,
            base_model_sha256=self._prover.description.base_model_sha256,
            config_sha256=hashlib.sha256(stored).hexdigest(),
            created=created,
            declaration=declaration,
        )
        return self._uploads.storage.store(
            upload.upload_id,
            (declaration.run_id, declaration.policy_version, declaration.weights_sha256),
            {CONFIG_NAME: stored, MANIFEST_NAME: write_manifest(manifest)},
        )

    def _name(self, declaration: Declaration, folder: Path) -> LoadedAdapter:
        """Return the adapter as the engine gets it, under a number and a name that were never used before."""
        number = next(self._numbers)
        run_id, version = declaration.key
        # The number makes the name new even if a deleted version is pushed again: engines cache by name.
        return LoadedAdapter(
            number, f"{run_id}@{version}.{number}", run_id, version, declaration.weights_sha256, folder
        )

    async def take_back(self, manifest: Manifest, folder: Path) -> None:
        """Load and prove a version that an earlier process has stored, its files checked.

        Raises:
            FailedPreconditionError: It belongs to another base, is too large in rank, or is not what it was.
        """
        description, declaration = self._prover.description, manifest.declaration
        if manifest.base_model_sha256 != description.base_model_sha256:
            raise refuse("it was stored for another base model.", reason="WRONG_BASE_MODEL")
        if declaration.rank > description.max_lora_rank:
            raise refuse(f"its rank {declaration.rank} is above adapters.max_rank.", reason="RANK_TOO_LARGE")
        watch, adapter = Stopwatch(lambda stage, seconds: None), self._name(declaration, folder)
        with self._registry.hold_before(*declaration.key) as before:
            mean = await self._prover.load(Candidate(adapter, declaration, before), watch, lambda: None)
        result = PushResult(tuple(watch.seconds), mean)
        self._registry.add(AdapterVersion(adapter, declaration, manifest.upload_id, result, manifest.created))


def _reach(point: str) -> None:
    with reporting_full_disk():
        reach(point)


def _version_exists(declaration: Declaration) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"Version {declaration.policy_version} of run {declaration.run_id} is stored with other content.",
        field="policy_version",
        reason="VERSION_EXISTS",
    )


def verify_files(upload: Upload, description: EngineDescription, watch: Stopwatch) -> dict[str, Any]:
    """Return the configuration to store, after every check that needs no engine."""
    shape = AdapterShape(upload.declaration.rank, upload.declaration.target_modules)
    weights = upload.folder / WEIGHTS_NAME
    with watch.stage("hash"):
        for file in upload.declaration.files:
            check_hash(upload.folder / file.name, file.sha256)
    with watch.stage("header"):
        config = normalise_adapter_config((upload.folder / CONFIG_NAME).read_bytes(), shape)
        entries: dict[str, TensorEntry] = read_safetensors_header(weights)
        check_tensors(entries, expected_tensors(description.linear_shapes, shape))
    with watch.stage("tensors"):
        check_finite(weights, entries)
    return config
