"""Bearer tokens: how one looks, what is kept of it, and the file that all processes of an operator read.

A token is `tether_<id>_<secret>`: the prefix lets scanners find leaked ones, the id names it in the file and in logs,
the secret is 32 random bytes. Only the SHA-256 of the secret is kept. A slow hash, as for passwords, would add
nothing: there is no list of likely secrets to try, and 2^256 of them cannot be tried at any speed; but every call would
pay for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

import tomli_w
from pydantic import AwareDatetime, Field, model_validator

from tether.errors import InvalidArgumentError, TetherError, UnauthenticatedError
from tether_services.runtime.durable import as_storage_error, write_text
from tether_services.runtime.settings import CallerSettings, Settings, check_one_caller_per_name, validate

TOKEN_PATTERN: Final = re.compile(r"tether_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
MAX_FILE_BYTES: Final = 8 * 1024 * 1024
_NO_SHA256: Final = "0" * 64
"""Compared where there is no such id, so that the answer takes as long as for a wrong secret. Nothing hashes to it."""
_HEADER: Final = "# Written by `tether token`. Holds no secrets, only their hashes.\n"


class TokenRecord(CallerSettings):
    """What is kept of a token."""

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    """Its public part."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of its secret part."""
    created: AwareDatetime
    """When it was made."""
    expires: AwareDatetime | None = None
    """It is refused from then on, give or take the leeway; unset: never."""
    revoked: AwareDatetime | None = None
    """When it was revoked; unset: it was not."""


class TokenFile(Settings):
    """The content of a tokens file."""

    version: Literal[1]
    """Of this layout. Required, so that an empty file is a broken one and not one without tokens."""
    tokens: tuple[TokenRecord, ...] = Field(default=(), max_length=10_000)
    """In the order in which they were made."""

    @model_validator(mode="after")
    def _check_distinct(self) -> TokenFile:
        if len({token.id for token in self.tokens}) != len(self.tokens):
            raise ValueError("two tokens have the same id")
        check_one_caller_per_name([token for token in self.tokens if token.revoked is None], field="tokens")
        return self


def new_token(caller: CallerSettings, *, now: datetime, lifetime: timedelta | None) -> tuple[str, TokenRecord]:
    """Return a new token and what is kept of it. Nobody can find the token again: show it once."""
    token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    record = TokenRecord(
        **caller.model_dump(),
        id=token_id,
        sha256=_digest(secret),
        created=now.replace(microsecond=0),
        expires=None if lifetime is None else (now + lifetime).replace(microsecond=0),
    )
    return f"tether_{token_id}_{secret}", record


@dataclass(frozen=True, slots=True)
class TokenVerifier:
    """Tells which token of a file was sent. A changed file gives a new one."""

    tokens: Mapping[str, TokenRecord]
    """By id."""
    leeway: timedelta
    """A token is accepted for this long after it has expired."""

    def verify(self, token: str, *, now: datetime) -> TokenRecord:
        """Return the record of a token. Wall-clock time: expiry is a date that was agreed on with people.

        Raises:
            UnauthenticatedError: It is unknown, revoked or expired; the last two are told to its owner only.
        """
        match = TOKEN_PATTERN.fullmatch(token)
        token_id, secret = match.groups() if match else ("", "")
        record = self.tokens.get(token_id)
        owned = hmac.compare_digest(_digest(secret), record.sha256 if record else _NO_SHA256)
        if record is None or not owned:
            raise UnauthenticatedError(
                "The token is not known here. Check that it is complete and was made for this service.",
                reason="TOKEN_UNKNOWN",
            )
        if record.revoked is not None:
            raise UnauthenticatedError("The token was revoked; ask the operator for another.", reason="TOKEN_REVOKED")
        if record.expires is not None and now >= record.expires + self.leeway:
            raise UnauthenticatedError("The token has expired; ask the operator for another.", reason="TOKEN_EXPIRED")
        return record


def read_tokens(path: Path, *, field: str = "tokens_file") -> TokenFile:
    """Return the content of a tokens file.

    Raises:
        InvalidArgumentError: It cannot be read, or something in it is unknown or wrong; nothing of it is quoted.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        values = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise InvalidArgumentError(
            f"Cannot read {path}: {error.strerror}.", field=field, reason="INVALID_CONFIG"
        ) from error
    except (ValueError, RecursionError):
        raise InvalidArgumentError(f"{path} is not TOML.", field=field, reason="INVALID_CONFIG") from None
    if len(content) > MAX_FILE_BYTES:
        message = f"{path} is larger than {MAX_FILE_BYTES} bytes; remove tokens that have expired."
        raise InvalidArgumentError(message, field=field, reason="INVALID_CONFIG")
    return _validate(values, path, field=field)


def _validate(values: dict[str, object], path: Path, *, field: str) -> TokenFile:
    try:
        return validate(TokenFile, values)
    except InvalidArgumentError as error:
        # The values stay out of the message: it goes to logs, and the file is close to secrets.
        parts = "; ".join(f"{v.field}: {v.description.split(', got ')[0]}" for v in error.violations[:5])
        message = f"{path} is not a tokens file: {parts}."
        raise InvalidArgumentError(message, field=field, reason="INVALID_CONFIG") from None


@contextmanager
def changing_tokens(path: Path) -> Iterator[list[TokenRecord]]:
    """Yield the tokens of a file as a list to change; it is written, whole or not at all, when the block ends well.

    A missing file is an empty one. Other processes that change it wait; those that read it never do.

    Raises:
        InvalidArgumentError: The file is none or would be none afterwards, or the folder is not there.
        TetherError: The disk is full or read-only.
    """
    try:
        with path.with_name(f".{path.name}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = list(read_tokens(path, field="--file").tokens) if path.exists() else []
            yield tokens
            content = validate(TokenFile, {"version": 1, "tokens": tokens})
            write_text(path, _format(content))  # a temporary file, hence mode 0600
    except OSError as error:
        raise _as_error(error, path) from error


def _as_error(error: OSError, path: Path) -> TetherError:
    named = as_storage_error(error, path)
    return named or InvalidArgumentError(f"Cannot write {path}: {os.strerror(error.errno or 0)}.", field="--file")


def _format(content: TokenFile) -> str:
    tokens = []
    for token in content.tokens:
        values = token.model_dump(exclude_none=True)
        tokens.append({**values, "scopes": sorted(token.scopes)})
    return _HEADER + tomli_w.dumps({"version": content.version, "tokens": tokens})


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def utc_now() -> datetime:
    """Return the time of day, with its zone."""
    return datetime.now(UTC)
