"""Reasons of identities, scopes and quotas."""

from __future__ import annotations

from typing import Final

from grpc import StatusCode

from tether.reasons.entry import Group, Reason

IDENTITY: Final = Group(
    "Who calls, and how much",
    "Reasons of what a call must prove and what its caller may use. They come before any work.",
    (
        Reason(
            name="TOKEN_MISSING",
            code=StatusCode.UNAUTHENTICATED,
            meaning="The call carries no token.",
            remedy="Send the metadata `authorization: Bearer TOKEN`.",
            repeat="no",
            places=("every service",),
        ),
        Reason(
            name="TOKEN_UNKNOWN",
            code=StatusCode.UNAUTHENTICATED,
            meaning="The token is not one that this service knows.",
            remedy="Look whether it is complete and was made for this service.",
            repeat="no",
            places=("every service",),
        ),
        Reason(
            name="TOKEN_EXPIRED",
            code=StatusCode.UNAUTHENTICATED,
            meaning="The token has expired.",
            remedy="Ask the operator for another one.",
            repeat="no",
            places=("every service",),
        ),
        Reason(
            name="TOKEN_REVOKED",
            code=StatusCode.UNAUTHENTICATED,
            meaning="The token was revoked.",
            remedy="Ask the operator for another one.",
            repeat="no",
            places=("every service",),
        ),
        Reason(
            name="CERTIFICATE_UNKNOWN",
            code=StatusCode.UNAUTHENTICATED,
            meaning="The certificate belongs to nobody that this service knows.",
            remedy="Have the operator add its name to `identities`.",
            repeat="no",
            places=("every service",),
        ),
        Reason(
            name="SCOPE_MISSING",
            code=StatusCode.PERMISSION_DENIED,
            meaning="The caller is known and lacks the scope of this method.",
            remedy="Ask the operator for the scope that the message names.",
            repeat="no",
            places=("every service",),
        ),
        Reason(
            name="QUOTA_REQUESTS",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="The caller begins more calls per second than it may.",
            remedy="Wait as long as told; send several items in one call.",
            repeat="told",
            places=("every service",),
        ),
        Reason(
            name="QUOTA_TOKENS",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="The caller has more tokens computed per second than it may.",
            remedy="Wait as long as told; ask the operator for a larger quota.",
            repeat="told",
            places=("every service",),
        ),
        Reason(
            name="QUOTA_CONCURRENCY",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="The caller has as many calls in flight as it may.",
            remedy="Wait for one of them.",
            repeat="told",
            places=("every service",),
        ),
        Reason(
            name="TOO_MANY_CALLS",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="As many calls are in flight as the service takes, of all callers together.",
            remedy="Wait as long as told; if it stays so, add replicas.",
            repeat="told",
            places=("every service",),
        ),
        Reason(
            name="MALFORMED_MESSAGE",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="The bytes of the request are not a message of this method.",
            remedy="Compare the method and the versions of both sides.",
            repeat="no",
            places=("every service",),
        ),
        Reason(
            name="TOKEN_NOT_FOUND",
            code=StatusCode.NOT_FOUND,
            meaning="The tokens file has no token of this id or name.",
            remedy="Take one that `tether token list` prints.",
            repeat="no",
            places=("command",),
        ),
        Reason(
            name="LIMITS_DIFFER",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="Another token of this name has other limits, and one name is one caller.",
            remedy="Give the same limits, take another name, or revoke the other token.",
            repeat="no",
            places=("command",),
        ),
    ),
)
