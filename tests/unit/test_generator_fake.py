"""The fake engine is its published oracle, and a pure function."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import GenerateCall, LoadedAdapter, Sampling, derive_seed
from tether_services.generator.engines.fake import (
    FakeEngine,
    fake_completion,
    fake_logprob,
    fake_next_token,
)
from tether_services.runtime.text import ByteCodec

PROMPT = (1, 40, 50, 60)


def new_engine(**changes: object) -> FakeEngine:
    return FakeEngine(GeneratorSettings.model_validate({"engine": "fake", **changes}))


def adapter_in(folder: Path, version: int = 3, number: int = 1) -> LoadedAdapter:
    return LoadedAdapter(number, f"run-a@{version}", "run-a", version, "0" * 64, folder)


def test_completion_is_built_from_the_published_functions() -> None:
    sampling = Sampling(50, seed=4, ignore_eos=True)
    completion = fake_completion(PROMPT, sampling, 2, stream=9)
    tokens = list(PROMPT)
    for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
        tokens.append(token)
        assert fake_logprob(tokens, len(tokens) - 1, 2) == logprob
    assert len(completion.token_ids) == 50


def test_next_token_is_the_first_of_a_completion() -> None:
    for stream in range(40):
        completion = fake_completion(PROMPT, Sampling(1), 1, stream=stream)
        assert completion.token_ids == [fake_next_token(PROMPT, 1, stream)]


def test_logprobs_lie_in_their_range_and_depend_on_everything() -> None:
    base = fake_logprob(PROMPT, 3, 0)
    assert -2 < base <= -1
    assert base != fake_logprob(PROMPT, 3, 1)
    assert base != fake_logprob((2, *PROMPT[1:]), 3, 0)
    assert base != fake_logprob((*PROMPT[:3], 61), 3, 0)
    assert base == fake_logprob((*PROMPT, 99, 98), 3, 0)


def test_completions_end_at_random_and_at_stops() -> None:
    reasons = [fake_completion(PROMPT, Sampling(40), 0, stream=stream).finish_reason for stream in range(200)]
    assert 0.5 < reasons.count("stop") / 200 < 0.9
    for stream in range(20):
        completion = fake_completion(PROMPT, Sampling(40, stop=("a", "e", "i")), 0, stream=stream)
        text = ByteCodec().decode(completion.token_ids)
        assert sum(text.count(letter) for letter in "aei") <= 1


def test_engine_answers_what_the_oracle_says(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = new_engine()
        adapter = adapter_in(tmp_path)
        await engine.start()
        await engine.load_adapter(adapter)
        sampling = Sampling(20, seed=5)
        for used, version in ((None, 0), (adapter, 3)):
            completions = await engine.generate(GenerateCall(PROMPT, 3, sampling, used, 10.0))
            for index, completion in enumerate(completions):
                assert completion == fake_completion(PROMPT, sampling, version, stream=derive_seed(5, index))
            ((first, second, third),) = await engine.compute_logprobs([PROMPT], used)
            assert (first, second, third) == tuple(fake_logprob(PROMPT, i, version) for i in (1, 2, 3))
        await engine.check()
        await engine.close()

    asyncio.run(scenario())


def test_greedy_completions_are_all_the_same() -> None:
    async def scenario() -> None:
        completions = await new_engine().generate(GenerateCall(PROMPT, 3, Sampling(20, temperature=0.0), None, 10.0))
        assert completions[0] == completions[1] == completions[2]

    asyncio.run(scenario())


def test_use_of_an_unloaded_or_deleted_adapter_is_a_defect(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = new_engine()
        folder = tmp_path / "adapter"
        folder.mkdir()
        adapter = adapter_in(folder)
        with pytest.raises(RuntimeError, match="not loaded"):
            await engine.compute_logprobs([PROMPT], adapter)
        await engine.load_adapter(adapter)
        assert await engine.compute_logprobs([PROMPT], adapter)
        folder.rmdir()
        with pytest.raises(RuntimeError, match="not loaded"):
            await engine.compute_logprobs([PROMPT], adapter)
        await engine.unload_adapter(adapter)
        with pytest.raises(KeyError):
            await engine.unload_adapter(adapter)

    asyncio.run(scenario())


def test_configured_delay_is_taken_per_token() -> None:
    async def scenario() -> float:
        engine = new_engine(fake_token_seconds=0.005)
        loop = asyncio.get_running_loop()
        started = loop.time()
        await engine.generate(GenerateCall(PROMPT, 2, Sampling(20, ignore_eos=True), None, 10.0))
        return loop.time() - started

    assert 0.1 <= asyncio.run(scenario()) < 1.0
