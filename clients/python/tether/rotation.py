"""A channel that shows credentials: a token with every call, and a new connection when the TLS files have changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Self

import grpc
import grpc.aio

from tether.credentials import Credentials

__all__ = ["CredentialChannel"]

LOOK_SECONDS: Final = 1.0
"""Who waits for a connection looks this often whether the files have changed: with the old ones it may never come."""


class CredentialChannel(grpc.aio.Channel):
    """Looks like any channel. gRPC reads TLS files once per channel (grpc 15735), so there is a new one per content.

    Calls in flight finish on the channel that they began on, which is closed after the last of them.
    """

    def __init__(
        self, credentials: Credentials, open_channel: Callable[[grpc.ChannelCredentials | None], grpc.aio.Channel]
    ) -> None:
        """Open the first channel.

        Args:
            credentials: Token and TLS files.
            open_channel: Opens a channel with what it is given; None is one without TLS.
        """
        self._credentials = credentials
        self._open = open_channel
        self._newest = _Generation(open_channel(credentials.for_channel()))
        self._draining: set[_Generation] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close all channels; calls in flight get `grace` seconds to finish."""
        every = [self._newest, *self._draining]
        await asyncio.gather(*(generation.close(grace) for generation in every))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state of the newest channel."""
        return self.current().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Return once the newest channel has another state."""
        await self.current().channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Return once there is a connection."""
        while not await self._is_ready(self.current()):
            pass

    async def _is_ready(self, generation: _Generation) -> bool:
        """Return True once a channel has a connection, False once it is not the newest any more."""
        ready = asyncio.ensure_future(generation.channel.channel_ready())
        try:
            while self.current() is generation:
                if (await asyncio.wait((ready,), timeout=LOOK_SECONDS))[0]:
                    await ready
                    return True
            return False
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return a method of the service, as `grpc.aio.Channel.unary_unary`."""
        return _Method(self, "unary_unary", (method, *arguments), options)

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return a method of the service, as `grpc.aio.Channel.unary_stream`."""
        return _Method(self, "unary_stream", (method, *arguments), options)

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return a method of the service, as `grpc.aio.Channel.stream_unary`."""
        return _Method(self, "stream_unary", (method, *arguments), options)

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return a method of the service, as `grpc.aio.Channel.stream_stream`."""
        return _Method(self, "stream_stream", (method, *arguments), options)

    def current(self) -> _Generation:
        """Return the channel to use now, a new one if the files have changed."""
        if self._credentials.tls_changed():
            old, self._newest = self._newest, _Generation(self._open(self._credentials.for_channel()))
            self._draining.add(old)
            old.retire(on_end=self._draining.discard)
        return self._newest

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what is sent beside every message."""
        return self._credentials.metadata()


class _Generation:
    """A channel and the number of its calls in flight."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._num_calls = 0
        self._on_end: Callable[[_Generation], None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def track(self, call: Any) -> None:
        """Count a call until it is done."""
        self._num_calls += 1
        call.add_done_callback(self._note_done)

    def retire(self, *, on_end: Callable[[_Generation], None]) -> None:
        """Close the channel once its last call is done."""
        self._on_end = on_end
        self._close_if_idle()

    async def close(self, grace: float | None) -> None:
        """Close the channel now."""
        await self.channel.close(grace)
        if self._closing is not None:
            await self._closing

    def _note_done(self, call: Any) -> None:
        self._num_calls -= 1
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._on_end is not None and self._num_calls == 0 and self._closing is None:
            self._closing = asyncio.create_task(self._end(self._on_end))

    async def _end(self, on_end: Callable[[_Generation], None]) -> None:
        await self.channel.close(None)
        on_end(self)


class _Method:
    """A method of a service on whichever channel is the current one when it is called."""

    def __init__(
        self, channel: CredentialChannel, kind: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._channel, self._kind, self._arguments, self._options = channel, kind, arguments, options
        self._bound: tuple[_Generation, Any] | None = None

    def __call__(self, *arguments: Any, metadata: Any = None, **options: Any) -> Any:
        """Begin a call; arguments and result are those of gRPC."""
        generation = self._channel.current()
        if self._bound is None or self._bound[0] is not generation:
            make = getattr(generation.channel, self._kind)
            self._bound = (generation, make(*self._arguments, **self._options))
        shown = (*(metadata or ()), *self._channel.metadata())
        call = self._bound[1](*arguments, metadata=shown, **options)
        generation.track(call)
        return call
