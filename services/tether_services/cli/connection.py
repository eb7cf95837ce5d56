"""What commands that call a service have in common: where it is, and the credentials it is shown."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from tether.credentials import CredentialOptions, TlsFiles

__all__ = ["Endpoint", "add_credentials", "credential_options"]


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
    group.add_argument("--token", action=_RefuseToken, help=argparse.SUPPRESS)  # not an abbreviation of --token-file
    group.add_argument(
        "--allow-plaintext-token",
        action="store_true",
        help="send the token to another machine although there is no TLS",
    )


def credential_options(known: argparse.Namespace) -> CredentialOptions:
    """Return what the options say, as every client takes it."""
    files = (known.ca_file, known.certificate_file, known.key_file)
    return {
        "token": known.token_file,
        "tls": TlsFiles(*files) if any(files) else None,
        "allow_plaintext_token": known.allow_plaintext_token,
    }
