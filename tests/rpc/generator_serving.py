"""A real generator on loopback ports, in the process of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.rpc.serving import LOCAL, Served, serving
from tether.v1 import adapter_pb2_grpc, generator_pb2, generator_pb2_grpc
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.service import GeneratorService
from tether_services.generator.verification import MANIFEST_NAME

PACKAGED_POLICY = Path(__file__).parents[2] / "services/tether_services/demo/models/policy"
STORIES = Path(__file__).parents[3] / "shared/models/stories260k"

needs_stories = pytest.mark.skipif(
    not STORIES.is_dir(),
    reason=f"the reference model is not there: {STORIES} (../shared is not part of the repository)",
)


@dataclass(frozen=True)
class Serving:
    """A running generator and its stubs."""

    generator: generator_pb2_grpc.GeneratorServiceAsyncStub
    adapters: adapter_pb2_grpc.AdapterServiceAsyncStub
    service: GeneratorService
    served: Served
    admin_target: str

    async def generate(self, prompt: Sequence[int] = (1, 40, 50), **fields: Any) -> generator_pb2.GenerateResponse:
        """Sample from token ids."""
        return await self.generator.Generate(generate_request(prompt, **fields), timeout=60)

    def stored_files(self) -> list[Path]:
        """Every file of an upload or a stored adapter, manifests aside."""
        folder = self.service.storage.folder
        files = (path for path in folder.glob("*/*/**/*") if path.is_file())
        return sorted(path for path in files if path.name != MANIFEST_NAME)


def settings(**changes: Any) -> GeneratorSettings:
    """Settings of a generator for a test: the fake engine on free ports unless changed."""
    return GeneratorSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake", **changes})


@asynccontextmanager
async def serve_generator(given: GeneratorSettings | None = None) -> AsyncIterator[Serving]:
    """Serve until the block ends."""
    given = given or settings()
    services: list[GeneratorService] = []

    def build(registry: Any) -> GeneratorService:
        services.append(GeneratorService(given, registry))
        return services[0]

    async with serving(given, build) as served:
        admin_target = f"127.0.0.1:{served.runner.bound_ports[1]}"
        async with (
            grpc.aio.insecure_channel(served.target) as data_channel,
            grpc.aio.insecure_channel(admin_target) as admin_channel,
        ):
            yield Serving(
                generator_pb2_grpc.GeneratorServiceStub(data_channel),
                adapter_pb2_grpc.AdapterServiceStub(admin_channel),
                services[0],
                served,
                admin_target,
            )


def generate_request(prompt: Sequence[int] = (1, 40, 50), **fields: Any) -> generator_pb2.GenerateRequest:
    """A correct request with 8 new tokens; fields of the request and of its sampling may be given."""
    own: dict[str, Any] = {name: fields.pop(name) for name in ("n", "policy_version", "run_id") if name in fields}
    sampling = generator_pb2.SamplingParams(**({"max_tokens": 8} | fields))
    return generator_pb2.GenerateRequest(prompt_token_ids=prompt, sampling=sampling, **({"n": 1} | own))


@dataclass(frozen=True)
class Refusal:
    """How a call failed."""

    code: grpc.StatusCode
    reason: str
    fields: tuple[str, ...]
    retry_after_seconds: float | None
    message: str


async def refusal(call: Awaitable[object]) -> Refusal:
    """The typed error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, caught.value
    reason, fields, retry = "", (), None
    for packed in status.details:
        info, bad, delay = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            reason = info.reason
        elif packed.Unpack(bad):
            fields = tuple(violation.field for violation in bad.field_violations)
        elif packed.Unpack(delay):
            retry = delay.retry_delay.ToNanoseconds() / 1e9
    return Refusal(caught.value.code(), reason, fields, retry, status.message)
