"""Who may call what: the identity of a caller by token or certificate, the scope of the method, the quota."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from tether.errors import InvalidArgumentError, PermissionDeniedError, TetherError, UnauthenticatedError
from tether_services.runtime.bearer_tokens import TokenVerifier, read_tokens, utc_now
from tether_services.runtime.callers import ANONYMOUS, Caller
from tether_services.runtime.limits import COMMON_NAME, CallInfo
from tether_services.runtime.quotas import Quotas
from tether_services.runtime.refusals import CallerLabels, Refusals
from tether_services.runtime.reloading import Reloaded
from tether_services.runtime.scopes import METHOD_SCOPES
from tether_services.runtime.settings import (
    CallerSettings,
    IdentitySettings,
    ServerSettings,
    check_one_caller_per_name,
)
from tether_services.runtime.tls import ServerCertificates

RELOAD_SECONDS: Final = 1.0
"""Files are looked at this often: a revoked token is refused this long afterwards at the latest."""
BEARER: Final = "bearer "


class Access:
    """Answers for every call of a service who makes it and whether it may, and holds its quota."""

    def __init__(
        self,
        settings: ServerSettings,
        service: str,
        registry: CollectorRegistry,
        *,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """Read the tokens file and the certificates.

        Args:
            settings: Of the service.
            service: Its name, for metrics.
            registry: Where they are.
            now: Time of day, for the expiry of tokens.

        Raises:
            InvalidArgumentError: A file cannot be used.
        """
        self._open = not settings.is_authenticated
        self._identities = settings.identities
        self._now = now
        labels = CallerLabels()
        self._refusals = Refusals(service, registry, labels)
        self._quotas = Quotas(
            service, registry, labels, max_calls=settings.max_calls, reserved_calls=settings.reserved_calls
        )
        stale = Gauge(
            "tether_credentials_stale",
            "1 while a changed file could not be read and the last good one is used.",
            ["file"],
            registry=registry,
        )
        self._tokens = _watch_tokens(settings, stale)
        self.certificates = ServerCertificates(settings.tls, registry, stale=stale) if settings.tls else None
        """Of all ports of the service; None without transport security."""

    def identify(self, call: CallInfo) -> Caller:
        """Return who makes a call that it may make.

        Raises:
            UnauthenticatedError: TOKEN_MISSING, TOKEN_UNKNOWN, TOKEN_EXPIRED, TOKEN_REVOKED or CERTIFICATE_UNKNOWN.
            PermissionDeniedError: SCOPE_MISSING.
        """
        name = ""
        try:
            caller = ANONYMOUS if self._open else self._authenticate(call)
            name = caller.name
            check_scope(caller, call.method)
        except TetherError as error:
            self._refusals.record(call, name, error.reason)
            raise
        return caller

    @contextmanager
    def hold(self, call: CallInfo, caller: Caller) -> Iterator[Callable[[int], None]]:
        """Hold the caller's place and yield what charges its tokens; see `Quotas.enter`."""
        try:
            place = self._quotas.enter(caller)
        except TetherError as error:
            self._refusals.record(call, caller.name, error.reason)
            raise
        try:
            yield place.charge
        finally:
            place.leave()

    async def watch_files(self) -> None:
        """Read changed files again, for ever."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read changed files again now."""
        if self._tokens is not None:
            self._tokens.refresh()
        if self.certificates is not None:
            self.certificates.current()

    def _authenticate(self, call: CallInfo) -> Caller:
        """Return who calls. A token decides alone, also beside a certificate: it is the narrower proof."""
        token = read_bearer_token(call.metadata)
        if token is not None and self._tokens is not None:
            return self._tokens.value.verify(token, now=self._now()).caller()
        if token is not None:
            raise UnauthenticatedError("This service takes certificates, not tokens.", reason="TOKEN_UNKNOWN")
        identity = find_identity(self._identities, call.identities)
        if identity is not None:
            return identity.caller()
        if call.identities and self._identities:
            raise UnauthenticatedError(
                "The certificate belongs to nobody that this service knows; the operator can add it to identities.",
                reason="CERTIFICATE_UNKNOWN",
            )
        raise UnauthenticatedError(
            "The call carries no token. Send the metadata authorization: Bearer TOKEN.", reason="TOKEN_MISSING"
        )


def _watch_tokens(settings: ServerSettings, stale: Gauge) -> Reloaded[TokenVerifier] | None:
    path = settings.tokens_file
    if path is None:
        return None

    def load() -> TokenVerifier:
        tokens = read_tokens(path).tokens
        check_callers([*settings.identities, *(token for token in tokens if token.revoked is None)])
        return TokenVerifier({token.id: token for token in tokens}, timedelta(seconds=settings.token_leeway_seconds))

    return Reloaded("tokens", [path], load, stale=stale)


def check_callers(callers: Sequence[CallerSettings]) -> None:
    """Refuse a token and an identity of one name whose limits differ.

    Raises:
        InvalidArgumentError: Names the caller.
    """
    try:
        check_one_caller_per_name(callers, field="identities and tokens")
    except ValueError as error:
        raise InvalidArgumentError(f"{error}.", field="tokens_file", reason="INVALID_CONFIG") from error


def describe_security(settings: ServerSettings) -> dict[str, object]:
    """Return what the log says at start of how the service is protected."""
    proofs = [
        name for name, there in (("tokens", settings.tokens_file), ("certificates", settings.identities)) if there
    ]
    mutual = settings.tls is not None and settings.tls.client_ca_file is not None
    transport = "mutual TLS" if mutual else "TLS" if settings.tls else "plain"
    return {"auth": " or ".join(proofs) or "none: everybody may call", "transport": transport}


def check_scope(caller: Caller, method: str) -> None:
    """Refuse a method that the caller has no scope for; one that is in no scope is nobody's.

    Raises:
        PermissionDeniedError: SCOPE_MISSING, naming the scope.
    """
    scope = METHOD_SCOPES.get(method)
    if scope is None:
        raise PermissionDeniedError("This method is in no scope: nobody may call it.", reason="SCOPE_MISSING")
    if scope not in caller.scopes:
        raise PermissionDeniedError(
            f"The caller {caller.name} lacks the scope {scope}; the operator can allow it.", reason="SCOPE_MISSING"
        )


def read_bearer_token(metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
    """Return the token of a call; None if there is none. Of several none counts: which one was meant is not known."""
    found = [value for key, value in metadata if key == "authorization"]
    if not found:
        return None
    value = found[0] if len(found) == 1 else ""
    text = value if isinstance(value, str) else value.decode("latin-1")
    return text[len(BEARER) :].strip() if text[: len(BEARER)].lower() == BEARER else ""


def find_identity(known: Sequence[IdentitySettings], proven: Sequence[str]) -> IdentitySettings | None:
    """Return whom a certificate belongs to: the exact entry, else the longest prefix; None if nobody."""
    best: IdentitySettings | None = None
    for identity in known:
        if identity.common_name and f"{COMMON_NAME}{identity.common_name}" in proven:
            return identity
        if identity.spiffe and identity.spiffe in proven:
            return identity
        is_prefix = identity.spiffe.endswith("/") and any(name.startswith(identity.spiffe) for name in proven)
        if is_prefix and (best is None or len(identity.spiffe) > len(best.spiffe)):
            best = identity
    return best
