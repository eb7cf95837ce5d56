"""Guards: checks that run before a method does any work. Health and reflection pass without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tether.errors import InvalidArgumentError, UnavailableError

NO_DEADLINE_SECONDS = 1e9
"""gRPC reports a missing deadline as None or as a time centuries away; both are above this."""

COMMON_NAME = "CN="
"""Begins the common name of a certificate among the identities of a call, so that it cannot pass for a SPIFFE id."""


@dataclass(frozen=True, slots=True)
class CallInfo:
    """What guards know about a call."""

    method: str
    """Full name, for example /tether.v1.RewardService/Score."""
    metadata: tuple[tuple[str, str | bytes], ...]
    """What the caller sent beside the message."""
    remaining_seconds: float | None
    """Time to the deadline; None if there is none."""
    identities: tuple[str, ...] = ()
    """Verified names in the caller's certificate: its SPIFFE id, else COMMON_NAME and its common name; else empty."""
    peer: str = ""
    """Address of the caller, for the audit log."""


def name_identities(uris: Sequence[str], common_names: Sequence[str]) -> tuple[str, ...]:
    """Return the name that a verified certificate proves, for `CallInfo.identities`.

    Args:
        uris: The URIs among its alternative names.
        common_names: Of its subject.

    A SPIFFE id is the only URI of its certificate (SPIFFE X.509-SVID, section 2). Where one stands beside other URIs
    the certificate is not as it should be and proves nothing, its common name neither.
    """
    if any(uri.lower().startswith("spiffe:") for uri in uris):
        return (uris[0],) if len(uris) == 1 else ()
    return tuple(f"{COMMON_NAME}{name}" for name in common_names if name)


Guard = Callable[[CallInfo], None]
"""Raises a TetherError to refuse the call. The pipeline knows the identity and holds the quota before it asks."""


def deadline_guard(max_deadline_seconds: float) -> Guard:
    """Return a guard that refuses calls without a deadline or with one beyond the maximum."""

    def check(call: CallInfo) -> None:
        remaining = call.remaining_seconds
        if remaining is None or remaining > NO_DEADLINE_SECONDS:
            raise InvalidArgumentError(
                f"The call has no deadline. Set one of at most {max_deadline_seconds:g} seconds.",
                field="deadline",
                reason="DEADLINE_MISSING",
            )
        if remaining > max_deadline_seconds + 1:  # a second of slack for clocks that round up
            raise InvalidArgumentError(
                f"The deadline is {remaining:.0f} s away; at most {max_deadline_seconds:g} s is accepted.",
                field="deadline",
                reason="DEADLINE_TOO_LONG",
            )

    return check


def readiness_guard(not_ready: Callable[[], str | None]) -> Guard:
    """Return a guard that refuses calls with UNAVAILABLE while `not_ready()` returns a reason."""

    def check(call: CallInfo) -> None:
        reason = not_ready()
        if reason:
            raise UnavailableError(
                f"The service is {reason}; call again shortly.", reason=reason.upper().replace(" ", "_")
            )

    return check
