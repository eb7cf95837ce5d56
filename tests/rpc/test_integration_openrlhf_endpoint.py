"""The endpoint for OpenRLHF as an ASGI application: callers that are slow, too many, too long or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.rpc import reward_rules
from tests.rpc.reward_serving import reward_in_thread
from tests.rpc.serving import Served, run
from tether import InternalError, ResourceExhaustedError, TetherError, UnavailableError
from tether.errors import BY_CODE
from tether.integrations.openrlhf import EndpointLimits, RewardEndpoint, app
from tether.integrations.openrlhf.endpoint import _endpoint_of_environment, _error_reply
from tether.integrations.scoring import ScoringOptions
from tether_services.reward.engines.fake import fake_text_score

BODY = json.dumps({"query": ["ab"], "prompts": ["a"], "labels": [""]}).encode()
Event = dict[str, Any]


class Caller:
    """One HTTP request in the terms of ASGI."""

    def __init__(self, *events: Event, headers: dict[str, str] | None = None) -> None:
        self.scope: Event = {
            "type": "http",
            "method": "POST",
            "path": "/get_reward",
            "headers": [
                (k.encode(), v.encode()) for k, v in ({"content-type": "application/json"} | (headers or {})).items()
            ],
        }
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        for event in events:
            self.events.put_nowait(event)
        self.num_received = 0
        self.sent: list[Event] = []

    async def receive(self) -> Event:
        self.num_received += 1
        return await self.events.get()

    async def send(self, event: Any) -> None:
        self.sent.append(event)

    async def call(self, endpoint: Callable[..., Awaitable[None]]) -> int:
        """Return the status of the answer, 0 if there is none."""
        await endpoint(self.scope, self.receive, self.send)
        return int(self.sent[0]["status"]) if self.sent else 0

    def answer(self) -> Any:
        return json.loads(self.sent[1]["body"])


def body(content: bytes, *, more: bool = False) -> Event:
    return {"type": "http.request", "body": content, "more_body": more}


GONE: Event = {"type": "http.disconnect"}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with reward_in_thread() as served:
        yield served


@pytest.fixture(scope="module")
def gated() -> Iterator[Served]:
    """A service that answers once the gate is open."""
    with reward_in_thread(models=[reward_rules.GATED_MODEL]) as served:
        yield served


@pytest.fixture
def gate() -> Iterator[Callable[[], None]]:
    reward_rules.GATE.clear()
    yield reward_rules.GATE.set
    reward_rules.GATE.set()


def endpoint_of(served: Served, **limits: Any) -> RewardEndpoint:
    return RewardEndpoint(ScoringOptions(served.target), limits=EndpointLimits(**limits))


def test_a_body_in_parts_is_put_together(service: Served) -> None:
    async def scenario() -> None:
        caller = Caller(body(BODY[:10], more=True), body(b"", more=True), body(BODY[10:]))
        assert await caller.call(endpoint_of(service)) == 200
        assert caller.answer()["rewards"] == [fake_text_score("a", "b")]

    run(scenario())


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_body_that_is_too_long_is_refused_without_reading_its_rest(service: Served, is_declared: bool) -> None:
    async def scenario() -> None:
        parts = [body(b" " * 60, more=True), body(b" " * 60, more=True), body(b" " * 60, more=True)]
        caller = Caller(*parts, headers={"content-length": "180"} if is_declared else {})
        assert await caller.call(endpoint_of(service, body_bytes=100)) == 413
        assert caller.num_received == (0 if is_declared else 2)
        within = Caller(body(BODY), headers={"content-length": str(len(BODY))})
        assert await within.call(endpoint_of(service, body_bytes=len(BODY))) == 200

    run(scenario())


def test_a_body_that_does_not_arrive_is_refused_in_time(service: Served) -> None:
    async def scenario() -> None:
        caller = Caller(body(BODY[:10], more=True))
        assert await caller.call(endpoint_of(service, body_seconds=0.05)) == 408
        assert caller.answer()["error"]["reason"] == "REQUEST_TIMEOUT"

    run(scenario())


def test_a_caller_that_hangs_up_ends_its_work(gated: Served, gate: Callable[[], None]) -> None:
    async def scenario() -> None:
        while_reading, while_scoring = Caller(body(BODY[:10], more=True), GONE), Caller(body(BODY), GONE)
        endpoint = endpoint_of(gated)
        assert await asyncio.wait_for(while_reading.call(endpoint), 5) == 0
        assert await asyncio.wait_for(while_scoring.call(endpoint), 5) == 0  # the gate is shut: nobody was scored

    run(scenario())


def test_no_more_requests_are_read_than_may_be_scored_at_a_time(gated: Served, gate: Callable[[], None]) -> None:
    async def scenario() -> None:
        endpoint = endpoint_of(gated, num_requests=1)
        first, second = Caller(body(BODY)), Caller(body(BODY))
        calls = [asyncio.create_task(caller.call(endpoint)) for caller in (first, second)]
        while not first.num_received:
            await asyncio.sleep(0)
        done, _ = await asyncio.wait(calls, timeout=0.2)
        assert not done
        assert second.num_received == 0
        gate()
        assert await asyncio.gather(*calls) == [200, 200]

    run(scenario())


def test_the_loop_is_free_while_a_request_is_scored(gated: Served, gate: Callable[[], None]) -> None:
    async def scenario() -> None:
        endpoint, health = endpoint_of(gated), Caller()
        scoring = asyncio.create_task(Caller(body(BODY)).call(endpoint))
        health.scope |= {"method": "GET", "path": "/health"}
        assert await health.call(endpoint) == 200
        assert not scoring.done()
        gate()
        assert await scoring == 200

    run(scenario())


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_that_says_whose_it_is(kind: type[TetherError]) -> None:
    expected = {"INVALID_ARGUMENT": 400, "RESOURCE_EXHAUSTED": 429, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504}
    expected["INTERNAL"] = 500
    reply = _error_reply(kind("What happened.", reason="SOME_REASON", field="query[1]"))
    assert reply.status == expected.get(kind.code.name, 502)
    body = {"code": kind.code.name, "reason": "SOME_REASON", "message": "What happened.", "field": "query[1]"}
    assert reply.body == {"error": body}


def test_the_delay_that_a_full_service_asks_for_is_passed_on_in_whole_seconds() -> None:
    assert _error_reply(ResourceExhaustedError("Full.", retry_after_seconds=0.2)).headers == ((b"retry-after", b"1"),)
    assert _error_reply(UnavailableError("Away.")).headers == ()


def test_a_defect_of_the_endpoint_is_an_internal_error_without_details(
    service: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = endpoint_of(service)
    monkeypatch.setattr(endpoint, "_form", 7)

    async def scenario() -> None:
        caller = Caller(body(BODY))
        assert await caller.call(endpoint) == 500
        assert caller.answer()["error"]["reason"] == InternalError.default_reason
        assert "object" not in caller.answer()["error"]["message"]

    run(scenario())
    assert "a request failed" in caplog.text


async def live(endpoint: Callable[..., Awaitable[None]]) -> list[str]:
    """Return what an application says to the start and the end of its server."""
    events = iter(["lifespan.startup", "lifespan.shutdown"])
    said: list[str] = []

    async def receive() -> Event:
        return {"type": next(events)}

    async def send(event: Any) -> None:
        said.append(event["type"])

    await endpoint({"type": "lifespan"}, receive, send)
    return said


def test_the_end_of_the_server_closes_the_connection(service: Served) -> None:
    async def scenario() -> None:
        endpoint = endpoint_of(service)
        assert await Caller(body(BODY)).call(endpoint) == 200
        assert len(endpoint._scorer._clients) == 1
        assert await live(endpoint) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert not endpoint._scorer._clients

    run(scenario())


def test_the_application_of_the_environment_does_not_start_without_a_target(
    service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    _endpoint_of_environment.cache_clear()
    monkeypatch.delenv("TETHER_OPENRLHF_TARGET", raising=False)
    assert run(live(app)) == ["lifespan.startup.failed"]
    monkeypatch.setenv("TETHER_OPENRLHF_TARGET", service.target)
    assert run(live(app)) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert run(Caller(body(BODY)).call(app)) == 200
    _endpoint_of_environment.cache_clear()


def test_another_protocol_is_a_mistake_of_the_server(service: Served) -> None:
    caller = Caller()
    caller.scope["type"] = "websocket"
    with pytest.raises(InternalError, match="websocket"):
        run(caller.call(endpoint_of(service)))
