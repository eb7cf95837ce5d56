"""Certificates for tests: an authority, what it signs, and the files of a service and of its callers."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tether.credentials import TlsFiles

DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, both PEM."""

    chain: bytes
    key: bytes

    def corrupted(self) -> Pair:
        """Return the pair with one bit of the signature flipped: well-formed, and signed by nobody."""
        certificate = x509.load_pem_x509_certificate(self.chain)
        der = bytearray(certificate.public_bytes(serialization.Encoding.DER))
        der[-1] ^= 1
        pem = x509.load_der_x509_certificate(bytes(der)).public_bytes(serialization.Encoding.PEM)
        return Pair(pem, self.key)


class Authority:
    """Signs certificates."""

    def __init__(self, name: str = "authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        now = datetime.now(UTC)
        self.root = _pem(
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * DAY)
            .not_valid_after(now + 1000 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        """Its own certificate."""

    def sign(
        self, name: str = "service", *, uris: Sequence[str] = (), ends: timedelta = DAY, begins: timedelta = -2 * DAY
    ) -> Pair:
        """Return a new pair, for 127.0.0.1 and localhost; its validity begins and ends so long from now."""
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        if not names:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        plain = serialization.NoEncryption()
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        return Pair(_pem(certificate), pem)


@cache
def authority(name: str = "authority") -> Authority:
    """Return the authority of that name."""
    return Authority(name)


@dataclass(frozen=True, slots=True)
class ServiceFiles:
    """The files of a service, which can be replaced while it runs."""

    folder: Path

    def write(self, pair: Pair) -> None:
        """Put a pair in the place of the present one, each file at once."""
        _replace(self.folder / "service.pem", pair.chain)
        _replace(self.folder / "service.key", pair.key)

    def settings(self, *, client_root: bytes | None = None) -> dict[str, str]:
        """Return the settings `tls` of a service that uses them."""
        found = {
            "certificate_file": str(self.folder / "service.pem"),
            "key_file": str(self.folder / "service.key"),
        }
        if client_root is not None:
            _replace(self.folder / "clients.pem", client_root)
            found["client_ca_file"] = str(self.folder / "clients.pem")
        return found


def service_files(folder: Path, pair: Pair | None = None) -> ServiceFiles:
    """Return the files of a service, with a valid pair unless one is given."""
    files = ServiceFiles(folder)
    files.write(pair or authority().sign())
    return files


def client_files(folder: Path, trusted: Authority, pair: Pair | None = None) -> TlsFiles:
    """Return the files of a client that trusts an authority and shows a pair, each put in place at once."""
    _replace(folder / "ca.pem", trusted.root)
    if pair is None:
        return TlsFiles(ca_file=folder / "ca.pem")
    _replace(folder / "client.pem", pair.chain)
    _replace(folder / "client.key", pair.key)
    return TlsFiles(folder / "ca.pem", folder / "client.pem", folder / "client.key")


def trusting(pair: Pair | None = None, *, root: bytes | None = None) -> grpc.ChannelCredentials:
    """Return the credentials of a caller that trusts the authority, or another root, and shows a certificate."""
    root = root or authority().root
    return grpc.ssl_channel_credentials(root, *((pair.key, pair.chain) if pair else ()))


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    os.replace(beside, path)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
