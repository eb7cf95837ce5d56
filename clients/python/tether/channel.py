"""Channels to the services and how to call over them: a deadline on every call, typed errors, bounded repeats."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol, Self, TypeVar

import grpc
import grpc.aio

from tether.attempts import ATTEMPTS, pause_after
from tether.breaker import BREAKER_OPEN, CircuitBreaker
from tether.channel_options import channel_options, has_replicas
from tether.credentials import Credentials, Tls, Token
from tether.deadline import Deadline
from tether.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError, UnavailableError
from tether.health import answers, is_serving
from tether.rotation import CredentialChannel
from tether.status import from_rpc_error

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ListT = TypeVar("ListT", bound="_ListRequest")
PageT = TypeVar("PageT", bound="_Page")

DEFAULT_TIMEOUT_SECONDS: Final = 120.0
"""Deadline of a call unless the client or the call says otherwise."""
AWAY_SECONDS: Final = 60.0
"""How long a call without effect waits for a service that has answered before: longer than a restart takes."""
UNKNOWN_SECONDS: Final = 3.0
"""The same for one that has not: it may be the wrong address."""
PAUSE_SECONDS: Final = 0.2
"""Between the repeats of gRPC and the next ones at least; doubles while it is the service that says it is not there."""
LAST_PAUSE_SECONDS: Final = 5.0
"""Largest of these pauses."""
MAX_PUSHBACKS: Final = 20
"""Times that one call without effect waits because a service that is full says when to come back."""
PUSHBACK_JITTER: Final = 0.5
"""Such a wait is as long as the service says, and up to this share longer, so that not all callers return at once."""
NOT_WAITED_FOR: Final = (BREAKER_OPEN, "ADAPTER_MISSING")
"""Reasons of UNAVAILABLE that end a call at once: a breaker has its own probe, an adapter somebody must push."""


def open_channel(
    target: str,
    *,
    retries: bool = True,
    token: Token = None,
    tls: Tls = None,
    allow_plaintext_token: bool = False,
) -> grpc.aio.Channel:
    """Return a channel to `host:port`, `dns:///name:port` or `unix:path`, bound to the running event loop.

    Args:
        target: Where to call.
        retries: As in ServiceClient, as all that follows.
        token: Sent with every call.
        tls: Files of TLS.
        allow_plaintext_token: Send the token unencrypted.

    Raises:
        InvalidArgumentError: A file is of no use, or PLAINTEXT_TOKEN.
    """
    credentials = Credentials(target, token=token, tls=tls, allow_plaintext_token=allow_plaintext_token)
    return channel_with(credentials, target, retries=retries)


def channel_with(
    credentials: Credentials, target: str, *, retries: bool = True, own_connection: bool = False
) -> grpc.aio.Channel:
    """Return a channel that shows credentials, bound to the running event loop.

    Args:
        credentials: Token and TLS files, made for the same target.
        target: Where to call.
        retries: As in ServiceClient.
        own_connection: Share the connection with no other channel of this process.
    """
    options = [*channel_options(retries=retries, replicas=has_replicas(target)), *credentials.options]
    if own_connection:
        options.append(("grpc.use_local_subchannel_pool", 1))

    def open_with(held: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        if held is None:
            return grpc.aio.insecure_channel(target, options=options)
        return grpc.aio.secure_channel(target, held, options=options)

    return open_with(None) if credentials.is_empty else CredentialChannel(credentials, open_with)


def check_timeout(seconds: float) -> float:
    """Return the timeout if it is a positive, finite number of seconds.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not math.isfinite(seconds) or seconds <= 0:
        raise InvalidArgumentError(f"{seconds!r} is not a positive, finite number of seconds.", field="timeout_seconds")
    return seconds


class _ListRequest(Protocol):
    """Asks for a part of a list."""

    page_token: str


class _Page(Protocol):
    """Such a part."""

    next_page_token: str


class ServiceClient:
    """A channel to one service and how to call it; the base of the clients.

    An async context manager. The channel opens with the first call, on the event loop of that call.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        retries: bool = True,
        breaker: bool = False,
        token: Token = None,
        tls: Tls = None,
        allow_plaintext_token: bool = False,
    ) -> None:
        """Remember where to call.

        Args:
            target: `host:port`, `dns:///name:port` (all its addresses are used) or `unix:path`.
            timeout_seconds: Deadline of each call that does not set its own.
            retries: Repeat calls without effect that find the service unavailable, or full and told when to come back;
                False if the caller does.
            breaker: Fail at once, with BREAKER_OPEN, while the service does not answer.
            token: Shown with every call; a path is that of a file that holds it and is read again when it changes.
                None: TETHER_TOKEN or TETHER_TOKEN_FILE; "": none.
            tls: Files of TLS, read again when they change. None: TETHER_CA_FILE, TETHER_CERTIFICATE_FILE and
                TETHER_KEY_FILE, no TLS where none of them is set; False: no TLS.
            allow_plaintext_token: Send the token to another machine although there is no TLS.

        Raises:
            InvalidArgumentError: A value or file is of no use, or PLAINTEXT_TOKEN: others could read the token.
        """
        if not target:
            raise InvalidArgumentError("A target such as 127.0.0.1:50051 is needed.", field="target")
        self.target = target
        self.timeout_seconds = check_timeout(timeout_seconds)
        self.breaker = CircuitBreaker(self.is_serving, target=target) if breaker else None
        """Opens when the service does not answer; None without one."""
        self._retries = retries
        self._credentials = Credentials(target, token=token, tls=tls, allow_plaintext_token=allow_plaintext_token)
        self._has_answered = False
        self._opened: grpc.aio.Channel | None = None
        self._closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled, those that wait for a service fail. Twice is once."""
        self._closed.set()
        if self.breaker is not None:
            await self.breaker.close()
        if self._opened is not None:
            await self._opened.close()

    @property
    def _channel(self) -> grpc.aio.Channel:
        self._check_open()
        if self._opened is None:
            self._opened = channel_with(self._credentials, self.target, retries=self._retries)
        return self._opened

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise FailedPreconditionError(f"The client of {self.target} is closed.", reason="CLIENT_CLOSED")

    def _timeout(self, timeout_seconds: float | None) -> float:
        return self.timeout_seconds if timeout_seconds is None else check_timeout(timeout_seconds)

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float | None,
    ) -> ResponseT:
        """Return the response of a unary call; every failure is a TetherError."""
        timeout = self._timeout(timeout_seconds)
        return await self._guarded(lambda seconds: method(request, timeout=seconds), timeout)

    async def _repeat(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float | None,
    ) -> ResponseT:
        """Return the response of a unary call, made up to ATTEMPTS times while the service is unavailable.

        Once if the caller repeats it. Only for requests with a request id, whose repeat has no second effect.
        """
        for attempt in range(1, ATTEMPTS if self._retries else 1):
            try:
                return await self._call(method, request, timeout_seconds)
            except UnavailableError:
                await pause_after(attempt)
        return await self._call(method, request, timeout_seconds)

    async def _read(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float | None,
    ) -> ResponseT:
        """Return the response of a unary call without effect; every failure is a TetherError.

        A service that has answered before is taken to be back soon, so that its restart costs no call. One that is full
        is called again when it says.
        """
        timeout = self._timeout(timeout_seconds)
        end, give_up, pause = time.monotonic() + timeout, math.inf, PAUSE_SECONDS
        pushbacks = 0
        while True:
            left = max(end - time.monotonic(), 0.0)
            try:
                response = await self._guarded(
                    lambda seconds: method(request, timeout=seconds), left, of_seconds=timeout
                )
            except UnavailableError as error:
                if not self._retries or error.reason in NOT_WAITED_FOR:
                    raise
                patience = AWAY_SECONDS if self._has_answered else UNKNOWN_SECONDS
                give_up = min(give_up, time.monotonic() + patience)
                if not self._is_connected():
                    pause = PAUSE_SECONDS
                if not await self._comes_back(min(give_up, end), pause):
                    self._has_answered = self._has_answered and end < give_up  # a short deadline tells nothing
                    raise
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
            except ResourceExhaustedError as error:
                pushbacks += 1
                if not self._retries or pushbacks > MAX_PUSHBACKS or not await self._has_room_again(error, end, pause):
                    raise
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
            else:
                self._has_answered = True
                return response

    async def _pages(
        self, method: grpc.aio.UnaryUnaryMultiCallable[ListT, PageT], request: ListT, timeout_seconds: float | None
    ) -> AsyncIterator[PageT]:
        """Yield all parts of a list, at least one, each read by a call of its own as by `_read`."""
        while True:
            page = await self._read(method, request, timeout_seconds)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _is_connected(self) -> bool:
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def _has_room_again(self, error: ResourceExhaustedError, end: float, pause: float) -> bool:
        """Return True when a full service may be called again, at once False if it does not say when, or too late.

        Raises:
            FailedPreconditionError: CLIENT_CLOSED, at once when the client is closed meanwhile.
        """
        if error.retry_after_seconds is None:
            return False
        wait = max(error.retry_after_seconds, pause) * random.uniform(1.0, 1.0 + PUSHBACK_JITTER)
        if time.monotonic() + wait >= end:
            return False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), wait)
        self._check_open()
        return True

    async def _comes_back(self, give_up: float, pause: float) -> bool:
        """Return whether there is a connection before a time, after a pause; not if the pause alone takes longer.

        Raises:
            FailedPreconditionError: CLIENT_CLOSED, at once when the client is closed meanwhile.
        """
        left = give_up - time.monotonic()
        if left <= pause:
            return False

        async def connect() -> None:
            await asyncio.sleep(pause)
            await self._channel.channel_ready()

        connecting, closing = asyncio.create_task(connect()), asyncio.create_task(self._closed.wait())
        try:
            await asyncio.wait((connecting, closing), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            is_there = connecting.done()
        finally:
            connecting.cancel()
            closing.cancel()
            await asyncio.gather(connecting, closing, return_exceptions=True)
        self._check_open()
        return is_there

    async def _upload(
        self,
        method: grpc.aio.StreamUnaryMultiCallable[RequestT, ResponseT],
        requests: Callable[[], AsyncIterator[RequestT]],
        timeout_seconds: float | None,
    ) -> ResponseT:
        """Return the response to a stream of requests; every failure is a TetherError."""
        timeout = self._timeout(timeout_seconds)
        return await self._guarded(lambda seconds: method(requests(), timeout=seconds), timeout)

    async def _guarded(
        self, begin: Callable[[float], Awaitable[ResponseT]], seconds: float, *, of_seconds: float | None = None
    ) -> ResponseT:
        """Return the response of a call, begun only if the breaker lets it; every failure is a TetherError.

        Args:
            begin: Makes the call with so many seconds; once more if the time of day jumps while it is begun.
            seconds: What it has.
            of_seconds: What the caller gave, for the message; None: the same.
        """

        async def call() -> ResponseT:
            deadline = Deadline(seconds)
            try:
                try:
                    return await begin(seconds)
                except grpc.aio.AioRpcError as error:
                    if not deadline.was_misread(error):
                        raise
                return await begin(deadline.left)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, target=self.target, timeout_seconds=of_seconds or seconds) from None

        return await (call() if self.breaker is None else self.breaker.call(call))

    async def is_serving(self) -> bool:
        """Return whether the service says that it serves; one that does not answer in a second does not."""
        return await is_serving(self._channel)

    async def answers(self) -> bool:
        """Return whether the service answers a health check within a second, whatever it says."""
        return await answers(self._channel)

    async def _stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float,
    ) -> AsyncIterator[ResponseT]:
        """Yield the responses of a server stream; every failure is a TetherError. Leaving it cancels the call."""
        deadline, left = Deadline(timeout_seconds), timeout_seconds
        while True:
            call = method(request, timeout=left)
            try:
                async for response in call:
                    yield response
                return
            except grpc.aio.AioRpcError as error:
                if left < timeout_seconds or not deadline.was_misread(error):
                    raise from_rpc_error(error, target=self.target, timeout_seconds=timeout_seconds) from None
                left = deadline.left  # it has not begun, see Deadline
            finally:
                call.cancel()
