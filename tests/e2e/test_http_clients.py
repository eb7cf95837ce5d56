"""curl, Node over gRPC and with fetch, the Connect library and the Python client get the same scores."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from connectrpc.client import ConnectClient
from connectrpc.code import Code
from connectrpc.compat import google_protobuf_binary_codec, google_protobuf_json_codec
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from google.protobuf import json_format

from tests.rpc.http_calls import LOCAL_HTTP
from tests.rpc.serving import Served, run, serving
from tether import RewardClient, ScoreItem
from tether.v1 import reward_pb2
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.service import GeneratorService
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import fake_score, fake_text_score
from tether_services.reward.service import RewardService

NODE = Path(__file__).parent / "node"
PROTOS = Path(__file__).parents[2] / "protos"
TEXT = ("Once upon a time", " all was well.")
IDS = ([1, 40, 41], [42, 2])
EXPECTED = [fake_text_score(*TEXT), fake_score(*IDS)]
MESSAGE = {
    "items": [
        {"prompt": TEXT[0], "response": TEXT[1]},
        {"prompt_token_ids": IDS[0], "response_token_ids": IDS[1]},
        {"prompt": "nothing follows"},
    ]
}


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def with_reward(scenario: Callable[[Served], Awaitable[None]]) -> None:
    settings = RewardSettings.model_validate({**LOCAL_HTTP, "engine": "fake"})

    async def main() -> None:
        async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
            await scenario(served)

    run(main(), timeout_seconds=240)


async def output_of(*command: str, cwd: Path | None = None) -> str:
    """Run a program that must succeed and return what it prints."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=cwd, stdout=pipe, stderr=pipe)
    output, errors = await asyncio.wait_for(process.communicate(), 200)
    assert process.returncode == 0, errors.decode()
    return output.decode()


def scores(answer: Any) -> list[float]:
    """Return the scores of the first two items; the third must have its error."""
    first, second, third = answer["scores"]
    assert third["error"]["field"] == "items[2].response"
    return [first["score"], second["score"]]


def test_curl_with_nothing_but_the_data_gets_the_scores() -> None:
    need("curl")

    async def scenario(served: Served) -> None:
        url = f"http://127.0.0.1:{served.runner.http_port}/tether.v1.RewardService/Score"
        for extra in ([], ["-H", "content-type: application/json"], ["-H", "content-type:application/json", "-0"]):
            answer = json.loads(await output_of("curl", "-sS", *extra, "-d", json.dumps(MESSAGE), url))
            assert scores(answer) == EXPECTED
        refused = await output_of("curl", "-sS", "-w", "%{http_code}", "-d", '{"items":[]}', url)
        assert refused.endswith("400") and json.loads(refused[:-3])["code"] == "invalid_argument"

    with_reward(scenario)


def test_curl_with_a_large_body_waits_for_the_word_to_go_on(tmp_path: Path) -> None:
    need("curl")
    file = tmp_path / "body.json"

    async def scenario(served: Served) -> None:
        url = f"http://127.0.0.1:{served.runner.http_port}/tether.v1.RewardService/Score"
        for size, status in ((2_000_000, "200"), (20_000_000, "413")):  # curl sends Expect: 100-continue
            file.write_text(json.dumps({"items": [{"prompt": "a", "response": "b" * size}]}))
            answer = await output_of("curl", "-sS", "-w", "%{http_code}", "--data-binary", f"@{file}", url)
            assert answer.endswith(status)

    with_reward(scenario)


def test_fetch_of_node_gets_the_scores_and_the_errors() -> None:
    need("node")

    async def scenario(served: Served) -> None:
        answers = json.loads(
            await output_of("node", "score_http.mjs", f"127.0.0.1:{served.runner.http_port}", cwd=NODE)
        )
        assert answers["score"]["status"] == 200 and scores(answers["score"]["body"]) == EXPECTED
        assert answers["none"]["status"] == 400
        assert answers["none"]["body"]["details"][1]["debug"]["fieldViolations"][0]["field"] == "items"

    with_reward(scenario)


def test_a_client_of_the_connect_library_gets_the_scores_and_the_errors_in_both_forms() -> None:
    info: MethodInfo[Any, Any] = MethodInfo(
        name="Score",
        service_name="tether.v1.RewardService",
        input=reward_pb2.ScoreRequest,
        output=reward_pb2.ScoreResponse,
        idempotency_level=IdempotencyLevel.UNKNOWN,
        stream_type=StreamType.UNARY,
    )

    async def scenario(served: Served) -> None:
        request = json_format.ParseDict(MESSAGE, reward_pb2.ScoreRequest())
        for codec in (google_protobuf_json_codec(), google_protobuf_binary_codec()):
            async with ConnectClient(f"http://127.0.0.1:{served.runner.http_port}", codec=codec) as client:
                answer = await client.execute_unary(request=request, method=info, timeout_ms=20_000)
                assert [score.score for score in answer.scores[:2]] == EXPECTED
                with pytest.raises(ConnectError, match="0 items") as caught:
                    await client.execute_unary(request=reward_pb2.ScoreRequest(), method=info)
                assert caught.value.code is Code.INVALID_ARGUMENT
                assert caught.value.details[0].type_name == "google.rpc.ErrorInfo"

    with_reward(scenario)


def test_node_over_grpc_and_python_get_the_scores_of_curl() -> None:
    need("curl", "node", "npm")

    async def scenario(served: Served) -> None:
        await output_of("npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error", cwd=NODE)
        given = GeneratorSettings.model_validate({**LOCAL_HTTP, "engine": "fake", "admin_address": "127.0.0.1:0"})
        async with serving(given, lambda registry: GeneratorService(given, registry)) as generator:
            node = await output_of("node", "score_generate.mjs", str(PROTOS), served.target, generator.target, cwd=NODE)
        url = f"http://127.0.0.1:{served.runner.http_port}/tether.v1.RewardService/Score"
        curl = await output_of("curl", "-sS", "-d", json.dumps(MESSAGE), url)
        async with RewardClient(served.target) as client:
            items = [ScoreItem(*TEXT), ScoreItem(prompt_token_ids=IDS[0], response_token_ids=IDS[1])]
            python = [score.score for score in (await client.score(items)).scores]
        answer = json.loads(node)["score"]
        assert [score["score"] for score in answer["scores"][:2]] == scores(json.loads(curl)) == python == EXPECTED

    with_reward(scenario)
