"""Every field of Generate, right and wrong, against the shipped fake engine."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tests.rpc.generator_serving import Refusal, generate_request, refusal, serve_generator, settings
from tests.rpc.serving import health, run
from tether.v1 import generator_pb2
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256, FAKE_MAX_MODEL_LEN
from tether_services.runtime.text import ByteCodec, Message

INVALID = grpc.StatusCode.INVALID_ARGUMENT
VOCAB = ByteCodec.vocab_size


def send(request: generator_pb2.GenerateRequest) -> generator_pb2.GenerateResponse:
    async def scenario() -> generator_pb2.GenerateResponse:
        async with serve_generator() as serving:
            return await serving.generator.Generate(request, timeout=10)

    return run(scenario())


def refuse(*requests: generator_pb2.GenerateRequest, **changes: Any) -> list[Refusal]:
    """Send bad requests to one server, then make sure that it still serves and is healthy."""

    async def scenario() -> list[Refusal]:
        async with serve_generator(settings(**changes)) as serving:
            refusals = [await refusal(serving.generator.Generate(request, timeout=10)) for request in requests]
            assert (await serving.generate()).completions[0].token_ids
            assert await health(serving.served.target, "tether.v1.GeneratorService") == 1
            return refusals

    return run(scenario())


def test_tokens_logprobs_and_reason_are_those_of_the_oracle() -> None:
    prompt = (1, 50, 60, 70)
    response = send(generate_request(prompt, n=3, max_tokens=40, seed=11))
    assert list(response.prompt_token_ids) == list(prompt)
    assert (response.policy_version, response.run_id, response.adapter_sha256) == (0, "", "")
    for index, completion in enumerate(response.completions):
        expected = fake_completion(prompt, Sampling(40, seed=11), 0, stream=derive_seed(11, index))
        assert list(completion.token_ids) == expected.token_ids
        assert list(completion.logprobs) == pytest.approx(expected.logprobs, abs=1e-6)
        assert completion.text == ByteCodec().decode(expected.token_ids)
        stopped = completion.finish_reason == generator_pb2.FINISH_REASON_STOP
        assert stopped == (expected.finish_reason == "stop")


def test_text_is_tokenised_with_the_beginning_of_text_token() -> None:
    request = generate_request(())
    request.prompt = "hello"
    assert list(send(request).prompt_token_ids) == ByteCodec().encode("hello", add_special_tokens=True)


def test_messages_are_rendered_as_a_conversation() -> None:
    request = generate_request(())
    request.messages.add(role="user", content="hi")
    expected = ByteCodec().encode_chat([Message("user", "hi")], add_generation_prompt=True)
    assert list(send(request).prompt_token_ids) == expected


def test_same_seed_gives_the_same_tokens_and_no_seed_gives_others() -> None:
    async def scenario() -> tuple[list[list[int]], list[list[int]]]:
        async with serve_generator() as serving:
            seeded = [await serving.generate(max_tokens=32, seed=5) for _ in range(2)]
            free = [await serving.generate(max_tokens=32, ignore_eos=True) for _ in range(2)]
            return (
                [list(response.completions[0].token_ids) for response in seeded],
                [list(response.completions[0].token_ids) for response in free],
            )

    seeded, free = run(scenario())
    assert seeded[0] == seeded[1]
    assert free[0] != free[1]


def test_completions_of_one_request_differ_and_neighbouring_seeds_share_no_stream() -> None:
    first = send(generate_request(n=4, max_tokens=32, seed=1, ignore_eos=True))
    second = send(generate_request(n=4, max_tokens=32, seed=2, ignore_eos=True))
    texts = [completion.text for response in (first, second) for completion in response.completions]
    assert len(set(texts)) == 8


def test_ignore_eos_gives_exactly_max_tokens() -> None:
    response = send(generate_request(n=8, max_tokens=200, seed=3, ignore_eos=True))
    assert [len(completion.token_ids) for completion in response.completions] == [200] * 8
    assert {completion.finish_reason for completion in response.completions} == {generator_pb2.FINISH_REASON_LENGTH}


def test_d5_stop_text_and_stop_id_end_a_completion_and_stay_in_it() -> None:
    free = send(generate_request(max_tokens=60, seed=3, ignore_eos=True)).completions[0]
    stop_id = free.token_ids[5]
    by_id = send(generate_request(max_tokens=60, seed=3, stop_token_ids=[stop_id])).completions[0]
    first = list(free.token_ids).index(stop_id)
    if ByteCodec.eos_id not in free.token_ids[: first + 1]:
        assert by_id.token_ids[-1] == stop_id
    by_text = send(generate_request(max_tokens=60, seed=3, stop=[by_id.text[-1]])).completions[0]
    assert by_text.finish_reason == generator_pb2.FINISH_REASON_STOP
    assert by_text.text.endswith(by_id.text[-1])


def test_get_generator_names_engine_base_limits_and_versions() -> None:
    async def scenario() -> generator_pb2.GetGeneratorResponse:
        async with serve_generator(settings(max_n=7, max_model_len=99, adapters={"max_rank": 5})) as serving:
            return await serving.generator.GetGenerator(generator_pb2.GetGeneratorRequest(), timeout=5)

    state = run(scenario())
    assert (state.engine, state.base_model_sha256, state.vocab_size) == ("fake", FAKE_BASE_SHA256, VOCAB)
    assert (state.max_n, state.max_model_len, state.max_lora_rank) == (7, 99, 5)
    assert list(state.stop_token_ids) == [ByteCodec.eos_id]
    assert (state.active_run_id, state.active_policy_version, list(state.loaded_policy_versions)) == ("", 0, [0])


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("n", {"n": 0}),
        ("n", {"n": -1}),
        ("n", {"n": 10_000}),
        ("policy_version", {"policy_version": -1}),
        ("run_id", {"run_id": "../../etc"}),
        ("sampling.temperature", {"temperature": float("nan")}),
        ("sampling.temperature", {"temperature": float("inf")}),
        ("sampling.temperature", {"temperature": -0.5}),
        ("sampling.temperature", {"temperature": 0.001}),
        ("sampling.temperature", {"temperature": 2.5}),
        ("sampling.top_p", {"top_p": 0.0}),
        ("sampling.top_p", {"top_p": 1.5}),
        ("sampling.top_p", {"top_p": float("nan")}),
        ("sampling.top_k", {"top_k": -1}),
        ("sampling.top_k", {"top_k": VOCAB + 1}),
        ("sampling.max_tokens", {"max_tokens": 0}),
        ("sampling.max_tokens", {"max_tokens": -3}),
        ("sampling.max_tokens", {"max_tokens": FAKE_MAX_MODEL_LEN}),
        ("sampling.max_tokens", {"max_tokens": FAKE_MAX_MODEL_LEN - 2}),
        ("sampling.seed", {"seed": -1}),
        ("sampling.stop", {"stop": ["x"] * 9}),
        ("sampling.stop[1]", {"stop": ["x", ""]}),
        ("sampling.stop[0]", {"stop": ["x" * 65]}),
        ("sampling.stop_token_ids[0]", {"stop_token_ids": [VOCAB]}),
        ("sampling.stop_token_ids", {"stop_token_ids": [1] * 65}),
        ("sampling.ignore_eos", {"ignore_eos": True, "stop": ["x"]}),
    ],
)
def test_field_out_of_range_is_named(field: str, fields: dict[str, Any]) -> None:
    (refused,) = refuse(generate_request(**fields))
    assert (refused.code, refused.fields) == (INVALID, (field,))


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
def test_token_id_out_of_vocabulary_is_named(token: int) -> None:
    (refused,) = refuse(generate_request((1, token, 2)))
    assert (refused.code, refused.fields) == (INVALID, ("prompt_token_ids[1]",))


def test_exactly_one_kind_of_prompt_is_needed() -> None:
    both = generate_request((1, 2))
    both.prompt = "hello"
    three = generate_request((1, 2))
    three.messages.add(role="user", content="hi")
    none, two, other = refuse(generate_request(()), both, three)
    assert (none.code, none.fields) == (INVALID, ("prompt",))
    assert (two.code, two.fields) == (INVALID, ("prompt_token_ids",))
    assert (other.code, other.fields) == (INVALID, ("prompt_token_ids",))


def test_unset_sampling_names_max_tokens() -> None:
    (refused,) = refuse(generator_pb2.GenerateRequest(prompt_token_ids=[1], n=1))
    assert (refused.code, refused.fields) == (INVALID, ("sampling.max_tokens",))


def test_prompt_that_fills_the_context_is_named_before_and_after_tokenising() -> None:
    long_ids = generate_request([5] * FAKE_MAX_MODEL_LEN)
    long_text = generate_request((), max_tokens=1)
    long_text.prompt = "x" * FAKE_MAX_MODEL_LEN
    absurd = generate_request((), max_tokens=1)
    absurd.prompt = "x" * (FAKE_MAX_MODEL_LEN * 64 + 1)
    refused = refuse(long_ids, long_text, absurd)
    assert [r.fields for r in refused] == [("prompt_token_ids",), ("prompt",), ("prompt",)]


def test_bad_messages_are_named() -> None:
    role, empty = generate_request(()), generate_request(())
    role.messages.add(role="root", content="hi")
    empty.messages.add(role="user", content="")
    refused = refuse(role, empty)
    assert [r.fields for r in refused] == [("messages[0].role",), ("messages[0].content",)]
    assert {r.code for r in refused} == {INVALID}


def test_huge_fields_are_refused_by_their_size_before_they_are_read() -> None:
    ids, messages = generate_request([9_999] * 500_000), generate_request(())
    messages.messages.extend([generator_pb2.ChatMessage()] * 500_000)
    refused = refuse(ids, messages)
    assert [r.fields for r in refused] == [("prompt_token_ids",), ("messages",)]  # not their first bad entry


def test_longest_prompt_and_completion_fit_exactly() -> None:
    request = generate_request([5] * 2000, max_tokens=FAKE_MAX_MODEL_LEN - 2000, ignore_eos=True)
    assert len(send(request).completions[0].token_ids) == FAKE_MAX_MODEL_LEN - 2000


def test_pins_that_cannot_be_met_are_failed_preconditions() -> None:
    version, own_run = refuse(generate_request(policy_version=3), generate_request(run_id="run-a"))
    assert (version.code, version.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VERSION_NOT_LOADED")
    assert (own_run.code, own_run.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RUN_NOT_ACTIVE")


def test_full_house_is_refused_with_a_time_to_retry_and_empties_again() -> None:
    async def scenario() -> tuple[Refusal, float, float]:
        slow = settings(fake_token_seconds=0.02, max_n=8, batch={"queue_limit": 8})
        async with serve_generator(slow) as serving:
            running = asyncio.ensure_future(serving.generate(n=6, max_tokens=20, ignore_eos=True))
            while serving.served.value("tether_generator_completions_in_flight") < 6:
                await asyncio.sleep(0.005)
            refused = await refusal(serving.generator.Generate(generate_request(n=3), timeout=5))
            fits = await serving.generate(n=2)
            await running
            assert len(fits.completions) == 2
            rejected = serving.served.value("tether_generator_rejected_total", reason="queue_full")
            return refused, rejected, serving.served.value("tether_generator_completions_in_flight")

    refused, rejected, left = run(scenario())
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert refused.retry_after_seconds and refused.retry_after_seconds > 0
    assert (rejected, left) == (3, 0)


def test_expired_call_frees_its_places() -> None:
    async def scenario() -> float:
        async with serve_generator(settings(fake_token_seconds=1.0)) as serving:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await serving.generator.Generate(generate_request(n=4), timeout=0.3)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            for _ in range(100):
                if serving.served.value("tether_generator_completions_in_flight") == 0:
                    break
                await asyncio.sleep(0.02)
            return serving.served.value("tether_generator_completions_in_flight")

    assert run(scenario()) == 0


def test_call_without_a_deadline_is_refused() -> None:
    async def scenario() -> Refusal:
        async with serve_generator() as serving:
            return await refusal(serving.generator.Generate(generate_request()))

    refused = run(scenario())
    assert (refused.code, refused.reason) == (INVALID, "DEADLINE_MISSING")


def test_both_services_are_healthy_on_both_ports() -> None:
    async def scenario() -> list[int]:
        async with serve_generator() as serving:
            names = ("tether.v1.GeneratorService", "tether.v1.AdapterService", "liveness")
            return [
                await health(target, name) for target in (serving.served.target, serving.admin_target) for name in names
            ]

    assert run(scenario()) == [1] * 6


def test_adapter_calls_are_not_served_on_the_data_port() -> None:
    from tether.v1 import adapter_pb2, adapter_pb2_grpc

    async def scenario() -> grpc.StatusCode:
        async with serve_generator() as serving, grpc.aio.insecure_channel(serving.served.target) as channel:
            stub = adapter_pb2_grpc.AdapterServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetActiveAdapter(adapter_pb2.GetActiveAdapterRequest(), timeout=5)
            return caught.value.code()

    assert run(scenario()) == grpc.StatusCode.UNIMPLEMENTED


def test_tokens_and_completions_are_counted() -> None:
    async def scenario() -> tuple[float, float, float, float]:
        async with serve_generator() as serving:
            await serving.generate((1, 2, 3), n=2, max_tokens=10, ignore_eos=True)
            value = serving.served.value
            return (
                value("tether_generator_tokens_total"),
                value("tether_generator_prompt_tokens_total"),
                value("tether_generator_completions_total", finish_reason="length"),
                value("tether_generator_requests_total", method="Generate", code="OK"),
            )

    assert run(scenario()) == (20, 3, 2, 1)
