"""The documents that are made from the code: they are up to date, valid, complete, and fit the messages themselves."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from openapi_schema_validator import OAS31Validator, oas31_format_checker
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.unit.contract_comments import read_comments
from tests.unit.reason_scan import ROOT
from tether.errors import BY_CODE, InvalidArgumentError, ResourceExhaustedError, TetherError
from tether.reasons import REASONS
from tether.v1 import generator_pb2
from tether_services.cli.main import main
from tether_services.documents.__main__ import OPENAPI, PAGE, render, services
from tether_services.documents.connect import HTTP_STATUSES, connect_error, http_status
from tether_services.documents.examples import EXAMPLES
from tether_services.documents.files import read_openapi
from tether_services.documents.limits import LIMITS
from tether_services.runtime.errors import to_status

STREAMS = {"AdapterService.PushChunks", "OrchestratorService.WatchRun"}


@functools.cache
def document(service: str) -> dict[str, Any]:
    """Return the committed document of a service of the contract."""
    parsed: dict[str, Any] = json.loads(read_openapi(f"tether.v1.{service}"))
    return parsed


def methods() -> Iterator[MethodDescriptor]:
    """Yield the unary methods of the contract."""
    for service in services():
        yield from (each for each in service.methods if f"{service.name}.{each.name}" not in STREAMS)


def name_of(method: MethodDescriptor) -> str:
    return f"{method.containing_service.name}.{method.name}"


def problems(service: str, schema: str, value: object) -> list[str]:
    """Return what a schema of a document has against a value."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document(service)["components"]}
    checker = OAS31Validator(whole, format_checker=oas31_format_checker)
    return [error.message for error in checker.iter_errors(value)]


SERVICES = sorted(service.name for service in services())
METHODS = sorted(methods(), key=name_of)
each_service = pytest.mark.parametrize("service", SERVICES)
each_method = pytest.mark.parametrize("method", METHODS, ids=[name_of(method) for method in METHODS])


def test_the_committed_documents_are_what_the_code_and_the_contract_make() -> None:
    fresh = render(read_comments())
    stale = [str(path) for path, text in fresh.items() if (ROOT / path).read_text(encoding="utf-8") != text]
    assert not stale, f"run make documents (scripts/generate_documents.sh): {stale}"
    kept = {path.name for path in (ROOT / OPENAPI).iterdir()}
    assert kept == {path.name for path in fresh if path != PAGE}


@each_service
def test_a_document_is_valid_openapi(service: str) -> None:
    OpenAPIV31SpecValidator(document(service)).validate()


@each_service
def test_a_document_has_exactly_the_unary_methods(service: str) -> None:
    expected = {f"/tether.v1.{service}/{each.name}" for each in METHODS if each.containing_service.name == service}
    assert set(document(service)["paths"]) == expected
    assert all(set(path) == {"post"} for path in document(service)["paths"].values())


def test_every_part_of_a_document_is_described() -> None:
    for service in SERVICES:
        for path in document(service)["paths"].values():
            assert path["post"]["summary"] and path["post"]["description"]
        for name, schema in document(service)["components"]["schemas"].items():
            assert schema["description"], name
            for field, inner in schema.get("properties", {}).items():
                described = inner.get("description") or "examples" in inner or "const" in inner
                assert described or (name, field) in {("BadRequest", "fieldViolations")}, (name, field)


def test_limits_are_of_messages_and_fields_that_requests_have() -> None:
    sent: dict[str, Descriptor] = {}
    for method in METHODS:
        for descriptor in reachable(method.input_type):
            sent[descriptor.name] = descriptor
    for key in LIMITS:
        message, _, field = key.partition(".")
        assert message in sent, key
        assert not field or field in sent[message].fields_by_name, key
    for key, limit in LIMITS.items():
        forms = limit.get("oneOf", ())
        names = [*limit.get("required", ()), *(name for each in forms for name in each["required"])]
        names += [name for each in forms for name in each.get("properties", ())]
        known = {field.name for field in sent[key.partition(".")[0]].fields}
        assert set(names) <= known, key


def test_no_message_is_both_sent_and_answered_so_that_its_limits_are_of_requests_alone() -> None:
    for service in SERVICES:
        own = [method for method in METHODS if method.containing_service.name == service]
        sent = {each.name for method in own for each in reachable(method.input_type)}
        answered = {each.name for method in own for each in reachable(method.output_type)}
        assert not sent & answered


def reachable(root: Descriptor) -> Iterator[Descriptor]:
    yield root
    for field in root.fields:
        if field.message_type is not None and not field.message_type.full_name.startswith("google."):
            yield from reachable(field.message_type)


@each_method
def test_whatever_a_service_can_answer_fits_its_schema(method: MethodDescriptor) -> None:
    service, schema = method.containing_service.name, method.output_type.name
    empty = as_json(message_factory.GetMessageClass(method.output_type)())
    assert problems(service, schema, empty) == []
    full = message_factory.GetMessageClass(method.output_type)()
    fill(full)
    value = as_json(full)
    assert problems(service, schema, value) == []
    assert sorted(value) == sorted(document(service)["components"]["schemas"][schema]["properties"])


def as_json(message: Message) -> dict[str, Any]:
    """Return a message as it is sent: with the names of the contract, and with fields that are 0 or empty."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def test_an_answer_has_every_field_without_presence_but_beside_an_error() -> None:
    schemas = document("RewardService")["components"]["schemas"]
    assert set(schemas["ScoreResponse"]["required"]) == {"scores", "model", "version", "model_sha256"}
    assert schemas["ItemScore"]["required"] == []
    assert problems("RewardService", "ScoreResponse", {"scores": [], "model": "m", "version": "1"}) != []
    assert "next_step" not in document("OrchestratorService")["components"]["schemas"]["ListStepsResponse"]["required"]


def fill(message: Message) -> None:
    """Set every field to something that is not its default."""
    if isinstance(message, Timestamp):
        message.FromMilliseconds(1_500)
        return
    for field in message.DESCRIPTOR.fields:
        held = field.message_type
        if held is not None and held.GetOptions().map_entry:
            getattr(message, field.name)["key"] = 3
        elif held is not None and field.is_repeated:
            fill(getattr(message, field.name).add())
        elif held is not None:
            getattr(message, field.name).SetInParent()
            fill(getattr(message, field.name))
        elif field.is_repeated:
            getattr(message, field.name).append(scalar(field.type))
        else:
            setattr(message, field.name, scalar(field.type))


def scalar(kind: int) -> object:
    by_type: dict[int, object] = {
        FieldDescriptor.TYPE_INT64: 2**62,
        FieldDescriptor.TYPE_STRING: "text",
        FieldDescriptor.TYPE_BOOL: True,
        FieldDescriptor.TYPE_DOUBLE: 0.1,
        FieldDescriptor.TYPE_FLOAT: 0.1,
        FieldDescriptor.TYPE_ENUM: 1,
    }
    return by_type.get(kind, 5)


@pytest.mark.parametrize(
    ("schema", "name", "value", "fits"),
    [
        ("GetGeneratorResponse", "active_policy_version", "9007199254740993", True),
        ("GetGeneratorResponse", "active_policy_version", 3, False),
        ("GetGeneratorResponse", "active_policy_version", "three", False),
        ("GetGeneratorResponse", "vocab_size", 259, True),
        ("GetGeneratorResponse", "vocab_size", 2**31, False),
        ("GetGeneratorResponse", "stop_token_ids", [1, 2], True),
        ("GetGeneratorResponse", "stop_token_ids", 1, False),
        ("SamplingParams", "seed", "9007199254740993", True),
        ("SamplingParams", "seed", 3, True),
        ("SamplingParams", "seed", 0.5, False),
        ("SamplingParams", "ignore_eos", True, True),
        ("SamplingParams", "ignore_eos", "true", False),
        ("SamplingParams", "ignore_EOS", True, False),
        ("SamplingParams", "ignore_eos", None, True),
        ("SamplingParams", "temperature", None, True),
        ("SamplingParams", "max_tokens", None, False),
        ("GetGeneratorResponse", "vocab_size", None, False),
    ],
)
def test_values_are_spelled_as_in_the_json_form_of_protobuf(schema: str, name: str, value: object, fits: bool) -> None:
    answer = as_json(generator_pb2.GetGeneratorResponse())
    right = answer if schema == "GetGeneratorResponse" else {"max_tokens": 1}
    assert problems("GeneratorService", schema, right) == []
    assert (problems("GeneratorService", schema, right | {name: value}) == []) == fits


def test_examples_are_of_methods_and_fit_their_schemas() -> None:
    by_name = {name_of(method): method for method in METHODS}
    assert {"GeneratorService.Generate", "RewardService.Score", "RewardService.Compare"} <= set(EXAMPLES)
    for name, examples in EXAMPLES.items():
        method = by_name[name]
        for body in examples.values():
            assert problems(method.containing_service.name, method.input_type.name, body) == []
            json_format.ParseDict(body, message_factory.GetMessageClass(method.input_type)())


ERRORS = (
    InvalidArgumentError("0 is outside [1, 64].", field="n"),
    ResourceExhaustedError("The queue is full.", retry_after_seconds=0.5),
)


@pytest.mark.parametrize("error", ERRORS, ids=["fields", "retry"])
@each_service
def test_error_bodies_fit_the_schema_and_hold_the_messages_of_the_status(service: str, error: TetherError) -> None:
    body = connect_error(error)
    assert problems(service, "Error", body) == []
    packed = to_status(error).details
    assert [detail["type"] for detail in body["details"]] == [each.TypeName() for each in packed]
    for detail, expected in zip(body["details"], packed, strict=True):
        assert base64.b64decode(detail["value"] + "=" * (-len(detail["value"]) % 4)) == expected.value
    info = error_details_pb2.ErrorInfo()
    json_format.ParseDict(body["details"][0]["debug"], info)
    assert (info.reason, info.domain) == (error.reason, "tether")


@each_method
def test_a_method_lists_the_reasons_that_the_catalogue_gives_it(method: MethodDescriptor) -> None:
    service = method.containing_service.name
    responses = document(service)["paths"][f"/tether.v1.{service}/{method.name}"]["post"]["responses"]
    listed = {
        (name, status)
        for status, response in responses.items()
        for name in re.findall(r"`([A-Z_0-9]+)`", response["description"])
    }
    places = {"every service", "http", service, name_of(method)}
    expected = {(reason.name, str(http_status(reason))) for reason in REASONS.values() if places & {*reason.places}}
    assert listed == expected


def test_the_reasons_of_a_method_are_not_those_of_its_items() -> None:
    paths = document("RewardService")["paths"]
    score, compare = (paths[f"/tether.v1.RewardService/{name}"]["post"]["responses"] for name in ("Score", "Compare"))
    assert "`EMPTY`" not in score["400"]["description"]
    assert "`EMPTY`" in compare["400"]["description"]
    reason = document("RewardService")["components"]["schemas"]["ErrorInfo"]["properties"]["reason"]
    assert "- `EMPTY`: " in reason["description"]
    assert "- `STALE_EPOCH`: " not in reason["description"]


def test_a_reason_has_the_http_status_of_its_code_or_its_own() -> None:
    entry = REASONS["TOO_LONG"]
    assert http_status(entry) == 400
    assert http_status(dataclasses.replace(entry, http_status=413)) == 413


def test_every_status_code_has_its_http_status() -> None:
    assert set(HTTP_STATUSES) == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    assert set(BY_CODE) <= set(HTTP_STATUSES)


def test_the_page_has_every_reason_and_every_code() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z][A-Z0-9_]*)`<br>([A-Z_]+)(?:<br>HTTP \d+)? \|", page, re.MULTILINE)
    assert sorted(rows) == sorted((reason.name, reason.code.name) for reason in REASONS.values())
    for code, error in BY_CODE.items():
        assert f"| `{code.name}` | {code.value[0]} | `{error.__name__}` |" in page


def test_the_command_prints_an_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["errors", "[too_long]"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("TOO_LONG  (INVALID_ARGUMENT, HTTP 400, InvalidArgumentError)\n")
    assert REASONS["TOO_LONG"].remedy in out


def test_the_command_lists_all_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["errors"]) == 0
    out = capsys.readouterr().out
    assert [name for name in REASONS if f"  {name} " not in out] == []


def test_the_command_refuses_an_unknown_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["errors", "NO_SUCH"]) == 1
    assert "There is no reason 'NO_SUCH'" in capsys.readouterr().err


def test_reading_a_document_loads_no_service() -> None:
    source = (Path(ROOT) / "services/tether_services/documents/files.py").read_text(encoding="utf-8")
    assert "tether_services." not in source
