"""The decoding loop against one-token-at-a-time forward passes of a tiny random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_llama import VOCAB_SIZE, write_tiny_llama
from tether_services.generator.engine import EngineCompletion, Sampling
from tether_services.generator.engines.decoding import DecodingModel, Row, decode_batch
from tether_services.generator.engines.sampling import draw_uniforms, sample_tokens, stack_sampling
from tether_services.runtime.text import ByteCodec

CPU = torch.device("cpu")
PROMPTS = [(1, 5, 9), (1,), (1, 7, 8, 9, 10, 11, 12), (3, 4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecodingModel:
    from transformers import AutoModelForCausalLM

    folder: Path = write_tiny_llama(tmp_path_factory.mktemp("model"))
    llama: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    return DecodingModel(llama, llama.config, ByteCodec(), (2,), VOCAB_SIZE, CPU)


def decode(model: DecodingModel, rows: list[Row]) -> list[EngineCompletion]:
    return decode_batch(model, rows, lambda: None)


@torch.no_grad()
def decode_slowly(model: DecodingModel, row: Row) -> EngineCompletion:
    """One row without cache, padding or neighbours."""
    tokens: list[int] = []
    logprobs: list[float] = []
    parameters = stack_sampling([row.sampling], vocab_size=model.vocab_size, device=CPU)
    uniforms = draw_uniforms([row.seed], length=row.sampling.max_tokens)
    stops = {*row.sampling.stop_token_ids, *(() if row.sampling.ignore_eos else model.stop_token_ids)}
    for step in range(row.sampling.max_tokens):
        logits = model.forward(torch.tensor([[*row.prompt_token_ids, *tokens]])).logits[:, -1]
        token, logprob = sample_tokens(logits, parameters, uniforms[:, step])
        tokens.append(int(token[0]))
        logprobs.append(float(logprob[0]))
        if tokens[-1] in stops or any(text in model.codec.decode(tokens) for text in row.sampling.stop):
            return EngineCompletion(tokens, logprobs, "stop")
    return EngineCompletion(tokens, logprobs, "length")


def assert_same(given: EngineCompletion, expected: EngineCompletion) -> None:
    assert given.token_ids == expected.token_ids
    assert given.finish_reason == expected.finish_reason
    assert given.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_mixed_batch_gives_each_row_what_it_gets_alone_without_cache_or_padding(model: DecodingModel) -> None:
    samplings = [
        Sampling(12, temperature=0.0),
        Sampling(20, temperature=0.7),
        Sampling(5, top_k=3),
        Sampling(17, temperature=1.5, top_p=0.6),
    ]
    rows = [Row(prompt, sampling, seed=i) for i, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True))]
    for given, row in zip(decode(model, rows), rows, strict=True):
        assert_same(given, decode_slowly(model, row))


@pytest.mark.parametrize("seed", range(6))
def test_rows_leave_the_batch_at_their_own_ends(model: DecodingModel, seed: int) -> None:
    rows = [
        Row(prompt, Sampling(30, stop_token_ids=(stop,)), seed=100 * seed + i)
        for i, (prompt, stop) in enumerate(zip(PROMPTS, (5, 6, 7, 8), strict=True))
    ]
    completions = decode(model, rows)
    for given, row in zip(completions, rows, strict=True):
        assert_same(given, decode_slowly(model, row))


def test_equal_prompts_need_no_mask_and_give_the_same(model: DecodingModel) -> None:
    rows = [Row((1, 5, 9), Sampling(10, ignore_eos=True), seed=i) for i in range(3)]
    completions = decode(model, rows)
    for given, row in zip(completions, rows, strict=True):
        assert_same(given, decode_slowly(model, row))
    assert len({tuple(completion.token_ids) for completion in completions}) == 3


def test_single_token_completion_has_length_one(model: DecodingModel) -> None:
    (completion,) = decode(model, [Row((1,), Sampling(1, ignore_eos=True), seed=0)])
    assert (len(completion.token_ids), len(completion.logprobs), completion.finish_reason) == (1, 1, "length")


def test_d5_stop_on_the_last_allowed_token_is_a_stop(model: DecodingModel) -> None:
    drawn = (decode_slowly(model, Row((1, 5), Sampling(4, ignore_eos=True), seed=seed)) for seed in range(50))
    seed, free = next((i, c) for i, c in enumerate(drawn) if c.token_ids[3] not in {2, *c.token_ids[:3]})
    sampling = Sampling(4, stop_token_ids=(free.token_ids[3],), ignore_eos=True)
    (completion,) = decode(model, [Row((1, 5), sampling, seed=seed)])
    assert (completion.token_ids, completion.finish_reason) == (free.token_ids, "stop")


def test_ignore_eos_passes_the_models_own_end_tokens(model: DecodingModel) -> None:
    rows = [Row((1,), Sampling(60, ignore_eos=ignore), seed=9) for ignore in (False, True)]
    rows += [Row((1,), Sampling(60), seed=seed) for seed in range(20)]
    completions = decode(model, rows)
    assert len(completions[1].token_ids) == 60
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped, "no row drew the end token; choose other seeds"
    assert all(c.token_ids[-1] == 2 and 2 not in c.token_ids[:-1] for c in stopped)


def test_stop_text_ends_a_row_and_stays(model: DecodingModel) -> None:
    free = decode_slowly(model, Row((1, 5), Sampling(40, ignore_eos=True), seed=4))
    text = ByteCodec().decode(free.token_ids)
    word = text[len(text) // 2 :][:2]
    rows = [Row((1, 5), Sampling(40, stop=(word,), stop_token_ids=()), seed=4), Row((1,), Sampling(40), seed=5)]
    given = decode(model, rows)[0]
    assert_same(given, decode_slowly(model, rows[0]))
    assert word in ByteCodec().decode(given.token_ids) or given.token_ids[-1] == 2


def test_abandoned_row_ends_at_the_next_step_and_its_neighbours_go_on(model: DecodingModel) -> None:
    rows = [Row((1, 5), Sampling(30, ignore_eos=True), seed=i) for i in range(2)]
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            rows[0].abandoned = True

    first, second = decode_batch(model, rows, count)
    assert len(first.token_ids) == 5
    assert_same(second, decode_slowly(model, rows[1]))
    assert steps == 30


def test_loop_ends_when_every_row_is_abandoned(model: DecodingModel) -> None:
    rows = [Row((1, 5), Sampling(50, ignore_eos=True), seed=i) for i in range(2)]
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        for row in rows:
            row.abandoned = True

    decode_batch(model, rows, count)
    assert steps == 1
