"""The small parts of the chassis: addresses, checks, logs, text, status."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from google.rpc import error_details_pb2

from tether.errors import BY_CODE, FailedPreconditionError, InternalError, InvalidArgumentError, TetherError
from tether_services.runtime import checks
from tether_services.runtime.auth import check_bind_address, split_address
from tether_services.runtime.errors import as_tether_error, to_status
from tether_services.runtime.logging import JsonFormatter, log_event
from tether_services.runtime.metrics import GpuCollector, new_registry
from tether_services.runtime.text import ByteCodec, Message, check_messages


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:50051", "[::1]:80", "127.8.9.1:65535", "unix:/tmp/x"])
def test_loopback_needs_no_flag(address: str) -> None:
    check_bind_address(address, insecure=False, field="address")


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "[::]:80", "10.0.0.1:1", "example.com:80"])
def test_an_address_that_others_reach_needs_the_flag(address: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_bind_address(address, insecure=False, field="address")
    assert caught.value.reason == "INSECURE_ADDRESS"
    check_bind_address(address, insecure=True, field="address")


@pytest.mark.parametrize("address", ["", "127.0.0.1", ":80", "127.0.0.1:http", "127.0.0.1:70000"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_bind_address(address, insecure=True, field="metrics_address")
    assert caught.value.violations[0].field == "metrics_address"


def test_an_ipv6_address_splits() -> None:
    assert split_address("[::1]:50051", field="address") == ("::1", 50051)


@pytest.mark.parametrize("value", [0.01, 1, 2])
def test_temperatures_in_range_pass(value: float) -> None:
    checks.check_temperature(value, field="temperature", allow_greedy=False)


@pytest.mark.parametrize("value", [0, -1, 0.009, 2.01, float("nan"), float("inf")])
def test_temperatures_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(InvalidArgumentError):
        checks.check_temperature(value, field="temperature", allow_greedy=False)
    if value == 0:
        checks.check_temperature(value, field="temperature", allow_greedy=True)


def test_a_bad_token_id_is_named_by_index() -> None:
    checks.check_token_ids([0, 511], field="ids", vocab_size=512)
    for ids, field in (([], "ids"), ([3, 512], "ids[1]"), ([3, 4, -1], "ids[2]")):
        with pytest.raises(InvalidArgumentError) as caught:
            checks.check_token_ids(ids, field="ids", vocab_size=512)
        assert caught.value.violations[0].field == field


@pytest.mark.parametrize("name", ["a", "run-1", "0.9_b", "x" * 64])
def test_good_names_pass(name: str) -> None:
    checks.check_name(name, field="run_id")


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc", "A", "a/b", "x" * 65, "a\n", "-a", "http://x", "a\x00"])
def test_names_that_could_be_paths_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        checks.check_name(name, field="run_id")


def test_a_sha256_is_64_lower_case_hex_digits() -> None:
    checks.check_sha256("0" * 64, field="sha256")
    for bad in ("", "0" * 63, "0" * 65, "G" * 64, "A" * 64):
        with pytest.raises(InvalidArgumentError):
            checks.check_sha256(bad, field="sha256")


def test_numbers_and_texts_outside_their_range_are_refused() -> None:
    checks.check_range(1, field="n", low=1, high=4)
    checks.check_text("abc", field="prompt", max_chars=3)
    for bad in (0, 5, float("nan")):
        with pytest.raises(InvalidArgumentError):
            checks.check_range(bad, field="n", low=1, high=4)
    with pytest.raises(InvalidArgumentError):
        checks.check_text("abcd", field="prompt", max_chars=3)


def test_pages_have_a_default_size_and_refuse_foreign_tokens() -> None:
    assert checks.check_page(0, "") == (50, 0)
    assert checks.check_page(7, "14") == (7, 14)
    for size, token in ((-1, ""), (201, ""), (5, "abc"), (5, "-3"), (5, "\u00b2"), (5, "\u0663"), (5, "9" * 5000)):
        with pytest.raises(InvalidArgumentError):
            checks.check_page(size, token)


def test_a_log_line_is_one_json_object_whatever_is_in_it() -> None:
    records: list[logging.LogRecord] = []
    log = logging.getLogger("tether_services.test")
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log_event(log, "adapter\nactivated", run_id="a\n{}\x1b[31m", policy_version=3)
    log.removeHandler(handler)
    line = JsonFormatter("generator").format(records[0])
    assert "\n" not in line
    assert "\x1b" not in line
    parsed = json.loads(line)
    assert (parsed["policy_version"], parsed["run_id"], parsed["service"]) == (3, "a\n{}\x1b[31m", "generator")


def test_bytes_round_trip_through_the_byte_codec() -> None:
    codec = ByteCodec()
    text = "Zoë </s> \x00"
    ids = codec.encode(text, add_special_tokens=True)
    assert ids[0] == codec.bos_id
    assert max(ids) < codec.vocab_size
    assert codec.decode(ids) == text


def test_special_strings_in_text_are_ordinary_bytes() -> None:
    codec = ByteCodec()
    assert codec.eos_id not in codec.encode("</s>", add_special_tokens=False)


def test_a_conversation_is_rendered_with_the_turn_to_complete() -> None:
    codec = ByteCodec()
    ids = codec.encode_chat([Message("user", "hi")], add_generation_prompt=True)
    assert codec.decode(ids) == "user: hi\nassistant: "


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Message("robot", "x"), "messages[1].role"),
        (Message("user", ""), "messages[1].content"),
        (Message("user", "x" * 99), "messages"),
    ],
)
def test_a_bad_message_is_named(message: Message, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_messages([Message("user", "hi"), message], field="messages", max_chars=50)
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize("kind", list(BY_CODE.values()))
def test_every_error_becomes_a_status_with_exactly_one_reason(kind: type[TetherError]) -> None:
    status = to_status(kind("message", field="a.b"))
    reasons = [d for d in status.details if d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert len(reasons) == 1
    assert status.code == kind.code.value[0]
    assert len(kind.default_reason) <= 63


def test_foreign_errors_become_internal_and_cancellation_stays_cancellation() -> None:
    assert isinstance(as_tether_error(KeyError("x")), InternalError)
    assert as_tether_error(asyncio.CancelledError()).code.name == "CANCELLED"
    ours = FailedPreconditionError("x")
    assert as_tether_error(ours) is ours


def test_gpu_families_exist_only_where_a_gpu_is() -> None:
    families = {family.name for family in new_registry().collect()}
    has_device = GpuCollector()._nvml is not None
    assert ("tether_gpu_memory_bytes" in families) == has_device
