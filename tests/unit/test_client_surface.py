"""The public surface of the client, checked against the contract and against a fresh interpreter."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import tether
from tether.channel_options import EFFECT_FREE_METHODS, channel_options, service_config
from tether.v1 import adapter_pb2, generator_pb2, orchestrator_pb2, reference_pb2, reward_model_pb2, reward_pb2

CONTRACT = (generator_pb2, adapter_pb2, reward_pb2, reward_model_pb2, reference_pb2, orchestrator_pb2)
METHODS_WITH_EFFECT = {
    "BeginPush",
    "PushChunks",
    "CommitPush",
    "ActivateAdapter",
    "RollbackAdapter",
    "DeleteAdapter",
    "StartRun",
    "CancelRun",
    "ResumeRun",
    "RollbackRun",
    "LoadRewardModel",
    "UnloadRewardModel",
    "SetDefaultRewardModel",
    "SetShadow",
    "ClearShadow",
}
VALUES = [
    (tether.Completion, generator_pb2.Completion),
    (tether.Generation, generator_pb2.GenerateResponse),
    (tether.GeneratorState, generator_pb2.GetGeneratorResponse),
    (tether.Message, generator_pb2.ChatMessage),
    (tether.SamplingParams, generator_pb2.SamplingParams),
    (tether.ScoreItem, reward_pb2.ScoreItem),
    (tether.ItemScore, reward_pb2.ItemScore),
    (tether.ScoreComponent, reward_pb2.ScoreComponent),
    (tether.ScoreResult, reward_pb2.ScoreResponse),
    (tether.CompareResult, reward_pb2.CompareResponse),
    (tether.PairPreference, reward_pb2.PairPreference),
    (tether.RewardModel, reward_pb2.RewardModel),
    (tether.LoadedRewardModel, reward_model_pb2.LoadedRewardModel),
    (tether.ScoreCacheState, reward_model_pb2.ScoreCacheState),
    (tether.RewardModelShadow, reward_model_pb2.RewardModelShadow),
    (tether.LogprobItem, reference_pb2.LogprobItem),
    (tether.ItemLogprobs, reference_pb2.ItemLogprobs),
    (tether.LogprobResult, reference_pb2.ComputeLogprobsResponse),
    (tether.ReferenceState, reference_pb2.GetReferenceResponse),
    (tether.Run, orchestrator_pb2.Run),
    (tether.Rollback, orchestrator_pb2.Rollback),
    (tether.StepEvent, orchestrator_pb2.StepEvent),
    (tether.StepState, orchestrator_pb2.StepState),
    (tether.SampleCounts, orchestrator_pb2.SampleCounts),
    (tether.Adapter, adapter_pb2.Adapter),
    (tether.AdapterProbe, adapter_pb2.AdapterProbe),
    (tether.CommitStage, adapter_pb2.CommitStage),
    (tether.PushResult, adapter_pb2.CommitPushResponse),
    (tether.ActiveAdapter, adapter_pb2.GetActiveAdapterResponse),
]


def services() -> dict[str, list[str]]:
    return {
        service.full_name: [method.name for method in service.methods]
        for module in CONTRACT
        for service in module.DESCRIPTOR.services_by_name.values()
    }


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_import_tether_loads_nothing_heavy() -> None:
    loaded = run_python("import json, sys, tether; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))")
    heavy = {
        "torch",
        "pydantic",
        "numpy",
        "transformers",
        "vllm",
        "peft",
        "rich",
        "prometheus_client",
        "tether_services",
    }
    assert not heavy & set(json.loads(loaded))


def test_all_is_sorted_complete_and_importable() -> None:
    assert tether.__all__ == sorted(tether.__all__)
    for name in tether.__all__:
        assert getattr(tether, name) is not None
    public = {name for name, value in vars(tether).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(tether.__all__) - {"__version__"}


def test_every_client_class_and_error_of_the_package_is_exported() -> None:
    found = set()
    for module in pkgutil.iter_modules(tether.__path__):
        if module.ispkg:
            continue
        for name, value in vars(importlib.import_module(f"tether.{module.name}")).items():
            ours = inspect.isclass(value) and value.__module__.startswith("tether.")
            if ours and (name.endswith("Client") or issubclass(value, Exception)):
                found.add(name)
    assert found - {"ServiceClient"} <= set(tether.__all__)


@pytest.mark.parametrize(("value", "message"), VALUES, ids=lambda item: str(getattr(item, "__name__", item)))
def test_values_have_the_field_names_of_the_contract(value: Any, message: Any) -> None:
    names = {field.name for field in dataclasses.fields(value)}
    assert names == {field.name for field in message.DESCRIPTOR.fields}
    assert value.__dataclass_params__.frozen
    assert "__slots__" in vars(value)


def test_every_value_field_has_a_docstring_in_the_source() -> None:
    for value, _message in VALUES:
        body = inspect.getsource(value)
        assert body.count('"""') // 2 >= len(dataclasses.fields(value)) + 1, value


def test_every_method_is_either_repeatable_or_has_an_effect() -> None:
    repeatable = {name for names in EFFECT_FREE_METHODS.values() for name in names}
    known = {name for names in services().values() for name in names}
    assert repeatable | METHODS_WITH_EFFECT | {"WatchRun"} == known
    assert not repeatable & METHODS_WITH_EFFECT
    for service, names in EFFECT_FREE_METHODS.items():
        assert set(names) <= set(services()[service])


def test_methods_with_an_effect_carry_a_request_id_or_are_idempotent_by_run() -> None:
    by_run = {"StartRun", "CancelRun", "ResumeRun", "PushChunks"}
    for module in CONTRACT:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if method.name in METHODS_WITH_EFFECT - by_run:
                    assert "request_id" in method.input_type.fields_by_name, method.full_name


def test_only_unavailable_is_retried_and_only_for_named_methods() -> None:
    (entry,) = service_config()["methodConfig"]
    assert entry["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert entry["retryPolicy"]["maxAttempts"] <= 5  # gRPC caps it there without a word
    assert all(set(name) == {"service", "method"} for name in entry["name"])


def test_no_channel_option_is_given_twice() -> None:
    names = [name for name, _value in channel_options()]
    assert len(names) == len(set(names))


def test_synchronous_methods_keep_the_signature_and_documentation_of_the_async_ones() -> None:
    assert inspect.signature(tether.Client.generate) == inspect.signature(tether.GeneratorClient.generate)
    assert inspect.signature(tether.Client.score_items) == inspect.signature(tether.RewardClient.score)
    assert tether.Client.get_run.__doc__ == tether.OrchestratorClient.get_run.__doc__


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert tether.__version__ == version("tether")
