"""What commands that call a service have in common: where it is, and the credentials it is shown."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from tether.credentials import TLS_VARIABLES, CredentialOptions, TlsFiles

__all__ = ["Endpoint", "add_connection", "add_credentials", "credential_options"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A service to call."""

    address: str
    """host:port."""
    credentials: CredentialOptions
    """What it is shown."""


class _RefuseToken(argparse.Action):
    """Ends the command without showing what was given."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        parser.error("a token is no argument, as other users could read it: use --token-file or TETHER_TOKEN")


def add_connection(parser: argparse.ArgumentParser, address: str, *, of: str, timeout_seconds: float = 120.0) -> None:
    """Add the options of a command that calls one service.

    Args:
        parser: Of the command.
        address: Where the service is, unless the command says otherwise.
        of: Which address is meant, for --help.
        timeout_seconds: Deadline of a call, unless the command says otherwise.
    """
    parser.add_argument("--address", default=address, metavar="HOST:PORT", help=f"of the {of} ({address})")
    text = f"deadline of a call ({timeout_seconds:g})"
    parser.add_argument("--timeout", type=float, default=timeout_seconds, metavar="SECONDS", help=text)
    add_credentials(parser)


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """Add the options about tokens and TLS. A token itself is never an argument: other users could read it."""
    group = parser.add_argument_group(
        "credentials", "Where an option is not given, TETHER_TOKEN, TETHER_TOKEN_FILE, TETHER_CA_FILE and so on count."
    )
    for option, variable, text in (
        ("--token-file", "TETHER_TOKEN_FILE", "file that holds the token"),
        ("--ca-file", "TETHER_CA_FILE", "authorities of the service's certificate (PEM)"),
        ("--certificate-file", "TETHER_CERTIFICATE_FILE", "own certificate (PEM)"),
        ("--key-file", "TETHER_KEY_FILE", "its key (PEM)"),
    ):
        group.add_argument(option, type=Path, metavar="FILE", help=f"{text}; {variable} otherwise")
    group.add_argument(
        "--server-name", metavar="NAME", help="name in the service's certificate, where it is not that of the address"
    )
    group.add_argument("--token", action=_RefuseToken, help=argparse.SUPPRESS)  # not an abbreviation of --token-file
    group.add_argument(
        "--allow-plaintext-token",
        action="store_true",
        help="send the token to another machine although there is no TLS",
    )


def credential_options(known: argparse.Namespace) -> CredentialOptions:
    """Return what the options say, as every client takes it."""
    files = {name: getattr(known, name) for name in TLS_VARIABLES}
    tls = None
    if known.server_name or any(files.values()):  # each of the others still comes from the environment
        found = {name: file or os.environ.get(TLS_VARIABLES[name]) or None for name, file in files.items()}
        tls = TlsFiles(**found, server_name=known.server_name)
    return {
        "token": known.token_file,
        "tls": tls,
        "allow_plaintext_token": known.allow_plaintext_token,
    }
