"""Bad adapters, one by one: a typed error, nothing stored, the old version serves on, the service stays healthy."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save

from tests.rpc.adapter_files import (
    AdapterBytes,
    activate,
    begin_request,
    commit,
    commit_request,
    delete_request,
    fake_adapter,
    fake_probe,
    fake_tensors,
    list_adapters,
    push,
    push_fakes,
    rollback_request,
    upload,
)
from tests.rpc.generator_serving import Refusal, Serving, refusal, serve_generator, settings
from tests.rpc.serving import health, run
from tether.v1 import adapter_pb2
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME

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


def declared(name: str, *, size_bytes: int = 10, sha256: str = "0" * 64) -> adapter_pb2.AdapterFile:
    return adapter_pb2.AdapterFile(name=name, size_bytes=size_bytes, sha256=sha256)


def probe_with_base(base_logprobs: list[float]) -> adapter_pb2.AdapterProbe:
    return adapter_pb2.AdapterProbe(token_ids=[1, 2], logprobs=[-1.0], base_logprobs=base_logprobs)


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


@pytest.mark.parametrize(
    ("reason", "field", "changes"),
    [
        ("WRONG_BASE_MODEL", "base_model_sha256", {"base_model_sha256": "a" * 64}),
        ("RANK_TOO_LARGE", "rank", {"rank": 9}),
        ("UNKNOWN_TARGET_MODULE", "target_modules[1]", {"target_modules": ["q_proj", "w_proj"]}),
        ("UNKNOWN_TARGET_MODULE", "target_modules[0]", {"target_modules": ["self_attn"]}),
        ("UNKNOWN_TARGET_MODULE", "target_modules[0]", {"target_modules": [".*"]}),
    ],
)
def test_adapter_that_does_not_fit_is_refused_before_any_byte(reason: str, field: str, changes: dict[str, Any]) -> None:
    refused = refuse_begin(**changes)
    assert (refused.code, refused.reason, refused.fields) == (FAILED, reason, (field,))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("request_id", {"request_id": "seven"}),
        ("request_id", {"request_id": ""}),
        ("run_id", {"run_id": "../../../etc"}),
        ("run_id", {"run_id": ".."}),
        ("run_id", {"run_id": "a/b"}),
        ("run_id", {"run_id": "/tmp"}),
        ("run_id", {"run_id": "run\n"}),
        ("run_id", {"run_id": ""}),
        ("run_id", {"run_id": "x" * 65}),
        ("policy_version", {"policy_version": 0}),
        ("policy_version", {"policy_version": -1}),
        ("policy_version", {"policy_version": 2**62}),
        ("base_model_sha256", {"base_model_sha256": "xyz"}),
        ("rank", {"rank": 0}),
        ("rank", {"rank": -4}),
        ("epoch", {"epoch": 0}),
        ("epoch", {"epoch": -1}),
        ("target_modules", {"target_modules": []}),
        ("files", {"files": []}),
        ("files", {"files": [declared(CONFIG_NAME)]}),
        ("files", {"files": [declared(CONFIG_NAME), declared(CONFIG_NAME)]}),
        ("files", {"files": [declared(CONFIG_NAME), declared("adapter_model.bin")]}),
        ("files", {"files": [declared(CONFIG_NAME), declared("../adapter_model.safetensors")]}),
        ("files", {"files": [declared(CONFIG_NAME), declared("/etc/passwd")]}),
        ("files", {"files": [declared(CONFIG_NAME), declared(WEIGHTS_NAME), declared("tokenizer.json")]}),
        ("files[1].size_bytes", {"files": [declared(CONFIG_NAME), declared(WEIGHTS_NAME, size_bytes=0)]}),
        ("files[1].size_bytes", {"files": [declared(CONFIG_NAME), declared(WEIGHTS_NAME, size_bytes=-1)]}),
        ("files[1].size_bytes", {"files": [declared(CONFIG_NAME), declared(WEIGHTS_NAME, size_bytes=2**62)]}),
        ("files[0].size_bytes", {"files": [declared(CONFIG_NAME, size_bytes=65_537), declared(WEIGHTS_NAME)]}),
        ("files", {"files": [declared(CONFIG_NAME), declared(WEIGHTS_NAME, size_bytes=99_995)]}),
        ("files[0].sha256", {"files": [declared(CONFIG_NAME, sha256="A" * 64), declared(WEIGHTS_NAME)]}),
        ("probes", {"probes": []}),
        ("probes", {"probes": [fake_probe(2)] * 17}),
        ("probes[0].token_ids", {"probes": [adapter_pb2.AdapterProbe(token_ids=[1])]}),
        ("probes[0].token_ids", {"probes": [fake_probe(2, [1] * 257)]}),
        ("probes[0].token_ids[1]", {"probes": [adapter_pb2.AdapterProbe(token_ids=[1, 9999], logprobs=[-1.0])]}),
        ("probes[0].logprobs", {"probes": [adapter_pb2.AdapterProbe(token_ids=[1, 2], logprobs=[-1.0, -1.0])]}),
        ("probes[0].logprobs", {"probes": [adapter_pb2.AdapterProbe(token_ids=[1, 2], logprobs=[float("nan")])]}),
        ("probes[0].logprobs", {"probes": [adapter_pb2.AdapterProbe(token_ids=[1, 2], logprobs=[0.5])]}),
        ("probes[0].base_logprobs", {"probes": [probe_with_base([-1.0, -1.0])]}),
        ("probes[0].base_logprobs", {"probes": [probe_with_base([float("inf")])]}),
    ],
)
def test_announcement_out_of_range_names_the_field(field: str, changes: dict[str, Any]) -> None:
    refused = refuse_begin(**changes)
    assert (refused.code, refused.fields) == (INVALID, (field,))


def test_bytes_that_do_not_match_their_hash_are_refused() -> None:
    adapter = fake_adapter(2)
    swapped = AdapterBytes(adapter.config, fake_adapter(3).weights, adapter.rank, adapter.targets)
    assert len(swapped.weights) == len(adapter.weights)
    refused = refuse_push(swapped, files=begin_request(adapter, "run-a", 2).files)
    assert (refused.code, refused.reason) == (FAILED, "HASH_MISMATCH")


def pickle_bytes() -> bytes:
    """A pickle that would leave a trace if anything loaded it."""

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, ("raise SystemExit('a pickle was loaded')",))

    buffer = io.BytesIO()
    pickle.dump(Trap(), buffer)
    return buffer.getvalue()


def with_raw_header(change: Callable[[bytes], bytes]) -> bytes:
    """Right tensors behind a header that the library which loads them would not take."""
    weights = fake_adapter(2).weights
    size = struct.unpack("<Q", weights[:8])[0]
    header = change(weights[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + weights[8 + size :]


@pytest.mark.parametrize(
    "weights",
    [
        b"x",
        b"\x00" * 8,
        b"not a safetensors file at all, but long enough to be read as one",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100_000_000) + b"{}" * 50,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 20_000) + b"[" * 20_000,
        with_raw_header(lambda raw: b" " + raw),
        with_raw_header(lambda raw: raw.decode().encode("utf-16")),
        fake_adapter(2).weights[:-1],
        fake_adapter(2).weights[:200],
        fake_adapter(2).weights + b"\x00" * 4,
        pickle_bytes(),
        b"PK\x03\x04" + b"\x00" * 100,
    ],
    ids=[
        "one byte",
        "no header",
        "text",
        "huge header",
        "header past the end",
        "list header",
        "broken json",
        "deep json",
        "space before the header",
        "header in utf-16",
        "truncated",
        "half a header",
        "too long",
        "pickle",
        "zip",
    ],
)
def test_what_is_not_safetensors_is_refused(weights: bytes) -> None:
    refused = refuse_push(fake_adapter(weights=weights))
    assert (refused.code, refused.reason) == (FAILED, "NOT_SAFETENSORS")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[A_NAME].update(data_offsets=[0, 2**50]),
        lambda header: header[A_NAME].update(data_offsets=[-64, 0]),
        lambda header: header[A_NAME].update(data_offsets=[64, 0]),
        lambda header: header[A_NAME].update(data_offsets="all"),
        lambda header: header[A_NAME].update(shape=[-2, -8]),
        lambda header: header[A_NAME].update(shape=[2**33, 2**33]),
        lambda header: header[A_NAME].update(shape=[1.5, 8]),
        lambda header: header[A_NAME].update(shape=[True, 16]),
        lambda header: header[A_NAME].pop("shape"),
        lambda header: header.update({A_NAME: "a string"}),
        lambda header: header.update(extra={"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}),
        lambda header: header.update(__metadata__=["pt"]),
        lambda header: header.update(__metadata__={"format": 1}),
    ],
)
def test_tampered_header_is_refused(change: Callable[[Header], None]) -> None:
    refused = refuse_push(with_header(change))
    assert (refused.code, refused.reason) == (FAILED, "NOT_SAFETENSORS")


def test_type_that_no_adapter_has_is_refused() -> None:
    tensors = {name: value.astype(np.float64) for name, value in fake_tensors(2).items()}
    assert refuse_push(fake_adapter(tensors=tensors)).reason == "BAD_DTYPE"
    strange = with_header(lambda header: header[A_NAME].update(dtype=["F32"]))
    assert refuse_push(strange).reason == "BAD_DTYPE"


@pytest.mark.parametrize(
    ("reason", "adapter"),
    [
        ("UNKNOWN_TENSOR", renamed("model.layers", "foo.layers")),
        ("UNKNOWN_TENSOR", renamed("base_model.model.", "")),
        ("UNKNOWN_TENSOR", renamed("v_proj", "k_proj")),
        ("UNKNOWN_TENSOR", renamed("lora_A.weight", "lora_A.default.weight")),
        ("UNKNOWN_TENSOR", renamed("layers.1", "layers.7")),
        ("MISSING_TENSOR", fake_adapter(tensors={k: v for k, v in fake_tensors(2).items() if "layers.1" not in k})),
        ("MISSING_TENSOR", fake_adapter(tensors={k: v for k, v in fake_tensors(2).items() if "lora_B" not in k})),
        ("WRONG_SHAPE", fake_adapter(tensors={k: v.T.copy() for k, v in fake_tensors(2).items()})),
        ("WRONG_SHAPE", fake_adapter(tensors=fake_tensors(2, rank=4))),
        ("UNKNOWN_TENSOR", fake_adapter(tensors=fake_tensors(2) | {"extra": np.zeros(4, dtype=np.float32)})),
        ("MISSING_TENSOR", fake_adapter(weights=save({}))),
    ],
)
def test_wrong_names_and_shapes_are_refused(reason: str, adapter: AdapterBytes) -> None:
    refused = refuse_push(adapter)
    assert (refused.code, refused.reason) == (FAILED, reason)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_infinities_and_nans_are_refused(poison: float, kind: Any) -> None:
    tensors = {name: value.astype(kind) for name, value in fake_tensors(2).items()}
    tensors[A_NAME][1, 3] = poison
    refused = refuse_push(fake_adapter(tensors=tensors))
    assert (refused.code, refused.reason) == (FAILED, "NOT_FINITE")


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"peft_type": ...},
        {"r": 3},
        {"r": "2"},
        {"r": True},
        {"lora_alpha": "16"},
        {"lora_alpha": 0},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"target_modules": ["q_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj", 7]},
        {"use_rslora": "yes"},
        {"lora_alpha": 10**400},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 64}},
        {"alpha_pattern": {"q_proj": 64}},
        {"layers_to_transform": [0]},
        {"layer_replication": [[0, 1]]},
        {"alora_invocation_tokens": [1]},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1, 2]},
        {"exclude_modules": ["q_proj"]},
        {"something_new": 1},
    ],
)
def test_configuration_that_asks_for_more_is_refused(changes: dict[str, Any]) -> None:
    refused = refuse_push(fake_adapter(2).with_config(**changes))
    assert (refused.code, refused.reason) == (FAILED, "BAD_ADAPTER_CONFIG")


@pytest.mark.parametrize("config", [b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 30_000, pickle_bytes()])
def test_configuration_that_is_no_json_object_is_refused(config: bytes) -> None:
    adapter = fake_adapter(2)
    refused = refuse_push(AdapterBytes(config, adapter.weights, adapter.rank, adapter.targets))
    assert (refused.code, refused.reason) == (FAILED, "BAD_ADAPTER_CONFIG")


def test_false_proof_is_refused() -> None:
    refused = refuse_push(fake_adapter(2), probes=[fake_probe(3)])
    assert (refused.code, refused.reason, refused.fields) == (FAILED, "PROOF_FAILED", ("probes",))


def test_adapter_with_less_effect_than_where_it_was_trained_is_refused() -> None:
    probe = fake_probe(2)
    probe.base_logprobs.extend(value - 5.0 for value in probe.logprobs)  # the fake base is at most 1 nat away
    refused = refuse_push(fake_adapter(2), probes=[probe])
    assert (refused.code, refused.reason, refused.fields) == (FAILED, "EFFECT_TOO_SMALL", ("probes",))


def test_calls_that_change_state_check_their_fields() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            for changes, field in (
                ({"request_id": "x"}, "request_id"),
                ({"run_id": "../x"}, "run_id"),
                ({"policy_version": -1}, "policy_version"),
                ({"expected_run_id": "/"}, "expected_run_id"),
                ({"expected_policy_version": -1}, "expected_policy_version"),
                ({"epoch": 0}, "epoch"),
            ):
                fields: dict[str, Any] = {"run_id": "run-a", "version": 1} | {}
                refused = await refusal(activate_with(serving, fields, changes))
                assert (refused.code, refused.fields) == (INVALID, (field,)), changes
            for changes, field in (
                ({"request_id": "x"}, "request_id"),
                ({"run_id": ".."}, "run_id"),
                ({"policy_version": 0}, "policy_version"),
                ({"epoch": 0}, "epoch"),
            ):
                deletion = delete_request("run-a", 1, **changes)
                refused = await refusal(serving.adapters.DeleteAdapter(deletion, timeout=5))
                assert (refused.code, refused.fields) == (INVALID, (field,)), changes
            for changes, field in (
                ({"request_id": ""}, "request_id"),
                ({"run_id": ""}, "run_id"),
                ({"expected_policy_version": -1}, "expected_policy_version"),
                ({"epoch": -1}, "epoch"),
            ):
                rollback = rollback_request("run-a", 1, **changes)
                refused = await refusal(serving.adapters.RollbackAdapter(rollback, timeout=5))
                assert (refused.code, refused.fields) == (INVALID, (field,)), changes
            for changes, field in (({"request_id": "x"}, "request_id"), ({"epoch": 0}, "epoch")):
                bad = commit_request("y", **changes)
                assert (await refusal(serving.adapters.CommitPush(bad, timeout=5))).fields == (field,)
            unknown = await refusal(commit(serving.adapters, "../../etc/passwd"))
            assert (unknown.code, unknown.fields) == (grpc.StatusCode.NOT_FOUND, ("upload_id",))
            await still_fine(serving)

    run(scenario())


async def activate_with(serving: Serving, fields: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Activate with fields replaced."""
    changed = dict(changes)
    run_id = changed.pop("run_id", fields["run_id"])
    version = changed.pop("policy_version", fields["version"])
    return await activate(serving.adapters, run_id, version, **changed)


def test_errors_name_no_path_of_the_server() -> None:
    refused = [
        refuse_push(fake_adapter(weights=b"x")),
        refuse_push(fake_adapter(2), probes=[fake_probe(3)]),
        refuse_begin(run_id="../../etc"),
    ]
    for error in refused:
        assert "tether-adapters" not in error.message
        assert "staging" not in error.message
