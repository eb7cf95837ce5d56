"""gRPC sets deadlines by the time of day; a jump of it between the call and its start is no reason to fail."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import grpc.aio._channel
import grpc.aio._interceptor
import pytest

import tether.deadline
from tests.rpc.adapter_store import Store, push, write_adapter
from tests.rpc.scripted_reward import ITEM, ScriptedReward, answer, fail_first, with_reward
from tests.rpc.test_client_watch import steps, watch, whole_run
from tether import DeadlineExceededError, InvalidArgumentError, RewardClient

HOUR = 3600.0


class Jump(Protocol):
    def __call__(self, seconds: float, *, at: int = 0) -> None: ...


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Have the time of day jump by so many seconds right after the next deadline was set, or one after that."""
    ahead, jumps = [0.0], list[float]()
    clock = SimpleNamespace(time=lambda: time.time() + ahead[0], monotonic=time.monotonic)
    monkeypatch.setattr(tether.deadline, "time", clock)

    def set_and_jump(timeout: float | None) -> float | None:
        seconds = jumps.pop() if jumps else 0.0
        ahead[0] += seconds
        return None if timeout is None else time.time() - seconds + timeout

    for module in (grpc.aio._channel, grpc.aio._interceptor):
        monkeypatch.setattr(module, "_timeout_to_deadline", set_and_jump)
    return lambda seconds, *, at=0: jumps.extend([seconds, *[0.0] * at])


@pytest.mark.parametrize("at", range(3), ids=["announced", "sent", "committed"])
@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_a_push_goes_on_while_the_clock_jumps(jump: Jump, seconds: float, at: int, tmp_path: Path) -> None:
    expected, store = write_adapter(tmp_path), Store()
    jump(seconds, at=at)
    push(store, tmp_path, retries=False)
    assert bytes(store.data) == expected
    assert (len(store.begins), len(store.commits)) == (1, 1)


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_a_watch_begins_while_the_clock_jumps(jump: Jump, seconds: float) -> None:
    jump(seconds)
    events, service = watch(whole_run)
    assert steps(events) == [0, 1, 2, 3]
    assert service.first_steps == [0]


@pytest.mark.parametrize("retries", [True, False])
@pytest.mark.parametrize("seconds", [HOUR, -HOUR, 30.0])
def test_a_call_that_begins_while_the_clock_jumps_is_answered(jump: Jump, seconds: float, retries: bool) -> None:
    service = ScriptedReward(answer)

    async def use(client: RewardClient) -> None:
        jump(seconds)
        assert (await client.score([ITEM], timeout_seconds=20)).scores[0].score == 14.0

    with_reward(service, use, retries=retries)
    assert service.calls == 1
    assert 15 < service.remaining[0] < 21  # clocks round up


def test_a_deadline_that_was_too_long_anyway_is_refused(jump: Jump) -> None:
    async def use(client: RewardClient) -> None:
        jump(-HOUR)
        with pytest.raises(InvalidArgumentError, match="DEADLINE_TOO_LONG"):
            await client.score([ITEM], timeout_seconds=700)

    with_reward(ScriptedReward(answer), use)


def test_an_error_of_the_service_while_the_clock_jumps_is_passed_on(jump: Jump) -> None:
    service = ScriptedReward(fail_first(9, DeadlineExceededError("The deadline passed in the queue.")))

    async def use(client: RewardClient) -> None:
        jump(0.5)
        with pytest.raises(DeadlineExceededError, match="in the queue"):
            await client.score([ITEM], timeout_seconds=20)

    with_reward(service, use)
    assert service.calls == 1
