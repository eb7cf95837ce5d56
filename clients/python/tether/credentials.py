"""What a client shows a service and demands of it: a bearer token and the files of TLS, read again when they change."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, Literal, TypeAlias, TypedDict, TypeVar

import grpc

from tether.errors import InvalidArgumentError

__all__ = ["CredentialOptions", "Credentials", "Tls", "TlsFiles", "Token", "is_loopback"]

log = logging.getLogger(__name__)

TOKEN_VARIABLE: Final = "TETHER_TOKEN"
"""Holds the token where none is given."""
TOKEN_FILE_VARIABLE: Final = "TETHER_TOKEN_FILE"
"""Names the file that holds it."""
TLS_VARIABLES: Final = {
    "ca_file": "TETHER_CA_FILE",
    "certificate_file": "TETHER_CERTIFICATE_FILE",
    "key_file": "TETHER_KEY_FILE",
}
"""Names of the variables that hold the fields of TlsFiles; where one is set, TLS is used."""
VARIABLES: Final = frozenset({TOKEN_VARIABLE, TOKEN_FILE_VARIABLE, *TLS_VARIABLES.values()})
"""All of them."""
_TOKEN_CHARACTERS: Final = re.compile(r"[A-Za-z0-9._~+/=-]+")  # RFC 6750, section 2.1
_UNENCRYPTED: Final = ("unix:", "unix-abstract:")
"""Schemes of targets that never leave the machine."""

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a TLS connection. They are read again when they change; calls in flight stay on the old connection.

    `TlsFiles()` alone is TLS with the authorities that gRPC brings along.
    """

    ca_file: str | Path | None = None
    """Authorities that may have signed the service's certificate; None takes those that gRPC brings along."""
    certificate_file: str | Path | None = None
    """The client's own certificate and what leads to its authority; given together with key_file, or not at all."""
    key_file: str | Path | None = None
    """Private key of that certificate, not encrypted."""
    server_name: str | None = None
    """Name that the service's certificate must have; None takes that of the target."""


Token: TypeAlias = str | Path | None
"""A token, or the path of a file that holds it; None looks into the environment, "" is none."""
Tls: TypeAlias = TlsFiles | Literal[False] | None
"""Files of TLS; None looks into the environment, False is none."""


class CredentialOptions(TypedDict, total=False):
    """The keyword arguments of every client that are about credentials."""

    token: Token
    tls: Tls
    allow_plaintext_token: bool


@dataclass(frozen=True, slots=True)
class _TlsContents:
    """What the files of TLS hold."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None = field(repr=False)


class Credentials:
    """The token and the TLS files of one client, as they are now."""

    def __init__(
        self,
        target: str,
        *,
        token: Token = None,
        tls: Tls = None,
        allow_plaintext_token: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Read the files for the first time.

        Args:
            target: Where the token will be sent.
            token: A token, or the path of a file that holds it; None for what the environment says, "" for none.
            tls: Files of TLS; None for what the environment says, False for none.
            allow_plaintext_token: Send the token to another machine without encryption.
            environ: The environment; None for the process's own.

        Raises:
            InvalidArgumentError: A file is not what it should be, or PLAINTEXT_TOKEN: the token would be readable on
                the way.
        """
        environ = os.environ if environ is None else environ
        _check_kinds(token, tls)
        token = _token_of(environ) if token is None else token
        files = _tls_of(environ) if tls is None else tls or None
        if token and files is None and not (allow_plaintext_token or is_loopback(target)):
            message = (
                f"The token would be sent to {target} unencrypted. Use TLS (a CA file), or allow_plaintext_token on a"
                " network where nobody else reads"
            )
            raise InvalidArgumentError(message, field="token", reason="PLAINTEXT_TOKEN")
        self._token = _watch_token(token) if token else None
        self._tls = None if files is None else _watch_tls(files)
        self._options = _channel_options(files, shields_token=bool(token) and files is None and is_loopback(target))

    def __repr__(self) -> str:
        """Return what there is, without the token."""
        return f"Credentials(token={'set' if self._token else 'none'}, tls={'on' if self._tls else 'off'})"

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a token nor TLS."""
        return self._token is None and self._tls is None

    @property
    def options(self) -> list[tuple[str, int | str]]:
        """Channel arguments that belong to them."""
        return self._options

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what is sent beside every message."""
        if self._token is None:
            return ()
        self._token.refresh()
        return (("authorization", f"Bearer {self._token.value}"),)

    def tls_changed(self) -> bool:
        """Return whether the TLS files hold something else than at the last look."""
        return self._tls is not None and self._tls.refresh()

    def for_channel(self) -> grpc.ChannelCredentials | None:
        """Return what a channel opened now needs; None for one without TLS."""
        if self._tls is None:
            return None
        held = self._tls.value
        return grpc.ssl_channel_credentials(held.ca, held.key, held.certificate)


class _Watched(Generic[ValueT]):
    """What is read from some files, read again when they change.

    While the new content is of no use, because a file is missing or only one of a pair has been replaced so far, the
    last good one stays in force.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], ValueT]) -> None:
        self._paths, self._read = paths, read
        self._seen = self._look()
        self.value = read()

    def refresh(self) -> bool:
        """Return whether the value is another one now. Costs a look at each file, well below the cost of a call."""
        seen = self._look()
        if seen == self._seen:
            return False
        try:
            value = self._read()
        except InvalidArgumentError as error:
            log.warning("credentials not reloaded, the former ones stay in use: %s", error.message)
            self._seen = seen
            return False
        if self._look() != seen:  # replaced while they were read: perhaps not of one kind, so look again
            return False
        self._seen = seen
        changed, self.value = value != self.value, value
        return changed

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_signature(path) for path in self._paths]


def _signature(path: Path) -> tuple[int, ...] | None:
    """Return what differs once a file was written, replaced or made readable; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def _check_kinds(token: object, tls: object) -> None:
    """Refuse what a configuration file may hold and a client cannot use, such as a table."""
    if not isinstance(token, str | Path | None):
        message = f"token is a {type(token).__name__}; a text or the Path of a file is accepted"
        raise InvalidArgumentError(message, field="token", reason="BAD_TOKEN")
    if not isinstance(tls, TlsFiles | None) and tls is not False:
        message = f"tls is a {type(tls).__name__}; TlsFiles, False or nothing is accepted. Or name the files in "
        raise InvalidArgumentError(message + ", ".join(TLS_VARIABLES.values()), field="tls", reason="BAD_TLS_FILES")


def _watch_token(token: str | Path) -> _Watched[str]:
    if isinstance(token, str):
        checked = _checked_token(token, origin="The token")
        return _Watched((), lambda: checked)
    path = token
    return _Watched(
        (path,), lambda: _checked_token(_read_file(path, field="token").decode(errors="replace"), origin=str(path))
    )


def _checked_token(text: str, *, origin: str) -> str:
    """Return a token without the whitespace around it. The error does not show it."""
    token = text.strip()
    if not _TOKEN_CHARACTERS.fullmatch(token):
        wrong = "has other characters than a token may have" if token else "is empty"
        message = f"{origin} {wrong}; letters, digits and . _ ~ + / = - are accepted, in one line"
        raise InvalidArgumentError(message, field="token", reason="BAD_TOKEN")
    return token


def _watch_tls(files: TlsFiles) -> _Watched[_TlsContents]:
    if (files.certificate_file is None) != (files.key_file is None):
        missing = "key_file" if files.key_file is None else "certificate_file"
        message = "A certificate and its key are given together: certificate_file and key_file"
        raise InvalidArgumentError(message, field=f"tls.{missing}", reason="BAD_TLS_FILES")
    named = (files.ca_file, files.certificate_file, files.key_file)
    return _Watched([Path(path) for path in named if path is not None], lambda: _read_tls(files))


def _read_tls(files: TlsFiles) -> _TlsContents:
    """Return the contents of the files, once OpenSSL finds them usable: gRPC would only say so at each connection."""
    contents = [
        None if path is None else _read_file(Path(path), field=f"tls.{name}")
        for name, path in (
            ("ca_file", files.ca_file),
            ("certificate_file", files.certificate_file),
            ("key_file", files.key_file),
        )
    ]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    checked = "ca_file"
    try:
        if files.ca_file is not None:
            context.load_verify_locations(cafile=files.ca_file)
        checked = "certificate_file"
        if files.certificate_file is not None and files.key_file is not None:
            context.load_cert_chain(files.certificate_file, files.key_file, password="")  # an encrypted key fails
    except OSError as error:  # ssl.SSLError is one
        named = files.ca_file if checked == "ca_file" else f"{files.certificate_file} with {files.key_file}"
        message = f"Cannot use {named}: {error.strerror or error}. PEM files are accepted, keys without a password"
        raise InvalidArgumentError(message, field=f"tls.{checked}", reason="BAD_TLS_FILES") from None
    return _TlsContents(*contents)


def _read_file(path: Path, *, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"Cannot read {path}: {error.strerror}"
        raise InvalidArgumentError(message, field=field, reason="CREDENTIALS_UNREADABLE") from None


def _token_of(environ: Mapping[str, str]) -> str | Path | None:
    """Return what the environment says about the token."""
    token, path = environ.get(TOKEN_VARIABLE, ""), environ.get(TOKEN_FILE_VARIABLE, "")
    if token and path:
        message = f"Both {TOKEN_VARIABLE} and {TOKEN_FILE_VARIABLE} are set; unset one"
        raise InvalidArgumentError(message, field=TOKEN_VARIABLE)
    return Path(path) if path else token or None


def _tls_of(environ: Mapping[str, str]) -> TlsFiles | None:
    """Return the files that the environment names; None if it names none."""
    named = {name: environ[variable] for name, variable in TLS_VARIABLES.items() if environ.get(variable)}
    return TlsFiles(**named) if named else None


def _channel_options(files: TlsFiles | None, *, shields_token: bool) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = []
    if files is not None and files.server_name is not None:
        options.append(("grpc.ssl_target_name_override", files.server_name))
    if shields_token:  # what is meant for this machine must not go through a proxy that the environment names
        options.append(("grpc.enable_http_proxy", 0))
    return options


def is_loopback(target: str) -> bool:
    """Return whether a target surely is on this machine: a socket file, localhost, or loopback addresses alone."""
    if target.startswith(_UNENCRYPTED):
        return True
    if target.startswith(("ipv4:", "ipv6:")):
        return all(_is_loopback_host(address) for address in target[5:].split(","))
    return _is_loopback_host(target.removeprefix("dns:").removeprefix("///"))


def _is_loopback_host(address: str) -> bool:
    bracketed = re.fullmatch(r"\[(.*)\](:\d+)?", address)
    host = bracketed[1] if bracketed else address.rpartition(":")[0] if address.count(":") == 1 else address
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
