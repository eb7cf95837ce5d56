"""The same request over gRPC and over HTTP: the same answer, or the same code, reason and fields."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.rpc.http_calls import LOCAL_HTTP, Reply, post
from tests.rpc.serving import run, serving
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.service import GeneratorService
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.service import OrchestratorService
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.service import ReferenceService
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService

TEXT_ITEM = {"prompt": "Once", "response": " upon a time"}
ID_ITEM = {"prompt_token_ids": [1, 40, 41], "response_token_ids": [42, 2]}
SAMPLING = {"max_tokens": 12, "temperature": 1.0, "seed": "7"}
GENERATE = {"prompt_token_ids": [1, 40, 41], "n": 2, "sampling": SAMPLING}

REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("reward", "Score", {"items": [TEXT_ITEM, ID_ITEM, {"prompt": "nothing follows"}]}),
    ("reward", "Score", {"items": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}]}),
    ("reward", "Score", {"items": []}),
    ("reward", "Score", {"items": [TEXT_ITEM] * 65}),
    ("reward", "Score", {"items": [TEXT_ITEM], "model": "none"}),
    ("reward", "Score", {"items": [TEXT_ITEM], "version": "none"}),
    ("reward", "Compare", {"prompt": "a", "responses": ["b", "cc", "ddd"]}),
    ("reward", "Compare", {"prompt": "a", "responses": ["b"]}),
    ("reward", "Compare", {"prompt": "a", "responses": ["b", ""]}),
    ("reward", "ListRewardModels", {}),
    ("reward", "ListRewardModels", {"page_size": -1}),
    ("reward", "ListRewardModels", {"page_token": "x"}),
    ("reference", "ComputeLogprobs", {"items": [ID_ITEM], "temperature": 0.7, "include_entropies": True}),
    ("reference", "ComputeLogprobs", {"items": []}),
    ("reference", "ComputeLogprobs", {"items": [ID_ITEM], "temperature": 3.0}),
    ("reference", "ComputeLogprobs", {"items": [ID_ITEM], "temperature": "NaN"}),
    ("reference", "ComputeLogprobs", {"items": [ID_ITEM], "temperature": "Infinity"}),
    ("reference", "ComputeLogprobs", {"items": [ID_ITEM, {"prompt_token_ids": [1], "response_token_ids": [-1]}]}),
    ("reference", "GetReference", {}),
    ("generator", "Generate", GENERATE),
    ("generator", "Generate", {**GENERATE, "n": 0}),
    ("generator", "Generate", {**GENERATE, "sampling": {**SAMPLING, "temperature": -1}}),
    ("generator", "Generate", {**GENERATE, "sampling": {**SAMPLING, "stop": [""]}}),
    ("generator", "Generate", {**GENERATE, "prompt": "both"}),
    ("generator", "Generate", {**GENERATE, "policy_version": "9"}),
    ("generator", "Generate", {**GENERATE, "run_id": "none"}),
    ("generator", "GetGenerator", {}),
    ("orchestrator", "ListRuns", {"page_size": 3}),
    ("orchestrator", "ListRuns", {"page_size": 1000}),
    ("orchestrator", "GetRun", {"run_id": "none"}),
    ("orchestrator", "GetRun", {"run_id": "../etc"}),
    ("orchestrator", "StartRun", {"run_id": "a", "config_toml": "steps = ["}),
    ("orchestrator", "CancelRun", {"run_id": "none", "request_id": "no uuid"}),
    ("orchestrator", "ListSteps", {"run_id": "none", "first_step": -1}),
]
SERVICES = {"reward": "Reward", "reference": "Reference", "generator": "Generator", "orchestrator": "Orchestrator"}


async def over_grpc(target: str, path: str, request: Message, kind: type[Message]) -> Any:
    """Return the answer as protobuf prints it, or (code, reason, fields)."""
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(
            path, request_serializer=type(request).SerializeToString, response_deserializer=kind.FromString
        )
        try:
            return json_format.MessageToDict(await call(request, timeout=20))
        except grpc.aio.AioRpcError as error:
            status = rpc_status.from_call(error)  # type: ignore[arg-type]
            assert status is not None
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            for packed in status.details:
                packed.Unpack(info)
                packed.Unpack(bad)
            return error.code().name, info.reason, [violation.field for violation in bad.field_violations]


def over_http(reply: Reply, kind: type[Message]) -> Any:
    """Return the same of an answer over HTTP."""
    if reply.status == 200:
        return json_format.MessageToDict(json_format.Parse(reply.content, kind()))
    return reply.body["code"].upper(), reply.reason, reply.fields


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    return run(ask_everything(tmp_path_factory.mktemp("runs")))


async def ask_everything(folder: Path) -> list[tuple[Any, Any]]:
    fake = {**LOCAL_HTTP, "engine": "fake"}
    reward = RewardSettings.model_validate(fake)
    reference = ReferenceSettings.model_validate(fake)
    generator = GeneratorSettings.model_validate({**fake, "admin_address": "127.0.0.1:0"})
    orchestrator = OrchestratorSettings.model_validate({**LOCAL_HTTP, "state_dir": str(folder)})
    async with AsyncExitStack() as stack:
        served = {
            "reward": await stack.enter_async_context(serving(reward, lambda r: RewardService(reward, r))),
            "reference": await stack.enter_async_context(serving(reference, lambda r: ReferenceService(reference, r))),
            "generator": await stack.enter_async_context(serving(generator, lambda r: GeneratorService(generator, r))),
            "orchestrator": await stack.enter_async_context(
                serving(orchestrator, lambda r: OrchestratorService(orchestrator, r))
            ),
        }

        async def both(service: str, method: str, message: dict[str, Any]) -> tuple[Any, Any]:
            name = f"tether.v1.{SERVICES[service]}Service"
            contract = Default().FindServiceByName(name).methods_by_name[method]
            request, kind = GetMessageClass(contract.input_type)(), GetMessageClass(contract.output_type)
            json_format.ParseDict(message, request)
            path = f"/{name}/{method}"
            plain = await over_grpc(served[service].target, path, request, kind)
            return plain, over_http(await post(served[service].runner.http_port, path, message), kind)

        calls: list[Awaitable[tuple[Any, Any]]] = [both(*asked) for asked in REQUESTS]
        return list(await asyncio.gather(*calls))


@pytest.mark.parametrize("index", range(len(REQUESTS)))
def test_both_ways_give_the_same(answers: list[tuple[Any, Any]], index: int) -> None:
    plain, json_answer = answers[index]
    assert json_answer == plain, REQUESTS[index]


def test_the_table_has_good_and_bad_requests_of_every_service(answers: list[tuple[Any, Any]]) -> None:
    for service in SERVICES:
        kinds = {type(plain) for (asked, _, _), (plain, _) in zip(REQUESTS, answers, strict=True) if asked == service}
        assert kinds == {dict, tuple}, json.dumps(service)


def test_adapter_methods_and_streams_are_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        settings = GeneratorSettings.model_validate({**LOCAL_HTTP, "engine": "fake", "admin_address": "127.0.0.1:0"})
        async with serving(settings, lambda registry: GeneratorService(settings, registry)) as served:
            reply = await post(served.runner.http_port, "/tether.v1.AdapterService/ListAdapters", {})
            assert (reply.status, reply.reason) == (404, "UNKNOWN_METHOD")
        runs = OrchestratorSettings.model_validate({**LOCAL_HTTP, "state_dir": str(tmp_path)})
        async with serving(runs, lambda registry: OrchestratorService(runs, registry)) as served:
            reply = await post(served.runner.http_port, "/tether.v1.OrchestratorService/WatchRun", {"run_id": "a"})
            assert (reply.status, reply.reason) == (501, "STREAMING_METHOD")

    run(main())
