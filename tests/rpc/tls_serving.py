"""Servers of scripted services that show a certificate, may demand one, and note what their callers show."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from tests.rpc.certificates import Authority, Pair

Add = Callable[[grpc.aio.Server], None]


class Visitors(grpc.aio.ServerInterceptor):
    """Notes the method and the token of every call; refuses other tokens than the wanted one."""

    def __init__(self, wanted: str | None = None) -> None:
        self.wanted = wanted
        self.seen: list[tuple[str, str | None]] = []

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Note a call."""
        shown = dict(handler_call_details.invocation_metadata).get("authorization")
        self.seen.append((handler_call_details.method.rpartition("/")[2], shown))
        if self.wanted is None or shown == f"Bearer {self.wanted}":
            return await continuation(handler_call_details)

        async def refuse(request: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

        return grpc.unary_unary_rpc_method_handler(refuse)

    def tokens(self, method: str) -> set[str | None]:
        """Return what calls of a method showed."""
        return {shown for name, shown in self.seen if name == method}


@dataclass(slots=True)
class Identity:
    """What a server shows and whom it lets in; may be replaced while it runs."""

    authority: Authority
    pair: Pair
    mutual: bool = False

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow changes of this object at the next handshake."""
        return grpc.dynamic_ssl_server_credentials(self._now(), self._now, self.mutual)

    def _now(self) -> Any:
        roots = self.authority.root if self.mutual else None
        return grpc.ssl_server_certificate_configuration([(self.pair.key, self.pair.chain)], roots)


@asynccontextmanager
async def serving_tls(identity: Identity | None, *adders: Add, visitors: Visitors, port: int = 0) -> AsyncIterator[str]:
    """Serve on the running loop, without TLS where there is no identity; yield host:port."""
    server = grpc.aio.server(interceptors=[visitors], options=[("grpc.so_reuseport", 0)])
    for add in adders:
        add(server)
    address = f"127.0.0.1:{port}"
    number = (
        server.add_insecure_port(address)
        if identity is None
        else server.add_secure_port(address, identity.credentials())
    )
    await server.start()
    try:
        yield f"127.0.0.1:{number}"
    finally:
        await server.stop(None)
