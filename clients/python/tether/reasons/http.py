"""Reasons of the HTTP port alone: what is no call yet, and what JSON can be wrong about."""

from __future__ import annotations

from typing import Final

from grpc import StatusCode

from tether.reasons.entry import Group, Reason

HTTP: Final = ("http",)


def _bad(name: str, meaning: str, remedy: str, *, http_status: int = 0) -> Reason:
    return Reason(name, StatusCode.INVALID_ARGUMENT, meaning, remedy, "no", HTTP, http_status)


def _missing(name: str, meaning: str, remedy: str, *, http_status: int = 0) -> Reason:
    return Reason(name, StatusCode.UNIMPLEMENTED, meaning, remedy, "no", HTTP, http_status)


HTTP_PORT: Final = Group(
    "JSON over HTTP",
    "Reasons of the HTTP port; all those of the methods come from it as well.",
    (
        _bad("MALFORMED_JSON", "The body is not JSON.", "Send a JSON object in UTF-8; the message says where it ends."),
        _bad("MALFORMED_BODY", "The body is not what content-encoding says.", "Send one whole gzip stream, or none."),
        _bad("WRONG_TYPE", "A field has a value of another type.", "Send what the violation says."),
        _bad("UNKNOWN_FIELD", "The message has no such field.", "Correct its name; /openapi.json has all of them."),
        _bad("UNKNOWN_ENUM_VALUE", "A field has a value that it does not know.", "Send one of those in the message."),
        _bad("DUPLICATE_FIELD", "A field is there twice, or under both of its names.", "Send it once."),
        _bad("TOO_MANY_VALUES", "The body has more values than are read at a time.", "Send fewer items per call."),
        _bad(
            "MALFORMED_REQUEST",
            "The bytes are not a request of HTTP/1.1, or it says the length of its body in two ways.",
            "Speak HTTP/1.1, or TLS if the port has it; give content-length or transfer-encoding, not both.",
        ),
        _bad(
            "UNSUPPORTED_MEDIA_TYPE",
            "The content type or encoding is none that is read.",
            "Send application/json or application/proto, plain or with gzip.",
            http_status=415,
        ),
        _bad(
            "HEADERS_TOO_LARGE",
            "There are too many headers, or they and the path are too long.",
            "Send fewer; `max_metadata_bytes` of the service bounds them.",
            http_status=431,
        ),
        _missing(
            "UNKNOWN_METHOD",
            "There is nothing at this path.",
            "Compare it with /openapi.json; some methods are there over gRPC only.",
            http_status=404,
        ),
        _missing("METHOD_NOT_ALLOWED", "Methods are called with POST.", "Send a POST.", http_status=405),
        _missing("STREAMING_METHOD", "The method streams.", "Call it over gRPC."),
        Reason(
            name="BROWSER_REFUSED",
            code=StatusCode.PERMISSION_DENIED,
            meaning="The request has an Origin header, so that it comes from a page in a browser.",
            remedy="Call from a program, or from the server of the page.",
            repeat="no",
            places=HTTP,
        ),
        Reason(
            name="MESSAGE_TOO_LARGE",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="The body is larger than the port accepts, as sent or unpacked.",
            remedy="Send fewer items per call.",
            repeat="no",
            places=HTTP,
            http_status=413,
        ),
        Reason(
            name="BODY_TOO_SLOW",
            code=StatusCode.DEADLINE_EXCEEDED,
            meaning="The body of the request did not arrive in time.",
            remedy="Send it without pauses.",
            repeat="later",
            places=HTTP,
            http_status=408,
        ),
        Reason(
            name="BODIES_FULL",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="The bodies of the calls in flight take as much memory as they may.",
            remedy="Wait as long as told, then send the same.",
            repeat="told",
            places=HTTP,
        ),
        Reason(
            name="TOO_MANY_CONNECTIONS",
            code=StatusCode.UNAVAILABLE,
            meaning="The port has as many connections as it takes.",
            remedy="Use one connection for many calls; wait as long as told.",
            repeat="told",
            places=HTTP,
        ),
    ),
)
