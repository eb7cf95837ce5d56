"""The one error tree, shared by the client and the services.

A service raises one of these; an interceptor turns it into a `google.rpc.Status`; the client turns that status back
into the same class. `reason` is a stable UPPER_SNAKE word to branch on, `message` is for people.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

__all__ = [
    "AbortedError",
    "CancelledError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "FieldViolation",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "PermissionDeniedError",
    "ResourceExhaustedError",
    "TetherError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that was refused, and why."""

    field: str
    """Path of the field in the request or the configuration, for example `sampling.temperature`."""
    description: str
    """What was wrong and what would be accepted."""


class TetherError(Exception):
    """Base of every error that tether raises on purpose."""

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    default_reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        reason: str | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        """Build an error.

        Args:
            message: What happened and the way out, in one or two sentences.
            field: Path of the offending field; short for a single violation with the message as its description.
            reason: Stable UPPER_SNAKE word of at most 63 characters; the class has a default.
            violations: All offending fields, when there are several.
            retry_after_seconds: When to call again; only set where calling again can help.
        """
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.violations = violations or ((FieldViolation(field, message),) if field else ())
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        fields = ", ".join(v.field for v in self.violations)
        return f"[{self.reason}] {self.message}" + (f" (field: {fields})" if fields else "")


class InvalidArgumentError(TetherError):
    """A field of the request or the configuration is outside its range. Never retry."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_FIELD"


class NotFoundError(TetherError):
    """The named model, adapter, version, upload or run does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class FailedPreconditionError(TetherError):
    """The state does not allow the call; the caller can repair it, then call again."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class AbortedError(TetherError):
    """A compare-and-set was lost or the caller is fenced off. Read the state again at a higher level."""

    code = grpc.StatusCode.ABORTED
    default_reason = "CONFLICT"


class ResourceExhaustedError(TetherError):
    """A queue, quota or disk is full. Call again after `retry_after_seconds` when it is set."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"


class UnavailableError(TetherError):
    """The service is not ready, is draining or cannot be reached. Calls without effect may be retried."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineExceededError(TetherError):
    """The deadline passed. The effect of a call that has one may have happened: repeat it with the same request_id."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class CancelledError(TetherError):
    """The caller cancelled."""

    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class UnauthenticatedError(TetherError):
    """No or bad credentials."""

    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(TetherError):
    """The credentials lack the scope of the method."""

    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class UnimplementedError(TetherError):
    """The method is part of the contract and not written yet."""

    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNIMPLEMENTED"


class InternalError(TetherError):
    """A defect in the service. The details are in its log only."""

    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


BY_CODE: dict[grpc.StatusCode, type[TetherError]] = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        NotFoundError,
        FailedPreconditionError,
        AbortedError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineExceededError,
        CancelledError,
        UnauthenticatedError,
        PermissionDeniedError,
        UnimplementedError,
        InternalError,
    )
}
"""The class for each status code; an unlisted code becomes the base class."""
