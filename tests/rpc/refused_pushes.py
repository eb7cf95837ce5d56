"""Pushes that a generator has to refuse, and the check that it is as good as before."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

import grpc

from tests.rpc.adapter_files import (
    AdapterBytes,
    activate,
    begin_request,
    commit,
    fake_adapter,
    fake_tensors,
    list_adapters,
    push,
    push_fakes,
    upload,
)
from tests.rpc.generator_serving import Refusal, Serving, refusal, serve_generator, settings
from tests.rpc.serving import health, run
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion

FAILED, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
A_NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Header = dict[str, Any]


async def still_fine(serving: Serving) -> None:
    """Version 1 is active, alone on disk, answers exactly, and everything is healthy."""
    assert await list_adapters(serving.adapters) == {("run-a", 1): "ACTIVE"}
    assert len(serving.stored_files()) == 2
    response = await serving.generate(seed=7)
    expected = fake_completion((1, 40, 50), Sampling(8, seed=7), 1, stream=derive_seed(7, 0))
    assert response.policy_version == 1
    assert list(response.completions[0].token_ids) == expected.token_ids
    for name in ("tether.v1.GeneratorService", "tether.v1.AdapterService", "liveness"):
        assert await health(serving.served.target, name) == 1


def refuse_push(adapter: AdapterBytes, **changes: Any) -> Refusal:
    """Push a bad version 2 over an active version 1 and make sure that nothing came of it."""

    async def scenario() -> Refusal:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            upload_id = await upload(serving.adapters, begin_request(adapter, "run-a", 2, **changes), adapter.data)
            refused = await refusal(commit(serving.adapters, upload_id))
            await still_fine(serving)
            assert (await refusal(commit(serving.adapters, upload_id))).code == grpc.StatusCode.NOT_FOUND
            assert serving.served.value("tether_adapter_push_total", result="refused") == 1
            # The same version can be pushed again, done right.
            good = fake_adapter(5)
            await push(serving.adapters, begin_request(good, "run-a", 2), good)
            return refused

    return run(scenario())


def refuse_begin(**changes: Any) -> Refusal:
    """Announce a bad adapter and make sure that nothing came of it."""

    async def scenario() -> Refusal:
        async with serve_generator(settings(adapters={"max_bytes": 100_000, "max_rank": 8})) as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            request = begin_request(fake_adapter(2), changes.pop("run_id", "run-a"), 2, **changes)
            refused = await refusal(serving.adapters.BeginPush(request, timeout=5))
            await still_fine(serving)
            return refused

    return run(scenario())


def with_header(change: Callable[[Header], None]) -> AdapterBytes:
    """A fake adapter whose safetensors header was tampered with."""
    weights = fake_adapter(2).weights
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    return fake_adapter(weights=struct.pack("<Q", len(raw)) + raw + weights[8 + length :])


def renamed(old: str, new: str) -> AdapterBytes:
    """A fake adapter with part of its tensor names replaced."""
    return fake_adapter(tensors={name.replace(old, new): value for name, value in fake_tensors(2).items()})


def pickle_bytes() -> bytes:
    """A pickle that would leave a trace if anything loaded it."""

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, ("raise SystemExit('a pickle was loaded')",))

    buffer = io.BytesIO()
    pickle.dump(Trap(), buffer)
    return buffer.getvalue()
