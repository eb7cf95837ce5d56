"""How the Connect protocol spells status codes and errors.

Source: the Connect protocol reference, sections "Error Codes" and "Error-End-Stream".
"""

from __future__ import annotations

import base64
from typing import Any, Final

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from tether.errors import TetherError
from tether.reasons import Reason
from tether_services.runtime.errors import to_status

HTTP_STATUSES: Final = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
"""HTTP status of each code."""
_DETAILS: Final[tuple[type[Message], ...]] = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
)


def http_status(reason: Reason) -> int:
    """Return the HTTP status of a reason: that of its code, unless HTTP has one for the case."""
    return reason.http_status or HTTP_STATUSES[reason.code]


def connect_code(code: grpc.StatusCode) -> str:
    """Return the name of a code in JSON: lower case, and American where gRPC is British."""
    return "canceled" if code is grpc.StatusCode.CANCELLED else code.name.lower()


def connect_error(error: TetherError) -> dict[str, Any]:
    """Return the JSON body of an error."""
    status = to_status(error)
    details = [_detail(packed) for packed in status.details]
    return {"code": connect_code(error.code), "message": status.message, "details": details}


def _detail(packed: Any) -> dict[str, Any]:
    message = next(kind() for kind in _DETAILS if packed.Is(kind.DESCRIPTOR))
    packed.Unpack(message)
    return {
        "type": message.DESCRIPTOR.full_name,
        "value": base64.b64encode(packed.value).decode().rstrip("="),
        "debug": json_format.MessageToDict(message),
    }
