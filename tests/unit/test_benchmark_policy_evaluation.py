"""The judge of the comparison with TRL: its figures against the reward service's engine, loops and hand calculation."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks import policy_evaluation as judge_module
from benchmarks.policy_evaluation import (
    BASE,
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    PROMPTS,
    REWARD,
    TEMPERATURE,
    Judge,
    Response,
    encode,
    evaluate,
    load_classifier,
    load_judge,
    load_policy,
    response_logprobs,
    sample,
    score,
    split_prompts,
    summarise,
)
from tether_services.demo.demo import CONFIG
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.prompts import read_prompts
from tether_services.orchestrator.prompts import split_prompts as split_prompts_of_a_run
from tether_services.reward.config import RewardSettings
from tether_services.reward.engine import ScoreTask
from tether_services.reward.engines.transformers import TransformersRewardEngine
from tether_services.runtime.settings import validate

END = 2
"""The stop token of the demo policy."""
PAIRS = [([1, 400, 17, 9], [88, 300, 12, END]), ([1, 5], [600]), ([1, 77, 78], [9] * 20), ([1, 9, 8], [0, 3, 0])]
PROMPT_IDS, RESPONSES = [p for p, _ in PAIRS], [r for _, r in PAIRS]


@pytest.fixture(scope="module")
def judge() -> Judge:
    whole = load_judge()
    return Judge(whole.tokenizer, whole.reference, whole.reward, whole.prompts[:3])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter folder whose policy differs from the reference."""
    folder = tmp_path_factory.mktemp("policy") / "adapter"
    torch.manual_seed(3)
    shape = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_policy(None), shape).save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_scores_are_those_of_the_reward_service(judge: Judge) -> None:
    async def ask() -> list[Any]:
        engine = TransformersRewardEngine(str(REWARD), RewardSettings(model=str(REWARD)), field="model")
        await engine.start()
        raw = await engine.score([ScoreTask(prompt_token_ids=tuple(p), response_token_ids=tuple(r)) for p, r in PAIRS])
        scale = engine.description
        await engine.close()
        return [scale.gain * (float(value) - scale.bias) for value in raw if isinstance(value, float)]

    assert score(judge.reward, PROMPT_IDS, RESPONSES) == pytest.approx(asyncio.run(ask()), abs=1e-5)


def test_the_stop_token_is_part_of_what_is_scored(judge: Judge) -> None:
    without = score(judge.reward, PROMPT_IDS[:1], [RESPONSES[0][:-1]])
    assert abs(without[0] - score(judge.reward, PROMPT_IDS[:1], RESPONSES[:1])[0]) > 1e-3


def test_the_head_of_the_classifier_gives_the_score_and_only_it_and_the_adapter_learn() -> None:
    frozen, learning = load_classifier(), load_classifier(is_trainable=True)
    names = {name for name, parameter in learning.named_parameters() if parameter.requires_grad}
    assert {"score.weight", "score.bias"} < names
    assert all("lora_" in name for name in names - {"score.weight", "score.bias"})
    assert torch.equal(frozen.score.weight, learning.score.weight)
    scale = json.loads((REWARD / "tether_reward.json").read_text())
    assert frozen.score.bias.item() == pytest.approx(-scale["gain"] * scale["bias"])


def test_logprobs_are_those_of_a_loop_without_padding(judge: Judge) -> None:
    with torch.no_grad():
        together = response_logprobs(judge.reference, PROMPT_IDS, RESPONSES)
    for (prompt, response), logprobs in zip(PAIRS, together, strict=True):
        assert torch.allclose(logprobs, _slow_logprobs(judge.reference, prompt, response), atol=1e-4)


@torch.no_grad()
def _slow_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    found = []
    for position, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:position]])).logits[0, -1].double() / TEMPERATURE
        found.append(logits[token] - torch.logsumexp(logits, dim=0))
    return torch.stack(found).float()


def test_samples_stop_after_the_stop_token_and_at_the_limit(judge: Judge) -> None:
    torch.manual_seed(0)
    prompt_ids = encode(judge.tokenizer, judge.prompts)
    rows = sample(judge.reference, judge.tokenizer, prompt_ids * 6)
    assert all(1 <= len(row) <= MAX_RESPONSE_TOKENS and END not in row[:-1] for row in rows)
    assert all(len(row) == MAX_RESPONSE_TOKENS for row in rows if row[-1] != END)


def test_a_row_is_cut_behind_its_first_stop_token(judge: Judge) -> None:
    class Writer:
        def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
            written = torch.tensor([[7, END, 0, 0], [7, 8, 9, 10], [0, 5, END, END]])
            return torch.cat([input_ids, written], dim=1)

    assert sample(Writer(), judge.tokenizer, [[1, 4], [1], [1, 2, 3]]) == [[7, END], [7, 8, 9, 10], [0, 5, END]]


def test_the_reference_has_no_kl_to_itself_and_the_same_random_numbers_twice(judge: Judge) -> None:
    first, second = (evaluate(load_policy(None), judge, num_responses=2, seed=5) for _ in range(2))
    assert first == second
    assert first.kl_per_64_tokens == 0.0
    assert [row.prompt for row in first.responses] == [p for p in judge.prompts for _ in range(2)]
    assert first != evaluate(load_policy(None), judge, num_responses=2, seed=6)


def test_evaluation_leaves_the_callers_random_numbers_alone(judge: Judge) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    evaluate(load_policy(None), judge, num_responses=1, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_an_adapter_and_the_whole_model_merged_from_it_are_judged_alike(
    judge: Judge, adapter: Path, tmp_path: Path
) -> None:
    policy = load_policy(adapter)
    load_policy(adapter).merge_and_unload().save_pretrained(tmp_path / "whole")
    merged = load_policy(tmp_path / "whole")
    with torch.no_grad():
        pairs = [response_logprobs(model, PROMPT_IDS, RESPONSES) for model in (policy, merged, judge.reference)]
    assert torch.allclose(torch.cat(pairs[0]), torch.cat(pairs[1]), atol=1e-4)
    assert not torch.allclose(torch.cat(pairs[0]), torch.cat(pairs[2]), atol=1e-2)


def test_figures_match_a_hand_calculation() -> None:
    rows = [Response("a", "", 1.0, 2.0, 4), Response("a", "", 3.0, 4.0, 8)]
    rows += [Response("b", "", 5.0, 0.0, 8), Response("b", "", 7.0, 6.0, 12)]
    figures = summarise(rows, num_responses=2)
    assert (figures.score_mean, figures.kl_per_response, figures.response_length_mean) == (4.0, 3.0, 8.0)
    assert figures.score_std == pytest.approx(math.sqrt(5.0))
    assert figures.score_error == pytest.approx(statistics.stdev([2.0, 6.0]) / math.sqrt(2))
    assert figures.kl_per_64_tokens == pytest.approx(64 * 12 / 32)
    # Residuals of the ratio: 6 - 12 * 12/32 = 1.5 and 6 - 20 * 12/32 = -1.5, over the mean of 16 tokens a prompt.
    assert figures.kl_error == pytest.approx(64 * statistics.stdev([1.5, -1.5]) / math.sqrt(2) / 16)


def test_held_out_prompts_are_those_of_the_demo() -> None:
    values = {"model": str(BASE), "prompts": str(PROMPTS), "evaluation_count": 64, "trainer": {"learning_rate": 1e-3}}
    expected = split_prompts_of_a_run(validate(RunConfig, values), read_prompts(PROMPTS, field="prompts"), None)
    assert [list(part) for part in split_prompts()] == list(expected)
    demo = CONFIG.read_text(encoding="utf-8")
    assert f"max_prompt_tokens = {MAX_PROMPT_TOKENS}\n" in demo
    assert f"max_response_tokens = {MAX_RESPONSE_TOKENS}\n" in demo
    assert f"temperature = {TEMPERATURE}\n" in demo
    assert "evaluation_count = 64\n" in demo


def test_a_prompt_that_is_too_long_is_named(judge: Judge) -> None:
    with pytest.raises(SystemExit, match="more than 64 tokens"):
        encode(judge.tokenizer, ("word " * 100,))


def test_the_command_writes_a_row_and_the_figures_of_each_policy(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_module, "split_prompts", lambda: ((), split_prompts()[1][:4]))
    output = tmp_path / "out" / "figures.json"
    monkeypatch.setattr(judge_module, "silence_loading", lambda: None)  # it would stay silent for the other tests
    command = ["x", str(adapter), "--responses", "1", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    assert judge_module.main() == 0
    assert [line.split()[0][-7:] for line in capsys.readouterr().out.splitlines()] == ["policy", "base", "adapter"]
    assert output.read_text(encoding="utf-8").count('"prompt"') == 8


def test_a_folder_without_a_policy_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path)])
    with pytest.raises(SystemExit):
        judge_module.main()
    assert "holds neither adapter_config.json nor config.json" in capsys.readouterr().err
