"""Messages from and to JSON, against protobuf's own parser and printer."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import InvalidArgumentError
from tether.v1 import adapter_pb2, generator_pb2, orchestrator_pb2, reference_pb2, reward_pb2
from tether_services.runtime.http.json_reading import MAX_DEPTH, MAX_STRUCTURE, check_readable, parse_json, read_message
from tether_services.runtime.http.json_writing import write_message

CANARY = "canary-7c1d"
INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
DOUBLE = st.floats(allow_nan=False)
FLOAT = st.floats(width=32, allow_nan=False)

SAMPLING = st.builds(
    generator_pb2.SamplingParams,
    temperature=st.none() | DOUBLE,
    top_k=INT32,
    stop=st.lists(TEXT, max_size=3),
    stop_token_ids=st.lists(INT32, max_size=4),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    ignore_eos=st.booleans(),
)
GENERATE = st.builds(
    generator_pb2.GenerateRequest,
    prompt=TEXT,
    messages=st.lists(st.builds(generator_pb2.ChatMessage, role=TEXT, content=TEXT), max_size=3),
    prompt_token_ids=st.lists(INT32, max_size=5),
    n=INT32,
    sampling=st.none() | SAMPLING,
    policy_version=st.none() | st.integers(-(2**63), 2**63 - 1),
)
LOGPROBS = st.builds(
    reference_pb2.ComputeLogprobsResponse,
    items=st.lists(
        st.builds(reference_pb2.ItemLogprobs, ref_logprobs=st.lists(FLOAT, max_size=4), entropies=st.lists(FLOAT)),
        max_size=3,
    ),
    base_model_sha256=TEXT,
)


def read(message: Message, raw: str | bytes) -> Any:
    read_message(raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw, message)
    return message


@given(GENERATE, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_protobuf_writes_is_read_as_it_was_under_both_names(message: Any, proto_names: bool, zeros: bool) -> None:
    raw = json_format.MessageToJson(
        message, preserving_proto_field_name=proto_names, always_print_fields_with_no_presence=zeros
    )
    assert read(generator_pb2.GenerateRequest(), raw) == message


@given(GENERATE | LOGPROBS)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_by_protobuf_as_it_was(message: Any) -> None:
    assert json_format.Parse(write_message(message), type(message)()) == message


def test_times_enums_maps_and_long_integers_are_written_by_the_mapping() -> None:
    run = orchestrator_pb2.Run(policy_version=2**60, state=orchestrator_pb2.RUN_STATE_PENDING)
    run.create_time.FromJsonString("2026-01-02T03:04:05Z")
    written = json.loads(write_message(run))
    assert written["policy_version"] == str(2**60)
    assert written["state"] == "RUN_STATE_PENDING"
    assert written["create_time"] == "2026-01-02T03:04:05Z" and "end_time" not in written
    counts = orchestrator_pb2.SampleCounts(dropped={"stale": 3})
    assert json.loads(write_message(counts))["dropped"] == {"stale": 3}


def test_numbers_that_json_lacks_are_written_as_texts() -> None:
    values = [math.nan, math.inf, -math.inf, 1.0]
    written = json.loads(write_message(reference_pb2.ItemLogprobs(ref_logprobs=values)))
    assert written["ref_logprobs"] == ["NaN", "Infinity", "-Infinity", 1.0]
    assert json.loads(write_message(reward_pb2.ItemScore(score=math.nan)))["score"] == "NaN"


def test_a_float_is_written_as_the_double_that_a_python_client_of_grpc_reads() -> None:
    message = reference_pb2.ItemLogprobs(ref_logprobs=[0.1])
    assert json.loads(write_message(message))["ref_logprobs"] == list(message.ref_logprobs) != [0.1]


def test_a_score_of_zero_is_written_but_not_beside_an_error() -> None:
    assert json.loads(write_message(reward_pb2.ItemScore()))["score"] == 0.0
    failed = reward_pb2.ItemScore(error=reward_pb2.ItemError(code=3, reason="EMPTY"))
    assert set(json.loads(write_message(failed))) == {"error"}


@pytest.mark.parametrize(
    "text",
    ['{"n":3}', '{"n":3.0}', '{"n":"3"}', '{"n":3e0}', '{"n":3,"prompt":null,"sampling":null}', ' {\n"n" : 3 } '],
)
def test_all_forms_of_an_integer_that_the_mapping_knows_are_read(text: str) -> None:
    assert read(generator_pb2.GenerateRequest(), text) == generator_pb2.GenerateRequest(n=3)


def test_a_long_run_of_digits_in_a_text_is_a_text() -> None:
    assert read(generator_pb2.GenerateRequest(), f'{{"prompt":"{"7" * 5000}","n":2}}').n == 2


def test_a_list_is_written_whole_though_in_pieces() -> None:
    for count in (0, 1, 4095, 4096, 4097, 9000):
        message = generator_pb2.Completion(token_ids=range(count))
        assert json.loads(write_message(message))["token_ids"] == list(range(count))


def test_special_numbers_are_read_from_texts_and_left_to_the_service() -> None:
    for text in ("NaN", "Infinity", "-Infinity", "1e-3"):
        message = read(reference_pb2.ComputeLogprobsRequest(), f'{{"temperature":"{text}"}}')
        assert message.temperature == float(text) or math.isnan(message.temperature)


def of(message: type[Message]) -> Any:
    return message.DESCRIPTOR


BAD = [
    ("", "MALFORMED_JSON", None),
    ("nothing", "MALFORMED_JSON", None),
    ('{"n":3', "MALFORMED_JSON", None),
    ('{"n":3,}', "MALFORMED_JSON", None),
    ("[" * 100_000, "MALFORMED_JSON", None),
    ('{"a":' * 50_000, "MALFORMED_JSON", None),
    (b'{"prompt":"\xff"}', "MALFORMED_JSON", None),
    (b"\xef\xbb\xbf{}", "MALFORMED_JSON", None),
    ('{"prompt":"\n"}', "MALFORMED_JSON", None),
    ('{"sampling":{"temperature":NaN}}', "MALFORMED_JSON", None),
    ('{"sampling":{"temperature":-Infinity}}', "MALFORMED_JSON", None),
    ('{"n":' + "9" * 5000 + "}", "MALFORMED_JSON", None),
    ('{"n":' + "9" * 80 + "}", "MALFORMED_JSON", None),
    ('{"n":' + "9" * 79 + "}", "INVALID_FIELD", "n"),
    ("[]", "WRONG_TYPE", None),
    ("3", "WRONG_TYPE", None),
    ('{"n":3,"n":4}', "DUPLICATE_FIELD", None),
    ('{"run_id":"a","runId":"b"}', "DUPLICATE_FIELD", "run_id"),
    ('{"promt":"a"}', "UNKNOWN_FIELD", "promt"),
    ('{"sampling":{"temprature":1}}', "UNKNOWN_FIELD", "sampling.temprature"),
    ('{"sampling":{"a text of somebody":1}}', "UNKNOWN_FIELD", "sampling"),
    ('{"@type":"a"}', "UNKNOWN_FIELD", None),
    ('{"n":true}', "WRONG_TYPE", "n"),
    ('{"n":1.5}', "WRONG_TYPE", "n"),
    ('{"n":"three"}', "WRONG_TYPE", "n"),
    ('{"n":[3]}', "WRONG_TYPE", "n"),
    ('{"n":2147483648}', "INVALID_FIELD", "n"),
    ('{"n":1e999999999}', "WRONG_TYPE", "n"),
    ('{"sampling":{"temperature":1e999999999}}', "INVALID_FIELD", "sampling.temperature"),
    ('{"sampling":{"temperature":"1e9999"}}', "INVALID_FIELD", "sampling.temperature"),
    ('{"sampling":{"temperature":"hot"}}', "WRONG_TYPE", "sampling.temperature"),
    ('{"sampling":{"seed":"9223372036854775808"}}', "INVALID_FIELD", "sampling.seed"),
    ('{"sampling":{"ignore_eos":1}}', "WRONG_TYPE", "sampling.ignore_eos"),
    ('{"sampling":[]}', "WRONG_TYPE", "sampling"),
    ('{"prompt":5}', "WRONG_TYPE", "prompt"),
    ('{"prompt":"\\ud800"}', "INVALID_FIELD", "prompt"),
    ('{"sampling":{"stop":["a","\\udc00"]}}', "INVALID_FIELD", "sampling.stop"),
    ('{"sampling":{"stop":["a",null]}}', "WRONG_TYPE", "sampling.stop[1]"),
    ('{"prompt_token_ids":"12"}', "WRONG_TYPE", "prompt_token_ids"),
    ('{"prompt_token_ids":[1,2,true]}', "WRONG_TYPE", "prompt_token_ids[2]"),
    ('{"promptTokenIds":[1,4294967296]}', "INVALID_FIELD", "prompt_token_ids[1]"),
    ('{"messages":[{"role":"user"},null]}', "WRONG_TYPE", "messages[1]"),
    ('{"messages":[{"role":"user"},{"content":7}]}', "WRONG_TYPE", "messages[1].content"),
]


@pytest.mark.parametrize(("raw", "reason", "field"), BAD, ids=range(len(BAD)))
def test_bad_input_is_an_invalid_argument_that_names_the_field(
    raw: str | bytes, reason: str, field: str | None
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read(generator_pb2.GenerateRequest(), raw)
    assert caught.value.reason == reason
    assert [violation.field for violation in caught.value.violations] == ([field] if field else [])


@pytest.mark.parametrize(
    "raw",
    [
        f'{{"n":"{CANARY}"}}',
        f'{{"prompt":["{CANARY}"]}}',
        f'{{"prompt":"{CANARY}',
        f'{{"the prompt is {CANARY}":1}}',
        f'{{"n":1,"n":"{CANARY}"}}',
        f"{CANARY}",
    ],
)
def test_no_error_repeats_what_the_caller_wrote(raw: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read(generator_pb2.GenerateRequest(), raw)
    assert CANARY not in str(caught.value)


def test_unknown_values_of_an_enum_are_refused_and_known_ones_read_by_name_and_number() -> None:
    for known in ('"FINISH_REASON_STOP"', "1"):
        message = read(generator_pb2.Completion(), f'{{"finish_reason":{known}}}')
        assert message.finish_reason == generator_pb2.FINISH_REASON_STOP
    for unknown in ('"FINISH_REASON_TIRED"', "17", "true", "1.0", "[]"):
        with pytest.raises(InvalidArgumentError, match="FINISH_REASON_LENGTH") as caught:
            read(generator_pb2.Completion(), f'{{"finish_reason":{unknown}}}')
        assert caught.value.reason == "UNKNOWN_ENUM_VALUE"


def test_a_float_field_takes_no_number_that_would_become_infinite() -> None:
    with pytest.raises(InvalidArgumentError, match="outside"):
        read(reference_pb2.ItemLogprobs(), '{"entropies":[1,1e39]}')
    assert read(reference_pb2.ItemLogprobs(), '{"entropies":[1,2.5]}').entropies == [1, 2.5]


def test_a_document_of_too_many_values_is_refused_before_it_is_built() -> None:
    raw = b'{"items":[' + b"[]," * MAX_STRUCTURE + b"[]]}"
    with pytest.raises(InvalidArgumentError) as caught:
        read(reward_pb2.ScoreRequest(), raw)
    assert caught.value.reason == "TOO_MANY_VALUES"


@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_the_parser_never_goes_deep(pair: str) -> None:
    """At the interpreter's own limit finalizers that the garbage collector runs meanwhile would fail as well."""

    def nested(depth: int, *, closed: bool = True) -> bytes:
        left, right = ("[", "]") if pair == "[]" else ('{"a":', "}")
        return (left * depth + ("1" if pair == "{}" else "") + (right * depth if closed else "")).encode()

    assert parse_json(nested(MAX_DEPTH)) is not None
    for document in (nested(MAX_DEPTH + 1), nested(100_000), nested(100_000, closed=False), b"[" * 500 + b"}" * 500):
        with pytest.raises(InvalidArgumentError, match="nested more than 32 deep"):
            parse_json(document)


def test_brackets_in_texts_are_no_depth() -> None:
    text = "[{" * 1000 + '\\"' + "]" * 3 + "\n\\" + "[" * 50
    document = json.dumps({"a": [{"b": text, text: []}] * 40, "c": "\\"})
    assert parse_json(document.encode()) == json.loads(document)


@given(st.recursive(st.text(alphabet='[]{}"\\a') | st.integers(0, 9), lambda inner: st.lists(inner, max_size=4)))
def test_a_document_that_is_not_deep_is_read_whatever_its_texts_are(value: Any) -> None:
    document = json.dumps({"value": value})
    assert parse_json(document.encode()) == {"value": value}


def test_messages_without_rules_for_reading_are_refused_when_the_service_starts() -> None:
    check_readable(of(generator_pb2.GenerateRequest))
    for message in (adapter_pb2.PushChunksRequest, orchestrator_pb2.StepEvent, orchestrator_pb2.WatchRunResponse):
        with pytest.raises(NotImplementedError, match=r"tether\.v1"):
            check_readable(of(message))
