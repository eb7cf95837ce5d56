"""Scores any policy on the held-out prompts of the demo and measures how far it went from the reference.

    .venv/bin/python benchmarks/policy_evaluation.py runs/demo/adapters/000024 runs/trl/NAME/adapter

It imports neither tether nor TRL, so that one third program judges both. A policy is a PEFT adapter over the demo
policy, or the folder of a whole model. Every policy answers the last 64 prompts of prompts.txt with the same random
numbers, at temperature 0.7 and with at most 64 new tokens. The score is that of the demo reward model on prompt and
response ids, the stop token included where there is one. KL is the sum over response tokens of logprob - ref_logprob at
temperature 0.7.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

DEMO = Path(__file__).resolve().parents[1] / "services" / "tether_services" / "demo"
BASE, REWARD, PROMPTS = DEMO / "models" / "policy", DEMO / "models" / "reward", DEMO / "prompts.txt"
NUM_HELD_OUT = 64
MAX_PROMPT_TOKENS = 64
MAX_RESPONSE_TOKENS = 64
TEMPERATURE = 0.7
BATCH_ROWS = 64
"""Rows of a forward pass; bounds the memory that the logits take."""
LOCAL = {"local_files_only": True, "trust_remote_code": False, "dtype": torch.float32}
"""How every model is loaded."""
HEADER = f"{'policy':<48} {'score':>7} {'+-':>5} {'KL/64':>7} {'+-':>5} {'KL/resp':>8} {'length':>7}"


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a held-out prompt."""

    prompt: str
    text: str
    score: float
    kl: float
    """Summed over the response, nats, by k1."""
    num_tokens: int
    """The stop token included."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One policy on the held-out prompts."""

    score_mean: float
    score_std: float
    """Population standard deviation over responses."""
    score_error: float
    """Standard error of score_mean; the prompts are the independent draws."""
    kl_per_response: float
    kl_per_64_tokens: float
    """64 times the KL of all responses over their tokens."""
    kl_error: float
    """Standard error of kl_per_64_tokens, over prompts."""
    response_length_mean: float
    responses: tuple[Response, ...]


@dataclass(frozen=True, slots=True)
class Judge:
    """Everything a policy is judged with."""

    tokenizer: Any
    reference: Any
    reward: Any
    prompts: tuple[str, ...]


def main() -> int:
    """Evaluate the base and every policy named, one row each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("policies", nargs="*", type=Path, help="folders of PEFT adapters or whole models")
    parser.add_argument("--responses", type=int, default=8, help="answers per prompt (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers, the same for every policy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    for source in arguments.policies:
        if not any((source / name).is_file() for name in ("adapter_config.json", "config.json")):
            parser.error(f"{source} holds neither adapter_config.json nor config.json")
    torch.set_num_threads(arguments.threads)
    silence_loading()
    judge = load_judge()
    results = {}
    print(HEADER, flush=True)
    for source in (None, *arguments.policies):
        name = str(source or "base")
        evaluation = evaluate(load_policy(source), judge, num_responses=arguments.responses, seed=arguments.seed)
        results[name] = asdict(evaluation)
        print(format_row(name, evaluation), flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


def silence_loading() -> None:
    """Keep progress bars and the note about the score head, which load_classifier brings, off the table."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_judge() -> Judge:
    """Return the demo's reference and reward model with its held-out prompts."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True, trust_remote_code=False, padding_side="left")
    reward = load_classifier().requires_grad_(False)
    return Judge(tokenizer, reference=load_policy(None), reward=reward, prompts=split_prompts()[1])


def split_prompts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (training, held-out) prompts of the demo: the last 64 are held out."""
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    return tuple(lines[:-NUM_HELD_OUT]), tuple(lines[-NUM_HELD_OUT:])


def encode(tokenizer: Any, prompts: tuple[str, ...]) -> list[list[int]]:
    """Return the token ids of each prompt, the beginning-of-text token included.

    Raises:
        SystemExit: A prompt has more than MAX_PROMPT_TOKENS tokens; the demo would leave it out.
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    too_long = [prompt for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) > MAX_PROMPT_TOKENS]
    if too_long:
        raise SystemExit(f"more than {MAX_PROMPT_TOKENS} tokens: {too_long[0]!r}")
    return encoded


def load_policy(source: Path | None) -> Any:
    """Return the frozen causal model of a PEFT adapter folder, of a whole model folder, or the demo policy for None."""
    if source is not None and not (source / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(source, **LOCAL).requires_grad_(False).eval()
    base = AutoModelForCausalLM.from_pretrained(BASE, **LOCAL)
    policy = base if source is None else PeftModel.from_pretrained(base, str(source), torch_device="cpu")
    return policy.requires_grad_(False).eval()


def load_classifier(*, is_trainable: bool = False) -> Any:
    """Return the demo reward model, a sequence classifier with LoRA layers whose head gives the score itself.

    The head is one linear layer with weight gain * w and bias -gain * b, so that its output is gain * (raw - b).
    The LoRA layers and this head are the parameters that `is_trainable` lets learn.
    """
    scale = json.loads((REWARD / "tether_reward.json").read_text(encoding="utf-8"))
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1, **LOCAL)
    adapted = PeftModel.from_pretrained(base, str(REWARD), is_trainable=is_trainable, torch_device="cpu")
    classifier = adapted.get_base_model()
    weight = classifier.score.modules_to_save["default"].weight
    classifier.score = nn.Linear(weight.shape[1], 1, dtype=torch.float32)
    with torch.no_grad():
        classifier.score.weight.copy_(scale["gain"] * weight)
        classifier.score.bias.fill_(-scale["gain"] * scale["bias"])
    return classifier.eval()


@torch.inference_mode()
def evaluate(policy: Any, judge: Judge, *, num_responses: int, seed: int) -> Evaluation:
    """Return the evaluation of a policy; a pure function of its weights, `num_responses` and `seed`."""
    prompts = [text for text in judge.prompts for _ in range(num_responses)]
    prompt_ids = encode(judge.tokenizer, tuple(prompts))
    rows: list[Response] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            rows += _judge_batch(policy, judge, prompts[part], prompt_ids[part])
    return summarise(rows, num_responses=num_responses)


def _judge_batch(policy: Any, judge: Judge, prompts: list[str], prompt_ids: list[list[int]]) -> list[Response]:
    responses = sample(policy, judge.tokenizer, prompt_ids)
    scores = score(judge.reward, prompt_ids, responses)
    pairs = [response_logprobs(model, prompt_ids, responses) for model in (policy, judge.reference)]
    kls = [float((logprobs - ref_logprobs).sum()) for logprobs, ref_logprobs in zip(*pairs, strict=True)]
    texts = judge.tokenizer.batch_decode(responses, skip_special_tokens=True)
    fields = zip(prompts, texts, scores, kls, responses, strict=True)
    return [Response(prompt, text, value, kl, len(ids)) for prompt, text, value, kl, ids in fields]


def sample(policy: Any, tokenizer: Any, prompt_ids: list[list[int]]) -> list[list[int]]:
    """Return one sampled response per prompt, up to and including the stop token where it came."""
    padded = tokenizer.pad({"input_ids": prompt_ids}, return_tensors="pt", padding_side="left")
    settings = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_RESPONSE_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    output = policy.generate(**padded, generation_config=settings)
    rows: list[list[int]] = output[:, padded["input_ids"].shape[1] :].tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]


def score(reward: Any, prompt_ids: list[list[int]], responses: list[list[int]]) -> list[float]:
    """Return the score of each prompt with its response, read at the last token."""
    ids, lengths = _right_padded(prompt_ids, responses)
    hidden = reward.model(input_ids=ids, use_cache=False).last_hidden_state
    scores: Tensor = reward.score(hidden[torch.arange(len(ids)), lengths - 1])
    return [float(value) for value in scores.squeeze(-1)]


def response_logprobs(model: Any, prompt_ids: list[list[int]], responses: list[list[int]]) -> list[Tensor]:
    """Return per response the float32 log-probabilities of its tokens at TEMPERATURE, natural log."""
    ids, _ = _right_padded(prompt_ids, responses)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1] / TEMPERATURE
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    spans = [(len(p) - 1, len(p) + len(r) - 1) for p, r in zip(prompt_ids, responses, strict=True)]
    return [row[start:end] for row, (start, end) in zip(logprobs, spans, strict=True)]


def _right_padded(prompt_ids: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return ids [B, L] and lengths [B]; the models are causal, so what stands to the right changes nothing."""
    rows = [torch.tensor(p + r) for p, r in zip(prompt_ids, responses, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def summarise(rows: list[Response], *, num_responses: int) -> Evaluation:
    """Return the figures of responses that lie prompt by prompt, `num_responses` of each."""
    groups = [rows[start : start + num_responses] for start in range(0, len(rows), num_responses)]
    num_tokens = sum(row.num_tokens for row in rows)
    kl_per_token = sum(row.kl for row in rows) / num_tokens
    residuals = [sum(row.kl - kl_per_token * row.num_tokens for row in group) for group in groups]
    return Evaluation(
        score_mean=statistics.fmean(row.score for row in rows),
        score_std=statistics.pstdev(row.score for row in rows),
        score_error=_standard_error([statistics.fmean(row.score for row in group) for group in groups]),
        kl_per_response=statistics.fmean(row.kl for row in rows),
        kl_per_64_tokens=64 * kl_per_token,
        kl_error=64 * _standard_error(residuals) * len(groups) / num_tokens,
        response_length_mean=num_tokens / len(rows),
        responses=tuple(rows),
    )


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def format_row(name: str, evaluation: Evaluation) -> str:
    """Return an evaluation as a table row."""
    return (
        f"{name[-48:]:<48} {evaluation.score_mean:>7.3f} {evaluation.score_error:>5.2f} "
        f"{evaluation.kl_per_64_tokens:>7.2f} {evaluation.kl_error:>5.2f} {evaluation.kl_per_response:>8.2f} "
        f"{evaluation.response_length_mean:>7.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
