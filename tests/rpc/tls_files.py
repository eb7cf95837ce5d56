"""Certificates made on the spot, and servers that demand them."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tether.credentials import TlsFiles

Add = Callable[[grpc.aio.Server], None]


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates for 127.0.0.1 and localhost."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        basic = x509.BasicConstraints(ca=True, path_length=None)
        self._certificate = _builder(self._name, self._name, self._key).add_extension(basic, critical=True)
        self.pem = self._certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str, *, dns: str = "localhost") -> Pair:
        """Return a new certificate with its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = [x509.DNSName(dns), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = _builder(subject, self._name, key).add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        return Pair(certificate, _private(key))


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write_files(folder: Path, authority: Authority, pair: Pair | None = None) -> TlsFiles:
    """Write what a client needs, each file replaced as a whole, and return where."""
    _replace(folder / "ca.pem", authority.pem)
    if pair is None:
        return TlsFiles(ca_file=folder / "ca.pem")
    _replace(folder / "client.pem", pair.certificate)
    _replace(folder / "client.key", pair.key)
    return TlsFiles(folder / "ca.pem", folder / "client.pem", folder / "client.key")


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


class Visitors(grpc.aio.ServerInterceptor):
    """Notes the token and the certificate name of every call; refuses other tokens than the wanted one."""

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
        roots = self.authority.pem if self.mutual else None
        return grpc.ssl_server_certificate_configuration([(self.pair.key, self.pair.certificate)], roots)


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
