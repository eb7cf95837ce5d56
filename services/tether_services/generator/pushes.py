"""From an announced adapter to a proven one: verify, store, load, prove. A failed check leaves nothing behind."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tether.errors import FailedPreconditionError, InvalidArgumentError, TetherError
from tether_services.generator.adapters import AdapterRegistry, AdapterVersion, PushResult
from tether_services.generator.engine import Engine, EngineDescription, LoadedAdapter
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.generator.uploads import Declaration, Upload, Uploads
from tether_services.generator.verification import (
    CONFIG_NAME,
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
from tether_services.runtime.logging import log_event

log = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-3
"""Mean |delta logprob| in nats between two float32 implementations; measured 1e-6, so this is generous."""
REDUCED_TOLERANCE = 0.05
"""The same in bfloat16 or float16."""


@dataclass(slots=True)
class _Stopwatch:
    """Times the stages of one commit."""

    observe: Callable[[str, float], None]
    seconds: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds.append((name, time.monotonic() - started))
        self.observe(*self.seconds[-1])


class AdapterPushes:
    """Takes adapters in, one commit at a time."""

    def __init__(
        self,
        engine: Engine,
        registry: AdapterRegistry,
        uploads: Uploads,
        metrics: GeneratorMetrics,
        *,
        tolerance: float | None,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._uploads = uploads
        self._metrics = metrics
        self._tolerance = tolerance
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._commits: dict[str, asyncio.Task[AdapterVersion]] = {}

    def begin(self, declaration: Declaration) -> tuple[str, int]:
        """Return (upload id, bytes already there) for an announced adapter.

        Raises:
            FailedPreconditionError: The version exists with other content.
            TetherError: Whatever `Uploads.begin` refuses.
        """
        for version in self._registry.all():
            same = version.declaration.same_content(declaration)
            if same and not version.retiring:
                return version.upload_id, declaration.size_bytes
            if version.declaration.request_id == declaration.request_id and not same:
                raise InvalidArgumentError("This request_id was used for another adapter.", field="request_id")
            if version.declaration.key == declaration.key:
                state = "being retired; try again shortly" if version.retiring else "stored with other content"
                raise FailedPreconditionError(
                    f"Version {declaration.policy_version} of run {declaration.run_id} is {state}.",
                    field="policy_version",
                    reason="VERSION_EXISTS",
                )
        upload = self._uploads.begin(declaration)
        return upload.upload_id, upload.received_bytes

    async def commit(self, upload_id: str) -> AdapterVersion:
        """Return the proven adapter of an upload, doing the work at most once. Goes on if the caller leaves.

        Raises:
            NotFoundError: There is no such upload.
            FailedPreconditionError: Bytes are missing, or a check failed; its reason names the check.
        """
        for version in self._registry.all():
            if version.upload_id == upload_id:
                return version
        if upload_id not in self._commits:
            upload = self._uploads.get(upload_id)
            if upload.received_bytes < upload.declaration.size_bytes:
                raise FailedPreconditionError(
                    f"{upload.received_bytes} of {upload.declaration.size_bytes} bytes have arrived; send the rest.",
                    field="upload_id",
                    reason="UPLOAD_INCOMPLETE",
                )
            upload.committing = True
            task = asyncio.create_task(self._commit(upload))
            self._commits[upload_id] = task
            task.add_done_callback(lambda done: self._finish(upload, done))
        return await asyncio.shield(self._commits[upload_id])

    async def close(self) -> None:
        """Cancel what is in progress."""
        tasks = list(self._commits.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finish(self, upload: Upload, task: asyncio.Task[AdapterVersion]) -> None:
        self._commits.pop(upload.upload_id, None)
        self._uploads.forget(upload)
        error = None if task.cancelled() else task.exception()
        result = "ok" if error is None else "refused" if isinstance(error, FailedPreconditionError) else "failed"
        self._metrics.pushes.labels(result).inc()
        fields: dict[str, Any] = {
            "run_id": upload.declaration.run_id,
            "policy_version": upload.declaration.policy_version,
        }
        if isinstance(error, TetherError):
            fields["reason"] = error.reason
        log_event(log, "adapter push", result=result, **fields)

    async def _commit(self, upload: Upload) -> AdapterVersion:
        watch = _Stopwatch(lambda stage, seconds: self._metrics.push_seconds.labels(stage).observe(seconds))
        declaration = upload.declaration
        async with self._turn:
            config = await asyncio.to_thread(verify_files, upload, self._engine.description, watch)
            adapter = await self._store(upload, config, watch)
            try:
                mean = await self._load_and_prove(adapter, declaration, watch)
            except BaseException:  # cancellation too must leave nothing behind
                await asyncio.to_thread(self._uploads.storage.remove, adapter.folder)
                raise
            version = AdapterVersion(adapter, declaration, upload.upload_id, PushResult(tuple(watch.seconds), mean))
            self._registry.add(version)
            self._metrics.adapter_bytes.set(declaration.size_bytes)
            return version

    async def _store(self, upload: Upload, config: dict[str, Any], watch: _Stopwatch) -> LoadedAdapter:
        declaration = upload.declaration
        sha256 = next(file.sha256 for file in declaration.files if file.name == WEIGHTS_NAME)
        target = (declaration.run_id, declaration.policy_version, sha256)
        with watch.stage("store"):
            folder = await asyncio.to_thread(self._uploads.storage.store, upload.upload_id, target, config)
        number = next(self._numbers)
        # The number makes the name new even if a deleted version is pushed again: engines cache by name.
        name = f"{declaration.run_id}@{declaration.policy_version}.{number}"
        return LoadedAdapter(number, name, declaration.run_id, declaration.policy_version, sha256, folder)

    async def _load_and_prove(self, adapter: LoadedAdapter, declaration: Declaration, watch: _Stopwatch) -> float:
        try:
            with watch.stage("load"):
                await self._engine.load_adapter(adapter)
        except Exception as error:  # an engine may refuse for reasons of its own; the old version keeps serving
            log.error("engine refused an adapter", exc_info=error)
            raise refuse("the engine could not load it.", reason="LOAD_FAILED") from error
        try:
            with watch.stage("prove"):
                return await self._prove(adapter, declaration)
        except BaseException:  # an interruption too must leave nothing half-done
            await self._engine.unload_adapter(adapter)
            raise

    async def _prove(self, adapter: LoadedAdapter, declaration: Declaration) -> float:
        """Return the mean |delta logprob| of the probes after checking the adapter against them and the base."""
        claimed = [value for probe in declaration.probes for value in probe.logprobs]
        sequences = [probe.token_ids for probe in declaration.probes]
        served = [value for row in await self._engine.compute_logprobs(sequences, adapter) for value in row]
        base = [value for row in await self._engine.compute_logprobs(sequences, None) for value in row]
        tolerance = self._tolerance or default_tolerance(self._engine.description.dtype)
        check_proof(served, base, declaration.differs_from_base, tolerance=tolerance)
        return check_claim(served, claimed, tolerance=tolerance)


def default_tolerance(dtype: str) -> float:
    """Return the largest mean |delta logprob| in nats that two correct implementations show."""
    return FLOAT32_TOLERANCE if dtype == "float32" else REDUCED_TOLERANCE


def verify_files(upload: Upload, description: EngineDescription, watch: _Stopwatch) -> dict[str, Any]:
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


def check_claim(served: list[float], claimed: list[float], *, tolerance: float) -> float:
    """Return the mean |served - claimed| in nats; refuse one above the tolerance."""
    mean = math.fsum(abs(a - b) for a, b in zip(served, claimed, strict=True)) / len(claimed)
    if not mean <= tolerance:  # also true for NaN
        raise refuse(
            f"its probes' log-probabilities are off by {mean:.3g} nats on average; {tolerance:g} is accepted.",
            reason="PROOF_FAILED",
            field="probes",
        )
    return mean


def check_proof(served: list[float], base: list[float], differs_from_base: bool, *, tolerance: float) -> None:
    """Refuse an adapter that has no effect although it should, or has one although it should not."""
    largest = max(abs(a - b) for a, b in zip(served, base, strict=True))
    if differs_from_base and largest == 0:
        raise refuse("loaded, it changes nothing.", reason="SAME_AS_BASE", field="differs_from_base")
    if not differs_from_base and not largest <= tolerance:
        raise refuse(
            f"it was declared equal to the base model but differs by up to {largest:.3g} nats.",
            reason="DIFFERS_FROM_BASE",
            field="differs_from_base",
        )
