"""OpenAPI 3.1 documents of the JSON-over-HTTP form: one for each service of the contract, its unary methods only."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

import tether
from tether.reasons import REASONS, Reason
from tether_services.documents.connect import HTTP_STATUSES, connect_code, http_status
from tether_services.documents.examples import EXAMPLES
from tether_services.documents.schemas import Comments, Schema, message_schemas, reference

_ABOUT: Final = (
    "The unary methods of {name} as JSON over HTTP: POST with a JSON body, in the Connect protocol. The same service"
    " answers gRPC with the same limits and errors.\n\n"
    "Bodies are the JSON form of the protobuf messages, with the field names of the .proto files; lowerCamelCase names"
    " are accepted too. 64-bit integers are texts, and accepted as numbers too. Answers have every field, also one that"
    " is 0 or empty, but those that the .proto files call optional, messages, and those beside an `error`.\n\n"
    "A failure is answered with an error body; branch on the `reason` of its google.rpc.ErrorInfo."
)
_TIMEOUT: Final[Schema] = {
    "name": "Connect-Timeout-Ms",
    "in": "header",
    "required": False,
    "description": "Deadline of the call in milliseconds, at most `max_deadline_seconds` of the service; its default"
    " where there is none.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 9_999_999_999},
    "example": 30_000,
}
_DETAIL: Final = "One of the messages of google.rpc that describe the error."
_ERRORS: Final[dict[str, Schema]] = {
    "Error": {
        "type": "object",
        "description": "Why a call failed.",
        "required": ["code", "message", "details"],
        "properties": {
            "code": {
                "type": "string",
                "description": "Status code.",
                "enum": [connect_code(code) for code in HTTP_STATUSES],
            },
            "message": {"type": "string", "description": "What was wrong and the way out, for people."},
            "details": {"type": "array", "description": _DETAIL, "items": reference("ErrorDetail")},
        },
    },
    "ErrorDetail": {
        "type": "object",
        "description": _DETAIL,
        "required": ["type", "value"],
        "properties": {
            "type": {
                "type": "string",
                "examples": ["google.rpc.ErrorInfo", "google.rpc.BadRequest", "google.rpc.RetryInfo"],
            },
            "value": {"type": "string", "description": "The encoded message, in base64 without padding."},
            "debug": {
                "description": "The message as JSON.",
                "anyOf": [reference("ErrorInfo"), reference("BadRequest"), reference("RetryInfo")],
            },
        },
    },
    "ErrorInfo": {
        "type": "object",
        "description": "What to branch on; every error has one.",
        "required": ["reason", "domain"],
        "properties": {
            "reason": {"type": "string", "pattern": "^[A-Z][A-Z0-9_]{0,62}$"},
            "domain": {"type": "string", "const": "tether"},
        },
    },
    "BadRequest": {
        "type": "object",
        "description": "The fields that are to blame.",
        "required": ["fieldViolations"],
        "properties": {
            "fieldViolations": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "field": {"type": "string", "examples": ["items[2].response"]},
                        "description": {"type": "string"},
                    },
                },
            }
        },
    },
    "RetryInfo": {
        "type": "object",
        "description": "When to call again; only where that can help.",
        "required": ["retryDelay"],
        "properties": {"retryDelay": {"type": "string", "examples": ["1s", "0.500s"]}},
    },
}


def build_document(service: ServiceDescriptor, comments: Comments) -> dict[str, Any]:
    """Return the OpenAPI document of a service.

    Args:
        service: Of the contract.
        comments: Of the contract, by full name.
    """
    methods = [method for method in service.methods if not (method.client_streaming or method.server_streaming)]
    requests = message_schemas((method.input_type for method in methods), comments, is_request=True)
    responses = message_schemas((method.output_type for method in methods), comments, is_request=False)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"tether {service.name}",
            "version": tether.__version__,
            "summary": _first_sentence(comments.get(service.full_name, "")),
            "description": _ABOUT.format(name=service.full_name),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {}],
        "tags": [{"name": service.name, "description": comments.get(service.full_name, "")}],
        "paths": {f"/{service.full_name}/{method.name}": {"post": _operation(method, comments)} for method in methods},
        "components": {
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token; not needed where the service runs open, as on loopback.",
                }
            },
            "parameters": {"Timeout": _TIMEOUT},
            "schemas": dict(sorted((responses | requests | _error_schemas(service)).items())),
        },
    }


def _operation(method: MethodDescriptor, comments: Comments) -> dict[str, Any]:
    service, text = method.containing_service, comments.get(method.full_name, "")
    examples = EXAMPLES.get(f"{service.name}.{method.name}", {})
    body = {"schema": reference(method.input_type.name), **_examples(examples)}
    return {
        "operationId": f"{service.name}_{method.name}",
        "tags": [service.name],
        "summary": _first_sentence(text),
        "description": text,
        "parameters": [{"$ref": "#/components/parameters/Timeout"}],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": {
                "description": comments.get(method.output_type.full_name, "The answer."),
                "content": {"application/json": {"schema": reference(method.output_type.name)}},
            },
            **_failures(method),
            "default": _failure("Any other failure, mostly of a proxy."),
        },
    }


def _examples(examples: Mapping[str, Any]) -> dict[str, Any]:
    return {"examples": {name: {"value": value} for name, value in examples.items()}} if examples else {}


def _failures(method: MethodDescriptor) -> dict[str, Any]:
    """Return the failures of a method by HTTP status, each with its reasons."""
    by_status: dict[int, list[Reason]] = {}
    for reason in reasons_of(method):
        by_status.setdefault(http_status(reason), []).append(reason)
    return {str(status): _failure(_list(status, reasons)) for status, reasons in sorted(by_status.items())}


def reasons_of(method: MethodDescriptor) -> list[Reason]:
    """Return the reasons that the catalogue gives for a method."""
    service = method.containing_service.name
    places = {"every service", "http", service, f"{service}.{method.name}"}
    return [reason for reason in REASONS.values() if places & set(reason.places)]


def _list(status: int, reasons: Iterable[Reason]) -> str:
    """Return the phrase of an HTTP status and the reasons that can be behind it."""
    known = {each.value: each.phrase for each in HTTPStatus}
    names = ", ".join(f"`{reason.name}`" for reason in reasons)
    return f"{known.get(status, 'Client Closed Request')}: {names}."


def _error_schemas(service: ServiceDescriptor) -> dict[str, Schema]:
    """Return the schemas of errors, with what each reason of a service means and what to do."""
    reasons = [reason for reason in REASONS.values() if any(_is_of(place, service) for place in reason.places)]
    lines = [f"- `{reason.name}`: {reason.meaning} {reason.remedy}" for reason in reasons]
    described = "\n".join(("A stable word; later versions may have more.", "", *lines))
    schemas = copy.deepcopy(_ERRORS)
    schemas["ErrorInfo"]["properties"]["reason"] |= {"description": described}
    return schemas


def _is_of(place: str, service: ServiceDescriptor) -> bool:
    return place in ("every service", "http") or place.partition(".")[0] == service.name


def _failure(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": reference("Error")}}}


def _first_sentence(text: str) -> str:
    return text.split("\n\n")[0].split(". ")[0].rstrip(".")
