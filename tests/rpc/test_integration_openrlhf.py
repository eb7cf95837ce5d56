"""The reward scorer behind OpenRLHF's two ways to ask for rewards: over HTTP and through a function in a file."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.rpc.http_serving import Answer, ask, http_in_thread
from tests.rpc.reward_serving import reward_in_thread
from tests.rpc.serving import Served
from tether import DeadlineExceededError, InvalidArgumentError, UnavailableError
from tether.integrations.openrlhf import QueryForm, RewardEndpoint, functions, make_reward_func, reward_file
from tether.integrations.scoring import ScoringOptions
from tether_services.reward.engines.fake import fake_score, fake_text_score
from tether_services.reward.items import encode_conversation
from tether_services.runtime.text import ByteCodec, Message

PATH = "/get_reward"
PROMPTS = [f"<|user|>Question {place}\n<|assistant|>" for place in range(100)]
RESPONSES = [f"Answer {place}</s>" for place in range(100)]
QUERIES = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
EXPECTED = [fake_text_score(prompt, response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
CANARY = "canary-3141"


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with reward_in_thread() as served:
        yield served


@pytest.fixture(scope="module")
def address(service: Served) -> Iterator[str]:
    with http_in_thread(RewardEndpoint(ScoringOptions(service.target))) as address:
        yield address


def payload(count: int) -> dict[str, Any]:
    """Return what OpenRLHF posts; labels have no part in the reward."""
    return {"query": QUERIES[:count], "prompts": PROMPTS[:count], "labels": [None] * count}


def error_of(answer: Answer) -> dict[str, str]:
    """Return the error of an answer, which holds nothing that could pass for a reward."""
    assert set(answer.body) == {"error"}
    assert set(answer.body["error"]) == {"code", "reason", "message", "field"}
    assert CANARY not in str(answer.body)
    error: dict[str, str] = answer.body["error"]
    return error


@pytest.mark.parametrize("count", [1, 100])
def test_the_endpoint_answers_with_the_scores_of_the_service(address: str, count: int) -> None:
    answer = ask(address, "POST", PATH, body=payload(count))
    assert answer.status == 200
    assert answer.body == {"rewards": EXPECTED[:count], "scores": EXPECTED[:count], "extra_logs": {}}


def test_many_callers_at_once_get_their_own_rewards(address: str) -> None:
    def one(place: int) -> Any:
        body = {"query": [QUERIES[place]], "prompts": [PROMPTS[place]], "labels": [""]}
        return ask(address, "POST", PATH, body=body).body["rewards"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(100))) == [[expected] for expected in EXPECTED]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"\xff\xfe", "body"),
        (b"[" * 200_000, "body"),
        (b"1" * 10_000, "body"),
        ([CANARY], "body"),
        ({"query": [CANARY]}, "prompts"),
        ({"prompts": [CANARY]}, "query"),
        ({"query": CANARY, "prompts": CANARY}, "query"),
        ({"query": [], "prompts": []}, "query"),
        ({"query": [CANARY], "prompts": []}, "prompts"),
        ({"query": [CANARY, 1], "prompts": [CANARY, CANARY]}, "query[1]"),
        ({"query": ["ab", CANARY], "prompts": ["a", "x"]}, "query[1]"),
        ({"query": ["ab", CANARY], "prompts": ["a", CANARY]}, "query[1]"),
        (b'{"query": ["a\\ud800"], "prompts": ["a"]}', "query[0]"),
        (b'{"query": ["a"], "prompts": ["\\ud800"]}', "prompts[0]"),
    ],
)
def test_a_body_that_cannot_be_scored_is_a_bad_request(address: str, body: Any, field: str) -> None:
    answer = ask(address, "POST", PATH, body=body)
    assert answer.status == 400
    error = error_of(answer)
    assert (error["code"], error["field"]) == ("INVALID_ARGUMENT", field)


@pytest.mark.parametrize(
    ("method", "path", "content_type", "status"),
    [
        ("POST", "/", "application/json", 404),
        ("GET", PATH, "application/json", 405),
        ("POST", "/health", "application/json", 405),
        ("POST", PATH, None, 415),
        ("POST", PATH, "text/plain", 415),
    ],
)
def test_a_request_of_another_kind_is_refused(
    address: str, method: str, path: str, content_type: str | None, status: int
) -> None:
    answer = ask(address, method, path, body=payload(1) if method == "POST" else None, content_type=content_type)
    assert answer.status == status
    error_of(answer)
    assert ("allow" in answer.headers) == (status == 405)


def test_a_body_that_is_too_long_is_refused_with_and_without_its_length(address: str) -> None:
    chunks = (b" " * 1_000_000 for _ in range(17))
    for body in (b" " * 17_000_000, chunks):
        try:
            answer = ask(address, "POST", PATH, body=body)
        except (BrokenPipeError, ConnectionResetError):  # it hangs up on the rest of the body
            continue
        assert (answer.status, error_of(answer)["reason"]) == (413, "REQUEST_ENTITY_TOO_LARGE")
    assert ask(address, "POST", PATH, body=payload(1)).status == 200


def test_a_response_without_a_score_is_an_error_unless_it_is_given_a_worth(service: Served) -> None:
    body = {"query": ["ab", "a</s>"], "prompts": ["a", "a"], "labels": ["", ""]}
    for unscored, expected in (("raise", None), (-1.0, [fake_text_score("a", "b"), -1.0])):
        options = ScoringOptions(service.target, unscored=unscored)  # type: ignore[arg-type]
        with http_in_thread(RewardEndpoint(options, form=QueryForm(end_text="</s>"))) as address:
            answer = ask(address, "POST", PATH, body=body)
        if expected is None:
            assert (answer.status, error_of(answer)["field"]) == (400, "query[1]")
        else:
            assert (answer.status, answer.body["rewards"]) == (200, expected)


def test_prompts_made_with_a_template_are_scored_as_conversations(service: Served) -> None:
    form = QueryForm("<|user|>{}\n<|assistant|>", "</s>")
    said = [
        (Message("user", f"Question {place}"), Message("assistant", f"Answer {place}")) for place in range(len(QUERIES))
    ]
    expected = [fake_score(*encode_conversation(ByteCodec(), turns)) for turns in said]
    with http_in_thread(RewardEndpoint(ScoringOptions(service.target), form=form)) as address:
        assert ask(address, "POST", PATH, body=payload(100)).body["rewards"] == expected
    rewards = make_reward_func(service.target, form=form)(QUERIES, PROMPTS, [])["rewards"]
    assert torch.equal(rewards, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("target", "options", "statuses"),
    [
        ("", {"model": "no-such-model"}, {502}),
        ("127.0.0.1:1", {"client_options": {"timeout_seconds": 0.5}}, {503, 504}),
    ],
)
def test_a_failure_between_endpoint_and_service_is_no_reward(
    service: Served, target: str, options: dict[str, Any], statuses: set[int]
) -> None:
    with http_in_thread(RewardEndpoint(ScoringOptions(target or service.target, **options))) as address:
        answer = ask(address, "POST", PATH, body=payload(2))
    assert answer.status in statuses
    error_of(answer)


def test_health_is_that_of_the_service(address: str) -> None:
    assert ask(address, "GET", "/health").body == {"status": "SERVING"}
    with http_in_thread(RewardEndpoint(ScoringOptions("127.0.0.1:1"))) as other:
        assert ask(other, "GET", "/health").status == 503


def test_the_command_serves_on_loopback_until_it_is_told_to_stop(service: Served) -> None:
    command = [sys.executable, "-m", "tether.integrations.openrlhf", "--reward", service.target, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            assert url.startswith("http://127.0.0.1:") and url.endswith(PATH)
            assert ask(url.split("/")[2], "POST", PATH, body=payload(3)).body["rewards"] == EXPECTED[:3]
            process.send_signal(signal.SIGTERM)
            assert (process.wait(20), process.communicate()) == (0, ("", ""))
        finally:
            process.kill()


@pytest.fixture
def environment(service: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TETHER_OPENRLHF_TARGET", service.target)
    functions._function_of_environment.cache_clear()
    yield
    functions._function_of_environment.cache_clear()


def load_as_openrlhf_does(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("reward_func", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward_func


def test_the_reward_file_is_loaded_and_called_as_openrlhf_does(environment: None) -> None:
    reward_func = load_as_openrlhf_does(str(reward_file.__file__))
    assert inspect.isfunction(reward_func)  # older versions make it a remote function, which an object cannot be

    async def rollouts() -> list[dict[str, Any]]:
        calls = (asyncio.to_thread(reward_func, [QUERIES[i]], [PROMPTS[i]], [None]) for i in range(32))
        return list(await asyncio.gather(*calls))

    answers = asyncio.run(rollouts())
    assert all(set(answer) == {"rewards", "scores", "extra_logs"} for answer in answers)
    rewards = torch.cat([answer["rewards"] for answer in answers])
    assert torch.equal(rewards, torch.tensor(EXPECTED[:32], dtype=torch.float32))


def test_a_function_of_ones_own_file_scores_a_batch(service: Served) -> None:
    reward_func = make_reward_func(service.target, form=QueryForm(end_text="</s>"))
    answer = reward_func(QUERIES, PROMPTS, [None] * 100, an_argument_of_later_versions=1)
    expected = [fake_text_score(p, r.removesuffix("</s>")) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert torch.equal(answer["rewards"], torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(answer["scores"], answer["rewards"])


def test_a_function_that_has_no_reward_raises_and_logs_why(service: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with pytest.raises(InvalidArgumentError, match="PROMPT_MISMATCH"):
        make_reward_func(service.target)([f"x{CANARY}"], [CANARY], [""])
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        make_reward_func("127.0.0.1:1", timeout_seconds=0.5)([CANARY * 2], [CANARY], [""])
    assert caplog.text.count("no rewards: ") == 2
    assert CANARY not in caplog.text


def test_an_environment_without_a_target_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TETHER_OPENRLHF_TARGET", raising=False)
    functions._function_of_environment.cache_clear()
    with pytest.raises(InvalidArgumentError, match="TETHER_OPENRLHF_TARGET=127"):
        load_as_openrlhf_does(str(reward_file.__file__))(["ab"], ["a"], [""])
