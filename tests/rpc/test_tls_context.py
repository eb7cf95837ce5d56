"""The SSL context that anything but gRPC serves with, and the date that is read from a certificate."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry

from tests.rpc.certificates import DAY, Authority, Pair, authority, service_files
from tests.rpc.serving import run
from tether.errors import InvalidArgumentError
from tether_services.runtime.limits import name_identities
from tether_services.runtime.settings import TlsSettings
from tether_services.runtime.tls import ServerCertificates, identities_of, read_expiry


@asynccontextmanager
async def serving_bytes(context: ssl.SSLContext, names: list[tuple[str, ...]] | None = None) -> AsyncIterator[int]:
    """Serve the letter x to whoever connects, note who that is in `names`, and yield the port."""
    names = [] if names is None else names

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        names.append(identities_of(writer.get_extra_info("peercert")))
        writer.write(b"x")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def connect(port: int, folder: Path, pair: Pair | None = None, *, server_name: str | None = "localhost") -> str:
    """Return the certificate that is shown, or why no connection came about."""
    context = ssl.create_default_context(cadata=authority().root.decode())
    context.check_hostname = server_name is not None
    if pair is not None:
        (folder / "caller.pem").write_bytes(pair.chain + pair.key)
        context.load_cert_chain(folder / "caller.pem")
    return await asyncio.to_thread(_connect, port, context, server_name)


def _connect(port: int, context: ssl.SSLContext, server_name: str | None) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=server_name) as secure:
                if secure.recv(1) != b"x":
                    return "refused"
                return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")
        except (ssl.SSLError, ConnectionError) as error:  # TLS 1.3 tells a caller of its certificate when it reads
            return type(error).__name__


def certificates(folder: Path, *, client_root: bytes | None = None, pair: Pair | None = None) -> ServerCertificates:
    files = service_files(folder, pair)
    return ServerCertificates(TlsSettings.model_validate(files.settings(client_root=client_root)), CollectorRegistry())


@pytest.mark.parametrize("server_name", ["localhost", None])
def test_new_connections_of_a_context_get_the_certificate_of_their_moment(
    tmp_path: Path, server_name: str | None
) -> None:
    first, second = authority().sign(), authority().sign()

    async def scenario() -> list[str]:
        async with serving_bytes(certificates(tmp_path, pair=first).server_context()) as port:
            seen = [await connect(port, tmp_path, server_name=server_name)]
            service_files(tmp_path, second)
            return [*seen, await connect(port, tmp_path, server_name=server_name)]

    assert run(scenario()) == [first.chain.decode(), second.chain.decode()]


def test_a_context_asks_for_certificates_of_the_roots_of_the_moment(tmp_path: Path) -> None:
    fresh = Authority("fresh")
    caller = fresh.sign("x")

    async def scenario() -> list[bool]:
        async with serving_bytes(certificates(tmp_path, client_root=authority().root).server_context()) as port:
            seen = [await connect(port, tmp_path, pair) for pair in (None, caller, authority().sign("y"))]
            (tmp_path / "clients.pem").write_bytes(fresh.root)
            seen += [await connect(port, tmp_path, pair) for pair in (None, caller, authority().sign("y"))]
            return ["CERTIFICATE" in outcome for outcome in seen]

    assert run(scenario()) == [False, False, True, False, True, False]


def test_a_context_tells_who_is_behind_a_certificate(tmp_path: Path) -> None:
    names: list[tuple[str, ...]] = []
    uris = ["spiffe://prod/trainer"]
    pairs = [authority().sign("laptop"), authority().sign("x", uris=uris), authority().sign("x", uris=uris * 2)]

    async def scenario() -> None:
        context = certificates(tmp_path, client_root=authority().root).server_context()
        async with serving_bytes(context, names) as port:
            for pair in pairs:
                await connect(port, tmp_path, pair)

    run(scenario())
    assert names == [("CN=laptop",), ("spiffe://prod/trainer",), ()]
    assert identities_of(None) == identities_of({}) == ()


@pytest.mark.parametrize("days", [-1, 1, 400, 365 * 30])
def test_the_expiry_is_the_one_that_a_library_reads(days: int) -> None:
    pair = authority().sign(ends=timedelta(days=days))  # 2050 and later are written in another form
    expected = x509.load_pem_x509_certificate(pair.chain).not_valid_after_utc
    assert datetime.fromtimestamp(read_expiry(b"# words before\n" + pair.chain + authority().root), UTC) == expected


@pytest.mark.parametrize("chain", [b"", b"nothing", authority().root[:-60], authority().root[100:]])
def test_what_is_no_certificate_has_no_expiry(chain: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        read_expiry(chain)


def test_every_cut_of_a_certificate_is_refused_with_an_error_of_ours() -> None:
    der = ssl.PEM_cert_to_DER_cert(authority().sign(ends=DAY).chain.decode())
    for length in range(0, 160):
        try:
            read_expiry(ssl.DER_cert_to_PEM_cert(der[:length]).encode())
        except InvalidArgumentError:
            continue


@pytest.mark.parametrize(
    ("uris", "names", "expected"),
    [
        ((), (), ()),
        ((), ("laptop",), ("CN=laptop",)),
        ((), ("", "a", "b"), ("CN=a", "CN=b")),
        (("spiffe://prod/a",), ("laptop",), ("spiffe://prod/a",)),
        (("spiffe://prod/a", "spiffe://prod/b"), ("laptop",), ()),
        (("http://x", "SpIfFe://prod/b"), ("laptop",), ()),
        (("http://x",), ("laptop",), ("CN=laptop",)),
    ],
)
def test_the_name_that_a_certificate_proves(
    uris: tuple[str, ...], names: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert name_identities(uris, names) == expected
