"""Turns a `google.rpc.Status` back into the error that the service raised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tether.errors import BY_CODE, FieldViolation, InvalidArgumentError, TetherError

DetailT = TypeVar("DetailT", bound=ProtoMessage)

BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
"""The status code of each number."""

BROKEN_CONNECTION = ("Internal error from Core", "Stream removed", "RST_STREAM", "Received RST_STREAM")
"""Beginnings of the details that gRPC makes up when a connection breaks under a call: the peer is gone."""
MADE_UP_CODES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
"""Codes that it gives them besides UNAVAILABLE, depending on what it was doing."""
NO_CONNECTION = "connections to all backends failing"
"""What its details begin with when no connection comes about; the last error follows."""
LIKELY_CAUSES = (
    ("Hostname Verification Check failed", "call it by the name in its certificate, or give server_name"),
    ("CERTIFICATE_VERIFY_FAILED", "the CA file did not sign its certificate, or that has expired"),
    ("WRONG_VERSION_NUMBER", "it has no TLS"),
    ("Socket closed", "where this stays so, it wants TLS (a CA file), or a certificate that it trusts"),
)
"""What is likely wrong by a part of that error."""


def from_rpc_error(error: grpc.aio.AioRpcError, *, target: str, timeout_seconds: float) -> TetherError:
    """Return the typed error of a failed call, with its reason, fields and retry delay where the service sent them.

    Args:
        error: What gRPC raised.
        target: Where the call went; part of the message when the failure did not come from a tether service.
        timeout_seconds: The call's deadline, for the message when it passed.
    """
    status = _rich_status(error)
    if status is not None:
        return from_status(status)
    code = error.code()
    details = error.details() or code.name
    if code in MADE_UP_CODES and details.startswith(BROKEN_CONNECTION):
        code = grpc.StatusCode.UNAVAILABLE
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = f"no answer within {timeout_seconds:g} s."
    if details.startswith(NO_CONNECTION):
        details += next((f" ({cause})" for part, cause in LIKELY_CAUSES if part in details), "")
    return _build(code, f"{target}: {details}", reason=code.name)


def reason_of(error: grpc.aio.AioRpcError) -> str | None:
    """Return the reason that the service gave for a failed call; None if the error is gRPC's own."""
    status = _rich_status(error)
    info = _detail(status, error_details_pb2.ErrorInfo()) if status is not None else None
    return None if info is None else info.reason


def from_status(status: status_pb2.Status) -> TetherError:
    """Return the typed error of a rich status."""
    code = BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    info = _detail(status, error_details_pb2.ErrorInfo())
    fields = _detail(status, error_details_pb2.BadRequest())
    retry = _detail(status, error_details_pb2.RetryInfo())
    return _build(
        code,
        status.message,
        reason=info.reason if info else code.name,
        violations=tuple(FieldViolation(v.field, v.description) for v in fields.field_violations) if fields else (),
        retry_after_seconds=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
    )


def from_code(number: int, message: str, *, reason: str, field: str) -> TetherError:
    """Return the typed error of an item that failed on its own inside a successful call."""
    violations = (FieldViolation(field, message),) if field else ()
    return _build(BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN), message, reason=reason, violations=violations)


@contextmanager
def request_field(field: str) -> Iterator[None]:
    """Turn a value that does not fit the contract's type (text for a number, an id over 32 bits) into a typed error."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidArgumentError(f"A value does not fit its type: {error}", field=field) from None


def _build(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str,
    violations: tuple[FieldViolation, ...] = (),
    retry_after_seconds: float | None = None,
) -> TetherError:
    kind = BY_CODE.get(code, TetherError)
    return kind(message, reason=reason, violations=violations, retry_after_seconds=retry_after_seconds)


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    try:
        status: status_pb2.Status | None = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:  # a proxy rewrote code or message: trust what gRPC itself reports
        return None
    return status


def _detail(status: status_pb2.Status, kind: DetailT) -> DetailT | None:
    """Return the first detail of this kind, or None."""
    return next((kind for detail in status.details if detail.Unpack(kind)), None)
