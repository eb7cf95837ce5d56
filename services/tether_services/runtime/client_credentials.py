"""Settings of a service that calls others: what it shows them, and how it knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from tether.credentials import CredentialOptions, TlsFiles
from tether_services.runtime.settings import Settings

__all__ = ["ClientCredentials"]


class ClientCredentials(Settings):
    """Credentials for the services that are called; what is empty comes from the environment, as in every client."""

    token_file: str = ""
    """File that holds the token, read again when it changes; empty: TETHER_TOKEN or TETHER_TOKEN_FILE."""
    ca_file: str = ""
    """Authorities of the services' certificates (PEM); TLS is used where this or a certificate is given; empty:
    TETHER_CA_FILE."""
    certificate_file: str = ""
    """Own certificate (PEM), for services that ask for one; empty: TETHER_CERTIFICATE_FILE."""
    key_file: str = ""
    """Its key (PEM), without a password; empty: TETHER_KEY_FILE."""
    allow_plaintext_token: bool = False
    """Send the token to other machines although there is no TLS. Only on a network that you trust."""

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        """Refuse a certificate without its key."""
        if bool(self.certificate_file) != bool(self.key_file):
            missing = "key_file" if self.certificate_file else "certificate_file"
            raise ValueError(f"{missing} is missing: a certificate and its key are given together")
        return self

    def options(self) -> CredentialOptions:
        """Return them as every client takes them."""
        named = (self.ca_file, self.certificate_file, self.key_file)
        ca, certificate, key = (Path(name) if name else None for name in named)
        return {
            "token": Path(self.token_file) if self.token_file else None,
            "tls": TlsFiles(ca, certificate, key) if ca or certificate else None,
            "allow_plaintext_token": self.allow_plaintext_token,
        }
