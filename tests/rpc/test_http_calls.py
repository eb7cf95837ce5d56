"""Unary methods over HTTP: what a caller sends and gets."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.rpc import reward_rules
from tests.rpc.http_calls import LOCAL_HTTP, get, post, send, take
from tests.rpc.serving import LOCAL, Served, run, serving
from tether.errors import InvalidArgumentError
from tether.v1 import reward_pb2
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import fake_text_score
from tether_services.reward.service import RewardService
from tether_services.runtime.settings import ServerSettings

SCORE = "/tether.v1.RewardService/Score"
ITEM = {"prompt": "Once", "response": " upon a time"}
EXPECTED = fake_text_score("Once", " upon a time")


def with_reward(scenario: Callable[[Served, int], Awaitable[None]], **values: Any) -> None:
    """Serve a reward service over HTTP and run the scenario."""
    given = {**LOCAL_HTTP, **({} if "models" in values else {"engine": "fake"}), **values}
    settings = RewardSettings.model_validate(given)

    async def main() -> None:
        async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
            assert served.runner.http_port is not None
            await scenario(served, served.runner.http_port)

    run(main())


def test_a_call_is_answered_in_json_with_the_names_of_the_protos() -> None:
    async def scenario(served: Served, port: int) -> None:
        reply = await post(port, SCORE, {"items": [ITEM]})
        assert reply.status == 200 and reply.headers["content-type"] == "application/json"
        (score,) = reply.body["scores"]
        assert score["score"] == EXPECTED and score["raw_score"] == EXPECTED and score["token_count"] > 0
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert served.value("tether_reward_requests_total", method="Score", code="OK") == 1

    with_reward(scenario)


def test_what_curl_sends_without_a_word_on_its_type_is_read_as_json() -> None:
    async def scenario(served: Served, port: int) -> None:
        form = "application/x-www-form-urlencoded"
        reply = await post(port, SCORE, {"items": [ITEM]}, content_type=form)
        assert reply.status == 200 and reply.body["scores"][0]["score"] == EXPECTED

    with_reward(scenario)


def test_a_browser_is_refused_whatever_it_sends() -> None:
    async def scenario(served: Served, port: int) -> None:
        for kind in ("application/json", "application/x-www-form-urlencoded", "text/plain"):
            reply = await post(port, SCORE, {"items": [ITEM]}, content_type=kind, origin="http://127.0.0.1:8052")
            assert (reply.status, reply.reason) == (403, "BROWSER_REFUSED")
            assert not [name for name in reply.headers if name.startswith("access-control")]
        preflight = await asyncio.to_thread(send, port, SCORE, None, {"origin": "http://a"}, method="OPTIONS")
        assert preflight.status == 405

    with_reward(scenario)


def test_binary_messages_and_packed_bodies_are_read_too() -> None:
    async def scenario(served: Served, port: int) -> None:
        message = reward_pb2.ScoreRequest(
            items=[reward_pb2.ScoreItem(prompt=ITEM["prompt"], response=ITEM["response"])]
        )
        for packed in (False, True):
            raw = gzip.compress(message.SerializeToString()) if packed else message.SerializeToString()
            coding = {"content_encoding": "gzip"} if packed else {}
            reply = await post(port, SCORE, raw, content_type="application/proto", **coding)
            assert reply.status == 200 and reply.headers["content-type"] == "application/proto"
            assert reward_pb2.ScoreResponse.FromString(reply.content).scores[0].score == EXPECTED
        broken = await post(port, SCORE, b"\xff\xff", content_type="application/proto")
        assert (broken.status, broken.body["code"], broken.reason) == (400, "invalid_argument", "MALFORMED_MESSAGE")

    with_reward(scenario)


def test_errors_have_the_code_the_reason_and_the_fields_of_grpc() -> None:
    async def scenario(served: Served, port: int) -> None:
        reply = await post(port, SCORE, {"items": [], "model": "default"})
        assert reply.status == 400 and reply.body["code"] == "invalid_argument"
        assert reply.reason == "INVALID_FIELD" and reply.fields == ["items"]
        assert reply.body["details"][0]["debug"] == {"reason": "INVALID_FIELD", "domain": "tether"}
        missing = await post(port, SCORE, {"items": [ITEM], "model": "none"})
        assert (missing.status, missing.body["code"], missing.reason) == (404, "not_found", "MODEL_NOT_FOUND")
        assert served.value("tether_reward_requests_total", method="Score", code="INVALID_ARGUMENT") == 1

    with_reward(scenario)


def test_a_full_queue_says_when_to_call_again_in_a_header_and_a_detail() -> None:
    async def scenario(served: Served, port: int) -> None:
        reward_rules.GATE.clear()
        try:
            slow = [asyncio.create_task(post(port, SCORE, {"items": [ITEM]})) for _ in range(12)]
            refused = None
            while refused is None:
                done, _pending = await asyncio.wait(slow, timeout=0.05)
                refused = next((task.result() for task in done if task.result().status == 429), None)
        finally:
            reward_rules.GATE.set()
        await asyncio.gather(*slow)
        assert refused.body["code"] == "resource_exhausted"
        delay = refused.detail("RetryInfo").retry_delay
        assert int(refused.headers["retry-after"]) >= delay.ToMilliseconds() / 1000 > 0

    with_reward(scenario, models=[reward_rules.GATED_MODEL], max_items=1, batch={"queue_limit": 2, "max_items": 1})


def test_the_deadline_is_the_callers_or_the_services_default() -> None:
    async def scenario(served: Served, port: int) -> None:
        reward_rules.GATE.clear()
        try:
            for headers in ({"connect_timeout_ms": "80"}, {}):
                reply = await post(port, SCORE, {"items": [ITEM]}, **headers)
                assert (reply.status, reply.body["code"]) == (504, "deadline_exceeded")
            counted = served.value("tether_reward_requests_total", method="Score", code="DEADLINE_EXCEEDED")
            assert counted == 2
            endless = await post(port, SCORE, {"items": [ITEM]}, connect_timeout_ms="999999999")
            assert (endless.status, endless.reason) == (400, "DEADLINE_TOO_LONG")
            for bad in ("1.5", "-1", "0", "00", "99999999999", "soon", ""):
                reply = await post(port, SCORE, {"items": [ITEM]}, connect_timeout_ms=bad)
                assert (reply.status, reply.fields) == (400, ["connect-timeout-ms"])
        finally:
            reward_rules.GATE.set()

    with_reward(scenario, models=[reward_rules.GATED_MODEL], http_timeout_seconds=0.1)


def test_a_caller_that_leaves_gives_its_call_up() -> None:
    async def scenario(served: Served, port: int) -> None:
        reward_rules.GATE.clear()
        try:
            _reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps({"items": [ITEM]}).encode()
            head = f"POST {SCORE} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            writer.write(head.encode() + b"\r\n\r\n" + body)
            while "tether_reward_queue_wait_seconds_count 1.0" not in served.metrics():
                await asyncio.sleep(0.01)
            writer.close()
            while not served.value("tether_reward_requests_total", method="Score", code="CANCELLED"):
                await asyncio.sleep(0.01)
        finally:
            reward_rules.GATE.set()

    with_reward(scenario, models=[reward_rules.GATED_MODEL])


@pytest.mark.parametrize(
    ("path", "headers", "method", "status", "reason"),
    [
        ("/nothing", {}, "POST", 404, "UNKNOWN_METHOD"),
        ("/tether.v1.RewardService/Nothing", {}, "POST", 404, "UNKNOWN_METHOD"),
        ("/tether.v1.RewardService/Score/", {}, "POST", 404, "UNKNOWN_METHOD"),
        ("/%2e%2e/healthz", {}, "GET", 404, "UNKNOWN_METHOD"),
        ("/healthz", {}, "POST", 404, "UNKNOWN_METHOD"),
        (SCORE, {}, "GET", 405, "METHOD_NOT_ALLOWED"),
        (SCORE, {}, "PUT", 405, "METHOD_NOT_ALLOWED"),
        (SCORE, {"content-type": "text/plain"}, "POST", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (SCORE, {"content-type": ""}, "POST", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (SCORE, {"content-type": "application/grpc"}, "POST", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (SCORE, {"content-type": "application/grpc-web+proto"}, "POST", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (SCORE, {"content-type": "application/connect+json"}, "POST", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (SCORE, {"content-encoding": "br"}, "POST", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (SCORE, {"connect-protocol-version": "2"}, "POST", 400, "INVALID_FIELD"),
    ],
)
def test_what_is_no_call_is_refused_in_the_same_shape(
    path: str, headers: dict[str, str], method: str, status: int, reason: str
) -> None:
    async def scenario(served: Served, port: int) -> None:
        given = {"content-type": "application/json", **headers}
        reply = await asyncio.to_thread(send, port, path, b"{}", given, method=method)
        assert (reply.status, reply.reason) == (status, reason)
        assert set(reply.body) == {"code", "message", "details"}
        assert ("allow" in reply.headers) == (status == 405)

    with_reward(scenario)


def test_health_says_the_state_and_nothing_else() -> None:
    async def scenario(served: Served, port: int) -> None:
        page = await get(port, "/healthz")
        assert (page.status, page.body) == (200, {"status": "SERVING"})
        await served.runner.health.engine_failed()
        page = await get(port, "/healthz")
        assert (page.status, page.body) == (503, {"status": "NOT_SERVING"})
        refused = await post(port, SCORE, {"items": [ITEM]})
        assert (refused.status, refused.body["code"], refused.reason) == (503, "unavailable", "ENGINE_FAILED")

    with_reward(scenario)


def test_the_openapi_document_of_the_service_is_served() -> None:
    async def scenario(served: Served, port: int) -> None:
        page = await get(port, "/openapi.json")
        assert page.status == 200 and set(page.body["paths"]) >= {SCORE}

    with_reward(scenario)


def test_many_calls_go_over_one_connection() -> None:
    def calls(port: int) -> list[int]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        statuses = []
        for body in (b'{"items":[]}', json.dumps({"items": [ITEM]}).encode(), b"{"):
            connection.request("POST", SCORE, body, {"content-type": "application/json"})
            before = connection.sock
            statuses.append(take(connection.getresponse()).status)
            assert connection.sock is before  # not closed in between
        connection.close()
        return statuses

    async def scenario(served: Served, port: int) -> None:
        assert await asyncio.to_thread(calls, port) == [400, 200, 400]

    with_reward(scenario)


def test_draining_lets_calls_in_flight_finish_and_closes_connections() -> None:
    async def scenario(served: Served, port: int) -> None:
        reward_rules.GATE.clear()
        idle = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        await asyncio.to_thread(idle.request, "GET", "/healthz")
        assert (await asyncio.to_thread(idle.getresponse)).read()
        try:
            slow = asyncio.create_task(post(port, SCORE, {"items": [ITEM]}))
            while "tether_reward_queue_wait_seconds_count 1.0" not in served.metrics():
                await asyncio.sleep(0.01)
            closing = asyncio.create_task(served.runner.close())
            while not served.runner.health.is_draining:
                await asyncio.sleep(0.01)
            assert await asyncio.to_thread(idle.sock.recv, 1) == b""  # the idle connection is closed at once
            idle.close()
            assert not slow.done() and not closing.done()
        finally:
            reward_rules.GATE.set()
        reply = await slow
        assert reply.status == 200 and reply.headers["connection"] == "close"
        await closing
        with pytest.raises(ConnectionRefusedError):
            await get(port, "/healthz")

    with_reward(scenario, models=[reward_rules.GATED_MODEL], drain_seconds=10)


def test_before_it_drains_a_service_says_so_and_still_answers() -> None:
    async def scenario(served: Served, port: int) -> None:
        closing = asyncio.create_task(served.runner.close())
        while (page := await get(port, "/healthz")).status == 200:
            await asyncio.sleep(0.01)
        assert (page.status, page.headers["connection"]) == (503, "close")
        reply = await post(port, SCORE, {"items": [ITEM]})
        assert reply.status == 200 and reply.headers["connection"] == "close"  # so that the next call goes elsewhere
        await closing

    with_reward(scenario, drain_notice_seconds=0.5)


def test_a_connection_ends_with_an_answer_when_it_is_old() -> None:
    async def scenario(served: Served, port: int) -> None:
        reply = await post(port, SCORE, {"items": [ITEM]})
        assert reply.status == 200 and reply.headers["connection"] == "close"

    with_reward(scenario, max_connection_age_seconds=1e-6)


def test_a_call_that_outlives_the_drain_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(served: Served, port: int) -> None:
        reward_rules.GATE.clear()
        try:
            slow = asyncio.create_task(post(port, SCORE, {"items": [ITEM]}))
            while "tether_reward_queue_wait_seconds_count 1.0" not in served.metrics():
                await asyncio.sleep(0.01)
            closing = asyncio.create_task(served.runner.close())
            reply = await slow
            assert (reply.status, reply.reason, reply.headers["connection"]) == (503, "DRAINING", "close")
        finally:
            reward_rules.GATE.set()
        await closing

    with_reward(scenario, models=[reward_rules.GATED_MODEL], drain_seconds=0.2)
    assert "Traceback" not in caplog.text


def test_http_is_off_unless_it_is_asked_for_and_has_the_rules_of_other_addresses() -> None:
    assert ServerSettings().http_address == ""

    async def main(**values: str) -> int | None:
        settings = RewardSettings.model_validate({**LOCAL, "engine": "fake", **values})
        async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
            return served.runner.http_port

    assert run(main()) is None
    for address in ("0.0.0.0:0", "127.0.0.1", "127.0.0.1:99999"):
        with pytest.raises(InvalidArgumentError) as caught:
            run(main(http_address=address))
        assert caught.value.violations[0].field == "http_address"
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(InvalidArgumentError, match="taken") as caught:
        run(main(http_address=f"127.0.0.1:{other.getsockname()[1]}"))
    assert caught.value.violations[0].field == "http_address"
