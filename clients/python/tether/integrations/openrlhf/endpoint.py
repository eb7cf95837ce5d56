"""OpenRLHF's remote reward model over HTTP: an ASGI application in front of the reward scorer.

`POST /get_reward` with {"query": [...], "prompts": [...], "labels": [...]} answers {"rewards": [...], "scores": [...],
"extra_logs": {}}; `GET /health` says whether the reward scorer serves. A failure is an HTTP status with {"error":
{"code", "reason", "message", "field"}}, never a reward.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import grpc

from tether.errors import InternalError, InvalidArgumentError, TetherError, UnavailableError
from tether.integrations.openrlhf.functions import options_from_environment
from tether.integrations.openrlhf.queries import PLAIN, QueryForm, split_queries
from tether.integrations.scoring import AsyncScorer, ScoringOptions, rewards_of
from tether.reward import ScoreItem

__all__ = ["EndpointLimits", "RewardEndpoint", "app"]

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

REWARD_PATH: Final = "/get_reward"
HEALTH_PATH: Final = "/health"
STATUSES: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
}
"""HTTP status of an error of the reward scorer; any other is between it and this endpoint: 502."""


@dataclass(frozen=True, slots=True)
class EndpointLimits:
    """What one caller can cost."""

    body_bytes: int = 16 * 1024 * 1024
    """Bytes of a request body at most."""
    body_seconds: float = 30.0
    """A body that takes longer to arrive is refused."""
    num_requests: int = 64
    """Requests that are read and scored at a time; the others wait unread."""


@dataclass(frozen=True, slots=True)
class _Reply:
    """What is sent back."""

    status: int
    """HTTP status."""
    body: dict[str, Any]
    """Sent as JSON."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Beside those of every reply."""


class _RefusedError(Exception):
    """The request is not one that this endpoint answers."""

    def __init__(self, status: HTTPStatus, message: str, *, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(message)
        body = {"error": {"code": "INVALID_ARGUMENT", "reason": status.name, "message": message, "field": ""}}
        self.reply = _Reply(status, body, headers)


class _GoneError(Exception):
    """The caller has hung up."""


class RewardEndpoint:
    """An ASGI application that speaks OpenRLHF's remote reward protocol."""

    def __init__(
        self, options: ScoringOptions, *, form: QueryForm = PLAIN, limits: EndpointLimits | None = None
    ) -> None:
        """Remember how to score; nothing is opened before the first request.

        Args:
            options: Where and how to score; `unscored` is "raise" or a number.
            form: What stands around the texts in prompts and queries.
            limits: What one caller can cost; None for the defaults.
        """
        self._scorer = AsyncScorer(options.need_a_number("OpenRLHF"))
        self._form = form
        self._limits = limits or EndpointLimits()
        self._slots = asyncio.Semaphore(self._limits.num_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or accompany the server from start to end."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            try:
                reply = await self._reply(scope, receive)
            except _GoneError:
                return
            await _send(reply, send)
        else:
            raise InternalError(f"This endpoint does not speak {scope['type']}.")

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            event = (await receive())["type"]
            if event == "lifespan.shutdown":
                await self._scorer.close()
            await send({"type": event + ".complete"})
            if event == "lifespan.shutdown":
                return

    async def _reply(self, scope: Scope, receive: Receive) -> _Reply:
        """Return the answer to a request; every failure but a caller that hung up has one."""
        try:
            if _route(scope) == HEALTH_PATH:
                return await self._health()
            async with self._slots:
                body = await self._read(scope, receive)
                return await _unless_gone(self._score(body), receive)
        except _RefusedError as refused:
            return refused.reply
        except TetherError as error:
            return _error_reply(error)
        except _GoneError:
            raise
        except Exception:
            log.exception("a request failed")
            return _error_reply(InternalError("The endpoint has a defect; its log says more."))

    async def _health(self) -> _Reply:
        if await self._scorer.is_serving():
            return _Reply(HTTPStatus.OK, {"status": "SERVING"})
        return _error_reply(UnavailableError(f"The reward scorer {self._scorer.options.target} does not serve."))

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body.

        Raises:
            _RefusedError: It is too long or takes too long.
            _GoneError: The caller hung up.
        """
        limits = self._limits
        too_large = _RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is longer than {limits.body_bytes} bytes; send less at a time.",
        )
        declared = _header(scope, b"content-length")
        if declared.isdigit() and int(declared) > limits.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise _GoneError
                    body += event.get("body", b"")
                    if len(body) > limits.body_bytes:
                        raise too_large
                    if not event.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise _RefusedError(
                HTTPStatus.REQUEST_TIMEOUT, f"The body did not arrive within {limits.body_seconds:g} s."
            ) from None

    async def _score(self, body: bytes) -> _Reply:
        """Return the rewards that a body asks for."""
        items = await asyncio.to_thread(_read_items, body, self._form)
        scores = await self._scorer.score(items)
        fields = [f"query[{index}]" for index in range(len(items))]
        rewards = rewards_of(scores, unscored=self._scorer.options.unscored, fields=fields)
        return _Reply(HTTPStatus.OK, {"rewards": rewards, "scores": rewards, "extra_logs": {}})


@functools.cache
def _endpoint_of_environment() -> RewardEndpoint:
    options = options_from_environment()
    return RewardEndpoint(ScoringOptions(options["target"], options["model"], options["version"]))


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as the endpoint that the environment describes: TETHER_OPENRLHF_TARGET, _MODEL and _VERSION."""
    try:
        endpoint = _endpoint_of_environment()
    except TetherError as error:
        if scope["type"] != "lifespan":
            raise
        await receive()
        await send({"type": "lifespan.startup.failed", "message": str(error)})
    else:
        await endpoint(scope, receive, send)


def _route(scope: Scope) -> str:
    """Return the path of a request that has the right method and type.

    Raises:
        _RefusedError: It has not. JSON is insisted on because a web page cannot send it elsewhere without asking.
    """
    path, method = str(scope["path"]), str(scope["method"])
    methods = {REWARD_PATH: "POST", HEALTH_PATH: "GET"}
    if path not in methods:
        raise _RefusedError(HTTPStatus.NOT_FOUND, f"There are POST {REWARD_PATH} and GET {HEALTH_PATH}.")
    if method != methods[path]:
        allowed = methods[path]
        raise _RefusedError(
            HTTPStatus.METHOD_NOT_ALLOWED, f"Use {allowed} here.", headers=((b"allow", allowed.encode()),)
        )
    kind = _header(scope, b"content-type").partition(b";")[0].strip().lower()
    if path == REWARD_PATH and kind != b"application/json":
        raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send the header content-type: application/json.")
    return path


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


def _read_items(body: bytes, form: QueryForm) -> Sequence[ScoreItem]:
    """Return the items of a body. Slow for a long one: call it in a thread.

    Raises:
        InvalidArgumentError: The body is not what OpenRLHF sends.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):  # broken UTF-8 is a ValueError too
        raise InvalidArgumentError("The body is not JSON in UTF-8.", field="body", reason="NOT_JSON") from None
    if not isinstance(asked, dict):
        raise InvalidArgumentError("The body is not a JSON object.", field="body")
    for name in ("query", "prompts"):
        if not isinstance(asked.get(name), list):
            raise InvalidArgumentError(f"{name} is needed: a list of texts.", field=name)
    if not asked["query"]:
        raise InvalidArgumentError("query is empty; there is nothing to score.", field="query")
    return split_queries(asked["query"], asked["prompts"], form=form)


async def _unless_gone(work: Awaitable[_Reply], receive: Receive) -> _Reply:
    """Return the result of the work, which is cancelled when the caller hangs up.

    Raises:
        _GoneError: The caller hung up.
    """

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _GoneError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _error_reply(error: TetherError) -> _Reply:
    status = STATUSES.get(error.code, HTTPStatus.BAD_GATEWAY)
    if isinstance(error, InternalError):
        status = HTTPStatus.INTERNAL_SERVER_ERROR
    field = error.violations[0].field if error.violations else ""
    body = {"code": error.code.name, "reason": error.reason, "message": error.message, "field": field}
    wait = error.retry_after_seconds
    headers = () if wait is None else ((b"retry-after", str(math.ceil(wait)).encode()),)
    return _Reply(status, {"error": body}, headers)


async def _send(reply: _Reply, send: Send) -> None:
    content = json.dumps(reply.body, allow_nan=False).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": int(reply.status), "headers": headers})
    await send({"type": "http.response.body", "body": content})
