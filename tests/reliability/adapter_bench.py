"""A served generator to which adapters are offered, and the truth about what it stores and serves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from tests.reliability.world import World, WorldPlan, open_world
from tests.rpc.adapter_files import AdapterBytes, activate, begin_request, commit, fake_adapter, push, upload
from tether.v1 import adapter_pb2, adapter_pb2_grpc
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["RUN", "Bench", "content_of", "open_bench"]

RUN: Final = "trial"
CALL_SECONDS: Final = 30.0


def content_of(weights: bytes, config: Mapping[str, Any]) -> str:
    """Return a hash of everything in an adapter that changes what it computes."""
    meaning = [config.get(key) for key in ("r", "lora_alpha", "use_rslora")] + sorted(config.get("target_modules", []))
    return hashlib.sha256(weights + json.dumps(meaning).encode()).hexdigest()


def intended(adapter: AdapterBytes) -> str:
    """Return the content of an adapter as it was made."""
    return content_of(adapter.weights, {"use_rslora": False, **json.loads(adapter.config)})


@dataclass(slots=True)
class Bench:
    """A generator, its adapter port straight and through the proxy, and the history of what was tried on it."""

    world: World
    straight: adapter_pb2_grpc.AdapterServiceAsyncStub
    """The stub that no fault touches."""

    def offer(self, adapter: AdapterBytes, *, bad_because: str = "") -> None:
        """Record an adapter that the generator is about to be offered."""
        self.world.recorder.record("offered", sha256=intended(adapter), valid=not bad_because, why=bad_because)

    async def push_and_activate(
        self, adapter: AdapterBytes, version: int, *, data: bytes | None = None, **changes: Any
    ) -> None:
        """Push, with other bytes than announced where given, activate, and record each call.

        Raises:
            grpc.aio.AioRpcError: The generator refused.
        """
        call = self.world.recorder.call
        request = begin_request(adapter, RUN, version, **changes)
        upload_id = await call("PushChunks", CALL_SECONDS, upload(self.straight, request, data or adapter.data))
        await self.commit_and_activate(adapter, version, upload_id)

    async def commit_and_activate(self, adapter: AdapterBytes, version: int, upload_id: str) -> None:
        """Commit, record that it was proven, and activate."""
        call = self.world.recorder.call
        await call("CommitPush", 60.0, commit(self.straight, upload_id))
        self.record_proven(adapter, version)
        await self.activate(version)

    def record_proven(self, adapter: AdapterBytes, version: int) -> None:
        """Record that the generator says that it has proven an adapter."""
        self.world.recorder.record(
            "proven", generator="generator", run=RUN, policy_version=version, sha256=intended(adapter)
        )

    async def activate(self, version: int) -> None:
        """Activate a version and record what is really active then."""
        await self.world.recorder.call("ActivateAdapter", 10.0, activate(self.straight, RUN, version))
        await self.observe_active()

    async def observe_active(self) -> tuple[str, int]:
        """Record what is active, by the bytes that lie on the generator's disk, and return its run and version."""
        active = await self.straight.GetActiveAdapter(adapter_pb2.GetActiveAdapterRequest(), timeout=10)
        version = active.policy_version
        content = self.stored_content(version) if version else ""
        self.world.recorder.record(
            "activated", generator="generator", run=active.run_id, policy_version=version, sha256=content
        )
        return active.run_id, version

    def stored_content(self, version: int) -> str:
        """Return the content of a version as it lies on the generator's disk."""
        folders = sorted(self.storage.glob(f"versions/{RUN}/{version}-*"), key=lambda path: path.stat().st_mtime_ns)
        assert folders, f"version {version} is active and not stored"
        config = json.loads((folders[-1] / CONFIG_NAME).read_text())
        return content_of((folders[-1] / WEIGHTS_NAME).read_bytes(), config)

    def left_in_staging(self) -> list[str]:
        """Return what lies in the staging folder."""
        return [path.name for path in self.storage.glob("staging/*")]

    @property
    def storage(self) -> Path:
        """Return the generator's adapter folder."""
        adapters = self.world.plan.settings.get("generator", {}).get("adapters", {})
        return Path(str(adapters.get("folder", self.world.folder / "adapters")))

    async def refused(self, attempt: Any) -> str:
        """Return why a push was refused: status code and reason; empty if it was accepted."""
        try:
            await attempt
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return ""


@asynccontextmanager
async def open_bench(folder: Path, plan: WorldPlan, *, first: bool = True) -> AsyncIterator[Bench]:
    """Yield a served generator, with version 1 active if wanted."""
    async with (
        open_world(folder, plan) as world,
        grpc.aio.insecure_channel(world.addresses["adapter"]) as channel,
    ):
        bench = Bench(world, adapter_pb2_grpc.AdapterServiceStub(channel))
        if first:
            adapter = fake_adapter(1)
            bench.offer(adapter)
            await push(bench.straight, begin_request(adapter, RUN, 1), adapter)
            bench.record_proven(adapter, 1)
            await bench.activate(1)
        yield bench
