"""What requests must look like beyond their types: the limits of the contract that no setting changes.

They are JSON Schema keywords by the full name of a field or a message. Limits that a service's settings, its model or
the state decide (items per call, the context, known names) are not here: the comments of the contract state them, and
the service answers with an error that names the field.
"""

from __future__ import annotations

from typing import Any, Final

from tether_services.generator.admin import (
    MAX_EPOCH,
    MAX_PROBE_TOKENS,
    MAX_PROBES,
    MAX_TARGET_MODULES,
    MAX_VERSION,
)
from tether_services.generator.service import MAX_SEED, MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS, MAX_STOPS
from tether_services.orchestrator.run_config import MAX_CONFIG_BYTES
from tether_services.reward.admin import MAX_VERSION_CHARS
from tether_services.reward.comparison import MAX_RESPONSES, MIN_RESPONSES
from tether_services.runtime.checks import NAME_PATTERN, PAGE_TOKEN_PATTERN, SHA256_PATTERN
from tether_services.runtime.text import MAX_MESSAGES, ROLES

Schema = dict[str, Any]

NAME: Final[Schema] = {"pattern": NAME_PATTERN.pattern}
ANY_NAME: Final[Schema] = {"pattern": f"^({NAME_PATTERN.pattern.strip('^$')})?$"}
SHA256: Final[Schema] = {"pattern": SHA256_PATTERN.pattern}
UUID: Final[Schema] = {"format": "uuid"}
PAGE_SIZE: Final[Schema] = {"minimum": 0, "maximum": 200}
PAGE_TOKEN: Final[Schema] = {"pattern": f"^({PAGE_TOKEN_PATTERN.pattern})?$"}
TOKEN_IDS: Final[Schema] = {"minItems": 1, "items": {"minimum": 0}}
EPOCH: Final[Schema] = {"minimum": 1, "maximum": MAX_EPOCH}
VERSION: Final[Schema] = {"minimum": 0, "maximum": MAX_VERSION}
PUSHED_VERSION: Final[Schema] = {"minimum": 1, "maximum": MAX_VERSION}
HELD: Final[Schema] = {"minLength": 1, "maxLength": MAX_VERSION_CHARS}
LABEL_PATTERN: Final = "^[^@]+@.+$"
MESSAGES: Final[Schema] = {"maxItems": MAX_MESSAGES}
ANY_TOKEN_IDS: Final[Schema] = {"items": {"minimum": 0}}


def one_of(**forms: tuple[str, ...]) -> Schema:
    """Return that a message has exactly one form: the field that makes it is there, fields of other forms are not.

    A field that is null or empty is not there.
    """
    nothing: list[Any] = [None, "", []]
    there, absent = {"not": {"enum": nothing}}, {"enum": nothing}
    options = [
        {"required": [name], "properties": {name: there} | dict.fromkeys(others, absent)}
        for name, others in forms.items()
    ]
    return {"oneOf": options}


LIMITS: Final[dict[str, Schema]] = {
    "GenerateRequest": {"required": ["n", "sampling"], **one_of(prompt=(), messages=(), prompt_token_ids=())},
    "GenerateRequest.messages": MESSAGES,
    "GenerateRequest.prompt_token_ids": ANY_TOKEN_IDS,
    "GenerateRequest.n": {"minimum": 1},
    "GenerateRequest.policy_version": {"minimum": 0},
    "GenerateRequest.run_id": ANY_NAME,
    "ChatMessage": {"required": ["role", "content"]},
    "ChatMessage.role": {"enum": [*ROLES]},
    "ChatMessage.content": {"minLength": 1},
    "SamplingParams": {"required": ["max_tokens"]},
    "SamplingParams.temperature": {"anyOf": [{"const": 0}, {"minimum": 0.01, "maximum": 2}]},
    "SamplingParams.top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "SamplingParams.top_k": {"minimum": 0},
    "SamplingParams.max_tokens": {"minimum": 1},
    "SamplingParams.stop": {"maxItems": MAX_STOPS, "items": {"minLength": 1, "maxLength": MAX_STOP_CHARS}},
    "SamplingParams.stop_token_ids": {"maxItems": MAX_STOP_TOKEN_IDS, "items": {"minimum": 0}},
    "SamplingParams.seed": {"minimum": 0, "maximum": MAX_SEED},
    "ScoreRequest": {"required": ["items"]},
    "ScoreRequest.items": {"minItems": 1},
    "ScoreItem": one_of(
        response=("prompt_token_ids",), messages=("prompt", "prompt_token_ids"), response_token_ids=("prompt",)
    ),
    "ScoreItem.messages": MESSAGES,
    "ScoreItem.prompt_token_ids": ANY_TOKEN_IDS,
    "ScoreItem.response_token_ids": ANY_TOKEN_IDS,
    "CompareRequest": {"required": ["responses"]},
    "CompareRequest.responses": {"minItems": MIN_RESPONSES, "maxItems": MAX_RESPONSES, "items": {"minLength": 1}},
    "ListRewardModelsRequest.page_size": PAGE_SIZE,
    "ListRewardModelsRequest.page_token": PAGE_TOKEN,
    "LoadRewardModelRequest": {"required": ["request_id", "name", "version"]},
    "LoadRewardModelRequest.request_id": UUID,
    "LoadRewardModelRequest.name": NAME,
    "LoadRewardModelRequest.version": NAME,
    "LoadRewardModelRequest.expected_sha256": {"pattern": f"^({SHA256_PATTERN.pattern.strip('^$')})?$"},
    "UnloadRewardModelRequest": {"required": ["request_id", "name", "version"]},
    "UnloadRewardModelRequest.request_id": UUID,
    "UnloadRewardModelRequest.name": HELD,
    "UnloadRewardModelRequest.version": HELD,
    "SetDefaultRewardModelRequest": {"required": ["request_id", "name", "version", "expected_current"]},
    "SetDefaultRewardModelRequest.request_id": UUID,
    "SetDefaultRewardModelRequest.name": HELD,
    "SetDefaultRewardModelRequest.version": HELD,
    "SetDefaultRewardModelRequest.expected_current": {"pattern": LABEL_PATTERN},
    "SetShadowRequest": {"required": ["request_id", "name", "version", "fraction"]},
    "SetShadowRequest.request_id": UUID,
    "SetShadowRequest.name": HELD,
    "SetShadowRequest.version": HELD,
    "SetShadowRequest.base": {"pattern": f"^({LABEL_PATTERN.strip('^$')})?$"},
    "SetShadowRequest.fraction": {"exclusiveMinimum": 0, "maximum": 1},
    "ClearShadowRequest": {"required": ["request_id"]},
    "ClearShadowRequest.request_id": UUID,
    "ListLoadedRewardModelsRequest.page_size": PAGE_SIZE,
    "ListLoadedRewardModelsRequest.page_token": PAGE_TOKEN,
    "ComputeLogprobsRequest": {"required": ["items"]},
    "ComputeLogprobsRequest.items": {"minItems": 1},
    "ComputeLogprobsRequest.temperature": {"minimum": 0.01, "maximum": 2},
    "LogprobItem": {"required": ["prompt_token_ids", "response_token_ids"]},
    "LogprobItem.prompt_token_ids": TOKEN_IDS,
    "LogprobItem.response_token_ids": TOKEN_IDS,
    "StartRunRequest": {"required": ["run_id", "config_toml"]},
    "StartRunRequest.run_id": NAME,
    "StartRunRequest.config_toml": {"minLength": 1, "maxLength": MAX_CONFIG_BYTES},
    "GetRunRequest": {"required": ["run_id"]},
    "GetRunRequest.run_id": NAME,
    "ListRunsRequest.page_size": PAGE_SIZE,
    "ListRunsRequest.page_token": PAGE_TOKEN,
    "CancelRunRequest": {"required": ["run_id"]},
    "CancelRunRequest.run_id": NAME,
    "CancelRunRequest.request_id": UUID,
    "ResumeRunRequest": {"required": ["run_id"]},
    "ResumeRunRequest.run_id": NAME,
    "ResumeRunRequest.request_id": UUID,
    "ResumeRunRequest.from_step": {"minimum": 0},
    "RollbackRunRequest": {"required": ["run_id"]},
    "RollbackRunRequest.run_id": NAME,
    "RollbackRunRequest.request_id": UUID,
    "RollbackRunRequest.to_step": {"minimum": 0},
    "ListStepsRequest": {"required": ["run_id"]},
    "ListStepsRequest.run_id": NAME,
    "ListStepsRequest.first_step": {"minimum": 0},
    "ListStepsRequest.page_size": {"minimum": 0, "maximum": 1000},
    "BeginPushRequest": {
        "required": [
            "request_id",
            "run_id",
            "policy_version",
            "base_model_sha256",
            "rank",
            "target_modules",
            "files",
            "probes",
            "epoch",
        ]
    },
    "BeginPushRequest.request_id": UUID,
    "BeginPushRequest.run_id": NAME,
    "BeginPushRequest.policy_version": PUSHED_VERSION,
    "BeginPushRequest.base_model_sha256": SHA256,
    "BeginPushRequest.rank": {"minimum": 1},
    "BeginPushRequest.target_modules": {"minItems": 1, "maxItems": MAX_TARGET_MODULES},
    "BeginPushRequest.files": {"minItems": 2, "maxItems": 2},
    "BeginPushRequest.probes": {"minItems": 1, "maxItems": MAX_PROBES},
    "BeginPushRequest.epoch": EPOCH,
    "AdapterFile": {"required": ["name", "size_bytes", "sha256"]},
    "AdapterFile.name": {"enum": ["adapter_config.json", "adapter_model.safetensors"]},
    "AdapterFile.size_bytes": {"minimum": 1},
    "AdapterFile.sha256": SHA256,
    "AdapterProbe": {"required": ["token_ids", "logprobs"]},
    "AdapterProbe.token_ids": {"minItems": 2, "maxItems": MAX_PROBE_TOKENS, "items": {"minimum": 0}},
    "AdapterProbe.logprobs": {"minItems": 1, "maxItems": MAX_PROBE_TOKENS - 1},
    "AdapterProbe.base_logprobs": {"maxItems": MAX_PROBE_TOKENS - 1},
    "CommitPushRequest": {"required": ["request_id", "epoch"]},
    "CommitPushRequest.request_id": UUID,
    "CommitPushRequest.epoch": EPOCH,
    "ActivateAdapterRequest": {"required": ["request_id", "run_id", "epoch"]},
    "ActivateAdapterRequest.request_id": UUID,
    "ActivateAdapterRequest.run_id": NAME,
    "ActivateAdapterRequest.policy_version": VERSION,
    "ActivateAdapterRequest.expected_run_id": ANY_NAME,
    "ActivateAdapterRequest.expected_policy_version": VERSION,
    "ActivateAdapterRequest.epoch": EPOCH,
    "RollbackAdapterRequest": {"required": ["request_id", "run_id", "epoch"]},
    "RollbackAdapterRequest.request_id": UUID,
    "RollbackAdapterRequest.run_id": NAME,
    "RollbackAdapterRequest.expected_policy_version": VERSION,
    "RollbackAdapterRequest.epoch": EPOCH,
    "ListAdaptersRequest.page_size": PAGE_SIZE,
    "ListAdaptersRequest.page_token": PAGE_TOKEN,
    "DeleteAdapterRequest": {"required": ["request_id", "run_id", "policy_version", "epoch"]},
    "DeleteAdapterRequest.request_id": UUID,
    "DeleteAdapterRequest.run_id": NAME,
    "DeleteAdapterRequest.policy_version": PUSHED_VERSION,
    "DeleteAdapterRequest.epoch": EPOCH,
}
"""By the name of a message, or of a message and its field as the contract spells it."""
