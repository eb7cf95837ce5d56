"""The reference engine against plain forward passes of the same model."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from tests.unit.tiny_reward import MAX_LEN, VOCABULARY, write_classifier, write_policy
from tether.errors import InvalidArgumentError
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engine import EngineDescription, LogprobTask, TaskLogprobs
from tether_services.reference.engines.transformers import TransformersReferenceEngine
from tether_services.runtime.content_hash import hash_model_folder

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("reference") / "policy")


def evaluate(
    folder: Path, tasks: Sequence[LogprobTask], **settings: object
) -> tuple[list[TaskLogprobs], EngineDescription]:
    async def main() -> tuple[list[TaskLogprobs], EngineDescription]:
        engine = TransformersReferenceEngine(ReferenceSettings.model_validate({"model": str(folder), **settings}))
        try:
            await engine.start()
            await engine.check()
            return await engine.compute_logprobs(tasks), engine.description
        finally:
            await engine.close()

    return asyncio.run(main())


def ragged_tasks(
    count: int, *, vocab_size: int, temperature: float = 1.0, include_entropies: bool = False, longest: int = 20
) -> list[LogprobTask]:
    rng = random.Random(count)

    def ids() -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, longest)))

    return [LogprobTask(ids(), ids(), temperature, include_entropies) for _ in range(count)]


@torch.no_grad()
def plain(folder: Path, task: LogprobTask) -> tuple[list[float], list[float]]:
    """Return logprobs and entropies from one unpadded forward pass, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[*task.prompt_token_ids, *task.response_token_ids]])
    table = torch.log_softmax(model(ids).logits[0].double() / task.temperature, -1)
    first = len(task.prompt_token_ids)
    rows = [table[first + offset - 1] for offset in range(len(task.response_token_ids))]
    logprobs = [float(row[token]) for row, token in zip(rows, task.response_token_ids, strict=True)]
    return logprobs, [float(-(row.exp() * row).sum()) for row in rows]


def assert_parity(folder: Path, tasks: Sequence[LogprobTask], *, tolerance: float) -> None:
    answers, _ = evaluate(folder, tasks)
    for task, answer in zip(tasks, answers, strict=True):
        logprobs, entropies = plain(folder, task)
        assert answer.ref_logprobs == pytest.approx(logprobs, abs=tolerance)
        assert answer.entropies == (pytest.approx(entropies, abs=tolerance) if task.include_entropies else [])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("include_entropies", [False, True])
def test_ragged_items_equal_a_plain_forward(policy: Path, temperature: float, include_entropies: bool) -> None:
    tasks = ragged_tasks(9, vocab_size=len(VOCABULARY), temperature=temperature, include_entropies=include_entropies)
    assert_parity(policy, tasks, tolerance=1e-5)


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260k is not there")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_trained_model_equals_a_plain_forward(temperature: float) -> None:
    story = tuple(json.loads((STORIES / "golden.json").read_text())["greedy_token_ids"])
    splits = [(0, 1, 9), (0, 40, 120), (30, 31, 32), (5, 105, 110), (0, 100, 200)]
    tasks = [LogprobTask((1, *story[a:b]), story[b:c], temperature, True) for a, b, c in splits]
    assert_parity(STORIES, tasks, tolerance=1e-5)


def test_an_item_alone_and_in_a_batch_agree(policy: Path) -> None:
    tasks = ragged_tasks(12, vocab_size=len(VOCABULARY))
    together, _ = evaluate(policy, tasks)
    for task, expected in zip(tasks, together, strict=True):
        alone, _ = evaluate(policy, [task])
        assert alone[0].ref_logprobs == pytest.approx(expected.ref_logprobs, abs=1e-5)


@pytest.mark.parametrize("forward_tokens", [1, 40, 10_000])
def test_the_size_of_a_pass_changes_neither_values_nor_order(policy: Path, forward_tokens: int) -> None:
    tasks = ragged_tasks(10, vocab_size=len(VOCABULARY))
    expected, _ = evaluate(policy, tasks)
    answers, _ = evaluate(policy, tasks, forward_tokens=forward_tokens)
    for answer, other in zip(answers, expected, strict=True):
        assert answer.ref_logprobs == pytest.approx(other.ref_logprobs, abs=1e-5)


def test_the_last_response_token_is_never_read_as_input(policy: Path) -> None:
    full = LogprobTask(tuple([3] * (MAX_LEN - 4)), (4, 5, 6, 7), 1.0, False)
    answers, _ = evaluate(policy, [full])
    logprobs, _ = plain(policy, full)
    assert answers[0].ref_logprobs == pytest.approx(logprobs, abs=1e-5)


def test_probabilities_of_all_next_tokens_sum_to_1(policy: Path) -> None:
    tasks = [LogprobTask((1, 4, 5), (token,), 0.7, False) for token in range(len(VOCABULARY))]
    answers, _ = evaluate(policy, tasks)
    total = sum(torch.tensor([answer.ref_logprobs[0] for answer in answers], dtype=torch.float64).exp().tolist())
    assert total == pytest.approx(1.0, abs=1e-5)


def test_the_description_names_model_hash_and_limits(policy: Path) -> None:
    _, description = evaluate(policy, ragged_tasks(1, vocab_size=5))
    assert description == EngineDescription(
        engine="transformers",
        base_model="policy",
        base_model_sha256=hash_model_folder(policy),
        vocab_size=len(VOCABULARY),
        max_model_len=MAX_LEN,
    )


def test_a_shorter_limit_is_taken_and_a_longer_one_refused(policy: Path) -> None:
    _, description = evaluate(policy, ragged_tasks(1, vocab_size=5), max_model_len=7)
    assert description.max_model_len == 7
    with pytest.raises(InvalidArgumentError) as caught:
        evaluate(policy, [], max_model_len=MAX_LEN + 1)
    assert caught.value.violations[0].field == "max_model_len"


def test_bfloat16_stays_near_float32(policy: Path) -> None:
    tasks = ragged_tasks(4, vocab_size=len(VOCABULARY))
    exact, _ = evaluate(policy, tasks)
    rough, _ = evaluate(policy, tasks, dtype="bfloat16")
    for one, other in zip(exact, rough, strict=True):
        assert one.ref_logprobs == pytest.approx(other.ref_logprobs, abs=0.3)
        assert one.ref_logprobs != other.ref_logprobs


def test_a_model_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=16,
        initializer_range=2.0,
        final_logit_softcapping=1.0,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="scales or caps"):
        evaluate(tmp_path, [])


@pytest.mark.parametrize("kind", ["classifier", "empty", "missing"])
def test_what_is_not_a_causal_model_names_the_setting(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    if kind == "classifier":
        write_classifier(folder)
    elif kind == "empty":
        folder.mkdir()
    with pytest.raises(InvalidArgumentError) as caught:
        evaluate(folder, [])
    assert caught.value.violations[0].field == "model"


def test_the_model_loads_in_a_thread_while_the_loop_runs(policy: Path) -> None:
    async def main() -> int:
        engine = TransformersReferenceEngine(ReferenceSettings(model=str(policy)))
        starting = asyncio.create_task(engine.start())
        ticks = 0
        while not starting.done():
            await asyncio.sleep(0.001)
            ticks += 1
        await starting
        await engine.close()
        return ticks

    assert asyncio.run(main()) > 1
