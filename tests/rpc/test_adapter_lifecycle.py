"""Adapters from announcement to retirement, against a real generator with the shipped fake engine."""

from __future__ import annotations

import asyncio
import json
import uuid

import grpc

from tests.rpc.adapter_files import (
    activate,
    begin_request,
    delete_request,
    fake_adapter,
    fake_probe,
    list_adapters,
    push,
    push_fakes,
    rollback_request,
)
from tests.rpc.generator_serving import Serving, generate_request, refusal, serve_generator, settings
from tests.rpc.serving import run
from tether.v1 import adapter_pb2, generator_pb2
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion

ABORTED, NOT_FOUND = grpc.StatusCode.ABORTED, grpc.StatusCode.NOT_FOUND
FAILED, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
STAGES = ["hash", "header", "tensors", "store", "load", "prove"]
PROMPT = (1, 40, 50)


def matches_oracle(response: generator_pb2.GenerateResponse, *, seed: int = 7, max_tokens: int = 8) -> bool:
    """Whether the tokens are those of the version that the response names."""
    expected = fake_completion(
        response.prompt_token_ids,
        Sampling(max_tokens, seed=seed),
        response.policy_version,
        stream=derive_seed(seed, 0),
    )
    return list(response.completions[0].token_ids) == expected.token_ids


async def active(serving: Serving) -> tuple[str, int]:
    response = await serving.adapters.GetActiveAdapter(adapter_pb2.GetActiveAdapterRequest(), timeout=5)
    return response.run_id, response.policy_version


async def loaded(serving: Serving) -> list[int]:
    response = await serving.generator.GetGenerator(generator_pb2.GetGeneratorRequest(), timeout=5)
    return list(response.loaded_policy_versions)


def test_pushed_adapter_is_proven_stored_and_not_yet_active() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            adapter = fake_adapter(1)
            response = await push(serving.adapters, begin_request(adapter, "run-a", 1), adapter)
            assert [stage.name for stage in response.stages] == STAGES
            assert all(stage.duration_seconds >= 0 for stage in response.stages)
            assert response.mean_abs_dlogp < 1e-6
            assert response.adapter.state == adapter_pb2.ADAPTER_STATE_LOADED
            assert (response.adapter.sha256, response.adapter.rank) == (adapter.sha256, 2)
            assert response.adapter.size_bytes == len(adapter.data)
            assert response.adapter.create_time.seconds > 1_700_000_000
            assert await active(serving) == ("", 0)
            names = [str(path.relative_to(serving.service.storage.folder)) for path in serving.stored_files()]
            folder = f"versions/run-a/1-{adapter.sha256[:12]}"
            assert names == [f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors"]

    run(scenario())


def test_stored_configuration_is_rewritten_and_private() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            adapter = fake_adapter(1).with_config(tokenizer_class=None)
            await push(serving.adapters, begin_request(adapter, "run-a", 1), adapter)
            config, weights = serving.stored_files()
            assert "auto_mapping" not in json.loads(config.read_text())
            assert "base_model_name_or_path" not in json.loads(config.read_text())
            assert json.loads(config.read_text())["lora_alpha"] == 4
            assert weights.read_bytes() == adapter.weights
            assert {path.stat().st_mode & 0o777 for path in (config, weights)} == {0o600}
            assert weights.parent.stat().st_mode & 0o077 == 0

    run(scenario())


def test_activated_version_makes_the_next_responses_and_names_itself() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            (adapter,) = await push_fakes(serving.adapters, "run-a", [1])
            before = await serving.generate(seed=7)
            assert (before.policy_version, before.adapter_sha256, before.run_id) == (0, "", "")
            assert matches_oracle(before)
            switched = await activate(serving.adapters, "run-a", 1)
            assert (switched.policy_version, switched.previous_policy_version) == (1, 0)
            after = await serving.generate(seed=7)
            assert (after.policy_version, after.adapter_sha256, after.run_id) == (1, adapter.sha256, "run-a")
            assert matches_oracle(after)
            assert after.completions[0].token_ids != before.completions[0].token_ids
            assert serving.served.value("tether_policy_version", role="generator") == 1

    run(scenario())


def test_swap_back_and_forth_gives_each_version_its_own_output() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])
            outputs = []
            for version in (1, 2, 1):
                await activate(serving.adapters, "run-a", version)
                outputs.append(await serving.generate(seed=7))
            assert [response.policy_version for response in outputs] == [1, 2, 1]
            assert all(matches_oracle(response) for response in outputs)
            assert outputs[0].completions == outputs[2].completions != outputs[1].completions

    run(scenario())


def test_request_may_pin_any_loaded_version_of_the_active_run() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])
            await activate(serving.adapters, "run-a", 2)
            for version in (0, 1, 2):
                response = await serving.generate(seed=7, policy_version=version, run_id="run-a")
                assert response.policy_version == version
                assert matches_oracle(response)
            missing = await refusal(serving.generator.Generate(generate_request(policy_version=3), timeout=5))
            other = await refusal(serving.generator.Generate(generate_request(run_id="run-b"), timeout=5))
            assert (missing.code, missing.reason) == (FAILED, "VERSION_NOT_LOADED")
            assert (other.code, other.reason) == (FAILED, "RUN_NOT_ACTIVE")
            assert matches_oracle(await serving.generate(seed=7))

    run(scenario())


def test_version_of_another_run_is_not_mixed_up_with_the_active_one() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await push_fakes(serving.adapters, "run-b", [2])
            await activate(serving.adapters, "run-a", 1)
            assert await loaded(serving) == [0, 1]
            missing = await refusal(serving.generator.Generate(generate_request(policy_version=2), timeout=5))
            assert missing.reason == "VERSION_NOT_LOADED"
            await activate(serving.adapters, "run-b", 0)
            assert await loaded(serving) == [0, 2]

    run(scenario())


def test_activation_is_a_compare_and_set() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])
            await activate(serving.adapters, "run-a", 1)
            for wrong in ({"expected_policy_version": 0}, {"expected_run_id": "run-b"}, {"expected_run_id": ""}):
                refused = await refusal(activate(serving.adapters, "run-a", 2, **wrong))
                assert refused.code == ABORTED
            assert await active(serving) == ("run-a", 1)
            absent = await refusal(activate(serving.adapters, "run-a", 9))
            assert absent.code == NOT_FOUND
            assert await active(serving) == ("run-a", 1)

    run(scenario())


def test_repeated_activation_is_a_no_op_with_the_first_answer() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])
            request = adapter_pb2.ActivateAdapterRequest(
                request_id=str(uuid.uuid4()), run_id="run-a", policy_version=1, epoch=1
            )
            first = await serving.adapters.ActivateAdapter(request, timeout=5)
            assert await serving.adapters.ActivateAdapter(request, timeout=5) == first
            again = adapter_pb2.ActivateAdapterRequest()
            again.CopyFrom(request)
            again.request_id = str(uuid.uuid4())
            assert (await serving.adapters.ActivateAdapter(again, timeout=5)).policy_version == 1
            await activate(serving.adapters, "run-a", 2)
            assert await serving.adapters.ActivateAdapter(request, timeout=5) == first
            assert await active(serving) == ("run-a", 2)
            request.policy_version = 2
            reused = await refusal(serving.adapters.ActivateAdapter(request, timeout=5))
            assert (reused.code, reused.fields) == (INVALID, ("request_id",))

    run(scenario())


def test_writer_with_an_older_epoch_is_fenced_off() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])
            await activate(serving.adapters, "run-a", 1, epoch=5)
            stale = await refusal(activate(serving.adapters, "run-a", 2, epoch=4))
            assert (stale.code, stale.reason, stale.fields) == (ABORTED, "STALE_EPOCH", ("epoch",))
            assert await active(serving) == ("run-a", 1)
            await activate(serving.adapters, "run-b", 0, epoch=1)  # another run counts its own epochs
            await activate(serving.adapters, "run-a", 2, epoch=5)
            assert await active(serving) == ("run-a", 2)

    run(scenario())


def test_version_zero_makes_the_run_the_owner() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await activate(serving.adapters, "run-a", 0)
            assert await active(serving) == ("run-a", 0)
            response = await serving.generate(seed=7, run_id="run-a", policy_version=0)
            assert (response.run_id, response.policy_version, response.adapter_sha256) == ("run-a", 0, "")
            reply = await serving.adapters.GetActiveAdapter(adapter_pb2.GetActiveAdapterRequest(), timeout=5)
            assert not reply.HasField("adapter")

    run(scenario())


def test_rollback_goes_to_the_next_lower_version_and_at_last_to_the_base() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1, 4])
            await activate(serving.adapters, "run-a", 4)
            request = rollback_request("run-a", 4)
            assert (await serving.adapters.RollbackAdapter(request, timeout=5)).policy_version == 1
            assert (await serving.adapters.RollbackAdapter(request, timeout=5)).policy_version == 1
            assert await active(serving) == ("run-a", 1)
            assert (await list_adapters(serving.adapters))[("run-a", 4)] == "LOADED"
            assert (await serving.adapters.RollbackAdapter(rollback_request("run-a", 1), timeout=5)).policy_version == 0
            nothing = await refusal(serving.adapters.RollbackAdapter(rollback_request("run-a", 0), timeout=5))
            assert (nothing.code, nothing.reason) == (FAILED, "NOTHING_BELOW")
            assert serving.served.value("tether_adapter_rollback_total") == 2

    run(scenario())


def test_rollback_from_an_unexpected_state_is_aborted() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            for request in (rollback_request("run-a", 2), rollback_request("run-b", 1)):
                assert (await refusal(serving.adapters.RollbackAdapter(request, timeout=5))).code == ABORTED
            assert await active(serving) == ("run-a", 1)

    run(scenario())


def test_newest_versions_and_the_active_one_stay_and_older_ones_go() -> None:
    async def scenario() -> None:
        async with serve_generator(settings(adapters={"keep_versions": 2})) as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            await push_fakes(serving.adapters, "run-a", [2, 3, 4])
            await serving.service.adapters.settle()
            assert await loaded(serving) == [0, 1, 3, 4]
            await activate(serving.adapters, "run-a", 4)
            await serving.service.adapters.settle()
            assert await loaded(serving) == [0, 3, 4]
            folders = {path.parent.name.split("-")[0] for path in serving.stored_files()}
            assert folders == {"3", "4"}
            pinned = await refusal(serving.generator.Generate(generate_request(policy_version=1), timeout=5))
            assert pinned.reason == "VERSION_NOT_LOADED"

    run(scenario())


def test_running_request_keeps_its_retired_version_until_it_ends() -> None:
    async def scenario() -> None:
        slow = settings(fake_token_seconds=0.02, adapters={"keep_versions": 1})
        async with serve_generator(slow) as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            running = asyncio.ensure_future(serving.generate(max_tokens=30, ignore_eos=True, seed=7))
            while serving.served.value("tether_generator_completions_in_flight") < 1:
                await asyncio.sleep(0.005)
            await push_fakes(serving.adapters, "run-a", [2])
            await activate(serving.adapters, "run-a", 2)
            listed = await serving.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(), timeout=5)
            old = next(adapter for adapter in listed.adapters if adapter.policy_version == 1)
            assert old.state == adapter_pb2.ADAPTER_STATE_RETIRING
            assert old.active_request_count == 1
            new = await refusal(serving.generator.Generate(generate_request(policy_version=1), timeout=5))
            assert new.reason == "VERSION_NOT_LOADED"
            response = await running
            assert response.policy_version == 1
            expected = fake_completion(PROMPT, Sampling(30, seed=7, ignore_eos=True), 1, stream=derive_seed(7, 0))
            assert list(response.completions[0].token_ids) == expected.token_ids
            await serving.service.adapters.settle()
            assert await list_adapters(serving.adapters) == {("run-a", 2): "ACTIVE"}

    run(scenario())


def test_delete_unloads_a_version_and_a_repeat_finds_nothing() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])
            await activate(serving.adapters, "run-a", 2)
            in_use = await refusal(serving.adapters.DeleteAdapter(delete_request("run-a", 2), timeout=5))
            assert (in_use.code, in_use.reason) == (FAILED, "VERSION_ACTIVE")
            await serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5)
            repeated = await refusal(serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5))
            assert repeated.code == NOT_FOUND
            await serving.service.adapters.settle()
            assert await list_adapters(serving.adapters) == {("run-a", 2): "ACTIVE"}
            assert len(serving.stored_files()) == 2

    run(scenario())


def test_deleted_version_can_be_pushed_again_with_other_content() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await serving.adapters.DeleteAdapter(delete_request("run-a", 1), timeout=5)
            await serving.service.adapters.settle()
            other = fake_adapter(99)
            response = await push(serving.adapters, begin_request(other, "run-a", 1), other)
            assert response.adapter.sha256 == other.sha256

    run(scenario())


def test_list_is_paged_oldest_first() -> None:
    async def scenario() -> None:
        async with serve_generator(settings(adapters={"keep_versions": 5})) as serving:
            await push_fakes(serving.adapters, "run-a", [3, 1, 2])
            first = await serving.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(page_size=2), timeout=5)
            second = await serving.adapters.ListAdapters(
                adapter_pb2.ListAdaptersRequest(page_size=2, page_token=first.next_page_token), timeout=5
            )
            assert [adapter.policy_version for adapter in first.adapters] == [3, 1]
            assert [adapter.policy_version for adapter in second.adapters] == [2]
            assert second.next_page_token == ""
            for bad in ({"page_size": -1}, {"page_size": 201}, {"page_token": "x"}):
                request = adapter_pb2.ListAdaptersRequest(**bad)
                assert (await refusal(serving.adapters.ListAdapters(request, timeout=5))).code == INVALID

    run(scenario())


def test_probe_of_the_base_model_proves_an_adapter_that_changes_nothing() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            adapter = fake_adapter(1)
            # Version 1 of the fake engine always differs from its base, so the declaration is false here.
            request = begin_request(adapter, "run-a", 1, probes=[fake_probe(1)], differs_from_base=False)
            refused = await refusal(push(serving.adapters, request, adapter))
            assert (refused.code, refused.reason) == (FAILED, "DIFFERS_FROM_BASE")

    run(scenario())


def test_push_stages_sizes_and_results_are_measured() -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            (adapter,) = await push_fakes(serving.adapters, "run-a", [1])
            value = serving.served.value
            assert value("tether_adapter_push_total", result="ok") == 1
            assert value("tether_adapter_bytes") == len(adapter.data)
            for stage in STAGES:
                assert value("tether_adapter_push_duration_seconds_count", stage=stage) == 1

    run(scenario())
