"""Reference service and trainer agree on the same tokens; else the KL would not be 0 where the policies are equal."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny_llama import VOCAB_SIZE, new_trainer, random_samples, write_tiny_llama
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engine import LogprobTask, TaskLogprobs
from tether_services.reference.engines.transformers import TransformersReferenceEngine

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


def reference_logprobs(folder: Path, tasks: list[LogprobTask], **settings: Any) -> list[TaskLogprobs]:
    async def main() -> list[TaskLogprobs]:
        engine = TransformersReferenceEngine(ReferenceSettings(model=str(folder), **settings))
        await engine.start()
        try:
            return await engine.compute_logprobs(tasks)
        finally:
            await engine.close()

    return asyncio.run(main())


def assert_agreement(folder: Path, *, vocab_size: int, temperature: float) -> None:
    samples = random_samples(12, vocab_size=vocab_size)
    tasks = [
        LogprobTask(tuple(sample.prompt_token_ids), tuple(sample.response_token_ids), temperature, False)
        for sample in samples
    ]
    ours = reference_logprobs(folder, tasks)
    theirs = new_trainer(folder).compute_logprobs(samples, adapter="reference", temperature=temperature)
    for one, other in zip(ours, theirs, strict=True):
        assert one.ref_logprobs == pytest.approx(other.tolist(), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reference_and_trainer_with_adapters_off_agree(tmp_path: Path, temperature: float) -> None:
    assert_agreement(write_tiny_llama(tmp_path / "base"), vocab_size=VOCAB_SIZE, temperature=temperature)


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260k is not there")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_they_agree_on_a_trained_model(temperature: float) -> None:
    assert_agreement(STORIES, vocab_size=512, temperature=temperature)
