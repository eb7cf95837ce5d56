"""The synchronous client: the same calls for programs without an event loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from tests.rpc.scripted_reward import ScriptedReward, answer
from tests.rpc.scripted_server import serving_in_thread
from tether import (
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RewardClient,
    ScoreItem,
    TetherError,
    UnavailableError,
)
from tether.v1 import reward_pb2


def test_a_score_takes_three_lines() -> None:
    with serving_in_thread(ScriptedReward(answer).add) as target, Client(reward=target) as client:
        assert client.score("Once upon a time", " all was well.").score == 14.0


def test_a_batch_keeps_its_order() -> None:
    with serving_in_thread(ScriptedReward(answer).add) as target, Client(reward=target) as client:
        result = client.score_items([ScoreItem("", "x" * length) for length in range(1, 9)])
    assert [score.score for score in result.scores] == [float(length) for length in range(1, 9)]


def test_errors_are_the_same_as_those_of_the_async_client() -> None:
    serving = serving_in_thread(ScriptedReward(answer).add)
    with serving as target, Client(reward=target) as client, pytest.raises(InvalidArgumentError, match="responses"):
        client.compare("a", ["b"])


def test_a_single_item_that_cannot_be_scored_raises_its_error() -> None:
    class Bad(ScriptedReward):
        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
            error = reward_pb2.ItemError(code=5, reason="NO_SUCH", message="Unknown.", field="items[0].response")
            return reward_pb2.ScoreResponse(scores=[reward_pb2.ItemScore(error=error)])

    with serving_in_thread(Bad(answer).add) as target, Client(reward=target) as client:
        with pytest.raises(NotFoundError, match="NO_SUCH"):
            client.score("a", "b")
        assert client.score_items([ScoreItem("a", "b")]).scores[0].error is not None


def test_a_service_without_an_address_is_named() -> None:
    expected = r"Client\(generator='host:port'\)"
    with Client(reward="127.0.0.1:1") as client, pytest.raises(InvalidArgumentError, match=expected):
        client.generate("a")


def test_threads_share_a_client() -> None:
    servicer = ScriptedReward(answer)
    scores: list[float] = []
    with serving_in_thread(servicer.add) as target, Client(reward=target) as client:
        threads = [
            threading.Thread(target=lambda n=n: scores.append(client.score("", "x" * n).score)) for n in range(1, 17)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert sorted(scores) == [float(n) for n in range(1, 17)]


def test_closing_ends_the_thread_and_later_calls_say_so() -> None:
    before = threading.active_count()
    client = Client(reward="127.0.0.1:1")
    assert threading.active_count() == before + 1
    client.close()
    client.close()
    assert threading.active_count() == before
    with pytest.raises(FailedPreconditionError, match="CLIENT_CLOSED"):
        client.score("a", "b")


@pytest.mark.parametrize("is_gone", [True, False])
def test_closing_ends_the_calls_of_other_threads(is_gone: bool) -> None:
    """Those that wait for a service to come back, and those that it works on."""

    async def sleep(call: int) -> None:
        await asyncio.sleep(30)

    with serving_in_thread(ScriptedReward(sleep).add) as target:
        client = Client(reward="127.0.0.1:1" if is_gone else target)
        client._service(RewardClient)._has_answered = True
        errors: list[TetherError] = []

        def score() -> None:
            try:
                client.score("a", "b")
            except TetherError as error:
                errors.append(error)

        threads = [threading.Thread(target=score, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        began = time.monotonic()
        client.close()
        for thread in threads:
            thread.join(3)
        assert time.monotonic() - began < 2
        assert [error.reason for error in errors] == ["CLIENT_CLOSED"] * 3


def test_a_program_that_forgets_to_close_still_ends_quietly() -> None:
    code = "from tether import Client\nclient = Client(reward='127.0.0.1:1')\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_nobody_listening_is_unavailable() -> None:
    client = Client(reward="127.0.0.1:1", timeout_seconds=10)
    with client, pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        client.score("a", "b")
