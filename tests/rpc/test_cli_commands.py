"""`tether score`, `tether generate` and `tether run` against servers on a loopback port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.scripted_server import in_thread, serving_in_thread
from tests.rpc.serving import LOCAL, serving
from tests.rpc.test_client_watch import RUNNING, SUCCEEDED, run_event, step
from tether.errors import FieldViolation, InvalidArgumentError, NotFoundError
from tether.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tether_services.cli.main import main
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion
from tether_services.generator.service import GeneratorService
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import fake_text_score
from tether_services.reward.service import RewardService
from tether_services.runtime.text import ByteCodec


@asynccontextmanager
async def reward_service() -> AsyncIterator[str]:
    settings = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
        yield served.target


@asynccontextmanager
async def generator_service() -> AsyncIterator[str]:
    settings = GeneratorSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    async with serving(settings, lambda registry: GeneratorService(settings, registry)) as served:
        yield served.target


class Runs(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """One run called "a"."""

    def __init__(self) -> None:
        self.started: list[orchestrator_pb2.StartRunRequest] = []
        self.end = SUCCEEDED

    def add(self, server: grpc.aio.Server) -> None:
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self, server)

    async def StartRun(self, request: orchestrator_pb2.StartRunRequest, context: Any) -> Any:
        if "nonsense" in request.config_toml:
            violations = (FieldViolation("nonsense", "unknown key"), FieldViolation("ppo.lam", "above 1"))
            raise InvalidArgumentError("Two bad keys.", reason="INVALID_CONFIG", violations=violations)
        self.started.append(request)
        return orchestrator_pb2.StartRunResponse(run=RUNNING)

    async def GetRun(self, request: orchestrator_pb2.GetRunRequest, context: Any) -> Any:
        if request.run_id != "a":
            raise NotFoundError(f"There is no run {request.run_id}.")
        return orchestrator_pb2.GetRunResponse(run=self.end)

    async def ListRuns(self, request: orchestrator_pb2.ListRunsRequest, context: Any) -> Any:
        return orchestrator_pb2.ListRunsResponse(runs=[RUNNING])

    async def CancelRun(self, request: orchestrator_pb2.CancelRunRequest, context: Any) -> Any:
        cancelled = orchestrator_pb2.Run(run_id="a", state=orchestrator_pb2.RUN_STATE_CANCELLED)
        return orchestrator_pb2.CancelRunResponse(run=cancelled)

    async def ResumeRun(self, request: orchestrator_pb2.ResumeRunRequest, context: Any) -> Any:
        resumed = orchestrator_pb2.Run(run_id="a", state=orchestrator_pb2.RUN_STATE_RUNNING, committed_step_count=2)
        return orchestrator_pb2.ResumeRunResponse(run=resumed)

    async def RollbackRun(self, request: orchestrator_pb2.RollbackRunRequest, context: Any) -> Any:
        rolled_back = orchestrator_pb2.Run(run_id="a", state=orchestrator_pb2.RUN_STATE_FAILED, committed_step_count=1)
        return orchestrator_pb2.RollbackRunResponse(run=rolled_back)

    async def ListSteps(self, request: orchestrator_pb2.ListStepsRequest, context: Any) -> Any:
        return orchestrator_pb2.ListStepsResponse(steps=[orchestrator_pb2.StepState(step=request.first_step)])

    async def WatchRun(
        self, request: orchestrator_pb2.WatchRunRequest, context: Any
    ) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
        for number in range(request.first_step, 4):
            yield step(number)
        yield run_event(self.end)


@pytest.fixture
def runs() -> Iterator[tuple[Runs, str]]:
    servicer = Runs()
    with serving_in_thread(servicer.add) as target:
        yield servicer, target


def test_score_prints_a_number_per_response(capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(reward_service) as target:
        assert main(["score", "Once", " upon", " below", "--address", target]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [f"{fake_text_score('Once', text):.4f}" for text in (" upon", " below")]
    assert shown.err.startswith("model default version ")


def test_score_as_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(reward_service) as target:
        assert main(["score", "Once", " upon", "--address", target, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["scores"][0]["score"] == fake_text_score("Once", " upon")
    assert result["scores"][0]["error"] is None and result["model"] == "default"


def test_a_response_that_cannot_be_scored_is_an_error_beside_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(reward_service) as target:
        assert main(["score", "Once", " upon", "", "--address", target]) == 1
        good, bad = capsys.readouterr().out.splitlines()
        assert float(good) and bad.startswith("error: [") and "items[1].response" in bad
        assert main(["score", "Once", "", "--address", target, "--json"]) == 1
    item = json.loads(capsys.readouterr().out)["scores"][0]
    assert item["score"] is None and item["error"]["fields"] == ["items[0].response"]


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(reward_service) as target:
        assert main(["score", "a", "b", "--model", "nonsense", "--address", target]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: [") and "nonsense" in shown and len(shown.splitlines()) == 1


def expected_text(index: int) -> str:
    prompt = ByteCodec().encode("Once", add_special_tokens=True)
    completion = fake_completion(prompt, Sampling(max_tokens=9), 0, stream=derive_seed(5, index))
    return ByteCodec().decode(completion.token_ids)


def test_generate_prints_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(generator_service) as target:
        assert main(["generate", "Once", "--max-tokens", "9", "--seed", "5", "--address", target]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected_text(0) + "\n"
    assert shown.err == "policy version 0\n"


def test_generate_separates_several_completions(capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(generator_service) as target:
        command = ["generate", "Once", "--n", "2", "--max-tokens", "9", "--seed", "5", "--address", target]
        assert main(command) == 0
        text = capsys.readouterr().out
        assert main([*command, "--json"]) == 0
    assert "--- 1 of 2 (" in text and "--- 2 of 2 (" in text
    assert expected_text(0) in text and expected_text(1) in text
    completions = json.loads(capsys.readouterr().out)["completions"]
    assert [completion["text"] for completion in completions] == [expected_text(0), expected_text(1)]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--temperature", "-1"], "sampling.temperature"),
        (["--temperature", "nan"], "sampling.temperature"),
        (["--n", "10000"], "n"),
        (["--n", "99999999999"], "n"),
        (["--policy-version", "4"], "policy_version"),
    ],
)
def test_bad_arguments_of_generate_are_one_line_that_names_the_field(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_thread(generator_service) as target:
        assert main(["generate", "Once", *arguments, "--address", target]) == 1
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1 and field in shown


def test_run_start_sends_the_file_with_its_overrides(
    runs: tuple[Runs, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servicer, target = runs
    file = tmp_path / "run.toml"
    file.write_text("total_steps = 4\n")
    assert main(["run", "start", "a", "--config", str(file), "--address", target]) == 0
    assert main(["run", "start", "a", "--config", str(file), "--set", "ppo.lam=0.5", "--address", target]) == 0
    first, second = servicer.started
    assert (first.run_id, first.config_toml) == ("a", "total_steps = 4\n")
    assert second.config_toml == "total_steps = 4\n\n[ppo]\nlam = 0.5\n"
    assert "running" in capsys.readouterr().out


def test_an_invalid_run_has_a_line_per_field_and_status_42(
    runs: tuple[Runs, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("nonsense = 4\n")
    assert main(["run", "start", "a", "--config", str(file), "--address", runs[1]]) == 42
    assert capsys.readouterr().err.splitlines()[1:] == ["  nonsense: unknown key", "  ppo.lam: above 1"]


def test_run_get_and_list_show_the_run(runs: tuple[Runs, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "get", "a", "--address", runs[1]]) == 0
    assert "succeeded" in capsys.readouterr().out
    assert main(["run", "list", "--address", runs[1]]) == 0
    assert "0/4" in capsys.readouterr().out


def test_run_cancel_and_resume_show_the_new_state(runs: tuple[Runs, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "cancel", "a", "--address", runs[1]]) == 0
    assert "cancelled" in capsys.readouterr().out
    assert main(["run", "resume", "a", "--address", runs[1]]) == 0
    assert "running" in capsys.readouterr().out


def test_run_watch_shows_every_step_and_the_end(runs: tuple[Runs, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "watch", "a", "--first-step", "1", "--address", runs[1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["step 1", "step 2", "step 3"]
    assert lines[-1] == "run a succeeded"


def test_resume_with_watch_goes_on_at_the_committed_step(
    runs: tuple[Runs, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "resume", "a", "--watch", "--address", runs[1]]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("step 2")


def test_watching_a_run_that_fails_ends_with_status_1_and_the_reason(
    runs: tuple[Runs, str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs[0].end = orchestrator_pb2.Run(run_id="a", state=orchestrator_pb2.RUN_STATE_FAILED, error="reward is gone")
    assert main(["run", "watch", "a", "--address", runs[1]]) == 1
    assert capsys.readouterr().err == "run a failed: reward is gone\n"


def test_an_unknown_run_is_one_line(runs: tuple[Runs, str], capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("get", "watch"):
        assert main(["run", action, "b", "--address", runs[1]]) == 1
        assert capsys.readouterr().err == "error: [NOT_FOUND] There is no run b.\n"
