"""Bad adapters, one by one: a typed error, nothing stored, the old version serves on, the service stays healthy."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from tests.rpc.adapter_files import (
    AdapterBytes,
    activate,
    commit,
    commit_request,
    delete_request,
    fake_adapter,
    fake_probe,
    push_fakes,
    rollback_request,
)
from tests.rpc.generator_serving import Serving, refusal, serve_generator
from tests.rpc.refused_pushes import pickle_bytes, refuse_begin, refuse_push, still_fine
from tests.rpc.serving import run
from tether.v1 import adapter_pb2
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME

FAILED, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT


def declared(name: str, *, size_bytes: int = 10, sha256: str = "0" * 64) -> adapter_pb2.AdapterFile:
    return adapter_pb2.AdapterFile(name=name, size_bytes=size_bytes, sha256=sha256)


def probe_with_base(base_logprobs: list[float]) -> adapter_pb2.AdapterProbe:
    return adapter_pb2.AdapterProbe(token_ids=[1, 2], logprobs=[-1.0], base_logprobs=base_logprobs)


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
