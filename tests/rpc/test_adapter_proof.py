"""What an adapter must differ from: the version before it; and what must not differ: the base from itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.rpc.adapter_files import (
    PROBE_TOKENS,
    activate,
    begin_request,
    delete_request,
    fake_adapter,
    fake_probe,
    list_adapters,
    push,
    push_fakes,
)
from tests.rpc.generator_serving import Serving, refusal, serve_generator, settings
from tests.rpc.serving import run
from tether.v1 import adapter_pb2
from tether_services.generator.engines import fake

Scenario = Callable[[Serving], Coroutine[Any, Any, None]]
LOOSE = settings(adapters={"prove_tolerance": 1.0})
"""So wide that the log-probabilities of another version, 0.3 nats away, pass as the claimed ones."""


def with_version_1(scenario: Scenario) -> None:
    """Run a scenario on a generator that has version 1 active, and accepts more than it should as claimed."""

    async def main() -> None:
        async with serve_generator(LOOSE) as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
            await scenario(serving)

    run(main())


async def push_second(serving: Serving, seed: int = 2, **changes: Any) -> adapter_pb2.CommitPushResponse:
    adapter = fake_adapter(seed)
    return await push(serving.adapters, begin_request(adapter, "run-a", 2, **changes), adapter)


def serve_version_1_for_all(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine does that takes a new adapter for one that it has loaded already."""
    engine = serving.service.engine
    original = engine._version  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "_version", lambda adapter: min(original(adapter), 1))


def test_an_adapter_that_the_engine_took_for_the_version_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(serving: Serving) -> None:
        serve_version_1_for_all(serving, monkeypatch)
        refused = await refusal(push_second(serving))
        assert (refused.reason, refused.fields) == ("SAME_AS_BEFORE", ("probes",))
        assert "differs from the version before by 0 nats" in refused.message
        assert await list_adapters(serving.adapters) == {("run-a", 1): "ACTIVE"}
        assert len(serving.stored_files()) == 2
        monkeypatch.undo()
        await push_second(serving)

    with_version_1(scenario)


@pytest.mark.parametrize(
    "push_it",
    [
        lambda serving: push_second(serving, seed=1),
        lambda serving: push_second(serving, probes=[fake_probe(1)]),
        lambda serving: push_second(serving, probes=[fake_probe(2, PROBE_TOKENS[::-1])]),
    ],
    ids=["the same weights", "the trainer saw no difference", "proofs of other tokens"],
)
def test_a_version_may_compute_what_the_one_before_does_where_nothing_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, push_it: Callable[[Serving], Coroutine[Any, Any, object]]
) -> None:
    async def scenario(serving: Serving) -> None:
        serve_version_1_for_all(serving, monkeypatch)
        await push_it(serving)
        assert (await list_adapters(serving.adapters))["run-a", 2] == "LOADED"

    with_version_1(scenario)


def test_versions_of_another_run_are_not_the_version_before(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(serving: Serving) -> None:
        serve_version_1_for_all(serving, monkeypatch)
        adapter = fake_adapter(2)
        await push(serving.adapters, begin_request(adapter, "run-b", 2), adapter)

    with_version_1(scenario)


def test_the_version_before_stays_loaded_until_it_has_been_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(serving: Serving) -> None:
        await push_fakes(serving.adapters, "run-a", [2])
        engine, reached, go_on = serving.service.engine, asyncio.Event(), asyncio.Event()
        compute = engine.compute_logprobs

        async def slow(*arguments: Any) -> list[list[float]]:
            reached.set()
            await go_on.wait()
            return await compute(*arguments)

        monkeypatch.setattr(engine, "compute_logprobs", slow)
        adapter = fake_adapter(3)
        pushing = asyncio.ensure_future(push(serving.adapters, begin_request(adapter, "run-a", 3), adapter))
        await reached.wait()
        await serving.adapters.DeleteAdapter(delete_request("run-a", 2), timeout=5)
        assert (await list_adapters(serving.adapters))["run-a", 2] == "RETIRING"
        go_on.set()
        await pushing
        await serving.service.adapters.settle()
        assert set(await list_adapters(serving.adapters)) == {("run-a", 1), ("run-a", 3)}

    with_version_1(scenario)


def test_nothing_is_proven_on_a_base_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(serving: Serving) -> None:
        original = fake.fake_logprob

        def changed(ids: Any, position: int, version: int) -> float:
            return original(ids, position, version) - (0.001 if version == 0 else 0.0)

        monkeypatch.setattr(fake, "fake_logprob", changed)
        refused = await refusal(push_second(serving))
        assert refused.reason == "BASE_CHANGED"
        assert "changed by 0.001 nats" in refused.message and "restart" in refused.message
        assert (await serving.generate()).policy_version == 1
        monkeypatch.undo()
        await push_second(serving)

    with_version_1(scenario)


def test_a_context_too_short_for_a_comparison_of_the_base_starts_all_the_same() -> None:
    async def scenario() -> None:
        async with serve_generator(settings(max_model_len=2)) as serving:
            assert (await serving.generate((1,), max_tokens=1)).policy_version == 0

    run(scenario())
