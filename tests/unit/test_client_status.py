"""A `google.rpc.Status` and the typed error are two spellings of the same thing."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from google.rpc import status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import (
    BY_CODE,
    DeadlineExceededError,
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    TetherError,
    UnavailableError,
)
from tether.status import from_code, from_rpc_error, from_status, request_field
from tether_services.runtime.errors import to_status

DETAILS_KEY = "grpc-status-details-bin"
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40)


def rpc_error(code: grpc.StatusCode, details: str | None, status: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*([(DETAILS_KEY, status)] if status is not None else []))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=details)


def typed(error: grpc.aio.AioRpcError) -> TetherError:
    return from_rpc_error(error, target="127.0.0.1:7", timeout_seconds=2.5)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(BY_CODE.values(), key=lambda kind: kind.__name__)),
    message=texts,
    reason=st.from_regex(r"[A-Z][A-Z0-9_]{0,62}", fullmatch=True),
    violations=st.lists(st.builds(FieldViolation, texts, texts), max_size=5),
    retry=st.none() | st.floats(0, 3600),
)
def test_every_error_survives_the_wire(
    kind: type[TetherError], message: str, reason: str, violations: list[FieldViolation], retry: float | None
) -> None:
    sent = kind(message, reason=reason, violations=tuple(violations), retry_after_seconds=retry)
    status = to_status(sent)
    received = typed(rpc_error(sent.code, message, status.SerializeToString()))
    assert type(received) is kind
    assert (received.message, received.reason, received.violations) == (message, reason, sent.violations)
    if retry is None:
        assert received.retry_after_seconds is None
    else:
        assert received.retry_after_seconds == pytest.approx(retry, abs=1e-6)


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE])
@pytest.mark.parametrize(
    "details",
    [
        "Internal error from Core (ExecuteBatchError)",
        "Stream removed",
        "Stream removed (recvmsg:Connection reset by peer (104))",
        "RST_STREAM (Received RST_STREAM with error code 2)",
        "Received RST_STREAM with error code 2",
    ],
)
def test_a_connection_that_broke_under_a_call_is_unavailable_whatever_grpc_calls_it(
    code: grpc.StatusCode, details: str
) -> None:
    assert type(typed(rpc_error(code, details))) is UnavailableError


def test_another_internal_error_is_not_taken_for_a_broken_connection() -> None:
    for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        assert typed(rpc_error(code, "something else")).code is code
    assert typed(rpc_error(grpc.StatusCode.NOT_FOUND, "Stream removed")).code is grpc.StatusCode.NOT_FOUND
    said = from_status(status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message="Stream removed"))
    assert said.code is grpc.StatusCode.INTERNAL, "a service that says so means itself"


def test_a_status_of_another_server_keeps_its_code_and_names_the_target() -> None:
    error = typed(rpc_error(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"))
    assert isinstance(error, UnavailableError)
    assert error.message == "127.0.0.1:7: failed to connect to all addresses"
    assert error.reason == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("last", "cause"),
    [
        ("Ssl handshake failed: CERTIFICATE_VERIFY_FAILED: unable to get local issuer", "(the CA file did not sign"),
        ("Hostname Verification Check failed.", "(call it by the name"),
        ("Ssl handshake failed: WRONG_VERSION_NUMBER", "(it has no TLS)"),
        ("Socket closed", "it wants TLS"),
        ("Connection refused", "Connection refused"),
    ],
)
def test_a_connection_that_does_not_come_about_names_the_likely_cause(last: str, cause: str) -> None:
    details = f"connections to all backends failing; last error: UNAVAILABLE: {last}"
    assert cause in typed(rpc_error(grpc.StatusCode.UNAVAILABLE, details)).message
    assert typed(rpc_error(grpc.StatusCode.UNAVAILABLE, last)).message.endswith(last), "a call that broke off"


def test_a_failure_without_a_text_is_named_by_its_code() -> None:
    assert typed(rpc_error(grpc.StatusCode.NOT_FOUND, None)).message == "127.0.0.1:7: NOT_FOUND"


def test_a_deadline_that_passed_on_the_clients_side_says_how_long_it_waited() -> None:
    error = typed(rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
    assert isinstance(error, DeadlineExceededError)
    assert error.message == "127.0.0.1:7: no answer within 2.5 s."


def test_a_deadline_that_the_service_reports_keeps_its_text() -> None:
    status = to_status(DeadlineExceededError("The item expired in the queue."))
    error = typed(rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, status.message, status.SerializeToString()))
    assert error.message == "The item expired in the queue."


def test_a_status_that_contradicts_the_call_is_not_believed() -> None:
    status = to_status(NotFoundError("There is none."))
    error = typed(rpc_error(grpc.StatusCode.UNAVAILABLE, "rewritten by a proxy", status.SerializeToString()))
    assert isinstance(error, UnavailableError)
    assert "rewritten by a proxy" in error.message


def test_an_oversized_message_is_not_mistaken_for_a_full_queue() -> None:
    error = typed(rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max"))
    assert isinstance(error, ResourceExhaustedError)
    assert error.reason == "RESOURCE_EXHAUSTED" and error.retry_after_seconds is None


@pytest.mark.parametrize("code", sorted(set(grpc.StatusCode) - set(BY_CODE) - {grpc.StatusCode.OK}, key=str))
def test_a_code_without_a_class_of_its_own_is_the_base_class(code: grpc.StatusCode) -> None:
    error = typed(rpc_error(code, "odd"))
    assert type(error) is TetherError and error.reason == code.name


def test_an_unknown_code_number_is_the_base_class() -> None:
    assert type(from_status(status_pb2.Status(code=99, message="odd"))) is TetherError
    assert type(from_code(99, "odd", reason="ODD", field="")) is TetherError


def test_an_items_error_names_its_field_only_where_there_is_one() -> None:
    error = from_code(3, "Is empty.", reason="EMPTY", field="items[2].response")
    assert isinstance(error, InvalidArgumentError)
    assert error.violations == (FieldViolation("items[2].response", "Is empty."),)
    assert from_code(13, "Broken.", reason="INTERNAL", field="").violations == ()


@pytest.mark.parametrize("error", [TypeError("bad type"), ValueError("Value out of range"), AttributeError("no field")])
def test_a_value_that_does_not_fit_becomes_an_error_of_its_field(error: Exception) -> None:
    with (
        pytest.raises(InvalidArgumentError, match="does not fit its type") as caught,
        request_field("items[0]"),
    ):
        raise error
    assert caught.value.violations[0].field == "items[0]"


def test_other_errors_pass_through() -> None:
    with pytest.raises(NotFoundError), request_field("items[0]"):
        raise NotFoundError("There is none.")
    with pytest.raises(KeyboardInterrupt), request_field("items[0]"):
        raise KeyboardInterrupt
