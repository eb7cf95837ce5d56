"""Certificates of a service, read again when their files change: for gRPC, and as an SSL context for anything else."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc
from prometheus_client import CollectorRegistry, Gauge

from tether.errors import InvalidArgumentError
from tether_services.runtime.limits import name_identities
from tether_services.runtime.logging import log_event
from tether_services.runtime.reloading import Reloaded
from tether_services.runtime.settings import TlsSettings

log = logging.getLogger(__name__)

CERTIFICATE, END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
_SEQUENCE, _EXPLICIT_0, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18
CENTURY_SPLIT: Final = 50
"""Two digits of a year below this are of this century (RFC 5280, section 4.1.2.5.1)."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """What the files of one moment hold. Equal if the bytes are."""

    key: bytes = field(repr=False)
    """PEM."""
    chain: bytes
    """PEM."""
    client_ca: bytes | None
    """PEM; None: callers show no certificate."""
    expires: float = field(compare=False)
    """When the certificate of the service does, in seconds since 1970."""
    context: ssl.SSLContext = field(compare=False, repr=False)
    """Serves with them."""


class ServerCertificates:
    """The certificates of a service, for all its ports."""

    def __init__(self, settings: TlsSettings, registry: CollectorRegistry, *, stale: Gauge | None = None) -> None:
        """Read the files.

        Raises:
            InvalidArgumentError: One of them cannot be used; the field says which.
        """
        self._settings = settings
        self._expiry = Gauge(
            "tether_tls_certificate_expiry_timestamp_seconds",
            "When the certificate of the service expires, in seconds since 1970.",
            registry=registry,
        )
        paths = [settings.certificate_file, settings.key_file]
        if settings.client_ca_file is not None:
            paths.append(settings.client_ca_file)
        self._files = Reloaded("tls", paths, self._load, stale=stale)

    def current(self) -> Certificates:
        """Return the certificates, after reading changed files again. Takes three calls of stat otherwise."""
        return self._files.refresh()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one gRPC port, which takes new connections with the certificates of their moment."""
        given = self.current()

        def fetch() -> Any:  # the stubs leave out that None means no change
            nonlocal given  # gRPC asks before each handshake, on a thread of its own
            current = self.current()
            if current is given:
                return None
            given = current
            return _configure(current)

        mutual = given.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(_configure(given), fetch, require_client_authentication=mutual)

    def server_context(self) -> ssl.SSLContext:
        """Return an SSL context for one listener, which takes new connections with the certificates of their moment."""
        context = _make_context(self._settings)

        def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, outer: ssl.SSLContext) -> None:
            connection.context = self.current().context  # asked for in each handshake, also without a server name

        context.sni_callback = choose
        return context

    def _load(self) -> Certificates:
        certificates = load_certificates(self._settings)
        self._expiry.set(certificates.expires)
        if certificates.expires < time.time():
            message = "callers will refuse it; put a valid one in its place, which needs no restart"
            log_event(log, "the certificate of the service has expired", level=logging.ERROR, action=message)
        return certificates


def identities_of(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the name that a caller's certificate proves, for `CallInfo.identities`.

    Args:
        certificate: What `getpeercert()` of a connection of `server_context` returns; empty or None without one.
    """
    given = certificate or {}
    uris = [value for kind, value in given.get("subjectAltName", ()) if kind == "URI"]
    attributes = [attribute for part in given.get("subject", ()) for attribute in part]
    return name_identities(uris, [value for kind, value in attributes if kind == "commonName"])


def load_certificates(settings: TlsSettings) -> Certificates:
    """Return what the files hold, proven to belong together.

    Raises:
        InvalidArgumentError: A file is missing, incomplete or of another kind, or the key is of another certificate.
    """
    before = _read_all(settings)
    chain, key, client_ca = before
    _check_whole(settings.certificate_file, chain, field="tls.certificate_file")
    if settings.client_ca_file is not None and client_ca is not None:
        _check_whole(settings.client_ca_file, client_ca, field="tls.client_ca_file")
    context = _make_context(settings)
    if _read_all(settings) != before:
        raise InvalidArgumentError("The files of tls change just now.", field="tls.certificate_file")
    return Certificates(key, chain, client_ca, read_expiry(chain), context)


def read_expiry(chain: bytes) -> float:
    """Return when the first certificate of PEM text expires, in seconds since 1970.

    The standard library decodes certificates of other machines only, in handshakes. RFC 5280, section 4.1: a
    certificate is a sequence of the signed part and more; the signed part is version (may be left out), serial number,
    algorithm, issuer, and validity: a sequence of two times.

    Raises:
        InvalidArgumentError: It is no certificate.
    """
    end = chain.find(END) + len(END)
    try:
        der = ssl.PEM_cert_to_DER_cert(chain[chain.find(CERTIFICATE) : end].decode("ascii"))
        signed = _enter(_enter(der, _SEQUENCE), _SEQUENCE)
        if signed[0] == _EXPLICIT_0:
            signed = _skip(signed)
        validity = _enter(_skip(_skip(_skip(signed))), _SEQUENCE)
        after = _skip(validity)
        content = _enter(after, after[0]).decode("ascii")
        return _read_time(after[0], content).timestamp()
    except (ValueError, IndexError) as error:
        raise InvalidArgumentError("Its first certificate cannot be read.", field="tls.certificate_file") from error


def _read_time(tag: int, text: str) -> datetime:
    if tag == _UTC_TIME:
        text = ("20" if int(text[:2]) < CENTURY_SPLIT else "19") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"tag {tag} is no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _bounds(der: bytes) -> tuple[int, int]:
    """Return where the content of the first element begins and ends."""
    length, start = der[1], 2
    if length >= 0x80:
        start += length - 0x80
        length = int.from_bytes(der[2:start], "big")
    return start, start + length


def _enter(der: bytes, tag: int) -> bytes:
    """Return the content of the first element, which must have that tag."""
    if der[0] != tag:
        raise ValueError(f"tag {der[0]} where {tag} was expected")
    start, end = _bounds(der)
    return der[start:end]


def _skip(der: bytes) -> bytes:
    """Return what follows the first element."""
    return der[_bounds(der)[1] :]


def _read_all(settings: TlsSettings) -> tuple[bytes, bytes, bytes | None]:
    client_ca = settings.client_ca_file
    return (
        _read(settings.certificate_file, field="tls.certificate_file"),
        _read(settings.key_file, field="tls.key_file"),
        None if client_ca is None else _read(client_ca, field="tls.client_ca_file"),
    )


def _read(path: Path, *, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"Cannot read {path}: {error.strerror}.", field=field) from error


def _check_whole(path: Path, content: bytes, *, field: str) -> None:
    """Refuse a file that is only half written: what follows the last whole certificate would be ignored."""
    if not content.count(CERTIFICATE) == content.count(END) >= 1:
        raise InvalidArgumentError(f"{path} does not hold whole certificates in PEM form.", field=field)


def _make_context(settings: TlsSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET  # a resumed session would outlive the roots that its certificate came from
    context.num_tickets = 0
    refuse_pass_phrase: Callable[[], str] = str  # else OpenSSL would ask the terminal for one
    try:
        context.load_cert_chain(settings.certificate_file, settings.key_file, password=refuse_pass_phrase)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"{settings.certificate_file} and {settings.key_file} do not belong together or are not PEM files without"
            f" a pass phrase ({_describe(error)}).",
            field="tls.key_file",
        ) from error
    if settings.client_ca_file is not None:
        _require_clients(context, settings.client_ca_file)
    return context


def _require_clients(context: ssl.SSLContext, roots: Path) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(roots)
    except (OSError, ValueError) as error:
        message = f"{roots} does not hold certificates in PEM form ({_describe(error)})."
        raise InvalidArgumentError(message, field="tls.client_ca_file") from error


def _describe(error: Exception) -> str:
    """Return the cause without what OpenSSL adds of its own source files."""
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__


def _configure(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    pair = (certificates.key, certificates.chain)
    return grpc.ssl_server_certificate_configuration([pair], certificates.client_ca)
