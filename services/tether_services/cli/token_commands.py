"""`tether token`: make, list and revoke the tokens that callers send to the services."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from tether.errors import InvalidArgumentError, NotFoundError
from tether_services.runtime.scopes import SCOPES

if TYPE_CHECKING:
    from tether_services.runtime.bearer_tokens import TokenRecord

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

LIFETIME_PATTERN: Final = re.compile(r"([1-9][0-9]{0,5})([mhd])")
UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}
DESCRIPTION = """\
Make, list and revoke the tokens that callers send as `authorization: Bearer TOKEN`.

The file holds hashes, never tokens. A service that was given it as `tokens_file` takes changes in within a second.
"""


def add_token(commands: Commands) -> None:
    """Add `tether token` to the command."""
    parser = commands.add_parser("token", help="make, list and revoke tokens of callers", description=DESCRIPTION)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _add_create(actions)
    listing = actions.add_parser("list", help="list the tokens", description="List the tokens.")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=show)
    revoking = actions.add_parser("revoke", help="revoke a token", description="Revoke a token.")
    revoking.add_argument("token", metavar="ID|NAME", help="id of a token, or the caller all of whose tokens to revoke")
    revoking.set_defaults(run=revoke)
    for inner in actions.choices.values():
        inner.add_argument("--file", type=Path, required=True, metavar="FILE", help="tokens file")


def _add_create(actions: Commands) -> None:
    text = "make a token and print it once"
    parser = actions.add_parser("create", help=text, description=f"{text.capitalize()}; nobody can find it again.")
    parser.add_argument("name", metavar="NAME", help="of the caller; several tokens of one name are one caller")
    parser.add_argument(
        "--scopes", required=True, metavar="SCOPE[,SCOPE]", help=f"what it may call: {', '.join(SCOPES)}"
    )
    parser.add_argument(
        "--expires", metavar="TIME", help="how long it is valid, for example 30d, 12h or 15m (for ever)"
    )
    parser.add_argument("--weight", type=float, default=1.0, help="share of the engine beside other callers (1)")
    parser.add_argument("--lane", default="shared", help="shared, or training: a reserved share of the engine (shared)")
    parser.add_argument("--requests-per-second", type=float, metavar="N", help="calls it may begin (no limit)")
    parser.add_argument("--tokens-per-second", type=float, metavar="N", help="tokens it may have computed (no limit)")
    parser.add_argument("--concurrency", type=int, metavar="N", help="calls it may have in flight (no limit)")
    parser.set_defaults(run=create)


def create(known: argparse.Namespace) -> int:
    """Make a token and print it."""
    from tether_services.runtime.bearer_tokens import changing_tokens, new_token, utc_now
    from tether_services.runtime.settings import CallerSettings, validate

    values = {
        "name": known.name,
        "scopes": [scope.strip() for scope in known.scopes.split(",")],
        "weight": known.weight,
        "lane": known.lane,
        "requests_per_second": known.requests_per_second,
        "tokens_per_second": known.tokens_per_second,
        "max_concurrency": known.concurrency,
    }
    caller = validate(CallerSettings, values)
    token, record = new_token(caller, now=utc_now(), lifetime=read_lifetime(known.expires))
    with changing_tokens(known.file) as tokens:
        check_same_limits(record, tokens)
        tokens.append(record)
    print(token)
    return 0


def show(known: argparse.Namespace) -> int:
    """Print the tokens, which is to say what is kept of them."""
    from tether_services.runtime.bearer_tokens import read_tokens, utc_now

    now = utc_now()
    rows = [describe(token, now=now) for token in read_tokens(known.file, field="--file").tokens]
    if known.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        limits = " ".join(f"{key}={row[key]}" for key in ("weight", "lane", *LIMITS) if row[key] is not None)
        print(f"{row['id']}  {row['state']:<8} {row['name']:<24} {','.join(row['scopes'])}  {limits}")
    return 0


def revoke(known: argparse.Namespace) -> int:
    """Mark tokens as revoked; they stay in the file, so that the refusals can say why."""
    from tether_services.runtime.bearer_tokens import changing_tokens, utc_now

    with changing_tokens(known.file) as tokens:
        found = [i for i, token in enumerate(tokens) if known.token in (token.id, token.name)]
        if not found:
            raise NotFoundError(
                f"{known.file} has no token {known.token!r}; `tether token list` names them.",
                field="token",
                reason="TOKEN_NOT_FOUND",
            )
        valid = [i for i in found if tokens[i].revoked is None]
        for i in valid:
            tokens[i] = tokens[i].model_copy(update={"revoked": utc_now().replace(microsecond=0)})
        names = [tokens[i].id for i in valid]
    print(f"revoked {', '.join(names)}" if names else "was revoked before")
    return 0


LIMITS: Final = ("requests_per_second", "tokens_per_second", "max_concurrency", "expires")


def describe(token: TokenRecord, *, now: datetime) -> dict[str, Any]:
    """Return what may be shown of a token: all but the hash."""
    state = "valid"
    if token.revoked is not None:
        state = "revoked"
    elif token.expires is not None and now >= token.expires:
        state = "expired"
    values = token.model_dump(mode="json", exclude={"sha256"})
    return {**values, "scopes": sorted(token.scopes), "state": state}


def check_same_limits(record: TokenRecord, others: Sequence[TokenRecord]) -> None:
    """Refuse a second token of a caller with other limits: one name is one caller.

    Raises:
        InvalidArgumentError: Names the way out.
    """
    for other in others:
        if other.revoked is None and other.name == record.name and other.limits() != record.limits():
            raise InvalidArgumentError(
                f"{record.name} has the token {other.id} with another weight, lane or limits, and one name is one"
                " caller: give the same ones, take another name, or revoke that token.",
                field="name",
                reason="LIMITS_DIFFER",
            )


def read_lifetime(text: str | None) -> timedelta | None:
    """Return how long a token is valid; None for ever.

    Raises:
        InvalidArgumentError: The text is no such time.
    """
    if text is None:
        return None
    match = LIFETIME_PATTERN.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(
            f"{text!r} is no time; 15m, 12h and 30d are.", field="--expires", reason="INVALID_CONFIG"
        )
    return timedelta(**{UNITS[match[2]]: int(match[1])})
