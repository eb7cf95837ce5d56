"""Adapters for tests: bytes for the fake base model, PEFT adapters for real ones, and the calls that push them."""

from __future__ import annotations

import hashlib
import json
import uuid
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tether.v1 import adapter_pb2, adapter_pb2_grpc
from tether_services.generator.engines.fake import FAKE_LINEAR_SHAPES, fake_logprob
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROBE_TOKENS = (1, 40, 50, 60, 70)


@dataclass(frozen=True)
class AdapterBytes:
    """The two files of an adapter."""

    config: bytes
    weights: bytes
    rank: int
    targets: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.weights).hexdigest()

    @property
    def data(self) -> bytes:
        """Both files in the order in which they are declared."""
        return self.config + self.weights

    def with_config(self, **changes: Any) -> AdapterBytes:
        """The same weights under a changed configuration; None removes a key."""
        config = json.loads(self.config) | changes
        return replace(self, config=json.dumps({k: v for k, v in config.items() if v is not ...}).encode())


def peft_config(rank: int, targets: Sequence[str], **changes: Any) -> bytes:
    """An adapter_config.json as PEFT writes it, shortened to the keys with a meaning."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
        "lora_dropout": 0.05,
        "base_model_name_or_path": "somewhere/else",
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "peft_version": "0.21.0",
    }
    return json.dumps(config | changes).encode()


def fake_tensors(
    seed: int = 0, *, rank: int = 2, targets: Sequence[str] = ("q_proj", "v_proj")
) -> dict[str, np.ndarray[Any, Any]]:
    """LoRA matrices that fit the fake base model."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for path, (inputs, outputs) in FAKE_LINEAR_SHAPES.items():
        if path.rpartition(".")[2] in targets:
            tensors[f"base_model.model.{path}.lora_A.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32)
            tensors[f"base_model.model.{path}.lora_B.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32)
    return tensors


def fake_adapter(
    seed: int = 0,
    *,
    rank: int = 2,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    weights: bytes | None = None,
) -> AdapterBytes:
    """An adapter for the fake base model; `tensors` or `weights` replace what is right by what is not."""
    if weights is None:
        weights = save(dict(tensors if tensors is not None else fake_tensors(seed, rank=rank, targets=targets)))
    return AdapterBytes(peft_config(rank, targets), weights, rank, tuple(targets))


def read_adapter(folder: Path) -> AdapterBytes:
    """The files of a folder that PEFT has written."""
    config = (folder / CONFIG_NAME).read_bytes()
    parsed = json.loads(config)
    return AdapterBytes(config, (folder / WEIGHTS_NAME).read_bytes(), parsed["r"], tuple(parsed["target_modules"]))


def write_peft_adapter(
    model_folder: Path,
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    targets: Sequence[str] = ALL_LINEAR,
    scale: float = 0.1,
    **options: Any,
) -> Path:
    """Write a LoRA adapter with random A and B for a model and return its folder; scale 0 leaves B at zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(generator=generator, std=parameter.shape[1] ** -0.5)
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    peft_model.save_pretrained(folder)
    return folder


def fake_probe(version: int, token_ids: Sequence[int] = PROBE_TOKENS) -> adapter_pb2.AdapterProbe:
    """What the fake engine says about some tokens under a version."""
    logprobs = [fake_logprob(token_ids, position, version) for position in range(1, len(token_ids))]
    return adapter_pb2.AdapterProbe(token_ids=token_ids, logprobs=logprobs)


def begin_request(adapter: AdapterBytes, run_id: str, version: int, **changes: Any) -> adapter_pb2.BeginPushRequest:
    """A correct announcement of an adapter for the fake base model, with changes."""
    files = [
        adapter_pb2.AdapterFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in ((CONFIG_NAME, adapter.config), (WEIGHTS_NAME, adapter.weights))
    ]
    fields: dict[str, Any] = {
        "request_id": str(uuid.uuid4()),
        "run_id": run_id,
        "policy_version": version,
        "base_model_sha256": FAKE_BASE_SHA256,
        "rank": adapter.rank,
        "target_modules": adapter.targets,
        "files": files,
        "probes": [fake_probe(version)],
        "differs_from_base": True,
        "epoch": 1,
    }
    return adapter_pb2.BeginPushRequest(**(fields | changes))


def chunk(
    begun: adapter_pb2.BeginPushResponse, data: bytes, *, offset: int = 0, **changes: Any
) -> adapter_pb2.PushChunksRequest:
    """One correct chunk of the stream that an announcement has opened, with changes."""
    fields: dict[str, Any] = {
        "upload_id": begun.upload_id,
        "stream": begun.stream,
        "offset": offset,
        "data": data,
        "crc32": zlib.crc32(data),
    }
    return adapter_pb2.PushChunksRequest(**(fields | changes))


async def chunks(
    begun: adapter_pb2.BeginPushResponse, data: bytes, *, offset: int = 0, size: int = 1024 * 1024
) -> AsyncIterator[adapter_pb2.PushChunksRequest]:
    """The bytes from an offset on, in chunks."""
    for start in range(offset, len(data), size):
        yield chunk(begun, data[start : start + size], offset=start)


async def upload(
    stub: adapter_pb2_grpc.AdapterServiceAsyncStub, request: adapter_pb2.BeginPushRequest, data: bytes
) -> str:
    """Announce and send, and return the upload's name."""
    begun = await stub.BeginPush(request, timeout=30)
    if begun.committed_offset < len(data):
        await stub.PushChunks(chunks(begun, data, offset=begun.committed_offset), timeout=30)
    return begun.upload_id


async def push(
    stub: adapter_pb2_grpc.AdapterServiceAsyncStub, request: adapter_pb2.BeginPushRequest, adapter: AdapterBytes
) -> adapter_pb2.CommitPushResponse:
    """Announce, send and commit."""
    return await commit(stub, await upload(stub, request, adapter.data), epoch=request.epoch)


async def commit(
    stub: adapter_pb2_grpc.AdapterServiceAsyncStub, upload_id: str, *, epoch: int = 1
) -> adapter_pb2.CommitPushResponse:
    """Commit an upload."""
    return await stub.CommitPush(commit_request(upload_id, epoch=epoch), timeout=60)


def commit_request(upload_id: str, **changes: Any) -> adapter_pb2.CommitPushRequest:
    """A correct commit with an id of its own, with changes."""
    fields: dict[str, Any] = {"request_id": str(uuid.uuid4()), "upload_id": upload_id, "epoch": 1}
    return adapter_pb2.CommitPushRequest(**(fields | changes))


def delete_request(run_id: str, version: int, /, **changes: Any) -> adapter_pb2.DeleteAdapterRequest:
    """A correct deletion with an id of its own, with changes."""
    fields: dict[str, Any] = {
        "request_id": str(uuid.uuid4()),
        "run_id": run_id,
        "policy_version": version,
        "epoch": 1,
    }
    return adapter_pb2.DeleteAdapterRequest(**(fields | changes))


def rollback_request(run_id: str, version: int, /, **changes: Any) -> adapter_pb2.RollbackAdapterRequest:
    """A correct rollback from a version with an id of its own, with changes."""
    fields: dict[str, Any] = {
        "request_id": str(uuid.uuid4()),
        "run_id": run_id,
        "expected_policy_version": version,
        "epoch": 1,
    }
    return adapter_pb2.RollbackAdapterRequest(**(fields | changes))


async def activate(
    stub: adapter_pb2_grpc.AdapterServiceAsyncStub, run_id: str, version: int, **changes: Any
) -> adapter_pb2.ActivateAdapterResponse:
    """Activate a version, expecting what is active."""
    active = await stub.GetActiveAdapter(adapter_pb2.GetActiveAdapterRequest(), timeout=10)
    fields: dict[str, Any] = {
        "request_id": str(uuid.uuid4()),
        "run_id": run_id,
        "policy_version": version,
        "expected_run_id": active.run_id,
        "expected_policy_version": active.policy_version,
        "epoch": 1,
    }
    return await stub.ActivateAdapter(adapter_pb2.ActivateAdapterRequest(**(fields | changes)), timeout=10)


async def push_fakes(
    stub: adapter_pb2_grpc.AdapterServiceAsyncStub, run_id: str, versions: Iterable[int]
) -> list[AdapterBytes]:
    """Push one fake adapter per version, seeded by its number."""
    adapters = []
    for version in versions:
        adapters.append(fake_adapter(version))
        await push(stub, begin_request(adapters[-1], run_id, version), adapters[-1])
    return adapters


async def list_adapters(stub: adapter_pb2_grpc.AdapterServiceAsyncStub) -> dict[tuple[str, int], str]:
    """The state of every stored adapter, by run and version."""
    response = await stub.ListAdapters(adapter_pb2.ListAdaptersRequest(), timeout=10)
    return {
        (adapter.run_id, adapter.policy_version): adapter_pb2.AdapterState.Name(adapter.state).removeprefix(
            "ADAPTER_STATE_"
        )
        for adapter in response.adapters
    }
