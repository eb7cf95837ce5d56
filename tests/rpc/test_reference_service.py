"""The reference service over a real loopback channel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import grpc
import grpc.aio
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rpc.serving import LOCAL, Served, failure, health, run, serving
from tests.unit.tiny_reward import MAX_LEN, VOCABULARY, write_policy
from tether.errors import InternalError, InvalidArgumentError, ResourceExhaustedError
from tether.reference import LogprobItem, ReferenceClient
from tether.v1 import reference_pb2, reference_pb2_grpc
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engine import TaskLogprobs
from tether_services.reference.engines.fake import fake_entropies, fake_ref_logprobs
from tether_services.reference.service import SERVICE_NAME, ReferenceService, check_finite
from tether_services.runtime.content_hash import hash_model_folder
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256

Scenario = Callable[[ReferenceClient, Served], Awaitable[None]]
Stub = reference_pb2_grpc.ReferenceServiceStub
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def with_reference(scenario: Scenario, **values: object) -> None:
    settings = ReferenceSettings.model_validate(LOCAL | values)

    async def main() -> None:
        async with (
            serving(settings, lambda registry: ReferenceService(settings, registry)) as served,
            ReferenceClient(served.target, timeout_seconds=20) as client,
        ):
            await scenario(client, served)

    run(main())


@torch.no_grad()
def plain(folder: Path, prompt: Sequence[int], response: Sequence[int], temperature: float) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    table = torch.log_softmax(model(torch.tensor([[*prompt, *response]])).logits[0] / temperature, -1)
    return [float(table[len(prompt) + place - 1, token]) for place, token in enumerate(response)]


def test_the_fake_answers_with_its_oracle() -> None:
    async def scenario(client: ReferenceClient, served: Served) -> None:
        items = [LogprobItem([1, 5], [7, 2]), LogprobItem([9], [3])]
        result = await client.compute_logprobs(items, temperature=0.7, include_entropies=True)
        for item, answer in zip(items, result.items, strict=True):
            tokens = item.prompt_token_ids, item.response_token_ids
            assert answer.ref_logprobs == pytest.approx(fake_ref_logprobs(*tokens), abs=1e-6)
            assert answer.entropies == pytest.approx(fake_entropies(*tokens), abs=1e-6)
        assert result.base_model_sha256 == FAKE_BASE_SHA256
        state = await client.get_reference()
        assert (state.engine, state.base_model, state.vocab_size, state.max_model_len) == ("fake", "fake", 259, 2048)
        assert state.max_items == 64

    with_reference(scenario, engine="fake")


def test_a_transformers_model_equals_a_plain_forward_at_both_temperatures(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    items = [LogprobItem([1, 4, 5], [6, 7]), LogprobItem([1], [8, 9, 10, 2]), LogprobItem([3] * 30, [4])]

    async def scenario(client: ReferenceClient, served: Served) -> None:
        state = await client.get_reference()
        assert (state.engine, state.base_model) == ("transformers", "policy")
        assert (state.vocab_size, state.max_model_len) == (len(VOCABULARY), MAX_LEN)
        assert state.base_model_sha256 == hash_model_folder(folder)
        answers = await asyncio.gather(*(client.compute_logprobs(items, temperature=t) for t in (1.0, 0.7)))
        for temperature, result in zip((1.0, 0.7), answers, strict=True):
            assert result.base_model_sha256 == state.base_model_sha256
            for item, answer in zip(items, result.items, strict=True):
                expected = plain(folder, item.prompt_token_ids, item.response_token_ids, temperature)
                assert answer.ref_logprobs == pytest.approx(expected, abs=1e-5)
                assert answer.entropies == ()

    with_reference(scenario, model=str(folder))


def test_calls_at_different_temperatures_never_share_a_batch() -> None:
    async def scenario(client: ReferenceClient, served: Served) -> None:
        items = [LogprobItem([1, 5], [7, 2])] * 3
        settings = [(1.0, False), (0.7, False), (1.0, True), (1.0, False)]
        calls = [client.compute_logprobs(items, temperature=t, include_entropies=e) for t, e in settings]
        results = await asyncio.gather(*calls)
        for (_, entropies), result in zip(settings, results, strict=True):
            assert all(bool(item.entropies) is entropies for item in result.items)
        assert served.value("tether_reference_batch_size_count") == 3
        assert served.value("tether_reference_batch_size_sum") == 12

    with_reference(scenario, engine="fake", batch={"max_delay_seconds": 0.3})


def test_an_unset_temperature_is_1(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    request = reference_pb2.ComputeLogprobsRequest(items=[{"prompt_token_ids": [1, 4], "response_token_ids": [5, 6]}])

    async def scenario(client: ReferenceClient, served: Served) -> None:
        async with grpc.aio.insecure_channel(served.target) as channel:
            response = await Stub(channel).ComputeLogprobs(request, timeout=10)
        assert list(response.items[0].ref_logprobs) == pytest.approx(plain(folder, [1, 4], [5, 6], 1.0), abs=1e-5)

    with_reference(scenario, model=str(folder))


def test_a_queue_without_room_refuses_with_a_delay() -> None:
    async def scenario(client: ReferenceClient, served: Served) -> None:
        waiting = asyncio.create_task(client.compute_logprobs([LogprobItem([1], [2])] * 2))
        while served.value("tether_reference_queue_depth") != 2:
            await asyncio.sleep(0.005)
        async with ReferenceClient(served.target, retries=False) as impatient:
            with pytest.raises(ResourceExhaustedError) as caught:
                await impatient.compute_logprobs([LogprobItem([1], [2])])
        assert caught.value.retry_after_seconds == 1.0
        assert len((await waiting).items) == 2

    with_reference(scenario, engine="fake", max_items=2, batch={"queue_limit": 2, "max_delay_seconds": 1.0})


def test_metrics_count_tokens_and_name_the_model() -> None:
    async def scenario(client: ReferenceClient, served: Served) -> None:
        await client.compute_logprobs([LogprobItem([1, 5, 6], [7, 2]), LogprobItem([9], [3])])
        assert served.value("tether_reference_tokens_total", part="prompt") == 4
        assert served.value("tether_reference_tokens_total", part="response") == 3
        assert served.value("tether_reference_model_info", base_model="fake", sha256=FAKE_BASE_SHA256) == 1
        assert served.value("tether_reference_requests_total", method="ComputeLogprobs", code="OK") == 1
        families = (
            "requests_total", "request_seconds", "queue_depth", "queue_limit", "queue_wait_seconds", "batch_size",
            "batch_tokens", "rejected_total", "tokens_total", "model_info",
        )  # fmt: skip
        assert [name for name in families if f"tether_reference_{name}" not in served.metrics()] == []

    with_reference(scenario, engine="fake")


def item(prompt: Sequence[int] = (1,), response: Sequence[int] = (2,)) -> reference_pb2.LogprobItem:
    return reference_pb2.LogprobItem(prompt_token_ids=prompt, response_token_ids=response)


def ask(*items: reference_pb2.LogprobItem, **fields: float) -> reference_pb2.ComputeLogprobsRequest:
    return reference_pb2.ComputeLogprobsRequest(items=items, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask(), "items"),
        (ask(*[item()] * 5), "items"),
        (ask(item(), item(prompt=())), "items[1].prompt_token_ids"),
        (ask(item(), item(response=())), "items[1].response_token_ids"),
        (ask(item(), item(), item(), item(response=[1] * 7 + [259])), "items[3].response_token_ids[7]"),
        (ask(item(prompt=[1, -1])), "items[0].prompt_token_ids[1]"),
        (ask(item(prompt=[2**31 - 1])), "items[0].prompt_token_ids[0]"),
        (ask(item(prompt=[1] * 2000, response=[2] * 49)), "items[0]"),
        (ask(item(response=[2] * 3000)), "items[0]"),
        (ask(item(), temperature=float("nan")), "temperature"),
        (ask(item(), temperature=float("inf")), "temperature"),
        (ask(item(), temperature=-1.0), "temperature"),
        (ask(item(), temperature=0.0), "temperature"),
        (ask(item(), temperature=0.009), "temperature"),
        (ask(item(), temperature=2.01), "temperature"),
    ],
)
def test_bad_input_names_the_field_and_the_service_goes_on(
    request_: reference_pb2.ComputeLogprobsRequest, field: str
) -> None:
    async def scenario(client: ReferenceClient, served: Served) -> None:
        async with grpc.aio.insecure_channel(served.target) as channel:
            code, violations = await failure(Stub(channel).ComputeLogprobs(request_, timeout=10))
        assert (code, [violation.field for violation in violations]) == (INVALID, [field])
        assert await health(served.target, SERVICE_NAME) == 1
        result = await client.compute_logprobs([LogprobItem([1] * 2000, [2] * 48)])
        assert len(result.items[0].ref_logprobs) == 48
        assert served.value("tether_reference_queue_depth") == 0

    with_reference(scenario, engine="fake", max_items=4)


def test_a_call_without_a_deadline_is_refused() -> None:
    async def scenario(client: ReferenceClient, served: Served) -> None:
        async with grpc.aio.insecure_channel(served.target) as channel:
            code, violations = await failure(Stub(channel).ComputeLogprobs(ask(item())))
        assert (code, violations[0].field) == (INVALID, "deadline")

    with_reference(scenario, engine="fake")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_never_sent(value: float) -> None:
    for answers in ([TaskLogprobs([-1.0, value], [])], [TaskLogprobs([-1.0], [value])]):
        with pytest.raises(InternalError) as caught:
            check_finite([TaskLogprobs([-0.5], []), *answers])
        assert (caught.value.reason, caught.value.violations[0].field) == ("NON_FINITE_LOGPROB", "items[1]")


def test_a_service_that_cannot_load_its_model_never_serves(tmp_path: Path) -> None:
    async def scenario(client: ReferenceClient, served: Served) -> None:
        raise AssertionError("it must not start")

    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgumentError) as caught:
        with_reference(scenario, model=str(tmp_path / "empty"))
    assert caught.value.violations[0].field == "model"


def test_health_answers_while_the_model_works(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")

    async def scenario(client: ReferenceClient, served: Served) -> None:
        items = [LogprobItem([1] * 20, [4] * 28)] * 64
        working = [asyncio.create_task(client.compute_logprobs(items)) for _ in range(8)]
        answered = 0
        while not all(task.done() for task in working):
            assert await health(served.target, SERVICE_NAME) == 1
            answered += 1
        assert answered > 1
        results = await asyncio.gather(*working)
        assert len({result.items[0].ref_logprobs for result in results}) == 1

    with_reference(scenario, model=str(folder))
