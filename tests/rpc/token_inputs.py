"""Tokens files for tests, and calls that carry a token."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tether_services.runtime.bearer_tokens import TokenRecord, changing_tokens, new_token, utc_now
from tether_services.runtime.settings import CallerSettings


def add_token(
    path: Path,
    *,
    name: str = "team-a",
    scopes: Sequence[str] = ("score",),
    expired: bool = False,
    revoked: bool = False,
    **limits: Any,
) -> str:
    """Add a token to a file and return it."""
    caller = CallerSettings(name=name, scopes=frozenset(scopes), **limits)
    age = timedelta(days=2)
    token, record = new_token(caller, now=utc_now() - age, lifetime=age / 2 if expired else None)
    if revoked:
        record = record.model_copy(update={"revoked": utc_now()})
    with changing_tokens(path) as tokens:
        tokens.append(record)
    return token


def revoke_all(path: Path) -> list[TokenRecord]:
    """Revoke every token of a file and return what is kept of them."""
    with changing_tokens(path) as tokens:
        tokens[:] = [token.model_copy(update={"revoked": utc_now()}) for token in tokens]
    return tokens


def bearing(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call with a token."""
    return (("authorization", f"Bearer {token}"),)
