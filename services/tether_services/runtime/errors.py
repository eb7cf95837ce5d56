"""Turns the error tree into `google.rpc.Status`, for every method of every service, in one place."""

from __future__ import annotations

import asyncio
import logging

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from tether.errors import CancelledError, InternalError, TetherError

log = logging.getLogger(__name__)

ERROR_DOMAIN = "tether"


def to_status(error: TetherError) -> status_pb2.Status:
    """Return the rich status: one ErrorInfo, BadRequest for fields, RetryInfo where calling again helps."""
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))]
    if error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.violations[:100]
        ]
        details.append(_pack(error_details_pb2.BadRequest(field_violations=violations)))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    number = code_pb2.Code.Value(error.code.name)
    return status_pb2.Status(code=number, message=error.message[:2000], details=details)


def _pack(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]
    return packed


def as_tether_error(error: BaseException) -> TetherError:
    """Return the error itself if it is ours, else an InternalError with a fixed text; the cause is only logged."""
    if isinstance(error, TetherError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return CancelledError("The call was cancelled or its deadline passed.")
    log.error("unforeseen error", exc_info=error)
    return InternalError("Internal error; the service's log has the details.")


async def abort(context: grpc.aio.ServicerContext, error: TetherError) -> None:  # type: ignore[type-arg]
    """End the call with the error's rich status. Always raises."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
