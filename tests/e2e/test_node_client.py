"""Programs outside Python work from the protos alone: a Node script against real servers with fake engines."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.serving import LOCAL, serving
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion
from tether_services.generator.service import GeneratorService
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import fake_score, fake_text_score
from tether_services.reward.service import RewardService

FOLDER = Path(__file__).parent / "node"
PROTOS = Path(__file__).parents[2] / "protos"


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(install, cwd=FOLDER, check=True, timeout=180)
    return asyncio.run(call_from_node())


async def call_from_node() -> dict[str, Any]:
    reward_settings = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    generator_settings = GeneratorSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    async with (
        serving(reward_settings, lambda registry: RewardService(reward_settings, registry)) as reward,
        serving(generator_settings, lambda registry: GeneratorService(generator_settings, registry)) as generator,
    ):
        process = await asyncio.create_subprocess_exec(
            *("node", "score_generate.mjs", str(PROTOS), reward.target, generator.target),
            cwd=FOLDER,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    answered: dict[str, Any] = json.loads(output)
    return answered


def test_scores_are_those_of_the_oracle(answers: dict[str, Any]) -> None:
    text, ids, _bad = answers["score"]["scores"]
    assert text["score"] == fake_text_score("Once upon a time", " all was well.")
    assert ids["score"] == fake_score([1, 40, 41], [42, 2])
    assert answers["score"]["model"] and len(answers["score"]["model_sha256"]) == 64


def test_an_item_that_cannot_be_scored_carries_its_error_beside_the_scores(answers: dict[str, Any]) -> None:
    error = answers["score"]["scores"][2]["error"]
    assert error["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert error["field"] == "items[2].response"


def test_completions_are_those_of_the_oracle(answers: dict[str, Any]) -> None:
    response = answers["generate"]
    assert response["policy_version"] == 0 and response["prompt_token_ids"] == [1, 40, 41]
    for index, completion in enumerate(response["completions"]):
        expected = fake_completion([1, 40, 41], Sampling(max_tokens=12), 0, stream=derive_seed(7, index))
        assert completion["token_ids"] == list(expected.token_ids)
        assert completion["logprobs"] == pytest.approx(list(expected.logprobs), abs=1e-6)
        assert completion["finish_reason"] == f"FINISH_REASON_{expected.finish_reason.upper()}"
    assert len(response["completions"]) == 2


def test_bad_input_is_a_status_that_names_the_field(answers: dict[str, Any]) -> None:
    assert answers["bad_temperature"]["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "[0.01, 2]" in answers["bad_temperature"]["details"]
    assert "sampling.temperature" in answers["bad_temperature"]["status"]


def test_a_call_without_a_deadline_is_refused(answers: dict[str, Any]) -> None:
    assert answers["no_deadline"]["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "deadline" in answers["no_deadline"]["details"]
